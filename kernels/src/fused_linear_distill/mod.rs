//! From hidden states to the distillation loss and its gradients, without the logits of a batch in memory.
//!
//! `L = sum_t [ w_soft(t) c d(P_t, Q_t) + w_hard(t) -ln q_t(label) ]`, with `z = hidden lm_head^T`, `q = softmax(z)` and
//! `d` any [`Divergence`] over the kept ids and one outcome for everything else, both sides at one temperature; `c` is
//! the temperature squared or 1. The gradients are made with the loss, for whoever asks for the one wants the other:
//! they wait in the graph until `backward` scales them.
//!
//! T rows, D width, V vocabulary, k kept ids. Here are the operation's parts that everyone sees; [`rows`] is one row's
//! arithmetic, [`host`] the processor's form, [`sharded`] the same in stages over a head in shards, [`logits`] the form
//! for logits at hand, and [`graph`] the node in the graph. With the features `wgpu` or `cuda` there is the device's form
//! as well: `device` drives the kernels in `cube`, in the sizes that [`tiles`] finds.

#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "cube")]
pub mod cube_top_k;
#[cfg(feature = "device")]
pub mod device;
#[cfg(feature = "device")]
mod device_gradients;
#[cfg(feature = "device")]
mod device_node;
#[cfg(feature = "device")]
pub mod device_top_k;
pub mod graph;
pub mod host;
pub mod logits;
mod pieces;
pub mod rows;
pub mod sharded;
pub mod tiles;

use crate::divergence::Divergence;

pub use graph::{LinearDistill, distill_logits, linear_distill, linear_distill_reference, row_slopes};

/// In the place of a label: the row has no hard target.
pub const NO_LABEL: u32 = u32::MAX;

/// Targets of T rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RowTargets {
    /// The next token of each row, or [`NO_LABEL`].
    pub labels: Vec<u32>,
    /// Row `r` keeps `ids[offsets[r]..offsets[r + 1]]`; a row that keeps none has no soft target. T + 1 numbers.
    pub offsets: Vec<usize>,
    /// Kept ids, no id twice in a row, in descending order of the teacher's probability.
    pub ids: Vec<u32>,
    /// The teacher's log-probability of each kept id, at the temperature of the loss.
    pub log_probs: Vec<f32>,
    /// Per row, the log of the teacher's probability of all other ids.
    pub log_tail: Vec<f32>,
}

impl RowTargets {
    /// Hard targets alone.
    pub fn labels(labels: Vec<u32>) -> Self {
        let (offsets, log_tail) = (vec![0; labels.len() + 1], vec![f32::NEG_INFINITY; labels.len()]);
        RowTargets { labels, offsets, log_tail, ..RowTargets::default() }
    }

    pub fn row_count(&self) -> usize {
        self.labels.len()
    }

    /// Where row `row` has its ids.
    pub fn kept(&self, row: usize) -> std::ops::Range<usize> {
        self.offsets[row]..self.offsets[row + 1]
    }

    /// Whether the row has any target.
    pub fn has_target(&self, row: usize) -> bool {
        self.labels[row] != NO_LABEL || !self.kept(row).is_empty()
    }

    /// Whether the parts fit each other and the vocabulary. Gives what is wrong.
    pub fn check(&self, vocab: usize) -> Result<(), String> {
        let rows = self.row_count();
        if self.offsets.len() != rows + 1 || self.log_tail.len() != rows {
            return Err(format!("{rows} labels, {} offsets and {} tails", self.offsets.len(), self.log_tail.len()));
        }
        if self.ids.len() != self.log_probs.len() || self.offsets.last() != Some(&self.ids.len()) {
            return Err(format!("{} ids and {} log-probabilities", self.ids.len(), self.log_probs.len()));
        }
        let mut seen = vec![usize::MAX; vocab];
        for row in 0..rows {
            if self.offsets[row] > self.offsets[row + 1] {
                return Err(format!("the offsets of row {row} go backwards"));
            }
            let label = self.labels[row];
            if label != NO_LABEL && label as usize >= vocab {
                return Err(format!("row {row} has label {label}, beyond the vocabulary of {vocab}"));
            }
            for &id in &self.ids[self.kept(row)] {
                match seen.get_mut(id as usize) {
                    None => return Err(format!("row {row} keeps id {id}, beyond the vocabulary of {vocab}")),
                    Some(last) if *last == row => return Err(format!("row {row} keeps id {id} twice")),
                    Some(last) => *last = row,
                }
            }
        }
        Ok(())
    }
}

/// What is computed for each row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossSettings {
    pub divergence: Divergence,
    /// Divides the logits of both sides in the soft loss. The hard loss is at 1.
    pub temperature: f32,
    /// Whether the soft loss is multiplied by the temperature squared, which keeps its gradient's size.
    pub t_scale: bool,
}

impl LossSettings {
    pub fn new(divergence: Divergence) -> Self {
        LossSettings { divergence, temperature: 1.0, t_scale: true }
    }

    /// What the soft loss is multiplied by beside its weight.
    pub fn soft_factor(&self) -> f64 {
        if self.t_scale { (self.temperature as f64).powi(2) } else { 1.0 }
    }
}

/// How much a row's two losses count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowWeights {
    pub soft: f32,
    pub hard: f32,
}

/// What is known of a row once its logits have been seen. Nats; all but `soft*` at temperature 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowMeasures {
    /// The divergence, before weight and temperature factor; 0 without soft target.
    pub soft: f64,
    /// `-ln q(label)`; 0 without label.
    pub hard: f64,
    pub log_sum_exp: f64,
    /// Log of the student's mass outside the kept ids.
    pub log_tail: f64,
    /// `sum q^2`.
    pub squared_probabilities: f64,
    /// The student's likeliest id.
    pub argmax: u32,
    /// `|| d soft / dz ||^2`, with the temperature factor, before the weight.
    pub soft_gradient_square: f64,
    /// `|| q - onehot(label) ||^2`.
    pub hard_gradient_square: f64,
}

/// The weights of a row, given its number and measures. Constants to the gradient.
pub type Weigh<'a> = dyn Fn(usize, &RowMeasures) -> RowWeights + Sync + 'a;
