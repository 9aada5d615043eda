//! One row of an answer: whether it is what was asked for, and what of it is kept.

use crate::import::{CompleteRow, Entry, ImportReport, LARGEST_SUM, ROUNDING, Row, complete};
use crate::selection::Selection;

/// What servers write for the logarithm of 0, or less.
const NOTHING: f32 = -9999.0;

/// What is wrong with an answer.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Flaw {
    /// It is half of one: another time it may be whole.
    Cut(String),
    /// Fewer ids than were asked for.
    Few {
        got: usize,
        place: String,
    },
    Wrong(String),
}

impl Flaw {
    /// Says what the flaw is in.
    pub fn about(self, what: &str) -> Flaw {
        match self {
            Flaw::Cut(problem) => Flaw::Cut(problem),
            Flaw::Few { got, .. } => Flaw::Few { got, place: what.into() },
            Flaw::Wrong(problem) => Flaw::Wrong(format!("{what}: {problem}")),
        }
    }
}

/// The likeliest ids of a prediction, in descending order, and the log-probability of the token that comes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Given {
    pub ids: Vec<u32>,
    pub log_probs: Vec<f32>,
    pub label: u32,
    pub label_log_prob: f32,
}

/// Checks the entries of one row. There are `k`, or `k` and the row's own token where it is not among them.
pub(super) fn given(mut entries: Vec<Entry>, label: u32, k: usize) -> Result<Given, Flaw> {
    let own = entries.iter().position(|entry| entry.id == label);
    let Some(own) = own else {
        return Err(Flaw::Wrong(format!("it lacks the token itself, {label}, so it is about another")));
    };
    if let Some(entry) = entries.iter().find(|entry| !entry.log_prob.is_finite() || entry.log_prob > ROUNDING) {
        return Err(Flaw::Wrong(format!("the id {} has the log-probability {}", entry.id, entry.log_prob)));
    }
    let label_log_prob = entries[own].log_prob.min(0.0);
    let ranked = entries.iter().all(|entry| entry.rank.is_some());
    if entries.len() == k + 1 {
        entries.remove(own);
    }
    if entries.len() > k {
        return Err(Flaw::Wrong(format!("it has {} ids, and {k} were asked for", entries.len())));
    }
    if entries.len() < k {
        // A label of a higher rank is there beside the likeliest.
        let beside = entries[own].rank.is_some_and(|rank| rank > entries.len() as u64);
        return Err(Flaw::Few { got: entries.len() - usize::from(beside), place: String::new() });
    }
    if ranked {
        entries.sort_by_key(|entry| entry.rank);
        // The rank of a row's own token counts those that are as likely; that of others is a place in the list.
        let others: Vec<(u32, u64)> = entries
            .iter()
            .filter(|entry| entry.id != label)
            .map(|entry| (entry.id, entry.rank.unwrap_or_default()))
            .collect();
        if let Some((id, rank)) = others.iter().find(|(_, rank)| *rank == 0 || *rank > k as u64) {
            return Err(Flaw::Wrong(format!("the id {id} has rank {rank}, and {k} were asked for")));
        }
        if let Some(pair) = others.windows(2).find(|pair| pair[0].1 == pair[1].1) {
            return Err(Flaw::Wrong(format!("the ids {} and {} both have rank {}", pair[0].0, pair[1].0, pair[0].1)));
        }
    }
    if let Some(pair) = entries.windows(2).find(|pair| pair[0].log_prob < pair[1].log_prob) {
        let problem = format!("the id {} is likelier than {}, which stands before it", pair[1].id, pair[0].id);
        return Err(Flaw::Wrong(problem));
    }
    let possible = entries.iter().filter(|entry| entry.log_prob > NOTHING);
    let (ids, log_probs) = possible.map(|entry| (entry.id, entry.log_prob.min(0.0))).unzip();
    Ok(Given { ids, log_probs, label, label_log_prob })
}

