//! The backward kernels of attention, which compute scores anew from the logarithm of each row's sum. One writes the
//! gradient of queries, a tile of rows each, the other those of keys and values, a tile of keys each: no sum is shared
//! between cubes, so that the result is the same every time.

// Their operands are what they are, and a launch takes them by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

use super::{
    UNITS,
    attention::{AttentionPlan, Seat, from_last, products, read_rows, seen, write_panel},
    lane_sum, product,
};

/// Units that add up one row, and rows of a cube, of [`row_numbers`].
const ROW_UNITS: usize = 32;
pub const ROWS: usize = UNITS / ROW_UNITS;

/// Two numbers per token and head for the kernels below: the logarithm of the row's sum, and the product of the output
/// with its gradient.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn row_numbers<E: Float, N: Size>(
    output: &[Vector<E, N>],
    gradient: &[Vector<E, N>],
    log_sums: &[f32],
    numbers: &mut [f32],
    rows: usize,
    #[comptime] head_dim: usize,
    #[define(E)] _element: ElemType,
) {
    let size = N::value();
    let unit = UNIT_POS as usize;
    let lane = unit % comptime!(ROW_UNITS);
    let row = (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * comptime!(ROWS)
        + unit / comptime!(ROW_UNITS);
    let mut sum = f32::new(0.0);
    if row < rows {
        let mut column = lane;
        while column < comptime!(head_dim / size) {
            let at = row * comptime!(head_dim / size) + column;
            let left = output[at];
            let right = gradient[at];
            #[unroll]
            for part in 0..size {
                sum += f32::cast_from(left.extract(part)) * f32::cast_from(right.extract(part));
            }
            column += comptime!(ROW_UNITS);
        }
    }
    let total = lane_sum(sum, ROW_UNITS);
    if lane == 0 && row < rows {
        numbers[row * 2] = log_sums[row];
        numbers[row * 2 + 1] = total;
    }
}

/// Weights of a tile of rows and a tile of keys, and the gradient of its scores before they are scaled, in the operands'
/// type. `scores` is scratch. Whoever calls this has synchronized what it wrote, and synchronizes before reading these.
#[cube]
fn weights_and_gradients<E: Float, N: Size>(
    rows: &[Vector<E, N>],
    gradients: &[Vector<E, N>],
    keys: &[Vector<E, N>],
    values: &[Vector<E, N>],
    scores: &mut [f32],
    weights: &mut [Vector<E, Const<1>>],
    score_gradients: &mut [Vector<E, Const<1>>],
    numbers: &[f32],
    ranges: &[u32],
    first_row: usize,
    first_key: usize,
    seat: &Seat,
    scale: f32,
    #[comptime] keep_weights: bool,
    #[comptime] plan: AttentionPlan,
) {
    let group = comptime!(plan.group);
    let lanes = comptime!(plan.lanes());
    let steps = comptime!(plan.side() / lanes);
    let row = UNIT_POS as usize / lanes;
    let lane = UNIT_POS as usize % lanes;
    let end = seat.length * group;
    let (first_seen, last_seen) = seen(ranges, first_row + row, end, seat, group);
    let mut log_sum = f32::new(0.0);
    let mut along = f32::new(0.0);
    if first_row + row < end {
        let at = seat.number(first_row + row, group, plan) * 2;
        log_sum = numbers[at];
        along = numbers[at + 1];
    }
    products::<E, N>(rows, keys, scores, plan);
    sync_cube();
    let mut own = Array::<f32>::new(steps);
    #[unroll]
    for step in 0..steps {
        let column = lane + comptime!(step * lanes);
        let mut weight = f32::new(0.0);
        if first_key + column >= first_seen && first_key + column <= last_seen {
            weight = (scores[row * comptime!(plan.tile.sums_stride()) + column] * scale - log_sum).exp();
        }
        own[step] = weight;
        if comptime!(keep_weights) {
            weights[row * comptime!(plan.weights().stride) + column] = Vector::<E, Const<1>>::new(E::cast_from(weight));
        }
    }
    sync_cube();
    products::<E, N>(gradients, values, scores, plan);
    sync_cube();
    #[unroll]
    for step in 0..steps {
        let column = lane + comptime!(step * lanes);
        let gradient = own[step] * (scores[row * comptime!(plan.tile.sums_stride()) + column] - along);
        score_gradients[row * comptime!(plan.weights().stride) + column] =
            Vector::<E, Const<1>>::new(E::cast_from(gradient));
    }
}

/// Gradient of a tile of queries; the grid is that of the forward kernel.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn attention_query_gradient<E: Float, N: Size>(
    query: &[Vector<E, N>],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    gradient: &[Vector<E, N>],
    numbers: &[f32],
    ranges: &[u32],
    query_gradient: &mut [Vector<E, N>],
    length: usize,
    scale: f32,
    #[comptime] plan: AttentionPlan,
    #[define(E)] _element: ElemType,
) {
    let tile = comptime!(plan.tile);
    let side = comptime!(plan.side());
    let group = comptime!(plan.group);
    let size = N::value();
    let seat = Seat { start: CUBE_POS_Z as usize * length, length, key_head: CUBE_POS_Y as usize };
    let end = length * group;
    let first_row = from_last(CUBE_COUNT_X, CUBE_POS_X) as usize * side;
    let last_row = min(first_row + side, end) - 1;

    let mut rows = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut gradients = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut keys = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut values = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(plan.sums_size()), 32usize);
    let mut score_gradients =
        Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(plan.weights_size()), 32usize);
    // Not written, since the weights themselves are of no use here.
    let mut weights = Shared::<[Vector<E, Const<1>>]>::new_slice(1usize);
    let mut factors = Shared::<[f32]>::new_slice(side);
    if UNIT_POS < comptime!(side as u32) {
        factors[UNIT_POS as usize] = scale;
    }

    let mut sums = Sequence::<product::Sums>::new();
    #[unroll]
    for _ in 0..comptime!(plan.panels()) {
        sums.push(product::zero(tile));
    }
    read_rows::<E, N>(query, &mut rows, first_row, end, &seat, group, plan);
    read_rows::<E, N>(gradient, &mut gradients, first_row, end, &seat, group, plan);

    let keys_end = last_row / group + 1;
    let mut first = ranges[seat.start + first_row / group] as usize - seat.start;
    while first < keys_end {
        read_rows::<E, N>(key, &mut keys, first, keys_end, &seat, 1usize, plan);
        read_rows::<E, N>(value, &mut values, first, keys_end, &seat, 1usize, plan);
        sync_cube();
        weights_and_gradients::<E, N>(
            &rows,
            &gradients,
            &keys,
            &values,
            &mut scores,
            &mut weights,
            &mut score_gradients,
            numbers,
            ranges,
            first_row,
            first,
            &seat,
            scale,
            false,
            plan,
        );
        sync_cube();
        #[unroll]
        for panel in 0..comptime!(plan.panels()) {
            product::multiply::<E, Const<1>, N>(
                sums.index_mut(panel),
                &score_gradients,
                0usize,
                comptime!(plan.weights()),
                &keys,
                comptime!(panel * side).runtime(),
                comptime!(plan.operand()),
                tile,
            );
        }
        sync_cube();
        first += side;
    }
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        write_panel::<E, N>(
            sums.index(panel),
            &mut scores,
            &factors,
            0usize,
            query_gradient,
            panel,
            first_row,
            end,
            &seat,
            group,
            plan,
        );
    }
}

