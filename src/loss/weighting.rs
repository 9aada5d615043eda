//! How much the soft and the hard target count: by a schedule, by what the losses do, or token by token.
//!
//! Weights are constants to the gradient. Those that follow the losses look at whole steps that are over, never at the
//! step in progress, so they do not depend on how it is cut into micro-batches; what they remember is
//! [`WeightingState`], which checkpoints keep.

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    schedule::Schedule,
};

/// Shares that follow the losses stay this far from 0 and 1, so that no target is ever given up.
const LEAST_SHARE: f64 = 1e-3;
/// Learned log-variances stay within this of 0.
const LARGEST_LOG_VARIANCE: f64 = 6.0;

/// The weights of one step or one row; never negative, never both zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    pub soft: f64,
    pub hard: f64,
}

impl Weights {
    /// `soft` for the soft target, the rest of 1 for the hard one.
    pub fn share(soft: f64) -> Self {
        Weights { soft, hard: 1.0 - soft }
    }
}

/// How the soft and the hard target are weighted. But for `uncertainty`, the weights add up to 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Weighting {
    /// The same share throughout. Hinton et al. 2015 (arXiv 1503.02531), section 2.
    Constant { soft: f64 },
    /// A straight line from the first step to the last.
    Linear { from: f64, to: f64 },
    /// Half a cosine wave from the first step to the last.
    Cosine { from: f64, to: f64 },
    /// Stays at `from`, then falls or rises to `to` in a straight line over the last `decay` share of the run.
    Wsd {
        from: f64,
        to: f64,
        #[serde(default = "fifth")]
        decay: f64,
    },
    /// Keeps `w_soft * soft = ratio * w_hard * hard`, by running means of both losses over past steps. `soft` is the
    /// share of the first step.
    MagnitudeMatch {
        #[serde(default = "half")]
        soft: f64,
        #[serde(default = "one")]
        ratio: f64,
        #[serde(default = "slow")]
        momentum: f64,
    },
    /// Keeps `w_soft |g_soft| = ratio * w_hard |g_hard|`, by running means of the exact norms of both losses' gradients
    /// in the logits. After GradNorm, Chen et al. 2018 (arXiv 1711.02257).
    GradientNorm {
        #[serde(default = "half")]
        soft: f64,
        #[serde(default = "one")]
        ratio: f64,
        #[serde(default = "slow")]
        momentum: f64,
    },
    /// `w = e^-s` with a learned log-variance `s` per loss, which minimises `e^-s loss + s / 2` by gradient descent
    /// with step size `rate`. Kendall, Gal & Cipolla 2018 (arXiv 1705.07115).
    Uncertainty {
        #[serde(default = "hundredth")]
        rate: f64,
    },
    /// Per token, `w_soft = soft * p(label)^power`: a teacher that missed the next token teaches less of it.
    /// After CA-MKD, Zhang, Chen & Wang 2022 (arXiv 2201.00007).
    TeacherConfidence {
        #[serde(default = "one")]
        soft: f64,
        #[serde(default = "one")]
        power: f64,
    },
    /// Per token, `w_soft = soft * e^(-H / scale)` with the entropy H in nats of the teacher's outcomes.
    /// After Kwon et al. 2020, Adaptive Knowledge Distillation Based on Entropy (ICASSP).
    TeacherEntropy {
        #[serde(default = "one")]
        soft: f64,
        #[serde(default = "three")]
        scale: f64,
    },
    /// Per token, `w_soft = soft * (1 - e^(-student's loss / teacher's loss))` on the label: more where the student is
    /// behind. Zhou et al. 2021, weighted soft labels (arXiv 2102.00650).
    StudentGap {
        #[serde(default = "one")]
        soft: f64,
    },
    /// A constant share, and a teacher that moves away from the student: the share t of the true teacher in the
    /// divergence `taid` goes from `from` to `to`, no slower than in a straight line, and faster while the loss falls.
    /// Shing et al. 2025, TAID (arXiv 2501.16937), algorithm 1.
    Taid {
        #[serde(default = "one")]
        soft: f64,
        #[serde(default = "taid_start")]
        from: f64,
        #[serde(default = "one")]
        to: f64,
        #[serde(default = "taid_rate")]
        rate: f64,
        #[serde(default = "taid_momentum")]
        momentum: f64,
    },
    /// This project's own reading of "dynamically weights the soft and hard targets through training", for which
    /// nothing more has been published: `w_soft = s * (floor + (1 - floor) * p(label))` per token, where `s` goes in a
    /// cosine from `from` to `to` over the run. Soft-heavy early, hard-heavy late, less of the teacher where it missed
    /// the next token.
    Llama4 {
        #[serde(default = "llama4_from")]
        from: f64,
        #[serde(default = "llama4_to")]
        to: f64,
        #[serde(default = "half")]
        floor: f64,
    },
}

