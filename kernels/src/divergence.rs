//! How far a student's distribution is from its teacher's, over the outcomes that a row of soft targets knows.
//!
//! Outcomes are the k kept ids and, last, one for everything else; P is the teacher, Q the student, both given as
//! natural logarithms. Each divergence gives its value and, per outcome, `G_j = dd / d ln q_j`. That is all a backward
//! pass over the vocabulary needs: `dd/dz_v = G_v - q_v S` for a kept id and `q_v (G_0 / q_0 - S)` for any other, with
//! `S` the sum of all `G`. So one kernel serves them all. Knows nothing of logits, tensors or weights.
//!
//! An outcome that the teacher holds impossible (`-inf`) costs nothing where it is multiplied by its probability. Where
//! a divergence takes the logarithm of it, it counts as [`LOG_IMPOSSIBLE`], so that a loss stays finite. An outcome
//! that the *student* cannot have (`-inf`: there is nothing beyond the kept ids) is no outcome.

use serde::{Deserialize, Serialize};

/// Stands for the logarithm of a teacher's probability of zero: that of the smallest f64 above zero.
pub const LOG_IMPOSSIBLE: f64 = -744.440_071_921_381;

/// A divergence with its parameters.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Divergence {
    /// `KL(P || Q) = sum p ln(p / q)`. Covers all that the teacher holds possible. `G = -p`.
    /// Hinton, Vinyals & Dean 2015 (arXiv 1503.02531).
    #[default]
    ForwardKl,
    /// `KL(Q || P) = sum q ln(q / p)`. Settles on what the teacher holds likely. `G = q (ln(q/p) + 1)`; grows without
    /// bound where the student has mass that the teacher denies. Gu et al. 2023, MiniLLM (arXiv 2306.08543).
    ReverseKl,
    /// `beta KL(P || M) + (1 - beta) KL(Q || M)` with `M = beta P + (1 - beta) Q`, `0 < beta < 1`. Bounded.
    /// `G = (1 - beta) q ln(q/m)`. Agarwal et al. 2023, GKD (arXiv 2306.13649). Towards `beta = 0` it is
    /// `beta` times forward KL, towards 1 it is `1 - beta` times reverse KL: those have names of their own.
    Jsd { beta: f64 },
    /// `KL(P || alpha P + (1 - alpha) Q)`, `0 <= alpha < 1`. Forward KL whose gradient stays bounded where the student
    /// has next to nothing. `G = -(1 - alpha) p q / m`. Ko et al. 2024, DistiLLM (arXiv 2402.03898).
    SkewKl { alpha: f64 },
    /// `KL(Q || alpha Q + (1 - alpha) P)`, `0 <= alpha < 1`. `G = q (ln(q/m) + 1 - alpha q / m)`.
    /// Ko et al. 2024, DistiLLM (arXiv 2402.03898).
    SkewReverseKl { alpha: f64 },
    /// `w KL(P || Q) + (1 - w) KL(Q || P)`, where `w` is the share of the gap `|p - q|` that lies in the teacher's head:
    /// its likeliest outcomes up to a mass of `head`. `w` is a constant to the gradient. The outcome of everything else
    /// belongs to the tail. Wu et al. 2024, AKL (arXiv 2404.02657).
    AdaptiveKl {
        #[serde(default = "half")]
        head: f64,
    },
    /// `sum |p - q| / 2`, between 0 and 1. `G = q sign(q - p) / 2`: vanishes where the student has nothing.
    /// Wen et al. 2023, f-DISTILL (arXiv 2307.15190).
    TotalVariation,
    /// `ln(sum p^alpha q^(1-alpha)) / (alpha - 1)`, `alpha > 0`, not 1. Forward KL as `alpha` goes to 1.
    /// `G = -p^alpha q^(1-alpha) / sum`. Rényi 1961; van Erven & Harremoës 2014 (arXiv 1206.2459).
    Renyi { alpha: f64 },
    /// `(sum p^alpha q^(1-alpha) - 1) / (alpha (alpha - 1))`, `alpha` neither 0 nor 1: forward KL as it goes to 1,
    /// reverse KL as it goes to 0. `G = -p^alpha q^(1-alpha) / alpha`. Amari 1985; Minka 2005.
    Alpha { alpha: f64 },
    /// `-sum p ln q`: forward KL and the teacher's entropy, with the same gradient, `G = -p`. For targets whose
    /// weights are no probabilities of outcomes, such as sampled ones.
    SoftCrossEntropy,
    /// `KL(P_t || Q)` with `P_t` proportional to `P^t Q^(1-t)`, the student's part a constant to the gradient:
    /// a teacher that moves away from the student as `teacher`, t, grows from 0 to 1. `G = -p_t`.
    /// Shing et al. 2025, TAID (arXiv 2501.16937).
    Taid { teacher: f64 },
    /// `KL(P' || Q')` with both sides renormalised over the kept ids. *Conditional*: it says nothing of how much mass
    /// the student puts elsewhere, so it is no divergence of the two distributions. `G = q' - p'`, nothing for the tail.
    ConditionalKl,
}

