//! What the program says to bad input: one line on stderr that names the file, tensor or key and the way out, nothing on
//! stdout, and an exit code that tells a wrong recipe (2) from a failure (1). `DIR` stands for the folder of the test.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use limbeck::checkpoint::{Dtype, SafetensorsEntry, TensorData, read_safetensors, write_safetensors};
use limbeck::models::llama4::Llama4Config;
use small_run::*;

/// Asserts that a run of the recipe fails with this exit code and nothing but this message.
fn refused(small: &SmallRun, command: &str, more: &[&str], code: i32, message: &str) {
    let outcome = small.limbeck(command, more);
    assert_eq!(small.shortened(&outcome.stderr), format!("error: {message}\n"));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (code, ""));
}

/// The end of a fingerprint that messages show, which a test cannot know.
fn without_fingerprints(text: &str) -> String {
    let mut parts = text.split("fingerprint ");
    let mut result = parts.next().unwrap().to_string();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_hexdigit).count();
        assert_eq!(digits, 16, "{text}");
        result += &format!("fingerprint F{}", &part[digits..]);
    }
    result
}

#[test]
fn an_unknown_key_is_named_with_the_one_that_was_meant() {
    let small = SmallRun::new();
    fs::write(small.path("recipe.toml"), RECIPE.replace("top_k", "topk")).unwrap();
    for command in ["distill", "precompute-teacher-logits", "evaluate"] {
        let message = "DIR/recipe.toml: line 13: `topk` is not a key of [cache]; did you mean `top_k`?";
        refused(&small, command, &[], 2, message);
    }
}

#[test]
fn a_missing_file_is_named_with_the_key_that_names_it() {
    let small = SmallRun::new();
    let moved = small.path("elsewhere");
    let cases = [
        (
            "teacher",
            "DIR/recipe.toml: line 10: `teacher.checkpoint` is DIR/teacher, which does not exist; give the path of a model \
             directory in Hugging Face layout, or of a .gguf file",
        ),
        (
            "text.jsonl",
            "DIR/recipe.toml: line 4: `data.sources[0].path` is DIR/text.jsonl, which does not exist; give the path of a \
             text, JSON Lines or Parquet file",
        ),
        (
            "held_out.jsonl",
            "DIR/recipe.toml: line 7: `data.held_out[0].path` is DIR/held_out.jsonl, which does not exist; give \
             the path of a text, JSON Lines or Parquet file",
        ),
        (
            "tokenizer",
            "DIR/recipe.toml: line 8: `data.tokenizer` is DIR/tokenizer, which does not exist; name a tokenizer.json or its \
             folder, or make one with `limbeck tokenizer train`",
        ),
    ];
    for (name, message) in cases {
        fs::rename(small.path(name), &moved).unwrap();
        for more in [&[][..], &["--dry-run"]] {
            refused(&small, "distill", more, 2, message);
        }
        fs::rename(&moved, small.path(name)).unwrap();
    }
    fs::rename(small.path("recipe.toml"), &moved).unwrap();
    refused(&small, "distill", &[], 2, "DIR/recipe.toml: no such recipe; check the path");
    fs::rename(&moved, small.path("recipe.toml")).unwrap();
    let pattern = ["--set", "data.sources=[{ path = \"web/*.jsonl\" }]"];
    refused(&small, "distill", &pattern, 1, "DIR/web/*.jsonl: no file matches; check the path");
    fs::remove_file(small.path("teacher/config.json")).unwrap();
    let message = "DIR/teacher/config.json: is missing; copy it from where the weights came from";
    refused(&small, "distill", &[], 1, message);
    assert!(!small.path("run").exists(), "a run that cannot begin leaves nothing");
}

#[test]
fn a_cache_made_with_another_tokenizer_is_refused() {
    let small = SmallRun::new();
    let few = ["--set", "data.tokens=500"];
    assert_eq!(small.limbeck("precompute-teacher-logits", &few).code, 0);
    let before = files(&small.path("run"));
    let reversed: Vec<String> = documents(1, 200).iter().map(|text| text.chars().rev().collect()).collect();
    let other = small.train_tokenizer("other", &reversed);
    assert_eq!(other.vocab_size(), small.vocab_size, "only the content differs");
    let outcome = small.limbeck("distill", &[&few[..], &["--set", "data.tokenizer=other"]].concat());
    assert_eq!(
        without_fingerprints(&small.shortened(&outcome.stderr)),
        format!(
            "error: the tokenizer differs: the finished cache DIR/run/cache/train has {size} tokens, fingerprint F..., this \
             run has {size} tokens, fingerprint F...; use the tokenizer it was begun with, or delete DIR/run/cache/train to \
             start afresh\n",
            size = small.vocab_size
        )
    );
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""));
    assert!(files(&small.path("run")) == before);
}

