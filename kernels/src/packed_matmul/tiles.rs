//! The loops around the innermost one: which rows meet which panels, and who does it.
//!
//! Nothing here can change a bit of the result: an element is the sum of its blocks of [`K_BLOCK`] products in their
//! order, wherever the cuts between tasks, tiles and panels fall.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

use rayon::prelude::*;

use super::{Instructions, Numbers, PackedMatrix, Panels, RowForm, ahead::Ahead, operand::Operand};

/// Output columns that lie beside each other in memory.
pub const PANEL: usize = 32;

/// Products that are summed in one chain, or pairs of them where rows are rounded to bfloat16. Part of the definition of
/// the result, as the order is.
pub const K_BLOCK: usize = 256;

/// The most rows of any instruction set's tile.
pub const MAX_TILE_ROWS: usize = 32;

/// A little more than the longest block, so that rows of a tile do not all fall into the same set of the first-level
/// cache.
pub const ROW_STRIDE: usize = 2 * K_BLOCK + 16;

/// One block of k of a row, as its [`RowForm`](super::RowForm) has it.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct TileRow([f32; ROW_STRIDE]);

impl TileRow {
    pub const ZEROS: TileRow = TileRow([0.0; ROW_STRIDE]);
}

impl Deref for TileRow {
    type Target = [f32; ROW_STRIDE];

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for TileRow {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// One block of k of the rows of a tile.
pub type TileRows = [TileRow; MAX_TILE_ROWS];

/// A tile's sums.
pub type Sums = [[f32; PANEL]; MAX_TILE_ROWS];

/// Where the sums of some rows go.
pub type Places<'a, const R: usize> = [&'a mut [f32; PANEL]; R];

pub static NO_TILE: TileRows = [TileRow::ZEROS; MAX_TILE_ROWS];
pub const NO_SUMS: Sums = [[0.0; PANEL]; MAX_TILE_ROWS];

/// The weights of one panel at one k (f32) or two (bf16, the first in the lower half of each number).
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub struct Line<T>(pub [T; PANEL]);

// SAFETY: an array of 128 bytes at an alignment that divides them, so that there is nothing but the numbers.
unsafe impl bytemuck::Zeroable for Line<f32> {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line<f32> {}
// SAFETY: as above.
unsafe impl bytemuck::Zeroable for Line<u32> {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line<u32> {}

impl Line<u32> {
    pub const ZEROS: Self = Line([0; PANEL]);
}

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
    /// The rows are rounded to bfloat16 too.
    Rounded(&'a [Line<u32>]),
}

/// All k of a panel.
#[derive(Debug, Clone, Copy)]
pub enum Panel<'a> {
    F32(&'a [Line<f32>]),
    /// Two k a line, of so many, for rows in f32.
    Bf16(&'a [Line<u32>], usize),
    /// The same, for rows that are rounded to bfloat16.
    Rounded(&'a [Line<u32>]),
}

impl<'a> Panel<'a> {
    /// Lines of f32, or of pairs for rows in bfloat16.
    pub(crate) fn of(lines: &'a [Line<f32>], numbers: Numbers) -> Self {
        match numbers {
            Numbers::F32 => Panel::F32(lines),
            Numbers::Bf16 => Panel::Rounded(bytemuck::cast_slice(lines)),
        }
    }

    /// Block number `block` of the products.
    #[inline(always)]
    pub(super) fn slice(self, block: usize) -> Slice<'a> {
        match self {
            Panel::F32(lines) => Slice::F32(&lines[block * K_BLOCK..lines.len().min((block + 1) * K_BLOCK)]),
            Panel::Bf16(lines, inputs) => {
                let (first, last) = (block * K_BLOCK, inputs.min((block + 1) * K_BLOCK));
                let (pairs, odd) = lines[first / 2..last.div_ceil(2)].split_at((last - first) / 2);
                Slice::Bf16 { pairs, odd: odd.first() }
            }
            Panel::Rounded(lines) => Slice::Rounded(&lines[block * K_BLOCK..lines.len().min((block + 1) * K_BLOCK)]),
        }
    }

    pub(super) fn blocks(self) -> usize {
        match self {
            Panel::F32(lines) => lines.len().div_ceil(K_BLOCK),
            Panel::Bf16(_, inputs) => inputs.div_ceil(K_BLOCK),
            Panel::Rounded(lines) => lines.len().div_ceil(K_BLOCK),
        }
    }
}

impl PackedMatrix {
    /// The panel after this one, if there is one.
    pub(crate) fn panel_after(&self, panel: usize) -> Option<Panel<'_>> {
        ((panel + 1) * PANEL < self.outputs).then(|| self.panel(panel + 1))
    }

    pub(crate) fn panel(&self, panel: usize) -> Panel<'_> {
        match &self.panels {
            Panels::F32(lines) => Panel::F32(&lines[panel * self.inputs..][..self.inputs]),
            Panels::Bf16(lines) => {
                let pairs = self.inputs.div_ceil(2);
                let lines = &lines[panel * pairs..][..pairs];
                match self.rows {
                    Numbers::F32 => Panel::Bf16(lines, self.inputs),
                    Numbers::Bf16 => Panel::Rounded(lines),
                }
            }
        }
    }
}

/// Rows of a task: few enough for a share of the second-level cache, enough to pay for bringing panels there.
const TASK_ROWS: usize = 112;
/// The same where each task packs its panels: enough that this is a small part of its work.
const PACKING_TASK_ROWS: usize = 256;
/// Panels of a task, whose blocks of k fill a half of the second-level cache.
const TASK_PANELS: usize = 8;
/// The same where there is a tile of rows alone: panels are then read once and in order.
const FEW_ROWS_TASK_PANELS: usize = 2;
/// Products below which handing out work costs more than it gains.
const SMALL: usize = 1 << 18;

/// One piece of an output: some columns of some rows.
struct Task<'a> {
    weights: Operand<'a>,
    rows: &'a [f32],
    first_row: usize,
    first_panel: usize,
    output: Vec<&'a mut [f32]>,
    /// Weights and first panel of the task after it, which the same thread is likely to do next.
    next: Option<(Operand<'a>, usize)>,
}

/// One product: rows, weights, and where the result goes.
pub(crate) struct Product<'a> {
    rows: &'a [f32],
    weights: Operand<'a>,
    output: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// # Shapes
    /// - `rows` `[N, inputs]`, `output` `[N, outputs]`
    ///
    /// # Panics
    /// When the slices do not have these shapes for the same N.
    pub fn new(rows: &'a [f32], weights: Operand<'a>, output: &'a mut [f32]) -> Self {
        let row_count = rows.len() / weights.inputs();
        assert_eq!(rows.len(), row_count * weights.inputs(), "whole rows");
        assert_eq!(output.len(), row_count * weights.outputs(), "a row of the result for each row");
        Product { rows, weights, output }
    }
}

/// A piece of a result that is there, still in the cache of the thread that computed it.
pub(crate) struct Piece<'a> {
    pub first_row: usize,
    /// The same columns of each of some rows.
    pub rows: &'a [&'a mut [f32]],
}

