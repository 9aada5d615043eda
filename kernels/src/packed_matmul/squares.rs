//! Squares of numbers whose rows become columns, in registers: how a product reads a matrix that lies the other way round.

use std::ops::Range;

use super::tiles::{Line, PANEL, TileRow};
use crate::vector_math::vectorised;

/// One side of them.
pub const SQUARE: usize = 16;

/// Where the rows of a square go.
pub type Sides<'a> = [&'a mut [f32; SQUARE]; SQUARE];

/// Brings some numbers of up to a panel's columns, which lie one behind the other, beside each other. What a column that is
/// not there leaves is 0.
///
/// # Shapes
/// - `columns` `[up to PANEL, inputs]`, `lines` `[k]`
pub fn pack_columns(columns: &[f32], inputs: usize, k: Range<usize>, lines: &mut [Line<f32>]) {
    let count = columns.len() / inputs;
    if count < PANEL {
        lines.fill(Line([0.0; PANEL]));
    }
    for first in (0..count).step_by(SQUARE) {
        let mut done = 0;
        if first + SQUARE <= count {
            for lines in lines.as_chunks_mut::<SQUARE>().0 {
                let sides = lines.each_mut().map(|line| line.0[first..].first_chunk_mut().expect("half a line"));
                turn(&columns[first * inputs + k.start + done..], inputs, sides);
                done += SQUARE;
            }
        }
        for column in first..count.min(first + SQUARE) {
            let rest = columns[column * inputs..][k.start + done..k.end].iter();
            rest.zip(&mut lines[done..]).for_each(|(value, line)| line.0[column] = *value);
        }
    }
}

/// Brings some numbers of columns `first..first + rows.len()` of a matrix into rows of tiles.
///
/// # Shapes
/// - `values` `[at least k.end, width]`
pub fn columns_to_rows(values: &[f32], width: usize, k: Range<usize>, first: usize, rows: &mut [TileRow]) {
    for from in k.clone().step_by(SQUARE) {
        let to = from - k.start;
        // All rows before the next k: then the matrix is read in its order.
        for (number, rows) in rows.chunks_mut(SQUARE).enumerate() {
            let first = first + number * SQUARE;
            match rows.first_chunk_mut::<SQUARE>() {
                Some(rows) if from + SQUARE <= k.end => {
                    let sides = rows.each_mut().map(|row| row[to..].first_chunk_mut().expect("a block of a row"));
                    turn(&values[from * width + first..], width, sides);
                }
                _ => {
                    for k in from..k.end.min(from + SQUARE) {
                        let values = &values[k * width + first..][..rows.len()];
                        rows.iter_mut().zip(values).for_each(|(row, value)| row[to + k - from] = *value);
                    }
                }
            }
        }
    }
}

/// Rows that begin `stride` apart become columns.
#[inline(always)]
fn turn(values: &[f32], stride: usize, mut sides: Sides<'_>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions.
        return unsafe { super::avx512::turn(values, stride, sides) };
    }
    vectorised(
        #[inline(always)]
        || turn_by_halves(values, stride, &mut sides),
    )
}

/// Four times the halves of the rows are shuffled into each other: each time a number's row and column, written in bits one
/// behind the other, turn by one bit, so that in the end they have changed places.
#[inline(always)]
fn turn_by_halves(values: &[f32], stride: usize, sides: &mut Sides<'_>) {
    const HALF: usize = SQUARE / 2;
    let mut square: [[f32; SQUARE]; SQUARE] =
        std::array::from_fn(|row| values[row * stride..][..SQUARE].try_into().expect("a side of a square"));
    for _ in 0..SQUARE.ilog2() {
        let mut next = [[0.0; SQUARE]; SQUARE];
        for row in 0..HALF {
            for column in 0..HALF {
                next[2 * row][2 * column] = square[row][column];
                next[2 * row][2 * column + 1] = square[row + HALF][column];
                next[2 * row + 1][2 * column] = square[row][column + HALF];
                next[2 * row + 1][2 * column + 1] = square[row + HALF][column + HALF];
            }
        }
        square = next;
    }
    sides.iter_mut().zip(&square).for_each(|(side, row)| **side = *row);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_of_turning_a_square_is_the_same() {
        let values: Vec<f32> = (0..SQUARE * 21).map(|n| n as f32).collect();
        let mut found = [[[0.0; SQUARE]; SQUARE]; 2];
        turn(&values[2..], 21, found[0].each_mut());
        turn_by_halves(&values[2..], 21, &mut found[1].each_mut());
        let expected: [[f32; SQUARE]; SQUARE] =
            std::array::from_fn(|column| std::array::from_fn(|row| (2 + row * 21 + column) as f32));
        assert_eq!(found, [expected; 2]);
    }

    #[test]
    fn columns_of_any_matrix_become_rows_of_a_tile() {
        for (inputs, width) in [(1, 1), (16, 16), (37, 23), (64, 48), (20, 100)] {
            let values: Vec<f32> = (0..inputs * width).map(|n| n as f32).collect();
            for first in [0, width / 2, width - 1] {
                let count = (width - first).min(20);
                let from = inputs / 3;
                let mut tile = vec![TileRow::ZEROS; count];
                columns_to_rows(&values, width, from..inputs, first, &mut tile);
                for (row, numbers) in tile.iter().enumerate() {
                    for k in from..inputs {
                        assert_eq!(numbers[k - from], values[k * width + first + row], "{inputs} x {width}: {row} {k}");
                    }
                }
            }
        }
    }
}
