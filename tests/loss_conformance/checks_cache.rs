//! What is kept of a teacher.

use std::sync::OnceLock;

use limbeck::targets::SparseTargets;
use limbeck_kernels::{
    divergence::Divergence,
    oracle::{KeptRow, forward_kl, hard_cross_entropy},
};

use crate::{
    material::{SOFT, TAILS, documents, ordinary, random, rows, with_tails},
    subject::{Implementation, Job, Outcome, RowLosses, Source},
    truth::{Bounds, Finding, must, near, same, truth},
};

/// Compares what the cache holds with the oracle's rows.
fn holds(subject: &dyn Implementation, job: &Job) -> Finding {
    same_targets(&subject.step(job)?.targets, &truth(job).targets)
}

fn same_targets(found: &SparseTargets, truth: &SparseTargets) -> Finding {
    must(found.offsets == truth.offsets, || format!("rows end at {:?}, not {:?}", found.offsets, truth.offsets))?;
    must(found.ids == truth.ids, || format!("ids {:?} instead of {:?}", found.ids, truth.ids))?;
    must(found.captures.len() == truth.captures.len(), || format!("{} captures", found.captures.len()))?;
    for (found, truth) in found.captures.iter().zip(&truth.captures) {
        near("a temperature", found.temperature as f64, truth.temperature as f64, 0.0)?;
        let columns = [
            ("log-probability", &found.log_probs, &truth.log_probs, 2e-6),
            ("tail", &found.log_tail, &truth.log_tail, 1e-5),
            ("label", &found.label_log_prob, &truth.label_log_prob, 2e-6),
        ];
        for (name, found, truth, bound) in columns {
            must(found.len() == truth.len(), || format!("{} of {name}", found.len()))?;
            for (place, (&found, &truth)) in found.iter().zip(truth).enumerate() {
                let bound = bound * (truth.abs() as f64).max(1.0);
                near(&format!("{name} {place} at {}", truth), found as f64, truth as f64, bound)?;
            }
        }
    }
    Ok(())
}

pub fn the_cache_holds_probabilities_of_the_full_row(subject: &dyn Implementation) -> Finding {
    holds(subject, &ordinary(6, 61, 8, 1))?;
    holds(subject, &documents(199, 7, 2))
}

pub fn tails_from_a_billionth_keep_their_digits(subject: &dyn Implementation) -> Finding {
    let (vocab, k) = (200, 16);
    let labels: Vec<u32> = (0..TAILS.len() as u32).map(|row| row * 20).collect();
    let job = rows(vocab, &labels, with_tails(vocab, k, &TAILS, 3), k, random(labels.len() * vocab, 4, 1.0));
    holds(subject, &job)?;
    // A cache of fewer ids has a tail of another size.
    holds(subject, &rows(vocab, &labels, with_tails(vocab, k, &TAILS, 5), 3, random(labels.len() * vocab, 6, 1.0)))
}

pub fn equal_logits_lose_no_mass(subject: &dyn Implementation) -> Finding {
    let mut teacher = vec![0.5; 2 * 40];
    // A few ids above the crowd, and the last kept one in it.
    teacher[40..43].copy_from_slice(&[3.0, 2.0, 4.0]);
    holds(subject, &rows(40, &[39, 2], teacher, 5, random(80, 7, 1.0)))
}

pub fn ids_above_seventeen_bits_survive(subject: &dyn Implementation) -> Finding {
    static WIDE: OnceLock<(Job, Outcome)> = OnceLock::new();
    let (job, truth) = WIDE.get_or_init(|| {
        let vocab = 202_048;
        let mut teacher = random(vocab, 8, 2.0);
        // 131,077 is 5 in 17 bits.
        for (place, id) in [131_077, 5, 202_047, 131_072, 131_071, 150_000].into_iter().enumerate() {
            teacher[id] = 18.0 - place as f32;
        }
        let job = rows(vocab, &[202_047], teacher, 6, random(vocab, 9, 2.0)).with_weights(SOFT);
        let truth = truth_of_wide(&job);
        (job, truth)
    });
    let found = subject.step(job)?;
    same_targets(&found.targets, &truth.targets)?;
    same(&found, truth, job.vocab, Bounds::default())
}

/// [`truth`] for a vocabulary where the oracle's derivative by one logit after the other would take a minute.
fn truth_of_wide(job: &Job) -> Outcome {
    let mut narrow = job.clone();
    narrow.student_logits().truncate(0);
    let mut outcome = truth(&narrow);
    let (targets, z) = (&outcome.targets, job.student.logits());
    let kept = KeptRow {
        ids: targets.ids.clone(),
        log_probs: targets.captures[0].log_probs.iter().map(|&value| value as f64).collect(),
        log_tail: targets.captures[0].log_tail[0] as f64,
        label_log_prob: 0.0,
    };
    let (soft, hard) = (forward_kl(&z, &kept, 1.0), hard_cross_entropy(&z, job.sequences[0].tokens[1]));
    outcome.rows = vec![Some(RowLosses { soft: soft.value, hard: hard.value })];
    (outcome.token_count, outcome.loss, outcome.gradients) = (1, soft.value, vec![soft.logits_grad]);
    outcome
}

pub fn short_rows_stay_short(subject: &dyn Implementation) -> Finding {
    let mut job = ordinary(5, 61, 8, 10);
    let Source::Teacher { keep, .. } = &mut job.source else { unreachable!("made of a teacher") };
    *keep = vec![8, 1, 3, 7, 2];
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
        let job = job.clone().with_divergence(divergence);
        holds(subject, &job)?;
        same(&subject.step(&job)?, &truth(&job), 61, Bounds::default())?;
    }
    Ok(())
}

pub fn each_temperature_is_captured_from_the_full_row(subject: &dyn Implementation) -> Finding {
    for temperature in [0.5, 2.0, 7.0] {
        for divergence in [Divergence::ForwardKl, Divergence::Jsd { beta: 0.3 }] {
            let job = ordinary(4, 61, 8, 11).at_temperature(temperature, true).with_divergence(divergence);
            holds(subject, &job)?;
            same(&subject.step(&job)?, &truth(&job), 61, Bounds::default())?;
        }
    }
    Ok(())
}