/// What a selection keeps of a row, with the tail that this leaves. The error is the problem, for a message that names the row.
pub(super) fn kept(row: Given, selection: &Selection, vocab_size: usize) -> Result<CompleteRow, String> {
    let probabilities = row.log_probs.iter().map(|log_prob| f64::from(*log_prob).exp());
    let count = match *selection {
        Selection::MinProb { theta, cap } => probabilities.take_while(|p| *p >= theta).count().clamp(1, cap),
        Selection::TopP { p, cap } => {
            let reached = probabilities.scan(0.0, |sum, probability| {
                *sum += probability;
                Some(*sum)
            });
            (reached.take_while(|sum| *sum < p).count() + 1).min(cap)
        }
        _ => row.ids.len(),
    };
    let count = count.min(row.ids.len());
    let kept = Row {
        ids: row.ids[..count].to_vec(),
        log_probs: row.log_probs[..count].to_vec(),
        label_log_prob: Some(row.label_log_prob),
    };
    complete(Some(&kept), row.label, vocab_size, LARGEST_SUM, &mut ImportReport::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(all: &[(u32, f64, u64)]) -> Vec<Entry> {
        let entry = |(id, p, rank): &(u32, f64, u64)| Entry { id: *id, log_prob: p.ln() as f32, rank: Some(*rank) };
        all.iter().map(entry).collect()
    }

    #[test]
    fn the_token_itself_says_its_probability_and_is_kept_only_among_the_likeliest() {
        let beside = given(entries(&[(9, 0.01, 7), (4, 0.5, 1), (2, 0.25, 2)]), 9, 2).unwrap();
        assert_eq!((beside.ids, beside.label_log_prob), (vec![4, 2], 0.01f64.ln() as f32));
        let among = given(entries(&[(2, 0.25, 2), (4, 0.5, 1)]), 2, 2).unwrap();
        assert_eq!((among.ids.clone(), among.label_log_prob), (vec![4, 2], 0.25f64.ln() as f32));
        // As likely as another, the token counts both for its rank.
        let tied = given(entries(&[(2, 0.25, 3), (4, 0.5, 1), (3, 0.25, 3)]), 2, 3).unwrap();
        assert_eq!(tied.ids, [4, 2, 3]);
        let row = kept(among, &Selection::TopK { k: 2 }, 10).unwrap();
        assert!((row.log_tail - 0.25f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn rows_that_are_not_what_was_asked_for_say_how() {
        let wrong = |entries: Vec<Entry>, label, k| match given(entries, label, k).unwrap_err() {
            Flaw::Wrong(problem) => problem,
            flaw => format!("{flaw:?}"),
        };
        assert_eq!(wrong(entries(&[(4, 0.5, 1)]), 9, 1), "it lacks the token itself, 9, so it is about another");
        assert_eq!(wrong(entries(&[(4, 1.5, 1)]), 4, 1), "the id 4 has the log-probability 0.4054651");
        let nan = vec![Entry { id: 4, log_prob: f32::NAN, rank: None }];
        assert_eq!(wrong(nan, 4, 1), "the id 4 has the log-probability NaN");
        let four = entries(&[(1, 0.4, 1), (2, 0.3, 2), (3, 0.2, 3), (4, 0.1, 4)]);
        assert_eq!(wrong(four.clone(), 1, 2), "it has 4 ids, and 2 were asked for");
        assert_eq!(given(four.clone(), 1, 9), Err(Flaw::Few { got: 4, place: String::new() }));
        assert_eq!(given(entries(&[(1, 0.4, 1), (7, 0.1, 8)]), 7, 9), Err(Flaw::Few { got: 1, place: String::new() }));
        let rising = entries(&[(1, 0.3, 1), (2, 0.4, 2)]);
        assert_eq!(wrong(rising, 1, 2), "the id 2 is likelier than 1, which stands before it");
        let gap = entries(&[(1, 0.3, 1), (2, 0.2, 9), (9, 0.1, 12)]);
        assert_eq!(wrong(gap, 9, 2), "the id 2 has rank 9, and 2 were asked for");
    }

    #[test]
    fn selections_take_the_head_of_what_came() {
        let row = |probabilities: &[f64]| Given {
            ids: (0..probabilities.len() as u32).collect(),
            log_probs: probabilities.iter().map(|p| p.ln() as f32).collect(),
            label: 40,
            label_log_prob: -9.0,
        };
        let count = |selection: Selection| kept(row(&[0.5, 0.2, 0.1, 0.05]), &selection, 50).unwrap().ids.len();
        assert_eq!(count(Selection::TopK { k: 4 }), 4);
        assert_eq!(count(Selection::MinProb { theta: 0.09, cap: 4 }), 3);
        assert_eq!(count(Selection::MinProb { theta: 0.9, cap: 4 }), 1);
        assert_eq!(count(Selection::MinProb { theta: 0.01, cap: 2 }), 2);
        assert_eq!(count(Selection::TopP { p: 0.6, cap: 4 }), 2);
        assert_eq!(count(Selection::TopP { p: 0.99, cap: 4 }), 4);
        let tail = kept(row(&[0.5, 0.2]), &Selection::TopP { p: 0.4, cap: 4 }, 50).unwrap();
        assert!((tail.log_tail - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(tail.label_log_prob, -9.0);
    }
}
