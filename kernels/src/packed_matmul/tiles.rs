//! The loops around the innermost one: which rows meet which panels, and who does it.
//!
//! Nothing here can change a bit of the result: an element is the sum of its blocks of [`K_BLOCK`] products in their
//! order, wherever the cuts between tasks, tiles and panels fall.

use rayon::prelude::*;

use super::{Instructions, Numbers, PackedMatrix, Panels, rounding::round_pairs};

/// Output columns that lie beside each other in memory.
pub const PANEL: usize = 32;

/// Products that are summed in one chain, or pairs of them where rows are rounded to bfloat16. Part of the definition of
/// the result, as the order is.
pub const K_BLOCK: usize = 256;

/// The most rows of any instruction set's tile.
pub const MAX_TILE_ROWS: usize = 14;

/// A little more than a block, so that rows of a tile do not all fall into the same set of the first-level cache.
pub const ROW_STRIDE: usize = K_BLOCK + 16;

/// One block of k of a row: f32, or the bits of two bfloat16 in each number.
pub type TileRow = [f32; ROW_STRIDE];

/// One block of k of the rows of a tile.
pub type TileRows = [TileRow; MAX_TILE_ROWS];

/// A tile's sums.
pub type Sums = [[f32; PANEL]; MAX_TILE_ROWS];

/// Where the sums of some rows go.
pub type Places<'a, const R: usize> = [&'a mut [f32; PANEL]; R];

pub const NO_TILE: TileRows = [[0.0; ROW_STRIDE]; MAX_TILE_ROWS];
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
    /// The rows are in bfloat16 too, two to a number.
    Rounded(&'a [Line<u32>]),
}

