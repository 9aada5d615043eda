//! The truth every implementation is compared to: plain loops in f64, written to be read.
//!
//! T teacher, S student, k kept ids. Distributions over k + 1 outcomes put everything not kept into one tail outcome.

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
