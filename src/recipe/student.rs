//! The model a recipe's `[student]` describes.

use std::path::Path;

use serde_json::json;

use super::schema::{Recipe, Shape, ShapeName};
use crate::{
    checkpoint::read_configuration,
    error::Result,
    models::{DecoderConfig, config::Names, llama4::shapes, read_config, upcycling::mixture_of},
    tokenizer::Tokenizer,
};

impl Recipe {
    /// The student's configuration: of its checkpoint, or of its shape with the tokenizer's vocabulary and document
    /// tokens.
    pub fn student_config(&self, tokenizer: &Tokenizer) -> Result<DecoderConfig> {
        match (&self.student.checkpoint, &self.student.shape) {
            (Some(checkpoint), _) => {
                let (path, config) = read_configuration(checkpoint)?;
                read_config(&path, &config)
            }
            (None, Some(shape)) => shape.decoder(self, tokenizer, self.donor()?),
            (None, None) => unreachable!("a checked recipe has a shape or a checkpoint"),
        }
    }
}

impl Shape {
    fn decoder(
        &self,
        recipe: &Recipe,
        tokenizer: &Tokenizer,
        donor: Option<(DecoderConfig, Vec<usize>)>,
    ) -> Result<DecoderConfig> {
        let vocab = donor.as_ref().map_or(tokenizer.vocab_size(), |(donor, _)| donor.vocab_size);
        let vocab = self.vocab.unwrap_or(vocab);
        if self.like == ShapeName::Llama {
            return match donor {
                None => self.dense(recipe, tokenizer, vocab),
                Some((donor, layers)) => {
                    let mut json = donor.json;
                    json["num_hidden_layers"] = json!(layers.len());
                    read_config(recipe.path(), &json)
                }
            };
        }
        let named = match self.like {
            ShapeName::Scout => shapes::scout(),
            ShapeName::Maverick => shapes::maverick(),
            ShapeName::Behemoth => shapes::behemoth(),
            ShapeName::Tiny | ShapeName::Llama => shapes::tiny(),
        };
        let begins_with = match &donor {
            None => None,
            Some((donor, layers)) => {
                let experts = recipe.student.init.as_ref().and_then(|init| init.experts);
                let experts = experts.unwrap_or(named.num_local_experts);
                let mixture = mixture_of(donor, layers, experts, recipe.path())?;
                Some(mixture.map_err(|unfit| recipe.error("student.init.from", unfit.problem, unfit.tip))?)
            }
        };
        let is_llama4 = donor.as_ref().is_some_and(|(donor, _)| donor.names == Names::Llama4);
        let mut config = begins_with.unwrap_or(named);
        let put = |into: &mut usize, value: Option<usize>| *into = value.unwrap_or(*into);
        put(&mut config.num_hidden_layers, self.layers);
        put(&mut config.hidden_size, self.hidden);
        put(&mut config.num_attention_heads, self.heads);
        put(&mut config.num_key_value_heads, self.kv_heads);
        put(&mut config.head_dim, self.head_dim);
        put(&mut config.num_local_experts, recipe.student.init.as_ref().and_then(|init| init.experts));
        put(&mut config.num_local_experts, self.experts);
        put(&mut config.num_experts_per_tok, self.experts_per_token);
        put(&mut config.intermediate_size, self.expert_width);
        put(&mut config.intermediate_size_mlp, self.dense_width);
        put(&mut config.attention_chunk_size, self.chunk);
        put(&mut config.max_position_embeddings, self.max_position);
        let layers = config.num_hidden_layers;
        // A donor of the family says this for each of its layers.
        if !is_llama4 || self.moe_interval.is_some() {
            let moe_interval = self.moe_interval.unwrap_or(if self.like == ShapeName::Maverick { 2 } else { 1 });
            config.moe_layers = (moe_interval - 1..layers).step_by(moe_interval).collect();
        }
        // Another donor has positions in every layer.
        if donor.is_none() || self.nope_interval.is_some() {
            let nope_interval = self.nope_interval.unwrap_or(4);
            config.rotary_layers = (1..=layers).map(|layer| !layer.is_multiple_of(nope_interval)).collect();
        }
        config.use_qk_norm = self.qk_norm.unwrap_or(config.use_qk_norm);
        config.rope_theta = self.rope_theta.unwrap_or(config.rope_theta);
        config.rms_norm_eps = self.norm_eps.unwrap_or(config.rms_norm_eps);
        config.tie_word_embeddings = self.tie_embeddings.unwrap_or(config.tie_word_embeddings);
        config.initializer_range = recipe.student.init_std();
        config.router_aux_loss_coef = recipe.train.router_aux_weight;
        config.vocab_size = vocab;
        config.bos_token_id = tokenizer.document_start();
        config.eos_token_ids = tokenizer.document_end().into_iter().collect();
        config.decoder(recipe.path())
    }

    fn dense(&self, recipe: &Recipe, tokenizer: &Tokenizer, vocab: usize) -> Result<DecoderConfig> {
        let heads = self.heads.unwrap_or(8);
        let hidden = self.hidden.unwrap_or(512);
        let json = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "mlp_bias": false,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "intermediate_size": self.dense_width.unwrap_or(hidden * 8 / 3 / 32 * 32),
            "num_hidden_layers": self.layers.unwrap_or(8),
            "num_attention_heads": heads,
            "num_key_value_heads": self.kv_heads.unwrap_or(heads),
            "head_dim": self.head_dim.unwrap_or(hidden / heads),
            "max_position_embeddings": self.max_position.unwrap_or(8192),
            "rms_norm_eps": self.norm_eps.unwrap_or(1e-5),
            "rope_theta": self.rope_theta.unwrap_or(10_000.0),
            "rope_scaling": null,
            "initializer_range": recipe.student.init_std(),
            "tie_word_embeddings": self.tie_embeddings.unwrap_or(false),
            "vocab_size": vocab,
            "bos_token_id": tokenizer.document_start(),
            "eos_token_id": tokenizer.document_end(),
            "use_cache": true,
        });
        read_config(Path::new(recipe.path()), &json)
    }
}
