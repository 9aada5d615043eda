//! A whole run in small: a folder with text, a tokenizer trained on it, a teacher with random weights, and a recipe.
//! Shared by the tests of the line from text to student.
#![allow(dead_code)] // each test uses a part of it

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use burn::tensor::Device;
use limbeck::checkpoint::StoredDtype;
use limbeck::models::llama4::{Llama4Config, shapes};
use limbeck::models::{Decoder, DecoderConfig, RandomWeights};
use limbeck::recipe::Recipe;
use limbeck::run::RunOptions;
use limbeck::tokenizer::{Tokenizer, train_byte_level_bpe};
use limbeck::train::trainer::{Export, write_model};
use tempfile::TempDir;

pub const RECIPE: &str = r#"name = "small"
seed = 17
[data]
sources = [{ path = "text.jsonl" }]
tokens = "6k"
seq_len = 32
held_out = [{ path = "held_out.jsonl" }]
tokenizer = "tokenizer"
[teacher]
checkpoint = "teacher"
batch_tokens = 96
[cache]
top_k = 8
temperatures = [1.0, 2.0]
sequences_per_shard = 40
[student]
init_std = 0.1
[student.shape]
like = "scout"
layers = 2
hidden = 32
heads = 4
kv_heads = 2
head_dim = 8
experts = 4
expert_width = 24
chunk = 16
nope_interval = 2
max_position = 64
[control]
[loss]
weighting = { kind = "constant", soft = 0.5 }
[train]
steps = 24
batch_tokens = 128
micro_batch_tokens = 64
lr = { schedule = "linear", from = 1e-2, to = 1e-3, warmup = 4 }
checkpoint_every = 8
evaluate_every = 8
log_every = 1
"#;

/// How the tests write models.
pub const EXPORT: Export = Export { dtype: StoredDtype::F32, max_shard_bytes: None, replace: true };

pub struct SmallRun {
    /// Removed when the run is dropped.
    _folder: TempDir,
    root: PathBuf,
    pub vocab_size: usize,
}

impl SmallRun {
    /// Text, held-out text, tokenizer, teacher and recipe, as [`RECIPE`] names them.
    pub fn new() -> SmallRun {
        let folder = tempfile::tempdir().unwrap();
        // Recipes give paths without symbolic links, and messages are compared with them.
        let root = folder.path().canonicalize().unwrap();
        let mut run = SmallRun { _folder: folder, root, vocab_size: 0 };
        write_documents(&run.path("text.jsonl"), &documents(1, 200));
        write_documents(&run.path("held_out.jsonl"), &documents(2, 24));
        run.vocab_size = run.train_tokenizer("tokenizer", &documents(1, 200)).vocab_size();
        run.write_teacher(5);
        fs::write(run.path("recipe.toml"), RECIPE).unwrap();
        run
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub fn train_tokenizer(&self, name: &str, texts: &[String]) -> Tokenizer {
        let special_tokens = ["<|begin_of_text|>", "<|end_of_text|>"];
        train_byte_level_bpe(texts.iter().cloned().map(Ok), 320, &special_tokens, &self.path(name)).unwrap()
    }

    /// A teacher with other weights for another seed.
    pub fn write_teacher(&self, seed: u64) {
        write_random(scout(2, self.vocab_size), &self.path("teacher"), seed);
    }

    pub fn recipe(&self, overrides: &[&str]) -> Recipe {
        let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
        Recipe::load(self.path("recipe.toml"), &overrides).unwrap()
    }

    pub fn options(&self, run_dir: &str) -> RunOptions {
        RunOptions { run_dir: Some(self.path(run_dir)), ..RunOptions::default() }
    }

    /// The program run on this folder's recipe, with results in `run`.
    pub fn limbeck(&self, command: &str, more: &[&str]) -> Outcome {
        let (recipe, run_dir) = (self.path("recipe.toml"), self.path("run"));
        let mut arguments: Vec<&OsStr> =
            vec![command.as_ref(), recipe.as_ref(), "--run-dir".as_ref(), run_dir.as_ref()];
        arguments.extend(more.iter().map(OsStr::new));
        limbeck(&arguments)
    }

    /// A message with `DIR` for this folder.
    pub fn shortened(&self, text: &str) -> String {
        text.replace(self.root.to_str().unwrap(), "DIR")
    }
}

/// What the program said, and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

pub fn limbeck(arguments: &[&OsStr]) -> Outcome {
    let program = Command::new(env!("CARGO_BIN_EXE_limbeck")).args(arguments).stdin(Stdio::null()).output();
    let output = program.expect("the program starts");
    Outcome {
        code: output.status.code().expect("it was not killed"),
        stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// A Scout in small: experts and normalised queries in every layer, the last layer without positions.
pub fn scout(layers: usize, vocab_size: usize) -> Llama4Config {
    Llama4Config {
        hidden_size: 32,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        intermediate_size: 24,
        intermediate_size_mlp: 48,
        num_local_experts: 4,
        moe_layers: (0..layers).collect(),
        rotary_layers: (1..=layers).map(|layer| layer < layers).collect(),
        attention_chunk_size: 16,
        max_position_embeddings: 64,
        vocab_size,
        ..shapes::tiny()
    }
}

/// A Maverick in small: experts in every second layer, queries as they are.
pub fn maverick(layers: usize, vocab_size: usize) -> Llama4Config {
    Llama4Config {
        moe_layers: (1..layers).step_by(2).collect(),
        use_qk_norm: false,
        rope_scaling: None,
        ..scout(layers, vocab_size)
    }
}

/// Weights large enough for predictions that are far from even.
pub fn random_model(config: DecoderConfig, seed: u64, device: &Device) -> Decoder {
    Decoder::load(config, &RandomWeights { seed, std: 0.25 }, device).unwrap()
}

/// A checkpoint of random weights.
pub fn write_random(config: Llama4Config, dir: &Path, seed: u64) {
    let mut model = random_model(config.decoder(dir).unwrap(), seed, &Device::flex());
    write_model(&mut model, dir, &EXPORT, &[], None).unwrap();
}

/// Documents of one to four sentences that follow a pattern, so that there is something to learn.
pub fn documents(seed: u64, count: usize) -> Vec<String> {
    const SUBJECTS: [&str; 6] = ["the still", "a retort", "the old alchemist", "her apprentice", "the fire", "a drop"];
    const VERBS: [&str; 6] = ["warms", "cools", "fills", "watches", "empties", "carries"];
    const OBJECTS: [&str; 6] =
        ["the glass", "a copper pipe", "the receiver", "the vapour", "some water", "the worm tub"];
    const ENDS: [&str; 6] =
        ["slowly", "before dawn", "in silence", "again and again", "until it is clear", "by the river"];
    let mut state = seed;
    let mut one_of = |words: &[&'static str]| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words[(state >> 33) as usize % words.len()]
    };
    (0..count)
        .map(|number| {
            let sentences = (0..=number % 4)
                .map(|_| format!("{} {} {} {}.", one_of(&SUBJECTS), one_of(&VERBS), one_of(&OBJECTS), one_of(&ENDS)));
            sentences.collect::<Vec<_>>().join(" ")
        })
        .collect()
}

pub fn write_documents(path: &Path, documents: &[String]) {
    let lines: Vec<String> = documents.iter().map(|text| serde_json::json!({ "text": text }).to_string()).collect();
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

/// Every file below a directory, by its path inside it.
pub fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_path_buf()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                found.insert(path.strip_prefix(directory).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    found
}
