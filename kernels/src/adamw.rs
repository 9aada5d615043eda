//! AdamW with decoupled weight decay (Loshchilov and Hutter, 2019, algorithm 2), one pass over memory on the host, one
//! launch on a device.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;

#[cfg(feature = "device")]
use crate::device;
use crate::{host_op, profile, vector_math::vectorised};

/// The numbers of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Share of the weight that is taken off per unit of learning rate.
    pub weight_decay: f64,
    /// Number of this update, from 1, for bias correction.
    pub update: u64,
    /// Factor on the gradient: clipping and the division by the token count in one.
    pub gradient_scale: f64,
}

/// One weight with its running moments.
#[derive(Debug, Clone)]
pub struct AdamwState {
    pub first_moment: Tensor<1>,
    pub second_moment: Tensor<1>,
}

impl AdamwStep {
    fn corrections(&self) -> (f64, f64) {
        let power = |beta: f64| 1.0 - beta.powf(self.update as f64);
        (power(self.beta1).recip(), power(self.beta2).recip())
    }

    /// The updated weight and moments.
    ///
    /// # Shapes
    /// - all tensors `[N]`
    pub fn apply(&self, weight: Tensor<1>, gradient: Tensor<1>, state: AdamwState) -> (Tensor<1>, AdamwState) {
        if host_op::runs_on(&weight.device()) {
            return self.on_host(weight, gradient, state);
        }
        #[cfg(feature = "device")]
        if device::adamw::takes(&[&weight, &gradient, &state.first_moment, &state.second_moment]) {
            return self.on_device(weight, gradient, state);
        }
        self.reference(weight, gradient, state)
    }

    #[cfg(feature = "device")]
    fn on_device(&self, weight: Tensor<1>, gradient: Tensor<1>, state: AdamwState) -> (Tensor<1>, AdamwState) {
        let (first_correction, second_correction) = self.corrections();
        let numbers = device::adamw::Numbers {
            scale: self.gradient_scale as f32,
            beta1: self.beta1 as f32,
            rest1: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            rest2: (1.0 - self.beta2) as f32,
            second_correction: second_correction as f32,
            eps: self.eps as f32,
            keep: (1.0 - self.learning_rate * self.weight_decay) as f32,
            rate: (self.learning_rate * first_correction) as f32,
        };
        let moments = [state.first_moment, state.second_moment];
        let [weight, first_moment, second_moment] = device::adamw::update(weight, gradient, moments, numbers);
        (weight, AdamwState { first_moment, second_moment })
    }

    /// [`AdamwStep::apply`] in plain tensor operations.
    pub fn reference(&self, weight: Tensor<1>, gradient: Tensor<1>, state: AdamwState) -> (Tensor<1>, AdamwState) {
        let (first_correction, second_correction) = self.corrections();
        let gradient = gradient * self.gradient_scale;
        let first = state.first_moment * self.beta1 + gradient.clone() * (1.0 - self.beta1);
        let second = state.second_moment * self.beta2 + gradient.clone() * gradient * (1.0 - self.beta2);
        let direction = first.clone() * first_correction / ((second.clone() * second_correction).sqrt() + self.eps);
        let weight = weight * (1.0 - self.learning_rate * self.weight_decay) - direction * self.learning_rate;
        (weight, AdamwState { first_moment: first, second_moment: second })
    }

    fn on_host(&self, weight: Tensor<1>, gradient: Tensor<1>, state: AdamwState) -> (Tensor<1>, AdamwState) {
        let device = weight.device();
        let _span = profile::op("adamw").with("weights", weight.dims()[0] as u64);
        let take = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().expect("weights and moments are f32");
        let (mut weight, gradient) = (take(weight), take(gradient));
        let (mut first, mut second) = (take(state.first_moment), take(state.second_moment));
        let (first_correction, second_correction) = self.corrections();
        let (beta1, beta2) = (self.beta1 as f32, self.beta2 as f32);
        let (rest1, rest2) = ((1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32);
        let keep = (1.0 - self.learning_rate * self.weight_decay) as f32;
        let rate = (self.learning_rate * first_correction) as f32;
        let (second_correction, eps, scale) = (second_correction as f32, self.eps as f32, self.gradient_scale as f32);
        const CHUNK: usize = 1 << 15;
        weight
            .par_chunks_mut(CHUNK)
            .zip(first.par_chunks_mut(CHUNK))
            .zip(second.par_chunks_mut(CHUNK))
            .zip(gradient.par_chunks(CHUNK))
            .for_each(|(((weight, first), second), gradient)| {
                vectorised(
                    #[inline(always)]
                    || {
                        for i in 0..weight.len() {
                            let g = gradient[i] * scale;
                            first[i] = beta1 * first[i] + rest1 * g;
                            second[i] = beta2 * second[i] + rest2 * g * g;
                            let direction = first[i] / ((second[i] * second_correction).sqrt() + eps);
                            weight[i] = weight[i] * keep - rate * direction;
                        }
                    },
                );
            });
        let give = |values: Vec<f32>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), &device)
        };
        (give(weight), AdamwState { first_moment: give(first), second_moment: give(second) })
    }
}
