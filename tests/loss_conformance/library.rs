//! Limbeck itself, as its drivers put it together: `top_k` of the teacher's rows, a cache on disk, a `DistillLoss` over
//! each micro-batch, one division per step.

use std::ops::Range;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Codec, Selection, SoftTargetSettings, TeacherIdentity,
        TokenizerIdentity, WriterPart,
    },
    loss::{DistillLoss, DistillLossConfig, LossOutput, Weighting},
    targets::{DistillBatch, SparseTargets, TargetKind, TargetSource},
};
use limbeck_kernels::top_k::top_k;

use crate::subject::{Implementation, Job, Outcome, RowLosses, Source, Student, push_nothing, push_row};

pub struct Limbeck {
    /// Whether what a teacher gave goes through files before a student sees it, as it does in a run.
    pub through_files: bool,
}

impl Implementation for Limbeck {
    fn step(&self, job: &Job) -> Result<Outcome, String> {
        let loss = loss(job, job.weights.soft)?;
        let batch = batch(job, self.through_files)?;
        let mut outcome = Outcome {
            targets: batch.targets.clone().unwrap_or(SparseTargets::empty(&[])),
            rows: vec![],
            token_count: 0,
            loss: 0.0,
            gradients: match &job.student {
                Student::Logits(_) => vec![vec![]],
                Student::Linear { lm_head, .. } => vec![vec![], vec![0.0; lm_head.len()]],
            },
        };
        for rows in job.micro_batches().into_iter().flatten() {
            let operands = operands(job, rows.clone());
            let output = forward(&loss, &operands, &part(&batch, rows))?;
            outcome.token_count += output.token_count;
            outcome.loss += output.value;
            let gradients = output.sum.backward();
            let gradient = |operand: &Tensor<2>| {
                let gradient = operand.grad(&gradients).expect("an operand has a gradient").into_data();
                gradient.try_into_vec::<f32>().expect("gradients are f32").into_iter().map(|value| value as f64)
            };
            outcome.gradients[0].extend(gradient(&operands[0]));
            for (sums, head) in outcome.gradients[1..].iter_mut().zip(&operands[1..]) {
                sums.iter_mut().zip(gradient(head)).for_each(|(sum, value)| *sum += value);
            }
        }
        let count = outcome.token_count.max(1) as f64;
        outcome.loss /= count;
        outcome.gradients.iter_mut().flatten().for_each(|value| *value /= count);
        if job.row_losses {
            outcome.rows = row_losses(job, &batch)?;
        }
        Ok(outcome)
    }
}

fn said(error: limbeck::Error) -> String {
    error.to_string()
}

fn loss(job: &Job, soft: f32) -> Result<DistillLoss, String> {
    assert!(job.weights.soft + job.weights.hard == 1.0, "a weighting has shares of one");
    let settings = job.settings;
    let mut config = DistillLossConfig::new(settings.divergence)
        .with_temperature(settings.temperature, settings.t_scale)
        .with_weighting(Weighting::Constant { soft: soft as f64 }, 1);
    if job.is_sampled() {
        config = config.with_sampled_targets();
    }
    config.init().map_err(said)
}

/// The student's logits of some rows, or their hidden states and the head.
fn operands(job: &Job, rows: Range<usize>) -> Vec<Tensor<2>> {
    let device = Device::flex().autodiff();
    let tensor = |values: &[f32], width: usize| {
        let data = TensorData::new(values.to_vec(), [values.len() / width, width]);
        Tensor::<2>::from_data(data, &device).require_grad()
    };
    match &job.student {
        Student::Logits(logits) => vec![tensor(&logits[rows.start * job.vocab..rows.end * job.vocab], job.vocab)],
        Student::Linear { hidden, lm_head, width, .. } => {
            vec![tensor(&hidden[rows.start * width..rows.end * width], *width), tensor(lm_head, *width)]
        }
    }
}

fn forward(loss: &DistillLoss, operands: &[Tensor<2>], batch: &DistillBatch) -> Result<LossOutput, String> {
    let output = match operands {
        [logits] => loss.forward_logits(0, logits.clone(), batch),
        [hidden, lm_head] => loss.forward(0, hidden.clone(), lm_head.clone(), batch),
        _ => unreachable!("logits, or hidden states and head"),
    };
    output.map_err(said)
}

/// The rows of a micro-batch.
fn part(batch: &DistillBatch, rows: Range<usize>) -> DistillBatch {
    let seq_len = batch.seq_len();
    DistillBatch {
        sequences: batch.sequences[rows.start / seq_len..rows.end / seq_len].to_vec(),
        targets: batch.targets.as_ref().map(|targets| targets.slice(rows.start, rows.end)),
        row_weights: batch.row_weights.as_ref().map(|weights| weights[rows].to_vec()),
    }
}

/// Each row alone: all others weigh nothing.
fn row_losses(job: &Job, batch: &DistillBatch) -> Result<Vec<Option<RowLosses>>, String> {
    let (loss, operands) = (loss(job, 0.5)?, operands(job, 0..job.row_count()));
    let of_row = |row: usize| {
        let mut weights = vec![0.0; job.row_count()];
        weights[row] = 1.0;
        let output = forward(&loss, &operands, &DistillBatch { row_weights: Some(weights), ..batch.clone() })?;
        let losses = output.soft.map(|soft| RowLosses { soft: soft.sum, hard: output.hard.sum });
        Ok(losses.filter(|_| output.token_count == 1))
    };
    (0..job.row_count()).map(of_row).collect()
}

/// What a student is given.
pub fn batch(job: &Job, through_files: bool) -> Result<DistillBatch, String> {
    let targets = match &job.source {
        Source::Missing => None,
        Source::Stored { targets, .. } => Some(targets.clone()),
        Source::Sampled { draws } => Some(sampled(job, draws)),
        Source::Teacher { logits, keep, temperatures } => {
            let targets = asked(job, logits, keep, temperatures);
            if through_files {
                return through_a_cache(job, targets, keep, temperatures);
            }
            Some(targets)
        }
    };
    Ok(DistillBatch { sequences: job.sequences.clone(), targets, row_weights: None })
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
    targets.kind = TargetKind::Sampled;
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
    let teacher = TeacherIdentity {
        name: "teacher".into(),
        fingerprint: "teacher".into(),
        dtype: "f32".into(),
        in_training: None,
    };
    let settings = CacheSettings {
        split: "train".into(),
        data_fingerprint: "made".into(),
        tokenizer: TokenizerIdentity { fingerprint: "made".into(), vocab_size: job.vocab },
        seq_len,
        sequences_per_shard: job.sequences.len(),
        codec: Codec::Raw,
        levels: None,
        log_normalizer: None,
        soft_targets: Some(SoftTargetSettings {
            teacher,
            selection: Selection::TopK { k: keep.iter().copied().max().unwrap_or(1) },
            temperatures: temperatures.to_vec(),
            router: None,
        }),
    };
    let mut writer = CacheWriter::create_or_resume(folder.path(), settings, WriterPart::WHOLE).map_err(said)?;
    for (number, sequence) in job.sequences.iter().enumerate() {
        let rows = targets.slice(number * seq_len, (number + 1) * seq_len);
        writer.push(sequence.clone(), Some(rows), 0).map_err(said)?;
    }
    writer.finish().map_err(said)?;
    let reader = CacheReader::open(folder.path()).map_err(said)?;
    let numbers: Vec<u64> = (0..job.sequences.len() as u64).collect();
    reader.read(&numbers).map_err(said)
}
