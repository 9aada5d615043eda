//! A checkpoint, read lazily under the names that models ask for.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::assembly::{Presented, StoredTensors};
use super::dtype::{Dtype, TensorInfo};
use super::runs::Runs;
use super::tensor_file::{TensorFile, missing_tensor};
use super::{fingerprint, open};
use crate::error::{Error, Result};

/// An open checkpoint: a configuration, and weights in one file or many.
///
/// Weights that are stored in FP8 are multiplied by their scales when they are read, and experts that are stored one by
/// one are read as rows of one stack; see [`CheckpointReader::names`].
/// May be read from several threads at once. A file that is shortened meanwhile is an error when it is read.
#[derive(Debug)]
pub struct CheckpointReader {
    pub(super) config_path: PathBuf,
    pub(super) config: Value,
    /// What the fingerprint covers of the configuration, as it was written.
    pub(super) stored_config: Value,
    pub(super) stored: StoredTensors,
    pub(super) tensors: BTreeMap<String, Presented>,
}

impl CheckpointReader {
    /// Opens a checkpoint and checks all its headers; reads no weights.
    ///
    /// It is a directory in Hugging Face layout, a directory with Meta's names (`params.json`, and safetensors), a GGUF
    /// file, of which a split model's first one is named, or the name of a model on the hub ([`crate::hub`]), which is
    /// downloaded. When both a single file and an index are there the single file counts, as it does in `transformers`.
    ///
    /// # Errors
    /// A missing or malformed directory, configuration, index or shard; a quantisation, architecture or number type that
    /// is not implemented; scales that are missing or do not fit their weights.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        open::open(path.as_ref())
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.stored.path
    }

    /// The file that the configuration is in, for messages about it.
    pub fn config_path(&self) -> &Path {
        &self.config_path
    }

    /// The configuration in Hugging Face's words, an object. It has no `quantization_config`: what is handed out is
    /// not quantised.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of all tensors that can be loaded, sorted. They are those of unquantised Hugging Face checkpoints, whatever
    /// the stored ones are: scales have none, and the experts of a layer are one tensor.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Type that the values are stored in, and shape of a tensor.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.info(tensor),
            Presented::Assembled(assembly) => Ok(&assembly.info),
        }
    }

    /// Whether a tensor is put together, or scaled, while it is read; else it is handed out as it is stored.
    pub fn is_assembled(&self, name: &str) -> bool {
        matches!(self.tensors.get(name), Some(Presented::Assembled(_)))
    }

    /// All values of a tensor; see [`super::SafetensorsFile::load_f32`].
    pub fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.file(tensor)?.load_f32(tensor, shape),
            Presented::Assembled(assembly) => assembly.load(&self.stored, name, shape),
        }
    }

    /// Some rows of a tensor's first axis, such as one expert; see [`super::SafetensorsFile::load_f32_rows`]. Of a stack
    /// only the bytes of those experts are touched, whatever form it is stored in.
    pub fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.file(tensor)?.load_f32_rows(tensor, shape, rows),
            Presented::Assembled(assembly) => assembly.load_rows(&self.stored, name, shape, rows),
        }
    }

    /// Some rows of a tensor's first axis as they are stored, little-endian, with their type; only their bytes are read, and
    /// the values are not looked at. `None` for a tensor that [is assembled](Self::is_assembled): its values have to be
    /// loaded. The bytes come in the memory of `spare`, if it is enough.
    ///
    /// # Errors
    /// As [`CheckpointReader::load_f32_rows`].
    pub fn stored_rows(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        spare: Vec<u8>,
    ) -> Result<Option<(Dtype, Vec<u8>)>> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.file(tensor)?.stored_rows(tensor, shape, rows, spare).map(Some),
            Presented::Assembled(_) => Ok(None),
        }
    }

    /// Some numbers of each of some rows as they are stored, one after the other; as [`CheckpointReader::stored_rows`].
    ///
    /// # Errors
    /// As [`CheckpointReader::load_f32_rows`], and runs beyond a row.
    pub fn stored_runs(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        runs: &Runs,
    ) -> Result<Option<(Dtype, Vec<u8>)>> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.file(tensor)?.stored_runs(tensor, shape, rows, runs).map(Some),
            Presented::Assembled(_) => Ok(None),
        }
    }

    /// Bytes of tensors that were read since the checkpoint was opened, its fingerprint's among them.
    pub fn bytes_read(&self) -> u64 {
        self.stored.files.iter().map(TensorFile::bytes_read).sum()
    }

    /// All values of a tensor of integers; see [`super::SafetensorsFile::load_i64`].
    pub fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        match self.presented(name)? {
            Presented::Stored(tensor) => self.stored.file(tensor)?.load_i64(tensor),
            Presented::Assembled(assembly) => Err(Error::Tensor {
                path: self.path().to_path_buf(),
                tensor: name.into(),
                problem: format!("has dtype {}, expected integers", assembly.info.dtype),
                tip: "store it as I64".into(),
            }),
        }
    }

    /// Elements of all tensors together; scales are none.
    pub fn parameter_count(&self) -> u64 {
        self.names().map(|name| self.info(name).map_or(0, TensorInfo::element_count)).sum()
    }

    /// Bytes of all that is stored together, scales included.
    pub fn byte_count(&self) -> u64 {
        self.stored_names().map(|name| self.stored.file(name).and_then(|file| file.byte_count(name)).unwrap_or(0)).sum()
    }

    /// BLAKE3, in hexadecimal, of the configuration's meaning and of every stored tensor's name, type, shape and
    /// content, scales included.
    ///
    /// The same weights have the same fingerprint however they are sharded and however `config.json` is laid out.
    /// Reads the whole checkpoint once, at the speed of the disk or of the memory it is cached in.
    ///
    /// # Errors
    /// None that an open checkpoint has today.
    pub fn fingerprint(&self) -> Result<String> {
        fingerprint::fingerprint(self)
    }

    pub(super) fn stored_config(&self) -> &Value {
        &self.stored_config
    }

    /// Names of all stored tensors, sorted.
    pub(super) fn stored_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.stored.file_of.keys().map(String::as_str)
    }

    pub(super) fn stored_info(&self, name: &str) -> Result<&TensorInfo> {
        self.stored.info(name)
    }

    /// Gives all bytes of a stored tensor to `take`, in order, a few MiB at a time.
    pub(super) fn each_piece(&self, name: &str, take: impl FnMut(&[u8])) -> Result<()> {
        self.stored.file(name)?.each_piece(name, take)
    }

    fn presented(&self, name: &str) -> Result<&Presented> {
        self.tensors.get(name).ok_or_else(|| missing_tensor(self.path(), name, self.names()))
    }
}
