//! Our decoders against the official implementations' numbers, for Llama 4 and the dense Llama family.
//!
//! Tolerances (docs/numerics.md): logits 2e-4 and hidden states 1e-4 absolute, gradients 1e-4 of a tensor's largest.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use limbeck::{
    checkpoint::{CheckpointReader, SafetensorsFile, read_safetensors},
    models::{
        Decoder, DecoderConfig, TokenLayout,
        generate::{Sampling, generate},
        parameter::CheckpointWeights,
        read_config,
    },
    targets::{DistillBatch, PackedSequence},
};
use limbeck_kernels::logsumexp_gather::hard_cross_entropy_sum;

const LOGITS: f32 = 2e-4;
/// Of the largest: 34 times f32's rounding, in models whose residual stream is up to forty times as large as what is added
/// to it.
const HIDDEN: f32 = 4e-6;
/// Of the largest.
const GRADIENTS: f32 = 1e-4;

const FLOAT32: [&str; 8] = [
    "llama4/scout_tiny",
    "llama4/maverick_tiny",
    "llama2_tiny",
    "llama3_tiny",
    "smollm2_tiny",
    "qwen2_tiny",
    "qwen3_tiny",
    "mistral_tiny",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

struct Golden(SafetensorsFile);

impl Golden {
    fn open(name: &str, file: &str) -> Self {
        Golden(read_safetensors(fixture(name).join(file)).unwrap())
    }

    fn shape(&self, key: &str) -> Vec<usize> {
        self.0.info(key).unwrap().shape.clone()
    }

    fn floats(&self, key: &str) -> Vec<f32> {
        self.0.load_f32(key, &self.shape(key)).unwrap()
    }

    fn tokens(&self, key: &str) -> Vec<u32> {
        self.0.load_i64(key).unwrap().into_iter().map(|id| id as u32).collect()
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

fn assert_within(what: &str, ours: &[f32], golden: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), golden.len(), "{what}");
    for (i, (a, b)) in ours.iter().zip(golden).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{i}]: {a} instead of {b}");
    }
}

/// Within a share of the largest golden value.
fn assert_within_share(what: &str, ours: &[f32], golden: &[f32], share: f32) {
    assert_within(what, ours, golden, share * golden.iter().fold(0.0f32, |most, value| most.max(value.abs())));
}

/// Cross-entropy summed over all rows but each sequence's last, as the goldens have it.
fn summed_cross_entropy(logits: Tensor<2>, ids: &[u32], length: usize) -> Tensor<1> {
    let rows: Vec<i64> = (0..ids.len()).filter(|n| n % length != length - 1).map(|n| n as i64).collect();
    let labels: Vec<u32> = rows.iter().map(|&n| ids[n as usize + 1]).collect();
    let count = rows.len();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &logits.device());
    hard_cross_entropy_sum(logits.select(0, rows), labels)
}

#[test]
fn logits_hidden_states_and_gradients_equal_the_goldens() {
    for name in FLOAT32 {
        let golden = Golden::open(name, "golden.safetensors");
        let mut model = Decoder::open(&fixture(name), &Device::flex().autodiff()).unwrap();
        let [_, length] = golden.shape("input_ids")[..] else { panic!("two axes") };
        let ids = golden.tokens("input_ids");
        let layout = TokenLayout::of_documents(&model.config, ids.clone(), length);

        let mut hidden = model.embed(&layout);
        assert_within_share(name, &values(hidden.clone()), &golden.floats("hidden.embed"), HIDDEN);
        for index in 0..model.layer_count() {
            let output = model.layer(index, hidden, &layout);
            hidden = output.hidden;
            let what = format!("{name} block {index}");
            assert_within_share(&what, &values(hidden.clone()), &golden.floats(&format!("hidden.{index}")), HIDDEN);
            if let Some(routing) = output.routing {
                let logits = golden.floats(&format!("router.{index}.logits"));
                assert_within_share(&what, &values(routing.logits), &logits, HIDDEN);
                assert_eq!(routing.experts, golden.tokens(&format!("router.{index}.indices")), "{what}");
            }
        }
        let normed = model.final_norm(hidden);
        assert_within_share(name, &values(normed.clone()), &golden.floats("hidden.final_norm"), HIDDEN);
        let logits = model.logits(normed);
        assert_within(name, &values(logits.clone()), &golden.floats("logits"), LOGITS);

        let loss = summed_cross_entropy(logits, &ids, length);
        let (ours, theirs) = (values(loss.clone())[0], golden.floats("ce_sum_f64")[0]);
        assert!((ours - theirs).abs() <= 1e-5 * theirs, "{name}: loss {ours} instead of {theirs}");
        let mut gradients = loss.backward();
        let mut compared = 0;
        model.visit(&mut |parameter, weight| {
            let ours = values(weight.take_gradient(&mut gradients).expect(parameter));
            // The Llama 4 goldens hold the gradients of one block of each kind.
            let key = format!("grad.{parameter}");
            if !golden.0.contains(&key) {
                return;
            }
            let theirs = golden.floats(&key);
            assert_within_share(&format!("{name} gradient of {parameter}"), &ours, &theirs, GRADIENTS);
            compared += 1;
        });
        let expected = golden.0.names().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(compared, expected, "{name}: every gradient compared");
    }
}

