//! From some most probable ids to a row of a cache: checked, in order, with a tail and a label.

use super::Row;

/// The smallest tail that is written where the kept probabilities come to one or more: what is known is rounded, and a tail
/// of nothing would forbid a student everything else.
pub const LEAST_TAIL: f64 = 1e-8;

/// How far above 0 a logarithm of a probability may be by rounding; what is above is brought down to 0.
pub(crate) const ROUNDING: f32 = 1e-3;

/// The largest sum of a row's probabilities that is taken for rounding where a server computed them.
pub(crate) const LARGEST_SUM: f64 = 1.01;

/// What an import found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImportReport {
    pub documents: u64,
    /// Documents of fewer than two tokens, which predict nothing and are left out.
    pub documents_left_out: u64,
    /// Predictions of the documents.
    pub rows: u64,
    /// Predictions of which nothing was known.
    pub rows_unknown: u64,
    /// Rows whose kept probabilities came to one, or so near that their tail was raised to [`LEAST_TAIL`].
    pub tails_raised: u64,
    /// The most by which the sum of a row's kept probabilities exceeded one.
    pub largest_excess: f64,
    /// Log-probabilities above 0, brought down to it.
    pub log_probs_above_zero: u64,
    /// Rows whose label was neither kept nor given: it got an even share of the tail.
    pub labels_shared: u64,
    /// Rows that keep their label, and those that would if they were about the token before or after it.
    pub(super) hits: [u64; 3],
}

/// A row as the cache has it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct CompleteRow {
    /// In descending order of probability, of equal ones the smaller id first.
    pub ids: Vec<u32>,
    pub log_probs: Vec<f32>,
    pub log_tail: f32,
    pub label_log_prob: f32,
}

/// Completes what is known of one prediction. The error is the problem, for a message that names the record.
pub(crate) fn complete(
    row: Option<&Row>,
    label: u32,
    vocab_size: usize,
    largest_sum: f64,
    report: &mut ImportReport,
) -> Result<CompleteRow, String> {
    report.rows += 1;
    let Some(row) = row.filter(|row| !row.ids.is_empty()) else {
        report.rows_unknown += 1;
        let label_log_prob = -(vocab_size as f64).ln() as f32;
        return Ok(CompleteRow { label_log_prob, ..CompleteRow::default() });
    };
    let mut kept: Vec<(u32, f32)> = row.ids.iter().copied().zip(row.log_probs.iter().copied()).collect();
    for (id, log_prob) in &kept {
        if *id as usize >= vocab_size {
            return Err(format!("the id {id} is outside the vocabulary of {vocab_size}"));
        }
        if !log_prob.is_finite() {
            return Err(format!("the log-probability of the id {id} is {log_prob}"));
        }
    }
    let sum: f64 = kept.iter().map(|(_, log_prob)| f64::from(*log_prob).exp()).sum();
    if sum > largest_sum {
        return Err(format!("its probabilities come to {sum:.4}, so these are not logarithms of probabilities"));
    }
    report.largest_excess = report.largest_excess.max(sum - 1.0);
    for (_, log_prob) in kept.iter_mut().filter(|(_, log_prob)| *log_prob > ROUNDING) {
        *log_prob = 0.0;
        report.log_probs_above_zero += 1;
    }
    kept.sort_by(|left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)));
    let mut ids: Vec<u32> = kept.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("the id {} is there twice", pair[0]));
    }
    let others = vocab_size - kept.len();
    let log_tail = if others == 0 {
        f64::NEG_INFINITY
    } else {
        report.tails_raised += u64::from(1.0 - sum < LEAST_TAIL);
        (1.0 - sum).max(LEAST_TAIL).ln()
    };
    let known = kept.iter().find(|(id, _)| *id == label).map(|(_, log_prob)| *log_prob).or(row.label_log_prob);
    let label_log_prob = known.unwrap_or_else(|| {
        report.labels_shared += 1;
        (log_tail - (others as f64).ln()) as f32
    });
    let (ids, log_probs) = kept.into_iter().unzip();
    Ok(CompleteRow { ids, log_probs, log_tail: log_tail as f32, label_log_prob })
}

