//! Shard files: plain safetensors, written in one stream in a fixed order, read through a memory map.
//!
//! Knows tensors of bytes and their hash, not what they mean; [`codec`](super::codec) gives them meaning. Written by
//! hand because the order of keys and tensors is part of the format: equal content must give equal bytes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::Deserialize;

use super::codec::Codec;
use super::manifest::{FORMAT, FORMAT_VERSION};
use crate::durable;
use crate::error::{Error, Result};

pub(crate) const SHARD_FOLDER: &str = "shards";

/// Name of a shard's file, relative to the cache directory.
pub(crate) fn file_name(number: usize) -> String {
    format!("{SHARD_FOLDER}/{number:05}.safetensors")
}

/// One tensor on its way into a shard.
pub(crate) struct TensorBytes<'a> {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Cow<'a, [u8]>,
}

/// What a shard's header says of it beside its tensors.
fn metadata(codec: Codec, number: usize, first_sequence: u64) -> [(&'static str, String); 5] {
    [
        ("format", FORMAT.to_string()),
        ("format_version", FORMAT_VERSION.to_string()),
        ("codec", codec.name().to_string()),
        ("shard", number.to_string()),
        ("first_sequence", first_sequence.to_string()),
    ]
}

/// The header, with its length in front, padded so that the first tensor is aligned to 8 bytes.
fn header(metadata: &[(&str, String)], tensors: &[TensorBytes<'_>]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    let metadata: serde_json::Map<_, _> =
        metadata.iter().map(|(key, value)| (key.to_string(), value.clone().into())).collect();
    entries.insert("__metadata__".into(), metadata.into());
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes.len();
        let entry = serde_json::json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end] });
        entries.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut json = serde_json::to_vec(&entries).expect("a header has only strings as keys");
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    bytes
}

/// Writes and seals one shard: temporary name, sync, rename, sync of the folder.
///
/// Returns the length of the file and the hash of all its bytes.
pub(crate) fn write(
    directory: &Path,
    codec: Codec,
    number: usize,
    first_sequence: u64,
    tensors: &[TensorBytes<'_>],
) -> Result<(u64, blake3::Hash)> {
    let path = directory.join(file_name(number));
    let temporary = durable::temporary_path(&path);
    // A crash's leftovers were removed when the cache was opened, so a file of this name has a living owner.
    let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary).map_err(|error| {
        if error.kind() == std::io::ErrorKind::AlreadyExists {
            Error::file(&temporary, "another process is writing this cache", "wait for it to end, or stop it")
        } else {
            Error::io(&temporary)(error)
        }
    })?;
    let mut written = || -> std::io::Result<(u64, blake3::Hash)> {
        let header = header(&metadata(codec, number, first_sequence), tensors);
        let mut hasher = blake3::Hasher::new();
        let mut length = 0;
        for piece in std::iter::once(&header[..]).chain(tensors.iter().map(|tensor| &tensor.bytes[..])) {
            file.write_all(piece)?;
            hasher.update_rayon(piece);
            length += piece.len() as u64;
        }
        file.sync_all()?;
        Ok((length, hasher.finalize()))
    };
    let sealed = written().and_then(|sealed| fs::rename(&temporary, &path).map(|()| sealed)).map_err(|error| {
        // Best effort: a full disk should not also keep the half-written file.
        let _ = fs::remove_file(&temporary);
        Error::io(&path)(error)
    })?;
    durable::sync_directory(&directory.join(SHARD_FOLDER))?;
    Ok(sealed)
}

/// A shard mapped into memory.
pub(crate) struct MappedShard {
    map: memmap2::Mmap,
}

impl MappedShard {
    pub(crate) fn open(path: &Path) -> Result<MappedShard> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read, as plain bytes, for which any content is valid. That nobody truncates a file
        // of a finished cache while it is read is a rule of the format (docs/cache-format.md, "Forbidden").
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(MappedShard { map })
    }

    /// Hash of the whole file, by all cores.
    pub(crate) fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update_rayon(&self.map);
        hasher.finalize()
    }

    pub(crate) fn length(&self) -> u64 {
        self.map.len() as u64
    }

    /// Where each tensor lies.
    pub(crate) fn index(&self, codec: Codec, number: usize, first_sequence: u64) -> Result<TensorIndex, String> {
        let length = self.map.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).unwrap_or(u64::MAX);
        let header = usize::try_from(length).ok().and_then(|length| self.map.get(8..length.checked_add(8)?));
        let header = header.ok_or("its header is longer than the file")?;
        let base = 8 + header.len();
        let header: Header =
            serde_json::from_slice(header).map_err(|error| format!("its header is malformed: {error}"))?;
        for (key, expected) in metadata(codec, number, first_sequence) {
            let said = header.metadata.get(key);
            if said != Some(&expected) {
                return Err(format!("its header says {key} = {said:?}, not {expected:?}"));
            }
        }
        // Without gaps from the header to the end of the file, so that every tensor lies inside the map.
        let mut places: Vec<_> = header.tensors.iter().map(|(name, entry)| (entry.data_offsets, name)).collect();
        places.sort_unstable();
        let mut end = 0;
        for ((from, to), name) in places {
            if from != end || to < from {
                return Err(format!("tensor `{name}` does not start where the one before it ends"));
            }
            end = to;
        }
        if end != self.map.len() - base {
            return Err(format!("its tensors have {end} bytes, the file has {} for them", self.map.len() - base));
        }
        Ok(TensorIndex { base, tensors: header.tensors })
    }

    pub(crate) fn tensors<'a>(&'a self, index: &'a TensorIndex) -> Tensors<'a> {
        Tensors { bytes: &self.map, index }
    }
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
    tensors: HashMap<String, TensorEntry>,
}

impl TensorIndex {
    /// Name and number of bytes of each tensor.
    pub(crate) fn sizes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|(name, entry)| (name.as_str(), entry.data_offsets.1 - entry.data_offsets.0))
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
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

/// The tensors of a mapped shard, after [`TensorIndex::check`]. Copies out of the map, so no alignment is needed.
pub(crate) struct Tensors<'a> {
    bytes: &'a [u8],
    index: &'a TensorIndex,
}

impl Tensors<'_> {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.index.has(name)
    }

    /// Elements `range` of a tensor of `N`-byte elements.
    fn elements<const N: usize>(&self, name: &str, range: Range<usize>) -> Result<&[[u8; N]], String> {
        let entry = self.index.tensors.get(name).ok_or_else(|| format!("tensor `{name}` is missing"))?;
        let (start, end) = entry.data_offsets;
        let (elements, _) = self.bytes[self.index.base + start..self.index.base + end].as_chunks::<N>();
        let length = elements.len();
        elements.get(range.clone()).ok_or_else(|| format!("tensor `{name}` has {length} elements, asked for {range:?}"))
    }

    pub(crate) fn u32s(&self, name: &str, range: Range<usize>) -> Result<Vec<u32>, String> {
        Ok(self.elements(name, range)?.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
    }

    pub(crate) fn f32s(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, String> {
        Ok(self.elements(name, range)?.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    pub(crate) fn u64s(&self, name: &str, range: Range<usize>) -> Result<Vec<u64>, String> {
        Ok(self.elements(name, range)?.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect())
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
