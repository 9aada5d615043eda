//! One rank of a teacher on several devices: loads its part of the model, computes its share of the sequences. Whom it
//! listens to, and what happens when something goes wrong, is in [`sharded`](super::sharded).

use std::ops::Range;
use std::sync::{Arc, atomic::AtomicBool};

use burn::tensor::Tensor;
use limbeck_kernels::selection_shard;

use super::{
    ahead::Whole,
    part_bytes::Beside,
    passing::Passing,
    predictions::Predictions,
    rank_model::{Neighbours, RankModel},
    resident::HEAD_ROWS,
    sharded::ShardSettings,
    sharded_head::ShardedHead,
    streamed::StreamCounts,
    sweep::Halt,
    wire::{counts_from, counts_to_bytes, targets_from},
};
use crate::{
    checkpoint::CheckpointReader,
    error::{Error, Result},
    models::{config::FeedForwardConfig, llama4::sharding, parameter::CheckpointWeights},
    parallel::{
        Collective, Place,
        message::{Incoming, Outgoing},
        share,
    },
    targets::{DistillBatch, PackedSequence, SparseTargets},
};

/// Batches, or sweeps, in flight for each stage of a pipeline: with four, a stage waits for a fifth of the time at most.
const BATCHES_PER_STAGE: usize = 4;
/// Most rows that an expert that stays in memory multiplies at once.
const EXPERT_ROWS: usize = 4096;
/// Rows of hidden states that each token of a batch has on its way to experts of other ranks and back: what is gathered,
/// sent, arrived, put together, computed, replied, and taken back, some of it as bytes and as numbers.
const ROWS_TO_EXPERTS: u64 = 9;
/// Rows that each token of a batch has while ranks add up what they have: summands, those of others, and sums.
const ROWS_IN_SUMS: u64 = 4;

/// One rank's part of the work.
pub(super) struct Rank {
    pub settings: ShardSettings,
    place: Place,
    pub predictions: Predictions,
    weights: Weights,
}

enum Weights {
    NotLoaded,
    Resident(Box<RankModel>),
    Streamed(Box<Passing>),
}

impl Rank {
    /// # Errors
    /// When the model does not fit the mesh, or the selection is none for its vocabulary.
    pub(super) fn new(number: usize, settings: &ShardSettings) -> Result<Self> {
        sharding::check(&settings.config, &settings.mesh)
            .map_err(|unfit| Error::usage(format!("the mesh's `{}` {}", unfit.axis, unfit.problem), unfit.tip))?;
        let vocab = settings.config.vocab_size;
        let predictions = Predictions::new(settings.selection.clone(), &settings.temperatures, vocab)?;
        let place = settings.mesh.place(number);
        Ok(Rank { settings: settings.clone(), place, predictions, weights: Weights::NotLoaded })
    }

    /// Loads this rank's weights, or prepares for them to pass by. Gives the bytes that each rank read.
    pub(super) fn load(&mut self, world: &dyn Collective) -> Result<Vec<u64>> {
        let ShardSettings { checkpoint, config, mesh, device, .. } = &self.settings;
        // A reader for each rank, so that each counts its own bytes.
        let reader = Arc::new(CheckpointReader::open(checkpoint)?);
        let source = CheckpointWeights::new(&reader).in_numbers(self.settings.numbers);
        let Some((seq_len, settings)) = &self.settings.streaming else {
            let model = RankModel::load(config, *mesh, self.place, &source, device, EXPERT_ROWS)?;
            self.weights = Weights::Resident(Box::new(model));
            let own = Outgoing::new().number(reader.bytes_read()).into_bytes();
            return world.all_gather(&own)?.iter().map(|bytes| Incoming::new(bytes).number()).collect();
        };
        let whole = Whole { config: Arc::new(config.clone()), mesh: *mesh, place: self.place };
        let (reader, beside) = (reader.clone(), self.beside());
        let mut passing =
            Passing::new(config.clone(), Some(whole), reader.clone(), device, *seq_len, settings, beside)?;
        // They compute in step, so all do as much at once as fits on each.
        let fit = &mut passing.fit;
        let own = [fit.sweep_sequences, fit.batch_sequences, fit.head_rows].map(|number| number as u64);
        let own = own.into_iter().fold(Outgoing::new().number(reader.bytes_read()), Outgoing::number);
        let mut read = vec![];
        for bytes in world.all_gather(&own.into_bytes())? {
            let mut message = Incoming::new(&bytes);
            read.push(message.number()?);
            for number in [&mut fit.sweep_sequences, &mut fit.batch_sequences, &mut fit.head_rows] {
                *number = (*number).min(message.number()? as usize);
            }
        }
        self.weights = Weights::Streamed(Box::new(passing));
        Ok(read)
    }

