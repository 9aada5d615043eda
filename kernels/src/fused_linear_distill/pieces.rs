//! What is done with the rows of one piece.
//!
//! Three matrix products per tile of the vocabulary, the fewest there can be: logits, gradient of the head, gradient of
//! the hidden states. With the rows innermost, products read the head in order, and exponentials run over sixteen rows
//! at once. A tile's gradient is made in a room of its own, small enough for the cache, so that logits may lie where the
//! gradient of the head is to be written. Tiles and parts are cut by the shapes alone, so sums do not depend on the
//! threads.

use std::sync::Mutex;

use rayon::prelude::*;

use super::{
    LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh,
    host::HostMatrix,
    rows::{DenseGradient, Mass, Outcomes, RowStatistics, finish_row},
};
use crate::{
    gemm_call::{View, multiply, multiply_into_columns},
    vector_math::{add_scaled_exp_columns, max_columns, scaled_exp_columns, sum_exp_columns},
};

/// Numbers in one tile of the head, and in its gradient.
const TILE: usize = 1 << 19;
/// Parts of the vocabulary whose gradients of the hidden states are added up apart.
pub(super) const PARTS: usize = 16;

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
pub(super) struct Piece<'a> {
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
}

/// What to compute, and into what.
pub(super) struct Results<'a> {
    /// Room for the parts of the hidden states' gradient, `PARTS` times `[D, n]`; the first of them becomes the sum.
    pub(super) hidden: Option<&'a mut [f32]>,
    pub(super) lm_head: Option<&'a mut [f32]>,
    /// Whether the head's gradient is added to what is there.
    pub(super) add: bool,
}

/// Some of the vocabulary.
struct Part<'a> {
    ids: std::ops::Range<usize>,
    logits: Option<&'a [f32]>,
    lm_head_grad: Option<&'a mut [f32]>,
    /// `[D, n]`
    hidden_grad: Option<&'a mut [f32]>,
    add: bool,
}

/// What is known of the rows' logits.
pub(super) struct Measured {
    statistics: Vec<RowStatistics>,
    /// In the order of the targets.
    kept: Vec<f32>,
    /// `-inf` where there is no label.
    labels: Vec<f32>,
}

/// What a tile's logits were before they were masked, and what they add up to.
struct TileMeasures<'a> {
    statistics: &'a mut [RowStatistics],
    kept: &'a mut [f32],
    labels: &'a mut [f32],
}

/// Rows with their values known and their gradients given by a few numbers each.
pub(super) struct Finished {
    pub(super) rows: Vec<(RowMeasures, RowWeights)>,
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

impl<'a> Piece<'a> {
    pub(super) fn new(
        hidden: &'a [f32],
        lm_head: HostMatrix<'a>,
        width: usize,
        live: &'a [usize],
        targets: &'a RowTargets,
        settings: &'a LossSettings,
    ) -> Self {
        Piece {
            hidden,
            lm_head,
            width,
            vocab: lm_head.len() / width,
            tile: (TILE / width.max(live.len())).clamp(64, 2048) / 64 * 64,
            live,
            entries: Entries::new(targets, live),
            targets,
            settings,
        }
    }

    fn count(&self) -> usize {
        self.live.len()
    }

