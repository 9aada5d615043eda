//! What the metadata and tensors of a GGUF file are called in Hugging Face checkpoints.
//!
//! For the architectures `llama` and `llama4`, as llama.cpp's converter writes them. It reorders the query and key rows
//! of `llama`, so that neighbouring rows turn together, and splits and transposes the experts of `llama4`; both is
//! undone. Everything else, a name too many included, is refused: a tensor left out would change the model.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::assembly::{Arrangement, Assembly, Joined, Piece, Presented, Slab, StoredTensors};
use super::dtype::TensorInfo;
use super::gguf::Metadata;
use crate::error::{Error, Result};

/// What llama.cpp takes for the length of a chunk of `llama4`, which no key of the format says.
const CHUNK: u64 = 8192;
/// Llama 3.1, 3.2 and the two spellings of Scout: `low_freq_factor`, `high_freq_factor`.
const ROPE_BANDS: [(f64, f64); 2] = [(1.0, 4.0), (1.0, 1.0)];
/// The context that all of them were made for before it was stretched.
const ROPE_CONTEXT: f64 = 8192.0;
/// Factors are stored in f32, and computed in it by the converter.
const ROPE_TOLERANCE: f64 = 1e-5;
const ROPE_FACTORS: &str = "rope_freqs.weight";

const AGAIN: &str = "convert the model again";

/// A model in GGUF, with its keys.
pub(super) struct GgufModel<'a> {
    metadata: &'a Metadata,
    stored: &'a StoredTensors,
    architecture: &'static str,
    /// Names that have been used; those left over are refused.
    mapped: BTreeMap<String, Presented>,
    used: BTreeSet<String>,
}

/// Configuration in Hugging Face's words, and the tensors under its names.
pub(super) fn read(metadata: &Metadata, stored: &StoredTensors) -> Result<(Value, BTreeMap<String, Presented>)> {
    const KEY: &str = "general.architecture";
    let architecture = match metadata.text(KEY)?.ok_or_else(|| metadata.missing(KEY))? {
        "llama" => "llama",
        "llama4" => "llama4",
        other => {
            let problem = format!("`{other}` is not an architecture this program reads from GGUF");
            return Err(metadata.error(KEY, problem, "use a file of llama or llama4, or a Hugging Face checkpoint"));
        }
    };
    let model = GgufModel { metadata, stored, architecture, mapped: BTreeMap::new(), used: BTreeSet::new() };
    model.read()
}

