//! The kernels. Each is generic in the type of its operands' elements and in how many of them are read at once; sums are
//! f32 whatever the type is. They guard every access themselves, and the width of a place in memory is that of whoever
//! launches them. Widths and counts are of vectors, unless a kernel says otherwise.
//!
//! Groups and threads are numbered along the whole grid, however it is folded: [`tensors`](super::tensors) folds it.

pub mod adamw;
pub mod attention;
pub mod attention_gradients;
pub mod gather_rows;
pub mod grouped_matmul;
pub mod plans;
pub mod product;
pub mod rms_norm;
pub mod rotary;
pub mod swiglu;

use cubecl::prelude::*;

/// Threads of a cube, and the least that a device must offer.
pub const UNITS: usize = 256;

/// Threads that share a row of so many vectors: a power of two, so that a cube holds whole rows.
pub fn lanes(vectors: usize) -> usize {
    vectors.next_power_of_two().clamp(PARTS, UNITS)
}

/// Numbers that one thread adds up in [`lane_sum`].
const PARTS: usize = 16;

/// The sum of `value` over each `lanes` consecutive threads of a cube, for all of them: sixteen at a time, and then those
/// sums, in an order that depends on nothing else. All threads of the cube must come here.
#[cube]
pub fn lane_sum(value: f32, #[comptime] lanes: usize) -> f32 {
    let unit = UNIT_POS as usize;
    let few = comptime!(lanes / PARTS);
    let mut all = Shared::<[f32]>::new_slice(comptime!(UNITS));
    let mut parts = Shared::<[f32]>::new_slice(comptime!(UNITS / PARTS));
    let lane = unit % lanes;
    let row = unit / lanes;
    all[unit] = value;
    sync_cube();
    if lane < few {
        let mut part = f32::new(0.0);
        #[unroll]
        for step in 0..comptime!(PARTS) {
            part += all[row * lanes + step * few + lane];
        }
        parts[row * few + lane] = part;
    }
    sync_cube();
    let mut sum = f32::new(0.0);
    #[unroll]
    for step in 0..few {
        sum += parts[row * few + step];
    }
    sum
}
