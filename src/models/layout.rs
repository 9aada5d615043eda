//! Where each token of a batch stands: its position inside its document and the keys it may see.
//!
//! Packed sequences hold several documents; positions restart at each, and no token sees another document.

use std::{collections::HashMap, sync::Arc};

use limbeck_kernels::{attention::KeyRanges, rotary::RotaryTable};

use super::{config::Span, rope};
use crate::{
    models::DecoderConfig,
    targets::{DistillBatch, PADDING},
};

/// The tokens of one forward pass, `token_count` of them in sequences of equal length.
#[derive(Debug, Clone)]
pub struct TokenLayout {
    pub ids: Arc<Vec<u32>>,
    pub sequence_len: usize,
    /// Position of each token inside its document.
    pub positions: Vec<u32>,
    rotary: Option<RotaryTable>,
    ranges: HashMap<SpanKey, KeyRanges>,
}

type SpanKey = (u8, usize);

fn span_key(span: Span) -> SpanKey {
    match span {
        Span::Full => (0, 0),
        Span::Chunk(size) => (1, size),
        Span::Window(size) => (2, size),
    }
}

impl TokenLayout {
    /// One document per sequence.
    pub fn of_documents(config: &DecoderConfig, ids: Vec<u32>, sequence_len: usize) -> Self {
        let positions = (0..ids.len()).map(|n| (n % sequence_len) as u32).collect();
        Self::new(config, ids, sequence_len, positions)
    }

    /// The input tokens of a batch of packed sequences.
    pub fn of_batch(config: &DecoderConfig, batch: &DistillBatch) -> Self {
        let length = batch.seq_len();
        let mut ids = Vec::with_capacity(batch.row_count());
        let mut positions: Vec<u32> = Vec::with_capacity(batch.row_count());
        for sequence in &batch.sequences {
            ids.extend_from_slice(&sequence.tokens[..length]);
            for t in 0..length {
                let goes_on =
                    t > 0 && sequence.segments[t] == sequence.segments[t - 1] && sequence.segments[t] != PADDING;
                positions.push(if goes_on { positions[positions.len() - 1] + 1 } else { 0 });
            }
        }
        Self::new(config, ids, length, positions)
    }

    fn new(config: &DecoderConfig, ids: Vec<u32>, sequence_len: usize, positions: Vec<u32>) -> Self {
        let any_rotary = config.layers.iter().any(|layer| layer.rotary);
        let rotary = any_rotary.then(|| {
            let frequencies = rope::frequencies(&config.rope, config.heads.head_dim);
            RotaryTable::new(&positions, &frequencies, config.rope.pairing)
        });
        let mut ranges = HashMap::new();
        for layer in &config.layers {
            ranges.entry(span_key(layer.span)).or_insert_with(|| {
                let first_key = positions.iter().enumerate().map(|(n, &position)| {
                    let back = match layer.span {
                        Span::Full => position,
                        Span::Chunk(size) => position % size as u32,
                        Span::Window(size) => position.min(size as u32 - 1),
                    };
                    n as u32 - back
                });
                KeyRanges { first_key: Arc::new(first_key.collect()), sequence_len }
            });
        }
        TokenLayout { ids: Arc::new(ids), sequence_len, positions, rotary, ranges }
    }

    pub fn token_count(&self) -> usize {
        self.ids.len()
    }

    pub fn ranges(&self, span: Span) -> &KeyRanges {
        &self.ranges[&span_key(span)]
    }

    /// # Panics
    /// When the model has no rotary layer.
    pub fn rotary(&self) -> &RotaryTable {
        self.rotary.as_ref().expect("asked for by a rotary layer")
    }
}