    /// Computes the logits `[V, n]`, with the kept ones taken out. `places` has room for `stride` of them per id; those
    /// of a tile are at the beginning of its room.
    pub(super) fn measure(&self, places: &mut [f32], stride: usize) -> Measured {
        let (count, tiles) = (self.count(), self.vocab.div_ceil(self.tile));
        // One allocation each: small ones that outlive a product would tear holes into the memory that products take
        // and leave, and there would be more of it with every tile.
        let mut statistics_of_tiles = vec![RowStatistics::NONE; tiles * count];
        let mut kept_of_tiles = vec![0.0; self.entries.kept.len()];
        let mut labels_of_tiles = vec![0.0; self.entries.labels.len()];
        let mut kept_left = Some(&mut kept_of_tiles[..]);
        let mut labels_left = Some(&mut labels_of_tiles[..]);
        let tiles: Vec<(TileMeasures, &mut [f32])> = statistics_of_tiles
            .chunks_mut(count)
            .zip(places.chunks_mut(self.tile * stride))
            .enumerate()
            .map(|(number, (statistics, places))| {
                let length = |entries: &[Entry]| within(entries, number * self.tile, self.tile).len();
                let kept = take_front(&mut kept_left, length(&self.entries.kept)).unwrap_or_default();
                let labels = take_front(&mut labels_left, length(&self.entries.labels)).unwrap_or_default();
                (TileMeasures { statistics, kept, labels }, places)
            })
            .collect();
        let tiles: Vec<TileMeasures> = tiles
            .into_par_iter()
            .enumerate()
            .map(|(number, (mut measures, places))| {
                let ids = places.len() / stride;
                self.measure_tile(number * self.tile, &mut places[..ids * count], &mut measures);
                measures
            })
            .collect();
        let temperature = self.settings.temperature as f64;
        let mut statistics = vec![RowStatistics::NONE; count];
        let (mut kept, mut labels) = (vec![0.0; self.entries.kept.len()], vec![f32::NEG_INFINITY; count]);
        for (number, tile) in tiles.into_iter().enumerate() {
            let first = number * self.tile;
            for (all, part) in statistics.iter_mut().zip(tile.statistics.iter()) {
                *all = all.join(*part, temperature);
            }
            for (entry, logit) in within(&self.entries.kept, first, self.tile).iter().zip(tile.kept.iter()) {
                let logit = *logit;
                kept[entry.slot as usize] = logit;
                let place = RowStatistics { largest: logit, argmax: entry.id, ..RowStatistics::NONE };
                let all = &mut statistics[entry.row as usize];
                *all = all.join(place, temperature);
            }
            for (entry, logit) in within(&self.entries.labels, first, self.tile).iter().zip(tile.labels.iter()) {
                labels[entry.slot as usize] = *logit;
            }
        }
        Measured { statistics, kept, labels }
    }

    fn measure_tile(&self, first: usize, logits: &mut [f32], measures: &mut TileMeasures<'_>) {
        let count = self.count();
        let ids = logits.len() / count;
        let head = self.lm_head.rows(self.width, first, ids);
        let hidden = View::rows(self.hidden, count, self.width, self.width);
        let head = View::rows(&head, ids, self.width, self.width).transposed();
        multiply_into_columns(logits, count, false, hidden, head);
        let at = |entry: &Entry| (entry.id as usize - first) * count + entry.row as usize;
        for (label, entry) in measures.labels.iter_mut().zip(within(&self.entries.labels, first, ids)) {
            *label = logits[at(entry)];
        }
        for (kept, entry) in measures.kept.iter_mut().zip(within(&self.entries.kept, first, ids)) {
            *kept = std::mem::replace(&mut logits[at(entry)], f32::NEG_INFINITY);
        }

        let (mut largest, mut places) = (vec![f32::NEG_INFINITY; count], vec![u32::MAX; count]);
        max_columns(logits, &mut largest, &mut places);
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
        for (row, statistics) in measures.statistics.iter_mut().enumerate() {
            *statistics = RowStatistics {
                rest: scaled[row],
                rest_unscaled: unscaled[row],
                largest: largest[row],
                argmax: if largest[row] > f32::NEG_INFINITY { first as u32 + places[row] } else { u32::MAX },
            };
        }
    }

    /// Values, weights and gradients of the rows' outcomes.
    pub(super) fn finish(&self, measured: &Measured, weigh: &Weigh<'_>) -> Finished {
        let offsets = &self.entries.offsets;
        let found: Vec<_> = (0..self.count())
            .into_par_iter()
            .map_init(Outcomes::default, |outcomes, place| {
                let slots = offsets[place]..offsets[place + 1];
                let mut kept_gradient = vec![0.0; slots.len()];
                let found = finish_row(
                    self.targets,
                    self.live[place],
                    self.settings,
                    &measured.statistics[place],
                    &measured.kept[slots],
                    measured.labels[place],
                    weigh,
                    outcomes,
                    &mut kept_gradient,
                );
                (found, kept_gradient)
            })
            .collect();
        let mut finished = Finished {
            rows: found.iter().map(|(found, _)| (found.measures, found.weights)).collect(),
            dense: DenseColumns::default(),
            kept_gradient: vec![],
            label_gradient: found.iter().map(|(found, _)| found.label_gradient).collect(),
        };
        for (found, kept_gradient) in found {
            finished.dense.push(&found.dense);
            finished.kept_gradient.extend(kept_gradient);
        }
        finished
    }

