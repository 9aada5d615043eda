//! Limbeck itself, as its drivers put it together: `top_k` of the teacher's rows, a cache on disk, the fused loss per
//! micro-batch, one division per step.

use half::bf16;
use limbeck::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Codec, Selection, SoftTargetSettings, TeacherIdentity,
        TokenizerIdentity,
    },
    targets::{DistillBatch, SparseTargets, TargetSource},
};
use limbeck_kernels::{
    fused_linear_distill::{
        NO_LABEL, RowMeasures, RowTargets,
        host::{self, HostMatrix, Wanted},
    },
    top_k::top_k,
};

use crate::subject::{Implementation, Job, Outcome, RowLosses, Source, Student, push_nothing, push_row};

pub struct Limbeck {
    /// Whether what a teacher gave goes through files before a student sees it, as it does in a run.
    pub through_files: bool,
}

impl Implementation for Limbeck {
    fn step(&self, job: &Job) -> Result<Outcome, String> {
        let settings = job.settings;
        settings.divergence.check().map_err(|invalid| invalid.problem)?;
        if job.is_sampled() && !settings.divergence.is_linear_in_the_teacher() {
            return Err(format!("{} cannot be had from sampled targets", settings.divergence.name()));
        }
        let batch = self.batch(job)?;
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
                    let answer = host::finish_logits(&mut logits, job.vocab, &row_targets, &settings, &weigh);
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

impl Limbeck {
    /// What a student is given.
    fn batch(&self, job: &Job) -> Result<DistillBatch, String> {
        let sequences = job.sequences.clone();
        let targets = match &job.source {
            Source::Missing => None,
            Source::Stored { targets, .. } => Some(targets.clone()),
            Source::Sampled { draws } => Some(sampled(job, draws)),
            Source::Teacher { logits, keep, temperatures } => {
                let targets = asked(job, logits, keep, temperatures);
                if self.through_files {
                    return through_a_cache(job, targets, keep, temperatures);
                }
                Some(targets)
            }
        };
        Ok(DistillBatch { sequences, targets })
    }
}

fn asked(job: &Job, logits: &[f32], keep: &[usize], temperatures: &[f32]) -> SparseTargets {
    let mut targets = SparseTargets::empty(temperatures);
    for (row, logits) in logits.chunks(job.vocab).enumerate() {
        let (sequence, t) = job.place(row);
        if !sequence.is_valid(t) {
            push_nothing(&mut targets);
            continue;
        }
        let kept = top_k(logits, job.vocab, &[sequence.tokens[t + 1]], keep[row], temperatures).remove(0);
        let captures: Vec<_> =
            kept.summaries.into_iter().map(|s| (s.log_probs, s.log_tail, s.label_log_prob)).collect();
        push_row(&mut targets, &kept.ids, &captures);
    }
    targets
}

/// Equal draws are one id with their share of all draws.
fn sampled(job: &Job, draws: &[Vec<u32>]) -> SparseTargets {
    let mut targets = SparseTargets::empty(&[job.settings.temperature]);
    for draws in draws {
        let mut sorted = draws.clone();
        sorted.sort_unstable();
        let mut counts: Vec<(usize, u32)> = sorted.chunk_by(|a, b| a == b).map(|run| (run.len(), run[0])).collect();
        counts.sort_by(|a, b| b.cmp(a));
        let ids: Vec<u32> = counts.iter().map(|&(_, id)| id).collect();
        let log_weight = |&(count, _): &(usize, u32)| (count as f64 / draws.len() as f64).ln() as f32;
        let log_weights = counts.iter().map(log_weight).collect();
        push_row(&mut targets, &ids, &[(log_weights, f32::NEG_INFINITY, 0.0)]);
    }
    targets
}

fn through_a_cache(
    job: &Job,
    targets: SparseTargets,
    keep: &[usize],
    temperatures: &[f32],
) -> Result<DistillBatch, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let seq_len = job.seq_len();
    let teacher = TeacherIdentity { name: "teacher".into(), fingerprint: "teacher".into(), dtype: "f32".into() };
    let settings = CacheSettings {
        split: "train".into(),
        data_fingerprint: "made".into(),
        tokenizer: TokenizerIdentity { fingerprint: "made".into(), vocab_size: job.vocab },
        seq_len,
        sequences_per_shard: job.sequences.len(),
        codec: Codec::Raw,
        soft_targets: Some(SoftTargetSettings {
            teacher,
            selection: Selection::TopK { k: keep.iter().copied().max().unwrap_or(1) },
            temperatures: temperatures.to_vec(),
        }),
    };
    let said = |error: limbeck::Error| error.to_string();
    let mut writer = CacheWriter::create_or_resume(folder.path(), settings).map_err(said)?;
    for (number, sequence) in job.sequences.iter().enumerate() {
        let rows = targets.slice(number * seq_len, (number + 1) * seq_len);
        writer.push(sequence.clone(), Some(rows), 0).map_err(said)?;
    }
    writer.finish().map_err(said)?;
    let reader = CacheReader::open(folder.path()).map_err(said)?;
    let numbers: Vec<u64> = (0..job.sequences.len() as u64).collect();
    reader.read(&numbers).map_err(said)
}
