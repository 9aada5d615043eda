//! One deterministic order of packed sequences, which can be left and taken up again at any sequence.
//!
//! Documents are taken from the source that is furthest behind its share of the tokens given so far: no source is ever
//! more than one document ahead of its share. One that has run out drops out, and the others keep their proportions.

use super::amount::{deserialize_count, deserialize_optional_count};
use super::packing::Packer;
use super::source::{CHUNK_BYTES, DataSource, OpenSource, open_all};
use super::split::{HeldOut, Side, Split, identity};
use super::stream::{DocumentStream, Shuffle, StreamPosition};
use crate::error::{Error, Result};
use crate::targets::PackedSequence;
use crate::tokenizer::Tokenizer;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

/// Of large JSONL and parquet files; a window takes chunks until it is full.
const CHUNKS_PER_WINDOW: u64 = 16;
/// Smaller windows would make lists of chunks longer than the data.
const LEAST_WINDOW: u64 = 4000;

/// What is read, in what proportions, and how it is cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    pub sources: Vec<DataSource>,
    /// Predictions per sequence.
    pub seq_len: usize,
    /// Stop once the sequences given have so many predictions in all: after `ceil(tokens / seq_len)` sequences.
    /// Without it, when the sources run out.
    #[serde(default, deserialize_with = "deserialize_optional_count", skip_serializing_if = "Option::is_none")]
    pub tokens: Option<u64>,
    #[serde(default, skip_serializing_if = "HeldOut::is_none")]
    pub held_out: HeldOut,
    /// How often each source may be read; a source that has been read so often drops out.
    #[serde(default = "one_epoch", deserialize_with = "deserialize_count")]
    pub epochs: u64,
    /// Decides the shuffles and the held-out documents.
    #[serde(default)]
    pub seed: u64,
    /// Bytes of text shuffled together, for each source; what the loader keeps in memory. Sources no larger than this
    /// are shuffled fully.
    #[serde(default = "default_window", deserialize_with = "deserialize_count")]
    pub shuffle_window: u64,
}

fn one_epoch() -> u64 {
    1
}

fn default_window() -> u64 {
    CHUNKS_PER_WINDOW * CHUNK_BYTES
}

impl DataConfig {
    /// One pass over the sources, nothing held out, seed 0.
    pub fn new(sources: Vec<DataSource>, seq_len: usize) -> DataConfig {
        DataConfig {
            sources,
            seq_len,
            tokens: None,
            held_out: HeldOut::None,
            epochs: one_epoch(),
            seed: 0,
            shuffle_window: default_window(),
        }
    }

    /// The same, all relative paths taken as relative to `folder`.
    pub fn relative_to(mut self, folder: &Path) -> DataConfig {
        let relative =
            |sources: Vec<DataSource>| sources.into_iter().map(|source| source.relative_to(folder)).collect();
        self.sources = relative(self.sources);
        if let HeldOut::Sources(sources) = self.held_out {
            self.held_out = HeldOut::Sources(relative(sources));
        }
        self
    }

    /// The held-out rule in a form that costs no pass over the data and that added sources do not change: an amount of
    /// tokens becomes the share it comes to. What a plan should keep.
    pub fn resolve_held_out(&self, tokenizer: &Tokenizer) -> Result<HeldOut> {
        let sources = self.open()?;
        Ok(Split::find(&self.held_out, self.seed, &sources, tokenizer)?.fixed(&self.held_out))
    }

    /// Whether every source is there and can be opened, held-out ones too. Reads no text.
    ///
    /// # Errors
    /// A source that does not exist, is of an unknown kind or contradicts itself, and nonsensical settings.
    pub fn check_files(&self) -> Result<()> {
        self.open()?;
        if let HeldOut::Sources(sources) = &self.held_out {
            open_all(sources, CHUNK_BYTES)?;
        }
        Ok(())
    }

