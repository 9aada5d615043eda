//! `manifest.json`: what a finished cache is, what it holds, and the hash of every byte of it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::DAMAGED;
use super::location::is_url;
use super::settings::{CacheSettings, Selection};
use super::shard;
use super::source::{CacheFiles, LocalFiles, read_whole};
use crate::durable;
use crate::error::{Error, Result};

/// Name of the manifest in a cache directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// The version of the layout that this program writes.
pub const FORMAT_VERSION: u32 = 2;
/// The oldest version that this program reads.
pub const OLDEST_VERSION: u32 = 1;
/// Longest manifest that is read into memory; a record of a shard takes less than a thousandth of it.
const MOST_BYTES: u64 = 1 << 30;
/// Name of the file with what a codec learnt from the data.
pub(crate) const CODER_FILE: &str = "coder.safetensors";
pub(crate) const FORMAT: &str = "limbeck soft-target cache";
pub(crate) const PROGRAM: &str = concat!("limbeck ", env!("CARGO_PKG_VERSION"));
/// What follows the root hash, which is the last value of the file.
pub(super) const AFTER_ROOT: &[u8] = b"\"\n}\n";
pub(super) const HASH_DIGITS: usize = 64;

/// What a finished cache is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub format_version: u32,
    /// Name and version of the program that wrote it.
    pub program: String,
    pub settings: CacheSettings,
    /// The tables of a codec that learns from the data.
    #[serde(default)]
    pub coder: Option<CoderRecord>,
    /// Of all shards together.
    pub counts: Counts,
    /// What quantising did to all shards together; `None` with a codec that is exact.
    #[serde(default)]
    pub error: Option<QuantiserError>,
    pub shards: Vec<ShardRecord>,
    /// BLAKE3 of every byte of the file before this value: the name of the whole cache's content.
    pub root: String,
    /// Where the cache lies, for messages.
    #[serde(skip)]
    pub directory: PathBuf,
}

/// The file that holds what a codec learnt from the data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoderRecord {
    /// Relative to the cache directory.
    pub file: String,
    /// Length of the file.
    pub bytes: u64,
    /// Hash of the whole file.
    pub blake3: String,
}

impl CoderRecord {
    pub(crate) fn of(bytes: &[u8]) -> CoderRecord {
        let blake3 = blake3::hash(bytes).to_hex().to_string();
        CoderRecord { file: CODER_FILE.into(), bytes: bytes.len() as u64, blake3 }
    }
}

/// One sealed shard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// Relative to the cache directory.
    pub file: String,
    pub first_sequence: u64,
    /// Length of the file.
    pub bytes: u64,
    /// Hash of its list of block hashes; in version 1, of the whole file.
    pub blake3: String,
    pub counts: Counts,
    /// What quantising did to it; `None` with a codec that is exact.
    #[serde(default)]
    pub error: Option<QuantiserError>,
}

/// How much a shard or a cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub sequences: u64,
    /// Places the model reads (the first `seq_len` of each sequence) that are not padding.
    pub tokens: u64,
    /// Rows that predict a token of the same document.
    pub valid_rows: u64,
    /// Vocabulary ids kept in all rows.
    pub kept_ids: u64,
    /// Bytes of text that the valid rows predict.
    pub text_bytes: u64,
}

impl Counts {
    /// The sum; `None` when it leaves 64 bits.
    pub fn checked_add(self, other: Counts) -> Option<Counts> {
        Some(Counts {
            sequences: self.sequences.checked_add(other.sequences)?,
            tokens: self.tokens.checked_add(other.tokens)?,
            valid_rows: self.valid_rows.checked_add(other.valid_rows)?,
            kept_ids: self.kept_ids.checked_add(other.kept_ids)?,
            text_bytes: self.text_bytes.checked_add(other.text_bytes)?,
        })
    }
}

/// How far what is stored is from what the teacher gave: sums and maxima over valid rows, at the first temperature.
/// Divergences are left 0 where ids were drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantiserError {
    /// Rows that were measured.
    pub rows: u64,
    /// Divergence of the stored from the given distribution over kept ids and tail, in nats: sum and largest.
    pub kl_sum: f64,
    pub kl_max: f64,
    /// Of the kept probabilities: sum of the squares of their errors, and of their own squares.
    pub squared_error: f64,
    pub squared_norm: f64,
    /// Largest error of a tail, as a probability.
    pub tail_max: f64,
    /// Largest error of a label's log-probability, in nats.
    pub label_max: f64,
}

