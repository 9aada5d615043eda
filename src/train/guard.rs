//! Steps that must not reach the weights: a loss or a gradient that is no number, and a loss far above those before it.
//!
//! Says what is wrong with a step and what was asked for; the training loop does it. What it remembers is in checkpoints, so
//! a run that was interrupted judges as an undisturbed one.

use std::{collections::VecDeque, fmt};

use serde::{Deserialize, Serialize};

/// What becomes of a step that a guard holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reaction {
    /// It counts like any other.
    Off,
    /// The run ends with an error; the latest checkpoint is from before it.
    #[default]
    Stop,
    /// Weights and moments stay as they are, and the run goes on with the next step's sequences.
    Skip,
    /// The run goes back to its last checkpoint, and on from there with the sequences after those of the step: whatever made
    /// the weights ready for the spike is undone as well.
    Rewind,
}

/// Settings of the guards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guards {
    /// For a loss or a gradient that is not finite. Default `stop`.
    pub not_finite: Reaction,
    /// For a loss far above the median of those before it. Default `off`.
    pub spike: Reaction,
    /// How far: in standard deviations, estimated by the median distance from the median. Default 10.
    pub spike_factor: f64,
    /// Steps whose losses are compared; there are no spikes before that many. Default 50.
    pub spike_window: usize,
    /// Steps that may be held back in a row before the run ends with an error all the same. Default 3.
    pub limit: u64,
}

impl Default for Guards {
    fn default() -> Self {
        Guards { not_finite: Reaction::Stop, spike: Reaction::Off, spike_factor: 10.0, spike_window: 50, limit: 3 }
    }
}

impl Guards {
    /// Whether one of them goes back to a checkpoint.
    pub fn rewinds(&self) -> bool {
        [self.not_finite, self.spike].contains(&Reaction::Rewind)
    }

    /// What is to be done about something.
    pub fn reaction(&self, trouble: &Trouble) -> Reaction {
        match trouble {
            Trouble::NotFinite { .. } => self.not_finite,
            Trouble::Spike { .. } => self.spike,
        }
    }
}

/// What is wrong with a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Trouble {
    NotFinite { what: &'static str },
    Spike { loss: f64, median: f64, allowed: f64 },
}

impl fmt::Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::NotFinite { what } => write!(formatter, "{what} is not finite"),
            Trouble::Spike { loss, median, allowed } => {
                write!(formatter, "the loss is {loss:.4}, above {allowed:.4}; the median before it is {median:.4}")
            }
        }
    }
}

/// What the guards remember.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LossWatch {
    /// Losses of the last steps that counted, oldest first.
    losses: VecDeque<f64>,
    /// Steps held back since one as late as the last of them counted, and that one's number.
    in_a_row: u64,
    last: u64,
    /// Steps held back in all.
    pub events: u64,
    /// Steps whose sequences were passed over by going back.
    pub passed_over: u64,
}

impl LossWatch {
    /// What is wrong with a step of this loss and gradient norm.
    pub fn trouble(&self, guards: &Guards, loss: f64, gradient_norm: f64) -> Option<Trouble> {
        if !loss.is_finite() {
            return Some(Trouble::NotFinite { what: "the loss" });
        }
        if !gradient_norm.is_finite() {
            return Some(Trouble::NotFinite { what: "the gradient's norm" });
        }
        if guards.spike == Reaction::Off || self.losses.len() < guards.spike_window {
            return None;
        }
        let middle = median(self.losses.iter().copied());
        // Normal numbers have a standard deviation of 1.4826 times their median distance from the median. Losses that hardly
        // differ are no reason to call the next one a spike.
        let spread = 1.4826 * median(self.losses.iter().map(|loss| (loss - middle).abs()));
        let allowed = middle + guards.spike_factor * spread.max(0.01 * middle.abs());
        (loss > allowed).then_some(Trouble::Spike { loss, median: middle, allowed })
    }

