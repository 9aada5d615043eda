//! Soft and hard targets in one loss.
//!
//! T tokens (rows), V vocabulary, K kept ids, D width. With teacher p and student q at temperature tau, both over the
//! K kept ids and one tail outcome that stands for everything else:
//!
//! `L = sum_t [ w_soft * tau^2 * KL(p_t || q_t) + w_hard * -ln q_t(label) ]`
//!
//! The student's probabilities come from its full softmax and its tail is summed over the ids not kept, never had as
//! one minus the rest; bucketing gives a lower bound of the divergence over the whole vocabulary (data processing
//! inequality), so it is never negative.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};
use limbeck_kernels::logsumexp_gather::{RowEntries, logsumexp_gather};
use serde::{Deserialize, Serialize};

use super::{Weighting, Weights};
use crate::{
    error::{Error, Result},
    targets::DistillBatch,
};

/// How far the student's distribution is from the teacher's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// `sum p ln(p / q)`: covers what the teacher holds possible. Hinton et al. 2015.
    #[default]
    ForwardKl,
}

/// What becomes of the probability outside the kept ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tail {
    /// One more outcome that holds it all.
    #[default]
    Bucket,
}

/// Settings of a [`DistillLoss`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DistillLossConfig {
    pub divergence: Divergence,
    pub tail: Tail,
    /// Divides both sides' logits; the teacher's rows must have been captured at it.
    pub temperature: f32,
    /// Multiplies the soft loss by the temperature squared, which keeps its gradient's size.
    pub t_scale: bool,
    pub weighting: Weighting,
    /// Steps over which the weighting runs.
    pub total_steps: u64,
}

impl DistillLossConfig {
    pub fn new(divergence: Divergence) -> Self {
        DistillLossConfig {
            divergence,
            tail: Tail::Bucket,
            temperature: 1.0,
            t_scale: true,
            weighting: Weighting::Constant { soft: 0.5 },
            total_steps: 1,
        }
    }

    pub fn with_tail(mut self, tail: Tail) -> Self {
        self.tail = tail;
        self
    }

    pub fn with_temperature(mut self, temperature: f32, t_scale: bool) -> Self {
        self.temperature = temperature;
        self.t_scale = t_scale;
        self
    }

    /// The soft target's share over a run of `total_steps`.
    pub fn with_weighting(mut self, weighting: Weighting, total_steps: u64) -> Self {
        self.weighting = weighting;
        self.total_steps = total_steps;
        self
    }

    pub fn init(self) -> Result<DistillLoss> {
        self.weighting.check()?;
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            let problem = format!("temperature {} is not positive", self.temperature);
            return Err(Error::usage(problem, "give a number above 0, such as 1.0"));
        }
        Ok(DistillLoss { config: self })
    }
}

/// The loss of a batch of rows.
#[derive(Debug, Clone)]
pub struct DistillLoss {
    config: DistillLossConfig,
}

/// Sums over the rows that count, and how many those are.
#[derive(Debug)]
pub struct LossOutput {
    /// `w_soft * tau^2 * soft + w_hard * hard`, summed: what to call `backward` on. `[1]`
    pub sum: Tensor<1>,
    /// Summed divergence in nats, before weight and temperature factor; `None` without soft targets.
    pub soft_sum: Option<f64>,
    /// Summed cross-entropy of the labels in nats, before its weight.
    pub hard_sum: f64,
    pub token_count: u64,
    pub weights: Weights,
}

impl LossOutput {
    /// The mean over the rows that count.
    pub fn mean(&self) -> Tensor<1> {
        self.sum.clone() / self.token_count.max(1) as f64
    }
}

impl DistillLoss {
    pub fn config(&self) -> &DistillLossConfig {
        &self.config
    }

    /// From the student's hidden states.
    ///
    /// # Shapes
    /// - `hidden` `[T, D]`, `lm_head` `[V, D]`, T the batch's rows
    pub fn forward(
        &self,
        step: u64,
        hidden: Tensor<2>,
        lm_head: Tensor<2>,
        batch: &DistillBatch,
    ) -> Result<LossOutput> {
        self.forward_logits(step, hidden.matmul(lm_head.transpose()), batch)
    }

