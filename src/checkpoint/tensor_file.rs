//! One file of tensors, whatever its header looked like.
//!
//! Knows where each tensor lies and how its numbers are stored; gives values. Headers are read through a memory map,
//! tensors by positioned reads: mapped pages would count as this process's memory for as long as the system likes, and
//! a file that shrinks would end the process. Knows nothing of what headers say, and nothing of how tensors of several
//! files or forms make up the one that a model asks for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::Mmap;
use rayon::prelude::*;

use super::convert::{self, CHUNK};
use super::dtype::{Dtype, TensorInfo};
use super::runs::Runs;
use crate::error::{Error, Result};
use crate::positioned::read_exact_at;

/// Bytes read at once where a tensor is only looked through.
const PIECE: usize = 4 << 20;

/// Tensors of one file. Its header is checked; its data stays on disk until a tensor is asked for.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    file: OpenFile,
    /// Bytes of tensors that were read so far.
    bytes_read: AtomicU64,
    tensors: BTreeMap<String, StoredTensor>,
}

#[derive(Debug)]
pub(super) struct StoredTensor {
    pub(super) info: TensorInfo,
    /// Place in the file, counted from the file's first byte; inside the file as it was when it was opened.
    pub(super) bytes: Range<usize>,
}

/// A file in the two ways it is read.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    pub(super) map: Mmap,
}

/// Opens a file. `kind` is what it should be, for the message when it is no file.
pub(super) fn open(path: &Path, kind: &str) -> Result<OpenFile> {
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::file(path, "does not exist", "check the path, or download it"),
        _ => Error::io(path)(error),
    })?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::file(path, "is not a file", format!("give the path of a {kind} file")));
    }
    // SAFETY: the map is only read. Another process that changes the file could change bytes under a reference, as
    // with every map; the bytes are plain numbers, for which each value is valid, and the header is parsed once.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    Ok(OpenFile { file, map })
}

