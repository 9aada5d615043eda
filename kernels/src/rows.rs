//! How rows are dealt out to threads.
//!
//! Chunk sizes depend on the row width alone, never on the number of threads, so that sums over chunks come out the
//! same on any machine.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Rows one task takes: enough work to be worth a task, few enough to spread.
pub fn row_chunk(width: usize) -> usize {
    (16_384 / width.max(1)).clamp(1, 256)
}

/// Chunks of [`row_chunk`] rows, in parallel.
pub fn par_rows(data: &mut [f32], width: usize) -> rayon::slice::ChunksMut<'_, f32> {
    data.par_chunks_mut(row_chunk(width) * width)
}

/// As many numbers as `fill` writes: nothing is put into their memory before.
///
/// # Safety
/// `fill` writes all of them.
pub unsafe fn written_by(length: usize, fill: impl FnOnce(&mut [MaybeUninit<f32>])) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(length);
    fill(&mut numbers.spare_capacity_mut()[..length]);
    // SAFETY: there is room for so many, and the caller promises that they are written.
    unsafe { numbers.set_len(length) };
    numbers
}

/// Puts numbers where nothing need have been before.
///
/// # Panics
/// When there are not as many of them as places.
pub fn put<'a>(places: &'a mut [MaybeUninit<f32>], numbers: &[f32]) -> &'a mut [f32] {
    assert_eq!(places.len(), numbers.len(), "a number for each place");
    places.iter_mut().zip(numbers).for_each(|(place, number)| _ = place.write(*number));
    // SAFETY: all of it was just written.
    unsafe { written(places) }
}

/// # Safety
/// All of it was written.
pub unsafe fn written(places: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: the same layout, and the caller's promise.
    unsafe { &mut *(places as *mut [MaybeUninit<f32>] as *mut [f32]) }
}
