//! [`select`](crate::selection::select) over logits that lie in pieces by vocabulary, on devices that each have some of
//! the columns: what each of them works out alone, and what follows from all of it.
//!
//! 1. [`largest`] of each row, whose largest over all shards every shard needs;
//! 2. [`candidates`]: the ids of a shard that may be kept, and what its columns add up to; [`keep`] merges them;
//! 3. [`outside`]: what the shard's columns add up to without the kept ids (added up again, never had by subtraction), and
//!    the label's logit; [`summarise`] makes the row.
//!
//! The order of ids and ties are those of `select`: the larger logit first, of equal ones the smaller id. Only rules
//! whose choice is not drawn are here; a draw runs along the whole row.

use rayon::prelude::*;

use crate::{
    divergence::log_sum_exp,
    row_masses::{BlockSums, RowMasses, block_maxima},
    selection::{RowSummary, Rule, SelectedRow},
    top_k::{by_logit, largest_ids},
    vector_math::max,
};

/// Columns that add up together: shards cut at multiples of it add up what one device does.
pub use crate::row_masses::BLOCK;

/// Some columns of rows of logits.
#[derive(Debug, Clone, Copy)]
pub struct Shard<'a> {
    /// `[N, width]` row-major
    pub logits: &'a [f32],
    pub width: usize,
    /// The id of the first column.
    pub first_id: u32,
}

/// What a shard knows of one row before the kept ids are known.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Candidates {
    /// Ids that may be kept, in descending order of their logits.
    pub ids: Vec<u32>,
    /// Their logits.
    pub logits: Vec<f32>,
    /// What the columns add up to at the first temperature, relative to the row's largest logit.
    pub total: f64,
    /// The same at temperature 1.
    pub total_at_one: f64,
}

/// What is kept of one row.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Kept {
    /// In descending order of their logits; of equal ones the smaller id first. Empty where the row is not finite.
    pub ids: Vec<u32>,
    pub logits: Vec<f32>,
    /// Log of what the whole row adds up to at temperature 1, relative to its largest logit.
    log_total_at_one: f64,
}

/// What a shard knows of one row once the kept ids are known.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outside {
    /// At each temperature: log of what the columns without the kept ids add up to, relative to the largest logit.
    pub log_masses: Vec<f64>,
    /// The label's logit, where the label is one of the columns.
    pub label_logit: Option<f32>,
}

/// Whether a rule's choice can be made from parts of a row.
pub fn is_possible(rule: Rule) -> bool {
    most(rule).is_some()
}

/// The most ids a rule keeps.
fn most(rule: Rule) -> Option<usize> {
    match rule {
        Rule::TopK { k } => Some(k),
        Rule::MinProb { cap, .. } | Rule::TopP { cap, .. } => Some(cap),
        Rule::ThresholdSampled { .. } | Rule::Sampled { .. } => None,
    }
}

impl<'a> Shard<'a> {
    fn rows(&self) -> rayon::slice::Chunks<'a, f32> {
        self.logits.par_chunks(self.width)
    }
}

/// The largest logit of each row of a shard; NaN is passed over.
pub fn largest(shard: Shard<'_>) -> Vec<f32> {
    shard.rows().map(|row| max(&block_maxima(row))).collect()
}

/// What each row of a shard has to offer; `largest` are those of the whole rows.
///
/// # Panics
/// When the rule draws.
pub fn candidates(shard: Shard<'_>, largest: &[f32], rule: Rule, first_temperature: f32) -> Vec<Candidates> {
    let most = most(rule).expect("a rule that does not draw");
    let of_row = |row: &[f32], largest: f32| {
        let BlockSums { largest: maxima, masses } = BlockSums::new(row, first_temperature);
        let masses = RowMasses::of_sums(row, &maxima, masses, largest, first_temperature);
        let total_at_one =
            if first_temperature == 1.0 { masses.total() } else { RowMasses::new(row, largest, 1.0).total() };
        let most = most.min(row.len());
        let local = match rule {
            // The whole row has at least what this shard has, so its bound is at least this one.
            Rule::MinProb { theta, .. } => {
                let mut ids = masses.at_least(theta * masses.total(), &maxima);
                if ids.is_empty() {
                    ids = largest_ids(row, &maxima, 1);
                }
                let order = by_logit(row);
                if ids.len() > most {
                    ids.select_nth_unstable_by(most - 1, order);
                    ids.truncate(most);
                }
                ids.sort_unstable_by(order);
                ids
            }
            _ => largest_ids(row, &maxima, most),
        };
        Candidates {
            logits: local.iter().map(|&id| row[id as usize]).collect(),
            ids: local.into_iter().map(|id| shard.first_id + id).collect(),
            total: masses.total(),
            total_at_one,
        }
    };
    shard.rows().zip(largest).map(|(row, &largest)| of_row(row, largest)).collect()
}