    fn open(&self) -> Result<Vec<OpenSource>> {
        if self.seq_len == 0 {
            return Err(Error::usage("`seq_len` is 0", "a sequence predicts at least one token; 512 is a usual start"));
        }
        if self.epochs == 0 {
            return Err(Error::usage("`epochs` is 0", "each source is read at least once"));
        }
        if self.shuffle_window < LEAST_WINDOW {
            let problem = format!("`shuffle_window` is {} bytes", self.shuffle_window);
            return Err(Error::usage(problem, "give it 4k at least; 64M is usual"));
        }
        // A window of many chunks from everywhere in the source mixes far better than one long stretch of it.
        open_all(&self.sources, self.shuffle_window / CHUNKS_PER_WINDOW)
    }
}

/// Where a loader stands, between two sequences. Belongs in every training checkpoint and cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    pub side: Side,
    /// Sequences given so far.
    pub sequences: u64,
    /// Each source, before the document that the next sequence starts with.
    pub streams: Vec<StreamPosition>,
    /// The document that goes on in the next sequence, if one does.
    pub document: Option<DocumentPosition>,
    /// Of configuration, tokenizer and sizes of the files.
    pub fingerprint: String,
}

/// A document that is partly given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentPosition {
    /// Number of its source.
    pub source: u64,
    /// The token that the next sequence starts from.
    pub token: u64,
}

/// Gives the packed sequences of one side of the data in one fixed order.
#[derive(Debug)]
pub struct DataLoader {
    config: DataConfig,
    tokenizer: Tokenizer,
    split: Arc<Split>,
    side: Side,
    streams: Vec<DocumentStream>,
    is_over: Vec<bool>,
    /// Held-out documents given; copies are left out.
    seen: HashSet<u128>,
    packer: Packer,
    document: Option<Document>,
    sequence_count: u64,
    fingerprint: String,
}

/// A document on its way into sequences.
#[derive(Debug)]
struct Document {
    source: usize,
    tokens: Vec<u32>,
    next: usize,
    /// Its source before it was taken.
    before: StreamPosition,
}

impl DataLoader {
    /// The training side, from its first sequence.
    ///
    /// # Errors
    /// A source that does not exist or cannot be read, nonsensical settings, or (when tokens are held out, for which
    /// all data is read once) a record that cannot be used.
    pub fn new(config: &DataConfig, tokenizer: &Tokenizer) -> Result<DataLoader> {
        DataLoader::open(config, tokenizer, Side::Training)
    }

    /// The held-out side: each distinct document once, source after source in file order, never shuffled. The token
    /// budget, the epochs and the weights concern training alone.
    pub fn held_out(config: &DataConfig, tokenizer: &Tokenizer) -> Result<DataLoader> {
        DataLoader::open(config, tokenizer, Side::HeldOut)
    }

    /// Goes on from a position, on the side it was saved on, giving what the loader that saved it would have given.
    ///
    /// The token budget may be another than before; everything else has to be the same.
    pub fn resume(config: &DataConfig, tokenizer: &Tokenizer, position: &Position) -> Result<DataLoader> {
        let mut loader = DataLoader::open(config, tokenizer, position.side)?;
        if position.fingerprint != loader.fingerprint || position.streams.len() != loader.streams.len() {
            return Err(Error::Mismatch {
                what: "the data to go on with".into(),
                left_name: "the saved position".into(),
                left: short(&position.fingerprint),
                right_name: "this run".into(),
                right: short(&loader.fingerprint),
                tip: "go on with the same sources, tokenizer, seed and lengths, or start anew".into(),
            });
        }
        if position.side == Side::HeldOut {
            // Which copies were left out is not part of the position; a held-out set is small enough to read again.
            while loader.sequence_count < position.sequences && loader.next_sequence()?.is_some() {}
            return Ok(loader);
        }
        for (stream, saved) in loader.streams.iter_mut().zip(&position.streams) {
            stream.seek(*saved);
        }
        loader.sequence_count = position.sequences;
        if let Some(DocumentPosition { source, token }) = position.document {
            let stale = || {
                let tip = "start anew, or put the files back as they were";
                Error::usage("the saved position is beyond the end of a document", tip)
            };
            let source =
                usize::try_from(source).ok().filter(|&source| source < loader.streams.len()).ok_or_else(stale)?;
            let document = loader.take_from(source)?.ok_or_else(stale)?;
            if token as usize >= document.tokens.len() {
                return Err(stale());
            }
            loader.document = Some(Document { next: token as usize, ..document });
        }
        Ok(loader)
    }

