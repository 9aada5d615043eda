//! Test only: runs the assembly on processors without AMX. Each of its instructions is one that the processor does not
//! know; the signal that this raises decodes it, does to emulated tile registers and memory what it says, and goes on
//! behind it.

use std::{
    mem, ptr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicPtr, Ordering},
    },
};

use super::{amx::SIDE, amx_emulation::Registers};

/// Tile registers of the one thread that may use them.
static REGISTERS: AtomicPtr<Registers> = AtomicPtr::new(ptr::null_mut());
static USED: Mutex<()> = Mutex::new(());

/// Does what `body` asks of tile registers that this processor need not have. Nothing else in the process may use them
/// meanwhile.
pub fn with_trap<R>(body: impl FnOnce() -> R) -> R {
    let _alone = USED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut registers = Registers::EMPTY;
    REGISTERS.store(&mut registers, Ordering::SeqCst);
    let (mut before, mut ours): (libc::sigaction, libc::sigaction);
    // SAFETY: all bytes of the structures are zero, which is valid; the handler is a function of the kind that the flag
    // promises, and the one before is put back.
    unsafe {
        (before, ours) = (mem::zeroed(), mem::zeroed());
        ours.sa_sigaction = on_illegal_instruction as *const () as usize;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(libc::sigaction(libc::SIGILL, &ours, &mut before), 0, "the handler is set");
    }
    let result = body();
    // SAFETY: as above.
    unsafe { assert_eq!(libc::sigaction(libc::SIGILL, &before, ptr::null_mut()), 0, "the handler is put back") };
    REGISTERS.store(ptr::null_mut(), Ordering::SeqCst);
    result
}

/// Where the system saves general registers, by the numbers that instructions have for them.
const PLACES: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_illegal_instruction(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system gives such a handler the interrupted thread's registers, of which the instruction pointer leads
    // to at least the 15 bytes that an instruction may have (code goes on behind it); tile registers are there while the
    // handler is set, and one thread uses them.
    unsafe {
        let saved = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let code = saved[libc::REG_RIP as usize] as *const u8;
        let bytes: [u8; 15] = ptr::read_unaligned(code.cast());
        let general = |number: usize| saved[PLACES[number] as usize] as usize;
        let length = perform(&mut *REGISTERS.load(Ordering::SeqCst), &bytes, general).unwrap_or_else(|| {
            libc::abort();
        });
        saved[libc::REG_RIP as usize] += length as i64;
    }
}

/// What an instruction of AMX does; its length. `None` for any other.
///
/// # Safety
/// Memory may be read and written where the instruction says.
unsafe fn perform(registers: &mut Registers, bytes: &[u8; 15], general: impl Fn(usize) -> usize) -> Option<usize> {
    let &[0xc4, first, second, operation, mode, ref rest @ ..] = bytes else { return None };
    // The map 0F38, 128 bits, no W.
    if first & 0x1f != 2 || second & 0x84 != 0 {
        return None;
    }
    let (prefix, other) = (second & 3, usize::from(!second >> 3 & 15));
    let (kind, tile, base) = (mode >> 6, usize::from(mode >> 3 & 7), usize::from(mode & 7));
    if kind == 3 {
        match (operation, prefix) {
            (0x49, 0) => registers.configure([0; 8]),
            (0x49, 3) => registers.zero(tile),
            (0x5c, 2) => registers.multiply(tile, base, other),
            _ => return None,
        }
        return Some(5);
    }
    // Base, index and displacement.
    let extended = |bit: u8| if first & bit == 0 { 8 } else { 0 };
    let (base, stride, after) = match base {
        4 => {
            let (scale, index, base) = (rest[0] >> 6, usize::from(rest[0] >> 3 & 7), usize::from(rest[0] & 7));
            let index = index + extended(0x40);
            (base, if index == 4 { 0 } else { general(index) << scale }, 1)
        }
        _ => (base, 0, 0),
    };
    if kind == 0 && base == 5 {
        return None;
    }
    let (displacement, size) = match kind {
        0 => (0, 0),
        1 => (isize::from(rest[after] as i8), 1),
        _ => (i32::from_le_bytes(rest[after..][..4].try_into().ok()?) as isize, 4),
    };
    let address = general(base + extended(0x20)).wrapping_add_signed(displacement);
    let row = |number: usize| (address + number * stride) as *mut [u32; SIDE];
    match (operation, prefix) {
        (0x49, 0) => {
            // SAFETY: the caller allows it.
            let bytes: [u8; 64] = unsafe { ptr::read_unaligned(address as *const _) };
            assert_eq!(bytes[..2], [1, 0], "palette 1, from the first row");
            let rows: [usize; 8] = std::array::from_fn(|tile| usize::from(bytes[48 + tile]));
            for (tile, &rows) in rows.iter().enumerate() {
                let width = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]);
                assert_eq!(width, if rows > 0 { 64 } else { 0 }, "bytes of a row of tile {tile}");
                assert!(rows <= SIDE, "rows of tile {tile}");
            }
            assert!(bytes[2..16].iter().chain(&bytes[32..48]).chain(&bytes[56..]).all(|&byte| byte == 0), "reserved");
            registers.configure(rows);
        }
        // SAFETY: the caller allows it.
        (0x4b, 3) => registers.load(tile, |number| unsafe { ptr::read_unaligned(row(number)) }),
        // SAFETY: the caller allows it.
        (0x4b, 2) => registers.store(tile, |number, values| unsafe { ptr::write_unaligned(row(number), values) }),
        _ => return None,
    }
    Some(5 + after + size)
}