#[test]
fn greedy_tokens_equal_the_goldens() {
    for name in FLOAT32 {
        let golden = Golden::open(name, "golden.safetensors");
        let model = Decoder::open(&fixture(name), &Device::flex()).unwrap();
        let prompt = golden.tokens("greedy.prompt");
        let mut tokens = prompt.clone();
        let wanted = golden.tokens("greedy.tokens");
        let mut unending = model.clone();
        unending.config.end_tokens.clear();
        generate(&unending, &prompt, wanted.len() - prompt.len(), &Sampling::greedy(), &mut |token| {
            tokens.push(token);
            Ok(())
        })
        .unwrap();
        assert_eq!(tokens, wanted, "{name}");
    }
}

#[test]
fn both_spellings_of_a_configuration_give_the_same_model() {
    for name in ["llama4/scout_tiny", "llama4/maverick_tiny", "llama3_tiny", "qwen2_tiny"] {
        let read = |file: &str| {
            let path = fixture(name).join(file);
            let json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            DecoderConfig { json: serde_json::Value::Null, ..read_config(&path, &json).unwrap() }
        };
        assert_eq!(read("config.json"), read("config.hub.json"), "{name}");
    }
}

#[test]
fn sharded_bf16_weights_give_the_golden_logits() {
    let name = "llama4/scout_tiny_bf16_sharded";
    let golden = Golden::open(name, "golden.safetensors");
    let model = Decoder::open(&fixture(name), &Device::flex()).unwrap();
    let length = golden.shape("input_ids")[1];
    let layout = TokenLayout::of_documents(&model.config, golden.tokens("input_ids"), length);
    let logits = model.logits(model.forward(&layout).0);
    assert_within(name, &values(logits), &golden.floats("logits_f32_run_of_bf16_weights"), LOGITS);
}

#[test]
fn packed_documents_give_what_each_gives_alone() {
    for name in ["llama4/scout_tiny", "llama4/maverick_tiny", "llama3_tiny", "mistral_tiny"] {
        let golden = Golden::open(name, "packed.safetensors");
        let model = Decoder::open(&fixture(name), &Device::flex()).unwrap();
        let (mut tokens, mut segments, mut wanted) = (vec![], vec![], vec![]);
        for document in 0..3 {
            let ids = golden.tokens(&format!("doc.{document}.input_ids"));
            segments.extend(vec![document; ids.len()]);
            tokens.extend(ids);
            wanted.extend(golden.floats(&format!("doc.{document}.logits")));
        }
        // A packed sequence has one token more than it has rows; it starts a document of its own.
        tokens.push(0);
        segments.push(3);
        let batch =
            DistillBatch { sequences: vec![PackedSequence { tokens, segments }], targets: None, row_weights: None };
        let layout = TokenLayout::of_batch(&model.config, &batch);
        let logits = model.logits(model.forward(&layout).0);
        assert_within(name, &values(logits), &wanted, LOGITS);
    }
}

#[test]
fn one_layer_can_be_loaded_and_run_alone() {
    let name = "llama4/maverick_tiny";
    let golden = Golden::open(name, "golden.safetensors");
    let reader = CheckpointReader::open(fixture(name)).unwrap();
    let config = read_config(&fixture(name).join("config.json"), reader.config()).unwrap();
    let length = golden.shape("input_ids")[1];
    let layout = TokenLayout::of_documents(&config, golden.tokens("input_ids"), length);
    let device = Device::flex();
    let source = CheckpointWeights::new(&reader);
    for index in 1..config.layers.len() {
        let layer = limbeck::models::Layer::load(&config, index, &source, &device).unwrap();
        let before = golden.floats(&format!("hidden.{}", index - 1));
        let before = Tensor::<2>::from_data(TensorData::new(before, [layout.token_count(), 64]), &device);
        let after = layer.forward(before, &layout).hidden;
        assert_within_share(name, &values(after), &golden.floats(&format!("hidden.{index}")), HIDDEN);
    }
}

/// A configuration that would compute something else is refused by name.
#[test]
fn unsupported_configurations_are_refused_with_the_key() {
    let cases = [
        ("llama3_tiny", "attention_bias", serde_json::json!(true)),
        ("llama3_tiny", "mlp_bias", serde_json::json!(true)),
        ("llama3_tiny", "hidden_act", serde_json::json!("gelu")),
        ("llama3_tiny", "model_type", serde_json::json!("gpt2")),
        ("qwen2_tiny", "use_sliding_window", serde_json::json!(true)),
        ("llama2_tiny", "num_hidden_layers", serde_json::json!("three")),
        ("llama4/scout_tiny", "attention_bias", serde_json::json!(true)),
        ("llama4/scout_tiny", "num_experts_per_tok", serde_json::json!(5)),
        ("llama4/scout_tiny", "no_rope_layers", serde_json::json!([1, 0])),
    ];
    for (name, key, value) in cases {
        let path = fixture(name).join("config.json");
        let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        json[key] = value;
        let message = read_config(&path, &json).unwrap_err().to_string();
        assert!(message.contains("config.json") && message.contains(&format!("`{key}`")), "{message}");
    }
}
