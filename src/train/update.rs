//! What each optimizer makes of a weight, its gradient and what it remembers of earlier ones.
//!
//! One weight at a time, flat; which weights, with which rate and decay, is the optimizer's business. Decay is decoupled:
//! the weight loses `rate * decay` of itself, whatever the gradient is.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use limbeck_kernels::{
    adamw::{AdamwState, AdamwStep},
    host_op,
    norms::sum_of_squares,
};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// How gradients become updates.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// Loshchilov and Hutter 2019, arXiv 1711.05101.
    #[default]
    Adamw,
    /// Orthogonalised momentum for matrices between hidden states, AdamW for the rest. Jordan et al. 2024; scaled to
    /// AdamW's root mean square, so that rate and decay are AdamW's, as in Liu et al. 2025, arXiv 2502.16982.
    Muon,
    /// The sign of a momentum. Chen et al. 2023, arXiv 2302.06675.
    Lion,
    /// Second moments by rows and columns, and steps relative to the weight's size. Shazeer and Stern 2018,
    /// arXiv 1804.04235, with the settings that PyTorch gives it.
    Adafactor,
}

/// What is remembered of a weight, by name.
pub type State = BTreeMap<&'static str, Tensor<1>>;

/// The numbers of one update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Update {
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub betas: [f64; 2],
    pub eps: f64,
    /// Muon's.
    pub momentum: f64,
    /// Number of this update, from 1.
    pub number: u64,
    /// Factor on the gradient: clipping and the division by the token count in one.
    pub gradient_scale: f64,
}

/// Elements that one thread works on at a time.
const CHUNK: usize = 1 << 15;

impl Update {
    fn kept(&self) -> f64 {
        1.0 - self.learning_rate * self.weight_decay
    }

    /// # Shapes
    /// - `weight`, `gradient`, result `[N]`
    pub fn adamw(&self, weight: Tensor<1>, gradient: Tensor<1>, state: &mut State) -> Tensor<1> {
        let step = AdamwStep {
            learning_rate: self.learning_rate,
            beta1: self.betas[0],
            beta2: self.betas[1],
            eps: self.eps,
            weight_decay: self.weight_decay,
            update: self.number,
            gradient_scale: self.gradient_scale,
        };
        let mut take = |name| remembered(state, name, &gradient);
        let moments = AdamwState { first_moment: take("first"), second_moment: take("second") };
        let (weight, moments) = step.apply(weight, gradient, moments);
        state.insert("first", moments.first_moment);
        state.insert("second", moments.second_moment);
        weight
    }

    /// # Shapes
    /// - `weight`, `gradient`, result `[N]`
    pub fn lion(&self, weight: Tensor<1>, gradient: Tensor<1>, state: &mut State) -> Tensor<1> {
        let momentum = remembered(state, "first", &gradient);
        let device = weight.device();
        let [beta1, beta2] = self.betas;
        if !host_op::runs_on(&device) {
            let gradient = gradient * self.gradient_scale;
            let direction = (momentum.clone() * beta1 + gradient.clone() * (1.0 - beta1)).sign();
            state.insert("first", momentum * beta2 + gradient * (1.0 - beta2));
            return weight * self.kept() - direction * self.learning_rate;
        }
        let values = |tensor: Tensor<1>| tensor.into_data().try_into_vec::<f32>().expect("weights and moments are f32");
        let (mut weight, gradient, mut momentum) = (values(weight), values(gradient), values(momentum));
        let (beta1, rest1, beta2, rest2) = (beta1 as f32, (1.0 - beta1) as f32, beta2 as f32, (1.0 - beta2) as f32);
        let (kept, rate, scale) = (self.kept() as f32, self.learning_rate as f32, self.gradient_scale as f32);
        weight.par_chunks_mut(CHUNK).zip(momentum.par_chunks_mut(CHUNK)).zip(gradient.par_chunks(CHUNK)).for_each(
            |((weight, momentum), gradient)| {
                for ((weight, momentum), gradient) in weight.iter_mut().zip(momentum).zip(gradient) {
                    let gradient = gradient * scale;
                    let mixed = beta1 * *momentum + rest1 * gradient;
                    // A sum of exactly zero has no direction, which `signum` would give it.
                    let direction = if mixed == 0.0 { 0.0 } else { mixed.signum() };
                    *weight = *weight * kept - rate * direction;
                    *momentum = beta2 * *momentum + rest2 * gradient;
                }
            },
        );
        let give = |values: Vec<f32>| {
            let count = values.len();
            Tensor::from_data(TensorData::new(values, [count]), &device)
        };
        state.insert("first", give(momentum));
        give(weight)
    }

