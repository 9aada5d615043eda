//! Rows of a matrix picked by number: token embedding, and sending tokens to experts and back.

use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;
use std::sync::Arc;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    rows::{par_rows, row_chunk},
    vector_math::add_scaled,
};

/// Row `i` of the result is row `rows[i]` of `x`; a row may be picked often or never.
///
/// # Shapes
/// - `x` `[M, D]`, `rows` of N numbers below M, result `[N, D]`
pub fn gather_rows(x: Tensor<2>, rows: Arc<Vec<u32>>) -> Tensor<2> {
    if host_op::runs_on(&x.device()) {
        return host_op::apply(GatherRows { rows }, vec![x.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&x.device(), x.dtype()) {
        let [row_count, _] = x.dims();
        assert!(rows.iter().all(|&row| (row as usize) < row_count), "picks below the {row_count} rows there are");
        return device::op::apply(device::gather_rows::GatherRows { rows, row_count }, vec![x.into()]);
    }
    gather_rows_reference(x, &rows)
}

/// [`gather_rows`] in plain tensor operations.
pub fn gather_rows_reference(x: Tensor<2>, rows: &[u32]) -> Tensor<2> {
    let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
    let count = rows.len();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &x.device());
    x.select(0, rows)
}

#[derive(Debug)]
struct GatherRows {
    rows: Arc<Vec<u32>>,
}

impl HostOp for GatherRows {
    fn names(&self) -> [&'static str; 2] {
        ["gather rows", "gather rows backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let x = inputs[0];
        let width = x.width();
        let mut output = vec![0.0; self.rows.len() * width];
        par_rows(&mut output, width).zip(self.rows.par_chunks(row_chunk(width))).for_each(|(output, rows)| {
            for (output, &row) in output.chunks_mut(width).zip(rows) {
                output.copy_from_slice(&x.data[row as usize * width..][..width]);
            }
        });
        Forward { shape: vec![self.rows.len(), width], data: output, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        if !needed[0] {
            return vec![None];
        }
        let width = inputs[0].width();
        let mut x_grad = vec![0.0; inputs[0].data.len()];
        // In picking order on one thread: the sum of a row picked often must not depend on scheduling.
        for (grad, &row) in grad.chunks(width).zip(self.rows.iter()) {
            add_scaled(&mut x_grad[row as usize * width..][..width], 1.0, grad);
        }
        vec![Some(x_grad)]
    }
}
