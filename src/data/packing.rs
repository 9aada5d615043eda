//! Documents, as token ids, into sequences of equal length. Knows nothing of files or text.
//!
//! A sequence has `seq_len + 1` places and `seq_len` rows; row `t` predicts place `t + 1`.
//! - Documents follow one another without gaps, each with a segment number of its own within the sequence.
//! - A document that does not fit goes on in the next sequence, whose first place **repeats** the last token of this one:
//!   as a label it was predicted here, there it is only read. So every token except a document's first is the label of
//!   exactly one valid row.
//! - A document that ends on the last place ends there; the next sequence starts with the next document, repeating
//!   nothing.
//! - When only the last place is left, the next document's first token goes there, carries no loss, and is repeated.
//! - Only the last sequence of all may have unused places; they hold the padding id and the segment [`PADDING`].
//! - A document of fewer than two tokens has nothing to predict and is left out.

use crate::targets::{PADDING, PackedSequence};

/// Fills one sequence after another. Holds at most one unfinished sequence.
#[derive(Debug, Clone)]
pub struct Packer {
    seq_len: usize,
    padding: u32,
    tokens: Vec<u32>,
    segments: Vec<u32>,
    segment_count: u32,
}

impl Packer {
    /// `padding` is the id written to unused places; no row with a loss ever reads or predicts it.
    ///
    /// # Panics
    /// If `seq_len` is 0.
    pub fn new(seq_len: usize, padding: u32) -> Packer {
        assert!(seq_len > 0, "a sequence predicts at least one token");
        Packer { seq_len, padding, tokens: vec![], segments: vec![], segment_count: 0 }
    }

    /// Adds as much of the document as fits, from its token `from` on.
    ///
    /// Returns the token the next sequence has to start from, or `None` when the document is all in. Where the answer
    /// is a number, the sequence is full.
    pub fn add(&mut self, document: &[u32], from: usize) -> Option<usize> {
        if document.len() < 2 {
            return None;
        }
        let end = document.len().min(from + self.room());
        self.tokens.extend_from_slice(&document[from..end]);
        self.segments.resize(self.tokens.len(), self.segment_count);
        self.segment_count += 1;
        (end < document.len()).then(|| end - 1)
    }

    fn room(&self) -> usize {
        self.seq_len + 1 - self.tokens.len()
    }

    /// Whether the sequence has to be taken before more can be added.
    pub fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Takes the sequence, with padding where it is not full; `None` when it predicts nothing.
    pub fn take(&mut self) -> Option<PackedSequence> {
        let mut tokens = std::mem::take(&mut self.tokens);
        let mut segments = std::mem::take(&mut self.segments);
        self.segment_count = 0;
        if tokens.len() < 2 {
            return None;
        }
        tokens.resize(self.seq_len + 1, self.padding);
        segments.resize(self.seq_len + 1, PADDING);
        Some(PackedSequence { tokens, segments })
    }
}

/// Packs documents that are all at hand, in their order.
///
/// # Shapes
/// Each document is its token ids, with the document's start and end tokens if there are such; each sequence has
/// `seq_len + 1` of them.
pub fn pack(documents: &[Vec<u32>], seq_len: usize, padding: u32) -> Vec<PackedSequence> {
    let mut packer = Packer::new(seq_len, padding);
    let mut sequences = vec![];
    for document in documents {
        let mut from = Some(0);
        while let Some(token) = from {
            if packer.is_full() {
                sequences.extend(packer.take());
            }
            from = packer.add(document, token);
        }
    }
    sequences.extend(packer.take());
    sequences
}