impl QuantiserError {
    /// Of both together. Sums of floats depend on their order: add shards in theirs.
    pub fn joined(self, other: QuantiserError) -> QuantiserError {
        QuantiserError {
            rows: self.rows.saturating_add(other.rows),
            kl_sum: self.kl_sum + other.kl_sum,
            kl_max: self.kl_max.max(other.kl_max),
            squared_error: self.squared_error + other.squared_error,
            squared_norm: self.squared_norm + other.squared_norm,
            tail_max: self.tail_max.max(other.tail_max),
            label_max: self.label_max.max(other.label_max),
        }
    }
}

/// What a reader wants of a cache; what is `None` (or empty, or false) is not asked for.
#[derive(Debug, Clone, Default)]
pub struct Expectation {
    pub split: Option<String>,
    pub data_fingerprint: Option<String>,
    pub tokenizer_fingerprint: Option<String>,
    pub vocab_size: Option<usize>,
    pub seq_len: Option<usize>,
    /// Whether soft targets are needed at all.
    pub soft_targets: bool,
    pub teacher_fingerprint: Option<String>,
    pub selection: Option<Selection>,
    /// Temperatures that must be among the captured ones.
    pub temperatures: Vec<f32>,
}

impl Manifest {
    /// The manifest of sealed shards; `root` is computed.
    pub(crate) fn new(
        directory: &Path,
        settings: CacheSettings,
        coder: Option<CoderRecord>,
        shards: Vec<ShardRecord>,
    ) -> Result<Manifest> {
        let counts = total(&shards).ok_or_else(|| {
            Error::file(directory, "the counts of its shards leave 64 bits", "split the data over several caches")
        })?;
        let mut manifest = Manifest {
            format: FORMAT.into(),
            format_version: FORMAT_VERSION,
            program: PROGRAM.into(),
            settings,
            coder,
            counts,
            error: total_error(&shards),
            shards,
            root: String::new(),
            directory: directory.to_path_buf(),
        };
        manifest.root = blake3::hash(&manifest.bytes_before_root()).to_hex().to_string();
        Ok(manifest)
    }

    fn bytes_before_root(&self) -> Vec<u8> {
        let blank = Manifest { root: String::new(), ..self.clone() };
        let mut bytes = serde_json::to_vec_pretty(&blank).expect("a manifest has only strings as keys");
        bytes.push(b'\n');
        bytes.truncate(bytes.len() - AFTER_ROOT.len());
        bytes
    }

    /// Writes the file: to a temporary name, synced, renamed. Whoever does it writes the same bytes.
    pub(crate) fn save(&self, owner: &str) -> Result<()> {
        let mut bytes = self.bytes_before_root();
        bytes.extend_from_slice(self.root.as_bytes());
        bytes.extend_from_slice(AFTER_ROOT);
        durable::write_new(&self.directory.join(MANIFEST_FILE), owner, &bytes).map(drop)
    }

    /// Reads and checks the manifest of the cache in `directory`, without looking at its shards.
    ///
    /// # Errors
    /// [`Error::File`] when there is none, when the cache is unfinished, when it is of another version, or when
    /// anything in it was changed.
    pub fn load(directory: impl AsRef<Path>) -> Result<Manifest> {
        Manifest::load_from(&LocalFiles::new(&directory), directory.as_ref())
    }

