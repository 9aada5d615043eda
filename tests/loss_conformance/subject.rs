//! What is tested: anything that turns a teacher's and a student's logits into one optimizer step's loss and gradient.
//!
//! The material is raw, because most mistakes are made on the way to the loss: in what is kept of the teacher, in which
//! rows count, in which token a row predicts, in what a sum is divided by.

use limbeck::targets::{PackedSequence, SparseTargets};
use limbeck_kernels::fused_linear_distill::{LossSettings, RowWeights};

pub trait Implementation: Sync {
    /// One optimizer step.
    ///
    /// # Errors
    /// A job that has no right answer is refused, with the reason.
    fn step(&self, job: &Job) -> Result<Outcome, String>;
}

/// What one optimizer step is made of. T rows: those of all sequences, one after the other; V vocabulary.
#[derive(Debug, Clone)]
pub struct Job {
    pub vocab: usize,
    /// Token ids and documents, all of one length.
    pub sequences: Vec<PackedSequence>,
    pub source: Source,
    pub student: Student,
    pub settings: LossSettings,
    pub weights: RowWeights,
    /// Per rank the number of sequences in each of its micro-batches.
    pub ranks: Vec<Vec<usize>>,
    /// Whether the losses of each row are asked for, and not only their mean.
    pub row_losses: bool,
}

/// Where the soft targets come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A teacher's logits `[T, V]`, from which each row keeps its own number of ids, captured at some temperatures.
    Teacher { logits: Vec<f32>, keep: Vec<usize>, temperatures: Vec<f32> },
    /// Per row the ids that were drawn from the teacher's distribution, with replacement.
    Sampled { draws: Vec<Vec<u32>> },
    /// What a cache holds already; `sampled` when its rows were drawn.
    Stored { targets: SparseTargets, sampled: bool },
    /// The cache is not there.
    Missing,
}

#[derive(Debug, Clone)]
pub enum Student {
    /// `[T, V]`
    Logits(Vec<f32>),
    /// Hidden states `[T, width]` and head `[V, width]`; handed over in bf16 when all their values are bf16's.
    Linear { hidden: Vec<f32>, lm_head: Vec<f32>, width: usize, bf16: bool },
}

/// The two losses of one row in nats, before weights and temperature factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLosses {
    pub soft: f64,
    pub hard: f64,
}

/// What came out of a step.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What the cache holds of the teacher.
    pub targets: SparseTargets,
    /// `None` for a row that does not count; empty where nobody asked.
    pub rows: Vec<Option<RowLosses>>,
    pub token_count: u64,
    /// What the optimizer minimises: the mean over the rows that count.
    pub loss: f64,
    /// The gradient of `loss` in the student's logits, or in hidden states and head.
    pub gradients: Vec<Vec<f64>>,
}

impl Job {
    pub fn seq_len(&self) -> usize {
        self.sequences[0].seq_len()
    }

    pub fn row_count(&self) -> usize {
        self.sequences.len() * self.seq_len()
    }

    /// Sequence and place of a row.
    pub fn place(&self, row: usize) -> (&PackedSequence, usize) {
        (&self.sequences[row / self.seq_len()], row % self.seq_len())
    }

    pub fn is_sampled(&self) -> bool {
        matches!(self.source, Source::Sampled { .. } | Source::Stored { sampled: true, .. })
    }

    /// Per rank, the rows of each micro-batch.
    pub fn micro_batches(&self) -> Vec<Vec<std::ops::Range<usize>>> {
        let mut next = 0;
        let mut rows = |sequences: &usize| {
            let first = next;
            next += sequences * self.seq_len();
            first..next
        };
        let ranks: Vec<Vec<_>> = self.ranks.iter().map(|parts| parts.iter().map(&mut rows).collect()).collect();
        assert_eq!(next, self.row_count(), "the micro-batches are all of the step");
        ranks
    }
}

impl Student {
    /// `[T, V]`, in f64 where they have to be computed.
    pub fn logits(&self) -> Vec<f64> {
        match self {
            Student::Logits(logits) => logits.iter().map(|&z| z as f64).collect(),
            Student::Linear { hidden, lm_head, width, .. } => {
                let dot = |h: &[f32], w: &[f32]| h.iter().zip(w).map(|(&h, &w)| h as f64 * w as f64).sum::<f64>();
                hidden.chunks(*width).flat_map(|h| lm_head.chunks(*width).map(move |w| dot(h, w))).collect()
            }
        }
    }
}

/// The index of the capture at a temperature.
pub fn capture_at(targets: &SparseTargets, temperature: f32) -> Option<usize> {
    targets.captures.iter().position(|capture| capture.temperature == temperature)
}

/// Appends a row; `captures` holds log-probabilities, tail and label of each temperature.
pub fn push_row(targets: &mut SparseTargets, ids: &[u32], captures: &[(Vec<f32>, f32, f32)]) {
    targets.ids.extend_from_slice(ids);
    targets.offsets.push(targets.ids.len() as u64);
    for (capture, (log_probs, log_tail, label_log_prob)) in targets.captures.iter_mut().zip(captures) {
        capture.log_probs.extend_from_slice(log_probs);
        capture.log_tail.push(*log_tail);
        capture.label_log_prob.push(*label_log_prob);
    }
}

/// Appends a row that keeps nothing.
pub fn push_nothing(targets: &mut SparseTargets) {
    let nothing = vec![(vec![], 0.0, 0.0); targets.captures.len()];
    push_row(targets, &[], &nothing);
}