    /// Takes note of a step that counts.
    pub fn accept(&mut self, guards: &Guards, step: u64, loss: f64) {
        if step >= self.last {
            self.in_a_row = 0;
        }
        if guards.spike != Reaction::Off {
            self.losses.push_back(loss);
            while self.losses.len() > guards.spike_window {
                self.losses.pop_front();
            }
        }
    }

    /// Takes note of a step that is held back; whether that is once too often.
    pub fn hold_back(&mut self, guards: &Guards, step: u64) -> bool {
        self.events += 1;
        self.in_a_row += 1;
        self.last = step;
        self.in_a_row > guards.limit
    }

    /// As of an earlier step, but for what is known since: `done` is that step, `self` the memory of the step held back.
    pub fn rewound(&self, to: LossWatch, done: u64) -> LossWatch {
        let LossWatch { in_a_row, last, events, passed_over, .. } = *self;
        // The steps from there to the one held back see other sequences now.
        LossWatch { losses: to.losses, in_a_row, last, events, passed_over: passed_over + last - done }
    }
}

/// The middle of some numbers, the lower one of two.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    let middle = (values.len().max(1) - 1) / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guards() -> Guards {
        Guards { not_finite: Reaction::Skip, spike: Reaction::Skip, spike_window: 20, ..Guards::default() }
    }

    fn watched(losses: impl Iterator<Item = f64>) -> LossWatch {
        let mut watch = LossWatch::default();
        losses.enumerate().for_each(|(step, loss)| watch.accept(&guards(), step as u64 + 1, loss));
        watch
    }

    #[test]
    fn a_spike_is_far_above_the_losses_before_it_and_ordinary_noise_is_none() {
        let noise = |step: usize| 3.0 + 0.1 * ((step * 7919 % 101) as f64 / 50.0 - 1.0);
        let watch = watched((0..30).map(noise));
        assert_eq!(watch.trouble(&guards(), 3.4, 1.0), None);
        assert_eq!(watch.trouble(&guards(), 0.1, 1.0), None, "below is no spike");
        let Some(Trouble::Spike { loss, median, allowed }) = watch.trouble(&guards(), 9.0, 1.0) else { panic!() };
        assert!(loss == 9.0 && (median - 3.0).abs() < 0.1 && allowed < 5.0, "{median} {allowed}");
        assert_eq!(watched((0..19).map(noise)).trouble(&guards(), 9.0, 1.0), None, "too few to tell");
        assert_eq!(watch.trouble(&Guards { spike: Reaction::Off, ..guards() }, 9.0, 1.0), None);
        let even = watched((0..20).map(|_| 2.0));
        assert_eq!(even.trouble(&guards(), 2.1, 1.0), None, "losses that are all alike allow some");
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let watch = LossWatch::default();
        let words = |loss, norm| watch.trouble(&guards(), loss, norm).unwrap().to_string();
        assert_eq!(words(f64::NAN, 1.0), "the loss is not finite");
        assert_eq!(words(1.0, f64::INFINITY), "the gradient's norm is not finite");
    }

    #[test]
    fn only_so_many_steps_in_a_row_are_held_back() {
        let mut watch = LossWatch::default();
        assert!(!(1..=3).any(|step| watch.hold_back(&guards(), step)));
        assert!(watch.hold_back(&guards(), 4));
        watch.accept(&guards(), 5, 1.0);
        assert!(!watch.hold_back(&guards(), 6), "one that counts ends the row");
        assert_eq!(watch.events, 5);
    }

    #[test]
    fn going_back_keeps_count_and_passes_sequences_over() {
        let mut watch = LossWatch::default();
        watch.hold_back(&guards(), 9);
        let mut back = watch.rewound(LossWatch::default(), 5);
        assert_eq!((back.passed_over, back.events, back.in_a_row), (4, 1, 1));
        back.accept(&guards(), 6, 1.0);
        assert_eq!(back.in_a_row, 1, "the step held back has not come yet");
        back.accept(&guards(), 9, 1.0);
        assert_eq!(back.in_a_row, 0);
    }
}
