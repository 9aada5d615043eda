//! Llama 4's text model: its configuration in both spellings, and the presets in [`shapes`].

pub mod shapes;
pub mod sharding;

use std::path::Path;

use limbeck_kernels::{attention::Heads, rotary::Pairing};
use serde_json::{Value, json};

use super::config::{
    AttentionTemperature, DecoderConfig, FeedForwardConfig, Keys, LayerConfig, Llama3Scaling, Names, QueryKeyNorm,
    Rope, Span,
};
use crate::error::Result;

/// The text model's configuration, in the words of its `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Llama4Config {
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    /// Width of every routed expert and of the shared expert.
    pub intermediate_size: usize,
    /// Width of dense feed-forward blocks.
    pub intermediate_size_mlp: usize,
    pub num_local_experts: usize,
    pub num_experts_per_tok: usize,
    /// Numbers of the blocks with experts.
    pub moe_layers: Vec<usize>,
    /// Per block, whether it has rotary embedding (the key in the file is named the other way round).
    pub rotary_layers: Vec<bool>,
    pub attention_chunk_size: usize,
    pub use_qk_norm: bool,
    pub temperature: Option<AttentionTemperature>,
    pub rope_theta: f64,
    pub rope_scaling: Option<Llama3Scaling>,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub vocab_size: usize,
    pub tie_word_embeddings: bool,
    pub initializer_range: f64,
    pub router_aux_loss_coef: f64,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
}

