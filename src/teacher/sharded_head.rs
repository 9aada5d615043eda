//! Targets from logits that lie on several ranks, each with some of the vocabulary. Exact selections exchange candidates
//! and sums; drawn ones run along whole rows, which one rank then gathers.

use limbeck_kernels::{
    selection_shard::{self, Candidates, Kept, Outside, Shard},
    vector_math::max,
};

use super::predictions::{Predictions, Row};
use crate::{
    error::Result,
    parallel::{
        Collective, Group,
        message::{Incoming, Outgoing, values},
    },
    targets::SparseTargets,
};

/// The ranks that have the vocabulary together.
pub(super) struct ShardedHead<'a> {
    pub group: &'a Group<'a>,
    pub predictions: &'a Predictions,
    /// The first of this rank's ids.
    pub first_id: u32,
}

impl ShardedHead<'_> {
    /// Appends the targets of some rows on the first rank of the group; the others help.
    ///
    /// # Shapes
    /// - `logits` `[rows, own ids]` row-major
    ///
    /// # Errors
    /// When a prediction is not finite, and when a rank is lost.
    pub(super) fn append(&self, logits: &[f32], rows: &[Row], targets: &mut SparseTargets) -> Result<()> {
        if self.group.size() == 1 {
            return self.predictions.append(logits, rows, targets);
        }
        if selection_shard::is_possible(self.predictions.rule()) {
            self.exact(logits, rows, targets)
        } else {
            self.whole_rows(logits, rows, targets)
        }
    }

    fn is_first(&self) -> bool {
        self.group.rank() == 0
    }

    fn exact(&self, logits: &[f32], rows: &[Row], targets: &mut SparseTargets) -> Result<()> {
        let (rule, temperatures) = (self.predictions.rule(), self.predictions.temperatures());
        let shard = Shard { logits, width: logits.len() / rows.len(), first_id: self.first_id };

        let maxima = self.group.all_gather(bytemuck::cast_slice(&selection_shard::largest(shard)))?;
        let maxima: Vec<Vec<f32>> = maxima.iter().map(|bytes| values(bytes)).collect();
        let of_row = |row: usize| max(&maxima.iter().map(|own| own[row]).collect::<Vec<_>>());
        let largest: Vec<f32> = (0..rows.len()).map(of_row).collect();

        let own = selection_shard::candidates(shard, &largest, rule, temperatures[0]);
        let all = self.group.all_gather(&candidates_to_bytes(&own))?;
        let all: Vec<Vec<Candidates>> = all.iter().map(|bytes| candidates_from(bytes)).collect::<Result<_>>()?;
        let kept: Vec<Kept> = (0..rows.len())
            .map(|row| {
                let offers: Vec<&Candidates> = all.iter().map(|own| &own[row]).collect();
                selection_shard::keep(&offers, largest[row], rule, temperatures[0])
            })
            .collect();

        let labels: Vec<u32> = rows.iter().map(Row::label).collect();
        let own = selection_shard::outside(shard, &largest, &kept, &labels, temperatures);
        if !self.is_first() {
            return self.group.send(0, outside_to_bytes(&own));
        }
        let mut all = vec![own];
        for rank in 1..self.group.size() {
            all.push(outside_from(&self.group.receive(rank)?, temperatures.len())?);
        }
        let selected = (0..rows.len()).map(|row| {
            let beside: Vec<&Outside> = all.iter().map(|own| &own[row]).collect();
            selection_shard::summarise(&beside, largest[row], &kept[row], temperatures)
        });
        self.predictions.append_selected(selected.collect(), rows, targets)
    }

    fn whole_rows(&self, logits: &[f32], rows: &[Row], targets: &mut SparseTargets) -> Result<()> {
        if !self.is_first() {
            return self.group.send(0, bytemuck::cast_slice(logits).to_vec());
        }
        let vocab = self.predictions.vocab();
        let mut whole = vec![0.0f32; rows.len() * vocab];
        let mut first = 0;
        for rank in 0..self.group.size() {
            let part: Vec<f32> = if rank == 0 { logits.to_vec() } else { values(&self.group.receive(rank)?) };
            let width = part.len() / rows.len();
            for (row, part) in whole.chunks_mut(vocab).zip(part.chunks(width)) {
                row[first..first + width].copy_from_slice(part);
            }
            first += width;
        }
        self.predictions.append(&whole, rows, targets)
    }
}

fn candidates_to_bytes(rows: &[Candidates]) -> Vec<u8> {
    let counts: Vec<u32> = rows.iter().map(|row| row.ids.len() as u32).collect();
    let ids: Vec<u32> = rows.iter().flat_map(|row| row.ids.iter().copied()).collect();
    let logits: Vec<f32> = rows.iter().flat_map(|row| row.logits.iter().copied()).collect();
    let totals: Vec<f64> = rows.iter().flat_map(|row| [row.total, row.total_at_one]).collect();
    Outgoing::new().list(&counts).list(&ids).list(&logits).list(&totals).into_bytes()
}

fn candidates_from(bytes: &[u8]) -> Result<Vec<Candidates>> {
    let mut message = Incoming::new(bytes);
    let (counts, ids): (Vec<u32>, Vec<u32>) = (message.list()?, message.list()?);
    let (logits, totals): (Vec<f32>, Vec<f64>) = (message.list()?, message.list()?);
    let mut first = 0;
    let rows = counts.into_iter().zip(totals.chunks(2)).map(|(count, totals)| {
        let own = first..first + count as usize;
        first = own.end;
        Candidates {
            ids: ids[own.clone()].to_vec(),
            logits: logits[own].to_vec(),
            total: totals[0],
            total_at_one: totals[1],
        }
    });
    Ok(rows.collect())
}

fn outside_to_bytes(rows: &[Outside]) -> Vec<u8> {
    let masses: Vec<f64> = rows.iter().flat_map(|row| row.log_masses.iter().copied()).collect();
    let is_own: Vec<u8> = rows.iter().map(|row| row.label_logit.is_some() as u8).collect();
    let labels: Vec<f32> = rows.iter().map(|row| row.label_logit.unwrap_or(0.0)).collect();
    Outgoing::new().list(&masses).list(&is_own).list(&labels).into_bytes()
}

fn outside_from(bytes: &[u8], temperatures: usize) -> Result<Vec<Outside>> {
    let mut message = Incoming::new(bytes);
    let masses: Vec<f64> = message.list()?;
    let (is_own, labels): (Vec<u8>, Vec<f32>) = (message.list()?, message.list()?);
    let rows = masses.chunks(temperatures).zip(is_own.into_iter().zip(labels));
    let rows = rows.map(|(masses, (is_own, label))| Outside {
        log_masses: masses.to_vec(),
        label_logit: (is_own == 1).then_some(label),
    });
    Ok(rows.collect())
}
