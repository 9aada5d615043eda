//! Weights as a task takes them: packed long ago, or a block at a time on the way.

use super::{
    Numbers, PackedMatrix,
    ahead::Ahead,
    tiles::{K_BLOCK, Line, PANEL, Slice},
};

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
            Operand::RowMajor { inputs, .. } => inputs,
        }
    }

    pub fn outputs(self) -> usize {
        match self {
            Operand::Packed(weights) => weights.outputs(),
            Operand::RowMajor { outputs, .. } => outputs,
        }
    }

    pub(super) fn numbers(self) -> Numbers {
        match self {
            Operand::Packed(weights) => weights.numbers(),
            Operand::RowMajor { .. } => Numbers::F32,
        }
    }

    /// A slice of the kind that this operand has.
    pub(super) fn some_slice(self) -> Slice<'a> {
        match self {
            Operand::Packed(weights) => weights.panel(0).slice(0),
            Operand::RowMajor { .. } => Slice::F32(&[]),
        }
    }

    /// Blocks of k.
    pub(super) fn blocks(self) -> usize {
        match self {
            Operand::Packed(weights) => weights.panel(0).blocks(),
            Operand::RowMajor { inputs, .. } => inputs.div_ceil(K_BLOCK),
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
                let (from, to) = (block * K_BLOCK, inputs.min((block + 1) * K_BLOCK));
                let depth = to - from;
                let needed = self.count * depth;
                if room.len() < needed {
                    room.resize(needed, Line([0.0; PANEL]));
                }
                let first = self.first * PANEL;
                let columns = (self.count * PANEL).min(outputs - first);
                for (k, row) in values[from * outputs..to * outputs].chunks_exact(outputs).enumerate() {
                    let (whole, rest) = row[first..first + columns].as_chunks::<PANEL>();
                    for (panel, part) in whole.iter().enumerate() {
                        room[panel * depth + k].0 = *part;
                    }
                    if !rest.is_empty() {
                        let line = &mut room[whole.len() * depth + k].0;
                        line[..rest.len()].copy_from_slice(rest);
                        line[rest.len()..].fill(0.0);
                    }
                }
                Block::Copied { lines: &room[..needed], depth }
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
                let (from, to) = (block * K_BLOCK, inputs.min((block + 1) * K_BLOCK));
                // All columns of some rows.
                let (part, parts) = (part * self.count + panel, parts * self.count);
                let border = |part: usize| from + (to - from) * part / parts;
                let first = self.first * PANEL;
                let columns = (self.count * PANEL).min(outputs - first);
                Ahead::rows(values, first, columns, outputs, border(part)..border(part + 1))
            }
        }
    }
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
    fn row_major_weights_give_the_bits_of_packed_ones() {
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
