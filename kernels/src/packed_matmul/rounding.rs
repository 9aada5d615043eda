//! Rounding to bfloat16, to the nearest and of two equally near to the even one.

use crate::vector_math::vectorised;

/// The bits of the nearest bfloat16. NaN stays NaN.
#[inline(always)]
pub fn nearest(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if value.is_nan() { (bits >> 16) | 0x40 } else { rounded }
}

/// Each value rounded, in f32.
#[inline(always)]
pub fn nearest_each(values: &[f32], rounded: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || rounded.iter_mut().zip(values).for_each(|(to, &value)| *to = f32::from_bits(nearest(value) << 16)),
    );
}

/// Two rounded values in the bits of each number, the first in the lower half.
#[inline(always)]
pub fn round_pairs(values: &[f32], pairs: &mut [f32]) {
    vectorised(
        #[inline(always)]
        || {
            let (twos, odd) = values.as_chunks::<2>();
            for (pair, two) in pairs.iter_mut().zip(twos) {
                *pair = f32::from_bits(nearest(two[0]) | nearest(two[1]) << 16);
            }
            if let ([odd], Some(pair)) = (odd, pairs.last_mut()) {
                *pair = f32::from_bits(nearest(*odd));
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rounding_is_that_of_the_crate_half() {
        let interesting = [0x8000u32, 0x7fff, 0x8001, 0x1_8000, 0x1_7fff, 0x7f80_0000, 0x7f7f_ffff, 0x7f80_0001, 1];
        for bits in interesting.into_iter().chain((0..200_000).map(|n: u32| n.wrapping_mul(2_654_435_761))) {
            for bits in [bits, bits | 1 << 31] {
                let value = f32::from_bits(bits);
                assert_eq!(nearest(value), u32::from(bf16::from_f32(value).to_bits()), "{bits:08x}");
            }
        }
    }

    #[test]
    fn an_odd_value_stands_before_a_zero() {
        let mut pairs = [f32::NAN; 2];
        round_pairs(&[1.0, -2.0, 0.5], &mut pairs);
        assert_eq!(pairs.map(f32::to_bits), [0xc000_3f80, 0x3f00]);
    }
}
