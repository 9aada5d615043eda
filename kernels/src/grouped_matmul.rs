//! One matrix product per group of rows: each expert multiplies only the tokens that chose it.

use burn::tensor::Tensor;
use std::sync::Arc;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    gemm_call::{View, multiply},
    host_op::{self, Forward, HostArray, HostOp},
};

/// Rows `offsets[e]..offsets[e + 1]` of `x` times matrix `e` of `weights`.
///
/// # Shapes
/// - `x` `[N, D]`, sorted by group; `weights` `[E, D, F]`; `offsets` of E + 1 numbers from 0 to N; result `[N, F]`
pub fn grouped_matmul(x: Tensor<2>, weights: Tensor<3>, offsets: Arc<Vec<usize>>) -> Tensor<2> {
    assert_eq!(offsets.len(), weights.dims()[0] + 1, "one offset more than groups");
    if host_op::runs_on(&x.device()) {
        return host_op::apply(GroupedMatmul { offsets }, vec![x.into(), weights.into()]);
    }
    #[cfg(feature = "device")]
    if x.dtype() == weights.dtype()
        && let [_, inner, outer] = weights.dims()
        && let Some(cut) = device::grouped_matmul::cut(&x.device(), x.dtype(), inner, outer)
    {
        let op = device::grouped_matmul::GroupedMatmul { offsets, cut };
        return device::op::apply(op, vec![x.into(), weights.into()]);
    }
    grouped_matmul_reference(x, weights, &offsets)
}

/// [`grouped_matmul`] in plain tensor operations.
pub fn grouped_matmul_reference(x: Tensor<2>, weights: Tensor<3>, offsets: &[usize]) -> Tensor<2> {
    let [_, inner, outer] = weights.dims();
    let groups = offsets.windows(2).enumerate().filter(|(_, bounds)| bounds[0] < bounds[1]);
    let products: Vec<Tensor<2>> = groups
        .map(|(group, bounds)| {
            let weight = weights.clone().narrow(0, group, 1).reshape([inner, outer]);
            x.clone().narrow(0, bounds[0], bounds[1] - bounds[0]).matmul(weight)
        })
        .collect();
    Tensor::cat(products, 0)
}

#[derive(Debug)]
struct GroupedMatmul {
    offsets: Arc<Vec<usize>>,
}

impl GroupedMatmul {
    /// Calls `body` with each group that has rows: its number, first row and row count.
    fn each(&self, mut body: impl FnMut(usize, usize, usize)) {
        for (group, bounds) in self.offsets.windows(2).enumerate() {
            if bounds[0] < bounds[1] {
                body(group, bounds[0], bounds[1] - bounds[0]);
            }
        }
    }
}

impl HostOp for GroupedMatmul {
    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (x, weights) = (inputs[0], inputs[1]);
        let (rows, inner, outer) = (x.shape[0], weights.shape[1], weights.shape[2]);
        let mut output = vec![0.0; rows * outer];
        self.each(|group, first, count| {
            let x = View::rows(&x.data[first * inner..], count, inner, inner);
            let weight = View::rows(&weights.data[group * inner * outer..], inner, outer, outer);
            multiply(&mut output[first * outer..][..count * outer], outer, false, 1.0, x, weight, true);
        });
        Forward { shape: vec![rows, outer], data: output, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (x, weights) = (inputs[0], inputs[1]);
        let (inner, outer) = (weights.shape[1], weights.shape[2]);
        let x_grad = needed[0].then(|| {
            let mut x_grad = vec![0.0; x.data.len()];
            self.each(|group, first, count| {
                let grad = View::rows(&grad[first * outer..], count, outer, outer);
                let weight = View::rows(&weights.data[group * inner * outer..], inner, outer, outer).transposed();
                multiply(&mut x_grad[first * inner..][..count * inner], inner, false, 1.0, grad, weight, true);
            });
            x_grad
        });
        let weight_grad = needed[1].then(|| {
            let mut weight_grad = vec![0.0; weights.data.len()];
            self.each(|group, first, count| {
                let grad = View::rows(&grad[first * outer..], count, outer, outer);
                let x = View::rows(&x.data[first * inner..], count, inner, inner).transposed();
                let into = &mut weight_grad[group * inner * outer..][..inner * outer];
                multiply(into, outer, false, 1.0, x, grad, true);
            });
            weight_grad
        });
        vec![x_grad, weight_grad]
    }
}
