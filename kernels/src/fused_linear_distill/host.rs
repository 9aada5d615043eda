//! The operation on a processor: the logits of some rows at a time, held where they cost no memory if there is such a
//! place.
//!
//! A row's gradient needs all of its logits to have been seen, so they are held in between: `[V, n]` for a piece of n
//! rows. The gradient of the head, `[V, D]`, is memory that nothing is written to before the first piece's gradient. Up
//! to D rows have their logits there, each tile of them where that tile of the head's gradient comes to lie, if that is
//! half of the rows at least. The other rows go in pieces that get memory of their own. What is done with a piece is in `pieces.rs`.

use std::borrow::Cow;

use half::bf16;

use super::{
    LossSettings, RowMeasures, RowTargets, RowWeights, Weigh,
    logits::row_loss,
    pieces::{PARTS, Piece, Results},
};

/// Most bytes of logits in memory at once.
pub(super) const PIECE_BYTES: usize = 64 << 20;
/// A piece has at most this part of all logits, so that small problems are lean as well.
const PIECE_SHARE: usize = 6;
/// Rows of a piece that are worth a matrix product.
const LEAST_ROWS: usize = 16;
/// Bytes of a head in bf16 that are widened at once.
const WIDENED_BYTES: usize = 16 << 20;

/// A row-major matrix in host memory.
#[derive(Debug, Clone, Copy)]
pub enum HostMatrix<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> HostMatrix<'a> {
    pub fn len(&self) -> usize {
        match self {
            HostMatrix::F32(values) => values.len(),
            HostMatrix::Bf16(values) => values.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn rows(&self, width: usize, first: usize, count: usize) -> Cow<'a, [f32]> {
        let range = first * width..(first + count) * width;
        match self {
            HostMatrix::F32(values) => Cow::Borrowed(&values[range]),
            HostMatrix::Bf16(values) => Cow::Owned(values[range].iter().map(|value| value.to_f32()).collect()),
        }
    }

    /// Rows to work on at once: all where nothing has to be widened.
    pub(super) fn tile(&self, width: usize, rows: usize) -> usize {
        match self {
            HostMatrix::F32(_) => rows.max(1),
            HostMatrix::Bf16(_) => (WIDENED_BYTES / (4 * width.max(1))).clamp(1, rows.max(1)),
        }
    }
}

/// Which gradients are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    pub hidden: bool,
    pub lm_head: bool,
}

impl Wanted {
    pub const NOTHING: Wanted = Wanted { hidden: false, lm_head: false };
    pub const BOTH: Wanted = Wanted { hidden: true, lm_head: true };
}

/// Loss and gradients of a batch.
#[derive(Debug)]
pub struct Output {
    /// `sum_t [ w_soft c d + w_hard ce ]`.
    pub loss: f64,
    /// Measures and weights of each row that has a target.
    pub rows: Vec<Option<(RowMeasures, RowWeights)>>,
    /// `[T, D]`, f32 accumulated.
    pub hidden_grad: Option<Vec<f32>>,
    /// `[V, D]`, f32 accumulated.
    pub lm_head_grad: Option<Vec<f32>>,
}

/// Runs the operation.
///
/// # Shapes
/// - `hidden` `[T, D]`, `lm_head` `[V, D]`, D is `width`, targets of T rows
///
/// # Panics
/// When shapes do not fit, or an id lies beyond the vocabulary: [`RowTargets::check`] says so without a panic.
pub fn run(
    hidden: HostMatrix<'_>,
    lm_head: HostMatrix<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
    wanted: Wanted,
) -> Output {
    let row_bytes = 4 * (lm_head.len() / width);
    let piece = (row_bytes * targets.row_count() / PIECE_SHARE).max(row_bytes * LEAST_ROWS).min(PIECE_BYTES);
    run_in_pieces(hidden, lm_head, width, targets, settings, weigh, wanted, piece)
}

