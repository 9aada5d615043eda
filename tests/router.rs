//! From a recipe to a student whose routers follow the teacher's: what the cache has of them, what a run does with it, and what
//! is refused.

mod small_run;

use burn::tensor::Device;
use limbeck::cache::{CacheReader, RouterSettings};
use limbeck::models::{Decoder, TokenLayout};
use limbeck::targets::{DistillBatch, TargetSource};
use limbeck::train::metrics::{Metric, StepMetrics, read_metrics};
use limbeck::{distill, precompute};
use small_run::*;

const KEPT: &str = "cache.router_layers=[1, 0]";
const SHORT: [&str; 3] = ["train.steps=6", "train.lr.warmup=0", "train.checkpoint_every=3"];

fn logged(run_dir: &std::path::Path, arm: &str) -> Vec<StepMetrics> {
    let lines = read_metrics(run_dir.join("metrics.jsonl")).unwrap().into_iter();
    let steps = lines.filter_map(|line| match line {
        Metric::Step(step) if step.arm == arm => Some(step),
        _ => None,
    });
    steps.collect()
}

#[test]
fn a_cache_has_the_probabilities_that_the_teachers_routers_give() {
    let small = SmallRun::new();
    let caches = precompute::run(&small.recipe(&[KEPT]), &small.options("run")).unwrap();
    let cache = CacheReader::open(caches.join("train")).unwrap();
    let settings = cache.manifest().settings.clone();
    assert_eq!(settings.router(), Some(&RouterSettings { layers: vec![1, 0], experts: 4 }));
    // Nothing is learnt from held-out text.
    assert_eq!(CacheReader::open(caches.join("held_out")).unwrap().manifest().settings.router(), None);

    let teacher = Decoder::open(&small.path("teacher"), &Device::flex()).unwrap();
    let mut largest = 0.0f64;
    for number in 0..cache.sequence_count() {
        let batch = cache.read(&[number]).unwrap();
        let (sequence, codes) = (batch.sequences[0].clone(), batch.targets.unwrap().router.unwrap());
        let alone = DistillBatch { sequences: vec![sequence.clone()], targets: None, row_weights: None };
        let (_, routings) = teacher.forward(&TokenLayout::of_batch(&teacher.config, &alone));
        for (column, layer) in [1, 0].into_iter().enumerate() {
            let logits = routings[layer].logits.clone().into_data().try_into_vec::<f32>().unwrap();
            for row in (0..32).filter(|row| sequence.is_valid(*row)) {
                let exp: Vec<f64> = logits[row * 4..row * 4 + 4].iter().map(|&z| (z as f64).exp()).collect();
                let weights: Vec<f64> = codes.weights(row, column).map(f64::from).collect();
                let (exp_sum, sum) = (exp.iter().sum::<f64>(), weights.iter().sum::<f64>());
                for (exp, weight) in exp.iter().zip(&weights) {
                    let (p, found) = (exp / exp_sum, weight / sum);
                    largest = largest.max((p - found).abs());
                }
            }
        }
    }
    // A root is off by a 510th, and the sum with it.
    assert!((1e-5..5e-3).contains(&largest), "a probability is off by {largest}");
    let said = limbeck(&["inspect".as_ref(), caches.join("train").as_os_str()]).stdout;
    assert!(said.contains("routers     of layers 1, 0, with 4 experts each"), "{said}");
}

