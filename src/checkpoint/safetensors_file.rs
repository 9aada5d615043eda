//! One safetensors file. Its header is read through a memory map, tensors by positioned reads: mapped pages would count
//! as this process's memory for as long as the system likes, and a file that shrinks would end the process.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;
use rayon::prelude::*;

use super::convert;
use super::dtype::{Dtype, TensorInfo};
use super::header::{self, StoredTensor};
use super::runs::Runs;
use crate::error::{Error, Result};
use crate::positioned::read_exact_at;

/// Bytes read at once where a tensor is not wanted whole.
const PIECE: usize = 4 << 20;

/// An open `.safetensors` file. Its header is checked; its data stays on disk until a tensor is asked for.
///
/// A file that is shortened while it is open is an error when a tensor is loaded; [`SafetensorsFile::raw_bytes`] alone hands
/// out mapped memory, and reading a page of it that is gone ends the process.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    /// Bytes of tensors that were read so far.
    bytes_read: AtomicU64,
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
    let (tensors, metadata) = (header.tensors, header.metadata);
    Ok(SafetensorsFile { path: path.to_path_buf(), file, map, bytes_read: AtomicU64::new(0), tensors, metadata })
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

    /// Bytes of tensors that were read from this file since it was opened, without what [`raw_bytes`](Self::raw_bytes)
    /// handed out.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Gives all stored bytes of a tensor to `take`, in order, a few MiB at a time.
    pub(super) fn each_piece(&self, name: &str, mut take: impl FnMut(&[u8])) -> Result<()> {
        let bytes = self.stored(name)?.bytes.clone();
        let mut buffer = vec![0; PIECE.min(bytes.len())];
        for start in bytes.clone().step_by(PIECE) {
            let buffer = &mut buffer[..PIECE.min(bytes.end - start)];
            self.read(name, buffer, start)?;
            take(buffer);
        }
        Ok(())
    }

    /// Fills `buffer` from a place in the file that belongs to the tensor `name`.
    fn read(&self, name: &str, buffer: &mut [u8], offset: usize) -> Result<()> {
        read_exact_at(&self.file, buffer, offset as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let problem = "the file ends within it, and did not when it was opened".to_string();
                self.error(name, problem, "leave the checkpoint alone while it is read, or download it again")
            }
            _ => Error::io(&self.path)(error),
        })?;
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Rows `rows` of the first axis, as [`SafetensorsFile::load_f32`] reads them; only their bytes are touched.
    ///
    /// # Shapes
    /// `shape` is that of the whole tensor; the result has `rows.len() * shape[1..].product()` values.
    ///
    /// # Errors
    /// As [`SafetensorsFile::load_f32`], and rows outside the tensor.
    pub fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        let (dtype, bytes) = self.place_of_rows(name, shape, rows.clone())?;
        let row_elements: usize = shape[1..].iter().product();
        self.decode(name, dtype, bytes, rows.start * row_elements)
    }

    /// Rows `rows` of the first axis as they are stored, little-endian, with their type; only their bytes are read.
    ///
    /// # Errors
    /// As [`SafetensorsFile::load_f32_rows`], except that the values are not looked at.
    pub fn stored_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<(Dtype, Vec<u8>)> {
        let (dtype, place) = self.place_of_rows(name, shape, rows)?;
        let mut bytes = vec![0; place.len()];
        self.read(name, &mut bytes, place.start)?;
        Ok((dtype, bytes))
    }

    /// Some numbers of each of some rows of the first axis as they are stored, one after the other; only their bytes are
    /// read.
    ///
    /// # Errors
    /// As [`SafetensorsFile::stored_rows`], and runs beyond a row.
    pub fn stored_runs(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        runs: &Runs,
    ) -> Result<(Dtype, Vec<u8>)> {
        let (dtype, place) = self.place_of_rows(name, shape, rows.clone())?;
        let (element, row) = (dtype.bits() as usize / 8, shape[1..].iter().product::<usize>());
        if runs.each().any(|run| run.start > run.end || run.end > row) {
            let problem = format!("a row of it has {row} numbers, and more are asked for");
            return Err(self.error(name, problem, "check that config.json belongs to these weights"));
        }
        let mut bytes = vec![0; rows.len() * runs.count() * element];
        let mut rest = bytes.as_mut_slice();
        for start in (0..rows.len()).map(|number| place.start + number * row * element) {
            for run in runs.each() {
                let (now, later) = rest.split_at_mut(run.len() * element);
                self.read(name, now, start + run.start * element)?;
                rest = later;
            }
        }
        Ok((dtype, bytes))
    }

    fn place_of_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<(Dtype, Range<usize>)> {
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
        Ok((stored.info.dtype, start + rows.start * row_bytes..start + rows.end * row_bytes))
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
        let width = dtype.bits() as usize / 8;
        let mut values = vec![0.0; bytes.len() / width];
        let finite = values
            .par_chunks_mut(convert::CHUNK)
            .enumerate()
            .map_init(Vec::new, |buffer, (number, values)| {
                buffer.resize(values.len() * width, 0);
                self.read(name, buffer, bytes.start + number * convert::CHUNK * width)?;
                Ok(convert::decode_chunk(dtype, buffer, values))
            })
            .try_reduce(|| true, |left, right| Ok(left & right))?;
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
