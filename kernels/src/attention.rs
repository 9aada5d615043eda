//! Grouped-query attention in which every query sees one run of keys that ends with itself.
//!
//! Causality, document borders in packed sequences, Llama 4's chunk grid and Mistral's sliding window all have this
//! form, so one number per query, the first key it sees, replaces every mask.

use burn::tensor::{Bool, Tensor, TensorData, activation::softmax};
use rayon::prelude::*;
use std::{mem::MaybeUninit, sync::Arc};

#[cfg(feature = "device")]
use crate::device;
use crate::{
    gemm_call::{View, multiply},
    host_op::{self, Forward, HostArray, HostOp},
    profile,
    rows::{put, row_chunk, written_by},
    vector_math::{exp_in_place, max},
};

/// Which keys each query sees.
#[derive(Debug, Clone)]
pub struct KeyRanges {
    /// Token `n` sees keys `first_key[n]..=n`. Never decreases inside a sequence, never reaches before its start.
    pub first_key: Arc<Vec<u32>>,
    /// Tokens of one sequence; the token count is a multiple of it.
    pub sequence_len: usize,
}

/// Sizes of the heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
}

/// Softmax attention with scale `1 / sqrt(head_dim)`; query head `j` uses key head `j / (query_heads / key_heads)`.
///
/// # Shapes
/// - `query` `[N, query_heads * head_dim]`, `key` and `value` `[N, key_heads * head_dim]`, result as `query`
pub fn attention(query: Tensor<2>, key: Tensor<2>, value: Tensor<2>, heads: Heads, ranges: &KeyRanges) -> Tensor<2> {
    assert_eq!(ranges.first_key.len(), query.dims()[0], "one key range per token");
    if host_op::runs_on(&query.device()) {
        let op = Attention { heads, ranges: ranges.clone() };
        return host_op::apply(op, vec![query.into(), key.into(), value.into()]);
    }
    #[cfg(feature = "device")]
    if query.dtype() == key.dtype()
        && query.dtype() == value.dtype()
        && let Some(plans) = device::attention::plans(&query.device(), query.dtype(), heads)
    {
        let op = device::attention::Attention { heads, ranges: ranges.clone(), plans };
        return device::op::apply(op, vec![query.into(), key.into(), value.into()]);
    }
    attention_reference(query, key, value, heads, ranges)
}

/// [`attention`] in plain tensor operations: holds all scores at once.
pub fn attention_reference(
    query: Tensor<2>,
    key: Tensor<2>,
    value: Tensor<2>,
    heads: Heads,
    ranges: &KeyRanges,
) -> Tensor<2> {
    let Heads { query_heads, key_heads, head_dim } = heads;
    let tokens = query.dims()[0];
    let (length, group) = (ranges.sequence_len, query_heads / key_heads);
    let sequences = tokens / length;
    let device = query.device();
    let query = query.reshape([sequences, length, key_heads, group * head_dim]).swap_dims(1, 2);
    let query = query.reshape([sequences * key_heads, length, group, head_dim]).swap_dims(1, 2).reshape([
        sequences * key_heads,
        group * length,
        head_dim,
    ]);
    let split = |x: Tensor<2>| {
        let x = x.reshape([sequences, length, key_heads, head_dim]).swap_dims(1, 2);
        x.reshape([sequences * key_heads, length, head_dim])
    };
    let (key, value) = (split(key), split(value));
    let scores = query.matmul(key.swap_dims(1, 2)).mul_scalar((head_dim as f32).sqrt().recip());
    let mut hidden = vec![true; tokens * length];
    for token in 0..tokens {
        let base = token / length * length;
        for column in ranges.first_key[token] as usize - base..=token - base {
            hidden[token * length + column] = false;
        }
    }
    let hidden = Tensor::<4, Bool>::from_data(TensorData::new(hidden, [sequences, 1, length, length]), &device);
    let scores = scores
        .reshape([sequences, key_heads * group, length, length])
        .mask_fill(hidden.expand([sequences, key_heads * group, length, length]), f32::NEG_INFINITY);
    let weights = softmax(scores, 3).reshape([sequences * key_heads, group * length, length]);
    let output = weights.matmul(value).reshape([sequences, key_heads, group, length, head_dim]);
    output.permute([0, 3, 1, 2, 4]).reshape([tokens, query_heads * head_dim])
}

/// Queries handled at once: their scores against all keys they see fit in the second-level cache.
const QUERY_BLOCK: usize = 64;

#[derive(Debug)]
struct Attention {
    heads: Heads,
    ranges: KeyRanges,
}

