//! Teachers that can be divided by 2, 3 and 4, and comparing their targets. Shared by the tests of teachers on several
//! devices.
//!
//! Sums that are added up in parts differ in their last bits. So log-probabilities are compared to 1e-5 relative
//! (absolute below 1), and kept ids may differ only where their log-probability is within [`TIE`] of the smallest that is
//! kept, and in one row of a hundred at most.
#![allow(dead_code)] // each test uses a part of it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use limbeck::cache::CacheReader;
use limbeck::checkpoint::{CheckpointReader, Dtype, SafetensorsEntry, TensorData, read_safetensors, write_safetensors};
use limbeck::models::llama4::Llama4Config;
use limbeck::models::{Decoder, DecoderConfig, RandomWeights, read_config};
use limbeck::parallel::Mesh;
use limbeck::selection::Selection;
use limbeck::targets::{PackedSequence, SparseTargets, TargetKind, TargetSource};
use limbeck::teacher::{ShardSettings, ShardedTeacher};
use limbeck::train::trainer::write_model;
use limbeck::{Result, precompute};
use limbeck_kernels::packed_matmul::Numbers;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::small_run::*;

/// How far below the smallest kept log-probability, or above it, an id may be kept by one and not by the other.
pub const TIE: f32 = 1e-4;
pub const CLOSE: f32 = 1e-5;

pub const LENGTH: usize = 32;
pub const ONE: Mesh = Mesh { expert: 1, tensor: 1, pipeline: 1, data: 1 };

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Packed documents of random ids.
pub fn sequences(vocab: usize, count: usize) -> Vec<PackedSequence> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut document = || (0..random.random_range(2..40)).map(|_| random.random_range(0..vocab as u32)).collect();
    let documents: Vec<Vec<u32>> = (0..3 * count).map(|_| document()).collect();
    let mut packed = limbeck::data::pack(&documents, LENGTH, 0);
    assert!(packed.len() >= count);
    packed.truncate(count);
    packed
}

pub fn config_of(dir: &Path) -> DecoderConfig {
    let reader = CheckpointReader::open(dir).unwrap();
    read_config(reader.config_path(), reader.config()).unwrap()
}

pub fn settings(checkpoint: &Path, mesh: Mesh, selection: Selection) -> ShardSettings {
    ShardSettings {
        numbers: Numbers::F32,
        checkpoint: checkpoint.into(),
        config: config_of(checkpoint),
        mesh,
        device: Device::flex(),
        selection,
        temperatures: vec![1.0, 2.0],
        batch_sequences: 2,
        streaming: None,
    }
}

pub fn sharded_teacher(checkpoint: &Path, mesh: Mesh, selection: Selection) -> Result<ShardedTeacher> {
    ShardedTeacher::in_process(&settings(checkpoint, mesh, selection), &vec![Device::flex(); mesh.size()])
}

pub fn numbered(sequences: &[PackedSequence]) -> Vec<(u64, &PackedSequence)> {
    (5..).zip(sequences).collect()
}

/// A dense model of the Llama family with these keys beside what all have.
pub fn write_dense(dir: &Path, more: serde_json::Value) {
    let mut json = serde_json::json!({
        "model_type": "llama", "hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 60, "num_hidden_layers": 4, "vocab_size": 301, "max_position_embeddings": 64,
    });
    json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let config = read_config(dir, &json).unwrap();
    let weights = RandomWeights { seed: 11, std: 0.2 };
    let mut model = Decoder::load(config, &weights, &Device::flex()).unwrap();
    write_model(&mut model, dir, &EXPORT, &[], None).unwrap();
}

pub fn joined(all: &[SparseTargets]) -> SparseTargets {
    let mut joined = SparseTargets::empty(&[1.0, 2.0]);
    all.iter().for_each(|targets| joined.extend(targets));
    joined
}

pub const DENSE_MESHES: [Mesh; 11] = [
    Mesh { tensor: 2, ..ONE },
    Mesh { tensor: 3, ..ONE },
    Mesh { tensor: 4, ..ONE },
    Mesh { pipeline: 2, ..ONE },
    Mesh { pipeline: 3, ..ONE },
    Mesh { pipeline: 4, ..ONE },
    Mesh { data: 2, ..ONE },
    Mesh { data: 3, ..ONE },
    Mesh { data: 4, ..ONE },
    Mesh { pipeline: 2, tensor: 2, ..ONE },
    Mesh { data: 2, tensor: 2, ..ONE },
];

pub const EXPERT_MESHES: [Mesh; 6] = [
    Mesh { expert: 2, ..ONE },
    Mesh { expert: 3, ..ONE },
    Mesh { expert: 4, ..ONE },
    Mesh { expert: 2, tensor: 2, ..ONE },
    Mesh { expert: 2, pipeline: 2, ..ONE },
    Mesh { expert: 2, data: 2, ..ONE },
];

