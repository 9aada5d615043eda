//! A teacher on several devices. The first rank is told which targets are wanted, tells the others, and collects what
//! they found; each rank has a part of the weights and computes a part of the tokens, as the mesh says.
//!
//! With `expert`, `pipeline` and `data` alone the targets are, on the processor, those of a resident teacher in every
//! bit; `tensor` adds up sums in parts, and changes their last bits.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::rc::Rc;
use std::thread::JoinHandle;

use burn::tensor::Device;

use super::{
    budget::StreamSettings,
    rank::{Rank, batch_of, not_loaded},
    streamed::StreamCounts,
    wire::{Command, targets_to_bytes},
};
use limbeck_kernels::packed_matmul::Numbers;

use crate::{
    error::{Error, Result},
    models::DecoderConfig,
    parallel::{Collective, Mesh, in_process},
    quantity::short_bytes,
    selection::Selection,
    targets::{PackedSequence, SparseTargets},
};

/// What every rank has to know, the same for all of them but for the device.
#[derive(Clone)]
pub struct ShardSettings {
    pub checkpoint: PathBuf,
    pub config: DecoderConfig,
    pub mesh: Mesh,
    pub device: Device,
    pub selection: Selection,
    pub temperatures: Vec<f32>,
    /// What matrices are multiplied in, where they stay in memory.
    pub numbers: Numbers,
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
    counts: Vec<StreamCounts>,
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
        let mut teacher =
            ShardedTeacher { world, rank: rank?, threads, failure: None, bytes_read: vec![], counts: vec![] };
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
        self.rank.sequences_at_once()
    }

    /// Bytes of weights that each rank read when it was loaded.
    pub fn bytes_read(&self) -> &[u64] {
        &self.bytes_read
    }

    /// What each rank has done so far, where layers pass by; else nothing.
    pub fn stream_counts(&self) -> &[StreamCounts] {
        &self.counts
    }

    /// The targets of sequences, each beside its number in the whole data set, in their order. Rows that predict across
    /// documents keep nothing.
    ///
    /// # Errors
    /// As of [`each_targets`](Self::each_targets).
    pub fn targets(&mut self, sequences: &[(u64, &PackedSequence)]) -> Result<Vec<SparseTargets>> {
        let mut all = vec![];
        self.each_targets(sequences, &mut |_, targets| {
            all.push(targets);
            Ok(())
        })?;
        Ok(all)
    }

    /// The same, each given with its place in `sequences`, in order, so that not all of them are in memory at once.
    ///
    /// # Errors
    /// When the sequences are too long for the teacher, differ in length, hold ids it does not know, or its predictions
    /// are not finite; and when a rank fails, or `give` does: after that, always.
    pub fn each_targets(
        &mut self,
        sequences: &[(u64, &PackedSequence)],
        give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>,
    ) -> Result<()> {
        let Some((_, first)) = sequences.first() else { return Ok(()) };
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
        let mut given = 0;
        self.counts = self.guarded(|world, rank| {
            let own = rank.compute(world, &sequences)?;
            rank.collect(world, own, &mut |found| {
                for number in 0..found.row_count() / length {
                    give(given, found.slice(number * length, (number + 1) * length))?;
                    given += 1;
                }
                Ok(())
            })?;
            rank.counts(world)
        })?;
        Ok(())
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
                    rank.counts(world)?;
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
