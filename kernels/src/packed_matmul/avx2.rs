//! Sums of products by AVX2 and FMA: six rows by half a panel stay in registers.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::{
    ahead::Ahead,
    place::Store,
    tiles::{HalfLine, PANEL, Places, Slice, TileRow},
};

/// Two registers of sums for each row, two of weights and one of a row's value: 15 of 16.
pub const TILE_ROWS: usize = 6;

const LANES: usize = 8;

#[inline]
#[target_feature(enable = "avx2,fma")]
fn quarters(half: &HalfLine<f32>) -> [__m256; 2] {
    let (low, high) = half.split_at(LANES);
    // SAFETY: both slices have eight numbers, which is what is read.
    unsafe { [_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn pair_quarters(half: &HalfLine<u32>) -> [__m256i; 2] {
    let (low, high) = half.split_at(LANES);
    // SAFETY: both slices have eight numbers, which is what is read.
    unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn step<const R: usize>(sums: &mut [[__m256; 2]; R], rows: &[TileRow; R], k: usize, weights: [__m256; 2]) {
    for (sums, row) in sums.iter_mut().zip(rows) {
        let value = _mm256_set1_ps(row[k]);
        sums[0] = _mm256_fmadd_ps(value, weights[0], sums[0]);
        sums[1] = _mm256_fmadd_ps(value, weights[1], sums[1]);
    }
}

/// Products of `R` rows with a panel's slice, each summed in the order of k.
#[target_feature(enable = "avx2,fma")]
pub fn sums<const R: usize>(
    rows: &[TileRow; R],
    slice: Slice<'_>,
    mut places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        match slice {
            Slice::F32(lines) => {
                let mut ahead = ahead.over(2 * lines.len());
                for (k, line) in lines.iter().enumerate() {
                    ahead.next();
                    step(&mut sums, rows, k, quarters(line.halves()[half]));
                }
            }
            Slice::Bf16 { pairs, odd } => {
                let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
                for (pair, line) in pairs.iter().enumerate() {
                    let weights = pair_quarters(line.halves()[half]);
                    let even = weights.map(|part| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(part)));
                    step(&mut sums, rows, 2 * pair, even);
                    let odd = weights.map(|part| _mm256_castsi256_ps(_mm256_and_si256(part, high)));
                    step(&mut sums, rows, 2 * pair + 1, odd);
                }
                if let Some(line) = odd {
                    let weights = pair_quarters(line.halves()[half]);
                    let even = weights.map(|part| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(part)));
                    step(&mut sums, rows, 2 * pairs.len(), even);
                }
            }
            Slice::Rounded(lines) => {
                let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
                for (pair, line) in lines.iter().enumerate() {
                    let weights = pair_quarters(line.halves()[half]);
                    let odd = weights.map(|part| _mm256_castsi256_ps(_mm256_and_si256(part, high)));
                    step(&mut sums, rows, 2 * pair + 1, odd);
                    let even = weights.map(|part| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(part)));
                    step(&mut sums, rows, 2 * pair, even);
                }
            }
        }
        const { assert!(PANEL == 4 * LANES) };
        for (sums, place) in sums.into_iter().zip(&mut places) {
            for (number, sum) in sums.into_iter().enumerate() {
                // SAFETY: a place has four times eight numbers, which are read, if they are to be added to, and written.
                unsafe {
                    let part = place.as_mut_ptr().add((2 * half + number) * LANES);
                    let sum = if store == Store::Add { _mm256_add_ps(_mm256_loadu_ps(part), sum) } else { sum };
                    _mm256_storeu_ps(part, sum);
                }
            }
        }
    }
}
