//! A student's training step, on targets that are made up.

use std::time::Instant;

use burn::tensor::Device;
use limbeck::{
    Result,
    loss::{DistillLossConfig, Divergence, Weighting},
    models::{Decoder, DecoderConfig, RandomWeights},
    schedule::{LearningRate, Schedule},
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind, TargetSource},
    train::{TrainConfig, Trainer, balance::RouterConfig},
};

use super::{median, take_turns};

/// Sequences with random but well-formed targets.
struct MadeUp {
    batch: DistillBatch,
}

impl TargetSource for MadeUp {
    fn sequence_count(&self) -> u64 {
        self.batch.sequences.len() as u64
    }
    fn seq_len(&self) -> usize {
        self.batch.seq_len()
    }
    fn read(&self, _: &[u64]) -> Result<DistillBatch> {
        Ok(self.batch.clone())
    }
}

pub fn student(
    config: DecoderConfig,
    batch: usize,
    sequence: usize,
    top_k: usize,
    steps: usize,
    turns: bool,
) -> Result<()> {
    let vocab = config.vocab_size as u32;
    let id = |n: usize| (n as u32).wrapping_mul(2_654_435_761) % vocab;
    let sequences: Vec<PackedSequence> = (0..batch)
        .map(|number| PackedSequence {
            tokens: (0..=sequence).map(|t| id(number * 1000 + t)).collect(),
            segments: vec![0; sequence + 1],
        })
        .collect();
    let rows = batch * sequence;
    let kept = 0.8f32 / top_k as f32;
    let targets = SparseTargets {
        offsets: (0..=rows as u64).map(|row| row * top_k as u64).collect(),
        ids: (0..rows * top_k)
            .map(|n| ((n % top_k) as u32 * (vocab / top_k as u32) + (n / top_k) as u32) % vocab)
            .collect(),
        captures: vec![Capture {
            temperature: 1.0,
            log_probs: vec![kept.ln(); rows * top_k],
            log_tail: vec![0.2f32.ln(); rows],
            label_log_prob: vec![-3.0; rows],
        }],

        kind: TargetKind::Exact,
        log_normalizer: None,
    };
    let source = MadeUp { batch: DistillBatch { sequences, targets: Some(targets), row_weights: None } };
    let weighting = Weighting::Constant { soft: 0.5 };
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, 1).init()?;
    let model = Decoder::load(config, &RandomWeights { seed: 1, std: 0.02 }, &Device::flex().autodiff())?;
    let train = TrainConfig {
        arm: "student".into(),
        steps: if turns { 1 << 20 } else { steps as u64 + 2 },
        sequences_per_step: batch as u64,
        sequences_per_micro_batch: batch as u64,
        learning_rate: LearningRate { warmup: 0, schedule: Schedule::Constant { value: 1e-4 } },
        router: RouterConfig { balance_weight: 0.001, ..RouterConfig::default() },
        seed: 1,
        checkpoint_every: 0,
        keep_checkpoints: 0,
        log_every: 0,
        evaluate_every: 0,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(train, model, loss, batch as u64)?;
    trainer.train_step(&source)?;
    if turns {
        return take_turns(|_| trainer.train_step(&source).map(drop));
    }
    let seconds = (0..steps).map(|_| {
        let began = Instant::now();
        trainer.train_step(&source).map(|_| began.elapsed().as_secs_f64())
    });
    let rate = rows as f64 / median(seconds.collect::<Result<_>>()?);
    println!(
        "{{\"bench\": \"student\", \"batch\": {batch}, \"sequence\": {sequence}, \"top_k\": {top_k}, \"tokens_per_second\": {rate:.0}}}"
    );
    Ok(())
}
