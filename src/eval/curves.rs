//! What an arm logged while it was trained, as curves. How they are drawn is `page`'s business.

use serde::{Deserialize, Deserializer, Serialize};

use crate::eval::report::Role;
use crate::train::metrics::{GuardMetrics, Metric};

/// What one arm logged during training: `(step, value)`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Curves {
    pub role: Role,
    /// What training minimised; arms with different weights are not comparable by it.
    #[serde(default, deserialize_with = "points_or_nan")]
    pub loss: Vec<(u64, f64)>,
    /// Cross-entropy of the training labels; comparable between arms.
    #[serde(default, deserialize_with = "points_or_nan")]
    pub hard_loss: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub soft_loss: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub held_out: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub soft_weight: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub hard_weight: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub soft_gradient_norm: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub hard_gradient_norm: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub learning_rate: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub grad_norm: Vec<(u64, f64)>,
    #[serde(default, deserialize_with = "points_or_nan")]
    pub tokens_per_second: Vec<(u64, f64)>,
    /// Held-out cross-entropy of the running mean of the weights.
    #[serde(default, deserialize_with = "points_or_nan")]
    pub averaged: Vec<(u64, f64)>,
    /// The largest share of a layer's tokens that one expert had, over the even share; the mean of the layers.
    #[serde(default, deserialize_with = "points_or_nan")]
    pub imbalance: Vec<(u64, f64)>,
    /// KL of routers from the teacher's that they follow.
    #[serde(default, deserialize_with = "points_or_nan", skip_serializing_if = "Vec::is_empty")]
    pub router_kl: Vec<(u64, f64)>,
    /// Steps that a guard held back.
    #[serde(default)]
    pub held_back: Vec<GuardMetrics>,
}

impl Curves {
    /// The curves of one arm, from the lines of `metrics.jsonl`.
    pub fn from_metrics(role: Role, metrics: &[Metric]) -> Curves {
        let mut curves = Curves {
            role,
            loss: Vec::new(),
            hard_loss: Vec::new(),
            soft_loss: Vec::new(),
            held_out: Vec::new(),
            soft_weight: Vec::new(),
            hard_weight: Vec::new(),
            soft_gradient_norm: Vec::new(),
            hard_gradient_norm: Vec::new(),
            learning_rate: Vec::new(),
            grad_norm: Vec::new(),
            tokens_per_second: Vec::new(),
            averaged: Vec::new(),
            imbalance: Vec::new(),
            router_kl: Vec::new(),
            held_back: Vec::new(),
        };
        for metric in metrics.iter().filter(|metric| metric.arm() == role.name()) {
            match metric {
                Metric::Step(line) => {
                    curves.loss.push((line.step, line.loss));
                    curves.hard_loss.push((line.step, line.hard_loss));
                    curves.soft_loss.extend(line.soft_loss.map(|value| (line.step, value)));
                    curves.soft_weight.push((line.step, line.soft_weight));
                    curves.hard_weight.push((line.step, line.hard_weight));
                    curves.soft_gradient_norm.extend(line.soft_gradient_norm.map(|value| (line.step, value)));
                    curves.hard_gradient_norm.push((line.step, line.hard_gradient_norm));
                    curves.learning_rate.push((line.step, line.learning_rate));
                    curves.grad_norm.push((line.step, line.grad_norm));
                    curves.tokens_per_second.push((line.step, line.tokens_per_second));
                    curves.router_kl.extend(line.router_kl.map(|value| (line.step, value)));
                    curves.imbalance.extend(imbalance(&line.expert_load).map(|value| (line.step, value)));
                }
                Metric::Evaluation(line) => {
                    curves.held_out.push((line.step, line.cross_entropy));
                    curves.averaged.extend(line.averaged_cross_entropy.map(|value| (line.step, value)));
                }
                Metric::Guard(line) => curves.held_back.push(line.clone()),
            }
        }
        curves
    }
}

/// The largest share over the even one, averaged over layers.
fn imbalance(loads: &[Vec<f32>]) -> Option<f64> {
    let of_layer = |load: &Vec<f32>| load.iter().fold(0.0f32, |a, &b| a.max(b)) as f64 * load.len() as f64;
    (!loads.is_empty()).then(|| loads.iter().map(of_layer).sum::<f64>() / loads.len() as f64)
}

fn points_or_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<(u64, f64)>, D::Error> {
    let points = Vec::<(u64, Option<f64>)>::deserialize(deserializer)?;
    Ok(points.into_iter().map(|(step, value)| (step, value.unwrap_or(f64::NAN))).collect())
}
