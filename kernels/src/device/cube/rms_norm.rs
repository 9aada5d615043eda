//! Normalisation of rows by their root mean square, and its gradients. A row is looked at by [`lanes`](super::lanes)
//! threads, so that a cube holds several rows where they are short.

// Operands, which a launch takes by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

use super::{UNITS, lane_sum};

/// `output = x * inverse * weight` with `inverse = 1 / sqrt(mean(x^2) + eps)`, which is kept.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn rms_norm<E: Float, N: Size>(
    x: &[Vector<E, N>],
    weight: &[Vector<E, N>],
    output: &mut [Vector<E, N>],
    inverse: &mut [f32],
    rows: usize,
    width: usize,
    inverse_width: f32,
    eps: f32,
    #[comptime] weighted: bool,
    #[comptime] lanes: usize,
    #[define(E)] _element: ElemType,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % lanes;
    let row = CUBE_POS * comptime!(UNITS / lanes) + unit / lanes;
    let first = row * width;
    let mut squares = Vector::<f32, N>::new(f32::new(0.0));
    if row < rows {
        let mut column = lane;
        while column < width {
            let value = Vector::<f32, N>::cast_from(x[first + column]);
            squares += value * value;
            column += lanes;
        }
    }
    let mean = lane_sum(squares.vector_sum(), lanes) * inverse_width;
    let scale = f32::new(1.0) / (mean + eps).sqrt();
    if row < rows {
        let mut column = lane;
        while column < width {
            let mut value = Vector::<f32, N>::cast_from(x[first + column]) * Vector::new(scale);
            if comptime!(weighted) {
                value *= Vector::<f32, N>::cast_from(weight[column]);
            }
            output[first + column] = Vector::cast_from(value);
            column += lanes;
        }
        if lane == 0 {
            inverse[row] = scale;
        }
    }
}

/// `x_grad = g * inverse - x * inverse^3 * mean(g x)` with `g = grad * weight`, for `rows_each` rows one after the other;
/// and, where `summed`, `partials = sum(grad * x * inverse)` over these rows, which `sum_partials` adds up.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn rms_norm_backward<E: Float, N: Size>(
    x: &[Vector<E, N>],
    weight: &[Vector<E, N>],
    grad: &[Vector<E, N>],
    inverse: &[f32],
    x_grad: &mut [Vector<E, N>],
    partials: &mut [f32],
    rows: usize,
    width: usize,
    rows_each: usize,
    inverse_width: f32,
    #[comptime] weighted: bool,
    #[comptime] summed: bool,
    #[comptime] lanes: usize,
    #[comptime] per_lane: usize,
    #[define(E)] _element: ElemType,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % lanes;
    let place = CUBE_POS * comptime!(UNITS / lanes) + unit / lanes;
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(if summed { per_lane } else { 1 }));
    for step in 0..rows_each {
        let row = place * rows_each + step;
        let first = row * width;
        let mut along = Vector::<f32, N>::new(f32::new(0.0));
        if row < rows {
            let mut column = lane;
            while column < width {
                let mut slope = Vector::<f32, N>::cast_from(grad[first + column]);
                if comptime!(weighted) {
                    slope *= Vector::<f32, N>::cast_from(weight[column]);
                }
                along += slope * Vector::<f32, N>::cast_from(x[first + column]);
                column += lanes;
            }
        }
        let mean = lane_sum(along.vector_sum(), lanes) * inverse_width;
        if row < rows {
            let scale = inverse[row];
            let shrink = mean * scale * scale * scale;
            #[unroll]
            for step in 0..per_lane {
                let column = lane + step * lanes;
                if column < width {
                    let value = Vector::<f32, N>::cast_from(x[first + column]);
                    let mut slope = Vector::<f32, N>::cast_from(grad[first + column]) * Vector::new(scale);
                    if comptime!(summed) {
                        sums[step] += slope * value;
                    }
                    if comptime!(weighted) {
                        slope *= Vector::<f32, N>::cast_from(weight[column]);
                    }
                    x_grad[first + column] = Vector::cast_from(slope - value * Vector::new(shrink));
                }
            }
        }
    }
    if comptime!(summed) {
        #[unroll]
        for step in 0..per_lane {
            let column = lane + step * lanes;
            if column < width && place * rows_each < rows {
                let at = (place * width + column) * N::value();
                #[unroll]
                for member in 0..N::value() {
                    partials[at + member] = sums[step].extract(member);
                }
            }
        }
    }
}

/// Columns that a cube of [`sum_partials`] adds up, by so many threads each.
pub const COLUMNS: usize = 32;
const PER_COLUMN: usize = UNITS / COLUMNS;

/// Adds up `count` rows of numbers, in an order that depends on nothing else. The width is of numbers.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn sum_partials<E: Float>(
    partials: &[f32],
    output: &mut [E],
    count: usize,
    width: usize,
    #[define(E)] _element: ElemType,
) {
    let unit = UNIT_POS as usize;
    let column = CUBE_POS * comptime!(COLUMNS) + unit % comptime!(COLUMNS);
    let mut part = f32::new(0.0);
    if column < width {
        let mut row = unit / comptime!(COLUMNS);
        while row < count {
            part += partials[row * width + column];
            row += comptime!(PER_COLUMN);
        }
    }
    let mut parts = Shared::<[f32]>::new_slice(comptime!(UNITS));
    parts[unit] = part;
    sync_cube();
    if unit < comptime!(COLUMNS) && column < width {
        let mut sum = f32::new(0.0);
        #[unroll]
        for step in 0..comptime!(PER_COLUMN) {
            sum += parts[step * comptime!(COLUMNS) + unit];
        }
        output[column] = E::cast_from(sum);
    }
}
