//! An allocator for programs whose tensors come and go with every step: large blocks lie on large pages, and what is freed is
//! kept for the next block of its size. Small blocks are the system allocator's. Not a general allocator: it makes nothing
//! better for blocks below [`LARGE`].
//!
//! A tensor of 25 MB is 6,000 pages of 4 KiB. The system maps each at its first touch, clears it, and takes it away when the
//! tensor is dropped; a product that runs through it misses the table of pages again and again. Here the same memory is
//! thirteen pages, and the next step's tensor finds them mapped.
//!
//! What is kept never makes a process larger than it was: blocks in use and blocks kept are together at most what was in use
//! at once before. A program chooses it with
//!
//! ```
//! use limbeck_kernels::large_blocks::LargeBlocks;
//!
//! #[global_allocator]
//! static ALLOCATOR: LargeBlocks = LargeBlocks;
//! # fn main() { assert_eq!(vec![1u8; 3 << 20].iter().map(|&byte| byte as usize).sum::<usize>(), 3 << 20) }
//! ```

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ptr::null_mut,
    sync::{Mutex, PoisonError},
};

/// Blocks of at least this many bytes are kept: the size of a large page on x86-64, and the alignment of a large block.
pub const LARGE: usize = 2 << 20;

/// Sizes are rounded up to eighths between powers of two, so that a block a little longer than the last one fits.
const SIZES: usize = 8 * usize::BITS as usize;

/// Large blocks kept, small ones from the system allocator. All values of this type are one allocator.
pub struct LargeBlocks;

/// The blocks of this process.
static BLOCKS: Blocks = Blocks::new();

/// Gives the system back what is kept. Nothing where a program has another allocator.
pub fn release() {
    BLOCKS.release();
}

struct Blocks {
    state: Mutex<State>,
}

struct State {
    /// The first free block of each size; each holds the address of the next one.
    free: [usize; SIZES],
    /// How many there are of each.
    counts: [usize; SIZES],
    /// Bytes of blocks in use, of blocks kept, and the most that was ever in use.
    in_use: usize,
    kept: usize,
    most: usize,
}

/// What a block of `size` bytes takes, and the number of this size. At least `size`, at most an eighth more.
fn rounded(size: usize) -> (usize, usize) {
    let power = size.next_power_of_two();
    let eighth = power / 16;
    let count = size.div_ceil(eighth);
    (count * eighth, power.trailing_zeros() as usize * 8 + count - 9)
}

/// What a block of this number takes.
fn taken(number: usize) -> usize {
    let (power, eighths) = (number / 8, number % 8 + 9);
    // The first numbers are of no size that a block has.
    if power < LARGE.trailing_zeros() as usize { 0 } else { (1usize << power) / 16 * eighths }
}

fn is_large(layout: Layout) -> bool {
    cfg!(target_os = "linux")
        && layout.size() >= LARGE
        && layout.size() <= isize::MAX as usize / 2
        && layout.align() <= LARGE
}

impl Blocks {
    const fn new() -> Self {
        Blocks { state: Mutex::new(State { free: [0; SIZES], counts: [0; SIZES], in_use: 0, kept: 0, most: 0 }) }
    }

    fn release(&self) {
        self.with(|state| state.release(0));
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        // Nothing in `State` panics.
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn take(&self, size: usize, zeroed: bool) -> *mut u8 {
        let (bytes, number) = rounded(size);
        let kept = self.with(|state| state.take(bytes, number));
        if !kept.is_null() {
            if zeroed {
                // SAFETY: the block is of `bytes`, at least `size`, and nobody else has it.
                unsafe { kept.write_bytes(0, size) };
            }
            return kept;
        }
        let mut block = pages::map(bytes);
        if block.is_null() {
            self.release();
            block = pages::map(bytes);
        }
        if block.is_null() {
            self.with(|state| state.in_use -= bytes);
        }
        block
    }

    fn give(&self, block: *mut u8, size: usize) {
        let (bytes, number) = rounded(size);
        self.with(|state| state.give(block, bytes, number));
    }
}

impl State {
    /// A kept block of this size. Null where there is none: then one is counted as in use, and others go that would have the
    /// process larger than it was.
    fn take(&mut self, bytes: usize, number: usize) -> *mut u8 {
        self.in_use += bytes;
        let block = self.pop(number);
        if block.is_null() {
            self.most = self.most.max(self.in_use);
            self.release(self.most - self.in_use);
        } else {
            self.kept -= bytes;
        }
        block
    }

