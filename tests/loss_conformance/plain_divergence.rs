//! The plain pipeline's divergences: value, and derivative in each ln q, written from their definitions.

use limbeck_kernels::divergence::Divergence;

use crate::{mistakes::Mistake, plain::Plain, plain_row::log_sum_exp};

/// `teacher` and `student` are log-probabilities of the same outcomes; with `has_tail` the last is the tail's.
pub fn evaluate(plain: &Plain, kind: Divergence, teacher: &[f64], student: &[f64], has_tail: bool) -> (f64, Vec<f64>) {
    let kind = match (plain.mistake, kind) {
        (Some(Mistake::DirectionsSwapped), Divergence::ForwardKl) => Divergence::ReverseKl,
        (Some(Mistake::DirectionsSwapped), Divergence::ReverseKl) => Divergence::ForwardKl,
        (Some(Mistake::JsdBetaFlipped), Divergence::Jsd { beta }) => Divergence::Jsd { beta: 1.0 - beta },
        (Some(Mistake::SkewAlphaFlipped), Divergence::SkewKl { alpha }) => Divergence::SkewKl { alpha: 1.0 - alpha },
        (Some(Mistake::SkewReverseAlphaFlipped), Divergence::SkewReverseKl { alpha }) => {
            Divergence::SkewReverseKl { alpha: 1.0 - alpha }
        }
        _ => kind,
    };
    let (value, slopes) = right(plain, kind, teacher, student, has_tail);
    match (plain.mistake, kind) {
        (Some(Mistake::GradientOfOtherDirection), Divergence::ForwardKl) => {
            (value, right(plain, Divergence::ReverseKl, teacher, student, has_tail).1)
        }
        (Some(Mistake::GradientOfOtherDirection), Divergence::ReverseKl) => {
            (value, right(plain, Divergence::ForwardKl, teacher, student, has_tail).1)
        }
        _ => (value, slopes),
    }
}

fn right(plain: &Plain, kind: Divergence, teacher: &[f64], student: &[f64], has_tail: bool) -> (f64, Vec<f64>) {
    let guarded = !plain.makes(Mistake::ImpossibleTimesInfinity);
    // p times something that is infinite where p is zero.
    let times = |p: f64, value: f64| if guarded && p == 0.0 { 0.0 } else { p * value };
    let each = |term: &dyn Fn(f64, f64) -> (f64, f64)| -> (f64, Vec<f64>) {
        let terms: Vec<(f64, f64)> = teacher.iter().zip(student).map(|(&lp, &lq)| term(lp, lq)).collect();
        (terms.iter().map(|(value, _)| value).sum(), terms.into_iter().map(|(_, slope)| slope).collect())
    };
    let mix = |share: f64, a: f64, b: f64| log_sum_exp(&[share.ln() + a, (1.0 - share).ln() + b]);
    match kind {
        Divergence::ForwardKl => each(&|lp, lq| (times(lp.exp(), lp - lq), -lp.exp())),
        Divergence::SoftCrossEntropy => each(&|lp, lq| (times(lp.exp(), -lq), -lp.exp())),
        Divergence::Jsd { beta } if plain.makes(Mistake::JsdFromTheMixture) => each(&|lp, lq| {
            let (q, lm) = (lq.exp(), mix(beta, lp, lq));
            let apart = beta * (lm - lp) + (1.0 - beta) * (lm - lq);
            (lm.exp() * apart, (1.0 - beta) * (q * (apart + 1.0) - lm.exp()))
        }),
        // The mixture moves with the student, but its terms sum to one: what it adds to the gradient cancels.
        Divergence::Jsd { beta } => each(&|lp, lq| {
            let (p, q, lm) = (lp.exp(), lq.exp(), mix(beta, lp, lq));
            let value = beta * times(p, lp - lm) + (1.0 - beta) * q * (lq - lm);
            (value, (1.0 - beta) * q * (lq - lm))
        }),
        Divergence::SkewKl { alpha } => each(&|lp, lq| {
            let lm = mix(alpha, lp, lq);
            (times(lp.exp(), lp - lm), -(1.0 - alpha) * times(lp.exp(), (lq - lm).exp()))
        }),
        Divergence::TotalVariation => each(&|lp, lq| {
            let (p, q) = (lp.exp(), lq.exp());
            let side = if p == q { 0.0 } else { (q - p).signum() };
            (0.5 * (p - q).abs(), 0.5 * q * side)
        }),
        Divergence::ConditionalKl => {
            let kept = teacher.len() - has_tail as usize;
            let (p_all, q_all) = (log_sum_exp(&teacher[..kept]), log_sum_exp(&student[..kept]));
            let mut value = 0.0;
            let mut slopes = vec![0.0; teacher.len()];
            for place in 0..kept {
                let (lp, lq) = (teacher[place] - p_all, student[place] - q_all);
                value += times(lp.exp(), lp - lq);
                slopes[place] = lq.exp() - lp.exp();
            }
            (value, slopes)
        }
        Divergence::ReverseKl if teacher.iter().all(|lp| lp.is_finite()) => each(&|lp, lq| {
            let q = lq.exp();
            (q * (lq - lp), q * (lq - lp + 1.0))
        }),
        Divergence::SkewReverseKl { alpha } if teacher.iter().all(|lp| lp.is_finite()) => each(&|lp, lq| {
            let (q, lm) = (lq.exp(), mix(alpha, lq, lp));
            let moved = if plain.makes(Mistake::SkewReverseMixtureDetached) { 0.0 } else { alpha * (lq - lm).exp() };
            (q * (lq - lm), q * (lq - lm + 1.0 - moved))
        }),
        // No mistake of the list is made in these, nor in those above where the teacher rules an outcome out.
        _ => {
            let mut slopes = vec![0.0; teacher.len()];
            let (mut teacher, mut student) = (teacher.to_vec(), student.to_vec());
            if !has_tail {
                slopes.push(0.0);
                teacher.push(f64::NEG_INFINITY);
                student.push(f64::NEG_INFINITY);
            }
            let value = kind.evaluate(&teacher, &student, &mut slopes);
            slopes.truncate(teacher.len() - !has_tail as usize);
            (value, slopes)
        }
    }
}
