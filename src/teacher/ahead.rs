//! The parts of a model, loaded one ahead of its use by a thread of their own. Knows which parts there are, and not in
//! what order they are wanted.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};

use burn::tensor::Device;
use rayon::Scope;

use crate::{
    error::Result,
    models::{DecoderConfig, Expert, Layer, RoutedLayer, WeightSource, ends::HeadBlock},
};

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

impl Part {
    pub(super) fn load(&self, config: &DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Loaded> {
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

/// How a part is loaded.
pub(super) type Load<'scope> = dyn Fn(&Part) -> Result<Loaded> + Sync + 'scope;

/// Loads on the thread of the pool that the scope is of; one part at a time.
pub(super) struct Ahead<'a, 'scope> {
    scope: &'a Scope<'scope>,
    load: &'scope Load<'scope>,
    pending: Option<(Part, Receiver<Result<Loaded>>)>,
}

impl<'a, 'scope> Ahead<'a, 'scope> {
    pub(super) fn new(scope: &'a Scope<'scope>, load: &'scope Load<'scope>) -> Self {
        Ahead { scope, load, pending: None }
    }

    /// Begins to load a part, which must be the next that is taken.
    pub(super) fn request(&mut self, part: Part) {
        assert!(self.pending.is_none(), "one part is read ahead, never two: {part:?}");
        let (sender, receiver) = sync_channel(1);
        let (load, wanted) = (self.load, part.clone());
        // Nobody listens any more after an error elsewhere.
        self.scope.spawn(move |_| drop(sender.send(load(&wanted))));
        self.pending = Some((part, receiver));
    }

    /// The part, loaded.
    pub(super) fn take(&mut self, part: Part) -> Result<Loaded> {
        if self.pending.is_none() {
            self.request(part.clone());
        }
        let (requested, loaded) = self.pending.take().expect("requested just now at the latest");
        assert_eq!(requested, part, "parts are taken in the order they are requested");
        loaded.recv().expect("a load that ends without a result has panicked")
    }
}
