//! The same step once more, in plain f64 loops that can be told to make a mistake.
//!
//! Without one it keeps every promise; so whatever a mutant breaks, the mistake broke it.

use half::bf16;
use limbeck::targets::PADDING;

use crate::{
    mistakes::Mistake,
    plain_row::{Kept, row_loss},
    plain_teacher,
    subject::{Implementation, Job, Outcome, Source, Student, capture_at},
};

pub struct Plain {
    pub mistake: Option<Mistake>,
}

impl Plain {
    pub fn makes(&self, mistake: Mistake) -> bool {
        self.mistake == Some(mistake)
    }

    /// The token that a row has to predict; none for a row that does not count.
    pub fn label(&self, job: &Job, row: usize) -> Option<u32> {
        let (sequence, t) = job.place(row);
        let (tokens, segments) = (&sequence.tokens, &sequence.segments);
        let counts = match self.mistake {
            Some(Mistake::MaskAtInput) => segments[t] != PADDING && (t == 0 || segments[t - 1] == segments[t]),
            Some(Mistake::DocumentsJoined) => segments[t] != PADDING && segments[t + 1] != PADDING,
            Some(Mistake::PaddingCounts) => segments[t] == segments[t + 1],
            _ => segments[t] != PADDING && segments[t] == segments[t + 1],
        };
        let label = match self.mistake {
            Some(Mistake::LabelOneLate) => tokens[(t + 2).min(tokens.len() - 1)],
            Some(Mistake::LabelOneEarly) => tokens[t],
            _ => tokens[t + 1],
        };
        counts.then_some(label)
    }

    fn refuse(&self, job: &Job) -> Result<(), String> {
        let divergence = job.settings.divergence;
        if !self.makes(Mistake::MeaninglessParametersTaken) {
            divergence.check().map_err(|invalid| invalid.problem)?;
        }
        if job.is_sampled() && !divergence.is_linear_in_the_teacher() && !self.makes(Mistake::SampledTakenByAll) {
            return Err(format!("{} cannot be had from sampled targets", divergence.name()));
        }
        Ok(())
    }

    /// What each row's loss is multiplied by, so that the sum over all rows is the step's mean.
    fn shares(&self, job: &Job) -> Vec<f64> {
        let counted = |row: usize| self.label(job, row).is_some();
        let count = |rows: std::ops::Range<usize>| rows.filter(|&row| counted(row)).count().max(1) as f64;
        let all =
            if self.makes(Mistake::EveryPlaceCounted) { job.row_count() as f64 } else { count(0..job.row_count()) };
        let ranks = job.micro_batches();
        let mut shares = vec![];
        for parts in &ranks {
            let of_rank: f64 = parts.iter().map(|rows| count(rows.clone())).sum();
            for rows in parts {
                let share = match self.mistake {
                    Some(Mistake::MeanOfMeans) => 1.0 / count(rows.clone()) / (parts.len() * ranks.len()) as f64,
                    Some(Mistake::LocalCount) => 1.0 / of_rank / ranks.len() as f64,
                    Some(Mistake::TimesAccumulation) => parts.len() as f64 / all,
                    _ => 1.0 / all,
                };
                shares.extend(std::iter::repeat_n(share, rows.len()));
            }
        }
        shares
    }
}

impl Implementation for Plain {
    fn step(&self, job: &Job) -> Result<Outcome, String> {
        self.refuse(job)?;
        let targets = plain_teacher::targets(self, job)?;
        let capture = match capture_at(&targets, job.settings.temperature) {
            Some(at) => &targets.captures[at],
            None if self.makes(Mistake::OtherTemperatureTaken) => &targets.captures[0],
            None => return Err("no capture at the loss's temperature".into()),
        };
        let shares = self.shares(job);
        let logits = job.student.logits();
        let (mut rows, mut loss, mut token_count) = (vec![], 0.0, 0);
        let mut gradient = vec![0.0; logits.len()];
        for (row, z) in logits.chunks(job.vocab).enumerate() {
            let Some(label) = self.label(job, row) else {
                rows.push(None);
                continue;
            };
            let places = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
            if places.is_empty() && job.weights.soft > 0.0 && !self.makes(Mistake::FallbackToLabels) {
                return Err(format!("row {row} counts but has no soft target"));
            }
            let ids = &targets.ids[places.clone()];
            let twice = ids.iter().enumerate().any(|(place, id)| ids[..place].contains(id));
            let from_outside = matches!(job.source, Source::Stored { .. });
            if twice && from_outside && !self.makes(Mistake::DuplicatesCountedTwice) {
                return Err(format!("row {row} keeps an id twice"));
            }
            let kept = Kept { ids, log_probs: &capture.log_probs[places], log_tail: capture.log_tail[row] };
            let (losses, objective, row_gradient) = row_loss(self, z, kept, label, &job.settings, job.weights);
            loss += shares[row] * objective;
            for (slot, value) in gradient[row * job.vocab..].iter_mut().zip(row_gradient) {
                *slot = shares[row] * value;
            }
            rows.push(Some(losses));
            token_count += 1;
        }
        let gradients = match &job.student {
            Student::Logits(_) => vec![gradient],
            Student::Linear { hidden, lm_head, width, .. } => self.through_the_head(&gradient, hidden, lm_head, *width),
        };
        Ok(Outcome { targets, rows, token_count, loss, gradients })
    }
}

impl Plain {
    /// From the gradient in the logits to those in hidden states and head.
    fn through_the_head(&self, gradient: &[f64], hidden: &[f32], lm_head: &[f32], width: usize) -> Vec<Vec<f64>> {
        let vocab = lm_head.len() / width;
        let (mut hidden_grad, mut head_grad) = (vec![0.0; hidden.len()], vec![0.0; lm_head.len()]);
        let round = |sum: f64| {
            if self.makes(Mistake::Bf16HeadGradient) { bf16::from_f64(sum).to_f64() } else { sum }
        };
        for (row, gradient) in gradient.chunks(vocab).enumerate() {
            for (v, g) in gradient.iter().enumerate() {
                for d in 0..width {
                    hidden_grad[row * width + d] += g * lm_head[v * width + d] as f64;
                    let sum = &mut head_grad[v * width + d];
                    *sum = round(*sum + g * hidden[row * width + d] as f64);
                }
            }
        }
        vec![hidden_grad, head_grad]
    }
}
