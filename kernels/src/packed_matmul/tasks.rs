//! The loops around the innermost one: which rows meet which panels, and who does it.
//!
//! Nothing here can change a bit of the result: an element is the sum of its blocks of [`K_BLOCK`] products in their
//! order, wherever the cuts between tasks, tiles and panels fall.

use std::{cell::RefCell, mem::MaybeUninit};

use rayon::prelude::*;

use super::{
    Instructions, Numbers,
    ahead::Ahead,
    left::Left,
    operand::Operand,
    place::{Store, fence, may_be_unwritten},
    tiles::{K_BLOCK, Line, PANEL, Slice, TileRow},
};
use crate::rows::written;

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
    left: Left<'a>,
    first_row: usize,
    first_panel: usize,
    output: Vec<&'a mut [MaybeUninit<f32>]>,
    stream: bool,
    /// Weights and first panel of the task after it, which the same thread is likely to do next.
    next: Option<(Operand<'a>, usize)>,
}

/// One product: rows, weights, and where the result goes.
pub(crate) struct Product<'a> {
    left: Left<'a>,
    weights: Operand<'a>,
    output: &'a mut [MaybeUninit<f32>],
    stream: bool,
}

impl<'a> Product<'a> {
    /// # Shapes
    /// - `rows` `[N, inputs]`, `output` `[N, outputs]`
    ///
    /// # Panics
    /// When the slices do not have these shapes for the same N.
    pub fn new(rows: &'a [f32], weights: Operand<'a>, output: &'a mut [f32]) -> Self {
        Self::of(Left::rows(rows, weights.inputs()), weights, may_be_unwritten(output))
    }

    /// [`new`](Self::new) into memory that nothing need have been written to; all of it is, once the product is done.
    pub fn into_unwritten(rows: &'a [f32], weights: Operand<'a>, output: &'a mut [MaybeUninit<f32>]) -> Self {
        Self::of(Left::rows(rows, weights.inputs()), weights, output)
    }

    /// The transpose of a matrix by another one, both as they lie, into memory that nothing was written to. With `stream` it
    /// is written past the caches if that can be: for results too large for them.
    ///
    /// # Shapes
    /// - `columns` `[inputs, N]`, `output` `[N, outputs]`
    ///
    /// # Panics
    /// When the slices do not have these shapes for the same N, or the weights are not in f32.
    pub fn of_columns(
        columns: &'a [f32],
        weights: Operand<'a>,
        output: &'a mut [MaybeUninit<f32>],
        stream: bool,
    ) -> Self {
        assert_eq!(weights.numbers(), Numbers::F32, "columns are multiplied as they are");
        Product { stream, ..Self::of(Left::columns(columns, weights.inputs()), weights, output) }
    }

    fn of(left: Left<'a>, weights: Operand<'a>, output: &'a mut [MaybeUninit<f32>]) -> Self {
        assert_eq!(output.len(), left.row_count() * weights.outputs(), "a row of the result for each row");
        Product { left, weights, output, stream: false }
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
    for product in products {
        if product.left.row_count() > 0 {
            amount += product.left.row_count() * product.weights.inputs() * product.weights.outputs();
            cut(instructions, product, &mut tasks);
        }
    }
    for number in 1..tasks.len() {
        tasks[number - 1].next = Some((tasks[number].weights, tasks[number].first_panel));
    }
    let work = |mut task: Task<'_>| {
        run(instructions, &mut task);
        // SAFETY: all of it was written.
        let rows: Vec<_> = task.output.into_iter().map(|row| unsafe { written(row) }).collect();
        then(Piece { first_row: task.first_row, rows: &rows })
    };
    if amount < SMALL { tasks.into_iter().map(work).collect() } else { tasks.into_par_iter().map(work).collect() }
}

