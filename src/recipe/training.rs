//! Parts of `[train]`: the router's balance, and what `[train]` may say of optimizers, guards and memory. How long a run is
//! and how it is cut is checked in `check`.

use serde::{Deserialize, Serialize};

use super::schema::{Dtype, Recipe, TrainSection};
use crate::error::{Error, Result};
use crate::train::balance::RouterConfig;
use crate::train::guard::{Guards, Reaction};
use crate::train::optimizer::{OptimizerConfig, OptimizerKind, Precision};

/// `[train.guards]`: what becomes of steps that went wrong.
pub type GuardsSection = Guards;

/// `train.router_balance`: a bias on the choice of experts, in the place of the balance loss or beside it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterBalance {
    /// What an expert's bias changes by after each step. Default 0.001.
    pub rate: f64,
    /// Share of the run, at its end, in which the biases go back to 0. Default 0.2.
    pub release: f64,
}

impl Default for RouterBalance {
    fn default() -> Self {
        RouterBalance { rate: 1e-3, release: 0.2 }
    }
}

pub(super) fn is_default(guards: &Guards) -> bool {
    *guards == Guards::default()
}

impl TrainSection {
    /// The optimizer this describes.
    pub fn optimizer(&self) -> OptimizerConfig {
        OptimizerConfig {
            kind: self.optimizer,
            betas: self.betas,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip_norm: self.clip_norm,
            momentum: self.momentum.unwrap_or(OptimizerConfig::default().momentum),
            groups: self.groups.clone(),
            precision: match self.precision {
                Dtype::F32 => Precision::F32,
                Dtype::Bf16 => Precision::Bf16,
            },
        }
    }

    /// How routers are trained, but for those that follow a teacher's.
    pub fn router(&self) -> RouterConfig {
        let bias = self.router_balance;
        RouterConfig {
            balance_weight: self.router_aux_weight,
            z_weight: self.router_z_weight,
            bias_rate: bias.map_or(0.0, |bias| bias.rate),
            bias_release: bias.map_or(0.0, |bias| bias.release),
            follow: None,
        }
    }
}

/// Refuses what has no meaning, or not together.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    let train = &recipe.train;
    if let Some(ema) = train.ema {
        recipe.number("train.ema", ema, (0.0..1.0).contains(&ema), "from 0 to below 1, as in 0.999")?;
    }
    let z_weight = train.router_z_weight;
    recipe.number("train.router_z_weight", z_weight, z_weight >= 0.0, "of 0 or more")?;
    if let Some(momentum) = train.momentum {
        recipe.number("train.momentum", momentum, (0.0..1.0).contains(&momentum), "from 0 to below 1")?;
        if train.optimizer != OptimizerKind::Muon {
            return Err(recipe.error("train.momentum", "is Muon's, and the optimizer is another", "remove it"));
        }
    }
    if let Some(RouterBalance { rate, release }) = train.router_balance {
        recipe.number("train.router_balance.rate", rate, rate > 0.0, "above 0, as in 0.001")?;
        let fits = (0.0..=1.0).contains(&release);
        recipe.number("train.router_balance.release", release, fits, "from 0 to 1, as in 0.2")?;
    }
    for (number, group) in train.groups.iter().enumerate() {
        group.check().map_err(|error| match error {
            Error::Usage { problem, tip } => {
                recipe.error(&format!("train.groups[{number}]"), format!("is not usable: {problem}"), tip)
            }
            error => error,
        })?;
    }
    check_guards(recipe)
}

fn check_guards(recipe: &Recipe) -> Result<()> {
    let guards = &recipe.train.guards;
    let key = |name: &str| format!("train.guards.{name}");
    if guards.not_finite == Reaction::Off {
        let problem = "is `off`, which would let a step without a finite loss into the weights";
        return Err(recipe.error(&key("not_finite"), problem, "use `stop`, `skip` or `rewind`"));
    }
    recipe.number(&key("spike_factor"), guards.spike_factor, guards.spike_factor > 0.0, "above 0, as in 10")?;
    recipe.positive(&key("spike_window"), guards.spike_window as u64)?;
    recipe.positive(&key("limit"), guards.limit)?;
    if recipe.tap.is_some() {
        for (name, reaction) in [("not_finite", guards.not_finite), ("spike", guards.spike)] {
            if matches!(reaction, Reaction::Skip | Reaction::Rewind) {
                let problem =
                    "lets the run go on after a step that does not count, and `[tap]` keeps that step's predictions";
                return Err(recipe.error(&key(name), problem, "use `stop`, or remove [tap]"));
            }
        }
    }
    Ok(())
}
