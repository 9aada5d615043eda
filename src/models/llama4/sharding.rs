//! Where a model's weights lie on a mesh of devices: which axis of the mesh cuts which axis of which tensor. Declares,
//! and does the arithmetic; the one place among the models where a mesh appears.
//!
//! The dense models of [`llama`](crate::models::llama) have names of the same endings, and are cut by the same table.

use std::ops::Range;

use limbeck_kernels::{attention::Heads, selection_shard::BLOCK};

use crate::{
    models::config::{DecoderConfig, FeedForwardConfig},
    parallel::{Axis, Mesh, Place, share},
};

/// One axis of a tensor, cut along one axis of the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub mesh: Axis,
    pub tensor: usize,
    pub unit: Unit,
}

/// What an axis of a tensor counts, and so where it may be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Query heads, `head_dim` numbers each; a whole number of heads for each rank.
    QueryHeads,
    /// The key heads that a rank's query heads look at; several ranks have the same one where there are fewer of them
    /// than ranks.
    KeyHeads,
    /// The inner width of a feed-forward block.
    Width,
    /// The gate's inner width and then the projection's: each half is cut as [`Unit::Width`] is.
    GateAndUp,
    /// Token ids, in whole blocks that add up together.
    Vocabulary,
    /// Routed experts.
    Experts,
}

const fn tensor(axis: usize, unit: Unit) -> Cut {
    Cut { mesh: Axis::Tensor, tensor: axis, unit }
}

/// Every weight that is cut, by the end of its name. Outputs of the first product of a half are cut, and the inputs of
/// its second, so that each rank has a summand of what the half adds. All others (norms, routers) are on every rank.
/// Besides, `pipeline` cuts between layers, and `data` cuts no weight.
const CUTS: [(&str, &[Cut]); 13] = [
    ("embed_tokens.weight", &[tensor(0, Unit::Vocabulary)]),
    ("lm_head.weight", &[tensor(0, Unit::Vocabulary)]),
    ("q_proj.weight", &[tensor(0, Unit::QueryHeads)]),
    ("q_proj.bias", &[tensor(0, Unit::QueryHeads)]),
    ("k_proj.weight", &[tensor(0, Unit::KeyHeads)]),
    ("k_proj.bias", &[tensor(0, Unit::KeyHeads)]),
    ("v_proj.weight", &[tensor(0, Unit::KeyHeads)]),
    ("v_proj.bias", &[tensor(0, Unit::KeyHeads)]),
    ("o_proj.weight", &[tensor(1, Unit::QueryHeads)]),
    // Of dense blocks and shared experts.
    ("up_proj.weight", &[tensor(0, Unit::Width)]),
    ("gate_proj.weight", &[tensor(0, Unit::Width)]),
    ("down_proj.weight", &[tensor(1, Unit::Width)]),
    ("router.weight", &[]),
];

/// The stacks of routed experts, `[experts, inputs, outputs]`.
const EXPERT_CUTS: [(&str, &[Cut]); 2] = [
    ("experts.gate_up_proj", &[Cut { mesh: Axis::Expert, tensor: 0, unit: Unit::Experts }, tensor(2, Unit::GateAndUp)]),
    ("experts.down_proj", &[Cut { mesh: Axis::Expert, tensor: 0, unit: Unit::Experts }, tensor(1, Unit::Width)]),
];

/// How the weight of this name is cut.
pub fn cuts(name: &str) -> &'static [Cut] {
    let all = CUTS.iter().chain(&EXPERT_CUTS);
    all.into_iter().find(|(end, _)| name.ends_with(end)).map_or(&[], |(_, cuts)| cuts)
}

/// Why a model does not fit a mesh: the axis at fault, what is wrong with its size, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    pub axis: &'static str,
    pub problem: String,
    pub tip: String,
}

