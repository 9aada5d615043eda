//! How a [`Coder`] is made from a sample of a cache's sequences.
//!
//! Three passes over the sample: ids that rows keep after and together with tokens become lists; logistic regression
//! weighs the lists against each other; a trial run of the codec counts the symbols of each context. The second and
//! third read sequences that did not go into the lists, or the lists would look better than they are: a quarter of the
//! sample in turn. Then the lists are made again, of everything. One thread, sums in a fixed order, no function of the system's library: the same
//! sample gives the same coder everywhere.

use super::coder::{Coder, LIST_LENGTH, context};
use super::compact::{QuantisedSequence, write_sequence};
use super::exact_math::{exp, ln};
use super::manifest::QuantiserError;
use super::model::{
    CLASS_WEIGHTS, CLASSES, FACT_WEIGHTS, Hint, History, Known, LARGEST_WEIGHT, Lists, Model, STRENGTHS, UNITS,
    WEIGHTS, class_of, evidence, evidence_of, order_of,
};
use super::quantizer::RowKind;
use super::rans::{ESCAPE, Sink, Table, Tables};
use super::record::{QuantisedRow, RecordShape};
use super::scale::Scale;
use super::walk::Workspace;
use crate::targets::{PackedSequence, SparseTargets};

/// How large a coder may become.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationSettings {
    /// Entries of all lists together; each costs about 1.5 bytes once, and time to load.
    pub list_entries: usize,
    /// Entries of one list; each costs time in every row that it is looked up for. At most 256.
    pub list_length: usize,
}

impl CalibrationSettings {
    /// What suits rows of a kind: the ids of exact rows are found with short lists, which are fast; drawn ones are
    /// everywhere, and long lists are worth their time.
    pub(crate) fn of_kind(kind: RowKind) -> Self {
        let list_length = match kind {
            RowKind::Exact => 40,
            RowKind::ThresholdSampled { .. } | RowKind::Sampled { .. } => 192,
        };
        CalibrationSettings { list_entries: 400_000, list_length }
    }
}

impl Default for CalibrationSettings {
    fn default() -> Self {
        CalibrationSettings::of_kind(RowKind::Exact)
    }
}

/// What an entry of a list costs, in bits: it is worth its place when the sample gains more from it.
const ENTRY_BITS: f64 = 13.0;
/// Pretended occurrences of what is usual, before a token's own count.
const PRIOR: f64 = 4.0;
/// Rows that the weights are fitted to.
const FIT_ROWS: usize = 12_000;
const FIT_PASSES: usize = 2;
/// Contexts that occurred less often share a table.
const LEAST_COUNT: u64 = 48;
/// What a table must save, in bits of the sample, to be kept apart from the one it is most like: what it costs itself, and
/// that all tables together should fit a near cache.
const TABLE_BITS: f64 = 2000.0;
/// Parts of the sample that are left out of the lists in turn.
const FOLDS: usize = 4;

/// A row of the sample, with what stands around it.
struct SampleRow<'a> {
    previous: u32,
    label: u32,
    place: usize,
    row: &'a QuantisedRow,
}

fn rows_of(quantised: &QuantisedSequence) -> impl Iterator<Item = SampleRow<'_>> {
    let sequence = &quantised.sequence;
    let places = (0..sequence.seq_len()).filter(move |place| sequence.is_valid(*place));
    places.zip(&quantised.rows).map(move |(place, row)| SampleRow {
        previous: sequence.tokens[place],
        label: sequence.tokens[place + 1],
        place,
        row,
    })
}

