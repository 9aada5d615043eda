//! A streamed teacher makes the cache that a resident one makes, to the last byte, in whatever memory, sweeps and files;
//! it reads no more than it needs; and what goes wrong on the way leaves nothing wrong behind.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::{Device, Tensor};
use limbeck::cache::{CacheReader, WriterPart};
use limbeck::checkpoint::{CheckpointReader, Dtype, SafetensorsEntry, TensorData, read_safetensors, write_safetensors};
use limbeck::models::llama4::Llama4Config;
use limbeck::models::{
    Decoder, DecoderConfig, Expert, RoutedLayer, TokenLayout, ends, parameter::CheckpointWeights, read_config,
};
use limbeck::run::RunOptions;
use limbeck::selection::Selection;
use limbeck::targets::{PackedSequence, SparseTargets};
use limbeck::teacher::{ResidentTeacher, Spill, StreamCounts, StreamSettings, StreamedTeacher};
use limbeck::{Error, Result, precompute};
use limbeck_kernels::packed_matmul::Numbers;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use small_run::*;

const LENGTH: usize = 32;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Packed documents of random ids.
fn sequences(vocab: usize, count: usize) -> Vec<PackedSequence> {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut document = || (0..random.random_range(2..40)).map(|_| random.random_range(0..vocab as u32)).collect();
    let documents: Vec<Vec<u32>> = (0..3 * count).map(|_| document()).collect();
    let mut packed = limbeck::data::pack(&documents, LENGTH, 0);
    assert!(packed.len() >= count);
    packed.truncate(count);
    packed
}

fn config_of(reader: &CheckpointReader, dir: &Path) -> DecoderConfig {
    read_config(&dir.join("config.json"), reader.config()).unwrap()
}

fn settings(memory: u64, spill_dir: &Path) -> StreamSettings {
    StreamSettings {
        numbers: Numbers::F32,
        memory,
        taken: vec![],
        batch_tokens: 96,
        sweep_tokens: None,
        spill: Spill::Auto,
        spill_dir: spill_dir.into(),
    }
}

const PLENTY: u64 = 1 << 30;

fn streamed(checkpoint: &Path, selection: Selection, settings: StreamSettings) -> Result<StreamedTeacher> {
    let reader = Arc::new(CheckpointReader::open(checkpoint)?);
    let config = config_of(&reader, checkpoint);
    StreamedTeacher::new(config, reader, &Device::flex(), selection, &[1.0, 2.0], LENGTH, settings)
}

/// The targets of all sequences, and what it took.
fn run_streamed(
    checkpoint: &Path,
    selection: Selection,
    sequences: &[PackedSequence],
    settings: StreamSettings,
) -> (Vec<SparseTargets>, StreamCounts) {
    let mut teacher = streamed(checkpoint, selection, settings).unwrap();
    let numbered: Vec<(u64, &PackedSequence)> = (5..).zip(sequences).collect();
    let mut all = vec![];
    let give = &mut |place, targets| {
        assert_eq!(place, all.len(), "in order");
        all.push(targets);
        Ok(())
    };
    assert!(teacher.targets(&numbered, false, &AtomicBool::new(false), give).unwrap());
    (all, teacher.counts())
}

/// The least memory that a teacher says it needs, in bytes.
fn least(checkpoint: &Path, spill: Spill) -> u64 {
    let error = streamed(checkpoint, Selection::TopK { k: 8 }, StreamSettings { spill, ..settings(0, Path::new("")) });
    let Err(error) = error else { panic!("nothing fits into no memory") };
    let text = error.to_string();
    let number = text.split("at least ").nth(1).and_then(|rest| rest.split(", by").next()).expect(&text);
    let digits: u64 = number.trim_end_matches(|c: char| c.is_alphabetic()).parse().unwrap();
    digits << if number.ends_with("KiB") { 10 } else { 20 }
}

/// A tiny Llama 4 in which each token chooses two of six experts, and none is near a seventh's.
fn two_of_six(dir: &Path) {
    let config = Llama4Config { num_local_experts: 6, num_experts_per_tok: 2, ..scout(3, 300) };
    write_random(config, dir, 3);
}

