//! What is kept of a teacher's row of logits: some ids by a rule, their log-probabilities or weights, and what everything
//! else comes to.
//!
//! The rules come in two kinds. *Exact* ones keep likely ids with their probabilities, and the mass of all others beside
//! them. *Drawn* ones keep ids with weights whose expectation is the teacher's whole distribution: `E[w_v] = p_v` for
//! every v, and nothing stands for the rest. With several temperatures the first decides which ids are kept.
//!
//! Draws take their randomness from ChaCha8 keyed by (seed, number of the sequence, row within it), so that they do not
//! depend on how rows are grouped into batches, files or processes.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use rayon::prelude::*;

use crate::{
    packed_matmul::{Instructions, Operand, PANEL, PackedMatrix, Product, multiply_then},
    profile,
    row_masses::{BLOCK, BlockSums, RowMasses},
    top_k::{by_logit, largest_ids},
    vector_math::max,
};

/// Which ids of a row are kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The `k` most probable; of equal ones the smaller ids.
    TopK { k: usize },
    /// Every id with a probability of at least `theta`, the `cap` most probable of them when there are more, and always
    /// the likeliest.
    MinProb { theta: f64, cap: usize },
    /// The fewest most probable ids that hold `p` together, at most `cap`.
    TopP { p: f64, cap: usize },
    /// Every id with a probability of at least `threshold` as it is, and any other with probability `p / threshold`, then
    /// at weight `threshold`. Systematic: one uniform number per row sets a comb of spacing `threshold` on the running sum
    /// of the smaller probabilities, and the ids its teeth fall on are kept. So each is kept with exactly its chance, and
    /// a row keeps at most `1 / threshold + 1` ids.
    ThresholdSampled { threshold: f64, seed: u64 },
    /// `draws` independent draws with replacement; an id's weight is its share of them.
    Sampled { draws: usize, seed: u64 },
}

/// Where a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowPlace {
    /// The token it predicts.
    pub label: u32,
    /// Number of its sequence in the whole data set.
    pub sequence: u64,
    /// Its number within the sequence.
    pub row: u64,
}

/// What is kept of one row of logits. Natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct SelectedRow {
    /// The kept ids, in descending order of their probability or weight at the first temperature; of equal ones the
    /// smaller id first.
    pub ids: Vec<u32>,
    /// One summary per temperature asked for.
    pub summaries: Vec<RowSummary>,
    /// Log-sum-exp of the logits, undivided.
    pub log_normalizer: f32,
}

/// The softmax of one row at one temperature, seen through the kept ids.
#[derive(Debug, Clone, PartialEq)]
pub struct RowSummary {
    /// Log-probability of each kept id under the full softmax; the log of its weight where ids were drawn.
    pub log_probs: Vec<f32>,
    /// Log of the probability of all other ids together, summed over them (never one minus the rest); `-inf` where ids
    /// were drawn, for their weights stand for all.
    pub log_tail: f32,
    /// Log-probability of the label.
    pub label_log_prob: f32,
}

/// Summarises each row of logits.
///
/// # Shapes
/// - `logits` `[N, V]` row-major, `places` `[N]`
///
/// A row with a NaN or without a finite largest logit gives NaN log-probabilities, which the caller must refuse.
///
/// # Panics
/// When there is no temperature, or the rule keeps nothing: `k` is not from 1 to V, another number is 0.
pub fn select(logits: &[f32], vocab: usize, places: &[RowPlace], rule: Rule, temperatures: &[f32]) -> Vec<SelectedRow> {
    check(rule, vocab, temperatures);
    assert_eq!(logits.len(), vocab * places.len(), "a place for each row");
    let _span = profile::op("log-sum-exp + top-k").with("rows", places.len() as u64);
    let of_row = |(row, place): (&[f32], &RowPlace)| {
        select_row(row, BlockSums::new(row, temperatures[0]), place, rule, temperatures)
    };
    logits.par_chunks(vocab).zip(places).map(of_row).collect()
}