fn half() -> f64 {
    0.5
}

/// Refused parameters: what is wrong, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    pub problem: String,
    pub tip: &'static str,
}

impl Divergence {
    /// One of each kind, for tests and tables.
    pub const EXAMPLES: [Divergence; 12] = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.5 },
        Divergence::SkewKl { alpha: 0.1 },
        Divergence::SkewReverseKl { alpha: 0.1 },
        Divergence::AdaptiveKl { head: 0.5 },
        Divergence::TotalVariation,
        Divergence::Renyi { alpha: 0.5 },
        Divergence::Alpha { alpha: 0.5 },
        Divergence::SoftCrossEntropy,
        Divergence::Taid { teacher: 0.5 },
        Divergence::ConditionalKl,
    ];

    /// Its name in recipes and reports.
    pub fn name(&self) -> &'static str {
        match self {
            Divergence::ForwardKl => "forward_kl",
            Divergence::ReverseKl => "reverse_kl",
            Divergence::Jsd { .. } => "jsd",
            Divergence::SkewKl { .. } => "skew_kl",
            Divergence::SkewReverseKl { .. } => "skew_reverse_kl",
            Divergence::AdaptiveKl { .. } => "adaptive_kl",
            Divergence::TotalVariation => "total_variation",
            Divergence::Renyi { .. } => "renyi",
            Divergence::Alpha { .. } => "alpha",
            Divergence::SoftCrossEntropy => "soft_cross_entropy",
            Divergence::Taid { .. } => "taid",
            Divergence::ConditionalKl => "conditional_kl",
        }
    }

    /// Whether its expectation over sampled targets is its value on the whole distribution, in the gradient: only what
    /// is linear in the teacher's probabilities.
    pub fn is_linear_in_the_teacher(&self) -> bool {
        matches!(self, Divergence::ForwardKl | Divergence::SoftCrossEntropy)
    }

    /// Whether the parameters make sense.
    pub fn check(&self) -> Result<(), Invalid> {
        let (fits, problem, tip) = match *self {
            Divergence::Jsd { beta } => (
                beta > 0.0 && beta < 1.0,
                format!("jsd with beta {beta} is 0 everywhere"),
                "give a beta between 0 and 1, or name `forward_kl` (towards 0) or `reverse_kl` (towards 1)",
            ),
            Divergence::SkewKl { alpha } | Divergence::SkewReverseKl { alpha } => (
                (0.0..1.0).contains(&alpha),
                format!("{} with alpha {alpha} is no divergence", self.name()),
                "give an alpha from 0 up to, but not including, 1",
            ),
            Divergence::AdaptiveKl { head } => (
                head > 0.0 && head < 1.0,
                format!("adaptive_kl with head {head} has one part only"),
                "give the mass of the teacher's head, between 0 and 1, such as 0.5",
            ),
            Divergence::Renyi { alpha } => (
                alpha > 0.0 && alpha != 1.0 && alpha.is_finite(),
                format!("renyi with alpha {alpha} is not defined"),
                "give a positive alpha other than 1; for 1 name `forward_kl`",
            ),
            Divergence::Alpha { alpha } => (
                alpha != 0.0 && alpha != 1.0 && alpha.is_finite(),
                format!("alpha divergence with alpha {alpha} is not defined"),
                "give another alpha; for 1 name `forward_kl`, for 0 `reverse_kl`",
            ),
            Divergence::Taid { teacher } => (
                (0.0..=1.0).contains(&teacher),
                format!("taid with teacher {teacher} is outside of both models"),
                "give the teacher's share, from 0 to 1",
            ),
            _ => return Ok(()),
        };
        if fits { Ok(()) } else { Err(Invalid { problem, tip }) }
    }

    /// The value in nats, and `G_j` of each outcome into `gradient`.
    ///
    /// `teacher` and `student` are log-probabilities of the same outcomes, the kept ids in descending order of the
    /// teacher's and the tail last.
    ///
    /// # Panics
    /// When the slices have different lengths.
    pub fn evaluate(&self, teacher: &[f64], student: &[f64], gradient: &mut [f64]) -> f64 {
        assert!(teacher.len() == student.len() && student.len() == gradient.len(), "outcomes differ in number");
        assert!(!student.is_empty(), "the tail is an outcome");
        let kept = student.len() - 1;
        let mut count = kept + 1;
        if student[kept] == f64::NEG_INFINITY {
            // Everything is kept: the last outcome does not exist.
            count = kept;
            gradient[kept] = 0.0;
        }
        let (teacher, student, gradient) = (&teacher[..count], &student[..count], &mut gradient[..count]);
        match *self {
            Divergence::ForwardKl => forward_kl(teacher, student, gradient),
            Divergence::ReverseKl => reverse_kl(teacher, student, gradient),
            Divergence::SoftCrossEntropy => each(teacher, student, gradient, |lp, lq| {
                let p = lp.exp();
                (if p > 0.0 { -p * lq } else { 0.0 }, -p)
            }),
            Divergence::Jsd { beta } => each(teacher, student, gradient, |lp, lq| {
                let (p, q) = (lp.exp(), lq.exp());
                let lm = log_mix(beta, lp, lq);
                let own = q * (lq - lm);
                (beta * weighted(p, lp - lm) + (1.0 - beta) * own, (1.0 - beta) * own)
            }),
            Divergence::SkewKl { alpha } => each(teacher, student, gradient, |lp, lq| {
                let p = lp.exp();
                if p == 0.0 {
                    return (0.0, 0.0);
                }
                let lm = log_mix(alpha, lp, lq);
                (p * (lp - lm), -(1.0 - alpha) * p * (lq - lm).exp())
            }),
            Divergence::SkewReverseKl { alpha } => each(teacher, student, gradient, |lp, lq| {
                let q = lq.exp();
                let lm = log_mix(alpha, lq, lp.max(LOG_IMPOSSIBLE));
                (q * (lq - lm), q * (lq - lm + 1.0 - alpha * (lq - lm).exp()))
            }),
            Divergence::AdaptiveKl { head } => {
                let weight = head_share(head, kept, teacher, student);
                let mut reverse = vec![0.0; count];
                let value = weight * forward_kl(teacher, student, gradient)
                    + (1.0 - weight) * reverse_kl(teacher, student, &mut reverse);
                for (forward, reverse) in gradient.iter_mut().zip(reverse) {
                    *forward = weight * *forward + (1.0 - weight) * reverse;
                }
                value
            }
            Divergence::TotalVariation => each(teacher, student, gradient, |lp, lq| {
                let (p, q) = (lp.exp(), lq.exp());
                let side = if q > p {
                    1.0
                } else if q < p {
                    -1.0
                } else {
                    0.0
                };
                (0.5 * (p - q).abs(), 0.5 * side * q)
            }),
            Divergence::Renyi { alpha } => {
                let log_sum = powers(alpha, teacher, student, gradient);
                for power in gradient.iter_mut() {
                    *power = -(*power - log_sum).exp();
                }
                log_sum / (alpha - 1.0)
            }
            Divergence::Alpha { alpha } => {
                let log_sum = powers(alpha, teacher, student, gradient);
                for power in gradient.iter_mut() {
                    *power = -power.exp() / alpha;
                }
                log_sum.exp_m1() / (alpha * (alpha - 1.0))
            }
            Divergence::Taid { teacher: share } => {
                // gradient holds ln p_t before it is normalised.
                let log_sum = powers(share, teacher, student, gradient);
                let mut value = 0.0;
                for (entry, lq) in gradient.iter_mut().zip(student) {
                    let lp = *entry - log_sum;
                    let p = lp.exp();
                    value += weighted(p, lp - lq);
                    *entry = -p;
                }
                value
            }
            Divergence::ConditionalKl => {
                let (lp_all, lq_all) = (log_sum_exp(&teacher[..kept]), log_sum_exp(&student[..kept]));
                gradient[kept..].fill(0.0);
                each(&teacher[..kept], &student[..kept], &mut gradient[..kept], |lp, lq| {
                    let (lp, lq) = (lp - lp_all, lq - lq_all);
                    let p = lp.exp();
                    (weighted(p, lp - lq), lq.exp() - p)
                })
            }
        }
    }
}