#[test]
fn every_memory_sweep_and_file_gives_the_resident_teachers_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (two, spill) = (folder.path().join("two"), folder.path().join("spill"));
    two_of_six(&two);
    let checkpoints = [
        fixture("llama3_tiny"),
        fixture("qwen3_tiny"),
        fixture("llama4/scout_tiny"),
        fixture("llama4/maverick_tiny"),
        fixture("llama4/scout_tiny_bf16_sharded"),
        fixture("llama4/maverick_tiny_meta_native"),
        fixture("quantised/fp8_blocks"),
        fixture("quantised/fp8_channels"),
        fixture("quantised/fp8_fused"),
        fixture("gguf/llama.gguf"),
        fixture("gguf/llama4.gguf"),
        two,
    ];
    for checkpoint in &checkpoints {
        let name = checkpoint.display();
        let vocab = config_of(&CheckpointReader::open(checkpoint).unwrap(), checkpoint).vocab_size;
        let sequences = sequences(vocab, 13);
        for selection in [Selection::TopK { k: 8 }, Selection::Sampled { draws: 5, seed: 3 }] {
            let resident = ResidentTeacher::open(checkpoint, &Device::flex(), selection.clone(), &[1.0, 2.0]).unwrap();
            let expected = resident.targets(&sequences, 5).unwrap();
            let plenty = || settings(PLENTY, &spill);
            let in_little = settings(least(checkpoint, Spill::Auto), &spill);
            let cases = [
                ("plenty of memory", plenty(), 0),
                ("the least memory", in_little, 1),
                (
                    "the least memory without a file",
                    { StreamSettings { spill: Spill::Never, ..settings(least(checkpoint, Spill::Never), &spill) } },
                    0,
                ),
                ("sweeps of one sequence", StreamSettings { sweep_tokens: Some(1), ..plenty() }, 0),
                (
                    "sweeps of five in batches of one",
                    { StreamSettings { sweep_tokens: Some(5 * 32), batch_tokens: 1, ..plenty() } },
                    0,
                ),
                ("a file", StreamSettings { spill: Spill::Always, ..plenty() }, 1),
            ];
            for (what, settings, spilled) in cases {
                let (found, counts) = run_streamed(checkpoint, selection.clone(), &sequences, settings);
                assert!(found == expected, "{name}, {selection:?}, {what}: other targets");
                assert_eq!(counts.tokens, 13 * 32, "{name}, {what}");
                assert_eq!(counts.spilled_sweeps > 0, spilled > 0, "{name}, {what}: {counts:?}");
            }
        }
    }
    assert_eq!(fs::read_dir(&spill).unwrap().count(), 0, "the files have no names");
}

#[test]
fn what_does_not_fit_is_said_before_anything_is_computed_and_the_least_that_is_named_does() {
    let small = SmallRun::new();
    let refused = |more: &[&str]| {
        let outcome = small.limbeck("precompute-teacher-logits", &[&["--set", "teacher.mode=streamed"], more].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""), "{}", outcome.stderr);
        assert!(!small.path("run/cache/train/shards").join("00000.safetensors").exists());
        outcome.stderr
    };
    let message = refused(&["--set", "teacher.memory=\"1MiB\""]);
    // The part that asks for most is named first.
    assert!(
        message.starts_with("error: the streamed teacher does not fit into 1MiB of memory; it takes the program ")
            && message.contains(", a shard in the making ")
            && message.contains(", two parts of its weights ")
            && message.contains(", one sequence's scratch ")
            && message.contains(", one sequence's hidden states "),
        "{message}"
    );
    let least = message.split("give it at least ").nth(1).unwrap().split(',').next().unwrap().to_string();

    // What is taken varies a little from one start to the next.
    let mebibytes: u64 = least.trim_end_matches("MiB").parse().unwrap();
    let memory = format!("teacher.memory=\"{}MiB\"", mebibytes + 8);
    let outcome =
        small.limbeck("precompute-teacher-logits", &["--set", "teacher.mode=streamed", "--set", memory.as_str()]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
}

/// A cache made by a recipe with these overrides, file by file.
fn cache(small: &SmallRun, run: &str, overrides: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    files(&precompute::run(&small.recipe(overrides), &small.options(run)).unwrap())
}

