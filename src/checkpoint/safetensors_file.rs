//! One safetensors file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use super::dtype::TensorInfo;
use super::header;
use super::tensor_file::{self, TensorFile};
use crate::error::Result;

/// An open `.safetensors` file. Its header is checked; its data stays on disk until a tensor is asked for.
///
/// A file that is shortened while it is open is an error when a tensor is loaded; [`SafetensorsFile::raw_bytes`] alone
/// hands out mapped memory, and reading a page of it that is gone ends the process.
#[derive(Debug)]
pub struct SafetensorsFile {
    tensors: TensorFile,
    metadata: BTreeMap<String, String>,
}

/// Opens one `.safetensors` file.
///
/// # Errors
/// A missing, truncated or malformed file, and a tensor whose type, shape and place in the file do not agree.
pub fn read_safetensors(path: impl AsRef<Path>) -> Result<SafetensorsFile> {
    let path = path.as_ref();
    let file = tensor_file::open(path, ".safetensors")?;
    let header = header::parse(path, &file.map)?;
    Ok(SafetensorsFile { tensors: TensorFile::new(path, file, header.tensors), metadata: header.metadata })
}

impl SafetensorsFile {
    pub(super) fn into_tensors(self) -> TensorFile {
        self.tensors
    }

    pub fn path(&self) -> &Path {
        self.tensors.path()
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.names()
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name)
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
        self.tensors.info(name)
    }

    /// The stored bytes of a tensor, straight from the file.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn raw_bytes(&self, name: &str) -> Result<&[u8]> {
        self.tensors.raw_bytes(name)
    }

    /// All values of an F32, BF16, F16 or F64 tensor.
    ///
    /// # Shapes
    /// `shape` is what the caller expects; the result has its product of values, row-major.
    ///
    /// # Errors
    /// A missing tensor, another shape, a type that holds no such numbers, NaN or infinite values.
    pub fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.tensors.load_f32(name, shape)
    }

    /// Rows `rows` of the first axis, as [`SafetensorsFile::load_f32`] reads them; only their bytes are touched.
    ///
    /// # Shapes
    /// `shape` is that of the whole tensor; the result has `rows.len() * shape[1..].product()` values.
    ///
    /// # Errors
    /// As [`SafetensorsFile::load_f32`], and rows outside the tensor.
    pub fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        self.tensors.load_f32_rows(name, shape, rows)
    }

    /// All values of a tensor of integers (or of truth values, as 0 and 1), row-major.
    ///
    /// # Errors
    /// A missing tensor, a type that is no integer, an unsigned value beyond `i64::MAX`.
    pub fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        self.tensors.load_i64(name)
    }
}
