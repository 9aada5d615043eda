//! The two halves of a transformer block over packed weights, for inference on the processor: a few rows at a time go
//! through all of a half, so that what lies between its operations stays in cache and is never a tensor.
//!
//! A row's bits depend on its sequence alone: products are those of [`packed_matmul`](crate::packed_matmul), attention's
//! among them, and how rows are dealt out to threads decides who computes an element, but not how. So a half gives the
//! same numbers alone and with the other one, in any batch, on any number of threads and with any instruction set (in
//! bfloat16: with any but AMX, or with AMX).

mod attention;
mod workspace;

use rayon::prelude::*;

pub use attention::{AttentionHalf, HeadNorm};
use workspace::{Workspace, with_workspace};

use crate::{
    packed_matmul::{Instructions, Numbers, PANEL, PackedMatrix, multiply_with},
    profile,
    rms_norm::norm_row,
    vector_math::{exp, vectorised},
};

/// The feed-forward half of a dense block: `down(silu(gate x) * up x)` of the normed rows.
#[derive(Debug, Clone, Copy)]
pub struct FeedForwardHalf<'a> {
    /// `[hidden]`
    pub norm: &'a [f32],
    pub eps: f32,
    pub gate: &'a PackedMatrix,
    pub up: &'a PackedMatrix,
    pub down: &'a PackedMatrix,
}

/// What becomes of a half's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Result {
    /// It is added to the rows.
    Added,
    /// It takes the place of the rows, for those who add it to others first.
    Instead,
}

/// Rows that go through a half together: their values between two products fit into the second-level cache.
const MOST_ROWS: usize = 128;
/// Below this many for each thread, threads share the columns of each product instead.
const FEWEST_ROWS: usize = 28;

/// How many rows a thread takes at once; `None` where they are so few that threads share columns.
fn rows_at_once(rows: usize) -> Option<usize> {
    let threads = rayon::current_num_threads();
    let share = rows.div_ceil(threads);
    if threads > 1 && share < FEWEST_ROWS {
        return None;
    }
    // As many pieces as make no thread wait long for the last one.
    Some(share.div_ceil(share.div_ceil(MOST_ROWS)).max(1))
}

/// Runs a block's attention, and its feed-forward half after it where there is one.
///
/// # Shapes
/// - `hidden` `[N, hidden]`, in whole sequences; changed in place
///
/// # Panics
/// When shapes do not fit each other.
pub fn attend(hidden: &mut [f32], attention: &AttentionHalf<'_>, then: Option<&FeedForwardHalf<'_>>, result: Result) {
    attend_with(Instructions::best(), hidden, attention, then, result);
}

/// [`attend`] by a given instruction set.
///
/// # Panics
/// As [`attend`].
pub fn attend_with(
    instructions: Instructions,
    hidden: &mut [f32],
    attention: &AttentionHalf<'_>,
    then: Option<&FeedForwardHalf<'_>>,
    result: Result,
) {
    let width = attention.query.inputs();
    let rows = hidden.len() / width;
    assert_eq!(hidden.len(), rows * width, "whole rows");
    let name = if then.is_some() { "packed block" } else { "packed attention half" };
    let _span = profile::op(name).with("rows", rows as u64);
    let projected = attention.project(instructions, hidden);
    let Some(count) = rows_at_once(rows) else {
        let block = MOST_ROWS.min(rows.div_ceil(rayon::current_num_threads()).max(1));
        let mixed_width = attention.output.inputs();
        let mut mixed = vec![0.0; rows * mixed_width];
        mixed.par_chunks_mut(block * mixed_width).enumerate().for_each(|(number, mixed)| {
            with_workspace(instructions, |workspace| {
                attention.mix(instructions, &projected, number * block, mixed, workspace);
            });
        });
        let mut update = vec![0.0; rows * width];
        multiply_with(instructions, &mixed, attention.output, &mut update);
        finish(hidden, &update, result);
        if let Some(then) = then {
            feed_forward_with(instructions, hidden, then, result);
        }
        return;
    };
    hidden.par_chunks_mut(count * width).enumerate().for_each(|(number, hidden)| {
        with_workspace(instructions, |workspace| {
            let rows = hidden.len() / width;
            let mut mixed = std::mem::take(&mut workspace.mixed);
            let mixed_width = attention.output.inputs();
            mixed.resize(rows * mixed_width, 0.0);
            let span = profile::piece("attention");
            attention.mix(instructions, &projected, number * count, &mut mixed, workspace);
            drop(span);
            let span = profile::piece("output product");
            workspace.rows.resize(instructions, attention.output.numbers(), rows, mixed_width);
            for (row, values) in mixed.chunks(mixed_width).enumerate() {
                workspace.rows.write_row(row, values);
            }
            workspace.mixed = mixed;
            finish_product(instructions, &workspace.rows, attention.output, hidden, result);
            drop(span);
            if let Some(then) = then {
                feed_forward_rows(instructions, hidden, then, result, workspace);
            }
        });
    });
}

/// Runs a block's feed-forward half.
///
/// # Shapes
/// - `hidden` `[N, hidden]`; changed in place
///
/// # Panics
/// When shapes do not fit each other.
pub fn feed_forward(hidden: &mut [f32], half: &FeedForwardHalf<'_>, result: Result) {
    feed_forward_with(Instructions::best(), hidden, half, result);
}

