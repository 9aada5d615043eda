//! Rows times the transpose of a trained matrix, with both gradients as they are stored: nothing is transposed in memory.

use burn::tensor::Tensor;

use crate::{
    gemm_call::{View, multiply},
    host_op::{self, Forward, HostArray, HostOp},
};

/// `x W^T`
///
/// # Shapes
/// - `x` `[N, inputs]`, `weight` `[outputs, inputs]`, result `[N, outputs]`
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    assert_eq!(x.dims()[1], weight.dims()[1], "a row for the weights");
    if host_op::runs_on(&x.device()) {
        return host_op::apply(Linear, vec![x.into(), weight.into()]);
    }
    linear_reference(x, weight)
}

/// [`linear`] in plain tensor operations.
pub fn linear_reference(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

#[derive(Debug)]
struct Linear;

impl HostOp for Linear {
    fn names(&self) -> [&'static str; 2] {
        ["matrix product", "matrix product backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (x, weight) = (inputs[0], inputs[1]);
        let (rows, inner, outer) = (x.shape[0], x.width(), weight.shape[0]);
        let mut data = vec![0.0; rows * outer];
        let (x, weight) = (View::rows(x.data, rows, inner, inner), View::rows(weight.data, outer, inner, inner));
        multiply(&mut data, outer, false, 1.0, x, weight.transposed(), true);
        Forward { shape: vec![rows, outer], data, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (x, weight) = (inputs[0], inputs[1]);
        let (rows, inner, outer) = (x.shape[0], x.width(), weight.shape[0]);
        let grad = View::rows(grad, rows, outer, outer);
        let x_grad = needed[0].then(|| {
            let mut x_grad = vec![0.0; rows * inner];
            let weight = View::rows(weight.data, outer, inner, inner);
            multiply(&mut x_grad, inner, false, 1.0, grad, weight, true);
            x_grad
        });
        let weight_grad = needed[1].then(|| {
            let mut weight_grad = vec![0.0; outer * inner];
            let x = View::rows(x.data, rows, inner, inner);
            multiply(&mut weight_grad, inner, false, 1.0, grad.transposed(), x, true);
            weight_grad
        });
        vec![x_grad, weight_grad]
    }
}
