//! Targets that were drawn from the teacher instead of cut from its top.

use limbeck_kernels::oracle::{self, KeptRow};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    material::{SOFT, ordinary, prediction, random},
    subject::{Implementation, Job, Source, Student},
    truth::{Finding, must, near},
};

const VOCAB: usize = 12;
/// Draws per row.
const DRAWS: usize = 4;

pub fn draws_become_shares_that_sum_to_one(subject: &dyn Implementation) -> Finding {
    let mut job = ordinary(2, VOCAB, 3, 61).with_weights(SOFT);
    job.source = Source::Sampled { draws: vec![vec![3, 3, 5, 1], vec![7, 7, 7, 7]] };
    let found = subject.step(&job)?;
    let (targets, logits) = (&found.targets, job.student.logits());
    for (row, (ids, shares)) in
        [(vec![3u32, 5, 1], vec![0.5f64, 0.25, 0.25]), (vec![7], vec![1.0])].into_iter().enumerate()
    {
        let places = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let kept = &targets.ids[places.clone()];
        must(kept.len() == ids.len(), || format!("row {row} keeps {kept:?}"))?;
        for (id, share) in ids.iter().zip(&shares) {
            let at = kept.iter().position(|kept| kept == id).ok_or(format!("row {row} keeps {kept:?}"))?;
            let weight = (targets.captures[0].log_probs[places.start + at] as f64).exp();
            near(&format!("row {row}'s weight of {id}"), weight, *share, 1e-6)?;
        }
        must(targets.captures[0].log_tail[row] == f32::NEG_INFINITY, || format!("row {row} has a tail"))?;
        let teacher = KeptRow {
            ids,
            log_probs: shares.iter().map(|share| share.ln()).collect(),
            log_tail: f64::NEG_INFINITY,
            label_log_prob: 0.0,
        };
        let truth = oracle::forward_kl(&logits[row * VOCAB..][..VOCAB], &teacher, 1.0);
        let losses = found.rows[row].ok_or(format!("row {row} does not count"))?;
        near(&format!("row {row}'s soft loss"), losses.soft, truth.value, 1e-6 * truth.value)?;
        for (v, slope) in truth.logits_grad.iter().enumerate() {
            near(&format!("row {row}'s gradient {v}"), found.gradients[0][row * VOCAB + v], slope / 2.0, 1e-6)?;
        }
    }
    Ok(())
}

pub fn sampled_targets_are_unbiased(subject: &dyn Implementation) -> Finding {
    unbiased(subject, 20_000)
}

/// The mean gradient over `draw_count` draws is within three standard errors of the gradient under the whole teacher.
pub fn unbiased(subject: &dyn Implementation, draw_count: usize) -> Finding {
    let row_count = draw_count / DRAWS;
    let (teacher, student) = (random(VOCAB, 62, 2.5), random(VOCAB, 63, 2.5));
    let (teacher, z): (Vec<f64>, Vec<f64>) =
        (teacher.iter().map(|&z| z as f64).collect(), student.iter().map(|&z| z as f64).collect());
    let log_p = oracle::log_softmax(&teacher, 1.0);
    let mut generator = ChaCha8Rng::seed_from_u64(64);
    let mut draw = || {
        let mut left = generator.random_range(0.0..1.0f64);
        let found = log_p.iter().position(|lp| {
            left -= lp.exp();
            left < 0.0
        });
        found.unwrap_or(VOCAB - 1) as u32
    };
    let draws: Vec<Vec<u32>> = (0..row_count).map(|_| (0..DRAWS).map(|_| draw()).collect()).collect();
    let job = Job {
        sequences: vec![prediction(0); row_count],
        source: Source::Sampled { draws },
        student: Student::Logits(student.repeat(row_count)),
        ranks: vec![vec![row_count]],
        row_losses: false,
        ..ordinary(1, VOCAB, 3, 61).with_weights(SOFT)
    };
    let found = subject.step(&job)?;
    let count = row_count as f64;
    let everything = KeptRow {
        ids: (0..VOCAB as u32).collect(),
        log_probs: log_p,
        log_tail: f64::NEG_INFINITY,
        label_log_prob: 0.0,
    };
    let truth = oracle::forward_kl(&z, &everything, 1.0).logits_grad;
    let (mut distance, mut variance) = (0.0, 0.0);
    for (v, truth) in truth.iter().enumerate() {
        // The step's mean is over the rows; one row's own gradient is `count` times its share.
        let column = || found.gradients[0][v..].iter().step_by(VOCAB).map(|value| value * count);
        let mean = column().sum::<f64>() / count;
        distance += (mean - truth).powi(2);
        variance += column().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0) / count;
    }
    let (distance, error) = (distance.sqrt(), variance.sqrt());
    must(distance <= 3.0 * error, || format!("off by {distance:e}, with a standard error of {error:e}"))?;
    must(error > 0.0 && error < 0.1, || format!("a standard error of {error:e} shows nothing"))
}
