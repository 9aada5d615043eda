//! Reading a finished cache: any sequence in constant time, and nothing before its hash agreed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::DAMAGED;
use super::blocks::{Checked, Refusal};
use super::codec::{Block, Coder, Shape};
use super::location::{is_url, local_directory};
use super::manifest::{CODER_FILE, Expectation, Manifest, ShardRecord, short};
use super::sealing::same_settings;
use super::settings::CacheSettings;
use super::shard::{TensorIndex, Tensors};
use super::source::{CacheFiles, LocalFiles, read_whole};
use crate::error::{Error, Result};
use crate::profile::stage;
use crate::targets::{DistillBatch, PackedSequence, TargetSource};

/// A finished cache, open for reading from any number of threads.
pub struct CacheReader {
    files: Box<dyn CacheFiles>,
    manifest: Manifest,
    coder: Option<Coder>,
    /// One place per shard, filled when it is first read.
    shards: Vec<Mutex<Option<Arc<OpenShard>>>>,
}

/// A shard whose list of hashes and whose header agreed with the manifest.
pub(crate) struct OpenShard {
    file: Checked,
    index: TensorIndex,
    shape: Shape,
}

impl OpenShard {
    /// Opens a shard of a cache of format `version`; `number` is its place among the cache's shards.
    pub(crate) fn open(
        files: &dyn CacheFiles,
        version: u32,
        settings: &CacheSettings,
        number: u64,
        record: &ShardRecord,
    ) -> Result<OpenShard, Refusal> {
        let source = files.open(&record.file)?;
        // The length is compared again, on what is open: the file may have been exchanged in between.
        if source.length() != record.bytes {
            return Err(Refusal::Other(other_length(source.length(), record)));
        }
        let file = match version {
            1 => Checked::open_whole(source, &record.blake3)?,
            _ => Checked::open(source, &record.blake3)?,
        };
        let shape = Shape::of(settings, record);
        let index = TensorIndex::read(&file, version, settings.codec, number, record.first_sequence);
        let index = index.and_then(|index| settings.codec.check(&index, &shape).map(|()| index));
        Ok(OpenShard { file, index: index.map_err(Refusal::Other)?, shape })
    }

    pub(crate) fn tensors(&self) -> Tensors<'_> {
        Tensors { file: &self.file, index: &self.index }
    }

    /// Its bytes, whatever they mean.
    pub(crate) fn checked(&self) -> &Checked {
        &self.file
    }

    /// All sequences of the shard.
    pub(crate) fn block(&self, settings: &CacheSettings, coder: Option<&Coder>) -> Result<Block, String> {
        let mut block = Block::empty(settings);
        settings.codec.decode(&self.tensors(), &self.shape, coder, 0..self.shape.sequences, &mut block)?;
        Ok(block)
    }

    /// Checks every byte, and whether the content makes sense throughout.
    pub(crate) fn verify(&self, settings: &CacheSettings, coder: Option<&Coder>) -> Result<(), String> {
        self.file.verify()?;
        settings.codec.verify(&self.tensors(), &self.shape, coder)
    }
}

fn other_length(length: u64, record: &ShardRecord) -> String {
    format!("it has {length} bytes, and was sealed with {}", record.bytes)
}

/// Whether a shard's file is there and has the length it was sealed with.
pub(crate) fn check_length(files: &dyn CacheFiles, directory: &Path, record: &ShardRecord) -> Result<()> {
    judge_length(files.length(&record.file), directory, record)
}

fn judge_length(length: std::io::Result<Option<u64>>, directory: &Path, record: &ShardRecord) -> Result<()> {
    let problem = match length {
        Ok(Some(length)) if length == record.bytes => return Ok(()),
        Ok(Some(length)) => other_length(length, record),
        Ok(None) => "it is missing".into(),
        Err(error) => return Err(Error::io(directory.join(&record.file))(error)),
    };
    let (cache, shard) = (directory.to_path_buf(), record.file.clone());
    Err(Error::Shard { cache, shard, problem, tip: DAMAGED.into() })
}

/// What to say of a shard that was not opened; `all` are the records of its cache.
pub(crate) fn refusal(refusal: Refusal, record: &ShardRecord, all: &[ShardRecord]) -> String {
    let hash = match refusal {
        Refusal::Other(problem) => return problem,
        Refusal::Hash(hash) => hash,
    };
    match all.iter().find(|other| other.blake3 == hash) {
        Some(other) => format!("it holds the content of {}: the files were swapped", other.file),
        None => format!(
            "it is damaged: the manifest names the hash {}, its bytes have {}",
            short(&record.blake3),
            short(&hash)
        ),
    }
}

