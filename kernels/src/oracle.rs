//! The truth every implementation is compared to: plain loops in f64, written to be read.
//!
//! T teacher, S student, k kept ids. Distributions over k + 1 outcomes put everything not kept into one tail outcome.

use crate::divergence::Divergence;

/// One row of a teacher, as the cache keeps it.
#[derive(Debug, Clone)]
pub struct KeptRow {
    pub ids: Vec<u32>,
    pub log_probs: Vec<f64>,
    pub log_tail: f64,
    pub label_log_prob: f64,
}

/// `ln sum exp`.
pub fn log_sum_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.iter().map(|v| (v - largest).exp()).sum::<f64>().ln()
}

/// `ln softmax(values / temperature)`.
pub fn log_softmax(values: &[f64], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = values.iter().map(|v| v / temperature).collect();
    let sum = log_sum_exp(&scaled);
    scaled.into_iter().map(|v| v - sum).collect()
}

/// The `k` largest entries by sorting everything, and the mass of the rest by adding it up.
pub fn top_k(logits: &[f32], k: usize, label: u32, temperature: f64) -> KeptRow {
    let logits: Vec<f64> = logits.iter().map(|&v| v as f64).collect();
    let log_probs = log_softmax(&logits, temperature);
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let rest: Vec<f64> = order[k..].iter().map(|&id| log_probs[id as usize]).collect();
    KeptRow {
        ids: order[..k].to_vec(),
        log_probs: order[..k].iter().map(|&id| log_probs[id as usize]).collect(),
        log_tail: log_sum_exp(&rest),
        label_log_prob: log_probs[label as usize],
    }
}

/// A loss of one row and its gradient in that row's logits.
#[derive(Debug, Clone)]
pub struct RowLoss {
    pub value: f64,
    pub logits_grad: Vec<f64>,
}

/// `-ln softmax(logits)[label]`.
pub fn hard_cross_entropy(logits: &[f64], label: u32) -> RowLoss {
    let log_probs = log_softmax(logits, 1.0);
    let mut logits_grad: Vec<f64> = log_probs.iter().map(|p| p.exp()).collect();
    logits_grad[label as usize] -= 1.0;
    RowLoss { value: -log_probs[label as usize], logits_grad }
}

/// Forward Kullback-Leibler divergence `sum p ln(p / q)` over the kept ids and one tail outcome, where the student's
/// distribution is its full softmax at the same temperature.
pub fn forward_kl(logits: &[f64], teacher: &KeptRow, temperature: f64) -> RowLoss {
    let log_q = log_softmax(logits, temperature);
    let is_kept = |v: usize| teacher.ids.contains(&(v as u32));
    let rest: Vec<f64> = (0..logits.len()).filter(|&v| !is_kept(v)).map(|v| log_q[v]).collect();
    let log_q_tail = log_sum_exp(&rest);
    let term = |log_p: f64, log_q: f64| if log_p == f64::NEG_INFINITY { 0.0 } else { log_p.exp() * (log_p - log_q) };
    let kept: f64 = teacher.ids.iter().zip(&teacher.log_probs).map(|(&id, &p)| term(p, log_q[id as usize])).sum();
    let value = kept + if rest.is_empty() { 0.0 } else { term(teacher.log_tail, log_q_tail) };
    // d/dz_v: every outcome pulls the whole softmax down by its probability and its own members up in proportion
    // to their share of it.
    let total: f64 = teacher.log_probs.iter().map(|p| p.exp()).sum::<f64>()
        + if rest.is_empty() { 0.0 } else { teacher.log_tail.exp() };
    let logits_grad = (0..logits.len())
        .map(|v| {
            let pull = match teacher.ids.iter().position(|&id| id as usize == v) {
                Some(j) => teacher.log_probs[j].exp(),
                None => (teacher.log_tail + log_q[v] - log_q_tail).exp(),
            };
            (log_q[v].exp() * total - pull) / temperature
        })
        .collect();
    RowLoss { value, logits_grad }
}

/// A number and its derivative by one logit: what makes the derivative of [`divergence`] independent of anybody's
/// algebra.
#[derive(Debug, Clone, Copy)]
struct Dual {
    value: f64,
    slope: f64,
}

impl Dual {
    fn new(value: f64) -> Self {
        Dual { value, slope: 0.0 }
    }

    fn exp(self) -> Self {
        let value = self.value.exp();
        Dual { value, slope: if value == 0.0 { 0.0 } else { value * self.slope } }
    }

    fn ln(self) -> Self {
        Dual { value: self.value.ln(), slope: self.slope / self.value }
    }

