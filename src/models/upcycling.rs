//! A model that begins with layers of another: some layers of a dense one as a smaller dense one or as a mixture of experts,
//! some layers of a mixture as a smaller mixture. Knows weights and their names; what is trained is somebody else's business.
//!
//! Where the shapes allow it, the new model computes what the chosen layers compute. A dense feed-forward block becomes the
//! shared expert, which every token passes. The routed experts begin with the same gate and up projections (Komatsuzaki et
//! al. 2022, sparse upcycling, arXiv 2212.05055), and with a down projection of zero: they add nothing at first, and what they
//! learn depends on the tokens that come to each. Units of an expert that is wider than the block are drawn at random behind a
//! down projection of zero, too; of one that is narrower, the first units of the block are kept, and then it is no longer the
//! same function.

use std::ops::Range;

use super::{
    config::{AttentionTemperature, DecoderConfig, FeedForwardConfig, Names, QueryKeyNorm, Span},
    llama4::Llama4Config,
    parameter::{RandomWeights, WeightSource},
};
use crate::error::Result;

/// Why a model cannot begin with another, for whoever knows where both were named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    pub problem: String,
    pub tip: String,
}

impl Unfit {
    fn new(problem: impl Into<String>, tip: impl Into<String>) -> Unfit {
        Unfit { problem: problem.into(), tip: tip.into() }
    }
}

/// Which layer of a donor becomes which layer of a student.
#[derive(Debug, Clone)]
pub struct Upcycling {
    donor: DecoderConfig,
    /// For each layer of the student, the donor's.
    layers: Vec<usize>,
    student: DecoderConfig,
    fresh: RandomWeights,
}

/// `count` of `all` layers, the first and the last among them.
pub fn evenly_spaced(count: usize, all: usize) -> Vec<usize> {
    let gaps = count.max(2) - 1;
    (0..count).map(|place| (place * all.saturating_sub(1) + gaps / 2) / gaps).collect()
}

/// The mixture that chosen layers of a donor become when nothing else is said: the donor's sizes, full attention with
/// positions in every layer where the donor has that, one expert's width the donor's.
///
/// # Errors
/// For donors whose attention Llama 4 has no form of.
pub fn mixture_of(
    donor: &DecoderConfig,
    layers: &[usize],
    experts: usize,
    path: &std::path::Path,
) -> Result<Result<Llama4Config, Unfit>> {
    if donor.names == Names::Llama4 {
        let mut config = Llama4Config::from_json(path, &donor.json)?;
        let moe = |layer: &usize| matches!(donor.layers[*layer].feed_forward, FeedForwardConfig::Experts { .. });
        config.moe_layers = layers.iter().enumerate().filter(|(_, layer)| moe(layer)).map(|(place, _)| place).collect();
        config.rotary_layers = layers.iter().map(|&layer| donor.layers[layer].rotary).collect();
        config.num_hidden_layers = layers.len();
        return Ok(Ok(config));
    }
    let layer = &donor.layers[0];
    if layer.bias || layer.query_key_norm != QueryKeyNorm::None || layer.span != Span::Full {
        let problem = "has biases, norms or a window in its attention, which Llama 4 has no place for";
        return Ok(Err(Unfit::new(problem, "begin with a model of the families llama or llama4")));
    }
    let FeedForwardConfig::Dense { width } = layer.feed_forward else { unreachable!("the family is dense") };
    let tokens = |key: &str| donor.json.get(key).and_then(|id| id.as_u64()).map(|id| id as u32);
    Ok(Ok(Llama4Config {
        hidden_size: donor.hidden_size,
        num_hidden_layers: layers.len(),
        num_attention_heads: donor.heads.query_heads,
        num_key_value_heads: donor.heads.key_heads,
        head_dim: donor.heads.head_dim,
        intermediate_size: width,
        intermediate_size_mlp: width,
        num_local_experts: experts,
        num_experts_per_tok: 1,
        moe_layers: (0..layers.len()).collect(),
        rotary_layers: vec![true; layers.len()],
        // Chunks as long as the longest text are none.
        attention_chunk_size: donor.max_position,
        use_qk_norm: false,
        temperature: Some(AttentionTemperature { scale: 0.1, floor_scale: 8192.0 }),
        rope_theta: donor.rope.theta,
        rope_scaling: donor.rope.scaling.clone(),
        max_position_embeddings: donor.max_position,
        rms_norm_eps: donor.json.get("rms_norm_eps").and_then(|eps| eps.as_f64()).unwrap_or(donor.rms_norm_eps as f64),
        vocab_size: donor.vocab_size,
        tie_word_embeddings: donor.tied,
        initializer_range: donor.init_std,
        router_aux_loss_coef: 0.001,
        bos_token_id: tokens("bos_token_id"),
        eos_token_ids: donor.end_tokens.clone(),
    }))
}

