//! What every way of writing a cache does at its ends: seal a shard, and make the manifest once all are sealed.

use std::fs;
use std::path::Path;

use super::DAMAGED;
use super::codec::{Block, Codec, Coder, Shape};
use super::manifest::{CODER_FILE, CoderRecord, Counts, Manifest, ShardRecord, check_records, short};
use super::reader::{check_length, read_coder};
use super::settings::CacheSettings;
use super::shard::{self, SHARD_FOLDER};
use super::source::LocalFiles;
use super::unfinished::{CALIBRATION_FOLDER, Position, SEALED_FOLDER, Sealed, Unfinished, tidy};
use crate::durable;
use crate::error::{Error, Result};
use crate::profile::stage;

/// What a cache still lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// Shards that are not sealed, of those that are known to belong to it.
    pub shards: Vec<u64>,
    /// How many shards it will have; `None` while nobody has come to the end of the data.
    pub total: Option<u64>,
}

impl std::fmt::Display for Missing {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let first: Vec<String> = self.shards.iter().take(3).map(u64::to_string).collect();
        match (self.shards.len(), self.total) {
            (0, None) => write!(formatter, "nobody has come to the end of the data"),
            (0, Some(total)) => write!(formatter, "none of its {total} shards is missing"),
            (count, total) => {
                let more = if count > first.len() { ", ..." } else { "" };
                let (word, list) = (if count == 1 { "shard is" } else { "shards are" }, first.join(", "));
                match total {
                    Some(total) => write!(formatter, "{count} of {total} {word} missing ({list}{more})"),
                    None => write!(formatter, "{count} {word} missing ({list}{more}), and the end of the data"),
                }
            }
        }
    }
}

/// What the writing of a part came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Finished(Box<Manifest>),
    /// This part is written, others are not.
    Missing(Missing),
}

/// The tables of a codec, and what they are called by.
#[derive(Debug, Clone)]
pub(crate) struct LearntCoder {
    pub coder: Coder,
    pub record: CoderRecord,
}

/// The tables in an unfinished cache, if they are there.
pub(crate) fn learnt_coder(directory: &Path, settings: &CacheSettings) -> Result<Option<LearntCoder>> {
    let path = directory.join(CODER_FILE);
    if settings.codec.calibration_tokens().is_none() || !path.is_file() {
        return Ok(None);
    }
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let coder = read_coder(settings, &bytes, &path)?;
    Ok(Some(LearntCoder { coder, record: CoderRecord::of(&bytes) }))
}

/// Number of shards of so many sequences.
pub(crate) fn shard_count(settings: &CacheSettings, sequences: u64) -> u64 {
    sequences.div_ceil(settings.sequences_per_shard as u64)
}

/// One shard that is ready to be sealed.
pub(crate) struct Filled<'a> {
    pub number: u64,
    pub counts: Counts,
    pub block: &'a Block,
    pub position: Option<Position>,
}

/// Writes and seals a shard of the cache. `Ok(false)` if another process has sealed it.
pub(crate) fn seal(files: &Unfinished, owner: &str, coder: Option<&LearntCoder>, filled: Filled<'_>) -> Result<bool> {
    seal_in(files, SHARD_FOLDER, SEALED_FOLDER, files.settings.codec, owner, coder, filled)
}

/// Writes and seals a shard that a coder is to learn from, in codec `raw`.
pub(crate) fn seal_calibration(files: &Unfinished, owner: &str, filled: Filled<'_>) -> Result<bool> {
    seal_in(files, CALIBRATION_FOLDER, CALIBRATION_FOLDER, Codec::Raw, owner, None, filled)
}

