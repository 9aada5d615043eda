//! How much of everything fits into a memory budget: tokens of a sweep, tokens of a batch, blocks of the head, and
//! whether hidden states go to a file. Arithmetic only. What is decided here changes no number that is computed.

use std::ops::Range;
use std::path::PathBuf;

use super::resident::HEAD_ROWS;
use crate::{
    error::{Error, Result},
    models::{
        DecoderConfig,
        config::{FeedForwardConfig, LayerConfig},
    },
};

/// Tokens per expert from which reading its weights takes less time than multiplying by them: a weight is read at
/// about 1.5 GB/s, and a core multiplies by it 5e10 times a second or more, so 64 already hide a fast disk and this many
/// a slow one.
const TOKENS_PER_EXPERT: u64 = 512;
/// Fewest tokens of a sweep that has the memory.
const LEAST_GOAL: u64 = 4096;
/// How many times more a device multiplies in the time in which a weight is read.
const DEVICE_FACTOR: u64 = 64;
/// Sweeps longer than this many times the goal gain nothing, and what is interrupted loses a sweep.
const MOST_GOALS: u64 = 16;
/// Blocks that the head is cut into where it does not fit, at most: each is read once for every piece of rows.
const HEAD_BLOCKS: u64 = 64;
/// Fewest rows of logits at once where the head is read in blocks.
const BLOCK_ROWS: u64 = 16;

/// Where the hidden states of a sweep are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Spill {
    /// In memory where that lets a sweep be long enough to hide the reading of weights, else in a file.
    #[default]
    Auto,
    Never,
    Always,
}

/// What a streamed teacher may take, and where it may put what does not fit.
#[derive(Debug, Clone)]
pub struct StreamSettings {
    /// Bytes of memory for everything.
    pub memory: u64,
    /// What of these is taken already or needed beside the teacher, each part by its name.
    pub taken: Vec<(&'static str, u64)>,
    /// Most tokens in one forward pass of a layer; at least one whole sequence is always run.
    pub batch_tokens: u64,
    /// Most tokens in one sweep, at least one whole sequence; chosen by the memory if not given.
    pub sweep_tokens: Option<u64>,
    pub spill: Spill,
    /// The directory of the file for hidden states that do not fit into memory.
    pub spill_dir: PathBuf,
}

/// What fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fit {
    pub sweep_sequences: usize,
    pub batch_sequences: usize,
    pub spill: bool,
    /// Token ids of each block of the head; one block stays in memory while all rows pass.
    pub head_blocks: Vec<Range<usize>>,
    /// Rows of logits held at once.
    pub head_rows: usize,
    /// Whether the head's first block fits beside the last layer.
    pub head_ahead: bool,
    /// Whether what a sweep begins with fits beside the head's last block.
    pub next_sweep_ahead: bool,
    /// Bytes beside the hidden states of a sweep and what is known of its tokens.
    pub fixed: u64,
    /// Bytes of these.
    pub sweep: u64,
}

