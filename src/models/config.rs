//! What a decoder is made of, whatever family its configuration came from; and how to read keys with clear errors.

use std::path::{Path, PathBuf};

use limbeck_kernels::{attention::Heads, rotary::Pairing};
use serde_json::Value;

use crate::error::{Error, Result};

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub heads: Heads,
    pub rms_norm_eps: f32,
    /// The head is the embedding.
    pub tied: bool,
    /// Longest sequence the model was made for.
    pub max_position: usize,
    pub rope: Rope,
    pub layers: Vec<LayerConfig>,
    /// Standard deviation of freshly drawn weights.
    pub init_std: f64,
    pub names: Names,
    /// Token ids that end a generation.
    pub end_tokens: Vec<u32>,
    /// The configuration in Hugging Face's words, written beside every checkpoint of the model.
    pub json: Value,
}

/// One transformer block.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// Queries and keys are turned by their position.
    pub rotary: bool,
    pub span: Span,
    pub query_key_norm: QueryKeyNorm,
    /// Llama 4's scaling of queries by position on layers without rotary embedding.
    pub temperature: Option<AttentionTemperature>,
    /// The query, key and value projections have biases.
    pub bias: bool,
    pub feed_forward: FeedForwardConfig,
}

/// How far back a token sees inside its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// To the document's start.
    Full,
    /// To the start of its chunk of this many positions.
    Chunk(usize),
    /// This many tokens, itself included.
    Window(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryKeyNorm {
    None,
    /// Weight-free, after the rotation (Llama 4).
    UnitAfterRotary,
    /// With a weight per channel, before the rotation (Qwen3).
    WeightedBeforeRotary,
}

/// `1 + scale * ln(1 + floor((position + 1) / floor_scale))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionTemperature {
    pub scale: f64,
    pub floor_scale: f64,
}

#[derive(Debug, Clone, PartialEq)]
pub enum FeedForwardConfig {
    Dense {
        width: usize,
    },
    /// Routed experts beside one shared expert of the same width.
    Experts {
        width: usize,
        expert_count: usize,
        chosen: usize,
    },
}

/// Rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Option<Llama3Scaling>,
    pub pairing: Pairing,
}

/// Llama 3's stretching of slow frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct Llama3Scaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position: f64,
}

/// What the feed-forward block is called in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Names {
    /// `feed_forward.*`
    Llama4,
    /// `mlp.*`
    Llama,
}

impl DecoderConfig {
    /// Parameters in all, and those one token passes through (both embeddings counted once each, unless tied).
    pub fn parameter_counts(&self) -> (u64, u64) {
        let (hidden, heads) = (self.hidden_size as u64, self.heads);
        let (query, key) = ((heads.query_heads * heads.head_dim) as u64, (heads.key_heads * heads.head_dim) as u64);
        let embeddings = self.vocab_size as u64 * hidden * if self.tied { 1 } else { 2 };
        let (mut total, mut active) = (embeddings + hidden, embeddings + hidden);
        for layer in &self.layers {
            let mut shared = 2 * hidden + 2 * hidden * query + 2 * hidden * key;
            if layer.bias {
                shared += query + 2 * key;
            }
            if layer.query_key_norm == QueryKeyNorm::WeightedBeforeRotary {
                shared += 2 * heads.head_dim as u64;
            }
            let (rest, chosen_rest) = match layer.feed_forward {
                FeedForwardConfig::Dense { width } => (3 * hidden * width as u64, 3 * hidden * width as u64),
                FeedForwardConfig::Experts { width, expert_count, chosen } => {
                    let expert = 3 * hidden * width as u64;
                    let router = expert_count as u64 * hidden;
                    (router + expert * (1 + expert_count as u64), router + expert * (1 + chosen as u64))
                }
            };
            total += shared + rest;
            active += shared + chosen_rest;
        }
        (total, active)
    }

    /// Numbers of the layers that have routed experts, with their expert counts.
    pub fn expert_layers(&self) -> Vec<(usize, usize)> {
        let experts = |layer: &LayerConfig| match layer.feed_forward {
            FeedForwardConfig::Experts { expert_count, .. } => Some(expert_count),
            FeedForwardConfig::Dense { .. } => None,
        };
        self.layers.iter().enumerate().filter_map(|(i, layer)| experts(layer).map(|count| (i, count))).collect()
    }

    /// The number of experts of each of some layers, which is the same for all of them; 0 for no layers.
    ///
    /// # Errors
    /// When one has none, or another number than the first.
    pub fn experts_of(&self, layers: &[usize]) -> Result<usize> {
        let all = self.expert_layers();
        let count = |layer: &usize| all.iter().find(|(number, _)| number == layer).map(|(_, count)| *count);
        let first = layers.first().and_then(count).unwrap_or(0);
        match layers.iter().find(|layer| count(layer).is_none_or(|count| count != first)) {
            None => Ok(first),
            Some(layer) => {
                let numbers: Vec<String> = all.iter().map(|(number, _)| number.to_string()).collect();
                let tip = match numbers.is_empty() {
                    true => "this model has none in any layer; leave its routers out".into(),
                    false => format!("layers with experts are {}", numbers.join(", ")),
                };
                let other = if count(layer).is_some() { "another number of experts" } else { "no routed experts" };
                Err(Error::usage(format!("layer {layer} has {other}"), tip))
            }
        }
    }

