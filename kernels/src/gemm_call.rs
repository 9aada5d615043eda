//! One safe face for the matrix multiplications inside host operations.

use std::mem::MaybeUninit;

use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix view over a slice: element `(i, j)` is `data[i * row_stride + j * column_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> View<'a> {
    /// Row-major rows that may lie apart: row `i` starts at `i * row_stride`.
    pub fn rows(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        View { data, rows, columns, row_stride, column_stride: 1 }
    }

    pub fn transposed(self) -> Self {
        View {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// How many elements a strided matrix spans.
fn span(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 { 0 } else { (rows - 1) * row_stride + (columns - 1) * column_stride + 1 }
}

/// `output = keep * output + scale * a * b`, where `output` has row-major rows `output_stride` apart.
/// `keep` is whether to add to what is there.
///
/// # Panics
/// When the shapes do not fit each other or the slices.
pub fn multiply(
    output: &mut [f32],
    output_stride: usize,
    keep: bool,
    scale: f32,
    a: View<'_>,
    b: View<'_>,
    parallel: bool,
) {
    // Small products lose more to handing out work than they gain.
    let parallel = parallel && a.rows * a.columns * b.columns >= 1 << 21;
    product(output, [output_stride, 1], keep, scale, a, b, parallel);
}

/// `output = keep * output + a * b` on this thread alone, where column `j` of the result is
/// `output[j * output_stride..]`: the layout in which a wide right operand is read in order and never packed.
///
/// # Panics
/// When the shapes do not fit each other or the slices.
pub fn multiply_into_columns(output: &mut [f32], output_stride: usize, keep: bool, a: View<'_>, b: View<'_>) {
    product(output, [1, output_stride], keep, 1.0, a, b, false);
}

/// Matrices `[rows, columns]` one after the other, each the product of two or zeros; in parallel, by blocks of `height` rows.
/// Nothing is written to the memory before them, which for the gradients of many experts takes as long as a tenth of a step.
///
/// # Panics
/// When the shapes do not fit each other or the slices.
pub fn stacked(rows: usize, columns: usize, height: usize, products: &[Option<[View<'_>; 2]>]) -> Vec<f32> {
    let length = products.len() * rows * columns;
    let mut output = Vec::with_capacity(length);
    if length == 0 {
        return output;
    }
    let places = output.spare_capacity_mut()[..length].par_chunks_exact_mut(rows * columns);
    places.zip(products).for_each(|(place, factors)| {
        let Some([a, b]) = *factors else {
            place.fill(MaybeUninit::new(0.0));
            return;
        };
        assert!(a.rows == rows && b.columns == columns && a.columns > 0, "a product of another shape");
        place.par_chunks_mut(height * columns).enumerate().for_each(|(block, into)| {
            let first = block * height;
            let a = View { data: &a.data[first * a.row_stride..], rows: into.len() / columns, ..a };
            product_into(into, [columns, 1], false, 1.0, a, b, false);
        });
    });
    // SAFETY: there is a matrix for each of the places, which are all of `length`, and each was filled: with zeros, or by
    // products of all of its rows and columns.
    unsafe { output.set_len(length) };
    output
}

/// The product into an output whose rows and columns are `output_strides` apart.
fn product(
    output: &mut [f32],
    output_strides: [usize; 2],
    keep: bool,
    scale: f32,
    a: View<'_>,
    b: View<'_>,
    parallel: bool,
) {
    // SAFETY: numbers that are there may be written as numbers that are not.
    let output = unsafe { &mut *(output as *mut [f32] as *mut [MaybeUninit<f32>]) };
    product_into(output, output_strides, keep, scale, a, b, parallel);
}

/// [`product`] into memory that nothing was written to; with `keep` all of it must have been.
fn product_into(
    output: &mut [MaybeUninit<f32>],
    output_strides: [usize; 2],
    keep: bool,
    scale: f32,
    a: View<'_>,
    b: View<'_>,
    parallel: bool,
) {
    let [row_stride, column_stride] = output_strides;
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    assert!(output.len() >= span(a.rows, b.columns, row_stride, column_stride), "output too small");
    assert!(a.data.len() >= span(a.rows, a.columns, a.row_stride, a.column_stride), "left operand too small");
    assert!(b.data.len() >= span(b.rows, b.columns, b.row_stride, b.column_stride), "right operand too small");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    // SAFETY: the three assertions above put every element that the strides reach inside its slice, and `output`
    // is borrowed mutably, so nothing else reads or writes it. Without `keep` it is not read here either.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            output.as_mut_ptr().cast::<f32>(),
            column_stride as isize,
            row_stride as isize,
            keep,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            if parallel { Parallelism::Rayon(0) } else { Parallelism::None },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stacked_products_are_those_of_each_pair_and_zeros_where_there_is_none() {
        let (rows, columns, inner) = (37, 19, 5);
        let values = |count: usize, step: usize| (0..count).map(|n| (n * step % 23) as f32 - 11.0).collect::<Vec<_>>();
        let (a, b) = (values(2 * rows * inner, 7), values(2 * inner * columns, 5));
        let pair = |n: usize| {
            // The left one transposed, as in a gradient of weights.
            let left = View::rows(&a[n * rows * inner..], inner, rows, rows).transposed();
            Some([left, View::rows(&b[n * inner * columns..], inner, columns, columns)])
        };
        let stack = stacked(rows, columns, 16, &[pair(0), None, pair(1)]);
        assert_eq!(stack.len(), 3 * rows * columns);
        for (place, &value) in stack.iter().enumerate() {
            let (group, row, column) = (place / (rows * columns), place / columns % rows, place % columns);
            let expected: f32 = match group {
                1 => 0.0,
                _ => (0..inner)
                    .map(|k| {
                        a[group / 2 * rows * inner + k * rows + row] * b[(group / 2 * inner + k) * columns + column]
                    })
                    .sum(),
            };
            assert_eq!(value, expected, "{place}");
        }
        assert!(stacked(rows, columns, 16, &[]).is_empty());
    }
}
