//! A training in small, in memory: packed sequences with a teacher's targets, a student of two layers, and what it leaves in
//! a directory. Shared by the tests of the trainer.
#![allow(dead_code)] // each test uses a part of it

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use burn::tensor::Device;
use limbeck::Result;
use limbeck::checkpoint::{CheckpointReader, checkpoint_dir};
use limbeck::data::pack;
use limbeck::eval::held_out::evaluate;
use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
use limbeck::models::llama4::{Llama4Config, shapes};
use limbeck::models::{Decoder, DecoderConfig, RandomWeights};
use limbeck::progress::Progress;
use limbeck::schedule::{LearningRate, Schedule};
use limbeck::selection::Selection;
use limbeck::targets::{DistillBatch, PackedSequence, SparseTargets, TargetSource};
use limbeck::teacher::ResidentTeacher;
use limbeck::train::balance::RouterConfig;
use limbeck::train::config::Evaluate;
use limbeck::train::metrics::{EvalMetrics, Metric, read_metrics};
use limbeck::train::order::SequenceOrder;
use limbeck::train::{TrainConfig, TrainOutput, Trainer};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub const VOCAB: usize = 96;
pub const STEPS: u64 = 12;

/// Packed sequences with a teacher's targets, in memory. Sets a flag at one of the evaluations.
pub struct Source {
    sequences: Vec<PackedSequence>,
    targets: Vec<SparseTargets>,
    evaluations: AtomicU64,
    pub stop_at: Option<(u64, Arc<AtomicBool>)>,
    /// Weights of the rows of some sequences, by number; no row has a weight where this is empty.
    pub weights: BTreeMap<u64, f32>,
}

impl Source {
    pub fn new() -> Source {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let documents: Vec<Vec<u32>> = (0..90)
            .map(|_| (0..random.random_range(2..40)).map(|_| random.random_range(0..VOCAB as u32)).collect())
            .collect();
        let sequences = pack(&documents, 32, 0);
        let teacher = random_model(scout(2, VOCAB).decoder(Path::new("teacher")).unwrap(), 5, &Device::flex());
        let teacher = ResidentTeacher::new(teacher, Selection::TopK { k: 8 }, &[1.0]).unwrap();
        let targets = teacher.with_router_layers(&[0, 1]).unwrap().targets(&sequences, 0).unwrap();
        Source { sequences, targets, evaluations: AtomicU64::new(0), stop_at: None, weights: BTreeMap::new() }
    }

    /// The first sequences alone, which a short training comes back to.
    pub fn first(mut self, count: usize) -> Source {
        self.sequences.truncate(count);
        self.targets.truncate(count);
        self
    }

    /// Asks to stop at an evaluation of the next training, counted from 1.
    pub fn stopping_at(self, evaluation: u64) -> Source {
        Source { stop_at: Some((evaluation, Arc::default())), ..self }
    }

    /// With a weight on the first sequence that some steps see, counted from 1, as [`config`] has them.
    pub fn with_weights(mut self, weights: &[(u64, f32)]) -> Source {
        let mut order = SequenceOrder::new(config().seed, self.sequence_count());
        for (step, weight) in weights {
            self.weights.insert(order.take((step - 1) * config().sequences_per_step, 1)[0], *weight);
        }
        self
    }

    /// The same text and targets, with a change to one sequence's targets.
    pub fn with_targets(mut self, number: u64, change: impl FnOnce(&mut SparseTargets)) -> Source {
        change(&mut self.targets[number as usize]);
        self
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
        let weight = |number: &u64| vec![self.weights.get(number).copied().unwrap_or(1.0); self.seq_len()];
        let row_weights = (!self.weights.is_empty()).then(|| numbers.iter().flat_map(weight).collect());
        Ok(DistillBatch { sequences, targets: Some(targets), row_weights })
    }
}

pub fn config() -> TrainConfig {
    TrainConfig {
        arm: "student".into(),
        steps: STEPS,
        sequences_per_step: 4,
        sequences_per_micro_batch: 2,
        learning_rate: LearningRate { warmup: 4, schedule: Schedule::Cosine { from: 3e-3, to: 3e-4 } },
        router: RouterConfig { balance_weight: 0.01, ..RouterConfig::default() },
        seed: 17,
        checkpoint_every: 5,
        keep_checkpoints: 10,
        log_every: 1,
        evaluate_every: 5,
        data: "the data".into(),
        ..TrainConfig::default()
    }
}

pub fn trainer(config: TrainConfig, layers: usize) -> Trainer {
    trainer_of(scout(layers, VOCAB), config, Source::new().sequence_count())
}