const STREAMED: &str = "teacher.mode=streamed";

#[test]
fn the_cache_of_a_streamed_teacher_is_that_of_a_resident_one() {
    let small = SmallRun::new();
    for (number, codec) in ["raw", "compact"].into_iter().enumerate() {
        let codec = format!("cache.codec={codec}");
        let expected = cache(&small, &format!("resident{number}"), &[&codec]);
        let cases: [&[&str]; 5] = [
            &[],
            &["teacher.memory=\"600MB\"", "teacher.sweep_tokens=32"],
            // Sweeps that end within shards, and shards within sweeps.
            &["teacher.sweep_tokens=2k", "teacher.batch_tokens=40"],
            &["teacher.spill=always", "teacher.sweep_tokens=1k"],
            &["teacher.spill=never", "teacher.memory=\"1GiB\""],
        ];
        for (case, overrides) in cases.into_iter().enumerate() {
            let overrides = [&[codec.as_str(), STREAMED], overrides].concat();
            let found = cache(&small, &format!("streamed{number}.{case}"), &overrides);
            assert!(found == expected, "{overrides:?}");
        }
    }
    for run in fs::read_dir(small.path("")).unwrap().map(|entry| entry.unwrap().path()) {
        let names = fs::read_dir(run).into_iter().flatten().map(|entry| entry.unwrap().file_name());
        assert!(!names.into_iter().any(|name| name.to_string_lossy().contains("tmp")), "nothing is left over");
    }
}

#[test]
fn parts_and_other_teachers_modes_make_one_cache_together() {
    let small = SmallRun::new();
    let expected = cache(&small, "resident", &["cache.sequences_per_shard=9"]);
    // One part resident and two streamed, in sweeps longer than a shard.
    for (index, mode) in [(0, "teacher.mode=resident"), (1, STREAMED), (2, STREAMED)] {
        let part: WriterPart = format!("{}/3", index + 1).parse().unwrap();
        let options = RunOptions { part, ..small.options("parts") };
        precompute::run_part(&small.recipe(&["cache.sequences_per_shard=9", mode]), &options).unwrap();
    }
    assert!(files(&small.path("parts/cache")) == expected);

    // Targets of other caches are taken over, and only the others computed.
    let reuse = format!("cache.reuse=[\"{}\"]", small.path("resident/cache").display());
    let longer = cache(&small, "longer", &["data.tokens=\"8k\""]);
    let found = cache(&small, "reused", &["data.tokens=\"8k\"", STREAMED, &reuse]);
    assert!(found == longer);
}

#[test]
fn experts_that_nobody_chose_are_not_read_and_each_other_one_once() {
    for chosen in [1, 3] {
        experts_are_read_once(chosen);
    }
}