impl CacheReader {
    /// Opens the cache in `directory`: checks its manifest and the length of every shard, reads no shard. An address in
    /// place of a directory is [opened](Self::open_url) as such.
    ///
    /// # Errors
    /// [`Error::File`] when there is no finished cache, or when its manifest or its coder were changed;
    /// [`Error::Shard`] naming the first shard that is missing or of another length.
    pub fn open(directory: impl AsRef<Path>) -> Result<CacheReader> {
        match directory.as_ref().to_str() {
            Some(url) if is_url(url) => CacheReader::open_url(url),
            _ => CacheReader::open_from(Box::new(LocalFiles::new(&directory)), directory),
        }
    }

    /// [`open`](Self::open) of an address: `s3://bucket/path`, `gs://`, `az://`, `http://`, `https://` in a program built
    /// with the feature `object-store`, `file:///path` in any.
    ///
    /// # Errors
    /// As of [`open`](Self::open); [`Error::Usage`] for an address that cannot be used.
    pub fn open_url(url: &str) -> Result<CacheReader> {
        match local_directory(url)? {
            Some(directory) => CacheReader::open_from(Box::new(LocalFiles::new(&directory)), directory),
            None => CacheReader::open_remote(url),
        }
    }

    #[cfg(feature = "object-store")]
    fn open_remote(url: &str) -> Result<CacheReader> {
        let files = super::ObjectFiles::open(url, super::ObjectOptions::default())?;
        let name = files.name().to_path_buf();
        CacheReader::open_from(Box::new(files), name)
    }

    #[cfg(not(feature = "object-store"))]
    fn open_remote(url: &str) -> Result<CacheReader> {
        let problem = format!("{url}: this limbeck was built without object stores");
        Err(Error::usage(problem, "build it with `--features object-store`, or copy the cache to this machine"))
    }

    /// [`open`](Self::open) of files that may be anywhere; `name` is how messages call the cache.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn open_from(files: Box<dyn CacheFiles>, name: impl AsRef<Path>) -> Result<CacheReader> {
        let manifest = Manifest::load_from(&*files, name.as_ref())?;
        let coder = match &manifest.coder {
            None => None,
            Some(record) => {
                let path = manifest.directory.join(CODER_FILE);
                let bytes = read_whole(&*files, CODER_FILE, record.bytes)
                    .map_err(|error| Error::file(&path, format!("it cannot be read: {error}"), DAMAGED))?;
                let hash = blake3::hash(&bytes).to_hex();
                if bytes.len() as u64 != record.bytes || hash.as_str() != record.blake3 {
                    let (named, actual) = (short(&record.blake3), short(&hash));
                    let problem =
                        format!("it is damaged: the manifest names the hash {named}, its bytes have {actual}");
                    return Err(Error::file(path, problem, DAMAGED));
                }
                Some(read_coder(&manifest.settings, &bytes, &path)?)
            }
        };
        let names: Vec<&str> = manifest.shards.iter().map(|record| record.file.as_str()).collect();
        let lengths = files.lengths(&names).into_iter().zip(&manifest.shards);
        lengths.into_iter().try_for_each(|(length, record)| judge_length(length, &manifest.directory, record))?;
        let shards = manifest.shards.iter().map(|_| Mutex::new(None)).collect();
        Ok(CacheReader { files, manifest, coder, shards })
    }

    /// [`open`](Self::open), and [`Manifest::expect`].
    pub fn open_expecting(directory: impl AsRef<Path>, expectation: &Expectation) -> Result<CacheReader> {
        let reader = CacheReader::open(directory)?;
        reader.manifest.expect(expectation)?;
        Ok(reader)
    }

    pub(crate) fn coder(&self) -> Option<&Coder> {
        self.coder.as_ref()
    }

    /// Whether the cache is the one that would be written with these settings.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming what differs.
    pub fn expect_settings(&self, settings: &CacheSettings) -> Result<()> {
        let name = format!("the cache {}", self.manifest.directory.display());
        let tip = "give the address of another cache, or the settings that this one was made with";
        same_settings((name, &self.manifest.settings), ("this run".into(), settings), tip)
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Checks every byte of one shard, whatever of it was read before.
    ///
    /// # Errors
    /// [`Error::Shard`] naming the shard and what is wrong with it.
    pub fn verify_shard(&self, number: usize) -> Result<()> {
        if number >= self.manifest.shards.len() {
            let problem = format!("shard {number} of a cache of {} shards", self.manifest.shards.len());
            return Err(Error::usage(problem, "shards are numbered from 0"));
        }
        let shard = self.open_shard(number)?;
        shard.verify(&self.manifest.settings, self.coder.as_ref()).map_err(|problem| self.shard_error(number, problem))
    }

    pub(crate) fn shard_error(&self, number: usize, problem: impl Into<String>) -> Error {
        let (cache, shard) = (self.manifest.directory.clone(), self.manifest.shards[number].file.clone());
        Error::Shard { cache, shard, problem: problem.into(), tip: DAMAGED.into() }
    }

    /// Name and number of bytes of each tensor of a shard; what is not a codec's tensor is left out.
    pub(crate) fn tensor_sizes(&self, number: usize) -> Result<Vec<(String, u64)>> {
        let shard = self.shard(number)?;
        let mut sizes: Vec<_> = shard.index.sizes().map(|(name, bytes)| (name.to_string(), bytes as u64)).collect();
        let list = shard.file.blocks() * super::blocks::HASH_BYTES;
        if list > 0 {
            sizes.push((super::shard::BLOCK_HASHES.to_string(), list));
        }
        Ok(sizes)
    }

    fn open_shard(&self, number: usize) -> Result<OpenShard> {
        let (manifest, record) = (&self.manifest, &self.manifest.shards[number]);
        check_length(&*self.files, &manifest.directory, record)?;
        OpenShard::open(&*self.files, manifest.format_version, &manifest.settings, number as u64, record)
            .map_err(|why| self.shard_error(number, refusal(why, record, &manifest.shards)))
    }

    /// The shard, opened at its first use.
    fn shard(&self, number: usize) -> Result<Arc<OpenShard>> {
        // A thread that panicked while holding the lock left either nothing or an open shard behind.
        let mut place = self.shards[number].lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match &*place {
            Some(shard) => Ok(shard.clone()),
            None => Ok(place.insert(Arc::new(self.open_shard(number)?)).clone()),
        }
    }
}

