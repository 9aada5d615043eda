//! One matrix product per group of rows, of all groups in one launch. Counts are of elements, not of vectors. The host
//! lists the tiles of rows, and a cube takes one of them by a tile of columns; the three products of forward and backward
//! differ only in how operands lie and in what the list says.

// Their operands are what they are, and a launch takes them by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

use super::product::{self, Layout, Tile};

/// Numbers per tile of the list: its first row and the end of its rows; the first and the end of what is added up; what
/// is added to a row number of the second operand, and of the output.
pub const NUMBERS: usize = 6;

/// How a cube's work is cut, and which operands lie turned: the first `[inner, rows]`, the second `[columns, inner]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GroupedPlan {
    pub tile: Tile,
    pub left_turned: bool,
    pub right_turned: bool,
}

impl GroupedPlan {
    /// Rows and columns of the first operand's tile, as it lies.
    pub const fn left(&self) -> (usize, usize) {
        if self.left_turned { (self.tile.inner, self.tile.rows) } else { (self.tile.rows, self.tile.inner) }
    }

    pub const fn right(&self) -> (usize, usize) {
        if self.right_turned { (self.tile.columns, self.tile.inner) } else { (self.tile.inner, self.tile.columns) }
    }

    pub const fn left_layout(&self) -> Layout {
        Layout { stride: self.left().1 + self.tile.pad(), turned: self.left_turned }
    }

    pub const fn right_layout(&self) -> Layout {
        Layout { stride: self.right().1 + self.tile.pad(), turned: self.right_turned }
    }

    /// Elements of one stage of an operand.
    pub const fn left_size(&self) -> usize {
        self.left().0 * self.left_layout().stride
    }

    pub const fn right_size(&self) -> usize {
        self.right().0 * self.right_layout().stride
    }
}

/// A tile of a matrix in global memory.
#[derive(CubeType, Clone, Copy)]
struct Window {
    first_row: usize,
    end_row: usize,
    first_column: usize,
    end_column: usize,
    /// What is added to a row's number.
    base: usize,
    stride: usize,
}

/// Reads a unit's share of a tile, with zeros outside the window.
#[cube]
fn read<E: Float, N: Size>(
    source: &[Vector<E, N>],
    held: &mut Array<Vector<E, N>>,
    window: &Window,
    #[comptime] shape: (usize, usize),
    #[comptime] units: usize,
) {
    let size = N::value();
    let across = comptime!(shape.1 / size);
    let count = comptime!(shape.0 * across);
    #[unroll]
    for turn in 0..comptime!(count.div_ceil(units)) {
        let place = UNIT_POS as usize + comptime!(turn * units);
        let row = window.first_row + place / across;
        let column = window.first_column + place % across * size;
        let mut value = Vector::<E, N>::new(E::from_int(0));
        if place < count && row < window.end_row && column < window.end_column {
            value = source[((window.base + row) * window.stride + column) / size];
        }
        held[turn] = value;
    }
}

/// Writes a unit's share of a tile to a stage in shared memory.
#[cube]
fn write<E: Float, N: Size>(
    held: &Array<Vector<E, N>>,
    stage: &mut [Vector<E, N>],
    start: usize,
    #[comptime] shape: (usize, usize),
    #[comptime] stride: usize,
    #[comptime] units: usize,
) {
    let size = N::value();
    let across = comptime!(shape.1 / size);
    let count = comptime!(shape.0 * across);
    #[unroll]
    for turn in 0..comptime!(count.div_ceil(units)) {
        let place = UNIT_POS as usize + comptime!(turn * units);
        if place < count {
            stage[(start + place / across * stride) / size + place % across] = held[turn];
        }
    }
}