/// Gradients of a tile of keys and of their values: x counts tiles, y key heads, z sequences. The second half of `ranges`
/// has, for every token, the last one that sees it.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn attention_key_gradients<E: Float, N: Size>(
    query: &[Vector<E, N>],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    gradient: &[Vector<E, N>],
    numbers: &[f32],
    ranges: &[u32],
    key_gradient: &mut [Vector<E, N>],
    value_gradient: &mut [Vector<E, N>],
    length: usize,
    scale: f32,
    #[comptime] plan: AttentionPlan,
    #[define(E)] _element: ElemType,
) {
    let tile = comptime!(plan.tile);
    let side = comptime!(plan.side());
    let group = comptime!(plan.group);
    let size = N::value();
    let seat = Seat { start: CUBE_POS_Z as usize * length, length, key_head: CUBE_POS_Y as usize };
    let tokens = CUBE_COUNT_Z as usize * length;
    let first_key = CUBE_POS_X as usize * side;
    let last_key = min(first_key + side, length) - 1;

    let mut rows = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut gradients = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut keys = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut values = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(plan.sums_size()), 32usize);
    let mut weights = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(plan.weights_size()), 32usize);
    let mut score_gradients =
        Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(plan.weights_size()), 32usize);
    // Of values, then of keys.
    let mut factors = Shared::<[f32]>::new_slice(comptime!(2 * side));
    if UNIT_POS < comptime!(side as u32) {
        factors[UNIT_POS as usize] = f32::new(1.0);
        factors[UNIT_POS as usize + side] = scale;
    }

    let mut key_sums = Sequence::<product::Sums>::new();
    let mut value_sums = Sequence::<product::Sums>::new();
    #[unroll]
    for _ in 0..comptime!(plan.panels()) {
        key_sums.push(product::zero(tile));
        value_sums.push(product::zero(tile));
    }
    read_rows::<E, N>(key, &mut keys, first_key, length, &seat, 1usize, plan);
    read_rows::<E, N>(value, &mut values, first_key, length, &seat, 1usize, plan);

    let end = (ranges[tokens + seat.start + last_key] as usize - seat.start + 1) * group;
    let mut first = first_key * group;
    while first < end {
        read_rows::<E, N>(query, &mut rows, first, end, &seat, group, plan);
        read_rows::<E, N>(gradient, &mut gradients, first, end, &seat, group, plan);
        sync_cube();
        weights_and_gradients::<E, N>(
            &rows,
            &gradients,
            &keys,
            &values,
            &mut scores,
            &mut weights,
            &mut score_gradients,
            numbers,
            ranges,
            first,
            first_key,
            &seat,
            scale,
            true,
            plan,
        );
        sync_cube();
        #[unroll]
        for panel in 0..comptime!(plan.panels()) {
            product::multiply::<E, Const<1>, N>(
                value_sums.index_mut(panel),
                &weights,
                0usize,
                comptime!(plan.weights_turned()),
                &gradients,
                comptime!(panel * side).runtime(),
                comptime!(plan.operand()),
                tile,
            );
            product::multiply::<E, Const<1>, N>(
                key_sums.index_mut(panel),
                &score_gradients,
                0usize,
                comptime!(plan.weights_turned()),
                &rows,
                comptime!(panel * side).runtime(),
                comptime!(plan.operand()),
                tile,
            );
        }
        sync_cube();
        first += side;
    }
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        write_panel::<E, N>(
            value_sums.index(panel),
            &mut scores,
            &factors,
            0usize,
            value_gradient,
            panel,
            first_key,
            length,
            &seat,
            1usize,
            plan,
        );
        write_panel::<E, N>(
            key_sums.index(panel),
            &mut scores,
            &factors,
            side,
            key_gradient,
            panel,
            first_key,
            length,
            &seat,
            1usize,
            plan,
        );
    }
}