/// A trainer of a student over some number of sequences.
fn trainer_of(student: Llama4Config, config: TrainConfig, sequence_count: u64) -> Trainer {
    let student = student.decoder(Path::new("student")).unwrap();
    let tracked = Device::flex().autodiff();
    let student = Decoder::load(student, &RandomWeights { seed: 11, std: 0.05 }, &tracked).unwrap();
    let weighting = Weighting::Linear { from: 0.9, to: 0.5 };
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, config.steps).init().unwrap();
    Trainer::new(config, student, loss, sequence_count).unwrap()
}

/// Measures on some held-out text, and asks to stop where the source says so.
pub fn evaluation<'a>(source: &'a Source, held_out: &'a Source) -> Evaluate<'a> {
    Box::new(move |model: &Decoder| {
        let number = source.evaluations.fetch_add(1, Ordering::Relaxed) + 1;
        if let Some((last, stop)) = &source.stop_at
            && *last == number
        {
            stop.store(true, Ordering::Relaxed);
        }
        let measured = evaluate(model, held_out, 3.0, Some(64))?;
        Ok(EvalMetrics {
            arm: String::new(),
            step: 0,
            cross_entropy: measured.cross_entropy,
            perplexity: measured.perplexity,
            bits_per_byte: measured.bits_per_byte,
            kl_to_teacher: measured.kl_to_teacher,
            top1_agreement: measured.top1_agreement,
            averaged_cross_entropy: None,
            averaged_kl_to_teacher: None,
        })
    })
}

/// Trains in a directory from where it stands to the end, or until the source asks to stop.
pub fn train(dir: &Path, config: TrainConfig, source: &Source) -> Result<()> {
    train_student(dir, scout(2, VOCAB), config, source)
}

/// As [`train`], with another student.
pub fn train_student(dir: &Path, student: Llama4Config, config: TrainConfig, source: &Source) -> Result<()> {
    let mut trainer = trainer_of(student, config, source.sequence_count()).resume(dir, &Device::flex().autodiff())?;
    let held_out = Source::new();
    let output = TrainOutput {
        dir: dir.to_path_buf(),
        files: vec![("tokenizer.json".into(), b"{}".to_vec())],
        metrics: dir.join("metrics.jsonl"),
        tensorboard: None,
        progress: Progress::silent(),
        stop: source.stop_at.as_ref().map(|(_, stop)| stop.clone()).unwrap_or_default(),
        tap: None,
        evaluate: Some(evaluation(source, &held_out)),
    };
    trainer.run(source, output)
}

/// What was logged, but for the clock.
pub fn metrics(dir: &Path) -> Vec<Metric> {
    let mut metrics = read_metrics(dir.join("metrics.jsonl")).unwrap();
    for metric in &mut metrics {
        if let Metric::Step(step) = metric {
            (step.tokens_per_second, step.data_wait) = (0.0, 0.0);
        }
    }
    metrics
}

/// Compares line by line, so that a failure shows the first that differs and not all of them.
pub fn assert_same_lines(left: &[Metric], right: &[Metric]) {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).for_each(|(left, right)| assert_eq!(left, right));
}

/// Every tensor of the checkpoint of a step.
pub fn tensors(dir: &Path, step: u64) -> BTreeMap<String, Vec<f32>> {
    let reader = CheckpointReader::open(checkpoint_dir(dir, step)).unwrap();
    let load = |name: &str| reader.load_f32(name, &reader.info(name).unwrap().shape.clone()).unwrap();
    reader.names().map(|name| (name.to_string(), load(name))).collect()
}

pub fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// The largest difference of two sets of tensors, relative to a tensor's norm, and the tensor.
pub fn largest_difference(left: &BTreeMap<String, Vec<f32>>, right: &BTreeMap<String, Vec<f32>>) -> (f64, String) {
    let mut largest = (0.0, String::new());
    for (name, values) in left {
        let difference = norm(values.iter().zip(&right[name]).map(|(a, b)| *a as f64 - *b as f64));
        let relative = difference / norm(values.iter().map(|&value| value as f64)).max(1e-12);
        if relative > largest.0 {
            largest = (relative, name.clone());
        }
    }
    largest
}

/// A Scout in small: experts and normalised queries in every layer, the last layer without positions.
pub fn scout(layers: usize, vocab_size: usize) -> Llama4Config {
    Llama4Config {
        hidden_size: 32,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        intermediate_size: 24,
        intermediate_size_mlp: 48,
        num_local_experts: 4,
        moe_layers: (0..layers).collect(),
        rotary_layers: (1..=layers).map(|layer| layer < layers).collect(),
        attention_chunk_size: 16,
        max_position_embeddings: 64,
        vocab_size,
        ..shapes::tiny()
    }
}

fn random_model(config: DecoderConfig, seed: u64, device: &Device) -> Decoder {
    Decoder::load(config, &RandomWeights { seed, std: 0.25 }, device).unwrap()
}

/// Every file below a directory, by its path inside it; links are not followed.
pub fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() {
                pending.push(path);
            } else if kind.is_file() {
                found.insert(path.strip_prefix(directory).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    found
}
