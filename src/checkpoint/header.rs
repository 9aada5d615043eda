//! The header of a safetensors file: parsed, and checked against the file's length before anything else is done.
//!
//! A file is an 8-byte little-endian header length, the header (JSON: tensor name to type, shape and byte range;
//! `__metadata__` to strings), then the data, which the ranges must cover without gaps or overlaps.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::dtype::{Dtype, TensorInfo, byte_count};
use super::tensor_file::StoredTensor;
use crate::error::{Error, Result};

/// Longest header accepted, the limit of the format's own implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes before the header.
pub(super) const LENGTH_BYTES: usize = 8;
/// Key of the header that holds strings instead of a tensor.
pub(super) const METADATA: &str = "__metadata__";

const AGAIN: &str = "download it again";

pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    pub(super) metadata: BTreeMap<String, String>,
}

/// Parses the header of a whole file, and checks every tensor of it against the file's length.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Header> {
    let (header, data_start) = header_bytes(path, file)?;
    let raw: RawHeader = serde_json::from_slice(header)
        .map_err(|error| Error::file(path, format!("its header does not parse: {error}"), AGAIN))?;
    let data_bytes = (file.len() - data_start) as u64;

    let mut tensors = BTreeMap::new();
    // (start, end, name) of every tensor, to be walked in the order of the file.
    let mut places = Vec::with_capacity(raw.tensors.len());
    for (name, raw) in raw.tensors {
        let fail = |problem: String, tip: &str| tensor_error(path, &name, problem, tip);
        let dtype = Dtype::from_name(&raw.dtype).ok_or_else(|| {
            fail(format!("has the unknown dtype `{}`", raw.dtype), "convert the checkpoint to BF16, F16 or F32")
        })?;
        let (start, end) = raw.data_offsets;
        if start > end {
            return Err(fail(format!("its data ends at {end}, before it starts at {start}"), AGAIN));
        }
        if end > data_bytes {
            let problem = format!("its data ends at byte {end}, but the file holds {data_bytes} bytes of data");
            return Err(fail(problem, "the file is truncated: download it again"));
        }
        let expected = byte_count(dtype, &raw.shape).map_err(|problem| fail(problem, AGAIN))?;
        if expected != end - start {
            let problem = format!("shape {:?} of {dtype} needs {expected} bytes, found {}", raw.shape, end - start);
            return Err(fail(problem, AGAIN));
        }
        let shape = raw.shape.iter().map(|&size| usize::try_from(size)).collect::<Result<_, _>>();
        let shape = shape.map_err(|_| fail(format!("shape {:?} is beyond this machine", raw.shape), AGAIN))?;
        // Both ends are at most the file's length, which is a usize.
        let bytes = data_start + start as usize..data_start + end as usize;
        places.push((start, end, name.clone()));
        if tensors.insert(name.clone(), StoredTensor { info: TensorInfo { dtype, shape }, bytes }).is_some() {
            return Err(tensor_error(path, &name, "is listed twice in the header".into(), AGAIN));
        }
    }
    check_coverage(path, places, data_bytes)?;
    Ok(Header { tensors, metadata: raw.metadata })
}

/// The header's text, and where the data starts.
fn header_bytes<'a>(path: &Path, file: &'a [u8]) -> Result<(&'a [u8], usize)> {
    if file.starts_with(b"version https://git-lfs") {
        return Err(Error::file(path, "is a git-lfs pointer, not the weights themselves", "run `git lfs pull`"));
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        let problem = format!("has {} bytes, too few for a safetensors file", file.len());
        return Err(Error::file(path, problem, AGAIN));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 {
        let problem = format!("its header should have {length} bytes, but only {} follow", rest.len());
        return Err(Error::file(path, problem, "it is truncated or not a safetensors file: download it again"));
    }
    if length > MAX_HEADER_BYTES {
        let problem = format!("its header has {length} bytes, more than the {MAX_HEADER_BYTES} that are allowed");
        return Err(Error::file(path, problem, "it is not a safetensors file: download it again"));
    }
    let length = length as usize;
    Ok((&rest[..length], LENGTH_BYTES + length))
}

/// Ranges must follow each other without overlap or gap, and end where the file ends.
fn check_coverage(path: &Path, mut places: Vec<(u64, u64, String)>, data_bytes: u64) -> Result<()> {
    places.sort();
    let mut covered = 0;
    let mut previous = "the header";
    for (start, end, name) in &places {
        if *start < covered {
            let problem = format!("its data starts at byte {start}, inside that of `{previous}`");
            return Err(tensor_error(path, name, problem, AGAIN));
        }
        if *start > covered {
            let problem = format!("its data starts at byte {start}, and bytes {covered}..{start} belong to no tensor");
            return Err(tensor_error(path, name, problem, AGAIN));
        }
        covered = *end;
        previous = name;
    }
    if covered != data_bytes {
        let problem = format!("has {} bytes after the last tensor", data_bytes - covered);
        return Err(Error::file(path, problem, AGAIN));
    }
    Ok(())
}

fn tensor_error(path: &Path, tensor: &str, problem: String, tip: &str) -> Error {
    Error::Tensor { path: path.to_path_buf(), tensor: tensor.into(), problem, tip: tip.into() }
}

/// The header as written, tensors in its order; a map type would hide a name that is listed twice.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: vec![], metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    let named = |error: A::Error| A::Error::custom(format!("`{name}`: {error}"));
                    if name == METADATA {
                        header.metadata = map.next_value::<Option<_>>().map_err(named)?.unwrap_or_default();
                    } else {
                        let tensor = map.next_value().map_err(named)?;
                        header.tensors.push((name, tensor));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
