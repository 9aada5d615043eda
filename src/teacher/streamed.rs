//! A teacher whose layers pass by: one layer over a long sweep of tokens, then the next, in bounded memory.
//!
//! A weight is read once for all tokens of a sweep, on a thread of its own while the part before it computes. In a layer
//! with experts the tokens of the whole sweep are grouped by expert, and experts that none of them chose are not read.
//! What is computed of a row is what [`ResidentTeacher`](super::ResidentTeacher) computes, in the same order, so on the
//! processor the bits are the same for any sweep, batch and budget.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use burn::tensor::Device;

use super::{budget::StreamSettings, part_bytes::Beside, passing::Passing, predictions::Predictions, sweep::Halt};
use crate::{
    checkpoint::CheckpointReader,
    error::Result,
    models::DecoderConfig,
    selection::Selection,
    targets::{PackedSequence, SparseTargets},
};

/// A checkpoint run layer by layer, and what is kept of its predictions.
pub struct StreamedTeacher {
    passing: Passing,
    predictions: Predictions,
}

/// What a streamed teacher has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamCounts {
    pub sweeps: u64,
    /// Rows that were computed.
    pub tokens: u64,
    /// Bytes of weights that were read.
    pub bytes_read: u64,
    /// Experts that were read, each once for every sweep in which a token chose it.
    pub experts_read: u64,
    /// Experts that were not read, because no token of a sweep chose them.
    pub experts_left_out: u64,
    /// Sweeps whose hidden states were in a file.
    pub spilled_sweeps: u64,
}

impl StreamedTeacher {
    /// Prepares for sequences of `seq_len` predictions; reads nothing of the weights but the last norm.
    ///
    /// # Errors
    /// When the selection is none for the teacher's vocabulary, the sequences are too long for the teacher, or not even
    /// one of them fits into the memory: then which parts take how much, and the least that would do.
    pub fn new(
        config: DecoderConfig,
        reader: Arc<CheckpointReader>,
        device: &Device,
        selection: Selection,
        temperatures: &[f32],
        seq_len: usize,
        settings: StreamSettings,
    ) -> Result<Self> {
        config.check_seq_len(seq_len)?;
        let predictions = Predictions::new(selection, temperatures, config.vocab_size)?;
        let passing = Passing::new(config, None, reader, device, seq_len, &settings, Beside::default())?;
        Ok(StreamedTeacher { passing, predictions })
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// When the selection is none for the teacher's vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        self.predictions.set_selection(selection)
    }

    /// How many sequences a sweep takes: give as many at a time.
    pub fn sweep_sequences(&self) -> usize {
        self.passing.fit.sweep_sequences
    }

    pub fn counts(&self) -> StreamCounts {
        self.passing.counts
    }

    /// Computes the targets of sequences, each beside its number in the whole data set, and gives each with its place
    /// in `sequences`, in order. `false` when it was asked to stop; what was given until then is right.
    ///
    /// `more`: whether other sequences will follow. Then the weights they pass first are read while the head computes
    /// these, where the memory allows it.
    ///
    /// # Errors
    /// When sequences hold ids that the teacher does not know or are of another length, when weights cannot be read or
    /// hidden states not be kept, when predictions are not finite, and what `give` returns.
    pub fn targets(
        &mut self,
        sequences: &[(u64, &PackedSequence)],
        more: bool,
        stop: &AtomicBool,
        give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>,
    ) -> Result<bool> {
        let size = self.sweep_sequences();
        for (number, sweep) in sequences.chunks(size).enumerate() {
            let first = number * size;
            let more = more || first + sweep.len() < sequences.len();
            let give = &mut |place, targets| give(first + place, targets);
            match self.passing.sweep(None, &self.predictions, sweep, more, stop, give) {
                Ok(()) => {}
                Err(Halt::Stopped) => return Ok(false),
                Err(Halt::Failed(error)) => return Err(error),
            }
        }
        Ok(!stop.load(Ordering::Relaxed))
    }
}
