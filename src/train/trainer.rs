//! The training loop: batches in, weights out, with checkpoints to go on from and a line of metrics per step.
//!
//! Sums and counts are gathered over the micro-batches of a step and divided once. Knows nothing of recipes or teachers.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use burn::tensor::Device;
use serde_json::json;

use super::{
    balance::LoadBalance,
    metrics::{EvalMetrics, MetricsWriter, StepMetrics},
    optimizer::{Optimizer, OptimizerConfig},
    order::SequenceOrder,
    prefetch::{Prefetch, Prefetcher},
    tap::Tap,
};
use crate::{
    checkpoint::{
        CheckpointWriter, Overwrite, StoredDtype, TensorSpec, TrainState, checkpoint_dir, keep_latest,
        latest_checkpoint,
    },
    error::{Error, Result},
    loss::{DistillLoss, TargetSums, Weights, distill::scalar},
    models::{Decoder, TokenLayout},
    progress::Progress,
    schedule::LearningRate,
    targets::{DistillBatch, TargetSource},
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
    pub learning_rate: LearningRate,
    pub optimizer: OptimizerConfig,
    /// Weight of the router's load-balancing loss.
    pub router_aux_weight: f64,
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

/// Where a run keeps what it makes, and how it is told to stop.
pub struct TrainOutput<'a> {
    /// Holds `checkpoints/`.
    pub dir: PathBuf,
    /// Written beside the weights of every checkpoint: tokenizer files and the like.
    pub files: Vec<(String, Vec<u8>)>,
    pub metrics: PathBuf,
    pub progress: Progress,
    pub stop: Arc<AtomicBool>,
    /// Measures the model on held-out text.
    pub evaluate: Option<Evaluate<'a>>,
    /// Sees the forward passes of steps.
    pub tap: Option<&'a mut dyn Tap>,
}

/// Held-out measures of a model, as a line of metrics without its arm and step.
pub type Evaluate<'a> = Box<dyn FnMut(&Decoder) -> Result<EvalMetrics> + 'a>;

/// A model in training.
pub struct Trainer {
    config: TrainConfig,
    /// What must not change between the parts of one run.
    identity: serde_json::Value,
    model: Decoder,
    loss: DistillLoss,
    optimizer: Optimizer,
    balance: LoadBalance,
    order: SequenceOrder,
    /// Steps done.
    step: u64,
    tokens_seen: u64,
}

impl Trainer {
    /// A fresh run of a model whose weights are tracked, over `sequence_count` sequences.
    pub fn new(config: TrainConfig, model: Decoder, loss: DistillLoss, sequence_count: u64) -> Self {
        Trainer {
            identity: identity(&config, &model, &loss),
            optimizer: Optimizer::new(config.optimizer.clone()),
            balance: LoadBalance::default(),
            order: SequenceOrder::new(config.seed, sequence_count),
            step: 0,
            tokens_seen: 0,
            config,
            model,
            loss,
        }
    }

    /// Goes on from the latest checkpoint in `dir`, if there is one.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when anything that decides the weights is not as it was; micro-batches may change.
    pub fn resume(mut self, dir: &Path, device: &Device) -> Result<Self> {
        let Some((step, path)) = latest_checkpoint(dir)? else { return Ok(self) };
        let mut state = TrainState::load(&path)?;
        if let Some((key, theirs, mine)) = first_difference("", &state.values["run"], &self.identity) {
            return Err(Error::Mismatch {
                what: format!("`{key}` of the run"),
                left_name: path.display().to_string(),
                left: theirs,
                right_name: "this run".into(),
                right: mine,
                tip: "go back to the settings the run began with, or start afresh with another --run-dir".into(),
            });
        }
        self.model = Decoder::open(&path, device)?;
        let inner = device.clone().inner();
        self.optimizer.load(&mut state, &mut self.model, step, &inner)?;
        let shares = serde_json::from_value(state.values["expert_shares"].clone());
        self.balance = LoadBalance::with_shares(shares.unwrap_or_default());
        let weighting = serde_json::from_value(state.values["weighting"].clone());
        self.loss = self.loss.with_state(weighting.unwrap_or_default());
        (self.step, self.tokens_seen) = (step, state.tokens_seen);
        tracing::info!("{}: going on from {}", self.config.arm, path.display());
        Ok(self)
    }

    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// What decides the weights, as JSON: two runs that start from the same weights and have the same are one run.
    pub fn identity(&self) -> &serde_json::Value {
        &self.identity
    }