    fn abs(self) -> Self {
        if self.value < 0.0 { self * -1.0 } else { self }
    }
}

impl std::ops::Add for Dual {
    type Output = Dual;
    fn add(self, other: Dual) -> Dual {
        Dual { value: self.value + other.value, slope: self.slope + other.slope }
    }
}

impl std::ops::Mul for Dual {
    type Output = Dual;
    fn mul(self, other: Dual) -> Dual {
        let slope = self.slope * other.value + self.value * other.slope;
        Dual { value: self.value * other.value, slope }
    }
}

impl std::ops::Mul<f64> for Dual {
    type Output = Dual;
    fn mul(self, factor: f64) -> Dual {
        Dual { value: self.value * factor, slope: self.slope * factor }
    }
}

impl std::ops::Sub for Dual {
    type Output = Dual;
    fn sub(self, other: Dual) -> Dual {
        self + other * -1.0
    }
}

impl std::iter::Sum for Dual {
    fn sum<I: Iterator<Item = Dual>>(terms: I) -> Dual {
        terms.fold(Dual::new(0.0), |sum, term| sum + term)
    }
}

/// Any divergence over the kept ids and one tail outcome, where the student's distribution is its full softmax at the
/// same temperature.
pub fn divergence(kind: Divergence, logits: &[f64], teacher: &KeptRow, temperature: f64) -> RowLoss {
    let log_q = log_softmax(logits, temperature);
    let place: Vec<Option<usize>> =
        (0..logits.len()).map(|v| teacher.ids.iter().position(|&id| id as usize == v)).collect();
    let rest: Vec<f64> = (0..logits.len()).filter(|&v| place[v].is_none()).map(|v| log_q[v]).collect();
    let mut log_p = teacher.log_probs.clone();
    let mut outcomes: Vec<f64> = teacher.ids.iter().map(|&id| log_q[id as usize]).collect();
    if !rest.is_empty() {
        log_p.push(teacher.log_tail);
        outcomes.push(log_sum_exp(&rest));
    }
    let kept = teacher.ids.len();
    let by_logit = |v: Option<usize>| {
        let duals: Vec<Dual> = outcomes
            .iter()
            .enumerate()
            .map(|(j, &value)| {
                // d ln q_j / dz_v: its share of the outcome, less its share of everything.
                let slope = v.map_or(0.0, |v| {
                    let own = match place[v] {
                        Some(at) => (at == j) as u8 as f64,
                        None if j == kept => (log_q[v] - value).exp(),
                        None => 0.0,
                    };
                    (own - log_q[v].exp()) / temperature
                });
                Dual { value, slope }
            })
            .collect();
        divergence_of_outcomes(kind, &log_p, &duals, kept)
    };
    RowLoss { value: by_logit(None).value, logits_grad: (0..logits.len()).map(|v| by_logit(Some(v)).slope).collect() }
}

