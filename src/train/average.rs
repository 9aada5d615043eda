//! A running mean of the weights: often better than the weights themselves while the learning rate is high, and free of
//! the noise of single steps. Follows the weights, and never changes them.

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};

use crate::{
    checkpoint::TrainState,
    error::{Error, Result},
    models::Decoder,
};

/// How the mean's tensors are called in a training state.
const PREFIX: &str = "average.";

/// The mean of each weight.
#[derive(Debug)]
pub struct WeightAverage {
    decay: f64,
    means: BTreeMap<String, Tensor<1>>,
}

impl WeightAverage {
    /// Begins with the weights as they are.
    pub fn new(decay: f64, model: &mut Decoder) -> Self {
        let mut means = BTreeMap::new();
        // A copy: the weights themselves are changed in place.
        model.visit(&mut |name, parameter| drop(means.insert(name.to_string(), parameter.flat() * 1.0)));
        WeightAverage { decay, means }
    }

    /// Follows the weights after `step` steps. The first steps count less than `decay` says, for there is little to be the
    /// mean of: the decay is at most `(1 + step) / (10 + step)`. `master` gives a weight in full precision, where that is
    /// not the model's.
    pub fn follow(&mut self, model: &mut Decoder, step: u64, master: &dyn Fn(&str) -> Option<Tensor<1>>) {
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        model.visit(&mut |name, parameter| {
            let Some(mean) = self.means.remove(name) else { return };
            let weight = master(name).unwrap_or_else(|| parameter.flat());
            self.means.insert(name.to_string(), mean * decay + weight * (1.0 - decay));
        });
    }

    /// The model with the mean's weights, outside any graph.
    pub fn model(&self, model: &Decoder) -> Decoder {
        let mut averaged = model.frozen();
        averaged.visit(&mut |name, mut parameter| {
            let shape = parameter.shape();
            parameter.set(self.means[name].clone(), &shape, false);
        });
        averaged
    }

    /// Puts the means into a training state.
    pub fn save(&self, state: &mut TrainState) {
        for (name, mean) in &self.means {
            let values = mean.clone().into_data().try_into_vec::<f32>().expect("weights are f32");
            state.tensors.insert(format!("{PREFIX}{name}"), (vec![values.len()], values));
        }
    }

    /// Takes the means out of a training state.
    ///
    /// # Errors
    /// When it has none of a weight.
    pub fn load(decay: f64, state: &mut TrainState, model: &mut Decoder, device: &Device) -> Result<Self> {
        let (mut means, mut missing) = (BTreeMap::new(), None);
        model.visit(&mut |name, parameter| {
            let count: usize = parameter.shape().iter().product();
            match state.tensors.remove(&format!("{PREFIX}{name}")).filter(|(_, values)| values.len() == count) {
                Some((_, values)) => {
                    let mean = Tensor::from_data(TensorData::new(values, [count]), device);
                    means.insert(name.to_string(), mean);
                }
                None => missing = Some(name.to_string()),
            }
        });
        match missing {
            None => Ok(WeightAverage { decay, means }),
            Some(name) => Err(Error::usage(
                format!("the training state has no running mean of `{name}`"),
                "remove train.ema, or start afresh with another --run-dir",
            )),
        }
    }
}
