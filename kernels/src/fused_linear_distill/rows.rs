//! One row of the loss: from what is known of its logits to its value and to the gradient in each of them.
//!
//! The vocabulary may come in parts. Each part gives the logits of the outcomes in it and a [`Mass`] of the others;
//! masses join in any number. Arithmetic on outcomes is f64, for there are few of them; no logits are touched here.

use super::{LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, Weigh};

/// What some logits that are no outcomes of their own add up to, relative to the largest of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mass {
    /// The largest logit; `-inf` for none.
    pub largest: f32,
    /// Sum of `exp((z - largest) / temperature)`.
    pub sum: f64,
    /// Sum of the squares of the same.
    pub squares: f64,
}

impl Mass {
    pub const NONE: Mass = Mass { largest: f32::NEG_INFINITY, sum: 0.0, squares: 0.0 };

    /// This and the mass of other logits, at the same temperature.
    pub fn join(self, other: Mass, temperature: f64) -> Mass {
        let (high, low) = if other.largest > self.largest { (other, self) } else { (self, other) };
        if low.largest == f32::NEG_INFINITY {
            // NaN sums stay: whoever reads the loss has to see them.
            return Mass { sum: high.sum + low.sum, squares: high.squares + low.squares, ..high };
        }
        let factor = ((low.largest as f64 - high.largest as f64) / temperature).exp();
        Mass {
            largest: high.largest,
            sum: high.sum + low.sum * factor,
            squares: high.squares + low.squares * factor * factor,
        }
    }

    /// `ln sum exp(z / temperature)`.
    pub fn log(&self, temperature: f64) -> f64 {
        if self.largest == f32::NEG_INFINITY {
            self.sum.ln()
        } else {
            self.largest as f64 / temperature + self.sum.ln()
        }
    }
}

/// What all parts of the vocabulary together know of a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowStatistics {
    /// Of the logits that are not kept, at the temperature of the soft loss.
    pub rest: Mass,
    /// The same at temperature 1; equal to `rest` when that is the temperature.
    pub rest_unscaled: Mass,
    /// The largest logit of all, and its id; of equal ones the smaller id.
    pub largest: f32,
    pub argmax: u32,
}

impl RowStatistics {
    pub const NONE: RowStatistics =
        RowStatistics { rest: Mass::NONE, rest_unscaled: Mass::NONE, largest: f32::NEG_INFINITY, argmax: u32::MAX };

    /// Joins what two parts of the vocabulary know.
    pub fn join(self, other: RowStatistics, temperature: f64) -> RowStatistics {
        let other_is_larger =
            other.largest > self.largest || (other.largest == self.largest && other.argmax < self.argmax);
        RowStatistics {
            rest: self.rest.join(other.rest, temperature),
            rest_unscaled: self.rest_unscaled.join(other.rest_unscaled, 1.0),
            largest: if other_is_larger { other.largest } else { self.largest },
            argmax: if other_is_larger { other.argmax } else { self.argmax },
        }
    }
}

/// The gradient in the logits that are not kept:
/// `soft * exp((z - shift) / temperature) + hard * exp(z - shift_unscaled)`. At temperature 1 `hard` is 0.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct DenseGradient {
    pub shift: f32,
    pub soft: f32,
    pub shift_unscaled: f32,
    pub hard: f32,
}

/// One row's targets and logits of its outcomes.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Teacher's log-probabilities of the kept ids; none for a row without soft target.
    pub log_probs: &'a [f32],
    pub log_tail: f32,
    /// Student's logits of the kept ids.
    pub kept_logits: &'a [f32],
    /// Student's logit of the label; none for a row without hard target.
    pub label_logit: Option<f32>,
    /// Place of the label among the kept ids.
    pub label_place: Option<usize>,
}

/// Scratch space, to be used for one row after the other.
#[derive(Debug, Default)]
pub struct Outcomes {
    teacher: Vec<f64>,
    student: Vec<f64>,
    gradient: Vec<f64>,
}

/// What is known of a row once its outcomes are: its values, and what the gradient of its logits is made of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FinishedRow {
    pub measures: RowMeasures,
    pub weights: RowWeights,
    /// Of the logits that are not kept.
    pub dense: DenseGradient,
    /// What a label that is not kept gets beside the dense gradient; 0 where there is none.
    pub label_gradient: f32,
}

/// [`Row::finish`] for row `row` of `targets`.
#[allow(clippy::too_many_arguments)] // a row's targets, what is known of it, and where its gradient goes
pub fn finish_row(
    targets: &RowTargets,
    row: usize,
    settings: &LossSettings,
    statistics: &RowStatistics,
    kept_logits: &[f32],
    label_logit: f32,
    weigh: &Weigh<'_>,
    outcomes: &mut Outcomes,
    kept_gradient: &mut [f32],
) -> FinishedRow {
    let (kept, label) = (targets.kept(row), targets.labels[row]);
    let label_place = targets.ids[kept.clone()].iter().position(|&id| id == label);
    let label_logit = label_place.map_or(label_logit, |place| kept_logits[place]);
    let target = Row {
        log_probs: &targets.log_probs[kept],
        log_tail: targets.log_tail[row],
        kept_logits,
        label_logit: (label != NO_LABEL).then_some(label_logit),
        label_place,
    };
    let weigh = |measures: &RowMeasures| weigh(row, measures);
    let (measures, weights, dense) = target.finish(settings, statistics, &weigh, outcomes, kept_gradient);
    let apart = label != NO_LABEL && label_place.is_none();
    FinishedRow { measures, weights, dense, label_gradient: if apart { -weights.hard } else { 0.0 } }
}