    pub fn tokens_seen(&self) -> u64 {
        self.tokens_seen
    }

    /// The model outside any graph.
    pub fn model(&self) -> Decoder {
        self.model.frozen()
    }

    /// One optimizer step on the sequences that are next in the order.
    pub fn train_step(&mut self, source: &dyn TargetSource) -> Result<StepMetrics> {
        let config = &self.config;
        let mut batches = micro_batches(config, &mut self.order, self.step).into_iter();
        let mut next = || source.read(&batches.next().expect("as many as the step takes"));
        self.step_on(&mut next, source.sequence_count(), None).map(|(metrics, _)| metrics)
    }

    /// One optimizer step on the micro-batches that are next, and how long it waited for them.
    fn step_on(
        &mut self,
        next: &mut dyn FnMut() -> Result<DistillBatch>,
        sequence_count: u64,
        tap: Option<&mut dyn Tap>,
    ) -> Result<(StepMetrics, Duration)> {
        let began = Instant::now();
        let mut waited = Duration::ZERO;
        let config = &self.config;
        let (mut loss_sum, mut aux_sum, mut token_count) = (0.0, None, 0);
        let (mut soft, mut hard): (Option<TargetSums>, _) = (None, TargetSums::default());
        let mut weights = Weights { soft: 0.0, hard: 0.0 };
        let mut tap = tap.filter(|tap| tap.takes(self.step + 1));
        // Its weights are those before the step, outside the graph.
        let frozen = tap.as_ref().map(|_| self.model.frozen());
        for _ in 0..config.sequences_per_step.div_ceil(config.sequences_per_micro_batch.max(1)) {
            let asked = Instant::now();
            let batch = next()?;
            waited += asked.elapsed();
            let layout = TokenLayout::of_batch(&self.model.config, &batch);
            let (hidden, routings) = self.model.forward(&layout);
            if let (Some(tap), Some(frozen)) = (&mut tap, &frozen) {
                tap.take(self.step + 1, &batch, hidden.clone().inner(), frozen)?;
            }
            let output = self.loss.forward(self.step, hidden, self.model.lm_head(), &batch)?;
            let mut sum = output.sum;
            loss_sum += output.value;
            if let Some(aux) = self.balance.gather(&routings) {
                let value = scalar(&aux);
                *aux_sum.get_or_insert(0.0) += value;
                loss_sum += value * config.router_aux_weight;
                if config.router_aux_weight != 0.0 {
                    sum = sum + aux * config.router_aux_weight;
                }
            }
            if let Some(sums) = &output.soft {
                soft.get_or_insert_default().join(sums);
            }
            hard.join(&output.hard);
            token_count += output.token_count;
            weights.soft += output.weights.soft;
            weights.hard += output.weights.hard;
            self.optimizer.gather(&mut self.model, sum.backward());
        }
        let count = token_count.max(1) as f64;
        let loss = loss_sum / count;
        if !loss.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the loss of step {}", self.step + 1),
                tip: "lower the learning rate, and start again from the last checkpoint".into(),
            });
        }
        let learning_rate = config.learning_rate.value(self.step, config.steps);
        let grad_norm = self.optimizer.step(&mut self.model, learning_rate, token_count)?;
        self.balance.end_step();
        self.loss.end_step(self.step, soft.as_ref(), &hard);
        self.step += 1;
        self.tokens_seen += token_count;
        let elapsed = began.elapsed().as_secs_f64();
        let metrics = StepMetrics {
            arm: config.arm.clone(),
            step: self.step,
            total_steps: config.steps,
            tokens_seen: self.tokens_seen,
            epoch: (self.step - 1) * config.sequences_per_step / sequence_count.max(1),
            loss,
            soft_loss: soft.map(|soft| soft.mean()),
            hard_loss: hard.mean(),
            soft_weight: weights.soft / count,
            hard_weight: weights.hard / count,
            soft_gradient_norm: soft.map(|soft| soft.gradient_norm()),
            hard_gradient_norm: hard.gradient_norm(),
            aux_loss: aux_sum.map(|sum| sum / count),
            learning_rate,
            grad_norm,
            tokens_per_second: token_count as f64 / elapsed,
            data_wait: waited.as_secs_f64() / elapsed,
            expert_load: self.balance.shares().to_vec(),
        };
        Ok((metrics, waited))
    }

    /// Trains to the last step, or until asked to stop; leaves a checkpoint either way. The batches of the next steps are
    /// read in the background.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when asked to stop, once the state is saved.
    pub fn run(&mut self, source: &dyn TargetSource, output: TrainOutput<'_>) -> Result<()> {
        let (config, mut order) = (self.config.clone(), self.order.clone());
        let steps = self.step..config.steps;
        let batches = steps.flat_map(move |step| micro_batches(&config, &mut order, step));
        Prefetcher::run(source, batches, Prefetch::default(), |batches| self.run_on(batches, source, output))
    }

    fn run_on(
        &mut self,
        batches: &mut Prefetcher<'_, '_>,
        source: &dyn TargetSource,
        mut output: TrainOutput<'_>,
    ) -> Result<()> {
        let mut next = || Ok(batches.next_batch()?.expect("as many as the steps take"));
        // Metrics are numbered by steps done, so those up to the checkpoint stay.
        let resumed = (self.step > 0).then_some(self.step + 1);
        std::fs::create_dir_all(&output.dir).map_err(Error::io(&output.dir))?;
        let mut metrics = MetricsWriter::open(&output.metrics, &self.config.arm, resumed)?;
        let mut progress = Some(output.progress.starting_at(self.tokens_in(self.step, source)));
        let mut saved = self.step;
        let (mut rate_tokens, mut rate_waited, mut rate_began) = (0, Duration::ZERO, Instant::now());
        while self.step < self.config.steps {
            let before = self.tokens_seen;
            let tap = output.tap.as_mut().map(|tap| &mut **tap as &mut dyn Tap);
            let (mut step, waited) = self.step_on(&mut next, source.sequence_count(), tap)?;
            rate_waited += waited;
            rate_tokens += self.tokens_seen - before;
            if let Some(progress) = &progress {
                progress.advance(self.config.sequences_per_step * source.seq_len() as u64);
            }
            let every = |interval: u64| interval > 0 && self.step.is_multiple_of(interval);
            let last = self.step == self.config.steps;
            if every(self.config.log_every) || last || self.step == 1 {
                let seconds = rate_began.elapsed().as_secs_f64();
                step.tokens_per_second = rate_tokens as f64 / seconds;
                step.data_wait = rate_waited.as_secs_f64() / seconds;
                if let Some(progress) = &progress {
                    progress.message(&format!("loss {:.3}", step.loss));
                }
                metrics.write(step)?;
                (rate_tokens, rate_waited, rate_began) = (0, Duration::ZERO, Instant::now());
            }
            if every(self.config.evaluate_every)
                && !last
                && let Some(evaluate) = &mut output.evaluate
            {
                let evaluation = evaluate(&self.model.frozen())?;
                metrics.write(EvalMetrics { arm: self.config.arm.clone(), step: self.step, ..evaluation })?;
                (rate_tokens, rate_waited, rate_began) = (0, Duration::ZERO, Instant::now());
            }
            let stop = output.stop.load(Ordering::Relaxed);
            if every(self.config.checkpoint_every) || last || stop {
                metrics.sync()?;
                self.save_with(&output.dir, &output.files, output.tap.as_deref_mut())?;
                saved = self.step;
            }
            if stop && !last {
                return Err(Error::Interrupted { saved: checkpoint_dir(&output.dir, saved) });
            }
        }
        if let Some(progress) = progress.take() {
            progress.finish();
        }
        Ok(())
    }

    fn tokens_in(&self, steps: u64, source: &dyn TargetSource) -> u64 {
        steps * self.config.sequences_per_step * source.seq_len() as u64
    }

    /// Writes a checkpoint of this step, complete or not at all, and drops the oldest.
    pub fn save(&mut self, dir: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
        self.save_with(dir, files, None)
    }

    /// As [`Trainer::save`], with what a tap has to keep.
    fn save_with(
        &mut self,
        dir: &Path,
        files: &[(String, Vec<u8>)],
        mut tap: Option<&mut (dyn Tap + '_)>,
    ) -> Result<()> {
        let mut state = TrainState {
            step: self.step,
            tokens_seen: self.tokens_seen,
            values: json!({
                "run": self.identity,
                "expert_shares": self.balance.shares(),
                "weighting": self.loss.state(),
            }),
            tensors: Default::default(),
        };
        self.optimizer.save(&mut state);
        let path = checkpoint_dir(dir, self.step);
        let export = Export { dtype: StoredDtype::F32, max_shard_bytes: None, replace: true };
        write_model_with(&mut self.model, &path, &export, files, &mut |partial| {
            state.save(partial)?;
            tap.as_mut().map_or(Ok(()), |tap| tap.keep(partial))
        })?;
        if self.config.keep_checkpoints > 0 {
            keep_latest(dir, self.config.keep_checkpoints)?;
        }
        Ok(())
    }
}

