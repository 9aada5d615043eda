//! Where sums go when they leave the registers: memory that has numbers already, or none yet.

use std::{marker::PhantomData, mem::MaybeUninit};

use super::tiles::PANEL;

/// What becomes of what is in a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// It is replaced, and need not have been written.
    Replace,
    /// The sums are added to it.
    Add,
    /// It is replaced past the caches, where the processor can do that: memory that nobody reads soon is then written
    /// without being read before. [`fence`] must follow.
    Stream,
}

/// The columns of one panel in one row.
pub struct Place<'a> {
    first: *mut f32,
    row: PhantomData<&'a mut [f32; PANEL]>,
}

impl<'a> Place<'a> {
    pub fn new(numbers: &'a mut [f32; PANEL]) -> Self {
        Place { first: numbers.as_mut_ptr(), row: PhantomData }
    }

    /// # Safety
    /// Nothing is added to it before something was put there.
    pub unsafe fn unwritten(numbers: &'a mut [MaybeUninit<f32>; PANEL]) -> Self {
        Place { first: numbers.as_mut_ptr().cast(), row: PhantomData }
    }

    /// [`PANEL`] numbers to be written, and to be read for [`Store::Add`].
    #[cfg(target_arch = "x86_64")]
    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.first
    }

    #[inline(always)]
    pub fn store(self, sums: &[f32; PANEL], store: Store) {
        // SAFETY: it was made of a reference to as many numbers, which it keeps borrowed.
        let place = unsafe { std::slice::from_raw_parts_mut(self.first.cast::<MaybeUninit<f32>>(), PANEL) };
        // SAFETY: where sums are added, `unwritten` was promised that there is something.
        unsafe { store_part(sums, place, store) };
    }
}

/// Puts the first of a panel's sums into the last columns of a row, or adds them to what is there.
///
/// # Safety
/// All columns are written where sums are added to them.
#[inline(always)]
pub unsafe fn store_part(sums: &[f32; PANEL], row: &mut [MaybeUninit<f32>], store: Store) {
    for (place, sum) in row.iter_mut().zip(sums) {
        match store {
            Store::Replace | Store::Stream => _ = place.write(*sum),
            // SAFETY: the caller promises it.
            Store::Add => unsafe { *place.assume_init_mut() += sum },
        }
    }
}

/// Numbers that are there, as memory that may be written.
pub fn may_be_unwritten(numbers: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the same layout. Everything here that writes to such memory writes numbers.
    unsafe { &mut *(numbers as *mut [f32] as *mut [MaybeUninit<f32>]) }
}

/// Makes what was written past the caches of this core visible before anything that it writes afterwards.
pub fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this architecture has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
