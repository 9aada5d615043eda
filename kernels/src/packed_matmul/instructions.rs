//! Which vector instructions the sums are computed with.

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{
    plain,
    tiles::{MAX_TILE_ROWS, PANEL, Slice, Sums, TileRows, add_sums},
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
    pub(super) fn tile_rows(self) -> usize {
        match self.0 {
            Set::Plain => plain::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => avx2::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => avx512::TILE_ROWS,
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
