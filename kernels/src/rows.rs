//! How rows are dealt out to threads.
//!
//! Chunk sizes depend on the row width alone, never on the number of threads, so that sums over chunks come out the
//! same on any machine.

use rayon::prelude::*;

/// Rows one task takes: enough work to be worth a task, few enough to spread.
pub fn row_chunk(width: usize) -> usize {
    (16_384 / width.max(1)).clamp(1, 256)
}

/// Chunks of [`row_chunk`] rows, in parallel.
pub fn par_rows(data: &mut [f32], width: usize) -> rayon::slice::ChunksMut<'_, f32> {
    data.par_chunks_mut(row_chunk(width) * width)
}
