//! Training is the same to the last bit whether it was interrupted or not, and the same but for rounding however a
//! step is cut into micro-batches.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::Device;
use limbeck::checkpoint::{CheckpointReader, checkpoint_dir};
use limbeck::data::pack;
use limbeck::eval::held_out::evaluate;
use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
use limbeck::models::{Decoder, RandomWeights};
use limbeck::progress::Progress;
use limbeck::schedule::{LearningRate, Schedule};
use limbeck::selection::Selection;
use limbeck::targets::{DistillBatch, PackedSequence, SparseTargets, TargetSource};
use limbeck::teacher::ResidentTeacher;
use limbeck::train::metrics::{EvalMetrics, Metric, read_metrics};
use limbeck::train::optimizer::OptimizerConfig;
use limbeck::train::{TrainConfig, TrainOutput, Trainer};
use limbeck::{Error, Result};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use small_run::*;

const VOCAB: usize = 96;
const STEPS: u64 = 12;

/// Packed sequences with a teacher's targets, in memory. Sets a flag at one of the evaluations.
struct Source {
    sequences: Vec<PackedSequence>,
    targets: Vec<SparseTargets>,
    evaluations: AtomicU64,
    stop_at: Option<(u64, Arc<AtomicBool>)>,
}

impl Source {
    fn new() -> Source {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let documents: Vec<Vec<u32>> = (0..90)
            .map(|_| (0..random.random_range(2..40)).map(|_| random.random_range(0..VOCAB as u32)).collect())
            .collect();
        let sequences = pack(&documents, 32, 0);
        let teacher = random_model(scout(2, VOCAB).decoder(Path::new("teacher")).unwrap(), 5, &Device::flex());
        let targets =
            ResidentTeacher::new(teacher, Selection::TopK { k: 8 }, &[1.0]).unwrap().targets(&sequences, 0).unwrap();
        Source { sequences, targets, evaluations: AtomicU64::new(0), stop_at: None }
    }
}

impl TargetSource for Source {
    fn sequence_count(&self) -> u64 {
        self.sequences.len() as u64
    }

    fn seq_len(&self) -> usize {
        32
    }

    fn read(&self, numbers: &[u64]) -> Result<DistillBatch> {
        let sequences = numbers.iter().map(|&number| self.sequences[number as usize].clone()).collect();
        let mut targets = SparseTargets::empty(&[1.0]);
        numbers.iter().for_each(|&number| targets.extend(&self.targets[number as usize]));
        Ok(DistillBatch { sequences, targets: Some(targets), row_weights: None })
    }
}

fn config() -> TrainConfig {
    TrainConfig {
        arm: "student".into(),
        steps: STEPS,
        sequences_per_step: 4,
        sequences_per_micro_batch: 2,
        learning_rate: LearningRate { warmup: 4, schedule: Schedule::Cosine { from: 3e-3, to: 3e-4 } },
        optimizer: OptimizerConfig { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, clip_norm: 1.0 },
        router_aux_weight: 0.01,
        seed: 17,
        checkpoint_every: 5,
        keep_checkpoints: 10,
        log_every: 1,
        evaluate_every: 5,
        data: "the data".into(),
    }
}

fn trainer(config: TrainConfig, layers: usize) -> Trainer {
    let student = scout(layers, VOCAB).decoder(Path::new("student")).unwrap();
    let tracked = Device::flex().autodiff();
    let student = Decoder::load(student, &RandomWeights { seed: 11, std: 0.05 }, &tracked).unwrap();
    let weighting = Weighting::Linear { from: 0.9, to: 0.5 };
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, config.steps).init().unwrap();
    Trainer::new(config, student, loss, Source::new().sequence_count())
}

