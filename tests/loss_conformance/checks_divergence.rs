//! Value and gradient of the soft loss.

use limbeck_kernels::divergence::Divergence;

use crate::{
    material::{BOTH, SOFT, TAILS, ordinary, random, rows, with_tails},
    subject::{Implementation, Job, Outcome, Source},
    truth::{Bounds, Finding, largest, must, near, same, same_gradients, same_values, truth},
};

/// Parameters other than a half, so that none is its own complement.
const DIVERGENCES: [Divergence; 16] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.5 },
    Divergence::Jsd { beta: 0.1 },
    Divergence::Jsd { beta: 0.9 },
    Divergence::SkewKl { alpha: 0.0 },
    Divergence::SkewKl { alpha: 0.1 },
    Divergence::SkewReverseKl { alpha: 0.1 },
    Divergence::AdaptiveKl { head: 0.5 },
    Divergence::TotalVariation,
    Divergence::Renyi { alpha: 0.5 },
    Divergence::Renyi { alpha: 2.0 },
    Divergence::Alpha { alpha: -1.0 },
    Divergence::SoftCrossEntropy,
    Divergence::Taid { teacher: 0.3 },
    Divergence::ConditionalKl,
];

/// k from 1 to V, sharp and flat teachers, logits up to +-80.
fn jobs() -> Vec<Job> {
    let scaled = |teacher: f32, student: f32, k: usize| {
        rows(61, &[0, 17, 60, 4], random(4 * 61, 21, teacher), k, random(4 * 61, 22, student))
    };
    vec![ordinary(6, 61, 8, 20), scaled(3.0, 3.0, 1), scaled(3.0, 3.0, 61), scaled(53.0, 53.0, 4), scaled(0.0, 1.0, 60)]
}

fn soft(outcome: &Outcome, row: usize) -> Result<f64, String> {
    outcome.rows[row].map(|losses| losses.soft).ok_or(format!("row {row} does not count"))
}

pub fn every_divergence_has_the_oracles_value(subject: &dyn Implementation) -> Finding {
    for job in jobs() {
        for divergence in DIVERGENCES {
            let job = job.clone().with_divergence(divergence);
            same_values(&subject.step(&job)?, &truth(&job), Bounds::default())
                .map_err(|how| format!("{divergence:?}: {how}"))?;
        }
    }
    Ok(())
}

pub fn every_divergence_has_the_oracles_gradient(subject: &dyn Implementation) -> Finding {
    for job in jobs() {
        for divergence in DIVERGENCES {
            let job = job.clone().with_divergence(divergence);
            same_gradients(&subject.step(&job)?, &truth(&job), job.vocab, Bounds::default().gradient)
                .map_err(|how| format!("{divergence:?}: {how}"))?;
        }
    }
    Ok(())
}

/// Needs no oracle: differences of the value itself. Where a divergence holds something constant to its gradient, that
/// gradient is not the slope; those are left out.
pub fn the_gradient_is_the_slope_of_the_value(subject: &dyn Implementation) -> Finding {
    let mut job = ordinary(2, 13, 4, 23).at_temperature(2.0, true).with_weights(BOTH);
    // Multiples of the step, so that nothing is rounded in the logits.
    let step = 1.0 / 32.0;
    job.student_logits().iter_mut().for_each(|z| *z = (*z / step).round() * step);
    let detached =
        |divergence: &Divergence| matches!(divergence, Divergence::AdaptiveKl { .. } | Divergence::Taid { .. });
    for divergence in DIVERGENCES.into_iter().filter(|divergence| !detached(divergence)) {
        let job = job.clone().with_divergence(divergence);
        let first = subject.step(&job)?;
        let stored = job.with_source(Source::Stored { targets: first.targets.clone(), sampled: false });
        let bound = 1e-4 * largest(&first.gradients[0]);
        for place in 0..first.gradients[0].len() {
            let at = |steps: f32| {
                let mut moved = stored.clone();
                moved.student_logits()[place] += steps * step;
                subject.step(&moved).map(|outcome| outcome.loss)
            };
            let slope = (8.0 * (at(1.0)? - at(-1.0)?) - (at(2.0)? - at(-2.0)?)) / (12.0 * step as f64);
            near(&format!("{divergence:?}: gradient {place}"), first.gradients[0][place], slope, bound)?;
        }
    }
    Ok(())
}

