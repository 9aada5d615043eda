//! Dense decoders of the Llama family by configuration: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3.

use std::path::Path;

use limbeck_kernels::rotary::Pairing;
use serde_json::Value;

use super::config::{DecoderConfig, FeedForwardConfig, Keys, LayerConfig, Names, QueryKeyNorm, Span};
use crate::error::Result;

/// Reads a `config.json` whose `model_type` is llama, mistral, qwen2 or qwen3.
pub fn from_json(path: &Path, json: &Value) -> Result<DecoderConfig> {
    let keys = Keys::new(path, json);
    let kind = json.get("model_type").and_then(Value::as_str).unwrap_or_default();
    let activation = keys.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
    keys.refuse("hidden_act", activation != "silu")?;
    keys.refuse("mlp_bias", keys.flag("mlp_bias", false)?)?;
    keys.refuse("attention_bias", keys.flag("attention_bias", false)?)?;
    keys.refuse("attention_dropout", keys.number("attention_dropout", 0.0)? != 0.0)?;
    keys.refuse("use_sliding_window", keys.flag("use_sliding_window", false)?)?;
    keys.refuse("quantization_config", keys.get("quantization_config").is_some())?;
    let hidden_size = keys.size("hidden_size")?;
    let span = match (kind, keys.optional_size("sliding_window")?) {
        ("mistral", Some(window)) => Span::Window(window),
        _ => Span::Full,
    };
    let layer = LayerConfig {
        rotary: true,
        span,
        query_key_norm: if kind == "qwen3" { QueryKeyNorm::WeightedBeforeRotary } else { QueryKeyNorm::None },
        temperature: None,
        bias: kind == "qwen2",
        feed_forward: FeedForwardConfig::Dense { width: keys.size("intermediate_size")? },
    };
    Ok(DecoderConfig {
        hidden_size,
        vocab_size: keys.size("vocab_size")?,
        heads: keys.heads(hidden_size)?,
        rms_norm_eps: keys.number("rms_norm_eps", 1e-6)? as f32,
        tied: keys.flag("tie_word_embeddings", false)?,
        max_position: keys.size("max_position_embeddings")?,
        rope: keys.rope(Pairing::Halves, 10_000.0)?,
        layers: vec![layer; keys.size("num_hidden_layers")?],
        init_std: keys.number("initializer_range", 0.02)?,
        names: Names::Llama,
        end_tokens: keys.tokens("eos_token_id")?,
        json: json.clone(),
    })
}