/// A tile of the output: x counts tiles of the list from `first_tile` on, y tiles of columns. While one stage of operands
/// is multiplied, the next is on its way.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn grouped_product<E: Float, N: Size>(
    left: &[Vector<E, N>],
    right: &[Vector<E, N>],
    output: &mut [Vector<E, N>],
    tiles: &[u32],
    first_tile: usize,
    columns: usize,
    left_stride: usize,
    right_stride: usize,
    #[comptime] plan: GroupedPlan,
    #[define(E)] _element: ElemType,
) {
    let tile = comptime!(plan.tile);
    let units = comptime!(tile.units());
    let size = N::value();
    let entry = (first_tile + CUBE_POS_X as usize) * comptime!(NUMBERS);
    let first_row = tiles[entry] as usize;
    let end_row = tiles[entry + 1] as usize;
    let mut inner = tiles[entry + 2] as usize;
    let end_inner = tiles[entry + 3] as usize;
    let right_base = tiles[entry + 4] as usize;
    let output_base = tiles[entry + 5] as usize;
    let first_column = CUBE_POS_Y as usize * comptime!(tile.columns);

    let mut left_tile = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(2 * plan.left_size() / size), 32usize);
    let mut right_tile = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(2 * plan.right_size() / size), 32usize);
    let mut stored = Shared::<[f32]>::new_aligned_slice(comptime!(tile.rows * tile.sums_stride()), 32usize);
    let left_shape = comptime!(plan.left());
    let right_shape = comptime!(plan.right());
    let mut left_held = Array::<Vector<E, N>>::new(comptime!((left_shape.0 * left_shape.1 / size).div_ceil(units)));
    let mut right_held = Array::<Vector<E, N>>::new(comptime!((right_shape.0 * right_shape.1 / size).div_ceil(units)));

    let mut left_window =
        Window { first_row, end_row, first_column: inner, end_column: end_inner, base: 0usize, stride: left_stride };
    if comptime!(plan.left_turned) {
        left_window.first_row = inner;
        left_window.end_row = end_inner;
        left_window.first_column = first_row;
        left_window.end_column = end_row;
    }
    let mut right_window = Window {
        first_row: inner,
        end_row: end_inner,
        first_column,
        end_column: columns,
        base: right_base,
        stride: right_stride,
    };
    if comptime!(plan.right_turned) {
        right_window.first_row = first_column;
        right_window.end_row = columns;
        right_window.first_column = inner;
        right_window.end_column = end_inner;
    }

    let mut sums = product::zero(tile);
    read::<E, N>(left, &mut left_held, &left_window, left_shape, units);
    read::<E, N>(right, &mut right_held, &right_window, right_shape, units);
    let mut stage = 0usize;
    while inner < end_inner {
        let left_start = stage * comptime!(plan.left_size());
        let right_start = stage * comptime!(plan.right_size());
        write::<E, N>(&left_held, &mut left_tile, left_start, left_shape, comptime!(plan.left_layout().stride), units);
        write::<E, N>(
            &right_held,
            &mut right_tile,
            right_start,
            right_shape,
            comptime!(plan.right_layout().stride),
            units,
        );
        sync_cube();
        inner += comptime!(tile.inner);
        if comptime!(plan.left_turned) {
            left_window.first_row = inner;
        } else {
            left_window.first_column = inner;
        }
        if comptime!(plan.right_turned) {
            right_window.first_column = inner;
        } else {
            right_window.first_row = inner;
        }
        read::<E, N>(left, &mut left_held, &left_window, left_shape, units);
        read::<E, N>(right, &mut right_held, &right_window, right_shape, units);
        product::multiply::<E, N, N>(
            &mut sums,
            &left_tile,
            left_start,
            comptime!(plan.left_layout()),
            &right_tile,
            right_start,
            comptime!(plan.right_layout()),
            tile,
        );
        // The other stage was last read before the cube met above, so that it is free.
        stage = 1 - stage;
    }
    product::store(&sums, &mut stored, tile);
    sync_cube();
    let across = comptime!(tile.columns / size);
    let mut place = UNIT_POS as usize;
    while place < comptime!(tile.rows * across) {
        let row = first_row + place / across;
        let column = first_column + place % across * size;
        if row < end_row && column < columns {
            let from = place / across * comptime!(tile.sums_stride()) + place % across * size;
            let mut value = Vector::<E, N>::empty();
            #[unroll]
            for lane in 0..size {
                value.insert(lane, E::cast_from(stored[from + lane]));
            }
            output[((output_base + row) * columns + column) / size] = value;
        }
        place += units;
    }
}