/// On two outcomes, by hand: P = (3/4, 1/4), Q = (1/2, 1/2).
pub fn parameters_weigh_the_side_they_are_named_for(subject: &dyn Implementation) -> Finding {
    let (p, q) = ([0.75f64, 0.25], [0.5f64, 0.5]);
    let kl = |a: [f64; 2], b: [f64; 2]| a[0] * (a[0] / b[0]).ln() + a[1] * (a[1] / b[1]).ln();
    let mostly_q = [0.1 * p[0] + 0.9 * q[0], 0.1 * p[1] + 0.9 * q[1]];
    let mostly_p = [0.9 * p[0] + 0.1 * q[0], 0.9 * p[1] + 0.1 * q[1]];
    let expected = [
        (Divergence::ForwardKl, kl(p, q)),
        (Divergence::ReverseKl, kl(q, p)),
        (Divergence::Jsd { beta: 0.1 }, 0.1 * kl(p, mostly_q) + 0.9 * kl(q, mostly_q)),
        (Divergence::SkewKl { alpha: 0.1 }, kl(p, mostly_q)),
        (Divergence::SkewReverseKl { alpha: 0.1 }, kl(q, mostly_p)),
        (Divergence::TotalVariation, 0.25),
    ];
    for (divergence, value) in expected {
        let teacher = vec![0.75f32.ln(), 0.25f32.ln()];
        let job = rows(2, &[0], teacher, 1, vec![0.3, 0.3]).with_divergence(divergence);
        near(&format!("{divergence:?}"), soft(&subject.step(&job)?, 0)?, value, 1e-6)?;
    }
    Ok(())
}

/// The sum over the vocabulary, with no outcome joined to another.
pub fn keeping_every_id_gives_the_dense_divergence(subject: &dyn Implementation) -> Finding {
    let vocab = 37;
    let job = ordinary(4, vocab, vocab, 24);
    let Source::Teacher { logits, .. } = &job.source else { unreachable!("made of a teacher") };
    let outcome = subject.step(&job)?;
    let probabilities = |z: &[f64]| {
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        z.iter().map(|z| z.exp() / sum).collect::<Vec<f64>>()
    };
    let wide: Vec<f64> = logits.iter().map(|&z| z as f64).collect();
    for (row, (teacher, student)) in wide.chunks(vocab).zip(job.student.logits().chunks(vocab)).enumerate() {
        let (p, q) = (probabilities(teacher), probabilities(student));
        let dense: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        near(&format!("row {row}"), soft(&outcome, row)?, dense, 1e-6 * dense)?;
    }
    Ok(())
}

/// The student moves its mass to ids that the teacher did not keep: that has to cost.
pub fn mass_outside_the_kept_ids_is_not_free(subject: &dyn Implementation) -> Finding {
    let (vocab, k) = (60, 8);
    let teacher = with_tails(vocab, k, &[0.01], 25);
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd { beta: 0.5 }] {
        let job = rows(vocab, &[2], teacher.clone(), k, teacher.clone()).with_divergence(divergence);
        let mut moved = job.clone();
        moved.student_logits()[k..].iter_mut().for_each(|z| *z += 7.0);
        let (near, far) = (soft(&subject.step(&job)?, 0)?, soft(&subject.step(&moved)?, 0)?);
        must(far > near + 0.2, || format!("{divergence:?} goes from {near} to {far}"))?;
    }
    Ok(())
}

/// Students with more mass on the kept ids than their teachers.
pub fn no_divergence_is_below_zero(subject: &dyn Implementation) -> Finding {
    let (vocab, k) = (60, 8);
    let teacher = with_tails(vocab, k, &[0.9, 0.5, 0.1], 26);
    let mut student = teacher.clone();
    student.chunks_mut(vocab).for_each(|row| row[..k].iter_mut().for_each(|z| *z += 2.0));
    for divergence in DIVERGENCES {
        let job = rows(vocab, &[2, 9, 11], teacher.clone(), k, student.clone()).with_divergence(divergence);
        let outcome = subject.step(&job)?;
        for row in 0..3 {
            let value = soft(&outcome, row)?;
            must(value > -1e-6, || format!("{divergence:?} is {value}"))?;
        }
    }
    Ok(())
}

