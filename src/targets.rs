//! The narrow waist: what the teacher makes, the cache stores and the loss consumes.
//!
//! Host data only. Knows nothing of models, files or recipes.
//!
//! A packed sequence of `seq_len` predictions is `seq_len + 1` tokens: row `t` predicts token `t + 1` from tokens
//! `0..=t`. Every label of a data set is predicted exactly once, and a label shifted by one cannot be expressed.

use crate::error::Result;

/// One packed sequence of token ids, with the documents it is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedSequence {
    /// `seq_len + 1` token ids; the model reads the first `seq_len`, and predicts the last `seq_len`.
    pub tokens: Vec<u32>,
    /// For each token, the number of its document inside this sequence, from 0. [`PADDING`] marks unused places
    /// at the end of the last sequence.
    pub segments: Vec<u32>,
}

/// Segment number of places that hold no document.
pub const PADDING: u32 = u32::MAX;

impl PackedSequence {
    /// Number of rows (predictions) in the sequence.
    pub fn seq_len(&self) -> usize {
        self.tokens.len() - 1
    }

    /// Whether row `t` predicts a token of the same document as its input; other rows carry no loss and no targets.
    pub fn is_valid(&self, t: usize) -> bool {
        self.segments[t] != PADDING && self.segments[t] == self.segments[t + 1]
    }

    /// Bytes of raw text that the predicted tokens stand for, where each id stands for `token_bytes` of them.
    pub fn text_bytes(&self, token_bytes: &[u32]) -> u64 {
        let predicted = (0..self.seq_len()).filter(|&row| self.is_valid(row)).map(|row| self.tokens[row + 1]);
        predicted.map(|id| token_bytes.get(id as usize).copied().unwrap_or(0) as u64).sum()
    }
}

/// What the numbers beside kept ids are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TargetKind {
    /// The teacher's probabilities of the kept ids, with that of all others beside them.
    #[default]
    Exact,
    /// Weights whose expectation is the teacher's whole distribution: ids were drawn, and there is no tail. Serves what is
    /// linear in the teacher's probabilities, and nothing else.
    Sampled,
}

/// Teacher probabilities at one temperature, for rows of kept ids (see [`SparseTargets`]). Natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct Capture {
    /// The temperature the full teacher row was divided by before its softmax.
    pub temperature: f32,
    /// Log-probability of each kept id under the full softmax, in the order of [`SparseTargets::ids`]; the log of its
    /// weight where ids were drawn.
    pub log_probs: Vec<f32>,
    /// Per row, log of the probability outside the kept ids, measured on the full row (`-inf` when nothing is left,
    /// and where ids were drawn).
    pub log_tail: Vec<f32>,
    /// Per row, log-probability of the label, kept or not.
    pub label_log_prob: Vec<f32>,
}

/// What a teacher's routers make of the tokens that rows predict from: the probabilities of experts, each in a byte.
///
/// A probability is the square of its code over the sum of those of all experts of the layer, and the likeliest expert has
/// the code 255. So a probability's root is off by a 510th of the largest root at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterCodes {
    pub layers: usize,
    /// Of each layer.
    pub experts: usize,
    /// `[rows, layers, experts]`; zeros in rows that are not valid.
    pub codes: Vec<u8>,
}

impl RouterCodes {
    /// No rows yet.
    pub fn empty(layers: usize, experts: usize) -> Self {
        RouterCodes { layers, experts, codes: vec![] }
    }

    /// Bytes of a row.
    pub fn width(&self) -> usize {
        self.layers * self.experts
    }

    /// Appends what one router makes of one token, from its logits.
    pub fn push(&mut self, logits: &[f32]) {
        // Where a logit is no finite number all codes are 0, in the end: no row that a cache takes.
        let largest = match logits.iter().any(|logit| logit.is_nan()) {
            true => f64::NAN,
            false => logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b)) as f64,
        };
        let code = |&logit: &f32| (255.0 * ((logit as f64 - largest) / 2.0).exp()).round() as u8;
        self.codes.extend(logits.iter().map(code));
    }

    /// The weights (not divided by their sum) of the experts of a layer in a row.
    pub fn weights(&self, row: usize, layer: usize) -> impl Iterator<Item = f32> {
        let first = row * self.width() + layer * self.experts;
        self.codes[first..first + self.experts].iter().map(|&code| f32::from(code) * f32::from(code))
    }

    fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        let width = self.width();
        let codes = self.codes[rows.start * width..rows.end * width].to_vec();
        RouterCodes { layers: self.layers, experts: self.experts, codes }
    }
}

/// Soft targets of some rows: per row a variable number of kept ids, in descending order of probability (or weight) at
/// the first temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct SparseTargets {
    /// Row `r` keeps `ids[offsets[r]..offsets[r + 1]]`. Length rows + 1, starts with 0, never decreases.
    pub offsets: Vec<u64>,
    /// Kept vocabulary ids.
    pub ids: Vec<u32>,
    /// One capture per temperature; at least one.
    pub captures: Vec<Capture>,
    pub kind: TargetKind,
    /// Per row, the log-sum-exp of the teacher's logits, undivided by any temperature; `None` where nobody kept it.
    pub log_normalizer: Option<Vec<f32>>,
    /// What the routers of some of the teacher's layers said; `None` where nobody kept it.
    pub router: Option<RouterCodes>,
}

