//! The files of an unfinished cache beside its shards: `begun.json`, the records in `sealed/`, `end.json`.
//!
//! Each is one line behind its hash, made whole under a temporary name and linked to its own; none is ever changed.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::lease::{LEASE_FOLDER, any_living};
use super::manifest::{FORMAT, FORMAT_VERSION, MANIFEST_FILE, PROGRAM, ShardRecord};
use super::owner;
use super::settings::CacheSettings;
use super::shard::SHARD_FOLDER;
use crate::durable::{self, TEMPORARY};
use crate::error::{Error, Result};

pub(crate) const BEGUN_FILE: &str = "begun.json";
pub(crate) const END_FILE: &str = "end.json";
pub(crate) const SEALED_FOLDER: &str = "sealed";
pub(crate) const CALIBRATION_FOLDER: &str = "calibration";
/// What format version 1 had in place of `begun.json`.
const VERSION_1_LOG: &str = "progress.log";
const HASH_DIGITS: usize = 64;

/// Whether a cache was begun in this directory and not finished.
pub fn is_unfinished(directory: impl AsRef<Path>) -> bool {
    let directory = directory.as_ref();
    let begun = [BEGUN_FILE, VERSION_1_LOG].iter().any(|name| directory.join(name).is_file());
    begun && !directory.join(MANIFEST_FILE).is_file()
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

/// A sealed shard, or one that the coder learns from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Sealed {
    pub shard: ShardRecord,
    /// Name of its file before it was sealed, in the same folder.
    pub written_as: String,
    /// Hash of the coder's tables it was encoded with.
    pub coder: Option<String>,
    pub position: Option<Position>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct End {
    sequences: u64,
}

/// The open directory.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pub directory: PathBuf,
    pub settings: CacheSettings,
    /// `begun.json`, byte for byte.
    begun: Vec<u8>,
}

fn line(entry: &impl Serialize) -> Vec<u8> {
    let json = serde_json::to_string(entry).expect("entries have only strings as keys");
    format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex()).into_bytes()
}

/// The JSON of a line whose hash agrees.
fn unsealed(bytes: &[u8]) -> Option<&[u8]> {
    let (hash, rest) = bytes.strip_suffix(b"\n")?.split_at_checked(HASH_DIGITS)?;
    let json = rest.strip_prefix(b" ")?;
    (blake3::hash(json).to_hex().as_bytes() == hash).then_some(json)
}

/// Reads a line; `None` if there is no such file.
fn read_line<T: DeserializeOwned>(path: &Path, tip: &str) -> Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let json = unsealed(&bytes).ok_or_else(|| Error::file(path, "it was edited or damaged", tip))?;
    serde_json::from_slice(json)
        .map(Some)
        .map_err(|error| Error::file(path, format!("it is not of this version: {error}"), tip))
}

fn afresh(directory: &Path) -> String {
    format!("delete {} to start afresh", directory.display())
}

impl Unfinished {
    /// Begins a cache in `directory`, or opens the one that was begun there. Says which it found by its settings.
    pub(crate) fn begin_or_open(directory: &Path, settings: &CacheSettings, owner: &str) -> Result<Unfinished> {
        let log = directory.join(VERSION_1_LOG);
        if log.is_file() {
            let problem = "it belongs to an unfinished cache of format version 1";
            let tip = format!("finish it with the limbeck that began it, or {}", afresh(directory));
            return Err(Error::file(log, problem, tip));
        }
        let path = directory.join(BEGUN_FILE);
        if !path.is_file() {
            for folder in [SHARD_FOLDER, SEALED_FOLDER] {
                if durable::file_names(&directory.join(folder))?.iter().any(|name| !name.ends_with(TEMPORARY)) {
                    return Err(Error::file(
                        directory,
                        format!("there are files in {folder}/, but neither manifest.json nor {BEGUN_FILE}"),
                        "restore the one that is missing, or delete the directory to start afresh",
                    ));
                }
            }
            fs::create_dir_all(directory).map_err(Error::io(directory))?;
            durable::sync_directory(durable::parent(directory))?;
            durable::write_new(&path, owner, &beginning(settings))?;
        }
        let opened = Unfinished::open(directory)?;
        for folder in [SHARD_FOLDER, SEALED_FOLDER, LEASE_FOLDER] {
            let folder = directory.join(folder);
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        }
        durable::sync_directory(directory)?;
        Ok(opened)
    }

