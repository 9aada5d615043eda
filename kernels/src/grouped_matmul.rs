//! One matrix product per group of rows: each expert multiplies only the tokens that chose it.

use std::{mem::MaybeUninit, sync::Arc};

use burn::tensor::Tensor;
use rayon::prelude::*;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    packed_matmul::{Instructions, Operand, Product, multiply_then},
    rows::written_by,
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

/// Gradients of so many bytes are written past the caches, which they do not fit into.
const STREAMED: usize = 32 << 20;

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
        let multiply = |mut rest: &mut [MaybeUninit<f32>]| {
            let mut products = vec![];
            for (bounds, values) in self.offsets.windows(2).zip(weights.chunks_exact(inputs * outputs)) {
                let (output, after) = rest.split_at_mut((bounds[1] - bounds[0]) * outputs);
                let rows = &rows[bounds[0] * inputs..bounds[1] * inputs];
                products.push(Product::into_unwritten(rows, operand(values), output));
                rest = after;
            }
            assert!(rest.is_empty(), "a group for each row");
            multiply_then(Instructions::best(), products, |_| ());
        };
        // SAFETY: products are written whole, and they are all there is.
        unsafe { written_by(rows.len() / inputs * outputs, multiply) }
    }

    /// For each group the transpose of its rows times the gradient of its results, into memory that nothing is written to
    /// before: with many experts that takes as long as a tenth of a step.
    ///
    /// # Shapes
    /// - `x` `[N, inner]`, `grad` `[N, outer]`; the result `[G, inner, outer]`
    fn weight_gradient(&self, x: &[f32], grad: &[f32], [inner, outer]: [usize; 2]) -> Vec<f32> {
        let length = (self.offsets.len() - 1) * inner * outer;
        let multiply = |places: &mut [MaybeUninit<f32>]| {
            let (mut products, mut unused) = (vec![], vec![]);
            for (place, bounds) in places.chunks_exact_mut(inner * outer).zip(self.offsets.windows(2)) {
                let inputs = bounds[1] - bounds[0];
                if inputs == 0 {
                    unused.push(place);
                    continue;
                }
                let values = &grad[bounds[0] * outer..bounds[1] * outer];
                let operand = Operand::RowMajor { values, inputs, outputs: outer };
                let x = &x[bounds[0] * inner..bounds[1] * inner];
                products.push(Product::of_columns(x, operand, place, length * size_of::<f32>() >= STREAMED));
            }
            unused.into_par_iter().for_each(|place| place.fill(MaybeUninit::new(0.0)));
            multiply_then(Instructions::best(), products, |_| ());
        };
        // SAFETY: there is a place for each group, and each is filled: with zeros or by a product.
        unsafe { written_by(length, multiply) }
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
        let weight_grad = needed[1].then(|| self.weight_gradient(x.data, grad, [inner, outer]));
        vec![x_grad, weight_grad]
    }
}
