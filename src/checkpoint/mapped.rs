//! One memory-mapped file of tensors, whatever its header looked like.
//!
//! Knows where each tensor lies and how its numbers are stored; gives values. Knows nothing of headers, and nothing of
//! how tensors of several files or forms make up the one that a model asks for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::convert;
use super::dtype::{Dtype, TensorInfo};
use crate::error::{Error, Result};

/// Tensors of one file. Its header is checked; its data stays on disk until a tensor is asked for.
#[derive(Debug)]
pub(super) struct MappedTensors {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, StoredTensor>,
}

#[derive(Debug)]
pub(super) struct StoredTensor {
    pub(super) info: TensorInfo,
    /// Place in the file, counted from the file's first byte; inside the file.
    pub(super) bytes: Range<usize>,
}

/// Maps a file. `kind` is what it should be, for the message when it is no file.
pub(super) fn map(path: &Path, kind: &str) -> Result<Mmap> {
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::file(path, "does not exist", "check the path, or download it"),
        _ => Error::io(path)(error),
    })?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::file(path, "is not a file", format!("give the path of a {kind} file")));
    }
    // SAFETY: the map is only read. Another process that changes the file could change bytes under a reference, as
    // with every map; the bytes are plain numbers, for which each value is valid, and the header is parsed once.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}

impl MappedTensors {
    /// Every tensor lies inside the map and has the bytes that its type and shape need.
    pub(super) fn new(path: &Path, map: Mmap, tensors: BTreeMap<String, StoredTensor>) -> Self {
        MappedTensors { path: path.to_path_buf(), map, tensors }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub(super) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub(super) fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.stored(name)?.info)
    }

    pub(super) fn raw_bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.map[self.stored(name)?.bytes.clone()])
    }

    /// See [`super::SafetensorsFile::load_f32`].
    pub(super) fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.checked(name, shape)?;
        self.decode(name, 0..self.stored(name)?.info.element_count())
    }

    /// See [`super::SafetensorsFile::load_f32_rows`].
    pub(super) fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        self.checked(name, shape)?;
        let row_elements = check_rows(&self.path, name, shape, &rows)?;
        self.decode(name, rows.start as u64 * row_elements..rows.end as u64 * row_elements)
    }

    /// See [`super::SafetensorsFile::load_i64`].
    pub(super) fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        let stored = self.stored(name)?;
        let dtype = stored.info.dtype;
        convert::decode_i64(dtype, &self.map[stored.bytes.clone()]).ok_or_else(|| match dtype {
            Dtype::U64 => self.error(name, "holds a number beyond 2^63 - 1".into(), "store it as I64"),
            _ => self.error(name, format!("has dtype {dtype}, expected integers"), "store it as I64"),
        })
    }

    /// Elements of a tensor by their numbers, row-major, as they are stored: not multiplied by any scale.
    ///
    /// # Errors
    /// A missing tensor, NaN or infinite values, elements that cut a block in two. The caller has checked that
    /// the type holds numbers and that the elements are in the tensor.
    pub(super) fn decode(&self, name: &str, elements: Range<u64>) -> Result<Vec<f32>> {
        let StoredTensor { info: TensorInfo { dtype, .. }, bytes } = self.stored(name)?;
        let block = dtype.block_elements();
        if !elements.start.is_multiple_of(block) || !elements.end.is_multiple_of(block) {
            let problem = format!("elements {}..{} cut a block of {block} in two", elements.start, elements.end);
            return Err(self.error(name, problem, "load whole rows of it"));
        }
        // At most the tensor's byte count, which is at most the file's length.
        let place = |element: u64| bytes.start + (element / block * dtype.block_bytes()) as usize;
        let (values, finite) = convert::decode_f32(*dtype, &self.map[place(elements.start)..place(elements.end)]);
        if !finite {
            let number = values.iter().position(|value| !value.is_finite()).unwrap_or(0) as u64;
            let problem = format!("contains NaN or infinite values, the first at element {}", elements.start + number);
            return Err(self.error(name, problem, "download it again, or go back to an earlier checkpoint"));
        }
        Ok(values)
    }

    fn stored(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).ok_or_else(|| missing_tensor(&self.path, name, self.names()))
    }

    /// The tensor, when its type is one that is read as numbers and its shape is the expected one.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<()> {
        let found = self.info(name)?;
        if convert::needs_scale(found.dtype) {
            let problem = format!("has dtype {} and nothing says how it is scaled", found.dtype);
            let tip = "add the quantization_config that belongs to it to config.json, or use BF16 weights";
            return Err(self.error(name, problem, tip));
        }
        if !convert::is_float(found.dtype) {
            let problem = format!("has dtype {}, expected F32, BF16, F16 or F64", found.dtype);
            return Err(self.error(name, problem, "use a checkpoint that is not quantised"));
        }
        check_shape(&self.path, name, &found.shape, shape)
    }

    pub(super) fn error(&self, tensor: &str, problem: String, tip: &str) -> Error {
        Error::Tensor { path: self.path.clone(), tensor: tensor.into(), problem, tip: tip.into() }
    }
}

pub(super) fn check_shape(path: &Path, tensor: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Tensor {
        path: path.to_path_buf(),
        tensor: tensor.into(),
        problem: format!("expected shape {expected:?}, found {found:?}"),
        tip: "check that config.json belongs to these weights".into(),
    })
}

/// Elements in one row of a tensor, when the rows are in it.
pub(super) fn check_rows(path: &Path, tensor: &str, shape: &[usize], rows: &Range<usize>) -> Result<u64> {
    let fail = |problem: String, tip: &str| {
        Err(Error::Tensor { path: path.to_path_buf(), tensor: tensor.into(), problem, tip: tip.into() })
    };
    let Some(&row_count) = shape.first() else {
        return fail("is a scalar and has no rows".into(), "load it whole");
    };
    if rows.start > rows.end || rows.end > row_count {
        let problem = format!("rows {}..{} are not among its {row_count} rows", rows.start, rows.end);
        return fail(problem, "check the number of experts in config.json");
    }
    Ok(if row_count == 0 { 0 } else { shape[1..].iter().map(|&size| size as u64).product() })
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
