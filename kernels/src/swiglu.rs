//! The gated activation of Llama's feed-forward layers.

use burn::tensor::{Tensor, activation::silu};
use rayon::prelude::*;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    rows::{par_rows, row_chunk},
    vector_math::{exp, vectorised},
};

/// `silu(gate) * up`, where `gate_up` holds the gate half first.
///
/// # Shapes
/// - `gate_up` `[N, 2 * I]`, result `[N, I]`
pub fn swiglu(gate_up: Tensor<2>) -> Tensor<2> {
    if host_op::runs_on(&gate_up.device()) {
        return host_op::apply(Swiglu, vec![gate_up.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&gate_up.device(), gate_up.dtype()) {
        return device::op::apply(device::swiglu::Swiglu, vec![gate_up.into()]);
    }
    swiglu_reference(gate_up)
}

/// [`swiglu`] in plain tensor operations.
pub fn swiglu_reference(gate_up: Tensor<2>) -> Tensor<2> {
    let width = gate_up.dims()[1] / 2;
    silu(gate_up.clone().narrow(1, 0, width)) * gate_up.narrow(1, width, width)
}

/// `silu(gate) * up` of two separate tensors.
///
/// # Shapes
/// - `gate`, `up` and the result `[N, I]`
pub fn gated_silu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    if host_op::runs_on(&gate.device()) {
        return host_op::apply(Swiglu, vec![gate.into(), up.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&gate.device(), gate.dtype()) && gate.dtype() == up.dtype() {
        return device::op::apply(device::swiglu::Swiglu, vec![gate.into(), up.into()]);
    }
    silu(gate) * up
}

/// One operand `[N, 2I]` or two `[N, I]`.
#[derive(Debug)]
struct Swiglu;

/// The gate and up rows of row `row`, wherever they are.
#[inline(always)]
fn halves<'a>(inputs: &[HostArray<'a>], row: usize, width: usize) -> (&'a [f32], &'a [f32]) {
    match inputs {
        [gate_up] => gate_up.data[2 * row * width..][..2 * width].split_at(width),
        [gate, up, ..] => (&gate.data[row * width..][..width], &up.data[row * width..][..width]),
        [] => unreachable!("an operation has operands"),
    }
}

impl HostOp for Swiglu {
    fn names(&self) -> [&'static str; 2] {
        ["swiglu", "swiglu backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (rows, width) = (inputs[0].shape[0], inputs[0].width() / (3 - inputs.len()));
        let mut output = vec![0.0; rows * width];
        par_rows(&mut output, width).enumerate().for_each(|(chunk, output)| {
            for (row, output) in output.chunks_mut(width).enumerate() {
                let (gate, up) = halves(inputs, chunk * row_chunk(width) + row, width);
                vectorised(
                    #[inline(always)]
                    || {
                        for i in 0..width {
                            output[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
                        }
                    },
                );
            }
        });
        Forward { shape: vec![rows, width], data: output, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (rows, width) = (inputs[0].shape[0], inputs[0].width() / (3 - inputs.len()));
        let derivative = |row: usize, gate_grad: &mut [f32], up_grad: &mut [f32]| {
            let (gate, up) = halves(inputs, row, width);
            let grad = &grad[row * width..][..width];
            vectorised(
                #[inline(always)]
                || {
                    for i in 0..width {
                        let sigmoid = 1.0 / (1.0 + exp(-gate[i]));
                        let silu = gate[i] * sigmoid;
                        up_grad[i] = grad[i] * silu;
                        gate_grad[i] = grad[i] * up[i] * (sigmoid + silu * (1.0 - sigmoid));
                    }
                },
            );
        };
        if inputs.len() == 1 {
            let mut both = vec![0.0; rows * 2 * width];
            both.par_chunks_mut(2 * width).enumerate().with_min_len(row_chunk(width)).for_each(|(row, both)| {
                let (gate_grad, up_grad) = both.split_at_mut(width);
                derivative(row, gate_grad, up_grad);
            });
            return vec![needed[0].then_some(both)];
        }
        let (mut gate_grads, mut up_grads) = (vec![0.0; rows * width], vec![0.0; rows * width]);
        gate_grads
            .par_chunks_mut(width)
            .zip(up_grads.par_chunks_mut(width))
            .enumerate()
            .with_min_len(row_chunk(width))
            .for_each(|(row, (gate_grad, up_grad))| derivative(row, gate_grad, up_grad));
        vec![needed[0].then_some(gate_grads), needed[1].then_some(up_grads)]
    }
}
