//! Loops over `f32` slices that the compiler turns into the widest vectors the processor has.
//!
//! Reductions run in sixteen fixed lanes, so that a result does not depend on the vector width chosen at run time.

use pulp::{Arch, NullaryFnOnce};

/// Lanes of a reduction, whatever vectors the processor has.
pub(crate) const LANES: usize = 16;

/// `e^x` to about one unit in the last place for `x <= 88`; 0 below -87, so that `-inf` gives exactly 0.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let power = power_of_two(x.clamp(-87.0, 88.0), LOG2_E);
    if x < -87.0 { 0.0 } else { power }
}

/// What an f32 holds of the base-2 logarithm of e, and what it leaves out.
const LOG2_E: [f32; 2] = split(std::f64::consts::LOG2_E);

/// A number as an f32 and the f32 that is missing to it.
pub const fn split(number: f64) -> [f32; 2] {
    [number as f32, (number - number as f32 as f64) as f32]
}

/// `2^(x (scale[0] + scale[1]))`, within a unit in the last place where that is from 2^-126 to 2^127; NaN of NaN. Every
/// step is fused, which wide vectors have one instruction for.
#[inline(always)]
pub fn power_of_two(x: f32, scale: [f32; 2]) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
    let shifted = x.mul_add(scale[0], ROUND);
    let n = shifted - ROUND;
    let f = x.mul_add(scale[1], x.mul_add(scale[0], -n));
    // The polynomial of degree 6 from 1 that is nearest to 2^f for |f| <= 1/2: within 2e-9 of it.
    let p = 1.535_336_2e-4f32;
    let p = p.mul_add(f, 1.339_887_5e-3);
    let p = p.mul_add(f, 9.618_437e-3);
    let p = p.mul_add(f, 5.550_332_4e-2);
    let p = p.mul_add(f, 2.402_264_8e-1);
    let p = p.mul_add(f, std::f32::consts::LN_2);
    let p = p.mul_add(f, 1.0);
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

#[inline(always)]
fn fold(values: &[f32], start: f32, lane: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane_value, &value) in lanes.iter_mut().zip(chunk) {
            *lane_value = lane(*lane_value, value);
        }
    }
    for (lane_value, &value) in lanes.iter_mut().zip(rest) {
        *lane_value = lane(*lane_value, value);
    }
    lanes.into_iter().fold(start, join)
}

/// The largest value, `-inf` for an empty slice; NaN is passed over.
pub fn max(values: &[f32]) -> f32 {
    vectorised(
        #[inline(always)]
        || fold(values, f32::NEG_INFINITY, |a, b| if b > a { b } else { a }, |a, b| if b > a { b } else { a }),
    )
}

/// Sum of `exp(value - shift)`: in f32 lanes over short stretches, in f64 across them.
pub fn sum_exp(values: &[f32], shift: f32) -> f32 {
    const STRETCH: usize = 2048;
    let sum = |stretch: &[f32]| {
        vectorised(
            #[inline(always)]
            || fold(stretch, 0.0, |sum, value| sum + exp(value - shift), |a, b| a + b),
        )
    };
    values.chunks(STRETCH).map(|stretch| sum(stretch) as f64).sum::<f64>() as f32
}

/// `ln(sum(exp(value)))`.
pub fn log_sum_exp(values: &[f32]) -> f32 {
    let largest = max(values);
    if !largest.is_finite() {
        return largest;
    }
    largest + sum_exp(values, largest).ln()
}

/// Replaces each value by `exp(value - shift)` and returns their sum.
pub fn exp_in_place(values: &mut [f32], shift: f32) -> f32 {
    vectorised(
        #[inline(always)]
        || {
            for value in values.iter_mut() {
                *value = exp(*value - shift);
            }
            fold(values, 0.0, |sum, value| sum + value, |a, b| a + b)
        },
    )
}

/// Writes `scale * exp(value - shift)`.
pub fn scaled_exp(values: &[f32], shift: f32, scale: f32, output: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (out, &value) in output.iter_mut().zip(values) {
                *out = scale * exp(value - shift);
            }
        },
    )
}

/// Sums of `exp(factor * (value - shift))` and of the squares of that, in f32 lanes: for short stretches.
pub fn sum_exp_and_squares(values: &[f32], shift: f32, factor: f32) -> (f32, f32) {
    vectorised(
        #[inline(always)]
        || {
            let (mut sums, mut squares) = ([0.0f32; LANES], [0.0f32; LANES]);
            let chunks = values.chunks_exact(LANES);
            let rest = chunks.remainder();
            for chunk in chunks {
                for lane in 0..LANES {
                    let value = exp(factor * (chunk[lane] - shift));
                    sums[lane] += value;
                    squares[lane] += value * value;
                }
            }
            for (lane, value) in rest.iter().enumerate() {
                let value = exp(factor * (value - shift));
                sums[lane] += value;
                squares[lane] += value * value;
            }
            (sums.into_iter().sum(), squares.into_iter().sum())
        },
    )
}

/// Replaces each value by `scale * exp(factor * (value - shift))`.
pub fn scaled_exp_in_place(values: &mut [f32], shift: f32, factor: f32, scale: f32) {
    vectorised(
        #[inline(always)]
        || {
            for value in values.iter_mut() {
                *value = scale * exp(factor * (*value - shift));
            }
        },
    )
}

