//! What limbeck writes, `transformers` reads: every weight finds its place, and the logits are equal.
//!
//! Runs where `$PYTHON` (`python3` when it is not set) can import torch and transformers; says on stderr when it is
//! skipped.

mod small_run;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use burn::tensor::Device;
use limbeck::checkpoint::{Dtype, SafetensorsEntry, TensorData, write_safetensors};
use limbeck::models::{DecoderConfig, read_config};
use limbeck::train::trainer::{Export, write_model};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use small_run::*;

/// The Python to test with; `None`, said on stderr, when it lacks what is needed.
fn python() -> Option<String> {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let probe = "import torch, transformers, safetensors; print(torch.__version__, transformers.__version__)";
    let reason = match Command::new(&python).args(["-c", probe]).output() {
        Ok(output) if output.status.success() => return Some(python),
        Ok(output) => {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            stderr.lines().last().unwrap_or("it failed").to_string()
        }
        Err(error) => error.to_string(),
    };
    // Past the capture of the test harness, which hides what a passing test prints.
    use std::io::Write;
    let _ = writeln!(
        std::io::stderr(),
        "SKIPPED: loading in transformers needs a Python with torch, transformers and safetensors, and `{python}` is none \
         ({reason}); set PYTHON to one that is"
    );
    None
}

/// Writes random token ids, has limbeck compute their logits, and `transformers` compare: what it found.
fn compare(python: &str, folder: &Path, checkpoint: &Path, vocab_size: usize, tolerance: f64, more: &[&str]) -> Value {
    let (tokens, logits) = (folder.join("tokens.safetensors"), folder.join("logits.safetensors"));
    let mut random = ChaCha8Rng::seed_from_u64(9);
    let ids: Vec<i64> = (0..2 * 40).map(|_| random.random_range(0..vocab_size as i64)).collect();
    let entry = SafetensorsEntry::new("input_ids", Dtype::I64, [2, 40]);
    write_safetensors(&tokens, &[entry], &BTreeMap::new(), &mut |_| Ok(TensorData::from(ids.clone()))).unwrap();
    let outcome = limbeck(&[
        "logits".as_ref(),
        checkpoint.as_ref(),
        "--tokens".as_ref(),
        tokens.as_ref(),
        "--output".as_ref(),
        logits.as_ref(),
    ]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    assert_eq!(outcome.stdout, format!("logits: {} [2, 40, {vocab_size}]\n", logits.display()));

    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/load_in_transformers.py");
    let mut command = Command::new(python);
    command.arg(script).args([checkpoint, &logits, &tokens]).args(["--tolerance", &tolerance.to_string()]).args(more);
    let output = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}: {stdout}{stderr}", checkpoint.display());
    let result: Value = serde_json::from_str(&stdout).unwrap();
    let counts = ["missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"].map(|kind| &result[kind]);
    assert_eq!((&result["ok"], counts), (&json!(true), [&json!(0); 4]), "{stdout}");
    assert!(result["max_difference"].as_f64().unwrap() <= tolerance, "{stdout}");
    assert!(result["max_abs_logit"].as_f64().unwrap() > 1.0, "logits that are all alike would prove little: {stdout}");
    result
}

/// As [`compare`], and that the weights are as many as they should be.
fn check(python: &str, folder: &Path, checkpoint: &Path, vocab_size: usize, parameters: u64) {
    let result = compare(python, folder, checkpoint, vocab_size, 2e-4, &[]);
    assert_eq!(result["parameters"], parameters, "{result}");
}

fn dense(vocab_size: usize, tied: bool) -> DecoderConfig {
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": tied,
        "vocab_size": vocab_size,
    });
    read_config(Path::new("dense"), &config).unwrap()
}

#[test]
fn a_student_loads_in_transformers_with_equal_logits() {
    let Some(python) = python() else { return };
    let small = SmallRun::new();
    let vocab_size = small.vocab_size;
    let tokenizer: Vec<(String, Vec<u8>)> = fs::read_dir(small.path("tokenizer"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap()))
        .collect();
    assert_eq!(tokenizer.len(), 3);
    let llama4 = |config: limbeck::models::llama4::Llama4Config| config.decoder(Path::new("student")).unwrap();
    let students = [
        ("scout", llama4(scout(4, vocab_size)), &tokenizer[..]),
        ("maverick", llama4(maverick(4, vocab_size)), &[]),
        ("dense", dense(vocab_size, false), &[]),
        ("dense-tied", dense(vocab_size, true), &tokenizer[..]),
    ];
    for (name, config, files) in students {
        let (parameters, _) = config.parameter_counts();
        let mut model = random_model(config, 7, &Device::flex());
        let checkpoint = small.path(name);
        write_model(&mut model, &checkpoint, &EXPORT, files, None).unwrap();
        check(&python, &small.path(""), &checkpoint, vocab_size, parameters);
        if name == "scout" {
            let sharded = small.path("scout-sharded");
            let export = Export { max_shard_bytes: Some(20_000), ..EXPORT };
            write_model(&mut model, &sharded, &export, files, None).unwrap();
            assert!(sharded.join("model.safetensors.index.json").is_file());
            check(&python, &small.path(""), &sharded, vocab_size, parameters);
        }
    }
}

