//! A checkpoint directory in Hugging Face layout, read lazily.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dtype::{Dtype, TensorInfo};
use super::safetensors_file::{SafetensorsFile, missing_tensor, read_safetensors};
use super::runs::Runs;
use super::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, fingerprint, index};
use crate::durable;
use crate::error::{Error, Result};

/// An open checkpoint: `config.json`, and the weights in `model.safetensors` or in the shards of
/// `model.safetensors.index.json`.
///
/// May be read from several threads at once. A file that is shortened meanwhile is an error when it is read.
#[derive(Debug)]
pub struct CheckpointReader {
    dir: PathBuf,
    config: Value,
    files: Vec<SafetensorsFile>,
    /// Tensor name to its place in `files`.
    file_of: BTreeMap<String, usize>,
}

impl CheckpointReader {
    /// Opens a checkpoint and checks all its headers; reads no weights.
    ///
    /// When both a single file and an index are there the single file counts, as it does in `transformers`.
    ///
    /// # Errors
    /// A missing or malformed directory, configuration, index or shard.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let problem = if dir.exists() { "is not a directory" } else { "does not exist" };
            return Err(Error::file(dir, problem, "give the path of a checkpoint directory in Hugging Face layout"));
        }
        let missing = "copy it from where the weights came from";
        let config = durable::read_json_object(&dir.join(CONFIG_FILE), missing, "download it again")?;
        let (files, file_of) = if dir.join(SINGLE_FILE).is_file() {
            let file = read_safetensors(dir.join(SINGLE_FILE))?;
            let file_of = file.names().map(|name| (name.to_string(), 0)).collect();
            (vec![file], file_of)
        } else if dir.join(INDEX_FILE).is_file() {
            open_shards(dir)?
        } else {
            return Err(no_weights(dir));
        };
        Ok(CheckpointReader { dir: dir.to_path_buf(), config, files, file_of })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The content of `config.json`, an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.file_of.keys().map(String::as_str)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// Type and shape of a tensor.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.file(name)?.info(name)
    }

    /// The stored bytes of a tensor, straight from the file.
    ///
    /// # Errors
    /// No tensor has this name.
    pub fn raw_bytes(&self, name: &str) -> Result<&[u8]> {
        self.file(name)?.raw_bytes(name)
    }

    /// All values of a tensor; see [`SafetensorsFile::load_f32`].
    pub fn load_f32(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.file(name)?.load_f32(name, shape)
    }

    /// Some rows of a tensor's first axis, such as one expert; see [`SafetensorsFile::load_f32_rows`].
    pub fn load_f32_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        self.file(name)?.load_f32_rows(name, shape, rows)
    }

    /// Some rows of a tensor's first axis as they are stored; see [`SafetensorsFile::stored_rows`].
    pub fn stored_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<(Dtype, Vec<u8>)> {
        self.file(name)?.stored_rows(name, shape, rows)
    }

    /// Some numbers of each of some rows of a tensor's first axis as they are stored; see
    /// [`SafetensorsFile::stored_runs`].
    pub fn stored_runs(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        runs: &Runs,
    ) -> Result<(Dtype, Vec<u8>)> {
        self.file(name)?.stored_runs(name, shape, rows, runs)
    }

    /// Gives all stored bytes of a tensor to `take`, in order, a few MiB at a time.
    pub(super) fn each_piece(&self, name: &str, take: impl FnMut(&[u8])) -> Result<()> {
        self.file(name)?.each_piece(name, take)
    }

    /// Bytes of tensors that were read since the checkpoint was opened, its fingerprint's among them.
    pub fn bytes_read(&self) -> u64 {
        self.files.iter().map(SafetensorsFile::bytes_read).sum()
    }

    /// All values of a tensor of integers; see [`SafetensorsFile::load_i64`].
    pub fn load_i64(&self, name: &str) -> Result<Vec<i64>> {
        self.file(name)?.load_i64(name)
    }

    /// Elements of all tensors together.
    pub fn parameter_count(&self) -> u64 {
        self.each().map(|(name, file)| file.info(name).map_or(0, TensorInfo::element_count)).sum()
    }

    /// Bytes of all tensors together, as stored.
    pub fn byte_count(&self) -> u64 {
        self.each().map(|(name, file)| file.raw_bytes(name).map_or(0, |bytes| bytes.len() as u64)).sum()
    }

    /// BLAKE3, in hexadecimal, of the configuration's meaning and of every tensor's name, type, shape and content.
    ///
    /// The same weights have the same fingerprint however they are sharded and however `config.json` is laid out.
    /// Reads the whole checkpoint once, at the speed of the disk or of the memory it is cached in.
    ///
    /// # Errors
    /// A file that cannot be read, or was shortened since.
    pub fn fingerprint(&self) -> Result<String> {
        fingerprint::fingerprint(self)
    }

    /// Every tensor with the file it is in, sorted by name.
    fn each(&self) -> impl Iterator<Item = (&str, &SafetensorsFile)> {
        self.file_of.iter().map(|(name, &file)| (name.as_str(), &self.files[file]))
    }

    fn file(&self, name: &str) -> Result<&SafetensorsFile> {
        let file = self.file_of.get(name).ok_or_else(|| missing_tensor(&self.dir, name, self.names()))?;
        Ok(&self.files[*file])
    }
}

fn open_shards(dir: &Path) -> Result<(Vec<SafetensorsFile>, BTreeMap<String, usize>)> {
    let mut files: Vec<SafetensorsFile> = vec![];
    let mut opened: BTreeMap<String, usize> = BTreeMap::new();
    let mut file_of = BTreeMap::new();
    for (tensor, shard) in index::read(dir)? {
        let number = match opened.get(&shard) {
            Some(&number) => number,
            None => {
                files.push(read_safetensors(dir.join(&shard))?);
                opened.insert(shard, files.len() - 1);
                files.len() - 1
            }
        };
        if !files[number].contains(&tensor) {
            return Err(Error::Tensor {
                path: files[number].path().to_path_buf(),
                tensor,
                problem: format!("is placed in this shard by {INDEX_FILE}, but is not in it"),
                tip: "download the shard and the index again".into(),
            });
        }
        file_of.insert(tensor, number);
    }
    let held: usize = files.iter().map(|file| file.names().len()).sum();
    if held > file_of.len() {
        tracing::warn!(
            "{}: the shards hold {} tensors that {INDEX_FILE} does not place in them; they are not read",
            dir.display(),
            held - file_of.len()
        );
    }
    Ok((files, file_of))
}

fn no_weights(dir: &Path) -> Error {
    let pickled = fs::read_dir(dir).into_iter().flatten().flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json"))
    });
    let problem = format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}");
    if pickled {
        return Error::file(dir, problem + ", only pickled weights", "save it again from Python as safetensors");
    }
    Error::file(dir, problem, "give the path of a checkpoint directory in Hugging Face layout")
}