impl TensorFile {
    /// Every tensor lies inside the file and has the bytes that its type and shape need.
    pub(super) fn new(path: &Path, file: OpenFile, tensors: BTreeMap<String, StoredTensor>) -> Self {
        TensorFile { path: path.to_path_buf(), file, bytes_read: AtomicU64::new(0), tensors }
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

    /// Bytes that a tensor takes in the file.
    pub(super) fn byte_count(&self, name: &str) -> Result<u64> {
        Ok(self.stored(name)?.bytes.len() as u64)
    }

    /// The stored bytes, through the map.
    pub(super) fn raw_bytes(&self, name: &str) -> Result<&[u8]> {
        Ok(&self.file.map[self.stored(name)?.bytes.clone()])
    }

    /// Bytes of tensors that were read since the file was opened, by all but [`raw_bytes`](Self::raw_bytes).
    pub(super) fn bytes_read(&self) -> u64 {
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

    /// Some rows as they are stored, little-endian, with their type; only their bytes are read, and the values are not
    /// looked at. They are put in the place of what `bytes` has.
    pub(super) fn stored_rows(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        mut bytes: Vec<u8>,
    ) -> Result<(Dtype, Vec<u8>)> {
        self.checked(name, shape)?;
        let row_elements = check_rows(&self.path, name, shape, &rows)?;
        let place = self.place(name, &(rows.start as u64 * row_elements..rows.end as u64 * row_elements))?;
        if bytes.capacity() < place.len() {
            bytes = Vec::new();
        }
        bytes.resize(place.len(), 0);
        self.read(name, &mut bytes, place.start)?;
        Ok((self.info(name)?.dtype, bytes))
    }

    /// Some numbers of each of some rows as they are stored, one after the other; only their bytes are read, and the values
    /// are not looked at. For types whose numbers are stored one by one.
    pub(super) fn stored_runs(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        runs: &Runs,
    ) -> Result<(Dtype, Vec<u8>)> {
        self.checked(name, shape)?;
        let row = check_rows(&self.path, name, shape, &rows)?;
        if runs.each().any(|run| run.start > run.end || run.end as u64 > row) {
            let problem = format!("a row of it has {row} numbers, and more are asked for");
            return Err(self.error(name, problem, "check that config.json belongs to these weights"));
        }
        let mut bytes = vec![];
        for start in rows.map(|number| number as u64 * row) {
            for run in runs.each() {
                let place = self.place(name, &(start + run.start as u64..start + run.end as u64))?;
                let before = bytes.len();
                bytes.resize(before + place.len(), 0);
                self.read(name, &mut bytes[before..], place.start)?;
            }
        }
        Ok((self.info(name)?.dtype, bytes))
    }

    /// See [`super::SafetensorsFile::load_i64`].
    pub(super) fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        let StoredTensor { info: TensorInfo { dtype, .. }, bytes: place } = self.stored(name)?;
        let mut bytes = vec![0; place.len()];
        self.read(name, &mut bytes, place.start)?;
        convert::decode_i64(*dtype, &bytes).ok_or_else(|| match dtype {
            Dtype::U64 => self.error(name, "holds a number beyond 2^63 - 1".into(), "store it as I64"),
            _ => self.error(name, format!("has dtype {dtype}, expected integers"), "store it as I64"),
        })
    }

    /// Elements of a tensor by their numbers, row-major, as they are stored: not multiplied by any scale.
    ///
    /// # Errors
    /// A missing tensor, NaN or infinite values, elements that cut a block in two, a file that has become too short.
    /// The caller has checked that the type holds numbers and that the elements are in the tensor.
    pub(super) fn decode(&self, name: &str, elements: Range<u64>) -> Result<Vec<f32>> {
        let (dtype, place) = (self.info(name)?.dtype, self.place(name, &elements)?);
        let bytes_of = |values: usize| values / dtype.block_elements() as usize * dtype.block_bytes() as usize;
        let mut values = vec![0.0; (elements.end - elements.start) as usize];
        let finite = values
            .par_chunks_mut(CHUNK)
            .enumerate()
            .map_init(Vec::new, |buffer, (number, values)| {
                buffer.resize(bytes_of(values.len()), 0);
                self.read(name, buffer, place.start + number * bytes_of(CHUNK))?;
                Ok(convert::decode_chunk(dtype, buffer, values))
            })
            .try_reduce(|| true, |left, right| Ok(left & right))?;
        if !finite {
            let number = values.iter().position(|value| !value.is_finite()).unwrap_or(0) as u64;
            let problem = format!("contains NaN or infinite values, the first at element {}", elements.start + number);
            return Err(self.error(name, problem, "download it again, or go back to an earlier checkpoint"));
        }
        Ok(values)
    }

    /// Where elements lie in the file.
    fn place(&self, name: &str, elements: &Range<u64>) -> Result<Range<usize>> {
        let StoredTensor { info: TensorInfo { dtype, .. }, bytes } = self.stored(name)?;
        let block = dtype.block_elements();
        if !elements.start.is_multiple_of(block) || !elements.end.is_multiple_of(block) {
            let problem = format!("elements {}..{} cut a block of {block} in two", elements.start, elements.end);
            return Err(self.error(name, problem, "load whole rows of it"));
        }
        // At most the tensor's byte count, which is at most the file's length.
        let place = |element: u64| bytes.start + (element / block * dtype.block_bytes()) as usize;
        Ok(place(elements.start)..place(elements.end))
    }

    /// Fills `buffer` from a place in the file that belongs to the tensor `name`.
    fn read(&self, name: &str, buffer: &mut [u8], offset: usize) -> Result<()> {
        read_exact_at(&self.file.file, buffer, offset as u64).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let problem = "the file ends within it, and did not when it was opened".to_string();
                self.error(name, problem, "leave the checkpoint alone while it is read, or download it again")
            }
            _ => Error::io(&self.path)(error),
        })?;
        self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
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
