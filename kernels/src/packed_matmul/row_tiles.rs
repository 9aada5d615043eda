//! Rows as the products take them: what becomes of their numbers, and where they lie.

use super::{
    Instructions, K_BLOCK, Numbers,
    ahead::Ahead,
    place::{Place, Store},
    rounding::{nearest_each, round_pairs},
    tiles::{Panel, Sums, TileRow},
};

/// Pairs that are multiplied in one step where tiles of registers are; pairs of a row end at a whole number of them.
pub const STEP: usize = 16;

/// How one block of k of a row lies in a [`TileRow`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum RowForm {
    /// The numbers as they are.
    #[default]
    Exact,
    /// Rounded to bfloat16, in f32. An odd one is followed by a zero.
    Rounded,
    /// Rounded to bfloat16, two in the bits of each number, the first in the lower half. Zeros follow up to a whole step.
    Pairs,
}

impl RowForm {
    /// Products of a block.
    pub fn k_block(self) -> usize {
        match self {
            RowForm::Exact => K_BLOCK,
            RowForm::Rounded | RowForm::Pairs => 2 * K_BLOCK,
        }
    }

    /// Where product `column` of a block begins in its row.
    #[inline(always)]
    pub fn place(self, column: usize) -> usize {
        match self {
            RowForm::Exact | RowForm::Rounded => column,
            RowForm::Pairs => column / 2,
        }
    }

    /// Writes numbers that begin with a pair.
    #[inline(always)]
    pub fn write(self, values: &[f32], row: &mut [f32]) {
        match self {
            RowForm::Exact => row[..values.len()].copy_from_slice(values),
            RowForm::Rounded => nearest_each(values, &mut row[..values.len()]),
            RowForm::Pairs => round_pairs(values, &mut row[..values.len().div_ceil(2)]),
        }
    }

    /// Writes the zeros after the last of `length` products of a block.
    #[inline(always)]
    pub fn end(self, length: usize, row: &mut TileRow) {
        match self {
            RowForm::Exact => {}
            RowForm::Rounded => row[length..length.next_multiple_of(2)].fill(0.0),
            RowForm::Pairs => {
                let pairs = length.div_ceil(2);
                row[pairs..pairs.next_multiple_of(STEP)].fill(0.0);
            }
        }
    }
}

/// Rows laid out for products with any number of panels.
///
/// Tiles of nearly equal height, each with its blocks of k one after the other.
#[derive(Debug, Default)]
pub(crate) struct RowTiles {
    tiles: Vec<TileRow>,
    form: RowForm,
    rows: usize,
    height: usize,
    blocks: usize,
}

impl RowTiles {
    /// Makes room for rows, whatever was here before; all of their numbers must be written.
    pub(crate) fn resize(&mut self, instructions: Instructions, numbers: Numbers, rows: usize, inputs: usize) {
        self.height = instructions.tile_height(rows, numbers);
        self.form = instructions.row_form(numbers);
        self.blocks = inputs.div_ceil(self.form.k_block());
        self.rows = rows;
        let count = self.tile_count() * self.blocks * self.height;
        if self.tiles.len() < count {
            self.tiles.resize(count, TileRow::ZEROS);
        }
        let last = inputs - (self.blocks - 1) * self.form.k_block();
        for row in 0..rows {
            let place = self.place(row, self.blocks - 1);
            self.form.end(last, &mut self.tiles[place]);
        }
    }

    fn place(&self, row: usize, block: usize) -> usize {
        (row / self.height * self.blocks + block) * self.height + row % self.height
    }

    /// Numbers `column..` of a row. They stay inside a block of k, and begin with a pair.
    #[inline(always)]
    pub(crate) fn write(&mut self, row: usize, column: usize, values: &[f32]) {
        let length = self.form.k_block();
        let place = self.place(row, column / length);
        self.form.write(values, &mut self.tiles[place][self.form.place(column % length)..]);
    }

    /// All numbers of a row.
    pub(crate) fn write_row(&mut self, row: usize, values: &[f32]) {
        let length = self.form.k_block();
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

    /// The products of a tile's rows with a panel. `next` is the panel after it: once all tiles have met this one, that one
    /// is in cache.
    #[inline(always)]
    pub(crate) fn product(
        &self,
        instructions: Instructions,
        tile: usize,
        panel: Panel<'_>,
        next: Option<Panel<'_>>,
        sums: &mut Sums,
    ) {
        let (_, count) = self.rows_of(tile);
        let size = self.blocks * self.height;
        let blocks = self.tiles[tile * size..][..size].chunks(self.height);
        let part = next.map(|next| (next, tile, self.tile_count()));
        product(instructions, count, blocks, panel, part, sums);
    }
}

/// The products of `count` rows with a panel; `blocks` are the rows' blocks of k. With `next`, a panel, one of some parts of
/// it is brought into the cache.
#[inline(always)]
pub(crate) fn product<'a>(
    instructions: Instructions,
    count: usize,
    blocks: impl Iterator<Item = &'a [TileRow]>,
    panel: Panel<'_>,
    next: Option<(Panel<'_>, usize, usize)>,
    sums: &mut Sums,
) {
    for (block, rows) in blocks.take(panel.blocks()).enumerate() {
        let ahead = next.map_or(Ahead::NOTHING, |(next, part, parts)| next.slice(block).part(part, parts));
        let store = if block == 0 { Store::Replace } else { Store::Add };
        let mut places = sums.iter_mut().map(Place::new);
        instructions.sum_tile(&rows[..count], panel.slice(block), &mut places, store, ahead);
    }
}
