//! Sums of products in plain Rust, for processors without a form of their own. Where the processor has no fused
//! multiply-add at all, each is a call of the C library, and slow.

use super::{
    ahead::Ahead,
    place::Store,
    tiles::{PANEL, Places, Slice, TileRow},
};

/// Rows summed at once.
pub const TILE_ROWS: usize = 4;

#[inline(always)]
fn step<const R: usize>(sums: &mut [[f32; PANEL]; R], rows: &[TileRow; R], k: usize, weights: &[f32; PANEL]) {
    for (sums, row) in sums.iter_mut().zip(rows) {
        for (sum, &weight) in sums.iter_mut().zip(weights) {
            *sum = row[k].mul_add(weight, *sum);
        }
    }
}

/// Products of `R` rows with a panel's slice, each summed in the order of k.
pub fn sums<const R: usize>(rows: &[TileRow; R], slice: Slice<'_>, places: Places<'_, R>, store: Store, _: Ahead<'_>) {
    let mut sums = [[0.0; PANEL]; R];
    match slice {
        Slice::F32(lines) => {
            for (k, line) in lines.iter().enumerate() {
                step(&mut sums, rows, k, &line.0);
            }
        }
        Slice::Bf16 { pairs, odd } => {
            for (pair, line) in pairs.iter().enumerate() {
                step(&mut sums, rows, 2 * pair, &line.0.map(|both| f32::from_bits(both << 16)));
                step(&mut sums, rows, 2 * pair + 1, &line.0.map(|both| f32::from_bits(both & 0xffff_0000)));
            }
            if let Some(line) = odd {
                step(&mut sums, rows, 2 * pairs.len(), &line.0.map(|both| f32::from_bits(both << 16)));
            }
        }
        Slice::Rounded(lines) => {
            for (pair, line) in lines.iter().enumerate() {
                step(&mut sums, rows, 2 * pair + 1, &line.0.map(|both| f32::from_bits(both & 0xffff_0000)));
                step(&mut sums, rows, 2 * pair, &line.0.map(|both| f32::from_bits(both << 16)));
            }
        }
    }
    for (place, sums) in places.into_iter().zip(&sums) {
        place.store(sums, store);
    }
}