    fn open(config: &DataConfig, tokenizer: &Tokenizer, side: Side) -> Result<DataLoader> {
        let mut sources = config.open()?;
        let mut split = Split::find(&config.held_out, config.seed, &sources, tokenizer)?;
        let shuffle = Shuffle { seed: config.seed, epochs: config.epochs, window_bytes: config.shuffle_window };
        let shuffle = match side {
            Side::Training => shuffle,
            Side::HeldOut => Shuffle { epochs: 1, ..shuffle },
        };
        let fingerprint = fingerprint(config, tokenizer, &split, side, &sources, |source, file| {
            Ok(source.sizes[file].to_le_bytes().to_vec())
        })?;
        match (side, &config.held_out) {
            (Side::HeldOut, HeldOut::None) => {
                return Err(Error::usage("nothing is held out", "set `held_out`, for example to \"1%\" or \"20M\""));
            }
            (Side::HeldOut, HeldOut::Sources(declared)) => {
                sources = open_all(declared, CHUNK_BYTES)?;
                // Of the held-out files everything counts, with no set of their own texts to look it up in.
                split = Split::everything();
            }
            _ => {}
        }
        let split = Arc::new(split);
        let streams: Vec<DocumentStream> = sources
            .into_iter()
            .enumerate()
            .map(|(number, source)| DocumentStream::new(source, number, split.clone(), side, shuffle))
            .collect();
        Ok(DataLoader {
            config: config.clone(),
            tokenizer: tokenizer.clone(),
            side,
            is_over: vec![false; streams.len()],
            streams,
            split,
            seen: HashSet::new(),
            packer: Packer::new(config.seq_len, tokenizer.document_end().unwrap_or(0)),
            document: None,
            sequence_count: 0,
            fingerprint,
        })
    }

    /// Predictions per sequence.
    pub fn seq_len(&self) -> usize {
        self.config.seq_len
    }

    /// Sequences that the token budget allows, if there is one; the data may run out before.
    pub fn sequence_limit(&self) -> Option<u64> {
        let budget = if self.side == Side::Training { self.config.tokens } else { None };
        budget.map(|tokens| tokens.div_ceil(self.config.seq_len as u64))
    }

    /// Tokens given so far by each source, document tokens included: what the weights divide.
    pub fn source_tokens(&self) -> Vec<u64> {
        self.streams.iter().map(|stream| stream.position().tokens).collect()
    }

    /// The next sequence; `None` when the budget is spent or the data has run out. Only the very last one has padding.
    ///
    /// # Errors
    /// A record that cannot be used, and a side without any document.
    pub fn next_sequence(&mut self) -> Result<Option<PackedSequence>> {
        if self.sequence_limit().is_some_and(|limit| self.sequence_count >= limit) {
            return Ok(None);
        }
        while !self.packer.is_full() {
            if self.document.is_none() {
                self.document = self.next_document()?;
            }
            let Some(document) = &mut self.document else { break };
            match self.packer.add(&document.tokens, document.next) {
                Some(next) => document.next = next,
                None => self.document = None,
            }
        }
        let sequence = self.packer.take();
        match sequence {
            Some(_) => self.sequence_count += 1,
            None if self.sequence_count == 0 => {
                let what = if self.side == Side::Training { "to train on" } else { "held out" };
                return Err(Error::usage(
                    format!("there is no document {what}"),
                    "check `held_out` and the sources, or use more and smaller documents",
                ));
            }
            None => {}
        }
        Ok(sequence)
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        while let Some(source) = self.next_source() {
            match self.take_from(source)? {
                Some(document) => {
                    if self.side == Side::Training || self.seen.insert(identity(bytemuck::cast_slice(&document.tokens)))
                    {
                        return Ok(Some(document));
                    }
                }
                None => self.is_over[source] = true,
            }
        }
        Ok(None)
    }

