//! The checkpoint that measured best on held-out text, and the names that point at it and at the latest. Decides what
//! stays, and measures nothing.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{guard::Reaction, metrics::EvalMetrics, trainer::Trainer};
use crate::{
    checkpoint::{Pointer, keep_latest_and, point_at},
    error::Result,
};

/// The evaluation that was best so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    /// Nats per token; of the running mean of the weights, where one is kept, for that is what is used in the end.
    pub cross_entropy: f64,
}

impl Best {
    /// What an evaluation is ranked by.
    pub fn measure(evaluation: &EvalMetrics) -> f64 {
        evaluation.averaged_cross_entropy.unwrap_or(evaluation.cross_entropy)
    }
}

impl Trainer {
    /// Takes note of an evaluation; whether it is the best so far.
    pub(super) fn rank(&mut self, evaluation: &EvalMetrics) -> bool {
        let cross_entropy = Best::measure(evaluation);
        let better = self.best.as_ref().is_none_or(|best| cross_entropy < best.cross_entropy);
        if better && cross_entropy.is_finite() {
            self.best = Some(Best { step: self.step, cross_entropy });
        }
        better && cross_entropy.is_finite()
    }

    /// The step of the checkpoint that a guard goes back to: the last one that the schedule made, for one that an
    /// interruption made would not be there in an undisturbed run.
    pub(super) fn last_scheduled(&self) -> u64 {
        match self.config.checkpoint_every {
            0 => 0,
            every => self.step / every * every,
        }
    }

    /// Points at the new checkpoint, and drops those that nothing needs any more.
    pub(super) fn after_saving(&self, dir: &Path) -> Result<()> {
        point_at(dir, Pointer::Latest, self.step)?;
        let mut kept = vec![];
        if let Some(best) = &self.best {
            point_at(dir, Pointer::Best, best.step)?;
            kept.push(best.step);
        }
        let guards = &self.config.guards;
        if [guards.not_finite, guards.spike].contains(&Reaction::Rewind) {
            kept.push(self.last_scheduled());
        }
        if self.config.keep_checkpoints > 0 {
            keep_latest_and(dir, self.config.keep_checkpoints, &kept)?;
        }
        Ok(())
    }
}