    /// [`load`](Self::load) from anywhere; `directory` is how messages call it.
    ///
    /// # Errors
    /// As of [`load`](Self::load).
    pub fn load_from(files: &dyn CacheFiles, directory: &Path) -> Result<Manifest> {
        let path = directory.join(MANIFEST_FILE);
        let bytes = match read_whole(files, MANIFEST_FILE, MOST_BYTES) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&path)(error)),
            Err(_) => return Err(missing(directory)),
        };
        Manifest::parse(&bytes, directory, &path)
    }

    pub(super) fn parse(bytes: &[u8], directory: &Path, path: &Path) -> Result<Manifest> {
        let damaged = |problem: String| Error::file(path, problem, DAMAGED);

        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        // First the version, so that a newer cache is called newer and not damaged.
        let version = serde_json::from_slice(bytes).map(|Version { format_version }| format_version);
        if let Ok(version) = version
            && !(OLDEST_VERSION..=FORMAT_VERSION).contains(&version)
        {
            return Err(Error::file(
                path,
                format!("the cache is of format version {version}, this program reads 1 and {FORMAT_VERSION}"),
                "read it with the limbeck that wrote it, or precompute it again with this one",
            ));
        }
        let root = bytes
            .strip_suffix(AFTER_ROOT)
            .and_then(|rest| rest.split_at_checked(rest.len().checked_sub(HASH_DIGITS)?))
            .filter(|(before, _)| before.ends_with(b"\"root\": \""));
        let Some((before, root)) = root else {
            return Err(damaged("it does not end with its root hash: it was truncated or edited".into()));
        };
        let actual = blake3::hash(before).to_hex();
        if actual.as_bytes() != root {
            let named = short(&String::from_utf8_lossy(root));
            return Err(damaged(format!(
                "it was edited or damaged: it names the root {named}, its content has {}",
                short(&actual)
            )));
        }
        let version = version.unwrap_or(FORMAT_VERSION);
        let mut manifest: Manifest = serde_json::from_slice(bytes)
            .map_err(|error| damaged(format!("it is not a manifest of format version {version}: {error}")))?;
        manifest.directory = directory.to_path_buf();
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    /// Settings, records and counts against each other.
    fn check(&self) -> std::result::Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("its format is `{}`, not `{FORMAT}`", self.format));
        }
        self.settings.check().map_err(|error| error.to_string())?;
        check_records(&self.shards, &self.settings)?;
        if total(&self.shards) != Some(self.counts) {
            return Err("its counts are not the sum of its shards' counts".into());
        }
        if total_error(&self.shards) != self.error {
            return Err("its error is not the sum of its shards' errors".into());
        }
        let learns = self.settings.codec.calibration_tokens().is_some();
        match &self.coder {
            Some(coder) if !learns => {
                Err(format!("it names `{}`, but its codec `{}` has none", coder.file, self.settings.codec.name()))
            }
            None if learns => Err(format!("it names no coder, but its codec is `{}`", self.settings.codec.name())),
            Some(coder) if coder.file != CODER_FILE => {
                Err(format!("its coder is called `{}`, not `{CODER_FILE}`", coder.file))
            }
            _ => Ok(()),
        }
    }

    /// Whether this is the cache that is wanted.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming what differs, both sides and the way out.
    pub fn expect(&self, expectation: &Expectation) -> Result<()> {
        let settings = &self.settings;
        let directory = self.directory.display();
        let soft_targets = settings.soft_targets.as_ref();
        let again = format!("or delete {directory} and run `limbeck precompute-teacher-logits` again");
        let differs = |what: &str, left: String, right: String, tip: String| {
            let left_name = format!("the cache {directory}");
            Err(Error::Mismatch { what: what.into(), left_name, left, right_name: "this run".into(), right, tip })
        };
        if let Some(expected) = &expectation.tokenizer_fingerprint
            && *expected != settings.tokenizer.fingerprint
        {
            let left = format!(
                "token ids of the tokenizer {} ({} tokens)",
                short(&settings.tokenizer.fingerprint),
                settings.tokenizer.vocab_size
            );
            let right = format!("the tokenizer {}", short(expected));
            return differs(
                "the tokenizer",
                left,
                right,
                format!("use the tokenizer the cache was made with, {again}"),
            );
        }
        if let Some(expected) = expectation.vocab_size
            && expected != settings.tokenizer.vocab_size
        {
            let left = settings.tokenizer.vocab_size.to_string();
            let tip = format!("give the student the vocabulary of the cache, {again}");
            return differs("the vocabulary size", left, expected.to_string(), tip);
        }
        if soft_targets.is_none() && (expectation.soft_targets || expectation.teacher_fingerprint.is_some()) {
            let tip = "train on the hard target alone, ".to_string() + &again;
            return differs("the kind of cache", "tokens only".into(), "a loss on soft targets".into(), tip);
        }
        if let (Some(expected), Some(soft_targets)) = (&expectation.teacher_fingerprint, soft_targets)
            && *expected != soft_targets.teacher.fingerprint
        {
            let teacher = &soft_targets.teacher;
            let left = format!(
                "targets of the teacher `{}` ({}), fingerprint {}",
                teacher.name,
                teacher.dtype,
                short(&teacher.fingerprint)
            );
            let right = format!("a teacher with fingerprint {}", short(expected));
            return differs("the teacher", left, right, format!("name the teacher the cache was made with, {again}"));
        }
        if let Some(expected) = &expectation.data_fingerprint
            && *expected != settings.data_fingerprint
        {
            let left = format!("data {}", short(&settings.data_fingerprint));
            let tip = format!("restore the [data] section and files the cache was made with, {again}");
            return differs("the data", left, format!("data {}", short(expected)), tip);
        }
        if let Some(expected) = &expectation.split
            && *expected != settings.split
        {
            let tip = "open the cache of the other split".to_string();
            return differs("the split", format!("`{}`", settings.split), format!("`{expected}`"), tip);
        }
        if let Some(expected) = expectation.seq_len
            && expected != settings.seq_len
        {
            let tip = format!("set [data] seq_len = {}, {again}", settings.seq_len);
            return differs("seq_len", settings.seq_len.to_string(), expected.to_string(), tip);
        }
        if let (Some(expected), Some(soft_targets)) = (&expectation.selection, soft_targets)
            && *expected != soft_targets.selection
        {
            let (left, right) = (soft_targets.selection.to_string(), expected.to_string());
            let tip = format!("set [cache] to {left}, {again}");
            return differs("the selection of kept ids", left, right, tip);
        }
        let captured = settings.temperatures();
        if expectation.temperatures.iter().any(|temperature| !captured.contains(temperature)) {
            let tip = format!("use a temperature that was captured, {again}");
            return differs(
                "the list of captured temperatures",
                format!("{captured:?}"),
                format!("{:?}", expectation.temperatures),
                tip,
            );
        }
        Ok(())
    }
}

