//! Counts between edges: how the rows of a cache are spread.

use std::collections::BTreeMap;

use serde::Serialize;

/// Counts between edges.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Histogram {
    /// Ascending, one more than `counts`. Empty when nothing was counted.
    pub edges: Vec<f64>,
    pub counts: Vec<u64>,
}

/// Nats per bar of an entropy.
const ENTROPY_STEP: f64 = 0.25;
/// Beyond 13 nats (442,413 equal outcomes) there is one bar for all.
const ENTROPY_BARS: usize = 52;
/// Two bars a decade from 10^-8 to 1, and one for what is below.
const TAIL_BARS: usize = 17;
/// Numbers of kept ids get a bar each up to this many.
const KEPT_BARS: u64 = 48;

/// Where a tail mass is counted.
pub(super) fn tail_bar(tail: f64) -> usize {
    if tail < 1e-8 { 0 } else { (((tail.log10() + 8.0) * 2.0) as usize + 1).min(TAIL_BARS - 1) }
}

/// Where an entropy in nats is counted.
pub(super) fn entropy_bar(entropy: f64) -> usize {
    ((entropy / ENTROPY_STEP).max(0.0) as usize).min(ENTROPY_BARS - 1)
}

/// Counts by bar, as long as they have to be.
pub(super) fn count(bars: &mut Vec<u64>, bar: usize) {
    if bars.len() <= bar {
        bars.resize(bar + 1, 0);
    }
    bars[bar] += 1;
}

impl Histogram {
    pub(super) fn of_tails(mut counts: Vec<u64>) -> Histogram {
        if counts.is_empty() {
            return Histogram::default();
        }
        counts.resize(TAIL_BARS, 0);
        let decades = (0..TAIL_BARS).map(|half| 10f64.powf(-8.0 + half as f64 / 2.0));
        Histogram { edges: std::iter::once(0.0).chain(decades).collect(), counts }
    }

    pub(super) fn of_entropies(counts: Vec<u64>) -> Histogram {
        if counts.is_empty() {
            return Histogram::default();
        }
        Histogram { edges: (0..=counts.len()).map(|bar| bar as f64 * ENTROPY_STEP).collect(), counts }
    }

    /// Of how often each number of ids is kept.
    pub(super) fn of_kept(rows: &BTreeMap<u64, u64>) -> Histogram {
        let (Some((&first, _)), Some((&last, _))) = (rows.first_key_value(), rows.last_key_value()) else {
            return Histogram::default();
        };
        let width = (last - first + 1).div_ceil(KEPT_BARS);
        let bars = (last - first) / width + 1;
        let mut counts = vec![0; bars as usize];
        rows.iter().for_each(|(kept, rows)| counts[((kept - first) / width) as usize] += rows);
        Histogram { edges: (0..=bars).map(|bar| (first + bar * width) as f64 - 0.5).collect(), counts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_counted_between_its_edges() {
        for tail in [0.0, 1e-12, 0.9999e-8, 1.0001e-8, 3.5e-5, 0.0999, 0.1001, 0.99, 1.0, 1.0005] {
            let mut bars = vec![];
            count(&mut bars, tail_bar(tail));
            let histogram = Histogram::of_tails(bars);
            let bar = histogram.counts.iter().position(|count| *count == 1).unwrap();
            let (from, to) = (histogram.edges[bar], histogram.edges[bar + 1]);
            assert!(from <= tail && (tail < to || tail >= 1.0), "{tail} between {from} and {to}");
            assert_eq!(histogram.edges.len(), histogram.counts.len() + 1);
        }
        let mut bars = vec![];
        for entropy in [0.1, 0.3, 0.4, -1e-9] {
            count(&mut bars, entropy_bar(entropy));
        }
        let histogram = Histogram::of_entropies(bars);
        assert_eq!((histogram.edges, histogram.counts), (vec![0.0, 0.25, 0.5], vec![2, 2]));
    }

    #[test]
    fn wide_ranges_of_kept_ids_share_bars() {
        let few = Histogram::of_kept(&BTreeMap::from([(2, 5), (4, 1)]));
        assert_eq!((few.edges, few.counts), (vec![1.5, 2.5, 3.5, 4.5], vec![5, 0, 1]));
        let many = Histogram::of_kept(&BTreeMap::from([(1, 1), (2, 1), (200_000, 3)]));
        assert_eq!((many.counts[0], *many.counts.last().unwrap()), (2, 3));
        assert!(many.counts.len() <= 48 && *many.edges.last().unwrap() >= 200_000.0);
        assert_eq!(Histogram::of_kept(&BTreeMap::new()), Histogram::default());
    }
}