/// Summarises each row of `hidden` times the weights of a head: [`select`] of their products, in pieces of which each is
/// added up while it is in cache. `room` is memory that is used again; its numbers are the logits afterwards.
///
/// # Shapes
/// - `hidden` `[N, D]` row-major, `head` of D inputs and V outputs, `places` `[N]`
///
/// # Panics
/// As [`select`], and when shapes do not fit.
pub fn select_products(
    hidden: &[f32],
    head: &PackedMatrix,
    places: &[RowPlace],
    rule: Rule,
    temperatures: &[f32],
    room: &mut Vec<f32>,
) -> Vec<SelectedRow> {
    let vocab = head.outputs();
    check(rule, vocab, temperatures);
    room.resize(vocab * places.len(), 0.0);
    let span = profile::op("packed product").with("rows", places.len() as u64);
    let pieces =
        multiply_then(Instructions::best(), vec![Product::new(hidden, Operand::Packed(head), room)], |piece| {
            let mut sums = BlockSums::with_capacity(piece.rows.iter().map(|row| row.len().div_ceil(BLOCK)).sum());
            sums.append_each(piece.rows, temperatures[0]);
            (piece.first_row, piece.rows.len(), sums)
        });
    drop(span);
    let _span = profile::op("log-sum-exp + top-k").with("rows", places.len() as u64);
    // Pieces come in the order of their rows and columns, and are cut between blocks.
    const { assert!(BLOCK.is_multiple_of(PANEL)) };
    let of_same_rows: Vec<&[_]> = pieces.chunk_by(|a, b| a.0 == b.0).collect();
    let of_row = |(number, (row, place)): (usize, (&[f32], &RowPlace))| {
        let pieces = of_same_rows[of_same_rows.partition_point(|pieces| pieces[0].0 <= number) - 1];
        let parts = pieces.iter().map(|(first_row, rows, sums)| (sums, *rows, number - first_row));
        select_row(row, BlockSums::of_pieces(parts, vocab.div_ceil(BLOCK)), place, rule, temperatures)
    };
    room.par_chunks(vocab).zip(places).enumerate().map(of_row).collect()
}

fn check(rule: Rule, vocab: usize, temperatures: &[f32]) {
    let keeps = match rule {
        Rule::TopK { k } => k >= 1 && k <= vocab,
        Rule::MinProb { theta, cap } => theta > 0.0 && cap >= 1,
        Rule::TopP { p, cap } => p > 0.0 && cap >= 1,
        Rule::ThresholdSampled { threshold, .. } => threshold > 0.0 && threshold <= 1.0,
        Rule::Sampled { draws, .. } => draws >= 1,
    };
    assert!(keeps, "{rule:?} keeps nothing of {vocab} ids, or more than there are");
    assert!(!temperatures.is_empty(), "a temperature to choose ids at");
}

/// Kept ids, and where their weights come from.
struct Kept {
    ids: Vec<u32>,
    weights: Weights,
}

enum Weights {
    /// Their probabilities.
    Probabilities,
    /// The first `certain` have their probabilities, the others the threshold.
    Threshold { certain: usize, threshold: f64 },
    /// Shares of draws.
    Shares(Vec<f64>),
}

/// `sums` are those of the row at the first temperature.
fn select_row(row: &[f32], sums: BlockSums, place: &RowPlace, rule: Rule, temperatures: &[f32]) -> SelectedRow {
    let BlockSums { largest: maxima, masses } = sums;
    let largest = max(&maxima);
    let first = RowMasses::of_sums(row, &maxima, masses, largest, temperatures[0]);
    if !first.total().is_finite() {
        let unknown = RowSummary { log_probs: vec![f32::NAN], log_tail: f32::NAN, label_log_prob: f32::NAN };
        return SelectedRow { ids: vec![0], summaries: vec![unknown; temperatures.len()], log_normalizer: f32::NAN };
    }
    let kept = keep(row, &maxima, &first, place, rule);
    let mut ascending = kept.ids.clone();
    ascending.sort_unstable();
    let first_log_sum = log_sum(&first, &ascending);
    let mut log_normalizer = None;
    let summaries = temperatures.iter().enumerate().map(|(number, &temperature)| {
        let later = (number > 0).then(|| RowMasses::new(row, largest, temperature));
        let masses = later.as_ref().unwrap_or(&first);
        let (log_outside, log_all) = if number == 0 { first_log_sum } else { log_sum(masses, &ascending) };
        if masses.temperature() == 1.0 {
            log_normalizer = Some(largest as f64 + log_all);
        }
        let log_prob = |id: u32| masses.log_weight(id) - log_all;
        let first_log_prob = |id: u32| first.log_weight(id) - first_log_sum.1;
        // A drawn id's weight is its probability over the chance it was kept with, and that chance is of the first
        // temperature: there the probability falls out.
        let other = |id: u32| if number == 0 { 0.0 } else { log_prob(id) - first_log_prob(id) };
        let log_probs = kept.ids.iter().enumerate().map(|(at, &id)| match &kept.weights {
            Weights::Probabilities => log_prob(id),
            Weights::Threshold { certain, threshold } if at < *certain => match number {
                // Rounding must not put it below those that were drawn.
                0 => log_prob(id).max(threshold.ln()),
                _ => log_prob(id),
            },
            Weights::Threshold { threshold, .. } => threshold.ln() + other(id),
            Weights::Shares(shares) => shares[at].ln() + other(id),
        });
        RowSummary {
            log_probs: log_probs.map(|log_prob| log_prob as f32).collect(),
            log_tail: match kept.weights {
                Weights::Probabilities => (log_outside - log_all) as f32,
                _ => f32::NEG_INFINITY,
            },
            label_log_prob: log_prob(place.label) as f32,
        }
    });
    let summaries = summaries.collect();
    let log_normalizer =
        log_normalizer.unwrap_or_else(|| largest as f64 + RowMasses::new(row, largest, 1.0).total().ln());
    SelectedRow { ids: kept.ids, summaries, log_normalizer: log_normalizer as f32 }
}

