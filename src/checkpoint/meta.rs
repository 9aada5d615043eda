//! Checkpoints with Meta's own names, `layers.0.attention.wq.weight`, under those of Hugging Face.
//!
//! For Llama 2 and 3, whose query and key rows are stored for the interleaved rotary embedding and are put in the order
//! of the one that turns halves; and for Llama 4, which is interleaved in both forms, and whose matrices are split,
//! stacked and transposed. One safetensors file or an index: pickled weights, and weights that are cut for several
//! devices, are refused where they are opened. Images are not read.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};

use super::assembly::{Arrangement, Assembly, Joined, Piece, Presented, Slab, StoredTensors, check_readable};
use super::dtype::TensorInfo;
use crate::error::{Error, Result};

/// The longest text that the base models of Llama 4 were trained on; no key of `params.json` says it.
const LLAMA4_POSITIONS: u64 = 262_144;
/// Likewise of Llama 3.1 and its successors, which are the ones with scaled rotary embedding.
const LLAMA31_POSITIONS: u64 = 131_072;
/// Likewise of Llama 3, which is told from Llama 2 by its `rope_theta`.
const LLAMA3_POSITIONS: u64 = 8192;
const LLAMA2_POSITIONS: u64 = 4096;
/// What the scaled rotary embedding scales from.
const ORIGINAL_POSITIONS: u64 = 8192;

/// Ends of the names of stored tensors that are no weights: precomputed angles and statistics.
const NO_WEIGHTS: [&str; 5] = ["rope.freqs", "freq_cis", "_extra_state", "gate_stats_3E", "expert_activation_DE"];
const VISION: [&str; 2] = ["vision_embeddings.", "vision_projection."];

/// Whether tensors have these names and not those of Hugging Face.
pub(super) fn has_these_names(stored: &StoredTensors) -> bool {
    stored.contains("tok_embeddings.weight")
}

/// Keys of `params.json`.
struct Params<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Params<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|value| !value.is_null())
    }

    fn error(&self, key: &str, problem: String) -> Error {
        let tip = "correct it by the model's own params.json".into();
        Error::Config { path: self.path.to_path_buf(), key: key.into(), problem, tip }
    }

    fn optional_size(&self, key: &str) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().filter(|&size| size > 0) {
            Some(size) => Ok(Some(size)),
            None => Err(self.error(key, format!("is {value}, not a positive whole number"))),
        }
    }

    fn size(&self, key: &str) -> Result<u64> {
        self.optional_size(key)?.ok_or_else(|| self.error(key, "is missing".into()))
    }

    fn number(&self, key: &str, default: f64) -> Result<f64> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().ok_or_else(|| self.error(key, format!("is {value}, not a number")))
    }

    fn flag(&self, key: &str) -> Result<bool> {
        let Some(value) = self.get(key) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.error(key, format!("is {value}, not true or false")))
    }
}

