//! A teacher with all its layers in memory on one device.

use std::path::Path;

use burn::tensor::Device;

use super::head::HeadTargets;
use crate::{
    error::Result,
    models::{Decoder, TokenLayout, feed_forward::Routing},
    profile::stage,
    selection::Selection,
    targets::{DistillBatch, PackedSequence, RouterCodes, SparseTargets},
};

/// Rows of logits held at once: the vocabulary is wide, so the head runs on a few rows at a time.
pub(super) const HEAD_ROWS: usize = 256;

/// A teacher, and what is kept of its predictions.
pub struct ResidentTeacher {
    model: Decoder,
    head: HeadTargets,
    /// Layers whose routers are listened to.
    router_layers: Vec<usize>,
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
        Ok(ResidentTeacher { model, head, router_layers: vec![] })
    }

    /// Keeps of each prediction what the routers of some layers say of the token it is made from.
    ///
    /// # Errors
    /// When a layer has no router, or has another number of experts than the first.
    pub fn with_router_layers(mut self, layers: &[usize]) -> Result<Self> {
        self.model.config.experts_of(layers)?;
        self.router_layers = layers.to_vec();
        Ok(self)
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
        let (hidden, routings) = self.model.forward(&layout);
        let mut targets = self.head.of_hidden(&self.model, hidden, &batch, first_sequence)?;
        if !self.router_layers.is_empty() {
            self.add_routers(&routings, batch.seq_len(), &mut targets);
        }
        Ok(targets)
    }

    /// `routings`: of all blocks with experts, over the rows of all sequences.
    fn add_routers(&self, routings: &[Routing], seq_len: usize, targets: &mut [SparseTargets]) {
        let blocks: Vec<usize> = self.model.config.expert_layers().into_iter().map(|(layer, _)| layer).collect();
        let logits = self.router_layers.iter().map(|layer| {
            let block = blocks.iter().position(|block| block == layer).expect("only layers with experts are kept");
            routings[block].logits.clone().into_data().try_into_vec::<f32>().expect("router logits are f32")
        });
        let logits: Vec<Vec<f32>> = logits.collect();
        let experts = routings[0].expert_count();
        for (number, targets) in targets.iter_mut().enumerate() {
            let mut codes = RouterCodes::empty(logits.len(), experts);
            for row in number * seq_len..(number + 1) * seq_len {
                logits.iter().for_each(|logits| codes.push(&logits[row * experts..(row + 1) * experts]));
            }
            targets.router = Some(codes);
        }
    }
}
