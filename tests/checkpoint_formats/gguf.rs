//! GGUF files: values as the `gguf` Python package reads them, models as `transformers` runs them.

use limbeck::checkpoint::{Dtype, read_gguf};
use limbeck::tokenizer::Tokenizer;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

fn file(name: &str) -> PathBuf {
    fixture("gguf").join(name)
}

#[test]
fn every_type_is_dequantised_to_the_bits_that_the_python_package_has() {
    let (ours, golden) =
        (read_gguf(file("blocks.gguf")).unwrap(), read_safetensors(file("blocks.safetensors")).unwrap());
    let expected = ["BF16", "F16", "F32", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"];
    assert!(ours.names().eq(expected));
    for name in expected {
        assert_eq!(
            (ours.info(name).unwrap().dtype.name(), ours.info(name).unwrap().shape.as_slice()),
            (name, [3, 512].as_slice())
        );
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(ours.load_f32(name, &[3, 512]).unwrap()), bits(all(&golden, name)), "{name}");
    }
}

#[test]
fn a_llama_in_gguf_computes_what_transformers_does() {
    let path = file("llama.gguf");
    assert_logits(&path, &file("llama.safetensors"), "logits");
    let reader = CheckpointReader::open(&path).unwrap();
    assert_rows(&reader);
    assert_eq!(reader.info("model.layers.0.self_attn.q_proj.weight").unwrap().dtype, Dtype::Q8_0);
    let config = reader.config();
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!((&config["rms_norm_eps"], &config["rope_theta"]), (&Value::from(1e-5), &Value::from(500000.0)));
    assert_eq!(config["rope_scaling"]["factor"], 8.0);
    assert_eq!(config["rope_scaling"]["high_freq_factor"], 4.0);
}

#[test]
fn a_llama_4_in_gguf_computes_what_transformers_does() {
    assert_logits(&file("llama4.gguf"), &file("llama4.safetensors"), "logits");
    assert_rows(&CheckpointReader::open(file("llama4.gguf")).unwrap());
}

#[test]
fn the_tokenizer_inside_gives_the_ids_that_tokenizers_does() {
    let tokenizer = Tokenizer::open(&file("llama.gguf")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(file("llama.tokenizer.json")).unwrap()).unwrap();
    for case in &cases {
        let ids: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        assert_eq!(tokenizer.encode_document(case["text"].as_str().unwrap()).unwrap(), ids, "{}", case["text"]);
    }
    assert_eq!(tokenizer.encode("<|start|>the").unwrap().len(), 3, "special token, t, he");
    assert_eq!((tokenizer.document_start(), tokenizer.document_end()), (Some(1), Some(0)));
    // What a student's checkpoint carries along is the same tokenizer once more.
    let dir = temporary();
    for (name, content) in tokenizer.files().unwrap() {
        fs::write(dir.path().join(name), content).unwrap();
    }
    let copy = Tokenizer::open(dir.path()).unwrap();
    assert_eq!(copy.fingerprint(), tokenizer.fingerprint());
    assert_eq!((copy.document_start(), copy.document_end()), (Some(1), Some(0)));
}

