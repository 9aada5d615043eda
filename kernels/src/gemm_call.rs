//! One safe face for the matrix multiplications inside host operations.

use gemm::Parallelism;

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
    let [row_stride, column_stride] = output_strides;
    assert_eq!(a.columns, b.rows, "inner sizes differ");
    assert!(output.len() >= span(a.rows, b.columns, row_stride, column_stride), "output too small");
    assert!(a.data.len() >= span(a.rows, a.columns, a.row_stride, a.column_stride), "left operand too small");
    assert!(b.data.len() >= span(b.rows, b.columns, b.row_stride, b.column_stride), "right operand too small");
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    // SAFETY: the three assertions above put every element that the strides reach inside its slice, and `output`
    // is borrowed mutably, so nothing else reads or writes it.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            output.as_mut_ptr(),
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