/// The sequences of a step, by micro-batches.
fn micro_batches(config: &TrainConfig, order: &mut SequenceOrder, step: u64) -> Vec<Vec<u64>> {
    let numbers = order.take(step * config.sequences_per_step, config.sequences_per_step);
    numbers.chunks(config.sequences_per_micro_batch.max(1) as usize).map(<[u64]>::to_vec).collect()
}

/// Everything that decides the weights, but how a step is cut into micro-batches.
fn identity(config: &TrainConfig, model: &Decoder, loss: &DistillLoss) -> serde_json::Value {
    json!({
        "arm": config.arm,
        "data": config.data,
        "seed": config.seed.to_string(),
        "steps": config.steps,
        "sequences_per_step": config.sequences_per_step,
        "learning_rate": config.learning_rate,
        "optimizer": config.optimizer,
        "router_aux_weight": config.router_aux_weight,
        "loss": loss.config(),
        "student": model.config.json,
    })
}

/// The first value of `mine` that `theirs` has otherwise: its dotted name and both values. Keys that one side lacks
/// say nothing.
fn first_difference(
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

/// How a model is written.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    pub dtype: StoredDtype,
    /// Most bytes in one file of weights; `None` for the writer's default.
    pub max_shard_bytes: Option<u64>,
    /// Replace a checkpoint of the same name, once the new one is complete.
    pub replace: bool,
}