/// Cuts the outputs into tasks and does them, in parallel where it pays. Calls `then` with each piece of the results, and
/// gives what it returns in the order of the pieces: by product, rows and columns.
pub(crate) fn multiply_then<R: Send>(
    instructions: Instructions,
    products: Vec<Product<'_>>,
    then: impl Fn(Piece<'_>) -> R + Sync,
) -> Vec<R> {
    let mut tasks = vec![];
    let mut amount = 0;
    for Product { rows, weights, output } in products {
        let row_count = output.len() / weights.outputs();
        if row_count > 0 {
            amount += row_count * weights.inputs() * weights.outputs();
            cut(instructions, rows, weights, output, row_count, &mut tasks);
        }
    }
    for number in 1..tasks.len() {
        tasks[number - 1].next = Some((tasks[number].weights, tasks[number].first_panel));
    }
    let work = |mut task: Task<'_>| {
        run(instructions, &mut task);
        then(Piece { first_row: task.first_row, rows: &task.output })
    };
    if amount < SMALL { tasks.into_iter().map(work).collect() } else { tasks.into_par_iter().map(work).collect() }
}

fn cut<'a>(
    instructions: Instructions,
    rows: &'a [f32],
    weights: Operand<'a>,
    output: &'a mut [f32],
    row_count: usize,
    tasks: &mut Vec<Task<'a>>,
) {
    let (inputs, outputs) = (weights.inputs(), weights.outputs());
    let one_tile = row_count <= instructions.rows_at_once(weights.some_slice());
    let panels = if one_tile { FEW_ROWS_TASK_PANELS } else { TASK_PANELS };
    let columns = panels * PANEL;
    let task_rows = match weights {
        Operand::Packed(_) => TASK_ROWS,
        // Of nearly equal height.
        Operand::RowMajor { .. } | Operand::Transposed { .. } => {
            row_count.div_ceil(row_count.div_ceil(PACKING_TASK_ROWS))
        }
    };
    let pieces = rows.chunks(task_rows * inputs).zip(output.chunks_mut(task_rows * outputs));
    for (number, (rows, output)) in pieces.enumerate() {
        let first = tasks.len();
        tasks.extend((0..outputs.div_ceil(columns)).map(|column| Task {
            weights,
            rows,
            first_row: number * task_rows,
            first_panel: column * panels,
            output: Vec::with_capacity(row_count.min(task_rows)),
            next: None,
        }));
        for row in output.chunks_mut(outputs) {
            for (task, piece) in tasks[first..].iter_mut().zip(row.chunks_mut(columns)) {
                task.output.push(piece);
            }
        }
    }
}

