//! The teacher's row in short: the `k` most probable ids, their log-probabilities, and the exact mass of all others.

use rayon::prelude::*;

use crate::vector_math::{exp, max, vectorised};

/// What is kept of one row of logits. Natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct TopKRow {
    /// The `k` largest logits' ids, largest first; of equal logits the smaller id first.
    pub ids: Vec<u32>,
    /// One summary per temperature asked for.
    pub summaries: Vec<RowSummary>,
}

/// The softmax of one row at one temperature, seen through the kept ids.
#[derive(Debug, Clone, PartialEq)]
pub struct RowSummary {
    /// Log-probability of each kept id under the full softmax.
    pub log_probs: Vec<f32>,
    /// Log of the probability of all other ids together, summed over them (never one minus the rest).
    pub log_tail: f32,
    /// Log-probability of the label.
    pub label_log_prob: f32,
}

/// Summarises each row of logits.
///
/// # Shapes
/// - `logits` `[N, V]` row-major, `labels` `[N]`; `k <= V`
///
/// A row with a NaN or without a finite largest logit gives NaN log-probabilities, which the caller must refuse.
pub fn top_k(logits: &[f32], vocab: usize, labels: &[u32], k: usize, temperatures: &[f32]) -> Vec<TopKRow> {
    assert!(k >= 1 && k <= vocab, "k must be between 1 and the vocabulary");
    logits
        .par_chunks(vocab)
        .zip(labels)
        .map(|(row, &label)| {
            let ids = largest_ids(row, k);
            let summaries = temperatures.iter().map(|&t| summarise(row, &ids, label, t)).collect();
            TopKRow { ids, summaries }
        })
        .collect()
}

/// Entries per block of the first pass; the largest of each block bounds the k-th largest of the row from below.
const BLOCK: usize = 32;

fn largest_ids(row: &[f32], k: usize) -> Vec<u32> {
    let mut block_maxima: Vec<f32> = row.chunks(BLOCK).map(max).collect();
    let bound = if block_maxima.len() > k {
        *block_maxima.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut candidates: Vec<u32> = Vec::with_capacity(4 * k);
    for (block, values) in row.chunks(BLOCK).enumerate() {
        let any = vectorised(
            #[inline(always)]
            || values.iter().fold(false, |any, &value| any | (value >= bound)),
        );
        if any {
            let first = (block * BLOCK) as u32;
            candidates.extend((0..values.len() as u32).filter(|&i| values[i as usize] >= bound).map(|i| first + i));
        }
    }
    let order = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if candidates.len() < k {
        // Only NaN entries fail every comparison; keep the row's length so that the caller sees them.
        candidates = (0..row.len() as u32).collect();
    }
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
    candidates
}

fn summarise(row: &[f32], ids: &[u32], label: u32, temperature: f32) -> RowSummary {
    let largest = row[ids[0] as usize];
    let last = row[ids[ids.len() - 1] as usize];
    let inverse = 1.0 / temperature;
    let weight = |value: f32| (((value - largest) * inverse) as f64).exp();
    let kept: f64 = ids.iter().map(|&id| weight(row[id as usize])).sum();
    let mut tail = sum_below(row, last, largest, inverse);
    // Entries equal to the last kept one that were not kept themselves.
    let equal = row.iter().filter(|&&value| value == last).count();
    let equal_kept = ids.iter().filter(|&&id| row[id as usize] == last).count();
    tail += equal.saturating_sub(equal_kept) as f64 * weight(last);
    let log_sum = (kept + tail).ln();
    let log_prob = |id: u32| (((row[id as usize] - largest) * inverse) as f64 - log_sum) as f32;
    RowSummary {
        log_probs: ids.iter().map(|&id| log_prob(id)).collect(),
        log_tail: (tail.ln() - log_sum) as f32,
        label_log_prob: log_prob(label),
    }
}

/// Sum of `exp((value - largest) * inverse)` over the values below `bound`, in f32 lanes over short stretches and in
/// f64 across them.
fn sum_below(row: &[f32], bound: f32, largest: f32, inverse: f32) -> f64 {
    row.chunks(2048)
        .map(|stretch| {
            vectorised(
                #[inline(always)]
                || {
                    let mut lanes = [0.0f32; 16];
                    let chunks = stretch.chunks_exact(16);
                    let rest = chunks.remainder();
                    for chunk in chunks {
                        for lane in 0..16 {
                            let weight = exp((chunk[lane] - largest) * inverse);
                            lanes[lane] += if chunk[lane] < bound || chunk[lane].is_nan() { weight } else { 0.0 };
                        }
                    }
                    for (lane, &value) in rest.iter().enumerate() {
                        let weight = exp((value - largest) * inverse);
                        lanes[lane] += if value < bound || value.is_nan() { weight } else { 0.0 };
                    }
                    lanes.iter().map(|&lane| lane as f64).sum::<f64>()
                },
            )
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle;

    fn row(vocab: usize, seed: u64, scale: f32) -> Vec<f32> {
        let mut state = seed;
        (0..vocab)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * scale
            })
            .collect()
    }

    #[test]
    fn top_k_equals_the_oracle() {
        for (vocab, k, scale) in [(5, 5, 3.0), (199, 7, 30.0), (4096, 64, 12.0), (49_152, 64, 40.0), (1000, 1, 1.0)] {
            for temperature in [0.5, 1.0, 4.0] {
                let logits = row(vocab, 17 + vocab as u64, scale);
                let label = (vocab / 3) as u32;
                let fast = &top_k(&logits, vocab, &[label], k, &[temperature])[0];
                let truth = oracle::top_k(&logits, k, label, temperature as f64);
                assert_eq!(fast.ids, truth.ids);
                let summary = &fast.summaries[0];
                for (a, b) in summary.log_probs.iter().zip(&truth.log_probs) {
                    assert!((*a as f64 - b).abs() < 2e-6 * b.abs().max(1.0), "{a} {b}");
                }
                assert!((summary.label_log_prob as f64 - truth.label_log_prob).abs() < 1e-5);
                if k == vocab {
                    assert_eq!(summary.log_tail, f32::NEG_INFINITY);
                } else {
                    assert!(
                        (summary.log_tail as f64 - truth.log_tail).abs() < 1e-5,
                        "{} {}",
                        summary.log_tail,
                        truth.log_tail
                    );
                }
            }
        }
    }

    #[test]
    fn equal_logits_keep_the_smaller_ids_and_lose_no_mass() {
        let logits = vec![1.0f32; 100];
        let kept = &top_k(&logits, 100, &[99], 10, &[1.0])[0];
        assert_eq!(kept.ids, (0..10).collect::<Vec<u32>>());
        assert!((kept.summaries[0].log_tail - 0.9f32.ln()).abs() < 1e-6);
        assert!((kept.summaries[0].label_log_prob - 0.01f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_tail_of_one_in_a_billion_is_exact() {
        let mut logits = vec![-20.0f32; 1000];
        logits[3] = 1.0;
        let kept = &top_k(&logits, 1000, &[3], 1, &[1.0])[0];
        let truth = (999.0 * (-21.0f64).exp() / (1.0 + 999.0 * (-21.0f64).exp())).ln();
        assert!((kept.summaries[0].log_tail as f64 - truth).abs() < 1e-5);
    }

    #[test]
    fn not_a_number_shows_in_the_summary() {
        let mut logits = row(100, 3, 5.0);
        logits[40] = f32::NAN;
        let kept = &top_k(&logits, 100, &[1], 4, &[1.0])[0];
        assert!(kept.summaries[0].log_probs.iter().any(|p| !p.is_finite()));
    }
}
