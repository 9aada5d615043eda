//! What the quick start ships is what it says: a teacher that predicts text it never saw, and a recipe that runs.

use std::{path::PathBuf, process::Command};

use burn::tensor::Device;
use limbeck::{
    cache::CacheReader,
    checkpoint::CheckpointReader,
    data::{DataConfig, DataLoader, DataSource},
    loss::{DistillLossConfig, Divergence, Weighting},
    models::{Decoder, TokenLayout},
    targets::DistillBatch,
    tokenizer::Tokenizer,
    train::metrics::{Metric, read_metrics},
};

fn quickstart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart")
}

#[test]
fn the_bundled_teacher_predicts_text_it_never_saw() {
    let tokenizer = Tokenizer::open(&quickstart().join("tokenizer")).unwrap();
    let model = Decoder::open(&quickstart().join("teacher"), &Device::flex()).unwrap();
    assert_eq!(model.config.vocab_size, tokenizer.vocab_size());
    let source = DataSource::new(quickstart().join("text/validation.jsonl").to_string_lossy());
    let mut loader = DataLoader::new(&DataConfig::new(vec![source], 256), &tokenizer).unwrap();
    let sequences = (0..8).map(|_| loader.next_sequence().unwrap().unwrap()).collect();
    let batch = DistillBatch { sequences, targets: None, row_weights: None };
    let layout = TokenLayout::of_batch(&model.config, &batch);
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(Weighting::hard_only(), 1).init().unwrap();
    let (hidden, routings) = model.forward(&layout);
    let output = loss.forward(0, hidden, model.lm_head(), &batch).unwrap();
    let cross_entropy = output.hard.sum / output.token_count as f64;
    assert!(cross_entropy < 4.0, "{cross_entropy} nats a token; a uniform guess is 7.6");
    for (block, routing) in routings.iter().enumerate() {
        let used = routing.loads().iter().filter(|&&load| load > 0).count();
        assert!(used >= routing.expert_count() / 2, "block {block} uses {used} of its experts");
    }
}

#[test]
fn the_bundled_teacher_fits_the_repository() {
    let reader = CheckpointReader::open(quickstart().join("teacher")).unwrap();
    assert!(reader.byte_count() <= 25_000_000, "{} bytes", reader.byte_count());
    // It and its text are for the student's eyes only through the soft targets.
    let text = |name: &str| std::fs::read_to_string(quickstart().join("text").join(name)).unwrap();
    let (student, held_out) = (text("student.jsonl"), text("held_out.jsonl"));
    assert!(student.lines().all(|line| !held_out.contains(line)), "a document is on both sides");
}

/// A sample of each quick-start recipe: a few steps on a little text, from the recipe file to the report.
#[test]
fn quick_start_recipes_run_from_text_to_report() {
    for (recipe, kept) in [("scout", 32), ("maverick", 32)] {
        let folder = tempfile::tempdir().unwrap();
        let held_out = folder.path().join("held_out.jsonl");
        let text = std::fs::read_to_string(quickstart().join("text/held_out.jsonl")).unwrap();
        let document: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        let start: String = document["text"].as_str().unwrap().chars().take(4000).collect();
        std::fs::write(&held_out, serde_json::json!({ "text": start }).to_string()).unwrap();
        let run_dir = folder.path().join("run");
        let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
            .args(["distill", quickstart().join(format!("{recipe}.toml")).to_str().unwrap(), "--run-dir"])
            .arg(&run_dir)
            .args(["--set", "data.tokens=4096", "--set", "train.steps=6", "--set", "train.lr.warmup=2"])
            .args(["--set", "control.lr.warmup=2"])
            .args(["--set", &format!("data.held_out=[{{ path = {held_out:?} }}]")])
            .output()
            .unwrap();
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{stderr}");
        for word in ["student", "control", "teacher", "report.html"] {
            assert!(stdout.contains(word), "{recipe}: no {word} in {stdout}");
        }
        let cache = CacheReader::open(run_dir.join("cache/train")).unwrap();
        let counts = &cache.manifest().counts;
        assert_eq!(counts.sequences, 32);
        assert_eq!(counts.kept_ids, counts.valid_rows * kept);
        let report = limbeck::eval::report::Report::read(run_dir.join("report.json")).unwrap();
        assert_eq!(report.arms.len(), 3);
        assert!(report.arms.iter().all(|arm| arm.evaluation.cross_entropy.is_finite()));
    }
}

/// The quick start with the codec that takes longest to decode: its targets are there before a step asks for them.
#[test]
fn the_quick_start_does_not_wait_for_its_data() {
    let folder = tempfile::tempdir().unwrap();
    let run_dir = folder.path().join("run");
    let output = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(["distill", quickstart().join("scout.toml").to_str().unwrap(), "--run-dir"])
        .arg(&run_dir)
        .args(["--set", "data.tokens=12288", "--set", "train.steps=16", "--set", "train.lr.warmup=2"])
        .args(["--set", "control.lr.warmup=2", "--set", "cache.codec=compact"])
        .args(["--set", "train.log_every=1"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (mut waited, mut seconds) = (0.0, 0.0);
    for metric in read_metrics(run_dir.join("metrics.jsonl")).unwrap() {
        let Metric::Step(step) = metric else { continue };
        assert!((0.0..=1.0).contains(&step.data_wait), "{step:?}");
        // There is nothing to hide the first batch behind.
        if step.step > 1 {
            let took = (step.tokens_seen / step.step) as f64 / step.tokens_per_second;
            (waited, seconds) = (waited + step.data_wait * took, seconds + took);
        }
    }
    // Ten times what it takes on a quiet machine (docs/performance.md): others may be using this one.
    assert!(seconds > 0.0 && waited < 0.05 * seconds, "waited for {waited} s of {seconds} s");
}