    /// Opens an unfinished cache.
    pub(crate) fn open(directory: &Path) -> Result<Unfinished> {
        let path = directory.join(BEGUN_FILE);
        let tip = afresh(directory);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
            program: String,
        }
        // First the version, so that a cache begun by another program is not called damaged.
        if let Some(Version { format_version, program }) =
            unsealed(&bytes).and_then(|json| serde_json::from_slice(json).ok())
            && (format_version != FORMAT_VERSION || program != PROGRAM)
        {
            return Err(Error::Mismatch {
                what: "the program".into(),
                left_name: format!("the unfinished cache {}", directory.display()),
                left: format!("{program} (format version {format_version})"),
                right_name: "this program".into(),
                right: format!("{PROGRAM} (format version {FORMAT_VERSION})"),
                tip: format!("finish it with the program that began it, or {tip}"),
            });
        }
        let gone = || Error::file(&path, "is missing", &*tip);
        let Beginning { settings, .. } = read_line(&path, &tip)?.ok_or_else(gone)?;
        settings.check()?;
        Ok(Unfinished { directory: directory.to_path_buf(), settings, begun: bytes })
    }

    /// Takes on other settings, if nothing is sealed and nobody else is at work.
    pub(crate) fn rebegin(&mut self, settings: &CacheSettings, owner: &str) -> Result<bool> {
        let folders = [SEALED_FOLDER, CALIBRATION_FOLDER].map(|folder| self.numbers(folder));
        for numbers in folders {
            if !numbers?.is_empty() {
                return Ok(false);
            }
        }
        if any_living(&self.directory, owner)?.is_some() {
            return Ok(false);
        }
        durable::remove(&self.directory.join(END_FILE))?;
        durable::write_bytes(&self.directory.join(BEGUN_FILE), &beginning(settings))?;
        *self = Unfinished::open(&self.directory)?;
        Ok(true)
    }

    /// Whether the directory still is the cache that was opened.
    pub(crate) fn check_same(&self) -> Result<()> {
        let path = self.directory.join(BEGUN_FILE);
        if fs::read(&path).map_err(Error::io(&path))? == self.begun {
            return Ok(());
        }
        Err(Error::file(path, "another process began the cache anew with other settings", "let only one of them run"))
    }

    /// Numbers of the records in a folder, in their order.
    pub(crate) fn numbers(&self, folder: &str) -> Result<Vec<u64>> {
        let names = durable::file_names(&self.directory.join(folder))?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| name.strip_suffix(".json")?.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(crate) fn record_path(&self, folder: &str, number: u64) -> PathBuf {
        self.directory.join(folder).join(format!("{number:05}.json"))
    }

    /// Whether a shard is sealed.
    pub(crate) fn is_sealed(&self, number: u64) -> bool {
        self.record_path(SEALED_FOLDER, number).is_file()
    }

    /// The record of a shard in a folder, if there is one; moves its file to its name if a crash left it without.
    pub(crate) fn record(&self, folder: &str, number: u64) -> Result<Option<Sealed>> {
        let path = self.record_path(folder, number);
        let Some(sealed) = read_line::<Sealed>(&path, &afresh(&self.directory))? else { return Ok(None) };
        let file = self.directory.join(&sealed.shard.file);
        if !file.is_file() {
            let written = file.with_file_name(&sealed.written_as);
            match fs::rename(&written, &file) {
                Ok(()) => durable::sync_directory(durable::parent(&file))?,
                // Another one did it first, or it is missing: whoever asks for its length finds out.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(&file)(error)),
            }
        }
        Ok(Some(sealed))
    }

    /// Seals a shard whose bytes are in its temporary file, synced. `Ok(false)` if another process has sealed it.
    pub(crate) fn seal(&self, folder: &str, number: u64, owner: &str, sealed: &Sealed) -> Result<bool> {
        let file = self.directory.join(&sealed.shard.file);
        let written = file.with_file_name(&sealed.written_as);
        let is_ours = durable::write_new(&self.record_path(folder, number), owner, &line(sealed))?;
        if !is_ours {
            durable::remove(&written)?;
            return Ok(false);
        }
        match fs::rename(&written, &file) {
            // Another process read the record, and did it.
            Err(error) if error.kind() == ErrorKind::NotFound && file.is_file() => {}
            other => other.map_err(Error::io(&file))?,
        }
        durable::sync_directory(durable::parent(&file))?;
        Ok(true)
    }

    /// How many sequences the data has, once somebody came to its end.
    pub(crate) fn end(&self) -> Result<Option<u64>> {
        let end = read_line::<End>(&self.directory.join(END_FILE), &afresh(&self.directory))?;
        Ok(end.map(|end| end.sequences))
    }

    /// Records how many sequences the data has.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when another writer came to another end.
    pub(crate) fn set_end(&self, sequences: u64, owner: &str) -> Result<()> {
        durable::write_new(&self.directory.join(END_FILE), owner, &line(&End { sequences }))?;
        match self.end()? {
            Some(theirs) if theirs != sequences => Err(Error::Mismatch {
                what: "the number of sequences".into(),
                left_name: format!("the unfinished cache {}", self.directory.display()),
                left: theirs.to_string(),
                right_name: "this run".into(),
                right: sequences.to_string(),
                tip: format!("restore the data it was begun with, or {}", afresh(&self.directory)),
            }),
            _ => Ok(()),
        }
    }

    /// Removes what dead writers left: temporary files that no record names, shards without a record.
    pub(crate) fn discard_leftovers(&self) -> Result<()> {
        for folder in ["", SHARD_FOLDER, SEALED_FOLDER, LEASE_FOLDER, CALIBRATION_FOLDER] {
            let inside = self.directory.join(folder);
            for name in durable::file_names(&inside)? {
                let path = inside.join(&name);
                let number = name.split('.').next().and_then(|number| number.parse().ok());
                let is_data = name.contains(".safetensors") && number.is_some();
                let records = match folder {
                    SHARD_FOLDER => Some(SEALED_FOLDER),
                    CALIBRATION_FOLDER => Some(CALIBRATION_FOLDER),
                    _ => None,
                };
                // First whether it is alive, then whether it is named: a record is made before its writer dies.
                let is_void = if name.ends_with(TEMPORARY) {
                    owner::of_temporary(&name).is_none_or(|owner| owner::is_dead(owner, &path))
                } else {
                    is_data && records.is_some()
                };
                if !is_void {
                    continue;
                }
                // Asking for the record also gives a shard its name, if that is all it lacks.
                if let (true, Some(records), Some(number)) = (is_data, records, number)
                    && let Some(sealed) = self.record(records, number)?
                    && (sealed.written_as == name || !name.ends_with(TEMPORARY))
                {
                    continue;
                }
                durable::remove(&path)?;
            }
        }
        Ok(())
    }
}