/// Whether a model can be laid out on a mesh.
///
/// # Errors
/// The axis that asks for more parts than there are, or for parts that are not whole.
pub fn check(config: &DecoderConfig, mesh: &Mesh) -> Result<(), Unfit> {
    let unfit = |axis, problem, tip| Err(Unfit { axis, problem, tip });
    let heads = config.heads.query_heads;
    if !heads.is_multiple_of(mesh.tensor) {
        let problem = format!("is {}, which does not divide the teacher's {heads} attention heads", mesh.tensor);
        return unfit("tensor", problem, format!("use a divisor of {heads}"));
    }
    let widths = config.layers.iter().map(|layer| match layer.feed_forward {
        FeedForwardConfig::Dense { width } | FeedForwardConfig::Experts { width, .. } => width,
    });
    let narrowest = widths.min().unwrap_or(0).min(config.vocab_size);
    if mesh.tensor > narrowest {
        let problem = format!("is {}, and a matrix of the teacher has {narrowest} outputs", mesh.tensor);
        return unfit("tensor", problem, format!("use at most {narrowest}"));
    }
    let experts: Vec<usize> = config.expert_layers().into_iter().map(|(_, count)| count).collect();
    if mesh.expert > 1 && experts.is_empty() {
        let problem = format!("is {}, and the teacher has no experts", mesh.expert);
        return unfit("expert", problem, "divide its sequences with `data`, or its matrices with `tensor`".into());
    }
    if let Some(count) = experts.iter().find(|count| !count.is_multiple_of(mesh.expert)) {
        let problem = format!("is {}, which does not divide the teacher's {count} experts", mesh.expert);
        return unfit("expert", problem, format!("use a divisor of {count}"));
    }
    let layers = config.layers.len();
    if mesh.pipeline > layers {
        let problem = format!("is {}, and the teacher has {layers} layers", mesh.pipeline);
        return unfit("pipeline", problem, format!("use at most {layers}"));
    }
    Ok(())
}

/// The layers of a pipeline stage.
pub fn layers(config: &DecoderConfig, mesh: &Mesh, place: Place) -> Range<usize> {
    share(config.layers.len(), mesh.pipeline, place.pipeline)
}

/// The experts that a rank has of a layer with `count` of them.
pub fn experts(count: usize, mesh: &Mesh, place: Place) -> Range<usize> {
    share(count, mesh.expert, place.expert)
}

/// The token ids whose rows of embedding and head a rank has.
pub fn vocabulary(config: &DecoderConfig, mesh: &Mesh, place: Place) -> Range<usize> {
    let vocab = config.vocab_size;
    let block = if vocab >= BLOCK * mesh.tensor { BLOCK } else { 1 };
    let blocks = share(vocab.div_ceil(block), mesh.tensor, place.tensor);
    blocks.start * block..(blocks.end * block).min(vocab)
}

/// The query heads of a rank.
fn query_heads(heads: Heads, mesh: &Mesh, place: Place) -> Range<usize> {
    share(heads.query_heads, mesh.tensor, place.tensor)
}

