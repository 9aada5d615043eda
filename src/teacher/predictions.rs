//! What is kept of a teacher's logits: rows of them become rows of [`SparseTargets`]. Knows nothing of models.

use limbeck_kernels::{
    packed_matmul::PackedMatrix,
    selection::{RowPlace, Rule, SelectedRow, select, select_products},
};

use crate::{
    error::{Error, Result},
    loss::distill::{labels, valid_rows},
    selection::Selection,
    targets::{Capture, DistillBatch, SparseTargets},
};

/// Which ids are kept, and at which temperatures.
#[derive(Debug, Clone)]
pub(super) struct Predictions {
    selection: Selection,
    temperatures: Vec<f32>,
    vocab: usize,
}

/// One row of a batch: where it stands, and whether it predicts anything.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    place: RowPlace,
    valid: bool,
}

impl Row {
    /// The token it predicts.
    pub(super) fn label(&self) -> u32 {
        self.place.label
    }
}

impl Predictions {
    /// # Errors
    /// When the selection is none for the vocabulary, or there is no temperature.
    pub(super) fn new(selection: Selection, temperatures: &[f32], vocab: usize) -> Result<Self> {
        if temperatures.is_empty() {
            return Err(Error::usage("no temperature to capture soft targets at", "give one, such as 1.0"));
        }
        let temperatures = temperatures.to_vec();
        let mut predictions = Predictions { selection: Selection::default(), temperatures, vocab };
        predictions.set_selection(selection)?;
        Ok(predictions)
    }

    /// # Errors
    /// When the selection is none for the vocabulary.
    pub(super) fn set_selection(&mut self, selection: Selection) -> Result<()> {
        selection.check(self.vocab).map_err(|unusable| {
            let name = selection.name();
            Error::usage(
                format!("the selection {name} has a {} that {}", unusable.parameter, unusable.problem),
                unusable.tip,
            )
        })?;
        self.selection = selection;
        Ok(())
    }

    /// # Errors
    /// When the sequences hold ids that the teacher does not know.
    pub(super) fn check_ids(&self, batch: &DistillBatch) -> Result<()> {
        let mut ids = batch.sequences.iter().flat_map(|sequence| &sequence.tokens);
        match ids.find(|&&id| id as usize >= self.vocab) {
            None => Ok(()),
            Some(id) => Err(Error::usage(
                format!("the data has token id {id}, and the teacher's vocabulary has {} ids", self.vocab),
                "tokenize the data with the teacher's own tokenizer",
            )),
        }
    }

    /// The rows of a batch; `number` gives each of its sequences its number in the whole data set.
    pub(super) fn rows(&self, batch: &DistillBatch, number: impl Fn(usize) -> u64) -> Vec<Row> {
        let length = batch.seq_len().max(1);
        let rows = valid_rows(batch).into_iter().zip(labels(batch)).enumerate();
        rows.map(|(row, (valid, label))| Row {
            place: RowPlace { label, sequence: number(row / length), row: (row % length) as u64 },
            valid,
        })
        .collect()
    }

    /// No rows yet, at this teacher's temperatures.
    pub(super) fn none(&self) -> SparseTargets {
        SparseTargets::empty(&self.temperatures)
    }

    /// Appends what is kept of some rows' logits. Rows that predict across documents keep nothing.
    ///
    /// # Shapes
    /// - `logits` `[rows, V]` row-major
    ///
    /// # Errors
    /// When a prediction is not finite.
    pub(super) fn append(&self, logits: &[f32], rows: &[Row], targets: &mut SparseTargets) -> Result<()> {
        let places: Vec<RowPlace> = rows.iter().map(|row| row.place).collect();
        let kept = select(logits, self.vocab, &places, self.rule(), &self.temperatures);
        self.append_selected(kept, rows, targets)
    }

    /// Appends what is kept of the products of some rows with a head that is packed, as [`append`](Self::append) would of
    /// their logits. `room` is memory that is used again.
    ///
    /// # Shapes
    /// - `hidden` `[rows, hidden]` row-major
    ///
    /// # Errors
    /// When a prediction is not finite.
    pub(super) fn append_products(
        &self,
        hidden: &[f32],
        head: &PackedMatrix,
        rows: &[Row],
        room: &mut Vec<f32>,
        targets: &mut SparseTargets,
    ) -> Result<()> {
        let places: Vec<RowPlace> = rows.iter().map(|row| row.place).collect();
        let kept = select_products(hidden, head, &places, self.rule(), &self.temperatures, room);
        self.append_selected(kept, rows, targets)
    }

    /// Appends what was kept of some rows. Rows that predict across documents keep nothing.
    ///
    /// # Errors
    /// When a prediction is not finite.
    pub(super) fn append_selected(
        &self,
        kept: Vec<SelectedRow>,
        rows: &[Row],
        targets: &mut SparseTargets,
    ) -> Result<()> {
        for (row, kept) in rows.iter().zip(kept) {
            if !row.valid {
                targets.extend(&self.nothing());
                continue;
            }
            let finite = kept
                .summaries
                .iter()
                .all(|summary| summary.log_probs.iter().all(|p| p.is_finite()) && !summary.log_tail.is_nan());
            if !finite {
                return Err(Error::NotFinite {
                    what: "the teacher's prediction".into(),
                    tip: "check its weights with inspect, or run it in a wider type".into(),
                });
            }
            let captures = kept.summaries.into_iter().zip(&self.temperatures).map(|(summary, &temperature)| Capture {
                temperature,
                log_probs: summary.log_probs,
                log_tail: vec![summary.log_tail],
                label_log_prob: vec![summary.label_log_prob],
            });
            let captures = captures.collect();
            targets.extend(&SparseTargets {
                offsets: vec![0, kept.ids.len() as u64],
                ids: kept.ids,
                captures,
                kind: self.selection.kind(),
                log_normalizer: Some(vec![kept.log_normalizer]),
            });
        }
        Ok(())
    }

    /// What the selection asks of the rows' arithmetic.
    pub(super) fn rule(&self) -> Rule {
        rule(&self.selection)
    }

    pub(super) fn temperatures(&self) -> &[f32] {
        &self.temperatures
    }

    pub(super) fn vocab(&self) -> usize {
        self.vocab
    }

    /// A row that keeps nothing.
    fn nothing(&self) -> SparseTargets {
        let captures = self.temperatures.iter().map(|&temperature| Capture {
            temperature,
            log_probs: vec![],
            log_tail: vec![0.0],
            label_log_prob: vec![0.0],
        });
        let (captures, kind) = (captures.collect(), self.selection.kind());
        SparseTargets { offsets: vec![0, 0], ids: vec![], captures, kind, log_normalizer: Some(vec![0.0]) }
    }
}

/// What the selection asks of the rows' arithmetic.
fn rule(selection: &Selection) -> Rule {
    match *selection {
        Selection::MinProb { theta, cap } => Rule::MinProb { theta, cap },
        Selection::TopK { k } => Rule::TopK { k },
        Selection::TopP { p, cap } => Rule::TopP { p, cap },
        Selection::ThresholdSampled { threshold, seed } => Rule::ThresholdSampled { threshold, seed },
        Selection::Sampled { draws, seed } => Rule::Sampled { draws, seed },
    }
}
