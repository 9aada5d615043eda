//! Bytes of the parts of a model, and of what works on them: arithmetic that [`budget`](super::budget) decides by.

use crate::models::{
    DecoderConfig,
    config::{FeedForwardConfig, LayerConfig},
};

/// Tokens per expert from which reading its weights takes less time than multiplying by them: a weight is read at
/// about 1.5 GB/s, and a core multiplies by it 5e10 times a second or more, so 64 already hide a fast disk and this many
/// a slow one.
const TOKENS_PER_EXPERT: u64 = 512;
/// Fewest tokens of a sweep that has the memory.
const LEAST_GOAL: u64 = 4096;
/// How many times more a device multiplies in the time in which a weight is read.
const DEVICE_FACTOR: u64 = 64;
/// Blocks that the head is cut into where it does not fit, at most: each is read once for every piece of rows.
pub(super) const HEAD_BLOCKS: u64 = 64;
/// Fewest rows of logits at once where the head is read in blocks.
pub(super) const BLOCK_ROWS: u64 = 16;

/// What a rank of several takes beside what one device would.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Beside {
    /// Bytes of a token of a batch: rows on their way.
    pub batch_token: u64,
    /// Bytes of a token of a sweep, wherever hidden states are.
    pub sweep_token: u64,
    /// Rows of hidden states for each token of a sweep.
    pub states: u64,
    /// Ids of other ranks whose logits are gathered.
    pub gathered_ids: u64,
}

/// Bytes of one weight.
#[derive(Debug, Clone, Copy)]
pub(super) struct WeightBytes {
    /// In the form that is multiplied by.
    pub kept: u64,
    /// While it is turned from its stored form into that one, beside it.
    pub reading: u64,
}

/// Bytes of the parts of a model.
pub(super) struct Parts<'a> {
    pub config: &'a DecoderConfig,
    pub width: u64,
    pub reading: u64,
    pub seq_len: u64,
    pub threads: u64,
    pub beside: Beside,
}

impl Parts<'_> {
    pub(super) fn hidden(&self) -> u64 {
        self.config.hidden_size as u64
    }

    /// What is loaded of a layer as one part: all of a dense one, or all but its routed experts.
    pub(super) fn layer(&self, layer: &LayerConfig) -> u64 {
        let (heads, hidden) = (self.config.heads, self.hidden());
        let (query, key) = ((heads.query_heads * heads.head_dim) as u64, (heads.key_heads * heads.head_dim) as u64);
        let (router, width) = match layer.feed_forward {
            FeedForwardConfig::Dense { width } => (0, width as u64),
            FeedForwardConfig::Experts { width, expert_count, .. } => (expert_count as u64, width as u64),
        };
        // Norms and biases stay f32.
        self.width * hidden * (2 * query + 2 * key + router + 3 * width) + 4 * (4 * hidden + query + 3 * key)
    }

    pub(super) fn expert(&self, layer: &LayerConfig) -> u64 {
        match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { width, .. } => self.width * 3 * self.hidden() * width as u64,
        }
    }

    /// The most weights that are in memory at once: what is multiplied by, what is read ahead, and the bytes of the
    /// largest matrix while it is turned from its stored form into the one in memory.
    pub(super) fn weights(&self) -> u64 {
        let layers = &self.config.layers;
        let next = |index: usize| layers.get(index + 1).map_or(0, |layer| self.layer(layer));
        let at_once = layers.iter().enumerate().map(|(index, layer)| {
            let (own, expert) = (self.layer(layer), self.expert(layer));
            own + expert + expert.max(next(index))
        });
        at_once.max().unwrap_or(0) + self.being_read()
    }

    /// The last layer's part of that, without anything ahead.
    pub(super) fn last_layer(&self) -> u64 {
        self.config.layers.last().map_or(0, |layer| self.layer(layer) + self.expert(layer))
    }

    /// What a sweep begins with, while it is read.
    pub(super) fn first_layer(&self) -> u64 {
        self.config.layers.first().map_or(0, |layer| self.layer(layer)) + self.being_read()
    }

    /// The stored form of the largest matrix.
    pub(super) fn being_read(&self) -> u64 {
        let matrix = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { width } => self.hidden() * width as u64,
            FeedForwardConfig::Experts { width, .. } => 2 * self.hidden() * width as u64,
        });
        let query = self.hidden() * (self.config.heads.query_heads * self.config.heads.head_dim) as u64;
        self.reading * matrix.max().unwrap_or(0).max(query)
    }

    /// Bytes that one token of a batch takes while it passes a layer.
    pub(super) fn token_scratch(&self) -> u64 {
        let (heads, hidden) = (self.config.heads, self.hidden());
        let (query, key) = ((heads.query_heads * heads.head_dim) as u64, (heads.key_heads * heads.head_dim) as u64);
        let attention = 6 * hidden + 5 * query + 6 * key + 2 * heads.head_dim as u64;
        let feed_forward = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { width } => 5 * hidden + 3 * width as u64,
            FeedForwardConfig::Experts { width, expert_count, .. } => {
                7 * hidden + 4 * width as u64 + 3 * expert_count as u64
            }
        });
        // Half more than the four bytes of a number, for what an allocator cannot use.
        6 * (attention.max(feed_forward.max().unwrap_or(0)) + 16) + self.beside.batch_token
    }

    /// The batch's scratch, with the scores of attention on each thread.
    pub(super) fn scratch(&self, tokens: u64) -> u64 {
        tokens * self.token_scratch() + self.threads * 64 * self.seq_len * 4
    }

    /// Bytes that one token of a sweep takes: its hidden states, unless spilled, and what is known of it beside them.
    pub(super) fn sweep_token(&self, spill: bool) -> u64 {
        let chosen = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { chosen, .. } => chosen as u64,
        });
        let chosen = chosen.max().unwrap_or(0);
        // Where several experts are added up, their sum is kept apart from the hidden states.
        let rows = self.beside.states + if chosen > 1 { 2 } else { 1 };
        let states = if spill { 0 } else { 4 * self.hidden() * rows };
        states + 48 + 12 * chosen + self.beside.sweep_token
    }

    /// Some rows of the head, and their stored form while they are read.
    pub(super) fn head(&self, ids: u64) -> u64 {
        (self.width + self.reading) * self.hidden() * ids
    }

    /// Bytes of `rows` rows of logits, and of what chooses from them.
    pub(super) fn logits(&self, rows: u64) -> u64 {
        let vocab = self.config.vocab_size as u64;
        rows * (8 * (vocab + self.beside.gathered_ids) + 12 * self.hidden()) + self.threads * 12 * vocab
    }

    /// The least that the head takes: two blocks, one of them being read, and few rows.
    pub(super) fn least_head(&self) -> u64 {
        let vocab = self.config.vocab_size as u64;
        let blocks = 2 * self.head(vocab.div_ceil(HEAD_BLOCKS)) + self.logits(BLOCK_ROWS);
        blocks.min(self.head(vocab) + self.logits(1))
    }

    /// Tokens of a sweep that is long enough.
    pub(super) fn goal(&self, host: bool) -> u64 {
        let spread = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 1,
            FeedForwardConfig::Experts { expert_count, chosen, .. } => (expert_count / chosen) as u64,
        });
        let goal = (TOKENS_PER_EXPERT * spread.max().unwrap_or(1)).max(LEAST_GOAL);
        if host { goal } else { goal * DEVICE_FACTOR }
    }
}
