//! Rotary position embedding, in the two layouts that checkpoints use.

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use std::{collections::HashMap, sync::Arc};

#[cfg(feature = "device")]
use crate::device;
use crate::{
    host_op::{self, Forward, HostArray, HostOp},
    rows::{par_rows, row_chunk},
    vector_math::vectorised,
};

/// Which two channels of a head turn together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Channels `2j` and `2j + 1` (Llama 4, Meta's own Llama checkpoints).
    Interleaved,
    /// Channels `j` and `j + d / 2` (Hugging Face's Llama 2 and 3, Qwen, Mistral).
    Halves,
}

/// Cosines and sines for each token: `[N, d / 2]` each, row-major.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    pub cosines: Arc<Vec<f32>>,
    pub sines: Arc<Vec<f32>>,
    pub pairing: Pairing,
    #[cfg(feature = "device")]
    pub(crate) uploaded: device::rotary::Uploaded,
}

impl RotaryTable {
    /// Angles `position * frequency` in `f32`, as the reference implementations compute them.
    pub fn new(positions: &[u32], frequencies: &[f32], pairing: Pairing) -> Self {
        // Positions come again in every document of a batch: each has its angles computed once.
        let mut places = HashMap::new();
        let mut distinct = vec![];
        let rows: Vec<usize> = positions
            .iter()
            .map(|&position| {
                *places.entry(position).or_insert_with(|| {
                    distinct.push(position);
                    distinct.len() - 1
                })
            })
            .collect();
        let width = frequencies.len();
        let of_all = |of: fn(f32) -> f32| {
            let each = distinct.iter().flat_map(|&position| frequencies.iter().map(move |&f| of(position as f32 * f)));
            let each: Vec<f32> = each.collect();
            let mut all = Vec::with_capacity(rows.len() * width);
            rows.iter().for_each(|row| all.extend_from_slice(&each[row * width..][..width]));
            Arc::new(all)
        };
        RotaryTable {
            cosines: of_all(f32::cos),
            sines: of_all(f32::sin),
            pairing,
            #[cfg(feature = "device")]
            uploaded: Default::default(),
        }
    }
}

impl RotaryTable {
    /// Turns the heads of one token.
    pub(crate) fn turn_in_place(&self, token: usize, heads: &mut [f32], head_dim: usize) {
        let half = head_dim / 2;
        let (cosines, sines) = (&self.cosines[token * half..][..half], &self.sines[token * half..][..half]);
        vectorised(
            #[inline(always)]
            || {
                for head in heads.chunks_mut(head_dim) {
                    match self.pairing {
                        Pairing::Interleaved => {
                            for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                                let [a, b] = *pair;
                                *pair = [a * c - b * s, a * s + b * c];
                            }
                        }
                        Pairing::Halves => {
                            let (low, high) = head.split_at_mut(half);
                            for (((a, b), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
                                (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                            }
                        }
                    }
                }
            },
        );
    }
}

/// Turns every head of every token by its position's angles.
///
/// # Shapes
/// - `x` `[N, heads * head_dim]`, table for N tokens and `head_dim / 2` frequencies, result `[N, heads * head_dim]`
pub fn rotary(x: Tensor<2>, head_dim: usize, table: &RotaryTable) -> Tensor<2> {
    if host_op::runs_on(&x.device()) {
        return host_op::apply(Rotary { head_dim, table: table.clone() }, vec![x.into()]);
    }
    #[cfg(feature = "device")]
    if device::op::runs_on(&x.device(), x.dtype()) {
        return device::op::apply(device::rotary::Rotary { head_dim, table: table.clone() }, vec![x.into()]);
    }
    rotary_reference(x, head_dim, table)
}

/// [`rotary`] in plain tensor operations.
pub fn rotary_reference(x: Tensor<2>, head_dim: usize, table: &RotaryTable) -> Tensor<2> {
    let [tokens, width] = x.dims();
    let (heads, half) = (width / head_dim, head_dim / 2);
    let device = x.device();
    // (pair member, pair) axes ordered as the layout stores them
    let (pair_axis, shape) = match table.pairing {
        Pairing::Interleaved => (3, [tokens, heads, half, 2]),
        Pairing::Halves => (2, [tokens, heads, 2, half]),
    };
    let table_shape = if pair_axis == 3 { [tokens, 1, half, 1] } else { [tokens, 1, 1, half] };
    let load = |values: &[f32]| Tensor::<4>::from_data(TensorData::new(values.to_vec(), table_shape), &device);
    let (cosines, sines) = (load(&table.cosines), load(&table.sines));
    let x = x.reshape(shape);
    let (a, b) = (x.clone().narrow(pair_axis, 0, 1), x.narrow(pair_axis, 1, 1));
    let turned_a = a.clone() * cosines.clone() - b.clone() * sines.clone();
    let turned_b = a * sines + b * cosines;
    Tensor::cat(vec![turned_a, turned_b], pair_axis).reshape([tokens, width])
}

#[derive(Debug)]
struct Rotary {
    head_dim: usize,
    table: RotaryTable,
}

impl Rotary {
    /// `direction` is 1 to turn forward, -1 to turn back (the transpose, hence the derivative).
    fn turn(&self, x: &[f32], width: usize, direction: f32) -> Vec<f32> {
        let half = self.head_dim / 2;
        let mut output = vec![0.0; x.len()];
        par_rows(&mut output, width).zip(x.par_chunks(row_chunk(width) * width)).enumerate().for_each(
            |(chunk, (output, x))| {
                for (row, (output, x)) in output.chunks_mut(width).zip(x.chunks(width)).enumerate() {
                    let token = chunk * row_chunk(width) + row;
                    let cosines = &self.table.cosines[token * half..][..half];
                    let sines = &self.table.sines[token * half..][..half];
                    for (output, x) in output.chunks_mut(self.head_dim).zip(x.chunks(self.head_dim)) {
                        match self.table.pairing {
                            Pairing::Interleaved => {
                                for j in 0..half {
                                    let (c, s) = (cosines[j], sines[j] * direction);
                                    output[2 * j] = x[2 * j] * c - x[2 * j + 1] * s;
                                    output[2 * j + 1] = x[2 * j] * s + x[2 * j + 1] * c;
                                }
                            }
                            Pairing::Halves => {
                                let (low, high) = output.split_at_mut(half);
                                for j in 0..half {
                                    let (c, s) = (cosines[j], sines[j] * direction);
                                    low[j] = x[j] * c - x[half + j] * s;
                                    high[j] = x[j] * s + x[half + j] * c;
                                }
                            }
                        }
                    }
                }
            },
        );
        output
    }
}

impl HostOp for Rotary {
    fn names(&self) -> [&'static str; 2] {
        ["rotary", "rotary backward"]
    }

    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let x = inputs[0];
        Forward { shape: x.shape.to_vec(), data: self.turn(x.data, x.width(), 1.0), saved: vec![] }
    }

    fn backward(&self, inputs: &[HostArray<'_>], _: &[f32], grad: &[f32], needed: &[bool]) -> Vec<Option<Vec<f32>>> {
        vec![needed[0].then(|| self.turn(grad, inputs[0].width(), -1.0))]
    }
}