fn seal_in(
    files: &Unfinished,
    folder: &str,
    records: &str,
    codec: Codec,
    owner: &str,
    coder: Option<&LearntCoder>,
    filled: Filled<'_>,
) -> Result<bool> {
    let settings = &files.settings;
    let mut record = ShardRecord {
        file: shard::file_in(folder, filled.number),
        first_sequence: filled.number * settings.sequences_per_shard as u64,
        bytes: 0,
        blake3: String::new(),
        counts: filled.counts,
        error: None,
    };
    let shape = Shape::of(settings, &record);
    let span = stage("cache encode").with("sequences", record.counts.sequences);
    let encoded = codec.encode(filled.block, &shape, coder.map(|coder| &coder.coder));
    drop(span);
    record.error = encoded.error;
    let temporary = durable::owned_temporary_path(&files.directory.join(&record.file), owner);
    let written = shard::write(&temporary, codec, filled.number, record.first_sequence, &encoded.tensors)?;
    record.bytes = written.bytes;
    record.blake3 = written.blake3.to_hex().to_string();
    let sealed = Sealed {
        shard: record,
        written_as: file_name(&temporary),
        coder: coder.map(|coder| coder.record.blake3.clone()),
        position: filled.position,
    };
    files.check_same().and_then(|()| files.seal(records, filled.number, owner, &sealed)).inspect_err(|_| {
        // Best effort, and only if no record vouches for it: a full disk should not also keep this file.
        if !files.record_path(records, filled.number).exists() {
            let _ = fs::remove_file(&temporary);
        }
    })
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Writes the manifest if every shard is sealed, and removes what only an unfinished cache has.
pub(crate) fn complete(files: &Unfinished, owner: &str) -> Result<Outcome> {
    let (directory, settings) = (&files.directory, &files.settings);
    let sealed = files.numbers(SEALED_FOLDER)?;
    let Some(sequences) = files.end()? else {
        let known = sealed.last().copied().unwrap_or(0);
        let shards = (0..known).filter(|number| sealed.binary_search(number).is_err()).collect();
        return Ok(Outcome::Missing(Missing { shards, total: None }));
    };
    let total = shard_count(settings, sequences);
    let shards: Vec<u64> = (0..total).filter(|number| sealed.binary_search(number).is_err()).collect();
    if !shards.is_empty() {
        return Ok(Outcome::Missing(Missing { shards, total: Some(total) }));
    }
    let afresh = format!("delete {} to start afresh", directory.display());
    let coder = learnt_coder(directory, settings)?.map(|coder| coder.record);
    let mut records = Vec::with_capacity(total as usize);
    for number in sealed {
        let path = files.record_path(SEALED_FOLDER, number);
        let Some(sealed) = files.record(SEALED_FOLDER, number)? else {
            return Err(Error::file(path, "is missing", afresh));
        };
        let (ours, theirs) = (coder.as_ref().map(|coder| &coder.blake3), sealed.coder.as_ref());
        if ours != theirs {
            let name = |hash: Option<&String>| hash.map_or("none".into(), |hash| short(hash));
            let problem = format!("it was encoded with the coder {}, {CODER_FILE} is {}", name(theirs), name(ours));
            return Err(Error::file(path, problem, afresh));
        }
        check_length(&LocalFiles::new(directory), directory, &sealed.shard)?;
        records.push(sealed.shard);
    }
    check_records(&records, settings).map_err(|problem| Error::file(directory, problem, &*afresh))?;
    let manifest = Manifest::new(directory, settings.clone(), coder, records)?;
    if manifest.counts.sequences != sequences {
        let problem = format!("its shards hold {} sequences, end.json says {sequences}", manifest.counts.sequences);
        return Err(Error::file(directory, problem, afresh));
    }
    manifest.save(owner)?;
    tidy(directory, manifest.shards.len())?;
    Ok(Outcome::Finished(Box::new(manifest)))
}

/// The error of two caches whose settings differ, if they do.
pub(crate) fn same_settings(
    (left_name, theirs): (String, &CacheSettings),
    (right_name, ours): (String, &CacheSettings),
    otherwise: &str,
) -> Result<()> {
    let Some((setting, left, right)) = theirs.first_difference(ours) else { return Ok(()) };
    let teacher = |settings: &CacheSettings| {
        settings.soft_targets.as_ref().map_or("none".into(), |soft_targets| {
            format!("`{}`, fingerprint {}", soft_targets.teacher.name, short(&soft_targets.teacher.fingerprint))
        })
    };
    let tokenizer = |settings: &CacheSettings| {
        format!("{} tokens, fingerprint {}", settings.tokenizer.vocab_size, short(&settings.tokenizer.fingerprint))
    };
    let data = |settings: &CacheSettings| format!("fingerprint {}", short(&settings.data_fingerprint));
    let (what, left, right, way_out) = match setting.as_str() {
        "tokenizer.fingerprint" => {
            ("the tokenizer".into(), tokenizer(theirs), tokenizer(ours), "use the tokenizer it was begun with")
        }
        "soft_targets.teacher.fingerprint" => {
            ("the teacher".into(), teacher(theirs), teacher(ours), "use the teacher it was begun with")
        }
        "data_fingerprint" => {
            let way_out = "restore the [data] section, the seed and the files it was begun with";
            ("the data".into(), data(theirs), data(ours), way_out)
        }
        _ => (format!("the cache setting `{setting}`"), left, right, "run with the settings it was begun with"),
    };
    Err(Error::Mismatch { what, left_name, left, right_name, right, tip: format!("{way_out}, or {otherwise}") })
}

/// Whether `file` is intact is not known, but it is there and as long as its record says.
pub(crate) fn check_sealed(files: &Unfinished) -> Result<()> {
    for number in files.numbers(SEALED_FOLDER)? {
        if let Some(sealed) = files.record(SEALED_FOLDER, number)? {
            let expected = shard::file_name(number);
            if sealed.shard.file != expected {
                let problem = format!("it is the record of `{}`, not of `{expected}`", sealed.shard.file);
                return Err(Error::file(files.record_path(SEALED_FOLDER, number), problem, DAMAGED));
            }
            check_length(&LocalFiles::new(&files.directory), &files.directory, &sealed.shard)?;
        }
    }
    Ok(())
}
