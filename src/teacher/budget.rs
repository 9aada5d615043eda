//! How much of everything fits into a memory budget: tokens of a sweep, tokens of a batch, blocks of the head, and
//! whether hidden states go to a file. Arithmetic only. What is decided here changes no number that is computed.

use std::ops::Range;
use std::path::PathBuf;

use limbeck_kernels::packed_matmul::Numbers;

use super::{
    part_bytes::{BLOCK_ROWS, Beside, HEAD_BLOCKS, Parts, WeightBytes},
    resident::HEAD_ROWS,
};
use crate::{
    error::{Error, Result},
    models::DecoderConfig,
};

/// Sweeps longer than this many times the goal gain nothing, and what is interrupted loses a sweep.
const MOST_GOALS: u64 = 16;

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
    /// What its matrices are multiplied in.
    pub numbers: Numbers,
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
    let parts = Parts { config, width: weight, reading: weight, seq_len, threads, beside: Beside::default() };
    vec![
        ("weights", weight * config.parameter_counts().0),
        // What is likely, where a budget counts half more to be safe.
        ("activations", parts.scratch(batch_tokens) * 2 / 3 + 8 * parts.hidden() * batch_tokens),
        ("logits", parts.logits(HEAD_ROWS as u64) / 2),
    ]
}

/// What a streamed teacher is likely to take, and how it goes over the tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamPlan {
    /// Less than its budget, which it may not pass even where every part is as large as it can be.
    pub memory: MemoryParts,
    pub sweep_tokens: u64,
    /// Times that the head is read for one sweep: where it is read in blocks, every piece of rows reads all of them.
    pub head_reads: u64,
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
) -> Result<StreamPlan> {
    let bytes = WeightBytes { kept: weight, reading: weight };
    let fit = Fit::new(config, seq_len as usize, settings, bytes, true, Beside::default())?;
    let threads = rayon::current_num_threads() as u64;
    let parts = Parts { config, width: weight, reading: weight, seq_len, threads, beside: Beside::default() };
    let taken: u64 = settings.taken.iter().map(|(_, bytes)| bytes).sum();
    let sweep_tokens = fit.sweep_sequences as u64 * seq_len;
    // Likely, as with resident_memory.
    let scratch = parts.scratch(fit.batch_sequences as u64 * seq_len) * 2 / 3;
    let block = parts.head(fit.head_blocks[0].len() as u64);
    let in_blocks = fit.head_blocks.len() > 1;
    let head = block * if in_blocks { 2 } else { 1 } + parts.logits(fit.head_rows as u64) / 2;
    let head_beside_layer = if fit.head_ahead { parts.last_layer() + scratch + block } else { 0 };
    let working = (parts.weights() + scratch).max(head).max(head_beside_layer).min(fit.fixed - taken);
    Ok(StreamPlan {
        memory: vec![("weights and what works", working), ("states of the sweep", fit.sweep)],
        sweep_tokens,
        head_reads: if in_blocks { sweep_tokens.div_ceil(fit.head_rows as u64) } else { 1 },
    })
}

impl Fit {
    /// `host`: whether the processor computes. `beside`: what this is needed for beside one device's work.
    ///
    /// # Errors
    /// When not even one sequence fits: which parts take how much, and the least that would do.
    pub(super) fn new(
        config: &DecoderConfig,
        seq_len: usize,
        settings: &StreamSettings,
        weight: WeightBytes,
        host: bool,
        beside: Beside,
    ) -> Result<Fit> {
        let length = seq_len as u64;
        let threads = rayon::current_num_threads() as u64;
        let parts = Parts { config, width: weight.kept, reading: weight.reading, seq_len: length, threads, beside };
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
            numbers: Numbers::F32,
            memory: mib << 20,
            taken: vec![("the program", 100 << 20)],
            batch_tokens: 4096,
            sweep_tokens: None,
            spill,
            spill_dir: PathBuf::new(),
        }
    }

    fn scout(mib: u64, spill: Spill) -> Result<Fit> {
        let config = shapes::scout().decoder(Path::new("scout")).unwrap();
        Fit::new(&config, 2048, &settings(mib, spill), BF16, true, Beside::default())
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
            Fit::new(
                &config,
                2048,
                &StreamSettings { memory: bytes, ..settings(0, spill) },
                BF16,
                true,
                Beside::default(),
            )
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