impl SparseTargets {
    pub fn row_count(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The capture at a temperature, if the teacher's rows were captured at it.
    pub fn capture(&self, temperature: f32) -> Option<&Capture> {
        self.captures.iter().find(|capture| capture.temperature == temperature)
    }

    /// An empty set of rows at the given temperatures, to be filled with [`SparseTargets::extend`]. Of which kind it is,
    /// and whether normalisers are kept, the first rows decide.
    pub fn empty(temperatures: &[f32]) -> Self {
        let captures = temperatures
            .iter()
            .map(|&temperature| Capture { temperature, log_probs: vec![], log_tail: vec![], label_log_prob: vec![] })
            .collect();
        SparseTargets {
            offsets: vec![0],
            ids: vec![],
            captures,
            kind: TargetKind::Exact,
            log_normalizer: None,
            router: None,
        }
    }

    /// Appends the rows of `other`, which must have the same temperatures in the same order and be of the same kind.
    /// Normalisers and what routers said stay where all rows have them.
    pub fn extend(&mut self, other: &SparseTargets) {
        if self.row_count() == 0 {
            (self.kind, self.log_normalizer) = (other.kind, other.log_normalizer.clone());
            self.router.clone_from(&other.router);
        } else if other.row_count() > 0 {
            assert_eq!(self.kind, other.kind, "probabilities beside drawn weights");
            match (&mut self.log_normalizer, &other.log_normalizer) {
                (Some(mine), Some(theirs)) => mine.extend_from_slice(theirs),
                _ => self.log_normalizer = None,
            }
            match (&mut self.router, &other.router) {
                (Some(mine), Some(theirs)) => {
                    let of = |codes: &RouterCodes| (codes.layers, codes.experts);
                    assert_eq!(of(mine), of(theirs), "rows of different routers");
                    mine.codes.extend_from_slice(&theirs.codes);
                }
                _ => self.router = None,
            }
        }
        let base = *self.offsets.last().expect("offsets start with 0");
        self.offsets.extend(other.offsets[1..].iter().map(|offset| base + offset));
        self.ids.extend_from_slice(&other.ids);
        assert_eq!(self.captures.len(), other.captures.len(), "rows captured at different temperatures");
        for (mine, theirs) in self.captures.iter_mut().zip(&other.captures) {
            assert_eq!(mine.temperature, theirs.temperature, "rows captured at different temperatures");
            mine.log_probs.extend_from_slice(&theirs.log_probs);
            mine.log_tail.extend_from_slice(&theirs.log_tail);
            mine.label_log_prob.extend_from_slice(&theirs.label_log_prob);
        }
    }

    /// Rows `start..end` as targets of their own.
    pub fn slice(&self, start: usize, end: usize) -> SparseTargets {
        let (from, to) = (self.offsets[start] as usize, self.offsets[end] as usize);
        SparseTargets {
            offsets: self.offsets[start..=end].iter().map(|offset| offset - self.offsets[start]).collect(),
            ids: self.ids[from..to].to_vec(),
            captures: self
                .captures
                .iter()
                .map(|capture| Capture {
                    temperature: capture.temperature,
                    log_probs: capture.log_probs[from..to].to_vec(),
                    log_tail: capture.log_tail[start..end].to_vec(),
                    label_log_prob: capture.label_log_prob[start..end].to_vec(),
                })
                .collect(),
            kind: self.kind,
            log_normalizer: self.log_normalizer.as_ref().map(|normalizers| normalizers[start..end].to_vec()),
            router: self.router.as_ref().map(|router| router.slice(start..end)),
        }
    }
}

/// What a model reads in one step: packed sequences of equal length, with soft targets when there are any.
#[derive(Debug, Clone)]
pub struct DistillBatch {
    pub sequences: Vec<PackedSequence>,
    /// Rows of all sequences, one after the other: `sequences.len() * seq_len` of them.
    /// Rows where [`PackedSequence::is_valid`] is false keep no ids.
    pub targets: Option<SparseTargets>,
    /// A weight for each row's loss, 0 for rows that are masked. `None`: every row that counts has weight 1.
    pub row_weights: Option<Vec<f32>>,
}

impl DistillBatch {
    pub fn seq_len(&self) -> usize {
        self.sequences.first().map_or(0, PackedSequence::seq_len)
    }

    pub fn row_count(&self) -> usize {
        self.sequences.len() * self.seq_len()
    }

    /// Puts the sequences of another batch of the same source behind those of this one.
    ///
    /// # Panics
    /// When only one of them has targets, or weights.
    pub fn append(&mut self, other: DistillBatch) {
        if other.sequences.is_empty() {
            return;
        }
        if self.sequences.is_empty() {
            *self = other;
            return;
        }
        self.sequences.extend(other.sequences);
        match (&mut self.targets, &other.targets) {
            (Some(mine), Some(theirs)) => mine.extend(theirs),
            (mine, theirs) => assert!(mine.is_none() && theirs.is_none(), "targets beside none"),
        }
        match (&mut self.row_weights, other.row_weights) {
            (Some(mine), Some(theirs)) => mine.extend(theirs),
            (mine, theirs) => assert!(mine.is_none() && theirs.is_none(), "weights beside none"),
        }
    }
}

/// Where batches come from: a cache on disk, or a live teacher. Several threads may read at once.
pub trait TargetSource: Sync {
    /// Number of packed sequences.
    fn sequence_count(&self) -> u64;
    /// Predictions per sequence.
    fn seq_len(&self) -> usize;
    /// The sequences with the given numbers, in the given order.
    fn read(&self, numbers: &[u64]) -> Result<DistillBatch>;
}