fn experts_are_read_once(chosen: usize) {
    let folder = tempfile::tempdir().unwrap();
    let config = Llama4Config { num_local_experts: 8, num_experts_per_tok: chosen, ..scout(3, 300) };
    let hidden = config.hidden_size as u64;
    let expert_bytes = 3 * hidden * config.intermediate_size as u64 * 4;
    let (dir, sequences) = (folder.path().join("teacher"), sequences(300, 10));
    write_random(config, &dir, 3);

    let bytes_of = |rows: &mut dyn FnMut(usize, &mut [f32])| {
        change_routers(&dir, rows);
        let resident = ResidentTeacher::open(&dir, &Device::flex(), Selection::TopK { k: 8 }, &[1.0, 2.0]).unwrap();
        let expected = resident.targets(&sequences, 5).unwrap();
        // Two sweeps, and pieces of one expert that are smaller than what it takes.
        let settings = StreamSettings { sweep_tokens: Some(5 * 32), ..settings(PLENTY, folder.path()) };
        let (found, counts) = run_streamed(&dir, Selection::TopK { k: 8 }, &sequences, settings);
        assert!(found == expected);
        assert_eq!(counts.sweeps, 2);
        assert_eq!(counts.experts_read + counts.experts_left_out, 2 * 3 * 8);
        (counts.bytes_read, counts.experts_read)
    };
    // Ties go to the first experts: they take all tokens.
    let (least_bytes, least) = bytes_of(&mut |_, row| row.fill(0.0));
    assert_eq!(least, 2 * 3 * chosen as u64, "in each layer and sweep");
    let check = |what: &str, (bytes, read): (u64, u64)| {
        assert!((least..=2 * 3 * 8).contains(&read), "{what}: {read}");
        assert_eq!(
            bytes - least_bytes,
            (read - least) * expert_bytes,
            "{what}: what the others have, and nothing beside"
        );
        read
    };
    if chosen == 1 {
        // Experts 2 and 5 of each layer share the tokens by a sign.
        let two = bytes_of(&mut |expert, row| {
            row.fill(0.0);
            row[0] = match expert {
                2 => 1.0,
                5 => -1.0,
                _ => 0.0,
            };
        });
        assert_eq!(check("two", two), 2 * 3 * 2);
    }
    // Loads of all kinds: even ones, and some experts much more often chosen than others, which may have no token at all.
    let mut random = ChaCha8Rng::seed_from_u64(chosen as u64);
    let mut reads = vec![];
    for bias in [0.0, 0.5, 4.0, 4.0, 30.0, 30.0] {
        let load = bytes_of(&mut |_, row| {
            let all: f32 = bias * random.random_range(-1.0..1.0);
            row.iter_mut().for_each(|weight| *weight = random.random_range(-1.0..1.0) + all);
        });
        reads.push(check(&format!("loads uneven by {bias}"), load));
    }
    assert!(reads[0] > reads[5], "some have none when loads are uneven: {reads:?}");
}

