//! A teacher on several devices. The first rank is told which targets are wanted, tells the others, and collects what
//! they found; each rank has a part of the weights and computes a part of the tokens, as the mesh says.
//!
//! With `expert`, `pipeline` and `data` alone the targets are, on the processor, those of a resident teacher in every
//! bit; `tensor` adds up sums in parts, and changes their last bits.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::{Device, Tensor};
use limbeck_kernels::host_op;

use super::{
    ahead::{Ahead, Whole},
    budget::{Fit, Spill, StreamSettings},
    predictions::Predictions,
    rank_model::{Neighbours, RankModel},
    resident::HEAD_ROWS,
    sharded_head::ShardedHead,
    streamed::weight_bytes,
    wire::{Command, targets_from, targets_to_bytes},
};
use crate::{
    checkpoint::CheckpointReader,
    error::{Error, Result},
    models::{DecoderConfig, config::FeedForwardConfig, llama4::sharding, parameter::CheckpointWeights},
    parallel::{
        Collective, Mesh, Place, in_process,
        message::{Incoming, Outgoing},
        share,
    },
    quantity::short_bytes,
    selection::Selection,
    targets::{DistillBatch, PackedSequence, SparseTargets},
};

/// Batches in flight for each stage of a pipeline: with four, a stage waits for a fifth of the time at most.
const BATCHES_PER_STAGE: usize = 4;
/// Most rows that an expert multiplies at once.
const EXPERT_ROWS: usize = 4096;

/// What every rank has to know, the same for all of them but for the device.
#[derive(Clone)]
pub struct ShardSettings {
    pub checkpoint: PathBuf,
    pub config: DecoderConfig,
    pub mesh: Mesh,
    pub device: Device,
    pub selection: Selection,
    pub temperatures: Vec<f32>,
    /// Sequences that a rank computes at once.
    pub batch_sequences: usize,
    /// Where the layers pass by instead of staying in memory: how long the sequences are, and what one rank may take.
    pub streaming: Option<(usize, StreamSettings)>,
}

/// A teacher of several ranks, of which this is the first.
pub struct ShardedTeacher {
    world: Rc<dyn Collective>,
    rank: Rank,
    threads: Vec<JoinHandle<()>>,
    /// Why nothing more can be computed.
    failure: Option<String>,
    bytes_read: Vec<u64>,
}

impl ShardedTeacher {
    /// The ranks as threads of this process, one for each device.
    ///
    /// # Errors
    /// When the model does not fit the mesh, the selection is none for the teacher's vocabulary, there is no temperature,
    /// or weights cannot be read.
    ///
    /// # Panics
    /// When there are not as many devices as the mesh has.
    pub fn in_process(settings: &ShardSettings, devices: &[Device]) -> Result<Self> {
        assert_eq!(devices.len(), settings.mesh.size(), "a device for each place of the mesh");
        let of_device = |device: &Device| ShardSettings { device: device.clone(), ..settings.clone() };
        let mut ends = in_process::world(devices.len()).into_iter();
        let first = Rc::new(ends.next().expect("a mesh has one device at least"));
        let mut threads = vec![];
        for (end, device) in ends.zip(&devices[1..]) {
            let settings = of_device(device);
            let thread = std::thread::Builder::new().name(format!("rank {}", end.rank()));
            // What goes wrong on a rank is told to the others, and comes back from the first.
            let spawned = thread.spawn(move || drop(serve(&end, &settings)));
            threads.push(spawned.map_err(|error| {
                Error::usage(format!("no thread for a device: {error}"), "allow this program more threads")
            })?);
        }
        Self::start(first, &of_device(&devices[0]), threads)
    }

    /// The first rank of a world whose other ranks [`serve`]. They are told to stop by [`dismiss`].
    ///
    /// # Errors
    /// As [`in_process`](Self::in_process).
    pub fn over(world: Rc<dyn Collective>, settings: &ShardSettings) -> Result<Self> {
        Self::start(world, settings, vec![])
    }

    fn start(world: Rc<dyn Collective>, settings: &ShardSettings, threads: Vec<JoinHandle<()>>) -> Result<Self> {
        let rank = Rank::new(world.rank(), settings);
        if rank.is_err() && !threads.is_empty() {
            dismiss(&*world);
        }
        let mut teacher = ShardedTeacher { world, rank: rank?, threads, failure: None, bytes_read: vec![] };
        teacher.tell(Command::Load)?;
        teacher.bytes_read = teacher.guarded(|world, rank| rank.load(world))?;
        let read = teacher.bytes_read.iter().map(|&bytes| short_bytes(bytes)).collect::<Vec<_>>().join(", ");
        tracing::info!("teacher on {} devices ({}): weights read by rank: {read}", settings.mesh.size(), settings.mesh);
        Ok(teacher)
    }