    /// Makes the gradient of the logits and multiplies it on. `logits` of none are where the gradient of the head comes
    /// to lie.
    pub(super) fn differentiate(&self, logits: Option<&[f32]>, finished: &Finished, results: Results<'_>) {
        let (count, width, add) = (self.count(), self.width, results.add);
        let tiles = self.vocab.div_ceil(self.tile);
        let mut lm_head_grad = results.lm_head;
        let mut hidden_grads = results.hidden;
        let parts: Vec<Part> = (0..PARTS)
            .map(|part| {
                let border = |part: usize| (part * tiles / PARTS * self.tile).min(self.vocab);
                border(part)..border(part + 1)
            })
            .filter(|ids| !ids.is_empty())
            .map(|ids| Part {
                logits: logits.map(|logits| &logits[ids.start * count..ids.end * count]),
                lm_head_grad: take_front(&mut lm_head_grad, ids.len() * width),
                hidden_grad: take_front(&mut hidden_grads, width * count),
                ids,
                add,
            })
            .collect();
        // A room for each thread at work, in one allocation.
        let room = self.tile.min(self.vocab) * count;
        let mut rooms = vec![0.0f32; rayon::current_num_threads().min(PARTS) * room];
        let rooms: Mutex<Vec<_>> = Mutex::new(rooms.chunks_mut(room).collect());
        let mut hidden_grads: Vec<_> = parts
            .into_par_iter()
            .filter_map(|part| {
                let room = rooms.lock().expect("no thread fails here").pop().expect("as many rooms as threads");
                let hidden_grad = self.differentiate_part(part, finished, room);
                rooms.lock().expect("no thread fails here").push(room);
                hidden_grad
            })
            .collect();
        if let Some((sum, others)) = hidden_grads.split_first_mut() {
            for other in others {
                sum.iter_mut().zip(other.iter()).for_each(|(sum, other)| *sum += other);
            }
        }
    }

    /// Gives back the room for the part's gradient of the hidden states.
    fn differentiate_part<'b>(
        &self,
        mut part: Part<'b>,
        finished: &Finished,
        room: &mut [f32],
    ) -> Option<&'b mut [f32]> {
        let (count, width) = (self.count(), self.width);
        let hidden = View::rows(self.hidden, count, width, width);
        for first in part.ids.clone().step_by(self.tile) {
            let (at, ids) = (first - part.ids.start, self.tile.min(part.ids.end - first));
            let mut lm_head_grad = part.lm_head_grad.as_deref_mut().map(|all| &mut all[at * width..][..ids * width]);
            let logits = match (part.logits, &lm_head_grad) {
                (Some(logits), _) => &logits[at * count..][..ids * count],
                (None, Some(gradient)) => &gradient[..ids * count],
                (None, None) => unreachable!("logits are somewhere"),
            };
            let gradient = &mut room[..ids * count];
            self.write_gradient(first, logits, finished, gradient);
            let gradient = View::rows(gradient, ids, count, count);
            if let Some(into) = &mut lm_head_grad {
                multiply(into, width, part.add, 1.0, gradient, hidden, false);
            }
            if let Some(into) = &mut part.hidden_grad {
                let head = self.lm_head.rows(width, first, ids);
                let head = View::rows(&head, ids, width, width);
                multiply_into_columns(into, count, at > 0, gradient.transposed(), head);
            }
        }
        part.hidden_grad
    }

    fn write_gradient(&self, first: usize, logits: &[f32], finished: &Finished, gradient: &mut [f32]) {
        let count = self.count();
        let (dense, temperature) = (&finished.dense, self.settings.temperature);
        if temperature == 1.0 {
            scaled_exp_columns(logits, &dense.shift, 1.0, &dense.soft, gradient);
        } else {
            add_scaled_exp_columns(
                logits,
                [&dense.shift, &dense.shift_unscaled],
                [1.0 / temperature, 1.0],
                [&dense.soft, &dense.hard],
                gradient,
            );
        }
        let ids = logits.len() / count;
        let at = |entry: &Entry| (entry.id as usize - first) * count + entry.row as usize;
        for entry in within(&self.entries.kept, first, ids) {
            gradient[at(entry)] = finished.kept_gradient[entry.slot as usize];
        }
        for entry in within(&self.entries.labels, first, ids) {
            gradient[at(entry)] += finished.label_gradient[entry.row as usize];
        }
    }
}

/// The first `count` values, which what is left of the slice begins after.
fn take_front<'a>(slice: &mut Option<&'a mut [f32]>, count: usize) -> Option<&'a mut [f32]> {
    let (front, rest) = slice.take()?.split_at_mut(count);
    *slice = Some(rest);
    Some(front)
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
