//! What a run may be asked for beside its loss: recomputed activations, a running mean of the weights, balance without a loss.

mod small_training;

use std::collections::BTreeMap;

use burn::tensor::Device;
use limbeck::checkpoint::checkpoint_dir;
use limbeck::models::Decoder;
use limbeck::schedule::{LearningRate, Schedule};
use limbeck::train::TrainConfig;
use limbeck::train::balance::RouterConfig;
use limbeck::train::metrics::{EvalMetrics, Metric};
use limbeck::train::router::{RouterDistillation, RouterPair};
use limbeck::train::trainer::AVERAGE_DIR;
use small_training::*;

/// The balance loss, the z-loss, a selection bias and a router that follows the teacher's, with weights at which each is felt.
fn routed() -> RouterConfig {
    let follow = Some(following(0.2, &[(1, 0)]));
    RouterConfig { balance_weight: 0.05, z_weight: 0.01, bias_rate: 0.02, bias_release: 0.25, follow }
}

/// Routers of the student that follow those of the teacher's layers, by their places.
fn following(weight: f64, pairs: &[(usize, usize)]) -> RouterDistillation {
    let pairs = pairs.iter().map(|&(block, column)| RouterPair { block, column }).collect();
    RouterDistillation { weight, pairs, experts: vec![0, 1, 2, 3] }
}

/// A rate at which routers move in a dozen steps.
fn following_config(follow: Option<RouterDistillation>) -> TrainConfig {
    let router = RouterConfig { follow, ..RouterConfig::default() };
    let learning_rate = LearningRate { warmup: 2, schedule: Schedule::Constant { value: 1e-2 } };
    TrainConfig { router, learning_rate, evaluate_every: 0, ..config() }
}

fn router_kls(lines: &[Metric]) -> Vec<Option<f64>> {
    let steps = lines.iter().filter_map(|line| match line {
        Metric::Step(step) => Some(step.router_kl),
        _ => None,
    });
    steps.collect()
}

#[test]
fn routers_that_follow_the_teachers_come_closer_to_them() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, follow| {
        let dir = folder.path().join(name);
        train(&dir, following_config(follow), &Source::new()).unwrap();
        router_kls(&metrics(&dir))
    };
    let both = [(0, 0), (1, 1)];
    let (pulled, watched) = (run("pulled", Some(following(2.0, &both))), run("watched", Some(following(1e-6, &both))));
    let value = |kls: &[Option<f64>], step: usize| kls[step].unwrap();
    assert!((value(&pulled, 0) / value(&watched, 0) - 1.0).abs() < 1e-9, "the same weights in the first step");
    let last = |kls: &[Option<f64>]| (9..12).map(|step| value(kls, step)).sum::<f64>() / 3.0;
    assert!(last(&pulled) < 0.8 * last(&watched), "{} of {} nats are left", last(&pulled), last(&watched));
    assert!(run("free", None).iter().all(Option::is_none));
    // A run does not go on with routers that follow in another way.
    let config = following_config(Some(following(1.0, &both)));
    let error = train(&folder.path().join("pulled"), config, &Source::new()).unwrap_err().to_string();
    assert!(error.contains("`router.follow.weight` of the run"), "{error}");
}

#[test]
fn the_pull_on_routers_does_not_depend_on_how_a_step_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let run = |size: u64| {
        let dir = folder.path().join(size.to_string());
        let config = TrainConfig { router: routed(), sequences_per_micro_batch: size, evaluate_every: 0, ..config() };
        // Masked rows have no part in it.
        train(&dir, config, &Source::new().with_weights(&[(1, 0.0), (2, 0.5)])).unwrap();
        (tensors(&dir, STEPS), router_kls(&metrics(&dir)))
    };
    let ((whole, whole_kls), (cut, cut_kls)) = (run(4), run(1));
    let (relative, tensor) = largest_difference(&whole, &cut);
    assert!(relative <= 1e-4, "{tensor} differs by {relative:e} of its norm");
    for (whole, cut) in whole_kls.iter().zip(&cut_kls) {
        assert!((whole.unwrap() - cut.unwrap()).abs() < 1e-4, "{whole:?} {cut:?}");
    }
}

