//! The loops around the innermost one: which rows meet which panels, and who does it.
//!
//! Nothing here can change a bit of the result: an element is the sum of its blocks of [`K_BLOCK`] products in their
//! order, wherever the cuts between tasks, tiles and panels fall.

use rayon::prelude::*;

use super::{Instructions, PackedMatrix, Panels};

/// Output columns that lie beside each other in memory.
pub const PANEL: usize = 32;

/// Products that are summed in one chain. Part of the definition of the result, as the order is.
pub const K_BLOCK: usize = 256;

/// The most rows of any instruction set's tile.
pub const MAX_TILE_ROWS: usize = 14;

/// A little more than a block, so that rows of a tile do not all fall into the same set of the first-level cache.
const ROW_STRIDE: usize = K_BLOCK + 16;

/// One block of k of the rows of a tile.
pub type TileRows = [[f32; ROW_STRIDE]; MAX_TILE_ROWS];

/// One block's sums of a tile.
pub type Sums = [[f32; PANEL]; MAX_TILE_ROWS];

/// The weights of one panel at one k (f32) or two (bf16, the first in the lower half of each number).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Line<T>(pub [T; PANEL]);

pub type HalfLine<T> = [T; PANEL / 2];

impl<T> Line<T> {
    #[inline(always)]
    pub fn halves<const HALF: usize>(&self) -> [&[T; HALF]; 2] {
        let (low, high) = self.0.split_at(HALF);
        [low.try_into().expect("half a line"), high.try_into().expect("half a line")]
    }
}

/// One block of k of a panel.
#[derive(Debug, Clone, Copy)]
pub enum Slice<'a> {
    F32(&'a [Line<f32>]),
    /// `odd` has one k, in its lower halves.
    Bf16 {
        pairs: &'a [Line<u32>],
        odd: Option<&'a Line<u32>>,
    },
}

impl PackedMatrix {
    /// Products `block * K_BLOCK..` of a panel.
    fn slice(&self, panel: usize, block: usize) -> Slice<'_> {
        let (first, last) = (block * K_BLOCK, self.inputs.min((block + 1) * K_BLOCK));
        match &self.panels {
            Panels::F32(lines) => Slice::F32(&lines[panel * self.inputs..][first..last]),
            Panels::Bf16(lines) => {
                let panel = &lines[panel * self.inputs.div_ceil(2)..][first / 2..last.div_ceil(2)];
                let (pairs, odd) = panel.split_at((last - first) / 2);
                Slice::Bf16 { pairs, odd: odd.first() }
            }
        }
    }
}

/// Rows of a task: few enough for a share of the second-level cache, enough to pay for bringing panels there.
const TASK_ROWS: usize = 112;
/// Panels of a task, whose blocks of k fill a half of the second-level cache.
const TASK_PANELS: usize = 8;
/// The same where there is a tile of rows alone: panels are then read once and in order.
const FEW_ROWS_TASK_PANELS: usize = 2;
/// Products below which handing out work costs more than it gains.
const SMALL: usize = 1 << 18;

/// One piece of the output: some columns of some rows.
struct Task<'a> {
    rows: &'a [f32],
    first_panel: usize,
    output: Vec<&'a mut [f32]>,
}

/// Cuts the output into tasks and does them, in parallel where it pays.
pub fn multiply(instructions: Instructions, rows: &[f32], weights: &PackedMatrix, output: &mut [f32]) {
    let (inputs, outputs) = (weights.inputs, weights.outputs);
    let row_count = output.len() / outputs;
    let panels = if row_count <= MAX_TILE_ROWS { FEW_ROWS_TASK_PANELS } else { TASK_PANELS };
    let mut tasks = Vec::new();
    for (rows, output) in rows.chunks(TASK_ROWS * inputs).zip(output.chunks_mut(TASK_ROWS * outputs)) {
        let first = tasks.len();
        let columns = panels * PANEL;
        tasks.extend((0..outputs.div_ceil(columns)).map(|number| Task {
            rows,
            first_panel: number * panels,
            output: Vec::with_capacity(row_count.min(TASK_ROWS)),
        }));
        for row in output.chunks_mut(outputs) {
            for (task, piece) in tasks[first..].iter_mut().zip(row.chunks_mut(columns)) {
                task.output.push(piece);
            }
        }
    }
    if row_count * inputs * outputs < SMALL {
        tasks.into_iter().for_each(|task| run(instructions, task, weights));
    } else {
        tasks.into_par_iter().for_each(|task| run(instructions, task, weights));
    }
}

fn run(instructions: Instructions, mut task: Task<'_>, weights: &PackedMatrix) {
    let inputs = weights.inputs;
    let most = instructions.tile_rows();
    // Tiles of nearly equal height: 16 rows are 8 and 8, not 14 and 2.
    let height = task.output.len().div_ceil(task.output.len().div_ceil(most));
    let panels = task.output[0].len().div_ceil(PANEL);
    let blocks = inputs.div_ceil(K_BLOCK);
    let mut tile = [[0.0; ROW_STRIDE]; MAX_TILE_ROWS];
    if task.output.len() <= height {
        // One tile: the weights are read once, in the order they lie in.
        for panel in 0..panels {
            for block in 0..blocks {
                let count = copy_rows(&mut tile, task.rows, inputs, block);
                let slice = weights.slice(task.first_panel + panel, block);
                instructions.add_tile(count, &tile, slice, &mut task.output, panel * PANEL, block == 0);
            }
        }
        return;
    }
    for block in 0..blocks {
        for (rows, output) in task.rows.chunks(height * inputs).zip(task.output.chunks_mut(height)) {
            let count = copy_rows(&mut tile, rows, inputs, block);
            for panel in 0..panels {
                let slice = weights.slice(task.first_panel + panel, block);
                instructions.add_tile(count, &tile, slice, output, panel * PANEL, block == 0);
            }
        }
    }
}

/// Brings one block of k of some rows together; how many rows there are.
fn copy_rows(tile: &mut TileRows, rows: &[f32], inputs: usize, block: usize) -> usize {
    let (first, last) = (block * K_BLOCK, inputs.min((block + 1) * K_BLOCK));
    for (to, from) in tile.iter_mut().zip(rows.chunks(inputs)) {
        to[..last - first].copy_from_slice(&from[first..last]);
    }
    rows.len() / inputs
}

/// Puts a block's sums where they belong, or adds them to what earlier blocks came to.
#[inline(always)]
pub fn add_sums(sums: &Sums, output: &mut [&mut [f32]], column: usize, first: bool) {
    for (sums, row) in sums.iter().zip(output) {
        let row = &mut row[column..];
        match row.first_chunk_mut::<PANEL>() {
            Some(row) if first => *row = *sums,
            Some(row) => row.iter_mut().zip(sums).for_each(|(place, sum)| *place += sum),
            None if first => row.iter_mut().zip(sums).for_each(|(place, sum)| *place = *sum),
            None => row.iter_mut().zip(sums).for_each(|(place, sum)| *place += sum),
        }
    }
}
