//! Soft targets that other programs made, as caches: DistillKit's Parquet files, and JSON Lines with the most probable
//! tokens of each place as vLLM and axolotl have them.
//!
//! A source gives `Document`s: token ids, and for each token but the first what is known of its prediction. The rest
//! is common to all: rows are checked and completed (`rows.rs`), documents packed into sequences (`packed.rs`), sequences
//! written by the cache.
//!
//! Such files lack what a cache measures. What is put in its place is the same for every source, and the manifest's
//! `teacher.dtype` says that it was:
//! - the **tail** is one minus the sum of the kept probabilities, at least [`LEAST_TAIL`];
//! - a **label's log-probability** is that of the label where it is kept or given; else the label gets an even share of
//!   the tail, one of the ids that are not kept;
//! - a prediction of which nothing is known keeps nothing, and is even over the vocabulary: all of it is tail.

mod columns;
mod compression;
mod distillkit;
mod jsonl;
mod packed;
mod places;
mod quantized;
mod rows;

use std::path::{Path, PathBuf};

use crate::cache::{
    CacheSettings, Codec, Manifest, Selection, SoftTargetSettings, TeacherIdentity, TokenizerIdentity, write_whole,
};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
pub use compression::CompressionConfig;
pub use jsonl::RowPlace;
use packed::Sequences;
pub(crate) use places::{Entry, Place, server_places, without_infinities};
pub(crate) use rows::{CompleteRow, LARGEST_SUM, ROUNDING, complete};
pub use rows::{ImportReport, LEAST_TAIL};

/// The fingerprint in the manifest when the weights of the teacher are not at hand.
pub const NOT_KNOWN: &str = "not known";

/// What the files do not say.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The tokenizer whose ids the files hold.
    pub tokenizer: Tokenizer,
    /// Ids that the rows may name, where the teacher had more than the tokenizer.
    pub vocab_size: Option<usize>,
    pub teacher_name: String,
    /// Of the teacher's configuration and weights, if they are at hand.
    pub teacher_fingerprint: Option<String>,
    /// The temperature that the probabilities were taken at.
    pub temperature: f32,
    /// `train` or `held_out`.
    pub split: String,
    pub seq_len: usize,
    pub sequences_per_shard: usize,
    pub codec: Codec,
}

/// A text as token ids, and what is known of its predictions.
#[derive(Debug, Clone, PartialEq)]
struct Document {
    tokens: Vec<u32>,
    /// `rows[t]` is about token `t + 1`; one fewer than tokens.
    rows: Vec<Option<Row>>,
    origin: Origin,
}

/// Where a document comes from, for messages.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Origin {
    file: usize,
    /// From 1.
    record: u64,
}

/// Some most probable ids of one prediction, in any order.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Row {
    pub ids: Vec<u32>,
    pub log_probs: Vec<f32>,
    /// Of the label, when it is given though it is not among the ids.
    pub label_log_prob: Option<f32>,
}

/// What a source is, beside its documents.
struct Source {
    /// The format's name, for the manifest.
    format: &'static str,
    files: Vec<PathBuf>,
    /// Most ids in a row.
    k: usize,
    /// Everything beside the files that decides what the documents are.
    settings: String,
    /// Largest sum of a row's probabilities that is still taken for rounding.
    largest_sum: f64,
}

/// Imports DistillKit's Parquet files: a directory of them, or files in the order given.
///
/// `config` is the `compression_config.yaml` they were written with; by default the one in their directory. Rows are decoded
/// as DistillKit decodes them, in the number formats that the configuration names.
///
/// # Errors
/// [`Error::File`] for a configuration or columns that are missing or not understood; [`Error::Data`] naming file and record
/// of what no cache may hold.
pub fn distillkit(
    paths: &[PathBuf],
    config: Option<&Path>,
    directory: &Path,
    options: &ImportOptions,
) -> Result<(Manifest, ImportReport)> {
    let files = distillkit::files(paths)?;
    let config = distillkit::config(config, &files)?;
    let source = Source {
        format: "DistillKit",
        k: config.k,
        settings: format!("{config:?}"),
        largest_sum: 1.5,
        files: files.clone(),
    };
    write(source, options, directory, || distillkit::documents(files, config))
}

/// Imports JSON Lines; see `docs/import.md` for the fields. `place` says which token a row is about where the files leave it open.
///
/// # Errors
/// [`Error::Data`] naming file and record of what is not understood, or what no cache may hold.
pub fn jsonl(
    paths: &[PathBuf],
    place: Option<RowPlace>,
    directory: &Path,
    options: &ImportOptions,
) -> Result<(Manifest, ImportReport)> {
    let files = jsonl::files(paths)?;
    let mut k = 0;
    for document in jsonl::documents(files.clone(), place) {
        k = document?.rows.iter().flatten().map(|row| row.ids.len()).max().unwrap_or(0).max(k);
    }
    if k == 0 {
        let problem = "there are no log-probabilities in these files";
        return Err(Error::file(&files[0], problem, "give records with `prompt_logprobs` or `target_logprobs`"));
    }
    let source = Source {
        format: "JSON Lines of top log-probabilities",
        k,
        settings: format!("{place:?}"),
        largest_sum: LARGEST_SUM,
        files: files.clone(),
    };
    write(source, options, directory, || jsonl::documents(files, place))
}

fn write<I: Iterator<Item = Result<Document>>>(
    source: Source,
    options: &ImportOptions,
    directory: &Path,
    documents: impl FnOnce() -> I,
) -> Result<(Manifest, ImportReport)> {
    let settings = settings(&source, options)?;
    settings.check()?;
    let mut report = ImportReport::default();
    let (source, found) = (&source, &mut report);
    let manifest = write_whole(directory, settings, move |first| {
        Sequences::new(documents(), source, options, found).skip(first as usize)
    })?;
    Ok((manifest, report))
}

fn settings(source: &Source, options: &ImportOptions) -> Result<CacheSettings> {
    let mut data = blake3::Hasher::new();
    data.update(format!("limbeck import 1 {} {}", source.format, source.settings).as_bytes());
    for file in &source.files {
        let mut content = blake3::Hasher::new();
        content.update_mmap_rayon(file).map_err(Error::io(file))?;
        data.update(content.finalize().as_bytes());
    }
    data.update(&(options.seq_len as u64).to_le_bytes());
    let vocab_size = vocab_size(options);
    Ok(CacheSettings {
        split: options.split.clone(),
        data_fingerprint: data.finalize().to_hex().to_string(),
        tokenizer: TokenizerIdentity { fingerprint: options.tokenizer.fingerprint(), vocab_size },
        seq_len: options.seq_len,
        sequences_per_shard: options.sequences_per_shard,
        codec: options.codec,
        levels: None,
        log_normalizer: None,
        soft_targets: Some(SoftTargetSettings {
            teacher: TeacherIdentity {
                name: options.teacher_name.clone(),
                fingerprint: options.teacher_fingerprint.clone().unwrap_or(NOT_KNOWN.into()),
                dtype: format!("not known (imported from {}: tails are 1 - sum, at least 1e-8)", source.format),
                in_training: None,
            },
            selection: Selection::TopK { k: source.k.min(vocab_size) },
            temperatures: vec![options.temperature],
            router: None,
        }),
    })
}

fn vocab_size(options: &ImportOptions) -> usize {
    options.vocab_size.unwrap_or(options.tokenizer.vocab_size())
}
