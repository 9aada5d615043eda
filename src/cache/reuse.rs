//! Targets that finished caches have already: sequences of a new cache are looked up by what they are made of.
//!
//! Knows nothing of where sequences come from. Two sequences are the same when tokens and documents are; where a
//! sequence stood makes no difference, so a cache of more of the same data costs what is new in it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::manifest::MANIFEST_FILE;
use super::reader::CacheReader;
use super::sealing::same_settings;
use super::settings::CacheSettings;
use crate::error::{Error, Result};
use crate::targets::{PackedSequence, SparseTargets, TargetSource};

/// Sequences hashed at a time.
const AT_ONCE: u64 = 1024;

type Key = [u8; 32];

/// Finished caches whose targets serve another cache.
#[derive(Default)]
pub struct Reuse {
    caches: Vec<CacheReader>,
    /// Cache and number of the first of equal sequences.
    places: HashMap<Key, (usize, u64)>,
}

impl Reuse {
    /// Opens the caches in `directories` for a cache with `settings`. Reads each of them once.
    ///
    /// # Errors
    /// [`Error::Mismatch`] when a cache was made with another teacher, tokenizer, selection, sequence length or other
    /// temperatures; [`Error::File`] when its values were rounded in another way than the new cache rounds; those of
    /// [`CacheReader`].
    pub fn open(directories: &[PathBuf], settings: &CacheSettings) -> Result<Reuse> {
        let mut reuse = Reuse::default();
        for directory in directories {
            if !directory.join(MANIFEST_FILE).is_file() {
                let tip = "name finished caches in [cache] reuse";
                return Err(Error::file(directory, "there is no finished cache to take targets from", tip));
            }
            let cache = CacheReader::open(directory)?;
            check(directory, &cache.manifest().settings, settings)?;
            let number = reuse.caches.len();
            for first in (0..cache.sequence_count()).step_by(AT_ONCE as usize) {
                let numbers: Vec<u64> = (first..cache.sequence_count().min(first + AT_ONCE)).collect();
                let keys: Result<Vec<Key>> =
                    numbers.par_iter().map(|&sequence| Ok(key(&cache.read(&[sequence])?.sequences[0]))).collect();
                for (key, sequence) in keys?.into_iter().zip(numbers) {
                    reuse.places.entry(key).or_insert((number, sequence));
                }
            }
            reuse.caches.push(cache);
        }
        Ok(reuse)
    }

    /// Number of different sequences that are at hand.
    pub fn sequence_count(&self) -> u64 {
        self.places.len() as u64
    }

    /// The targets of a sequence, if one of the caches has it.
    ///
    /// # Errors
    /// [`Error::Shard`] when the cache that has it is damaged.
    pub fn targets(&self, sequence: &PackedSequence) -> Result<Option<SparseTargets>> {
        if self.places.is_empty() {
            return Ok(None);
        }
        let Some(&(cache, number)) = self.places.get(&key(sequence)) else { return Ok(None) };
        Ok(self.caches[cache].read(&[number])?.targets)
    }
}

fn key(sequence: &PackedSequence) -> Key {
    let mut hasher = blake3::Hasher::new();
    for number in sequence.tokens.iter().chain(&sequence.segments) {
        hasher.update(&number.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Whether targets of a cache with settings `theirs` are those that one with `ours` would be given.
fn check(directory: &Path, theirs: &CacheSettings, ours: &CacheSettings) -> Result<()> {
    // What these settle makes no difference to a sequence's targets.
    let lacks_normalizers = ours.log_normalizer == Some(true) && !theirs.keeps_log_normalizer();
    let alike = CacheSettings {
        split: ours.split.clone(),
        data_fingerprint: ours.data_fingerprint.clone(),
        sequences_per_shard: ours.sequences_per_shard,
        codec: ours.codec,
        levels: ours.levels,
        log_normalizer: if lacks_normalizers { Some(false) } else { ours.log_normalizer },
        ..theirs.clone()
    };
    let named = format!("the cache {} named in [cache] reuse", directory.display());
    same_settings((named, &alike), ("this run".into(), ours), "name caches that were made alike, or none")?;
    let rounds = |settings: &CacheSettings| settings.codec.default_levels().map(|_| settings.levels());
    match rounds(theirs) {
        None => Ok(()),
        Some(levels) if rounds(ours) == Some(levels) => Ok(()),
        Some(levels) => Err(Error::file(
            directory,
            format!("its targets are rounded to {levels} levels ({}), which cannot be undone", theirs.codec.name()),
            format!("set [cache] levels = {levels} with packed or compact, or leave it out of [cache] reuse"),
        )),
    }
}
