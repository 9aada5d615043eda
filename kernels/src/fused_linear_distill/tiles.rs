//! How large the pieces are that a device works in: plain arithmetic, so that it can be checked anywhere.

/// Rows and columns come in multiples of this, so that every piece of a tensor starts where a device may bind it: at
/// 512 bytes on CUDA, 256 elsewhere.
pub const STEP: usize = 256;

/// Bytes that [`Tiles::fitting`] fills beside operands and gradients.
pub const BUDGET: usize = 62 << 20;

const TOKEN_BLOCK: usize = 2048;
const PIECE: usize = 1024;
/// A product that is no wider than this leaves most of a device idle.
const NARROWEST: usize = 512;

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Rows that have a target.
    pub rows: usize,
    pub width: usize,
    pub vocab: usize,
    /// Kept ids of all rows together.
    pub kept: usize,
    /// Bytes of an element of the operands.
    pub element: usize,
    /// Whether rows without target lie between the others, which have to be brought together first.
    pub gathers: bool,
}

/// Sizes of the pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiles {
    /// Rows at once.
    pub token_block: usize,
    /// Columns of the logits' gradient at once.
    pub vocab_tile: usize,
    /// Columns of the logits at once; also sets the room that every product is written to.
    pub piece: usize,
}

impl Tiles {
    /// The largest sizes that need no more than `budget` bytes; if there are none, the smallest.
    pub fn fitting(problem: &Problem, budget: usize) -> Tiles {
        let most_rows = round_up(problem.rows).min(TOKEN_BLOCK);
        let most_columns = round_up(problem.vocab);
        let piece = PIECE.min(most_columns);
        let mut token_block = most_rows;
        loop {
            let tiles = Tiles { token_block, vocab_tile: piece, piece };
            let bytes = tiles.bytes(problem);
            if bytes <= budget || token_block == STEP {
                let column = token_block * problem.element * piece;
                let widest = (token_block * piece / NARROWEST).max(piece).min(most_columns);
                let more = budget.saturating_sub(bytes) / column;
                let vocab_tile = (piece * (1 + more)).min(widest / piece * piece).max(piece);
                return Tiles { vocab_tile, ..tiles };
            }
            token_block -= STEP;
        }
    }

    /// Numbers that the room for products has to hold.
    pub fn room(&self) -> usize {
        (self.token_block * self.piece).max(self.vocab_tile * STEP)
    }

    /// Columns of a product of `rows` rows that fit the room.
    pub fn columns(&self, rows: usize) -> usize {
        (self.room() / rows.max(1) / STEP * STEP).max(STEP)
    }

    /// Bytes of device memory beside operands and gradients.
    pub fn bytes(&self, problem: &Problem) -> usize {
        let block = self.token_block * problem.width;
        let gathered = if problem.gathers { block * problem.element } else { 0 };
        4 * self.room()
            + self.token_block * self.vocab_tile * problem.element
            + 4 * block
            + gathered
            + ROW_BYTES * problem.rows
            + KEPT_BYTES * problem.kept
    }

    /// Whether a device can work with them.
    ///
    /// # Panics
    /// When it cannot.
    pub fn check(&self) {
        for size in [self.token_block, self.vocab_tile, self.piece] {
            assert!(size > 0 && size.is_multiple_of(STEP), "{size} is no multiple of {STEP}");
        }
        assert!(self.vocab_tile.is_multiple_of(self.piece), "a tile is made of whole pieces");
        let most = self.token_block.max(self.vocab_tile);
        assert!(most <= 65_535, "a row is a group of threads, of which a device starts 65,535 at most");
        assert!(self.token_block * self.vocab_tile <= u32::MAX as usize, "places in a tile have 32 bits");
    }
}

/// Statistics, targets and gradient of a row, in words of four bytes: 5 sums, the largest logit's id, offset, label, its
/// logit, its gradient, 4 numbers of the dense gradient, and the row's number.
const ROW_BYTES: usize = 4 * (5 + 1 + 1 + 1 + 1 + 1 + 4 + 1);
/// Id of a kept entry, and its logit or, later, gradient.
const KEPT_BYTES: usize = 4 * 2;

fn round_up(count: usize) -> usize {
    count.max(1).next_multiple_of(STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_of_llama_4_needs_64_mib_beside_the_gradients() {
        for (width, vocab) in [(5120, 202_048), (4096, 128_256)] {
            for element in [2, 4] {
                for gathers in [false, true] {
                    let problem = Problem { rows: 8192, width, vocab, kept: 8192 * 64, element, gathers };
                    let tiles = Tiles::fitting(&problem, BUDGET);
                    tiles.check();
                    let bytes = tiles.bytes(&problem);
                    assert!(bytes <= 64 << 20, "{tiles:?}: {bytes} bytes");
                    assert!(tiles.token_block >= 1024 && tiles.vocab_tile >= 1024, "{tiles:?}");
                }
            }
        }
    }

    #[test]
    fn small_problems_get_small_tiles() {
        let problem = Problem { rows: 5, width: 16, vocab: 300, kept: 10, element: 4, gathers: false };
        let tiles = Tiles::fitting(&problem, BUDGET);
        tiles.check();
        assert_eq!(tiles, Tiles { token_block: 256, vocab_tile: 512, piece: 512 });
    }

    #[test]
    fn a_budget_that_is_too_small_gives_the_smallest_tiles() {
        let problem = Problem { rows: 4096, width: 4096, vocab: 9000, kept: 0, element: 4, gathers: true };
        let tiles = Tiles::fitting(&problem, 0);
        tiles.check();
        assert_eq!(tiles, Tiles { token_block: 256, vocab_tile: 1024, piece: 1024 });
    }
}
