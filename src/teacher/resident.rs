//! A teacher with all its layers in memory on one device.

use std::path::Path;

use burn::tensor::Device;

use super::head::HeadTargets;
use crate::{
    error::Result,
    models::{Decoder, TokenLayout},
    profile::stage,
    selection::Selection,
    targets::{DistillBatch, PackedSequence, SparseTargets},
};

/// Rows of logits held at once: the vocabulary is wide, so the head runs on a few rows at a time.
pub(super) const HEAD_ROWS: usize = 256;

/// A teacher, and what is kept of its predictions.
pub struct ResidentTeacher {
    model: Decoder,
    head: HeadTargets,
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
        let head = HeadTargets::new(selection, temperatures, model.config.vocab_size)?;
        Ok(ResidentTeacher { model, head })
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// When the selection is none for the teacher's vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        self.head.set_selection(selection)
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
        let _span = stage("teacher batch").with("tokens", batch.row_count() as u64);
        self.model.config.check_seq_len(batch.seq_len())?;
        self.head.check_ids(&batch)?;
        let layout = TokenLayout::of_batch(&self.model.config, &batch);
        let (hidden, _) = self.model.forward(&layout);
        self.head.of_hidden(&self.model, hidden, &batch, first_sequence)
    }
}