/// Writes a model in Hugging Face's layout, with the files given beside it.
pub fn write_model(
    model: &mut Decoder,
    dir: &Path,
    export: &Export,
    files: &[(String, Vec<u8>)],
    state: Option<&TrainState>,
) -> Result<()> {
    write_model_with(model, dir, export, files, &mut |partial| state.map_or(Ok(()), |state| state.save(partial)))
}

/// As [`write_model`], with whatever `more` puts into the directory.
fn write_model_with(
    model: &mut Decoder,
    dir: &Path,
    export: &Export,
    files: &[(String, Vec<u8>)],
    more: &mut dyn FnMut(&Path) -> Result<()>,
) -> Result<()> {
    let (mut specs, mut tensors) = (vec![], std::collections::BTreeMap::new());
    model.visit(&mut |name, parameter| {
        specs.push(TensorSpec::new(name, parameter.shape()));
        tensors.insert(name.to_string(), parameter.flat());
    });
    let mut config = model.config.json.clone();
    if let Some(keys) = config.as_object_mut() {
        keys.remove("torch_dtype");
        let name = match export.dtype {
            StoredDtype::F32 => "float32",
            StoredDtype::Bf16 => "bfloat16",
            StoredDtype::F16 => "float16",
        };
        keys.insert("dtype".into(), name.into());
    }
    let generation = json!({
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    });
    let generation = serde_json::to_vec_pretty(&generation).expect("plain JSON");
    let mut writer = CheckpointWriter::new(dir, &config, export.dtype)
        .with_overwrite(if export.replace { Overwrite::Replace } else { Overwrite::Refuse })
        .with_file("generation_config.json", generation);
    if let Some(bytes) = export.max_shard_bytes {
        writer = writer.with_max_shard_bytes(bytes);
    }
    for (name, bytes) in files {
        writer = writer.with_file(name.clone(), bytes.as_slice());
    }
    writer.with_extra(more).write(&specs, &mut |name| {
        let tensor = tensors.remove(name).expect("every tensor is written once");
        Ok(tensor.into_data().try_into_vec::<f32>().expect("weights are f32"))
    })
}
