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
use std::time::Instant;

use burn::tensor::Device;
use limbeck_kernels::host_op;

use super::{
    ahead::Ahead,
    budget::{Fit, StreamSettings, WeightBytes},
    predictions::Predictions,
    sweep::{Halt, Sweep},
};
use crate::{
    checkpoint::{CheckpointReader, Dtype},
    error::{Error, Result},
    models::{DecoderConfig, ends::FinalNorm, parameter::CheckpointWeights},
    quantity::{short_bytes, thousands},
    selection::Selection,
    targets::{PackedSequence, SparseTargets},
};

/// A checkpoint run layer by layer, and what is kept of its predictions.
pub struct StreamedTeacher {
    config: Arc<DecoderConfig>,
    reader: Arc<CheckpointReader>,
    device: Device,
    final_norm: FinalNorm,
    predictions: Predictions,
    seq_len: usize,
    settings: StreamSettings,
    fit: Fit,
    ahead: Ahead,
    counts: StreamCounts,
    /// What the checkpoint had been read when the last sweep ended.
    bytes_before: u64,
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
        let fit = Fit::new(&config, seq_len, &settings, weight_bytes(&reader, device), host_op::runs_on(device))?;
        tracing::debug!("streamed teacher: {fit:?}");
        let final_norm = FinalNorm::load(&config, &CheckpointWeights::new(&reader), device)?;
        let (config, device, counts) = (Arc::new(config), device.clone(), StreamCounts::default());
        let ahead = Ahead::new(config.clone(), reader.clone(), device.clone(), None)?;
        let bytes_before = reader.bytes_read();
        Ok(StreamedTeacher {
            config,
            reader,
            device,
            final_norm,
            predictions,
            seq_len,
            settings,
            fit,
            ahead,
            counts,
            bytes_before,
        })
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
        self.fit.sweep_sequences
    }

    pub fn counts(&self) -> StreamCounts {
        self.counts
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
        for (number, sweep) in sequences.chunks(self.fit.sweep_sequences).enumerate() {
            let first = number * self.fit.sweep_sequences;
            let more = more || first + sweep.len() < sequences.len();
            match self.sweep(sweep, more, stop, &mut |place, targets| give(first + place, targets)) {
                Ok(()) => {}
                Err(Halt::Stopped) => return Ok(false),
                Err(Halt::Failed(error)) => return Err(error),
            }
        }
        Ok(!stop.load(Ordering::Relaxed))
    }

    fn sweep(
        &mut self,
        sequences: &[(u64, &PackedSequence)],
        more: bool,
        stop: &AtomicBool,
        give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>,
    ) -> Result<(), Halt> {
        let began = Instant::now();
        if let Some((number, sequence)) = sequences.iter().find(|(_, sequence)| sequence.seq_len() != self.seq_len) {
            let problem = format!("sequence {number} has {} predictions, not {}", sequence.seq_len(), self.seq_len);
            return Err(Error::usage(problem, "give sequences of one length").into());
        }
        let source = CheckpointWeights::new(&self.reader);
        let sweep = Sweep {
            config: &self.config,
            device: &self.device,
            source: &source,
            predictions: &self.predictions,
            final_norm: &self.final_norm,
            fit: &self.fit,
            spill: self.fit.spill.then_some(self.settings.spill_dir.as_path()),
            length: self.seq_len,
            sequences,
            more,
            stop,
            ahead: &mut self.ahead,
        };
        let experts = sweep.run(give)?;
        let tokens = (sequences.len() * self.seq_len) as u64;
        let bytes_read = self.reader.bytes_read();
        let bytes = bytes_read - std::mem::replace(&mut self.bytes_before, bytes_read);
        self.counts.sweeps += 1;
        self.counts.tokens += tokens;
        self.counts.bytes_read += bytes;
        self.counts.experts_read += experts.read;
        self.counts.experts_left_out += experts.left_out;
        self.counts.spilled_sweeps += self.fit.spill as u64;
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(
            "sweep of {} tokens: {} of weights read, {} experts read and {} left out, hidden states in {}, {:.0} tokens \
             a second",
            thousands(tokens),
            short_bytes(bytes),
            experts.read,
            experts.left_out,
            if self.fit.spill { "a file" } else { "memory" },
            tokens as f64 / seconds
        );
        Ok(())
    }
}

/// What a weight takes. On the processor two bytes if all matrices are bfloat16, else four, and beside that for a moment
/// its stored bytes or, where it is decoded, four; what is put together has a piece of that besides. Elsewhere it is f32.
pub(super) fn weight_bytes(reader: &CheckpointReader, device: &Device) -> WeightBytes {
    if !host_op::runs_on(device) {
        return WeightBytes { kept: 4, reading: 8 };
    }
    let matrices = reader.names().filter_map(|name| Some((name, reader.info(name).ok()?)));
    let each = matrices.filter(|(_, info)| info.shape.len() > 1).map(|(name, info)| {
        let (kept, reading) = match info.dtype {
            Dtype::Bf16 => (2, 2),
            Dtype::F16 => (4, 2),
            _ => (4, 4),
        };
        WeightBytes { kept, reading: if reader.is_assembled(name) { 8 } else { reading } }
    });
    let larger =
        |a: WeightBytes, b: WeightBytes| WeightBytes { kept: a.kept.max(b.kept), reading: a.reading.max(b.reading) };
    each.reduce(larger).unwrap_or(WeightBytes { kept: 4, reading: 8 })
}
