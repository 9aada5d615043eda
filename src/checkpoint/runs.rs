//! Which numbers of a tensor's rows are wanted: the same stretches of each row. Arithmetic only.

use std::ops::Range;

/// Stretches of a row of a tensor's first axis, `ranges` in each of `repeats` pieces of `stride` numbers.
///
/// Some columns of a matrix `[rows, columns]` are ranges of one piece; of a stack `[experts, inputs, outputs]`, a row of
/// which is an expert, some of the outputs are ranges in each of its `inputs` pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    pub repeats: usize,
    pub stride: usize,
    pub ranges: Vec<Range<usize>>,
}

impl Runs {
    /// Each stretch, in order.
    pub fn each(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let pieces = (0..self.repeats).map(|piece| piece * self.stride);
        pieces.flat_map(|start| self.ranges.iter().map(move |range| start + range.start..start + range.end))
    }

    /// Numbers of one row.
    pub fn count(&self) -> usize {
        self.repeats * self.ranges.iter().map(|range| range.len()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stretches_of_each_piece_follow_each_other() {
        let runs = Runs { repeats: 2, stride: 10, ranges: vec![1..3, 6..7] };
        assert_eq!(runs.each().collect::<Vec<_>>(), [1..3, 6..7, 11..13, 16..17]);
        assert_eq!(runs.count(), 6);
    }
}
