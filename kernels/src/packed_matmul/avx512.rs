//! Sums of products by AVX-512: fourteen rows by one panel stay in registers; and by its products of
//! bfloat16, where there are any.

use std::arch::x86_64::{
    __m512, __m512bh, __m512d, __m512i, _mm_loadu_ps, _mm512_add_ps, _mm512_and_si512, _mm512_castpd_ps,
    _mm512_castps_pd, _mm512_castps128_ps512, _mm512_castsi512_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_mask_broadcast_f32x4, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_stream_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd,
    _mm512_unpacklo_ps,
};

use super::{
    ahead::Ahead,
    place::Store,
    squares::{SQUARE, Sides},
    tiles::{Line, PANEL, Places, ROW_STRIDE, Slice, TileRow},
};

/// Two registers of sums for each row, two of weights and one of a row's value: 31 of 32.
pub const TILE_ROWS: usize = 14;

/// The same where weights are widened from bfloat16, which takes two more. With more rows the compiler keeps sums in
/// memory, and half as much time again is gone.
pub const WIDENED_TILE_ROWS: usize = 13;

const LANES: usize = 16;

/// Numbers of two registers beside each other: of the first two in each quarter, and of the last two.
#[inline]
#[target_feature(enable = "avx512f")]
fn beside(a: __m512, b: __m512) -> [__m512d; 2] {
    [_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(a, b))]
}

/// Rows that begin `stride` apart become columns: `sides[c][r]` is `values[r * stride + c]`.
///
/// Four numbers of four rows go into the quarters of a register by loads alone; turning four times four numbers in each
/// quarter is left for the one port that shuffles.
#[target_feature(enable = "avx512f")]
pub fn turn(values: &[f32], stride: usize, sides: Sides<'_>) {
    const { assert!(SQUARE == LANES) };
    assert!(values.len() >= (SQUARE - 1) * stride + SQUARE, "sixteen rows of sixteen numbers");
    let four = |row: usize, column: usize| {
        // SAFETY: rows and columns are below sixteen, and so these numbers are where the assertion says that there are some.
        unsafe { _mm_loadu_ps(values.as_ptr().add(row * stride + column)) }
    };
    let mut quarters = [[_mm512_setzero_ps(); 4]; 4];
    for row in 0..4 {
        for (column, quarters) in quarters.iter_mut().enumerate() {
            let four = |quarter: usize| four(4 * quarter + row, 4 * column);
            let two = _mm512_mask_broadcast_f32x4(_mm512_castps128_ps512(four(0)), 0xf0, four(1));
            let three = _mm512_mask_broadcast_f32x4(two, 0xf00, four(2));
            quarters[row] = _mm512_mask_broadcast_f32x4(three, 0xf000, four(3));
        }
    }
    let mut sides = sides.into_iter();
    for [a, b, c, d] in quarters {
        let [low, high] = beside(a, b);
        let [low_after, high_after] = beside(c, d);
        for side_values in [
            _mm512_unpacklo_pd(low, low_after),
            _mm512_unpackhi_pd(low, low_after),
            _mm512_unpacklo_pd(high, high_after),
            _mm512_unpackhi_pd(high, high_after),
        ] {
            let side = sides.next().expect("sixteen sides");
            // SAFETY: a side has sixteen numbers.
            unsafe { _mm512_storeu_ps(side.as_mut_ptr(), _mm512_castpd_ps(side_values)) };
        }
    }
}

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
    ($sums:expr, $places:expr, $store:expr) => {
        const { assert!(PANEL == 2 * LANES) };
        for (row, mut place) in $places.into_iter().enumerate() {
            let place = place.as_mut_ptr();
            for half in 0..2 {
                // SAFETY: a place has twice sixteen numbers, which may be written, and read if they are to be added to.
                unsafe { put(place.add(half * LANES), $sums[row][half], $store) };
            }
        }
    };
}

/// # Safety
/// There are sixteen numbers that may be written, and read if they are to be added to.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn put(place: *mut f32, sum: __m512, store: Store) {
    // SAFETY: as the caller promises; what is streamed to must be aligned.
    unsafe {
        match store {
            Store::Stream if place.addr().is_multiple_of(size_of::<__m512>()) => _mm512_stream_ps(place, sum),
            Store::Replace | Store::Stream => _mm512_storeu_ps(place, sum),
            Store::Add => _mm512_storeu_ps(place, _mm512_add_ps(_mm512_loadu_ps(place), sum)),
        }
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
    store: Store,
    ahead: Ahead<'_>,
) {
    match slice {
        Slice::F32(lines) => exact_sums(rows, lines, places, store, ahead),
        Slice::Bf16 { pairs, odd } => widened_sums(rows, pairs, odd, places, store, ahead),
        Slice::Rounded(lines) => rounded_sums(rows, lines, places, store, ahead),
    }
}

// Each has a function to itself: what one needs in registers is then no concern of the others.

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn exact_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<f32>],
    places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    assert!(lines.len() <= ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(lines.len());
    for (k, line) in lines.iter().enumerate() {
        ahead.next();
        step(&mut sums, rows, k, halves(line));
    }
    finish!(sums, places, store);
}

/// The same with whole panels that are not packed yet, which this does on the way: its stores wait for nothing.
#[target_feature(enable = "avx512f")]
pub fn packing_sums<'b, const R: usize>(
    rows: &[TileRow; R],
    (source, lines): (impl Iterator<Item = &'b [f32; PANEL]>, &mut [Line<f32>]),
    places: Places<'_, R>,
    store: Store,
    ahead: Ahead<'_>,
) {
    assert!(lines.len() <= ROW_STRIDE, "a block of a row");
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    let mut ahead = ahead.over(lines.len());
    for (k, (line, weights)) in lines.iter_mut().zip(source).enumerate() {
        ahead.next();
        line.0 = *weights;
        step(&mut sums, rows, k, halves(line));
    }
    finish!(sums, places, store);
}

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn widened_sums<const R: usize>(
    rows: &[TileRow; R],
    pairs: &[Line<u32>],
    odd: Option<&Line<u32>>,
    places: Places<'_, R>,
    store: Store,
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
    finish!(sums, places, store);
}

#[inline(never)]
#[target_feature(enable = "avx512f")]
fn rounded_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<u32>],
    places: Places<'_, R>,
    store: Store,
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
    finish!(sums, places, store);
}

/// Products of `R` rows of pairs with lines of pairs, by the processor's own instruction for them.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn pair_sums<const R: usize>(
    rows: &[TileRow; R],
    lines: &[Line<u32>],
    places: Places<'_, R>,
    store: Store,
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
    finish!(sums, places, store);
}

/// The same bits, as pairs of bfloat16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which any are valid.
    unsafe { std::mem::transmute(bits) }
}
