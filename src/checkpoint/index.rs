//! `model.safetensors.index.json`: which shard holds which tensor.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::{Value, json};

use super::INDEX_FILE;
use crate::durable;
use crate::error::{Error, Result};

/// Tensor name to file name, as the index in `dir` says; every file is there.
pub(super) fn read(dir: &Path) -> Result<BTreeMap<String, String>> {
    let path = dir.join(INDEX_FILE);
    let again = "download it again";
    let index = durable::read_json_object(&path, again, again)?;
    let Some(entries) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::file(&path, "has no `weight_map` object", again));
    };
    if entries.is_empty() {
        return Err(Error::file(&path, "its `weight_map` is empty", again));
    }
    let mut shard_of = BTreeMap::new();
    for (tensor, shard) in entries {
        let Some(shard) = shard.as_str().filter(|shard| is_plain_name(shard)) else {
            let problem = format!("places the tensor `{tensor}` in {shard}, which is not a file name");
            return Err(Error::file(&path, problem, again));
        };
        if !shard_of.values().any(|known| known == shard) && !dir.join(shard).is_file() {
            let problem = format!("names the shard `{shard}` (for `{tensor}`), which is missing");
            return Err(Error::file(&path, problem, "download the missing shard"));
        }
        shard_of.insert(tensor.clone(), shard.to_string());
    }
    Ok(shard_of)
}

/// Writes the index of a sharded checkpoint.
pub(super) fn write(dir: &Path, shard_of: &BTreeMap<&str, &str>, bytes: u64, parameters: u64) -> Result<()> {
    let metadata = json!({ "total_parameters": parameters, "total_size": bytes });
    durable::write_json(&dir.join(INDEX_FILE), &json!({ "metadata": metadata, "weight_map": shard_of }))
}

/// Whether a name stays in the directory it is joined to.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(first)) if first == name) && components.next().is_none()
}