/// Bytes that a teacher takes of the processor's memory, each part by its name.
pub type MemoryParts = Vec<(&'static str, u64)>;

/// What a resident teacher takes when `batch_tokens` in sequences of `seq_len` run at once; weights have `weight` bytes.
pub fn resident_memory(config: &DecoderConfig, seq_len: u64, batch_tokens: u64, weight: u64) -> MemoryParts {
    let threads = rayon::current_num_threads() as u64;
    let parts = Parts { config, width: weight, reading: weight, seq_len, threads };
    vec![
        ("weights", weight * config.parameter_counts().0),
        // What is likely, where a budget counts half more to be safe.
        ("activations", parts.scratch(batch_tokens) * 2 / 3 + 8 * parts.hidden() * batch_tokens),
        ("logits", parts.logits(HEAD_ROWS as u64) / 2),
    ]
}

/// What a streamed teacher takes, and the tokens of its sweep.
///
/// # Errors
/// When not even one sequence fits, as the teacher itself says it.
pub fn streamed_memory(
    config: &DecoderConfig,
    seq_len: u64,
    settings: &StreamSettings,
    weight: u64,
) -> Result<(MemoryParts, u64)> {
    let fit = Fit::new(config, seq_len as usize, settings, WeightBytes { kept: weight, reading: weight }, true)?;
    let taken: u64 = settings.taken.iter().map(|(_, bytes)| bytes).sum();
    let parts = vec![("weights and what works", fit.fixed - taken), ("states of the sweep", fit.sweep)];
    Ok((parts, fit.sweep_sequences as u64 * seq_len))
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
struct Parts<'a> {
    config: &'a DecoderConfig,
    width: u64,
    reading: u64,
    seq_len: u64,
    threads: u64,
}

impl Parts<'_> {
    fn hidden(&self) -> u64 {
        self.config.hidden_size as u64
    }

    /// What is loaded of a layer as one part: all of a dense one, or all but its routed experts.
    fn layer(&self, layer: &LayerConfig) -> u64 {
        let (heads, hidden) = (self.config.heads, self.hidden());
        let (query, key) = ((heads.query_heads * heads.head_dim) as u64, (heads.key_heads * heads.head_dim) as u64);
        let (router, width) = match layer.feed_forward {
            FeedForwardConfig::Dense { width } => (0, width as u64),
            FeedForwardConfig::Experts { width, expert_count, .. } => (expert_count as u64, width as u64),
        };
        // Norms and biases stay f32.
        self.width * hidden * (2 * query + 2 * key + router + 3 * width) + 4 * (4 * hidden + query + 3 * key)
    }

    fn expert(&self, layer: &LayerConfig) -> u64 {
        match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { width, .. } => self.width * 3 * self.hidden() * width as u64,
        }
    }

    /// The most weights that are in memory at once: what is multiplied by, what is read ahead, and the bytes of the
    /// largest matrix while it is turned from its stored form into the one in memory.
    fn weights(&self) -> u64 {
        let layers = &self.config.layers;
        let next = |index: usize| layers.get(index + 1).map_or(0, |layer| self.layer(layer));
        let at_once = layers.iter().enumerate().map(|(index, layer)| {
            let (own, expert) = (self.layer(layer), self.expert(layer));
            own + expert + expert.max(next(index))
        });
        at_once.max().unwrap_or(0) + self.being_read()
    }

    /// The last layer's part of that, without anything ahead.
    fn last_layer(&self) -> u64 {
        self.config.layers.last().map_or(0, |layer| self.layer(layer) + self.expert(layer))
    }

    /// What a sweep begins with, while it is read.
    fn first_layer(&self) -> u64 {
        self.config.layers.first().map_or(0, |layer| self.layer(layer)) + self.being_read()
    }

    /// The stored form of the largest matrix.
    fn being_read(&self) -> u64 {
        let matrix = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { width } => self.hidden() * width as u64,
            FeedForwardConfig::Experts { width, .. } => 2 * self.hidden() * width as u64,
        });
        let query = self.hidden() * (self.config.heads.query_heads * self.config.heads.head_dim) as u64;
        self.reading * matrix.max().unwrap_or(0).max(query)
    }

    /// Bytes that one token of a batch takes while it passes a layer.
    fn token_scratch(&self) -> u64 {
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
        6 * (attention.max(feed_forward.max().unwrap_or(0)) + 16)
    }

    /// The batch's scratch, with the scores of attention on each thread.
    fn scratch(&self, tokens: u64) -> u64 {
        tokens * self.token_scratch() + self.threads * 64 * self.seq_len * 4
    }

    /// Bytes that one token of a sweep takes: its hidden states, unless spilled, and what is known of it beside them.
    fn sweep_token(&self, spill: bool) -> u64 {
        let chosen = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 0,
            FeedForwardConfig::Experts { chosen, .. } => chosen as u64,
        });
        let chosen = chosen.max().unwrap_or(0);
        // Where several experts are added up, their sum is kept apart from the hidden states.
        let states = if spill { 0 } else { 4 * self.hidden() * if chosen > 1 { 2 } else { 1 } };
        states + 48 + 12 * chosen
    }

    /// Some rows of the head, and their stored form while they are read.
    fn head(&self, ids: u64) -> u64 {
        (self.width + self.reading) * self.hidden() * ids
    }

    /// Bytes of `rows` rows of logits, and of what chooses from them.
    fn logits(&self, rows: u64) -> u64 {
        let vocab = self.config.vocab_size as u64;
        rows * (8 * vocab + 12 * self.hidden()) + self.threads * 12 * vocab
    }

    /// The least that the head takes: two blocks, one of them being read, and few rows.
    fn least_head(&self) -> u64 {
        let vocab = self.config.vocab_size as u64;
        let blocks = 2 * self.head(vocab.div_ceil(HEAD_BLOCKS)) + self.logits(BLOCK_ROWS);
        blocks.min(self.head(vocab) + self.logits(1))
    }

    /// Tokens of a sweep that is long enough.
    fn goal(&self, host: bool) -> u64 {
        let spread = self.config.layers.iter().map(|layer| match layer.feed_forward {
            FeedForwardConfig::Dense { .. } => 1,
            FeedForwardConfig::Experts { expert_count, chosen, .. } => (expert_count / chosen) as u64,
        });
        let goal = (TOKENS_PER_EXPERT * spread.max().unwrap_or(1)).max(LEAST_GOAL);
        if host { goal } else { goal * DEVICE_FACTOR }
    }
}

