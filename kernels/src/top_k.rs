//! The `k` most probable ids of a teacher's row: the plainest of the [selections](crate::selection).

use std::{cell::RefCell, cmp::Ordering};

use crate::{
    row_masses::BLOCK,
    selection::{RowPlace, Rule, SelectedRow, select},
    vector_math::{LANES, vectorised},
};

/// Summarises each row of logits by its `k` largest entries.
///
/// # Shapes
/// - `logits` `[N, V]` row-major, `labels` `[N]`; `k <= V`
///
/// A row with a NaN or without a finite largest logit gives NaN log-probabilities, which the caller must refuse.
pub fn top_k(logits: &[f32], vocab: usize, labels: &[u32], k: usize, temperatures: &[f32]) -> Vec<SelectedRow> {
    // Nothing is drawn, so where a row stands makes no difference.
    let places: Vec<RowPlace> = labels.iter().map(|&label| RowPlace { label, sequence: 0, row: 0 }).collect();
    select(logits, vocab, &places, Rule::TopK { k }, temperatures)
}

/// The larger logit first; of equal ones the smaller id.
pub(crate) fn by_logit(row: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + Copy {
    move |a, b| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b))
}

/// The `k` largest entries' ids, largest first. `maxima` are those of the blocks; the row has no NaN.
pub(crate) fn largest_ids(row: &[f32], maxima: &[f32], k: usize) -> Vec<u32> {
    // The k-th largest of the maxima bounds the k-th largest of the row from below.
    let mut sorted = maxima.to_vec();
    let bound = if sorted.len() > k {
        *sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    } else {
        f32::NEG_INFINITY
    };
    let mut candidates = ids_at_least(row, maxima, bound);
    let order = by_logit(row);
    if candidates.len() > k {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    candidates.sort_unstable_by(order);
    candidates
}

/// What a thread looks for candidates in, kept from one row to the next.
#[derive(Default)]
struct Room {
    /// Blocks that have some.
    blocks: Vec<usize>,
    /// Their entries, one behind the other.
    values: Vec<f32>,
}

thread_local! {
    static ROOM: RefCell<Room> = RefCell::default();
}

/// Ids of entries that are at least `bound`, in ascending order.
fn ids_at_least(row: &[f32], maxima: &[f32], bound: f32) -> Vec<u32> {
    ROOM.with_borrow_mut(|Room { blocks, values }| {
        blocks.clear();
        blocks.extend((0..maxima.len()).filter(|&block| maxima[block] >= bound));
        // Brought together first: nothing is decided on the way, so that they wait for memory together.
        values.clear();
        for &block in blocks.iter() {
            values.extend_from_slice(&row[block * BLOCK..row.len().min((block + 1) * BLOCK)]);
        }
        let mut ids = Vec::with_capacity(2 * blocks.len());
        vectorised(
            #[inline(always)]
            || {
                for (&block, values) in blocks.iter().zip(values.chunks(BLOCK)) {
                    let mut first = (block * BLOCK) as u32;
                    let (whole, rest) = values.as_chunks::<LANES>();
                    for chunk in whole {
                        let mut reached = 0;
                        for (lane, &value) in chunk.iter().enumerate() {
                            reached |= ((value >= bound) as u32) << lane;
                        }
                        while reached != 0 {
                            ids.push(first + reached.trailing_zeros());
                            reached &= reached - 1;
                        }
                        first += LANES as u32;
                    }
                    ids.extend((first..).zip(rest).filter(|&(_, &value)| value >= bound).map(|(id, _)| id));
                }
            },
        );
        ids
    })
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