/// What a test changes of a file, and how: `from` is there once, and as long as `to`.
fn spoilt(name: &str, from: &[u8], to: &[u8]) -> (TempDir, PathBuf) {
    let mut bytes = fs::read(file(name)).unwrap();
    let places: Vec<usize> =
        bytes.windows(from.len()).enumerate().filter(|(_, window)| *window == from).map(|(at, _)| at).collect();
    assert_eq!((places.len(), from.len()), (1, to.len()), "{}", String::from_utf8_lossy(from));
    bytes[places[0]..places[0] + to.len()].copy_from_slice(to);
    let dir = temporary();
    let path = dir.path().join(name);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

#[test]
fn metadata_decides_the_fingerprint_only_where_it_decides_the_model() {
    let before = CheckpointReader::open(file("llama.gguf")).unwrap().fingerprint().unwrap();
    let fingerprint = |path: &Path| CheckpointReader::open(path).unwrap().fingerprint().unwrap();
    let (_dir, renamed) = spoilt("llama.gguf", b"\x04\0\0\0\0\0\0\0tiny", b"\x04\0\0\0\0\0\0\0Tiny");
    assert_eq!(fingerprint(&renamed), before);
    let epsilon = [b"rms_epsilon\x06\0\0\0".as_slice(), &1e-5f32.to_le_bytes()].concat();
    let other = [b"rms_epsilon\x06\0\0\0".as_slice(), &1e-6f32.to_le_bytes()].concat();
    assert_ne!(fingerprint(&spoilt("llama.gguf", &epsilon, &other).1), before);
}

#[test]
fn a_model_in_several_files_is_read_by_the_first() {
    // A header without tensors, and one with a split's count, are what a splitting program leaves in the first part.
    let dir = temporary();
    let name = |number: u32| dir.path().join(format!("m-{number:05}-of-00002.gguf"));
    let bytes = fs::read(file("llama.gguf")).unwrap();
    let count = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    let mut first = bytes[..24].to_vec();
    first[16..24].copy_from_slice(&(count + 1).to_le_bytes());
    first.extend(11u64.to_le_bytes());
    first.extend(b"split.count");
    first.extend(2u32.to_le_bytes());
    first.extend(2u16.to_le_bytes());
    // The pairs end where the first tensor's name begins, or a test of this file has changed.
    let pairs_end = bytes.windows(25).position(|window| window == b"\x11\0\0\0\0\0\0\0rope_freqs.weight").unwrap();
    first.extend(&bytes[24..pairs_end]);
    first[8..16].copy_from_slice(&0u64.to_le_bytes());
    fs::write(name(1), &first).unwrap();
    let missing = message(CheckpointReader::open(name(1)), &name(2));
    assert_eq!(missing, "is missing, part 2 of 2; download it");
    fs::write(name(2), &bytes).unwrap();
    assert_logits(&name(1), &file("llama.safetensors"), "logits");
    let other = dir.path().join("renamed.gguf");
    fs::copy(name(1), &other).unwrap();
    assert_eq!(
        message(CheckpointReader::open(&other), &other),
        "is a part of a model in 2 files, and its name does not end in -00001-of-00002.gguf; \
         give the path of the first part, under its own name"
    );
}

#[test]
fn every_truncated_file_is_refused() {
    let whole = fs::read(file("llama4.gguf")).unwrap();
    let dir = temporary();
    let path = dir.path().join("cut.gguf");
    let cut = |length: usize| {
        fs::write(&path, &whole[..length]).unwrap();
        message(CheckpointReader::open(&path), &path)
    };
    assert_eq!(cut(2), "does not start with the letters GGUF; give the path of a .gguf file");
    assert_eq!(cut(6), "ends at byte 6, inside the version; the file is truncated: download it again");
    let name = whole.windows(11).position(|window| window == b"blk.3.attn_").unwrap();
    let at = cut(name + 3);
    assert!(at.ends_with("inside the name of a tensor; the file is truncated: download it again"), "{at}");
    let last = cut(whole.len() - 200);
    assert!(last.contains("bytes of data; the file is truncated: download it again"), "{last}");
    for length in (0..whole.len() - 64).step_by(997) {
        cut(length);
    }
}

#[test]
fn headers_that_cannot_be_are_refused() {
    let refusal = |from: &[u8], to: &[u8]| {
        let (_dir, path) = spoilt("llama4.gguf", from, to);
        message(CheckpointReader::open(&path), &path)
    };
    assert_eq!(
        refusal(b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0"),
        "is a GGUF file of version 1, and this program reads 2 and 3; convert the model again"
    );
    assert_eq!(
        refusal(b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"),
        "is a GGUF file in big-endian byte order; convert it to little-endian"
    );
    assert_eq!(
        refusal(b"\x06\0\0\0\0\0\0\0llama4", b"\x06\0\0\0\0\0\0\0mamba2"),
        "`general.architecture`: `mamba2` is not an architecture this program reads from GGUF; \
         use a file of llama or llama4, or a Hugging Face checkpoint"
    );
    let described = |sizes: [u64; 2], kind: u32| {
        let mut bytes = b"token_embd.weight\x02\0\0\0".to_vec();
        sizes.iter().for_each(|size| bytes.extend(size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes
    };
    let true_one = described([32, 61], 30);
    assert_eq!(
        refusal(&true_one, &described([32, 61], 13)),
        "tensor `token_embd.weight`: is stored as Q5_K, which this program does not read; \
         use a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K and Q6_K tensors"
    );
    let unknown = refusal(&true_one, &described([32, 61], 4_000_000_000));
    assert!(unknown.starts_with("tensor `token_embd.weight`: has the unknown type number 4000000000"), "{unknown}");
    assert_eq!(
        refusal(&true_one, &described([1 << 32, 1 << 32], 30)),
        "tensor `token_embd.weight`: shape [4294967296, 4294967296] of BF16 overflows 64 bits; download it again"
    );
    let wide = refusal(&true_one, &described([1 << 50, 1], 30));
    assert!(wide.contains("needs 2251799813685248 bytes from byte"), "{wide}");
    assert_eq!(
        refusal(&true_one, &described([61, 32], 2)),
        "tensor `token_embd.weight`: rows of Some(61) values are no whole blocks of Q4_0; download it again"
    );
    let more = refusal(b"llama4.block_count\x04\0\0\0\x04\0\0\0", b"llama4.block_count\x04\0\0\0\x03\0\0\0");
    assert!(more.contains("is not a tensor that models of `llama4` have; use a model whose architecture"), "{more}");
    let absurd = refusal(b"llama4.rope.freq_base\x06\0\0\0", b"llama4.rope.freq_base\x63\0\0\0");
    assert_eq!(absurd, "`llama4.rope.freq_base` has the unknown type 99; download it again");
    let kind = refusal(b"llama4.expert_count\x04\0\0\0", b"llama4.expert_count\x06\0\0\0");
    assert_eq!(kind, "`llama4.expert_count`: is not a whole number; convert the model again");
    let missing = refusal(b"llama4.context_length", b"llama4.context_lengtH");
    assert_eq!(missing, "`llama4.context_length`: is missing from the metadata; convert the model again");
}

#[test]
fn what_would_change_the_model_is_refused_by_its_key() {
    let refusal = |from: &[u8], to: &[u8]| {
        let (_dir, path) = spoilt("llama.gguf", from, to);
        message(CheckpointReader::open(&path), &path)
    };
    let base = [b"llama.rope.freq_base\x06\0\0\0".as_slice(), &500000f32.to_le_bytes()].concat();
    let other = [b"llama.rope.freq_base\x06\0\0\0".as_slice(), &10000f32.to_le_bytes()].concat();
    assert_eq!(
        refusal(&base, &other),
        "tensor `rope_freqs.weight`: its divisors are none that Llama 3 or Llama 4 have; \
         use the Hugging Face checkpoint, whose config.json names them"
    );
    assert_eq!(
        refusal(b"llama.rope.dimension_count\x04\0\0\0\x10\0\0\0", b"llama.attention.key_length\x04\0\0\0\x20\0\0\0"),
        "tensor `rope_freqs.weight`: expected shape [16], found [8]; check that config.json belongs to these weights"
    );
    assert_eq!(
        refusal(b"llama.rope.dimension_count\x04\0\0\0\x10\0\0\0", b"llama.rope.dimension_count\x04\0\0\0\x08\0\0\0"),
        "`llama.rope.dimension_count`: turning a part of each head is not supported; use a model without it"
    );
}

#[test]
fn tokenizers_of_other_kinds_are_refused_by_name() {
    let (_dir, path) = spoilt("llama.gguf", b"smollm", b"falcon");
    assert_eq!(
        message(Tokenizer::open(&path), &path),
        "`tokenizer.ggml.pre`: `falcon` is not a way of cutting text that is known; \
         name the model's own tokenizer.json as data.tokenizer"
    );
    let (_dir, path) = spoilt("llama.gguf", b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert");
    assert_eq!(
        message(Tokenizer::open(&path), &path),
        "`tokenizer.ggml.model`: `bert` is not a kind of tokenizer that is read from GGUF; \
         name the model's own tokenizer.json as data.tokenizer"
    );
    assert_eq!(
        message(Tokenizer::open(&file("llama4.gguf")), &file("llama4.gguf")),
        "`tokenizer.ggml.model`: is missing from the metadata; convert the model again"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    #[test]
    fn no_changed_byte_of_a_header_ends_the_process(at in 0usize..9000, to in any::<u8>()) {
        let mut bytes = fs::read(file("llama.gguf")).unwrap();
        bytes[at] = to;
        let dir = temporary();
        let path = dir.path().join("changed.gguf");
        fs::write(&path, bytes).unwrap();
        // Either is fine: an error, or a model that reads within the file.
        if let Ok(reader) = CheckpointReader::open(&path) {
            for name in reader.names() {
                let _ = reader.load_f32(name, &reader.info(name).unwrap().shape.clone());
            }
        }
        let _ = Tokenizer::open(&path);
    }
}
