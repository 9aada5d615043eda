//! Soft and hard targets in one loss.
//!
//! T tokens (rows), V vocabulary, k kept ids, D width. With teacher P and student Q at temperature tau, both over the
//! k kept ids and one tail outcome that stands for everything else:
//!
//! `L = sum_t r_t [ w_soft(t) * tau^2 * d(P_t, Q_t) + w_hard(t) * -ln q_t(label) ]`
//!
//! The student's probabilities come from its full softmax and its tail is summed over the ids not kept, never had as
//! one minus the rest. `r_t` are the batch's row weights, 1 unless given. [`DistillLoss::forward`] never has the logits
//! of a batch in memory.

use std::{collections::HashMap, sync::Arc};

use burn::tensor::Tensor;
use limbeck_kernels::fused_linear_distill::{
    LinearDistill, LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, distill_logits, graph::SharedWeigh,
    linear_distill,
};
use serde::{Deserialize, Serialize};

use super::{
    Divergence, Weighting, Weights,
    weighting::{StepMeans, TokenFacts, WeightingState},
};
use crate::{
    error::{Error, Result},
    targets::{DistillBatch, TargetKind},
};

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
    /// The kept ids were drawn from the teacher: weights stand beside them instead of probabilities, and there is no tail.
    pub sampled_targets: bool,
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
            sampled_targets: false,
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

    /// Targets that were drawn from the teacher rather than its likeliest ids ([`TargetKind::Sampled`]). With weights w the
    /// gradient in a row's logits is `sum(w) q - w`, whose expectation over the draws is `q - p`.
    pub fn with_sampled_targets(mut self) -> Self {
        self.sampled_targets = true;
        self
    }

    /// # Errors
    /// For parameters without meaning, and for combinations that compute something other than they say.
    pub fn init(self) -> Result<DistillLoss> {
        self.check()?;
        Ok(DistillLoss { config: self, state: WeightingState::default() })
    }

    /// Whether [`init`](Self::init) would take it.
    pub fn check(&self) -> Result<()> {
        self.weighting.check()?;
        self.divergence.check().map_err(|invalid| Error::usage(invalid.problem, invalid.tip))?;
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            let problem = format!("temperature {} is not positive", self.temperature);
            return Err(Error::usage(problem, "give a number above 0, such as 1.0"));
        }
        if self.sampled_targets && !self.divergence.is_linear_in_the_teacher() {
            let problem = format!("{} of sampled targets is biased", self.divergence.name());
            return Err(Error::usage(problem, "use `forward_kl` or `soft_cross_entropy`, or keep the likeliest ids"));
        }
        if self.sampled_targets && matches!(self.weighting, Weighting::TeacherEntropy { .. }) {
            let problem = "the entropy of sampled targets is not the teacher's";
            return Err(Error::usage(problem, "use another weighting, or keep the likeliest ids"));
        }
        if matches!(self.weighting, Weighting::Taid { .. }) && !matches!(self.divergence, Divergence::Taid { .. }) {
            let problem = format!("the weighting `taid` moves a teacher that {} has not", self.divergence.name());
            return Err(Error::usage(problem, "use the divergence `taid` with it"));
        }
        Ok(())
    }
}

/// The loss of a batch of rows.
#[derive(Debug, Clone)]
pub struct DistillLoss {
    config: DistillLossConfig,
    state: WeightingState,
}

/// Sums over the rows that count, and how many those are.
#[derive(Debug)]
pub struct LossOutput {
    /// The weighted losses, summed: what to call `backward` on. `[1]`
    pub sum: Tensor<1>,
    /// The same, in f64.
    pub value: f64,
    /// Rows that count.
    pub token_count: u64,
    /// What each kind of target gave, unweighted; `None` without soft targets.
    pub soft: Option<TargetSums>,
    pub hard: TargetSums,
    /// Sums of the rows' weights.
    pub weights: Weights,
    /// Rows in which student and teacher hold the same id likeliest; `None` without soft targets, and with drawn ones,
    /// which do not say which id that is.
    pub agreed: Option<u64>,
    /// What was found of each row; `None` for rows that do not count.
    pub rows: Vec<Option<RowMeasures>>,
}

/// Sums of one kind of target over the rows that have it, before weight and temperature factor.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TargetSums {
    /// Nats.
    pub sum: f64,
    pub count: u64,
    /// Squared norm of the loss's gradient in a row's logits, with the temperature factor, summed over the rows.
    pub gradient_square: f64,
}

