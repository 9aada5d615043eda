//! One sweep: embedding, every layer over all its tokens, the head. What is in memory at any moment is what
//! [`budget`](super::budget) counted.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor, TensorData};

use super::{
    ahead::{Ahead, Loaded, Part},
    budget::Fit,
    predictions::{Predictions, Row},
    rank_model::Neighbours,
    sharded_head::ShardedHead,
    states::States,
};
use crate::{
    error::{Error, Result},
    memory,
    models::{
        DecoderConfig, TokenLayout, WeightSource,
        config::FeedForwardConfig,
        ends::{FinalNorm, embedding_rows},
    },
    parallel::{Collective, message},
    profile::stage,
    targets::{DistillBatch, PackedSequence, SparseTargets},
};

/// Rows of the embedding between two that are wanted which are read rather than skipped.
const EMBEDDING_GAP: usize = 8;
/// Numbers of the embedding that are read at once.
const EMBEDDING_PIECE: usize = 1 << 20;

/// A sweep, ready to run.
pub(super) struct Sweep<'a> {
    /// Of the model as it is computed here: on a rank of several with its numbers of heads, widths and ids.
    pub config: &'a DecoderConfig,
    pub device: &'a Device,
    /// Of this model.
    pub source: &'a dyn WeightSource,
    /// The layers that are computed here.
    pub layers: Range<usize>,
    /// The first of the ids whose rows of embedding and head are here.
    pub first_id: usize,
    /// Where others compute the rest.
    pub neighbours: Option<&'a Neighbours<'a>>,
    pub predictions: &'a Predictions,
    pub final_norm: &'a FinalNorm,
    pub fit: &'a Fit,
    /// Where hidden states go that do not fit into memory; `None` if they do.
    pub spill: Option<&'a Path>,
    /// Predictions of one sequence.
    pub length: usize,
    pub sequences: &'a [(u64, &'a PackedSequence)],
    /// Whether another sweep follows.
    pub more: bool,
    pub stop: &'a AtomicBool,
    pub ahead: &'a mut Ahead,
}

/// Experts of all layers, by whether a token chose them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Experts {
    pub read: u64,
    pub left_out: u64,
}

/// Why a sweep ended early.
pub(super) enum Halt {
    Stopped,
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Halt::Failed(error)
    }
}

