//! The kernels of the device form. Each works on one tile of logits, `rows` by `width`, of the rows from `first_row` on
//! and the ids from `first_id` on; a matrix product made the tile and others will use it up.
//!
//! They guard every access themselves. Places in a tile have 32 bits; the two kernels that see all hidden states take
//! the width of an address from whoever launches them.

// Their operands are what they are, and a launch takes them by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

/// Stands in a tile for a logit that is counted elsewhere. Finite, since not every device knows infinity.
pub const NOTHING: f32 = -3.0e38;

/// Numbers per row of the running statistics: the largest logit of the rest; the sum of `exp(z - largest)` and of its
/// squares; the same two of `exp((z - largest) / temperature)`.
pub const STATISTICS: usize = 5;

/// Threads of a row where its few kept ids are looked at.
pub const FEW_UNITS: usize = 64;
/// Threads of a row of logits.
pub use crate::device::cube::UNITS;

/// Takes the kept logits that lie in the tile out of it, and copies the label's. One cube per row.
#[cube(launch, create_dummy_kernel)]
pub fn gather_kept(
    logits: &mut [f32],
    offsets: &[u32],
    ids: &[u32],
    labels: &[u32],
    kept_logits: &mut [f32],
    label_logits: &mut [f32],
    first_row: usize,
    first_id: usize,
    width: usize,
    #[comptime] units: usize,
) {
    let row = first_row + CUBE_POS_X as usize;
    let base = CUBE_POS_X as usize * width;
    let unit = UNIT_POS as usize;
    if unit == 0 {
        let label = labels[row] as usize;
        // A kept label is taken from among the kept ones: another unit may be at this place.
        if label >= first_id && label < first_id + width {
            label_logits[row] = logits[base + label - first_id];
        }
    }
    let mut place = offsets[row] as usize + unit;
    let end = offsets[row + 1] as usize;
    while place < end {
        let id = ids[place] as usize;
        if id >= first_id && id < first_id + width {
            let at = base + id - first_id;
            kept_logits[place] = logits[at];
            logits[at] = f32::new(NOTHING);
        }
        place += units;
    }
}

/// Joins what a tile's logits add up to into the running statistics of each row. One cube per row.
#[cube(launch, create_dummy_kernel)]
pub fn row_statistics(
    logits: &[f32],
    statistics: &mut [f32],
    argmax: &mut [u32],
    first_row: usize,
    first_id: usize,
    width: usize,
    inverse_temperature: f32,
    #[comptime] scaled: bool,
    #[comptime] units: usize,
) {
    let row = first_row + CUBE_POS_X as usize;
    let base = CUBE_POS_X as usize * width;
    let unit = UNIT_POS as usize;

    let mut largest = f32::new(NOTHING);
    let mut place = unit;
    let mut column = unit;
    while column < width {
        let z = logits[base + column];
        if z > largest {
            largest = z;
            place = column;
        }
        column += units;
    }
    let mut largest_of = Shared::<[f32]>::new_slice(units);
    let mut place_of = Shared::<[u32]>::new_slice(units);
    largest_of[unit] = largest;
    place_of[unit] = place as u32;
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            let other = largest_of[unit + half];
            let other_place = place_of[unit + half];
            if other > largest_of[unit] || (other == largest_of[unit] && other_place < place_of[unit]) {
                largest_of[unit] = other;
                place_of[unit] = other_place;
            }
        }
        sync_cube();
        half /= 2;
    }
    let largest = largest_of[0];

    let mut sum = f32::new(0.0);
    let mut squares = f32::new(0.0);
    let mut sum_scaled = f32::new(0.0);
    let mut squares_scaled = f32::new(0.0);
    let mut column = unit;
    while column < width {
        let z = logits[base + column];
        // A logit that is no number is unequal to everything, so that it is counted, and shows.
        if z != f32::new(NOTHING) {
            let difference = z - largest;
            let term = difference.exp();
            sum += term;
            squares += term * term;
            if comptime!(scaled) {
                let term = (difference * inverse_temperature).exp();
                sum_scaled += term;
                squares_scaled += term * term;
            }
        }
        column += units;
    }
    let mut sum_of = Shared::<[f32]>::new_slice(units);
    let mut squares_of = Shared::<[f32]>::new_slice(units);
    let mut sum_scaled_of = Shared::<[f32]>::new_slice(units);
    let mut squares_scaled_of = Shared::<[f32]>::new_slice(units);
    sum_of[unit] = sum;
    squares_of[unit] = squares;
    if comptime!(scaled) {
        sum_scaled_of[unit] = sum_scaled;
        squares_scaled_of[unit] = squares_scaled;
    }
    sync_cube();
    let mut half = comptime!(units / 2).runtime();
    while half > 0 {
        if unit < half {
            sum_of[unit] += sum_of[unit + half];
            squares_of[unit] += squares_of[unit + half];
            if comptime!(scaled) {
                sum_scaled_of[unit] += sum_scaled_of[unit + half];
                squares_scaled_of[unit] += squares_scaled_of[unit + half];
            }
        }
        sync_cube();
        half /= 2;
    }

    if unit == 0 {
        let at = row * comptime!(STATISTICS);
        let before = statistics[at];
        let joined = max(before, largest);
        let old = (before - joined).exp();
        let new = (largest - joined).exp();
        statistics[at] = joined;
        statistics[at + 1] = statistics[at + 1] * old + sum_of[0] * new;
        statistics[at + 2] = statistics[at + 2] * old * old + squares_of[0] * new * new;
        if comptime!(scaled) {
            let old = ((before - joined) * inverse_temperature).exp();
            let new = ((largest - joined) * inverse_temperature).exp();
            statistics[at + 3] = statistics[at + 3] * old + sum_scaled_of[0] * new;
            statistics[at + 4] = statistics[at + 4] * old * old + squares_scaled_of[0] * new * new;
        }
        // Of equal logits the smaller id, which came in an earlier tile.
        if largest > before {
            argmax[row] = first_id as u32 + place_of[0];
        }
    }
}