/// What a thread works in, kept from one task to the next.
struct Room {
    /// Rows of the tile that is multiplied.
    tile: Vec<TileRow>,
    /// Blocks that were not packed before.
    lines: Vec<Line<f32>>,
}

thread_local! {
    static ROOM: RefCell<Room> = const { RefCell::new(Room { tile: Vec::new(), lines: Vec::new() }) };
}

fn run(instructions: Instructions, task: &mut Task<'_>) {
    let _tiles = instructions.begin();
    ROOM.with_borrow_mut(|room| run_in(room, instructions, task));
}

fn run_in(room: &mut Room, instructions: Instructions, task: &mut Task<'_>) {
    let weights = task.weights;
    let inputs = weights.inputs();
    let form = instructions.row_form(weights.numbers());
    let height = instructions.even_height(task.output.len(), instructions.rows_at_once(weights.some_slice()));
    let panels = weights.panels(task.first_panel, task.output[0].len().div_ceil(PANEL));
    let blocks = weights.blocks();
    let tiles = task.output.len().div_ceil(height);
    let Room { tile, lines } = room;
    if tile.len() < height {
        tile.resize(height, TileRow::ZEROS);
    }
    if let (1, Operand::Packed(weights)) = (tiles, weights) {
        // One tile: the weights are read once, in the order they lie in.
        for panel in 0..panels.count() {
            for block in 0..blocks {
                let count = copy_rows(tile, task.rows, inputs, block, form);
                let slice = weights.panel(task.first_panel + panel).slice(block);
                let column = panel * PANEL;
                instructions.add_tile(&tile[..count], slice, &mut task.output, column, block == 0, Ahead::NOTHING);
            }
        }
        return;
    }
    let next_task = task.next.map(|(weights, first)| weights.panels(first, panels.count()));
    for block in 0..blocks {
        // What comes after this block is asked for while this one is multiplied.
        let next = if block + 1 < blocks { Some((panels, block + 1)) } else { next_task.map(|panels| (panels, 0)) };
        let block_of_all = panels.block(block, lines);
        let chunks = task.rows.chunks(height * inputs).zip(task.output.chunks_mut(height));
        for (number, (rows, output)) in chunks.enumerate() {
            let count = copy_rows(tile, rows, inputs, block, form);
            for panel in 0..panels.count() {
                let ahead = next.map_or(Ahead::NOTHING, |(panels, block)| panels.ahead(block, panel, number, tiles));
                let slice = block_of_all.slice(panel);
                instructions.add_tile(&tile[..count], slice, output, panel * PANEL, block == 0, ahead);
            }
        }
    }
}

impl<'a> Slice<'a> {
    /// One of some parts of it, as what lies ahead.
    #[inline(always)]
    pub(super) fn part(self, part: usize, parts: usize) -> Ahead<'a> {
        let bytes: &[u8] = match self {
            Slice::F32(lines) => bytemuck::cast_slice(lines),
            Slice::Bf16 { pairs, .. } => bytemuck::cast_slice(pairs),
            Slice::Rounded(lines) => bytemuck::cast_slice(lines),
        };
        let border = |part: usize| bytes.len() / 64 * part / parts * 64;
        Ahead::bytes(&bytes[border(part)..border(part + 1)])
    }
}

/// Brings one block of k of some rows together; how many rows there are.
fn copy_rows(tile: &mut [TileRow], rows: &[f32], inputs: usize, block: usize, form: RowForm) -> usize {
    let (first, last) = (block * form.k_block(), inputs.min((block + 1) * form.k_block()));
    for (to, from) in tile.iter_mut().zip(rows.chunks(inputs)) {
        form.write(&from[first..last], &mut to[..]);
        form.end(last - first, to);
    }
    rows.len() / inputs
}

/// Puts the first of a panel's sums into the last columns of a row, or adds them to what is there.
pub fn add_part(sums: &[f32; PANEL], row: &mut [f32], first: bool) {
    match first {
        true => row.copy_from_slice(&sums[..row.len()]),
        false => row.iter_mut().zip(sums).for_each(|(place, sum)| *place += sum),
    }
}
