//! What a sequence comes to in a model loaded for inference does not depend on what it is computed with.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use limbeck::models::{
    Decoder, DecoderConfig, Layer, RandomWeights, TokenLayout,
    config::{FeedForwardConfig, Span},
    read_config,
};

/// Not a multiple of any vector or tile; longer than the chunks of the fixtures, and than a block of queries.
const LENGTH: usize = 149;
const SEQUENCES: usize = 5;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    tensor.into_data().try_into_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

fn on_threads<R: Send>(count: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap().install(body)
}

/// Hidden states of every block, router logits, normed hidden states and logits of some sequences run together.
fn run(model: &Decoder, ids: &[u32]) -> Vec<Vec<u32>> {
    let layout = TokenLayout::of_documents(&model.config, ids.to_vec(), LENGTH);
    let mut hidden = model.embed(&layout);
    let mut all = vec![bits(hidden.clone())];
    for index in 0..model.layer_count() {
        let output = model.layer(index, hidden, &layout);
        hidden = output.hidden;
        all.push(bits(hidden.clone()));
        all.extend(output.routing.map(|routing| bits(routing.logits)));
    }
    let normed = model.final_norm(hidden);
    all.extend([bits(normed.clone()), bits(model.logits(normed))]);
    all
}

fn check(name: &str, model: &Decoder) {
    let vocab = model.config.vocab_size as u32;
    let ids: Vec<u32> = (0..(SEQUENCES * LENGTH) as u32).map(|n| n.wrapping_mul(2_654_435_761) % vocab).collect();
    let together = on_threads(1, || run(model, &ids));
    for (threads, sequences) in [(2, SEQUENCES), (1, 1), (2, 1), (1, 2), (2, 2), (3, 3)] {
        let mut parts: Vec<Vec<u32>> = vec![vec![]; together.len()];
        for ids in ids.chunks(sequences * LENGTH) {
            let part = on_threads(threads, || run(model, ids));
            parts.iter_mut().zip(part).for_each(|(all, part)| all.extend(part));
        }
        assert!(parts == together, "{name}: {sequences} sequences at once on {threads} threads");
    }
}

#[test]
fn a_row_gives_the_same_bits_in_any_batch() {
    let names = ["llama4/scout_tiny", "llama4/maverick_tiny", "llama4/scout_tiny_bf16_sharded", "smollm2_tiny"];
    for name in names.into_iter().chain(["llama3_tiny", "qwen2_tiny", "qwen3_tiny", "mistral_tiny"]) {
        check(name, &Decoder::open_for_inference(&fixture(name), &Device::flex()).unwrap());
    }
}

#[test]
fn a_row_gives_the_same_bits_in_any_batch_of_a_model_with_several_experts_a_token() {
    let path = fixture("llama4/scout_tiny").join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["num_experts_per_tok"] = serde_json::json!(3);
    // Wider than a block of k, and than a panel of columns.
    json["hidden_size"] = serde_json::json!(328);
    let config = read_config(&path, &json).unwrap();
    let several = |config: &DecoderConfig| {
        let chosen = |layer: &limbeck::models::config::LayerConfig| match layer.feed_forward {
            FeedForwardConfig::Experts { chosen, .. } => chosen == 3,
            FeedForwardConfig::Dense { .. } => false,
        };
        config.layers.iter().any(chosen)
            && config.layers.iter().any(|layer| matches!(layer.span, Span::Chunk(size) if size < LENGTH))
            && config.layers.iter().any(|layer| !layer.rotary)
    };
    assert!(several(&config), "three experts a token, chunks shorter than a sequence, layers without rotation");
    let weights = RandomWeights { seed: 5, std: 0.1 };
    check("three experts", &Decoder::load_for_inference(config, &weights, &Device::flex()).unwrap());
}

/// Weights that a checkpoint has in bf16 take two bytes, and give what the same numbers in f32 give.
#[test]
fn packed_models_give_what_tensors_give() {
    for name in ["llama4/scout_tiny", "llama4/maverick_tiny", "llama4/scout_tiny_bf16_sharded", "smollm2_tiny"] {
        let packed = Decoder::open_for_inference(&fixture(name), &Device::flex()).unwrap();
        let tensors = Decoder::open(&fixture(name), &Device::flex()).unwrap();
        let ids: Vec<u32> = (0..2 * LENGTH as u32).map(|n| n * 31 % packed.config.vocab_size as u32).collect();
        let logits = |model: &Decoder| {
            let layout = TokenLayout::of_documents(&model.config, ids.clone(), LENGTH);
            model.logits(model.forward(&layout).0).into_data().try_into_vec::<f32>().unwrap()
        };
        for (packed, tensor) in logits(&packed).into_iter().zip(logits(&tensors)) {
            assert!((packed - tensor).abs() <= 1e-4, "{name}: {packed} instead of {tensor}");
        }
        assert_eq!(bits(packed.lm_head()), bits(tensors.lm_head()), "{name}");
    }
}

#[test]
fn a_layer_loaded_alone_gives_the_bits_it_gives_in_its_model() {
    let name = "llama4/maverick_tiny";
    let model = Decoder::open_for_inference(&fixture(name), &Device::flex()).unwrap();
    let reader = limbeck::checkpoint::CheckpointReader::open(fixture(name)).unwrap();
    let source = limbeck::models::parameter::CheckpointWeights::new(&reader);
    let ids: Vec<u32> = (0..LENGTH as u32).collect();
    let layout = TokenLayout::of_documents(&model.config, ids, LENGTH);
    let mut hidden = model.embed(&layout);
    for index in 0..model.layer_count() {
        let layer = Layer::load_for_inference(&model.config, index, &source, &Device::flex()).unwrap();
        let wanted = model.layer(index, hidden.clone(), &layout).hidden;
        hidden = layer.forward(hidden, &layout).hidden;
        assert_eq!(bits(hidden.clone()), bits(wanted), "block {index}");
    }
}
