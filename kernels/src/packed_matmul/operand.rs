//! Weights as a task takes them: packed long ago, or a panel's block at a time on the way.

use std::ops::Range;

use super::{
    Numbers, PackedMatrix,
    ahead::Ahead,
    squares::pack_columns,
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

    /// One block of k of one of them.
    ///
    /// # Panics
    /// When they are not packed.
    #[inline(always)]
    pub fn packed(self, block: usize, panel: usize) -> Slice<'a> {
        let Operand::Packed(weights) = self.operand else { unreachable!("packed weights") };
        weights.panel(self.first + panel).slice(block)
    }

    /// The same of weights that are not packed.
    ///
    /// # Panics
    /// When they are.
    pub fn source(self, block: usize, panel: usize) -> Source<'a> {
        match self.operand {
            Operand::Packed(_) => unreachable!("weights that are not packed"),
            Operand::RowMajor { values, inputs, outputs } => {
                let first = (self.first + panel) * PANEL;
                let values = &values[k_of(block, inputs).start * outputs + first..];
                Source::Rows(Strided { values, columns: PANEL.min(outputs - first), stride: outputs })
            }
            Operand::Transposed { values, inputs, .. } => {
                let k = k_of(block, inputs);
                let columns = values[(self.first + panel) * PANEL * inputs..].chunks(PANEL * inputs).next();
                Source::Columns { values: columns.expect("a panel"), inputs, k: (k.start, k.end) }
            }
        }
    }

    /// How many k a block has.
    pub fn depth(self, block: usize) -> usize {
        k_of(block, self.operand.inputs()).len()
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
                let border = |part: usize| k.start + k.len() * part / parts;
                let first = (self.first + panel) * PANEL;
                Ahead::rows(values, first, PANEL.min(outputs - first), outputs, border(part)..border(part + 1))
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

/// One block of k of one panel's weights that are not packed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source<'a> {
    Rows(Strided<'a>),
    /// Up to [`PANEL`] columns of the weights, one behind the other.
    Columns {
        values: &'a [f32],
        inputs: usize,
        k: (usize, usize),
    },
}

/// Up to [`PANEL`] numbers of each of some rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Strided<'a> {
    /// From the first number on.
    values: &'a [f32],
    columns: usize,
    stride: usize,
}

impl<'a> Strided<'a> {
    /// Where all of the panel's columns are there.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub fn whole(self) -> Option<impl Iterator<Item = &'a [f32; PANEL]>> {
        let rows = self.values.chunks(self.stride);
        (self.columns == PANEL).then(|| rows.map(|row| row.first_chunk().expect("a panel's columns")))
    }
}

impl Source<'_> {
    /// Puts the numbers of each k beside each other, and zeros after the last column.
    pub fn pack(self, lines: &mut [Line<f32>]) {
        match self {
            Source::Rows(Strided { values, columns, stride }) => {
                for (line, row) in lines.iter_mut().zip(values.chunks(stride)) {
                    match row[..columns].first_chunk() {
                        Some(whole) => line.0 = *whole,
                        None => {
                            line.0[..columns].copy_from_slice(&row[..columns]);
                            line.0[columns..].fill(0.0);
                        }
                    }
                }
            }
            Source::Columns { values, inputs, k } => pack_columns(values, inputs, k.0..k.1, lines),
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
    fn what_lies_ahead_is_a_panels_whole_block_once() {
        let (inputs, outputs) = (300, 333);
        let weights = values(inputs * outputs, 3);
        let panels = Operand::RowMajor { values: &weights, inputs, outputs }.panels(8, 8);
        assert_eq!(panels.count(), 3);
        let tiles = 5;
        for panel in 0..3 {
            let rows = (0..tiles).map(|tile| panels.ahead(1, panel, tile, tiles).row_count()).sum::<usize>();
            assert_eq!(rows, inputs - K_BLOCK);
        }
    }
}