/// Upcycled, with routers balanced by a bias, rounded weights and a running mean: nothing of this is in the format.
#[test]
fn a_trained_student_loads_in_transformers_whatever_it_was_trained_with() {
    let Some(python) = python() else { return };
    let small = SmallRun::new();
    let mut donor = random_model(dense(small.vocab_size, true), 7, &Device::flex());
    write_model(&mut donor, &small.path("donor"), &EXPORT, &[], None).unwrap();
    fs::copy(small.path("tokenizer/tokenizer.json"), small.path("donor/tokenizer.json")).unwrap();
    for shape in ["scout", "maverick"] {
        let (shape_key, run) = (format!("student.shape={{like=\"{shape}\"}}"), format!("run-{shape}"));
        let overrides = [
            "teacher.checkpoint=donor",
            &shape_key,
            "student.init={from=\"donor\", layers=[0, 1, 1], experts=4}",
            "train.steps=8",
            "train.router_balance={rate=0.05}",
            "train.precision=bf16",
            "train.ema=0.9",
            "control.enabled=false",
        ];
        limbeck::distill::run(&small.recipe(&overrides), &small.options(&run)).unwrap();
        let checkpoint = small.path(&run).join("checkpoints/step-000008");
        let model = limbeck::models::Decoder::open(&checkpoint, &Device::flex()).unwrap();
        let (parameters, _) = model.config.parameter_counts();
        check(&python, &small.path(""), &checkpoint, small.vocab_size, parameters);
        check(&python, &small.path(""), &checkpoint.join("ema"), small.vocab_size, parameters);
    }
}

/// What `limbeck export` writes of a trained student, in f32 and, as it does by itself, in bf16.
#[test]
fn an_exported_student_has_equal_logits_in_transformers_in_f32_and_in_bf16() {
    let Some(python) = python() else { return };
    let small = SmallRun::new();
    for shape in ["scout", "maverick", "llama"] {
        let run = format!("run-{shape}");
        let sizes = "layers=4, hidden=32, heads=4, kv_heads=2, head_dim=8, max_position=64";
        let family = match shape {
            "llama" => "dense_width=48",
            _ => "experts=4, expert_width=24, dense_width=48, chunk=16, nope_interval=2",
        };
        let overrides = [
            &format!("student.shape={{like=\"{shape}\", {sizes}, {family}}}"),
            "train.steps=8",
            "control.enabled=false",
        ];
        limbeck::distill::run(&small.recipe(&overrides), &small.options(&run)).unwrap();
        let trained = small.path(&run).join("checkpoints/step-000008");
        for (dtype, name) in [(Some("f32"), "float32"), (None, "bfloat16")] {
            let exported = small.path(&format!("{run}-{name}"));
            let mut arguments: Vec<&OsStr> =
                vec!["export".as_ref(), trained.as_ref(), "--output".as_ref(), exported.as_ref()];
            arguments.extend(dtype.iter().flat_map(|dtype| ["--dtype", dtype]).map(OsStr::new));
            let outcome = limbeck(&arguments);
            assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
            let more = ["--rounded-from", trained.to_str().unwrap(), "--in-bf16"];
            let result = compare(&python, &small.path(""), &exported, small.vocab_size, 1e-5, &more);
            assert_eq!(result["stored_dtypes"], json!([name]), "{shape}");
            let parameters = result["parameters"].as_u64().unwrap();
            let rounded = result["rounded_weights"].as_u64().unwrap();
            if name == "bfloat16" {
                assert!(rounded > parameters * 9 / 10, "trained weights of {shape} that bf16 holds: {result}");
                // There every activation is rounded as well, and a token may go to another expert.
                assert!(result["bf16"]["mean_kl"].as_f64().unwrap() <= 2e-4, "{shape}: {result}");
            } else {
                assert_eq!(rounded, 0, "{shape}");
            }
        }
    }
}