#[test]
fn recomputed_layers_give_the_weights_that_kept_ones_give() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, checkpoint_activations| {
        let dir = folder.path().join(name);
        let config = TrainConfig { router: routed(), checkpoint_activations, ..config() };
        train(&dir, config, &Source::new()).unwrap();
        (tensors(&dir, STEPS), metrics(&dir))
    };
    let ((kept, kept_lines), (again, again_lines)) = (run("kept", false), run("again", true));
    let (relative, tensor) = largest_difference(&kept, &again);
    assert!(relative <= 1e-6, "{tensor} differs by {relative:e} of its norm");
    for (kept, again) in kept_lines.iter().zip(&again_lines) {
        let (Metric::Step(kept), Metric::Step(again)) = (kept, again) else { continue };
        assert!((kept.loss - again.loss).abs() < 1e-5 && (kept.grad_norm - again.grad_norm).abs() < 1e-5);
        assert_eq!(kept.expert_load, again.expert_load);
        assert!((kept.router_kl.unwrap() - again.router_kl.unwrap()).abs() < 1e-6);
    }
}

#[test]
fn the_running_mean_follows_the_weights_and_is_a_model_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let config =
        TrainConfig { average: Some(0.8), checkpoint_every: 1, keep_checkpoints: 20, evaluate_every: 4, ..config() };
    let start: BTreeMap<String, Vec<f32>> = {
        let (mut model, mut found) = (trainer(config.clone(), 2).model(), BTreeMap::new());
        model.visit(&mut |name, parameter| {
            found.insert(name.to_string(), parameter.flat().into_data().try_into_vec::<f32>().unwrap());
        });
        found
    };
    train(dir, config, &Source::new()).unwrap();
    let mut mean: BTreeMap<String, Vec<f64>> =
        start.into_iter().map(|(name, values)| (name, values.into_iter().map(f64::from).collect())).collect();
    for step in 1..=STEPS {
        let decay = 0.8f64.min((1 + step) as f64 / (10 + step) as f64);
        for (name, weight) in tensors(dir, step) {
            let mean = mean.get_mut(&name).unwrap();
            mean.iter_mut()
                .zip(weight)
                .for_each(|(mean, weight)| *mean = decay * *mean + (1.0 - decay) * weight as f64);
        }
    }
    // Beside the weights of a checkpoint, in the form of any checkpoint.
    let model = checkpoint_dir(dir, STEPS).join(AVERAGE_DIR);
    let mut averaged = Decoder::open(&model, &Device::flex()).unwrap();
    averaged.visit(&mut |name, parameter| {
        let found = parameter.flat().into_data().try_into_vec::<f32>().unwrap();
        let difference = norm(found.iter().zip(&mean[name]).map(|(a, b)| *a as f64 - b));
        assert!(difference <= 1e-6 * norm(mean[name].iter().copied()).max(1e-3), "{name}: {difference:e}");
    });
    assert!(model.join("tokenizer.json").is_file(), "it can be used as it is");
    let evaluations: Vec<EvalMetrics> = metrics(dir)
        .into_iter()
        .filter_map(|line| match line {
            Metric::Evaluation(line) => Some(line),
            _ => None,
        })
        .collect();
    assert_eq!(evaluations.len(), 3);
    for line in evaluations {
        let averaged = line.averaged_cross_entropy.unwrap();
        assert!(averaged.is_finite() && averaged != line.cross_entropy && line.averaged_kl_to_teacher.is_some());
    }
}

/// The largest share that an expert has, averaged over blocks, over the last steps.
fn busiest(lines: &[Metric]) -> f64 {
    let shares = lines.iter().filter_map(|line| match line {
        Metric::Step(step) if step.step > STEPS - 6 => {
            let largest = |load: &Vec<f32>| load.iter().fold(0.0f32, |a, &b| a.max(b)) as f64;
            Some(step.expert_load.iter().map(largest).sum::<f64>() / step.expert_load.len() as f64)
        }
        _ => None,
    });
    shares.sum::<f64>() / 6.0
}

#[test]
fn a_bias_alone_evens_the_load_and_is_gone_from_what_is_exported() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, bias_rate| {
        let dir = folder.path().join(name);
        let router = RouterConfig { bias_rate, bias_release: 0.0, ..RouterConfig::default() };
        train(&dir, TrainConfig { router, evaluate_every: 0, ..config() }, &Source::new()).unwrap();
        busiest(&metrics(&dir))
    };
    let (without, with) = (run("without", 0.0), run("with", 0.01));
    assert!(
        with < without - 0.03,
        "the busiest of 4 experts has {with:.3} of the tokens, and {without:.3} without a bias"
    );
    // What is written is a model of the family, which has no such bias; a run that goes on has it.
    let (plain, biased) = (tensors(&folder.path().join("without"), STEPS), tensors(&folder.path().join("with"), STEPS));
    assert!(plain.keys().eq(biased.keys()));
    let state = std::fs::read_to_string(checkpoint_dir(folder.path().join("with"), STEPS).join("train_state.json"));
    let state: serde_json::Value = serde_json::from_str(&state.unwrap()).unwrap();
    assert_eq!(state["values"]["expert_biases"].as_array().unwrap().len(), 2);
}