fn half() -> f64 {
    0.5
}
fn one() -> f64 {
    1.0
}
fn fifth() -> f64 {
    0.2
}
fn three() -> f64 {
    3.0
}
fn slow() -> f64 {
    0.95
}
fn hundredth() -> f64 {
    0.01
}
fn taid_start() -> f64 {
    0.4
}
fn taid_rate() -> f64 {
    5e-4
}
fn taid_momentum() -> f64 {
    0.99
}
fn llama4_from() -> f64 {
    0.9
}
fn llama4_to() -> f64 {
    0.3
}

/// What a weighting remembers of the steps that are over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct WeightingState {
    /// Running means of what is balanced: losses, or norms of gradients.
    pub soft: Option<f64>,
    pub hard: Option<f64>,
    /// Learned log-variances.
    pub log_variance_soft: f64,
    pub log_variance_hard: f64,
    /// The true teacher's share, the running mean of the loss's relative fall, and the last loss.
    pub teacher_share: Option<f64>,
    pub fall: f64,
    pub last_loss: Option<f64>,
}

/// Means over the tokens of one whole step, unweighted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMeans {
    pub soft: f64,
    pub hard: f64,
    /// Root of the mean square of the loss's gradient in a token's logits.
    pub soft_gradient_norm: f64,
    pub hard_gradient_norm: f64,
}

/// What a token's weights may depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenFacts {
    /// The teacher's log-probability of the label.
    pub label_log_prob: f64,
    /// Entropy of the teacher's outcomes, in nats.
    pub entropy: f64,
    /// The student's cross-entropy of the label.
    pub student_loss: f64,
}

impl Weighting {
    /// The hard target alone.
    pub fn hard_only() -> Self {
        Weighting::Constant { soft: 0.0 }
    }

    /// Whether the soft target ever counts.
    pub fn needs_soft_targets(&self) -> bool {
        self.schedule().is_none_or(|schedule| schedule.peak() > 0.0)
    }

    /// Refuses parameters without meaning.
    pub fn check(&self) -> Result<()> {
        match self.parameters().into_iter().find(|(_, value, range)| !range.holds(*value)) {
            Some(("soft" | "from" | "to", value, Range::Share)) => {
                Err(Error::usage(format!("soft weight {value} is not a share"), "give a number from 0 to 1"))
            }
            Some((name, value, range)) => Err(Error::usage(
                format!("weighting {name} {value} is out of range"),
                format!("give a number {}", range.words()),
            )),
            None => Ok(()),
        }
    }

    /// Its numbers by name, with what they may be.
    pub fn parameters(&self) -> Vec<(&'static str, f64, Range)> {
        use Range::{Positive, Share, ShareBelowOne};
        match *self {
            Weighting::Constant { soft } | Weighting::StudentGap { soft } => vec![("soft", soft, Share)],
            Weighting::Linear { from, to } | Weighting::Cosine { from, to } => {
                vec![("from", from, Share), ("to", to, Share)]
            }
            Weighting::Wsd { from, to, decay } => {
                vec![("from", from, Share), ("to", to, Share), ("decay", decay, Share)]
            }
            Weighting::MagnitudeMatch { soft, ratio, momentum } | Weighting::GradientNorm { soft, ratio, momentum } => {
                vec![("soft", soft, Share), ("ratio", ratio, Positive), ("momentum", momentum, ShareBelowOne)]
            }
            Weighting::Uncertainty { rate } => vec![("rate", rate, Positive)],
            Weighting::TeacherConfidence { soft, power } => vec![("soft", soft, Share), ("power", power, Positive)],
            Weighting::TeacherEntropy { soft, scale } => vec![("soft", soft, Share), ("scale", scale, Positive)],
            Weighting::Taid { soft, from, to, rate, momentum } => vec![
                ("soft", soft, Share),
                ("from", from, Share),
                ("to", to, Share),
                ("rate", rate, Positive),
                ("momentum", momentum, ShareBelowOne),
            ],
            Weighting::Llama4 { from, to, floor } => {
                vec![("from", from, Share), ("to", to, Share), ("floor", floor, Share)]
            }
        }
    }

