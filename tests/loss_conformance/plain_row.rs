//! One row of the plain pipeline: both losses and the gradient in the row's logits, in f64.

use half::bf16;
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{LossSettings, RowWeights},
};

use crate::{mistakes::Mistake, plain::Plain, plain_divergence, subject::RowLosses};

/// Width that a padded vocabulary is a multiple of.
const PADDED_TO: usize = 64;

/// What the cache holds of the row at the loss's temperature.
#[derive(Debug, Clone, Copy)]
pub struct Kept<'a> {
    pub ids: &'a [u32],
    pub log_probs: &'a [f32],
    pub log_tail: f32,
}

/// `ln sum exp`.
pub fn log_sum_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.iter().map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// Losses of a row, its part of the objective, and that part's gradient in the logits.
pub fn row_loss(
    plain: &Plain,
    z: &[f64],
    kept: Kept<'_>,
    label: u32,
    settings: &LossSettings,
    weights: RowWeights,
) -> (RowLosses, f64, Vec<f64>) {
    let temperature = settings.temperature as f64;
    let (soft, soft_gradient) =
        if kept.ids.is_empty() { (0.0, vec![0.0; z.len()]) } else { soft(plain, z, kept, settings) };
    let (hard, hard_gradient) = hard(plain, z, kept, label, temperature);

    let (mut soft_weight, mut hard_weight) = (weights.soft as f64, weights.hard as f64);
    match plain.mistake {
        Some(Mistake::SoftWeightTwice) => soft_weight *= soft_weight,
        Some(Mistake::HalfAndHalf) => (soft_weight, hard_weight) = (0.5, 0.5),
        Some(Mistake::FallbackToLabels) if kept.ids.is_empty() => (soft_weight, hard_weight) = (0.0, 1.0),
        _ => {}
    }
    let asked = if settings.t_scale { temperature * temperature } else { 1.0 };
    let factor = if plain.makes(Mistake::SquareMissing) { 1.0 } else { asked };
    let gradient_factor = if plain.makes(Mistake::SquareOnValueOnly) { 1.0 } else { factor };
    if plain.makes(Mistake::SquareOnBoth) {
        hard_weight *= asked;
    }
    let objective = soft_weight * factor * soft + hard_weight * hard;
    let gradient = soft_gradient
        .iter()
        .zip(&hard_gradient)
        .map(|(soft, hard)| soft_weight * gradient_factor * soft + hard_weight * hard)
        .collect();
    (RowLosses { soft, hard }, objective, gradient)
}

/// The student's log-probabilities; longer than the logits where a mistake pads them.
fn log_softmax(plain: &Plain, z: &[f64], temperature: f64) -> Vec<f64> {
    let mut scaled: Vec<f64> = z.iter().map(|z| z / temperature).collect();
    let round = |value: f64| bf16::from_f64(value).to_f64();
    match plain.mistake {
        Some(Mistake::VocabularyPadded) => scaled.resize(z.len().next_multiple_of(PADDED_TO), 0.0),
        Some(Mistake::Bf16StudentSoftmax) => {
            let sum = round(log_sum_exp(&scaled));
            return scaled.into_iter().map(|z| round(round(z) - sum)).collect();
        }
        Some(Mistake::Bf16Accumulator) => {
            let largest = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum = scaled.iter().fold(0.0, |sum, z| round(sum + (z - largest).exp()));
            return scaled.into_iter().map(|z| z - largest - sum.ln()).collect();
        }
        _ => {}
    }
    let sum = log_sum_exp(&scaled);
    scaled.into_iter().map(|z| z - sum).collect()
}

