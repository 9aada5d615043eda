//! A teacher with all its layers in memory on one device.

use std::path::Path;

use burn::tensor::Device;
use limbeck_kernels::selection::{RowPlace, Rule, select};

use crate::{
    error::{Error, Result},
    loss::distill::{labels, valid_rows},
    models::{Decoder, TokenLayout},
    selection::Selection,
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets},
};

/// Rows of logits held at once: the vocabulary is wide, so the head runs on a few rows at a time.
const HEAD_ROWS: usize = 256;

/// A teacher, and what is kept of its predictions.
pub struct ResidentTeacher {
    model: Decoder,
    selection: Selection,
    temperatures: Vec<f32>,
}

impl ResidentTeacher {
    /// # Errors
    /// When the checkpoint cannot be loaded, and as [`new`](Self::new).
    pub fn open(checkpoint: &Path, device: &Device, selection: Selection, temperatures: &[f32]) -> Result<Self> {
        Self::new(Decoder::open_for_inference(checkpoint, device)?, selection, temperatures)
    }

    /// # Errors
    /// When the selection is none for the teacher's vocabulary, or there is no temperature.
    pub fn new(model: Decoder, selection: Selection, temperatures: &[f32]) -> Result<Self> {
        if temperatures.is_empty() {
            return Err(Error::usage("no temperature to capture soft targets at", "give one, such as 1.0"));
        }
        let temperatures = temperatures.to_vec();
        let mut teacher = ResidentTeacher { model, selection: Selection::default(), temperatures };
        teacher.set_selection(selection)?;
        Ok(teacher)
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// When the selection is none for the teacher's vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        selection.check(self.model.config.vocab_size).map_err(|unusable| {
            let name = selection.name();
            Error::usage(
                format!("the selection {name} has a {} that {}", unusable.parameter, unusable.problem),
                unusable.tip,
            )
        })?;
        self.selection = selection;
        Ok(())
    }

    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The targets of each sequence, in their order. Rows that predict across documents keep nothing.
    ///
    /// `first_sequence` is the number of the first of them in the whole data set, the others follow it: what is drawn
    /// depends on that number and not on the batch.
    ///
    /// # Errors
    /// When the sequences are too long for the teacher, hold ids it does not know, or its predictions are not finite.
    pub fn targets(&self, sequences: &[PackedSequence], first_sequence: u64) -> Result<Vec<SparseTargets>> {
        let batch = DistillBatch { sequences: sequences.to_vec(), targets: None, row_weights: None };
        let vocab = self.model.config.vocab_size;
        self.model.config.check_seq_len(batch.seq_len())?;
        if let Some(id) = sequences.iter().flat_map(|sequence| &sequence.tokens).find(|&&id| id as usize >= vocab) {
            return Err(Error::usage(
                format!("the data has token id {id}, and the teacher's vocabulary has {vocab} ids"),
                "tokenize the data with the teacher's own tokenizer",
            ));
        }
        let layout = TokenLayout::of_batch(&self.model.config, &batch);
        let (hidden, _) = self.model.forward(&layout);
        let (valid, labels) = (valid_rows(&batch), labels(&batch));
        let (rows, length) = (valid.len(), batch.seq_len());
        let place = |row: usize| RowPlace {
            label: labels[row],
            sequence: first_sequence + (row / length) as u64,
            row: (row % length) as u64,
        };
        let mut all = SparseTargets::empty(&self.temperatures);
        for first in (0..rows).step_by(HEAD_ROWS) {
            let count = HEAD_ROWS.min(rows - first);
            let logits = self.model.logits(hidden.clone().narrow(0, first, count));
            let logits = logits.into_data().try_into_vec::<f32>().expect("logits are f32");
            let places: Vec<RowPlace> = (first..first + count).map(place).collect();
            let kept = select(&logits, vocab, &places, rule(&self.selection), &self.temperatures);
            for (row, kept) in kept.into_iter().enumerate() {
                if !valid[first + row] {
                    all.extend(&self.nothing());
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
                let captures =
                    kept.summaries.into_iter().zip(&self.temperatures).map(|(summary, &temperature)| Capture {
                        temperature,
                        log_probs: summary.log_probs,
                        log_tail: vec![summary.log_tail],
                        label_log_prob: vec![summary.label_log_prob],
                    });
                let captures = captures.collect();
                all.extend(&SparseTargets {
                    offsets: vec![0, kept.ids.len() as u64],
                    ids: kept.ids,
                    captures,
                    kind: self.selection.kind(),
                    log_normalizer: Some(vec![kept.log_normalizer]),
                });
            }
        }
        Ok((0..sequences.len()).map(|number| all.slice(number * length, (number + 1) * length)).collect())
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
