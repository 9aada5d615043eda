//! The fused operation by itself, without tensors and in the types it takes: rows of targets in, gradients out.

use half::bf16;
use limbeck_kernels::fused_linear_distill::{
    NO_LABEL, RowMeasures, RowTargets,
    host::{self, HostMatrix, Wanted},
    logits,
};

use crate::{
    library::batch,
    subject::{Implementation, Job, Outcome, RowLosses, Student},
};

pub struct Fused;

impl Implementation for Fused {
    fn step(&self, job: &Job) -> Result<Outcome, String> {
        let settings = job.settings;
        settings.divergence.check().map_err(|invalid| invalid.problem)?;
        if job.is_sampled() && !settings.divergence.is_linear_in_the_teacher() {
            return Err(format!("{} cannot be had from sampled targets", settings.divergence.name()));
        }
        let batch = batch(job, false)?;
        let targets = batch.targets.as_ref().ok_or("there are no soft targets")?;
        let capture = targets.capture(settings.temperature).ok_or("no capture at the loss's temperature")?;
        let mut outcome = Outcome {
            targets: targets.clone(),
            rows: vec![],
            token_count: 0,
            loss: 0.0,
            gradients: match &job.student {
                Student::Logits(_) => vec![vec![]],
                Student::Linear { lm_head, .. } => vec![vec![], vec![0.0; lm_head.len()]],
            },
        };
        for rows in job.micro_batches().into_iter().flatten() {
            let mut row_targets = RowTargets { offsets: vec![0], ..RowTargets::default() };
            for row in rows.clone() {
                let (sequence, t) = (&batch.sequences[row / batch.seq_len()], row % batch.seq_len());
                let valid = sequence.is_valid(t);
                let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
                if valid && kept.is_empty() && job.weights.soft > 0.0 {
                    return Err(format!("row {row} counts but has no soft target"));
                }
                row_targets.labels.push(if valid { sequence.tokens[t + 1] } else { NO_LABEL });
                row_targets.ids.extend(&targets.ids[kept.clone()]);
                row_targets.log_probs.extend(&capture.log_probs[kept]);
                row_targets.log_tail.push(capture.log_tail[row]);
                row_targets.offsets.push(row_targets.ids.len());
                outcome.token_count += valid as u64;
            }
            row_targets.check(job.vocab)?;
            let weigh = |_: usize, _: &RowMeasures| job.weights;
            let (loss, found) = match &job.student {
                Student::Logits(logits) => {
                    let mut logits = logits[rows.start * job.vocab..rows.end * job.vocab].to_vec();
                    let answer = logits::finish_logits(&mut logits, job.vocab, &row_targets, &settings, &weigh);
                    outcome.gradients[0].extend(logits.iter().map(|&value| value as f64));
                    answer
                }
                Student::Linear { hidden, lm_head, width, bf16: narrow } => {
                    let hidden = &hidden[rows.start * width..rows.end * width];
                    let run = |h, w| host::run(h, w, *width, &row_targets, &settings, &weigh, Wanted::BOTH);
                    let output = if *narrow {
                        let halves = |values: &[f32]| values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>();
                        run(HostMatrix::Bf16(&halves(hidden)), HostMatrix::Bf16(&halves(lm_head)))
                    } else {
                        run(HostMatrix::F32(hidden), HostMatrix::F32(lm_head))
                    };
                    let widened = |values: Option<Vec<f32>>| values.into_iter().flatten().map(|value| value as f64);
                    outcome.gradients[0].extend(widened(output.hidden_grad));
                    for (sum, value) in outcome.gradients[1].iter_mut().zip(widened(output.lm_head_grad)) {
                        *sum += value;
                    }
                    (output.loss, output.rows)
                }
            };
            outcome.loss += loss;
            let measured = |(measures, _): (RowMeasures, _)| RowLosses { soft: measures.soft, hard: measures.hard };
            outcome.rows.extend(found.into_iter().map(|row| row.map(measured)));
        }
        let count = outcome.token_count.max(1) as f64;
        outcome.loss /= count;
        outcome.gradients.iter_mut().flatten().for_each(|value| *value /= count);
        Ok(outcome)
    }
}