/// [`run`] with a budget for the logits.
#[allow(clippy::too_many_arguments)] // the operation's operands, and the size of its scratch space
pub fn run_in_pieces(
    hidden: HostMatrix<'_>,
    lm_head: HostMatrix<'_>,
    width: usize,
    targets: &RowTargets,
    settings: &LossSettings,
    weigh: &Weigh<'_>,
    wanted: Wanted,
    piece_bytes: usize,
) -> Output {
    let (rows, vocab) = (targets.row_count(), lm_head.len() / width);
    assert_eq!(hidden.len(), rows * width, "one row of targets per hidden state");
    // Rows without a target cost nothing.
    let live: Vec<usize> = (0..rows).filter(|&row| targets.has_target(row)).collect();
    let mut output = Output {
        loss: 0.0,
        rows: vec![None; rows],
        hidden_grad: wanted.hidden.then(|| vec![0.0; rows * width]),
        lm_head_grad: wanted.lm_head.then(|| vec![0.0; lm_head.len()]),
    };
    let in_gradient = if wanted.lm_head { rows_in_gradient(live.len(), width) } else { 0 };
    let (first, others) = live.split_at(in_gradient);
    let most = piece_rows(others.len(), vocab, piece_bytes);
    let mut room = vec![];
    // One room for all pieces: as many small ones, freed in between, would be a third more memory.
    let largest = first.len().max(most.min(others.len()));
    let mut hidden_grads = vec![0.0f32; if wanted.hidden { PARTS * width * largest } else { 0 }];
    let pieces = (!first.is_empty()).then_some(first).into_iter().chain(others.chunks(most));
    for (number, live) in pieces.enumerate() {
        let hidden_rows = gather(&hidden, width, live);
        let piece = Piece::new(&hidden_rows, lm_head, width, live, targets, settings);
        let borrowed = number == 0 && !first.is_empty();
        if !borrowed && room.is_empty() {
            room = vec![0.0f32; live.len() * vocab];
        }
        let measured = match &mut output.lm_head_grad {
            Some(gradient) if borrowed => piece.measure(gradient, width),
            _ => piece.measure(&mut room[..live.len() * vocab], live.len()),
        };
        let finished = piece.finish(&measured, weigh);
        for (&row, found) in live.iter().zip(&finished.rows) {
            output.loss += row_loss(targets, row, settings, &found.0, &found.1);
            output.rows[row] = Some(*found);
        }
        if wanted != Wanted::NOTHING {
            let logits = (!borrowed).then(|| &room[..live.len() * vocab]);
            let results = Results {
                hidden: wanted.hidden.then_some(&mut hidden_grads[..]),
                lm_head: output.lm_head_grad.as_deref_mut(),
                add: number > 0,
            };
            piece.differentiate(logits, &finished, results);
            if let Some(into) = &mut output.hidden_grad {
                for (place, &row) in live.iter().enumerate() {
                    for (d, slot) in into[row * width..][..width].iter_mut().enumerate() {
                        *slot = hidden_grads[d * live.len() + place];
                    }
                }
            }
        }
    }
    output
}

/// How many rows have their logits in the gradient of the head: as many as it is wide, but no more than the parts of
/// the hidden states' gradient leave memory for.
fn rows_in_gradient(rows: usize, width: usize) -> usize {
    let most = PIECE_BYTES / (4 * PARTS * width.max(1));
    let most = width.min(most.max(LEAST_ROWS));
    // For a small share of the rows it saves no pass over the head, and the parts' sums are as large as it is wide.
    if 2 * most < rows {
        return 0;
    }
    // Whole vectors of rows, where there are more than fit.
    if rows > most && most > LEAST_ROWS { most / LEAST_ROWS * LEAST_ROWS } else { rows.min(most) }
}

/// Rows per piece: as many as the budget has room for, in pieces of about equal size.
pub(super) fn piece_rows(rows: usize, vocab: usize, bytes: usize) -> usize {
    let most = (bytes / (4 * vocab.max(1))).max(1);
    let even = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
    // Whole vectors of rows, where the budget has room for them: every further piece reads the head twice more.
    let whole = even.next_multiple_of(LEAST_ROWS);
    if whole <= most { whole } else { even }
}

pub(super) fn gather<'a>(hidden: &HostMatrix<'a>, width: usize, rows: &[usize]) -> Cow<'a, [f32]> {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    let all = hidden.rows(width, first, last + 1 - first);
    if rows.len() == last + 1 - first {
        return all;
    }
    Cow::Owned(rows.iter().flat_map(|row| &all[(row - first) * width..][..width]).copied().collect())
}