    /// From the student's logits.
    ///
    /// # Shapes
    /// - `logits` `[T, V]`, T the batch's rows
    ///
    /// # Errors
    /// When the weighting asks for soft targets and the batch has none at the loss's temperature, or none for a row
    /// that counts; never falls back to the hard target alone.
    pub fn forward_logits(&self, step: u64, logits: Tensor<2>, batch: &DistillBatch) -> Result<LossOutput> {
        let config = &self.config;
        let weights = config.weighting.weights(step, config.total_steps);
        let soft = match &batch.targets {
            _ if !config.weighting.needs_soft_targets() => None,
            Some(_) => Some(SoftRows::new(batch, config.temperature)?),
            None => {
                return Err(Error::usage(
                    "the loss weighs soft targets but the batch has none",
                    "precompute them, or set the soft weight to 0",
                ));
            }
        };
        let device = logits.device();
        let valid = valid_rows(batch);
        let token_count = valid.iter().filter(|&&valid| valid).count() as u64;
        let rows = valid.len();
        let column = |values: Vec<f32>| Tensor::<2>::from_data(TensorData::new(values, [rows, 1]), &device);
        let mask = column(valid.iter().map(|&valid| valid as u8 as f32).collect());

        let labels = RowEntries::labels(labels(batch));
        let entries = match &soft {
            Some(soft) if config.temperature == 1.0 => RowEntries { labels: labels.labels.clone(), ..soft.entries() },
            _ => labels,
        };
        let columns = logsumexp_gather(logits.clone(), &entries);
        let hard = ((columns.clone().narrow(1, 0, 1) - columns.clone().narrow(1, 2, 1)) * mask).sum();
        let hard_sum = scalar(&hard);
        let mut sum = hard * weights.hard;
        let mut soft_sum = None;
        if let Some(soft) = soft {
            let columns = match config.temperature {
                1.0 => columns,
                temperature => logsumexp_gather(
                    logits / temperature,
                    &RowEntries { labels: entries.labels.clone(), ..soft.entries() },
                ),
            };
            let all = columns.clone().narrow(1, 0, 1);
            let log_tail = columns.clone().narrow(1, 1, 1) - all.clone();
            let log_kept = columns.narrow(1, 3, soft.width) - all;
            let probabilities = TensorData::new(soft.probabilities, [rows, soft.width]);
            let crossed =
                (log_kept * Tensor::from_data(probabilities, &device)).sum() + (log_tail * column(soft.tails)).sum();
            let divergence = -crossed + soft.negative_entropy;
            soft_sum = Some(scalar(&divergence));
            let scale = if config.t_scale { (config.temperature as f64).powi(2) } else { 1.0 };
            sum = sum + divergence * (weights.soft * scale);
        }
        Ok(LossOutput { sum, soft_sum, hard_sum, token_count, weights })
    }
}

/// The number in a tensor of one element.
pub fn scalar(tensor: &Tensor<1>) -> f64 {
    tensor.clone().detach().into_data().convert::<f64>().try_into_vec::<f64>().expect("converted to f64")[0]
}

/// Which rows carry a loss.
pub fn valid_rows(batch: &DistillBatch) -> Vec<bool> {
    batch.sequences.iter().flat_map(|sequence| (0..sequence.seq_len()).map(|t| sequence.is_valid(t))).collect()
}

/// The token each row predicts.
pub fn labels(batch: &DistillBatch) -> Vec<u32> {
    batch.sequences.iter().flat_map(|sequence| sequence.tokens[1..].iter().copied()).collect()
}

/// Soft targets as rectangles, padded with probability 0.
struct SoftRows {
    width: usize,
    ids: Arc<Vec<u32>>,
    counts: Arc<Vec<u32>>,
    probabilities: Vec<f32>,
    tails: Vec<f32>,
    /// `sum p ln p` over all outcomes of all rows.
    negative_entropy: f64,
}

impl SoftRows {
    fn new(batch: &DistillBatch, temperature: f32) -> Result<Self> {
        let targets = batch.targets.as_ref().expect("checked by the caller");
        let Some(capture) = targets.capture(temperature) else {
            let captured: Vec<String> = targets.captures.iter().map(|c| c.temperature.to_string()).collect();
            return Err(Error::usage(
                format!("no soft targets at temperature {temperature}, only at {}", captured.join(", ")),
                "capture them at the loss's temperature: add it to cache.temperatures",
            ));
        };
        let rows = targets.row_count();
        let valid = valid_rows(batch);
        if rows != valid.len() {
            let problem = format!("{rows} rows of soft targets for {} predictions", valid.len());
            return Err(Error::usage(problem, "give one row per prediction"));
        }
        let bounds = |row: usize| targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let width = (0..rows).map(|row| bounds(row).len()).max().unwrap_or(0).max(1);
        let mut soft = SoftRows {
            width,
            ids: Arc::default(),
            counts: Arc::default(),
            probabilities: vec![0.0; rows * width],
            tails: vec![0.0; rows],
            negative_entropy: 0.0,
        };
        let (mut ids, mut counts) = (vec![0u32; rows * width], vec![0u32; rows]);
        let weigh = |log_prob: f32| if log_prob == f32::NEG_INFINITY { 0.0 } else { log_prob.exp() };
        for row in (0..rows).filter(|&row| valid[row]) {
            let kept = bounds(row);
            if kept.is_empty() {
                return Err(Error::usage(
                    format!("row {row} counts but has no soft target"),
                    "precompute the cache again, or set the soft weight to 0",
                ));
            }
            counts[row] = kept.len() as u32;
            ids[row * width..][..kept.len()].copy_from_slice(&targets.ids[kept.clone()]);
            let mut negative_entropy = 0.0;
            for (place, &log_prob) in capture.log_probs[kept].iter().enumerate() {
                let probability = weigh(log_prob);
                soft.probabilities[row * width + place] = probability;
                negative_entropy += probability as f64 * log_prob as f64;
            }
            let log_tail = capture.log_tail[row];
            soft.tails[row] = weigh(log_tail);
            if soft.tails[row] > 0.0 {
                negative_entropy += soft.tails[row] as f64 * log_tail as f64;
            }
            soft.negative_entropy += negative_entropy;
        }
        soft.ids = Arc::new(ids);
        soft.counts = Arc::new(counts);
        Ok(soft)
    }

    /// Kept entries; the labels are the caller's.
    fn entries(&self) -> RowEntries {
        RowEntries { labels: Arc::default(), kept: self.ids.clone(), counts: self.counts.clone() }
    }
}