impl Coder {
    /// Learns from sequences of the cache; more of them make records smaller and the coder larger.
    pub fn calibrate<'a>(
        sample: impl Iterator<Item = (&'a PackedSequence, Option<&'a SparseTargets>)>,
        shape: &RecordShape,
        settings: CalibrationSettings,
    ) -> Coder {
        let mut error = QuantiserError::default();
        let sample: Vec<QuantisedSequence> =
            sample.map(|(sequence, targets)| QuantisedSequence::new(sequence, targets, shape, &mut error)).collect();
        let folds = FOLDS.min(sample.len()).max(1);
        let part = |keep: &dyn Fn(usize) -> bool| -> Vec<&QuantisedSequence> {
            sample.iter().enumerate().filter(|(number, _)| keep(number % folds)).map(|(_, sequence)| sequence).collect()
        };
        let mut weights = vec![];
        let mut counts = Counts(vec![[0; 256]; context::COUNT_OF_CONTEXTS]);
        for fold in 0..folds {
            // A sample of one sequence is all there is to learn from.
            let learnt = lists_of(&part(&|number| number != fold || folds == 1), shape.vocab_size, settings);
            let held = part(&|number| number == fold);
            if fold == 0 {
                weights = fit(&learnt, &held, shape);
            }
            let model = Model::new(learnt.classes, learnt.follows, learnt.together, weights.clone());
            let mut space = Workspace::new(shape, &model);
            for sequence in held {
                counts = write_sequence(sequence, shape, &model, &mut space, counts);
            }
        }
        let tables = tables_of(&counts.0);
        let all = lists_of(&part(&|_| true), shape.vocab_size, settings);
        Coder { model: Model::new(all.classes, all.follows, all.together, weights), tables }
    }
}

struct Learnt {
    classes: Vec<u8>,
    follows: Lists,
    together: Lists,
}

/// An entry that a list may get.
struct Entry {
    gain: f64,
    token: u32,
    id: u32,
    strength: u8,
}

fn lists_of(sample: &[&QuantisedSequence], vocab_size: usize, settings: CalibrationSettings) -> Learnt {
    let mut totals = vec![0u32; vocab_size];
    let mut row_count = 0u32;
    let mut by_token: [Vec<(u32, &QuantisedRow)>; 2] = Default::default();
    for sequence in sample {
        sequence.sequence.tokens.iter().for_each(|token| totals[*token as usize] += 1);
        for SampleRow { previous, label, row, .. } in rows_of(sequence) {
            row_count += 1;
            row.ids.iter().for_each(|id| totals[*id as usize] += 1);
            by_token[0].push((previous, row));
            by_token[1].push((label, row));
            if let Some(top) = row.ids.first().filter(|top| **top != label) {
                by_token[1].push((*top, row));
            }
        }
    }
    let odds = |prob: f64| {
        let prob = prob.clamp(1e-7, 0.97);
        ln(prob / (1.0 - prob)) / std::f64::consts::LN_2
    };
    let usual: Vec<f64> =
        totals.iter().map(|total| (f64::from(*total) + 0.05) / (f64::from(row_count) + 1.0)).collect();
    let mut entries: Vec<(usize, Entry)> = vec![];
    let mut counts = vec![0u32; vocab_size];
    for (kind, rows) in by_token.iter_mut().enumerate() {
        rows.sort_by_key(|row| row.0);
        for group in rows.chunk_by(|left, right| left.0 == right.0) {
            let mut seen: Vec<u32> = vec![];
            for id in group.iter().flat_map(|(_, row)| &row.ids) {
                if counts[*id as usize] == 0 {
                    seen.push(*id);
                }
                counts[*id as usize] += 1;
            }
            let start = entries.len();
            for id in seen {
                let count = std::mem::take(&mut counts[id as usize]);
                if count < 2 {
                    continue;
                }
                let before = usual[id as usize];
                let after = (f64::from(count) + PRIOR * before) / (group.len() as f64 + PRIOR);
                let bits = odds(after) - odds(before);
                let gain = f64::from(count) * bits - ENTRY_BITS;
                let strength = bits.round_ties_even();
                if gain > 0.0 && strength >= 1.0 {
                    let strength = strength.min(STRENGTHS as f64 - 1.0) as u8;
                    entries.push((kind, Entry { gain, token: group[0].0, id, strength }));
                }
            }
            entries[start..].sort_by(|left, right| by_gain(&left.1, &right.1));
            entries.truncate(start + settings.list_length.min(LIST_LENGTH));
        }
    }
    entries.sort_by(|left, right| by_gain(&left.1, &right.1).then(left.0.cmp(&right.0)));
    entries.truncate(settings.list_entries);
    let classes: Vec<u8> = totals.iter().map(|total| class_of(*total).0.min(CLASSES as u8 - 1)).collect();
    let (_, places) = order_of(&classes);
    let mut lists = [Lists::default(), Lists::default()];
    for (number, lists) in lists.iter_mut().enumerate() {
        let mut mine: Vec<&Entry> = entries.iter().filter(|entry| entry.0 == number).map(|entry| &entry.1).collect();
        mine.sort_by_key(|entry| (entry.token, entry.id));
        lists.starts.push(0);
        for entry in mine {
            lists.starts.resize(entry.token as usize + 1, lists.hints.len() as u32);
            lists.hints.push(Hint::new(places[entry.id as usize], entry.strength));
        }
        lists.starts.resize(vocab_size + 1, lists.hints.len() as u32);
    }
    let [follows, together] = lists;
    Learnt { classes, follows, together }
}