/// A run of queries of one sequence and the keys that any of them sees, in token numbers.
struct Block {
    first: usize,
    count: usize,
    first_key: usize,
    key_count: usize,
}

impl Attention {
    fn blocks(&self, sequence: usize) -> impl Iterator<Item = Block> + '_ {
        let length = self.ranges.sequence_len;
        let start = sequence * length;
        (start..start + length).step_by(QUERY_BLOCK).map(move |first| {
            let count = QUERY_BLOCK.min(start + length - first);
            let first_key = self.ranges.first_key[first] as usize;
            Block { first, count, first_key, key_count: first + count - first_key }
        })
    }

    fn scale(&self) -> f32 {
        (self.heads.head_dim as f32).sqrt().recip()
    }

    /// Writes the block's scores, hides what a query does not see, and calls `row` with each query's number in the
    /// block and its scores inside its own range.
    fn scores(
        &self,
        scores: &mut [f32],
        block: &Block,
        query: View<'_>,
        key: View<'_>,
        mut row: impl FnMut(usize, &mut [f32]),
    ) {
        multiply(scores, block.key_count, false, self.scale(), query, key.transposed(), false);
        for (i, scores) in scores.chunks_mut(block.key_count).take(block.count).enumerate() {
            let token = block.first + i;
            let from = self.ranges.first_key[token] as usize - block.first_key;
            let to = token + 1 - block.first_key;
            scores[..from].fill(0.0);
            scores[to..].fill(0.0);
            row(i, &mut scores[from..to]);
        }
    }

    /// The head's rows `first..first + count` of a `[N, heads * head_dim]` array.
    fn head<'a>(&self, array: &HostArray<'a>, head: usize, first: usize, count: usize) -> View<'a> {
        let width = array.width();
        View::rows(&array.data[first * width + head * self.heads.head_dim..], count, self.heads.head_dim, width)
    }
}

impl HostOp for Attention {
    fn names(&self) -> [&'static str; 2] {
        ["attention", "attention backward"]
    }

