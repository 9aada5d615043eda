//! Tokens on their way to the ranks that have the experts they chose, and what the experts give on its way back. Rows of
//! numbers alone; what an expert is, it does not know.

use std::ops::Range;

use crate::{
    error::Result,
    models::Choices,
    parallel::{
        Collective,
        message::{Incoming, Outgoing},
    },
};

/// Who has which experts of a layer.
#[derive(Debug, Clone)]
pub(super) struct Dispatch {
    /// The experts of each rank of the group: all of them, in order.
    pub owners: Vec<Range<usize>>,
    /// Experts that a token chooses.
    pub chosen: usize,
}

/// What one expert is to compute.
pub(super) struct Work {
    /// Its place among those of this rank.
    pub expert: usize,
    /// `[rows, width]`
    pub rows: Vec<f32>,
    /// `[rows]`
    pub scores: Vec<f32>,
}

/// The rows that one rank sent for this rank's experts.
struct Arrived {
    /// Of each expert, rows in a row.
    counts: Vec<u32>,
    scores: Vec<f32>,
    rows: Vec<f32>,
}

impl Dispatch {
    /// Sends each token to the experts it chose. `run` computes one of this rank's experts over rows of any
    /// ranks. Gives, for each of a token's choices in the order of the experts' numbers, what they gave.
    ///
    /// All ranks of the group call it at once, those that have no tokens too. A rank holds at most what all ranks of
    /// its group send: all their tokens when it has the expert that all of them chose.
    ///
    /// # Shapes
    /// - `tokens`: choices `[N, chosen]` and rows `[N, width]`; result `chosen` times `[N, width]`
    pub(super) fn run(
        &self,
        group: &dyn Collective,
        width: usize,
        tokens: Option<(Choices, Vec<f32>)>,
        run: impl FnMut(Work) -> Result<Vec<f32>>,
    ) -> Result<Vec<Vec<f32>>> {
        let (choices, rows) = tokens.unwrap_or((Choices { experts: vec![], scores: vec![] }, vec![]));
        // Assignments by expert; those of one expert keep the order of the tokens.
        let mut order: Vec<usize> = (0..choices.experts.len()).collect();
        order.sort_by_key(|&assignment| choices.experts[assignment]);
        let token = |assignment: usize| assignment / self.chosen;

        let mut rest = order.as_slice();
        let parts = self.owners.iter().map(|owned| {
            let end = rest.partition_point(|&assignment| (choices.experts[assignment] as usize) < owned.end);
            let (own, later) = rest.split_at(end);
            rest = later;
            let mut counts = vec![0u32; owned.len()];
            own.iter().for_each(|&assignment| counts[choices.experts[assignment] as usize - owned.start] += 1);
            let scores: Vec<f32> = own.iter().map(|&assignment| choices.scores[assignment]).collect();
            let mut sent = Vec::with_capacity(own.len() * width);
            own.iter().for_each(|&assignment| sent.extend_from_slice(&rows[token(assignment) * width..][..width]));
            Outgoing::new().list(&counts).list(&scores).list(&sent).into_bytes()
        });
        let arrived = group.all_to_all(parts.collect())?;
        let arrived = arrived.iter().map(|bytes| {
            let mut message = Incoming::new(bytes);
            Ok(Arrived { counts: message.list()?, scores: message.list()?, rows: message.list()? })
        });
        let arrived: Vec<Arrived> = arrived.collect::<Result<_>>()?;

        let replies = serve(&arrived, self.owners[group.rank()].len(), width, run)?;
        let replies = replies.into_iter().map(|reply| bytemuck::cast_slice(&reply).to_vec()).collect();
        let given = group.all_to_all(replies)?;

        // The owners have the experts in order, so their replies follow each other in the order of the assignments.
        let mut outputs = vec![vec![0.0f32; rows.len()]; self.chosen];
        let mut seen = vec![0usize; rows.len() / width];
        let mut assignments = order.into_iter();
        for bytes in &given {
            let values: Vec<f32> = crate::parallel::message::values(bytes);
            for (row, assignment) in values.chunks(width).zip(&mut assignments) {
                let token = token(assignment);
                outputs[seen[token]][token * width..][..width].copy_from_slice(row);
                seen[token] += 1;
            }
        }
        Ok(outputs)
    }
}

