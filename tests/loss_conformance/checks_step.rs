//! Which rows count, what they predict, and how they become one step.

use half::bf16;
use limbeck_kernels::divergence::Divergence;

use crate::{
    material::{BOTH, HARD, documents, ordinary, predictions_of_documents, random},
    subject::{Implementation, Student},
    truth::{Bounds, Finding, largest, must, near, same, same_values, truth},
};

/// Against labels that are written down in the material, not computed.
pub fn a_row_predicts_the_next_token(subject: &dyn Implementation) -> Finding {
    let vocab = 199;
    let job = documents(vocab, 7, 51).with_weights(HARD);
    let (found, logits) = (subject.step(&job)?, job.student.logits());
    for (row, label) in predictions_of_documents(vocab) {
        let z = &logits[row * vocab..][..vocab];
        let hard = z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[label as usize];
        let losses = found.rows[row].ok_or(format!("row {row} does not count"))?;
        near(&format!("row {row}'s hard loss"), losses.hard, hard, 1e-6 * hard)?;
        let gradient = &found.gradients[0][row * vocab..][..vocab];
        must(gradient[label as usize] < 0.0, || format!("row {row} does not raise its label {label}"))?;
    }
    Ok(())
}

pub fn documents_and_padding_teach_nothing(subject: &dyn Implementation) -> Finding {
    let vocab = 199;
    let job = documents(vocab, 7, 52).with_weights(BOTH);
    let found = subject.step(&job)?;
    let counting: Vec<usize> = predictions_of_documents(vocab).into_iter().map(|(row, _)| row).collect();
    near("the count", found.token_count as f64, counting.len() as f64, 0.0)?;
    for row in 0..job.row_count() {
        let counts = counting.contains(&row);
        must(found.rows[row].is_some() == counts, || format!("row {row} counts: {}", !counts))?;
        let kept = found.targets.offsets[row + 1] - found.targets.offsets[row];
        must((kept > 0) == counts, || format!("row {row} keeps {kept} ids"))?;
        let pull = largest(&found.gradients[0][row * vocab..][..vocab]);
        must((pull > 0.0) == counts, || format!("row {row} pulls with {pull}"))?;
    }
    same(&found, &truth(&job), vocab, Bounds::default())
}

/// Three sequences of 5, 4 and 2 rows that count, however they are dealt to micro-batches and ranks.
pub fn any_partition_gives_the_same_step(subject: &dyn Implementation) -> Finding {
    let vocab = 61;
    let job = documents(vocab, 7, 53);
    let truth = truth(&job);
    for ranks in [
        vec![vec![3]],
        vec![vec![1, 2]],
        vec![vec![2, 1]],
        vec![vec![1, 1, 1]],
        vec![vec![1], vec![2]],
        vec![vec![1, 1], vec![1]],
    ] {
        let mut job = job.clone();
        job.ranks = ranks.clone();
        let found = subject.step(&job).and_then(|found| {
            same_values(&found, &truth, Bounds::default())?;
            let bound = 1e-6 * largest(&truth.gradients[0]);
            let pairs = found.gradients[0].iter().zip(&truth.gradients[0]);
            pairs.enumerate().try_for_each(|(place, (f, t))| near(&format!("gradient {place}"), *f, *t, bound))
        });
        found.map_err(|how| format!("{ranks:?}: {how}"))?;
    }
    Ok(())
}

pub fn hidden_states_and_head_get_the_oracles_gradients(subject: &dyn Implementation) -> Finding {
    let (row_count, vocab, width) = (24, 61, 16);
    let narrow = |values: Vec<f32>| values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
        for bf16 in [false, true] {
            let (mut hidden, mut lm_head) = (random(row_count * width, 54, 1.5), random(vocab * width, 55, 1.0));
            if bf16 {
                (hidden, lm_head) = (narrow(hidden), narrow(lm_head));
            }
            let mut job = ordinary(row_count, vocab, 8, 56).with_divergence(divergence);
            job.student = Student::Linear { hidden, lm_head, width, bf16 };
            job.ranks = vec![vec![10, 14]];
            // Logits are products of f32 here, each off by some 1e-7 of the terms that make it up.
            let bounds = Bounds { absolute: 2e-6, ..Bounds::default() };
            let (found, truth) = (subject.step(&job)?, truth(&job));
            same_values(&found, &truth, bounds)?;
            for (number, (found, truth)) in found.gradients.iter().zip(&truth.gradients).enumerate() {
                for (place, (f, t)) in found.iter().zip(truth).enumerate() {
                    near(&format!("gradient {number} at {place}"), *f, *t, 1e-5 * largest(truth))?;
                }
            }
        }
    }
    Ok(())
}
