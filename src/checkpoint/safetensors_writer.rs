//! Writing one safetensors file, a tensor at a time.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::convert;
use super::dtype::{Dtype, byte_count};
use super::header::{LENGTH_BYTES, METADATA};
use crate::durable;
use crate::error::{Error, Result};

/// What a file will hold under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafetensorsEntry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl SafetensorsEntry {
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: impl Into<Vec<usize>>) -> Self {
        SafetensorsEntry { name: name.into(), dtype, shape: shape.into() }
    }
}

/// The values of one tensor, row-major, to be written.
#[derive(Debug, Clone)]
pub enum TensorData<'a> {
    /// For entries of F32, BF16 and F16; rounded to nearest, ties to even.
    F32(Cow<'a, [f32]>),
    /// For entries of I64.
    I64(Cow<'a, [i64]>),
    /// For entries of any type: its stored form, little-endian.
    Bytes(Cow<'a, [u8]>),
}

impl From<Vec<f32>> for TensorData<'_> {
    fn from(values: Vec<f32>) -> Self {
        TensorData::F32(values.into())
    }
}

impl<'a> From<&'a [f32]> for TensorData<'a> {
    fn from(values: &'a [f32]) -> Self {
        TensorData::F32(values.into())
    }
}

impl From<Vec<i64>> for TensorData<'_> {
    fn from(values: Vec<i64>) -> Self {
        TensorData::I64(values.into())
    }
}

/// Writes a `.safetensors` file: complete under its name, or not there.
///
/// `fetch` is asked once for each name, in the order of the file (widest type first, so that every tensor is aligned;
/// else the order of `entries`). One tensor is in memory at a time. Values are written as they are, NaN too.
///
/// # Errors
/// A name given twice, data of another type or length than its entry, what `fetch` returns, and input/output errors.
pub fn write_safetensors<'a>(
    path: impl AsRef<Path>,
    entries: &[SafetensorsEntry],
    metadata: &BTreeMap<String, String>,
    fetch: &mut dyn FnMut(&str) -> Result<TensorData<'a>>,
) -> Result<()> {
    let path = path.as_ref();
    let mut entries: Vec<&SafetensorsEntry> = entries.iter().collect();
    entries.sort_by_key(|entry| std::cmp::Reverse(8 * entry.dtype.block_bytes() / entry.dtype.block_elements()));
    let header = header_text(path, &entries, metadata)?;
    durable::write_file(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::io(path))?;
        out.write_all(&header).map_err(Error::io(path))?;
        for entry in entries {
            write_tensor(path, entry, &fetch(&entry.name)?, out)?;
        }
        Ok(())
    })
}

/// The header, padded with blanks so that the data starts at a multiple of eight.
fn header_text(path: &Path, entries: &[&SafetensorsEntry], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA.into(), json!(metadata));
    }
    let mut start = 0u64;
    for entry in entries {
        let end = entry_bytes(path, entry)?
            .checked_add(start)
            .ok_or_else(|| tensor_error(path, &entry.name, "ends beyond 64 bits".into(), "check its shape"))?;
        let value = json!({ "dtype": entry.dtype.name(), "shape": entry.shape, "data_offsets": [start, end] });
        if entry.name == METADATA || header.insert(entry.name.clone(), value).is_some() {
            return Err(tensor_error(path, &entry.name, "cannot be written twice".into(), "give each its own name"));
        }
        start = end;
    }
    let mut text = serde_json::to_vec(&Value::Object(header)).expect("JSON values always serialise");
    text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
    Ok(text)
}

fn write_tensor(path: &Path, entry: &SafetensorsEntry, data: &TensorData<'_>, out: &mut impl Write) -> Result<()> {
    let fail = |problem: String| tensor_error(path, &entry.name, problem, "check what is written under this name");
    let (kind, width, count) = match data {
        TensorData::F32(values) => ("f32 values", entry.dtype.block_bytes(), values.len() as u64),
        TensorData::I64(values) => ("i64 values", entry.dtype.block_bytes(), values.len() as u64),
        TensorData::Bytes(bytes) => ("bytes", 1, bytes.len() as u64),
    };
    let matches = match data {
        TensorData::F32(_) => matches!(entry.dtype, Dtype::F32 | Dtype::Bf16 | Dtype::F16),
        TensorData::I64(_) => entry.dtype == Dtype::I64,
        TensorData::Bytes(_) => true,
    };
    if !matches {
        return Err(fail(format!("{kind} cannot be stored as {}", entry.dtype)));
    }
    let expected = entry_bytes(path, entry)? / width;
    if count != expected {
        return Err(fail(format!("shape {:?} needs {expected} {kind}, found {count}", entry.shape)));
    }
    match data {
        TensorData::F32(values) => convert::write_f32(values, entry.dtype, out),
        TensorData::I64(values) => convert::write_i64(values, out),
        TensorData::Bytes(bytes) => out.write_all(bytes),
    }
    .map_err(Error::io(path))
}

fn entry_bytes(path: &Path, entry: &SafetensorsEntry) -> Result<u64> {
    if Dtype::from_name(entry.dtype.name()).is_none() {
        let problem = format!("{} is a type of GGUF, which safetensors files do not have", entry.dtype);
        return Err(tensor_error(path, &entry.name, problem, "write it as F32, BF16 or F16"));
    }
    let shape: Vec<u64> = entry.shape.iter().map(|&size| size as u64).collect();
    byte_count(entry.dtype, &shape).map_err(|problem| tensor_error(path, &entry.name, problem, "check its shape"))
}

fn tensor_error(path: &Path, tensor: &str, problem: String, tip: &str) -> Error {
    Error::Tensor { path: path.to_path_buf(), tensor: tensor.into(), problem, tip: tip.into() }
}