    /// The weights of a step before any token has its say.
    pub fn weights(&self, state: &WeightingState, step: u64, total: u64) -> Weights {
        match *self {
            Weighting::MagnitudeMatch { soft, ratio, .. } | Weighting::GradientNorm { soft, ratio, .. } => {
                let (Some(size), Some(other)) = (state.soft, state.hard) else { return Weights::share(soft) };
                let sum = size + ratio * other;
                if sum > 0.0 && sum.is_finite() {
                    Weights::share((ratio * other / sum).clamp(LEAST_SHARE, 1.0 - LEAST_SHARE))
                } else {
                    Weights::share(soft)
                }
            }
            Weighting::Uncertainty { .. } => {
                Weights { soft: (-state.log_variance_soft).exp(), hard: (-state.log_variance_hard).exp() }
            }
            Weighting::TeacherConfidence { soft, .. }
            | Weighting::TeacherEntropy { soft, .. }
            | Weighting::StudentGap { soft }
            | Weighting::Taid { soft, .. } => Weights::share(soft),
            _ => Weights::share(self.schedule().expect("the others are schedules").value(step, total)),
        }
    }

    /// The weights of a token, given its step's.
    pub fn token_weights(&self, step: Weights, facts: &TokenFacts) -> Weights {
        let confidence = facts.label_log_prob.min(0.0).exp();
        let factor = match *self {
            Weighting::TeacherConfidence { power, .. } => confidence.powf(power),
            Weighting::TeacherEntropy { scale, .. } => (-facts.entropy.max(0.0) / scale).exp(),
            // A teacher without a loss of its own is ahead of any student.
            Weighting::StudentGap { .. } => {
                -(-facts.student_loss.max(0.0) / (-facts.label_log_prob).max(f64::MIN_POSITIVE)).exp_m1()
            }
            Weighting::Llama4 { floor, .. } => floor + (1.0 - floor) * confidence,
            _ => return step,
        };
        Weights::share(step.soft * factor)
    }

    /// In a few words, for a plan.
    pub fn summary(&self) -> String {
        let rest = "; the text has the rest";
        match *self {
            Weighting::Constant { soft } => format!("{soft} throughout{rest}"),
            Weighting::Linear { from, to } | Weighting::Cosine { from, to } | Weighting::Wsd { from, to, .. } => {
                format!("{from} at the start, {to} at the end{rest}")
            }
            Weighting::MagnitudeMatch { ratio, .. } => format!("such that the losses stay at {ratio} to 1{rest}"),
            Weighting::GradientNorm { ratio, .. } => format!("such that the gradients stay at {ratio} to 1{rest}"),
            Weighting::Uncertainty { .. } => "learned, as is that of the text".to_string(),
            Weighting::TeacherConfidence { soft, .. } => {
                format!("up to {soft} where the teacher is sure of the next token{rest}")
            }
            Weighting::TeacherEntropy { soft, .. } => format!("up to {soft} where the teacher is sure{rest}"),
            Weighting::StudentGap { soft } => format!("up to {soft} where the student is behind{rest}"),
            Weighting::Taid { soft, from, to, .. } => {
                format!("{soft} throughout{rest}; the teacher's share goes from {from} to {to}")
            }
            Weighting::Llama4 { from, to, .. } => {
                format!("up to {from} at the start, {to} at the end, where the teacher is sure of the next token{rest}")
            }
        }
    }