/// What is kept of a row, from the candidates of all its shards in the order of their columns.
pub fn keep(shards: &[&Candidates], largest: f32, rule: Rule, first_temperature: f32) -> Kept {
    let total: f64 = shards.iter().map(|shard| shard.total).sum();
    if !total.is_finite() {
        return Kept::default();
    }
    let log_total_at_one = shards.iter().map(|shard| shard.total_at_one).sum::<f64>().ln();
    let mut all: Vec<(u32, f32)> =
        shards.iter().flat_map(|shard| shard.ids.iter().copied().zip(shard.logits.iter().copied())).collect();
    all.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let log_weight = |logit: f32| scaled(logit, largest, first_temperature);
    let count = match rule {
        Rule::MinProb { theta, cap } => {
            let bound = (theta * total).ln();
            all.iter().take_while(|(_, logit)| log_weight(*logit) >= bound).count().clamp(1, cap)
        }
        Rule::TopP { p, cap } => {
            let (mut reached, wanted) = (0.0, p * total);
            let enough = all.iter().take(cap).position(|(_, logit)| {
                reached += log_weight(*logit).exp();
                reached >= wanted
            });
            enough.map_or(cap, |place| place + 1)
        }
        rule => most(rule).expect("a rule that does not draw"),
    };
    all.truncate(count);
    let (ids, logits) = all.into_iter().unzip();
    Kept { ids, logits, log_total_at_one }
}

/// What each row of a shard has beside the kept ids.
pub fn outside(shard: Shard<'_>, largest: &[f32], kept: &[Kept], labels: &[u32], temperatures: &[f32]) -> Vec<Outside> {
    let columns = shard.first_id..shard.first_id + shard.width as u32;
    let of_row = |row: &[f32], largest: f32, kept: &Kept, label: u32| {
        let mut own: Vec<u32> =
            kept.ids.iter().filter(|id| columns.contains(id)).map(|id| id - shard.first_id).collect();
        own.sort_unstable();
        let log_mass = |&temperature: &f32| match kept.ids.is_empty() {
            true => f64::NAN,
            false => RowMasses::new(row, largest, temperature).log_outside(&own),
        };
        Outside {
            log_masses: temperatures.iter().map(log_mass).collect(),
            label_logit: columns.contains(&label).then(|| row[(label - shard.first_id) as usize]),
        }
    };
    let rows = shard.rows().zip(largest).zip(kept.par_iter().zip(labels));
    rows.map(|((row, &largest), (kept, &label))| of_row(row, largest, kept, label)).collect()
}

/// The row as [`select`](crate::selection::select) gives it, from what all shards have beside the kept ids.
///
/// # Panics
/// When the label is in none of the shards.
pub fn summarise(shards: &[&Outside], largest: f32, kept: &Kept, temperatures: &[f32]) -> SelectedRow {
    if kept.ids.is_empty() {
        let unknown = RowSummary { log_probs: vec![f32::NAN], log_tail: f32::NAN, label_log_prob: f32::NAN };
        return SelectedRow { ids: vec![0], summaries: vec![unknown; temperatures.len()], log_normalizer: f32::NAN };
    }
    let label = shards.iter().find_map(|shard| shard.label_logit).expect("the label is one of the ids");
    let mut log_all_at_one = kept.log_total_at_one;
    // By id, as `select` adds them up.
    let mut ascending: Vec<(u32, f32)> = kept.ids.iter().copied().zip(kept.logits.iter().copied()).collect();
    ascending.sort_unstable_by_key(|(id, _)| *id);
    let summaries = temperatures.iter().enumerate().map(|(number, &temperature)| {
        let parts: Vec<f64> = shards.iter().map(|shard| shard.log_masses[number]).collect();
        let log_outside = log_sum_exp(&parts);
        let log_weight = |logit: f32| scaled(logit, largest, temperature);
        let inside: f64 = ascending.iter().map(|(_, logit)| log_weight(*logit).exp()).sum();
        let log_all = (inside + log_outside.exp()).ln();
        if temperature == 1.0 {
            log_all_at_one = log_all;
        }
        RowSummary {
            log_probs: kept.logits.iter().map(|&logit| (log_weight(logit) - log_all) as f32).collect(),
            log_tail: (log_outside - log_all) as f32,
            label_log_prob: (log_weight(label) - log_all) as f32,
        }
    });
    let summaries = summaries.collect();
    SelectedRow { ids: kept.ids.clone(), summaries, log_normalizer: (largest as f64 + log_all_at_one) as f32 }
}

