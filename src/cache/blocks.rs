//! Hashes of blocks: what vouches for a shard's bytes (docs/cache-format.md, "Blocks").
//!
//! A shard of version 2 carries a list of hashes, one for each 64 KiB of its data, and the manifest the hash of the list.
//! Knows bytes and hashes, not what is in them.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::manifest::short;
use super::source::ShardSource;

/// Bytes of a shard's data under one hash.
pub const BLOCK_BYTES: u64 = 65_536;
pub(crate) const HASH_BYTES: u64 = 32;
/// Blocks fetched in one piece when all of a shard is walked.
const BLOCKS_PER_WALK: u64 = 64;

/// Blocks of a data part of so many bytes.
pub(crate) fn block_count(data_bytes: u64) -> u64 {
    data_bytes.div_ceil(BLOCK_BYTES)
}

/// Length of the data part of a file, and the number of its blocks; `None` if no shard has this length.
pub(crate) fn split(file_bytes: u64) -> Option<(u64, u64)> {
    let blocks = file_bytes.div_ceil(BLOCK_BYTES + HASH_BYTES);
    let data = file_bytes.checked_sub(HASH_BYTES * blocks)?;
    (data > 0 && block_count(data) == blocks).then_some((data, blocks))
}

/// Makes the list while the data goes by in pieces of any length.
#[derive(Default)]
pub(crate) struct BlockHasher {
    list: Vec<u8>,
    open: blake3::Hasher,
    /// Bytes in the open block.
    filled: u64,
}

impl BlockHasher {
    pub(crate) fn update(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() {
            let room = (BLOCK_BYTES - self.filled) as usize;
            let (now, later) = piece.split_at(room.min(piece.len()));
            self.open.update(now);
            self.filled += now.len() as u64;
            piece = later;
            if self.filled == BLOCK_BYTES {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.list.extend_from_slice(self.open.finalize().as_bytes());
        self.open.reset();
        self.filled = 0;
    }

    /// The hashes of all blocks, one after the other.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        if self.filled > 0 {
            self.close();
        }
        self.list
    }
}

/// A shard whose bytes are handed out only after their hash agreed.
pub(crate) struct Checked {
    source: Box<dyn ShardSource>,
    /// Bytes before the list.
    data_bytes: u64,
    /// Empty in version 1, whose hash is of the whole file and was checked when it was opened.
    list: Vec<u8>,
    /// A bit per block that was checked while borrowed.
    seen: Vec<AtomicU64>,
}

/// Why a shard was not opened.
pub(crate) enum Refusal {
    /// Its hash, in hex, is not the one that the manifest names.
    Hash(String),
    Other(String),
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Refusal {
        Refusal::Other(unread(error))
    }
}

fn unread(error: std::io::Error) -> String {
    format!("it cannot be read: {error}")
}

/// Bytes that passed a check. What came damaged is read once more where that may help, and never kept.
fn read_again_if_damaged<'a, E>(
    source: &'a dyn ShardSource,
    range: Range<u64>,
    check: impl Fn(&[u8]) -> Result<(), E>,
) -> std::io::Result<Result<Cow<'a, [u8]>, E>> {
    let bytes = source.read(range.clone())?;
    match check(&bytes) {
        Err(_) if source.forget(range.clone()) => {}
        outcome => return Ok(outcome.map(|()| bytes)),
    }
    let again = source.read(range.clone())?;
    let outcome = check(&again);
    if outcome.is_err() {
        source.forget(range);
    }
    Ok(outcome.map(|()| again))
}

impl Checked {
    /// A shard of version 2: checks its list against `expected`, the hash in the manifest.
    pub(crate) fn open(source: Box<dyn ShardSource>, expected: &str) -> Result<Checked, Refusal> {
        let length = source.length();
        let Some((data_bytes, blocks)) = split(length) else {
            return Err(Refusal::Other(format!("no shard has a length of {length} bytes")));
        };
        let list = read_again_if_damaged(&*source, data_bytes..length, |list| {
            let hash = blake3::hash(list).to_hex();
            if hash.as_str() == expected { Ok(()) } else { Err(Refusal::Hash(hash.to_string())) }
        });
        let list = list??.into_owned();
        let seen = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(Checked { source, data_bytes, list, seen })
    }