    /// Whether tokens have weights of their own.
    pub fn is_per_token(&self) -> bool {
        matches!(
            self,
            Weighting::TeacherConfidence { .. }
                | Weighting::TeacherEntropy { .. }
                | Weighting::StudentGap { .. }
                | Weighting::Llama4 { .. }
        )
    }

    /// The true teacher's share in the divergence of a step, for `taid`.
    pub fn teacher_share(&self, state: &WeightingState, step: u64, total: u64) -> Option<f64> {
        let Weighting::Taid { from, to, .. } = *self else { return None };
        let line = Schedule::Linear { from, to }.value(step, total);
        Some(state.teacher_share.map_or(line, |share| share.max(line)).min(to.max(from)))
    }

    /// Takes note of a step that is over.
    pub fn end_step(&self, state: &mut WeightingState, means: &StepMeans, step: u64, total: u64) {
        let follow = |mean: &mut Option<f64>, value: f64, momentum: f64| {
            let value = value.max(0.0);
            *mean = Some(mean.map_or(value, |mean| momentum * mean + (1.0 - momentum) * value));
        };
        match *self {
            Weighting::MagnitudeMatch { momentum, .. } => {
                follow(&mut state.soft, means.soft, momentum);
                follow(&mut state.hard, means.hard, momentum);
            }
            Weighting::GradientNorm { momentum, .. } => {
                follow(&mut state.soft, means.soft_gradient_norm, momentum);
                follow(&mut state.hard, means.hard_gradient_norm, momentum);
            }
            Weighting::Uncertainty { rate } => {
                for (log_variance, loss) in
                    [(&mut state.log_variance_soft, means.soft), (&mut state.log_variance_hard, means.hard)]
                {
                    let slope = 0.5 - (-*log_variance).exp() * loss.max(0.0);
                    *log_variance = (*log_variance - rate * slope).clamp(-LARGEST_LOG_VARIANCE, LARGEST_LOG_VARIANCE);
                }
            }
            Weighting::Taid { rate, momentum, .. } => {
                let share = self.teacher_share(state, step, total).expect("this is taid");
                if let Some(last) = state.last_loss {
                    let fall = ((last - means.soft) / (last.max(0.0) + 1e-15)).clamp(-10.0, 10.0);
                    state.fall = momentum * state.fall + (1.0 - momentum) * fall;
                    let sigmoid = 1.0 / (1.0 + (-state.fall).exp());
                    state.teacher_share = Some(share + rate * sigmoid * (1.0 - share));
                } else {
                    state.teacher_share = Some(share);
                }
                state.last_loss = Some(means.soft);
            }
            _ => {}
        }
    }

    /// The share's course over the run, where that is all there is to it.
    fn schedule(&self) -> Option<Schedule> {
        Some(match *self {
            Weighting::Constant { soft } => Schedule::Constant { value: soft },
            Weighting::Linear { from, to } => Schedule::Linear { from, to },
            Weighting::Cosine { from, to } | Weighting::Llama4 { from, to, .. } => Schedule::Cosine { from, to },
            Weighting::Wsd { from, to, decay } => Schedule::Wsd { from, to, decay },
            _ => return None,
        })
    }
}

/// What a parameter may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// From 0 to 1.
    Share,
    /// From 0, below 1.
    ShareBelowOne,
    /// Above 0.
    Positive,
}