    /// What a rank takes beside what a streamed teacher on one device does.
    fn beside(&self) -> Beside {
        let ShardSettings { config, mesh, selection, temperatures, .. } = &self.settings;
        let chosen = config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { chosen, .. } => chosen as u64,
        });
        let (chosen, experts, tensor) = (chosen.max().unwrap_or(0), mesh.expert > 1, mesh.tensor > 1);
        let rows = if experts { ROWS_TO_EXPERTS } else { 0 } + if tensor { ROWS_IN_SUMS } else { 0 };
        let (ids, captures) = (selection.most_ids().min(config.vocab_size) as u64, temperatures.len() as u64);
        let targets = 20 + 4 * ids + captures * (4 * ids + 8);
        let in_flight = self.in_flight() as u64;
        // Every rank is told all sequences, and the targets of its own wait for the first rank, as numbers or as bytes.
        let sequences = 24 * in_flight * (mesh.data * mesh.expert) as u64;
        Beside {
            batch_token: 4 * config.hidden_size as u64 * rows,
            sweep_token: sequences + 2 * in_flight * targets,
            // What each of a token's experts gives is kept until all have given theirs.
            states: if experts { chosen.saturating_sub(1) } else { 0 },
            gathered_ids: match tensor && !selection_shard::is_possible(self.predictions.rule()) {
                true => config.vocab_size as u64,
                false => 0,
            },
        }
    }

    /// Batches or sweeps of a rank's own sequences that are computed without asking for more.
    fn in_flight(&self) -> usize {
        if self.settings.mesh.pipeline > 1 { BATCHES_PER_STAGE * self.settings.mesh.pipeline } else { 1 }
    }

    /// How many sequences keep all ranks busy.
    pub(super) fn sequences_at_once(&self) -> usize {
        let mesh = &self.settings.mesh;
        let own = match &self.weights {
            Weights::Streamed(passing) => passing.fit.sweep_sequences,
            _ => self.settings.batch_sequences,
        };
        own * self.in_flight() * mesh.data * mesh.expert
    }

    /// Computes this rank's share of the sequences. Gives its targets on the rank that has them in the end.
    pub(super) fn compute(
        &mut self,
        world: &dyn Collective,
        sequences: &[(u64, PackedSequence)],
    ) -> Result<Option<SparseTargets>> {
        let mesh = self.settings.mesh;
        let owners = mesh.data * mesh.expert;
        let own = share(sequences.len(), owners, self.place.data * mesh.expert + self.place.expert);
        // As many batches, or sweeps, on every rank, some of them empty, for in each layer all ranks meet.
        let most = sequences.len().div_ceil(owners);
        let neighbours = Neighbours::new(world, &mesh);
        let targets = match &mut self.weights {
            Weights::NotLoaded => return Err(not_loaded()),
            Weights::Resident(_) => self.batches(&neighbours, &sequences[own], most)?,
            Weights::Streamed(passing) => {
                let own: Vec<(u64, &PackedSequence)> =
                    sequences[own].iter().map(|(number, sequence)| (*number, sequence)).collect();
                let size = passing.fit.sweep_sequences;
                let (mut targets, sweeps) = (self.predictions.none(), most.div_ceil(size));
                for sweep in 0..sweeps {
                    let now = &own[(sweep * size).min(own.len())..((sweep + 1) * size).min(own.len())];
                    let give = &mut |_, found: SparseTargets| {
                        targets.extend(&found);
                        Ok(())
                    };
                    let (more, never) = (sweep + 1 < sweeps, AtomicBool::new(false));
                    match passing.sweep(Some(&neighbours), &self.predictions, now, more, &never, give) {
                        Ok(()) => {}
                        Err(Halt::Failed(error)) => return Err(error),
                        Err(Halt::Stopped) => unreachable!("nobody asks it to stop"),
                    }
                }
                targets
            }
        };
        let has_targets = self.place.pipeline + 1 == mesh.pipeline && self.place.tensor == 0;
        Ok(has_targets.then_some(targets))
    }

    /// The targets of this rank's own sequences, batch by batch, on the rank that has them in the end.
    fn batches(
        &self,
        neighbours: &Neighbours<'_>,
        own: &[(u64, PackedSequence)],
        most: usize,
    ) -> Result<SparseTargets> {
        let (ShardSettings { config, mesh, batch_sequences: size, .. }, Weights::Resident(model)) =
            (&self.settings, &self.weights)
        else {
            return Err(not_loaded());
        };
        let vocabulary = sharding::vocabulary(config, mesh, self.place);
        let head = ShardedHead {
            group: &neighbours.tensor,
            predictions: &self.predictions,
            first_id: vocabulary.start as u32,
        };
        let mut targets = self.predictions.none();
        let mut append = |hidden: Tensor<2>, range: Range<usize>| {
            let rows = self.predictions.rows(&batch_of(&own[range.clone()]), |row| own[range.start + row].0);
            for first in (0..rows.len()).step_by(HEAD_ROWS) {
                let count = HEAD_ROWS.min(rows.len() - first);
                let logits = model.logits(hidden.clone().narrow(0, first, count));
                head.append(&logits, &rows[first..first + count], &mut targets)?;
            }
            Ok::<_, Error>(())
        };
        for batch in 0..most.div_ceil(*size) {
            let at = |batch: usize| (batch * size).min(own.len());
            let range = at(batch)..at(batch + 1);
            let Some(hidden) = model.forward(neighbours, &batch_of(&own[range.clone()]))? else { continue };
            append(hidden, range)?;
        }
        Ok(targets)
    }

    /// On the first rank: hands out all targets in the order of the sequences, those of one rank at a time.
    pub(super) fn collect(
        &self,
        world: &dyn Collective,
        mut own: Option<SparseTargets>,
        give: &mut dyn FnMut(SparseTargets) -> Result<()>,
    ) -> Result<()> {
        let mesh = &self.settings.mesh;
        for data in 0..mesh.data {
            for expert in 0..mesh.expert {
                let rank = mesh.rank(Place { data, pipeline: mesh.pipeline - 1, expert, tensor: 0 });
                give(match own.take_if(|_| rank == world.rank()) {
                    Some(own) => own,
                    None => {
                        let (temperatures, selection) = (&self.settings.temperatures, &self.settings.selection);
                        targets_from(&world.receive(rank)?, temperatures, selection)?
                    }
                })?;
            }
        }
        Ok(())
    }

    /// What each rank of a streamed teacher has done so far. All ranks call it at once.
    pub(super) fn counts(&self, world: &dyn Collective) -> Result<Vec<StreamCounts>> {
        let Weights::Streamed(passing) = &self.weights else { return Ok(vec![]) };
        let all = world.all_gather(&counts_to_bytes(&passing.counts))?;
        all.iter().map(|bytes| counts_from(bytes)).collect()
    }
}

pub(super) fn not_loaded() -> Error {
    Error::usage("a rank is to compute before it has loaded", "run the same version of this program on every rank")
}

pub(super) fn batch_of(sequences: &[(u64, PackedSequence)]) -> DistillBatch {
    let sequences = sequences.iter().map(|(_, sequence)| sequence.clone()).collect();
    DistillBatch { sequences, targets: None, row_weights: None }
}
