//! Sums of products by AMX: 32 rows by one panel stay in four tile registers of sums.
//!
//! A tile register holds 16 rows of 64 bytes. One of rows is 16 rows by 16 pairs, as [`RowForm::Pairs`] has them; one of
//! weights is 16 lines by half a panel, as packed weights lie in memory. What multiplies them is the processor
//! ([`Assembly`]) or code that does as it does ([`Emulation`]), behind [`Tiles`].
//!
//! The instruction does not add pairs to a sum one after the other, as that of AVX-512 does. Of 16 pairs of products it
//! sums the first of each in one chain from zero, the second of each in another, adds both, and adds that to the sum.
//! So results differ from those of other instruction sets, within the bound that both have.
//!
//! [`RowForm::Pairs`]: super::RowForm::Pairs
//! [`Assembly`]: super::amx_assembly::Assembly
//! [`Emulation`]: super::amx_emulation::Emulation

use super::{
    place::{Place, Store},
    row_tiles::STEP,
    tiles::{Line, Sums, TileRow},
};
use crate::vector_math::vectorised;

/// Rows of a tile register, and numbers of four bytes in each.
pub const SIDE: usize = 16;

/// Rows whose sums stay in registers: two tiles.
pub const TILE_ROWS: usize = 2 * SIDE;

/// What has eight tile registers.
pub trait Tiles {
    /// The sums of the products of rows, from pair `first` on, with whole steps of lines; added to those of the call
    /// before, which was for as many rows, where it is to `go_on`.
    fn multiply(&mut self, rows: &[TileRow], first: usize, lines: &[Line<u32>], go_on: bool) -> &Sums;
}

/// Puts the products of up to 32 rows of pairs and a panel's slice into a place for each, or adds them to what is there.
///
/// Lines that do not fill a step are copied before zeros; rows have theirs already. Zeros change no sum, but what is
/// behind the last line in memory may be no number.
pub fn sums<'a>(
    tiles: &mut impl Tiles,
    rows: &[TileRow],
    lines: &[Line<u32>],
    places: &mut impl Iterator<Item = Place<'a>>,
    store: Store,
) {
    let (steps, rest) = lines.split_at(lines.len() / STEP * STEP);
    let sums = match (steps, rest) {
        (_, []) => tiles.multiply(rows, 0, steps, false),
        _ => {
            let mut padded = [Line::ZEROS; STEP];
            padded[..rest.len()].copy_from_slice(rest);
            if !steps.is_empty() {
                tiles.multiply(rows, 0, steps, false);
            }
            tiles.multiply(rows, steps.len(), &padded, !steps.is_empty())
        }
    };
    vectorised(
        #[inline(always)]
        || {
            for (sums, place) in sums.iter().zip(places.take(rows.len())) {
                place.store(sums, store);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{
            amx_emulation::Emulation,
            row_tiles::RowForm,
            tiles::{NO_SUMS, PANEL},
        },
        *,
    };

    /// Numbers of sizes between 2^-12 and 2^12.
    fn random(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let size = 2f32.powi((state >> 30) as i32 % 13);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size
        };
        (0..count).map(|_| next()).collect()
    }

    fn rounded(value: f32) -> f32 {
        half::bf16::from_f32(value).to_f32()
    }

    /// What the instruction is documented to do, written for one sum: `row` and `column` have its products' factors.
    fn documented(row: &[f32], column: &[f32]) -> f32 {
        let groups = row.chunks(2 * STEP).zip(column.chunks(2 * STEP));
        groups.fold(0.0, |sum, (row, column)| {
            let [even, odd] = [0, 1].map(|which| {
                let factors = row.iter().zip(column).skip(which).step_by(2);
                factors.fold(0.0f32, |sum, (&x, &w)| rounded(x).mul_add(rounded(w), sum))
            });
            sum + (even + odd)
        })
    }

    proptest! {
        #[test]
        fn tiles_of_any_size_are_what_the_instruction_is_documented_to_give(
            row_count in 1usize..=TILE_ROWS, inputs in 1usize..=(4 * STEP + 3), again: bool, seed: u64,
        ) {
            let (rows, weights) = (random(row_count * inputs, seed), random(PANEL * inputs, seed ^ 1));
            // What was in a row before, and what is behind the last line, are no numbers.
            let mut tile = [TileRow::ZEROS; TILE_ROWS];
            tile.iter_mut().for_each(|row| row.fill(f32::NAN));
            for (row, values) in tile.iter_mut().zip(rows.chunks(inputs)) {
                RowForm::Pairs.write(values, &mut row[..]);
                RowForm::Pairs.end(inputs, row);
            }
            let pairs = inputs.div_ceil(2);
            let mut lines = vec![Line([u32::MAX; PANEL]); pairs.next_multiple_of(STEP)];
            for (pair, line) in lines[..pairs].iter_mut().enumerate() {
                let bits = |column: usize, k: usize| match k < inputs {
                    true => u32::from(half::bf16::from_f32(weights[column * inputs + k]).to_bits()),
                    false => 0,
                };
                line.0 = std::array::from_fn(|column| bits(column, 2 * pair) | bits(column, 2 * pair + 1) << 16);
            }
            let mut found = NO_SUMS;
            let mut emulation = Emulation::default();
            for store in if again { &[Store::Replace, Store::Add][..] } else { &[Store::Replace] } {
                let mut places = found.iter_mut().map(Place::new);
                sums(&mut emulation, &tile[..row_count], &lines[..pairs], &mut places, *store);
            }
            for (row, found) in rows.chunks(inputs).zip(&found) {
                for (column, found) in weights.chunks(inputs).zip(found) {
                    let once = documented(row, column);
                    let wanted = if again { once + once } else { once };
                    prop_assert_eq!(found.to_bits(), wanted.to_bits());
                }
            }
            prop_assert!(found[row_count..].as_flattened().iter().all(|&sum| sum == 0.0), "rows that there are not");
        }
    }
}