impl ImportReport {
    /// Counts whether a row keeps its label, or rather the token before or after it.
    pub(super) fn place(&mut self, row: &Row, before: u32, label: u32, after: Option<u32>) {
        for (hits, token) in self.hits.iter_mut().zip([Some(label), Some(before), after]) {
            *hits += u64::from(token.is_some_and(|token| row.ids.contains(&token)));
        }
    }

    /// What is wrong when rows look to be about another token than their own: whatever wrote them, what follows in a text is
    /// more often among the most probable tokens than its neighbours are.
    pub(super) fn shifted(&self) -> Option<String> {
        let [own, before, after] = self.hits;
        let (other, which) = if before >= after { (before, "before") } else { (after, "after") };
        (self.rows - self.rows_unknown >= 32 && other >= 2 * own + 8).then(|| {
            format!(
                "{own} of the first {} rows keep the token they are about, and {other} the token {which} it: the rows \
                 are shifted by one",
                self.rows
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(kept: &[(u32, f32)]) -> Row {
        Row {
            ids: kept.iter().map(|(id, _)| *id).collect(),
            log_probs: kept.iter().map(|(_, p)| p.ln()).collect(),
            label_log_prob: None,
        }
    }

    #[test]
    fn tails_are_what_the_kept_leave_and_labels_share_them() {
        let mut report = ImportReport::default();
        let known = complete(Some(&row(&[(3, 0.25), (7, 0.5)])), 3, 10, 1.01, &mut report).unwrap();
        assert_eq!((known.ids, known.log_probs), (vec![7, 3], vec![0.5f32.ln(), 0.25f32.ln()]));
        assert!((known.log_tail - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!(known.label_log_prob, 0.25f32.ln());
        let shared = complete(Some(&row(&[(3, 0.25), (7, 0.5)])), 4, 10, 1.01, &mut report).unwrap();
        assert!((shared.label_log_prob - (0.25f32 / 8.0).ln()).abs() < 1e-6);
        let given = Row { label_log_prob: Some(-6.0), ..row(&[(3, 0.25)]) };
        assert_eq!(complete(Some(&given), 4, 10, 1.01, &mut report).unwrap().label_log_prob, -6.0);
        let unknown = complete(None, 4, 10, 1.01, &mut report).unwrap();
        assert_eq!((unknown.log_tail, unknown.label_log_prob, unknown.ids.len()), (0.0, -10f32.ln(), 0));
        assert_eq!((report.rows, report.rows_unknown, report.labels_shared, report.tails_raised), (4, 1, 1, 0));
    }

    #[test]
    fn sums_of_one_and_above_leave_the_least_tail() {
        let mut report = ImportReport::default();
        let renormalised = complete(Some(&row(&[(1, 1.0)])), 5, 10, 1.01, &mut report).unwrap();
        assert!((f64::from(renormalised.log_tail) - LEAST_TAIL.ln()).abs() < 1e-5);
        complete(Some(&row(&[(1, 0.755), (2, 0.25)])), 1, 10, 1.01, &mut report).unwrap();
        assert_eq!(report.tails_raised, 2);
        assert!((report.largest_excess - 0.005).abs() < 1e-6);
        let all = complete(Some(&row(&[(0, 0.5), (1, 0.5)])), 1, 2, 1.01, &mut report).unwrap();
        assert_eq!(all.log_tail, f32::NEG_INFINITY);
    }

    #[test]
    fn what_no_cache_may_hold_is_said() {
        let problem = |row: Row| complete(Some(&row), 0, 10, 1.01, &mut ImportReport::default()).unwrap_err();
        assert_eq!(problem(row(&[(10, 0.5)])), "the id 10 is outside the vocabulary of 10");
        assert_eq!(problem(row(&[(1, f32::NAN)])), "the log-probability of the id 1 is NaN");
        assert_eq!(problem(row(&[(1, 0.25), (1, 0.5)])), "the id 1 is there twice");
        assert_eq!(
            problem(row(&[(1, 0.9), (2, 0.8)])),
            "its probabilities come to 1.7000, so these are not logarithms of probabilities"
        );
    }
}
