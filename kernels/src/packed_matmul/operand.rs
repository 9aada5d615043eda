//! Weights as a task takes them: packed long ago, or a block at a time on the way.

use std::ops::Range;

use super::{
    Numbers, PackedMatrix,
    ahead::Ahead,
    tiles::{K_BLOCK, Line, PANEL, Slice},
};
use crate::vector_math::vectorised;

/// The right operand of a product.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Operand<'a> {
    Packed(&'a PackedMatrix),
    /// `[inputs, outputs]`, row-major, in f32. A block of it is packed by each task that multiplies with it: a copy of as
    /// many numbers for each hundred rows.
    RowMajor {
        values: &'a [f32],
        inputs: usize,
        outputs: usize,
    },
    /// The same of `[outputs, inputs]`.
    Transposed {
        values: &'a [f32],
        inputs: usize,
        outputs: usize,
    },
}

/// Some panels of an operand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Panels<'a> {
    operand: Operand<'a>,
    first: usize,
    count: usize,
}

impl<'a> Operand<'a> {
    pub fn inputs(self) -> usize {
        match self {
            Operand::Packed(weights) => weights.inputs(),
            Operand::RowMajor { inputs, .. } | Operand::Transposed { inputs, .. } => inputs,
        }
    }

    pub fn outputs(self) -> usize {
        match self {
            Operand::Packed(weights) => weights.outputs(),
            Operand::RowMajor { outputs, .. } | Operand::Transposed { outputs, .. } => outputs,
        }
    }

    pub(super) fn numbers(self) -> Numbers {
        match self {
            Operand::Packed(weights) => weights.numbers(),
            Operand::RowMajor { .. } | Operand::Transposed { .. } => Numbers::F32,
        }
    }

    /// A slice of the kind that this operand has.
    pub(super) fn some_slice(self) -> Slice<'a> {
        match self {
            Operand::Packed(weights) => weights.panel(0).slice(0),
            Operand::RowMajor { .. } | Operand::Transposed { .. } => Slice::F32(&[]),
        }
    }

    /// Blocks of k.
    pub(super) fn blocks(self) -> usize {
        match self {
            Operand::Packed(weights) => weights.panel(0).blocks(),
            Operand::RowMajor { inputs, .. } | Operand::Transposed { inputs, .. } => inputs.div_ceil(K_BLOCK),
        }
    }

    /// Up to `most` panels from `first` on.
    pub(super) fn panels(self, first: usize, most: usize) -> Panels<'a> {
        let all = self.outputs().div_ceil(PANEL);
        Panels { operand: self, first, count: most.min(all - first) }
    }
}

impl<'a> Panels<'a> {
    pub fn count(self) -> usize {
        self.count
    }

    /// One block of k of all of them. What is not packed yet is packed into `room`.
    pub fn block<'b>(self, block: usize, room: &'b mut Vec<Line<f32>>) -> Block<'b>
    where
        'a: 'b,
    {
        match self.operand {
            Operand::Packed(weights) => Block::Packed { weights, first: self.first, block },
            Operand::RowMajor { values, inputs, outputs } => {
                let k = k_of(block, inputs);
                let first = self.first * PANEL;
                let columns = (self.count * PANEL).min(outputs - first);
                let depth = k.len();
                let lines = lines(room, self.count * depth);
                for (k, row) in values[k.start * outputs..k.end * outputs].chunks_exact(outputs).enumerate() {
                    let (whole, rest) = row[first..first + columns].as_chunks::<PANEL>();
                    for (panel, part) in whole.iter().enumerate() {
                        lines[panel * depth + k].0 = *part;
                    }
                    if !rest.is_empty() {
                        let line = &mut lines[whole.len() * depth + k].0;
                        line[..rest.len()].copy_from_slice(rest);
                        line[rest.len()..].fill(0.0);
                    }
                }
                Block::Copied { lines, depth }
            }
            Operand::Transposed { values, inputs, .. } => {
                let k = k_of(block, inputs);
                let depth = k.len();
                let lines = lines(room, self.count * depth);
                let columns = values[self.first * PANEL * inputs..].chunks(PANEL * inputs);
                for (lines, columns) in lines.chunks_exact_mut(depth).zip(columns) {
                    pack_columns(columns, inputs, k.clone(), lines);
                }
                Block::Copied { lines, depth }
            }
        }
    }

    /// One of some parts of a block, which is needed next: to be asked for while panel number `panel` is multiplied.
    pub fn ahead(self, block: usize, panel: usize, part: usize, parts: usize) -> Ahead<'a> {
        if panel >= self.count {
            return Ahead::NOTHING;
        }
        match self.operand {
            Operand::Packed(weights) => weights.panel(self.first + panel).slice(block).part(part, parts),
            Operand::RowMajor { values, inputs, outputs } => {
                let k = k_of(block, inputs);
                // All columns of some rows.
                let (part, parts) = (part * self.count + panel, parts * self.count);
                let border = |part: usize| k.start + k.len() * part / parts;
                let first = self.first * PANEL;
                let columns = (self.count * PANEL).min(outputs - first);
                Ahead::rows(values, first, columns, outputs, border(part)..border(part + 1))
            }
            Operand::Transposed { values, inputs, outputs } => {
                let k = k_of(block, inputs);
                let first = (self.first + panel) * PANEL;
                let columns = PANEL.min(outputs - first);
                let border = |part: usize| first + columns * part / parts;
                Ahead::rows(values, k.start, k.len(), inputs, border(part)..border(part + 1))
            }
        }
    }
}

