//! What AMX does with tiles of bfloat16, in plain Rust: for tests everywhere, and to compare the processor with.
//!
//! Written from Intel's description of the instructions (Software Developer's Manual, volume 2, `TDPBF16PS`): fused
//! multiply-adds in f32 that round to nearest and ties to even, where numbers below the smallest normal one count as
//! zero, before an operation and after it.

use super::{
    amx::{SIDE, TILE_ROWS, Tiles},
    row_tiles::STEP,
    tiles::{Line, NO_SUMS, Sums, TileRow},
};
use crate::vector_math::vectorised;

/// A tile register.
type Register = [[u32; SIDE]; SIDE];

/// Tile registers, and how many rows of each are in use; all rows are 64 bytes long.
#[derive(Debug)]
pub struct Registers {
    pub tiles: [Register; 8],
    pub rows: [usize; 8],
}

impl Registers {
    pub const EMPTY: Registers = Registers { tiles: [[[0; SIDE]; SIDE]; 8], rows: [0; 8] };

    /// `ldtilecfg`, which clears what is in the tiles.
    pub fn configure(&mut self, rows: [usize; 8]) {
        *self = Registers { rows, ..Registers::EMPTY };
    }

    /// `tilezero`.
    pub fn zero(&mut self, tile: usize) {
        assert!(self.rows[tile] > 0, "tile {tile} is not configured");
        self.tiles[tile] = [[0; SIDE]; SIDE];
    }

    /// `tileloadd`: `row(n)` are the 64 bytes at the n-th stride.
    pub fn load(&mut self, tile: usize, row: impl Fn(usize) -> [u32; SIDE]) {
        self.zero(tile);
        for number in 0..self.rows[tile] {
            self.tiles[tile][number] = row(number);
        }
    }

    /// `tilestored`, likewise.
    pub fn store(&self, tile: usize, mut row: impl FnMut(usize, [u32; SIDE])) {
        (0..self.rows[tile]).for_each(|number| row(number, self.tiles[tile][number]));
    }

    /// `tdpbf16ps`: adds the products of `rows` and `lines` to `sums`.
    pub fn multiply(&mut self, sums: usize, rows: usize, lines: usize) {
        assert!(self.rows[sums] == self.rows[rows] && self.rows[lines] == SIDE, "shapes that fit each other");
        let (rows, lines) = (self.tiles[rows], self.tiles[lines]);
        let count = self.rows[sums];
        let sums = &mut self.tiles[sums][..count];
        vectorised(
            #[inline(always)]
            || {
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let (mut firsts, mut seconds) = ([0.0f32; SIDE], [0.0f32; SIDE]);
                    for (pair, line) in row.into_iter().zip(lines) {
                        for column in 0..SIDE {
                            firsts[column] = add(firsts[column], pair << 16, line[column] << 16);
                            let high = 0xffff_0000;
                            seconds[column] = add(seconds[column], pair & high, line[column] & high);
                        }
                    }
                    for ((sum, first), second) in sums.iter_mut().zip(firsts).zip(seconds) {
                        let both = normal(first + second);
                        *sum = normal(normal(f32::from_bits(*sum)) + both).to_bits();
                    }
                }
            },
        );
    }
}

/// Zero, of the same sign, in place of a number below the smallest normal one.
#[inline(always)]
fn normal(value: f32) -> f32 {
    match value.abs() < f32::MIN_POSITIVE {
        true => 0f32.copysign(value),
        false => value,
    }
}

/// `sum + a * b`
#[inline(always)]
fn add(sum: f32, a: u32, b: u32) -> f32 {
    normal(normal(f32::from_bits(a)).mul_add(normal(f32::from_bits(b)), sum))
}

/// The program of the assembly, step by step.
#[derive(Debug)]
pub struct Emulation {
    registers: Registers,
    sums: Sums,
}

impl Default for Emulation {
    fn default() -> Self {
        Emulation { registers: Registers::EMPTY, sums: NO_SUMS }
    }
}

