//! How much the soft and the hard target count at a step.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    schedule::Schedule,
};

/// The weights of one step; never negative, never both zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    pub soft: f64,
    pub hard: f64,
}

/// The soft target's weight over the run, between 0 and 1; the hard target has the rest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Weighting {
    /// The same share throughout. Hinton et al. 2015, section 2.
    Constant { soft: f64 },
    /// A straight line from the first step to the last.
    Linear { from: f64, to: f64 },
    /// Half a cosine wave from the first step to the last.
    Cosine { from: f64, to: f64 },
}

impl Weighting {
    /// The hard target alone.
    pub fn hard_only() -> Self {
        Weighting::Constant { soft: 0.0 }
    }

    /// Whether the soft target ever counts.
    pub fn needs_soft_targets(&self) -> bool {
        self.schedule().peak() > 0.0
    }

    /// Refuses shares outside 0..=1.
    pub fn check(&self) -> Result<()> {
        match self.shares().into_iter().find(|(_, share)| !(0.0..=1.0).contains(share)) {
            Some((_, share)) => {
                Err(Error::usage(format!("soft weight {share} is not a share"), "give a number from 0 to 1"))
            }
            None => Ok(()),
        }
    }

    /// The shares it is made of, by their names.
    pub fn shares(&self) -> Vec<(&'static str, f64)> {
        match *self {
            Weighting::Constant { soft } => vec![("soft", soft)],
            Weighting::Linear { from, to } | Weighting::Cosine { from, to } => vec![("from", from), ("to", to)],
        }
    }

    /// The weights at `step` of `total`.
    pub fn weights(&self, step: u64, total: u64) -> Weights {
        let soft = self.schedule().value(step, total);
        Weights { soft, hard: 1.0 - soft }
    }

    fn schedule(&self) -> Schedule {
        match *self {
            Weighting::Constant { soft } => Schedule::Constant { value: soft },
            Weighting::Linear { from, to } => Schedule::Linear { from, to },
            Weighting::Cosine { from, to } => Schedule::Cosine { from, to },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_shares_of_one_at_every_step() {
        let kinds = [
            Weighting::hard_only(),
            Weighting::Constant { soft: 1.0 },
            Weighting::Linear { from: 0.9, to: 0.5 },
            Weighting::Cosine { from: 0.0, to: 1.0 },
        ];
        for weighting in kinds {
            weighting.check().unwrap();
            for step in 0..120 {
                let Weights { soft, hard } = weighting.weights(step, 100);
                assert!(soft >= 0.0 && hard >= 0.0 && (soft + hard - 1.0).abs() < 1e-12);
            }
        }
        let message = Weighting::Linear { from: 0.5, to: 1.5 }.check().unwrap_err().to_string();
        assert_eq!(message, "soft weight 1.5 is not a share; give a number from 0 to 1");
    }
}