impl GgufModel<'_> {
    fn read(mut self) -> Result<(Value, BTreeMap<String, Presented>)> {
        let config = match self.architecture {
            "llama" => self.llama()?,
            _ => self.llama4()?,
        };
        let layers = self.size("block_count")?;
        self.rename("token_embd.weight", "model.embed_tokens.weight");
        self.rename("output_norm.weight", "model.norm.weight");
        if self.stored.contains("output.weight") {
            self.rename("output.weight", "lm_head.weight");
        }
        self.used.insert(ROPE_FACTORS.into());
        for layer in 0..layers {
            self.layer(layer)?;
        }
        if let Some(name) = self.stored.file_of.keys().find(|name| !self.used.contains(*name)) {
            let problem = format!("is not a tensor that models of `{}` have", self.architecture);
            return Err(self.stored.error(name, problem, "use a model whose architecture this program reads"));
        }
        Ok((config, self.mapped))
    }

    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn optional_size(&self, key: &str) -> Result<Option<u64>> {
        self.metadata.size(&self.key(key))
    }

    fn size(&self, key: &str) -> Result<u64> {
        self.optional_size(key)?.ok_or_else(|| self.metadata.missing(&self.key(key)))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.metadata.number(&self.key(key))
    }

    /// A size that may be written as one per layer, all of them equal.
    fn size_of_layers(&self, key: &str) -> Result<Option<u64>> {
        let name = self.key(key);
        match self.metadata.get(&name) {
            Some(Value::Array(sizes)) => match sizes.first().map(|first| (first, first.as_u64())) {
                Some((first, Some(size))) if sizes.iter().all(|size| size == first) => Ok(Some(size)),
                _ => Err(self.metadata.error(&name, "differs between layers", "use a model whose layers are alike")),
            },
            _ => self.metadata.size(&name),
        }
    }

    fn refuse(&self, key: &str, unsupported: bool, what: &str) -> Result<()> {
        if !unsupported {
            return Ok(());
        }
        Err(self.metadata.error(&self.key(key), format!("{what} is not supported"), "use a model without it"))
    }

    /// The keys that both architectures have.
    fn shared(&self) -> Result<Value> {
        let hidden = self.size("embedding_length")?;
        let heads = self.size_of_layers("attention.head_count")?;
        let heads = heads.ok_or_else(|| self.metadata.missing(&self.key("attention.head_count")))?;
        let key_heads = self.size_of_layers("attention.head_count_kv")?.unwrap_or(heads);
        let rotated = self.optional_size("rope.dimension_count")?;
        let head_dim = self.optional_size("attention.key_length")?.or(hidden.checked_div(heads));
        let head_dim = head_dim.ok_or_else(|| self.metadata.error(&self.key("attention.head_count"), "is 0", AGAIN))?;
        let partial = rotated.is_some_and(|rotated| rotated != head_dim);
        self.refuse("rope.dimension_count", partial, "turning a part of each head")?;
        let values = self.optional_size("attention.value_length")?.unwrap_or(head_dim);
        self.refuse("attention.value_length", values != head_dim, "another length than that of keys")?;
        let vocab = match self.optional_size("vocab_size")? {
            Some(size) => size,
            None => self.stored.info("token_embd.weight")?.shape.first().copied().unwrap_or(0) as u64,
        };
        let epsilon = "attention.layer_norm_rms_epsilon";
        let mut config = json!({
            "attention_bias": false,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "num_hidden_layers": self.size("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head_dim,
            "max_position_embeddings": self.size("context_length")?,
            "rms_norm_eps": self.number(epsilon)?.ok_or_else(|| self.metadata.missing(&self.key(epsilon)))?,
            "vocab_size": vocab,
            "tie_word_embeddings": !self.stored.contains("output.weight"),
            "bos_token_id": self.metadata.size("tokenizer.ggml.bos_token_id")?,
            "eos_token_id": self.metadata.size("tokenizer.ggml.eos_token_id")?,
        });
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        config["rope_theta"] = json!(theta);
        config["rope_scaling"] = self.rope_scaling(theta, head_dim)?;
        Ok(config)
    }

    fn llama(&mut self) -> Result<Value> {
        let experts = self.optional_size("expert_count")?.unwrap_or(0);
        self.refuse("expert_count", experts > 0, &format!("a mixture of {experts} experts"))?;
        let mut config = self.shared()?;
        config["model_type"] = json!("llama");
        config["architectures"] = json!(["LlamaForCausalLM"]);
        config["mlp_bias"] = json!(false);
        let width = self.size_of_layers("feed_forward_length")?;
        config["intermediate_size"] = json!(width.ok_or_else(|| self.metadata.missing("llama.feed_forward_length"))?);
        Ok(config)
    }

    fn llama4(&mut self) -> Result<Value> {
        // 0 marks models without chunks and without layers that turn nothing.
        let window = self.optional_size("attention.sliding_window")?.unwrap_or(CHUNK);
        self.refuse("attention.sliding_window", window != CHUNK, &format!("a window of {window}"))?;
        let mut config = self.shared()?;
        let experts = self.size("expert_count")?;
        config["model_type"] = json!("llama4_text");
        config["architectures"] = json!(["Llama4ForCausalLM"]);
        config["num_local_experts"] = json!(experts);
        config["num_experts_per_tok"] = json!(self.size("expert_used_count")?);
        config["interleave_moe_layer_step"] = json!(self.size("interleave_moe_layer_step")?);
        config["intermediate_size"] = json!(self.size("expert_feed_forward_length")?);
        let width = self.size_of_layers("feed_forward_length")?;
        config["intermediate_size_mlp"] =
            json!(width.ok_or_else(|| self.metadata.missing("llama4.feed_forward_length"))?);
        config["attention_chunk_size"] = json!(CHUNK);
        config["attn_temperature_tuning"] = json!(true);
        config["floor_scale"] = json!(self.number("attention.temperature_length")?.unwrap_or(8192.0));
        config["attn_scale"] = json!(self.number("attention.temperature_scale")?.unwrap_or(0.1));
        // As llama.cpp has it: of the models there are, the one with 128 experts norms neither queries nor keys.
        config["use_qk_norm"] = json!(experts != 128);
        Ok(config)
    }

    /// Rotary scaling. The converter writes it as one divisor per frequency, from which the few settings that are in
    /// use are recognised; divisors that none of them explains are refused.
    fn rope_scaling(&self, theta: f64, head_dim: u64) -> Result<Value> {
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        self.refuse("rope.scaling.type", kind != "none", &format!("`{kind}`"))?;
        if !self.stored.contains(ROPE_FACTORS) {
            return Ok(Value::Null);
        }
        let count = (head_dim / 2) as usize;
        let stored = self.stored.file(ROPE_FACTORS)?.load_f32(ROPE_FACTORS, &[count])?;
        let factor = f64::from(stored.iter().copied().fold(1.0, f32::max));
        if factor == 1.0 {
            return Ok(Value::Null);
        }
        for (low, high) in ROPE_BANDS {
            let explained = stored.iter().enumerate().all(|(index, &divisor)| {
                let wavelength = 2.0 * std::f64::consts::PI * theta.powf(2.0 * index as f64 / head_dim as f64);
                let expected = if wavelength < ROPE_CONTEXT / high {
                    1.0
                } else if wavelength > ROPE_CONTEXT / low {
                    factor
                } else {
                    let smooth = (ROPE_CONTEXT / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                };
                (f64::from(divisor) - expected).abs() <= ROPE_TOLERANCE * expected
            });
            if explained {
                return Ok(json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": ROPE_CONTEXT,
                }));
            }
        }
        let problem = "its divisors are none that Llama 3 or Llama 4 have".into();
        Err(self.stored.error(ROPE_FACTORS, problem, "use the Hugging Face checkpoint, whose config.json names them"))
    }

    fn rename(&mut self, from: &str, to: &str) {
        self.used.insert(from.into());
        if self.stored.contains(from) {
            self.mapped.insert(to.into(), Presented::Stored(from.into()));
        }
    }

    fn layer(&mut self, layer: u64) -> Result<()> {
        let (from, to) = (format!("blk.{layer}."), format!("model.layers.{layer}."));
        let block = if self.architecture == "llama" { "mlp" } else { "feed_forward" };
        let mut rename = |stored: &str, name: &str| {
            self.rename(&format!("{from}{stored}.weight"), &format!("{to}{name}.weight"));
        };
        rename("attn_norm", "input_layernorm");
        rename("ffn_norm", "post_attention_layernorm");
        rename("attn_v", "self_attn.v_proj");
        rename("attn_output", "self_attn.o_proj");
        for part in ["gate", "up", "down"] {
            rename(&format!("ffn_{part}"), &format!("{block}.{part}_proj"));
            rename(&format!("ffn_{part}_shexp"), &format!("feed_forward.shared_expert.{part}_proj"));
        }
        rename("ffn_gate_inp", "feed_forward.router");
        for (part, key) in [("q", "attention.head_count"), ("k", "attention.head_count_kv")] {
            let (from, to) = (format!("{from}attn_{part}.weight"), format!("{to}self_attn.{part}_proj.weight"));
            if self.architecture == "llama4" {
                self.rename(&from, &to);
                continue;
            }
            self.used.insert(from.clone());
            if self.stored.contains(&from) {
                let heads = self.size_of_layers(key)?.or(self.size_of_layers("attention.head_count")?).unwrap_or(1);
                let TensorInfo { dtype, shape } = self.stored.info(&from)?.clone();
                if heads == 0 || !shape.first().is_some_and(|&rows| (rows as u64).is_multiple_of(2 * heads)) {
                    return Err(wrong_shape(self.stored, &from, &shape, &format!("rows of {heads} heads")));
                }
                let piece = Piece::whole(self.stored, &from)?.arranged(Arrangement::PairsToHalves { heads });
                self.mapped.insert(to, Presented::Assembled(Assembly::matrix(dtype, shape, vec![piece])));
            }
        }
        if self.architecture == "llama4" {
            let experts = format!("{to}feed_forward.experts.");
            self.stack(
                &[&format!("{from}ffn_gate_exps.weight"), &format!("{from}ffn_up_exps.weight")],
                &experts,
                "gate_up",
            )?;
            self.stack(&[&format!("{from}ffn_down_exps.weight")], &experts, "down")?;
        }
        Ok(())
    }

    /// Stacks of output-major experts as one input-major stack, side by side.
    fn stack(&mut self, from: &[&str], prefix: &str, part: &str) -> Result<()> {
        self.used.extend(from.iter().map(|name| name.to_string()));
        // A layer without experts has none of them; one without some of them is found out by the missing name.
        if !from.iter().all(|name| self.stored.contains(name)) {
            return Ok(());
        }
        let TensorInfo { dtype, shape } = self.stored.info(from[0])?.clone();
        let &[experts, outputs, inputs] = shape.as_slice() else {
            return Err(wrong_shape(self.stored, from[0], &shape, "a stack of matrices"));
        };
        if let Some(other) = from.iter().find(|name| self.stored.info(name).is_ok_and(|info| info.shape != shape)) {
            let found = &self.stored.info(other)?.shape;
            return Err(wrong_shape(self.stored, other, found, &format!("{shape:?} as `{}` has", from[0])));
        }
        let mut slabs = Vec::with_capacity(experts);
        for expert in 0..experts as u64 {
            let rows = expert * outputs as u64..(expert + 1) * outputs as u64;
            let piece =
                |name: &&str| Ok(Piece::whole(self.stored, name)?.rows(rows.clone()).arranged(Arrangement::Transposed));
            let pieces = from.iter().map(piece).collect::<Result<_>>()?;
            slabs.push(Slab { pieces, joined: Joined::Columns });
        }
        let info = TensorInfo { dtype, shape: vec![experts, inputs, outputs * from.len()] };
        self.mapped.insert(format!("{prefix}{part}_proj"), Presented::Assembled(Assembly { info, slabs }));
        Ok(())
    }
}

fn wrong_shape(stored: &StoredTensors, name: &str, shape: &[usize], expected: &str) -> Error {
    stored.error(name, format!("has shape {shape:?}, expected {expected}"), AGAIN)
}
