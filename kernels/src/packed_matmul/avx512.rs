//! Sums of products by AVX-512: fourteen rows by one panel stay in registers; and by its products of
//! bfloat16, where there are any.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32,
    _mm512_storeu_ps,
};

use super::{
    ahead::Ahead,
    tiles::{Line, PANEL, Places, ROW_STRIDE, Slice, TileRow},
};

/// Two registers of sums for each row, two of weights and one of a row's value: 31 of 32.
pub const TILE_ROWS: usize = 14;

/// The same where weights are widened from bfloat16, which takes two more. With more rows the compiler keeps sums in
/// memory, and half as much time again is gone.
pub const WIDENED_TILE_ROWS: usize = 13;

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

/// Puts sums where they go, or adds them to what is there. A function would be called, with all sums through memory.
macro_rules! finish {
    ($sums:expr, $places:expr, $first:expr) => {
        const { assert!(PANEL == 2 * LANES) };
        for (row, place) in $places.into_iter().enumerate() {
            let (low, high) = place.split_at_mut(LANES);
            put(low.try_into().expect("half a panel"), $sums[row][0], $first);
            put(high.try_into().expect("half a panel"), $sums[row][1], $first);
        }
    };
}

#[inline]
#[target_feature(enable = "avx512f")]
fn put(place: &mut [f32; LANES], sum: __m512, first: bool) {
    // SAFETY: a place of sixteen numbers is read, if at all, and written.
    unsafe {
        let sum = if first { sum } else { _mm512_add_ps(_mm512_loadu_ps(place.as_ptr()), sum) };
        _mm512_storeu_ps(place.as_mut_ptr(), sum);
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn step<const R: usize>(sums: &mut [[__m512; 2]; R], rows: &[TileRow; R], k: usize, weights: [__m512; 2]) {
    for (sums, row) in sums.iter_mut().zip(rows) {
        let value = _mm512_set1_ps(row[k]);
        sums[0] = _mm512_fmadd_ps(value, weights[0], sums[0]);
        sums[1] = _mm512_fmadd_ps(value, weights[1], sums[1]);
    }
}

/// The first of two numbers in each lane, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn firsts(line: [__m512i; 2]) -> [__m512; 2] {
    line.map(|half| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half)))
}

/// The second of two numbers in each lane, widened.
#[inline]
#[target_feature(enable = "avx512f")]
fn seconds(line: [__m512i; 2]) -> [__m512; 2] {
    let high = _mm512_set1_epi32(0xffff_0000u32 as i32);
    line.map(|half| _mm512_castsi512_ps(_mm512_and_si512(half, high)))
}

/// Products of `R` rows with a panel's slice, each summed in the order of k.
#[target_feature(enable = "avx512f")]
pub fn sums<const R: usize>(
    rows: &[TileRow; R],
    slice: Slice<'_>,
    places: Places<'_, R>,
    first: bool,
    ahead: Ahead<'_>,
) {
    match slice {
        Slice::F32(lines) => exact_sums(rows, lines, places, first, ahead),
        Slice::Bf16 { pairs, odd } => widened_sums(rows, pairs, odd, places, first, ahead),
        Slice::Rounded(lines) => rounded_sums(rows, lines, places, first, ahead),
    }
}

// Each has a function to itself: what one needs in registers is then no concern of the others.

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn exact_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<f32>],
    places: Places<'_, R>,
    first: bool,
    ahead: Ahead<'_>,
) {
    assert!(lines.len() <= ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(lines.len());
    for (k, line) in lines.iter().enumerate() {
        ahead.next();
        step(&mut sums, rows, k, halves(line));
    }
    finish!(sums, places, first);
}

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn widened_sums<const R: usize>(
    rows: &[TileRow; R],
    pairs: &[Line<u32>],
    odd: Option<&Line<u32>>,
    places: Places<'_, R>,
    first: bool,
    ahead: Ahead<'_>,
) {
    assert!(2 * pairs.len() < ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(pairs.len());
    for (pair, line) in pairs.iter().enumerate() {
        ahead.next();
        let line = pair_halves(line);
        step(&mut sums, rows, 2 * pair, firsts(line));
        step(&mut sums, rows, 2 * pair + 1, seconds(line));
    }
    if let Some(line) = odd {
        step(&mut sums, rows, 2 * pairs.len(), firsts(pair_halves(line)));
    }
    finish!(sums, places, first);
}

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn rounded_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<u32>],
    places: Places<'_, R>,
    first: bool,
    ahead: Ahead<'_>,
) {
    assert!(2 * lines.len() < ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(lines.len());
    for (pair, line) in lines.iter().enumerate() {
        ahead.next();
        let line = pair_halves(line);
        step(&mut sums, rows, 2 * pair + 1, seconds(line));
        step(&mut sums, rows, 2 * pair, firsts(line));
    }
    finish!(sums, places, first);
}

/// Products of `R` rows of pairs with lines of pairs, by the processor's own instruction for them.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn pair_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<u32>],
    places: Places<'_, R>,
    first: bool,
    ahead: Ahead<'_>,
) {
    assert!(lines.len() <= ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(lines.len());
    for (pair, line) in lines.iter().enumerate() {
        ahead.next();
        let [low, high] = pair_halves(line);
        let weights = [pairs(low), pairs(high)];
        for (sums, row) in sums.iter_mut().zip(rows) {
            let values = pairs(_mm512_set1_epi32(row[pair].to_bits() as i32));
            sums[0] = _mm512_dpbf16_ps(sums[0], values, weights[0]);
            sums[1] = _mm512_dpbf16_ps(sums[1], values, weights[1]);
        }
    }
    finish!(sums, places, first);
}

/// The same bits, as pairs of bfloat16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which any are valid.
    unsafe { std::mem::transmute(bits) }
}
