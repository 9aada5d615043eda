//! Training is the same to the last bit whether it was interrupted or not, and the same but for rounding however a
//! step is cut into micro-batches.

mod small_training;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use limbeck::Error;
use limbeck::checkpoint::checkpoint_dir;
use limbeck::models::llama4::Llama4Config;
use limbeck::schedule::{LearningRate, Schedule};
use limbeck::train::TrainConfig;
use limbeck::train::metrics::Metric;
use limbeck::train::optimizer::OptimizerConfig;
use small_training::*;

#[test]
fn an_interrupted_training_goes_on_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let each_step = || TrainConfig { evaluate_every: 1, ..config() };
    train(&whole, each_step(), &Source::new()).unwrap();

    // At the end of step 7, and again of the third step after that.
    for (evaluation, stopped_at) in [(7, 7), (3, 10)] {
        let source = Source::new().stopping_at(evaluation);
        let error = train(&parts, each_step(), &source).unwrap_err();
        let Error::Interrupted { saved } = &error else { panic!("{error}") };
        assert_eq!(*saved, checkpoint_dir(&parts, stopped_at));
        assert_eq!(error.exit_code(), 130);
    }
    train(&parts, each_step(), &Source::new()).unwrap();

    let lines = metrics(&whole);
    assert_eq!(lines.len(), 2 * STEPS as usize, "every step, and an evaluation after each");
    assert_same_lines(&metrics(&parts), &lines);
    // Weights, moments, shares of the experts, counts: all that a run goes on from.
    let (whole, parts) = (files(&checkpoint_dir(&whole, STEPS)), files(&checkpoint_dir(&parts, STEPS)));
    assert!(whole.len() >= 6 && whole.keys().eq(parts.keys()));
    for (path, bytes) in &whole {
        assert!(*bytes == parts[path], "{} is not the same", path.display());
    }
}

#[test]
fn a_training_that_died_goes_on_from_its_last_checkpoint_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, died) = (folder.path().join("whole"), folder.path().join("died"));
    train(&whole, config(), &Source::new()).unwrap();
    // What a process killed in step 9 leaves: the checkpoint of step 5, lines up to step 8 and a torn one.
    train(&died, config(), &Source::new()).unwrap();
    for step in [10, 12] {
        fs::remove_dir_all(checkpoint_dir(&died, step)).unwrap();
    }
    let text = fs::read_to_string(died.join("metrics.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(died.join("metrics.jsonl"), lines[..9].join("\n") + "\n" + &lines[9][..20]).unwrap();
    train(&died, config(), &Source::new()).unwrap();
    assert_same_lines(&metrics(&died), &metrics(&whole));
    let last = |dir: &Path| files(&checkpoint_dir(dir, STEPS));
    assert!(last(&died) == last(&whole));
}

/// Wide enough that every product, the loss and the update are divided among the threads.
#[test]
fn training_gives_the_same_bits_on_any_number_of_threads() {
    let student = || Llama4Config {
        hidden_size: 96,
        head_dim: 24,
        intermediate_size: 80,
        intermediate_size_mlp: 160,
        ..scout(2, 3 * 1024 + 40)
    };
    let folder = tempfile::tempdir().unwrap();
    let on = |threads: usize| {
        let dir = folder.path().join(threads.to_string());
        let config = TrainConfig { steps: 3, sequences_per_step: 16, sequences_per_micro_batch: 8, ..config() };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| train_student(&dir, student(), config, &Source::new())).unwrap();
        (metrics(&dir), files(&checkpoint_dir(&dir, 3)))
    };
    let (lines, checkpoint) = on(1);
    for threads in [2, 3] {
        let found = on(threads);
        assert_same_lines(&found.0, &lines);
        for (path, bytes) in &checkpoint {
            assert!(*bytes == found.1[path], "{} is not the same on {threads} threads", path.display());
        }
    }
}

#[test]
fn micro_batches_change_the_weights_by_rounding_alone() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, sequences_per_micro_batch| {
        let dir = folder.path().join(name);
        train(&dir, TrainConfig { sequences_per_micro_batch, ..config() }, &Source::new()).unwrap();
        (tensors(&dir, STEPS), metrics(&dir))
    };
    let (whole, whole_lines) = run("whole", 4);
    // Halves, and a last micro-batch that is smaller than the others.
    for (name, sequences) in [("halves", 2), ("uneven", 3)] {
        let (cut, lines) = run(name, sequences);
        let (relative, tensor) = largest_difference(&whole, &cut);
        assert!(relative <= 1e-6, "{name}: {tensor} differs by {relative:e} of its norm");
        for (one, other) in whole_lines.iter().zip(&lines) {
            let (Metric::Step(one), Metric::Step(other)) = (one, other) else { continue };
            assert!((one.loss - other.loss).abs() < 1e-5, "step {}: {} and {}", one.step, one.loss, other.loss);
            assert_eq!((one.tokens_seen, &one.expert_load), (other.tokens_seen, &other.expert_load));
        }
    }
}

#[test]
fn going_on_with_other_settings_is_refused_naming_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let source = Source::new().stopping_at(3);
    train(dir, TrainConfig { evaluate_every: 1, ..config() }, &source).unwrap_err();
    let before = files(dir);
    let refusal = |config: TrainConfig, layers: usize| {
        let error = trainer(config, layers).resume(dir, &Device::flex().autodiff()).err().expect("it is refused");
        assert!(matches!(error, Error::Mismatch { .. }) && error.exit_code() == 1);
        error.to_string()
    };
    let expected = |key: &str, theirs: &str, mine: &str| {
        format!(
            "`{key}` of the run differs: {} has {theirs}, this run has {mine}; go back to the settings the run began with, \
             or start afresh with another --run-dir",
            checkpoint_dir(dir, 3).display()
        )
    };
    assert_eq!(refusal(TrainConfig { seed: 18, ..config() }, 2), expected("seed", "17", "18"));
    assert_eq!(refusal(TrainConfig { steps: 13, ..config() }, 2), expected("steps", "12", "13"));
    let other = TrainConfig { data: "other data".into(), ..config() };
    assert_eq!(refusal(other, 2), expected("data", "the data", "other data"));
    let wider = TrainConfig { sequences_per_step: 8, ..config() };
    assert_eq!(refusal(wider, 2), expected("sequences_per_step", "4", "8"));
    let faster = LearningRate { schedule: Schedule::Cosine { from: 6e-3, to: 3e-4 }, ..config().learning_rate };
    let faster = TrainConfig { learning_rate: faster, ..config() };
    assert_eq!(refusal(faster, 2), expected("learning_rate.schedule.from", "0.003", "0.006"));
    let decayed = OptimizerConfig { weight_decay: 0.0, ..config().optimizer };
    let decayed = TrainConfig { optimizer: decayed, ..config() };
    assert_eq!(refusal(decayed, 2), expected("optimizer.weight_decay", "0.1", "0.0"));
    assert_eq!(refusal(config(), 3), expected("student.moe_layers", "[0,1]", "[0,1,2]"));
    assert!(files(dir) == before, "a refusal changes nothing");

    // How a step is cut, and when something is written, may change.
    let freely = TrainConfig { sequences_per_micro_batch: 4, checkpoint_every: 0, log_every: 3, ..config() };
    train(dir, freely, &Source::new()).unwrap();
}