/// Value and gradient of a divergence that is a sum over outcomes.
fn each(teacher: &[f64], student: &[f64], gradient: &mut [f64], term: impl Fn(f64, f64) -> (f64, f64)) -> f64 {
    let mut value = 0.0;
    for ((entry, &lp), &lq) in gradient.iter_mut().zip(teacher).zip(student) {
        let (part, slope) = term(lp, lq);
        value += part;
        *entry = slope;
    }
    value
}

fn forward_kl(teacher: &[f64], student: &[f64], gradient: &mut [f64]) -> f64 {
    each(teacher, student, gradient, |lp, lq| {
        let p = lp.exp();
        (weighted(p, lp - lq), -p)
    })
}

fn reverse_kl(teacher: &[f64], student: &[f64], gradient: &mut [f64]) -> f64 {
    each(teacher, student, gradient, |lp, lq| {
        let q = lq.exp();
        let difference = lq - lp.max(LOG_IMPOSSIBLE);
        (q * difference, q * (difference + 1.0))
    })
}

/// `weight * value`, 0 for no weight at all, however infinite the value.
fn weighted(weight: f64, value: f64) -> f64 {
    if weight == 0.0 { 0.0 } else { weight * value }
}

/// `ln(share e^a + (1 - share) e^b)`.
fn log_mix(share: f64, a: f64, b: f64) -> f64 {
    let (a, b) = (share.ln() + a, (-share).ln_1p() + b);
    let largest = a.max(b);
    if largest == f64::NEG_INFINITY { largest } else { largest + ((a - largest).exp() + (b - largest).exp()).ln() }
}

