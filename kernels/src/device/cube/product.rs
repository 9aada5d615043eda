//! Products of tiles in a cube's shared memory, for kernels that do something between two of them: by registers, each
//! unit a few rows by a few columns, or by the matrix instructions of tensor cores, each plane a few 16 by 16 fragments.
//!
//! The two have the same four steps: sums start at [`zero`], [`multiply`] adds a product, [`scale_rows`] multiplies rows by
//! factors, and [`store`] writes the sums to shared memory, where any unit may read them. Nothing else in a kernel knows of
//! fragments, so that a device without tensor cores checks all but these few lines.

// Their operands are what they are.
#![allow(clippy::too_many_arguments)]

use cubecl::{
    cmma::{self, MatrixIdent, MatrixLayout},
    prelude::*,
};

/// Side of a fragment.
pub const FRAGMENT: usize = 16;
/// Units of a plane on devices with tensor cores.
pub const PLANE: usize = 32;

/// How a cube multiplies `[rows, inner]` by `[inner, columns]`. Workers are units, or planes where there are tensor
/// cores; they divide rows and columns evenly among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    pub row_workers: usize,
    pub column_workers: usize,
    pub tensor_cores: bool,
}

impl Tile {
    /// Units of the cube.
    pub const fn units(&self) -> usize {
        self.row_workers * self.column_workers * if self.tensor_cores { PLANE } else { 1 }
    }

    /// Numbers, or fragments, of a worker: rows by columns.
    pub const fn own(&self) -> (usize, usize) {
        let side = if self.tensor_cores { FRAGMENT } else { 1 };
        (self.rows / side / self.row_workers, self.columns / side / self.column_workers)
    }

    /// Distance of two rows of stored sums. What is added keeps rows of a column out of one bank of memory, and
    /// fragments where instructions can reach them.
    pub const fn sums_stride(&self) -> usize {
        self.columns + if self.tensor_cores { 4 } else { 1 }
    }

    /// What is added to the rows of an operand, for the same reasons.
    pub const fn pad(&self) -> usize {
        if self.tensor_cores { 8 } else { 0 }
    }
}

/// Where an operand lies in its memory: element `(r, c)` at `r * stride + c`, or at `c * stride + r` where it is turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layout {
    pub stride: usize,
    pub turned: bool,
}

impl Layout {
    const fn of_fragments(&self) -> MatrixLayout {
        if self.turned { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor }
    }
}

/// The sums of a worker. One of the two is in use.
#[derive(CubeType)]
pub struct Sums {
    /// Row by row: number `i`, `j` is at [`register_row`] and [`register_column`].
    pub registers: Array<f32>,
    fragments: Sequence<cmma::Matrix<f32>>,
}

/// Sums of nothing.
#[cube]
pub fn zero(#[comptime] tile: Tile) -> Sums {
    let own = comptime!(tile.own());
    let mut fragments = Sequence::<cmma::Matrix<f32>>::new();
    let mut registers = Array::<f32>::new(comptime!(if tile.tensor_cores { 1 } else { own.0 * own.1 }));
    if comptime!(tile.tensor_cores) {
        #[unroll]
        for _ in 0..comptime!(own.0 * own.1) {
            fragments.push(cmma::Matrix::<f32>::from_value(
                MatrixIdent::Accumulator,
                FRAGMENT,
                FRAGMENT,
                FRAGMENT,
                MatrixLayout::Undefined,
                0.0f32,
            ));
        }
    } else {
        #[unroll]
        for place in 0..comptime!(own.0 * own.1) {
            registers[place] = f32::new(0.0);
        }
    }
    Sums { registers, fragments }
}

