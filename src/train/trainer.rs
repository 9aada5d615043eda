//! A model in training: batches in, weights out, and the state that a run goes on from.
//!
//! Sums and counts are gathered over the micro-batches of a step and divided once. Knows nothing of recipes or teachers;
//! `training_loop` runs it to the end.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use burn::tensor::Device;
use serde_json::json;

use super::{
    average::WeightAverage,
    balance::LoadBalance,
    best::Best,
    config::first_difference,
    export::write_model_with,
    guard::{LossWatch, Reaction, Trouble},
    metrics::StepMetrics,
    optimizer::Optimizer,
    order::SequenceOrder,
    pass::{Pass, Sums},
    tap::Tap,
};
pub use super::{
    config::{Evaluate, TrainConfig, TrainOutput},
    export::{Export, write_model},
};
use crate::{
    checkpoint::{StoredDtype, TrainState, checkpoint_dir, latest_checkpoint},
    error::{Error, Result},
    loss::{DistillLoss, TargetSums, Weights},
    models::Decoder,
    profile::stage,
    targets::{DistillBatch, TargetSource},
};

/// Where a checkpoint keeps the running mean of the weights, as a model of its own.
pub const AVERAGE_DIR: &str = "ema";

/// A model in training.
pub struct Trainer {
    pub(super) config: TrainConfig,
    /// What must not change between the parts of one run.
    identity: serde_json::Value,
    pub(super) model: Decoder,
    loss: DistillLoss,
    optimizer: Optimizer,
    balance: LoadBalance,
    pub(super) average: Option<WeightAverage>,
    pub(super) order: SequenceOrder,
    pub(super) watch: LossWatch,
    /// The checkpoint that measured best.
    pub(super) best: Option<Best>,
    /// Steps done.
    pub(super) step: u64,
    pub(super) tokens_seen: u64,
}

/// A step that was computed, and the reason why its update was not made, if it was not.
pub(super) struct StepDone {
    pub metrics: StepMetrics,
    pub waited: Duration,
    pub trouble: Option<Trouble>,
}

impl Trainer {
    /// A fresh run of a model whose weights are tracked, over `sequence_count` sequences.
    ///
    /// # Errors
    /// For a group of weights that the model has none of.
    pub fn new(config: TrainConfig, mut model: Decoder, loss: DistillLoss, sequence_count: u64) -> Result<Self> {
        let mut optimizer = Optimizer::new(config.optimizer.clone());
        optimizer.adopt(&mut model)?;
        Ok(Trainer {
            identity: config.identity(&model, &loss),
            optimizer,
            balance: LoadBalance::default(),
            average: config.average.map(|decay| WeightAverage::new(decay, &mut model)),
            order: SequenceOrder::new(config.seed, sequence_count),
            watch: LossWatch::default(),
            best: None,
            step: 0,
            tokens_seen: 0,
            config,
            model,
            loss,
        })
    }

    /// Goes on from the latest checkpoint in `dir`, if there is one.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when anything that decides the weights is not as it was; micro-batches may change.
    pub fn resume(mut self, dir: &Path, device: &Device) -> Result<Self> {
        let Some((_, path)) = latest_checkpoint(dir)? else { return Ok(self) };
        self.restore(&path, device)?;
        tracing::info!("{}: going on from {}", self.config.arm, path.display());
        Ok(self)
    }

