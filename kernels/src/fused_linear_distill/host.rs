//! The operation on a processor: the logits of a few rows at a time, vocabulary by row, each tile of them handled while
//! it is in the cache.
//!
//! Three matrix products per tile, the fewest there can be: logits, gradient of the head, gradient of the hidden
//! states. Logits `[V, n]` of a piece of n rows become their own gradient in place, so that a piece is all the memory
//! there is beside the results. With the rows innermost, products read the head once and in order, and exponentials run
//! over sixteen rows at once. Tiles and groups are cut by the shapes alone, so sums do not depend on the threads.

use std::borrow::Cow;

use half::bf16;
use rayon::prelude::*;

use super::{
    LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh,
    logits::row_loss,
    rows::{DenseGradient, Mass, Outcomes, Row, RowStatistics},
};
use crate::{
    gemm_call::{View, multiply, multiply_into_columns},
    vector_math::{add_scaled_exp_columns, max_columns, scaled_exp_columns, sum_exp_columns},
};

/// Most bytes of logits in memory at once.
pub(super) const PIECE_BYTES: usize = 64 << 20;
/// A piece has at most this part of all logits, so that small problems are lean as well.
const PIECE_SHARE: usize = 6;
/// Rows of a piece that are worth a matrix product.
const LEAST_ROWS: usize = 16;
/// Bytes of a head in bf16 that are widened at once.
const WIDENED_BYTES: usize = 16 << 20;
/// Weights of the head in one tile.
const TILE_WEIGHTS: usize = 1 << 19;
/// Parts of the vocabulary whose gradients of the hidden states are added up apart.
const GROUPS: usize = 16;

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
    let most = piece_rows(live.len(), vocab, piece_bytes);
    let mut logits = vec![0.0f32; most.min(live.len()) * vocab];
    for (number, live) in live.chunks(most).enumerate() {
        let hidden_rows = gather(&hidden, width, live);
        let piece = Piece {
            hidden: &hidden_rows,
            lm_head,
            width,
            vocab,
            tile: (TILE_WEIGHTS / width.max(1)).clamp(64, 2048),
            live,
            entries: Entries::new(targets, live),
            targets,
            settings,
            first: number == 0,
        };
        let logits = &mut logits[..live.len() * vocab];
        let (statistics, kept_logits, label_logits) = piece.measure(logits);
        let finished = piece.finish(&statistics, &kept_logits, &label_logits, weigh);
        for (&row, found) in live.iter().zip(&finished.rows) {
            output.loss += row_loss(targets, row, settings, &found.0, &found.1);
            output.rows[row] = Some(*found);
        }
        if wanted != Wanted::NOTHING {
            let hidden_grad = piece.differentiate(logits, &finished, wanted, output.lm_head_grad.as_deref_mut());
            if let Some(into) = &mut output.hidden_grad {
                for (place, &row) in live.iter().enumerate() {
                    for (d, slot) in into[row * width..][..width].iter_mut().enumerate() {
                        *slot = hidden_grad[d * live.len() + place];
                    }
                }
            }
        }
    }
    output
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

/// One logit that a row's targets name.
#[derive(Debug, Clone, Copy)]
struct Entry {
    id: u32,
    /// Row within the piece.
    row: u32,
    /// Place among the kept ids of the piece.
    slot: u32,
}

/// The logits that the targets of a piece name, by id, so that a tile finds its own.
struct Entries {
    kept: Vec<Entry>,
    labels: Vec<Entry>,
    /// Where each row's kept ids begin; one more than rows.
    offsets: Vec<usize>,
}

impl Entries {
    fn new(targets: &RowTargets, live: &[usize]) -> Self {
        let mut entries = Entries { kept: vec![], labels: vec![], offsets: vec![0] };
        for (place, &row) in live.iter().enumerate() {
            for &id in &targets.ids[targets.kept(row)] {
                entries.kept.push(Entry { id, row: place as u32, slot: entries.kept.len() as u32 });
            }
            entries.offsets.push(entries.kept.len());
            if targets.labels[row] != NO_LABEL {
                entries.labels.push(Entry { id: targets.labels[row], row: place as u32, slot: place as u32 });
            }
        }
        entries.kept.sort_unstable_by_key(|entry| (entry.id, entry.row));
        entries.labels.sort_unstable_by_key(|entry| (entry.id, entry.row));
        entries
    }
}

/// Those of the ids from `first` on, `count` of them.
fn within(entries: &[Entry], first: usize, count: usize) -> &[Entry] {
    let from = entries.partition_point(|entry| (entry.id as usize) < first);
    let to = entries.partition_point(|entry| (entry.id as usize) < first + count);
    &entries[from..to]
}

/// Some rows and all of the head.
struct Piece<'a> {
    /// `[n, D]`
    hidden: &'a [f32],
    lm_head: HostMatrix<'a>,
    width: usize,
    vocab: usize,
    /// Ids per tile.
    tile: usize,
    live: &'a [usize],
    entries: Entries,
    targets: &'a RowTargets,
    settings: &'a LossSettings,
    /// Whether the head's gradient has nothing yet.
    first: bool,
}