impl Row<'_> {
    /// The row's loss. `weigh` is asked for its weights once its measures are known; they are constants to the gradient.
    /// The gradient of each kept logit goes to `kept_gradient`, that of the label, when it is not kept, is
    /// `-weights.hard` more than the dense one.
    pub fn finish(
        &self,
        settings: &LossSettings,
        statistics: &RowStatistics,
        weigh: &dyn Fn(&RowMeasures) -> RowWeights,
        outcomes: &mut Outcomes,
        kept_gradient: &mut [f32],
    ) -> (RowMeasures, RowWeights, DenseGradient) {
        let temperature = settings.temperature as f64;
        let one = settings.temperature == 1.0;
        let count = self.kept_logits.len();
        let log_rest = statistics.rest.log(temperature);
        let log_rest_unscaled = if one { log_rest } else { statistics.rest_unscaled.log(1.0) };
        let log_all = |log_rest: f64, temperature: f64| log_sum(log_rest, self.kept_logits, temperature);
        let all_unscaled = log_all(log_rest_unscaled, 1.0);
        let all = if one { all_unscaled } else { log_all(log_rest, temperature) };

        let mut squares =
            statistics.rest_unscaled.squares * (2.0 * (statistics.rest_unscaled.largest as f64 - all_unscaled)).exp();
        if statistics.rest_unscaled.largest == f32::NEG_INFINITY {
            squares = 0.0;
        }
        squares += self.kept_logits.iter().map(|&z| (2.0 * (z as f64 - all_unscaled)).exp()).sum::<f64>();
        let mut measures = RowMeasures {
            soft: 0.0,
            hard: 0.0,
            log_sum_exp: all_unscaled,
            log_tail: log_rest_unscaled - all_unscaled,
            squared_probabilities: squares,
            argmax: statistics.argmax,
            soft_gradient_square: 0.0,
            hard_gradient_square: 0.0,
        };
        if let Some(label) = self.label_logit {
            let log_q = label as f64 - all_unscaled;
            measures.hard = -log_q;
            measures.hard_gradient_square = (squares - 2.0 * log_q.exp() + 1.0).max(0.0);
        }
        let mut total = 0.0;
        if count > 0 {
            outcomes.set(self, log_rest - all, all, temperature);
            measures.soft = settings.divergence.evaluate(&outcomes.teacher, &outcomes.student, &mut outcomes.gradient);
            total = outcomes.gradient.iter().sum();
            measures.soft_gradient_square = self.soft_gradient_square(settings, statistics, outcomes, total, log_rest);
        }

        let weights = weigh(&measures);
        let soft_factor = weights.soft as f64 * settings.soft_factor() / temperature;
        let hard = if self.label_logit.is_some() { weights.hard as f64 } else { 0.0 };
        for (place, slot) in kept_gradient.iter_mut().enumerate() {
            let q = outcomes.student[place].exp();
            let q_unscaled = if one { q } else { (self.kept_logits[place] as f64 - all_unscaled).exp() };
            let label = if self.label_place == Some(place) { 1.0 } else { 0.0 };
            *slot = (soft_factor * (outcomes.gradient[place] - q * total) + hard * (q_unscaled - label)) as f32;
        }
        // Relative to the mass of the rest, so that nothing overflows however small that is.
        let mut dense = DenseGradient {
            shift: statistics.rest.largest,
            shift_unscaled: statistics.rest_unscaled.largest,
            ..DenseGradient::default()
        };
        if statistics.rest.largest > f32::NEG_INFINITY {
            let soft =
                if count > 0 { soft_factor * (outcomes.gradient[count] - total * (log_rest - all).exp()) } else { 0.0 };
            let hard = hard * (log_rest_unscaled - all_unscaled).exp();
            if one {
                dense.soft = ((soft + hard) / statistics.rest.sum) as f32;
            } else {
                dense.soft = (soft / statistics.rest.sum) as f32;
                dense.hard = (hard / statistics.rest_unscaled.sum) as f32;
            }
        }
        (measures, weights, dense)
    }

    /// The squared norm of the soft loss's gradient in all logits, before weights.
    fn soft_gradient_square(
        &self,
        settings: &LossSettings,
        statistics: &RowStatistics,
        outcomes: &Outcomes,
        total: f64,
        log_rest: f64,
    ) -> f64 {
        let count = self.kept_logits.len();
        let kept: f64 =
            (0..count).map(|place| (outcomes.gradient[place] - outcomes.student[place].exp() * total).powi(2)).sum();
        let rest = if statistics.rest.largest > f32::NEG_INFINITY {
            let share = statistics.rest.squares / (statistics.rest.sum * statistics.rest.sum);
            share * (outcomes.gradient[count] - total * (outcomes.student[count]).exp()).powi(2)
        } else {
            debug_assert!(log_rest == f64::NEG_INFINITY);
            0.0
        };
        (kept + rest) * (settings.soft_factor() / settings.temperature as f64).powi(2)
    }
}

impl Outcomes {
    fn set(&mut self, row: &Row<'_>, log_tail: f64, all: f64, temperature: f64) {
        self.teacher.clear();
        self.teacher.extend(row.log_probs.iter().map(|&log_prob| log_prob as f64));
        self.teacher.push(row.log_tail as f64);
        self.student.clear();
        self.student.extend(row.kept_logits.iter().map(|&z| z as f64 / temperature - all));
        self.student.push(log_tail);
        self.gradient.resize(self.student.len(), 0.0);
    }
}

/// `ln(e^log_rest + sum e^(z / temperature))`.
fn log_sum(log_rest: f64, logits: &[f32], temperature: f64) -> f64 {
    let largest = logits.iter().fold(log_rest, |largest, &z| largest.max(z as f64 / temperature));
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    let sum: f64 = logits.iter().map(|&z| (z as f64 / temperature - largest).exp()).sum();
    largest + (sum + (log_rest - largest).exp()).ln()
}
