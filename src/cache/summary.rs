//! What is in a cache, in numbers a person can judge it by.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::Serialize;

use super::codec::Shape;
use super::compact::RecordParts;
use super::histogram::{Histogram, count, entropy_bar, tail_bar};
use super::manifest::Counts;
use super::reader::CacheReader;
use super::records;
use crate::error::Result;
use crate::targets::{Capture, TargetSource};

/// Sequences looked into at most; evenly spread over larger caches.
const SEQUENCES: u64 = 16_384;
/// Records taken apart, evenly spread.
const RECORDS_READ: u64 = 64;
/// Tail masses kept per capture to find their deciles; evenly thinned out beyond.
const TAILS: usize = 1 << 20;

/// Statistics of a cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub shards: usize,
    /// Of the whole cache, exact.
    pub counts: Counts,
    /// Bytes of all shards, and of the coder's tables.
    pub bytes: u64,
    /// `bytes / counts.valid_rows`, exact.
    pub bytes_per_token: f64,
    /// `8 * bytes / counts.kept_ids`: everything, counted on what is kept. 0 where nothing is.
    pub bits_per_kept: f64,
    /// Sequences that the following statistics looked into; smaller than `counts.sequences` in a large cache.
    pub sequences_read: u64,
    /// Fewest and most ids kept in a valid row. Zero without soft targets.
    pub kept_min: u64,
    pub kept_max: u64,
    /// `counts.kept_ids / counts.valid_rows`, exact.
    pub kept_mean: f64,
    /// Rows by the number of ids they keep.
    pub kept_histogram: Histogram,
    /// One per temperature; empty without soft targets.
    pub captures: Vec<CaptureSummary>,
    /// What the bytes are spent on: each tensor, what entropy coded records are made of, then `headers`.
    pub parts: Vec<Part>,
}

/// Statistics of the valid rows at one temperature.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaptureSummary {
    pub temperature: f32,
    /// Mean probability outside the kept ids.
    pub tail_mean: f64,
    /// The smallest tail mass, its nine deciles, and the largest.
    pub tail_deciles: [f64; 11],
    /// Mean entropy in nats, the tail taken as one outcome: at most the teacher's true entropy.
    pub entropy: f64,
    /// Mean of `-label_log_prob` in nats: the teacher's own loss on this data, at this temperature.
    pub label_loss: f64,
    /// Largest distance of kept mass plus tail mass from 1 in a row.
    pub mass_error: f64,
    /// Rows by the probability outside the kept ids, in half decades.
    pub tail_histogram: Histogram,
    /// Rows by their entropy in nats, the tail taken as one outcome.
    pub entropy_histogram: Histogram,
}

/// Bytes of one tensor over all shards.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    pub name: String,
    pub bytes: u64,
    /// Per valid row.
    pub bytes_per_token: f64,
}

#[derive(Clone, Default)]
struct RowStatistics {
    rows: u64,
    /// Rows by the number of ids they keep.
    kept: BTreeMap<u64, u64>,
    captures: Vec<CaptureSums>,
}

#[derive(Clone, Default)]
struct CaptureSums {
    tail: f64,
    entropy: f64,
    label_loss: f64,
    mass_error: f64,
    tails: Vec<f32>,
    tail_bars: Vec<u64>,
    entropy_bars: Vec<u64>,
}

fn add_bars(mine: &mut Vec<u64>, theirs: &[u64]) {
    mine.resize(mine.len().max(theirs.len()), 0);
    mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
}

impl RowStatistics {
    fn add(mut self, other: RowStatistics) -> RowStatistics {
        self.rows += other.rows;
        other.kept.into_iter().for_each(|(kept, rows)| *self.kept.entry(kept).or_default() += rows);
        self.captures.resize(self.captures.len().max(other.captures.len()), CaptureSums::default());
        for (mine, theirs) in self.captures.iter_mut().zip(other.captures) {
            mine.tail += theirs.tail;
            mine.entropy += theirs.entropy;
            mine.label_loss += theirs.label_loss;
            mine.mass_error = mine.mass_error.max(theirs.mass_error);
            mine.tails.extend(theirs.tails);
            add_bars(&mut mine.tail_bars, &theirs.tail_bars);
            add_bars(&mut mine.entropy_bars, &theirs.entropy_bars);
        }
        self
    }
}

