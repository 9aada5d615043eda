//! Rows of a matrix picked by number: token embedding, and sending tokens to experts and back.

use std::{mem::MaybeUninit, sync::Arc};

use burn::tensor::{Int, Tensor, TensorData};
use rayon::prelude::*;

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    rows::{put, row_chunk, written_by},
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
        let pick = |places: &mut [MaybeUninit<f32>]| {
            let chunks = places.par_chunks_mut(row_chunk(width) * width).zip(self.rows.par_chunks(row_chunk(width)));
            chunks.for_each(|(places, rows)| {
                for (place, &row) in places.chunks_exact_mut(width).zip(rows) {
                    put(place, &x.data[row as usize * width..][..width]);
                }
            });
        };
        // SAFETY: a place for each row, and each is put there.
        let data = unsafe { written_by(self.rows.len() * width, pick) };
        Forward { shape: vec![self.rows.len(), width], data, saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        if !needed[0] {
            return vec![None];
        }
        let width = inputs[0].width();
        let (first_pick, picks) = picks_by_row(&self.rows, inputs[0].data.len() / width);
        let add_up = |places: &mut [MaybeUninit<f32>]| {
            let chunks = places.par_chunks_mut(row_chunk(width) * width).zip(first_pick.par_chunks(row_chunk(width)));
            chunks.for_each(|(places, bounds)| {
                for (place, &(first, count)) in places.chunks_exact_mut(width).zip(bounds) {
                    let mut picks = picks[first as usize..][..count as usize].iter();
                    let gradient = |pick: &u32| &grad[*pick as usize * width..][..width];
                    match picks.next() {
                        None => place.fill(MaybeUninit::new(0.0)),
                        Some(pick) => {
                            let sum = put(place, gradient(pick));
                            picks.for_each(|pick| add_scaled(sum, 1.0, gradient(pick)));
                        }
                    }
                }
            });
        };
        // SAFETY: each row is zeros, or what was picked from it adds up to.
        vec![Some(unsafe { written_by(inputs[0].data.len(), add_up) })]
    }
}

/// For each row where its picks begin and how many they are, and all picks by row: those of one row in their order, in which
/// they are added up whoever does it.
fn picks_by_row(rows: &[u32], row_count: usize) -> (Vec<(u32, u32)>, Vec<u32>) {
    let mut bounds = vec![(0u32, 0u32); row_count];
    rows.iter().for_each(|&row| bounds[row as usize].1 += 1);
    let mut first = 0;
    for (begin, count) in &mut bounds {
        (*begin, first) = (first, first + *count);
        *count = 0;
    }
    let mut picks = vec![0; rows.len()];
    for (pick, &row) in rows.iter().enumerate() {
        let (begin, count) = &mut bounds[row as usize];
        picks[(*begin + *count) as usize] = pick as u32;
        *count += 1;
    }
    (bounds, picks)
}