fn divergence_of_outcomes(kind: Divergence, log_p: &[f64], log_q: &[Dual], kept: usize) -> Dual {
    let possible = |lp: f64| lp.max(crate::divergence::LOG_IMPOSSIBLE);
    let both = || log_p.iter().copied().zip(log_q.iter().copied());
    let kl_to = |log_m: &dyn Fn(f64, Dual) -> Dual| -> Dual {
        both()
            .filter(|(lp, _)| *lp > f64::NEG_INFINITY)
            .map(|(lp, lq)| (Dual::new(lp) - log_m(lp, lq)) * lp.exp())
            .sum()
    };
    let kl_from =
        |log_m: &dyn Fn(f64, Dual) -> Dual| -> Dual { both().map(|(lp, lq)| lq.exp() * (lq - log_m(lp, lq))).sum() };
    // ln(share e^a + (1 - share) e^b), relative to the larger so that neither underflows.
    let mix = |share: f64, a: Dual, b: Dual| {
        let largest = Dual::new(a.value.max(b.value));
        ((a - largest).exp() * share + (b - largest).exp() * (1.0 - share)).ln() + largest
    };
    let power_sum = |alpha: f64| {
        let logs: Vec<Dual> = both().map(|(lp, lq)| Dual::new(alpha * possible(lp)) + lq * (1.0 - alpha)).collect();
        let largest = Dual::new(logs.iter().map(|log| log.value).fold(f64::NEG_INFINITY, f64::max));
        logs.into_iter().map(|log| (log - largest).exp()).sum::<Dual>().ln() + largest
    };
    match kind {
        Divergence::ForwardKl => kl_to(&|_, lq| lq),
        Divergence::ReverseKl => kl_from(&|lp, _| Dual::new(possible(lp))),
        Divergence::Jsd { beta } => {
            let middle = |lp: f64, lq: Dual| mix(beta, Dual::new(lp), lq);
            kl_to(&middle) * beta + kl_from(&middle) * (1.0 - beta)
        }
        Divergence::SkewKl { alpha } => kl_to(&|lp, lq| mix(alpha, Dual::new(lp), lq)),
        Divergence::SkewReverseKl { alpha } => kl_from(&|lp, lq| mix(alpha, lq, Dual::new(possible(lp)))),
        Divergence::AdaptiveKl { head } => {
            let mut mass = 0.0;
            let (mut in_head, mut all) = (0.0, 0.0);
            for (place, (lp, lq)) in both().enumerate() {
                let gap = (lp.exp() - lq.value.exp()).abs();
                in_head += if place < kept && mass < head { gap } else { 0.0 };
                all += gap;
                mass += lp.exp();
            }
            let share = if all > 0.0 { in_head / all } else { 0.5 };
            kl_to(&|_, lq| lq) * share + kl_from(&|lp, _| Dual::new(possible(lp))) * (1.0 - share)
        }
        Divergence::TotalVariation => both().map(|(lp, lq)| (Dual::new(lp.exp()) - lq.exp()).abs() * 0.5).sum(),
        Divergence::Renyi { alpha } => power_sum(alpha) * (1.0 / (alpha - 1.0)),
        Divergence::Alpha { alpha } => (power_sum(alpha).exp() - Dual::new(1.0)) * (1.0 / (alpha * (alpha - 1.0))),
        Divergence::SoftCrossEntropy => {
            both().filter(|(lp, _)| *lp > f64::NEG_INFINITY).map(|(lp, lq)| lq * -lp.exp()).sum()
        }
        Divergence::Taid { teacher } => {
            let logs: Vec<f64> = both().map(|(lp, lq)| teacher * possible(lp) + (1.0 - teacher) * lq.value).collect();
            let all = log_sum_exp(&logs);
            logs.iter().zip(log_q).map(|(log, &lq)| (Dual::new(log - all) - lq) * (log - all).exp()).sum()
        }
        Divergence::ConditionalKl => {
            let p_all = log_sum_exp(&log_p[..kept]);
            let q_all = log_q[..kept].iter().map(|lq| lq.exp()).sum::<Dual>().ln();
            let terms = log_p[..kept].iter().zip(&log_q[..kept]);
            terms
                .filter(|(lp, _)| **lp > f64::NEG_INFINITY)
                .map(|(lp, &lq)| (Dual::new(lp - p_all) - lq + q_all) * (lp - p_all).exp())
                .sum()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_agree_with_finite_differences() {
        let teacher_logits: Vec<f32> = (0..12).map(|i| ((i * 37) % 11) as f32 * 0.4).collect();
        let logits: Vec<f64> = (0..12).map(|i| ((i * 53) % 13) as f64 * 0.3 - 1.0).collect();
        for (k, temperature) in [(1, 1.0), (4, 1.0), (4, 2.5), (12, 1.0)] {
            let teacher = top_k(&teacher_logits, k, 5, temperature);
            type Loss<'a> = &'a dyn Fn(&[f64]) -> RowLoss;
            let soft: Loss = &|z| forward_kl(z, &teacher, temperature);
            let hard: Loss = &|z| hard_cross_entropy(z, 5);
            for loss in [soft, hard] {
                let grad = loss(&logits).logits_grad;
                for v in 0..logits.len() {
                    let shifted = |by: f64| {
                        let mut z = logits.clone();
                        z[v] += by;
                        loss(&z).value
                    };
                    let slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
                    assert!((slope - grad[v]).abs() < 1e-8, "k {k}: {slope} {}", grad[v]);
                }
            }
        }
    }

    #[test]
    fn keeping_everything_gives_the_dense_divergence() {
        let teacher_logits: Vec<f32> = (0..9).map(|i| (i as f32 * 1.7).sin() * 3.0).collect();
        let logits: Vec<f64> = (0..9).map(|i| (i as f64 * 0.9).cos() * 2.0).collect();
        let teacher = top_k(&teacher_logits, 9, 0, 1.0);
        let wide: Vec<f64> = teacher_logits.iter().map(|&v| v as f64).collect();
        let (p, q) = (log_softmax(&wide, 1.0), log_softmax(&logits, 1.0));
        let dense: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        assert!((forward_kl(&logits, &teacher, 1.0).value - dense).abs() < 1e-12);
    }
}
