//! `[train]` as it is written, with its defaults. What its values may be is checked in `check` and `training`.

use serde::{Deserialize, Serialize};

use super::micro_batch_key::MicroBatch;
use super::schema::Dtype;
use super::training::{GuardsSection, RouterBalance};
use crate::data::deserialize_count;
use crate::schedule::{LearningRate, Schedule};
use crate::train::groups::ParameterGroup;
use crate::train::optimizer::OptimizerKind;

/// `[train]`: how long and how fast; exactly one of `steps` and `epochs`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSection {
    /// Optimizer steps.
    pub steps: Option<u64>,
    /// Passes over the training tokens; fractions are allowed.
    pub epochs: Option<f64>,
    /// Tokens in one optimizer step; a multiple of `data.seq_len`.
    #[serde(deserialize_with = "deserialize_count")]
    pub batch_tokens: u64,
    /// Tokens held in memory at once: a multiple of `data.seq_len` that divides `batch_tokens`, or `"auto"` for as many as
    /// the memory at hand allows. Default: all of them.
    pub micro_batch_tokens: Option<MicroBatch>,
    /// Keeps of each layer its input alone, and runs it once more in the backward pass. Default false.
    #[serde(default, skip_serializing_if = "is_false")]
    pub checkpoint_activations: bool,
    pub lr: LearningRateSection,
    /// How gradients become updates. Default `adamw`.
    #[serde(default)]
    pub optimizer: OptimizerKind,
    /// Weights with a learning rate or a decay of their own, by patterns of their names. Default: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ParameterGroup>,
    /// What the model's weights are rounded to after each step; the optimizer keeps them in f32. Default `f32`.
    #[serde(default, skip_serializing_if = "is_f32")]
    pub precision: Dtype,
    /// Decay of a running mean of the weights, which is measured and exported beside them. Default: no such mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ema: Option<f64>,
    /// Decay of the two running means. Default `[0.9, 0.95]`.
    #[serde(default = "betas")]
    pub betas: [f64; 2],
    /// AdamW's epsilon. Default 1e-8.
    #[serde(default = "eps")]
    pub eps: f64,
    /// Muon's momentum. Default 0.95.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Decoupled weight decay of matrices; norms, biases and the embedding are not decayed. Default 0.1.
    #[serde(default = "weight_decay")]
    pub weight_decay: f64,
    /// Largest norm of the whole gradient; 0 for no limit. Default 1.
    #[serde(default = "one")]
    pub clip_norm: f64,
    /// Weight of the loss that balances the load of experts. Default 0.001.
    #[serde(default = "router_aux_weight")]
    pub router_aux_weight: f64,
    /// Weight of the loss that keeps the router's logits small. Default 0.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub router_z_weight: f64,
    /// Balances the load of experts by a bias on their choice. Default: no such bias.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_balance: Option<RouterBalance>,
    /// What becomes of steps that went wrong. Default: the run stops where a number is not finite.
    #[serde(default, skip_serializing_if = "super::training::is_default")]
    pub guards: GuardsSection,
    /// Seeds the order in which sequences are seen. Default: the recipe's `seed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Steps between checkpoints; 0 for one at the end only. Default 500.
    #[serde(default = "checkpoint_every")]
    pub checkpoint_every: u64,
    /// Steps between evaluations on held-out text; 0 for one at the end only. Default: `checkpoint_every`.
    pub evaluate_every: Option<u64>,
    /// Most held-out tokens read by an evaluation during training; the one at the end reads all. Default 32768.
    #[serde(default = "evaluate_tokens", deserialize_with = "deserialize_count")]
    pub evaluate_tokens: u64,
    /// Latest checkpoints kept. Default 2.
    #[serde(default = "keep_checkpoints")]
    pub keep_checkpoints: usize,
    /// Steps between lines of metrics.jsonl. Default 10.
    #[serde(default = "log_every")]
    pub log_every: u64,
    /// Whether event files for TensorBoard are written into the run directory. Default false.
    #[serde(default, skip_serializing_if = "is_false")]
    pub tensorboard: bool,
}

/// `train.lr` and `control.lr`: warm-up, then a schedule over the rest of the run.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRateSection {
    pub schedule: LearningRateKind,
    /// The rate after warm-up, from which the schedule starts.
    pub from: f64,
    /// The rate at the last step; not for `constant`. Default 0.
    pub to: Option<f64>,
    /// Steps of linear climb to `from`. Default 0.
    #[serde(default)]
    pub warmup: u64,
    /// Share of what follows the warm-up, 0 to 1, in which `wsd` falls from `from` to `to`; for `wsd` alone. Default 0.2.
    pub decay: Option<f64>,
}

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LearningRateKind {
    Constant,
    Linear,
    Cosine,
    /// Warm-up, stable, decay.
    Wsd,
}

impl LearningRateSection {
    /// The learning rate this describes.
    pub fn learning_rate(&self) -> LearningRate {
        let (from, to) = (self.from, self.to.unwrap_or(0.0));
        let schedule = match self.schedule {
            LearningRateKind::Constant => Schedule::Constant { value: from },
            LearningRateKind::Linear => Schedule::Linear { from, to },
            LearningRateKind::Cosine => Schedule::Cosine { from, to },
            LearningRateKind::Wsd => Schedule::Wsd { from, to, decay: self.decay.unwrap_or(0.2) },
        };
        LearningRate { warmup: self.warmup, schedule }
    }
}

fn is_false(value: &bool) -> bool {
    !value
}
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}
fn is_f32(dtype: &Dtype) -> bool {
    *dtype == Dtype::F32
}
fn one() -> f64 {
    1.0
}
fn betas() -> [f64; 2] {
    [0.9, 0.95]
}
fn eps() -> f64 {
    1e-8
}
fn weight_decay() -> f64 {
    0.1
}
fn router_aux_weight() -> f64 {
    0.001
}
fn checkpoint_every() -> u64 {
    500
}
fn evaluate_tokens() -> u64 {
    32_768
}
fn keep_checkpoints() -> usize {
    2
}
fn log_every() -> u64 {
    10
}
