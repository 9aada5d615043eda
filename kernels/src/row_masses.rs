//! What the entries of one row of logits add up to at one temperature, block by block.
//!
//! One pass of exponentials over the row answers everything a selection asks afterwards: the whole sum, the sum without
//! some ids (their blocks are added up again, nothing is subtracted), and where in the running sum a draw falls. A block's
//! entries are added up relative to its own largest, which takes nothing but the block to know: so whoever computes the
//! logits can do it while they are in cache.

use std::cell::RefCell;

use crate::vector_math::{LANES, exp, power_of_two, split, vectorised};

/// Entries per block.
pub const BLOCK: usize = 64;

/// Blocks whose lanes are joined at a time.
const JOINED: usize = 8;

/// Below this an f32 exponential may have been rounded to nothing, so that the sum has to be made relative to what is
/// left.
const FAINT: f64 = 1e-26;

thread_local! {
    /// A row's blocks without those that something is left out of; memory kept from one row to the next.
    static UNTOUCHED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Each block's largest entry, and what its entries add up to relative to that.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockSums {
    /// NaN is passed over; `-inf` where there is nothing else.
    pub largest: Vec<f32>,
    /// The sum of `exp((entry - largest) / temperature)`.
    pub masses: Vec<f32>,
}

impl BlockSums {
    pub fn new(row: &[f32], temperature: f32) -> Self {
        let mut sums = BlockSums::default();
        sums.append_each(&[row], temperature);
        sums
    }

    /// Of one row, out of those of pieces of it: of each, the blocks of some rows one behind the other, and which of the
    /// rows it is.
    pub fn of_pieces<'a>(pieces: impl Iterator<Item = (&'a BlockSums, usize, usize)>, blocks: usize) -> Self {
        let mut sums = BlockSums::with_capacity(blocks);
        for (piece, rows, row) in pieces {
            let count = piece.largest.len() / rows;
            sums.largest.extend_from_slice(&piece.largest[row * count..][..count]);
            sums.masses.extend_from_slice(&piece.masses[row * count..][..count]);
        }
        sums
    }

    /// None yet, with room for so many blocks.
    pub fn with_capacity(blocks: usize) -> Self {
        BlockSums { largest: Vec::with_capacity(blocks), masses: Vec::with_capacity(blocks) }
    }

    /// Appends the blocks of one row after the other. What was there before must have ended with a whole block.
    pub fn append_each<R: AsRef<[f32]>>(&mut self, rows: &[R], temperature: f32) {
        let before = self.largest.len();
        let blocks: usize = rows.iter().map(|row| row.as_ref().len().div_ceil(BLOCK)).sum();
        self.largest.resize(before + blocks, f32::NEG_INFINITY);
        self.masses.resize(before + blocks, 0.0);
        let (maxima, masses) = (&mut self.largest[before..], &mut self.masses[before..]);
        let scale = split(std::f64::consts::LOG2_E / temperature as f64);
        vectorised(
            #[inline(always)]
            || {
                each_largest(rows, maxima);
                let (mut masses, mut maxima) = (Joins::new(masses, |a, b| a + b), maxima.iter());
                for row in rows {
                    let (blocks, rest) = row.as_ref().as_chunks();
                    for (block, &largest) in blocks.iter().zip(maxima.by_ref()) {
                        masses.push(block_mass(block, largest, scale));
                    }
                    if !rest.is_empty() {
                        masses.put(rest_mass(rest, *maxima.next().expect("the rest is a block"), scale));
                    }
                }
                masses.join();
            },
        );
    }
}

/// The largest entry of each block; NaN is passed over.
pub(crate) fn block_maxima(row: &[f32]) -> Vec<f32> {
    let mut maxima = vec![f32::NEG_INFINITY; row.len().div_ceil(BLOCK)];
    vectorised(
        #[inline(always)]
        || each_largest(&[row], &mut maxima),
    );
    maxima
}

