//! Models as directories in Hugging Face's layout, from weights that are in memory. What is in a checkpoint beside the weights
//! is whoever's who asks for it.

use std::path::Path;

use serde_json::json;

use crate::{
    checkpoint::{CheckpointWriter, Overwrite, StoredDtype, TensorSpec, TrainState},
    error::Result,
    models::Decoder,
};

/// How a model is written.
#[derive(Debug, Clone, Copy)]
pub struct Export {
    pub dtype: StoredDtype,
    /// Most bytes in one file of weights; `None` for the writer's default.
    pub max_shard_bytes: Option<u64>,
    /// Replace a checkpoint of the same name, once the new one is complete.
    pub replace: bool,
}

/// Writes a model in Hugging Face's layout, with the files given beside it.
pub fn write_model(
    model: &mut Decoder,
    dir: &Path,
    export: &Export,
    files: &[(String, Vec<u8>)],
    state: Option<&TrainState>,
) -> Result<()> {
    write_model_with(model, dir, export, files, &mut |partial| state.map_or(Ok(()), |state| state.save(partial)))
}

/// As [`write_model`], with whatever `more` puts into the directory.
pub(super) fn write_model_with(
    model: &mut Decoder,
    dir: &Path,
    export: &Export,
    files: &[(String, Vec<u8>)],
    more: &mut dyn FnMut(&Path) -> Result<()>,
) -> Result<()> {
    let (mut specs, mut tensors) = (vec![], std::collections::BTreeMap::new());
    model.visit(&mut |name, parameter| {
        specs.push(TensorSpec::new(name, parameter.shape()));
        tensors.insert(name.to_string(), parameter.flat());
    });
    let mut config = model.config.json.clone();
    if let Some(keys) = config.as_object_mut() {
        keys.remove("torch_dtype");
        let name = match export.dtype {
            StoredDtype::F32 => "float32",
            StoredDtype::Bf16 => "bfloat16",
            StoredDtype::F16 => "float16",
        };
        keys.insert("dtype".into(), name.into());
    }
    let generation = json!({
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
    });
    let generation = serde_json::to_vec_pretty(&generation).expect("plain JSON");
    let mut writer = CheckpointWriter::new(dir, &config, export.dtype)
        .with_overwrite(if export.replace { Overwrite::Replace } else { Overwrite::Refuse })
        .with_file("generation_config.json", generation);
    if let Some(bytes) = export.max_shard_bytes {
        writer = writer.with_max_shard_bytes(bytes);
    }
    for (name, bytes) in files {
        writer = writer.with_file(name.clone(), bytes.as_slice());
    }
    writer.with_extra(more).write(&specs, &mut |name| {
        let tensor = tensors.remove(name).expect("every tensor is written once");
        Ok(tensor.into_data().try_into_vec::<f32>().expect("weights are f32"))
    })
}
