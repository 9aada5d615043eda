//! A layer with experts in a sweep: every batch attends and is routed, and then each expert that was chosen is read, once,
//! for all tokens of the sweep. Where several ranks have the experts, tokens travel to them and back in rounds.

use std::ops::Range;

use burn::tensor::Tensor;

use super::{
    ahead::{Loaded, Part},
    rank_model::Neighbours,
    rounds::{ByExpert, Rounds, Tokens},
    states::States,
    sweep::{Experts, Halt, Sweep, values},
};
use crate::{
    error::Result,
    models::{Choices, Expert, RoutedLayer, TokenLayout},
    parallel::{Collective, message},
};

impl Sweep<'_> {
    /// Takes all tokens through a layer. Gives how many experts of those that are here were read.
    pub(super) fn routed(
        &mut self,
        index: usize,
        expert_count: usize,
        chosen: usize,
        states: &mut States,
    ) -> Result<Experts, Halt> {
        let Loaded::Routed(layer) = self.ahead.take(Part::Routed(index))? else { unreachable!("as it was asked for") };
        match self.neighbours.filter(|neighbours| neighbours.expert.size() > 1) {
            None => self.all_experts(index, expert_count, chosen, &layer, states),
            Some(neighbours) => self.experts_of_ranks(neighbours, index, expert_count, chosen, &layer, states),
        }
    }

    /// The attention half of a batch: its hidden states after it, and the experts that its tokens choose.
    fn attend(&self, layer: &RoutedLayer, states: &mut States, batch: &Range<usize>) -> Result<(Tensor<2>, Choices)> {
        let layout = TokenLayout::of_batch(self.config, &self.batch(batch));
        let hidden = self.tensor(states.read(batch.start * self.length..batch.end * self.length)?);
        let attended = hidden.clone() + self.sum(layer.attention_update(hidden, &layout))?;
        states.write(batch.start * self.length, &values(attended.clone()))?;
        let found = layer.choose(attended.clone());
        Ok((attended, found))
    }

    /// All experts are here.
    fn all_experts(
        &mut self,
        index: usize,
        expert_count: usize,
        chosen: usize,
        layer: &RoutedLayer,
        states: &mut States,
    ) -> Result<Experts, Halt> {
        let rows = self.sequences.len() * self.length;
        // The sum of what experts give a token, where there are several; else it goes to the hidden states at once.
        let several = chosen > 1;
        let mut updates = if several { Some(States::new(rows, self.config.hidden_size, self.spill)?) } else { None };
        let mut choices = no_choices(rows * chosen);
        let mut first_expert = None;
        for batch in self.batches() {
            self.check_stop()?;
            let (attended, found) = self.attend(layer, states, &batch)?;
            if let Some(updates) = &mut updates {
                updates.write(batch.start * self.length, &values(layer.shared(attended)))?;
            }
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

        let own = ByExpert::new(&choices.experts, expert_count);
        let mut wanted = own.chosen();
        if let Some(place) = wanted.iter().position(|&expert| Some(expert) == first_expert) {
            wanted[..=place].rotate_right(1);
        }
        for (place, &expert) in wanted.iter().enumerate() {
            let weights = self.expert(index, expert, wanted.get(place + 1).copied())?;
            for piece in own.of(expert).chunks(self.fit.batch_sequences * self.length) {
                self.check_stop()?;
                let tokens: Vec<u32> = piece.iter().map(|assignment| assignment / chosen as u32).collect();
                let scores = piece.iter().map(|&assignment| choices.scores[assignment as usize]).collect();
                let attended = self.tensor(states.gather(&tokens)?);
                let routed = layer.routed(&weights, attended.clone(), scores);
                match &mut updates {
                    None => {
                        let update = self.sum(layer.shared(attended.clone()) + routed)?;
                        states.scatter(&tokens, &values(attended + update))?;
                    }
                    Some(updates) => {
                        let update = self.tensor(updates.gather(&tokens)?) + routed;
                        updates.scatter(&tokens, &values(update))?;
                    }
                }
            }
            self.give_back(index, *weights, place + 1 < wanted.len());
        }
        if wanted.is_empty()
            && let Some(part) = self.after(index)
        {
            self.ahead.request(part);
        }
        if let Some(updates) = updates {
            for batch in self.batches() {
                let rows = batch.start * self.length..batch.end * self.length;
                let update = self.sum(self.tensor(updates.read(rows.clone())?))?;
                let hidden = self.tensor(states.read(rows.clone())?) + update;
                states.write(rows.start, &values(hidden))?;
            }
        }
        Ok(Experts { read: wanted.len() as u64, left_out: (expert_count - wanted.len()) as u64 })
    }

    /// Each rank of a group has some of the experts, and tokens of its own.
    fn experts_of_ranks(
        &mut self,
        neighbours: &Neighbours<'_>,
        index: usize,
        expert_count: usize,
        chosen: usize,
        layer: &RoutedLayer,
        states: &mut States,
    ) -> Result<Experts, Halt> {
        let (group, owners) = (&neighbours.expert, neighbours.owners(expert_count));
        let (width, rows) = (self.config.hidden_size, self.sequences.len() * self.length);
        let mut choices = no_choices(rows * chosen);
        let (mut first, here) = (None, &owners[group.rank()]);
        for batch in self.batches() {
            let (_, found) = self.attend(layer, states, &batch)?;
            if first.is_none() {
                // As on one device; the order of experts is none of the sums' here.
                let own = found.experts.iter().map(|&expert| expert as usize).filter(|expert| here.contains(expert));
                first = own.min();
                first.into_iter().for_each(|expert| self.ahead.request(Part::Expert(index, expert)));
            }
            choices.experts.extend(found.experts);
            choices.scores.extend(found.scores);
        }
        // What each of a token's experts gives, in the order of their numbers; one goes to the hidden states at once.
        let mut outputs = vec![];
        if chosen > 1 {
            let new = |_| States::new(rows, width, self.spill);
            outputs = (0..chosen).map(new).collect::<Result<Vec<States>>>()?;
        }
        let own = ByExpert::new(&choices.experts, expert_count);
        // A rank has at most a batch of rows in a round.
        let piece = (self.fit.batch_sequences * self.length / group.size()).max(1);
        let rounds = Rounds::agree(group, &owners, &own, first, piece)?;
        let wanted = rounds.experts(group.rank());
        let mut coming = wanted.iter().copied();
        if first.is_none() {
            let part = wanted.first().map(|&expert| Part::Expert(index, expert));
            part.or_else(|| self.after(index)).into_iter().for_each(|part| self.ahead.request(part));
        }
        let mut in_use: Option<(usize, Box<Expert>)> = None;
        for round in 0..rounds.count() {
            let sent: Vec<&[u32]> = (0..group.size()).map(|rank| rounds.sent(&own, rank, round)).collect();
            let tokens = |sent: &[u32]| -> Vec<u32> { sent.iter().map(|place| place / chosen as u32).collect() };
            let message = |sent: &&[u32]| {
                let scores = sent.iter().map(|&place| choices.scores[place as usize]).collect();
                Ok(Tokens { scores, rows: states.gather(&tokens(sent))? }.to_bytes())
            };
            let arrived = group.all_to_all(sent.iter().map(message).collect::<Result<_>>()?)?;
            let mut replies = vec![vec![]; group.size()];
            if let Some(step) = rounds.step(group.rank(), round) {
                if in_use.as_ref().is_none_or(|(expert, _)| *expert != step.expert) {
                    if let Some((_, before)) = in_use.take() {
                        self.ahead.give_back(*before);
                    }
                    let expert = coming.next();
                    debug_assert_eq!(expert, Some(step.expert));
                    in_use = Some((step.expert, self.expert(index, step.expert, coming.clone().next())?));
                }
                let (_, expert) = in_use.as_ref().expect("just taken at the latest");
                let (arrived, counts) = Tokens::arrived(arrived)?;
                let output = values(layer.routed(expert, self.tensor(arrived.rows), arrived.scores));
                let mut output = output.as_slice();
                for (reply, count) in replies.iter_mut().zip(counts) {
                    let (rows, rest) = output.split_at(count * width);
                    *reply = bytemuck::cast_slice(rows).to_vec();
                    output = rest;
                }
            }
            for (sent, given) in sent.into_iter().zip(group.all_to_all(replies)?) {
                if sent.is_empty() {
                    continue;
                }
                let routed: Vec<f32> = message::values(&given);
                if chosen == 1 {
                    let attended = self.tensor(states.gather(sent)?);
                    let update = self.sum(layer.shared(attended.clone()) + self.tensor(routed))?;
                    states.scatter(sent, &values(attended + update))?;
                    continue;
                }
                for (number, output) in outputs.iter_mut().enumerate() {
                    let is_this = |place: &u32| number_among(&choices.experts, *place as usize, chosen) == number;
                    let own = sent.iter().zip(routed.chunks(width)).filter(|(place, _)| is_this(place));
                    let (places, rows): (Vec<u32>, Vec<&[f32]>) = own.unzip();
                    output.scatter(&tokens(&places), &rows.concat())?;
                }
            }
        }
        if let Some((_, last)) = in_use {
            self.give_back(index, *last, false);
        }
        if chosen > 1 {
            for batch in self.batches() {
                let rows = batch.start * self.length..batch.end * self.length;
                let attended = self.tensor(states.read(rows.clone())?);
                let mut update = layer.shared(attended.clone());
                for output in &outputs {
                    update = update + self.tensor(output.read(rows.clone())?);
                }
                states.write(rows.start, &values(attended + self.sum(update)?))?;
            }
        }
        Ok(Experts { read: wanted.len() as u64, left_out: (here.len() - wanted.len()) as u64 })
    }

    /// An expert that was asked for; begins to read what follows it.
    fn expert(&mut self, index: usize, expert: usize, next: Option<usize>) -> Result<Box<Expert>> {
        let Loaded::Expert(weights) = self.ahead.take(Part::Expert(index, expert))? else {
            unreachable!("as it was asked for")
        };
        let next = next.map(|next| Part::Expert(index, next));
        if let Some(part) = next.or_else(|| self.after(index)) {
            self.ahead.request(part);
        }
        Ok(weights)
    }

    /// Keeps an expert's memory where another one follows; else it would stay beside something that it was not counted
    /// with.
    fn give_back(&mut self, index: usize, expert: Expert, more: bool) {
        if more || matches!(self.after(index), Some(Part::Routed(_))) {
            self.ahead.give_back(expert);
        }
    }
}

fn no_choices(room: usize) -> Choices {
    let mut choices = Choices { experts: Vec::with_capacity(room), scores: Vec::new() };
    choices.scores.reserve_exact(room);
    choices
}

/// How many of a token's experts come before the one at `place` of all choices.
fn number_among(experts: &[u32], place: usize, chosen: usize) -> usize {
    let own = &experts[place / chosen * chosen..][..chosen];
    own.iter().filter(|&&other| other < experts[place]).count()
}
