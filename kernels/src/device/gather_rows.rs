//! Picked rows on a device: one launch each way. Picks are sorted by row on the host, so that each row of the gradient is
//! summed where it is written, in picking order and without atomics, and nothing but the gradient is in memory.

use std::sync::Arc;

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;

use super::{
    cube::gather_rows as kernels,
    op::{DeviceOp, Spec},
    tensors::{address, buffer, element, empty, threads, upload, vector_size, vectors},
};

/// Of one operand `[row_count, D]`.
#[derive(Debug)]
pub struct GatherRows {
    pub rows: Arc<Vec<u32>>,
    pub row_count: usize,
}

/// Picks by row.
#[derive(Debug, PartialEq)]
pub struct Sorted {
    /// Places in the list of picks, those of one row together and in ascending order.
    pub places: Vec<u32>,
    /// Where each row's places begin, and where the last one's end.
    pub starts: Vec<u32>,
}

impl Sorted {
    pub fn new(picks: &[u32], row_count: usize) -> Sorted {
        let mut starts = vec![0u32; row_count + 1];
        picks.iter().for_each(|&row| starts[row as usize + 1] += 1);
        for row in 0..row_count {
            starts[row + 1] += starts[row];
        }
        let mut next = starts.clone();
        let mut places = vec![0; picks.len()];
        for (place, &row) in picks.iter().enumerate() {
            let next = &mut next[row as usize];
            places[*next as usize] = place as u32;
            *next += 1;
        }
        Sorted { places, starts }
    }
}

impl DeviceOp for GatherRows {
    fn outputs(&self, inputs: &[Spec]) -> Vec<Spec> {
        vec![Spec::new([self.rows.len(), inputs[0].shape[1]], inputs[0].dtype)]
    }

    fn reads_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[CubeTensor]) -> (CubeTensor, Vec<CubeTensor>) {
        let x = &inputs[0];
        let width = x.meta.shape()[1];
        let output = empty(x, [self.rows.len(), width], x.dtype);
        let vector = vector_size(x, width);
        let count = output.meta.num_elements() / vector;
        if count > 0 {
            let (cubes, dim) = threads(count);
            kernels::pick_rows::launch(
                &x.client,
                cubes,
                dim,
                address(&[x, &output]),
                vector,
                vectors(x, vector),
                buffer(&upload(&x.client, &self.rows), self.rows.len(), 4),
                vectors(&output, vector),
                count,
                width / vector,
                element(x.dtype).expect("asked for before"),
            );
        }
        (output, vec![])
    }

    fn backward(
        &self,
        _: &[CubeTensor],
        _: &[CubeTensor],
        grad: CubeTensor,
        needed: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        if !needed[0] {
            return vec![None];
        }
        let width = grad.meta.shape()[1];
        let x_grad = empty(&grad, [self.row_count, width], grad.dtype);
        let vector = vector_size(&grad, width);
        let count = x_grad.meta.num_elements() / vector;
        if count > 0 {
            let sorted = Sorted::new(&self.rows, self.row_count);
            let (cubes, dim) = threads(count);
            // Where nothing was picked there is no gradient to bind, and nothing is read.
            let nothing = empty(&grad, [1, vector], grad.dtype);
            let source = if grad.meta.num_elements() > 0 { &grad } else { &nothing };
            kernels::sum_picked_rows::launch(
                &grad.client,
                cubes,
                dim,
                address(&[&grad, &x_grad]),
                vector,
                vectors(source, vector),
                buffer(&upload(&grad.client, &sorted.places), sorted.places.len().max(1), 4),
                buffer(&upload(&grad.client, &sorted.starts), sorted.starts.len(), DType::U32.size()),
                vectors(&x_grad, vector),
                count,
                width / vector,
                element(grad.dtype).expect("asked for before"),
            );
        }
        vec![Some(x_grad)]
    }
}
