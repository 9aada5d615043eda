//! Packed weights in burn's graph: the products as operations on host tensors.

use std::sync::Arc;

use burn::tensor::{Tensor, TensorData};

use super::{Instructions, Operand, PackedMatrix, Product, multiply_then};
use crate::{
    gemm_call::{self, View},
    host_op::{self, Forward, HostArray, HostOp},
    profile,
};

/// `x W^T` with packed weights, which are constants to the gradient.
///
/// # Shapes
/// - `x` `[N, inputs]`, result `[N, outputs]`
///
/// # Panics
/// When the tensor is not on the processor (`flex`).
pub fn linear(x: Tensor<2>, weights: &Arc<PackedMatrix>) -> Tensor<2> {
    let rows = x.dims()[0];
    grouped(x, std::slice::from_ref(weights), Arc::new(vec![0, rows]))
}

/// Rows `offsets[e]..offsets[e + 1]` of `x` times matrix `e`.
///
/// # Shapes
/// - `x` `[N, inputs]`, sorted by group; `offsets` of E + 1 numbers from 0 to N; result `[N, outputs]`
///
/// # Panics
/// When the tensor is not on the processor (`flex`).
pub fn grouped(x: Tensor<2>, weights: &[Arc<PackedMatrix>], offsets: Arc<Vec<usize>>) -> Tensor<2> {
    assert!(host_op::runs_on(&x.device()), "packed weights multiply tensors of the processor");
    assert_eq!(offsets.len(), weights.len() + 1, "one offset more than groups");
    assert_eq!(x.dims()[1], weights[0].inputs(), "a row for the weights");
    host_op::apply(Products { weights: weights.to_vec(), offsets }, vec![x.into()])
}

/// The rows of `[outputs, inputs]` weights that have these numbers, as an embedding looks them up.
///
/// # Shapes
/// - result `[N, inputs]`, outside any graph
pub fn rows(weights: &PackedMatrix, numbers: &[u32], device: &burn::tensor::Device) -> Tensor<2> {
    let _span = profile::op("embedding rows").with("rows", numbers.len() as u64);
    let mut values = vec![0.0; numbers.len() * weights.inputs()];
    for (row, &number) in values.chunks_mut(weights.inputs()).zip(numbers) {
        weights.row(number as usize, row);
    }
    Tensor::from_data(TensorData::new(values, [numbers.len(), weights.inputs()]), device)
}

#[derive(Debug)]
struct Products {
    weights: Vec<Arc<PackedMatrix>>,
    offsets: Arc<Vec<usize>>,
}

impl Products {
    /// Each matrix that has rows, with the first of them and their number.
    fn groups(&self) -> impl Iterator<Item = (&PackedMatrix, usize, usize)> {
        let bounds = self.offsets.windows(2).map(|bounds| (bounds[0], bounds[1] - bounds[0]));
        self.weights.iter().zip(bounds).filter(|(_, (_, count))| *count > 0).map(|(w, (first, n))| (&**w, first, n))
    }
}

impl HostOp for Products {
    fn names(&self) -> [&'static str; 2] {
        ["packed product", "packed product backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (x, outputs) = (inputs[0], self.weights[0].outputs());
        let width = x.width();
        let mut data = vec![0.0; x.shape[0] * outputs];
        // All at once, so that no thread waits for another at the end of each.
        let mut rest = &mut data[..];
        let mut products = vec![];
        for (weights, first, count) in self.groups() {
            let (output, after) = rest.split_at_mut(count * outputs);
            products.push(Product::new(&x.data[first * width..][..count * width], Operand::Packed(weights), output));
            rest = after;
        }
        multiply_then(Instructions::best(), products, |_| ());
        Forward { shape: vec![x.shape[0], outputs], data, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (width, outputs) = (inputs[0].width(), self.weights[0].outputs());
        let x_grad = needed[0].then(|| {
            let mut x_grad = vec![0.0; inputs[0].data.len()];
            for (weights, first, count) in self.groups() {
                let unpacked = weights.unpacked();
                let grad = View::rows(&grad[first * outputs..], count, outputs, outputs);
                let weights = View::rows(&unpacked, outputs, width, width);
                gemm_call::multiply(&mut x_grad[first * width..], width, false, 1.0, grad, weights, true);
            }
            x_grad
        });
        vec![x_grad]
    }
}