    /// A shard of version 1: checks all of it now.
    pub(crate) fn open_whole(source: Box<dyn ShardSource>, expected: &str) -> Result<Checked, Refusal> {
        let length = source.length();
        let bytes = read_again_if_damaged(&*source, 0..length, |bytes| {
            let mut hasher = blake3::Hasher::new();
            hasher.update_rayon(bytes);
            let hash = hasher.finalize().to_hex();
            if hash.as_str() == expected { Ok(()) } else { Err(Refusal::Hash(hash.to_string())) }
        });
        let bytes = bytes??;
        // What was fetched is kept, so that the hash is of what is read later.
        let fetched = match bytes {
            Cow::Owned(bytes) => Some(bytes),
            Cow::Borrowed(_) => None,
        };
        let source = fetched.map_or(source, |bytes| Box::new(bytes));
        Ok(Checked { source, data_bytes: length, list: vec![], seen: vec![] })
    }

    /// Bytes before the list of hashes.
    pub(crate) fn data_bytes(&self) -> u64 {
        self.data_bytes
    }

    /// Number of blocks; 0 in version 1.
    pub(crate) fn blocks(&self) -> u64 {
        self.list.len() as u64 / HASH_BYTES
    }

    /// Some bytes of the data part, checked.
    pub(crate) fn bytes(&self, range: Range<u64>) -> Result<Cow<'_, [u8]>, String> {
        if range.start > range.end || range.end > self.data_bytes {
            return Err(format!("bytes {range:?} are asked for, and it has {}", self.data_bytes));
        }
        if self.list.is_empty() || range.is_empty() {
            return self.source.read(range).map_err(unread);
        }
        let (first, end) = (range.start / BLOCK_BYTES, range.end.div_ceil(BLOCK_BYTES));
        if (first..end).all(|block| self.is_seen(block)) {
            return self.source.read(range).map_err(unread);
        }
        let start = first * BLOCK_BYTES;
        let whole = self.whole_blocks(first..end)?;
        let inner = (range.start - start) as usize..(range.end - start) as usize;
        Ok(match whole {
            Cow::Borrowed(bytes) => {
                (first..end).for_each(|block| self.mark(block));
                Cow::Borrowed(&bytes[inner])
            }
            Cow::Owned(mut bytes) => {
                bytes.truncate(inner.end);
                bytes.drain(..inner.start);
                Cow::Owned(bytes)
            }
        })
    }

    fn whole_blocks(&self, blocks: Range<u64>) -> Result<Cow<'_, [u8]>, String> {
        let range = blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(self.data_bytes);
        let read = read_again_if_damaged(&*self.source, range, |bytes| self.check(blocks.clone(), bytes));
        read.map_err(unread)?
    }

    /// Checks every block, by all cores.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let blocks = self.blocks();
        let walks = blocks.div_ceil(BLOCKS_PER_WALK);
        // The first damage in the order of the file, whoever finds it.
        let damage = (0..walks).into_par_iter().find_map_first(|walk| {
            let (first, end) = (walk * BLOCKS_PER_WALK, ((walk + 1) * BLOCKS_PER_WALK).min(blocks));
            self.whole_blocks(first..end).err()
        });
        damage.map_or(Ok(()), Err)
    }

    fn check(&self, blocks: Range<u64>, bytes: &[u8]) -> Result<(), String> {
        for (number, block) in blocks.clone().zip(bytes.chunks(BLOCK_BYTES as usize)) {
            let place = (number * HASH_BYTES) as usize;
            let expected = &self.list[place..place + HASH_BYTES as usize];
            let hash = blake3::hash(block);
            if hash.as_bytes() != expected {
                let from = number * BLOCK_BYTES;
                let named = blake3::Hash::from_slice(expected).expect("32 bytes").to_hex();
                return Err(format!(
                    "block {number} (bytes {from} to {}) is damaged: its list names the hash {}, the bytes have {}",
                    from + block.len() as u64,
                    short(&named),
                    short(&hash.to_hex())
                ));
            }
        }
        if bytes.len().div_ceil(BLOCK_BYTES as usize) as u64 == blocks.end - blocks.start {
            return Ok(());
        }
        Err("it is shorter than when it was opened".into())
    }

    fn is_seen(&self, block: u64) -> bool {
        self.seen[(block / 64) as usize].load(Ordering::Acquire) >> (block % 64) & 1 == 1
    }

    fn mark(&self, block: u64) {
        self.seen[(block / 64) as usize].fetch_or(1 << (block % 64), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_blocks_follows_from_the_length_of_the_file() {
        assert_eq!(split(0), None);
        for data in (1..5).chain(65_500..65_600).chain(131_000..131_200).chain([1 << 30, 1 << 45]) {
            let blocks = block_count(data);
            assert_eq!(split(data + HASH_BYTES * blocks), Some((data, blocks)), "{data}");
        }
        // Lengths that no shard has: the last block would be empty.
        for length in (1..=32).chain(65_569..=65_600) {
            assert_eq!(split(length), None, "{length}");
        }
    }

    #[test]
    fn the_list_does_not_depend_on_the_pieces() {
        let data: Vec<u8> = (0..200_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        let whole: Vec<u8> = data.chunks(65_536).flat_map(|block| *blake3::hash(block).as_bytes()).collect();
        for piece in [1000, 65_536, 70_001, 200_000] {
            let mut hasher = BlockHasher::default();
            data.chunks(piece).for_each(|piece| hasher.update(piece));
            assert_eq!(hasher.finish(), whole);
        }
    }

    /// A source that hands out copies, and counts them.
    struct Copies(Vec<u8>, AtomicU64);

    impl ShardSource for Copies {
        fn length(&self) -> u64 {
            self.0.len() as u64
        }

        fn read(&self, range: Range<u64>) -> std::io::Result<Cow<'_, [u8]>> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.read(range).map(|bytes| Cow::Owned(bytes.into_owned()))
        }
    }

    #[test]
    fn a_part_is_handed_out_checked_from_memory_and_from_copies() {
        let mut file: Vec<u8> = (0..150_000u32).map(|i| (i / 3) as u8).collect();
        let mut hasher = BlockHasher::default();
        hasher.update(&file);
        file.extend(hasher.finish());
        let (data, _) = split(file.len() as u64).unwrap();
        assert_eq!(data, 150_000);
        let name = blake3::hash(&file[150_000..]).to_hex().to_string();
        let sources: [Box<dyn ShardSource>; 2] =
            [Box::new(file.clone()), Box::new(Copies(file.clone(), AtomicU64::new(0)))];
        for source in sources {
            let checked = Checked::open(source, &name).ok().unwrap();
            for range in [0..10, 65_530..65_540, 100..150_000, 149_999..150_000, 7..7, 0..150_000] {
                let expected = &file[range.start as usize..range.end as usize];
                assert_eq!(&checked.bytes(range.clone()).unwrap()[..], expected, "{range:?}");
            }
            assert!(checked.bytes(0..150_001).is_err());
            checked.verify().unwrap();
        }
        // A flip is found when its block is touched, and not before.
        let mut flipped = file.clone();
        flipped[70_000] ^= 4;
        let sources: [Box<dyn ShardSource>; 2] =
            [Box::new(flipped.clone()), Box::new(Copies(flipped, AtomicU64::new(0)))];
        for source in sources {
            let checked = Checked::open(source, &name).ok().unwrap();
            checked.bytes(0..65_536).unwrap();
            for _ in 0..2 {
                let error = checked.bytes(65_535..65_537).unwrap_err();
                assert!(error.starts_with("block 1 (bytes 65536 to 131072) is damaged: its list names "), "{error}");
            }
            checked.bytes(131_072..150_000).unwrap();
            checked.verify().unwrap_err();
        }
    }
}
