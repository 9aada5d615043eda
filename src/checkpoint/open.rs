//! Opening a checkpoint: which form a path has, where its configuration and its tensors are, and what they mean.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::assembly::StoredTensors;
use super::gguf::{Metadata, read_gguf};
use super::quantization::Quantization;
use super::reader::CheckpointReader;
use super::safetensors_file::read_safetensors;
use super::tensor_file::TensorFile;
use super::{CONFIG_FILE, INDEX_FILE, SINGLE_FILE, gguf_models, hugging_face, index, meta, quantization};
use crate::durable;
use crate::error::{Error, Result};
use crate::hub::{self, Wanted};

/// Configuration of a checkpoint as Meta publishes it.
const PARAMS_FILE: &str = "params.json";
/// Which part of a split model a GGUF file is, and of how many.
const SPLIT_COUNT: &str = "split.count";

/// Whether a path is that of a GGUF file, by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|ending| ending.eq_ignore_ascii_case("gguf"))
}

pub(super) fn open(path: &Path) -> Result<CheckpointReader> {
    let path = &hub::local(path, Wanted::Everything)?;
    if path.is_file() && is_gguf(path) {
        return open_gguf(path);
    }
    if !path.is_dir() {
        let problem = if path.exists() { "is not a directory" } else { "does not exist" };
        let tip = "give the path of a checkpoint directory in Hugging Face layout, or of a .gguf file";
        return Err(Error::file(path, problem, tip));
    }
    let native = !path.join(CONFIG_FILE).is_file() && path.join(PARAMS_FILE).is_file();
    let config_path = path.join(if native { PARAMS_FILE } else { CONFIG_FILE });
    let missing = "copy it from where the weights came from";
    let stored_config = durable::read_json_object(&config_path, missing, "download it again")?;
    let mut config = stored_config.clone();
    let quantization = if native { Quantization::None } else { quantization::take(&config_path, &mut config)? };
    let (files, file_of) = if path.join(SINGLE_FILE).is_file() {
        open_single(&path.join(SINGLE_FILE))?
    } else if path.join(INDEX_FILE).is_file() {
        open_shards(path)?
    } else if let Some(file) = consolidated(path)? {
        open_single(&file)?
    } else {
        return Err(no_weights(path));
    };
    let stored = StoredTensors { path: path.to_path_buf(), files, file_of };
    let tensors = if meta::has_these_names(&stored) {
        if native {
            config = meta::config(&config_path, &stored_config, &stored)?;
        }
        meta::present(&config_path, &config, &stored)?
    } else if native {
        let problem =
            format!("has no {CONFIG_FILE}, and its tensors do not have the names that belong to {PARAMS_FILE}");
        return Err(Error::file(path, problem, missing));
    } else {
        hugging_face::present(&stored, quantization)?
    };
    Ok(CheckpointReader { config_path, config, stored_config, stored, tensors })
}

/// The configuration of a checkpoint in Hugging Face's words, and the file it is in. For a model on the hub that is all
/// that is downloaded, unless its configuration is not said in one file.
///
/// # Errors
/// As [`CheckpointReader::open`]; of a model on the hub no weights are looked at.
pub fn read_configuration(path: &Path) -> Result<(PathBuf, Value)> {
    if hub::is_hub(path) && !is_gguf(path) {
        let config_path = hub::local(path, Wanted::Configuration)?.join(CONFIG_FILE);
        if config_path.is_file() {
            let mut config = durable::read_json_object(&config_path, "download it again", "download it again")?;
            quantization::take(&config_path, &mut config)?;
            return Ok((config_path, config));
        }
    }
    let reader = CheckpointReader::open(path)?;
    Ok((reader.config_path.clone(), reader.config.clone()))
}

