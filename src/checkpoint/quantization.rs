//! What a `config.json` says about quantised weights: which of their forms this program reads, and which it refuses.
//!
//! Reads settings only; [`super::hugging_face`] finds the tensors that they are about.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// The key, in configurations of every method.
const KEY: &str = "quantization_config";

/// How the FP8 weights of a checkpoint are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Quantization {
    None,
    /// One scale per output channel, or one for the whole tensor, in `weight_scale`.
    Channels,
    /// One scale per block of so many rows and columns, in `weight_scale_inv` (which is multiplied by, as `weight_scale`
    /// is) or, in compressed-tensors' layout, in `weight_scale`.
    Blocks {
        size: [u64; 2],
        suffix: &'static str,
    },
}

/// The quantisation that a configuration describes, and the configuration without it: what is handed out is plain.
///
/// Weights are read back to numbers; that other programs also round activations and key caches while they run is
/// theirs, and not imitated.
///
/// # Errors
/// A method, format or number type that is not implemented, by its name.
pub(super) fn take(path: &Path, config: &mut Value) -> Result<Quantization> {
    let mut found = Quantization::None;
    if let Some(settings) = remove(config) {
        found = read(path, &settings)?;
    }
    if let Some(settings) = config.get_mut("text_config").and_then(remove) {
        found = read(path, &settings)?;
    }
    Ok(found)
}

fn remove(config: &mut Value) -> Option<Value> {
    config.as_object_mut()?.shift_remove(KEY).filter(|settings| !settings.is_null())
}

fn read(path: &Path, settings: &Value) -> Result<Quantization> {
    let method = settings.get("quant_method").and_then(Value::as_str).unwrap_or_default();
    match method {
        "compressed-tensors" => compressed_tensors(path, settings),
        "fbgemm_fp8" => Ok(Quantization::Channels),
        "fp8" => match settings.get("weight_block_size").filter(|size| !size.is_null()) {
            Some(size) => {
                Ok(Quantization::Blocks { size: block(path, "weight_block_size", size)?, suffix: "weight_scale_inv" })
            }
            None => Ok(Quantization::Channels),
        },
        "" => Err(refused(path, "quant_method", "is missing".into())),
        other => Err(refused(path, "quant_method", format!("`{other}` is not a method this program reads"))),
    }
}

fn compressed_tensors(path: &Path, settings: &Value) -> Result<Quantization> {
    let word = |settings: &Value, key: &str| settings.get(key).and_then(Value::as_str).map(str::to_string);
    let check = |settings: &Value, key: &str, allowed: &[&str]| match word(settings, key) {
        Some(value) if !allowed.contains(&value.as_str()) => {
            Err(refused(path, key, format!("`{value}` is not one this program reads")))
        }
        _ => Ok(()),
    };
    check(settings, "format", &["float-quantized", "naive-quantized"])?;
    check(settings, "quantization_status", &["compressed"])?;
    if let Some(sparsity) = settings.get("sparsity_config") {
        check(sparsity, "format", &["dense"])?;
    }
    let rotated = settings.get("transform_config").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
    if rotated {
        return Err(refused(path, "transform_config", "is not one this program reads".into()));
    }
    let groups = settings.get("config_groups").and_then(Value::as_object);
    let mut found = None;
    for group in groups.into_iter().flat_map(|groups| groups.values()) {
        check(group, "format", &["float-quantized", "naive-quantized"])?;
        let Some(weights) = group.get("weights").filter(|weights| !weights.is_null()) else { continue };
        check(weights, "type", &["float"])?;
        if let Some(bits) = weights.get("num_bits").filter(|bits| **bits != 8) {
            return Err(refused(path, "num_bits", format!("{bits} is not 8")));
        }
        let this = match word(weights, "strategy").as_deref() {
            Some("channel" | "tensor") => Quantization::Channels,
            Some("block") => {
                let size = weights.get("block_structure").unwrap_or(&Value::Null);
                Quantization::Blocks { size: block(path, "block_structure", size)?, suffix: "weight_scale" }
            }
            other => {
                let problem = format!("`{}` is not one this program reads", other.unwrap_or_default());
                return Err(refused(path, "strategy", problem));
            }
        };
        if found.is_some_and(|found| found != this) {
            return Err(refused(path, "config_groups", "scale weights in more than one way".into()));
        }
        found = Some(this);
    }
    found.ok_or_else(|| refused(path, "config_groups", "say nothing about weights".into()))
}

fn block(path: &Path, key: &str, value: &Value) -> Result<[u64; 2]> {
    let sizes: Option<Vec<u64>> = value.as_array().and_then(|sizes| sizes.iter().map(Value::as_u64).collect());
    match sizes.as_deref() {
        Some(&[rows, columns]) if rows > 0 && columns > 0 => Ok([rows, columns]),
        _ => Err(refused(path, key, format!("is {value}, not two sizes"))),
    }
}

fn refused(path: &Path, key: &str, problem: String) -> Error {
    Error::Config {
        path: path.to_path_buf(),
        key: format!("{KEY}.{key}"),
        problem,
        tip: "use weights in BF16, or in FP8 by compressed-tensors (float-quantized), fbgemm_fp8 or fp8".into(),
    }
}