impl Upcycling {
    /// # Errors
    /// When the sizes of the two models do not fit.
    pub fn new(
        donor: DecoderConfig,
        layers: Vec<usize>,
        student: DecoderConfig,
        fresh: RandomWeights,
    ) -> Result<Self, Unfit> {
        let sizes = |config: &DecoderConfig| {
            let heads = config.heads;
            [
                ("hidden", config.hidden_size),
                ("heads", heads.query_heads),
                ("kv_heads", heads.key_heads),
                ("head_dim", heads.head_dim),
                ("vocab", config.vocab_size),
            ]
        };
        for ((name, theirs), (_, mine)) in sizes(&donor).into_iter().zip(sizes(&student)) {
            if theirs != mine {
                let problem = format!("has `{name}` = {theirs}, and the student {mine}");
                return Err(Unfit::new(problem, format!("remove student.shape.{name}")));
            }
        }
        if donor.names == Names::Llama4 && student.names == Names::Llama {
            return Err(Unfit::new("has experts, and the student none", "use like = \"scout\" or \"maverick\""));
        }
        for (place, &layer) in layers.iter().enumerate() {
            let (theirs, mine) = (&donor.layers[layer], &student.layers[place]);
            if theirs.bias != mine.bias || theirs.query_key_norm != mine.query_key_norm {
                let problem =
                    format!("has another kind of attention in layer {layer} than the student in layer {place}");
                return Err(Unfit::new(problem, "remove student.shape.qk_norm and student.shape.nope_interval"));
            }
            use FeedForwardConfig::{Dense, Experts};
            let fits = match (&theirs.feed_forward, &mine.feed_forward) {
                (Dense { .. }, _) => true,
                (Experts { .. }, Dense { .. }) => false,
                (Experts { width, expert_count, .. }, Experts { width: mine, expert_count: count, .. }) => {
                    width == mine && expert_count >= count
                }
            };
            if !fits {
                let problem =
                    format!("has other experts in layer {layer} than the student can begin with in layer {place}");
                let tip = "use experts of the same width, at most as many, in the same layers";
                return Err(Unfit::new(problem, tip));
            }
        }
        Ok(Upcycling { donor, layers, student, fresh })
    }

    /// Whether the student computes what the chosen layers compute, before it is trained.
    pub fn keeps_the_function(&self) -> bool {
        use FeedForwardConfig::{Dense, Experts};
        self.layers.iter().zip(&self.student.layers).all(|(&layer, mine)| {
            let theirs = &self.donor.layers[layer];
            let same_attention = theirs.rotary == mine.rotary && theirs.temperature == mine.temperature
                || (theirs.rotary && mine.rotary);
            let covers = match (&theirs.feed_forward, &mine.feed_forward) {
                (Dense { width }, Dense { width: mine } | Experts { width: mine, .. }) => mine >= width,
                (Experts { expert_count, .. }, Experts { expert_count: mine, .. }) => expert_count == mine,
                (Experts { .. }, Dense { .. }) => false,
            };
            same_attention && covers
        })
    }

    /// The student's weights, out of the donor's.
    pub fn weights<'a>(&'a self, donor: &'a dyn WeightSource) -> UpcycledWeights<'a> {
        UpcycledWeights { map: self, donor }
    }
}

/// Weights of a student, made of a donor's while they are asked for.
pub struct UpcycledWeights<'a> {
    map: &'a Upcycling,
    donor: &'a dyn WeightSource,
}

impl WeightSource for UpcycledWeights<'_> {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let Some((place, part)) = layer_and_part(name) else {
            let tied = name == "lm_head.weight" && self.map.donor.tied;
            return self.donor.load(if tied { "model.embed_tokens.weight" } else { name }, shape);
        };
        let prefix = format!("model.layers.{}.", self.map.layers[place]);
        let own = |part: &str, shape: &[usize]| self.donor.load(&format!("{prefix}{part}"), shape);
        if let Some(part) = part.strip_prefix("feed_forward.").or(part.strip_prefix("mlp.")) {
            return self.feed_forward(name, part, place, shape);
        }
        let values = own(part, shape)?;
        let is_turned = part == "self_attn.q_proj.weight" || part == "self_attn.k_proj.weight";
        if is_turned && self.map.donor.rope.pairing != self.map.student.rope.pairing {
            return Ok(interleaved(&values, self.map.donor.heads.head_dim, shape[1]));
        }
        Ok(values)
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        let width: usize = shape[1..].iter().product();
        let mut values = self.load(name, shape)?;
        values.truncate(rows.end * width);
        Ok(values.split_off(rows.start * width))
    }
}