/// The configuration in Hugging Face's words. Widths are those of the tensors.
pub(super) fn config(path: &Path, json: &Value, stored: &StoredTensors) -> Result<Value> {
    let params = Params { path, json };
    let (hidden, heads) = (params.size("dim")?, params.size("n_heads")?);
    let llama4 = params.get("moe_args").is_some();
    let theta = params.number("rope_theta", 10_000.0)?;
    let scaled = params.flag("use_scaled_rope")?;
    let known = match (llama4, scaled) {
        (true, _) => LLAMA4_POSITIONS,
        (false, true) => LLAMA31_POSITIONS,
        (false, false) if theta > 10_000.0 => LLAMA3_POSITIONS,
        (false, false) => LLAMA2_POSITIONS,
    };
    let positions = params.optional_size("max_seq_len")?.unwrap_or(known);
    let (factor, high) = if llama4 { (16.0, 1.0) } else { (8.0, 4.0) };
    let scaling = match scaled {
        false => Value::Null,
        true => json!({
            "rope_type": "llama3",
            "factor": params.number("rope_scaling_factor", factor)?,
            "low_freq_factor": 1.0,
            "high_freq_factor": params.number("rope_high_freq_factor", high)?,
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        }),
    };
    let size = |name: &str, axis: usize| Ok(stored.info(name)?.shape.get(axis).copied().unwrap_or(0) as u64);
    let mut config = json!({
        "attention_bias": false,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "num_hidden_layers": params.size("n_layers")?,
        "num_attention_heads": heads,
        "num_key_value_heads": params.optional_size("n_kv_heads")?.unwrap_or(heads),
        "head_dim": params.optional_size("head_dim")?.unwrap_or(hidden / heads),
        "max_position_embeddings": positions,
        "rms_norm_eps": params.number("norm_eps", 1e-5)?,
        "rope_theta": theta,
        "rope_scaling": scaling,
        // The file's own number can be -1, or smaller than the table.
        "vocab_size": size("tok_embeddings.weight", 0)?,
        "tie_word_embeddings": !stored.contains("output.weight"),
    });
    if !llama4 {
        config["model_type"] = json!("llama");
        config["architectures"] = json!(["LlamaForCausalLM"]);
        config["mlp_bias"] = json!(false);
        config["intermediate_size"] = json!(size("layers.0.feed_forward.w1.weight", 0)?);
        return Ok(config);
    }
    let layers = params.size("n_layers")?;
    let moe = Params { path, json: &json["moe_args"] };
    let interval = moe.optional_size("interleave_moe_layer_step")?.unwrap_or(1);
    let with_experts = |layer: &u64| (layer + 1).is_multiple_of(interval);
    config["model_type"] = json!("llama4_text");
    config["architectures"] = json!(["Llama4ForCausalLM"]);
    config["num_local_experts"] = json!(moe.size("num_experts")?);
    config["num_experts_per_tok"] = json!(moe.optional_size("top_k")?.unwrap_or(1));
    config["moe_layers"] = (0..layers).filter(with_experts).collect();
    // With no layer of a kind, its width is used nowhere, and any will do.
    let expert_width = match (0..layers).find(with_experts) {
        Some(layer) => size(&format!("layers.{layer}.feed_forward.experts.moe_w_in_eD_F"), 1)?,
        None => hidden,
    };
    config["intermediate_size"] = json!(expert_width);
    config["intermediate_size_mlp"] = json!(match (0..layers).find(|layer| !with_experts(layer)) {
        Some(layer) => size(&format!("layers.{layer}.feed_forward.mlp.fc2_weight"), 1)?,
        None => 2 * expert_width,
    });
    let turned = match params.optional_size("nope_layer_interval")? {
        Some(interval) => (0..layers).map(|layer| u8::from(!(layer + 1).is_multiple_of(interval))).collect(),
        None => vec![1; layers as usize],
    };
    config["no_rope_layers"] = json!(turned);
    config["attention_chunk_size"] = json!(params.optional_size("attention_chunk_size")?.unwrap_or(positions));
    config["use_qk_norm"] = json!(params.flag("use_qk_norm")?);
    config["attn_temperature_tuning"] = json!(params.flag("attn_temperature_tuning")?);
    config["floor_scale"] = json!(params.number("floor_scale", 8192.0)?);
    config["attn_scale"] = json!(params.number("attn_scale", 0.1)?);
    Ok(config)
}

/// The stored tensors under Hugging Face's names, by a configuration in its words.
pub(super) fn present(path: &Path, config: &Value, stored: &StoredTensors) -> Result<BTreeMap<String, Presented>> {
    let config = config.get("text_config").unwrap_or(config);
    let keys = Params { path, json: config };
    let (heads, key_heads) = (keys.size("num_attention_heads")?, keys.size("num_key_value_heads")?);
    let head_dim = match keys.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None => keys.size("hidden_size")? / heads,
    };
    let mut model = MetaModel { stored, heads, key_heads, head_dim, mapped: BTreeMap::new() };
    for name in stored.file_of.keys() {
        model.present(name)?;
    }
    Ok(model.mapped)
}

