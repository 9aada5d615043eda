//! The plain pipeline's cache: what it keeps of each row of a teacher.

use half::{bf16, f16};
use limbeck::targets::{SparseTargets, TargetKind};

use crate::{
    mistakes::Mistake,
    plain::Plain,
    plain_row::log_sum_exp,
    subject::{Job, Source, push_nothing, push_row},
};

/// Floor of a tail that was had by subtraction.
const FLOOR: f64 = 1e-10;

/// Ids of a row, and log-probabilities, tail and label of each temperature.
type KeptRow = (Vec<u32>, Vec<(Vec<f32>, f32, f32)>);

pub fn targets(plain: &Plain, job: &Job) -> Result<SparseTargets, String> {
    match &job.source {
        Source::Missing if plain.makes(Mistake::FallbackToLabels) => {
            let mut targets = SparseTargets::empty(&[job.settings.temperature]);
            (0..job.row_count()).for_each(|_| push_nothing(&mut targets));
            Ok(targets)
        }
        Source::Missing => Err("there are no soft targets".into()),
        Source::Stored { targets, .. } => Ok(targets.clone()),
        Source::Sampled { draws } => Ok(sampled(plain, job, draws)),
        Source::Teacher { logits, keep, temperatures } => Ok(asked(plain, job, logits, keep, temperatures)),
    }
}

fn asked(plain: &Plain, job: &Job, logits: &[f32], keep: &[usize], temperatures: &[f32]) -> SparseTargets {
    let mut targets = SparseTargets::empty(temperatures);
    let widest = keep.iter().copied().max().unwrap_or(0);
    let mut buffer: Vec<u32> = (0..widest as u32).collect();
    for (row, &k) in keep.iter().enumerate() {
        let Some(label) = plain.label(job, row) else {
            push_nothing(&mut targets);
            continue;
        };
        let from = if plain.makes(Mistake::TeacherShiftedByOne) { row.saturating_sub(1) } else { row };
        let z: Vec<f64> = logits[from * job.vocab..][..job.vocab].iter().map(|&z| z as f64).collect();
        let (mut ids, mut captures) = kept_row(plain, &z, k, label, temperatures);
        if plain.makes(Mistake::SentinelAsId) {
            fill_up(&mut ids, &mut captures, &vec![u32::MAX; widest]);
        }
        if plain.makes(Mistake::StaleIds) {
            fill_up(&mut ids, &mut captures, &buffer);
            buffer.copy_from_slice(&ids);
        }
        let packed: Vec<u32> = ids.iter().map(|&id| packed(plain, id)).collect();
        push_row(&mut targets, &packed, &captures);
    }
    targets
}

/// An id after it was packed in a fixed number of bits: 20, enough for every vocabulary there is.
fn packed(plain: &Plain, id: u32) -> u32 {
    let bits = if plain.makes(Mistake::IdsIn17Bits) { 17 } else { 20 };
    id & ((1 << bits) - 1)
}

/// Makes a row as long as the longest, with impossible ids.
fn fill_up(ids: &mut Vec<u32>, captures: &mut [(Vec<f32>, f32, f32)], with: &[u32]) {
    ids.extend_from_slice(&with[ids.len()..]);
    for (log_probs, _, _) in captures {
        log_probs.resize(ids.len(), f32::NEG_INFINITY);
    }
}

fn kept_row(plain: &Plain, z: &[f64], k: usize, label: u32, temperatures: &[f32]) -> KeptRow {
    let mut order: Vec<u32> = (0..z.len() as u32).collect();
    order.sort_by(|&a, &b| z[b as usize].total_cmp(&z[a as usize]).then(a.cmp(&b)));
    let ids = order[..k].to_vec();
    let captures = temperatures
        .iter()
        .map(|&temperature| {
            let (log_probs, log_tail, label) = capture(plain, z, &order, k, label, temperature as f64);
            (log_probs.into_iter().map(|log_prob| log_prob as f32).collect(), log_tail as f32, label as f32)
        })
        .collect();
    (ids, captures)
}