/// The largest value of each column of row-major `values` and the first row that has it, if it is larger than what
/// `largest` has.
pub fn max_columns(values: &[f32], largest: &mut [f32], rows: &mut [u32]) {
    vectorised(
        #[inline(always)]
        || {
            for (number, row) in values.chunks_exact(largest.len()).enumerate() {
                for ((largest, place), &value) in largest.iter_mut().zip(rows.iter_mut()).zip(row) {
                    let larger = value > *largest;
                    *largest = if larger { value } else { *largest };
                    *place = if larger { number as u32 } else { *place };
                }
            }
        },
    )
}

/// Adds to each column's sums `exp(factor * (value - shift))` and the square of that: in f32 over short stretches, in
/// f64 across them.
pub fn sum_exp_columns(values: &[f32], shift: &[f32], factor: f32, sums: &mut [f64], squares: &mut [f64]) {
    const STRETCH: usize = 64;
    let width = shift.len();
    let (mut part, mut part_squares) = (vec![0.0f32; width], vec![0.0f32; width]);
    for stretch in values.chunks(STRETCH * width) {
        part.fill(0.0);
        part_squares.fill(0.0);
        vectorised(
            #[inline(always)]
            || {
                for row in stretch.chunks_exact(width) {
                    let columns = row.iter().zip(shift).zip(&mut part).zip(&mut part_squares);
                    for (((&value, &shift), sum), square) in columns {
                        let value = exp(factor * (value - shift));
                        *sum += value;
                        *square += value * value;
                    }
                }
            },
        );
        for column in 0..width {
            sums[column] += part[column] as f64;
            squares[column] += part_squares[column] as f64;
        }
    }
}

/// Writes `scale * exp(factor * (value - shift))` of each value, with its column's scale and shift.
pub fn scaled_exp_columns(values: &[f32], shift: &[f32], factor: f32, scale: &[f32], output: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (row, output) in values.chunks_exact(shift.len()).zip(output.chunks_exact_mut(shift.len())) {
                for (((output, &value), &shift), &scale) in output.iter_mut().zip(row).zip(shift).zip(scale) {
                    *output = scale * exp(factor * (value - shift));
                }
            }
        },
    )
}

/// As [`scaled_exp_columns`], the sum of two such terms.
pub fn add_scaled_exp_columns(
    values: &[f32],
    shift: [&[f32]; 2],
    factor: [f32; 2],
    scale: [&[f32]; 2],
    output: &mut [f32],
) {
    vectorised(
        #[inline(always)]
        || {
            let width = shift[0].len();
            for (row, output) in values.chunks_exact(width).zip(output.chunks_exact_mut(width)) {
                for (column, (output, &value)) in output.iter_mut().zip(row).enumerate() {
                    let first = scale[0][column] * exp(factor[0] * (value - shift[0][column]));
                    *output = first + scale[1][column] * exp(factor[1] * (value - shift[1][column]));
                }
            }
        },
    )
}

/// Sum of products.
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    vectorised(
        #[inline(always)]
        || {
            let mut lanes = [0.0f32; LANES];
            let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
            let (a_rest, b_rest) = (a_chunks.remainder(), b_chunks.remainder());
            for (x, y) in a_chunks.zip(b_chunks) {
                for lane in 0..LANES {
                    lanes[lane] += x[lane] * y[lane];
                }
            }
            for lane in 0..a_rest.len().min(b_rest.len()) {
                lanes[lane] += a_rest[lane] * b_rest[lane];
            }
            lanes.into_iter().sum()
        },
    )
}

/// `y += scale * x`.
pub fn add_scaled(y: &mut [f32], scale: f32, x: &[f32]) {
    vectorised(
        #[inline(always)]
        || {
            for (y, &x) in y.iter_mut().zip(x) {
                *y += scale * x;
            }
        },
    )
}

/// Runs a closure with the widest vector instructions of this processor switched on; write it as plain loops and
/// mark it `#[inline(always)]`.
#[inline(always)]
pub fn vectorised<R>(body: impl FnMut() -> R) -> R {
    Arch::new().dispatch(Body(body))
}

/// A closure called by reference: called by value it would be called through a function of the compiler's, which may stay one
/// of its own, and that one is for processors without wide vectors.
struct Body<F>(F);

impl<R, F: FnMut() -> R> NullaryFnOnce for Body<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_a_unit_in_the_last_place() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let truth = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - truth) / truth).abs());
        }
        assert!(worst < 1.2e-7, "relative error {worst:e}");
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn reductions_agree_with_f64() {
        let values: Vec<f32> = (0..1037).map(|i| ((i * 7919) % 1000) as f32 / 50.0 - 10.0).collect();
        let sum: f64 = values.iter().map(|&v| (v as f64).exp()).sum();
        assert!((log_sum_exp(&values) as f64 - sum.ln()).abs() < 1e-6);
        let square: f64 = values.iter().map(|&v| (v as f64).powi(2)).sum();
        assert!(((dot(&values, &values) as f64 - square) / square).abs() < 1e-6);
        assert_eq!(max(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
    }

    #[test]
    fn the_largest_of_a_column_is_the_first_of_equal_ones() {
        let none = f32::NEG_INFINITY;
        let (mut largest, mut rows) = ([none; 4], [u32::MAX; 4]);
        max_columns(&[1.0, f32::NAN, none, -3.0, 2.0, 5.0, none, -1.0, 2.0, 4.0, none, -1.0], &mut largest, &mut rows);
        assert_eq!((largest, rows), ([2.0, 5.0, none, -1.0], [1, 1, u32::MAX, 1]));
    }
}