/// Adds `a` times `b`, which lie in shared memory from `a_start` and `b_start` on.
#[cube]
pub fn multiply<E: Float, A: Size, B: Size>(
    sums: &mut Sums,
    a: &[Vector<E, A>],
    a_start: usize,
    #[comptime] a_layout: Layout,
    b: &[Vector<E, B>],
    b_start: usize,
    #[comptime] b_layout: Layout,
    #[comptime] tile: Tile,
) {
    let own = comptime!(tile.own());
    if comptime!(tile.tensor_cores) {
        let plane = UNIT_POS as usize / comptime!(PLANE);
        let first_row = plane / comptime!(tile.column_workers) * comptime!(own.0 * FRAGMENT);
        let first_column = plane % comptime!(tile.column_workers) * comptime!(own.1 * FRAGMENT);
        #[unroll]
        for step in 0..comptime!(tile.inner / FRAGMENT) {
            let from = comptime!(step * FRAGMENT);
            let mut left = Sequence::<cmma::Matrix<Vector<E, A>>>::new();
            #[unroll]
            for i in 0..comptime!(own.0) {
                let at = a_start + place(first_row + comptime!(i * FRAGMENT), from.runtime(), a_layout);
                let fragment = cmma::Matrix::<Vector<E, A>>::from_slice(
                    MatrixIdent::A,
                    FRAGMENT,
                    FRAGMENT,
                    FRAGMENT,
                    comptime!(a_layout.of_fragments()),
                    &a[at / A::value()..a.len()],
                    comptime!(a_layout.stride as u32),
                );
                left.push(fragment);
            }
            #[unroll]
            for j in 0..comptime!(own.1) {
                let at = b_start + place(from.runtime(), first_column + comptime!(j * FRAGMENT), b_layout);
                let right = cmma::Matrix::<Vector<E, B>>::from_slice(
                    MatrixIdent::B,
                    FRAGMENT,
                    FRAGMENT,
                    FRAGMENT,
                    comptime!(b_layout.of_fragments()),
                    &b[at / B::value()..b.len()],
                    comptime!(b_layout.stride as u32),
                );
                #[unroll]
                for i in 0..comptime!(own.0) {
                    let sum = sums.fragments.index(comptime!(i * own.1 + j));
                    cmma::execute(left.index(i), &right, sum, sum);
                }
            }
        }
    } else {
        let row = UNIT_POS as usize / comptime!(tile.column_workers);
        let column = UNIT_POS as usize % comptime!(tile.column_workers);
        let mut left = Array::<f32>::new(comptime!(own.0));
        let mut right = Array::<f32>::new(comptime!(own.1));
        for k in 0..comptime!(tile.inner) {
            #[unroll]
            for i in 0..comptime!(own.0) {
                left[i] = element::<E, A>(a, a_start + place(row + comptime!(i * tile.row_workers), k, a_layout));
            }
            #[unroll]
            for j in 0..comptime!(own.1) {
                right[j] =
                    element::<E, B>(b, b_start + place(k, column + comptime!(j * tile.column_workers), b_layout));
            }
            #[unroll]
            for i in 0..comptime!(own.0) {
                #[unroll]
                for j in 0..comptime!(own.1) {
                    sums.registers[comptime!(i * own.1 + j)] += left[i] * right[j];
                }
            }
        }
    }
}

/// Writes the sums to rows of [`Tile::sums_stride`] in shared memory.
#[cube]
pub fn store(sums: &Sums, output: &mut [f32], #[comptime] tile: Tile) {
    let own = comptime!(tile.own());
    if comptime!(tile.tensor_cores) {
        store_fragments(&sums.fragments, output, tile);
    } else {
        #[unroll]
        for i in 0..comptime!(own.0) {
            #[unroll]
            for j in 0..comptime!(own.1) {
                output[register_place(i, j, tile)] = sums.registers[comptime!(i * own.1 + j)];
            }
        }
    }
}

#[cube]
fn store_fragments(fragments: &Sequence<cmma::Matrix<f32>>, output: &mut [f32], #[comptime] tile: Tile) {
    let own = comptime!(tile.own());
    #[unroll]
    for i in 0..comptime!(own.0) {
        #[unroll]
        for j in 0..comptime!(own.1) {
            let at = fragment_place(i, j, tile);
            let end = output.len();
            cmma::store(
                &mut output[at..end],
                fragments.index(comptime!(i * own.1 + j)),
                comptime!(tile.sums_stride() as u32),
                MatrixLayout::RowMajor,
            );
        }
    }
}

