//! How numbers lie for the innermost loop: weights in panels, and rows in tiles.

use std::ops::{Deref, DerefMut};

use super::{Numbers, PackedMatrix, Panels, ahead::Ahead, place::Place};

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
pub type Places<'a, const R: usize> = [Place<'a>; R];

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
