//! Writing a checkpoint directory in Hugging Face layout: complete under its name, or not there.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::dtype::{Dtype, StoredDtype, byte_count};
use super::safetensors_writer::{SafetensorsEntry, TensorData, write_safetensors};
use super::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, convert, index, steps};
use crate::durable;
use crate::error::{Error, Result};

/// Size of a shard when the caller names none.
const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Name and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        TensorSpec { name: name.into(), shape: shape.into() }
    }
}

/// What to do when the directory already holds a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overwrite {
    Refuse,
    /// Replace it once the new one is complete. A directory of other things is never replaced.
    Replace,
}

/// A checkpoint about to be written; [`CheckpointWriter::write`] does it.
///
/// Everything goes to `<dir>.partial-<process>` first, is synced, and renamed at the end.
pub struct CheckpointWriter<'a> {
    dir: PathBuf,
    config: &'a Value,
    dtype: StoredDtype,
    max_shard_bytes: u64,
    overwrite: Overwrite,
    files: Vec<(String, Cow<'a, [u8]>)>,
    extra: Vec<ExtraFiles<'a>>,
}

type ExtraFiles<'a> = Box<dyn FnOnce(&Path) -> Result<()> + 'a>;

impl<'a> CheckpointWriter<'a> {
    /// A checkpoint of these weights alone. `config` is written to `config.json` as it is: its `dtype` key, if
    /// any, should agree with `dtype`, since `transformers` converts the weights to it on loading.
    pub fn new(dir: impl AsRef<Path>, config: &'a Value, dtype: StoredDtype) -> Self {
        CheckpointWriter {
            dir: dir.as_ref().to_path_buf(),
            config,
            dtype,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            overwrite: Overwrite::Refuse,
            files: vec![],
            extra: vec![],
        }
    }

    /// Most bytes of tensors in one shard (5 GB unless said); a larger tensor has a shard to itself.
    pub fn with_max_shard_bytes(mut self, bytes: u64) -> Self {
        self.max_shard_bytes = bytes;
        self
    }

    /// What to do when the directory already holds a checkpoint; [`Overwrite::Refuse`] unless said.
    pub fn with_overwrite(mut self, overwrite: Overwrite) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Adds a file as it is, such as `tokenizer.json` or `generation_config.json`.
    pub fn with_file(mut self, name: impl Into<String>, bytes: impl Into<Cow<'a, [u8]>>) -> Self {
        self.files.push((name.into(), bytes.into()));
        self
    }

    /// Adds files that `write` puts into the directory it is given, which is renamed afterwards: a
    /// [`TrainState`](super::TrainState), for example. It must sync what it writes.
    pub fn with_extra(mut self, write: impl FnOnce(&Path) -> Result<()> + 'a) -> Self {
        self.extra.push(Box::new(write));
        self
    }

    /// Writes the checkpoint. `fetch` is asked once for each tensor, in order, and one is in memory at a time.
    ///
    /// # Shapes
    /// `fetch` returns the product of the tensor's shape of values, row-major.
    ///
    /// # Errors
    /// A directory that may not be replaced, no tensors or one named twice, values of the wrong count or that are
    /// not finite once stored, what `fetch` returns, and input/output errors. Nothing is left behind then.
    pub fn write(self, tensors: &[TensorSpec], fetch: &mut dyn FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
        let shards = self.plan(tensors)?;
        self.check_files()?;
        self.check_target()?;
        let parent = durable::parent(&self.dir);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let partial = PartialDirectory::create(&self.dir)?;
        self.write_weights(&partial.path, &shards, fetch)?;
        durable::write_json(&partial.path.join(CONFIG_FILE), self.config)?;
        for (name, bytes) in &self.files {
            durable::write_bytes(&partial.path.join(name), bytes)?;
        }
        for write in self.extra {
            write(&partial.path)?;
        }
        partial.commit(&self.dir, self.overwrite)
    }

    fn write_weights(
        &self,
        partial: &Path,
        shards: &[Vec<SafetensorsEntry>],
        fetch: &mut dyn FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let names = shard_names(shards.len());
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let dtype = Dtype::from(self.dtype);
        let mut fetch_checked = |name: &str| {
            let values = fetch(name)?;
            self.check_values(name, &values, dtype)?;
            Ok(TensorData::from(values))
        };
        for (name, entries) in names.iter().zip(shards) {
            write_safetensors(partial.join(name), entries, &metadata, &mut fetch_checked)?;
        }
        if shards.len() > 1 {
            let shard_of = names
                .iter()
                .zip(shards)
                .flat_map(|(shard, entries)| entries.iter().map(|entry| (entry.name.as_str(), shard.as_str())))
                .collect();
            let elements = |entry: &SafetensorsEntry| entry.shape.iter().map(|&size| size as u64).product::<u64>();
            let parameters = shards.iter().flatten().map(elements).sum::<u64>();
            index::write(partial, &shard_of, parameters * dtype.block_bytes(), parameters)?;
        }
        Ok(())
    }