/// The key heads of a rank, each for the same number of its query heads one after the other.
fn key_heads(heads: Heads, mesh: &Mesh, place: Place) -> Vec<usize> {
    let group = heads.query_heads / heads.key_heads;
    let wanted: Vec<usize> = query_heads(heads, mesh, place).map(|query| query / group).collect();
    // A rank's queries may begin and end within a group; then a key head is there for each part that divides all.
    let together = wanted.chunk_by(|a, b| a == b).fold(0, |divisor, run| greatest_common_divisor(divisor, run.len()));
    wanted.into_iter().step_by(together.max(1)).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// The length of an axis that counts these units, and what a rank has of it, in the order in which it has it. `layer` is
/// the one that the tensor belongs to.
pub fn ranges(
    unit: Unit,
    config: &DecoderConfig,
    layer: Option<usize>,
    mesh: &Mesh,
    place: Place,
) -> (usize, Vec<Range<usize>>) {
    let heads = config.heads;
    let scaled = |range: Range<usize>| range.start * heads.head_dim..range.end * heads.head_dim;
    let feed_forward = layer.and_then(|layer| config.layers.get(layer)).map(|layer| &layer.feed_forward);
    let (width, expert_count) = match feed_forward {
        Some(&FeedForwardConfig::Dense { width }) => (width, 0),
        Some(&FeedForwardConfig::Experts { width, expert_count, .. }) => (width, expert_count),
        None => (0, 0),
    };
    let own = share(width, mesh.tensor, place.tensor);
    match unit {
        Unit::QueryHeads => (heads.query_heads * heads.head_dim, vec![scaled(query_heads(heads, mesh, place))]),
        Unit::KeyHeads => {
            let own = key_heads(heads, mesh, place).into_iter().map(|head| scaled(head..head + 1));
            (heads.key_heads * heads.head_dim, own.collect())
        }
        Unit::Width => (width, vec![own]),
        Unit::GateAndUp => (2 * width, vec![own.clone(), width + own.start..width + own.end]),
        Unit::Vocabulary => (config.vocab_size, vec![vocabulary(config, mesh, place)]),
        Unit::Experts => (expert_count, vec![experts(expert_count, mesh, place)]),
    }
}

/// The model as one rank computes it: fewer heads, narrower blocks. The layers, experts and ids keep their numbers.
pub fn own_config(config: &DecoderConfig, mesh: &Mesh, place: Place) -> DecoderConfig {
    let mut own = config.clone();
    own.heads.query_heads = query_heads(config.heads, mesh, place).len();
    own.heads.key_heads = key_heads(config.heads, mesh, place).len();
    for layer in &mut own.layers {
        match &mut layer.feed_forward {
            FeedForwardConfig::Dense { width } | FeedForwardConfig::Experts { width, .. } => {
                *width = share(*width, mesh.tensor, place.tensor).len();
            }
        }
    }
    own
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::shapes;
    use super::*;

    fn heads(query_heads: usize, key_heads: usize) -> Heads {
        Heads { query_heads, key_heads, head_dim: 4 }
    }

    #[test]
    fn every_query_head_finds_its_own_key_head() {
        for (query, key, tensor) in [
            (12, 12, 4),
            (12, 6, 4),
            (12, 6, 3),
            (12, 2, 3),
            (12, 2, 4),
            (12, 1, 4),
            (40, 8, 8),
            (40, 8, 5),
            (40, 8, 20),
        ] {
            let mesh = Mesh { tensor, ..Mesh::default() };
            let mut seen = vec![];
            for rank in 0..tensor {
                let (all, place) = (heads(query, key), mesh.place(rank));
                let (own, keys) = (query_heads(all, &mesh, place), key_heads(all, &mesh, place));
                assert!(own.len().is_multiple_of(keys.len()), "{query} {key} {tensor}: {keys:?}");
                for (number, head) in own.clone().enumerate() {
                    assert_eq!(keys[number / (own.len() / keys.len())], head / (query / key));
                }
                seen.extend(own);
            }
            assert!(seen.into_iter().eq(0..query));
        }
        let mesh = Mesh { tensor: 3, ..Mesh::default() };
        assert_eq!(key_heads(heads(12, 2), &mesh, mesh.place(1)), [0, 1], "an even part of two groups");
        assert_eq!(
            key_heads(heads(12, 4), &Mesh { tensor: 6, ..mesh }, Place { tensor: 1, ..Place::default() }),
            [0, 1]
        );
        assert_eq!(key_heads(heads(40, 8), &Mesh { tensor: 8, ..mesh }, Place { tensor: 5, ..Place::default() }), [5]);
    }

    #[test]
    fn a_scout_is_cut_to_its_last_number_and_nothing_twice() {
        let config = shapes::scout().decoder(Path::new("scout")).unwrap();
        let mesh = Mesh { expert: 4, tensor: 8, pipeline: 3, data: 2 };
        check(&config, &mesh).unwrap();
        for unit in [Unit::QueryHeads, Unit::KeyHeads, Unit::Width, Unit::GateAndUp, Unit::Vocabulary] {
            let mut covered = vec![];
            let mut whole = 0;
            for tensor in 0..8 {
                let (length, own) = ranges(unit, &config, Some(0), &mesh, Place { tensor, ..Place::default() });
                whole = length;
                covered.extend(own.into_iter().flatten());
            }
            covered.sort_unstable();
            assert!(covered.into_iter().eq(0..whole), "{unit:?}");
        }
        let place = Place { tensor: 3, ..Place::default() };
        let ids = vocabulary(&config, &mesh, place);
        assert!(ids.start.is_multiple_of(BLOCK) && ids.end.is_multiple_of(BLOCK), "{ids:?}");
        let own = own_config(&config, &mesh, place);
        assert_eq!((own.heads.query_heads, own.heads.key_heads, own.heads.head_dim), (5, 1, 128));
        let FeedForwardConfig::Experts { width, expert_count, chosen } = own.layers[0].feed_forward else { panic!() };
        assert_eq!((width, expert_count, chosen), (1024, 16, 1));
        assert_eq!(experts(16, &mesh, Place { expert: 2, ..place }), 8..12);
        assert_eq!(layers(&config, &mesh, Place { pipeline: 1, ..place }), 16..32);
    }

    #[test]
    fn names_find_their_cuts() {
        let units = |name: &str| cuts(name).iter().map(|cut| (cut.mesh, cut.tensor, cut.unit)).collect::<Vec<_>>();
        let layer = "model.layers.3.";
        assert_eq!(units(&format!("{layer}self_attn.o_proj.weight")), [(Axis::Tensor, 1, Unit::QueryHeads)]);
        assert_eq!(units(&format!("{layer}mlp.down_proj.weight")), [(Axis::Tensor, 1, Unit::Width)]);
        assert_eq!(
            units(&format!("{layer}feed_forward.experts.down_proj")),
            [(Axis::Expert, 0, Unit::Experts), (Axis::Tensor, 1, Unit::Width)]
        );
        assert_eq!(
            units(&format!("{layer}feed_forward.shared_expert.gate_proj.weight")),
            [(Axis::Tensor, 0, Unit::Width)]
        );
        for whole in ["input_layernorm.weight", "self_attn.q_norm.weight", "feed_forward.router.weight"] {
            assert!(cuts(&format!("{layer}{whole}")).is_empty());
        }
    }

    #[test]
    fn what_does_not_divide_is_refused_by_its_axis() {
        let scout = shapes::scout().decoder(Path::new("scout")).unwrap();
        let message = |mesh: Mesh| {
            let unfit = check(&scout, &mesh).unwrap_err();
            format!("{} {}; {}", unfit.axis, unfit.problem, unfit.tip)
        };
        let one = Mesh::default();
        assert_eq!(
            message(Mesh { tensor: 3, ..one }),
            "tensor is 3, which does not divide the teacher's 40 attention heads; use a divisor of 40"
        );
        assert_eq!(
            message(Mesh { expert: 5, ..one }),
            "expert is 5, which does not divide the teacher's 16 experts; use a divisor of 16"
        );
        assert_eq!(
            message(Mesh { pipeline: 49, ..one }),
            "pipeline is 49, and the teacher has 48 layers; use at most 48"
        );
        let dense = DecoderConfig {
            layers: vec![crate::models::config::LayerConfig {
                feed_forward: FeedForwardConfig::Dense { width: 3 },
                ..scout.layers[0].clone()
            }],
            ..scout.clone()
        };
        let unfit = |mesh| check(&dense, &mesh).unwrap_err();
        let experts = unfit(Mesh { expert: 2, ..one });
        assert_eq!((experts.axis, experts.problem.as_str()), ("expert", "is 2, and the teacher has no experts"));
        assert_eq!(unfit(Mesh { tensor: 4, ..one }).problem, "is 4, and a matrix of the teacher has 3 outputs");
    }
}