impl CacheReader {
    /// Statistics of the cache. Verifies the shards it looks into.
    ///
    /// # Errors
    /// [`Error::Shard`](crate::Error::Shard) when one is damaged.
    pub fn summary(&self) -> Result<Summary> {
        let manifest = self.manifest();
        let counts = manifest.counts;
        let sequences_read = counts.sequences.min(SEQUENCES);
        let temperatures = manifest.settings.temperatures();
        let mut statistics = RowStatistics::default();
        if !temperatures.is_empty() {
            let rows_read = sequences_read as usize * manifest.settings.seq_len;
            let stride = rows_read.div_ceil(TAILS);
            let parts: Result<Vec<RowStatistics>> = (0..sequences_read)
                .into_par_iter()
                .map(|i| {
                    self.sequence_statistics(
                        (i as u128 * counts.sequences as u128 / sequences_read as u128) as u64,
                        stride,
                    )
                })
                .collect();
            // In the order of the sequences, so that the sums do not depend on the number of cores.
            statistics = parts?.into_iter().fold(statistics, RowStatistics::add);
        }
        let rows = statistics.rows.max(1) as f64;
        let captures = temperatures.iter().zip(statistics.captures).map(|(&temperature, mut sums)| {
            sums.tails.sort_by(f32::total_cmp);
            let last = sums.tails.len().saturating_sub(1);
            let decile = |i: usize| sums.tails.get((last * i + 5) / 10).map_or(0.0, |tail| f64::from(*tail));
            CaptureSummary {
                temperature,
                tail_mean: sums.tail / rows,
                tail_deciles: std::array::from_fn(decile),
                entropy: sums.entropy / rows,
                label_loss: sums.label_loss / rows,
                mass_error: sums.mass_error,
                tail_histogram: Histogram::of_tails(sums.tail_bars),
                entropy_histogram: Histogram::of_entropies(sums.entropy_bars),
            }
        });
        let captures = captures.collect();
        let kept = &statistics.kept;
        let kept_min = kept.first_key_value().map_or(0, |(kept, _)| *kept);
        let kept_max = kept.last_key_value().map_or(0, |(kept, _)| *kept);
        let coder = manifest.coder.as_ref().map_or(0, |coder| coder.bytes);
        let bytes = coder + manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>();
        Ok(Summary {
            shards: manifest.shards.len(),
            counts,
            bytes,
            bytes_per_token: bytes as f64 / counts.valid_rows.max(1) as f64,
            bits_per_kept: if counts.kept_ids == 0 { 0.0 } else { 8.0 * bytes as f64 / counts.kept_ids as f64 },
            sequences_read,
            kept_min,
            kept_max,
            kept_mean: counts.kept_ids as f64 / counts.valid_rows.max(1) as f64,
            kept_histogram: Histogram::of_kept(kept),
            captures,
            parts: self.parts()?,
        })
    }

    fn sequence_statistics(&self, number: u64, stride: usize) -> Result<RowStatistics> {
        let batch = self.read(&[number])?;
        let (sequence, mut statistics) = (&batch.sequences[0], RowStatistics::default());
        let Some(targets) = &batch.targets else { return Ok(statistics) };
        statistics.captures = vec![CaptureSums::default(); targets.captures.len()];
        for row in (0..sequence.seq_len()).filter(|row| sequence.is_valid(*row)) {
            let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
            *statistics.kept.entry(kept.len() as u64).or_default() += 1;
            statistics.rows += 1;
            // The place in the whole cache decides, so that thinning out is even and repeatable.
            let sampled = (number as usize).wrapping_mul(sequence.seq_len()).wrapping_add(row).is_multiple_of(stride);
            for (sums, capture) in statistics.captures.iter_mut().zip(&targets.captures) {
                sums.add_row(capture, kept.clone(), row, sampled);
            }
        }
        Ok(statistics)
    }

    fn parts(&self) -> Result<Vec<Part>> {
        let manifest = self.manifest();
        let per_token = |bytes: u64| bytes as f64 / manifest.counts.valid_rows.max(1) as f64;
        let mut parts: std::collections::BTreeMap<String, u64> = Default::default();
        let mut headers = 0;
        for (number, record) in manifest.shards.iter().enumerate() {
            headers += record.bytes;
            for (name, bytes) in self.tensor_sizes(number)? {
                *parts.entry(name).or_default() += bytes;
                headers -= bytes;
            }
        }
        // What records are made of is estimated from some of them, and made to add up to what they take.
        let mut made_of = vec![];
        if let (Some(records), Some(found)) = (parts.get(records::RECORDS).copied(), self.record_parts()?) {
            let found = [
                ("tokens", found.tokens),
                ("ids", found.ids),
                ("levels", found.levels),
                ("tails", found.tails),
                ("labels", found.labels),
            ];
            let total: f64 = found.iter().map(|(_, bytes)| bytes).sum();
            let share = |bytes: f64| (bytes / total.max(1e-9) * records as f64).round() as u64;
            made_of.extend(found.map(|(name, bytes)| (format!("records: {name}"), share(bytes))));
            parts.remove(records::RECORDS);
        }
        let coder = manifest.coder.iter().map(|coder| ("coder".to_string(), coder.bytes));
        let parts = parts.into_iter().chain(made_of).chain(coder).chain([("headers".to_string(), headers)]);
        Ok(parts.map(|(name, bytes)| Part { name, bytes, bytes_per_token: per_token(bytes) }).collect())
    }

    /// What the records of some sequences are made of, evenly spread over the cache; `None` unless they are entropy
    /// coded.
    fn record_parts(&self) -> Result<Option<RecordParts>> {
        let Some(coder) = self.coder() else { return Ok(None) };
        let shape = Shape::of_settings(&self.manifest().settings);
        let (count, all) = (self.sequence_count().min(RECORDS_READ), self.sequence_count());
        let mut parts = RecordParts::default();
        for place in 0..count {
            let batch = self.read(&[place * all / count])?;
            if !records::add_parts(&mut parts, &batch.sequences[0], batch.targets.as_ref(), &shape, coder) {
                return Ok(None);
            }
        }
        Ok(Some(parts))
    }
}

impl CaptureSums {
    fn add_row(&mut self, capture: &Capture, kept: std::ops::Range<usize>, row: usize, sampled: bool) {
        let log_tail = f64::from(capture.log_tail[row]);
        let tail = log_tail.exp();
        let (mut mass, mut entropy) = (tail, 0.0);
        for log_prob in capture.log_probs[kept].iter().map(|log_prob| f64::from(*log_prob)) {
            mass += log_prob.exp();
            entropy -= log_prob.exp() * log_prob;
        }
        if tail > 0.0 {
            entropy -= tail * log_tail;
        }
        self.tail += tail;
        self.entropy += entropy;
        self.label_loss -= f64::from(capture.label_log_prob[row]);
        self.mass_error = self.mass_error.max((mass - 1.0).abs());
        count(&mut self.tail_bars, tail_bar(tail));
        count(&mut self.entropy_bars, entropy_bar(entropy));
        if sampled {
            self.tails.push(tail as f32);
        }
    }
}