impl Fit {
    /// `host`: whether the processor computes.
    ///
    /// # Errors
    /// When not even one sequence fits: which parts take how much, and the least that would do.
    pub(super) fn new(
        config: &DecoderConfig,
        seq_len: usize,
        settings: &StreamSettings,
        weight: WeightBytes,
        host: bool,
    ) -> Result<Fit> {
        let length = seq_len as u64;
        let threads = rayon::current_num_threads() as u64;
        let parts = Parts { config, width: weight.kept, reading: weight.reading, seq_len: length, threads };
        let taken: u64 = settings.taken.iter().map(|(_, bytes)| bytes).sum();
        let (weights, head) = (parts.weights(), parts.least_head());
        let layers = weights + parts.scratch(length);
        let may_spill = settings.spill != Spill::Never;
        let one_sequence = length * parts.sweep_token(may_spill);
        let least = taken + one_sequence + layers.max(head);
        if settings.memory < least {
            let mut names = settings.taken.clone();
            if layers >= head {
                names.extend([("two parts of its weights", weights), ("one sequence's scratch", layers - weights)]);
            } else {
                names.push(("blocks of its head", head));
            }
            names.push(("one sequence's hidden states", one_sequence));
            return Err(too_small(settings, least, names));
        }

        // Half of what is left goes to what makes a layer and the head efficient, as far as they gain by it.
        let free = settings.memory - least;
        let batch = settings.batch_tokens.max(length);
        let whole_head = parts.head(config.vocab_size as u64) + parts.logits(HEAD_ROWS as u64) + parts.first_layer();
        let head_beside_layer = parts.last_layer() + parts.scratch(batch) + parts.head(config.vocab_size as u64);
        let useful = (weights + parts.scratch(batch)).max(whole_head).max(head_beside_layer);
        let phase = useful.min(layers.max(head) + free / 2);
        let batch_tokens = (phase - weights - parts.scratch(0)) / parts.token_scratch();
        let batch_sequences = (batch_tokens.min(batch) / length).max(1);
        let (head_blocks, head_rows) = head_pieces(&parts, phase);
        let block = parts.head(head_blocks[0].len() as u64);
        let head_ahead = parts.last_layer() + parts.scratch(batch_sequences * length) + block <= phase;
        let next_sweep_ahead = block + parts.logits(head_rows as u64) + parts.first_layer() <= phase;

        let room = settings.memory - taken - phase;
        let (in_memory, spilled) = (room / parts.sweep_token(false), room / parts.sweep_token(true));
        let goal = settings.sweep_tokens.unwrap_or_else(|| parts.goal(host)).max(length);
        let most = settings.sweep_tokens.unwrap_or(MOST_GOALS * goal).max(length);
        let spill = match settings.spill {
            Spill::Always => true,
            Spill::Never => false,
            Spill::Auto => in_memory < goal,
        };
        let sweep_tokens = match settings.spill {
            _ if !spill => in_memory.min(most),
            Spill::Always => spilled.min(most),
            _ => spilled.min(goal),
        };
        let sweep_sequences = (sweep_tokens / length).max(1);
        Ok(Fit {
            sweep_sequences: sweep_sequences as usize,
            batch_sequences: batch_sequences.min(sweep_sequences) as usize,
            spill,
            head_blocks,
            head_rows,
            head_ahead,
            next_sweep_ahead,
            fixed: taken + phase,
            sweep: sweep_sequences * length * parts.sweep_token(spill),
        })
    }
}

/// The blocks of the head and the rows of logits that fit into `room` bytes, which the least of them do.
fn head_pieces(parts: &Parts<'_>, room: u64) -> (Vec<Range<usize>>, usize) {
    let vocab = parts.config.vocab_size as u64;
    let (whole, row) = (parts.head(vocab), parts.logits(1) - parts.logits(0));
    if whole + parts.logits(1) <= room {
        let rows = (room - whole - parts.logits(0)) / row;
        let all = std::iter::once(0..vocab as usize).collect();
        return (all, rows.clamp(1, HEAD_ROWS as u64) as usize);
    }
    // Two blocks in half of the room, logits in the other: every piece of rows reads the
    // whole head.
    let blocks_room = (room / 2).clamp(2 * parts.head(vocab.div_ceil(HEAD_BLOCKS)), room - parts.logits(BLOCK_ROWS));
    let ids = (blocks_room / parts.head(2)).clamp(1, vocab);
    let rows = (room - blocks_room - parts.logits(0)) / row;
    let blocks = (0..vocab).step_by(ids as usize).map(|first| first as usize..(first + ids).min(vocab) as usize);
    (blocks.collect(), rows.max(1) as usize)
}