/// A codec's tables from the bytes of their file, whose hash agreed.
pub(crate) fn read_coder(settings: &CacheSettings, bytes: &[u8], path: &Path) -> Result<Coder> {
    let path: PathBuf = path.to_path_buf();
    settings.codec.read_coder(settings, bytes).map_err(|problem| Error::file(path, problem, DAMAGED))
}

impl TargetSource for CacheReader {
    fn sequence_count(&self) -> u64 {
        self.manifest.counts.sequences
    }

    fn seq_len(&self) -> usize {
        self.manifest.settings.seq_len
    }

    /// # Errors
    /// [`Error::Usage`] for a number that the cache does not have; [`Error::Shard`] when what it lies in is damaged.
    fn read(&self, numbers: &[u64]) -> Result<DistillBatch> {
        let _span = stage("read the cache").with("sequences", numbers.len() as u64);
        let settings = &self.manifest.settings;
        let mut block = Block::empty(settings);
        let places = numbers.len() * (settings.seq_len + 1);
        block.tokens.reserve_exact(places);
        block.segments.reserve_exact(places);
        for &number in numbers {
            if number >= self.sequence_count() {
                let directory = self.manifest.directory.display();
                let problem = format!("{directory}: there is no sequence {number}");
                return Err(Error::usage(problem, format!("the cache has {}, from 0", self.sequence_count())));
            }
            let full = settings.sequences_per_shard as u64;
            let (shard_number, place) = ((number / full) as usize, (number % full) as usize);
            let shard = self.shard(shard_number)?;
            settings
                .codec
                .decode(&shard.tensors(), &shard.shape, self.coder.as_ref(), place..place + 1, &mut block)
                .map_err(|problem| self.shard_error(shard_number, problem))?;
        }
        let places = block.tokens.chunks(settings.seq_len + 1).zip(block.segments.chunks(settings.seq_len + 1));
        let sequences = places
            .map(|(tokens, segments)| PackedSequence { tokens: tokens.to_vec(), segments: segments.to_vec() })
            .collect();
        Ok(DistillBatch { sequences, targets: block.targets, row_weights: None })
    }
}
