//! The rounds in which the tokens of a long sweep travel to the ranks that have the experts they chose: in each, every
//! rank is sent some tokens for one of its experts, never more than it was meant to hold. Each expert has its rounds one
//! after the other, so it is needed once, and one that no token of any rank chose has none.

use std::ops::Range;

use crate::{
    error::Result,
    parallel::{
        Collective,
        message::{Incoming, Outgoing, values},
    },
};

/// What one rank does with each token of its own, sorted by the expert that it chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ByExpert {
    /// Where each expert's assignments begin in `order`, and where the last one's end.
    pub starts: Vec<usize>,
    /// Places in the list of choices. Those of one expert keep the order of the tokens.
    pub order: Vec<u32>,
}

impl ByExpert {
    /// `experts`: what each token chose, one after the other.
    pub(super) fn new(experts: &[u32], expert_count: usize) -> Self {
        let mut starts = vec![0usize; expert_count + 1];
        experts.iter().for_each(|&expert| starts[expert as usize + 1] += 1);
        (0..expert_count).for_each(|expert| starts[expert + 1] += starts[expert]);
        let (mut next, mut order) = (starts.clone(), vec![0u32; experts.len()]);
        for (assignment, &expert) in experts.iter().enumerate() {
            order[next[expert as usize]] = assignment as u32;
            next[expert as usize] += 1;
        }
        ByExpert { starts, order }
    }

    /// The assignments of an expert.
    pub(super) fn of(&self, expert: usize) -> &[u32] {
        &self.order[self.starts[expert]..self.starts[expert + 1]]
    }

    /// The experts that a token chose, in order.
    pub(super) fn chosen(&self) -> Vec<usize> {
        (0..self.starts.len() - 1).filter(|&expert| !self.of(expert).is_empty()).collect()
    }
}

/// One rank's part in a round: each rank sends it tokens that chose this expert, from this one of its own on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub expert: usize,
    first: usize,
}

/// The rounds of one layer, the same on every rank.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rounds {
    /// The steps of each rank; some have fewer than others.
    steps: Vec<Vec<Step>>,
    /// Most tokens that a rank sends to another one in a round.
    piece: usize,
}

impl Rounds {
    /// All ranks of the group call it at once. `owners`: the experts of each of them, in order. `first`: the one of its
    /// experts that this rank wants to begin with, because it is reading it; a token of its own chose it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub(super) fn agree(
        group: &dyn Collective,
        owners: &[Range<usize>],
        own: &ByExpert,
        first: Option<usize>,
        piece: usize,
    ) -> Result<Rounds> {
        let counts = own.starts.windows(2).map(|pair| (pair[1] - pair[0]) as u32);
        let message: Vec<u32> = counts.chain([first.map_or(u32::MAX, |first| first as u32)]).collect();
        let all = group.all_gather(bytemuck::cast_slice(&message))?;
        let all: Vec<Vec<u32>> = all.iter().map(|bytes| values(bytes)).collect();
        Ok(Rounds::new(owners, &all, piece))
    }

    /// `counts`: of each rank, how many of its tokens chose each expert, and after that the expert it begins with.
    fn new(owners: &[Range<usize>], counts: &[Vec<u32>], piece: usize) -> Rounds {
        let most = |expert: usize| counts.iter().map(|counts| counts[expert] as usize).max().unwrap_or(0);
        let steps = |expert: usize| (0..most(expert)).step_by(piece).map(move |first| Step { expert, first });
        let of_rank = |(owned, counts): (&Range<usize>, &Vec<u32>)| {
            let mut experts: Vec<usize> = owned.clone().collect();
            if let Some(place) = experts.iter().position(|&expert| Some(&(expert as u32)) == counts.last()) {
                experts[..=place].rotate_right(1);
            }
            experts.into_iter().flat_map(steps).collect()
        };
        Rounds { steps: owners.iter().zip(counts).map(of_rank).collect(), piece }
    }

    pub(super) fn count(&self) -> usize {
        self.steps.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// What a rank does in a round, if it still has something to do.
    pub(super) fn step(&self, rank: usize, round: usize) -> Option<Step> {
        self.steps[rank].get(round).copied()
    }

    /// The experts of a rank that a token of any rank chose, in the order in which they are needed.
    pub(super) fn experts(&self, rank: usize) -> Vec<usize> {
        let mut experts: Vec<usize> = self.steps[rank].iter().map(|step| step.expert).collect();
        experts.dedup();
        experts
    }

    /// Those of a rank's own assignments that it sends to another one in a round.
    pub(super) fn sent<'a>(&self, own: &'a ByExpert, to: usize, round: usize) -> &'a [u32] {
        let Some(step) = self.step(to, round) else { return &[] };
        let all = own.of(step.expert);
        &all[step.first.min(all.len())..(step.first + self.piece).min(all.len())]
    }
}

