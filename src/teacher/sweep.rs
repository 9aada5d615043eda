//! One sweep: embedding, every layer over all its tokens, the head. What is in memory at any moment is what
//! [`budget`](super::budget) counted.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor, TensorData};

use super::{
    ahead::{Ahead, Loaded, Part},
    budget::Fit,
    predictions::{Predictions, Row},
    states::States,
};
use crate::{
    error::{Error, Result},
    models::{
        Choices, DecoderConfig, TokenLayout, WeightSource,
        config::FeedForwardConfig,
        ends::{FinalNorm, embedding_rows},
    },
    targets::{DistillBatch, PackedSequence, SparseTargets},
};

/// Rows of the embedding between two that are wanted which are read rather than skipped.
const EMBEDDING_GAP: usize = 8;
/// Numbers of the embedding that are read at once.
const EMBEDDING_PIECE: usize = 1 << 20;

/// A sweep, ready to run.
pub(super) struct Sweep<'a> {
    pub config: &'a DecoderConfig,
    pub device: &'a Device,
    pub source: &'a dyn WeightSource,
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
        self.ahead.begin(self.first_part(0));
        let mut states = self.embed()?;
        let mut experts = Experts::default();
        for index in 0..self.config.layers.len() {
            match self.config.layers[index].feed_forward {
                FeedForwardConfig::Dense { .. } => self.dense(index, &mut states)?,
                FeedForwardConfig::Experts { expert_count, chosen, .. } => {
                    let read = self.routed(index, chosen, &mut states)?;
                    experts.read += read;
                    experts.left_out += expert_count as u64 - read;
                }
            }
        }
        self.head(&states, give)?;
        Ok(experts)
    }

    /// Numbers of the sequences of each batch.
    fn batches(&self) -> Vec<std::ops::Range<usize>> {
        let (all, size) = (self.sequences.len(), self.fit.batch_sequences);
        (0..all).step_by(size).map(|first| first..(first + size).min(all)).collect()
    }

    fn batch(&self, range: &std::ops::Range<usize>) -> DistillBatch {
        let sequences = self.sequences[range.clone()].iter().map(|(_, sequence)| (*sequence).clone());
        DistillBatch { sequences: sequences.collect(), targets: None, row_weights: None }
    }

    fn check_stop(&self) -> Result<(), Halt> {
        if self.stop.load(Ordering::Relaxed) { Err(Halt::Stopped) } else { Ok(()) }
    }

    fn tensor(&self, values: Vec<f32>) -> Tensor<2> {
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
    fn after(&self, index: usize) -> Option<Part> {
        match index + 1 < self.config.layers.len() {
            true => Some(self.first_part(index + 1)),
            false => self.fit.head_ahead.then(|| Part::Head(self.fit.head_blocks[0].clone())),
        }
    }

    /// The embedding of all tokens; of its rows only those that occur are read.
    fn embed(&self) -> Result<States, Halt> {
        let (length, width) = (self.length, self.config.hidden_size);
        let mut states = States::new(self.sequences.len() * length, width, self.spill)?;
        for batch in self.batches() {
            self.check_stop()?;
            let sequences = self.sequences[batch.clone()].iter().enumerate();
            let mut wanted: Vec<(usize, usize)> = sequences
                .flat_map(|(number, (_, sequence))| {
                    let ids = sequence.tokens[..length].iter().enumerate();
                    ids.map(move |(t, &id)| (id as usize, number * length + t))
                })
                .collect();
            wanted.sort_unstable();
            let mut values = vec![0.0; wanted.len() * width];
            let most = (EMBEDDING_PIECE / width).max(1);
            let mut rest = wanted.as_slice();
            while let Some(&(first, _)) = rest.first() {
                let near = rest
                    .windows(2)
                    .take_while(|pair| pair[1].0 - pair[0].0 <= EMBEDDING_GAP && pair[1].0 - first < most);
                let (now, later) = rest.split_at(1 + near.count());
                let rows = embedding_rows(self.config, self.source, first..now[now.len() - 1].0 + 1)?;
                for &(id, row) in now {
                    let embedded = &rows[(id - first) * width..][..width];
                    values[row * width..][..width].copy_from_slice(embedded);
                }
                rest = later;
            }
            states.write(batch.start * length, &values)?;
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
            let output = layer.forward(self.tensor(hidden), &layout);
            states.write(batch.start * self.length, &values(output.hidden))?;
        }
        Ok(())
    }

    /// A layer with experts. Gives how many of them were read.
    fn routed(&mut self, index: usize, chosen: usize, states: &mut States) -> Result<u64, Halt> {
        let Loaded::Routed(layer) = self.ahead.take(Part::Routed(index))? else { unreachable!("as it was asked for") };
        let rows = self.sequences.len() * self.length;
        // The sum of what experts give a token, where there are several; else it goes to the hidden states at once.
        let several = chosen > 1;
        let mut updates = if several { Some(States::new(rows, self.config.hidden_size, self.spill)?) } else { None };
        let mut choices = Choices { experts: Vec::with_capacity(rows * chosen), scores: Vec::new() };
        choices.scores.reserve_exact(rows * chosen);
        let mut first_expert = None;
        for batch in self.batches() {
            self.check_stop()?;
            let layout = TokenLayout::of_batch(self.config, &self.batch(&batch));
            let hidden = states.read(batch.start * self.length..batch.end * self.length)?;
            let attended = layer.attend(self.tensor(hidden), &layout);
            let found = layer.choose(attended.clone());
            if let Some(updates) = &mut updates {
                updates.write(batch.start * self.length, &values(layer.shared(attended.clone())))?;
            }
            states.write(batch.start * self.length, &values(attended))?;
            if first_expert.is_none() {
                // One that is certain to be chosen can be read while other batches attend; where sums have an order, it
                // must be the first.
                let smallest = found.experts.iter().copied().min();
                first_expert = smallest.filter(|&expert| !several || expert == 0).map(|expert| expert as usize);
                if let Some(expert) = first_expert {
                    self.ahead.request(Part::Expert(index, expert));
                }
            }
            choices.experts.extend(found.experts);
            choices.scores.extend(found.scores);
        }

        let (starts, order) = by_expert(&choices.experts);
        let mut wanted: Vec<usize> =
            (0..starts.len() - 1).filter(|&expert| starts[expert] < starts[expert + 1]).collect();
        if let Some(place) = wanted.iter().position(|&expert| Some(expert) == first_expert) {
            wanted[..=place].rotate_right(1);
        }
        for (place, &expert) in wanted.iter().enumerate() {
            let loaded = self.ahead.take(Part::Expert(index, expert))?;
            let Loaded::Expert(weights) = loaded else { unreachable!("as it was asked for") };
            let next = wanted.get(place + 1).map(|&next| Part::Expert(index, next));
            if let Some(part) = next.or_else(|| self.after(index)) {
                self.ahead.request(part);
            }
            for piece in order[starts[expert]..starts[expert + 1]].chunks(self.fit.batch_sequences * self.length) {
                self.check_stop()?;
                let tokens: Vec<u32> = piece.iter().map(|assignment| assignment / chosen as u32).collect();
                let scores = piece.iter().map(|&assignment| choices.scores[assignment as usize]).collect();
                let attended = self.tensor(states.gather(&tokens)?);
                let routed = layer.routed(&weights, attended.clone(), scores);
                match &mut updates {
                    None => {
                        let update = layer.shared(attended.clone()) + routed;
                        states.scatter(&tokens, &values(attended + update))?;
                    }
                    Some(updates) => {
                        let update = self.tensor(updates.gather(&tokens)?) + routed;
                        updates.scatter(&tokens, &values(update))?;
                    }
                }
            }
            // Else it would stay beside something that it was not counted with.
            if place + 1 < wanted.len() || matches!(self.after(index), Some(Part::Routed(_))) {
                self.ahead.give_back(*weights);
            }
        }
        if let Some(updates) = updates {
            for batch in self.batches() {
                let rows = batch.start * self.length..batch.end * self.length;
                let hidden = self.tensor(states.read(rows.clone())?) + self.tensor(updates.read(rows.clone())?);
                states.write(rows.start, &values(hidden))?;
            }
        }
        Ok(wanted.len() as u64)
    }

    /// The head over pieces of rows. Where it is in blocks, each piece of rows reads all of them.
    fn head(&mut self, states: &States, give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>) -> Result<(), Halt> {
        let (vocab, length, fit) = (self.config.vocab_size, self.length, self.fit);
        // The last thing that is loaded in this sweep, or in its last piece of rows, is of the next.
        let next_sweep = (self.more && fit.next_sweep_ahead).then(|| self.first_part(0));
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
            self.predictions.append(&logits, &rows[..count], &mut pending)?;
            rows.clear();
            let complete = pending.row_count() / length;
            for number in 0..complete {
                give(given + number, pending.slice(number * length, (number + 1) * length))?;
            }
            given += complete;
            pending = pending.slice(complete * length, pending.row_count());
        }
        Ok(())
    }
}

/// Where each expert's assignments begin in the list of all assignments sorted by expert (and where the last one's
/// end), and that list. Assignments of one expert keep the order of the tokens.
fn by_expert(experts: &[u32]) -> (Vec<usize>, Vec<u32>) {
    let count = experts.iter().max().map_or(0, |&last| last as usize + 1);
    let mut starts = vec![0usize; count + 1];
    experts.iter().for_each(|&expert| starts[expert as usize + 1] += 1);
    (0..count).for_each(|expert| starts[expert + 1] += starts[expert]);
    let (mut next, mut order) = (starts.clone(), vec![0u32; experts.len()]);
    for (assignment, &expert) in experts.iter().enumerate() {
        order[next[expert as usize]] = assignment as u32;
        next[expert as usize] += 1;
    }
    (starts, order)
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().expect("hidden states and logits are f32")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_grouped_by_expert_in_the_order_of_the_tokens() {
        let (starts, order) = by_expert(&[3, 0, 3, 3, 0, 1]);
        assert_eq!((starts.as_slice(), order.as_slice()), (&[0, 2, 3, 3, 6][..], &[1, 4, 5, 0, 2, 3][..]));
        assert_eq!(by_expert(&[]), (vec![0], vec![]));
    }
}