    fn give(&mut self, block: *mut u8, bytes: usize, number: usize) {
        self.in_use -= bytes;
        self.kept += bytes;
        // SAFETY: a freed block of at least `LARGE` bytes, aligned to as much, holds an address.
        unsafe { block.cast::<usize>().write(self.free[number]) };
        self.free[number] = block as usize;
        self.counts[number] += 1;
    }

    fn pop(&mut self, number: usize) -> *mut u8 {
        let block = self.free[number] as *mut u8;
        if !block.is_null() {
            // SAFETY: `give` wrote the next one's address there, and a kept block is nobody's.
            self.free[number] = unsafe { block.cast::<usize>().read() };
            self.counts[number] -= 1;
        }
        block
    }

    /// Gives blocks back to the system until at most `bytes` are kept, and little more than must be: with two blocks of
    /// gradients at hand, neither goes for one of a token's ids. What goes has to be cleared when it comes back.
    fn release(&mut self, bytes: usize) {
        while self.kept > bytes {
            let excess = self.kept - bytes;
            let border = (0..SIZES).find(|&number| taken(number) >= excess).unwrap_or(SIZES);
            let smaller = (0..border).map(|number| self.counts[number] * taken(number)).sum::<usize>();
            let number = match smaller >= excess {
                true => (0..border).rev().find(|&number| self.counts[number] > 0),
                false => (border..SIZES).find(|&number| self.counts[number] > 0),
            };
            let number = number.expect("what is kept is counted");
            let block = self.pop(number);
            pages::unmap(block, taken(number));
            self.kept -= taken(number);
        }
    }
}

// SAFETY: a large block is `LARGE` or more bytes of a mapping of its own, aligned to `LARGE`, and belongs to one caller from `take`
// to `give`; which of the two allocators has it follows from its layout, which is the same when it is freed. The others are
// the system allocator's.
unsafe impl GlobalAlloc for Blocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return self.take(layout.size(), false);
        }
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return self.take(layout.size(), true);
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_large(layout) {
            return self.give(block, layout.size());
        }
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size`, rounded up to the alignment, is no more than `isize::MAX`.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (is_large(layout), is_large(new)) {
            // SAFETY: as above.
            (false, false) => unsafe { System.realloc(block, layout, size) },
            (true, true) if rounded(layout.size()) == rounded(size) => block,
            _ => {
                // SAFETY: the new block is another one, and what is copied fits both.
                unsafe {
                    let other = self.alloc(new);
                    if !other.is_null() {
                        other.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    other
                }
            }
        }
    }
}

// SAFETY: it passes everything on.
unsafe impl GlobalAlloc for LargeBlocks {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, here and below.
        unsafe { BLOCKS.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe { BLOCKS.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { BLOCKS.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { BLOCKS.realloc(block, layout, size) }
    }
}

/// Mappings of the system.
#[cfg(target_os = "linux")]
mod pages {
    use super::{LARGE, null_mut};

    /// `bytes` of zeros, aligned to a large page, on large pages where the system has them; null when it has no more memory.
    pub fn map(bytes: usize) -> *mut u8 {
        let room = bytes + LARGE;
        // SAFETY: a new mapping touches no memory that is there; what is cut off and advised about lies within it.
        unsafe {
            let (read_write, own) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let mapping = libc::mmap(null_mut(), room, read_write, own, -1, 0);
            if mapping == libc::MAP_FAILED {
                return null_mut();
            }
            let before = mapping.cast::<u8>().align_offset(LARGE);
            let block = mapping.add(before);
            if before > 0 {
                libc::munmap(mapping, before);
            }
            libc::munmap(block.add(bytes), room - before - bytes);
            // Without large pages it is as good as any other memory.
            libc::madvise(block, bytes, libc::MADV_HUGEPAGE);
            block.cast()
        }
    }

    pub fn unmap(block: *mut u8, bytes: usize) {
        // SAFETY: the block is a mapping of this many bytes that nobody uses.
        unsafe { libc::munmap(block.cast(), bytes) };
    }
}

/// Elsewhere no block is large.
#[cfg(not(target_os = "linux"))]
mod pages {
    pub fn map(_: usize) -> *mut u8 {
        super::null_mut()
    }

    pub fn unmap(_: *mut u8, _: usize) {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rand_chacha::{ChaCha8Rng, rand_core::Rng, rand_core::SeedableRng};

    use super::*;

    fn kept(blocks: &Blocks) -> usize {
        blocks.with(|state| state.kept)
    }

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 64).unwrap()
    }

    #[test]
    fn sizes_are_rounded_to_eighths_and_numbered_apart() {
        let mut last = (0, 0);
        for size in (LARGE..LARGE * 9).step_by(4096) {
            let (bytes, number) = rounded(size);
            assert!(bytes >= size && bytes <= size + size / 8 && bytes % 4096 == 0, "{size}: {bytes}");
            assert!((bytes, number) == last || (bytes > last.0 && number == last.1 + 1) || last == (0, 0), "{size}");
            last = (bytes, number);
            assert_eq!(taken(number), bytes);
        }
    }

    #[test]
    fn a_freed_block_comes_back_and_is_zero_where_that_is_asked() {
        let blocks = Blocks::new();
        // SAFETY: blocks are freed with the layouts that they were allocated with, and written within them.
        unsafe {
            let first = blocks.alloc(layout(3 << 20));
            assert_eq!(first.align_offset(LARGE), 0);
            first.write_bytes(7, 3 << 20);
            blocks.dealloc(first, layout(3 << 20));
            assert_eq!(kept(&blocks), 3 << 20);
            let again = blocks.alloc_zeroed(layout((3 << 20) - 100));
            assert_eq!(again, first);
            assert!(std::slice::from_raw_parts(again, (3 << 20) - 100).iter().all(|&byte| byte == 0));
            blocks.dealloc(again, layout((3 << 20) - 100));
        }
        blocks.release();
        assert_eq!(kept(&blocks), 0);
    }

    #[test]
    fn what_is_kept_never_makes_the_process_larger_than_it_was() {
        let blocks = Blocks::new();
        // SAFETY: as above.
        unsafe {
            let many: Vec<_> = (0..8).map(|_| blocks.alloc(layout(4 << 20))).collect();
            many.iter().for_each(|&block| blocks.dealloc(block, layout(4 << 20)));
            assert_eq!(kept(&blocks), 32 << 20);
            let other = blocks.alloc(layout(10 << 20));
            assert!(kept(&blocks) + (10 << 20) <= 32 << 20, "{}", kept(&blocks));
            assert_eq!(kept(&blocks), 20 << 20);
            blocks.dealloc(other, layout(10 << 20));
        }
        blocks.release();
    }

    #[test]
    fn a_large_block_does_not_go_for_a_small_one() {
        let blocks = Blocks::new();
        let sizes = [64, 4, 4, 4, 32].map(|size: usize| size << 20);
        // SAFETY: as above.
        unsafe {
            let many = sizes.map(|size| (blocks.alloc(layout(size)), size));
            many.iter().for_each(|&(block, size)| blocks.dealloc(block, layout(size)));
            // Two of 4 make room for it.
            let small = blocks.alloc(layout(6 << 20));
            assert_eq!(kept(&blocks), (64 + 32 + 4) << 20);
            // Nothing less than 32 does for this one.
            let middle = blocks.alloc(layout(28 << 20));
            assert_eq!(kept(&blocks), (64 + 4) << 20);
            blocks.dealloc(small, layout(6 << 20));
            blocks.dealloc(middle, layout(28 << 20));
        }
        blocks.release();
        assert_eq!(kept(&blocks), 0);
    }

    #[test]
    fn what_was_written_stays_through_any_order_of_calls() {
        let blocks = Blocks::new();
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut held: Vec<(*mut u8, usize, u8)> = Vec::new();
        for call in 0..600u32 {
            let size = LARGE / 2 + random.next_u32() as usize % (6 << 20);
            let mark = call as u8 | 1;
            // SAFETY: as above.
            unsafe {
                if held.len() > 6 || (call % 3 == 2 && !held.is_empty()) {
                    let (block, size, mark) = held.swap_remove(random.next_u32() as usize % held.len());
                    assert!(std::slice::from_raw_parts(block, size).iter().step_by(997).all(|&byte| byte == mark));
                    blocks.dealloc(block, layout(size));
                } else if call % 7 == 6 && !held.is_empty() {
                    let (block, old, mark) = held.pop().unwrap();
                    let block = blocks.realloc(block, layout(old), size);
                    assert!(std::slice::from_raw_parts(block, old.min(size)).iter().all(|&byte| byte == mark));
                    block.write_bytes(mark, size);
                    held.push((block, size, mark));
                } else {
                    let block =
                        if call % 2 == 0 { blocks.alloc(layout(size)) } else { blocks.alloc_zeroed(layout(size)) };
                    let bytes = std::slice::from_raw_parts_mut(block, size);
                    assert!(call % 2 == 0 || bytes.iter().step_by(509).all(|&byte| byte == 0));
                    bytes.fill(mark);
                    held.push((block, size, mark));
                }
            }
        }
        for (block, size, mark) in held {
            // SAFETY: as above.
            unsafe {
                assert!(std::slice::from_raw_parts(block, size).iter().step_by(997).all(|&byte| byte == mark));
                blocks.dealloc(block, layout(size));
            }
        }
        blocks.release();
    }
}
