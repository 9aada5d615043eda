//! What a run of training is told: what decides its weights, what does not, and where its results go. Computes nothing.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use serde_json::json;

use super::{balance::RouterConfig, guard::Guards, metrics::EvalMetrics, optimizer::OptimizerConfig, tap::Tap};
use crate::{
    error::Result,
    loss::DistillLoss,
    models::Decoder,
    progress::Progress,
    schedule::{LearningRate, Schedule},
};

/// Settings of one training run.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    /// What the run is called in metrics: `student` or `control`.
    pub arm: String,
    pub steps: u64,
    pub sequences_per_step: u64,
    /// Sequences in memory at once; the last micro-batch of a step may have fewer.
    pub sequences_per_micro_batch: u64,
    /// That size was found for the memory at hand. A run that goes on keeps the one it began with, for another one would
    /// change the last bits of sums.
    pub automatic_micro_batch: bool,
    pub learning_rate: LearningRate,
    pub optimizer: OptimizerConfig,
    pub router: RouterConfig,
    pub guards: Guards,
    /// Decay of a running mean of the weights; `None` for no such mean.
    pub average: Option<f64>,
    /// Keeps of each layer its input alone, and runs it once more in the backward pass.
    pub checkpoint_activations: bool,
    /// Seeds the order of the sequences.
    pub seed: u64,
    /// Steps between checkpoints; 0 for one at the end only.
    pub checkpoint_every: u64,
    pub keep_checkpoints: usize,
    /// Steps between lines of metrics.
    pub log_every: u64,
    /// Steps between evaluations; 0 for none.
    pub evaluate_every: u64,
    /// The data's identity (a cache's root), compared when a run goes on.
    pub data: String,
}

impl Default for TrainConfig {
    fn default() -> Self {
        TrainConfig {
            arm: "student".into(),
            steps: 1,
            sequences_per_step: 1,
            sequences_per_micro_batch: 1,
            automatic_micro_batch: false,
            learning_rate: LearningRate { warmup: 0, schedule: Schedule::Constant { value: 1e-3 } },
            optimizer: OptimizerConfig::default(),
            router: RouterConfig::default(),
            guards: Guards::default(),
            average: None,
            checkpoint_activations: false,
            seed: 0,
            checkpoint_every: 0,
            keep_checkpoints: 1,
            log_every: 10,
            evaluate_every: 0,
            data: String::new(),
        }
    }
}

impl TrainConfig {
    /// Everything that decides the weights, but how a step is cut into micro-batches.
    pub(super) fn identity(&self, model: &Decoder, loss: &DistillLoss) -> serde_json::Value {
        json!({
            "arm": self.arm,
            "data": self.data,
            "seed": self.seed.to_string(),
            "steps": self.steps,
            "sequences_per_step": self.sequences_per_step,
            "learning_rate": self.learning_rate,
            "optimizer": self.optimizer,
            // Under the names that the first checkpoints had for them.
            "router_aux_weight": self.router.balance_weight,
            "router": self.router,
            "guards": self.guards,
            "average": self.average,
            "loss": loss.config(),
            "student": model.config.json,
        })
    }
}

/// Where a run keeps what it makes, and how it is told to stop.
pub struct TrainOutput<'a> {
    /// Holds `checkpoints/`.
    pub dir: PathBuf,
    /// Written beside the weights of every checkpoint: tokenizer files and the like.
    pub files: Vec<(String, Vec<u8>)>,
    pub metrics: PathBuf,
    /// Directory of event files for TensorBoard, one for each arm.
    pub tensorboard: Option<PathBuf>,
    pub progress: Progress,
    pub stop: Arc<AtomicBool>,
    /// Measures the model on held-out text.
    pub evaluate: Option<Evaluate<'a>>,
    /// Sees the forward passes of steps.
    pub tap: Option<&'a mut dyn Tap>,
}

/// Held-out measures of a model, as a line of metrics without its arm and step.
pub type Evaluate<'a> = Box<dyn FnMut(&Decoder) -> Result<EvalMetrics> + 'a>;

/// The first value of `mine` that `theirs` has otherwise: its dotted name and both values. Keys that one side lacks
/// say nothing.
pub(super) fn first_difference(
    name: &str,
    theirs: &serde_json::Value,
    mine: &serde_json::Value,
) -> Option<(String, String, String)> {
    if let (Some(theirs), Some(mine)) = (theirs.as_object(), mine.as_object()) {
        return mine.iter().find_map(|(key, mine)| {
            let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            first_difference(&inner, theirs.get(key)?, mine)
        });
    }
    let text = |value: &serde_json::Value| value.as_str().map_or(value.to_string(), String::from);
    (theirs != mine).then(|| (name.to_string(), text(theirs), text(mine)))
}
