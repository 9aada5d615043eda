//! Checkpoints with Meta's names.

use std::collections::BTreeMap;

use limbeck::checkpoint::{Dtype, SafetensorsEntry, TensorData, write_safetensors};
use serde_json::json;

use super::*;

const LLAMA4: &str = "llama4/maverick_tiny_meta_native";

#[test]
fn a_llama_4_with_metas_names_is_the_one_with_hugging_faces() {
    assert_logits(&fixture(LLAMA4), &fixture(LLAMA4).join("golden.safetensors"), "logits_f32_run_of_bf16_weights");
    let native = CheckpointReader::open(fixture(LLAMA4)).unwrap();
    let converted = CheckpointReader::open(fixture("llama4/maverick_tiny")).unwrap();
    assert!(native.names().eq(converted.names()));
    for name in native.names() {
        assert_eq!(native.info(name).unwrap().shape, converted.info(name).unwrap().shape, "{name}");
        let rounded: Vec<f32> =
            load(&converted, name).into_iter().map(|value| half::bf16::from_f32(value).to_f32()).collect();
        assert_eq!(load(&native, name), rounded, "{name}");
    }
    assert_rows(&native);
}

/// `llama2_tiny` as Meta's conversion would have found it: other names, and rows of queries and keys in pairs.
fn llama2(dir: &Path) {
    let reader = CheckpointReader::open(fixture("llama2_tiny")).unwrap();
    let config = reader.config();
    let (hidden, heads) =
        (config["hidden_size"].as_u64().unwrap() as usize, config["num_attention_heads"].as_u64().unwrap());
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for name in reader.names() {
        let mut values = load(&reader, name);
        if name.contains("q_proj") || name.contains("k_proj") {
            let size = hidden / heads as usize;
            let rows: Vec<&[f32]> = values.chunks(hidden).collect();
            // Row 2 i + j of a head is row j * size / 2 + i there.
            values = (0..rows.len())
                .flat_map(|row| {
                    let (head, place) = (row / size, row % size);
                    rows[head * size + place % 2 * size / 2 + place / 2].iter().copied()
                })
                .collect();
        }
        let renamed = [
            ("model.embed_tokens", "tok_embeddings"),
            ("model.norm", "norm"),
            ("lm_head", "output"),
            ("model.layers", "layers"),
            ("self_attn.q_proj", "attention.wq"),
            ("self_attn.k_proj", "attention.wk"),
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attention_norm"),
        ]
        .iter()
        .fold(name.to_string(), |name, (from, to)| name.replace(from, to));
        tensors.insert(renamed, (reader.info(name).unwrap().shape.clone(), values));
    }
    tensors.insert("rope.freqs".into(), (vec![1], vec![0.0]));
    let entries: Vec<SafetensorsEntry> = tensors
        .iter()
        .map(|(name, (shape, _))| SafetensorsEntry::new(name.as_str(), Dtype::F32, shape.clone()))
        .collect();
    write_safetensors(dir.join("consolidated.safetensors"), &entries, &BTreeMap::new(), &mut |name| {
        Ok(TensorData::from(tensors[name].1.clone()))
    })
    .unwrap();
    let params = json!({
        "dim": hidden, "n_layers": config["num_hidden_layers"], "n_heads": heads, "vocab_size": -1, "multiple_of": 8,
        "norm_eps": config["rms_norm_eps"],
    });
    fs::write(dir.join("params.json"), params.to_string()).unwrap();
}

#[test]
fn a_llama_with_metas_names_has_its_rows_put_in_order() {
    let dir = temporary();
    llama2(dir.path());
    assert_logits(dir.path(), &fixture("llama2_tiny/golden.safetensors"), "logits");
    let (native, converted) =
        (CheckpointReader::open(dir.path()).unwrap(), CheckpointReader::open(fixture("llama2_tiny")).unwrap());
    for name in converted.names() {
        assert_eq!(load(&native, name), load(&converted, name), "{name}");
    }
    assert_rows(&native);
    // Its name is not decisive: with a config.json the tensors speak for themselves.
    fs::remove_file(dir.path().join("params.json")).unwrap();
    fs::copy(fixture("llama2_tiny/config.json"), dir.path().join("config.json")).unwrap();
    assert_logits(dir.path(), &fixture("llama2_tiny/golden.safetensors"), "logits");
}

#[test]
fn what_is_wrong_with_such_a_checkpoint_is_said() {
    let dir = temporary();
    let (path, params) = (dir.path(), dir.path().join("params.json"));
    llama2(path);
    let edit = |key: &str, value: serde_json::Value| {
        let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&params).unwrap()).unwrap();
        json[key] = value;
        fs::write(&params, json.to_string()).unwrap();
    };
    edit("n_heads", json!(3));
    let rows = message(CheckpointReader::open(path), &path.join("consolidated.safetensors"));
    assert_eq!(
        rows,
        "tensor `layers.0.attention.wk.weight`: has shape [32, 32], expected 30 rows; \
         check that params.json belongs to these weights"
    );
    edit("n_heads", json!("four"));
    assert_eq!(
        message(CheckpointReader::open(path), &params),
        "`n_heads`: is \"four\", not a positive whole number; correct it by the model's own params.json"
    );
    fs::copy(path.join("consolidated.safetensors"), path.join("consolidated.01.safetensors")).unwrap();
    assert_eq!(
        message(CheckpointReader::open(path), path),
        "holds weights that are cut into 2 files for as many devices; \
         join them into one consolidated.safetensors, or use the Hugging Face form"
    );
    for name in ["consolidated.safetensors", "consolidated.01.safetensors"] {
        fs::remove_file(path.join(name)).unwrap();
    }
    fs::write(path.join("consolidated.00.pth"), "").unwrap();
    let pickled = message(CheckpointReader::open(path), path);
    assert!(pickled.ends_with("only pickled weights; save it again from Python as safetensors"), "{pickled}");
    let entries = [
        SafetensorsEntry::new("tok_embeddings.weight", Dtype::F32, vec![1, 1]),
        SafetensorsEntry::new("layers.0.attention.wo.bias", Dtype::F32, vec![1]),
    ];
    write_safetensors(path.join("consolidated.00.safetensors"), &entries, &BTreeMap::new(), &mut |_| {
        Ok(TensorData::from(vec![0f32]))
    })
    .unwrap();
    edit("n_heads", json!(1));
    fs::write(
        path.join("config.json"),
        json!({ "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2 }).to_string(),
    )
    .unwrap();
    assert_eq!(
        message(CheckpointReader::open(path), &path.join("consolidated.00.safetensors")),
        "tensor `layers.0.attention.wo.bias`: is not a tensor that Meta's Llama models have; \
         use a checkpoint of Llama 2, 3 or 4, or the Hugging Face form of this one"
    );
}