#[test]
fn a_tokenizer_that_is_not_the_teachers_own_is_refused() {
    let small = SmallRun::new();
    fs::copy(small.path("tokenizer/tokenizer.json"), small.path("teacher/tokenizer.json")).unwrap();
    assert_eq!(small.limbeck("distill", &["--dry-run"]).code, 0);
    let reversed: Vec<String> = documents(1, 200).iter().map(|text| text.chars().rev().collect()).collect();
    small.train_tokenizer("other", &reversed);
    let outcome = small.limbeck("distill", &["--set", "data.tokenizer=other"]);
    assert_eq!(
        without_fingerprints(&small.shortened(&outcome.stderr)),
        format!(
            "error: the tokenizer differs: `teacher.checkpoint` DIR/teacher has {size} tokens, fingerprint F..., \
             DIR/other/tokenizer.json has {size} tokens, fingerprint F...; make `data.tokenizer` the model's own, or leave \
             it away\n",
            size = small.vocab_size
        )
    );
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""));
}

#[test]
fn a_cache_of_another_teacher_is_refused() {
    let small = SmallRun::new();
    let few = ["--set", "data.tokens=500"];
    assert_eq!(small.limbeck("precompute-teacher-logits", &few).code, 0);
    let before = files(&small.path("run"));
    small.write_teacher(6);
    let outcome = small.limbeck("distill", &few);
    assert_eq!(
        without_fingerprints(&small.shortened(&outcome.stderr)),
        "error: the teacher differs: the finished cache DIR/run/cache/train has `teacher`, fingerprint F..., this run has \
         `teacher`, fingerprint F...; use the teacher it was begun with, or delete DIR/run/cache/train to start afresh\n"
    );
    assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""));
    assert!(files(&small.path("run")) == before);
}

#[test]
fn a_cache_of_other_data_is_refused() {
    let small = SmallRun::new();
    assert_eq!(small.limbeck("precompute-teacher-logits", &["--set", "data.tokens=500"]).code, 0);
    let changes = [["--set", "data.tokens=600"], ["--set", "seed=18"]];
    for change in changes {
        let outcome = small.limbeck("distill", &[&["--set", "data.tokens=500"][..], &change].concat());
        assert_eq!(
            without_fingerprints(&small.shortened(&outcome.stderr)),
            "error: the data differs: the finished cache DIR/run/cache/train has fingerprint F..., this run has fingerprint \
             F...; restore the [data] section, the seed and the files it was begun with, or delete DIR/run/cache/train to \
             start afresh\n"
        );
        assert_eq!((outcome.code, outcome.stdout.as_str()), (1, ""));
    }
}

/// The header of a safetensors file, and its data.
fn parts(path: &Path) -> (serde_json::Value, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..data]).unwrap(), bytes[data..].to_vec())
}