/// Changes the values of a checkpoint's tensors.
pub fn change(dir: &Path, mut change: impl FnMut(&str, &[usize], &mut [f32])) {
    let path = dir.join("model.safetensors");
    let file = read_safetensors(&path).unwrap();
    let names: Vec<String> = file.names().map(String::from).collect();
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = names
        .into_iter()
        .map(|name| {
            let shape = file.info(&name).unwrap().shape.clone();
            let mut values = file.load_f32(&name, &shape).unwrap();
            change(&name, &shape, &mut values);
            (name, shape, values)
        })
        .collect();
    drop(file);
    let entries: Vec<SafetensorsEntry> = tensors
        .iter()
        .map(|(name, shape, _)| SafetensorsEntry { name: name.clone(), shape: shape.clone(), dtype: Dtype::F32 })
        .collect();
    let mut fetch = |name: &str| {
        let found = tensors.iter().find(|(known, _, _)| known == name).unwrap();
        Ok(TensorData::F32(found.2.clone().into()))
    };
    write_safetensors(&path, &entries, &BTreeMap::new(), &mut fetch).unwrap();
}

/// A Llama 4 whose sizes divide by 2, 3 and 4: twelve heads on six key heads, twelve experts.
pub fn divisible(layers: usize, vocab_size: usize, chosen: usize) -> Llama4Config {
    Llama4Config {
        hidden_size: 48,
        num_attention_heads: 12,
        num_key_value_heads: 6,
        num_local_experts: 12,
        num_experts_per_tok: chosen,
        ..scout(layers, vocab_size)
    }
}

/// Compares targets, by the rules that stand at the head of this file.
pub fn assert_close(what: &str, found: &SparseTargets, expected: &SparseTargets) {
    assert_eq!(found.row_count(), expected.row_count(), "{what}");
    let near = |a: f32, b: f32| a == b || (a - b).abs() <= CLOSE * b.abs().max(1.0);
    let mut others = 0;
    for row in 0..found.row_count() {
        let (found, expected) = (found.slice(row, row + 1), expected.slice(row, row + 1));
        let what = format!("{what}, row {row}");
        for (a, b) in found.captures.iter().zip(&expected.captures) {
            assert!(near(a.label_log_prob[0], b.label_log_prob[0]), "{what}: {a:?} {b:?}");
        }
        let (a, b) = (found.log_normalizer.as_ref().unwrap()[0], expected.log_normalizer.as_ref().unwrap()[0]);
        assert!(near(a, b), "{what}: normaliser {a} {b}");
        let log_probs = |targets: &SparseTargets, capture: usize| -> BTreeMap<u32, f32> {
            targets.ids.iter().copied().zip(targets.captures[capture].log_probs.iter().copied()).collect()
        };
        let (ours, theirs) = (log_probs(&found, 0), log_probs(&expected, 0));
        if ours.keys().eq(theirs.keys()) {
            for (number, (a, b)) in found.captures.iter().zip(&expected.captures).enumerate() {
                let (ours, theirs) = (log_probs(&found, number), log_probs(&expected, number));
                assert!(ours.values().zip(theirs.values()).all(|(a, b)| near(*a, *b)), "{what}: {ours:?} {theirs:?}");
                assert!(near(a.log_tail[0], b.log_tail[0]), "{what}: tails {} {}", a.log_tail[0], b.log_tail[0]);
            }
            continue;
        }
        others += 1;
        let drawn = expected.kind == TargetKind::Sampled;
        let border = theirs.values().copied().fold(f32::INFINITY, f32::min);
        for (id, log_prob) in ours.iter().filter(|(id, _)| !theirs.contains_key(id)) {
            assert!(drawn || (log_prob - border).abs() < TIE, "{what}: id {id} at {log_prob}, border {border}");
        }
    }
    assert!(others * 100 <= found.row_count(), "{what}: {others} of {} rows keep other ids", found.row_count());
}

/// A run whose teacher divides by 2, 3 and 4.
pub fn small_run() -> SmallRun {
    let small = SmallRun::new();
    write_random(divisible(4, small.vocab_size, 1), &small.path("teacher"), 5);
    small
}

/// A cache made by a recipe with these overrides.
pub fn cache(small: &SmallRun, run: &str, overrides: &[&str]) -> PathBuf {
    precompute::run(&small.recipe(overrides), &small.options(run)).unwrap()
}

pub fn all_targets(cache: &Path) -> SparseTargets {
    let cache = CacheReader::open(cache).unwrap();
    let numbers: Vec<u64> = (0..cache.sequence_count()).collect();
    cache.read(&numbers).unwrap().targets.unwrap()
}
