//! Decoder-only language models, layer by layer.
//!
//! A model is an embedding, layers, a final norm and a head; a layer can be loaded, run and dropped on its own.
//! [`llama4`] and [`llama`] read the configurations of their families into one [`DecoderConfig`]; [`Decoder`] runs it.
//! Single-device code: nothing here knows of meshes, caches or recipes.

pub mod attention;
pub mod config;
pub mod decoder;
pub mod ends;
pub mod feed_forward;
pub mod generate;
pub mod layout;
pub mod linear;
pub mod llama;
pub mod llama4;
mod packed_block;
pub mod parameter;
pub mod rope;
pub mod routed;
pub mod upcycling;

pub use config::DecoderConfig;
pub use decoder::{Decoder, Layer, LayerOutput};
pub use layout::TokenLayout;
pub use parameter::{ParameterRef, RandomWeights, WeightSource};
pub use routed::{Choices, Expert, RoutedLayer};

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// Reads a Hugging Face `config.json` of any supported family. `path` is for error messages.
pub fn read_config(path: &Path, json: &Value) -> Result<DecoderConfig> {
    let kind = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "llama4" | "llama4_text" => llama4::Llama4Config::from_json(path, json)?.decoder(path),
        "llama" | "mistral" | "qwen2" | "qwen3" => llama::from_json(path, json),
        other => Err(Error::Config {
            path: path.to_path_buf(),
            key: "model_type".into(),
            problem: format!("`{other}` is not a model this program runs"),
            tip: "use a checkpoint of type llama4, llama4_text, llama, mistral, qwen2 or qwen3".into(),
        }),
    }
}
