//! Which vector instructions the sums are computed with.

use std::{fmt, mem::MaybeUninit, sync::LazyLock};

use super::{
    Line, Numbers, RowForm,
    ahead::Ahead,
    amx::{self, SIDE},
    amx_emulation::Emulation,
    operand::Source,
    place::{Place, Store, store_part},
    plain,
    tiles::{NO_SUMS, PANEL, Slice, TileRow},
};
#[cfg(target_arch = "x86_64")]
use super::{
    amx_assembly, avx2, avx512,
    tiles::{K_BLOCK, NO_TILE},
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
    /// AVX-512, and AMX where rows are rounded to bfloat16.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Plain code, and AMX as plain code does it where rows are rounded to bfloat16.
    EmulatedAmx,
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
        if amx_assembly::AMX.is_ok() {
            sets.push(Instructions(Set::Amx));
        }
    }
    sets
});

static BEST: LazyLock<Instructions> = LazyLock::new(|| {
    let best = *AVAILABLE.last().expect("plain code always runs");
    #[cfg(target_arch = "x86_64")]
    if best.0 == Set::Avx512Bf16 && widening_is_faster() {
        return Instructions(Set::Avx512);
    }
    best
});

/// Whether this processor is faster with fused multiply-adds of widened bfloat16 than with its products of bfloat16, of
/// which some can do but a quarter as many in a cycle. It is found by trying, for a tenth of a millisecond: both give the
/// same bits, so that nothing else depends on it.
#[cfg(target_arch = "x86_64")]
fn widening_is_faster() -> bool {
    let (rows, lines) = (NO_TILE, vec![Line([0u32; PANEL]); K_BLOCK]);
    let mut sums = NO_SUMS;
    let mut least = [f64::INFINITY; 2];
    for _ in 0..12 {
        for (set, least) in [Set::Avx512, Set::Avx512Bf16].into_iter().zip(&mut least) {
            // As many rows for both.
            let rows = &rows[..avx512::WIDENED_TILE_ROWS];
            let began = std::time::Instant::now();
            Instructions(set).sum_tile(
                rows,
                Slice::Rounded(&lines),
                &mut sums.iter_mut().map(Place::new),
                Store::Replace,
                Ahead::NOTHING,
            );
            *least = least.min(began.elapsed().as_secs_f64());
        }
    }
    least[0] < least[1]
}

/// One call for each number of rows that a tile may have.
macro_rules! for_rows {
    ($module:ident::$sums:ident, [$($count:literal)*], $rows:expr, $slice:expr, $places:expr, $store:expr, $ahead:expr) => {
        match $rows.len() {
            $($count => $module::$sums::<$count>(
                $rows.try_into().expect("so many rows"),
                $slice,
                std::array::from_fn(|_| $places.next().expect("a place for each row")),
                $store,
                $ahead,
            ),)*
            other => unreachable!("a tile of {other} rows"),
        }
    };
}

/// A whole panel's columns of each row.
///
/// # Safety
/// They are written where anything is added to them.
#[inline(always)]
unsafe fn whole_places<'a>(
    output: &'a mut [&mut [MaybeUninit<f32>]],
    column: usize,
) -> impl Iterator<Item = Place<'a>> {
    output.iter_mut().map(move |row| {
        let numbers = row[column..].first_chunk_mut().expect("a whole panel");
        // SAFETY: the caller promises it.
        unsafe { Place::unwritten(numbers) }
    })
}