fn missing(directory: &Path) -> Error {
    if super::unfinished::is_unfinished(directory) {
        let again = "run `limbeck precompute-teacher-logits` again with the same recipe; it continues where it stopped";
        return Error::file(directory, "this cache is unfinished", again);
    }
    if is_url(directory) {
        let tip = "check the address and its credentials; caches are written to directories, and copied once finished";
        return Error::file(directory, "there is no finished cache here (no manifest.json)", tip);
    }
    Error::file(
        directory,
        "there is no cache here (no manifest.json)",
        "check the path, or run `limbeck precompute-teacher-logits` to make one",
    )
}

/// Sum of the shards' errors, in their order; `None` when none has one.
pub(crate) fn total_error(shards: &[ShardRecord]) -> Option<QuantiserError> {
    shards.iter().filter_map(|shard| shard.error).reduce(QuantiserError::joined)
}

/// Sum of the shards' counts; `None` when it leaves 64 bits.
pub(crate) fn total(shards: &[ShardRecord]) -> Option<Counts> {
    shards.iter().try_fold(Counts::default(), |sum, shard| sum.checked_add(shard.counts))
}

/// Whether the records are those of a cache with these settings: numbered, adjoining, full but for the last.
pub(crate) fn check_records(shards: &[ShardRecord], settings: &CacheSettings) -> std::result::Result<(), String> {
    let full = settings.sequences_per_shard as u64;
    for (number, record) in shards.iter().enumerate() {
        let name = shard::file_name(number as u64);
        let sequences = record.counts.sequences;
        let rows = sequences.checked_mul(settings.seq_len as u64);
        if record.file != name {
            return Err(format!("shard {number} is called `{}`, not `{name}`", record.file));
        }
        if Some(record.first_sequence) != full.checked_mul(number as u64) {
            return Err(format!(
                "`{name}` starts with sequence {}, not {}",
                record.first_sequence,
                full * number as u64
            ));
        }
        if sequences == 0 || sequences > full || (sequences < full && number + 1 < shards.len()) {
            return Err(format!("`{name}` holds {sequences} sequences, not {full}"));
        }
        if rows.is_none_or(|rows| record.counts.valid_rows > rows || record.counts.tokens > rows) {
            return Err(format!("`{name}` counts more rows than its {sequences} sequences have"));
        }
    }
    Ok(())
}

/// Enough of a fingerprint to tell it from others by eye.
pub(crate) fn short(fingerprint: &str) -> String {
    match fingerprint.char_indices().nth(16) {
        Some((end, _)) => format!("{}...", &fingerprint[..end]),
        None => fingerprint.to_string(),
    }
}