/// Turns logits that are not kept into the loss's gradient in them, and writes it into columns of a wider tile.
/// `dense` holds, per row: shift, soft, shift at temperature 1, hard. One unit per logit.
#[cube(launch, create_dummy_kernel)]
pub fn dense_gradient<E: Float>(
    logits: &[f32],
    gradient: &mut [E],
    dense: &[f32],
    first_row: usize,
    rows: usize,
    columns: usize,
    width: usize,
    first_column: usize,
    inverse_temperature: f32,
    #[comptime] scaled: bool,
    #[define(E)] _element: ElemType,
) {
    let row = ABSOLUTE_POS_Y as usize;
    let column = ABSOLUTE_POS_X as usize;
    if row < rows && column < columns {
        let z = logits[row * columns + column];
        let at = (first_row + row) * 4;
        // No logit is above the shift but the kept ones, which are written over.
        let zero = f32::new(0.0);
        let mut value = dense[at + 1] * (min(z - dense[at], zero) * inverse_temperature).exp();
        if comptime!(scaled) {
            value += dense[at + 3] * min(z - dense[at + 2], zero).exp();
        }
        gradient[row * width + first_column + column] = E::cast_from(value);
    }
}

/// Writes the gradient of the kept ids and of the label into a tile. One cube per row.
#[cube(launch, create_dummy_kernel)]
pub fn place_kept<E: Float>(
    gradient: &mut [E],
    offsets: &[u32],
    ids: &[u32],
    labels: &[u32],
    kept_gradient: &[f32],
    label_gradient: &[f32],
    first_row: usize,
    first_id: usize,
    width: usize,
    #[comptime] units: usize,
    #[define(E)] _element: ElemType,
) {
    let row = first_row + CUBE_POS_X as usize;
    let base = CUBE_POS_X as usize * width;
    let unit = UNIT_POS as usize;
    if unit == 0 {
        let label = labels[row] as usize;
        let more = label_gradient[row];
        // Nothing is added for a kept label, where another unit may be at this place.
        if label >= first_id && label < first_id + width && more != f32::new(0.0) {
            let at = base + label - first_id;
            gradient[at] = E::cast_from(f32::cast_from(gradient[at]) + more);
        }
    }
    let mut place = offsets[row] as usize + unit;
    let end = offsets[row + 1] as usize;
    while place < end {
        let id = ids[place] as usize;
        if id >= first_id && id < first_id + width {
            gradient[base + id - first_id] = E::cast_from(kept_gradient[place]);
        }
        place += units;
    }
}

/// `target[row, first_column + column] = keep * target + scale * product[row, column]`. One unit per number.
#[cube(launch, create_dummy_kernel)]
pub fn add_product<E: Float>(
    target: &mut [E],
    product: &[f32],
    rows: usize,
    columns: usize,
    stride: usize,
    first_column: usize,
    scale: f32,
    #[comptime] keep: bool,
    #[define(E)] _element: ElemType,
) {
    let row = ABSOLUTE_POS_Y as usize;
    let column = ABSOLUTE_POS_X as usize;
    if row < rows && column < columns {
        let at = row * stride + first_column + column;
        let mut value = scale * product[row * columns + column];
        if comptime!(keep) {
            value += f32::cast_from(target[at]);
        }
        target[at] = E::cast_from(value);
    }
}

/// Brings rows together: `output[row] = input[row_ids[first_row + row]]`. One unit per number.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn gather_rows<E: Float>(
    input: &[E],
    row_ids: &[u32],
    output: &mut [E],
    first_row: usize,
    rows: usize,
    columns: usize,
    stride: usize,
    #[define(E)] _element: ElemType,
) {
    let row = ABSOLUTE_POS_Y as usize;
    let column = ABSOLUTE_POS_X as usize;
    if row < rows && column < columns {
        output[row * columns + column] = input[row_ids[first_row + row] as usize * stride + column];
    }
}

/// Puts sums back where their rows belong: `output[row_ids[first_row + row]] = input[row]`. One unit per number.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn scatter_rows<E: Float>(
    input: &[f32],
    row_ids: &[u32],
    output: &mut [E],
    first_row: usize,
    rows: usize,
    columns: usize,
    stride: usize,
    #[define(E)] _element: ElemType,
) {
    let row = ABSOLUTE_POS_Y as usize;
    let column = ABSOLUTE_POS_X as usize;
    if row < rows && column < columns {
        output[row_ids[first_row + row] as usize * stride + column] = E::cast_from(input[row * columns + column]);
    }
}