/// Multiplies each row of the sums by its factor. Where there are fragments, `scratch` has room for stored sums, and nobody
/// else reads or writes it meanwhile.
#[cube]
pub fn scale_rows(sums: &mut Sums, factors: &[f32], scratch: &mut [f32], #[comptime] tile: Tile) {
    let own = comptime!(tile.own());
    if comptime!(tile.tensor_cores) {
        // Which unit holds what of a fragment is not known. By way of shared memory, where a plane looks at its own alone.
        let first = fragment_place(0usize, 0usize, tile);
        let first_row = first / comptime!(tile.sums_stride());
        let across = comptime!(own.1 * FRAGMENT);
        store_fragments(&sums.fragments, scratch, tile);
        sync_plane();
        let mut place = UNIT_POS as usize % comptime!(PLANE);
        while place < comptime!(own.0 * FRAGMENT * across) {
            let row = place / across;
            scratch[first + row * comptime!(tile.sums_stride()) + place % across] *= factors[first_row + row];
            place += comptime!(PLANE);
        }
        sync_plane();
        #[unroll]
        for i in 0..comptime!(own.0) {
            #[unroll]
            for j in 0..comptime!(own.1) {
                let at = fragment_place(i, j, tile);
                cmma::load_with_layout(
                    sums.fragments.index_mut(comptime!(i * own.1 + j)),
                    &scratch[at..scratch.len()],
                    comptime!(tile.sums_stride() as u32),
                    MatrixLayout::RowMajor,
                );
            }
        }
        sync_plane();
    } else {
        #[unroll]
        for i in 0..comptime!(own.0) {
            let factor = factors[register_row(i, tile)];
            #[unroll]
            for j in 0..comptime!(own.1) {
                sums.registers[comptime!(i * own.1 + j)] *= factor;
            }
        }
    }
}

/// Where the plane's fragment begins among stored sums.
#[cube]
fn fragment_place(#[comptime] i: usize, #[comptime] j: usize, #[comptime] tile: Tile) -> usize {
    let own = comptime!(tile.own());
    let plane = UNIT_POS as usize / comptime!(PLANE);
    let row = plane / comptime!(tile.column_workers) * comptime!(own.0 * FRAGMENT) + comptime!(i * FRAGMENT);
    let column = plane % comptime!(tile.column_workers) * comptime!(own.1 * FRAGMENT) + comptime!(j * FRAGMENT);
    row * comptime!(tile.sums_stride()) + column
}

/// Where the unit's number lies among stored sums.
#[cube]
fn register_place(#[comptime] i: usize, #[comptime] j: usize, #[comptime] tile: Tile) -> usize {
    register_row(i, tile) * comptime!(tile.sums_stride()) + register_column(j, tile)
}

#[cube]
pub fn register_row(#[comptime] i: usize, #[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / comptime!(tile.column_workers) + comptime!(i * tile.row_workers)
}

#[cube]
pub fn register_column(#[comptime] j: usize, #[comptime] tile: Tile) -> usize {
    UNIT_POS as usize % comptime!(tile.column_workers) + comptime!(j * tile.column_workers)
}

#[cube]
fn place(row: usize, column: usize, #[comptime] layout: Layout) -> usize {
    if comptime!(layout.turned) {
        column * comptime!(layout.stride) + row
    } else {
        row * comptime!(layout.stride) + column
    }
}

/// One element of memory that is read and written in vectors.
#[cube]
fn element<E: Float, N: Size>(values: &[Vector<E, N>], at: usize) -> f32 {
    let vector = values[at / N::value()];
    f32::cast_from(vector.extract_dynamic(at % N::value()))
}