/// Runs each expert once over the rows of all ranks; gives each rank its rows' outputs, in the order in which it sent them.
fn serve(
    arrived: &[Arrived],
    expert_count: usize,
    width: usize,
    mut run: impl FnMut(Work) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<f32>>> {
    let mut replies: Vec<Vec<f32>> = arrived.iter().map(|from| Vec::with_capacity(from.rows.len())).collect();
    let mut taken = vec![0usize; arrived.len()];
    for expert in 0..expert_count {
        let counts: Vec<usize> = arrived.iter().map(|from| from.counts[expert] as usize).collect();
        let total = counts.iter().sum::<usize>();
        if total == 0 {
            continue;
        }
        let (mut rows, mut scores) = (Vec::with_capacity(total * width), Vec::with_capacity(total));
        for ((from, taken), &count) in arrived.iter().zip(&mut taken).zip(&counts) {
            rows.extend_from_slice(&from.rows[*taken * width..][..count * width]);
            scores.extend_from_slice(&from.scores[*taken..][..count]);
            *taken += count;
        }
        let output = run(Work { expert, rows, scores })?;
        let mut output = output.as_slice();
        for (reply, &count) in replies.iter_mut().zip(&counts) {
            let (own, rest) = output.split_at(count * width);
            reply.extend_from_slice(own);
            output = rest;
        }
    }
    Ok(replies)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::{in_process, share};

    /// Rows that come back as what the expert's number and the score make of them.
    fn run_on(ranks: usize, expert_count: usize, chosen: usize, experts_of: &[Vec<u32>]) {
        let width = 2;
        let results: Vec<Vec<Vec<f32>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = in_process::world(ranks)
                .into_iter()
                .zip(experts_of)
                .map(|(end, experts)| {
                    scope.spawn(move || {
                        let owners: Vec<Range<usize>> =
                            (0..ranks).map(|rank| share(expert_count, ranks, rank)).collect();
                        let first = owners[end.rank()].start;
                        let dispatch = Dispatch { owners, chosen };
                        let rows: Vec<f32> =
                            (0..experts.len() / chosen * width).map(|n| (end.rank() * 100 + n) as f32).collect();
                        let scores = (0..experts.len()).map(|n| n as f32 + 0.5).collect();
                        let tokens =
                            (!experts.is_empty()).then(|| (Choices { experts: experts.clone(), scores }, rows));
                        let run = |work: Work| {
                            let number = (first + work.expert) as f32;
                            let scores = work.scores.iter().flat_map(|score| [score; 2]);
                            let rows = work.rows.iter().zip(scores);
                            Ok(rows.map(|(row, score)| row * 1000.0 + number * 10.0 + score).collect())
                        };
                        dispatch.run(&end, width, tokens, run).unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (rank, (experts, outputs)) in experts_of.iter().zip(results).enumerate() {
            assert_eq!(outputs.len(), chosen);
            for token in 0..experts.len() / chosen {
                let mut own: Vec<(u32, usize)> =
                    (0..chosen).map(|choice| (experts[token * chosen + choice], token * chosen + choice)).collect();
                own.sort_unstable();
                for (place, (expert, assignment)) in own.into_iter().enumerate() {
                    for column in 0..width {
                        let row = (rank * 100 + token * width + column) as f32;
                        let expected = row * 1000.0 + expert as f32 * 10.0 + assignment as f32 + 0.5;
                        assert_eq!(outputs[place][token * width + column], expected);
                    }
                }
            }
        }
    }

    #[test]
    fn every_token_comes_back_from_the_experts_it_chose() {
        run_on(1, 4, 1, &[vec![3, 0, 3, 1]]);
        run_on(2, 4, 2, &[vec![3, 0, 1, 2, 0, 1], vec![2, 3]]);
        run_on(3, 6, 1, &[vec![5, 5, 0], vec![], vec![2, 4, 4, 1]]);
        // One expert takes all; two ranks have none of the tokens.
        run_on(4, 4, 1, &[vec![2; 9], vec![], vec![2; 3], vec![]]);
        run_on(2, 2, 1, &[vec![], vec![]]);
    }
}