    /// Each matrix of a stack is orthogonalised on its own.
    ///
    /// # Shapes
    /// - `weight`, `gradient`, result `[N]`, the values of `shape`, whose last two axes are the matrix
    pub fn muon(&self, weight: Tensor<1>, gradient: Tensor<1>, shape: [usize; 3], state: &mut State) -> Tensor<1> {
        let momentum = remembered(state, "first", &gradient);
        let gradient = gradient * self.gradient_scale;
        let momentum = momentum * self.momentum + gradient.clone() * (1.0 - self.momentum);
        state.insert("first", momentum.clone());
        // Nesterov's: where the momentum would be after one more step of the same gradient.
        let ahead = gradient * (1.0 - self.momentum) + momentum * self.momentum;
        let direction = orthogonalised(ahead.reshape(shape)).flatten(0, -1);
        let rate = self.learning_rate * 0.2 * (shape[1].max(shape[2]) as f64).sqrt();
        weight * self.kept() - direction * rate
    }

    /// # Shapes
    /// - `weight`, `gradient`, result `[N]`, the values of `shape`; the second moments of a matrix, or of each matrix of a
    ///   stack, are kept by rows and columns, those of a vector (`shape` `[1, 1, N]`) one by one
    pub fn adafactor(&self, weight: Tensor<1>, gradient: Tensor<1>, shape: [usize; 3], state: &mut State) -> Tensor<1> {
        const LEAST: f64 = f32::EPSILON as f64;
        const LEAST_SIZE: f64 = 1e-3;
        let [stack, rows, columns] = shape;
        let count = (stack * rows * columns) as f64;
        let gradient = (gradient * self.gradient_scale).reshape(shape);
        let fresh = (self.number as f64).powf(-0.8);
        let squares = gradient.clone().square();
        let mut follow = |name, now: Tensor<1>| {
            let mean = remembered(state, name, &now) * (1.0 - fresh) + now * fresh;
            state.insert(name, mean.clone());
            mean
        };
        let estimate = if rows == 1 {
            follow("second", squares.flatten(0, -1)).reshape(shape)
        } else {
            let by_row = follow("row", squares.clone().mean_dim(2).flatten(0, -1)).reshape([stack, rows, 1]);
            let by_column = follow("column", squares.mean_dim(1).flatten(0, -1)).reshape([stack, 1, columns]);
            let mean = by_row.clone().mean_dim(1).clamp_min(LEAST);
            by_row * by_column / mean
        };
        let update = (gradient / estimate.clamp_min(LEAST * LEAST).sqrt()).flatten(0, -1);
        let root_mean_square = |tensor: Tensor<1>| {
            let (tensor, squares) = sum_of_squares(tensor);
            (tensor, (squares / count).sqrt())
        };
        let (update, size) = root_mean_square(update);
        let (weight, weight_size) = root_mean_square(weight);
        let rate = self.learning_rate.min((self.number as f64).sqrt().recip()) * weight_size.max(LEAST_SIZE);
        weight * self.kept() - update * (rate / size.max(1.0))
    }
}

/// What is remembered under a name; zeros at first.
fn remembered(state: &mut State, name: &'static str, like: &Tensor<1>) -> Tensor<1> {
    state.remove(name).unwrap_or_else(|| Tensor::zeros(like.dims(), &like.device()))
}

/// Matrices with about the same singular vectors and with singular values near 1: five rounds of a quintic Newton-Schulz
/// iteration (Jordan et al. 2024).
///
/// # Shapes
/// - `matrices` and result `[stack, rows, columns]`
fn orthogonalised(matrices: Tensor<3>) -> Tensor<3> {
    const COEFFICIENTS: (f64, f64, f64) = (3.4445, -4.7750, 2.0315);
    let [_, rows, columns] = matrices.dims();
    let tall = rows > columns;
    let x = if tall { matrices.swap_dims(1, 2) } else { matrices };
    let size = x.clone().square().sum_dim(2).sum_dim(1).sqrt().clamp_min(1e-7);
    let mut x = x / size;
    let (a, b, c) = COEFFICIENTS;
    for _ in 0..5 {
        let square = x.clone().matmul(x.clone().swap_dims(1, 2));
        let polynomial = square.clone() * b + square.clone().matmul(square) * c;
        x = x.clone() * a + polynomial.matmul(x);
    }
    if tall { x.swap_dims(1, 2) } else { x }
}
