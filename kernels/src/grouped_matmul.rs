//! One matrix product per group of rows: each expert multiplies only the tokens that chose it.

use burn::tensor::Tensor;
use std::sync::Arc;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    gemm_call::{View, stacked},
    host_op::{self, Forward, HostArray, HostOp},
    packed_matmul::{Instructions, Operand, Product, multiply_then},
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

/// Rows of a weight's gradient that are one task: few enough that a large matrix is many. Fixed, so that no sum depends on
/// how many threads there are.
const ROW_BLOCK: usize = 256;

impl GroupedMatmul {
    /// The rows of each group times its matrix, as `operand` reads it.
    ///
    /// # Shapes
    /// - `rows` `[N, inputs]`, `weights` G matrices; the result `[N, outputs]`
    fn products<'a>(
        &self,
        rows: &'a [f32],
        weights: &'a [f32],
        [inputs, outputs]: [usize; 2],
        operand: impl Fn(&'a [f32]) -> Operand<'a>,
    ) -> Vec<f32> {
        let mut output = vec![0.0; rows.len() / inputs * outputs];
        let mut rest = &mut output[..];
        let mut products = vec![];
        for (bounds, values) in self.offsets.windows(2).zip(weights.chunks_exact(inputs * outputs)) {
            let (output, after) = rest.split_at_mut((bounds[1] - bounds[0]) * outputs);
            products.push(Product::new(&rows[bounds[0] * inputs..bounds[1] * inputs], operand(values), output));
            rest = after;
        }
        multiply_then(Instructions::best(), products, |_| ());
        output
    }
}

impl HostOp for GroupedMatmul {
    fn names(&self) -> [&'static str; 2] {
        ["grouped matmul", "grouped matmul backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (x, weights) = (inputs[0], inputs[1]);
        let (rows, inner, outer) = (x.shape[0], weights.shape[1], weights.shape[2]);
        let operand = |values| Operand::RowMajor { values, inputs: inner, outputs: outer };
        let output = self.products(x.data, weights.data, [inner, outer], operand);
        Forward { shape: vec![rows, outer], data: output, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        let (x, weights) = (inputs[0], inputs[1]);
        let (inner, outer) = (weights.shape[1], weights.shape[2]);
        let x_grad = needed[0].then(|| {
            let operand = |values| Operand::Transposed { values, inputs: outer, outputs: inner };
            self.products(grad, weights.data, [outer, inner], operand)
        });
        let weight_grad = needed[1].then(|| {
            let products: Vec<_> = self
                .offsets
                .windows(2)
                .map(|bounds| {
                    let (first, count) = (bounds[0], bounds[1] - bounds[0]);
                    (count > 0).then(|| {
                        let x = View::rows(&x.data[first * inner..], count, inner, inner);
                        [x.transposed(), View::rows(&grad[first * outer..], count, outer, outer)]
                    })
                })
                .collect();
            // Blocks of the rows of each matrix, the inputs.
            stacked(inner, outer, inner.min(ROW_BLOCK), &products)
        });
        vec![x_grad, weight_grad]
    }
}
