//! The memory that training a student asks for, estimated from its sizes, and how many sequences fit into what is there.

use serde::{Deserialize, Serialize};

use super::micro_batch_key::MicroBatch;
use super::plan::{ModelSize, Plan};
use super::schema::Dtype;
use crate::quantity::short_bytes;

/// Bytes on one device. Activations are an estimate, the rest is exact for AdamW in f32.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryEstimate {
    pub teacher_weights: u64,
    pub weights: u64,
    pub gradients: u64,
    pub optimizer: u64,
    pub activations: u64,
}

impl MemoryEstimate {
    /// Memory of training a student on micro-batches of `sequences` times `seq_len` tokens. The teacher is counted
    /// beside it only in `teacher_weights`, for it is dropped before training.
    pub fn new(student: &ModelSize, teacher: Option<(&ModelSize, Dtype)>, sequences: u64, seq_len: u64) -> Self {
        let four_bytes = |count: u64| count.saturating_mul(4);
        let tokens = sequences.saturating_mul(seq_len);
        // About 17 values of the hidden width per layer and token are kept for the backward pass of a decoder layer,
        // and per head two rows of attention scores; logits, their gradient and a softmax are each one row of the
        // vocabulary.
        let per_layer = tokens.saturating_mul(17 * student.hidden);
        let scores = tokens.saturating_mul(2 * student.heads).saturating_mul(seq_len);
        let logits = tokens.saturating_mul(3 * student.vocab);
        let kept = student.layers.saturating_mul(per_layer.saturating_add(scores)).saturating_add(logits);
        MemoryEstimate {
            teacher_weights: teacher.map_or(0, |(teacher, dtype)| {
                let width = match dtype {
                    Dtype::F32 => 4,
                    Dtype::Bf16 => 2,
                };
                teacher.total_parameters.saturating_mul(width)
            }),
            weights: four_bytes(student.total_parameters),
            gradients: four_bytes(student.total_parameters),
            optimizer: four_bytes(student.total_parameters).saturating_mul(2),
            activations: four_bytes(kept),
        }
    }

    /// Bytes of activations where each layer keeps its input alone, and one at a time has the rest.
    pub fn checkpointed(student: &ModelSize, sequences: u64, seq_len: u64) -> u64 {
        let one_layer = ModelSize { layers: 1, ..student.clone() };
        let inputs = sequences.saturating_mul(seq_len).saturating_mul(student.hidden.saturating_mul(student.layers));
        MemoryEstimate::new(&one_layer, None, sequences, seq_len).activations.saturating_add(inputs.saturating_mul(4))
    }

    /// Bytes while the student is trained.
    pub fn training(&self) -> u64 {
        [self.weights, self.gradients, self.optimizer, self.activations]
            .iter()
            .fold(0, |sum, part| sum.saturating_add(*part))
    }

    /// Bytes at the fuller of the two times: teacher alone, student alone.
    pub fn peak(&self) -> u64 {
        self.training().max(self.teacher_weights)
    }
}

impl Plan {
    /// With `train.micro_batch_tokens = "auto"`, takes as many sequences at once as three quarters of `free` bytes hold, by
    /// the estimate; the models' sizes must be known.
    pub fn fit_micro_batch(&mut self, free: Option<u64>) {
        let (Some(MicroBatch::Auto), Some(student)) = (self.recipe.train.micro_batch_tokens, &self.student) else {
            return;
        };
        let Some(free) = free else {
            self.warnings.push(
                "the system does not say how much memory is free; train.micro_batch_tokens = \"auto\" \
                                takes one sequence at a time"
                    .to_string(),
            );
            return self.set_micro_batch(1);
        };
        let (seq_len, train) = (self.recipe.data.seq_len as u64, &self.recipe.train);
        let needs = |sequences: u64| {
            let mut memory = MemoryEstimate::new(student, None, sequences, seq_len);
            if train.checkpoint_activations {
                memory.activations = MemoryEstimate::checkpointed(student, sequences, seq_len);
            }
            // The running mean and the unrounded weights.
            let more = train.ema.is_some() as u64 + (train.precision == Dtype::Bf16) as u64;
            memory.training().saturating_add(memory.weights.saturating_mul(more))
        };
        let budget = free / 4 * 3;
        let divisors =
            (1..=self.sequences_per_step).rev().filter(|count| self.sequences_per_step.is_multiple_of(*count));
        let fitting = divisors.into_iter().find(|&count| needs(count) <= budget);
        if fitting.is_none() {
            self.warnings.push(format!(
                "one sequence at a time takes about {}, and {} are free",
                short_bytes(needs(1)),
                short_bytes(free)
            ));
        }
        self.set_micro_batch(fitting.unwrap_or(1));
    }

    fn set_micro_batch(&mut self, sequences: u64) {
        self.sequences_per_micro_batch = sequences;
        self.micro_batches_per_step = self.sequences_per_step / sequences;
        if let (Some(memory), Some(student)) = (&mut self.memory, &self.student) {
            let again = MemoryEstimate::new(student, None, sequences, self.recipe.data.seq_len as u64);
            memory.activations = again.activations;
        }
    }
}