    /// Keeps something else from now on.
    ///
    /// # Errors
    /// When the selection is none for the teacher's vocabulary.
    pub fn set_selection(&mut self, selection: Selection) -> Result<()> {
        self.rank.predictions.set_selection(selection.clone())?;
        self.rank.settings.selection = selection;
        Ok(())
    }

    /// How many sequences keep all devices busy: give as many at a time.
    pub fn sequences_at_once(&self) -> usize {
        let settings = &self.rank.settings;
        if settings.streaming.is_some() {
            return self.rank.sweep_sequences * settings.mesh.data * settings.mesh.expert;
        }
        let in_flight = if settings.mesh.pipeline > 1 { BATCHES_PER_STAGE * settings.mesh.pipeline } else { 1 };
        settings.batch_sequences * in_flight * settings.mesh.data * settings.mesh.expert
    }

    /// Bytes of weights that each rank read.
    pub fn bytes_read(&self) -> &[u64] {
        &self.bytes_read
    }

    /// The targets of sequences, each beside its number in the whole data set, in their order. Rows that predict across
    /// documents keep nothing.
    ///
    /// # Errors
    /// When the sequences are too long for the teacher, differ in length, hold ids it does not know, or its predictions
    /// are not finite; and when a rank fails: after that, always.
    pub fn targets(&mut self, sequences: &[(u64, &PackedSequence)]) -> Result<Vec<SparseTargets>> {
        let Some((_, first)) = sequences.first() else { return Ok(vec![]) };
        let length = first.seq_len();
        self.rank.settings.config.check_seq_len(length)?;
        if let Some((number, sequence)) = sequences.iter().find(|(_, sequence)| sequence.seq_len() != length) {
            let problem = format!("sequence {number} has {} predictions, not {length}", sequence.seq_len());
            return Err(Error::usage(problem, "give sequences of one length"));
        }
        let sequences: Vec<(u64, PackedSequence)> =
            sequences.iter().map(|(number, sequence)| (*number, (*sequence).clone())).collect();
        self.rank.predictions.check_ids(&batch_of(&sequences))?;
        let selection = self.rank.settings.selection.clone();
        self.tell(Command::Compute { selection, sequences: sequences.clone() })?;
        let found = self.guarded(|world, rank| {
            let own = rank.compute(world, &sequences)?;
            rank.collect(world, own)
        })?;
        Ok((0..sequences.len()).map(|number| found.slice(number * length, (number + 1) * length)).collect())
    }

    fn tell(&mut self, command: Command) -> Result<()> {
        if let Some(failure) = &self.failure {
            let tip = "start the run again; it goes on from what is sealed";
            return Err(Error::usage(format!("the teacher's devices have failed before: {failure}"), tip));
        }
        self.world.broadcast(0, command.to_bytes()).map(drop)
    }

    fn guarded<R>(&mut self, body: impl FnOnce(&dyn Collective, &mut Rank) -> Result<R>) -> Result<R> {
        let (world, rank) = (&*self.world, &mut self.rank);
        let result = guarded(world, || body(world, rank));
        if let Err(error) = &result {
            self.failure = Some(error.to_string());
        }
        result
    }
}

impl Drop for ShardedTeacher {
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        if self.failure.is_none() {
            // A thread that is gone is not told, and ends anyway.
            dismiss(&*self.world);
        }
        for thread in self.threads.drain(..) {
            // It has told the others of its panic, if there was one.
            drop(thread.join());
        }
    }
}

/// Tells the ranks that [`serve`] that nothing more is to be done.
pub fn dismiss(world: &dyn Collective) {
    // Who is gone does not need to be told.
    drop(world.broadcast(0, Command::Stop.to_bytes()));
}

/// Is one of the other ranks of a [`ShardedTeacher`] until it is told to stop.
///
/// # Errors
/// What went wrong on this rank, which all others are told, or on another one.
pub fn serve(world: &dyn Collective, settings: &ShardSettings) -> Result<()> {
    guarded(world, || {
        let mut rank: Option<Rank> = None;
        loop {
            match Command::from_bytes(&world.broadcast(0, vec![])?)? {
                Command::Stop => return Ok(()),
                Command::Load => {
                    let mut loaded = Rank::new(world.rank(), settings)?;
                    loaded.load(world)?;
                    rank = Some(loaded);
                }
                Command::Compute { selection, sequences } => {
                    let rank = rank.as_mut().ok_or_else(not_loaded)?;
                    rank.predictions.set_selection(selection)?;
                    if let Some(own) = rank.compute(world, &sequences)? {
                        world.send(0, targets_to_bytes(&own))?;
                    }
                }
            }
        }
    })
}

