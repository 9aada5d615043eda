//! Made-up hidden states, heads and targets, and what an f64 loop says of their loss.

#![allow(dead_code)] // each test file uses a part of it

use std::sync::Arc;

use limbeck_kernels::{
    fused_linear_distill::{LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights},
    oracle::{self, KeptRow},
};

pub fn random(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (next() + next() + next() - 1.5) * scale).collect()
}

/// Targets of rows whose teacher logits are given, rounded to what a cache keeps.
pub fn targets(
    teacher: &[f32],
    vocab: usize,
    k: usize,
    labels: Vec<u32>,
    temperature: f32,
) -> (RowTargets, Vec<KeptRow>) {
    let mut targets = RowTargets { labels, offsets: vec![0], ..RowTargets::default() };
    let mut kept_rows = vec![];
    for (logits, &label) in teacher.chunks(vocab).zip(&targets.labels) {
        let label = if label == NO_LABEL { 0 } else { label };
        let mut kept = oracle::top_k(logits, k, label, temperature as f64);
        for value in &mut kept.log_probs {
            *value = *value as f32 as f64;
        }
        kept.log_tail = kept.log_tail as f32 as f64;
        targets.ids.extend(&kept.ids);
        targets.log_probs.extend(kept.log_probs.iter().map(|&value| value as f32));
        targets.log_tail.push(kept.log_tail as f32);
        targets.offsets.push(targets.ids.len());
        kept_rows.push(kept);
    }
    (targets, kept_rows)
}

pub fn weigh(_: usize, _: &RowMeasures) -> RowWeights {
    RowWeights { soft: 0.7, hard: 0.3 }
}

pub struct Truth {
    pub soft: Vec<f64>,
    pub hard: Vec<f64>,
    pub loss: f64,
    /// `[T, V]`
    pub logits_grad: Vec<f64>,
    pub soft_gradient_square: Vec<f64>,
    pub hard_gradient_square: Vec<f64>,
}

pub fn truth(logits: &[f64], vocab: usize, targets: &RowTargets, kept: &[KeptRow], settings: &LossSettings) -> Truth {
    let mut truth = Truth {
        soft: vec![],
        hard: vec![],
        loss: 0.0,
        logits_grad: vec![],
        soft_gradient_square: vec![],
        hard_gradient_square: vec![],
    };
    let square = |gradient: &[f64], factor: f64| gradient.iter().map(|g| (g * factor).powi(2)).sum::<f64>();
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let soft = oracle::divergence(settings.divergence, logits, &kept[row], settings.temperature as f64);
        let factor = settings.soft_factor();
        let mut gradient: Vec<f64> = soft.logits_grad.iter().map(|g| 0.7 * factor * g).collect();
        truth.loss += 0.7 * factor * soft.value;
        truth.soft_gradient_square.push(square(&soft.logits_grad, factor));
        truth.soft.push(soft.value);
        let label = targets.labels[row];
        if label == NO_LABEL {
            truth.hard.push(0.0);
            truth.hard_gradient_square.push(0.0);
        } else {
            let hard = oracle::hard_cross_entropy(logits, label);
            truth.loss += 0.3 * hard.value;
            for (gradient, hard) in gradient.iter_mut().zip(&hard.logits_grad) {
                *gradient += 0.3 * hard;
            }
            truth.hard.push(hard.value);
            truth.hard_gradient_square.push(square(&hard.logits_grad, 1.0));
        }
        truth.logits_grad.extend(gradient);
    }
    truth
}

pub fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

pub fn assert_close(found: &[f32], truth: &[f64], bound: f64, what: &str) {
    let largest = largest(truth);
    for (place, (found, truth)) in found.iter().zip(truth).enumerate() {
        assert!((*found as f64 - truth).abs() <= bound * largest + 1e-14, "{what}[{place}] {found} instead of {truth}");
    }
}

/// Hidden states, head, targets and the truth about their loss.
pub struct Linear {
    pub width: usize,
    pub vocab: usize,
    pub hidden: Vec<f32>,
    pub lm_head: Vec<f32>,
    pub targets: Arc<RowTargets>,
    pub settings: LossSettings,
    pub loss: f64,
    pub hidden_grad: Vec<f64>,
    pub lm_head_grad: Vec<f64>,
}

pub fn linear(rows: usize, width: usize, vocab: usize, k: usize, settings: LossSettings) -> Linear {
    let (hidden, lm_head) = (random(rows * width, 1, 1.5), random(vocab * width, 2, 1.0));
    linear_of(hidden, lm_head, rows, width, vocab, k, settings)
}

pub fn linear_of(
    hidden: Vec<f32>,
    lm_head: Vec<f32>,
    rows: usize,
    width: usize,
    vocab: usize,
    k: usize,
    settings: LossSettings,
) -> Linear {
    let labels = (0..rows).map(|row| if row % 5 == 4 { NO_LABEL } else { (row * 37 % vocab) as u32 }).collect();
    let (mut targets, mut kept) = targets(&random(rows * vocab, 5, 3.0), vocab, k, labels, settings.temperature);
    // One row has no target at all.
    let removed = targets.kept(1).clone();
    targets.labels[1] = NO_LABEL;
    targets.ids.drain(removed.clone());
    targets.log_probs.drain(removed);
    targets.offsets[2..].iter_mut().for_each(|offset| *offset -= k);
    kept[1] = KeptRow { ids: vec![], log_probs: vec![], log_tail: f64::NEG_INFINITY, label_log_prob: 0.0 };
    let mut logits = vec![0.0f64; rows * vocab];
    for row in 0..rows {
        for v in 0..vocab {
            logits[row * vocab + v] =
                (0..width).map(|d| hidden[row * width + d] as f64 * lm_head[v * width + d] as f64).sum();
        }
    }
    let mut truth = truth(&logits, vocab, &targets, &kept, &settings);
    truth.loss -= 0.7 * settings.soft_factor() * truth.soft[1];
    truth.logits_grad[vocab..2 * vocab].fill(0.0);
    let (mut hidden_grad, mut lm_head_grad) = (vec![0.0; rows * width], vec![0.0; vocab * width]);
    for row in 0..rows {
        for v in 0..vocab {
            let gradient = truth.logits_grad[row * vocab + v];
            for d in 0..width {
                hidden_grad[row * width + d] += gradient * lm_head[v * width + d] as f64;
                lm_head_grad[v * width + d] += gradient * hidden[row * width + d] as f64;
            }
        }
    }
    Linear {
        width,
        vocab,
        hidden,
        lm_head,
        targets: Arc::new(targets),
        settings,
        loss: truth.loss,
        hidden_grad,
        lm_head_grad,
    }
}