impl TargetSums {
    fn add(&mut self, loss: f64, gradient_square: f64) {
        self.sum += loss;
        self.count += 1;
        self.gradient_square += gradient_square;
    }

    /// Joins the sums of other rows.
    pub fn join(&mut self, other: &TargetSums) {
        self.sum += other.sum;
        self.count += other.count;
        self.gradient_square += other.gradient_square;
    }

    /// Nats per row that has the target.
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// Root of the mean square of the gradient in a row's logits.
    pub fn gradient_norm(&self) -> f64 {
        (self.gradient_square / self.count.max(1) as f64).sqrt()
    }
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

    /// What the weighting remembers.
    pub fn state(&self) -> &WeightingState {
        &self.state
    }

    /// Goes on with what an earlier run remembered.
    pub fn with_state(mut self, state: WeightingState) -> Self {
        self.state = state;
        self
    }

    /// Takes note of a step that is over, micro-batches and all; weightings that follow the losses need it.
    pub fn end_step(&mut self, step: u64, soft: Option<&TargetSums>, hard: &TargetSums) {
        let Some(soft) = soft else { return };
        let means = StepMeans {
            soft: soft.mean(),
            hard: hard.mean(),
            soft_gradient_norm: soft.gradient_norm(),
            hard_gradient_norm: hard.gradient_norm(),
        };
        self.config.weighting.end_step(&mut self.state, &means, step, self.config.total_steps);
    }

    /// From the student's hidden states, without the logits of the batch in memory.
    ///
    /// # Shapes
    /// - `hidden` `[T, D]`, `lm_head` `[V, D]`, T the batch's rows
    ///
    /// # Errors
    /// When the weighting asks for soft targets and the batch has none at the loss's temperature, or none for a row
    /// that counts; never falls back to the hard target alone. When an id lies beyond the vocabulary.
    pub fn forward(
        &self,
        step: u64,
        hidden: Tensor<2>,
        lm_head: Tensor<2>,
        batch: &DistillBatch,
    ) -> Result<LossOutput> {
        let vocab = lm_head.dims()[0];
        self.with_targets(step, batch, vocab, |targets, settings, weigh| {
            linear_distill(hidden, lm_head, targets, settings, weigh)
        })
    }

    /// From the student's logits.
    ///
    /// # Shapes
    /// - `logits` `[T, V]`, T the batch's rows
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_logits(&self, step: u64, logits: Tensor<2>, batch: &DistillBatch) -> Result<LossOutput> {
        let vocab = logits.dims()[1];
        self.with_targets(step, batch, vocab, |targets, settings, weigh| {
            distill_logits(logits, &targets, &settings, &weigh)
        })
    }

    fn with_targets(
        &self,
        step: u64,
        batch: &DistillBatch,
        vocab: usize,
        run: impl FnOnce(Arc<RowTargets>, LossSettings, SharedWeigh) -> LinearDistill,
    ) -> Result<LossOutput> {
        let config = &self.config;
        let valid = valid_rows(batch);
        let temperature = config.weighting.needs_soft_targets().then_some(config.temperature);
        let sampled = batch.targets.as_ref().is_some_and(|targets| targets.kind == TargetKind::Sampled);
        if temperature.is_some() && sampled && !config.sampled_targets {
            let problem = "the targets were drawn from the teacher, and the loss expects its likeliest ids";
            return Err(Error::usage(problem, "make the loss with `with_sampled_targets`"));
        }
        let targets = Arc::new(row_targets(batch, &valid, temperature)?);
        targets.check(vocab).map_err(|problem| {
            Error::usage(problem, "give teacher, student and text the same tokenizer, and precompute the cache again")
        })?;
        let mut settings =
            LossSettings { divergence: config.divergence, temperature: config.temperature, t_scale: config.t_scale };
        if let Some(teacher) = config.weighting.teacher_share(&self.state, step, config.total_steps) {
            settings.divergence = Divergence::Taid { teacher };
        }
        let output = run(targets.clone(), settings, self.weigh(step, batch, &targets)?);
        let mut output = gather(output, &targets, temperature.is_some());
        output.agreed = output.agreed.filter(|_| !sampled);
        Ok(output)
    }