    /// Which tensors go to which shard: in order, a new one whenever the next does not fit.
    fn plan(&self, tensors: &[TensorSpec]) -> Result<Vec<Vec<SafetensorsEntry>>> {
        if tensors.is_empty() {
            return Err(Error::usage(format!("{} would hold no tensors", self.dir.display()), "name at least one"));
        }
        let dtype = Dtype::from(self.dtype);
        let mut shards: Vec<Vec<SafetensorsEntry>> = vec![];
        let mut names = BTreeSet::new();
        let mut shard_bytes = 0u64;
        for tensor in tensors {
            if !names.insert(&tensor.name) {
                return Err(self.error(&tensor.name, "is to be written twice".into(), "give each its own name"));
            }
            let shape: Vec<u64> = tensor.shape.iter().map(|&size| size as u64).collect();
            let bytes =
                byte_count(dtype, &shape).map_err(|problem| self.error(&tensor.name, problem, "check its shape"))?;
            let entry = SafetensorsEntry::new(&tensor.name, dtype, tensor.shape.clone());
            match shards.last_mut() {
                Some(shard) if shard_bytes.saturating_add(bytes) <= self.max_shard_bytes => {
                    shard_bytes += bytes;
                    shard.push(entry);
                }
                _ => {
                    shard_bytes = bytes;
                    shards.push(vec![entry]);
                }
            }
        }
        Ok(shards)
    }

    fn check_values(&self, name: &str, values: &[f32], dtype: Dtype) -> Result<()> {
        let Some(place) = convert::first_unstorable(values, dtype) else { return Ok(()) };
        let value = values[place];
        if value.is_finite() {
            let problem = format!("holds {value} at element {place}, beyond the range of {dtype}");
            return Err(self.error(name, problem, "store it as F32"));
        }
        let problem = format!("contains NaN or infinite values, the first at element {place}");
        Err(self.error(name, problem, "go back to an earlier checkpoint, with a lower learning rate"))
    }

    /// Added files must stay in the directory, and not take the place of what the writer makes.
    fn check_files(&self) -> Result<()> {
        for (name, _) in &self.files {
            let reserved = name == CONFIG_FILE || name == INDEX_FILE;
            if reserved || !index::is_plain_name(name) || name.ends_with(".safetensors") {
                let problem = format!("cannot add the file `{name}` to {}", self.dir.display());
                return Err(Error::usage(problem, "give a plain file name other than those of config and weights"));
            }
        }
        Ok(())
    }

    fn check_target(&self) -> Result<()> {
        check_target(&self.dir, self.overwrite)
    }

    fn error(&self, tensor: &str, problem: String, tip: &str) -> Error {
        Error::Tensor { path: self.dir.clone(), tensor: tensor.into(), problem, tip: tip.into() }
    }
}

/// `model.safetensors`, or `model-00001-of-00003.safetensors` and so on.
fn shard_names(count: usize) -> Vec<String> {
    if count == 1 {
        return vec![SINGLE_FILE.into()];
    }
    (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors")).collect()
}

/// Whether the directory may be written: absent or empty, or a checkpoint that may be replaced.
fn check_target(dir: &Path, overwrite: Overwrite) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) if !dir.exists() => false,
        Err(error) => return Err(Error::io(dir)(error)),
    };
    if !entries {
        return Ok(());
    }
    if !steps::is_complete(dir) {
        return Err(Error::file(dir, "holds other files than a checkpoint", "give an empty or a new directory"));
    }
    match overwrite {
        Overwrite::Refuse => Err(Error::file(dir, "already holds a checkpoint", "remove it or ask to overwrite it")),
        Overwrite::Replace => Ok(()),
    }
}

/// A directory being written, removed again unless it is committed.
struct PartialDirectory {
    path: PathBuf,
    committed: bool,
}

impl PartialDirectory {
    fn create(dir: &Path) -> Result<Self> {
        let path = durable::partial_path(dir)?;
        // A process that had our number before us may have left one.
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::io(&path))?;
        }
        fs::create_dir(&path).map_err(Error::io(&path))?;
        Ok(PartialDirectory { path, committed: false })
    }

    /// Gives the directory its name. A checkpoint that it replaces is moved aside first and removed last, so that
    /// one of the two is whole at every moment.
    fn commit(mut self, dir: &Path, overwrite: Overwrite) -> Result<()> {
        durable::sync_directory(&self.path)?;
        check_target(dir, overwrite)?;
        let replaced = durable::sibling(dir, ".replaced-")?;
        let replaces = steps::is_complete(dir);
        if replaces {
            if replaced.exists() {
                fs::remove_dir_all(&replaced).map_err(Error::io(&replaced))?;
            }
            fs::rename(dir, &replaced).map_err(Error::io(dir))?;
        }
        if let Err(error) = fs::rename(&self.path, dir) {
            if replaces {
                fs::rename(&replaced, dir).map_err(Error::io(&replaced))?;
            }
            return Err(Error::io(dir)(error));
        }
        self.committed = true;
        durable::sync_directory(durable::parent(dir))?;
        if replaces {
            fs::remove_dir_all(&replaced).map_err(Error::io(&replaced))?;
        }
        Ok(())
    }
}

impl Drop for PartialDirectory {
    fn drop(&mut self) {
        if !self.committed {
            // The error that brought us here is the one to tell; a partial directory is never read.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}
