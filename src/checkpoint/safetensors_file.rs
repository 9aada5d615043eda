//! One memory-mapped safetensors file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::convert;
use super::dtype::{Dtype, TensorInfo};
use super::header::{self, StoredTensor};
use crate::error::{Error, Result};

/// An open `.safetensors` file. Its header is checked; its data stays on disk until a tensor is asked for.
///
/// The file must not be shortened while it is open: reading a page that is gone ends the process.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: BTreeMap<String, String>,
}

/// Opens one `.safetensors` file.
///
/// # Errors
/// A missing, truncated or malformed file, and a tensor whose type, shape and place in the file do not agree.
pub fn read_safetensors(path: impl AsRef<Path>) -> Result<SafetensorsFile> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::file(path, "does not exist", "check the path, or download it"),
        _ => Error::io(path)(error),
    })?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::file(path, "is not a file", "give the path of a .safetensors file"));
    }
    // SAFETY: the map is only read. Another process that changes the file could change bytes under a reference, as
    // with every map; the bytes are plain numbers, for which each value is valid, and the header is parsed once.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    let header = header::parse(path, &map)?;
    Ok(SafetensorsFile { path: path.to_path_buf(), map, tensors: header.tensors, metadata: header.metadata })
}

impl SafetensorsFile {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Type and shape of a tensor.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.stored(name)?.info)
    }

    /// The stored bytes of a tensor, straight from the file.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn raw_bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.map[self.stored(name)?.bytes.clone()])
    }

    /// All values of an F32, BF16, F16 or F64 tensor.
    ///
    /// # Shapes
    /// `shape` is what the caller expects; the result has its product of values, row-major.
    ///
    /// # Errors
    /// A missing tensor, another shape, a type that holds no such numbers, NaN or infinite values.
    pub fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let stored = self.checked(name, shape)?;
        self.decode(name, stored.info.dtype, stored.bytes.clone(), 0)
    }

    /// Rows `rows` of the first axis, as [`SafetensorsFile::load_f32`] reads them; only their bytes are touched.
    ///
    /// # Shapes
    /// `shape` is that of the whole tensor; the result has `rows.len() * shape[1..].product()` values.
    ///
    /// # Errors
    /// As [`SafetensorsFile::load_f32`], and rows outside the tensor.
    pub fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        let stored = self.checked(name, shape)?;
        let Some(&row_count) = shape.first() else {
            return Err(self.error(name, "is a scalar and has no rows".into(), "load it whole"));
        };
        if rows.start > rows.end || rows.end > row_count {
            let problem = format!("rows {}..{} are not among its {row_count} rows", rows.start, rows.end);
            return Err(self.error(name, problem, "check the number of experts in config.json"));
        }
        // Products stay below the tensor's byte count, which the header's check bounds by the file's length.
        let row_bytes = stored.bytes.len().checked_div(row_count).unwrap_or(0);
        let start = stored.bytes.start;
        let row_elements: usize = if row_count == 0 { 0 } else { shape[1..].iter().product() };
        let bytes = start + rows.start * row_bytes..start + rows.end * row_bytes;
        self.decode(name, stored.info.dtype, bytes, rows.start * row_elements)
    }

    /// All values of a tensor of integers (or of truth values, as 0 and 1), row-major.
    ///
    /// # Errors
    /// A missing tensor, a type that is no integer, an unsigned value beyond `i64::MAX`.
    pub fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        let stored = self.stored(name)?;
        let dtype = stored.info.dtype;
        convert::decode_i64(dtype, &self.map[stored.bytes.clone()]).ok_or_else(|| match dtype {
            Dtype::U64 => self.error(name, "holds a number beyond 2^63 - 1".into(), "store it as I64"),
            _ => self.error(name, format!("has dtype {dtype}, expected integers"), "store it as I64"),
        })
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| missing_tensor(&self.path, name, self.names()))
    }

    /// The tensor, when its type is one that is read as numbers and its shape is the expected one.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<&StoredTensor> {
        let stored = self.stored(name)?;
        let found = &stored.info;
        if !convert::is_float(found.dtype) {
            let problem = format!("has dtype {}, expected F32, BF16, F16 or F64", found.dtype);
            return Err(self.error(name, problem, "use a checkpoint that is not quantised"));
        }
        if found.shape != shape {
            let problem = format!("expected shape {shape:?}, found {:?}", found.shape);
            return Err(self.error(name, problem, "check that config.json belongs to these weights"));
        }
        Ok(stored)
    }

    /// `first` is the number of the first element, for the message.
    fn decode(&self, name: &str, dtype: Dtype, bytes: Range<usize>, first: usize) -> Result<Vec<f32>> {
        let (values, finite) = convert::decode_f32(dtype, &self.map[bytes]);
        if !finite {
            let place = values.iter().position(|value| !value.is_finite()).unwrap_or(0);
            let problem = format!("contains NaN or infinite values, the first at element {}", first + place);
            return Err(self.error(name, problem, "download it again, or go back to an earlier checkpoint"));
        }
        Ok(values)
    }

    fn error(&self, tensor: &str, problem: String, tip: &str) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: tensor.into(), problem, tip: tip.into() }
    }
}

/// The error for a name that is not there, with the nearest one that is.
pub(super) fn missing_tensor<'a>(path: &Path, name: &str, names: impl Iterator<Item = &'a str>) -> Error {
    let nearest = names.min_by_key(|known| strsim::levenshtein(known, name));
    let problem = match nearest {
        Some(nearest) => format!("is missing, the nearest name is `{nearest}`"),
        None => "is missing, as the file holds no tensors".into(),
    };
    let tip = "check that config.json belongs to these weights, or download them again".into();
    Error::Tensor { path: path.to_path_buf(), tensor: name.into(), problem, tip }
}