#[inline(always)]
fn each_largest<R: AsRef<[f32]>>(rows: &[R], maxima: &mut [f32]) {
    let mut maxima = Joins::new(maxima, larger);
    for row in rows {
        let (blocks, rest) = row.as_ref().as_chunks();
        blocks.iter().for_each(|block| maxima.push(block_largest(block)));
        if !rest.is_empty() {
            maxima.put(rest.iter().copied().fold(f32::NEG_INFINITY, larger));
        }
    }
    maxima.join();
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
fn block_largest(block: &[f32; BLOCK]) -> [f32; LANES] {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    lanes
}

/// What an entry weighs beside the largest. `scale` is the base-2 logarithm of e over the temperature, [split].
#[inline(always)]
fn weight(value: f32, largest: f32, scale: [f32; 2]) -> f32 {
    // What is smaller than the smallest is lost beside the largest, which is 1.
    let smallest = -126.0 / scale[0];
    let x = value - largest;
    power_of_two(if x < smallest { smallest } else { x }, scale)
}

#[inline(always)]
fn block_mass(block: &[f32; BLOCK], largest: f32, scale: [f32; 2]) -> [f32; LANES] {
    let mut lanes = [0.0f32; LANES];
    if largest == f32::NEG_INFINITY {
        lanes[0] = nothing(block);
        return lanes;
    }
    for chunk in block.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += weight(chunk[lane], largest, scale);
        }
    }
    lanes
}

/// The same of what is less than a block.
#[inline(always)]
fn rest_mass(rest: &[f32], largest: f32, scale: [f32; 2]) -> f32 {
    if largest == f32::NEG_INFINITY {
        return nothing(rest);
    }
    rest.iter().map(|&value| weight(value, largest, scale)).sum()
}

/// What entries without a largest add up to: nothing, or not a number, as `-inf` less itself is none.
fn nothing(block: &[f32]) -> f32 {
    block.iter().map(|&value| if value.is_nan() { value } else { 0.0 }).sum()
}

/// Lanes of blocks that become a number each, some blocks at a time: one alone would wait for each of its steps.
struct Joins<'a, W> {
    waiting: [[f32; LANES]; JOINED],
    count: usize,
    places: &'a mut [f32],
    with: W,
}

impl<'a, W: Fn(f32, f32) -> f32> Joins<'a, W> {
    fn new(places: &'a mut [f32], with: W) -> Self {
        Joins { waiting: [[0.0; LANES]; JOINED], count: 0, places, with }
    }

    #[inline(always)]
    fn push(&mut self, lanes: [f32; LANES]) {
        self.waiting[self.count] = lanes;
        self.count += 1;
        if self.count == JOINED {
            self.join();
        }
    }

    /// A number as it is.
    #[inline(always)]
    fn put(&mut self, number: f32) {
        self.join();
        let (place, places) = std::mem::take(&mut self.places).split_first_mut().expect("a place for each block");
        *place = number;
        self.places = places;
    }

    /// Those that wait, in the order of [`join`].
    #[inline(always)]
    fn join(&mut self) {
        const HALF: usize = LANES / 2;
        let mut halves = [[0.0f32; HALF]; JOINED];
        for (half, lanes) in halves.iter_mut().zip(&self.waiting) {
            for lane in 0..HALF {
                half[lane] = (self.with)(lanes[lane], lanes[lane + HALF]);
            }
        }
        let mut turned: [[f32; JOINED]; HALF] = std::array::from_fn(|lane| halves.map(|half| half[lane]));
        let mut width = HALF / 2;
        while width > 0 {
            for lane in 0..width {
                let high = turned[lane + width];
                let low = &mut turned[lane];
                for block in 0..JOINED {
                    low[block] = (self.with)(low[block], high[block]);
                }
            }
            width /= 2;
        }
        let (places, rest) = std::mem::take(&mut self.places).split_at_mut(self.count);
        places.copy_from_slice(&turned[0][..self.count]);
        (self.places, self.count) = (rest, 0);
    }
}

