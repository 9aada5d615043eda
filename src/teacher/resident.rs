//! A teacher with all its layers in memory on one device.

use std::path::Path;

use burn::tensor::Device;
use limbeck_kernels::top_k::top_k;

use crate::{
    error::{Error, Result},
    loss::distill::{labels, valid_rows},
    models::{Decoder, TokenLayout},
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets},
};

/// Rows of logits held at once: the vocabulary is wide, so the head runs on a few rows at a time.
const HEAD_ROWS: usize = 256;

/// A teacher, and what is kept of its predictions.
pub struct ResidentTeacher {
    model: Decoder,
    top_k: usize,
    temperatures: Vec<f32>,
}

impl ResidentTeacher {
    /// # Errors
    /// When the checkpoint cannot be loaded, or `top_k` is 0 or above the vocabulary.
    pub fn open(checkpoint: &Path, device: &Device, top_k: usize, temperatures: &[f32]) -> Result<Self> {
        Self::new(Decoder::open(checkpoint, device)?, top_k, temperatures)
    }

    pub fn new(model: Decoder, top_k: usize, temperatures: &[f32]) -> Result<Self> {
        let vocab = model.config.vocab_size;
        if top_k == 0 || top_k > vocab {
            return Err(Error::usage(
                format!("top_k is {top_k}, and the teacher's vocabulary has {vocab} ids"),
                format!("set top_k to a number from 1 to {vocab}"),
            ));
        }
        Ok(ResidentTeacher { model, top_k, temperatures: temperatures.to_vec() })
    }

    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The targets of each sequence, in their order. Rows that predict across documents keep nothing.
    ///
    /// # Errors
    /// When the sequences are too long for the teacher, hold ids it does not know, or its predictions are not finite.
    pub fn targets(&self, sequences: &[PackedSequence]) -> Result<Vec<SparseTargets>> {
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
        let rows = valid.len();
        let mut all = SparseTargets::empty(&self.temperatures);
        for first in (0..rows).step_by(HEAD_ROWS) {
            let count = HEAD_ROWS.min(rows - first);
            let logits = self.model.logits(hidden.clone().narrow(0, first, count));
            let logits = logits.into_data().try_into_vec::<f32>().expect("logits are f32");
            let kept = top_k(&logits, vocab, &labels[first..first + count], self.top_k, &self.temperatures);
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
                all.extend(&SparseTargets { offsets: vec![0, kept.ids.len() as u64], ids: kept.ids, captures });
            }
        }
        let length = batch.seq_len();
        Ok((0..sequences.len()).map(|number| all.slice(number * length, (number + 1) * length)).collect())
    }

    /// A row that keeps nothing.
    fn nothing(&self) -> SparseTargets {
        let mut row = SparseTargets::empty(&self.temperatures);
        row.offsets.push(0);
        for capture in &mut row.captures {
            capture.log_tail.push(0.0);
            capture.label_log_prob.push(0.0);
        }
        row
    }
}