fn by_gain(left: &Entry, right: &Entry) -> std::cmp::Ordering {
    right.gain.total_cmp(&left.gain).then(left.token.cmp(&right.token)).then(left.id.cmp(&right.id))
}

/// Weights of evidence by logistic regression: is a candidate kept, given all that speaks for it?
fn fit(learnt: &Learnt, sample: &[&QuantisedSequence], shape: &RecordShape) -> Vec<i16> {
    let unit = std::f64::consts::LN_2;
    // Where the sample says nothing, what is sensible: damped evidence, frequency as it was counted.
    let mut weights = vec![0.0; WEIGHTS];
    for kind in [evidence::FOLLOWS, evidence::WITH_LABEL, evidence::WITH_TOP] {
        (0..STRENGTHS).for_each(|strength| weights[kind * STRENGTHS + strength] = 0.5 * unit * strength as f64);
    }
    for kind in [evidence::AFTER_SAME, evidence::AFTER_OTHER, evidence::BEFORE_SAME, evidence::PREVIOUS] {
        (0..STRENGTHS).for_each(|strength| weights[kind * STRENGTHS + strength] = 0.5 * unit * strength as f64);
    }
    weights[evidence::LABEL * STRENGTHS] = 6.0 * unit;
    let rows: usize = sample.iter().map(|sequence| sequence.rows.len()).sum();
    for class in 0..CLASSES {
        weights[CLASS_WEIGHTS + class] = (class as f64 - 64.0) * 0.25 * unit;
    }
    let scale = Scale::new(shape);
    let mut slopes = vec![1e-6; WEIGHTS];
    let model = Model::new(learnt.classes.clone(), learnt.follows.clone(), learnt.together.clone(), vec![0; WEIGHTS]);
    let mut history = History::new(shape.vocab_size);
    let every = (rows / FIT_ROWS).max(1);
    // By place in the model's order: one more than the number of the candidate; whether it is kept.
    let mut numbers = vec![0u32; shape.vocab_size];
    let mut kept = vec![false; shape.vocab_size];
    for pass in 0..FIT_PASSES {
        let rate = 0.3 / (1 + pass) as f64;
        let mut number = 0usize;
        for sequence in sample {
            history.clear();
            for SampleRow { previous, label, place, row } in rows_of(sequence) {
                number += 1;
                if let (Some(&top), true) = (row.ids.first(), number.is_multiple_of(every)) {
                    let mut candidates: Vec<u32> = vec![];
                    let mut features: Vec<Vec<u16>> = vec![];
                    let known = Known { place, previous, label, top };
                    let facts = evidence_of(&model, &history, known, |kind, hints| {
                        for hint in hints {
                            let number = &mut numbers[hint.place() as usize];
                            if *number == 0 {
                                candidates.push(hint.place());
                                *number = candidates.len() as u32;
                                let class = model.classes[model.order[hint.place() as usize] as usize];
                                features.push(vec![(CLASS_WEIGHTS + class as usize) as u16]);
                            }
                            let feature = kind * STRENGTHS + hint.strength() as usize;
                            features[*number as usize - 1].push(feature as u16);
                        }
                    });
                    let facts: Vec<u16> =
                        (0..facts.len()).filter(|fact| facts[*fact]).map(|fact| (FACT_WEIGHTS + fact) as u16).collect();
                    let place_of = |id: &u32| model.places[*id as usize];
                    row.ids.iter().for_each(|id| kept[place_of(id) as usize] = true);
                    for (place, features) in candidates.iter().zip(&features) {
                        numbers[*place as usize] = 0;
                        if *place == place_of(&top) {
                            continue;
                        }
                        let all = || features.iter().chain(&facts).map(|feature| *feature as usize);
                        let sum: f64 = all().map(|feature| weights[feature]).sum();
                        let expected = 1.0 / (1.0 + exp(-sum.clamp(-30.0, 30.0)));
                        let slope = expected - f64::from(u8::from(kept[*place as usize]));
                        for feature in all() {
                            slopes[feature] += slope * slope;
                            weights[feature] -= rate * slope / (slopes[feature] + 1.0).sqrt();
                        }
                    }
                    row.ids.iter().for_each(|id| kept[place_of(id) as usize] = false);
                }
                let hints: Vec<Hint> = (row.ids.iter().zip(&row.levels))
                    .map(|(id, level)| Hint::new(model.places[*id as usize], scale.strength(*level)))
                    .collect();
                history.row(place, previous, label, &hints);
            }
        }
    }
    let largest = f64::from(LARGEST_WEIGHT);
    let fixed = |weight: f64| (weight / unit * f64::from(UNITS)).round_ties_even().clamp(-largest, largest) as i16;
    weights.iter().map(|weight| fixed(*weight)).collect()
}