    /// Takes over everything that a checkpoint of this run holds.
    pub(super) fn restore(&mut self, path: &Path, device: &Device) -> Result<()> {
        let mut state = TrainState::load(path)?;
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
        self.model = Decoder::open(path, device)?;
        let inner = device.clone().inner();
        let updates = state.values["updates"].as_u64().unwrap_or(state.step);
        self.optimizer.load(&mut state, &mut self.model, updates, &inner)?;
        if let Some(decay) = self.config.average {
            self.average = Some(WeightAverage::load(decay, &mut state, &mut self.model, &inner)?);
        }
        fn value<T: serde::de::DeserializeOwned + Default>(state: &TrainState, key: &str) -> T {
            serde_json::from_value(state.values[key].clone()).unwrap_or_default()
        }
        self.balance = LoadBalance::with_state(value(&state, "expert_shares"), value(&state, "expert_biases"));
        self.loss = self.loss.clone().with_state(value(&state, "weighting"));
        self.watch = value(&state, "guards");
        self.best = value(&state, "best");
        if let Some(size) = state.values["sequences_per_micro_batch"].as_u64()
            && self.config.automatic_micro_batch
        {
            self.config.sequences_per_micro_batch = size;
        }
        (self.step, self.tokens_seen) = (state.step, state.tokens_seen);
        Ok(())
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

    /// The model outside any graph, as it is exported: experts are chosen by the router alone.
    pub fn model(&self) -> Decoder {
        let mut model = self.model.frozen();
        model.set_selection_biases(&[]);
        model
    }

    /// The running mean of the weights as a model, where one is kept.
    pub fn averaged_model(&self) -> Option<Decoder> {
        self.average.as_ref().map(|average| average.model(&self.model()))
    }

    /// The checkpoint that measured best so far.
    pub fn best(&self) -> Option<&Best> {
        self.best.as_ref()
    }

    /// One optimizer step on the sequences that are next in the order.
    ///
    /// # Errors
    /// When a guard holds the step back, unless it says that such steps are skipped.
    pub fn train_step(&mut self, source: &dyn TargetSource) -> Result<StepMetrics> {
        let batches = self.batches(self.step);
        let mut numbers = batches.clone().into_iter();
        let mut next = || source.read(&numbers.next().expect("as many as the step takes"));
        let done = self.step_on(&batches, &mut next, source.sequence_count(), None)?;
        let Some(trouble) = done.trouble else { return Ok(done.metrics) };
        let too_often = self.watch.hold_back(&self.config.guards, self.step + 1);
        if self.config.guards.reaction(&trouble) != Reaction::Skip || too_often {
            return Err(self.diverged(&trouble, too_often));
        }
        self.step += 1;
        Ok(done.metrics)
    }

    /// The sequences of a step, by micro-batches.
    pub(super) fn batches(&mut self, step: u64) -> Vec<Vec<u64>> {
        micro_batches(&self.config, &mut self.order, step + self.watch.passed_over)
    }

    /// A held-back step as an error; `too_often`: one in a row too many.
    pub(super) fn diverged(&self, trouble: &Trouble, too_often: bool) -> Error {
        let limit = self.config.guards.limit;
        let (row, other) = match too_often {
            true => (format!(", after {limit} others that did not count"), "raise train.guards.limit"),
            false => (String::new(), "let train.guards skip such steps or rewind"),
        };
        Error::Diverged {
            what: format!("step {} of the {}: {trouble}{row}", self.step + 1, self.config.arm),
            tip: format!("lower the learning rate and go on from the last checkpoint in another --run-dir, or {other}"),
        }
    }

    /// One optimizer step on the micro-batches that are next. A step that a guard holds back changes nothing.
    pub(super) fn step_on(
        &mut self,
        numbers: &[Vec<u64>],
        next: &mut dyn FnMut() -> Result<DistillBatch>,
        sequence_count: u64,
        tap: Option<&mut dyn Tap>,
    ) -> Result<StepDone> {
        let _span = stage("training step").with("step", self.step + 1);
        let began = Instant::now();
        let mut waited = Duration::ZERO;
        let (mut loss_sum, mut aux_sum, mut router_kl, mut token_count) = (0.0, None, None, 0);
        let (mut soft, mut hard): (Option<TargetSums>, _) = (None, TargetSums::default());
        let mut weights = Weights { soft: 0.0, hard: 0.0 };
        let mut tap = tap.filter(|tap| tap.takes(self.step + 1));
        // Its weights are those before the step, outside the graph.
        let frozen = tap.as_ref().map(|_| self.model.frozen());
        self.bias_selection();
        let pass = Pass {
            step: self.step,
            loss: &self.loss,
            router: &self.config.router,
            by_layers: self.config.checkpoint_activations,
        };
        for numbers in numbers {
            let (asked, span) = (Instant::now(), stage("wait for data"));
            let batch = next()?;
            drop(span);
            waited += asked.elapsed();
            refuse_targets_without_meaning(&batch, numbers)?;
            let shown = match (&mut tap, &frozen) {
                (Some(tap), Some(frozen)) => Some((&mut **tap as &mut dyn Tap, frozen)),
                _ => None,
            };
            let (model, optimizer) = (&mut self.model, &mut self.optimizer);
            let mut gather = |model: &mut Decoder, gradients| {
                let _span = stage("gather gradients");
                optimizer.gather(model, gradients);
            };
            let found = pass.run(model, &mut self.balance, &batch, shown, &mut gather)?;
            let Some(Sums { output, balance, router, router_kl: kl }) = found else {
                // The other micro-batches are taken all the same, so that the next step begins with its own.
                loss_sum = f64::NAN;
                continue;
            };
            loss_sum += output.value + router;
            if let Some(value) = balance {
                *aux_sum.get_or_insert(0.0) += value;
            }
            if let Some(value) = kl {
                *router_kl.get_or_insert(0.0) += value;
            }
            if let Some(sums) = &output.soft {
                soft.get_or_insert_default().join(sums);
            }
            hard.join(&output.hard);
            token_count += output.token_count;
            weights.soft += output.weights.soft;
            weights.hard += output.weights.hard;
        }
        drop(frozen);
        let config = &self.config;
        let count = token_count.max(1) as f64;
        let loss = loss_sum / count;
        let learning_rate = config.learning_rate.value(self.step, config.steps);
        let span = stage("optimizer");
        let grad_norm = self.optimizer.gradient_norm(token_count);
        let trouble = self.watch.trouble(&config.guards, loss, grad_norm);
        if trouble.is_none() {
            self.optimizer.update(&mut self.model, learning_rate, token_count, grad_norm);
            drop(span);
            self.balance.end_step(&config.router);
            self.loss.end_step(self.step, soft.as_ref(), &hard);
            self.watch.accept(&config.guards, self.step + 1, loss);
            self.step += 1;
            self.tokens_seen += token_count;
            if let Some(average) = &mut self.average {
                average.follow(&mut self.model, self.step, &|name| self.optimizer.master(name));
            }
        } else {
            self.optimizer.discard();
            self.balance.drop_step();
        }
        let elapsed = began.elapsed().as_secs_f64();
        let done = self.step.max(1);
        let metrics = StepMetrics {
            arm: config.arm.clone(),
            step: done,
            total_steps: config.steps,
            tokens_seen: self.tokens_seen,
            epoch: (done - 1 + self.watch.passed_over) * config.sequences_per_step / sequence_count.max(1),
            loss,
            soft_loss: soft.map(|soft| soft.mean()),
            hard_loss: hard.mean(),
            soft_weight: weights.soft / count,
            hard_weight: weights.hard / count,
            soft_gradient_norm: soft.map(|soft| soft.gradient_norm()),
            hard_gradient_norm: hard.gradient_norm(),
            aux_loss: aux_sum.map(|sum: f64| sum / count),
            router_kl: router_kl.map(|sum: f64| sum / count),
            learning_rate,
            grad_norm,
            tokens_per_second: token_count as f64 / elapsed,
            data_wait: waited.as_secs_f64() / elapsed,
            expert_load: self.balance.shares().to_vec(),
        };
        Ok(StepDone { metrics, waited, trouble })
    }

    /// Gives the model this step's selection biases.
    fn bias_selection(&mut self) {
        let config = &self.config.router;
        if config.bias_rate == 0.0 {
            return;
        }
        let share = config.bias_share(self.step, self.config.steps) as f32;
        let biases: Vec<Vec<f32>> = match share {
            0.0 => vec![],
            share => {
                self.balance.biases().iter().map(|biases| biases.iter().map(|bias| bias * share).collect()).collect()
            }
        };
        self.model.set_selection_biases(&biases);
    }

    /// Writes a checkpoint of this step, complete or not at all, and drops the oldest.
    pub fn save(&mut self, dir: &Path, files: &[(String, Vec<u8>)]) -> Result<()> {
        self.save_with(dir, files, None)
    }

    /// As [`Trainer::save`], with what a tap has to keep.
    pub(super) fn save_with(
        &mut self,
        dir: &Path,
        files: &[(String, Vec<u8>)],
        mut tap: Option<&mut (dyn Tap + '_)>,
    ) -> Result<()> {
        let _span = stage("checkpoint");
        let mut state = TrainState {
            step: self.step,
            tokens_seen: self.tokens_seen,
            values: json!({
                "run": self.identity,
                "updates": self.optimizer.updates(),
                "expert_shares": self.balance.shares(),
                "expert_biases": self.balance.biases(),
                "weighting": self.loss.state(),
                "guards": self.watch,
                "best": self.best,
                "sequences_per_micro_batch": self.config.sequences_per_micro_batch,
            }),
            tensors: Default::default(),
        };
        self.optimizer.save(&mut state);
        if let Some(average) = &self.average {
            average.save(&mut state);
        }
        let mut averaged = self.averaged_model();
        let path = checkpoint_dir(dir, self.step);
        let export = Export { dtype: StoredDtype::F32, max_shard_bytes: None, replace: true };
        write_model_with(&mut self.model, &path, &export, files, &mut |partial| {
            if let Some(averaged) = &mut averaged {
                write_model(averaged, &partial.join(AVERAGE_DIR), &export, files, None)?;
            }
            state.save(partial)?;
            tap.as_mut().map_or(Ok(()), |tap| tap.keep(partial))
        })?;
        self.after_saving(dir)
    }
}

/// The sequences of a step, by micro-batches.
pub(super) fn micro_batches(config: &TrainConfig, order: &mut SequenceOrder, step: u64) -> Vec<Vec<u64>> {
    let numbers = order.take(step * config.sequences_per_step, config.sequences_per_step);
    numbers.chunks(config.sequences_per_micro_batch.max(1) as usize).map(<[u64]>::to_vec).collect()
}

/// Refuses targets that are no log-probabilities, by the number of their sequence.
fn refuse_targets_without_meaning(batch: &DistillBatch, numbers: &[u64]) -> Result<()> {
    let Some(targets) = &batch.targets else { return Ok(()) };
    let seq_len = batch.seq_len().max(1);
    let row_of = |place: usize| targets.offsets.partition_point(|&offset| offset as usize <= place) - 1;
    for capture in &targets.captures {
        let kept = capture.log_probs.iter().position(|value| !value.is_finite()).map(row_of);
        // A tail may be empty, and a label may have no probability to speak of.
        let no_log = |value: &f32| value.is_nan() || *value == f32::INFINITY;
        let tail = capture.log_tail.iter().position(no_log);
        let label = capture.label_log_prob.iter().position(no_log);
        if let Some(row) = kept.or(tail).or(label) {
            let sequence = numbers.get(row / seq_len).copied().unwrap_or_default();
            return Err(Error::NotFinite {
                what: format!(
                    "a teacher's log-probability in row {} of sequence {sequence} of the training targets",
                    row % seq_len
                ),
                tip: "check the cache with `limbeck inspect --verify`, and precompute or import it again".into(),
            });
        }
    }
    Ok(())
}