#[test]
fn a_student_follows_and_its_control_does_not() {
    let small = SmallRun::new();
    let follows = [KEPT, "loss.router={ weight = 0.5, layers = [[0, 0], [1, 1]] }"];
    let recipe = small.recipe(&[&follows[..], &SHORT].concat());
    let report = distill::run(&recipe, &small.options("run")).unwrap();
    let (student, control) = (logged(&small.path("run"), "student"), logged(&small.path("run"), "control"));
    assert!(student.iter().all(|step| step.router_kl.is_some_and(|kl| kl > 0.0)));
    assert!(control.iter().all(|step| step.router_kl.is_none()));
    // The step's loss has it, at its weight.
    for step in &student {
        let parts = step.soft_weight * step.soft_loss.unwrap() + step.hard_weight * step.hard_loss;
        let routers = 0.001 * step.aux_loss.unwrap() + 0.5 * step.router_kl.unwrap();
        assert!((step.loss - parts - routers).abs() < 1e-5, "{step:?}");
    }
    assert!(report.html().contains("Routers against the teacher"), "the report shows it");
    // A student that was stopped goes on; one whose routers follow otherwise does not.
    let other =
        small.recipe(&[&follows[..1], &["loss.router={ weight = 0.25, layers = [[0, 0], [1, 1]] }"], &SHORT].concat());
    let error = distill::run(&other, &small.options("run")).unwrap_err().to_string();
    assert!(error.contains("`router.follow.weight` of the run"), "{error}");

    // The cache alone is enough: neither teacher nor text.
    let train = format!("cache.train={}", small.path("run/cache/train").display());
    let text: String = RECIPE.split_inclusive('\n').filter(|line| kept_beside_a_cache(line)).collect();
    std::fs::write(small.path("recipe.toml"), text).unwrap();
    let recipe = small.recipe(&[&[&train[..], "control.enabled=false", follows[1]], &SHORT[..]].concat());
    distill::run(&recipe, &small.options("alone")).unwrap();
    let alone = logged(&small.path("alone"), "student");
    assert!((alone[0].router_kl.unwrap() - student[0].router_kl.unwrap()).abs() < 1e-9);
    let recipe = || small.limbeck("distill", &["--set", &train, "--set", "loss.router.layers=[[0, 2]]", "--dry-run"]);
    let expected =
        "names the teacher's layer 2, whose router the cache does not keep; the cache has those of layers [1, 0]";
    assert!(recipe().stderr.contains(expected), "{}", recipe().stderr);
}

/// Lines of the recipe that say nothing which a finished cache says.
fn kept_beside_a_cache(line: &str) -> bool {
    let answered = ["sources", "tokens", "seq_len", "held_out", "[teacher]", "checkpoint =", "batch_tokens = 96"];
    let of_cache = ["top_k", "temperatures", "sequences_per_shard", "evaluate_every"];
    !answered.iter().chain(&of_cache).any(|word| line.starts_with(word))
}

#[test]
fn routers_that_are_not_there_are_refused_before_anything_is_computed() {
    let small = SmallRun::new();
    let message = |overrides: &[&str]| {
        let words: Vec<&str> = overrides.iter().flat_map(|word| ["--set", word]).chain(["--dry-run"]).collect();
        let outcome = small.limbeck("distill", &words);
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        outcome
            .stderr
            .split("`cache.router_layers` ")
            .last()
            .unwrap()
            .split("`loss.router.")
            .last()
            .unwrap()
            .trim()
            .to_string()
    };
    assert_eq!(
        message(&["cache.router_layers=[0, 2]"]),
        "cannot be had: layer 2 has no routed experts; layers with experts are 0, 1"
    );
    assert_eq!(
        message(&[KEPT, "loss.router={ layers = [[2, 0]] }"]),
        "layers` cannot be had: layer 2 has no routed experts; layers with experts are 0, 1"
    );
    assert_eq!(
        message(&[KEPT, "loss.router={ layers = [[0, 0]] }", "student.shape.experts=8"]),
        "layers` pairs routers of 8 experts with the teacher's of 4; give the student at most as many, or remove loss.router"
    );
    let dense = "student.shape={ like = \"llama\", layers = 1, hidden = 32, heads = 4 }";
    assert_eq!(
        message(&[KEPT, "loss.router={ layers = [[0, 0]] }", dense]),
        "layers` cannot be had: layer 0 has no routed experts; this model has none in any layer; leave its routers out"
    );
}

#[test]
fn a_student_of_some_of_the_teachers_experts_follows_what_is_said_of_those() {
    let small = SmallRun::new();
    let overrides = [
        KEPT,
        "loss.router={ layers = [[0, 1]] }",
        "student.shape={ like = \"scout\" }",
        "student.init={ from = \"teacher\", layers = [1], experts = 2 }",
        "control.enabled=false",
    ];
    std::fs::copy(small.path("tokenizer/tokenizer.json"), small.path("teacher/tokenizer.json")).unwrap();
    distill::run(&small.recipe(&[&overrides[..], &SHORT].concat()), &small.options("run")).unwrap();
    let steps = logged(&small.path("run"), "student");
    // Its router begins as the teacher's rows for experts 0 and 3, on hidden states of its own.
    assert!(steps.iter().all(|step| step.router_kl.unwrap().is_finite()));
}