fn too_small(settings: &StreamSettings, least: u64, mut parts: Vec<(&'static str, u64)>) -> Error {
    parts.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let parts: Vec<String> = parts.iter().map(|(name, bytes)| format!("{name} {}", mebibytes(*bytes))).collect();
    Error::usage(
        format!(
            "the streamed teacher does not fit into {} of memory; it takes {}",
            mebibytes(settings.memory),
            parts.join(", ")
        ),
        format!("give it at least {}, by `teacher.memory`", mebibytes(least)),
    )
}

/// Bytes as recipes take them, rounded up.
fn mebibytes(bytes: u64) -> String {
    match bytes {
        ..0x10_0000 => format!("{}KiB", bytes.div_ceil(1 << 10)),
        _ => format!("{}MiB", bytes.div_ceil(1 << 20)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::llama4::shapes;

    const BF16: WeightBytes = WeightBytes { kept: 2, reading: 2 };

    fn settings(mib: u64, spill: Spill) -> StreamSettings {
        StreamSettings {
            memory: mib << 20,
            taken: vec![("the program", 100 << 20)],
            batch_tokens: 4096,
            sweep_tokens: None,
            spill,
            spill_dir: PathBuf::new(),
        }
    }

    fn scout(mib: u64, spill: Spill) -> Result<Fit> {
        Fit::new(&shapes::scout().decoder(Path::new("scout")).unwrap(), 2048, &settings(mib, spill), BF16, true)
    }

    #[test]
    fn a_scout_of_200_gb_fits_into_2_gib_and_gains_by_more() {
        let little = scout(2 << 10, Spill::Auto).unwrap();
        assert!(little.head_blocks.len() > 1, "a head of 2 GB is read in blocks");
        let ids = little.head_blocks.iter().flat_map(|block| block.clone());
        assert!(ids.eq(0..202_048), "which are all of it, in order");
        let more = scout(16 << 10, Spill::Auto).unwrap();
        assert_eq!((more.spill, more.head_blocks.len(), more.batch_sequences), (false, 1, 2));
        assert!(more.sweep_sequences * 2048 >= 8192, "{more:?}");
        assert!(
            more.head_ahead && more.next_sweep_ahead,
            "the head is read beside the last layer, and the first beside it"
        );
        let most = MOST_GOALS as usize * 8192;
        let lots = scout(512 << 10, Spill::Auto).unwrap();
        assert_eq!(lots.sweep_sequences * 2048, most, "longer sweeps gain nothing, and an interruption loses them");
    }

    #[test]
    fn hidden_states_go_to_a_file_where_sweeps_would_be_too_short() {
        let (auto, never) = (scout(2176, Spill::Auto).unwrap(), scout(2176, Spill::Never).unwrap());
        assert!(!never.spill && never.sweep_sequences * 2048 < 8192, "{never:?}");
        assert!(auto.spill && auto.sweep_sequences * 2048 == 8192, "{auto:?}");
        assert!(scout(64 << 10, Spill::Always).unwrap().spill);
    }

    #[test]
    fn what_is_too_little_is_refused_and_the_least_that_is_named_is_enough() {
        let config = shapes::scout().decoder(Path::new("scout")).unwrap();
        let fit = |bytes: u64, spill| {
            Fit::new(&config, 2048, &StreamSettings { memory: bytes, ..settings(0, spill) }, BF16, true)
        };
        for spill in [Spill::Auto, Spill::Never, Spill::Always] {
            let message = fit(1 << 30, spill).unwrap_err().to_string();
            let start = "the streamed teacher does not fit into 1024MiB of memory; it takes two parts of its weights ";
            assert!(message.starts_with(start), "{message}");
            let least = message.split("at least ").nth(1).unwrap().split("MiB").next().unwrap();
            let least = least.parse::<u64>().unwrap() << 20;
            let fits = fit(least, spill).unwrap();
            assert_eq!(fits.batch_sequences, 1);
            assert!(fit(least - (1 << 20), spill).is_err());
        }
    }
}