fn open_gguf(path: &Path) -> Result<CheckpointReader> {
    let (metadata, first) = read_gguf(path)?.into_parts();
    let mut stored = StoredTensors { path: path.to_path_buf(), files: vec![], file_of: BTreeMap::new() };
    let mut add = |file: TensorFile| {
        let number = stored.files.len();
        if let Some(name) = file.names().find(|name| stored.file_of.contains_key(*name)) {
            return Err(file.error(name, "is in an earlier part of the model too".into(), "download the parts again"));
        }
        stored.file_of.extend(file.names().map(|name| (name.to_string(), number)));
        stored.files.push(file);
        Ok(())
    };
    add(first)?;
    for part in other_parts(path, &metadata)? {
        add(read_gguf(&part)?.into_parts().1)?;
    }
    let (config, tensors) = gguf_models::read(&metadata, &stored)?;
    // Names, licences and tokenizers do not change what the weights compute.
    let identity = |key: &str| {
        key == "general.architecture"
            || !["general.", "tokenizer.", "split."].iter().any(|start| key.starts_with(start))
    };
    let pairs = metadata.pairs().iter().filter(|(key, _)| identity(key));
    let stored_config = Value::Object(pairs.map(|(key, value)| (key.clone(), value.clone())).collect());
    Ok(CheckpointReader { config_path: path.to_path_buf(), config, stored_config, stored, tensors })
}

/// The parts of a split model beside the first: `name-00002-of-00003.gguf` and so on.
fn other_parts(path: &Path, metadata: &Metadata) -> Result<Vec<PathBuf>> {
    let count = metadata.size(SPLIT_COUNT)?.unwrap_or(1);
    if count < 2 {
        return Ok(vec![]);
    }
    let first = format!("-00001-of-{count:05}.gguf");
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&first) else {
        let problem = format!("is a part of a model in {count} files, and its name does not end in {first}");
        return Err(Error::file(path, problem, "give the path of the first part, under its own name"));
    };
    let part = |number: u64| path.with_file_name(format!("{stem}-{number:05}-of-{count:05}.gguf"));
    // As many files as are there: the count is the file's word.
    (2..=count)
        .map(|number| match part(number) {
            file if file.is_file() => Ok(file),
            file => Err(Error::file(&file, format!("is missing, part {number} of {count}"), "download it")),
        })
        .collect()
}

fn open_single(file: &Path) -> Result<(Vec<TensorFile>, BTreeMap<String, usize>)> {
    let file = read_safetensors(file)?.into_tensors();
    let file_of = file.names().map(|name| (name.to_string(), 0)).collect();
    Ok((vec![file], file_of))
}

/// The one file of a checkpoint as Meta names it.
fn consolidated(dir: &Path) -> Result<Option<PathBuf>> {
    let mut files: Vec<PathBuf> = names_in(dir)
        .filter(|name| name.starts_with("consolidated") && name.ends_with(".safetensors"))
        .map(|name| dir.join(name))
        .collect();
    files.sort();
    if files.len() > 1 {
        let problem = format!("holds weights that are cut into {} files for as many devices", files.len());
        return Err(Error::file(
            dir,
            problem,
            "join them into one consolidated.safetensors, or use the Hugging Face form",
        ));
    }
    Ok(files.pop())
}

fn names_in(dir: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn open_shards(dir: &Path) -> Result<(Vec<TensorFile>, BTreeMap<String, usize>)> {
    let mut files: Vec<TensorFile> = vec![];
    let mut opened: BTreeMap<String, usize> = BTreeMap::new();
    let mut file_of = BTreeMap::new();
    for (tensor, shard) in index::read(dir)? {
        let number = match opened.get(&shard) {
            Some(&number) => number,
            None => {
                files.push(read_safetensors(dir.join(&shard))?.into_tensors());
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
    let is_pickled = |name: &String| {
        let hugging_face =
            name.starts_with("pytorch_model") && (name.ends_with(".bin") || name.ends_with(".bin.index.json"));
        hugging_face || name.starts_with("consolidated") && name.ends_with(".pth")
    };
    let problem = format!("holds neither {SINGLE_FILE} nor {INDEX_FILE}");
    if names_in(dir).any(|name| is_pickled(&name)) {
        let tip = "save it again from Python as safetensors";
        return Error::file(dir, problem + ", only pickled weights", tip);
    }
    if let Some(name) = names_in(dir).find(|name| is_gguf(Path::new(name))) {
        return Error::file(dir, problem, format!("name the file {name} in it"));
    }
    Error::file(dir, problem, "give the path of a checkpoint directory in Hugging Face layout, or of a .gguf file")
}