pub fn a_student_equal_to_its_teacher_is_left_alone(subject: &dyn Implementation) -> Finding {
    for temperature in [1.0, 3.0] {
        for divergence in DIVERGENCES.into_iter().filter(|divergence| *divergence != Divergence::SoftCrossEntropy) {
            let logits = random(4 * 61, 27, 4.0);
            let job = rows(61, &[0, 3, 5, 60], logits.clone(), 8, logits).with_divergence(divergence);
            let outcome = subject.step(&job.at_temperature(temperature, false).with_weights(SOFT))?;
            for row in 0..4 {
                near(&format!("{divergence:?}"), soft(&outcome, row)?, 0.0, 1e-6)?;
            }
            // Total variation has a kink there: its gradient points to whichever side the rounding fell.
            let smooth = divergence != Divergence::TotalVariation;
            must(!smooth || largest(&outcome.gradients[0]) < 1e-6, || format!("{divergence:?} pulls"))?;
        }
    }
    Ok(())
}

/// The gradient of the ids outside, held against its own size.
pub fn a_tiny_tail_still_pulls(subject: &dyn Implementation) -> Finding {
    let (vocab, k) = (60, 8);
    let reversed: Vec<f64> = TAILS.iter().rev().copied().collect();
    let labels = vec![1; TAILS.len()];
    // Never the teacher's own tail, where the pull is a difference of equals.
    let students = TAILS.map(|tail| (3.0 * tail).min(0.95));
    for tails in [&TAILS[..], &reversed, &[1e-2; TAILS.len()]] {
        let (teacher, student) = (with_tails(vocab, k, tails, 28), with_tails(vocab, k, &students, 29));
        for divergence in [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd { beta: 0.5 }] {
            let job = rows(vocab, &labels, teacher.clone(), k, student.clone());
            let job = job.with_divergence(divergence).with_weights(SOFT);
            let (found, truth) = (subject.step(&job)?, truth(&job));
            same_values(&found, &truth, Bounds::default())?;
            for row in 0..labels.len() {
                let outside = |outcome: &Outcome| outcome.gradients[0][row * vocab + k..(row + 1) * vocab].to_vec();
                let (found, truth) = (outside(&found), outside(&truth));
                let bound = 1e-4 * largest(&truth) + 1e-15;
                for (found, truth) in found.into_iter().zip(truth) {
                    near(&format!("{divergence:?} row {row}"), found, truth, bound)?;
                }
            }
        }
    }
    Ok(())
}

/// Probabilities of exactly zero, on either side.
pub fn what_is_impossible_stays_finite(subject: &dyn Implementation) -> Finding {
    let (vocab, labels) = (31, [4, 7, 30]);
    let mut one_hot = vec![-1e30; 3 * vocab];
    labels.iter().enumerate().for_each(|(row, &label)| one_hot[row * vocab + label as usize] = 0.0);
    let student = random(3 * vocab, 30, 4.0);
    for divergence in [
        Divergence::ForwardKl,
        Divergence::Jsd { beta: 0.5 },
        Divergence::SkewKl { alpha: 0.1 },
        Divergence::TotalVariation,
        Divergence::SoftCrossEntropy,
    ] {
        // One id kept, a few of them impossible, and all there are, so that nothing is outside.
        for k in [1, 5, vocab] {
            let job = rows(vocab, &labels, one_hot.clone(), k, student.clone()).with_divergence(divergence);
            same(&subject.step(&job)?, &truth(&job), vocab, Bounds::default())
                .map_err(|how| format!("{divergence:?}, k {k}: {how}"))?;
        }
    }
    Ok(())
}

/// Differences of 0.3 on top of 60, which bf16 counts in steps of a quarter, and many terms of about the same size.
pub fn close_logits_keep_their_digits(subject: &dyn Implementation) -> Finding {
    let vocab = 512;
    let lifted = |seed: u64| random(2 * vocab, seed, 0.6).into_iter().map(|z| z + 60.0).collect::<Vec<f32>>();
    let job = rows(vocab, &[3, 400], lifted(31), 16, lifted(32));
    // One step of f32 at 60 is 4e-6, and what the logits lost before they came here is nobody's fault.
    same(&subject.step(&job)?, &truth(&job), vocab, Bounds { absolute: 5e-7, ..Bounds::default() })
}