struct Counts(Vec<[u32; 256]>);

impl Sink for Counts {
    fn symbol(&mut self, context: usize, symbol: u8) {
        if symbol != ESCAPE {
            self.0[context][symbol as usize] += 1;
        }
    }
    fn raw(&mut self, _: u32, _: u32) {}
}

fn tables_of(counts: &[[u32; 256]]) -> Tables {
    let mut tables = vec![];
    let mut by_context = vec![0; counts.len()];
    for (number, start) in context::KINDS.iter().enumerate() {
        let end = context::KINDS.get(number + 1).copied().unwrap_or(counts.len());
        let pooled = tables.len() as u16;
        tables.push(Table::from_counts(&sum_of(&counts[*start..end])));
        by_context[*start..end].fill(pooled);
        let often: Vec<usize> = (*start..end).filter(|context| total_of(&counts[*context]) >= LEAST_COUNT).collect();
        for group in alike(often.iter().map(|context| counts[*context]).collect()) {
            let of_group: Vec<[u32; 256]> = group.iter().map(|number| counts[often[*number]]).collect();
            group.iter().for_each(|number| by_context[often[*number]] = tables.len() as u16);
            tables.push(Table::from_counts(&sum_of(&of_group)));
        }
    }
    Tables::new(tables, by_context)
}

fn total_of(counts: &[u32; 256]) -> u64 {
    counts.iter().map(|count| u64::from(*count)).sum()
}

fn sum_of(counts: &[[u32; 256]]) -> [u32; 256] {
    std::array::from_fn(|symbol| counts.iter().map(|counts| counts[symbol]).sum())
}