/// Changes the routers of a checkpoint row by row, that is, expert by expert.
fn change_routers(dir: &Path, change: &mut dyn FnMut(usize, &mut [f32])) {
    let path = dir.join("model.safetensors");
    let file = read_safetensors(&path).unwrap();
    let names: Vec<String> = file.names().map(String::from).collect();
    let tensors: Vec<(String, Vec<usize>, Vec<f32>)> = names
        .into_iter()
        .map(|name| {
            let shape = file.info(&name).unwrap().shape.clone();
            let mut values = file.load_f32(&name, &shape).unwrap();
            if name.ends_with("router.weight") {
                values.chunks_mut(shape[1]).enumerate().for_each(|(expert, row)| change(expert, row));
            }
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

#[test]
fn layers_in_pieces_equal_the_goldens() {
    for name in ["llama4/scout_tiny", "llama4/maverick_tiny", "llama3_tiny"] {
        let dir = fixture(name);
        let golden = read_safetensors(dir.join("golden.safetensors")).unwrap();
        let floats = |key: &str| golden.load_f32(key, &golden.info(key).unwrap().shape).unwrap();
        let reader = CheckpointReader::open(&dir).unwrap();
        let (config, source, device) = (config_of(&reader, &dir), CheckpointWeights::new(&reader), Device::flex());
        let ids: Vec<u32> = golden.load_i64("input_ids").unwrap().into_iter().map(|id| id as u32).collect();
        let length = golden.info("input_ids").unwrap().shape[1];
        let layout = TokenLayout::of_documents(&config, ids.clone(), length);
        let width = config.hidden_size;
        let row = |&id: &u32| ends::embedding_rows(&config, &source, id as usize..id as usize + 1, &device).unwrap();
        let rows = ids.iter().flat_map(row);
        let embedded = burn::tensor::TensorData::new(rows.collect::<Vec<f32>>(), [ids.len(), width]);
        let mut hidden = Tensor::<2>::from_data(embedded, &device);
        for index in 0..config.layers.len() {
            hidden = match RoutedLayerOrDense::load(&config, index, &source, &device) {
                RoutedLayerOrDense::Dense(layer) => layer.forward(hidden, &layout).hidden,
                RoutedLayerOrDense::Routed(layer, experts) => {
                    let attended = layer.attend(hidden, &layout);
                    let choices = layer.choose(attended.clone());
                    let indices = golden.load_i64(&format!("router.{index}.indices")).unwrap();
                    let chosen: Vec<i64> = choices.experts.iter().map(|&expert| expert as i64).collect();
                    assert_eq!(chosen, indices, "{name} block {index}");
                    assert_eq!(chosen.len(), ids.len(), "one expert for each token");
                    let update = layer.shared(attended.clone());
                    // Token by token: what an expert gives does not depend on the others it is given.
                    let all = attended.clone();
                    let routed = (0..ids.len()).map(|token| {
                        let row = all.clone().narrow(0, token, 1);
                        let expert = &experts[choices.experts[token] as usize];
                        layer.routed(expert, row, vec![choices.scores[token]])
                    });
                    attended + (update + Tensor::cat(routed.collect(), 0))
                }
            };
            within(&format!("{name} block {index}"), hidden.clone(), &floats(&format!("hidden.{index}")), 1e-4);
        }
        let normed = ends::FinalNorm::load(&config, &source, &device).unwrap().forward(hidden);
        let middle = config.vocab_size / 3;
        let blocks = [0..middle, middle..config.vocab_size]
            .map(|ids| ends::HeadBlock::load(&config, ids, &source, &device).unwrap().logits(normed.clone()));
        within(name, Tensor::cat(blocks.to_vec(), 1), &floats("logits"), 2e-4);
    }
}

enum RoutedLayerOrDense {
    Dense(Box<limbeck::models::Layer>),
    Routed(Box<RoutedLayer>, Vec<Expert>),
}

impl RoutedLayerOrDense {
    fn load(config: &DecoderConfig, index: usize, source: &CheckpointWeights<'_>, device: &Device) -> Self {
        use limbeck::models::{Layer, config::FeedForwardConfig};
        match config.layers[index].feed_forward {
            FeedForwardConfig::Dense { .. } => {
                RoutedLayerOrDense::Dense(Box::new(Layer::load_for_inference(config, index, source, device).unwrap()))
            }
            FeedForwardConfig::Experts { expert_count, .. } => {
                let experts = (0..expert_count).map(|expert| Expert::load(config, index, expert, source, device));
                let layer = RoutedLayer::load(config, index, source, device).unwrap();
                RoutedLayerOrDense::Routed(Box::new(layer), experts.collect::<Result<_>>().unwrap())
            }
        }
    }
}

fn within(what: &str, ours: Tensor<2>, golden: &[f32], tolerance: f32) {
    let ours = ours.into_data().try_into_vec::<f32>().unwrap();
    assert_eq!(ours.len(), golden.len(), "{what}");
    for (place, (a, b)) in ours.iter().zip(golden).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{place}]: {a} instead of {b}");
    }
}

#[test]
fn an_interrupted_sweep_keeps_what_is_sealed_and_goes_on_to_the_same_bytes() {
    let small = SmallRun::new();
    let overrides = ["cache.sequences_per_shard=9", STREAMED, "teacher.sweep_tokens=640"];
    let expected = cache(&small, "whole", &overrides);
    let (recipe, options) = (small.recipe(&overrides), small.options("parts"));
    let train = small.path("parts/cache/train/shards");
    let sealed = || {
        let names = fs::read_dir(&train).into_iter().flatten().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).count()
    };
    let mut interrupted = 0;
    loop {
        options.stop.store(false, Ordering::Relaxed);
        let (over, before) = (AtomicBool::new(false), sealed());
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                while sealed() == before && !over.load(Ordering::Relaxed) {
                    std::thread::sleep(std::time::Duration::from_micros(100));
                }
                options.stop.store(true, Ordering::Relaxed);
            });
            let result = precompute::run(&recipe, &options);
            over.store(true, Ordering::Relaxed);
            result
        });
        match result {
            Err(error @ Error::Interrupted { .. }) => assert_eq!(error.exit_code(), 130),
            Err(error) => panic!("{error}"),
            Ok(_) => break,
        }
        interrupted += 1;
        assert!(interrupted < 100);
    }
    assert!(interrupted > 0, "it was never interrupted");
    assert!(files(&small.path("parts/cache")) == expected);
}

