//! Measures of a model on held-out text: how well it predicts it, how close it is to the teacher and where, and whether its
//! probabilities mean what they say.

use std::sync::Arc;

use burn::tensor::Tensor;
use limbeck_kernels::gather_rows::gather_rows;

use super::{
    calibration::{ByConfidence, ByEntropy},
    report::Evaluation,
};
use crate::{
    error::Result,
    loss::{
        DistillLossConfig, Divergence, LossOutput, Weighting,
        distill::{labels, valid_rows},
    },
    models::{Decoder, TokenLayout},
    profile::stage,
    targets::{DistillBatch, SparseTargets, TargetKind, TargetSource},
};

/// Rows of logits held at once.
const BATCH_ROWS: usize = 1024;

/// Measures `model` on the first sequences of `held_out`, at least `tokens` predictions of them (all when `None`).
/// `bytes_per_token` is the held-out text's mean, for bits per byte. Soft measures need soft targets at temperature 1.
pub fn evaluate(
    model: &Decoder,
    held_out: &dyn TargetSource,
    bytes_per_token: f64,
    tokens: Option<u64>,
) -> Result<Evaluation> {
    let seq_len = held_out.seq_len();
    let all = held_out.sequence_count();
    let wanted = tokens.map_or(all, |tokens| tokens.div_ceil(seq_len as u64).clamp(1, all));
    let _span = stage("evaluation").with("tokens", wanted * seq_len as u64);
    let per_batch = (BATCH_ROWS / seq_len).max(1) as u64;
    let (mut hard_sum, mut soft_sum, mut agreed, mut token_count) = (0.0, None, 0u64, 0u64);
    let (mut by_entropy, mut by_confidence) = (ByEntropy::default(), ByConfidence::default());
    let mut loads: Vec<Vec<u64>> = vec![];
    for first in (0..wanted).step_by(per_batch as usize) {
        let numbers: Vec<u64> = (first..(first + per_batch).min(wanted)).collect();
        let batch = held_out.read(&numbers)?;
        let soft = batch.targets.as_ref().is_some_and(|targets| targets.capture(1.0).is_some());
        let layout = TokenLayout::of_batch(&model.config, &batch);
        let (hidden, routings) = model.forward(&layout);
        let weighting = Weighting::Constant { soft: if soft { 0.5 } else { 0.0 } };
        let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, 1).init()?;
        let output = loss.forward(0, hidden.clone(), model.lm_head(), &batch)?;
        hard_sum += output.hard.sum;
        token_count += output.token_count;
        if let (Some(soft), Some(same)) = (&output.soft, output.agreed) {
            *soft_sum.get_or_insert(0.0) += soft.sum;
            agreed += same;
        }
        count_rows(model, hidden, &batch, &output, &mut by_entropy, &mut by_confidence);
        loads.resize(routings.len(), vec![]);
        for (loads, routing) in loads.iter_mut().zip(&routings) {
            loads.resize(routing.expert_count(), 0);
            loads.iter_mut().zip(routing.loads()).for_each(|(sum, load)| *sum += load);
        }
    }
    let count = token_count.max(1) as f64;
    let mut evaluation = Evaluation::from_sums(hard_sum, token_count, (bytes_per_token * count).round() as u64);
    evaluation.kl_to_teacher = soft_sum.map(|sum: f64| sum / count);
    evaluation.top1_agreement = soft_sum.map(|_| agreed as f64 / count);
    evaluation.expert_load = loads.iter().map(|loads| shares(loads)).collect();
    evaluation.by_entropy = by_entropy.bins();
    evaluation.by_confidence = by_confidence.bins();
    Ok(evaluation)
}

/// Counts each row of a batch that has a loss, where the teacher's entropy and the model's confidence say.
fn count_rows(
    model: &Decoder,
    hidden: Tensor<2>,
    batch: &DistillBatch,
    output: &LossOutput,
    by_entropy: &mut ByEntropy,
    by_confidence: &mut ByConfidence,
) {
    let likeliest: Vec<u32> = output.rows.iter().map(|row| row.as_ref().map_or(0, |row| row.argmax)).collect();
    // The likeliest token's logit is all that the confidence needs beside what the loss found.
    let rows = gather_rows(model.lm_head(), Arc::new(likeliest));
    let logits: Tensor<1> = (hidden * rows).sum_dim(1).flatten(0, -1);
    let logits = logits.into_data().try_into_vec::<f32>().expect("logits are f32");
    let labels = labels(batch);
    let targets = batch.targets.as_ref().filter(|targets| targets.kind == TargetKind::Exact);
    for (row, found) in output.rows.iter().enumerate() {
        let Some(found) = found else { continue };
        let confidence = (logits[row] as f64 - found.log_sum_exp).exp().min(1.0);
        by_confidence.add(confidence, found.argmax == labels[row]);
        if let (Some(targets), Some(_)) = (targets, &output.soft)
            && let Some(first) = first_id(targets, row)
        {
            by_entropy.add(entropy(targets, row), found.soft, first == found.argmax);
        }
    }
}

/// The id that the teacher holds likeliest.
fn first_id(targets: &SparseTargets, row: usize) -> Option<u32> {
    targets.ids[targets.offsets[row] as usize..targets.offsets[row + 1] as usize].first().copied()
}

/// Entropy in nats of the kept ids and everything else as one outcome, at temperature 1.
fn entropy(targets: &SparseTargets, row: usize) -> f64 {
    let Some(capture) = targets.capture(1.0) else { return 0.0 };
    let kept = &capture.log_probs[targets.offsets[row] as usize..targets.offsets[row + 1] as usize];
    let outcomes = kept.iter().chain(&capture.log_tail[row..=row]).filter(|log| **log > f32::NEG_INFINITY);
    outcomes.map(|&log| -(log as f64).exp() * log as f64).sum()
}

fn shares(loads: &[u64]) -> Vec<f64> {
    let total = loads.iter().sum::<u64>().max(1) as f64;
    loads.iter().map(|&load| load as f64 / total).collect()
}

/// The teacher's own measures on held-out text, read from its soft targets at temperature 1.
pub fn teacher_evaluation(held_out: &dyn TargetSource, bytes_per_token: f64) -> Result<Evaluation> {
    let (mut sum, mut token_count, mut by_confidence) = (0.0, 0u64, ByConfidence::default());
    for number in 0..held_out.sequence_count() {
        let batch = held_out.read(&[number])?;
        let Some(targets) = &batch.targets else { continue };
        let Some(capture) = targets.capture(1.0) else { continue };
        let labels = labels(&batch);
        for (row, valid) in valid_rows(&batch).into_iter().enumerate() {
            if valid {
                sum -= capture.label_log_prob[row] as f64;
                token_count += 1;
                if let (Some(first), TargetKind::Exact) = (first_id(targets, row), targets.kind) {
                    let confidence = (capture.log_probs[targets.offsets[row] as usize] as f64).exp().min(1.0);
                    by_confidence.add(confidence, first == labels[row]);
                }
            }
        }
    }
    if token_count == 0 {
        return Err(crate::Error::usage(
            "the held-out cache has no soft targets at temperature 1",
            "add 1.0 to cache.temperatures",
        ));
    }
    let mut evaluation = Evaluation::from_sums(sum, token_count, (bytes_per_token * token_count as f64).round() as u64);
    evaluation.by_confidence = by_confidence.bins();
    Ok(evaluation)
}
