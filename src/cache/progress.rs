//! `progress.log`: which shards of an unfinished cache are sealed, and where the data loader stood.
//!
//! Only ever appended to, one synced line per sealed shard; a crash can tear its last line and nothing else.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::manifest::{FORMAT, FORMAT_VERSION, PROGRAM, ShardRecord, check_records};
use super::settings::CacheSettings;
use crate::durable;
use crate::error::{Error, Result};

pub(crate) const PROGRESS_FILE: &str = "progress.log";
const HASH_DIGITS: usize = 64;

/// Whether a cache was begun in this directory and not finished.
pub fn is_unfinished(directory: impl AsRef<Path>) -> bool {
    let directory = directory.as_ref();
    directory.join(PROGRESS_FILE).is_file() && !directory.join(super::MANIFEST_FILE).is_file()
}

/// Where the data loader was just before a sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// The loader was about to give this sequence.
    pub sequence: u64,
    /// What the loader wants to be given back. Integers and text; a float may lose its last bit.
    pub loader: serde_json::Value,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Beginning {
    format: String,
    format_version: u32,
    program: String,
    settings: CacheSettings,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    shard: ShardRecord,
    position: Option<Position>,
}

/// The open log.
#[derive(Debug)]
pub(crate) struct Progress {
    path: PathBuf,
    file: File,
    length: u64,
    pub settings: CacheSettings,
    pub shards: Vec<ShardRecord>,
    /// Recorded with the last sealed shard.
    pub position: Option<Position>,
}

fn line(entry: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string(entry).expect("log entries have only strings as keys");
    format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex()).into_bytes()
}

/// The JSON of a line (without its newline) whose hash agrees.
fn unsealed(line: &[u8]) -> Option<&[u8]> {
    let (hash, rest) = line.split_at_checked(HASH_DIGITS)?;
    let json = rest.strip_prefix(b" ")?;
    (blake3::hash(json).to_hex().as_bytes() == hash).then_some(json)
}

impl Progress {
    /// Begins a log, in a directory that exists.
    pub(crate) fn begin(directory: &Path, settings: CacheSettings) -> Result<Progress> {
        let beginning =
            Beginning { format: FORMAT.into(), format_version: FORMAT_VERSION, program: PROGRAM.into(), settings };
        let path = directory.join(PROGRESS_FILE);
        let bytes = line(&beginning);
        durable::write_bytes(&path, &bytes)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        let length = bytes.len() as u64;
        Ok(Progress { path, file, length, settings: beginning.settings, shards: vec![], position: None })
    }

    /// Opens the log of an unfinished cache, and cuts off the line that a crash tore.
    pub(crate) fn open(directory: &Path) -> Result<Progress> {
        let path = directory.join(PROGRESS_FILE);
        let start_afresh = format!("delete {} to start afresh", directory.display());
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let damaged = |problem: String| Error::file(&path, problem, &*start_afresh);
        let mut entries = vec![];
        let mut length = 0;
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n').peekable();
        while let Some(line) = lines.next() {
            match line.strip_suffix(b"\n").and_then(unsealed) {
                Some(json) => entries.push(json),
                // The last line is appended in one piece and synced before the next; a crash tears no other.
                None if lines.peek().is_none() && !entries.is_empty() => break,
                None => return Err(damaged(format!("line {} is damaged", entries.len() + 1))),
            }
            length += line.len() as u64;
        }
        let parse = |error: serde_json::Error| damaged(format!("it is not a log of this version: {error}"));
        let Some((first, rest)) = entries.split_first() else { return Err(damaged("it is empty".into())) };
        let beginning: Beginning = serde_json::from_slice(first).map_err(parse)?;
        if beginning.format_version != FORMAT_VERSION || beginning.program != PROGRAM {
            return Err(Error::Mismatch {
                what: "the program".into(),
                left_name: format!("the unfinished cache {}", directory.display()),
                left: format!("{} (format version {})", beginning.program, beginning.format_version),
                right_name: "this program".into(),
                right: format!("{PROGRAM} (format version {FORMAT_VERSION})"),
                tip: format!("finish it with the program that began it, or {start_afresh}"),
            });
        }
        let mut shards = vec![];
        let mut position = None;
        for json in rest {
            let sealed: Sealed = serde_json::from_slice(json).map_err(parse)?;
            shards.push(sealed.shard);
            position = sealed.position;
        }
        check_records(&shards, &beginning.settings).map_err(damaged)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io(&path))?;
        if length < bytes.len() as u64 {
            file.set_len(length).and_then(|()| file.sync_all()).map_err(Error::io(&path))?;
        }
        Ok(Progress { path, file, length, settings: beginning.settings, shards, position })
    }

    /// Records a sealed shard.
    pub(crate) fn append(&mut self, shard: ShardRecord, position: Option<Position>) -> Result<()> {
        let length = self.file.metadata().map_err(Error::io(&self.path))?.len();
        if length != self.length {
            return Err(Error::file(&self.path, "another process is writing this cache", "let only one write it"));
        }
        let sealed = Sealed { shard, position };
        let bytes = line(&sealed);
        self.file.write_all(&bytes).and_then(|()| self.file.sync_all()).map_err(Error::io(&self.path))?;
        self.length += bytes.len() as u64;
        self.shards.push(sealed.shard);
        self.position = sealed.position;
        Ok(())
    }

    /// Sequences in sealed shards.
    pub(crate) fn sequences(&self) -> u64 {
        self.shards.last().map_or(0, |shard| shard.first_sequence + shard.counts.sequences)
    }
}
