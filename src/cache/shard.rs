//! Shard files: plain safetensors, written in one stream in a fixed order, and read tensor by tensor.
//!
//! Knows tensors of bytes, not what they mean; [`codec`](super::codec) gives them meaning, and
//! [`blocks`](super::blocks) vouches for them. Written by hand because the order of keys and tensors is part of the
//! format: equal content must give equal bytes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;

use super::blocks::{BlockHasher, Checked, HASH_BYTES, block_count};
use super::codec::Codec;
use super::manifest::{FORMAT, FORMAT_VERSION};
use crate::durable;
use crate::error::{Error, Result};
use crate::profile::stage;

pub(crate) const SHARD_FOLDER: &str = "shards";
/// The tensor with the hashes of all that comes before it.
pub(crate) const BLOCK_HASHES: &str = "block_hashes";

/// Name of a shard's file, relative to the cache directory.
pub(crate) fn file_name(number: u64) -> String {
    file_in(SHARD_FOLDER, number)
}

/// Name of a shard's file in one of the folders of shards.
pub(crate) fn file_in(folder: &str, number: u64) -> String {
    format!("{folder}/{number:05}.safetensors")
}

/// One tensor on its way into a shard.
pub(crate) struct TensorBytes<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

/// What a shard's header says of it beside its tensors.
fn metadata(version: u32, codec: Codec, number: u64, first_sequence: u64) -> [(&'static str, String); 5] {
    [
        ("format", FORMAT.to_string()),
        ("format_version", version.to_string()),
        ("codec", codec.name().to_string()),
        ("shard", number.to_string()),
        ("first_sequence", first_sequence.to_string()),
    ]
}

/// The header, with its length in front, padded so that the first tensor is aligned to 8 bytes. Names the hashes of
/// `blocks` blocks after the tensors.
fn header(metadata: &[(&str, String)], tensors: &[TensorBytes<'_>], blocks: u64) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    let metadata: serde_json::Map<_, _> =
        metadata.iter().map(|(key, value)| (key.to_string(), value.clone().into())).collect();
    entries.insert("__metadata__".into(), metadata.into());
    let mut start = 0;
    let mut add = |name: &str, dtype: Dtype, shape: &[usize], bytes: usize| {
        let entry = serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, start + bytes] });
        entries.insert(name.into(), entry);
        start += bytes;
    };
    for tensor in tensors {
        add(&tensor.name, tensor.dtype, &tensor.shape, tensor.bytes.len());
    }
    let shape = [blocks as usize, HASH_BYTES as usize];
    add(BLOCK_HASHES, Dtype::U8, &shape, shape[0] * shape[1]);
    let mut json = serde_json::to_vec(&entries).expect("a header has only strings as keys");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// The header whose own length is counted in the number of blocks that it names.
fn header_with_blocks(metadata: &[(&str, String)], tensors: &[TensorBytes<'_>]) -> Vec<u8> {
    let content: u64 = tensors.iter().map(|tensor| tensor.bytes.len() as u64).sum();
    let mut blocks = block_count(content);
    loop {
        let header = header(metadata, tensors, blocks);
        // A larger number never makes a shorter header, so this comes to rest.
        match block_count(header.len() as u64 + content) {
            needed if needed == blocks => return header,
            needed => blocks = needed,
        }
    }
}

/// Length and hash of a file that was written.
pub(crate) struct Written {
    pub bytes: u64,
    pub blake3: blake3::Hash,
}

/// Writes the bytes of a shard to `path`, a temporary name, and syncs file and folder.
pub(crate) fn write(
    path: &Path,
    codec: Codec,
    number: u64,
    first_sequence: u64,
    tensors: &[TensorBytes<'_>],
) -> Result<Written> {
    let header = header_with_blocks(&metadata(FORMAT_VERSION, codec, number, first_sequence), tensors);
    let mut hasher = BlockHasher::default();
    let mut bytes = 0;
    let _span = stage("cache write");
    write_synced(path, |file| {
        for piece in std::iter::once(&header[..]).chain(tensors.iter().map(|tensor| &tensor.bytes[..])) {
            file.write_all(piece)?;
            hasher.update(piece);
            bytes += piece.len() as u64;
        }
        let list = std::mem::take(&mut hasher).finish();
        file.write_all(&list)?;
        Ok(Written { bytes: bytes + list.len() as u64, blake3: blake3::hash(&list) })
    })
}

/// Writes a file under a temporary name that nobody else uses, and syncs it and its folder.
pub(crate) fn write_synced<T>(path: &Path, fill: impl FnOnce(&mut fs::File) -> std::io::Result<T>) -> Result<T> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path).map_err(Error::io(path))?;
    let sync = |file: &fs::File| {
        let _span = stage("cache sync");
        file.sync_all()
    };
    let filled = fill(&mut file).and_then(|filled| sync(&file).map(|()| filled)).map_err(|error| {
        // Best effort: a full disk should not also keep the half-written file.
        let _ = fs::remove_file(path);
        Error::io(path)(error)
    })?;
    durable::sync_directory(durable::parent(path))?;
    Ok(filled)
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__")]
    metadata: HashMap<String, String>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorEntry>,
}

#[derive(Deserialize)]
struct TensorEntry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// From the end of the header.
    data_offsets: (usize, usize),
}

/// Where the tensors of a shard lie.
pub(crate) struct TensorIndex {
    /// Length of the header.
    base: usize,
    /// The codec's; the list of hashes is not among them.
    tensors: HashMap<String, TensorEntry>,
}