/// The divergence over the kept ids and one outcome for everything else, and its gradient in the logits.
fn soft(plain: &Plain, z: &[f64], kept: Kept<'_>, settings: &LossSettings) -> (f64, Vec<f64>) {
    let temperature = settings.temperature as f64;
    let log_q = log_softmax(plain, z, temperature);
    let ids: Vec<usize> = kept.ids.iter().map(|&id| id as usize % z.len()).collect();
    let mut is_kept = vec![false; log_q.len()];
    ids.iter().for_each(|&id| is_kept[id] = true);
    let rest: Vec<f64> = log_q.iter().zip(&is_kept).filter(|(_, kept)| !**kept).map(|(&log_q, _)| log_q).collect();

    let mut teacher: Vec<f64> = kept.log_probs.iter().map(|&log_prob| log_prob as f64).collect();
    let mut student: Vec<f64> = ids.iter().map(|&id| log_q[id]).collect();
    let mut log_tail = kept.log_tail as f64;
    if plain.makes(Mistake::TeacherRenormalised) || plain.makes(Mistake::RawLogitsWithoutNormaliser) {
        let sum = log_sum_exp(&teacher);
        teacher.iter_mut().for_each(|log_prob| *log_prob -= sum);
        log_tail = f64::NEG_INFINITY;
    }
    let mut student_tail = log_sum_exp(&rest);
    let mut tail_moves = !plain.makes(Mistake::TailNotInGradient);
    let kept_mass = student.iter().map(|log_q| log_q.exp()).sum::<f64>() as f32;
    match plain.mistake {
        Some(Mistake::TailClampedToFloor) => {
            tail_moves = 1.0 - kept_mass > 1e-8;
            student_tail = ((1.0 - kept_mass).max(1e-8) as f64).ln();
        }
        // 1 - 1e-8 is 1 in f32.
        Some(Mistake::TailClampedToNaN) => student_tail = (-(kept_mass.min(1.0 - 1e-8)) as f64).ln_1p(),
        _ => {}
    }
    let drops = matches!(plain.mistake, Some(Mistake::NoTailOutcome | Mistake::NoTailOutcomeClamped));
    // The tail is no outcome where nothing is left to be in it.
    let has_tail = !drops && (!rest.is_empty() || plain.makes(Mistake::ImpossibleTimesInfinity));
    if has_tail {
        teacher.push(log_tail);
        student.push(student_tail);
    }

    let mut kind = settings.divergence;
    if plain.makes(Mistake::BothRenormalised) && kind == Divergence::ForwardKl {
        kind = Divergence::ConditionalKl;
    }
    let (mut value, mut slopes) = plain_divergence::evaluate(plain, kind, &teacher, &student, has_tail);
    if plain.makes(Mistake::NoTailOutcomeClamped) && value < 0.0 {
        value = 0.0;
        slopes.fill(0.0);
    }
    let tail_slope = if !has_tail || !tail_moves { 0.0 } else { slopes[ids.len()] };
    let sum: f64 = slopes[..ids.len()].iter().sum::<f64>() + tail_slope;
    // d ln q_j / dz_v: what of outcome j is v's, less v's share of everything.
    let mut gradient: Vec<f64> = log_q.iter().map(|log_q| -log_q.exp() * sum).collect();
    for (&id, slope) in ids.iter().zip(&slopes) {
        gradient[id] += slope;
    }
    if has_tail {
        for ((gradient, log_q), _) in gradient.iter_mut().zip(&log_q).zip(&is_kept).filter(|(_, kept)| !**kept) {
            *gradient += tail_slope * (log_q - student_tail).exp();
        }
    }
    gradient.truncate(z.len());
    let divisor = if plain.makes(Mistake::TemperatureNotInGradient) { 1.0 } else { temperature };
    gradient.iter_mut().for_each(|value| *value /= divisor);
    (value, gradient)
}

/// The label's cross-entropy and its gradient in the logits.
fn hard(plain: &Plain, z: &[f64], kept: Kept<'_>, label: u32, temperature: f64) -> (f64, Vec<f64>) {
    if plain.makes(Mistake::UnkeptLabelDropped) && !kept.ids.contains(&label) {
        return (0.0, vec![0.0; z.len()]);
    }
    let temperature = if plain.makes(Mistake::HardAtTemperature) { temperature } else { 1.0 };
    let log_q = log_softmax(plain, z, temperature);
    let mut gradient: Vec<f64> = log_q[..z.len()].iter().map(|log_q| log_q.exp()).collect();
    gradient[label as usize] -= 1.0;
    gradient.iter_mut().for_each(|value| *value /= temperature);
    (-log_q[label as usize], gradient)
}
