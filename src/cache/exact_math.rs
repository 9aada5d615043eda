//! Exponentials and logarithms from additions, products and quotients alone, so that they give the same bits on every
//! machine; those of the system's library differ in the last place, and a cache's bytes may not.

use std::f64::consts::LN_2;

/// `1 / n!` and `1 / (2 n + 1)`, by `n`.
const INVERSE_FACTORIALS: [f64; 17] = {
    let mut inverses = [1.0; 17];
    let mut n = 1;
    while n < inverses.len() {
        inverses[n] = inverses[n - 1] / n as f64;
        n += 1;
    }
    inverses
};
const INVERSE_ODD: [f64; 13] = {
    let mut inverses = [1.0; 13];
    let mut n = 1;
    while n < inverses.len() {
        inverses[n] = 1.0 / (2 * n + 1) as f64;
        n += 1;
    }
    inverses
};

/// `e^x`; 0 far below the smallest double.
pub(crate) fn exp(x: f64) -> f64 {
    if x < -700.0 {
        return 0.0;
    }
    let turns = (x * (1.0 / LN_2)).round_ties_even().min(1000.0);
    // LN_2 in two parts, the first of 21 bits, so that its product with `turns` is exact.
    const HIGH: f64 = 0.693_147_182_464_599_6;
    let rest = (x - turns * HIGH) - turns * (LN_2 - HIGH);
    let mut sum = INVERSE_FACTORIALS[14];
    for coefficient in INVERSE_FACTORIALS[..14].iter().rev() {
        sum = coefficient + sum * rest;
    }
    sum * f64::from_bits(((turns as i64 + 1023) as u64) << 52)
}

/// `1 - e^x` for `x <= 0`, exact to the last places also where it is small.
pub(crate) fn one_minus_exp(x: f64) -> f64 {
    if x < -0.5 {
        return 1.0 - exp(x);
    }
    let mut sum = INVERSE_FACTORIALS[16];
    for coefficient in INVERSE_FACTORIALS[1..16].iter().rev() {
        sum = coefficient + sum * x;
    }
    -sum * x
}

/// Natural logarithm of a normal positive number.
pub(crate) fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    exponent as f64 * LN_2 + ln_near_one(mantissa - 1.0)
}

/// `ln(1 + x)` for `x` from -0.3 to 0.42.
fn ln_near_one(x: f64) -> f64 {
    let ratio = x / (2.0 + x);
    let square = ratio * ratio;
    // In pairs and fours that need not wait for one another; the order is part of what a cache's values are.
    let (fourth, eighth) = (square * square, (square * square) * (square * square));
    let pair = |n: usize| INVERSE_ODD[n] + INVERSE_ODD[n + 1] * square;
    let four = |n: usize| pair(n) + pair(n + 2) * fourth;
    let sum = four(0) + (four(4) + (four(8) + INVERSE_ODD[12] * eighth) * eighth) * eighth;
    2.0 * ratio * sum
}

/// `ln(1 - x)` for `x` from 0 to below 1, exact to the last places also where it is small.
pub(crate) fn ln_one_minus(x: f64) -> f64 {
    if x < 0.25 { ln_near_one(-x) } else { ln(1.0 - x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_agree_with_the_systems_functions() {
        for step in -7000..=40 {
            let x = step as f64 * 0.1 + 0.0123;
            // Far from 0 the last places of x are lost to its size.
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-14 + 4e-16 * x.abs(), "exp({x})");
            if x < 0.0 {
                assert!((one_minus_exp(x) / -x.exp_m1() - 1.0).abs() < 1e-14, "1 - exp({x})");
            }
            let y = x.exp();
            assert!((ln(y) - y.ln()).abs() <= 1e-15 * (1.0 + x.abs()) * 2.0, "ln({y})");
            if y < 1.0 {
                assert!((ln_one_minus(y) / (-y).ln_1p() - 1.0).abs() < 1e-13, "ln(1 - {y})");
            }
        }
        assert_eq!((exp(0.0), exp(-1e30), ln(1.0), one_minus_exp(0.0)), (1.0, 0.0, 0.0, 0.0));
    }
}
