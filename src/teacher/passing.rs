//! A model whose layers pass by, or one rank's part of it: sweep after sweep over it, within a budget. What is made of its
//! predictions is for the caller to say.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, atomic::AtomicBool};
use std::time::Instant;

use burn::tensor::Device;
use limbeck_kernels::{host_op, packed_matmul::Numbers};

use super::{
    ahead::{Ahead, Whole},
    budget::{Fit, StreamSettings},
    part_bytes::{Beside, WeightBytes},
    predictions::Predictions,
    rank_model::Neighbours,
    streamed::StreamCounts,
    sweep::{Halt, Sweep},
};
use crate::{
    checkpoint::{CheckpointReader, Dtype},
    error::{Error, Result},
    models::{DecoderConfig, WeightSource, ends::FinalNorm, llama4::sharding, parameter::CheckpointWeights},
    profile::stage,
    quantity::{short_bytes, thousands},
    targets::{PackedSequence, SparseTargets},
};

/// A model, of which one or two layers are in memory at a time.
pub(super) struct Passing {
    /// As it is computed here: on a rank with its numbers of heads, widths and ids.
    config: Arc<DecoderConfig>,
    part_of: Option<Whole>,
    layers: Range<usize>,
    ids: Range<usize>,
    reader: Arc<CheckpointReader>,
    device: Device,
    final_norm: FinalNorm,
    seq_len: usize,
    spill_dir: PathBuf,
    /// Ranks that compute together have the same numbers of sequences and rows in it.
    pub fit: Fit,
    ahead: Ahead,
    numbers: Numbers,
    pub counts: StreamCounts,
    /// What the checkpoint had been read when the last sweep ended.
    bytes_before: u64,
}

impl Passing {
    /// Reads nothing of the weights but the last norm. `beside`: what is needed for one rank of several.
    ///
    /// # Errors
    /// When not even one sequence fits into the memory: then which parts take how much, and the least that would do.
    pub(super) fn new(
        whole: DecoderConfig,
        part_of: Option<Whole>,
        reader: Arc<CheckpointReader>,
        device: &Device,
        seq_len: usize,
        settings: &StreamSettings,
        beside: Beside,
    ) -> Result<Self> {
        let (layers, ids, config) = match &part_of {
            None => (0..whole.layers.len(), 0..whole.vocab_size, whole),
            Some(Whole { mesh, place, .. }) => {
                let ids = sharding::vocabulary(&whole, mesh, *place);
                let own = sharding::own_config(&whole, mesh, *place);
                (sharding::layers(&whole, mesh, *place), ids.clone(), DecoderConfig { vocab_size: ids.len(), ..own })
            }
        };
        let here = DecoderConfig { layers: config.layers[layers.clone()].to_vec(), ..config.clone() };
        let weight = weight_bytes(&reader, device, part_of.as_ref().map_or(1, |whole| whole.mesh.tensor));
        let fit = Fit::new(&here, seq_len, settings, weight, host_op::runs_on(device), beside)?;
        tracing::debug!("streamed teacher: {fit:?}");
        let final_norm = FinalNorm::load(&config, &CheckpointWeights::new(&reader), device)?;
        let config = Arc::new(config);
        let ahead = Ahead::new(config.clone(), reader.clone(), device.clone(), part_of.clone(), settings.numbers)?;
        Ok(Passing {
            bytes_before: reader.bytes_read(),
            device: device.clone(),
            spill_dir: settings.spill_dir.clone(),
            counts: StreamCounts::default(),
            config,
            part_of,
            layers,
            ids,
            reader,
            final_norm,
            seq_len,
            fit,
            ahead,
            numbers: settings.numbers,
        })
    }

    /// One sweep over these sequences, at most as many as fit. With `neighbours`, all ranks at once, those that have no
    /// sequences too. Gives each sequence's targets with its place, in order, where this rank has them.
    ///
    /// # Errors
    /// As of a streamed teacher.
    pub(super) fn sweep(
        &mut self,
        neighbours: Option<&Neighbours<'_>>,
        predictions: &Predictions,
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
        let weights = CheckpointWeights::new(&self.reader).in_numbers(self.numbers);
        let slices = self.part_of.as_ref().map(|whole| whole.slices(&weights));
        let source: &dyn WeightSource = match &slices {
            Some(slices) => slices,
            None => &weights,
        };
        let sweep = Sweep {
            config: &self.config,
            device: &self.device,
            source,
            layers: self.layers.clone(),
            first_id: self.ids.start,
            neighbours,
            predictions,
            final_norm: &self.final_norm,
            fit: &self.fit,
            spill: self.fit.spill.then_some(self.spill_dir.as_path()),
            length: self.seq_len,
            sequences,
            more,
            stop,
            ahead: &mut self.ahead,
        };
        let span = stage("sweep").with("tokens", (sequences.len() * self.seq_len) as u64);
        let experts = sweep.run(give)?;
        drop(span);
        let tokens = (sequences.len() * self.seq_len) as u64;
        let bytes_read = self.reader.bytes_read();
        let bytes = bytes_read - std::mem::replace(&mut self.bytes_before, bytes_read);
        self.counts.sweeps += 1;
        self.counts.tokens += tokens;
        self.counts.bytes_read += bytes;
        self.counts.experts_read += experts.read;
        self.counts.experts_left_out += experts.left_out;
        self.counts.spilled_sweeps += self.fit.spill as u64;
        if neighbours.is_some_and(|neighbours| neighbours.world.rank() > 0) {
            return Ok(());
        }
        let seconds = began.elapsed().as_secs_f64();
        tracing::info!(
            "sweep of {} tokens{}: {} of weights read, {} experts read and {} left out, hidden states in {}, {:.0} \
             tokens a second",
            thousands(tokens),
            if neighbours.is_some() { " on the first device" } else { "" },
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
/// its stored bytes or, where it is decoded, four; what is put together has a piece of that besides. Elsewhere it is f32. `tensor`: how many ranks have
/// parts of a matrix.
fn weight_bytes(reader: &CheckpointReader, device: &Device, tensor: usize) -> WeightBytes {
    if !host_op::runs_on(device) {
        return WeightBytes { kept: 4, reading: 8 * tensor as u64 };
    }
    let matrices = reader.names().filter_map(|name| Some((name, reader.info(name).ok()?)));
    let each = matrices.filter(|(_, info)| info.shape.len() > 1).map(|(name, info)| {
        let (kept, reading) = match info.dtype {
            Dtype::Bf16 => (2, 2),
            Dtype::F16 => (4, 2),
            _ => (4, 4),
        };
        // What is decoded, or put together, is so in whole rows, of which a rank may want a part.
        let is_stored = !reader.is_assembled(name) && matches!(info.dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32);
        let reading = if reader.is_assembled(name) { 8 } else { reading };
        WeightBytes { kept, reading: if is_stored { reading } else { reading * tensor as u64 } }
    });
    let larger =
        |a: WeightBytes, b: WeightBytes| WeightBytes { kept: a.kept.max(b.kept), reading: a.reading.max(b.reading) };
    each.reduce(larger).unwrap_or(WeightBytes { kept: 4, reading: 8 })
}
