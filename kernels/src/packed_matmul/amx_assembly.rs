//! Tile registers of the processor, by assembly: stable Rust has no functions for them.
//!
//! One block of assembly loads, multiplies and stores, so that the compiler never has to know what is in a tile. What
//! lasts from one call to the next is the configuration, which a thread has until it gives the tiles back.

use std::{arch::asm, cell::RefCell, sync::LazyLock};

use super::{
    amx::{SIDE, TILE_ROWS, Tiles},
    amx_emulation::Emulation,
    row_tiles::STEP,
    tiles::{Line, NO_SUMS, PANEL, ROW_STRIDE, Sums, TileRow},
};

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    first_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const LINE_BYTES: usize = size_of::<Line<u32>>();
const ROW_BYTES: usize = size_of::<TileRow>();

// Sums lie as lines do, and a half of either is a tile's row.
const _: () = assert!(LINE_BYTES == size_of::<[f32; PANEL]>() && LINE_BYTES == 2 * 4 * SIDE);

/// A thread's tile registers.
#[derive(Debug)]
pub struct Assembly {
    /// Rows that the tiles are configured for; 0 where they are not.
    configured: usize,
    sums: Sums,
}

thread_local! {
    static THREAD: RefCell<Assembly> = const { RefCell::new(Assembly { configured: 0, sums: NO_SUMS }) };
}

/// Lends the thread's tile registers.
///
/// # Safety
/// Processor and system let this process use them ([`AMX`] says so).
pub unsafe fn with_tiles<R>(body: impl FnOnce(&mut Assembly) -> R) -> R {
    THREAD.with_borrow_mut(body)
}

/// Gives the thread's tile registers back, so that the system need not save eight KiB when it takes the processor away.
pub fn release() {
    THREAD.with_borrow_mut(|tiles| {
        if std::mem::take(&mut tiles.configured) > 0 {
            // SAFETY: they were configured, so they are there; nothing is expected in them any more.
            unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) }
        }
    });
}

