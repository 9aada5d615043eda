//! A number that changes with the step: learning rates and loss weights.

use serde::{Deserialize, Serialize};

/// `value(step)` over a run of `total` steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Schedule {
    /// The same value throughout.
    Constant { value: f64 },
    /// A straight line from `from` at the first step to `to` at the last.
    Linear { from: f64, to: f64 },
    /// Half a cosine wave from `from` to `to`.
    Cosine { from: f64, to: f64 },
    /// Warm-up, stable, decay: stays at `from` until the last `decay` share (0..1) of the run, then a straight line to `to`.
    Wsd { from: f64, to: f64, decay: f64 },
}

impl Schedule {
    /// The value at `step` of `total` steps; steps beyond the end keep the last value.
    pub fn value(&self, step: u64, total: u64) -> f64 {
        let last = total.saturating_sub(1).max(1) as f64;
        let progress = (step as f64 / last).min(1.0);
        let mix = |from: f64, to: f64, share: f64| from + (to - from) * share;
        match *self {
            Schedule::Constant { value } => value,
            Schedule::Linear { from, to } => mix(from, to, progress),
            Schedule::Cosine { from, to } => mix(from, to, 0.5 - 0.5 * (std::f64::consts::PI * progress).cos()),
            Schedule::Wsd { from, to, decay } => {
                mix(from, to, if decay <= 0.0 { 0.0 } else { ((progress - (1.0 - decay)) / decay).clamp(0.0, 1.0) })
            }
        }
    }

    /// The largest value the schedule takes.
    pub fn peak(&self) -> f64 {
        match *self {
            Schedule::Constant { value } => value,
            Schedule::Linear { from, to } | Schedule::Cosine { from, to } | Schedule::Wsd { from, to, .. } => {
                from.max(to)
            }
        }
    }
}

/// A learning rate: a straight climb from near zero over `warmup` steps, then `schedule` over the rest of the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearningRate {
    /// Steps of warm-up; 0 for none.
    pub warmup: u64,
    /// What follows, as if the run began after the warm-up.
    pub schedule: Schedule,
}

impl LearningRate {
    /// The rate at `step` of `total` steps. The first step of a warm-up is one share of it, never zero.
    pub fn value(&self, step: u64, total: u64) -> f64 {
        if step < self.warmup {
            return self.schedule.value(0, total) * (step + 1) as f64 / self.warmup as f64;
        }
        self.schedule.value(step - self.warmup, total.saturating_sub(self.warmup))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_and_end_where_they_say() {
        for schedule in [
            Schedule::Linear { from: 0.9, to: 0.5 },
            Schedule::Cosine { from: 0.9, to: 0.5 },
            Schedule::Wsd { from: 0.9, to: 0.5, decay: 0.2 },
        ] {
            assert!((schedule.value(0, 101) - 0.9).abs() < 1e-12);
            assert!((schedule.value(100, 101) - 0.5).abs() < 1e-12);
            assert!((schedule.value(5000, 101) - 0.5).abs() < 1e-12);
        }
        assert!((Schedule::Cosine { from: 0.9, to: 0.5 }.value(50, 101) - 0.7).abs() < 1e-12);
        assert_eq!(Schedule::Wsd { from: 1.0, to: 0.0, decay: 0.2 }.value(79, 101), 1.0);
        assert_eq!(Schedule::Constant { value: 0.3 }.value(7, 0), 0.3);
    }

    #[test]
    fn a_warm_up_climbs_to_the_schedule_and_leaves_it_the_rest_of_the_run() {
        let rate = LearningRate { warmup: 10, schedule: Schedule::Linear { from: 1.0, to: 0.0 } };
        assert!((rate.value(0, 111) - 0.1).abs() < 1e-12);
        assert!((rate.value(9, 111) - 1.0).abs() < 1e-12);
        assert!((rate.value(10, 111) - 1.0).abs() < 1e-12);
        assert!((rate.value(60, 111) - 0.5).abs() < 1e-12);
        assert!((rate.value(110, 111) - 0.0).abs() < 1e-12);
        assert_eq!(LearningRate { warmup: 0, ..rate }.value(0, 100), 1.0);
    }
}
