//! Which vector instructions the sums are computed with.

use std::sync::LazyLock;

#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use super::{
    plain,
    tiles::{NO_SUMS, PANEL, Slice, TileRow, add_part},
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

/// One call for each number of rows that a tile may have.
macro_rules! for_rows {
    ($module:ident::$sums:ident, [$($count:literal)*], $rows:expr, $slice:expr, $places:expr, $first:expr) => {
        match $rows.len() {
            $($count => $module::$sums::<$count>(
                $rows.try_into().expect("so many rows"),
                $slice,
                std::array::from_fn(|_| $places.next().expect("a place for each row")),
                $first,
            ),)*
            other => unreachable!("a tile of {other} rows"),
        }
    };
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

    /// The most rows that are summed at once with a slice of this kind.
    pub(super) fn rows_at_once(self, slice: Slice<'_>) -> usize {
        match (self.0, slice) {
            #[cfg(target_arch = "x86_64")]
            (Set::Avx512 | Set::Avx512Bf16, Slice::Bf16 { .. }) => avx512::WIDENED_TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx512, Slice::Rounded(_)) => avx512::ROUNDED_TILE_ROWS,
            _ => self.tile_rows(),
        }
    }

    /// Puts the products of rows and a panel's slice into columns `column..` of the output's rows, or adds them to what
    /// is there.
    pub(super) fn add_tile(
        self,
        rows: &[TileRow],
        slice: Slice<'_>,
        output: &mut [&mut [f32]],
        column: usize,
        first: bool,
    ) {
        if output[0].len() - column >= PANEL {
            let mut places = output.iter_mut().map(|row| row[column..].first_chunk_mut().expect("a whole panel"));
            self.sum_tile(rows, slice, &mut places, first);
        } else {
            let mut sums = NO_SUMS;
            self.sum_tile(rows, slice, &mut sums.iter_mut(), true);
            sums.iter().zip(output).for_each(|(sums, row)| add_part(sums, &mut row[column..], first));
        }
    }

    /// Puts the products of rows and a panel's slice into a place for each, or adds them to what is there.
    #[inline(always)]
    pub(super) fn sum_tile<'a>(
        self,
        rows: &[TileRow],
        slice: Slice<'_>,
        places: &mut impl Iterator<Item = &'a mut [f32; PANEL]>,
        first: bool,
    ) {
        // Of equal height, as those of a task.
        let pieces = rows.len().div_ceil(self.rows_at_once(slice));
        for rows in rows.chunks(rows.len().div_ceil(pieces)) {
            match (self.0, slice) {
                (Set::Plain, _) => for_rows!(plain::sums, [1 2 3 4], rows, slice, places, first),
                // SAFETY: a value of these exists only where the processor was found to have the instructions.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx2, _) => unsafe { for_rows!(avx2::sums, [1 2 3 4 5 6], rows, slice, places, first) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx512Bf16, Slice::Rounded(lines)) => unsafe {
                    for_rows!(avx512::pair_sums, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, lines, places, first)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx512 | Set::Avx512Bf16, _) => unsafe {
                    for_rows!(avx512::sums, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, slice, places, first)
                },
            }
        }
    }
}