impl Range {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Range::Share => (0.0..=1.0).contains(&value),
            Range::ShareBelowOne => (0.0..1.0).contains(&value),
            Range::Positive => value > 0.0 && value.is_finite(),
        }
    }

    pub fn words(self) -> &'static str {
        match self {
            Range::Share => "from 0 to 1",
            Range::ShareBelowOne => "from 0 to below 1",
            Range::Positive => "above 0",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_kind() -> Vec<Weighting> {
        let parse = |text: &str| serde_json::from_str(text).unwrap();
        [
            r#"{"kind":"constant","soft":0.0}"#,
            r#"{"kind":"constant","soft":1.0}"#,
            r#"{"kind":"linear","from":0.9,"to":0.5}"#,
            r#"{"kind":"cosine","from":0.0,"to":1.0}"#,
            r#"{"kind":"wsd","from":0.9,"to":0.1}"#,
            r#"{"kind":"magnitude_match"}"#,
            r#"{"kind":"gradient_norm","ratio":2.0}"#,
            r#"{"kind":"uncertainty","rate":0.5}"#,
            r#"{"kind":"teacher_confidence"}"#,
            r#"{"kind":"teacher_entropy"}"#,
            r#"{"kind":"student_gap"}"#,
            r#"{"kind":"taid"}"#,
            r#"{"kind":"llama4"}"#,
        ]
        .map(parse)
        .to_vec()
    }

    fn means(soft: f64, hard: f64) -> StepMeans {
        StepMeans { soft, hard, soft_gradient_norm: soft / 2.0, hard_gradient_norm: hard / 4.0 }
    }

    #[test]
    fn weights_are_never_negative_nor_all_zero_nor_not_a_number() {
        let extremes = [0.0, 1e-300, 1e-9, 1.0, 700.0, 1e300, -1e-9];
        for weighting in every_kind() {
            weighting.check().unwrap();
            let mut state = WeightingState::default();
            let mut step = 0;
            for soft in extremes {
                for hard in extremes {
                    let weights = weighting.weights(&state, step, 40);
                    for label_log_prob in [0.0, -1e-9, -3.0, -200.0] {
                        for entropy in [0.0, 2.0, 50.0] {
                            let facts = TokenFacts { label_log_prob, entropy, student_loss: hard };
                            let Weights { soft, hard } = weighting.token_weights(weights, &facts);
                            let fine = soft >= 0.0 && hard >= 0.0 && soft + hard > 0.0 && (soft + hard).is_finite();
                            assert!(fine, "{weighting:?} {facts:?}: {soft} {hard}");
                            if !matches!(weighting, Weighting::Uncertainty { .. }) {
                                assert!((soft + hard - 1.0).abs() < 1e-12);
                            }
                        }
                    }
                    let share = weighting.teacher_share(&state, step, 40).unwrap_or(0.5);
                    assert!((0.0..=1.0).contains(&share), "{weighting:?}: {share}");
                    weighting.end_step(&mut state, &means(soft, hard), step, 40);
                    step += 1;
                }
            }
        }
    }

    #[test]
    fn a_state_that_was_written_goes_on_as_if_it_had_not_been() {
        for weighting in every_kind() {
            let (mut straight, mut broken) = (WeightingState::default(), WeightingState::default());
            for step in 0..30 {
                let seen = means(2.0 / (1.0 + step as f64), 5.0 - 0.1 * step as f64);
                weighting.end_step(&mut straight, &seen, step, 30);
                weighting.end_step(&mut broken, &seen, step, 30);
                broken = serde_json::from_str(&serde_json::to_string(&broken).unwrap()).unwrap();
                assert_eq!(straight, broken, "{weighting:?}");
            }
        }
    }

    #[test]
    fn magnitudes_and_gradients_are_kept_in_proportion() {
        let settle = |weighting: &Weighting| {
            let mut state = WeightingState::default();
            assert_eq!(weighting.weights(&state, 0, 10), Weights::share(0.5));
            for step in 0..200 {
                weighting.end_step(&mut state, &means(0.4, 3.0), step, 200);
            }
            weighting.weights(&state, 200, 200)
        };
        let Weights { soft, hard } = settle(&Weighting::MagnitudeMatch { soft: 0.5, ratio: 2.0, momentum: 0.9 });
        assert!((soft * 0.4 / (hard * 3.0) - 2.0).abs() < 1e-9, "losses in the ratio asked for");
        let Weights { soft, hard } = settle(&Weighting::GradientNorm { soft: 0.5, ratio: 1.0, momentum: 0.9 });
        assert!((soft * 0.2 / (hard * 0.75) - 1.0).abs() < 1e-9, "gradients of equal length");
    }

    #[test]
    fn learned_variances_find_the_minimum() {
        let weighting = Weighting::Uncertainty { rate: 0.05 };
        let mut state = WeightingState::default();
        for step in 0..5000 {
            weighting.end_step(&mut state, &means(0.25, 4.0), step, 5000);
        }
        let Weights { soft, hard } = weighting.weights(&state, 0, 1);
        // d/ds (e^-s L + s/2) = 0 at e^-s = 1 / (2 L).
        assert!((soft - 2.0).abs() < 1e-6 && (hard - 0.125).abs() < 1e-6, "{soft} {hard}");
    }

    #[test]
    fn tokens_weigh_the_teacher_by_what_it_knows() {
        let facts =
            |label_log_prob: f64, entropy: f64, student_loss: f64| TokenFacts { label_log_prob, entropy, student_loss };
        let soft = |weighting: &Weighting, facts: &TokenFacts| {
            weighting.token_weights(weighting.weights(&WeightingState::default(), 0, 11), facts).soft
        };
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} instead of {b}");
        let confidence = Weighting::TeacherConfidence { soft: 0.8, power: 2.0 };
        near(soft(&confidence, &facts(0.5f64.ln(), 1.0, 1.0)), 0.8 * 0.25);
        let entropy = Weighting::TeacherEntropy { soft: 0.8, scale: 2.0 };
        near(soft(&entropy, &facts(-1.0, 2.0, 1.0)), 0.8 * (-1.0f64).exp());
        let gap = Weighting::StudentGap { soft: 1.0 };
        near(soft(&gap, &facts(-2.0, 1.0, 2.0)), 1.0 - (-1.0f64).exp());
        assert!(soft(&gap, &facts(-2.0, 1.0, 9.0)) > soft(&gap, &facts(-2.0, 1.0, 0.1)));
        let llama4 = Weighting::Llama4 { from: 0.9, to: 0.3, floor: 0.5 };
        near(soft(&llama4, &facts(0.0, 0.0, 1.0)), 0.9);
        near(soft(&llama4, &facts(-200.0, 0.0, 1.0)), 0.45);
        let late = llama4.weights(&WeightingState::default(), 10, 11);
        near(llama4.token_weights(late, &facts(0.0, 0.0, 1.0)).soft, 0.3);
    }

    #[test]
    fn the_interpolated_teacher_moves_on_and_faster_while_the_loss_falls() {
        let weighting = Weighting::Taid { soft: 1.0, from: 0.2, to: 1.0, rate: 0.01, momentum: 0.5 };
        let run = |losses: &dyn Fn(u64) -> f64| {
            let mut state = WeightingState::default();
            let mut shares = vec![];
            for step in 0..60 {
                shares.push(weighting.teacher_share(&state, step, 400).unwrap());
                weighting.end_step(&mut state, &means(losses(step), 3.0), step, 400);
            }
            shares
        };
        let (falling, rising) = (run(&|step| 0.7f64.powi(step as i32)), run(&|step| 1.4f64.powi(step as i32)));
        assert_eq!(falling[0], 0.2);
        assert!(falling.windows(2).all(|pair| pair[0] <= pair[1]), "never goes back");
        assert!(falling[59] > rising[59] && rising[59] >= 0.2 + 0.8 * 59.0 / 399.0 - 1e-12);
        let last = weighting.teacher_share(&WeightingState::default(), 399, 400).unwrap();
        assert!((last - 1.0).abs() < 1e-12, "ends at the true teacher");
    }

    #[test]
    fn parameters_without_meaning_are_refused() {
        let message = |weighting: Weighting| weighting.check().unwrap_err().to_string();
        assert_eq!(
            message(Weighting::Linear { from: 0.5, to: 1.5 }),
            "soft weight 1.5 is not a share; give a number from 0 to 1"
        );
        assert_eq!(
            message(Weighting::GradientNorm { soft: 0.5, ratio: 0.0, momentum: 0.9 }),
            "weighting ratio 0 is out of range; give a number above 0"
        );
        assert!(Weighting::MagnitudeMatch { soft: 0.5, ratio: 1.0, momentum: 1.0 }.check().is_err());
        assert!(Weighting::TeacherEntropy { soft: 0.5, scale: f64::NAN }.check().is_err());
    }
}