fn cut<'a>(instructions: Instructions, product: Product<'a>, tasks: &mut Vec<Task<'a>>) {
    let Product { left, weights, output, stream } = product;
    let (inputs, outputs, row_count) = (weights.inputs(), weights.outputs(), left.row_count());
    let one_tile = row_count <= instructions.rows_at_once(weights.some_slice());
    let panels = match (left.is_transposed(), one_tile) {
        // Columns are brought together once for all of them, which is worth more where k are few.
        (true, _) => TASK_PANELS * K_BLOCK / inputs.clamp(1, K_BLOCK),
        (false, true) => FEW_ROWS_TASK_PANELS,
        (false, false) => TASK_PANELS,
    };
    let columns = panels * PANEL;
    let task_rows = match weights {
        Operand::Packed(_) => TASK_ROWS,
        // Of nearly equal height.
        Operand::RowMajor { .. } | Operand::Transposed { .. } => {
            row_count.div_ceil(row_count.div_ceil(PACKING_TASK_ROWS))
        }
    };
    for (number, output) in output.chunks_mut(task_rows * outputs).enumerate() {
        let first = tasks.len();
        tasks.extend((0..outputs.div_ceil(columns)).map(|column| Task {
            weights,
            left,
            first_row: number * task_rows,
            first_panel: column * panels,
            output: Vec::with_capacity(row_count.min(task_rows)),
            stream,
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
    /// Rows that are multiplied.
    rows: Vec<TileRow>,
    /// A panel's block that was not packed before.
    lines: Vec<Line<f32>>,
}

thread_local! {
    static ROOM: RefCell<Room> = const { RefCell::new(Room { rows: Vec::new(), lines: Vec::new() }) };
}

fn run(instructions: Instructions, task: &mut Task<'_>) {
    let _tiles = instructions.begin();
    ROOM.with_borrow_mut(|room| match task.weights {
        Operand::Packed(_) => run_packed(room, instructions, task),
        Operand::RowMajor { .. } | Operand::Transposed { .. } => run_packing(room, instructions, task),
    });
}

/// So many rows, whatever is in them.
fn first_rows(rows: &mut Vec<TileRow>, count: usize) -> &mut [TileRow] {
    if rows.len() < count {
        rows.resize(count, TileRow::ZEROS);
    }
    &mut rows[..count]
}

/// A tile's rows stay in the first-level cache, the task's panels come from the second one.
fn run_packed(room: &mut Room, instructions: Instructions, task: &mut Task<'_>) {
    let weights = task.weights;
    let form = instructions.row_form(weights.numbers());
    let row_count = task.output.len();
    let height = instructions.even_height(row_count, instructions.rows_at_once(weights.some_slice()));
    let panels = weights.panels(task.first_panel, task.output[0].len().div_ceil(PANEL));
    let blocks = weights.blocks();
    let tiles = row_count.div_ceil(height);
    let store = |block| if block == 0 { Store::Replace } else { Store::Add };
    if tiles == 1 {
        // The weights are read once, in the order they lie in.
        for panel in 0..panels.count() {
            for block in 0..blocks {
                let tile = first_rows(&mut room.rows, row_count);
                task.left.copy(task.first_row, block, form, tile);
                let (slice, column) = (panels.packed(block, panel), panel * PANEL);
                // SAFETY: the first block's products are put there before others are added.
                unsafe { instructions.add_tile(tile, slice, &mut task.output, column, store(block), Ahead::NOTHING) };
            }
        }
        return;
    }
    let next_task = task.next.map(|(weights, first)| weights.panels(first, panels.count()));
    for block in 0..blocks {
        // What comes after this block is asked for while this one is multiplied.
        let next = if block + 1 < blocks { Some((panels, block + 1)) } else { next_task.map(|panels| (panels, 0)) };
        for (number, output) in task.output.chunks_mut(height).enumerate() {
            let tile = first_rows(&mut room.rows, output.len());
            task.left.copy(task.first_row + number * height, block, form, tile);
            for panel in 0..panels.count() {
                let ahead = next.map_or(Ahead::NOTHING, |(panels, block)| panels.ahead(block, panel, number, tiles));
                let (slice, column) = (panels.packed(block, panel), panel * PANEL);
                // SAFETY: the first block's products are put into all columns before others are added.
                unsafe { instructions.add_tile(tile, slice, output, column, store(block), ahead) };
            }
        }
    }
}

/// A panel stays in the first-level cache, where it was packed, and rows come from the second one. Weights are asked for a
/// panel ahead, not a block: rows that are a power of two apart share few sets of the cache, and a block would drive out the
/// one before.
fn run_packing(room: &mut Room, instructions: Instructions, task: &mut Task<'_>) {
    let weights = task.weights;
    let row_count = task.output.len();
    let height = instructions.even_height(row_count, instructions.rows_at_once(weights.some_slice()));
    let panels = weights.panels(task.first_panel, task.output[0].len().div_ceil(PANEL));
    let blocks = weights.blocks();
    let tiles = row_count.div_ceil(height);
    let Room { rows, lines } = room;
    let rows = first_rows(rows, row_count);
    if lines.len() < K_BLOCK {
        lines.resize(K_BLOCK, Line([0.0; PANEL]));
    }
    // What one block leaves is in cache when the next is added to it, so that only the whole is written past the caches.
    let first_store = if task.stream && blocks == 1 { Store::Stream } else { Store::Replace };
    let next_task = task.next.map(|(weights, first)| weights.panels(first, 1));
    for block in 0..blocks {
        task.left.copy(task.first_row, block, instructions.row_form(Numbers::F32), rows);
        let store = if block == 0 { first_store } else { Store::Add };
        let lines = &mut lines[..panels.depth(block)];
        for panel in 0..panels.count() {
            let next = match (panel + 1 < panels.count(), block + 1 < blocks) {
                (true, _) => Some((panels, block, panel + 1)),
                (false, true) => Some((panels, block + 1, 0)),
                (false, false) => next_task.map(|panels| (panels, 0, 0)),
            };
            let column = panel * PANEL;
            for (number, output) in task.output.chunks_mut(height).enumerate() {
                let tile = &rows[number * height..][..output.len()];
                let ahead =
                    next.map_or(Ahead::NOTHING, |(panels, block, panel)| panels.ahead(block, panel, number, tiles));
                // SAFETY: the first block's products are put into all columns before others are added.
                unsafe {
                    if number == 0 {
                        let panel = (panels.source(block, panel), &mut *lines);
                        instructions.add_tile_packing(tile, panel, output, column, store, ahead);
                    } else {
                        instructions.add_tile(tile, Slice::F32(lines), output, column, store, ahead);
                    }
                }
            }
        }
    }
    if first_store == Store::Stream {
        fence();
    }
}