fn scaled(logit: f32, largest: f32, temperature: f32) -> f64 {
    (logit as f64 - largest as f64) / temperature as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::selection::{RowPlace, select};

    fn rows(vocab: usize, count: usize, scale: f32, seed: u64) -> Vec<f32> {
        let mut state = seed;
        (0..vocab * count)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale
            })
            .collect()
    }

    /// All steps, with the columns cut at `cuts`.
    fn sharded(
        logits: &[f32],
        vocab: usize,
        cuts: &[usize],
        labels: &[u32],
        rule: Rule,
        temperatures: &[f32],
    ) -> Vec<SelectedRow> {
        let bounds = [&[0], cuts, &[vocab]].concat();
        let columns: Vec<(usize, Vec<f32>)> = bounds
            .windows(2)
            .map(|bounds| {
                (bounds[0], logits.chunks(vocab).flat_map(|row| row[bounds[0]..bounds[1]].to_vec()).collect())
            })
            .collect();
        let rows = labels.len();
        let shards: Vec<Shard> = columns
            .iter()
            .map(|(first, logits)| Shard { logits, width: logits.len() / rows, first_id: *first as u32 })
            .collect();
        let maxima: Vec<Vec<f32>> = shards.iter().map(|shard| largest(*shard)).collect();
        let all: Vec<f32> = (0..rows).map(|row| max(&maxima.iter().map(|own| own[row]).collect::<Vec<_>>())).collect();
        let offers: Vec<Vec<Candidates>> =
            shards.iter().map(|shard| candidates(*shard, &all, rule, temperatures[0])).collect();
        let kept: Vec<Kept> = (0..rows)
            .map(|row| {
                let own: Vec<&Candidates> = offers.iter().map(|offers| &offers[row]).collect();
                keep(&own, all[row], rule, temperatures[0])
            })
            .collect();
        let beside: Vec<Vec<Outside>> =
            shards.iter().map(|shard| outside(*shard, &all, &kept, labels, temperatures)).collect();
        (0..rows)
            .map(|row| {
                let own: Vec<&Outside> = beside.iter().map(|beside| &beside[row]).collect();
                summarise(&own, all[row], &kept[row], temperatures)
            })
            .collect()
    }

    const RULES: [Rule; 6] = [
        Rule::TopK { k: 7 },
        Rule::TopK { k: 199 },
        Rule::MinProb { theta: 1e-3, cap: 128 },
        Rule::MinProb { theta: 1e-4, cap: 5 },
        Rule::TopP { p: 0.9, cap: 40 },
        Rule::TopP { p: 1.0, cap: 3 },
    ];

    fn near(a: f32, b: f32) -> bool {
        a == b || (a - b).abs() <= 1e-6 * b.abs().max(1.0)
    }

    #[test]
    fn shards_give_what_the_whole_row_gives() {
        for (vocab, cuts) in [(199, vec![64, 128]), (199, vec![1, 2, 190]), (640, vec![320]), (640, vec![64, 65, 639])]
        {
            for scale in [0.5, 20.0, 90.0] {
                let (count, logits) = (6, rows(vocab, 6, scale, vocab as u64 + scale as u64));
                let labels: Vec<u32> = (0..count).map(|row| (row * 37 % vocab) as u32).collect();
                let places: Vec<RowPlace> =
                    labels.iter().map(|&label| RowPlace { label, sequence: 0, row: 0 }).collect();
                for rule in RULES {
                    for temperatures in [&[1.0][..], &[2.0, 1.0], &[0.5, 3.0]] {
                        let whole = select(&logits, vocab, &places, rule, temperatures);
                        let parts = sharded(&logits, vocab, &cuts, &labels, rule, temperatures);
                        for (part, whole) in parts.iter().zip(&whole) {
                            assert_eq!(part.ids, whole.ids, "{rule:?} {cuts:?} {scale} {temperatures:?}");
                            assert!(near(part.log_normalizer, whole.log_normalizer));
                            for (a, b) in part.summaries.iter().zip(&whole.summaries) {
                                assert!(a.log_probs.iter().zip(&b.log_probs).all(|(a, b)| near(*a, *b)));
                                assert!(near(a.log_tail, b.log_tail), "{} {}", a.log_tail, b.log_tail);
                                assert!(near(a.label_log_prob, b.label_log_prob));
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn of_equal_logits_the_smaller_ids_are_kept_whichever_shard_has_them() {
        let mut logits = vec![0.0f32; 200];
        (logits[150], logits[20]) = (1.0, 1.0);
        let kept = |k| sharded(&logits, 200, &[64, 128], &[3], Rule::TopK { k }, &[1.0])[0].ids.clone();
        assert_eq!(kept(1), [20]);
        assert_eq!(kept(5), [20, 150, 0, 1, 2]);
    }

    #[test]
    fn faint_tails_are_exact_and_what_is_not_finite_shows() {
        let mut logits = vec![-90.0f32; 300];
        logits[70] = 5.0;
        let row = &sharded(&logits, 300, &[64, 192], &[299], Rule::TopK { k: 1 }, &[1.0])[0];
        let truth = 299f64.ln() - 95.0;
        assert!((row.summaries[0].log_tail as f64 - truth).abs() < 1e-4);
        logits[250] = f32::NAN;
        let row = &sharded(&logits, 300, &[64, 192], &[0], Rule::MinProb { theta: 0.1, cap: 4 }, &[1.0, 2.0])[0];
        assert!(row.summaries.iter().all(|summary| summary.log_probs[0].is_nan()) && row.log_normalizer.is_nan());
        let all = [f32::NEG_INFINITY; 128];
        let row = &sharded(&all, 128, &[64], &[0], Rule::TopK { k: 2 }, &[1.0])[0];
        assert!(row.summaries[0].log_probs[0].is_nan());
    }
}