/// Tells the other ranks what went wrong, and where.
pub fn tell_failure(world: &dyn Collective, error: &Error) {
    match error {
        Error::Rank { rank, failure, .. } => world.fail(*rank, failure),
        own => world.fail(world.rank(), &own.to_string()),
    }
}

/// Tells the other ranks when something goes wrong, be it an error or a panic.
fn guarded<R>(world: &dyn Collective, body: impl FnOnce() -> Result<R>) -> Result<R> {
    // What a panic leaves half done is not used again: the rank is at its end.
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("for no reason that it gives");
        let failure = format!("it panicked: {text}; this is a mistake in the program, please report it");
        Err(Error::Rank { rank: world.rank(), seen_by: world.rank(), operation: "its own work".into(), failure })
    });
    if let Err(error) = &result {
        tell_failure(world, error);
    }
    result
}

/// One rank's part of the work.
struct Rank {
    settings: ShardSettings,
    place: Place,
    predictions: Predictions,
    model: Option<RankModel>,
    /// Sequences of this rank that pass a layer before the next, where layers pass by: the same on every rank.
    sweep_sequences: usize,
}

impl Rank {
    fn new(number: usize, settings: &ShardSettings) -> Result<Self> {
        if settings.streaming.is_some() && settings.mesh.pipeline > 1 {
            let problem = "the mesh has a `pipeline`, and a streamed teacher has all its layers on each device in turn";
            return Err(Error::usage(problem, "use `expert`, `tensor` and `data`"));
        }
        sharding::check(&settings.config, &settings.mesh)
            .map_err(|unfit| Error::usage(format!("the mesh's `{}` {}", unfit.axis, unfit.problem), unfit.tip))?;
        let vocab = settings.config.vocab_size;
        let predictions = Predictions::new(settings.selection.clone(), &settings.temperatures, vocab)?;
        Ok(Rank {
            settings: settings.clone(),
            place: settings.mesh.place(number),
            predictions,
            model: None,
            sweep_sequences: 0,
        })
    }

    /// Loads this rank's weights. Gives the bytes that each rank read.
    fn load(&mut self, world: &dyn Collective) -> Result<Vec<u64>> {
        let ShardSettings { checkpoint, config, mesh, device, .. } = &self.settings;
        // A reader for each rank, so that each counts its own bytes.
        let reader = Arc::new(CheckpointReader::open(checkpoint)?);
        let source = CheckpointWeights::new(&reader);
        let (ahead, sweep) = match &self.settings.streaming {
            None => (None, usize::MAX),
            Some((seq_len, settings)) => {
                let (own, sweep) = self.sweep(&reader, *seq_len, settings)?;
                let whole = Whole { config: Arc::new(config.clone()), mesh: *mesh, place: self.place };
                (Some(Ahead::new(Arc::new(own), reader.clone(), device.clone(), Some(whole))?), sweep)
            }
        };
        self.model = Some(RankModel::load(config, *mesh, self.place, &source, device, EXPERT_ROWS, ahead)?);
        let own = Outgoing::new().number(reader.bytes_read()).number(sweep as u64);
        let mut read = vec![];
        self.sweep_sequences = sweep;
        for bytes in world.all_gather(&own.into_bytes())? {
            let mut message = Incoming::new(&bytes);
            read.push(message.number()?);
            self.sweep_sequences = self.sweep_sequences.min(message.number()? as usize);
        }
        Ok(read)
    }