    fn take_from(&mut self, source: usize) -> Result<Option<Document>> {
        let before = self.streams[source].position();
        let tokens = self.streams[source].next(&self.tokenizer)?;
        Ok(tokens.map(|tokens| Document { source, tokens, next: 0, before }))
    }

    /// Training: the source with the fewest tokens for its weight, the first of equals. Held out: the first.
    fn next_source(&self) -> Option<usize> {
        let mut open = (0..self.streams.len()).filter(|&source| !self.is_over[source]);
        if self.side == Side::HeldOut {
            return open.next();
        }
        let share =
            |source: usize| self.streams[source].position().tokens as f64 / self.streams[source].source.declared.weight;
        open.min_by(|&left, &right| share(left).total_cmp(&share(right)))
    }

    /// Where this loader stands, for [`DataLoader::resume`].
    pub fn position(&self) -> Position {
        let mut streams: Vec<StreamPosition> = self.streams.iter().map(DocumentStream::position).collect();
        let document = self.document.as_ref().map(|document| {
            streams[document.source] = document.before;
            DocumentPosition { source: document.source as u64, token: document.next as u64 }
        });
        let fingerprint = self.fingerprint.clone();
        Position { side: self.side, sequences: self.sequence_count, streams, document, fingerprint }
    }

    /// Hex BLAKE3 of everything that decides the sequences: sources in their order with weights and fields, lengths,
    /// seed, held-out rule, side, tokenizer, and the content of every file (all of which are read).
    ///
    /// Not of file names and folders, nor of the token budget: a larger budget gives the same sequences and then more.
    pub fn data_fingerprint(&self) -> Result<String> {
        let sources = self.config.open()?;
        fingerprint(&self.config, &self.tokenizer, &self.split, self.side, &sources, |source, file| {
            let path = &source.files[file];
            let mut hasher = blake3::Hasher::new();
            hasher.update_mmap_rayon(path).map_err(Error::io(path))?;
            Ok(hasher.finalize().as_bytes().to_vec())
        })
    }
}

fn short(fingerprint: &str) -> String {
    fingerprint.chars().take(12).collect()
}

/// Of what decides the sequences of this side, and of nothing else: a held-out set that is other files stays the same
/// when the training data changes.
fn fingerprint(
    config: &DataConfig,
    tokenizer: &Tokenizer,
    split: &Split,
    side: Side,
    sources: &[OpenSource],
    file_identity: impl Fn(&OpenSource, usize) -> Result<Vec<u8>>,
) -> Result<String> {
    let held_out_sources = match &config.held_out {
        HeldOut::Sources(declared) => open_all(declared, CHUNK_BYTES)?,
        _ => vec![],
    };
    let is_training = side == Side::Training;
    let is_read = is_training || held_out_sources.is_empty();
    let cut = if held_out_sources.is_empty() { split.cut } else { 0 };
    let numbers = [
        side as u64,
        config.seq_len as u64,
        if is_read { config.seed } else { 0 },
        cut,
        if is_training { config.epochs } else { 0 },
        if is_training { config.shuffle_window } else { 0 },
    ];
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"limbeck data 1").update(tokenizer.fingerprint().as_bytes());
    for token in [tokenizer.document_start(), tokenizer.document_end()] {
        hasher.update(&token.map_or(u64::MAX, u64::from).to_le_bytes());
    }
    numbers.iter().for_each(|number| {
        hasher.update(&number.to_le_bytes());
    });
    let read = if is_read { sources } else { &[] };
    for (part, sources) in [read, &held_out_sources].into_iter().enumerate() {
        for source in sources {
            let declared = &source.declared;
            let weight = if is_training { declared.weight } else { 0.0 };
            let settings = (part, source.kind as u8, weight, source.field(), &declared.document_separator);
            hasher.update(serde_json::to_string(&settings).expect("plain values").as_bytes());
            hasher.update(&(source.files.len() as u64).to_le_bytes());
            for file in 0..source.files.len() {
                let identity = file_identity(source, file)?;
                hasher.update(&(identity.len() as u64).to_le_bytes()).update(&identity);
            }
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}
