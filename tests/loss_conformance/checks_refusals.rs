//! What has no right answer is refused, not answered.

use limbeck::targets::SparseTargets;
use limbeck_kernels::divergence::Divergence;

use crate::{
    material::{BOTH, SOFT, ordinary},
    subject::{Implementation, Job, Source, push_nothing, push_row},
    truth::{Finding, must},
};

fn refused(subject: &dyn Implementation, job: &Job, what: &str) -> Finding {
    let answer = subject.step(job);
    must(answer.is_err(), || format!("{what} is answered with a loss of {:?}", answer.map(|outcome| outcome.loss)))
}

/// A row of three ids at temperature 1, and a second made of `ids`.
fn stored(ids: &[u32]) -> Source {
    let mut targets = SparseTargets::empty(&[1.0]);
    push_row(&mut targets, &[3, 1, 4], &[(vec![-0.7, -1.6, -2.5], -1.5, -1.6)]);
    if ids.is_empty() {
        push_nothing(&mut targets);
    } else {
        push_row(&mut targets, ids, &[(vec![-1.7; ids.len()], -0.6, -1.6)]);
    }
    Source::Stored { targets, sampled: false }
}

fn job() -> Job {
    ordinary(2, 12, 3, 71).with_weights(BOTH)
}

pub fn missing_targets_are_refused(subject: &dyn Implementation) -> Finding {
    subject.step(&job().with_source(stored(&[3, 1])))?;
    refused(subject, &job().with_source(Source::Missing), "a batch without targets")?;
    refused(subject, &job().with_source(stored(&[])), "a row that counts and has no targets")
}

pub fn targets_of_another_temperature_are_refused(subject: &dyn Implementation) -> Finding {
    let mut job = job().with_source(stored(&[3, 1]));
    job.settings.temperature = 2.0;
    refused(subject, &job, "a capture at temperature 1 for a loss at 2")
}

pub fn sampled_targets_serve_linear_divergences_alone(subject: &dyn Implementation) -> Finding {
    let sampled = job().with_weights(SOFT).with_source(Source::Sampled { draws: vec![vec![3, 3, 5], vec![1, 2, 4]] });
    for divergence in Divergence::EXAMPLES {
        let job = sampled.clone().with_divergence(divergence);
        if matches!(divergence, Divergence::ForwardKl | Divergence::SoftCrossEntropy) {
            subject.step(&job)?;
        } else {
            refused(subject, &job, &format!("{} of sampled targets", divergence.name()))?;
        }
    }
    Ok(())
}

pub fn an_id_twice_in_a_row_is_refused(subject: &dyn Implementation) -> Finding {
    refused(subject, &job().with_source(stored(&[5, 2, 5])), "an id that comes twice")
}

pub fn parameters_without_meaning_are_refused(subject: &dyn Implementation) -> Finding {
    for divergence in [
        Divergence::Jsd { beta: 0.0 },
        Divergence::Jsd { beta: 1.0 },
        Divergence::Renyi { alpha: 1.0 },
        Divergence::Alpha { alpha: 0.0 },
        Divergence::Alpha { alpha: 1.0 },
        Divergence::SkewKl { alpha: 1.0 },
        Divergence::SkewReverseKl { alpha: -0.1 },
    ] {
        refused(subject, &job().with_divergence(divergence), &format!("{divergence:?}"))?;
    }
    Ok(())
}