/// Log of what lies outside the ids, and of everything, relative to the largest entry.
fn log_sum(masses: &RowMasses<'_>, ascending: &[u32]) -> (f64, f64) {
    let outside = masses.log_outside(ascending);
    let inside: f64 = ascending.iter().map(|&id| masses.log_weight(id).exp()).sum();
    (outside, (inside + outside.exp()).ln())
}

fn keep(row: &[f32], maxima: &[f32], masses: &RowMasses<'_>, place: &RowPlace, rule: Rule) -> Kept {
    let exact = |ids| Kept { ids, weights: Weights::Probabilities };
    match rule {
        Rule::TopK { k } => exact(largest_ids(row, maxima, k)),
        Rule::MinProb { theta, cap } => {
            let mut ids = masses.at_least(theta * masses.total(), maxima);
            if ids.is_empty() {
                return exact(largest_ids(row, maxima, 1));
            }
            let order = by_logit(row);
            if ids.len() > cap {
                ids.select_nth_unstable_by(cap - 1, order);
                ids.truncate(cap);
            }
            ids.sort_unstable_by(order);
            exact(ids)
        }
        Rule::TopP { p, cap } => {
            let mut ids = largest_ids(row, maxima, cap.min(row.len()));
            let (mut reached, wanted) = (0.0, p * masses.total());
            let enough = ids.iter().position(|&id| {
                reached += masses.log_weight(id).exp();
                reached >= wanted
            });
            ids.truncate(enough.map_or(ids.len(), |place| place + 1));
            exact(ids)
        }
        Rule::ThresholdSampled { threshold, seed } => {
            let spacing = threshold * masses.total();
            let mut ids = masses.at_least(spacing, maxima);
            let start = uniform(&mut generator(seed, place)) * spacing;
            let mut drawn = masses.passing(&ids, (0u32..).map(|tooth| start + tooth as f64 * spacing));
            // An id below the spacing has room for one tooth; two are a matter of rounding.
            drawn.dedup();
            ids.sort_unstable_by(by_logit(row));
            let certain = ids.len();
            ids.append(&mut drawn);
            Kept { ids, weights: Weights::Threshold { certain, threshold } }
        }
        Rule::Sampled { draws, seed } => {
            let mut generator = generator(seed, place);
            let mut targets: Vec<f64> = (0..draws).map(|_| uniform(&mut generator) * masses.total()).collect();
            targets.sort_unstable_by(f64::total_cmp);
            let drawn = masses.passing(&[], targets);
            let mut counts: Vec<(usize, u32)> = drawn.chunk_by(|a, b| a == b).map(|run| (run.len(), run[0])).collect();
            counts.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
            let shares = counts.iter().map(|&(count, _)| count as f64 / drawn.len() as f64).collect();
            Kept { ids: counts.into_iter().map(|(_, id)| id).collect(), weights: Weights::Shares(shares) }
        }
    }
}

/// The randomness of one row and of no other.
fn generator(seed: u64, place: &RowPlace) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, number) in key.as_chunks_mut::<8>().0.iter_mut().zip([seed, place.sequence, place.row]) {
        *bytes = number.to_le_bytes();
    }
    ChaCha8Rng::from_seed(key)
}

/// From 0 up to, but not including, 1.
fn uniform(generator: &mut ChaCha8Rng) -> f64 {
    (generator.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
