//! Reading a finished cache: any sequence in constant time, and nothing before its shard's hash agreed.

use std::path::Path;
use std::sync::{Arc, Mutex};

use super::DAMAGED;
use super::codec::Shape;
use super::manifest::{Expectation, Manifest, short};
use super::shard::{MappedShard, TensorIndex};
use super::writer::check_length;
use crate::error::{Error, Result};
use crate::targets::{DistillBatch, PackedSequence, SparseTargets, TargetSource};

/// A finished cache, open for reading from any number of threads.
pub struct CacheReader {
    manifest: Manifest,
    /// One place per shard, filled when it is first read.
    shards: Vec<Mutex<Option<Arc<OpenShard>>>>,
}

/// A shard whose hash and layout agreed with the manifest.
struct OpenShard {
    map: MappedShard,
    index: TensorIndex,
    shape: Shape,
}

impl CacheReader {
    /// Opens the cache in `directory`: checks its manifest and the length of every shard, reads no shard.
    ///
    /// # Errors
    /// [`Error::File`] when there is no finished cache or its manifest was changed; [`Error::Shard`] naming the first
    /// shard that is missing or of another length.
    pub fn open(directory: impl AsRef<Path>) -> Result<CacheReader> {
        let manifest = Manifest::load(directory)?;
        manifest.shards.iter().try_for_each(|record| check_length(&manifest.directory, record))?;
        let shards = manifest.shards.iter().map(|_| Mutex::new(None)).collect();
        Ok(CacheReader { manifest, shards })
    }

    /// [`open`](Self::open), and [`Manifest::expect`].
    pub fn open_expecting(directory: impl AsRef<Path>, expectation: &Expectation) -> Result<CacheReader> {
        let reader = CacheReader::open(directory)?;
        reader.manifest.expect(expectation)?;
        Ok(reader)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Checks every byte of one shard: its hash, its header, its offsets.
    ///
    /// # Errors
    /// [`Error::Shard`] naming the shard and what is wrong with it.
    pub fn verify_shard(&self, number: usize) -> Result<()> {
        self.open_shard(number).map(drop)
    }

    pub(crate) fn shard_error(&self, number: usize, problem: impl Into<String>) -> Error {
        let (cache, shard) = (self.manifest.directory.clone(), self.manifest.shards[number].file.clone());
        Error::Shard { cache, shard, problem: problem.into(), tip: DAMAGED.into() }
    }

    /// Maps a shard and finds its tensors without checking its hash.
    pub(crate) fn map_shard(&self, number: usize) -> Result<(MappedShard, Result<TensorIndex, String>)> {
        let record = &self.manifest.shards[number];
        check_length(&self.manifest.directory, record)?;
        let map = MappedShard::open(&self.manifest.directory.join(&record.file))?;
        let index = map.index(self.manifest.settings.codec, number, record.first_sequence);
        Ok((map, index))
    }

    fn open_shard(&self, number: usize) -> Result<OpenShard> {
        let Some(record) = self.manifest.shards.get(number) else {
            let problem = format!("shard {number} of a cache of {} shards", self.manifest.shards.len());
            return Err(Error::usage(problem, "shards are numbered from 0"));
        };
        let directory = &self.manifest.directory;
        check_length(directory, record)?;
        let map = MappedShard::open(&directory.join(&record.file))?;
        // The length is compared again, on what is mapped: the file may have been exchanged in between.
        let hash = map.hash().to_hex();
        if map.length() != record.bytes || hash.as_str() != record.blake3 {
            let twin = self.manifest.shards.iter().find(|other| other.blake3 == hash.as_str());
            return Err(self.shard_error(
                number,
                match twin {
                    Some(other) => format!("it holds the content of {}: the files were swapped", other.file),
                    None => format!(
                        "it is damaged: the manifest names the hash {}, its bytes have {}",
                        short(&record.blake3),
                        short(&hash)
                    ),
                },
            ));
        }
        let codec = self.manifest.settings.codec;
        let shape = Shape::of(&self.manifest.settings, record);
        let index = map
            .index(codec, number, record.first_sequence)
            .and_then(|index| codec.check(&index, &map.tensors(&index), &shape).map(|()| index))
            .map_err(|problem| self.shard_error(number, problem))?;
        Ok(OpenShard { map, index, shape })
    }

    /// The shard, opened and verified at its first use.
    fn shard(&self, number: usize) -> Result<Arc<OpenShard>> {
        // A thread that panicked while holding the lock left either nothing or a verified shard behind.
        let mut place = self.shards[number].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*place {
            Some(shard) => Ok(shard.clone()),
            None => Ok(place.insert(Arc::new(self.open_shard(number)?)).clone()),
        }
    }
}

impl TargetSource for CacheReader {
    fn sequence_count(&self) -> u64 {
        self.manifest.counts.sequences
    }

    fn seq_len(&self) -> usize {
        self.manifest.settings.seq_len
    }

    /// # Errors
    /// [`Error::Usage`] for a number that the cache does not have; [`Error::Shard`] when the shard it lies in is damaged.
    fn read(&self, numbers: &[u64]) -> Result<DistillBatch> {
        let settings = &self.manifest.settings;
        let mut sequences = Vec::with_capacity(numbers.len());
        let mut targets = settings.soft_targets.as_ref().map(|soft| SparseTargets::empty(&soft.temperatures));
        for &number in numbers {
            if number >= self.sequence_count() {
                let directory = self.manifest.directory.display();
                let problem = format!("{directory}: there is no sequence {number}");
                return Err(Error::usage(problem, format!("the cache has {}, from 0", self.sequence_count())));
            }
            let full = settings.sequences_per_shard as u64;
            let (shard_number, place) = ((number / full) as usize, (number % full) as usize);
            let shard = self.shard(shard_number)?;
            let block = settings
                .codec
                .decode(&shard.map.tensors(&shard.index), &shard.shape, place..place + 1)
                .map_err(|problem| self.shard_error(shard_number, problem))?;
            sequences.push(PackedSequence { tokens: block.tokens, segments: block.segments });
            if let (Some(targets), Some(rows)) = (&mut targets, &block.targets) {
                targets.extend(rows);
            }
        }
        Ok(DistillBatch { sequences, targets, row_weights: None })
    }
}
