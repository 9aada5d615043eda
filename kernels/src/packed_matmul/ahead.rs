//! Weights that are asked for before they are needed, a little with each step of a product: a burst of requests waits for
//! itself, and the products with it.

use std::ops::Range;

/// Bytes that the next products need, in rows of equal length; none where nothing is known to come.
#[derive(Debug, Clone, Copy)]
pub struct Ahead<'a> {
    first: &'a [u8],
    rows: usize,
    /// Bytes from a row's beginning to that of the next one.
    stride: usize,
}

impl<'a> Ahead<'a> {
    pub const NOTHING: Ahead<'static> = Ahead { first: &[], rows: 0, stride: 0 };

    pub fn bytes(bytes: &'a [u8]) -> Self {
        Ahead { first: bytes, rows: 1, stride: 0 }
    }

    /// Columns `first..first + columns` of some of the rows of `values`, which are `width` long.
    pub fn rows(values: &'a [f32], first: usize, columns: usize, width: usize, rows: Range<usize>) -> Self {
        match values.get(rows.start * width + first..).and_then(|values| values.get(..columns)) {
            Some(row) if !rows.is_empty() => {
                Ahead { first: bytemuck::cast_slice(row), rows: rows.len(), stride: width * size_of::<f32>() }
            }
            _ => Ahead::NOTHING,
        }
    }

    #[cfg(test)]
    pub fn row_count(&self) -> usize {
        self.rows
    }

    /// Asks for all of it.
    pub fn at_once(self) {
        let lines = (self.rows * self.first.len()).div_ceil(64);
        let mut requests = self.over(lines);
        (0..lines).for_each(|_| requests.next());
    }

    /// Spread over so many steps, each of which asks for what begins in its share.
    #[inline(always)]
    pub fn over(self, steps: usize) -> Requests {
        let (at, length) = (self.first.as_ptr(), self.first.len());
        Requests {
            at,
            step: (self.rows * length).div_ceil(steps.max(1)),
            row_end: at.wrapping_add(length),
            skip: self.stride.wrapping_sub(length),
            stride: self.stride,
        }
    }
}

/// What is left to ask for.
pub struct Requests {
    at: *const u8,
    step: usize,
    row_end: *const u8,
    skip: usize,
    stride: usize,
}

impl Requests {
    #[inline(always)]
    pub fn next(&mut self) {
        if self.step > 0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a hint about an address; nothing is read.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(self.at.cast());
            }
            self.at = self.at.wrapping_add(self.step);
            if self.stride > 0 && self.at >= self.row_end {
                self.at = self.at.wrapping_add(self.skip);
                self.row_end = self.row_end.wrapping_add(self.stride);
            }
        }
    }
}