/// Groups contexts that are so alike that one table for two of them costs the sample less than [`TABLE_BITS`]: the
/// two that cost least first.
fn alike(counts: Vec<[u32; 256]>) -> Vec<Vec<usize>> {
    let symbols =
        (0..256).rev().find(|symbol| counts.iter().any(|counts| counts[*symbol] > 0)).map_or(0, |last| last + 1);
    // A count's share of what its context costs, in bits.
    let most = counts.iter().map(total_of).sum::<u64>();
    let known: Vec<f64> = (0..most.min(1 << 16)).map(count_bits).collect();
    let bits_of = |count: u64| known.get(count as usize).copied().unwrap_or_else(|| count_bits(count));
    struct Group {
        members: Vec<usize>,
        counts: [u32; 256],
        /// Without the share of the total.
        bits: f64,
        total: u64,
    }
    let cost = |group: &Group| bits_of(group.total) - group.bits;
    let mut groups: Vec<Option<Group>> = counts
        .into_iter()
        .enumerate()
        .map(|(number, counts)| {
            let bits = counts.iter().map(|count| bits_of(u64::from(*count))).sum();
            Some(Group { members: vec![number], counts, bits, total: total_of(&counts) })
        })
        .collect();
    let loss = |left: &Group, right: &Group| {
        let both = left.counts[..symbols].iter().zip(&right.counts[..symbols]);
        let bits: f64 = both.map(|(left, right)| bits_of(u64::from(left + right))).sum();
        bits_of(left.total + right.total) - bits - cost(left) - cost(right)
    };
    // Of each group: the later one that it is most like.
    let nearest = |groups: &[Option<Group>], number: usize| -> Option<(f64, usize)> {
        let group = groups[number].as_ref()?;
        let later = groups.iter().enumerate().skip(number + 1);
        later
            .filter_map(|(other, later)| Some((loss(group, later.as_ref()?), other)))
            .min_by(|left, right| left.0.total_cmp(&right.0))
    };
    let mut best: Vec<Option<(f64, usize)>> = (0..groups.len()).map(|number| nearest(&groups, number)).collect();
    loop {
        let pairs =
            best.iter().enumerate().filter_map(|(number, best)| best.map(|(loss, other)| (loss, number, other)));
        let Some((least, first, second)) = pairs.min_by(|left, right| left.0.total_cmp(&right.0)) else { break };
        if least > TABLE_BITS {
            break;
        }
        let (Some(left), Some(right)) = (groups[first].take(), groups[second].take()) else { break };
        let counts = sum_of(&[left.counts, right.counts]);
        groups[first] = Some(Group {
            members: [left.members, right.members].concat(),
            counts,
            bits: counts.iter().map(|count| bits_of(u64::from(*count))).sum(),
            total: left.total + right.total,
        });
        best[second] = None;
        for number in 0..groups.len() {
            if number == first || best[number].is_some_and(|(_, other)| other == first || other == second) {
                best[number] = nearest(&groups, number);
            } else if let (Some((before, _)), true) = (best[number], number < first)
                && let (Some(group), Some(joined)) = (&groups[number], &groups[first])
            {
                let loss = loss(group, joined);
                if loss < before {
                    best[number] = Some((loss, first));
                }
            }
        }
    }
    groups.into_iter().flatten().map(|group| group.members).collect()
}

/// `count * log2(count)`.
fn count_bits(count: u64) -> f64 {
    if count == 0 { 0.0 } else { count as f64 * ln(count as f64) / std::f64::consts::LN_2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_that_are_alike_share_a_table() {
        let counts = |pairs: &[(usize, u32)]| {
            let mut counts = [0; 256];
            pairs.iter().for_each(|(symbol, count)| counts[*symbol] = *count);
            counts
        };
        let (left, right) = (counts(&[(1, 9000), (2, 1000)]), counts(&[(1, 1000), (2, 9000)]));
        let nearly_left = counts(&[(1, 900), (2, 110)]);
        assert_eq!(alike(vec![left, right, nearly_left, right]), [vec![0, 2], vec![1, 3]]);
        assert_eq!(alike(vec![]), Vec::<Vec<usize>>::new());
    }
}