fn write_parts(path: &Path, header: &serde_json::Value, data: &[u8]) {
    let header = header.to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_truncated_or_absurd_weights_file_is_named() {
    let small = SmallRun::new();
    let weights = small.path("teacher/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let data = whole.len() - 8 - header;

    fs::write(&weights, &whole[..whole.len() - 100]).unwrap();
    let message = format!(
        "DIR/teacher/model.safetensors: tensor `lm_head.weight`: its data ends at byte {data}, but the file holds {} bytes \
         of data; the file is truncated: download it again",
        data - 100
    );
    refused(&small, "distill", &[], 1, &message);

    fs::write(&weights, &whole[..header / 2]).unwrap();
    let message = format!(
        "DIR/teacher/model.safetensors: its header should have {header} bytes, but only {} follow; it is truncated or not a \
         safetensors file: download it again",
        header / 2 - 8
    );
    refused(&small, "distill", &[], 1, &message);

    let mut absurd = whole.clone();
    absurd[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    fs::write(&weights, absurd).unwrap();
    let message = format!(
        "DIR/teacher/model.safetensors: its header should have {} bytes, but only {} follow; it is truncated or not a \
         safetensors file: download it again",
        1u64 << 60,
        whole.len() - 8
    );
    refused(&small, "distill", &[], 1, &message);

    fs::write(&weights, &whole).unwrap();
    let (mut header, data) = parts(&weights);
    header["model.norm.weight"]["shape"] = serde_json::json!([1u64 << 40, 1u64 << 40]);
    write_parts(&weights, &header, &data);
    refused(
        &small,
        "distill",
        &[],
        1,
        "DIR/teacher/model.safetensors: tensor `model.norm.weight`: shape [1099511627776, 1099511627776] of F32 overflows \
         64 bits; download it again",
    );
}

#[test]
fn a_tensor_of_the_wrong_shape_or_with_nan_is_named() {
    let small = SmallRun::new();
    let weights = small.path("teacher/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let router = "model.layers.1.feed_forward.router.weight";
    let (mut header, data) = parts(&weights);
    header[router]["shape"] = serde_json::json!([32, 4]);
    write_parts(&weights, &header, &data);
    let wrong_shape = format!(
        "DIR/teacher/model.safetensors: tensor `{router}`: expected shape [4, 32], found [32, 4]; check that config.json \
         belongs to these weights"
    );
    refused(&small, "distill", &[], 1, &wrong_shape);

    fs::write(&weights, &whole).unwrap();
    let (header, mut data) = parts(&weights);
    let start = header[router]["data_offsets"][0].as_u64().unwrap() as usize;
    data[start + 4 * 7..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    write_parts(&weights, &header, &data);
    let nan = format!(
        "DIR/teacher/model.safetensors: tensor `{router}`: contains NaN or infinite values, the first at element 7; \
         download it again, or go back to an earlier checkpoint"
    );
    refused(&small, "distill", &[], 1, &nan);
    refused(&small, "precompute-teacher-logits", &[], 1, &nan);

    // A missing tensor, with the nearest name.
    fs::write(&weights, &whole).unwrap();
    let (mut header, data) = parts(&weights);
    let tensors = header.as_object_mut().unwrap();
    let norm = tensors.remove("model.norm.weight").unwrap();
    tensors.insert("model.norn.weight".into(), norm);
    write_parts(&weights, &header, &data);
    refused(
        &small,
        "distill",
        &[],
        1,
        "DIR/teacher: tensor `model.norm.weight`: is missing, the nearest name is `model.norn.weight`; \
         check that config.json belongs to these weights, or download them again",
    );
}

#[test]
fn empty_text_and_text_that_is_not_utf8_are_named_with_their_place() {
    let small = SmallRun::new();
    let source = |name: &str| format!("data.sources=[{{ path = \"{name}\" }}]");
    let cases: [(&str, &[u8], &str); 5] = [
        (
            "empty.txt",
            b" \n",
            "DIR/empty.txt: record 1: the file has no text; give it some text, or take it out of the source",
        ),
        ("empty.jsonl", b"", "DIR/empty.jsonl: the source has no records; give it some text, or leave the source out"),
        (
            "latin.txt",
            b"caf\xe9 au lait",
            "DIR/latin.txt: record 1: not UTF-8 at byte 3 of the file; convert the file to UTF-8, for example with iconv",
        ),
        (
            "latin.jsonl",
            b"{\"text\": \"one\"}\n{\"text\": \"caf\xe9\"}\n",
            "DIR/latin.jsonl: record 2: not UTF-8 at byte 29 of the file; convert the file to UTF-8, for example with iconv",
        ),
        (
            "blank.jsonl",
            b"{\"text\": \"\"}\n",
            "DIR/blank.jsonl: no document of this source is left to train on; give it more documents, hold out less, or \
             leave the source out",
        ),
    ];
    for (name, content, message) in cases {
        fs::write(small.path(name), content).unwrap();
        refused(&small, "distill", &["--set", &source(name)], 1, message);
    }
    // Mended, the same run directory serves.
    let outcome = small.limbeck("precompute-teacher-logits", &["--set", "data.tokens=500"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
}

#[test]
fn numbers_beyond_a_model_are_refused_with_its_limit() {
    let small = SmallRun::new();
    let longer = [
        "--set",
        "data.seq_len=65",
        "--set",
        "train.batch_tokens=130",
        "--set",
        "train.micro_batch_tokens=130",
        "--set",
        "student.shape.max_position=128",
    ];
    let message = "DIR/recipe.toml: --set data.seq_len=65: `data.seq_len` is 65, but the teacher reads at most 64 positions; \
                   use at most 64";
    refused(&small, "distill", &longer, 2, message);
    refused(&small, "distill", &[&longer[..], &["--dry-run"]].concat(), 2, message);
    let message = "DIR/recipe.toml: --set data.seq_len=65: `data.seq_len` is 65, but the student reads at most 64 positions; \
                   use at most 64";
    refused(&small, "distill", &longer[..6], 2, message);

    let most = small.vocab_size;
    let message = format!(
        "DIR/recipe.toml: --set cache.top_k={}: `cache.top_k` is {}, but the teacher's vocabulary has {most} tokens; use at \
         most {most}",
        most + 1,
        most + 1
    );
    refused(&small, "distill", &["--set", &format!("cache.top_k={}", most + 1)], 2, &message);

    let config = Llama4Config { vocab_size: most - 1, ..scout(2, most) };
    fs::remove_dir_all(small.path("teacher")).unwrap();
    write_random(config, &small.path("teacher"), 5);
    let message = format!(
        "DIR/recipe.toml: `student.shape.vocab` gives a vocabulary of {most}, but the teacher's has {} tokens; student and \
         teacher must predict the same tokens",
        most - 1
    );
    refused(&small, "distill", &[], 2, &message);
}

fn write_ids(path: &Path, name: &str, shape: &[usize], ids: Vec<i64>) {
    let entry = SafetensorsEntry::new(name, Dtype::I64, shape.to_vec());
    let mut ids = Some(ids);
    let mut fetch = |_: &str| Ok(TensorData::from(ids.take().unwrap()));
    write_safetensors(path, &[entry], &BTreeMap::new(), &mut fetch).unwrap();
}

#[test]
fn token_ids_that_a_model_cannot_read_are_named() {
    let small = SmallRun::new();
    let (tokens, output) = (small.path("in.safetensors"), small.path("out.safetensors"));
    let logits = || {
        limbeck(&[
            "logits".as_ref(),
            small.path("teacher").as_os_str(),
            "--tokens".as_ref(),
            tokens.as_ref(),
            "--output".as_ref(),
            output.as_ref(),
        ])
    };
    let refused = |code: i32, message: &str| {
        let outcome = logits();
        assert_eq!(small.shortened(&outcome.stderr), format!("error: {message}\n"));
        assert_eq!((outcome.code, outcome.stdout.as_str()), (code, ""));
        assert!(!output.exists());
    };
    let last = small.vocab_size as i64 - 1;
    refused(1, "DIR/in.safetensors: does not exist; check the path, or download it");
    for id in [last + 1, -1] {
        write_ids(&tokens, "input_ids", &[1, 3], vec![1, id, 2]);
        let problem = format!("tensor `input_ids`: holds id {id}; ids go from 0 to {last}");
        refused(1, &format!("DIR/in.safetensors: {problem}"));
    }
    write_ids(&tokens, "input_ids", &[3], vec![1, 2, 3]);
    refused(1, "DIR/in.safetensors: tensor `input_ids`: has shape [3]; give it the shape [batch, sequence]");
    write_ids(&tokens, "tokens", &[1, 3], vec![1, 2, 3]);
    refused(1, "DIR/in.safetensors: tensor `input_ids`: is missing; give it as i64 of shape [batch, sequence]");
    write_ids(&tokens, "input_ids", &[1, 65], vec![1; 65]);
    refused(2, "sequence length 65 is over the model's maximum of 64; set seq_len to 64 or less");

    write_ids(&tokens, "input_ids", &[1, 3], vec![1, last, 2]);
    let outcome = logits();
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let written = read_safetensors(&output).unwrap();
    assert_eq!(written.info("logits").unwrap().shape, [1, 3, small.vocab_size]);
}

#[test]
fn a_prompt_that_leaves_no_room_is_refused() {
    let small = SmallRun::new();
    fs::copy(small.path("tokenizer/tokenizer.json"), small.path("teacher/tokenizer.json")).unwrap();
    let arguments = ["--prompt", "the", "--max-tokens", "80"];
    let teacher = small.path("teacher");
    let mut all = vec!["generate".as_ref(), teacher.as_os_str()];
    all.extend(arguments.iter().map(std::ffi::OsStr::new));
    let outcome = limbeck(&all);
    assert_eq!(
        outcome.stderr,
        "error: the prompt has 2 tokens, --max-tokens is 80, and the model reads at most 64 positions; ask for fewer \
         tokens, or shorten the prompt\n"
    );
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""));
}
