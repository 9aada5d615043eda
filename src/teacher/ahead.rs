//! The parts of a model, loaded one ahead of its use by a thread of their own. Knows which parts there are, and not in
//! what order they are wanted.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use burn::tensor::Device;
use limbeck_kernels::packed_matmul::Numbers;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::slices::Slices;
use crate::{
    checkpoint::CheckpointReader,
    error::{Error, Result},
    models::{
        DecoderConfig, Expert, Layer, RoutedLayer, WeightSource,
        ends::HeadBlock,
        parameter::{CheckpointWeights, Spare},
    },
    parallel::{Mesh, Place},
    profile::stage,
};

/// How long a part is waited for in silence; then twice as long, and so on.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is loaded as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    /// A dense layer.
    Dense(usize),
    /// A layer with experts, without them.
    Routed(usize),
    /// One expert of a layer.
    Expert(usize, usize),
    /// Some rows of the head.
    Head(Range<usize>),
}

pub(super) enum Loaded {
    Dense(Box<Layer>),
    Routed(Box<RoutedLayer>),
    Expert(Box<Expert>),
    Head(Box<HeadBlock>),
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Dense(index) | Part::Routed(index) => write!(formatter, "layer {index} of the teacher"),
            Part::Expert(index, expert) => write!(formatter, "expert {expert} of layer {index} of the teacher"),
            Part::Head(ids) => write!(formatter, "the teacher's head for {} token ids", ids.len()),
        }
    }
}

impl Part {
    fn load(&self, config: &DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Loaded> {
        Ok(match self {
            Part::Dense(index) => Loaded::Dense(Box::new(Layer::load_for_inference(config, *index, source, device)?)),
            Part::Routed(index) => Loaded::Routed(Box::new(RoutedLayer::load(config, *index, source, device)?)),
            Part::Expert(index, expert) => {
                Loaded::Expert(Box::new(Expert::load(config, *index, *expert, source, device)?))
            }
            Part::Head(ids) => Loaded::Head(Box::new(HeadBlock::load(config, ids.clone(), source, device)?)),
        })
    }
}

/// A model that is divided, and the part of it that is loaded here.
#[derive(Clone)]
pub(super) struct Whole {
    pub config: Arc<DecoderConfig>,
    pub mesh: Mesh,
    pub place: Place,
}

impl Whole {
    /// What is here of the whole model's weights.
    pub(super) fn slices<'a>(&'a self, source: &'a dyn WeightSource) -> Slices<'a> {
        Slices { source, config: &self.config, mesh: self.mesh, place: self.place }
    }
}

/// Loads one part at a time, on a thread of its own.
pub(super) struct Ahead {
    config: Arc<DecoderConfig>,
    reader: Arc<CheckpointReader>,
    device: Device,
    /// The whole model, where this is one rank's part of it.
    part_of: Option<Whole>,
    /// What matrices are multiplied in.
    numbers: Numbers,
    /// One thread; what it converts in parallel elsewhere is converted on it.
    loader: ThreadPool,
    pending: Option<(Part, Receiver<Result<Loaded>>)>,
    /// Memory of experts, for experts: what else is loaded is of other sizes, and is loaded when this is empty.
    spare: Arc<Spare>,
}

impl Ahead {
    /// # Errors
    /// When the system allows no more threads.
    pub(super) fn new(
        config: Arc<DecoderConfig>,
        reader: Arc<CheckpointReader>,
        device: Device,
        part_of: Option<Whole>,
        numbers: Numbers,
    ) -> Result<Self> {
        let loader = ThreadPoolBuilder::new()
            .num_threads(1)
            .thread_name(|_| "weights".into())
            // Whoever waits for the part finds out, by the channel.
            .panic_handler(|_| {})
            .build();
        let loader = loader.map_err(|error| {
            Error::usage(format!("no thread to read weights on: {error}"), "allow this program more threads")
        })?;
        Ok(Ahead { config, reader, device, part_of, numbers, loader, pending: None, spare: Arc::default() })
    }

    /// Begins to load a part, which must be the next that is taken.
    pub(super) fn request(&mut self, part: Part) {
        assert!(self.pending.is_none(), "one part is read ahead, never two: {part:?}");
        let (sender, receiver) = sync_channel(1);
        let (config, reader, device) = (self.config.clone(), self.reader.clone(), self.device.clone());
        let (wanted, part_of, numbers) = (part.clone(), self.part_of.clone(), self.numbers);
        let spare = matches!(part, Part::Expert(..)).then(|| self.spare.clone());
        if spare.is_none() {
            self.spare.clear();
        }
        self.loader.spawn(move || {
            let _span = stage("load weights");
            let source = CheckpointWeights::new(&reader).in_numbers(numbers);
            let source = match &spare {
                Some(spare) => source.reusing(spare),
                None => source,
            };
            let loaded = match &part_of {
                None => wanted.load(&config, &source, &device),
                Some(whole) => wanted.load(&config, &whole.slices(&source), &device),
            };
            // Nobody listens any more when the teacher is gone.
            drop(sender.send(loaded));
        });
        self.pending = Some((part, receiver));
    }

    /// The part, loaded.
    pub(super) fn take(&mut self, part: Part) -> Result<Loaded> {
        if self.pending.is_none() {
            self.request(part.clone());
        }
        let (requested, loaded) = self.pending.take().expect("requested just now at the latest");
        assert_eq!(requested, part, "parts are taken in the order they are requested");
        let _span = stage("wait for weights");
        let (mut patience, mut waited) = (PATIENCE, Duration::ZERO);
        loop {
            match loaded.recv_timeout(patience) {
                Ok(loaded) => return loaded,
                // However long it takes: a disk that stalls may come back.
                Err(RecvTimeoutError::Timeout) => {
                    waited += patience;
                    tracing::warn!(
                        "{part} is still being read after {} s; the disk or the network is slow",
                        waited.as_secs()
                    );
                    patience *= 2;
                }
                Err(RecvTimeoutError::Disconnected) => panic!("a load that ends without a result has panicked"),
            }
        }
    }

    /// Keeps the memory of an expert for the next one that is requested.
    pub(super) fn give_back(&mut self, expert: Expert) {
        expert.give_back(&self.spare);
    }

    /// Begins anew, with this part: what is loaded or being loaded stays if it is that one, and is dropped if a sweep
    /// that ended early left another.
    pub(super) fn begin(&mut self, part: Part) {
        match self.pending.take() {
            Some((pending, loaded)) if pending == part => self.pending = Some((pending, loaded)),
            other => {
                // Two parts at once would not be what was counted.
                drop(other.map(|(_, loaded)| loaded.recv()));
                self.request(part);
            }
        }
    }
}