fn beginning(settings: &CacheSettings) -> Vec<u8> {
    line(&Beginning {
        format: FORMAT.into(),
        format_version: FORMAT_VERSION,
        program: PROGRAM.into(),
        settings: settings.clone(),
    })
}

/// Removes everything that only an unfinished cache has, and shards beyond `shards`.
pub(crate) fn tidy(directory: &Path, shards: usize) -> Result<()> {
    let mut changed = false;
    for folder in [SEALED_FOLDER, LEASE_FOLDER, CALIBRATION_FOLDER] {
        let folder = directory.join(folder);
        match fs::remove_dir_all(&folder) {
            Ok(()) => changed = true,
            // Another process that is finishing too, or a late writer: whoever comes next removes what is left.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) => {}
            Err(error) => return Err(Error::io(&folder)(error)),
        }
    }
    for folder in ["", SHARD_FOLDER] {
        let inside = directory.join(folder);
        for name in durable::file_names(&inside)? {
            let path = inside.join(&name);
            let number: Option<usize> = name.split('.').next().and_then(|number| number.parse().ok());
            let is_void = if name.ends_with(TEMPORARY) {
                // In the cache's own folder only what is ours.
                let ours = [BEGUN_FILE, END_FILE, MANIFEST_FILE, "coder."].iter().any(|start| name.starts_with(start));
                let living = owner::of_temporary(&name).is_some_and(|owner| !owner::is_dead(owner, &path));
                (folder == SHARD_FOLDER && number.is_some() || folder.is_empty() && ours) && !living
            } else if folder == SHARD_FOLDER {
                name.ends_with(".safetensors") && number.is_some_and(|number| number >= shards)
            } else {
                name == BEGUN_FILE || name == END_FILE
            };
            if is_void {
                durable::remove(&path)?;
                changed = true;
            }
        }
    }
    if changed { durable::sync_directory(directory) } else { Ok(()) }
}