fn capture(plain: &Plain, z: &[f64], order: &[u32], k: usize, label: u32, temperature: f64) -> (Vec<f64>, f64, f64) {
    let of = |log_p: &[f64], ids: &[u32]| ids.iter().map(|&id| log_p[id as usize]).collect::<Vec<f64>>();
    let log_p = log_softmax(plain, z, temperature);
    let (kept, rest) = (of(&log_p, &order[..k]), of(&log_p, &order[k..]));
    let (log_tail, label_log_prob) = (log_sum_exp(&rest), log_p[label as usize]);
    let subtracted = |log_probs: &[f64]| (1.0 - log_probs.iter().map(|lp| lp.exp()).sum::<f64>()).max(FLOOR).ln();
    match plain.mistake {
        Some(Mistake::TopKBeforeSoftmax) => {
            let scaled: Vec<f64> = of(z, &order[..k]).iter().map(|z| z / temperature).collect();
            let sum = log_sum_exp(&scaled);
            let label = z[label as usize] / temperature - sum;
            (scaled.iter().map(|z| z - sum).collect(), f64::NEG_INFINITY, label)
        }
        Some(Mistake::RawLogitsWithoutNormaliser) => {
            (of(z, &order[..k]).iter().map(|z| z / temperature).collect(), f64::NEG_INFINITY, label_log_prob)
        }
        Some(Mistake::NormaliserBeforeRounding) => {
            let scaled: Vec<f64> = z.iter().map(|z| z / temperature).collect();
            let sum = log_sum_exp(&scaled);
            let rounded: Vec<f64> =
                of(&scaled, &order[..k]).iter().map(|&z| bf16::from_f64(z).to_f64() - sum).collect();
            let log_tail = subtracted(&rounded);
            (rounded, log_tail, label_log_prob)
        }
        Some(Mistake::TailFromF16) => {
            let rounded: Vec<f64> = kept.iter().map(|&log_prob| f16::from_f64(log_prob).to_f64()).collect();
            (kept, subtracted(&rounded), label_log_prob)
        }
        Some(Mistake::TailFromBf16) => {
            let rounded: Vec<f64> = kept.iter().map(|&log_prob| bf16::from_f64(log_prob).to_f64()).collect();
            (kept, subtracted(&rounded), label_log_prob)
        }
        Some(Mistake::TiesLoseMass) => {
            let below: Vec<f64> = rest.into_iter().filter(|log_prob| *log_prob < kept[k - 1]).collect();
            (kept, log_sum_exp(&below), label_log_prob)
        }
        Some(Mistake::TemperatureOnTruncatedRow) => {
            let at_one = log_softmax(plain, z, 1.0);
            let mut outcomes = of(&at_one, &order[..k]);
            outcomes.push(log_sum_exp(&of(&at_one, &order[k..])));
            outcomes.iter_mut().for_each(|log_prob| *log_prob /= temperature);
            let sum = log_sum_exp(&outcomes);
            outcomes.iter_mut().for_each(|log_prob| *log_prob -= sum);
            let log_tail = outcomes.pop().expect("the tail is an outcome");
            (outcomes, log_tail, label_log_prob)
        }
        _ => (kept, log_tail, label_log_prob),
    }
}

fn log_softmax(plain: &Plain, z: &[f64], temperature: f64) -> Vec<f64> {
    let scaled: Vec<f64> = z.iter().map(|z| z / temperature).collect();
    let sum = log_sum_exp(&scaled);
    if plain.makes(Mistake::Bf16TeacherSoftmax) {
        let round = |value: f64| bf16::from_f64(value).to_f64();
        return scaled.into_iter().map(|z| round(round(z) - round(sum))).collect();
    }
    scaled.into_iter().map(|z| z - sum).collect()
}

/// Ids drawn from the teacher: equal draws are one outcome with their share of all draws. There is no tail.
fn sampled(plain: &Plain, job: &Job, draws: &[Vec<u32>]) -> SparseTargets {
    let mut targets = SparseTargets::empty(&[job.settings.temperature]);
    targets.kind = TargetKind::Sampled;
    for draws in draws {
        if plain.makes(Mistake::DuplicatesCountedTwice) {
            let share = -(draws.len() as f32).ln();
            push_row(&mut targets, draws, &[(vec![share; draws.len()], f32::NEG_INFINITY, 0.0)]);
            continue;
        }
        let mut weights: Vec<(f64, u32)> = vec![];
        for &id in draws {
            match weights.iter_mut().find(|(_, known)| *known == id) {
                Some((weight, _)) => *weight += 1.0,
                None => weights.push((1.0, id)),
            }
        }
        if plain.makes(Mistake::DrawsAsSet) {
            weights.iter_mut().for_each(|(weight, _)| *weight = 1.0);
        }
        weights.sort_by(|a, b| b.0.total_cmp(&a.0));
        let all: f64 = weights.iter().map(|(weight, _)| weight).sum();
        let ids: Vec<u32> = weights.iter().map(|&(_, id)| id).collect();
        let log_weights = weights.iter().map(|(weight, _)| (weight / all).ln() as f32).collect();
        push_row(&mut targets, &ids, &[(log_weights, f32::NEG_INFINITY, 0.0)]);
    }
    targets
}