fn k_of(block: usize, inputs: usize) -> Range<usize> {
    block * K_BLOCK..inputs.min((block + 1) * K_BLOCK)
}

/// So many lines of a room, which grows where it has to.
fn lines(room: &mut Vec<Line<f32>>, count: usize) -> &mut [Line<f32>] {
    if room.len() < count {
        room.resize(count, Line([0.0; PANEL]));
    }
    &mut room[..count]
}

/// One side of the squares in which columns that lie one behind the other become lines.
const SQUARE: usize = 16;

/// Brings some numbers of up to a panel's columns beside each other. What a column that is not there leaves is 0.
///
/// # Shapes
/// - `columns` `[up to PANEL, inputs]`, `lines` `[k]`
fn pack_columns(columns: &[f32], inputs: usize, k: Range<usize>, lines: &mut [Line<f32>]) {
    let count = columns.len() / inputs;
    if count < PANEL {
        lines.fill(Line([0.0; PANEL]));
    }
    vectorised(
        #[inline(always)]
        || {
            for first in (0..count).step_by(SQUARE) {
                let mut done = 0;
                if first + SQUARE <= count {
                    for squares in lines.chunks_exact_mut(SQUARE) {
                        let square = std::array::from_fn(|column| {
                            let begin = (first + column) * inputs + k.start + done;
                            columns[begin..begin + SQUARE].try_into().expect("a side of a square")
                        });
                        for (line, row) in squares.iter_mut().zip(transposed(square)) {
                            line.0[first..first + SQUARE].copy_from_slice(&row);
                        }
                        done += SQUARE;
                    }
                }
                for column in first..count.min(first + SQUARE) {
                    let rest = columns[column * inputs..][k.start + done..k.end].iter();
                    rest.zip(&mut lines[done..]).for_each(|(value, line)| line.0[column] = *value);
                }
            }
        },
    );
}

/// Four times the halves of the rows are shuffled into each other: each time a number's row and column, written in bits one
/// behind the other, turn by one bit, so that in the end they have changed places.
#[inline(always)]
fn transposed(mut square: [[f32; SQUARE]; SQUARE]) -> [[f32; SQUARE]; SQUARE] {
    const HALF: usize = SQUARE / 2;
    for _ in 0..SQUARE.ilog2() {
        let mut next = [[0.0; SQUARE]; SQUARE];
        for row in 0..HALF {
            for column in 0..HALF {
                next[2 * row][2 * column] = square[row][column];
                next[2 * row][2 * column + 1] = square[row + HALF][column];
                next[2 * row + 1][2 * column] = square[row][column + HALF];
                next[2 * row + 1][2 * column + 1] = square[row + HALF][column + HALF];
            }
        }
        square = next;
    }
    square
}

/// One block of k of some panels, packed.
pub(super) enum Block<'a> {
    Packed { weights: &'a PackedMatrix, first: usize, block: usize },
    Copied { lines: &'a [Line<f32>], depth: usize },
}

impl<'a> Block<'a> {
    #[inline(always)]
    pub fn slice(&self, panel: usize) -> Slice<'a> {
        match self {
            Block::Packed { weights, first, block } => weights.panel(first + panel).slice(*block),
            Block::Copied { lines, depth } => Slice::F32(&lines[panel * depth..][..*depth]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Instructions, Order, Product, multiply_then},
        *,
    };

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|n| ((n * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
    }

    #[test]
    fn weights_packed_on_the_way_give_the_bits_of_packed_ones() {
        for (rows, inputs, outputs) in [(1, 7, 5), (13, 256, 64), (64, 300, 333), (600, 520, 77)] {
            let (x, weights) = (values(rows * inputs, 1), values(inputs * outputs, 2));
            let packed = PackedMatrix::pack_f32(&weights, Order::InputMajor, inputs, outputs);
            for &instructions in Instructions::available() {
                let product = |weights: Operand<'_>| {
                    let mut output = vec![f32::NAN; rows * outputs];
                    multiply_then(instructions, vec![Product::new(&x, weights, &mut output)], |_| ());
                    output
                };
                let expected = product(Operand::Packed(&packed));
                let found = product(Operand::RowMajor { values: &weights, inputs, outputs });
                assert!(found == expected, "{instructions}: {rows} x {inputs} x {outputs}");
                let values: Vec<f32> =
                    (0..outputs).flat_map(|j| weights.iter().skip(j).step_by(outputs)).copied().collect();
                let found = product(Operand::Transposed { values: &values, inputs, outputs });
                assert!(found == expected, "{instructions}: {rows} x {inputs} x {outputs}, transposed");
            }
        }
    }

    #[test]
    fn what_lies_ahead_is_the_whole_block_once() {
        let (inputs, outputs) = (300, 333);
        let weights = values(inputs * outputs, 3);
        let panels = Operand::RowMajor { values: &weights, inputs, outputs }.panels(8, 8);
        assert_eq!(panels.count(), 3);
        let tiles = 5;
        let rows: usize = (0..tiles)
            .flat_map(|tile| (0..3).map(move |panel| (tile, panel)))
            .map(|(tile, panel)| panels.ahead(1, panel, tile, tiles).row_count())
            .sum();
        assert_eq!(rows, inputs - K_BLOCK);
    }
}