impl Instructions {
    /// Those of this processor, the plainest first.
    pub fn available() -> &'static [Instructions] {
        &AVAILABLE
    }

    /// The fastest of this processor.
    pub fn best() -> Instructions {
        *BEST
    }

    /// What AMX gives where rows are rounded to bfloat16, by plain code on any processor. Slow; for tests.
    pub fn emulated_amx() -> Instructions {
        Instructions(Set::EmulatedAmx)
    }

    /// Whether AMX is used for bfloat16 on this machine, or why not.
    pub fn amx() -> Result<(), &'static str> {
        #[cfg(target_arch = "x86_64")]
        let found = *amx_assembly::AMX;
        #[cfg(not(target_arch = "x86_64"))]
        let found = Err("this processor does not have it");
        found
    }

    /// Whether products in bfloat16 are summed in the order of AMX, not in that of all others.
    pub fn sums_by_amx(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Amx => true,
            Set::EmulatedAmx => true,
            _ => false,
        }
    }

    /// How rows lie for products in these numbers.
    pub(crate) fn row_form(self, numbers: Numbers) -> RowForm {
        match (numbers, self.0) {
            (Numbers::F32, _) => RowForm::Exact,
            #[cfg(target_arch = "x86_64")]
            (Numbers::Bf16, Set::Avx512Bf16 | Set::Amx) => RowForm::Pairs,
            (Numbers::Bf16, Set::EmulatedAmx) => RowForm::Pairs,
            (Numbers::Bf16, _) => RowForm::Rounded,
        }
    }

    /// The height of tiles that so many rows are divided into.
    pub(crate) fn tile_height(self, rows: usize, numbers: Numbers) -> usize {
        let slice = match numbers {
            Numbers::F32 => Slice::F32(&[]),
            Numbers::Bf16 => Slice::Rounded(&[]),
        };
        self.even_height(rows, self.rows_at_once(slice))
    }

    /// Tiles of nearly equal height: 16 rows are 8 and 8, not 14 and 2. Those of AMX are full instead, as half a tile of
    /// registers takes as long as a whole one.
    pub(super) fn even_height(self, rows: usize, most: usize) -> usize {
        if most == amx::TILE_ROWS {
            return if rows > SIDE { most } else { rows.max(1) };
        }
        rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
    }

    /// The most rows that are summed at once with a slice of this kind.
    pub(super) fn rows_at_once(self, slice: Slice<'_>) -> usize {
        match (self.0, slice) {
            (Set::EmulatedAmx, Slice::Rounded(_)) => amx::TILE_ROWS,
            (Set::Plain | Set::EmulatedAmx, _) => plain::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Amx, Slice::Rounded(_)) => amx::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx2, Slice::F32(_)) => avx2::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx2, _) => avx2::WIDENED_TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx512Bf16, Slice::Rounded(_)) => avx512::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx512, Slice::Rounded(_)) | (_, Slice::Bf16 { .. }) => avx512::WIDENED_TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            (Set::Avx512 | Set::Avx512Bf16 | Set::Amx, Slice::F32(_)) => avx512::TILE_ROWS,
        }
    }

    /// Begins a piece of work on this thread. What the processor must be told for it is taken back when this is dropped.
    pub(crate) fn begin(self) -> Work {
        Work(self)
    }

    /// Puts the products of rows and a panel's slice into columns `column..` of the output's rows, or adds them to what
    /// is there. Meanwhile what lies ahead is brought into the cache.
    ///
    /// # Safety
    /// These columns are written where products are added to them.
    pub(super) unsafe fn add_tile(
        self,
        rows: &[TileRow],
        slice: Slice<'_>,
        output: &mut [&mut [MaybeUninit<f32>]],
        column: usize,
        store: Store,
        ahead: Ahead<'_>,
    ) {
        if output[0].len() - column >= PANEL {
            // SAFETY: the caller promises it.
            let mut places = unsafe { whole_places(output, column) };
            self.sum_tile(rows, slice, &mut places, store, ahead);
        } else {
            let mut sums = NO_SUMS;
            self.sum_tile(rows, slice, &mut sums.iter_mut().map(Place::new), Store::Replace, ahead);
            // SAFETY: the caller promises it.
            sums.iter().zip(output).for_each(|(sums, row)| unsafe { store_part(sums, &mut row[column..], store) });
        }
    }

    /// [`add_tile`](Self::add_tile) with weights that are not packed yet, and are afterwards.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn add_tile_packing(
        self,
        rows: &[TileRow],
        (source, lines): (Source<'_>, &mut [Line<f32>]),
        output: &mut [&mut [MaybeUninit<f32>]],
        column: usize,
        store: Store,
        ahead: Ahead<'_>,
    ) {
        #[cfg(target_arch = "x86_64")]
        if let (Set::Avx512 | Set::Avx512Bf16 | Set::Amx, Source::Rows(weights)) = (self.0, source)
            && let Some(weights) = weights.whole()
        {
            // SAFETY: the caller promises the first; these sets exist only where the processor has the instructions.
            unsafe {
                let places = &mut whole_places(output, column);
                let panel = (weights, lines);
                for_rows!(avx512::packing_sums, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, panel, places, store, ahead);
            }
            return;
        }
        source.pack(lines);
        // SAFETY: the caller promises it.
        unsafe { self.add_tile(rows, Slice::F32(lines), output, column, store, ahead) };
    }

    /// Puts the products of rows and a panel's slice into a place for each, or adds them to what is there.
    #[inline(always)]
    pub(super) fn sum_tile<'a>(
        self,
        rows: &[TileRow],
        slice: Slice<'_>,
        places: &mut impl Iterator<Item = Place<'a>>,
        store: Store,
        ahead: Ahead<'_>,
    ) {
        match (self.0, slice) {
            (Set::EmulatedAmx, Slice::Rounded(lines)) => {
                return amx::sums(&mut Emulation::default(), rows, lines, places, store);
            }
            // SAFETY: a value of this exists only where processor and system were found to allow it.
            #[cfg(target_arch = "x86_64")]
            (Set::Amx, Slice::Rounded(lines)) => unsafe {
                // Its loop is assembly, with no step to ask in.
                ahead.at_once();
                return amx_assembly::with_tiles(|tiles| amx::sums(tiles, rows, lines, places, store));
            },
            _ => {}
        }
        // Of equal height, as those of a task.
        let pieces = rows.len().div_ceil(self.rows_at_once(slice));
        for rows in rows.chunks(rows.len().div_ceil(pieces)) {
            match (self.0, slice) {
                (Set::Plain | Set::EmulatedAmx, _) => {
                    for_rows!(plain::sums, [1 2 3 4], rows, slice, places, store, ahead)
                }
                // SAFETY: a value of these exists only where the processor was found to have the instructions.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx2, _) => unsafe { for_rows!(avx2::sums, [1 2 3 4 5 6], rows, slice, places, store, ahead) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx512Bf16, Slice::Rounded(lines)) => unsafe {
                    for_rows!(avx512::pair_sums, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, lines, places, store, ahead)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                (Set::Avx512 | Set::Avx512Bf16 | Set::Amx, _) => unsafe {
                    for_rows!(avx512::sums, [1 2 3 4 5 6 7 8 9 10 11 12 13 14], rows, slice, places, store, ahead)
                },
            }
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match self.0 {
            Set::Plain => "plain code",
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => "AVX-512 with products of bfloat16",
            #[cfg(target_arch = "x86_64")]
            Set::Amx => "AVX-512 and AMX",
            Set::EmulatedAmx => "plain code that does as AMX",
        })
    }
}

/// A piece of a thread's work.
#[must_use]
pub(crate) struct Work(Instructions);

impl Drop for Work {
    fn drop(&mut self) {
        #[cfg(target_arch = "x86_64")]
        if self.0.0 == Set::Amx {
            amx_assembly::release();
        }
    }
}
