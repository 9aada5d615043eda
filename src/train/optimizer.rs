//! AdamW over a model's weights, in two groups: matrices decay, vectors (norms and biases) do not.

use std::collections::BTreeMap;

use burn::tensor::{Device, Gradients, Tensor, TensorData};
use limbeck_kernels::{
    adamw::{AdamwState, AdamwStep},
    norms::sum_of_squares,
};

use serde::Serialize;

use crate::{
    checkpoint::TrainState,
    error::{Error, Result},
    models::Decoder,
};

/// Settings of the optimizer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OptimizerConfig {
    pub betas: [f64; 2],
    pub eps: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the whole mean gradient; 0 for no limit.
    pub clip_norm: f64,
}

/// Running moments of each weight, and the gradient gathered for the step to come.
pub struct Optimizer {
    config: OptimizerConfig,
    states: BTreeMap<String, AdamwState>,
    gathered: BTreeMap<String, Tensor<1>>,
    updates: u64,
}

impl Optimizer {
    pub fn new(config: OptimizerConfig) -> Self {
        Optimizer { config, states: BTreeMap::new(), gathered: BTreeMap::new(), updates: 0 }
    }

    /// Adds the gradients of one micro-batch.
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

    /// One update with what was gathered, divided by `token_count`. Gives the norm of the mean gradient before clipping.
    ///
    /// # Errors
    /// When the gradient is not finite; the weights are left as they were.
    pub fn step(&mut self, model: &mut Decoder, learning_rate: f64, token_count: u64) -> Result<f64> {
        let mut squares = 0.0;
        let gathered = std::mem::take(&mut self.gathered);
        let mut gradients = BTreeMap::new();
        for (name, gradient) in gathered {
            let (gradient, square) = sum_of_squares(gradient);
            squares += square;
            gradients.insert(name, gradient);
        }
        let count = token_count.max(1) as f64;
        let norm = squares.sqrt() / count;
        if !norm.is_finite() {
            return Err(Error::NotFinite {
                what: "the gradient's norm".into(),
                tip: "lower the learning rate or clip_norm, and start again from the last checkpoint".into(),
            });
        }
        let clip = match self.config.clip_norm {
            limit if limit > 0.0 && norm > limit => limit / norm,
            _ => 1.0,
        };
        self.updates += 1;
        let step = AdamwStep {
            learning_rate,
            beta1: self.config.betas[0],
            beta2: self.config.betas[1],
            eps: self.config.eps,
            weight_decay: self.config.weight_decay,
            update: self.updates,
            gradient_scale: clip / count,
        };
        model.visit(&mut |name, mut parameter| {
            let Some(gradient) = gradients.remove(name) else { return };
            let shape = parameter.shape();
            let state = self.states.remove(name).unwrap_or_else(|| {
                let count: usize = shape.iter().product();
                let zeros = || Tensor::zeros([count], &gradient.device());
                AdamwState { first_moment: zeros(), second_moment: zeros() }
            });
            let step = if parameter.is_vector() { AdamwStep { weight_decay: 0.0, ..step } } else { step };
            let (weight, state) = step.apply(parameter.take(), gradient, state);
            parameter.set(weight, &shape, true);
            self.states.insert(name.to_string(), state);
        });
        Ok(norm)
    }

    /// Puts the moments into a training state.
    pub fn save(&self, state: &mut TrainState) {
        let values = |tensor: &Tensor<1>| tensor.clone().into_data().try_into_vec::<f32>().expect("moments are f32");
        for (name, moments) in &self.states {
            for (kind, tensor) in [("first", &moments.first_moment), ("second", &moments.second_moment)] {
                state.tensors.insert(format!("{kind}.{name}"), (tensor.dims().to_vec(), values(tensor)));
            }
        }
    }

    /// Takes the moments out of a training state of `updates` updates.
    pub fn load(&mut self, state: &mut TrainState, model: &mut Decoder, updates: u64, device: &Device) -> Result<()> {
        let mut missing = None;
        model.visit(&mut |name, parameter| {
            let count: usize = parameter.shape().iter().product();
            let mut take = |kind: &str| {
                let (_, values) = state.tensors.remove(&format!("{kind}.{name}"))?;
                (values.len() == count).then(|| Tensor::from_data(TensorData::new(values, [count]), device))
            };
            match (take("first"), take("second")) {
                (Some(first_moment), Some(second_moment)) => {
                    self.states.insert(name.to_string(), AdamwState { first_moment, second_moment });
                }
                _ => missing = Some(name.to_string()),
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
}