impl Assembly {
    fn configure(&mut self, rows: usize) {
        if self.configured == rows {
            return;
        }
        let [upper, lower] = [rows.min(SIDE), rows.saturating_sub(SIDE)].map(|rows| rows as u8);
        let mut configuration =
            Configuration { palette: 1, first_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        for (tile, rows) in [upper, upper, lower, lower, upper, lower, SIDE as u8, SIDE as u8].into_iter().enumerate() {
            configuration.rows[tile] = rows;
            configuration.row_bytes[tile] = if rows > 0 { 4 * SIDE as u16 } else { 0 };
        }
        // SAFETY: whoever lends tile registers knows that they are there; 64 bytes are read, a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration, options(readonly, nostack, preserves_flags)) }
        self.configured = rows;
    }
}

impl Tiles for Assembly {
    fn multiply(&mut self, rows: &[TileRow], first: usize, lines: &[Line<u32>], go_on: bool) -> &Sums {
        assert!((1..=TILE_ROWS).contains(&rows.len()), "rows for two tiles");
        let (steps, rest) = lines.as_chunks::<STEP>();
        assert!(!steps.is_empty() && rest.is_empty(), "whole steps");
        assert!(first + lines.len() <= ROW_STRIDE, "a block of a row");
        self.configure(rows.len());
        let (row, line, sums) = (rows[0][first..].as_ptr(), lines.as_ptr(), self.sums.as_mut_ptr());
        let steps = steps.len();
        // Sums of upper rows are in tiles 0 and 1, of lower ones in 2 and 3; rows in 4 and 5, weights in 6 and 7.
        if rows.len() > SIDE {
            // SAFETY: tiles are configured for these rows, of which `steps` times 16 numbers are read; so are `steps`
            // times 16 lines; sums have a place for 32 rows. No tile is expected to keep anything.
            unsafe {
                asm!(
                    "test {go_on:e}, {go_on:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{sums} + {line_bytes}]",
                    "tileloadd tmm1, [{sums} + {line_bytes} + {half}]",
                    "tileloadd tmm2, [{sums} + {line_bytes} + {lower_sums}]",
                    "tileloadd tmm3, [{sums} + {line_bytes} + {lower_sums} + {half}]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm6, [{line} + {line_bytes}]",
                    "tileloadd tmm4, [{row} + {row_bytes}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{line} + {line_bytes} + {half}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{row} + {row_bytes} + {lower_rows}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {row}, {row_step}",
                    "add {line}, {line_step}",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{sums} + {line_bytes}], tmm0",
                    "tilestored [{sums} + {line_bytes} + {half}], tmm1",
                    "tilestored [{sums} + {line_bytes} + {lower_sums}], tmm2",
                    "tilestored [{sums} + {line_bytes} + {lower_sums} + {half}], tmm3",
                    go_on = in(reg) u32::from(go_on),
                    row = inout(reg) row => _,
                    line = inout(reg) line => _,
                    steps = inout(reg) steps => _,
                    sums = in(reg) sums,
                    line_bytes = in(reg) LINE_BYTES,
                    row_bytes = in(reg) ROW_BYTES,
                    half = const LINE_BYTES / 2,
                    lower_sums = const SIDE * LINE_BYTES,
                    lower_rows = const SIDE * ROW_BYTES,
                    row_step = const STEP * 4,
                    line_step = const STEP * LINE_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        } else {
            // SAFETY: as above, for one tile of rows.
            unsafe {
                asm!(
                    "test {go_on:e}, {go_on:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{sums} + {line_bytes}]",
                    "tileloadd tmm1, [{sums} + {line_bytes} + {half}]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "3:",
                    "tileloadd tmm6, [{line} + {line_bytes}]",
                    "tileloadd tmm4, [{row} + {row_bytes}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{line} + {line_bytes} + {half}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {row}, {row_step}",
                    "add {line}, {line_step}",
                    "dec {steps}",
                    "jnz 3b",
                    "tilestored [{sums} + {line_bytes}], tmm0",
                    "tilestored [{sums} + {line_bytes} + {half}], tmm1",
                    go_on = in(reg) u32::from(go_on),
                    row = inout(reg) row => _,
                    line = inout(reg) line => _,
                    steps = inout(reg) steps => _,
                    sums = in(reg) sums,
                    line_bytes = in(reg) LINE_BYTES,
                    row_bytes = in(reg) ROW_BYTES,
                    half = const LINE_BYTES / 2,
                    row_step = const STEP * 4,
                    line_step = const STEP * LINE_BYTES,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
        &self.sums
    }
}

/// Whether products are computed by AMX in this process, or why not.
pub static AMX: LazyLock<Result<(), &'static str>> = LazyLock::new(|| {
    offered()?;
    // SAFETY: processor and system were just found to allow it.
    let agree = unsafe { with_tiles(agree) };
    release();
    if agree { Ok(()) } else { Err("the processor's products of tiles are not those that are documented") }
});

/// Asks the processor for the instructions, and the system for leave to use them.
fn offered() -> Result<(), &'static str> {
    #[cfg(not(target_os = "linux"))]
    {
        Err("it is used on Linux alone")
    }
    #[cfg(target_os = "linux")]
    {
        use std::arch::x86_64::{__cpuid, __cpuid_count};

        const TILE_DATA: u64 = 18;
        const TILE_STATES: u32 = 0b11 << 17;
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        const GET_PERMITTED: i64 = 0x1022;
        const ASK_PERMISSION: i64 = 0x1023;
        const ABSENT: &str = "this processor does not have it, or its hypervisor hides it";

        #[allow(unused_unsafe, reason = "safe functions in newer compilers")]
        // SAFETY: every x86-64 processor has the instruction; leaf 7 is read where there is one.
        let (first, seventh) = unsafe {
            let seventh = if __cpuid(0).eax < 7 { None } else { Some(__cpuid_count(7, 0).edx) };
            (__cpuid(1).ecx, seventh.unwrap_or(0))
        };
        let saves_states = first & 1 << 27 != 0;
        if !saves_states || seventh & BF16_AND_TILES != BF16_AND_TILES || !is_x86_feature_detected!("avx512f") {
            return Err(ABSENT);
        }
        let enabled: u32;
        // SAFETY: the system has enabled the instruction, which reads a register.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") enabled, out("edx") _, options(nomem, nostack, preserves_flags));
        }
        if enabled & TILE_STATES != TILE_STATES {
            return Err("the system does not save its registers");
        }
        let mut permitted = 0u64;
        // SAFETY: the first call takes a number, the second writes one where it is told.
        let failed = unsafe {
            libc::syscall(libc::SYS_arch_prctl, ASK_PERMISSION, TILE_DATA) != 0
                || libc::syscall(libc::SYS_arch_prctl, GET_PERMITTED, &raw mut permitted) != 0
        };
        if failed || permitted & 1 << TILE_DATA == 0 { Err("the system does not permit its registers") } else { Ok(()) }
    }
}

/// Whether tiles give the bits of the emulation, for one tile of rows and two, with a sum to go on from, and with numbers
/// whose order and smallness matter.
fn agree(tiles: &mut Assembly) -> bool {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    // Bfloat16 of both signs and sizes between 2^-8 and 2^7; in every eighth step of lines far smaller ones.
    let mut number = |least: u32| u32::from(next() as u16 & 0x807f) | (least + next() % 16) << 7;
    let mut rows = [TileRow::ZEROS; TILE_ROWS];
    let lines: Vec<Line<u32>> = (0..8 * STEP)
        .map(|line| {
            let least = if line / STEP == 7 { 0 } else { 119 };
            Line(std::array::from_fn(|_| number(least) | number(least) << 16))
        })
        .collect();
    for row in &mut rows {
        row[..8 * STEP].fill_with(|| f32::from_bits(number(119) | number(119) << 16));
    }
    let mut emulation = Emulation::default();
    [1, SIDE, SIDE + 1, TILE_ROWS].into_iter().all(|count| {
        [(0, 3 * STEP, false), (3 * STEP, 4 * STEP, true), (7 * STEP, STEP, false)].into_iter().all(
            |(first, length, go_on)| {
                let lines = &lines[first..][..length];
                let found = *tiles.multiply(&rows[..count], first, lines, go_on);
                let wanted = emulation.multiply(&rows[..count], first, lines, go_on);
                let bits =
                    |sums: &Sums| sums[..count].as_flattened().iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                bits(&found) == bits(wanted)
            },
        )
    })
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::{
        super::{
            amx,
            amx_trap::with_trap,
            place::{Place, Store},
        },
        *,
    };

    /// On the processor's tiles where it has them, on emulated ones elsewhere.
    fn on_tiles<R>(body: impl FnOnce(&mut Assembly) -> R) -> R {
        let body = || {
            // SAFETY: the processor and the system allow it, or what they do not know is done by the trap.
            let result = unsafe { with_tiles(body) };
            release();
            result
        };
        match *AMX {
            Ok(()) => body(),
            Err(why) => {
                eprintln!("the processor's AMX is not tested ({why}): the assembly ran on emulated tile registers");
                with_trap(body)
            }
        }
    }

    #[test]
    fn assembly_gives_the_bits_of_the_emulation() {
        assert!(on_tiles(agree));
    }

    #[test]
    fn assembly_meets_the_edges_of_rows_and_lines_as_the_emulation_does() {
        let mut state = 3u32;
        let mut number = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state & 0xbfff_bfff
        };
        let mut rows = [TileRow::ZEROS; TILE_ROWS];
        rows.iter_mut().for_each(|row| row.fill_with(|| f32::from_bits(number())));
        let lines: Vec<Line<u32>> = (0..16 * STEP).map(|_| Line(std::array::from_fn(|_| number()))).collect();
        on_tiles(|tiles| {
            // Heights up and down, so that tiles are configured anew.
            for count in [32, 1, 15, 31, 17, 16, 2] {
                for length in [1, 15, 16, 17, 33, 16 * STEP] {
                    for row in &mut rows {
                        row[length..length.next_multiple_of(STEP)].fill(0.0);
                    }
                    let mut found = [[[1.0f32; PANEL]; TILE_ROWS]; 2];
                    for store in [Store::Replace, Store::Add] {
                        let (rows, lines) = (&rows[..count], &lines[..length]);
                        let [ours, wanted] = &mut found;
                        amx::sums(tiles, rows, lines, &mut ours.iter_mut().map(Place::new), store);
                        let mut places = wanted.iter_mut().map(Place::new);
                        amx::sums(&mut Emulation::default(), rows, lines, &mut places, store);
                    }
                    let [found, wanted] = found.map(|sums| sums.map(|row| row.map(f32::to_bits)));
                    assert!(found == wanted, "{count} rows, {length} lines");
                    assert!(
                        wanted[count..].as_flattened().iter().all(|&bits| bits == 1.0f32.to_bits()),
                        "other places"
                    );
                }
            }
        });
    }

    #[test]
    fn tiles_are_given_back_and_configured_again() {
        let (rows, lines) = ([TileRow::ZEROS; 3], [Line::ZEROS; STEP]);
        on_tiles(|tiles| {
            tiles.multiply(&rows, 0, &lines, false);
            assert_eq!(tiles.configured, 3);
        });
        THREAD.with_borrow(|tiles| assert_eq!(tiles.configured, 0));
        on_tiles(|tiles| assert_eq!(tiles.multiply(&rows, 0, &lines, false)[0], [0.0; PANEL]));
    }
}