    /// The weights of each row.
    fn weigh(&self, step: u64, batch: &DistillBatch, targets: &RowTargets) -> Result<SharedWeigh> {
        let config = &self.config;
        let of_step = config.weighting.weights(&self.state, step, config.total_steps);
        let row_weights = batch.row_weights.clone();
        if let Some(weights) = &row_weights
            && let Some(row) = weights.iter().position(|weight| !(weight.is_finite() && *weight >= 0.0))
        {
            let problem = format!("row {row} has weight {}", weights[row]);
            return Err(Error::usage(problem, "give finite weights that are not negative"));
        }
        let row_weight = move |row: usize| row_weights.as_ref().map_or(1.0, |weights| weights[row] as f64);
        if !config.weighting.is_per_token() {
            return Ok(Arc::new(move |row, _| narrow(of_step, row_weight(row))));
        }
        let label_log_probs = batch.targets.as_ref().and_then(|targets| targets.capture(config.temperature));
        let label_log_probs = label_log_probs.expect("checked with the targets").label_log_prob.clone();
        let needs_entropy = matches!(config.weighting, Weighting::TeacherEntropy { .. });
        let entropies: Vec<f64> =
            (0..targets.row_count()).map(|row| if needs_entropy { entropy(targets, row) } else { 0.0 }).collect();
        let weighting = config.weighting.clone();
        Ok(Arc::new(move |row, measures| {
            let facts = TokenFacts {
                label_log_prob: label_log_probs[row] as f64,
                entropy: entropies[row],
                student_loss: measures.hard,
            };
            narrow(weighting.token_weights(of_step, &facts), row_weight(row))
        }))
    }
}

fn narrow(weights: Weights, factor: f64) -> RowWeights {
    RowWeights { soft: (weights.soft * factor) as f32, hard: (weights.hard * factor) as f32 }
}

/// Entropy of the teacher's outcomes in nats.
fn entropy(targets: &RowTargets, row: usize) -> f64 {
    let outcomes = targets.log_probs[targets.kept(row)].iter().chain(&targets.log_tail[row..=row]);
    outcomes.filter(|log| **log > f32::NEG_INFINITY).map(|&log| -(log as f64).exp() * log as f64).sum()
}

fn gather(output: LinearDistill, targets: &RowTargets, needs_soft: bool) -> LossOutput {
    let (mut soft, mut hard) = (TargetSums::default(), TargetSums::default());
    let mut weights = Weights { soft: 0.0, hard: 0.0 };
    let (mut token_count, mut agreed) = (0, 0);
    for (row, found) in output.rows.iter().enumerate() {
        let Some((measures, row_weights)): &Option<(RowMeasures, RowWeights)> = found else { continue };
        token_count += 1;
        weights.soft += row_weights.soft as f64;
        weights.hard += row_weights.hard as f64;
        if let Some(first) = targets.ids[targets.kept(row)].first() {
            soft.add(measures.soft, measures.soft_gradient_square);
            agreed += (*first == measures.argmax) as u64;
        }
        if targets.labels[row] != NO_LABEL {
            hard.add(measures.hard, measures.hard_gradient_square);
        }
    }
    LossOutput {
        sum: output.loss,
        value: output.value,
        token_count,
        soft: needs_soft.then_some(soft),
        hard,
        weights,
        agreed: needs_soft.then_some(agreed),
        rows: output.rows.iter().map(|row| row.as_ref().map(|(measures, _)| *measures)).collect(),
    }
}

/// The divergence of each row alone, in nats, before any weight or temperature factor. Rows that do not count have 0.
///
/// # Shapes
/// - `logits` `[T, V]`, T the batch's rows; result `[T]`
///
/// # Errors
/// When the divergence's parameters have no meaning, and as [`DistillLoss::forward`].
pub fn divergence(
    divergence: Divergence,
    temperature: f32,
    logits: Tensor<2>,
    batch: &DistillBatch,
) -> Result<Tensor<1>> {
    let mut config = DistillLossConfig::new(divergence).with_temperature(temperature, false);
    config.sampled_targets = batch.targets.as_ref().is_some_and(|targets| targets.kind == TargetKind::Sampled);
    config.check()?;
    let mut targets = row_targets(batch, &valid_rows(batch), Some(temperature))?;
    let [rows, vocab] = logits.dims();
    targets.labels.fill(NO_LABEL);
    targets.check(vocab).map_err(|problem| Error::usage(problem, "give targets of the student's vocabulary"))?;
    let settings = LossSettings { divergence, temperature, t_scale: false };
    let weigh: SharedWeigh = Arc::new(|_, _| RowWeights { soft: 1.0, hard: 0.0 });
    let device = logits.device();
    let (values, slope) = limbeck_kernels::fused_linear_distill::row_slopes(logits, &targets, &settings, &weigh);
    let values: Vec<f32> = values.iter().map(|found| found.map_or(0.0, |(measures, _)| measures.soft as f32)).collect();
    let values = Tensor::<1>::from_data(burn::tensor::TensorData::new(values, [rows]), &device);
    Ok(slope.clone() - slope.detach() + values)
}