impl UpcycledWeights<'_> {
    /// A weight of a feed-forward block; `name` is the student's, `part` what it is called in the block.
    fn feed_forward(&self, name: &str, part: &str, place: usize, shape: &[usize]) -> Result<Vec<f32>> {
        let map = self.map;
        let (layer, hidden) = (map.layers[place], map.donor.hidden_size);
        let block = match map.donor.names {
            Names::Llama4 => format!("model.layers.{layer}.feed_forward."),
            Names::Llama => format!("model.layers.{layer}.mlp."),
        };
        let theirs = match map.donor.layers[layer].feed_forward {
            FeedForwardConfig::Experts { expert_count, .. } => {
                return self.experts(&block, part, expert_count, shape);
            }
            FeedForwardConfig::Dense { width } => width,
        };
        let load = |matrix: &str| {
            let shape = if matrix == "down" { [hidden, theirs] } else { [theirs, hidden] };
            self.donor.load(&format!("{block}{matrix}_proj.weight"), &shape)
        };
        match part.strip_prefix("shared_expert.").unwrap_or(part) {
            "router.weight" => map.fresh.load(name, shape),
            "experts.down_proj" => Ok(vec![0.0; shape.iter().product()]),
            "experts.gate_up_proj" => {
                let [_, _, both] = *shape else { unreachable!("a stack has three axes") };
                let (mine, kept) = (both / 2, theirs.min(both / 2));
                let (gate, up) = (load("gate")?, load("up")?);
                let mut values = map.fresh.load(name, shape)?;
                for expert in values.chunks_mut(hidden * both) {
                    for (input, row) in expert.chunks_mut(both).enumerate() {
                        for unit in 0..kept {
                            row[unit] = gate[unit * hidden + input];
                            row[mine + unit] = up[unit * hidden + input];
                        }
                    }
                }
                Ok(values)
            }
            "down_proj.weight" => {
                let (down, mine) = (load("down")?, shape[1]);
                let kept = theirs.min(mine);
                let mut values = vec![0.0; hidden * mine];
                for (row, own) in values.chunks_mut(mine).zip(down.chunks(theirs)) {
                    row[..kept].copy_from_slice(&own[..kept]);
                }
                Ok(values)
            }
            matrix => {
                let matrix = matrix.strip_suffix("_proj.weight").expect("gate or up");
                let own = load(matrix)?;
                let mut values =
                    if shape[0] > theirs { map.fresh.load(name, shape)? } else { vec![0.0; shape[0] * hidden] };
                let kept = values.len().min(own.len());
                values[..kept].copy_from_slice(&own[..kept]);
                Ok(values)
            }
        }
    }

    /// A weight of a block with experts out of one with as many or more; of more, evenly spaced ones.
    fn experts(&self, block: &str, part: &str, theirs: usize, shape: &[usize]) -> Result<Vec<f32>> {
        let name = format!("{block}{part}");
        if part.starts_with("shared_expert.") {
            return self.donor.load(&name, shape);
        }
        let mut whole = shape.to_vec();
        whole[0] = theirs;
        let mut values = Vec::with_capacity(shape.iter().product());
        for expert in evenly_spaced(shape[0], theirs) {
            values.extend(self.donor.load_rows(&name, &whole, expert..expert + 1)?);
        }
        Ok(values)
    }
}

/// `model.layers.3.mlp.up_proj.weight` as 3 and `mlp.up_proj.weight`.
fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (number, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    Some((number.parse().ok()?, part))
}

/// Rows of a query or key projection whose rotation pairs the halves of a head, in the order in which neighbours are pairs.
fn interleaved(values: &[f32], head_dim: usize, inputs: usize) -> Vec<f32> {
    let mut turned = Vec::with_capacity(values.len());
    for head in values.chunks(head_dim * inputs) {
        for pair in 0..head_dim / 2 {
            for row in [pair, pair + head_dim / 2] {
                turned.extend_from_slice(&head[row * inputs..(row + 1) * inputs]);
            }
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_spread_from_the_first_to_the_last() {
        assert_eq!(evenly_spaced(4, 30), [0, 10, 19, 29]);
        assert_eq!(evenly_spaced(3, 3), [0, 1, 2]);
        assert_eq!(evenly_spaced(1, 12), [0]);
        assert_eq!(evenly_spaced(2, 16), [0, 15]);
    }
}