    /// Saves the logarithm of each row's softmax denominator, `[query_heads, N]`.
    fn forward(&self, inputs: &[HostArray<'_>]) -> Forward {
        let (query, key, value) = (inputs[0], inputs[1], inputs[2]);
        let Heads { query_heads, key_heads, head_dim } = self.heads;
        let (tokens, length) = (query.shape[0], self.ranges.sequence_len);
        let (sequences, group) = (tokens / length, query_heads / key_heads);
        let tasks: Vec<(usize, usize)> = (0..sequences).flat_map(|s| (0..query_heads).map(move |h| (s, h))).collect();
        let (outputs, log_sums): (Vec<_>, Vec<_>) = tasks
            .par_iter()
            .map(|&(sequence, head)| {
                let _span = profile::piece("attention");
                let mut output = vec![0.0; length * head_dim];
                let mut log_sums = vec![0.0; length];
                let mut scores = vec![0.0; QUERY_BLOCK * length];
                let start = sequence * length;
                for block in self.blocks(sequence) {
                    let scores = &mut scores[..block.count * block.key_count];
                    let query = self.head(&query, head, block.first, block.count);
                    let key = self.head(&key, head / group, block.first_key, block.key_count);
                    let value = self.head(&value, head / group, block.first_key, block.key_count);
                    let mut inverse = [0.0; QUERY_BLOCK];
                    self.scores(scores, &block, query, key, |i, scores| {
                        let largest = max(scores);
                        let sum = exp_in_place(scores, largest);
                        inverse[i] = sum.recip();
                        log_sums[block.first - start + i] = largest + sum.ln();
                    });
                    let output = &mut output[(block.first - start) * head_dim..][..block.count * head_dim];
                    let weights = View::rows(scores, block.count, block.key_count, block.key_count);
                    multiply(output, head_dim, false, 1.0, weights, value, false);
                    for (row, inverse) in output.chunks_mut(head_dim).zip(inverse) {
                        row.iter_mut().for_each(|x| *x *= inverse);
                    }
                }
                (output, log_sums)
            })
            .unzip();
        let data = side_by_side(&outputs, query_heads, length, head_dim);
        let mut saved = vec![0.0; query_heads * tokens];
        for ((sequence, head), log_sums) in tasks.into_iter().zip(log_sums) {
            saved[head * tokens + sequence * length..][..length].copy_from_slice(&log_sums);
        }
        Forward { shape: query.shape.to_vec(), data, saved }
    }

    fn backward(
        &self,
        inputs: &[HostArray<'_>],
        saved: &[f32],
        grad: &[f32],
        needed: &[bool],
    ) -> Vec<Option<Vec<f32>>> {
        let (query, key, value) = (inputs[0], inputs[1], inputs[2]);
        let grad = HostArray { shape: query.shape, data: grad };
        let Heads { query_heads, key_heads, head_dim } = self.heads;
        let (tokens, length) = (query.shape[0], self.ranges.sequence_len);
        let (sequences, group) = (tokens / length, query_heads / key_heads);
        let tasks: Vec<(usize, usize)> = (0..sequences).flat_map(|s| (0..key_heads).map(move |h| (s, h))).collect();
        let group_width = group * head_dim;
        let (query_grads, (key_grads, value_grads)): (Vec<_>, (Vec<_>, Vec<_>)) = tasks
            .par_iter()
            .map(|&(sequence, key_head)| {
                let _span = profile::piece("attention backward");
                let mut query_grad = vec![0.0; length * group_width];
                let (mut key_grad, mut value_grad) = (vec![0.0; length * head_dim], vec![0.0; length * head_dim]);
                let (mut scores, mut scores_grad) = (vec![0.0; QUERY_BLOCK * length], vec![0.0; QUERY_BLOCK * length]);
                let start = sequence * length;
                for member in 0..group {
                    let head = key_head * group + member;
                    let log_sums = &saved[head * tokens..][..tokens];
                    for block in self.blocks(sequence) {
                        let size = block.count * block.key_count;
                        let (weights, scores_grad) = (&mut scores[..size], &mut scores_grad[..size]);
                        let query = self.head(&query, head, block.first, block.count);
                        let grad = self.head(&grad, head, block.first, block.count);
                        let key = self.head(&key, key_head, block.first_key, block.key_count);
                        let value = self.head(&value, key_head, block.first_key, block.key_count);
                        self.scores(weights, &block, query, key, |i, scores| {
                            exp_in_place(scores, log_sums[block.first + i]);
                        });
                        let weights_view = View::rows(weights, block.count, block.key_count, block.key_count);
                        let key_rows =
                            (block.first_key - start) * head_dim..(block.first + block.count - start) * head_dim;
                        let value_rows = &mut value_grad[key_rows.clone()];
                        multiply(value_rows, head_dim, true, 1.0, weights_view.transposed(), grad, false);
                        multiply(scores_grad, block.key_count, false, 1.0, grad, value.transposed(), false);
                        for (weights, scores_grad) in
                            weights.chunks(block.key_count).zip(scores_grad.chunks_mut(block.key_count))
                        {
                            let along = crate::vector_math::dot(weights, scores_grad);
                            for (scores_grad, &weight) in scores_grad.iter_mut().zip(weights) {
                                *scores_grad = weight * (*scores_grad - along);
                            }
                        }
                        let scores_grad = View::rows(scores_grad, block.count, block.key_count, block.key_count);
                        let query_rows = &mut query_grad[(block.first - start) * group_width + member * head_dim..];
                        multiply(query_rows, group_width, false, self.scale(), scores_grad, key, false);
                        let key_rows = &mut key_grad[key_rows];
                        multiply(key_rows, head_dim, true, self.scale(), scores_grad.transposed(), query, false);
                    }
                }
                (query_grad, (key_grad, value_grad))
            })
            .unzip();
        let parts = [(query_grads, group_width), (key_grads, head_dim), (value_grads, head_dim)];
        let together = |(parts, width): (Vec<_>, usize)| side_by_side(&parts, key_heads, length, width);
        parts.into_iter().zip(needed).map(|(parts, &needed)| needed.then(|| together(parts))).collect()
    }
}

/// `[N, heads * width]` from what each head made of each sequence, `[L, width]`; sequence after sequence, and head after
/// head in each.
fn side_by_side(parts: &[Vec<f32>], heads: usize, length: usize, width: usize) -> Vec<f32> {
    let fill = |places: &mut [MaybeUninit<f32>]| {
        let row_width = heads * width;
        places.par_chunks_mut(row_width).with_min_len(row_chunk(row_width)).enumerate().for_each(|(token, places)| {
            let (sequence, row) = (token / length, token % length);
            for (head, places) in places.chunks_exact_mut(width).enumerate() {
                put(places, &parts[sequence * heads + head][row * width..][..width]);
            }
        });
    };
    // SAFETY: each token's row is filled head by head.
    unsafe { written_by(parts.len() * length * width, fill) }
}