/// Tokens for an expert.
pub(super) struct Tokens {
    /// `[N]`
    pub scores: Vec<f32>,
    /// `[N, width]` row-major
    pub rows: Vec<f32>,
}

impl Tokens {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        Outgoing::new().list(&self.scores).list(&self.rows).into_bytes()
    }

    /// What all ranks sent in one round, one after the other, and how many tokens each of them did.
    ///
    /// # Errors
    /// When something else arrived.
    pub(super) fn arrived(messages: Vec<Vec<u8>>) -> Result<(Tokens, Vec<usize>)> {
        let (mut all, mut counts) = (Tokens { scores: vec![], rows: vec![] }, vec![]);
        for bytes in messages {
            let mut message = Incoming::new(&bytes);
            let scores: Vec<f32> = message.list()?;
            counts.push(scores.len());
            all.scores.extend(scores);
            all.rows.extend(message.list::<f32>()?);
        }
        Ok((all, counts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_grouped_by_expert_in_the_order_of_the_tokens() {
        let found = ByExpert::new(&[3, 0, 3, 3, 0, 1], 5);
        assert_eq!(found, ByExpert { starts: vec![0, 2, 3, 3, 6, 6], order: vec![1, 4, 5, 0, 2, 3] });
        assert_eq!((found.of(3), found.chosen()), (&[0, 2, 3][..], vec![0, 1, 3]));
        assert!(ByExpert::new(&[], 2).chosen().is_empty());
    }

    /// Loads of all kinds: every assignment is sent exactly once, to the owner of its expert while that has it, and no
    /// message is larger than it may be.
    #[test]
    fn every_token_is_sent_once_and_every_expert_needed_once() {
        let owners = [0..2, 2..4, 4..6];
        let cases: [[Vec<u32>; 3]; 5] = [
            [vec![0, 1, 2, 3, 4, 5, 0], vec![5, 5, 5, 1], vec![2]],
            [vec![3; 11], vec![3; 2], vec![]],
            [vec![], vec![], vec![]],
            [vec![4, 5, 4, 5], vec![5], vec![4; 9]],
            [vec![1], vec![], vec![]],
        ];
        for (experts, piece) in cases.iter().flat_map(|case| [1, 2, 3, 100].map(|piece| (case, piece))) {
            let own: Vec<ByExpert> = experts.iter().map(|experts| ByExpert::new(experts, 6)).collect();
            // A rank begins with the last of its experts that its own tokens chose.
            let first = |rank: usize| own[rank].chosen().into_iter().rfind(|expert| owners[rank].contains(expert));
            let count = |rank: usize, expert: usize| own[rank].of(expert).len() as u32;
            let message = |rank: usize| {
                let first = first(rank).map_or(u32::MAX, |first| first as u32);
                (0..6).map(|expert| count(rank, expert)).chain([first]).collect()
            };
            let rounds = Rounds::new(&owners, &(0..3).map(message).collect::<Vec<_>>(), piece);
            for (rank, owned) in owners.iter().enumerate() {
                let needed: Vec<usize> = owned
                    .clone()
                    .filter(|expert| experts.iter().flatten().any(|chosen| *chosen as usize == *expert))
                    .collect();
                let mut found = rounds.experts(rank);
                assert!(first(rank).is_none_or(|first| found[0] == first), "{experts:?}: {found:?}");
                found.sort_unstable();
                assert_eq!(found, needed, "{experts:?}");
            }
            for (own, experts) in own.iter().zip(experts) {
                let mut sent: Vec<u32> = vec![];
                for round in 0..rounds.count() {
                    for to in 0..3 {
                        let now = rounds.sent(own, to, round);
                        assert!(now.len() <= piece);
                        let step = rounds.step(to, round);
                        assert!(
                            now.iter().all(|&place| Some(experts[place as usize] as usize) == step.map(|s| s.expert))
                        );
                        sent.extend(now);
                    }
                }
                sent.sort_unstable();
                assert!(sent.into_iter().eq(0..experts.len() as u32), "{experts:?} in pieces of {piece}");
            }
            assert!(rounds.count() <= experts.iter().map(Vec::len).sum::<usize>(), "none is empty for all");
        }
    }

    #[test]
    fn tokens_arrive_as_they_were_sent() {
        let sent = |scores: &[f32]| Tokens {
            scores: scores.to_vec(),
            rows: scores.iter().flat_map(|score| [*score, -score]).collect(),
        };
        let messages = vec![sent(&[1.0, 2.0]).to_bytes(), sent(&[]).to_bytes(), sent(&[3.0]).to_bytes()];
        let (all, counts) = Tokens::arrived(messages).unwrap();
        assert_eq!((all.scores, all.rows), (vec![1.0, 2.0, 3.0], vec![1.0, -1.0, 2.0, -2.0, 3.0, -3.0]));
        assert_eq!(counts, [2, 0, 1]);
    }
}
