//! Jobs to be done: made-up logits, documents and targets.

use limbeck::targets::{PADDING, PackedSequence};
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{LossSettings, RowWeights},
};

use crate::subject::{Job, Source, Student};

pub const SOFT: RowWeights = RowWeights { soft: 1.0, hard: 0.0 };
pub const HARD: RowWeights = RowWeights { soft: 0.0, hard: 1.0 };
/// Unequal, and exact in every type.
pub const BOTH: RowWeights = RowWeights { soft: 0.75, hard: 0.25 };

/// Tails of teachers, from next to nothing to nearly everything.
pub const TAILS: [f64; 9] = [1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-3, 0.02, 0.5, 0.9];

pub fn random(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (next() + next() + next() - 1.5) * scale).collect()
}

/// Rows of logits whose `k` first ids have all but `tail` of the probability.
pub fn with_tails(vocab: usize, k: usize, tails: &[f64], seed: u64) -> Vec<f32> {
    let mut logits = random(tails.len() * vocab, seed, 1.0);
    for (row, tail) in logits.chunks_mut(vocab).zip(tails) {
        let log_sum = |values: &[f32]| values.iter().map(|&z| (z as f64).exp()).sum::<f64>().ln();
        // The lowest kept id has to stay above the others.
        row[..k].iter_mut().for_each(|z| *z = *z * 0.1 + 6.0);
        let (kept, rest) = (log_sum(&row[..k]), log_sum(&row[k..]));
        row[..k].iter_mut().for_each(|z| *z = (*z as f64 - kept + (-tail).ln_1p()) as f32);
        row[k..].iter_mut().for_each(|z| *z = (*z as f64 - rest + tail.ln()) as f32);
    }
    logits
}

/// A sequence of one prediction.
pub fn prediction(label: u32) -> PackedSequence {
    PackedSequence { tokens: vec![0, label], segments: vec![0, 0] }
}

/// One row per label, each on its own, the teacher kept to its `k` likeliest ids.
pub fn rows(vocab: usize, labels: &[u32], teacher: Vec<f32>, k: usize, student: Vec<f32>) -> Job {
    Job {
        vocab,
        sequences: labels.iter().map(|&label| prediction(label)).collect(),
        source: Source::Teacher { logits: teacher, keep: vec![k; labels.len()], temperatures: vec![1.0] },
        student: Student::Logits(student),
        settings: LossSettings::new(Divergence::ForwardKl),
        weights: BOTH,
        ranks: vec![vec![labels.len()]],
        row_losses: true,
    }
}

/// Some rows with nothing remarkable about them.
pub fn ordinary(row_count: usize, vocab: usize, k: usize, seed: u64) -> Job {
    let labels: Vec<u32> = (0..row_count).map(|row| (row * 37 % vocab) as u32).collect();
    rows(vocab, &labels, random(row_count * vocab, seed, 5.0), k, random(row_count * vocab, seed + 100, 5.0))
}

/// Two sequences of documents, and one that is padded; all tokens differ.
pub fn documents(vocab: usize, k: usize, seed: u64) -> Job {
    let sequence = |first: u32, segments: [u32; 7]| PackedSequence {
        tokens: (first..first + 7).map(|token| token * 5 % vocab as u32).collect(),
        segments: segments.to_vec(),
    };
    let sequences = vec![
        sequence(1, [0, 0, 0, 1, 1, 1, 1]),
        sequence(20, [0, 1, 1, 2, 2, 2, 2]),
        sequence(9, [0, 0, 0, PADDING, PADDING, PADDING, PADDING]),
    ];
    let row_count = 18;
    Job {
        sequences,
        source: Source::Teacher {
            logits: random(row_count * vocab, seed, 4.0),
            keep: vec![k; row_count],
            temperatures: vec![1.0],
        },
        student: Student::Logits(random(row_count * vocab, seed + 100, 4.0)),
        ranks: vec![vec![3]],
        ..ordinary(1, vocab, k, seed)
    }
}

/// The rows of [`documents`] that count, and the tokens they predict: written down, not computed.
pub fn predictions_of_documents(vocab: usize) -> Vec<(usize, u32)> {
    let token = |number: u32| number * 5 % vocab as u32;
    vec![
        (0, token(2)),
        (1, token(3)),
        (3, token(5)),
        (4, token(6)),
        (5, token(7)),
        (7, token(22)),
        (9, token(24)),
        (10, token(25)),
        (11, token(26)),
        (12, token(10)),
        (13, token(11)),
    ]
}

impl Job {
    pub fn with_divergence(mut self, divergence: Divergence) -> Job {
        self.settings.divergence = divergence;
        self
    }

    pub fn with_weights(mut self, weights: RowWeights) -> Job {
        self.weights = weights;
        self
    }

    /// At a temperature of the loss, and of the capture.
    pub fn at_temperature(mut self, temperature: f32, t_scale: bool) -> Job {
        self.settings.temperature = temperature;
        self.settings.t_scale = t_scale;
        if let Source::Teacher { temperatures, .. } = &mut self.source {
            *temperatures = vec![1.0, temperature];
            temperatures.dedup();
        }
        self
    }

    pub fn with_source(mut self, source: Source) -> Job {
        self.source = source;
        self
    }

    /// The student's logits, to be changed.
    pub fn student_logits(&mut self) -> &mut Vec<f32> {
        match &mut self.student {
            Student::Logits(logits) => logits,
            Student::Linear { .. } => panic!("this student has hidden states"),
        }
    }
}