/// `ln sum exp`.
pub(crate) fn log_sum_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.iter().map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// `ln(p^alpha q^(1-alpha))` of each outcome into `logs`; gives the log of their sum.
fn powers(alpha: f64, teacher: &[f64], student: &[f64], logs: &mut [f64]) -> f64 {
    for ((log, &lp), &lq) in logs.iter_mut().zip(teacher).zip(student) {
        *log = match alpha {
            0.0 => lq,
            alpha if alpha < 0.0 => alpha * lp.max(LOG_IMPOSSIBLE) + (1.0 - alpha) * lq,
            alpha => alpha * lp + (1.0 - alpha) * lq,
        };
    }
    log_sum_exp(logs)
}

/// The share of the gap between teacher and student that lies in the teacher's head.
fn head_share(head: f64, kept: usize, teacher: &[f64], student: &[f64]) -> f64 {
    let (mut mass, mut head_gap, mut all) = (0.0, 0.0, 0.0);
    for (place, (lp, lq)) in teacher.iter().zip(student).enumerate() {
        let (p, q) = (lp.exp(), lq.exp());
        // The outcome that reaches the mass still belongs to the head; the tail never does.
        if place < kept && mass < head {
            head_gap += (p - q).abs();
        }
        mass += p;
        all += (p - q).abs();
    }
    if all > 0.0 { head_gap / all } else { 0.5 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(logits: &[f64]) -> Vec<f64> {
        let sum = log_sum_exp(logits);
        logits.iter().map(|logit| logit - sum).collect()
    }

    #[test]
    fn equal_distributions_have_no_divergence_and_pull_nowhere() {
        let p = normalised(&[2.0, 1.0, 0.5, -3.0, -20.0]);
        for divergence in Divergence::EXAMPLES {
            let mut gradient = [0.0; 5];
            let value = divergence.evaluate(&p, &p, &mut gradient);
            if divergence != Divergence::SoftCrossEntropy {
                assert!(value.abs() < 1e-12, "{}: {value}", divergence.name());
            }
            // What reaches a logit is G_j - q_j S.
            let sum: f64 = gradient.iter().sum();
            for (g, lp) in gradient.iter().zip(&p) {
                assert!((g - lp.exp() * sum).abs() < 1e-12, "{}: {gradient:?}", divergence.name());
            }
        }
    }

    #[test]
    fn limits_are_what_the_papers_say() {
        let (p, q) = (normalised(&[2.0, 0.1, -1.0, 0.4]), normalised(&[0.3, 1.0, -2.0, 0.9]));
        let value = |divergence: Divergence| divergence.evaluate(&p, &q, &mut [0.0; 4]);
        let (forward, reverse) = (value(Divergence::ForwardKl), value(Divergence::ReverseKl));
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-4, "{a} and {b}");
        let small = 1e-6;
        near(value(Divergence::Jsd { beta: small }) / small, forward);
        near(value(Divergence::Jsd { beta: 1.0 - small }) / small, reverse);
        near(value(Divergence::SkewKl { alpha: 0.0 }), forward);
        near(value(Divergence::SkewReverseKl { alpha: 0.0 }), reverse);
        near(value(Divergence::Renyi { alpha: 1.0 - small }), forward);
        near(value(Divergence::Alpha { alpha: 1.0 - small }), forward);
        near(value(Divergence::Alpha { alpha: small }), reverse);
        near(value(Divergence::Taid { teacher: 1.0 }), forward);
        assert!(value(Divergence::Taid { teacher: 0.0 }).abs() < 1e-12);
        let total = value(Divergence::TotalVariation);
        assert!(total * total * 2.0 <= forward, "Pinsker's inequality");
    }

    #[test]
    fn impossible_outcomes_leave_every_value_and_gradient_finite() {
        let teacher = [(0.75f64).ln(), (0.25f64).ln(), f64::NEG_INFINITY];
        for student in [[-0.5f64, -1.2, -2.3], [-0.2, -1.6, f64::NEG_INFINITY], [-400.0, 0.0, -800.0]] {
            for divergence in Divergence::EXAMPLES {
                let mut gradient = [7.0; 3];
                let value = divergence.evaluate(&teacher, &student, &mut gradient);
                assert!(value.is_finite() && gradient.iter().all(|g| g.is_finite()), "{divergence:?} {student:?}");
            }
        }
    }

    #[test]
    fn parameters_without_meaning_are_refused_with_a_way_out() {
        let refusal = |divergence: Divergence| divergence.check().unwrap_err();
        assert!(refusal(Divergence::Jsd { beta: 0.0 }).tip.contains("forward_kl"));
        assert!(refusal(Divergence::Jsd { beta: 1.0 }).tip.contains("reverse_kl"));
        assert_eq!(refusal(Divergence::Renyi { alpha: 1.0 }).problem, "renyi with alpha 1 is not defined");
        for divergence in [
            Divergence::SkewKl { alpha: 1.0 },
            Divergence::SkewReverseKl { alpha: -0.1 },
            Divergence::AdaptiveKl { head: 1.0 },
            Divergence::Alpha { alpha: f64::NAN },
            Divergence::Taid { teacher: 1.5 },
        ] {
            // NaN compares as nothing, so it must not slip through.
            assert!(divergence.check().is_err(), "{divergence:?}");
        }
        assert!(Divergence::EXAMPLES.iter().all(|divergence| divergence.check().is_ok()));
    }
}