/// Halves the lanes until one is left: the same order whatever the width of the vectors.
#[inline(always)]
fn join<T: Copy>(mut lanes: [T; LANES], with: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = with(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// A sum in f64, in lanes: in one chain each addition would wait for the one before.
fn sum_of(weights: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    vectorised(
        #[inline(always)]
        || {
            let (whole, rest) = weights.as_chunks::<LANES>();
            for chunk in whole {
                for lane in 0..LANES {
                    lanes[lane] += chunk[lane] as f64;
                }
            }
            rest.iter().zip(&mut lanes).for_each(|(&weight, lane)| *lane += weight as f64);
        },
    );
    join(lanes, |a, b| a + b)
}

/// A row, and the sum of `exp((logit - largest) / temperature)` over each block of it.
pub(crate) struct RowMasses<'a> {
    row: &'a [f32],
    largest: f32,
    temperature: f32,
    blocks: Vec<f32>,
    total: f64,
}

impl<'a> RowMasses<'a> {
    /// `largest` is the largest entry of the row, or of a longer one that it is a part of. A row with a NaN, or without a
    /// finite largest entry, has a total that is not finite.
    pub(crate) fn new(row: &'a [f32], largest: f32, temperature: f32) -> Self {
        let sums = BlockSums::new(row, temperature);
        Self::of_sums(row, &sums.largest, sums.masses, largest, temperature)
    }

    /// The same, where the blocks are added up already: those of [`BlockSums`] at this temperature.
    pub(crate) fn of_sums(
        row: &'a [f32],
        maxima: &[f32],
        mut blocks: Vec<f32>,
        largest: f32,
        temperature: f32,
    ) -> Self {
        let inverse = 1.0 / temperature;
        vectorised(
            #[inline(always)]
            || {
                for (mass, &own) in blocks.iter_mut().zip(maxima) {
                    // A NaN stays one, and what is infinitely small is nothing.
                    *mass *= if own == f32::NEG_INFINITY { 1.0 } else { exp((own - largest) * inverse) };
                }
            },
        );
        let total = sum_of(&blocks);
        RowMasses { row, largest, temperature, blocks, total }
    }

    pub(crate) fn temperature(&self) -> f32 {
        self.temperature
    }

    /// The sum over the whole row, at least 1 where it is finite.
    pub(crate) fn total(&self) -> f64 {
        self.total
    }

    /// Logarithm of an entry's weight, relative to the largest.
    pub(crate) fn log_weight(&self, id: u32) -> f64 {
        self.scaled(self.row[id as usize])
    }

    fn scaled(&self, value: f32) -> f64 {
        (value as f64 - self.largest as f64) / self.temperature as f64
    }

    /// Ids whose weight is at least `weight`, in ascending order, found by the maxima of the blocks.
    pub(crate) fn at_least(&self, weight: f64, maxima: &[f32]) -> Vec<u32> {
        let bound = weight.ln();
        let mut ids = vec![];
        for (block, &largest) in maxima.iter().enumerate() {
            if self.scaled(largest) >= bound {
                let first = (block * BLOCK) as u32;
                let reaches = |&(_, &value): &(u32, &f32)| self.scaled(value) >= bound;
                ids.extend((first..).zip(self.block(block)).filter(reaches).map(|(id, _)| id));
            }
        }
        ids
    }

    /// Logarithm of what all ids but these add up to, relative to the largest entry; `-inf` when nothing is left. `ids`
    /// ascend.
    pub(crate) fn log_outside(&self, ids: &[u32]) -> f64 {
        let mut sum = 0.0;
        UNTOUCHED.with_borrow_mut(|untouched| {
            untouched.clone_from(&self.blocks);
            for inside in ids.chunk_by(|a, b| *a as usize / BLOCK == *b as usize / BLOCK) {
                let block = inside[0] as usize / BLOCK;
                untouched[block] = 0.0;
                let mut buffer = [0.0; BLOCK];
                self.weights(block, inside, &mut buffer);
                sum += sum_of(&buffer);
            }
            sum += sum_of(untouched);
        });
        if sum > FAINT {
            return sum.ln();
        }
        // So far below the largest that only its own scale has digits for it.
        let mut left = ids.iter().copied().peekable();
        let outside = (0..).zip(self.row).filter(|(id, _)| left.next_if_eq(id).is_none());
        let outside: Vec<f64> = outside.map(|(_, &value)| self.scaled(value)).collect();
        crate::divergence::log_sum_exp(&outside)
    }

    /// For each target the id at which the running sum of weights, over all ids but `excluded`, passes it. Targets and
    /// `excluded` ascend; it ends with the first target beyond the sum.
    pub(crate) fn passing(&self, excluded: &[u32], targets: impl IntoIterator<Item = f64>) -> Vec<u32> {
        let mut targets = targets.into_iter().peekable();
        let (mut found, mut before, mut left) = (vec![], 0.0, excluded);
        for (block, &mass) in self.blocks.iter().enumerate() {
            let behind = ((block + 1) * BLOCK) as u64;
            let (inside, after) = left.split_at(left.iter().take_while(|&&id| (id as u64) < behind).count());
            left = after;
            let mut buffer = [0.0; BLOCK];
            let mass = if inside.is_empty() {
                mass as f64
            } else {
                self.weights(block, inside, &mut buffer);
                sum_of(&buffer)
            };
            let end = before + mass;
            if targets.peek().is_some_and(|target| *target < end) {
                if inside.is_empty() {
                    self.weights(block, inside, &mut buffer);
                }
                let (mut reached, mut last) = (before, None);
                for (place, &weight) in buffer.iter().enumerate() {
                    if weight > 0.0 {
                        let id = (block * BLOCK + place) as u32;
                        (reached, last) = (reached + weight as f64, Some(id));
                        while targets.next_if(|target| *target < reached).is_some() {
                            found.push(id);
                        }
                    }
                }
                // The block's sum was rounded in another order: what lies between the two belongs to its last entry.
                while let (Some(id), Some(_)) = (last, targets.next_if(|target| *target < end)) {
                    found.push(id);
                }
            }
            before = end;
        }
        found
    }

    /// The weights of a block's entries, 0 for those excluded. What lies in `buffer` behind the last of them stays.
    fn weights(&self, block: usize, excluded: &[u32], buffer: &mut [f32; BLOCK]) {
        let values = self.block(block);
        let (largest, inverse) = (self.largest, 1.0 / self.temperature);
        vectorised(
            #[inline(always)]
            || {
                for (weight, &value) in buffer.iter_mut().zip(values) {
                    *weight = exp((value - largest) * inverse);
                }
            },
        );
        for &id in excluded {
            buffer[id as usize - block * BLOCK] = 0.0;
        }
    }

    fn block(&self, block: usize) -> &'a [f32] {
        &self.row[block * BLOCK..self.row.len().min((block + 1) * BLOCK)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_adds_up_to_the_same_bits_alone_and_among_others() {
        let entry = |number: usize| ((number * 7919 + number * number % 97) % 1009) as f32 * 0.05 - 30.0;
        let mut rows: Vec<Vec<f32>> =
            (0..7).map(|row| (0..4 * BLOCK + row * 9).map(|i| entry(row + 31 * i)).collect()).collect();
        rows[1][BLOCK..2 * BLOCK].fill(f32::NEG_INFINITY);
        rows[2][BLOCK..2 * BLOCK].fill(f32::NAN);
        rows[3][5] = f32::NAN;
        rows[4][4 * BLOCK..].fill(f32::NEG_INFINITY);
        rows[5][2 * BLOCK] = f32::INFINITY;
        let temperature = 1.7;
        let scale = split(std::f64::consts::LOG2_E / temperature as f64);
        let mut all = BlockSums::default();
        all.append_each(&rows, temperature);
        let mut sums = all.largest.iter().zip(&all.masses);
        for row in &rows {
            assert_eq!(block_maxima(row), BlockSums::new(row, temperature).largest);
            for block in row.chunks(BLOCK) {
                let (&largest, &mass) = sums.next().unwrap();
                let expected = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert_eq!(largest, expected);
                let mass_of_one = match <&[f32; BLOCK]>::try_from(block) {
                    Ok(block) => join(block_mass(block, expected, scale), |a, b| a + b),
                    Err(_) => rest_mass(block, expected, scale),
                };
                assert!(mass.to_bits() == mass_of_one.to_bits() || mass.is_nan() && mass_of_one.is_nan());
                if block.iter().all(|value| value.is_finite()) {
                    let exact = |value: &f32| ((*value as f64 - expected as f64) / temperature as f64).exp();
                    let exact: f64 = block.iter().map(exact).sum();
                    assert!((mass as f64 / exact - 1.0).abs() < 1e-6, "{mass} instead of {exact}");
                }
            }
        }
        assert!(sums.next().is_none());
    }
}