/// The number in a tensor of one element.
pub fn scalar(tensor: &Tensor<1>) -> f64 {
    tensor.clone().detach().into_data().convert::<f64>().try_into_vec::<f64>().expect("converted to f64")[0]
}

/// Which rows carry a loss.
pub fn valid_rows(batch: &DistillBatch) -> Vec<bool> {
    let weights = batch.row_weights.as_deref();
    let rows = batch.sequences.iter().flat_map(|sequence| (0..sequence.seq_len()).map(|t| sequence.is_valid(t)));
    rows.enumerate().map(|(row, valid)| valid && weights.is_none_or(|weights| weights[row] != 0.0)).collect()
}

/// The token each row predicts.
pub fn labels(batch: &DistillBatch) -> Vec<u32> {
    batch.sequences.iter().flat_map(|sequence| sequence.tokens[1..].iter().copied()).collect()
}

/// The rows' labels, and their soft targets at `temperature` if any are wanted.
fn row_targets(batch: &DistillBatch, valid: &[bool], temperature: Option<f32>) -> Result<RowTargets> {
    let labels = labels(batch).into_iter().zip(valid);
    let labels = labels.map(|(label, &valid)| if valid { label } else { NO_LABEL }).collect();
    let Some(temperature) = temperature else { return Ok(RowTargets::labels(labels)) };
    let Some(targets) = &batch.targets else {
        return Err(Error::usage(
            "the loss weighs soft targets but the batch has none",
            "precompute them, or set the soft weight to 0",
        ));
    };
    let Some(capture) = targets.capture(temperature) else {
        let captured: Vec<String> = targets.captures.iter().map(|c| c.temperature.to_string()).collect();
        return Err(Error::usage(
            format!("no soft targets at temperature {temperature}, only at {}", captured.join(", ")),
            "capture them at the loss's temperature: add it to cache.temperatures",
        ));
    };
    if targets.row_count() != valid.len() {
        let problem = format!("{} rows of soft targets for {} predictions", targets.row_count(), valid.len());
        return Err(Error::usage(problem, "give one row per prediction"));
    }
    let mut rows = RowTargets { labels, offsets: vec![0], ..RowTargets::default() };
    rows.ids.reserve(targets.ids.len());
    rows.log_probs.reserve(targets.ids.len());
    for (row, &valid) in valid.iter().enumerate() {
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        if valid && kept.is_empty() {
            return Err(Error::usage(
                format!("row {row} counts but has no soft target"),
                "precompute the cache again, or set the soft weight to 0",
            ));
        }
        let sampled = targets.kind == TargetKind::Sampled;
        if valid {
            let (ids, log_probs) = (&targets.ids[kept.clone()], &capture.log_probs[kept]);
            rows.ids.extend_from_slice(ids);
            rows.log_probs.extend_from_slice(log_probs);
            if sampled {
                merge_draws(*rows.offsets.last().expect("starts with 0"), &mut rows.ids, &mut rows.log_probs);
            }
        }
        rows.offsets.push(rows.ids.len());
        rows.log_tail.push(if valid && !sampled { capture.log_tail[row] } else { f32::NEG_INFINITY });
    }
    Ok(rows)
}

/// Makes one outcome, with the sum of the weights, of each id that was drawn several times in the row from place `first`.
fn merge_draws(first: usize, ids: &mut Vec<u32>, log_weights: &mut Vec<f32>) {
    let mut seen = HashMap::with_capacity(ids.len() - first);
    let mut end = first;
    for place in first..ids.len() {
        let (id, log_weight) = (ids[place], log_weights[place]);
        let at = *seen.entry(id).or_insert(end);
        if at == end {
            (ids[end], log_weights[end]) = (id, log_weight);
            end += 1;
        } else {
            let (a, b) = (log_weights[at].max(log_weight) as f64, log_weights[at].min(log_weight) as f64);
            log_weights[at] = (a + (b - a).exp().ln_1p()) as f32;
        }
    }
    ids.truncate(end);
    log_weights.truncate(end);
}