impl Llama4Config {
    /// Reads a text configuration, or the text part of a multimodal one.
    pub fn from_json(path: &Path, json: &Value) -> Result<Self> {
        let json = json.get("text_config").unwrap_or(json);
        let keys = Keys::new(path, json);
        let activation = keys.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        keys.refuse("hidden_act", activation != "silu")?;
        keys.refuse("attention_bias", keys.flag("attention_bias", false)?)?;
        keys.refuse("attention_dropout", keys.number("attention_dropout", 0.0)? != 0.0)?;
        keys.refuse("quantization_config", keys.get("quantization_config").is_some())?;
        let hidden_size = keys.size("hidden_size")?;
        let layers = keys.size("num_hidden_layers")?;
        let heads = keys.heads(hidden_size)?;
        let num_local_experts = keys.size("num_local_experts")?;
        let num_experts_per_tok = keys.optional_size("num_experts_per_tok")?.unwrap_or(1);
        if num_experts_per_tok > num_local_experts {
            let problem = format!("{num_experts_per_tok} is more than the {num_local_experts} experts there are");
            return Err(keys.error("num_experts_per_tok", problem, "correct the configuration file"));
        }
        let moe_layers = match keys.get("moe_layers") {
            Some(_) => keys.sizes("moe_layers")?,
            None => {
                let step = keys.optional_size("interleave_moe_layer_step")?.unwrap_or(1);
                (step - 1..layers).step_by(step).collect()
            }
        };
        if let Some(&layer) = moe_layers.iter().find(|&&layer| layer >= layers) {
            let problem = format!("names block {layer} of a model with {layers}");
            return Err(keys.error("moe_layers", problem, "correct the configuration file"));
        }
        let listed = keys.sizes("no_rope_layers")?;
        let rotary_layers: Vec<bool> = if listed.is_empty() {
            let interval = keys.optional_size("no_rope_layer_interval")?.unwrap_or(4);
            (0..layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect()
        } else {
            listed.iter().map(|&flag| flag != 0).collect()
        };
        if rotary_layers.len() != layers {
            let problem = format!("has {} entries for {layers} blocks", rotary_layers.len());
            return Err(keys.error("no_rope_layers", problem, "give one entry per block"));
        }
        let rope = keys.rope(Pairing::Interleaved, 500_000.0)?;
        let temperature = keys.flag("attn_temperature_tuning", true)?.then_some(AttentionTemperature {
            scale: keys.number("attn_scale", 0.1)?,
            floor_scale: keys.number("floor_scale", 8192.0)?,
        });
        Ok(Llama4Config {
            hidden_size,
            num_hidden_layers: layers,
            num_attention_heads: heads.query_heads,
            num_key_value_heads: heads.key_heads,
            head_dim: heads.head_dim,
            intermediate_size: keys.size("intermediate_size")?,
            intermediate_size_mlp: keys.size("intermediate_size_mlp")?,
            num_local_experts,
            num_experts_per_tok,
            moe_layers,
            rotary_layers,
            attention_chunk_size: keys.optional_size("attention_chunk_size")?.unwrap_or(8192),
            use_qk_norm: keys.flag("use_qk_norm", true)?,
            temperature,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            rms_norm_eps: keys.number("rms_norm_eps", 1e-5)?,
            vocab_size: keys.size("vocab_size")?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            initializer_range: keys.number("initializer_range", 0.02)?,
            router_aux_loss_coef: keys.number("router_aux_loss_coef", 0.001)?,
            bos_token_id: keys.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: keys.tokens("eos_token_id")?,
        })
    }

    /// The configuration as `Llama4ForCausalLM` reads it, in the spelling that both old and new readers accept.
    pub fn to_json(&self) -> Value {
        let scaling = self.rope_scaling.as_ref().map(|scaling| {
            json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position as u64,
            })
        });
        let temperature = self.temperature.unwrap_or(AttentionTemperature { scale: 0.1, floor_scale: 8192.0 });
        // Readers that check types want a whole number here.
        let floor_scale = match temperature.floor_scale {
            whole if whole.fract() == 0.0 => json!(whole as u64),
            other => json!(other),
        };
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        json!({
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "attention_bias": false,
            "attention_chunk_size": self.attention_chunk_size,
            "attention_dropout": 0.0,
            "attn_scale": temperature.scale,
            "attn_temperature_tuning": self.temperature.is_some(),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": null,
            "floor_scale": floor_scale,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "intermediate_size_mlp": self.intermediate_size_mlp,
            "max_position_embeddings": self.max_position_embeddings,
            "moe_layers": self.moe_layers,
            "no_rope_layers": self.rotary_layers.iter().map(|&rotary| rotary as u8).collect::<Vec<_>>(),
            "num_attention_heads": self.num_attention_heads,
            "num_experts_per_tok": self.num_experts_per_tok,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_local_experts": self.num_local_experts,
            "output_router_logits": false,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "router_aux_loss_coef": self.router_aux_loss_coef,
            "router_jitter_noise": 0.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            "use_cache": true,
            "use_qk_norm": self.use_qk_norm,
            "vocab_size": self.vocab_size,
        })
    }

    /// The decoder this configuration describes. `path` is for error messages.
    pub fn decoder(&self, path: &Path) -> Result<DecoderConfig> {
        let keys = Value::Null;
        let keys = Keys::new(path, &keys);
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let problem =
                format!("{} does not divide {} query heads", self.num_key_value_heads, self.num_attention_heads);
            return Err(keys.error("num_key_value_heads", problem, "choose a divisor"));
        }
        let layer = |index: usize| {
            let rotary = self.rotary_layers[index];
            LayerConfig {
                rotary,
                span: if rotary { Span::Chunk(self.attention_chunk_size) } else { Span::Full },
                query_key_norm: match self.use_qk_norm && rotary {
                    true => QueryKeyNorm::UnitAfterRotary,
                    false => QueryKeyNorm::None,
                },
                temperature: if rotary { None } else { self.temperature },
                bias: false,
                feed_forward: if self.moe_layers.contains(&index) {
                    FeedForwardConfig::Experts {
                        width: self.intermediate_size,
                        expert_count: self.num_local_experts,
                        chosen: self.num_experts_per_tok,
                    }
                } else {
                    FeedForwardConfig::Dense { width: self.intermediate_size_mlp }
                },
            }
        };
        Ok(DecoderConfig {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            heads: Heads {
                query_heads: self.num_attention_heads,
                key_heads: self.num_key_value_heads,
                head_dim: self.head_dim,
            },
            rms_norm_eps: self.rms_norm_eps as f32,
            tied: self.tie_word_embeddings,
            max_position: self.max_position_embeddings,
            rope: Rope { theta: self.rope_theta, scaling: self.rope_scaling.clone(), pairing: Pairing::Interleaved },
            layers: (0..self.num_hidden_layers).map(layer).collect(),
            init_std: self.initializer_range,
            names: Names::Llama4,
            end_tokens: self.eos_token_ids.clone(),
            json: self.to_json(),
        })
    }
}