struct MetaModel<'a> {
    stored: &'a StoredTensors,
    heads: u64,
    key_heads: u64,
    head_dim: u64,
    mapped: BTreeMap<String, Presented>,
}

impl MetaModel<'_> {
    fn present(&mut self, name: &str) -> Result<()> {
        if NO_WEIGHTS.iter().any(|end| name.ends_with(end)) || VISION.iter().any(|start| name.starts_with(start)) {
            return Ok(());
        }
        check_readable(self.stored, name)?;
        let whole = match name {
            "tok_embeddings.weight" => Some("model.embed_tokens.weight"),
            "norm.weight" => Some("model.norm.weight"),
            "output.weight" => Some("lm_head.weight"),
            _ => None,
        };
        if let Some(to) = whole {
            self.mapped.insert(to.into(), Presented::Stored(name.into()));
            return Ok(());
        }
        let unknown = || {
            let tip = "use a checkpoint of Llama 2, 3 or 4, or the Hugging Face form of this one";
            self.stored.error(name, "is not a tensor that Meta's Llama models have".into(), tip)
        };
        let (layer, part) = name.strip_prefix("layers.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
        let to = format!("model.layers.{layer}.");
        let renamed = match part {
            "attention_norm.weight" | "attention.wqkv.layer_norm_weight" => "input_layernorm.weight",
            "ffn_norm.weight" | "feed_forward.norm.weight" | "feed_forward.mlp.layer_norm_weight" => {
                "post_attention_layernorm.weight"
            }
            "attention.wv.weight" => "self_attn.v_proj.weight",
            "attention.wo.weight" => "self_attn.o_proj.weight",
            "feed_forward.w1.weight" => "mlp.gate_proj.weight",
            "feed_forward.w3.weight" => "mlp.up_proj.weight",
            "feed_forward.w2.weight" => "mlp.down_proj.weight",
            "feed_forward.w_in_shared_FD.weight" => "feed_forward.shared_expert.gate_proj.weight",
            "feed_forward.w_swiglu_FD.weight" => "feed_forward.shared_expert.up_proj.weight",
            "feed_forward.w_out_shared_DF.weight" => "feed_forward.shared_expert.down_proj.weight",
            "feed_forward.mlp.fc2_weight" => "feed_forward.down_proj.weight",
            "attention.wq.weight" => return self.halves(name, &to, "q", self.heads),
            "attention.wk.weight" => return self.halves(name, &to, "k", self.key_heads),
            "attention.wqkv.weight" => return self.split_attention(name, &to),
            "feed_forward.mlp.fc1_weight" => return self.split_dense(name, &to),
            "feed_forward.router_DE" => return self.router(name, &to),
            "feed_forward.experts.moe_w_in_eD_F" => return self.experts(&to, layer, &["in", "swiglu"], "gate_up_proj"),
            // Side by side with the one before it.
            "feed_forward.experts.moe_w_swiglu_eD_F" => return Ok(()),
            "feed_forward.experts.moe_w_out_eF_D" => return self.experts(&to, layer, &["out"], "down_proj"),
            _ => return Err(unknown()),
        };
        self.mapped.insert(format!("{to}{renamed}"), Presented::Stored(name.into()));
        Ok(())
    }

    fn wrong_rows(&self, name: &str, expected: &str) -> Error {
        let found = self.stored.info(name).map(|info| info.shape.clone()).unwrap_or_default();
        let problem = format!("has shape {found:?}, expected {expected}");
        self.stored.error(name, problem, "check that params.json belongs to these weights")
    }

    fn insert(&mut self, name: String, rows: u64, piece: Piece) -> Result<()> {
        let dtype = self.stored.info(&piece.tensor)?.dtype;
        let shape = vec![rows as usize, piece.columns as usize];
        self.mapped.insert(name, Presented::Assembled(Assembly::matrix(dtype, shape, vec![piece])));
        Ok(())
    }

    fn halves(&mut self, name: &str, to: &str, part: &str, heads: u64) -> Result<()> {
        let piece = Piece::whole(self.stored, name)?;
        let rows = heads * self.head_dim;
        if piece.rows.end != rows || !self.head_dim.is_multiple_of(2) {
            return Err(self.wrong_rows(name, &format!("{rows} rows")));
        }
        self.insert(
            format!("{to}self_attn.{part}_proj.weight"),
            rows,
            piece.arranged(Arrangement::PairsToHalves { heads }),
        )
    }

    fn split_attention(&mut self, name: &str, to: &str) -> Result<()> {
        let piece = Piece::whole(self.stored, name)?;
        let (query, key) = (self.heads * self.head_dim, self.key_heads * self.head_dim);
        if piece.rows.end != query + 2 * key {
            return Err(self.wrong_rows(name, &format!("{} rows", query + 2 * key)));
        }
        let mut first = 0;
        for (part, rows) in [("q", query), ("k", key), ("v", key)] {
            self.insert(format!("{to}self_attn.{part}_proj.weight"), rows, piece.clone().rows(first..first + rows))?;
            first += rows;
        }
        Ok(())
    }

    fn split_dense(&mut self, name: &str, to: &str) -> Result<()> {
        let piece = Piece::whole(self.stored, name)?;
        let rows = piece.rows.end / 2;
        if piece.rows.end % 2 != 0 {
            return Err(self.wrong_rows(name, "an even number of rows"));
        }
        self.insert(format!("{to}feed_forward.gate_proj.weight"), rows, piece.clone().rows(0..rows))?;
        self.insert(format!("{to}feed_forward.up_proj.weight"), rows, piece.rows(rows..2 * rows))
    }

    fn router(&mut self, name: &str, to: &str) -> Result<()> {
        let piece = Piece::whole(self.stored, name)?;
        let dtype = self.stored.info(name)?.dtype;
        let shape = vec![piece.columns as usize, piece.rows.end as usize];
        let piece = piece.arranged(Arrangement::Transposed);
        let name = format!("{to}feed_forward.router.weight");
        self.mapped.insert(name, Presented::Assembled(Assembly::matrix(dtype, shape, vec![piece])));
        Ok(())
    }

    /// Matrices `[experts * rows, columns]`, side by side, as a stack; input-major in both forms.
    fn experts(&mut self, to: &str, layer: &str, parts: &[&str], name: &str) -> Result<()> {
        let order = if parts.len() == 2 { "eD_F" } else { "eF_D" };
        let stored_name = |part: &str| format!("layers.{layer}.feed_forward.experts.moe_w_{part}_{order}");
        let pieces: Vec<Piece> =
            parts.iter().map(|part| Piece::whole(self.stored, &stored_name(part))).collect::<Result<_>>()?;
        // The router has one column per expert.
        let router = self.stored.info(&format!("layers.{layer}.feed_forward.router_DE"))?;
        let experts = router.shape.last().copied().unwrap_or(0) as u64;
        let (rows, columns) = (pieces[0].rows.end, pieces[0].columns);
        for piece in &pieces {
            check_readable(self.stored, &piece.tensor)?;
            if (piece.rows.end, piece.columns) != (rows, columns) || experts == 0 || !rows.is_multiple_of(experts) {
                return Err(self.wrong_rows(&piece.tensor, &format!("[{experts} x rows, {columns}]")));
            }
        }
        let each = rows / experts;
        let slab = |expert: u64| {
            let rows = expert * each..(expert + 1) * each;
            Slab {
                pieces: pieces.iter().map(|piece| piece.clone().rows(rows.clone())).collect(),
                joined: Joined::Columns,
            }
        };
        let info = TensorInfo {
            dtype: self.stored.info(&pieces[0].tensor)?.dtype,
            shape: vec![experts as usize, each as usize, columns as usize * pieces.len()],
        };
        let assembly = Assembly { info, slabs: (0..experts).map(slab).collect() };
        self.mapped.insert(format!("{to}feed_forward.experts.{name}"), Presented::Assembled(assembly));
        Ok(())
    }
}