impl Sweep<'_> {
    /// Gives each sequence's targets with its place, in order.
    pub(super) fn run(mut self, give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>) -> Result<Experts, Halt> {
        // First what costs nothing.
        for batch in self.batches() {
            self.predictions.check_ids(&self.batch(&batch))?;
        }
        self.ahead.begin(self.first_part(self.layers.start));
        let mut states = match self.previous() {
            None => self.embed()?,
            Some(_) => self.taken_over()?,
        };
        let mut experts = Experts::default();
        for index in self.layers.clone() {
            let _span = stage("layer").with("index", index as u64);
            match self.config.layers[index].feed_forward {
                FeedForwardConfig::Dense { .. } => self.dense(index, &mut states)?,
                FeedForwardConfig::Experts { expert_count, chosen, .. } => {
                    let found = self.routed(index, expert_count, chosen, &mut states)?;
                    experts.read += found.read;
                    experts.left_out += found.left_out;
                }
            }
        }
        match self.next() {
            None => self.head(&states, give)?,
            Some(_) => self.hand_on(&states)?,
        }
        Ok(experts)
    }

    /// The rank with the layers before these, if it is another one.
    fn previous(&self) -> Option<usize> {
        self.neighbours?.previous
    }

    /// The rank with the layers after these.
    fn next(&self) -> Option<usize> {
        self.neighbours?.next
    }

    /// Hidden states of the rank with the layers before these. It sends a batch when it is asked to, so that of a sweep
    /// that this rank has no room for yet nothing is on its way.
    fn taken_over(&self) -> Result<States> {
        let (world, previous) = self.neighbours.and_then(|all| Some((all.world, all.previous?))).expect("one before");
        let mut states = States::new(self.sequences.len() * self.length, self.config.hidden_size, self.spill)?;
        for batch in self.batches() {
            world.send(previous, vec![])?;
            states.write(batch.start * self.length, &message::values::<f32>(&world.receive(previous)?))?;
        }
        Ok(states)
    }

    fn hand_on(&self, states: &States) -> Result<()> {
        let (world, next) = self.neighbours.and_then(|all| Some((all.world, all.next?))).expect("one after");
        for batch in self.batches() {
            world.receive(next)?;
            let hidden = states.read(batch.start * self.length..batch.end * self.length)?;
            world.send(next, bytemuck::cast_slice(&hidden).to_vec())?;
        }
        Ok(())
    }

    /// The sum of the summands that ranks have whose matrices are parts of the same.
    pub(super) fn sum(&self, summand: Tensor<2>) -> Result<Tensor<2>> {
        let Some(neighbours) = self.neighbours.filter(|neighbours| neighbours.tensor.size() > 1) else {
            return Ok(summand);
        };
        let mut sum = values(summand);
        neighbours.tensor.all_reduce(&mut sum)?;
        Ok(self.tensor(sum))
    }

    /// Numbers of the sequences of each batch.
    pub(super) fn batches(&self) -> Vec<Range<usize>> {
        let (all, size) = (self.sequences.len(), self.fit.batch_sequences);
        (0..all).step_by(size).map(|first| first..(first + size).min(all)).collect()
    }

    pub(super) fn batch(&self, range: &Range<usize>) -> DistillBatch {
        let sequences = self.sequences[range.clone()].iter().map(|(_, sequence)| (*sequence).clone());
        DistillBatch { sequences: sequences.collect(), targets: None, row_weights: None }
    }

    pub(super) fn check_stop(&self) -> Result<(), Halt> {
        if self.stop.load(Ordering::Relaxed) { Err(Halt::Stopped) } else { Ok(()) }
    }

    pub(super) fn tensor(&self, values: Vec<f32>) -> Tensor<2> {
        let width = self.config.hidden_size;
        let rows = values.len() / width;
        Tensor::from_data(TensorData::new(values, [rows, width]), self.device)
    }

    /// What is loaded first of a layer.
    fn first_part(&self, index: usize) -> Part {
        match self.config.layers[index].feed_forward {
            FeedForwardConfig::Dense { .. } => Part::Dense(index),
            FeedForwardConfig::Experts { .. } => Part::Routed(index),
        }
    }

    /// What is loaded while a layer's last part computes.
    pub(super) fn after(&self, index: usize) -> Option<Part> {
        if index + 1 < self.layers.end {
            return Some(self.first_part(index + 1));
        }
        let head_follows = self.fit.head_ahead && self.next().is_none() && !self.sequences.is_empty();
        head_follows.then(|| Part::Head(self.fit.head_blocks[0].clone()))
    }

    /// The embedding of all tokens; of its rows only those that occur are read, of each by one rank.
    fn embed(&self) -> Result<States, Halt> {
        let _span = stage("embedding");
        let (length, width) = (self.length, self.config.hidden_size);
        let own = self.first_id..self.first_id + self.config.vocab_size;
        let mut states = States::new(self.sequences.len() * length, width, self.spill)?;
        for batch in self.batches() {
            self.check_stop()?;
            let sequences = self.sequences[batch.clone()].iter().enumerate();
            let mut wanted: Vec<(usize, usize)> = sequences
                .flat_map(|(number, (_, sequence))| {
                    let ids = sequence.tokens[..length].iter().enumerate();
                    ids.map(move |(t, &id)| (id as usize, number * length + t))
                })
                .filter(|(id, _)| own.contains(id))
                .map(|(id, row)| (id - own.start, row))
                .collect();
            wanted.sort_unstable();
            let mut embedded = vec![0.0; batch.len() * length * width];
            let most = (EMBEDDING_PIECE / width).max(1);
            let mut rest = wanted.as_slice();
            while let Some(&(first, _)) = rest.first() {
                let near = rest
                    .windows(2)
                    .take_while(|pair| pair[1].0 - pair[0].0 <= EMBEDDING_GAP && pair[1].0 - first < most);
                let (now, later) = rest.split_at(1 + near.count());
                let rows = embedding_rows(self.config, self.source, first..now[now.len() - 1].0 + 1, self.device)?;
                for &(id, row) in now {
                    embedded[row * width..][..width].copy_from_slice(&rows[(id - first) * width..][..width]);
                }
                rest = later;
            }
            if let Some(neighbours) = self.neighbours {
                neighbours.tensor.all_reduce(&mut embedded)?;
            }
            states.write(batch.start * length, &embedded)?;
        }
        Ok(states)
    }

    fn dense(&mut self, index: usize, states: &mut States) -> Result<(), Halt> {
        let Loaded::Dense(layer) = self.ahead.take(Part::Dense(index))? else { unreachable!("as it was asked for") };
        if let Some(part) = self.after(index) {
            self.ahead.request(part);
        }
        for batch in self.batches() {
            self.check_stop()?;
            let layout = TokenLayout::of_batch(self.config, &self.batch(&batch));
            let hidden = states.read(batch.start * self.length..batch.end * self.length)?;
            let hidden = self.tensor(hidden);
            let attended = hidden.clone() + self.sum(layer.attention_update(hidden, &layout))?;
            let update = self.sum(layer.feed_forward_update(attended.clone()).0)?;
            states.write(batch.start * self.length, &values(attended + update))?;
        }
        Ok(())
    }

    /// The head over pieces of rows. Where it is in blocks, each piece of rows reads all of them.
    fn head(&mut self, states: &States, give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>) -> Result<(), Halt> {
        if self.sequences.is_empty() {
            return Ok(());
        }
        let _span = stage("head + top-k").with("rows", (self.sequences.len() * self.length) as u64);
        let (vocab, length, fit) = (self.config.vocab_size, self.length, self.fit);
        if !fit.head_ahead {
            memory::give_back_freed();
        }
        // The last thing that is loaded in this sweep, or in its last piece of rows, is of the next.
        let next_sweep = (self.more && fit.next_sweep_ahead).then(|| self.first_part(self.layers.start));
        let whole = match fit.head_blocks.as_slice() {
            [all] => Some(self.ahead.take(Part::Head(all.clone()))?),
            _ => None,
        };
        if let (Some(_), Some(part)) = (&whole, &next_sweep) {
            self.ahead.request(part.clone());
        }
        let total = self.sequences.len() * length;
        let mut pending = self.predictions.none();
        let (mut given, mut rows) = (0, Vec::<Row>::new());
        for first in (0..total).step_by(fit.head_rows) {
            self.check_stop()?;
            let count = fit.head_rows.min(total - first);
            let hidden = self.final_norm.forward(self.tensor(states.read(first..first + count)?));
            let logits = match &whole {
                Some(Loaded::Head(head)) => values(head.logits(hidden)),
                Some(_) => unreachable!("as it was asked for"),
                None => {
                    let mut logits = vec![0.0; count * vocab];
                    for (number, block) in fit.head_blocks.iter().enumerate() {
                        let loaded = self.ahead.take(Part::Head(block.clone()))?;
                        let Loaded::Head(head) = loaded else { unreachable!("as it was asked for") };
                        let next = fit.head_blocks.get(number + 1);
                        let next = next.or_else(|| fit.head_blocks.first().filter(|_| first + count < total));
                        let next = next.map(|block| Part::Head(block.clone())).or_else(|| next_sweep.clone());
                        if let Some(part) = next {
                            self.ahead.request(part);
                        }
                        let part = values(head.logits(hidden.clone()));
                        for (logits, part) in logits.chunks_mut(vocab).zip(part.chunks(block.len())) {
                            logits[block.clone()].copy_from_slice(part);
                        }
                    }
                    logits
                }
            };
            // What the rows stand for is worked out a sequence at a time.
            while rows.len() < count {
                let sequence = (first + rows.len()) / length;
                let place = (first + rows.len()) % length;
                let (number, _) = self.sequences[sequence];
                let batch = self.batch(&(sequence..sequence + 1));
                rows.extend(self.predictions.rows(&batch, |_| number).into_iter().skip(place));
            }
            self.append(&logits, &rows[..count], &mut pending)?;
            rows.clear();
            // None on ranks that help another one with its rows.
            let complete = pending.row_count() / length;
            for number in 0..complete {
                give(given + number, pending.slice(number * length, (number + 1) * length))?;
            }
            given += complete;
            pending = pending.slice(complete * length, pending.row_count());
        }
        Ok(())
    }

    /// What is kept of some rows' logits; where several ranks have their ids, on the first of these.
    fn append(&self, logits: &[f32], rows: &[Row], targets: &mut SparseTargets) -> Result<()> {
        let Some(neighbours) = self.neighbours else { return self.predictions.append(logits, rows, targets) };
        let (group, first_id) = (&neighbours.tensor, self.first_id as u32);
        ShardedHead { group, predictions: self.predictions, first_id }.append(logits, rows, targets)
    }
}

pub(super) fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("hidden states and logits are f32")
}