impl Tiles for Emulation {
    fn multiply(&mut self, rows: &[TileRow], first: usize, lines: &[Line<u32>], go_on: bool) -> &Sums {
        assert!((1..=TILE_ROWS).contains(&rows.len()), "rows for two tiles");
        let heights = [rows.len().min(SIDE), rows.len().saturating_sub(SIDE)];
        let parts = if heights[1] > 0 { 2 } else { 1 };
        let Emulation { registers, sums } = self;
        registers.configure([heights[0], heights[0], heights[1], heights[1], heights[0], heights[1], SIDE, SIDE]);
        let halves = || (0..parts).flat_map(|part| [(part, 0), (part, 1)]);
        for (part, half) in halves() {
            match go_on {
                true => registers.load(2 * part + half, |row| {
                    std::array::from_fn(|column| sums[part * SIDE + row][half * SIDE + column].to_bits())
                }),
                false => registers.zero(2 * part + half),
            }
        }
        let (steps, rest) = lines.as_chunks::<STEP>();
        assert!(rest.is_empty(), "whole steps");
        for (step, lines) in steps.iter().enumerate() {
            for part in 0..parts {
                registers.load(4 + part, |row| {
                    std::array::from_fn(|pair| rows[part * SIDE + row][first + step * STEP + pair].to_bits())
                });
            }
            for half in 0..2 {
                registers.load(6 + half, |pair| std::array::from_fn(|column| lines[pair].0[half * SIDE + column]));
            }
            halves().for_each(|(part, half)| registers.multiply(2 * part + half, 4 + part, 6 + half));
        }
        for (part, half) in halves() {
            registers.store(2 * part + half, |row, values| {
                let place = &mut sums[part * SIDE + row][half * SIDE..][..SIDE];
                place.iter_mut().zip(values).for_each(|(place, bits)| *place = f32::from_bits(bits));
            });
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_sum(pairs: &[[f32; 4]], sum: f32) -> f32 {
        let bits = |value: f32| u32::from(half::bf16::from_f32(value).to_bits());
        let mut registers = Registers::EMPTY;
        registers.configure([1, 0, 0, 0, 1, 0, SIDE, 0]);
        registers.load(0, |_| [sum.to_bits(); SIDE]);
        registers
            .load(4, |_| std::array::from_fn(|pair| pairs.get(pair).map_or(0, |[x, y, ..]| bits(*x) | bits(*y) << 16)));
        registers.load(6, |pair| [pairs.get(pair).map_or(0, |[.., v, w]| bits(*v) | bits(*w) << 16); SIDE]);
        registers.multiply(0, 4, 6);
        f32::from_bits(registers.tiles[0][0][0])
    }

    #[test]
    fn firsts_and_seconds_are_summed_apart_and_then_together() {
        let large = 2f32.powi(24);
        // One after the other, 1 would be lost beside 2^24 before that is taken away again.
        assert_eq!(one_sum(&[[large, 1.0, 1.0, 1.0], [-large, 0.0, 1.0, 1.0]], 0.0), 1.0);
        // Here it is lost: in the chain of the firsts, then where both chains meet, then beside the sum so far.
        assert_eq!(one_sum(&[[large, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], [-large, 0.0, 1.0, 1.0]], 0.0), 0.0);
        assert_eq!(one_sum(&[[large, 1.0, 1.0, 1.0]], -large), 0.0);
        assert_eq!(one_sum(&[[1.0, 0.0, 1.0, 0.0]], large), large);
        // Ties go to even: 2^24 + 1 to 2^24, 2^24 + 3 to 2^24 + 4.
        assert_eq!(one_sum(&[[3.0, 0.0, 1.0, 0.0]], large), large + 4.0);
    }

    #[test]
    fn numbers_below_the_smallest_normal_one_count_as_zero() {
        let least = f32::MIN_POSITIVE;
        assert_eq!(one_sum(&[[least, 0.0, 1.0, 0.0]], 0.0), least);
        assert_eq!(one_sum(&[[least / 2.0, 0.0, 2.0, 0.0]], 0.0), 0.0, "a factor");
        assert_eq!(one_sum(&[[least, 0.0, 0.5, 0.0]], 0.0), 0.0, "a product");
        assert_eq!(one_sum(&[[0.0; 4]], least / 2.0), 0.0, "the sum so far");
        assert_eq!(one_sum(&[[least, -least, 1.5, 1.0]], 0.0), 0.0, "a sum of both chains");
        assert!(one_sum(&[[f32::NAN, 0.0, 1.0, 0.0]], 0.0).is_nan());
        assert_eq!(one_sum(&[[f32::INFINITY, 0.0, 1.0, 0.0]], 0.0), f32::INFINITY);
    }
}