    /// The model as this rank computes it, and the sequences of a sweep that fit into its memory.
    fn sweep(
        &self,
        reader: &CheckpointReader,
        seq_len: usize,
        given: &StreamSettings,
    ) -> Result<(DecoderConfig, usize)> {
        let ShardSettings { config, mesh, device, .. } = &self.settings;
        let own = sharding::own_config(config, mesh, self.place);
        let ids = sharding::vocabulary(config, mesh, self.place).len();
        let weight = weight_bytes(reader, device);
        // Embedding and head stay; the budget counts blocks of a head besides.
        let ends = weight.kept * 2 * (ids * own.hidden_size) as u64;
        let mut settings = StreamSettings { spill: Spill::Never, ..given.clone() };
        settings.taken.push(("its parts of embedding and head", ends));
        let budgeted = DecoderConfig { vocab_size: ids, ..own.clone() };
        let fit = Fit::new(&budgeted, seq_len, &settings, weight, host_op::runs_on(device))?;
        // Beside its hidden states a token has, on its way to an expert and back, a row sent and one received for each
        // choice, and on the rank of the expert that all chose those of all ranks.
        let chosen = own.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { chosen, .. } => chosen,
        });
        let rows = chosen.max().unwrap_or(0) * (3 + 3 * mesh.expert) + 2;
        Ok((own, (fit.sweep_sequences / rows).max(1)))
    }

    /// Computes this rank's share of the sequences, batch by batch. Gives its targets on the rank that has them in the end.
    fn compute(&self, world: &dyn Collective, sequences: &[(u64, PackedSequence)]) -> Result<Option<SparseTargets>> {
        let (mesh, size) = (&self.settings.mesh, self.settings.batch_sequences);
        let model = self.model.as_ref().ok_or_else(not_loaded)?;
        let owners = mesh.data * mesh.expert;
        let own = share(sequences.len(), owners, self.place.data * mesh.expert + self.place.expert);
        let neighbours = Neighbours::new(world, mesh);
        let vocabulary = sharding::vocabulary(&self.settings.config, mesh, self.place);
        let head = ShardedHead {
            group: &neighbours.tensor,
            predictions: &self.predictions,
            first_id: vocabulary.start as u32,
        };
        let mut targets = self.predictions.none();
        let mut append = |hidden: Tensor<2>, range: Range<usize>| {
            let rows =
                self.predictions.rows(&batch_of(&sequences[range.clone()]), |row| sequences[range.start + row].0);
            for first in (0..rows.len()).step_by(HEAD_ROWS) {
                let count = HEAD_ROWS.min(rows.len() - first);
                let logits = model.logits(hidden.clone().narrow(0, first, count));
                head.append(&logits, &rows[first..first + count], &mut targets)?;
            }
            Ok(())
        };
        if self.settings.streaming.is_some() {
            // As many sweeps on every rank, some of them empty.
            for sweep in 0..sequences.len().div_ceil(owners).div_ceil(self.sweep_sequences) {
                let at = |sweep: usize| (own.start + sweep * self.sweep_sequences).min(own.end);
                let ranges = (at(sweep)..at(sweep + 1)).step_by(size);
                let ranges: Vec<Range<usize>> = ranges.map(|first| first..(first + size).min(at(sweep + 1))).collect();
                let batches: Vec<DistillBatch> =
                    ranges.iter().map(|range| batch_of(&sequences[range.clone()])).collect();
                for (hidden, range) in model.sweep(&neighbours, &batches)?.into_iter().zip(ranges) {
                    append(hidden, range)?;
                }
            }
            return Ok((self.place.tensor == 0).then_some(targets));
        }
        // As many batches on every rank, some of them empty, for in each layer all ranks meet.
        for batch in 0..sequences.len().div_ceil(owners).div_ceil(size) {
            let at = |batch: usize| (own.start + batch * size).min(own.end);
            let range = at(batch)..at(batch + 1);
            let batch = batch_of(&sequences[range.clone()]);
            let Some(hidden) = model.forward(&neighbours, &batch)? else { continue };
            append(hidden, range)?;
        }
        let has_targets = self.place.pipeline + 1 == mesh.pipeline && self.place.tensor == 0;
        Ok(has_targets.then_some(targets))
    }

    /// On the first rank: all targets, in the order of the sequences.
    fn collect(&self, world: &dyn Collective, own: Option<SparseTargets>) -> Result<SparseTargets> {
        let (mesh, mut own) = (&self.settings.mesh, own);
        let mut all = self.predictions.none();
        for data in 0..mesh.data {
            for expert in 0..mesh.expert {
                let rank = mesh.rank(Place { data, pipeline: mesh.pipeline - 1, expert, tensor: 0 });
                let found = match own.take_if(|_| rank == world.rank()) {
                    Some(own) => own,
                    None => {
                        let (temperatures, selection) = (&self.settings.temperatures, &self.settings.selection);
                        targets_from(&world.receive(rank)?, temperatures, selection)?
                    }
                };
                all.extend(&found);
            }
        }
        Ok(all)
    }
}

fn not_loaded() -> Error {
    Error::usage("a rank is to compute before it has loaded", "run the same version of this program on every rank")
}

fn batch_of(sequences: &[(u64, PackedSequence)]) -> DistillBatch {
    let sequences = sequences.iter().map(|(_, sequence)| sequence.clone()).collect();
    DistillBatch { sequences, targets: None, row_weights: None }
}
