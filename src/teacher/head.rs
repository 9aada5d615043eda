//! From hidden states to targets, a few rows at a time: a row of logits is as wide as the vocabulary, so all of them are
//! never held.

use std::sync::{Mutex, PoisonError};

use burn::tensor::Tensor;

use super::{predictions::Predictions, resident::HEAD_ROWS};
use crate::{
    error::Result,
    models::Decoder,
    selection::Selection,
    targets::{DistillBatch, SparseTargets},
};

/// What is kept of the predictions that follow from hidden states.
pub struct HeadTargets {
    predictions: Predictions,
    /// For logits, kept from one batch to the next: new pages cost a system as much time as filling them.
    room: Mutex<Vec<f32>>,
}

impl HeadTargets {
    /// # Errors
    /// When the selection is none for the vocabulary, or there is no temperature.
    pub fn new(selection: Selection, temperatures: &[f32], vocab_size: usize) -> Result<Self> {
        let predictions = Predictions::new(selection, temperatures, vocab_size)?;
        Ok(HeadTargets { predictions, room: Mutex::default() })
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// When the selection is none for the vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        self.predictions.set_selection(selection)
    }

    /// # Errors
    /// When the sequences hold ids outside the vocabulary.
    pub fn check_ids(&self, batch: &DistillBatch) -> Result<()> {
        self.predictions.check_ids(batch)
    }

    /// The targets of each sequence of a batch, in their order. `first_sequence` is the number of the first of them in
    /// the whole data set, the others follow it: what is drawn depends on that number.
    ///
    /// # Shapes
    /// - `hidden` `[N, hidden]` after the final norm of `model`, on its device
    ///
    /// # Errors
    /// When a prediction is not finite.
    pub fn of_hidden(
        &self,
        model: &Decoder,
        hidden: Tensor<2>,
        batch: &DistillBatch,
        first_sequence: u64,
    ) -> Result<Vec<SparseTargets>> {
        let length = batch.seq_len();
        let rows = self.predictions.rows(batch, |sequence| first_sequence + sequence as u64);
        let mut all = self.predictions.none();
        for first in (0..rows.len()).step_by(HEAD_ROWS) {
            let count = HEAD_ROWS.min(rows.len() - first);
            let (hidden, rows) = (hidden.clone().narrow(0, first, count), &rows[first..first + count]);
            let numbers = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().expect("models compute in f32");
            match model.packed_head() {
                Some(head) => {
                    let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
                    self.predictions.append_products(&numbers(hidden), head, rows, &mut room, &mut all)?;
                }
                None => self.predictions.append(&numbers(model.logits(hidden)), rows, &mut all)?,
            }
        }
        Ok((0..batch.sequences.len()).map(|number| all.slice(number * length, (number + 1) * length)).collect())
    }
}
