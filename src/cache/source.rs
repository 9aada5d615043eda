//! Where the bytes of a finished cache come from: a directory, memory, or whatever else implements the two traits.
//!
//! Knows names and ranges, and neither hashes nor tensors; nothing that comes from here is believed before
//! [`blocks`](super::blocks) checked it.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One file, open for reading any part of it from any number of threads.
pub trait ShardSource: Send + Sync {
    /// Length of the file in bytes.
    fn length(&self) -> u64;

    /// The bytes of `range`, all of them. What is borrowed must not change while the source lives, and is checked once;
    /// what is owned is checked each time.
    ///
    /// # Errors
    /// [`ErrorKind::UnexpectedEof`] when the file ends before the range does.
    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>>;

    /// Drops what is kept of a range that turned out to be damaged. Whether another reading may give other bytes: not
    /// from a disk, but from a network.
    fn forget(&self, range: Range<u64>) -> bool {
        let _ = range;
        false
    }
}

/// The files of one finished cache, by their names relative to it (`manifest.json`, `shards/00000.safetensors`).
pub trait CacheFiles: Send + Sync {
    /// The length of a file; `None` when there is none of this name.
    fn length(&self, name: &str) -> io::Result<Option<u64>>;

    /// [`length`](Self::length) of several files, in their order: where an answer takes long, all at once.
    fn lengths(&self, names: &[&str]) -> Vec<io::Result<Option<u64>>> {
        names.iter().map(|name| self.length(name)).collect()
    }

    /// Opens a file to read parts of it.
    fn open(&self, name: &str) -> io::Result<Box<dyn ShardSource>>;
}

/// Whole content of a file, if it has no more than `most` bytes.
pub(crate) fn read_whole(files: &dyn CacheFiles, name: &str, most: u64) -> io::Result<Vec<u8>> {
    let source = files.open(name)?;
    if source.length() > most {
        let problem = format!("it has {} bytes, more than the {most} that are read", source.length());
        return Err(io::Error::new(ErrorKind::InvalidData, problem));
    }
    source.read(0..source.length()).map(Cow::into_owned)
}

/// A cache in a directory, its shards mapped into memory.
#[derive(Debug, Clone)]
pub struct LocalFiles {
    directory: PathBuf,
}

impl LocalFiles {
    pub fn new(directory: impl AsRef<Path>) -> LocalFiles {
        LocalFiles { directory: directory.as_ref().to_path_buf() }
    }
}

impl CacheFiles for LocalFiles {
    fn length(&self, name: &str) -> io::Result<Option<u64>> {
        match fs::metadata(self.directory.join(name)) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn ShardSource>> {
        let file = File::open(self.directory.join(name))?;
        // SAFETY: the map is only read, as plain bytes, for which any content is valid. That nobody truncates a file
        // of a finished cache while it is read is a rule of the format (docs/cache-format.md, "Forbidden").
        let map = unsafe { memmap2::Mmap::map(&file) }?;
        Ok(Box::new(Mapped(map)))
    }
}

struct Mapped(memmap2::Mmap);

impl ShardSource for Mapped {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        part(&self.0, range)
    }
}

/// A file held in memory.
impl ShardSource for Vec<u8> {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
        part(self, range)
    }
}

fn part(bytes: &[u8], range: Range<u64>) -> io::Result<Cow<'_, [u8]>> {
    let place = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    let part = bytes.get(place(range.start)..place(range.end));
    part.map(Cow::Borrowed).ok_or_else(|| {
        let problem = format!("bytes {} to {} of a file of {}", range.start, range.end, bytes.len());
        io::Error::new(ErrorKind::UnexpectedEof, problem)
    })
}
