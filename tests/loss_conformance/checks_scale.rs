//! Temperature, its square, and the weights of the two losses.

use limbeck_kernels::{divergence::Divergence, fused_linear_distill::RowWeights};

use crate::{
    material::{BOTH, HARD, SOFT, ordinary, random, rows},
    subject::{Implementation, RowLosses, Source},
    truth::{Bounds, Finding, largest, must, near, same, truth},
};

pub fn the_soft_gradient_keeps_its_size_at_any_temperature(subject: &dyn Implementation) -> Finding {
    // Hinton's limit: at a high temperature the scaled gradient is the difference of the centred logits over V.
    let vocab = 20;
    let job = ordinary(1, vocab, vocab, 41).with_weights(SOFT).at_temperature(1000.0, true);
    let Source::Teacher { logits, .. } = &job.source else { unreachable!("made of a teacher") };
    let centred = |z: Vec<f64>| {
        let mean = z.iter().sum::<f64>() / vocab as f64;
        z.into_iter().map(move |z| z - mean)
    };
    let teacher = centred(logits.iter().map(|&z| z as f64).collect());
    let limit: Vec<f64> = centred(job.student.logits()).zip(teacher).map(|(z, t)| (z - t) / vocab as f64).collect();
    let found = &subject.step(&job)?.gradients[0];
    for (place, (found, limit_here)) in found.iter().zip(&limit).enumerate() {
        near(&format!("gradient {place} at temperature 1000"), *found, *limit_here, 0.02 * largest(&limit))?;
    }
    // The factor is the square, in value and gradient, and on the soft loss alone.
    for divergence in [Divergence::ForwardKl, Divergence::Jsd { beta: 0.5 }] {
        for t_scale in [true, false] {
            let job =
                ordinary(3, 61, 8, 42).with_divergence(divergence).with_weights(BOTH).at_temperature(4.0, t_scale);
            same(&subject.step(&job)?, &truth(&job), 61, Bounds::default())?;
        }
    }
    Ok(())
}

pub fn the_hard_loss_is_at_temperature_one(subject: &dyn Implementation) -> Finding {
    for weights in [HARD, BOTH] {
        let job = ordinary(3, 61, 8, 43).with_weights(weights).at_temperature(4.0, true);
        let (found, one) = (subject.step(&job)?, truth(&ordinary(3, 61, 8, 43).with_weights(HARD)));
        for (row, (found, one)) in found.rows.iter().flatten().zip(one.rows.iter().flatten()).enumerate() {
            near(&format!("row {row}'s hard loss"), found.hard, one.hard, 1e-6 * one.hard)?;
        }
        if weights == HARD {
            for (place, (found, truth)) in found.gradients[0].iter().zip(&one.gradients[0]).enumerate() {
                near(&format!("gradient {place}"), *found, *truth, 1e-5 * largest(&one.gradients[0]))?;
            }
        }
    }
    Ok(())
}

/// The step is linear in the two weights.
pub fn each_weight_counts_once(subject: &dyn Implementation) -> Finding {
    let job = ordinary(3, 61, 8, 44);
    let at = |soft: f32, hard: f32| subject.step(&job.clone().with_weights(RowWeights { soft, hard }));
    let (soft, hard) = (at(1.0, 0.0)?, at(0.0, 1.0)?);
    let mean = |of: fn(&RowLosses) -> f64| soft.rows.iter().flatten().map(of).sum::<f64>() / soft.token_count as f64;
    near("the loss of soft targets alone", soft.loss, mean(|row| row.soft), 1e-6 * soft.loss)?;
    near("the loss of hard targets alone", hard.loss, mean(|row| row.hard), 1e-6 * hard.loss)?;
    for (soft_weight, hard_weight) in [(0.75f32, 0.25f32), (0.5, 0.5), (0.25, 0.75)] {
        let both = at(soft_weight, hard_weight)?;
        let sum = |soft: f64, hard: f64| soft_weight as f64 * soft + hard_weight as f64 * hard;
        let what = |name: &str| format!("{name} at weights {soft_weight} and {hard_weight}");
        near(&what("the loss"), both.loss, sum(soft.loss, hard.loss), 1e-6 * both.loss.abs())?;
        let bound = 1e-5 * largest(&both.gradients[0]);
        for (place, found) in both.gradients[0].iter().enumerate() {
            near(&what("a gradient"), *found, sum(soft.gradients[0][place], hard.gradients[0][place]), bound)?;
        }
    }
    Ok(())
}

/// The label first, last and not among the kept ids, and one of two rows that are otherwise the same.
pub fn a_label_counts_kept_or_not(subject: &dyn Implementation) -> Finding {
    let (vocab, k) = (61, 8);
    let teacher: Vec<f32> = random(vocab, 45, 4.0);
    let mut order: Vec<u32> = (0..vocab as u32).collect();
    order.sort_by(|&a, &b| teacher[b as usize].total_cmp(&teacher[a as usize]));
    let labels = [order[0], order[k / 2], order[k - 1], order[k], order[vocab - 1], order[0]];
    let (teacher, student) = (teacher.repeat(labels.len()), random(vocab, 46, 4.0).repeat(labels.len()));
    for weights in [HARD, BOTH] {
        let job = rows(vocab, &labels, teacher.clone(), k, student.clone()).with_weights(weights);
        let (found, truth) = (subject.step(&job)?, truth(&job));
        same(&found, &truth, vocab, Bounds::default())?;
        if weights == HARD {
            // q - 1 at the label is the only entry below zero.
            for (row, &label) in labels.iter().enumerate() {
                let gradient = &found.gradients[0][row * vocab..][..vocab];
                let below: Vec<usize> = (0..vocab).filter(|&v| gradient[v] < 0.0).collect();
                must(below == [label as usize], || format!("row {row} raises {below:?}"))?;
            }
        }
    }
    Ok(())
}