/// [`feed_forward`] by a given instruction set.
///
/// # Panics
/// As [`feed_forward`].
pub fn feed_forward_with(instructions: Instructions, hidden: &mut [f32], half: &FeedForwardHalf<'_>, result: Result) {
    let width = half.gate.inputs();
    let rows = hidden.len() / width;
    assert_eq!(hidden.len(), rows * width, "whole rows");
    let _span = profile::op("packed feed-forward half").with("rows", rows as u64);
    if let Some(count) = rows_at_once(rows) {
        hidden.par_chunks_mut(count * width).for_each(|hidden| {
            with_workspace(instructions, |workspace| feed_forward_rows(instructions, hidden, half, result, workspace));
        });
        return;
    }
    let normed = normed(hidden, half.norm, half.eps);
    let inner_width = half.gate.outputs();
    let (mut gate, mut up) = (vec![0.0; rows * inner_width], vec![0.0; rows * inner_width]);
    multiply_with(instructions, &normed, half.gate, &mut gate);
    multiply_with(instructions, &normed, half.up, &mut up);
    gate_into(&mut gate, &up);
    let mut update = normed;
    multiply_with(instructions, &gate, half.down, &mut update);
    finish(hidden, &update, result);
}

/// `gate = silu(gate) * up`
#[inline(always)]
fn gate_into(gate: &mut [f32], up: &[f32]) {
    vectorised(
        #[inline(always)]
        || gate.iter_mut().zip(up).for_each(|(gate, &up)| *gate = *gate / (1.0 + exp(-*gate)) * up),
    );
}

fn normed(hidden: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut normed = vec![0.0; hidden.len()];
    let rows = normed.chunks_mut(weight.len()).zip(hidden.chunks(weight.len()));
    rows.for_each(|(normed, row)| {
        norm_row(row, Some(weight), eps, normed);
    });
    normed
}

fn finish(hidden: &mut [f32], update: &[f32], result: Result) {
    match result {
        Result::Added => hidden.iter_mut().zip(update).for_each(|(place, update)| *place += update),
        Result::Instead => hidden.copy_from_slice(update),
    }
}

/// Lays out the normed rows for products.
fn norm_into(
    instructions: Instructions,
    hidden: &[f32],
    weight: &[f32],
    eps: f32,
    numbers: Numbers,
    workspace: &mut Workspace,
) {
    let width = weight.len();
    workspace.rows.resize(instructions, numbers, hidden.len() / width, width);
    workspace.row.resize(width, 0.0);
    for (number, row) in hidden.chunks(width).enumerate() {
        norm_row(row, Some(weight), eps, &mut workspace.row);
        workspace.rows.write_row(number, &workspace.row);
    }
}

/// The product of rows that are laid out, into row-major ones.
fn finish_product(
    instructions: Instructions,
    rows: &crate::packed_matmul::RowTiles,
    weights: &PackedMatrix,
    output: &mut [f32],
    result: Result,
) {
    let outputs = weights.outputs();
    let mut sums = crate::packed_matmul::NO_SUMS;
    for panel in 0..outputs.div_ceil(PANEL) {
        let next = weights.panel_after(panel);
        let column = panel * PANEL;
        let columns = PANEL.min(outputs - column);
        for tile in 0..rows.tile_count() {
            rows.product(instructions, tile, weights.panel(panel), next, &mut sums);
            let (first, count) = rows.rows_of(tile);
            for (row, sums) in (first..first + count).zip(&sums) {
                let place = &mut output[row * outputs + column..][..columns];
                match result {
                    Result::Added => place.iter_mut().zip(sums).for_each(|(place, sum)| *place += sum),
                    Result::Instead => place.copy_from_slice(&sums[..columns]),
                }
            }
        }
    }
}

fn feed_forward_rows(
    instructions: Instructions,
    hidden: &mut [f32],
    half: &FeedForwardHalf<'_>,
    result: Result,
    workspace: &mut Workspace,
) {
    let span = profile::piece("norm, gate and up products, swiglu");
    norm_into(instructions, hidden, half.norm, half.eps, half.gate.numbers(), workspace);
    let Workspace { rows, inner, .. } = workspace;
    let (inner_width, count) = (half.gate.outputs(), hidden.len() / half.norm.len());
    inner.resize(instructions, half.down.numbers(), count, inner_width);
    let (mut gate, mut up) = (crate::packed_matmul::NO_SUMS, crate::packed_matmul::NO_SUMS);
    for panel in 0..inner_width.div_ceil(PANEL) {
        let next = (half.gate.panel_after(panel), half.up.panel_after(panel));
        let columns = PANEL.min(inner_width - panel * PANEL);
        for tile in 0..rows.tile_count() {
            rows.product(instructions, tile, half.gate.panel(panel), next.0, &mut gate);
            rows.product(instructions, tile, half.up.panel(panel), next.1, &mut up);
            let (first, count) = rows.rows_of(tile);
            gate_into(gate[..count].as_flattened_mut(), up[..count].as_flattened());
            for (row, gate) in (first..first + count).zip(&gate) {
                inner.write(row, panel * PANEL, &gate[..columns]);
            }
        }
    }
    drop(span);
    let _span = profile::piece("down product");
    finish_product(instructions, inner, half.down, hidden, result);
}
