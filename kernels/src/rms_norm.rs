//! Root-mean-square normalisation over the last axis, with or without a weight.

use burn::tensor::Tensor;
use rayon::prelude::*;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    rows::{par_rows, row_chunk},
    vector_math::{dot, vectorised},
};

/// `x / sqrt(mean(x^2) + eps) * weight`.
///
/// # Shapes
/// - `x` `[N, D]`, `weight` `[D]`, result `[N, D]`
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    if host_op::runs_on(&x.device()) {
        return host_op::apply(RmsNorm { eps }, vec![x.into(), weight.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&x.device(), x.dtype()) && x.dtype() == weight.dtype() {
        return device::op::apply(device::rms_norm::RmsNorm { eps }, vec![x.into(), weight.into()]);
    }
    rms_norm_reference(x, eps) * weight.unsqueeze()
}

/// `x / sqrt(mean(x^2) + eps)`: normalisation without a weight, as Llama 4 applies to queries and keys.
///
/// # Shapes
/// - `x` `[N, D]`, result `[N, D]`
pub fn unit_rms(x: Tensor<2>, eps: f32) -> Tensor<2> {
    if host_op::runs_on(&x.device()) {
        return host_op::apply(RmsNorm { eps }, vec![x.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&x.device(), x.dtype()) {
        return device::op::apply(device::rms_norm::RmsNorm { eps }, vec![x.into()]);
    }
    rms_norm_reference(x, eps)
}

/// [`unit_rms`] in plain tensor operations.
pub fn rms_norm_reference(x: Tensor<2>, eps: f32) -> Tensor<2> {
    let mean_square = x.clone().powf_scalar(2.0).mean_dim(1);
    x / (mean_square + eps).sqrt()
}

/// One row; what it was multiplied by before the weight.
#[inline(always)]
pub(crate) fn norm_row(x: &[f32], weight: Option<&[f32]>, eps: f32, output: &mut [f32]) -> f32 {
    let scale = (dot(x, x) / x.len() as f32 + eps).sqrt().recip();
    vectorised(
        #[inline(always)]
        || match weight {
            Some(weight) => {
                for ((out, &x), &w) in output.iter_mut().zip(x).zip(weight) {
                    *out = x * scale * w;
                }
            }
            None => {
                for (out, &x) in output.iter_mut().zip(x) {
                    *out = x * scale;
                }
            }
        },
    );
    scale
}

#[derive(Debug)]
struct RmsNorm {
    eps: f32,
}

impl HostOp for RmsNorm {
    fn names(&self) -> [&'static str; 2] {
        ["rms_norm", "rms_norm backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (x, weight) = (inputs[0], inputs.get(1).map(|weight| weight.data));
        let width = x.width();
        let mut output = vec![0.0; x.data.len()];
        let mut inverse = vec![0.0; x.data.len() / width];
        par_rows(&mut output, width)
            .zip(inverse.par_chunks_mut(row_chunk(width)))
            .zip(x.data.par_chunks(row_chunk(width) * width))
            .for_each(|((output, inverse), x)| {
                for ((out, inverse), x) in output.chunks_mut(width).zip(inverse).zip(x.chunks(width)) {
                    *inverse = norm_row(x, weight, self.eps, out);
                }
            });
        Forward { shape: x.shape.to_vec(), data: output, saved: inverse }
    }

    fn backward(
        &self,
        inputs: &[HostArray<'_>],
        saved: &[f32],
        grad: &[f32],
        needed: &[bool],
    ) -> Vec<Option<Vec<f32>>> {
        let (x, weight) = (inputs[0], inputs.get(1).map(|weight| weight.data));
        let width = x.width();
        let mut x_grad = vec![0.0; x.data.len()];
        let weight_partials: Vec<Vec<f32>> = par_rows(&mut x_grad, width)
            .zip(saved.par_chunks(row_chunk(width)))
            .zip(x.data.par_chunks(row_chunk(width) * width))
            .zip(grad.par_chunks(row_chunk(width) * width))
            .map(|(((x_grad, inverse), x), grad)| {
                let mut weight_grad = vec![0.0; if weight.is_some() { width } else { 0 }];
                let mut scaled = vec![0.0; width];
                for (row, (x_grad, &inverse)) in x_grad.chunks_mut(width).zip(inverse).enumerate() {
                    let (x, grad) = (&x[row * width..][..width], &grad[row * width..][..width]);
                    vectorised(
                        #[inline(always)]
                        || match weight {
                            Some(weight) => {
                                for i in 0..width {
                                    scaled[i] = grad[i] * weight[i];
                                    weight_grad[i] += grad[i] * x[i] * inverse;
                                }
                            }
                            None => scaled.copy_from_slice(grad),
                        },
                    );
                    let along = dot(&scaled, x) * inverse * inverse * inverse / width as f32;
                    vectorised(
                        #[inline(always)]
                        || {
                            for i in 0..width {
                                x_grad[i] = scaled[i] * inverse - x[i] * along;
                            }
                        },
                    );
                }
                weight_grad
            })
            .collect();
        let mut grads = vec![needed[0].then_some(x_grad)];
        if weight.is_some() {
            let mut weight_grad = vec![0.0; width];
            for partial in weight_partials {
                weight_grad.iter_mut().zip(partial).for_each(|(sum, part)| *sum += part);
            }
            grads.push(needed[1].then_some(weight_grad));
        }
        grads
    }
}