/// What a tile's logits were before they were masked, and what they add up to.
struct TileMeasures {
    statistics: Vec<RowStatistics>,
    kept: Vec<f32>,
    labels: Vec<f32>,
}

/// Rows with their values known and their gradients given by a few numbers each.
struct Finished {
    rows: Vec<(RowMeasures, RowWeights)>,
    dense: DenseColumns,
    /// In the order of the targets.
    kept_gradient: Vec<f32>,
    /// What the label's logit gets beside the dense gradient; 0 where the label is kept.
    label_gradient: Vec<f32>,
}

/// [`DenseGradient`] of each row, one vector per number.
#[derive(Default)]
struct DenseColumns {
    shift: Vec<f32>,
    soft: Vec<f32>,
    shift_unscaled: Vec<f32>,
    hard: Vec<f32>,
}

impl Piece<'_> {
    fn count(&self) -> usize {
        self.live.len()
    }

    /// Computes the logits `[V, n]`, with the kept ones taken out.
    fn measure(&self, logits: &mut [f32]) -> (Vec<RowStatistics>, Vec<f32>, Vec<Option<f32>>) {
        let count = self.count();
        let tiles: Vec<TileMeasures> = logits
            .par_chunks_mut(self.tile * count)
            .enumerate()
            .map(|(number, logits)| self.measure_tile(number * self.tile, logits))
            .collect();
        let temperature = self.settings.temperature as f64;
        let mut statistics = vec![RowStatistics::NONE; count];
        let (mut kept, mut labels) = (vec![0.0; self.entries.kept.len()], vec![None; count]);
        for (number, tile) in tiles.into_iter().enumerate() {
            let first = number * self.tile;
            for (all, part) in statistics.iter_mut().zip(tile.statistics) {
                *all = all.join(part, temperature);
            }
            for (entry, logit) in within(&self.entries.kept, first, self.tile).iter().zip(tile.kept) {
                kept[entry.slot as usize] = logit;
                let place = RowStatistics { largest: logit, argmax: entry.id, ..RowStatistics::NONE };
                let all = &mut statistics[entry.row as usize];
                *all = all.join(place, temperature);
            }
            for (entry, logit) in within(&self.entries.labels, first, self.tile).iter().zip(tile.labels) {
                labels[entry.slot as usize] = Some(logit);
            }
        }
        (statistics, kept, labels)
    }

    fn measure_tile(&self, first: usize, logits: &mut [f32]) -> TileMeasures {
        let count = self.count();
        let ids = logits.len() / count;
        let head = self.lm_head.rows(self.width, first, ids);
        let hidden = View::rows(self.hidden, count, self.width, self.width);
        let head = View::rows(&head, ids, self.width, self.width).transposed();
        multiply_into_columns(logits, count, false, hidden, head);
        let at = |entry: &Entry| (entry.id as usize - first) * count + entry.row as usize;
        let labels = within(&self.entries.labels, first, ids).iter().map(|entry| logits[at(entry)]).collect();
        let kept = within(&self.entries.kept, first, ids)
            .iter()
            .map(|entry| std::mem::replace(&mut logits[at(entry)], f32::NEG_INFINITY))
            .collect();

        let mut largest = vec![f32::NEG_INFINITY; count];
        max_columns(logits, &mut largest);
        // Where nothing is left every exponential is 0, relative to whatever is not infinite.
        let shift: Vec<f32> = largest.iter().map(|&largest| if largest.is_finite() { largest } else { 0.0 }).collect();
        let masses = |temperature: f32| -> Vec<Mass> {
            let (mut sums, mut squares) = (vec![0.0f64; count], vec![0.0f64; count]);
            sum_exp_columns(logits, &shift, 1.0 / temperature, &mut sums, &mut squares);
            let columns = largest.iter().zip(sums).zip(squares);
            columns.map(|((&largest, sum), squares)| Mass { largest, sum, squares }).collect()
        };
        let unscaled = masses(1.0);
        let scaled =
            if self.settings.temperature == 1.0 { unscaled.clone() } else { masses(self.settings.temperature) };
        let statistics = (0..count).map(|row| RowStatistics {
            rest: scaled[row],
            rest_unscaled: unscaled[row],
            largest: largest[row],
            argmax: (0..ids)
                .find(|id| logits[id * count + row] == largest[row])
                .map_or(u32::MAX, |id| (first + id) as u32),
        });
        TileMeasures { statistics: statistics.collect(), kept, labels }
    }

    /// Values, weights and gradients of the rows' outcomes.
    fn finish(
        &self,
        statistics: &[RowStatistics],
        kept_logits: &[f32],
        label_logits: &[Option<f32>],
        weigh: &Weigh<'_>,
    ) -> Finished {
        let (targets, offsets) = (self.targets, &self.entries.offsets);
        let mut found: Vec<_> = (0..self.count())
            .into_par_iter()
            .map_init(Outcomes::default, |outcomes, place| {
                let (row, slots) = (self.live[place], offsets[place]..offsets[place + 1]);
                let (kept, label) = (targets.kept(row), targets.labels[row]);
                let target = Row {
                    log_probs: &targets.log_probs[kept.clone()],
                    log_tail: targets.log_tail[row],
                    kept_logits: &kept_logits[slots.clone()],
                    label_logit: label_logits[place],
                    label_place: targets.ids[kept].iter().position(|&id| id == label),
                };
                let mut kept_gradient = vec![0.0; slots.len()];
                let (measures, weights, dense) = target.finish(
                    self.settings,
                    &statistics[place],
                    &|measures| weigh(row, measures),
                    outcomes,
                    &mut kept_gradient,
                );
                let apart = target.label_logit.is_some() && target.label_place.is_none();
                ((measures, weights), dense, kept_gradient, if apart { -weights.hard } else { 0.0 })
            })
            .collect();
        let mut finished = Finished {
            rows: found.iter().map(|found| found.0).collect(),
            dense: DenseColumns::default(),
            kept_gradient: vec![],
            label_gradient: found.iter().map(|found| found.3).collect(),
        };
        for (_, dense, kept_gradient, _) in &mut found {
            finished.dense.push(dense);
            finished.kept_gradient.append(kept_gradient);
        }
        finished
    }

    /// Turns the logits into their gradient and multiplies it on. Gives the gradient of the hidden states, `[D, n]`.
    fn differentiate(
        &self,
        logits: &mut [f32],
        finished: &Finished,
        wanted: Wanted,
        lm_head_grad: Option<&mut [f32]>,
    ) -> Vec<f32> {
        let (count, width) = (self.count(), self.width);
        let ids = self.vocab.div_ceil(self.tile).div_ceil(GROUPS).max(1) * self.tile;
        let groups = logits.par_chunks_mut(ids * count).enumerate();
        let parts: Vec<Vec<f32>> = match lm_head_grad {
            Some(gradient) => groups
                .zip(gradient.par_chunks_mut(ids * width))
                .map(|((number, logits), gradient)| {
                    self.differentiate_group(number * ids, logits, finished, wanted, Some(gradient))
                })
                .collect(),
            None => groups
                .map(|(number, logits)| self.differentiate_group(number * ids, logits, finished, wanted, None))
                .collect(),
        };
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_default();
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        sum
    }

    fn differentiate_group(
        &self,
        first: usize,
        logits: &mut [f32],
        finished: &Finished,
        wanted: Wanted,
        mut lm_head_grad: Option<&mut [f32]>,
    ) -> Vec<f32> {
        let (count, width) = (self.count(), self.width);
        let hidden = View::rows(self.hidden, count, width, width);
        let mut hidden_grad = vec![0.0; if wanted.hidden { width * count } else { 0 }];
        for (number, logits) in logits.chunks_mut(self.tile * count).enumerate() {
            let first = first + number * self.tile;
            let ids = logits.len() / count;
            self.write_gradient(first, logits, finished);
            let gradient = View::rows(logits, ids, count, count);
            if let Some(into) = &mut lm_head_grad {
                multiply(&mut into[number * self.tile * width..], width, !self.first, 1.0, gradient, hidden, false);
            }
            if wanted.hidden {
                let head = self.lm_head.rows(width, first, ids);
                let head = View::rows(&head, ids, width, width);
                multiply_into_columns(&mut hidden_grad, count, true, gradient.transposed(), head);
            }
        }
        hidden_grad
    }

    fn write_gradient(&self, first: usize, logits: &mut [f32], finished: &Finished) {
        let count = self.count();
        let (dense, temperature) = (&finished.dense, self.settings.temperature);
        if temperature == 1.0 {
            scaled_exp_columns(logits, &dense.shift, 1.0, &dense.soft);
        } else {
            add_scaled_exp_columns(
                logits,
                [&dense.shift, &dense.shift_unscaled],
                [1.0 / temperature, 1.0],
                [&dense.soft, &dense.hard],
            );
        }
        let ids = logits.len() / count;
        let at = |entry: &Entry| (entry.id as usize - first) * count + entry.row as usize;
        for entry in within(&self.entries.kept, first, ids) {
            logits[at(entry)] = finished.kept_gradient[entry.slot as usize];
        }
        for entry in within(&self.entries.labels, first, ids) {
            logits[at(entry)] += finished.label_gradient[entry.row as usize];
        }
    }
}

impl DenseColumns {
    fn push(&mut self, dense: &DenseGradient) {
        let finite = |shift: f32| if shift.is_finite() { shift } else { 0.0 };
        self.shift.push(finite(dense.shift));
        self.soft.push(dense.soft);
        self.shift_unscaled.push(finite(dense.shift_unscaled));
        self.hard.push(dense.hard);
    }
}