/// Trains in a directory from where it stands to the end, or until the source asks to stop.
fn train(dir: &Path, config: TrainConfig, source: &Source) -> Result<()> {
    let mut trainer = trainer(config, 2).resume(dir, &Device::flex().autodiff())?;
    let held_out = Source::new();
    let output = TrainOutput {
        dir: dir.to_path_buf(),
        files: vec![("tokenizer.json".into(), b"{}".to_vec())],
        metrics: dir.join("metrics.jsonl"),
        progress: Progress::silent(),
        stop: source.stop_at.as_ref().map(|(_, stop)| stop.clone()).unwrap_or_default(),
        tap: None,
        evaluate: Some(Box::new(|model: &Decoder| {
            let number = source.evaluations.fetch_add(1, Ordering::Relaxed) + 1;
            if let Some((last, stop)) = &source.stop_at
                && *last == number
            {
                stop.store(true, Ordering::Relaxed);
            }
            let measured = evaluate(model, &held_out, 3.0, Some(64))?;
            Ok(EvalMetrics {
                arm: String::new(),
                step: 0,
                cross_entropy: measured.cross_entropy,
                perplexity: measured.perplexity,
                bits_per_byte: measured.bits_per_byte,
                kl_to_teacher: measured.kl_to_teacher,
                top1_agreement: measured.top1_agreement,
            })
        })),
    };
    trainer.run(source, output)
}

/// What was logged, but for the clock.
fn metrics(dir: &Path) -> Vec<Metric> {
    let mut metrics = read_metrics(dir.join("metrics.jsonl")).unwrap();
    for metric in &mut metrics {
        if let Metric::Step(step) = metric {
            (step.tokens_per_second, step.data_wait) = (0.0, 0.0);
        }
    }
    metrics
}

/// Compares line by line, so that a failure shows the first that differs and not all of them.
fn assert_same_lines(left: &[Metric], right: &[Metric]) {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).for_each(|(left, right)| assert_eq!(left, right));
}

#[test]
fn an_interrupted_training_goes_on_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    let each_step = || TrainConfig { evaluate_every: 1, ..config() };
    train(&whole, each_step(), &Source::new()).unwrap();

    // At the end of step 7, and again of the third step after that.
    for (evaluation, stopped_at) in [(7, 7), (3, 10)] {
        let source = Source { stop_at: Some((evaluation, Arc::default())), ..Source::new() };
        let error = train(&parts, each_step(), &source).unwrap_err();
        let Error::Interrupted { saved } = &error else { panic!("{error}") };
        assert_eq!(*saved, checkpoint_dir(&parts, stopped_at));
        assert_eq!(error.exit_code(), 130);
    }
    train(&parts, each_step(), &Source::new()).unwrap();

    let lines = metrics(&whole);
    assert_eq!(lines.len(), 2 * STEPS as usize - 1, "every step, and an evaluation after each but the last");
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

/// Every tensor of a checkpoint.
fn tensors(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let reader = CheckpointReader::open(checkpoint_dir(dir, STEPS)).unwrap();
    let load = |name: &str| reader.load_f32(name, &reader.info(name).unwrap().shape.clone()).unwrap();
    reader.names().map(|name| (name.to_string(), load(name))).collect()
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

#[test]
fn micro_batches_change_the_weights_by_rounding_alone() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, sequences_per_micro_batch| {
        let dir = folder.path().join(name);
        train(&dir, TrainConfig { sequences_per_micro_batch, ..config() }, &Source::new()).unwrap();
        (tensors(&dir), metrics(&dir))
    };
    let (whole, whole_lines) = run("whole", 4);
    // Halves, and a last micro-batch that is smaller than the others.
    for (name, sequences) in [("halves", 2), ("uneven", 3)] {
        let (cut, lines) = run(name, sequences);
        for (tensor, values) in &whole {
            let difference = norm(values.iter().zip(&cut[tensor]).map(|(a, b)| *a as f64 - *b as f64));
            let relative = difference / norm(values.iter().map(|&value| value as f64));
            assert!(relative <= 1e-6, "{name}: {tensor} differs by {relative:e} of its norm");
        }
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
    let source = Source { stop_at: Some((3, Arc::default())), ..Source::new() };
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