    /// Refuses sequences longer than the model was made for.
    pub fn check_seq_len(&self, seq_len: usize) -> Result<()> {
        if seq_len > self.max_position {
            return Err(Error::usage(
                format!("sequence length {seq_len} is over the model's maximum of {}", self.max_position),
                format!("set seq_len to {} or less", self.max_position),
            ));
        }
        Ok(())
    }
}

/// Reads the keys of one JSON object, with errors that name file and key.
pub struct Keys<'a> {
    path: PathBuf,
    json: &'a Value,
}

impl<'a> Keys<'a> {
    pub fn new(path: &Path, json: &'a Value) -> Self {
        Keys { path: path.to_path_buf(), json }
    }

    /// The value of a key; absent and null are the same.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    pub fn error(&self, key: &str, problem: impl Into<String>, tip: impl Into<String>) -> Error {
        Error::Config { path: self.path.clone(), key: key.into(), problem: problem.into(), tip: tip.into() }
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        self.error(key, format!("is {value}, not {wanted}"), "correct the configuration file")
    }

    pub fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| self.error(key, "is missing", "add it to the configuration file"))
    }

    pub fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0) {
            Some(n) => Ok(Some(n)),
            None => Err(self.wrong(key, value, "a positive whole number")),
        }
    }

    pub fn number(&self, key: &str, default: f64) -> Result<f64> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_f64().ok_or_else(|| self.wrong(key, value, "a number")),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            // older Llama 4 files write 4 where newer ones write true
            Some(value) => value
                .as_bool()
                .or_else(|| value.as_i64().map(|n| n != 0))
                .ok_or_else(|| self.wrong(key, value, "true or false")),
        }
    }

    /// A list of whole numbers; empty when absent.
    pub fn sizes(&self, key: &str) -> Result<Vec<usize>> {
        let Some(value) = self.get(key) else { return Ok(vec![]) };
        let list = value.as_array().ok_or_else(|| self.wrong(key, value, "a list"))?;
        list.iter()
            .map(|n| n.as_u64().map(|n| n as usize).ok_or_else(|| self.wrong(key, n, "a whole number")))
            .collect()
    }

    /// One id or a list of ids.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        match self.get(key) {
            None => Ok(vec![]),
            Some(Value::Array(_)) => Ok(self.sizes(key)?.into_iter().map(|id| id as u32).collect()),
            Some(value) => {
                Ok(vec![value.as_u64().ok_or_else(|| self.wrong(key, value, "a token id or a list of them"))? as u32])
            }
        }
    }

    /// Refuses a value that would change the computation in a way this program does not do.
    pub fn refuse(&self, key: &str, unsupported: bool) -> Result<()> {
        if !unsupported {
            return Ok(());
        }
        let value = self.get(key).cloned().unwrap_or_default();
        Err(self.error(key, format!("{value} is not supported"), "use a model without it"))
    }

    /// Query, key and value head counts and size.
    pub fn heads(&self, hidden_size: usize) -> Result<Heads> {
        let query_heads = self.size("num_attention_heads")?;
        let key_heads = self.optional_size("num_key_value_heads")?.unwrap_or(query_heads);
        let head_dim = match self.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(query_heads) => hidden_size / query_heads,
            None => return Err(self.error("head_dim", "is missing and heads do not divide hidden_size", "add it")),
        };
        if !query_heads.is_multiple_of(key_heads) {
            let problem = format!("{key_heads} does not divide num_attention_heads {query_heads}");
            return Err(self.error("num_key_value_heads", problem, "correct the configuration file"));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.error("head_dim", format!("{head_dim} is odd"), "rotary embedding turns pairs"));
        }
        Ok(Heads { query_heads, key_heads, head_dim })
    }

    /// Rotary settings in either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`.
    pub fn rope(&self, pairing: Pairing, default_theta: f64) -> Result<Rope> {
        let parameters = self.get("rope_parameters").or_else(|| self.get("rope_scaling"));
        let inner = parameters.map(|json| Keys { path: self.path.clone(), json });
        let theta = match &inner {
            Some(inner) if inner.get("rope_theta").is_some() => inner.number("rope_theta", default_theta)?,
            _ => self.number("rope_theta", default_theta)?,
        };
        let Some(inner) = inner else { return Ok(Rope { theta, scaling: None, pairing }) };
        let kind = inner.get("rope_type").or_else(|| inner.get("type")).and_then(Value::as_str).unwrap_or("default");
        let scaling = match kind {
            "default" => None,
            "llama3" => Some(Llama3Scaling {
                factor: inner.number("factor", 8.0)?,
                low_freq_factor: inner.number("low_freq_factor", 1.0)?,
                high_freq_factor: inner.number("high_freq_factor", 4.0)?,
                original_max_position: inner.number("original_max_position_embeddings", 8192.0)?,
            }),
            other => {
                let tip = "use a model whose rope_type is default or llama3";
                return Err(self.error("rope_type", format!("`{other}` is not supported"), tip));
            }
        };
        Ok(Rope { theta, scaling, pairing })
    }
}