/// All k of a panel.
#[derive(Debug, Clone, Copy)]
pub enum Panel<'a> {
    F32(&'a [Line<f32>]),
    /// Two k a line, of so many, for rows in f32.
    Bf16(&'a [Line<u32>], usize),
    /// The same, for rows in bfloat16.
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

    /// Products `block * numbers.k_block()..`
    #[inline(always)]
    fn slice(self, block: usize) -> Slice<'a> {
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

    fn blocks(self) -> usize {
        match self {
            Panel::F32(lines) => lines.len().div_ceil(K_BLOCK),
            Panel::Bf16(_, inputs) => inputs.div_ceil(K_BLOCK),
            Panel::Rounded(lines) => lines.len().div_ceil(K_BLOCK),
        }
    }
}

impl PackedMatrix {
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
    let most = instructions.rows_at_once(weights.panel(0).slice(0));
    // Tiles of nearly equal height: 16 rows are 8 and 8, not 14 and 2.
    let height = task.output.len().div_ceil(task.output.len().div_ceil(most));
    let panels = task.output[0].len().div_ceil(PANEL);
    let blocks = weights.panel(0).blocks();
    let mut tile = NO_TILE;
    if task.output.len() <= height {
        // One tile: the weights are read once, in the order they lie in.
        for panel in 0..panels {
            for block in 0..blocks {
                let count = copy_rows(&mut tile, task.rows, inputs, block, weights.rows);
                let slice = weights.panel(task.first_panel + panel).slice(block);
                instructions.add_tile(&tile[..count], slice, &mut task.output, panel * PANEL, block == 0);
            }
        }
        return;
    }
    for block in 0..blocks {
        for (rows, output) in task.rows.chunks(height * inputs).zip(task.output.chunks_mut(height)) {
            let count = copy_rows(&mut tile, rows, inputs, block, weights.rows);
            for panel in 0..panels {
                let slice = weights.panel(task.first_panel + panel).slice(block);
                instructions.add_tile(&tile[..count], slice, output, panel * PANEL, block == 0);
            }
        }
    }
}

/// Brings one block of k of some rows together; how many rows there are.
fn copy_rows(tile: &mut TileRows, rows: &[f32], inputs: usize, block: usize, numbers: Numbers) -> usize {
    let length = numbers.k_block();
    let (first, last) = (block * length, inputs.min((block + 1) * length));
    for (to, from) in tile.iter_mut().zip(rows.chunks(inputs)) {
        numbers.write(&from[first..last], to);
    }
    rows.len() / inputs
}

impl Numbers {
    /// Products of a block.
    pub(crate) fn k_block(self) -> usize {
        match self {
            Numbers::F32 => K_BLOCK,
            Numbers::Bf16 => 2 * K_BLOCK,
        }
    }

    /// Writes numbers as the rows of a tile have them. An odd one is the first of a pair with zero.
    #[inline(always)]
    pub(crate) fn write(self, values: &[f32], row: &mut [f32]) {
        match self {
            Numbers::F32 => row[..values.len()].copy_from_slice(values),
            Numbers::Bf16 => round_pairs(values, &mut row[..values.len().div_ceil(2)]),
        }
    }
}

/// Rows laid out for products with any number of panels.
///
/// Tiles of nearly equal height, each with its blocks of k one after the other.
#[derive(Debug, Default)]
pub(crate) struct RowTiles {
    tiles: Vec<TileRows>,
    numbers: Numbers,
    rows: usize,
    height: usize,
    blocks: usize,
}

impl RowTiles {
    /// Makes room for rows, whatever was here before; all of their numbers must be written.
    pub(crate) fn resize(&mut self, instructions: Instructions, numbers: Numbers, rows: usize, inputs: usize) {
        self.height = rows.div_ceil(rows.div_ceil(instructions.tile_rows()).max(1)).max(1);
        self.blocks = inputs.div_ceil(numbers.k_block());
        (self.numbers, self.rows) = (numbers, rows);
        let count = rows.div_ceil(self.height) * self.blocks;
        if self.tiles.len() < count {
            self.tiles.resize(count, [[0.0; ROW_STRIDE]; MAX_TILE_ROWS]);
        }
    }

    /// Numbers `column..` of a row. They stay inside a block of k, and begin with a pair.
    #[inline(always)]
    pub(crate) fn write(&mut self, row: usize, column: usize, values: &[f32]) {
        let length = self.numbers.k_block();
        let tile = &mut self.tiles[row / self.height * self.blocks + column / length][row % self.height];
        let place = match self.numbers {
            Numbers::F32 => column % length,
            Numbers::Bf16 => column % length / 2,
        };
        self.numbers.write(values, &mut tile[place..]);
    }

    /// All numbers of a row.
    pub(crate) fn write_row(&mut self, row: usize, values: &[f32]) {
        let length = self.numbers.k_block();
        for (block, values) in values.chunks(length).enumerate() {
            self.write(row, block * length, values);
        }
    }

    pub(crate) fn tile_count(&self) -> usize {
        self.rows.div_ceil(self.height)
    }

    /// The first row of a tile, and their number.
    pub(crate) fn rows_of(&self, tile: usize) -> (usize, usize) {
        let first = tile * self.height;
        (first, self.height.min(self.rows - first))
    }

    /// The products of a tile's rows with a panel.
    #[inline(always)]
    pub(crate) fn product(&self, instructions: Instructions, tile: usize, panel: Panel<'_>, sums: &mut Sums) {
        let (_, count) = self.rows_of(tile);
        product(instructions, count, &self.tiles[tile * self.blocks..][..self.blocks], panel, sums);
    }
}

/// The products of `count` rows with a panel; `tiles` are the rows' blocks of k.
#[inline(always)]
pub(crate) fn product(instructions: Instructions, count: usize, tiles: &[TileRows], panel: Panel<'_>, sums: &mut Sums) {
    for (block, tile) in tiles.iter().take(panel.blocks()).enumerate() {
        instructions.sum_tile(&tile[..count], panel.slice(block), &mut sums.iter_mut(), block == 0);
    }
}

/// Puts the first of a panel's sums into the last columns of a row, or adds them to what is there.
pub fn add_part(sums: &[f32; PANEL], row: &mut [f32], first: bool) {
    match first {
        true => row.copy_from_slice(&sums[..row.len()]),
        false => row.iter_mut().zip(sums).for_each(|(place, sum)| *place += sum),
    }
}
