//! Sums of products by AVX2 and FMA: six rows by half a panel stay in registers.

use std::arch::x86_64::{
    __m256, __m256i, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};

use super::{
    ahead::Ahead,
    place::Store,
    tiles::{Line, PANEL, Places, ROW_STRIDE, Slice, TileRow},
};

/// Two registers of sums for each row, two of weights and one of a row's value: 15 of 16.
pub const TILE_ROWS: usize = 6;

/// The same where weights are widened from bfloat16, which takes two more.
pub const WIDENED_TILE_ROWS: usize = 5;

const LANES: usize = 8;

/// Half of a line.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn quarters(line: &Line<f32>, half: usize) -> [__m256; 2] {
    let (low, high) = line.halves::<{ PANEL / 2 }>()[half].split_at(LANES);
    // SAFETY: both slices have eight numbers, which is what is read.
    unsafe { [_mm256_loadu_ps(low.as_ptr()), _mm256_loadu_ps(high.as_ptr())] }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn pair_quarters(line: &Line<u32>, half: usize) -> [__m256i; 2] {
    let (low, high) = line.halves::<{ PANEL / 2 }>()[half].split_at(LANES);
    // SAFETY: both slices have eight numbers, which is what is read.
    unsafe { [_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())] }
}

/// The first of two numbers in each lane, widened.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn firsts(pairs: [__m256i; 2]) -> [__m256; 2] {
    pairs.map(|quarter| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(quarter)))
}

/// The second of two numbers in each lane, widened.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn seconds(pairs: [__m256i; 2]) -> [__m256; 2] {
    let high = _mm256_set1_epi32(0xffff_0000u32 as i32);
    pairs.map(|quarter| _mm256_castsi256_ps(_mm256_and_si256(quarter, high)))
}

/// Puts the sums of half a panel where they go, or adds them to what is there. A function would be called, with all sums
/// through memory.
macro_rules! finish {
    ($sums:expr, $places:expr, $half:expr, $store:expr) => {
        const { assert!(PANEL == 4 * LANES) };
        for (sums, place) in $sums.into_iter().zip(&mut $places) {
            for (number, sum) in sums.into_iter().enumerate() {
                // SAFETY: a place has four times eight numbers, which are read, if they are to be added to, and written.
                unsafe {
                    let part = place.as_mut_ptr().add((2 * $half + number) * LANES);
                    let sum = if $store == Store::Add { _mm256_add_ps(_mm256_loadu_ps(part), sum) } else { sum };
                    _mm256_storeu_ps(part, sum);
                }
            }
        }
    };
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
    places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    match slice {
        Slice::F32(lines) => exact_sums(rows, lines, places, store, ahead),
        Slice::Bf16 { pairs, odd } => widened_sums(rows, pairs, odd, places, store, ahead),
        Slice::Rounded(lines) => rounded_sums(rows, lines, places, store, ahead),
    }
}

// Each has a function to itself: in one for all of them the compiler kept a sum in memory, which made it half as fast.

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn exact_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<f32>],
    mut places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    assert!(lines.len() <= ROW_STRIDE, "a block of a row");
    let mut ahead = ahead.over(2 * lines.len());
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for (k, line) in lines.iter().enumerate() {
            ahead.next();
            step(&mut sums, rows, k, quarters(line, half));
        }
        finish!(sums, places, half, store);
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn widened_sums<const R: usize>(
    rows: &[TileRow; R],
    pairs: &[Line<u32>],
    odd: Option<&Line<u32>>,
    mut places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    assert!(2 * pairs.len() < ROW_STRIDE, "a block of a row");
    let mut ahead = ahead.over(2 * pairs.len());
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for (pair, line) in pairs.iter().enumerate() {
            ahead.next();
            let line = pair_quarters(line, half);
            step(&mut sums, rows, 2 * pair, firsts(line));
            step(&mut sums, rows, 2 * pair + 1, seconds(line));
        }
        if let Some(line) = odd {
            step(&mut sums, rows, 2 * pairs.len(), firsts(pair_quarters(line, half)));
        }
        finish!(sums, places, half, store);
    }
}

#[inline(never)]
#[target_feature(enable = "avx2,fma")]
fn rounded_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<u32>],
    mut places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    assert!(2 * lines.len() < ROW_STRIDE, "a block of a row");
    let mut ahead = ahead.over(2 * lines.len());
    for half in 0..2 {
        let mut sums = [[_mm256_setzero_ps(); 2]; R];
        for (pair, line) in lines.iter().enumerate() {
            ahead.next();
            let line = pair_quarters(line, half);
            step(&mut sums, rows, 2 * pair + 1, seconds(line));
            step(&mut sums, rows, 2 * pair, firsts(line));
        }
        finish!(sums, places, half, store);
    }
}
