//! Keeping fewer of the ids that a cache keeps: what a tighter selection would have kept of the same rows.
//!
//! Only where nothing is missing: every id that the tighter selection wants must be kept already. What is dropped joins
//! the tail.

use crate::error::{Error, Result};
use crate::selection::Selection;
use crate::targets::{Capture, SparseTargets};

/// Whether rows that were selected by `before` hold all that `after` selects.
///
/// # Errors
/// [`Error::Usage`] saying what is missing.
pub(crate) fn check(before: &Selection, after: &Selection) -> Result<()> {
    use Selection::{MinProb, TopK};
    let refused = |problem: String| {
        Err(Error::usage(
            format!("{after} cannot be taken from a cache of {before}: {problem}"),
            "narrow the selection, or precompute with it",
        ))
    };
    match (before, after) {
        (before, after) if before == after => Ok(()),
        (MinProb { theta: least, .. }, MinProb { theta, .. }) if theta < least => {
            refused(format!("it has no probabilities from {theta} to {least}"))
        }
        (MinProb { .. } | TopK { .. }, MinProb { .. }) | (TopK { .. }, TopK { .. }) => {
            if after.most_ids() > before.most_ids() {
                refused(format!("it keeps {} ids of a row at most, not {}", before.most_ids(), after.most_ids()))
            } else {
                Ok(())
            }
        }
        _ => refused("only min_prob and top_k can be narrowed, to min_prob, and top_k to top_k".into()),
    }
}

/// What `selection` keeps of rows that hold all it wants. The first temperature decides.
pub(crate) fn narrow(targets: &SparseTargets, selection: &Selection) -> SparseTargets {
    let least = match selection {
        Selection::MinProb { theta, .. } => *theta,
        _ => 0.0,
    };
    let first = &targets.captures[0].log_probs;
    let mut narrowed = SparseTargets {
        offsets: vec![0],
        ids: vec![],
        captures: targets
            .captures
            .iter()
            .map(|capture| Capture { log_probs: vec![], log_tail: vec![], ..capture.clone() })
            .collect(),
        kind: targets.kind,
        log_normalizer: targets.log_normalizer.clone(),
        router: targets.router.clone(),
    };
    for row in 0..targets.row_count() {
        let (start, end) = (targets.offsets[row] as usize, targets.offsets[row + 1] as usize);
        // The likeliest id always stays.
        let likely = first[start..end].iter().enumerate();
        let count = likely.take_while(|(place, p)| *place == 0 || f64::from(**p).exp() >= least).count();
        let cut = start + count.min(selection.most_ids());
        narrowed.ids.extend_from_slice(&targets.ids[start..cut]);
        narrowed.offsets.push(narrowed.ids.len() as u64);
        for (narrowed, capture) in narrowed.captures.iter_mut().zip(&targets.captures) {
            narrowed.log_probs.extend_from_slice(&capture.log_probs[start..cut]);
            let mut tail = capture.log_tail[row];
            if cut < end {
                // From the smallest up, so that little is lost.
                let dropped = capture.log_probs[cut..end].iter().rev().map(|p| f64::from(*p).exp());
                tail = (f64::from(tail).exp() + dropped.sum::<f64>()).ln() as f32;
            }
            narrowed.log_tail.push(tail);
        }
    }
    narrowed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_joins_the_tail() {
        let log = |values: &[f32]| values.iter().map(|value| value.ln()).collect::<Vec<f32>>();
        let capture = |temperature, log_probs: &[f32], tails: &[f32]| Capture {
            temperature,
            log_probs: log(log_probs),
            log_tail: log(tails),
            label_log_prob: log(&[0.3, 0.004]),
        };
        let targets = SparseTargets {
            offsets: vec![0, 4, 5],
            ids: vec![5, 2, 9, 1, 7],
            captures: vec![
                capture(1.0, &[0.5, 0.3, 0.1, 0.05, 0.004], &[0.05, 0.996]),
                capture(2.0, &[0.3, 0.2, 0.15, 0.1, 0.01], &[0.25, 0.99]),
            ],
            ..SparseTargets::empty(&[])
        };
        let narrowed = narrow(&targets, &Selection::MinProb { theta: 0.09, cap: 2 });
        assert_eq!((&narrowed.offsets[..], &narrowed.ids[..]), (&[0, 2, 3][..], &[5, 2, 7][..]));
        let tails = |at: usize| narrowed.captures[at].log_tail.iter().map(|tail| tail.exp()).collect::<Vec<f32>>();
        for (found, expected) in tails(0).into_iter().chain(tails(1)).zip([0.2, 0.996, 0.5, 0.99]) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        assert_eq!(narrow(&targets, &Selection::MinProb { theta: 0.09, cap: 9 }).ids, [5, 2, 9, 7]);
        assert_eq!(narrow(&targets, &Selection::TopK { k: 1 }).ids, [5, 7]);
    }

    #[test]
    fn what_a_cache_does_not_have_is_refused() {
        let (top, tight) = (Selection::TopK { k: 64 }, Selection::MinProb { theta: 1e-3, cap: 64 });
        assert!(check(&top, &tight).is_ok() && check(&tight, &Selection::MinProb { theta: 3e-3, cap: 10 }).is_ok());
        let problem = |before: &Selection, after: &Selection| check(before, after).unwrap_err().to_string();
        assert!(problem(&tight, &Selection::MinProb { theta: 1e-4, cap: 8 }).contains("from 0.0001 to 0.001"));
        assert!(problem(&top, &Selection::TopK { k: 65 }).contains("64 ids of a row at most, not 65"));
        assert!(problem(&tight, &Selection::TopK { k: 5 }).contains("only min_prob and top_k can be narrowed"));
    }
}
