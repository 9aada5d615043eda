//! The optimizer: gradients gathered over a step, their norm, and one update of every weight, by groups.

use std::collections::BTreeMap;

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use limbeck_kernels::norms::sum_of_squares;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use super::update::OptimizerKind;
use super::{
    groups::{Groups, ParameterGroup, is_vocabulary},
    update::{State, Update},
};
use crate::{
    checkpoint::TrainState,
    error::{Error, Result},
    models::Decoder,
};

/// Settings of the optimizer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerConfig {
    pub kind: OptimizerKind,
    pub betas: [f64; 2],
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the whole mean gradient; 0 for no limit.
    pub clip_norm: f64,
    /// Of Muon.
    pub momentum: f64,
    /// Weights with rates and decays of their own.
    pub groups: Vec<ParameterGroup>,
    pub precision: Precision,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            kind: OptimizerKind::Adamw,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.1,
            clip_norm: 1.0,
            momentum: 0.95,
            groups: vec![],
            precision: Precision::F32,
        }
    }
}

/// What the weights are that the model computes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    /// Rounded to bfloat16 after each step; the optimizer keeps the unrounded ones, which the updates add up in.
    Bf16,
}

/// Running moments of each weight, and the gradient gathered for the step to come.
pub struct Optimizer {
    config: OptimizerConfig,
    groups: Groups,
    states: BTreeMap<String, State>,
    /// The unrounded weights, where the model's are rounded.
    masters: BTreeMap<String, Tensor<1>>,
    gathered: BTreeMap<String, Tensor<1>>,
    updates: u64,
}

impl Optimizer {
    pub fn new(config: OptimizerConfig) -> Self {
        Optimizer {
            groups: Groups::new(config.weight_decay, &config.groups),
            config,
            states: BTreeMap::new(),
            masters: BTreeMap::new(),
            gathered: BTreeMap::new(),
            updates: 0,
        }
    }

    /// Takes over a model's weights before the first step: where they are rounded, the unrounded ones are kept here.
    ///
    /// # Errors
    /// For a group that no weight belongs to.
    pub fn adopt(&mut self, model: &mut Decoder) -> Result<()> {
        let mut names = vec![];
        model.visit(&mut |name, _| names.push(name.to_string()));
        if let Some(pattern) = self.groups.unused(&names) {
            return Err(Error::usage(
                format!("train.groups: no weight of the student is called `{pattern}`"),
                "`limbeck inspect --tensors CHECKPOINT` lists the names",
            ));
        }
        if self.config.precision == Precision::Bf16 {
            model.visit(&mut |name, mut parameter| {
                let (shape, weight) = (parameter.shape(), parameter.take());
                let rounded = rounded(&weight);
                self.masters.insert(name.to_string(), weight);
                parameter.set(rounded, &shape, true);
            });
        }
        Ok(())
    }

    /// The unrounded weight of a name, where the model's is rounded.
    pub fn master(&self, name: &str) -> Option<Tensor<1>> {
        self.masters.get(name).cloned()
    }

    /// Adds the gradients of one micro-batch, or of a part of one.
    pub fn gather(&mut self, model: &mut Decoder, mut gradients: Gradients) {
        model.visit(&mut |name, parameter| {
            let Some(gradient) = parameter.take_gradient(&mut gradients) else { return };
            let gradient = match self.gathered.remove(name) {
                Some(sum) => sum + gradient,
                None => gradient,
            };
            self.gathered.insert(name.to_string(), gradient);
        });
    }

    /// Norm of what was gathered, divided by `token_count`; before clipping.
    pub fn gradient_norm(&mut self, token_count: u64) -> f64 {
        let mut squares = 0.0;
        for (name, gradient) in std::mem::take(&mut self.gathered) {
            let (gradient, square) = sum_of_squares(gradient);
            squares += square;
            self.gathered.insert(name, gradient);
        }
        squares.sqrt() / token_count.max(1) as f64
    }

    /// Forgets what was gathered.
    pub fn discard(&mut self) {
        self.gathered.clear();
    }

