//! Sums of products by AVX-512: fourteen rows by one panel stay in registers; and by its products of
//! bfloat16, where there are any.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_storeu_ps,
};

use super::tiles::{Line, PANEL, Slice, Sums, TileRows};

/// Two registers of sums for each row, two of weights and one of a row's value: 31 of 32.
pub const TILE_ROWS: usize = 14;

const LANES: usize = 16;

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(line: &Line<f32>) -> [__m512; 2] {
    let [low, high] = line.halves::<LANES>();
    // SAFETY: each reference is to sixteen numbers, which is what is read.
    unsafe { [_mm512_loadu_ps(low.as_ptr()), _mm512_loadu_ps(high.as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn pair_halves(line: &Line<u32>) -> [__m512i; 2] {
    let [low, high] = line.halves::<LANES>();
    // SAFETY: each reference is to sixteen numbers, which is what is read.
    unsafe { [_mm512_loadu_si512(low.as_ptr().cast()), _mm512_loadu_si512(high.as_ptr().cast())] }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn step<const R: usize>(sums: &mut [[__m512; 2]; R], rows: &TileRows, k: usize, weights: [__m512; 2]) {
    for (sums, row) in sums.iter_mut().zip(rows) {
        let value = _mm512_set1_ps(row[k]);
        sums[0] = _mm512_fmadd_ps(value, weights[0], sums[0]);
        sums[1] = _mm512_fmadd_ps(value, weights[1], sums[1]);
    }
}

/// Products of the first `R` rows with a panel's slice, each summed in the order of k.
#[target_feature(enable = "avx512f")]
pub fn sums<const R: usize>(rows: &TileRows, slice: Slice<'_>, out: &mut Sums) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    match slice {
        Slice::F32(lines) => {
            for (k, line) in lines.iter().enumerate() {
                step(&mut sums, rows, k, halves(line));
            }
        }
        Slice::Bf16 { pairs, odd } => {
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            for (pair, line) in pairs.iter().enumerate() {
                let weights = pair_halves(line);
                let even = weights.map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half)));
                step(&mut sums, rows, 2 * pair, even);
                let odd = weights.map(|half| _mm512_castsi512_ps(_mm512_and_si512(half, high)));
                step(&mut sums, rows, 2 * pair + 1, odd);
            }
            if let Some(line) = odd {
                let even = pair_halves(line).map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half)));
                step(&mut sums, rows, 2 * pairs.len(), even);
            }
        }
        Slice::Rounded(lines) => {
            let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
            for (pair, line) in lines.iter().enumerate() {
                let weights = pair_halves(line);
                let even = weights.map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half)));
                let odd = weights.map(|half| _mm512_castsi512_ps(_mm512_and_si512(half, high)));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let bits = row[pair].to_bits();
                    let second = _mm512_set1_ps(f32::from_bits(bits & 0xffff_0000));
                    let first = _mm512_set1_ps(f32::from_bits(bits << 16));
                    for half in 0..2 {
                        sums[half] = _mm512_fmadd_ps(second, odd[half], sums[half]);
                        sums[half] = _mm512_fmadd_ps(first, even[half], sums[half]);
                    }
                }
            }
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        const { assert!(PANEL == 2 * LANES) };
        let (low, high) = out.split_at_mut(LANES);
        // SAFETY: both halves have sixteen places, which is what is written.
        unsafe {
            _mm512_storeu_ps(low.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(high.as_mut_ptr(), sums[1]);
        }
    }
}

/// Products of the first `R` rows with lines of pairs, rows in bfloat16.
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn rounded_sums<const R: usize>(rows: &TileRows, lines: &[Line<u32>], out: &mut Sums) {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for (pair, line) in lines.iter().enumerate() {
        let [low, high] = pair_halves(line);
        let weights = [pairs(low), pairs(high)];
        for (sums, row) in sums.iter_mut().zip(rows) {
            let values = pairs(_mm512_set1_epi32(row[pair].to_bits() as i32));
            sums[0] = _mm512_dpbf16_ps(sums[0], values, weights[0]);
            sums[1] = _mm512_dpbf16_ps(sums[1], values, weights[1]);
        }
    }
    for (out, sums) in out.iter_mut().zip(sums) {
        let (low, high) = out.split_at_mut(LANES);
        // SAFETY: both halves have sixteen places, which is what is written.
        unsafe {
            _mm512_storeu_ps(low.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(high.as_mut_ptr(), sums[1]);
        }
    }
}

/// The same bits, as pairs of bfloat16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which any are valid.
    unsafe { std::mem::transmute(bits) }
}
