//! The left operand of a product: rows as they lie, or columns of a matrix.

use super::{
    RowForm,
    squares::columns_to_rows,
    tiles::{K_BLOCK, TileRow},
};

#[derive(Debug, Clone, Copy)]
pub(super) struct Left<'a> {
    values: &'a [f32],
    rows: usize,
    inputs: usize,
    columns: bool,
}

impl<'a> Left<'a> {
    /// # Shapes
    /// - `values` `[N, inputs]`, row-major
    ///
    /// # Panics
    /// When these are not whole rows.
    pub fn rows(values: &'a [f32], inputs: usize) -> Self {
        assert!(values.len().is_multiple_of(inputs), "whole rows");
        Left { values, rows: values.len() / inputs, inputs, columns: false }
    }

    /// The transpose of a matrix.
    ///
    /// # Shapes
    /// - `values` `[inputs, N]`, row-major
    ///
    /// # Panics
    /// When these are not whole rows.
    pub fn columns(values: &'a [f32], inputs: usize) -> Self {
        assert!(values.len().is_multiple_of(inputs), "whole rows");
        Left { values, rows: values.len() / inputs, inputs, columns: true }
    }

    pub fn row_count(self) -> usize {
        self.rows
    }

    pub fn is_transposed(self) -> bool {
        self.columns
    }

    /// Brings one block of k of the rows from `first` on together, as many as the tile has.
    pub fn copy(self, first: usize, block: usize, form: RowForm, tile: &mut [TileRow]) {
        if self.columns {
            assert_eq!(form, RowForm::Exact, "columns are multiplied as they are");
            let k = block * K_BLOCK..self.inputs.min((block + 1) * K_BLOCK);
            return columns_to_rows(self.values, self.rows, k, first, tile);
        }
        let (from, to) = (block * form.k_block(), self.inputs.min((block + 1) * form.k_block()));
        let rows = self.values[first * self.inputs..].chunks_exact(self.inputs);
        for (place, row) in tile.iter_mut().zip(rows) {
            form.write(&row[from..to], &mut place[..]);
            form.end(to - from, place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Instructions, Line, Operand, PANEL, Product, multiply_then, place::may_be_unwritten};

    fn values(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|n| ((n * 7919 + seed * 104_729) % 2003) as f32 / 1001.5 - 1.0).collect()
    }

    #[test]
    fn columns_give_the_bits_of_the_same_rows_also_past_the_caches() {
        for (rows, inputs, outputs) in [(1, 1, 1), (5, 3, 7), (31, 64, 96), (40, 300, 64), (300, 20, 1100)] {
            let (x, weights) = (values(rows * inputs, 1), values(inputs * outputs, 2));
            let columns: Vec<f32> = (0..inputs).flat_map(|k| x.iter().skip(k).step_by(inputs)).copied().collect();
            let weights = Operand::RowMajor { values: &weights, inputs, outputs };
            for &instructions in Instructions::available() {
                let mut expected = vec![f32::NAN; rows * outputs];
                multiply_then(instructions, vec![Product::new(&x, weights, &mut expected)], |_| ());
                for (stream, shift) in [(false, 0), (true, 0), (true, 1)] {
                    // Aligned as what is streamed to must be, and not.
                    let mut lines = vec![Line([f32::NAN; PANEL]); (rows * outputs + shift).div_ceil(PANEL)];
                    let found = &mut bytemuck::cast_slice_mut::<Line<f32>, f32>(&mut lines)[shift..][..rows * outputs];
                    let product = Product::of_columns(&columns, weights, may_be_unwritten(found), stream);
                    multiply_then(instructions, vec![product], |_| ());
                    assert!(found == expected, "{instructions}: {rows} x {inputs} x {outputs}, {stream} {shift}");
                }
            }
        }
    }
}