    /// One update with what was gathered, divided by `token_count`; `norm` is its [`Optimizer::gradient_norm`].
    pub fn update(&mut self, model: &mut Decoder, learning_rate: f64, token_count: u64, norm: f64) {
        let clip = match self.config.clip_norm {
            limit if limit > 0.0 && norm > limit => limit / norm,
            _ => 1.0,
        };
        self.updates += 1;
        let config = &self.config;
        let update = Update {
            learning_rate,
            weight_decay: config.weight_decay,
            betas: config.betas,
            eps: config.eps,
            momentum: config.momentum,
            number: self.updates,
            gradient_scale: clip / token_count.max(1) as f64,
        };
        model.visit(&mut |name, mut parameter| {
            let Some(gradient) = self.gathered.remove(name) else { return };
            let shape = parameter.shape();
            let state = self.states.entry(name.to_string()).or_default();
            let (factor, weight_decay) = self.groups.of(name, parameter.is_vector());
            let update = Update { learning_rate: update.learning_rate * factor, weight_decay, ..update };
            // In bf16 the model's own values are dropped with this.
            let taken = parameter.take();
            let weight = self.masters.remove(name).unwrap_or(taken);
            let matrix = match *shape.as_slice() {
                [count] => [1, 1, count],
                [rows, columns] => [1, rows, columns],
                [stack, rows, columns] => [stack, rows, columns],
                _ => unreachable!("weights have one to three axes"),
            };
            let is_hidden = !parameter.is_vector() && !is_vocabulary(name) && !name.ends_with("router.weight");
            let weight = match self.config.kind {
                OptimizerKind::Muon if is_hidden => update.muon(weight, gradient, matrix, state),
                OptimizerKind::Adamw | OptimizerKind::Muon => update.adamw(weight, gradient, state),
                OptimizerKind::Lion => update.lion(weight, gradient, state),
                OptimizerKind::Adafactor => update.adafactor(weight, gradient, matrix, state),
            };
            if self.config.precision == Precision::Bf16 {
                parameter.set(rounded(&weight), &shape, true);
                self.masters.insert(name.to_string(), weight);
            } else {
                parameter.set(weight, &shape, true);
            }
        });
    }

    /// Puts the moments into a training state.
    pub fn save(&self, state: &mut TrainState) {
        let mut put = |name: String, tensor: &Tensor<1>| {
            let values = tensor.clone().into_data().try_into_vec::<f32>().expect("moments are f32");
            state.tensors.insert(name, (tensor.dims().to_vec(), values));
        };
        for (name, moments) in &self.states {
            moments.iter().for_each(|(kind, tensor)| put(format!("{kind}.{name}"), tensor));
        }
        self.masters.iter().for_each(|(name, weight)| put(format!("{MASTER}.{name}"), weight));
    }

    /// Takes the moments out of a training state of `updates` updates.
    ///
    /// # Errors
    /// When it has none for a weight.
    pub fn load(&mut self, state: &mut TrainState, model: &mut Decoder, updates: u64, device: &Device) -> Result<()> {
        let (mut missing, bf16) = (None, self.config.precision == Precision::Bf16);
        (self.states, self.masters, self.gathered) = Default::default();
        model.visit(&mut |name, parameter| {
            let count: usize = parameter.shape().iter().product();
            let mut take = |kind: &str| {
                let (_, values) = state.tensors.remove(&format!("{kind}.{name}"))?;
                let count = values.len();
                Some(Tensor::from_data(TensorData::new(values, [count]), device))
            };
            let found: State = KINDS.iter().filter_map(|kind| Some((*kind, take(kind)?))).collect();
            let master: Option<Tensor<1>> = take(MASTER);
            let has_length = |tensor: &Tensor<1>| tensor.dims() == [count];
            let whole = ["first", "second"].iter().all(|kind| found.get(kind).is_none_or(has_length))
                && (updates == 0 || !found.is_empty())
                && (!bf16 || master.as_ref().is_some_and(has_length));
            if !whole {
                missing = Some(name.to_string());
            }
            if !found.is_empty() {
                self.states.insert(name.to_string(), found);
            }
            if let Some(master) = master {
                self.masters.insert(name.to_string(), master);
            }
        });
        if let Some(name) = missing {
            return Err(Error::usage(
                format!("the training state has no moments for `{name}`"),
                "start from an earlier checkpoint, or afresh with another --run-dir",
            ));
        }
        self.updates = updates;
        Ok(())
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }
}

/// What states are called in checkpoints.
const KINDS: [&str; 4] = ["first", "second", "row", "column"];
const MASTER: &str = "master";

/// The nearest values that bfloat16 has.
fn rounded(weight: &Tensor<1>) -> Tensor<1> {
    let device = weight.device();
    let mut values = weight.clone().into_data().try_into_vec::<f32>().expect("weights are f32");
    values.par_iter_mut().for_each(|value| *value = half::bf16::from_f32(*value).to_f32());
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &device)
}