impl TensorIndex {
    /// Reads the header of a shard and compares it with what the manifest and the length of the file say.
    pub(crate) fn read(
        file: &Checked,
        version: u32,
        codec: Codec,
        number: u64,
        first_sequence: u64,
    ) -> Result<TensorIndex, String> {
        let long = "its header is longer than the file";
        if file.data_bytes() < 8 {
            return Err(long.into());
        }
        let length = file.bytes(0..8)?;
        let length = u64::from_le_bytes(length[..].try_into().expect("8 bytes were asked for"));
        let end = length.checked_add(8).filter(|end| *end <= file.data_bytes()).ok_or(long)?;
        let header: Header = serde_json::from_slice(&file.bytes(8..end)?)
            .map_err(|error| format!("its header is malformed: {error}"))?;
        for (key, expected) in metadata(version, codec, number, first_sequence) {
            let said = header.metadata.get(key);
            if said != Some(&expected) {
                return Err(format!("its header says {key} = {said:?}, not {expected:?}"));
            }
        }
        let mut tensors = header.tensors;
        // Without gaps from the header to the end of the file, so that every tensor lies inside it.
        let mut places: Vec<_> = tensors.iter().map(|(name, entry)| (entry.data_offsets, name)).collect();
        places.sort_unstable();
        let mut reached = 0;
        for ((from, to), name) in places {
            if from != reached || to < from {
                return Err(format!("tensor `{name}` does not start where the one before it ends"));
            }
            reached = to;
        }
        let base = usize::try_from(end).map_err(|_| long)?;
        let list = (file.blocks() * HASH_BYTES) as usize;
        let room = file.data_bytes() as usize - base + list;
        if reached != room {
            return Err(format!("its tensors have {reached} bytes, the file has {room} for them"));
        }
        if version > 1 {
            let shape = [file.blocks() as usize, HASH_BYTES as usize];
            let entry = tensors.remove(BLOCK_HASHES);
            let is_last = |entry: &TensorEntry| {
                entry.dtype == Dtype::U8 && entry.shape == shape && entry.data_offsets == (room - list, room)
            };
            if !entry.as_ref().is_some_and(is_last) {
                return Err(format!("its last tensor is not `{BLOCK_HASHES}`, U8 {shape:?}"));
            }
        }
        Ok(TensorIndex { base, tensors })
    }

    /// Name and number of bytes of each tensor of the codec.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.data_offsets.1 - entry.data_offsets.0))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Bytes of a tensor, if it is there.
    pub(crate) fn length(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|entry| entry.data_offsets.1 - entry.data_offsets.0)
    }

    /// Whether the shard has exactly the tensors of `layout`.
    pub(crate) fn check(&self, layout: &[(String, Dtype, Vec<usize>)]) -> Result<(), String> {
        for (name, dtype, shape) in layout {
            let entry = self.tensors.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
            if entry.dtype != *dtype || entry.shape != *shape {
                return Err(format!(
                    "tensor `{name}` is {:?} {:?}, the manifest implies {dtype:?} {shape:?}",
                    entry.dtype, entry.shape
                ));
            }
            let implied = shape.iter().try_fold(dtype.bitsize() / 8, |size, extent| size.checked_mul(*extent));
            let bytes = entry.data_offsets.1 - entry.data_offsets.0;
            if implied != Some(bytes) {
                return Err(format!("tensor `{name}` has {bytes} bytes, which is not what {dtype:?} {shape:?} takes"));
            }
        }
        match self.tensors.keys().find(|name| layout.iter().all(|(expected, ..)| expected != *name)) {
            Some(name) => Err(format!("tensor `{name}` does not belong there")),
            None => Ok(()),
        }
    }
}

/// The tensors of an open shard. What is asked for is checked against its hash; alignment is not needed.
pub(crate) struct Tensors<'a> {
    pub file: &'a Checked,
    pub index: &'a TensorIndex,
}

impl<'a> Tensors<'a> {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.index.has(name)
    }

    /// Elements `range` of a tensor of elements of `size` bytes, as bytes.
    fn elements(&self, name: &str, size: usize, range: Range<usize>) -> Result<Cow<'a, [u8]>, String> {
        let entry = self.index.tensors.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
        let (start, end) = entry.data_offsets;
        let length = (end - start) / size;
        if range.start > range.end || range.end > length {
            return Err(format!("tensor `{name}` has {length} elements, asked for {range:?}"));
        }
        let start = self.index.base + start;
        self.file.bytes((start + range.start * size) as u64..(start + range.end * size) as u64)
    }

    pub(crate) fn u8s(&self, name: &str, range: Range<usize>) -> Result<Cow<'a, [u8]>, String> {
        self.elements(name, 1, range)
    }

    /// Appends elements of a tensor to `into`.
    pub(crate) fn extend_u32s(&self, name: &str, range: Range<usize>, into: &mut Vec<u32>) -> Result<(), String> {
        let bytes = self.elements(name, 4, range)?;
        into.extend(bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
        Ok(())
    }

    /// Appends elements of a tensor to `into`.
    pub(crate) fn extend_f32s(&self, name: &str, range: Range<usize>, into: &mut Vec<f32>) -> Result<(), String> {
        let bytes = self.elements(name, 4, range)?;
        into.extend(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
        Ok(())
    }

    pub(crate) fn u64s(&self, name: &str, range: Range<usize>) -> Result<Vec<u64>, String> {
        let bytes = self.elements(name, 8, range)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
    }
}

/// Little-endian bytes of numbers, without a copy where memory has them already.
pub(crate) fn little_endian<T: bytemuck::NoUninit, const N: usize>(
    values: &[T],
    to_bytes: impl Fn(&T) -> [u8; N],
) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(values))
    } else {
        Cow::Owned(values.iter().flat_map(to_bytes).collect())
    }
}