#[test]
fn a_stopped_teacher_gives_what_it_gave_and_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = fixture("llama4/scout_tiny");
    let sequences = sequences(64, 6);
    let mut teacher = streamed(
        &checkpoint,
        Selection::TopK { k: 8 },
        StreamSettings { sweep_tokens: Some(64), ..settings(PLENTY, folder.path()) },
    )
    .unwrap();
    let numbered: Vec<(u64, &PackedSequence)> = (0..).zip(&sequences).collect();
    let stop = AtomicBool::new(false);
    let mut given = 0;
    let finished = teacher.targets(&numbered, false, &stop, &mut |_, _| {
        given += 1;
        stop.store(given >= 3, Ordering::Relaxed);
        Ok(())
    });
    assert!(!finished.unwrap());
    assert!((3..6).contains(&given), "{given}");
}

#[test]
fn what_is_read_ahead_for_sequences_to_come_is_used_or_dropped() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama4/scout_tiny", "llama3_tiny"] {
        let checkpoint = fixture(name);
        let vocab = config_of(&CheckpointReader::open(&checkpoint).unwrap(), &checkpoint).vocab_size;
        let sequences = sequences(vocab, 6);
        let sweeps_of_two = || StreamSettings { sweep_tokens: Some(64), ..settings(PLENTY, folder.path()) };
        let (expected, counts) = run_streamed(&checkpoint, Selection::TopK { k: 8 }, &sequences, sweeps_of_two());

        let mut teacher = streamed(&checkpoint, Selection::TopK { k: 8 }, sweeps_of_two()).unwrap();
        let numbered: Vec<(u64, &PackedSequence)> = (5..).zip(&sequences).collect();
        let mut found = vec![];
        for (first, more) in [(0, true), (2, true), (4, false)] {
            let give = &mut |_, targets| {
                found.push(targets);
                Ok(())
            };
            let asked = &numbered[first..first + 2];
            assert!(teacher.targets(asked, more, &AtomicBool::new(false), give).unwrap());
        }
        assert!(found == expected, "{name}");
        assert_eq!(teacher.counts(), counts, "{name}: no byte is read twice");

        // A sweep that ends early leaves something else behind than what the next one begins with.
        let stop = AtomicBool::new(false);
        let stopped = teacher.targets(&numbered, true, &stop, &mut |_, _| {
            stop.store(true, Ordering::Relaxed);
            Ok(())
        });
        assert!(!stopped.unwrap());
        let failed = teacher.targets(&numbered, true, &AtomicBool::new(false), &mut |place, _| match place {
            3 => Err(Error::usage("enough", "stop")),
            _ => Ok(()),
        });
        assert!(failed.unwrap_err().to_string().starts_with("enough"));
        found.clear();
        let give = &mut |_, targets| {
            found.push(targets);
            Ok(())
        };
        assert!(teacher.targets(&numbered, false, &AtomicBool::new(false), give).unwrap());
        assert!(found == expected, "{name}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_streamed_run_with_what_is_sealed_and_the_same_command_goes_on_to_the_same_bytes() {
    use std::process::{Command, Stdio};
    let small = SmallRun::new();
    // Sweeps of one sequence, so that there is time to interrupt it.
    let overrides = ["cache.sequences_per_shard=9", STREAMED, "teacher.sweep_tokens=32", "data.tokens=20k"];
    let arguments: Vec<&str> = overrides.iter().flat_map(|word| ["--set", word]).collect();
    let (recipe, run_dir) = (small.path("recipe.toml"), small.path("run"));
    let mut child = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(["precompute-teacher-logits", recipe.to_str().unwrap(), "--run-dir", run_dir.to_str().unwrap()])
        .args(&arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let first = run_dir.join("cache/train/shards/00000.safetensors");
    while !first.exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it sealed anything");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]), "{stderr}");
    let train = run_dir.join("cache/train");
    let end = format!("error: interrupted; state saved in {}, run the same command again to go on\n", train.display());
    assert!(stderr.ends_with(&end), "{stderr}");
    assert!(CacheReader::open(&train).is_err(), "nothing takes it for a finished cache");
    let sealed = fs::read(&first).unwrap();

    let outcome = small.limbeck("precompute-teacher-logits", &arguments);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(fs::read(&first).unwrap() == sealed);
    let expected = cache(&small, "resident", &["cache.sequences_per_shard=9", "data.tokens=20k"]);
    assert!(files(&small.path("run/cache")) == expected);
}

#[test]
fn a_checkpoint_that_shrinks_while_it_is_read_is_an_error_and_not_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(scout(2, 300), &dir, 3);
    let sequences = sequences(300, 3);
    let mut teacher = streamed(&dir, Selection::TopK { k: 8 }, settings(PLENTY, folder.path())).unwrap();
    let path = dir.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    // In place, as a download that begins again would.
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(whole.len() as u64 / 2).unwrap();
    let numbered: Vec<(u64, &PackedSequence)> = (0..).zip(&sequences).collect();
    let mut given = 0;
    let error = teacher
        .targets(&numbered, false, &AtomicBool::new(false), &mut |_, _| {
            given += 1;
            Ok(())
        })
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with(&format!("{}: tensor `model.", path.display()))
            && error.ends_with(
                "the file ends within it, and did not when it was opened; leave the checkpoint alone while it is read, \
                 or download it again"
            ),
        "{error}"
    );
    assert_eq!(given, 0);
    // Whole again, it goes on.
    fs::write(&path, whole).unwrap();
    assert!(teacher.targets(&numbered, false, &AtomicBool::new(false), &mut |_, _| Ok(())).unwrap());
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_stops_the_run_and_seals_nothing_wrong() {
    use std::process::{Command, Stdio};
    let small = SmallRun::new();
    let overrides = ["cache.sequences_per_shard=2", STREAMED, "teacher.spill=always", "teacher.sweep_tokens=4k"];
    let expected = cache(&small, "whole", &overrides);
    // No file may grow beyond 96 KiB, which the shards and the other files of this run stay below and its hidden states
    // do not.
    let words = overrides.iter().map(|word| format!("--set {word}")).collect::<Vec<_>>().join(" ");
    let command = format!(
        "trap '' XFSZ; ulimit -f 96; exec {} precompute-teacher-logits {} --run-dir {} {words}",
        env!("CARGO_BIN_EXE_limbeck"),
        small.path("recipe.toml").display(),
        small.path("run").display()
    );
    let output = Command::new("bash").args(["-c", &command]).stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let message = "DIR/run: the hidden states that do not fit into memory cannot be written here: ";
    assert!(
        small.shortened(&stderr).contains(message)
            && stderr.ends_with(
                "; make room there, raise `teacher.memory`, or lower `teacher.sweep_tokens`; what is sealed is kept\n"
            ),
        "{stderr}"
    );
    // The same command goes on when there is room.
    assert!(cache(&small, "run", &overrides) == expected);
    CacheReader::open(small.path("run/cache/train")).unwrap();
}

