//! Which vector instructions the sums are computed with.

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{
    plain,
    tiles::{MAX_TILE_ROWS, PANEL, Slice, Sums, TileRows, add_sums, join_sums},
};

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instructions(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// With its products of bfloat16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

static AVAILABLE: LazyLock<Vec<Instructions>> = LazyLock::new(|| {
    let mut sets = vec![Instructions(Set::Plain)];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            sets.push(Instructions(Set::Avx2));
        }
        if is_x86_feature_detected!("avx512f") {
            sets.push(Instructions(Set::Avx512));
            if is_x86_feature_detected!("avx512bf16") {
                sets.push(Instructions(Set::Avx512Bf16));
            }
        }
    }
    sets
});

macro_rules! sums_of {
    ($module:ident, [$($count:literal)*], $rows:expr, $slice:expr, $output:expr) => {{
        let mut sums: Sums = [[0.0; PANEL]; MAX_TILE_ROWS];
        match $output.len() {
            $($count => $module::sums::<$count>($rows, $slice, &mut sums),)*
            other => unreachable!("a tile of {other} rows"),
        }
        sums
    }};
}

impl Instructions {
    /// Those of this processor, the plainest first.
    pub fn available() -> &'static [Instructions] {
        &AVAILABLE
    }

    /// The fastest of this processor.
    pub fn best() -> Instructions {
        *AVAILABLE.last().expect("plain code always runs")
    }

    /// The most rows that a tile has.
    pub(crate) fn tile_rows(self) -> usize {
        match self.0 {
            Set::Plain => plain::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => avx2::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Avx512Bf16 => avx512::TILE_ROWS,
        }
    }

    /// Adds the products of `count` rows and a panel's slice to columns `column..` of the output.
    pub(super) fn add_tile(
        self,
        count: usize,
        rows: &TileRows,
        slice: Slice<'_>,
        output: &mut [&mut [f32]],
        column: usize,
        first: bool,
    ) {
        let output = &mut output[..count];
        match self.0 {
            Set::Plain => plain_tile(rows, slice, output, column, first),
            // SAFETY: a value of these exists only where the processor was found to have the instructions.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2_tile(rows, slice, output, column, first) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512_tile(rows, slice, output, column, first) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => unsafe { avx512_bf16_tile(rows, slice, output, column, first) },
        }
    }

    /// Puts the products of `count` rows and a panel's slice into `output`, or adds them to what is there.
    #[inline(always)]
    pub(super) fn sum_tile(self, count: usize, rows: &TileRows, slice: Slice<'_>, output: &mut Sums, first: bool) {
        let output = &mut output[..count];
        match self.0 {
            Set::Plain => join_sums(&sums_of!(plain, [1 2 3 4], rows, slice, output), output, first),
            // SAFETY: a value of these exists only where the processor was found to have the instructions.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { avx2_sum(rows, slice, output, first) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { avx512_sum(rows, slice, output, first) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => unsafe { avx512_bf16_sum(rows, slice, output, first) },
        }
    }
}

fn plain_tile(rows: &TileRows, slice: Slice<'_>, output: &mut [&mut [f32]], column: usize, first: bool) {
    let sums = sums_of!(plain, [1 2 3 4], rows, slice, output);
    add_sums(&sums, output, column, first);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2_tile(rows: &TileRows, slice: Slice<'_>, output: &mut [&mut [f32]], column: usize, first: bool) {
    let sums = sums_of!(avx2, [1 2 3 4 5 6], rows, slice, output);
    add_sums(&sums, output, column, first);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512_tile(rows: &TileRows, slice: Slice<'_>, output: &mut [&mut [f32]], column: usize, first: bool) {
    let sums = sums_of!(avx512, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, slice, output);
    add_sums(&sums, output, column, first);
}

/// The sums of a slice of any kind.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn avx512_bf16_sums(count: usize, rows: &TileRows, slice: Slice<'_>) -> Sums {
    let output = 0..count;
    let Slice::Rounded(lines) = slice else {
        return sums_of!(avx512, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, slice, output);
    };
    let mut sums: Sums = [[0.0; PANEL]; MAX_TILE_ROWS];
    macro_rules! rounded {
        ($($count:literal)*) => {
            match count {
                $($count => avx512::rounded_sums::<$count>(rows, lines, &mut sums),)*
                other => unreachable!("a tile of {other} rows"),
            }
        };
    }
    rounded!(1 2 3 4 5 6 7 8 9 10 11 12 13 14);
    sums
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn avx512_bf16_tile(rows: &TileRows, slice: Slice<'_>, output: &mut [&mut [f32]], column: usize, first: bool) {
    let sums = avx512_bf16_sums(output.len(), rows, slice);
    add_sums(&sums, output, column, first);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn avx512_bf16_sum(rows: &TileRows, slice: Slice<'_>, output: &mut [[f32; PANEL]], first: bool) {
    let sums = avx512_bf16_sums(output.len(), rows, slice);
    join_sums(&sums, output, first);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2_sum(rows: &TileRows, slice: Slice<'_>, output: &mut [[f32; PANEL]], first: bool) {
    let sums = sums_of!(avx2, [1 2 3 4 5 6], rows, slice, output);
    join_sums(&sums, output, first);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512_sum(rows: &TileRows, slice: Slice<'_>, output: &mut [[f32; PANEL]], first: bool) {
    let sums = sums_of!(avx512, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, slice, output);
    join_sums(&sums, output, first);
}