#[test]
fn ids_beyond_the_vocabulary_and_other_lengths_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut teacher =
        streamed(&fixture("llama3_tiny"), Selection::TopK { k: 8 }, settings(PLENTY, folder.path())).unwrap();
    let mut refused = |sequence: &PackedSequence| {
        teacher.targets(&[(4, sequence)], false, &AtomicBool::new(false), &mut |_, _| Ok(())).unwrap_err().to_string()
    };
    let message = refused(&PackedSequence { tokens: vec![9_999_999; 33], segments: vec![0; 33] });
    assert!(message.starts_with("the data has token id 9999999, and the teacher's vocabulary has "), "{message}");
    let message = refused(&PackedSequence { tokens: vec![1; 5], segments: vec![0; 5] });
    assert_eq!(message, "sequence 4 has 4 predictions, not 32; give sequences of one length");
}

/// The decoder itself, as a control of what the tests above compare with.
#[test]
fn a_resident_teacher_for_inference_is_close_to_its_tensors() {
    let dir = fixture("llama4/scout_tiny");
    let device = Device::flex();
    let (packed, tensors) =
        (Decoder::open_for_inference(&dir, &device).unwrap(), Decoder::open(&dir, &device).unwrap());
    let layout = TokenLayout::of_documents(&tensors.config, (0..LENGTH as u32).collect(), LENGTH);
    let golden = tensors.forward(&layout).0.into_data().try_into_vec::<f32>().unwrap();
    within("hidden states", packed.forward(&layout).0, &golden, 1e-4);
}
