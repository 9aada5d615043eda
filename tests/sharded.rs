//! A teacher divided over several devices gives what it gives on one; each device reads its own part of the weights; and
//! a device that fails ends the run without anything wrong sealed.
//!
//! Meshes without a `tensor` axis give the same bits on the processor. With one, sums are added up in parts, and targets
//! are compared as `sharded_run` says.

mod sharded_run;
mod small_run;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use limbeck::checkpoint::{CheckpointReader, read_safetensors};
use limbeck::models::llama4::{Llama4Config, sharding};
use limbeck::parallel::{Axis, Collective, Mesh, Operation, in_process};
use limbeck::selection::Selection;
use limbeck::targets::PackedSequence;
use limbeck::teacher::{ResidentTeacher, ShardedTeacher, sharded};
use limbeck::{Error, Result, precompute};
use sharded_run::*;
use small_run::*;

fn check_meshes(checkpoint: &Path, selection: Selection, meshes: &[Mesh], count: usize) {
    let sequences = sequences(config_of(checkpoint).vocab_size, count);
    let resident = ResidentTeacher::open(checkpoint, &Device::flex(), selection.clone(), &[1.0, 2.0]).unwrap();
    let expected = resident.targets(&sequences, 5).unwrap();
    for mesh in meshes {
        let what = format!("{}, {selection:?}, {mesh}", checkpoint.display());
        let mut teacher = sharded_teacher(checkpoint, *mesh, selection.clone()).unwrap();
        let found = teacher.targets(&numbered(&sequences)).unwrap();
        assert_eq!(found.len(), expected.len(), "{what}");
        if mesh.tensor == 1 {
            assert!(found == expected, "{what}: other bits");
        } else {
            assert_close(&what, &joined(&found), &joined(&expected));
        }
    }
}

#[test]
fn a_dense_teacher_on_two_to_four_devices_gives_what_it_gives_on_one() {
    let folder = tempfile::tempdir().unwrap();
    let models = [
        ("llama", serde_json::json!({})),
        ("tied", serde_json::json!({ "tie_word_embeddings": true, "num_key_value_heads": 4 })),
        ("qwen2", serde_json::json!({ "model_type": "qwen2", "num_key_value_heads": 6 })),
        ("qwen3", serde_json::json!({ "model_type": "qwen3", "num_key_value_heads": 1 })),
    ];
    for (name, more) in models {
        let dir = folder.path().join(name);
        write_dense(&dir, more);
        check_meshes(&dir, Selection::TopK { k: 8 }, &DENSE_MESHES, 11);
    }
}

#[test]
fn a_teacher_with_experts_on_two_to_four_devices_gives_what_it_gives_on_one() {
    let folder = tempfile::tempdir().unwrap();
    let models = [
        ("one of twelve", divisible(4, 300, 1)),
        ("three of twelve", divisible(4, 300, 3)),
        ("a maverick", Llama4Config { moe_layers: vec![1, 3], use_qk_norm: false, ..divisible(4, 300, 1) }),
    ];
    for (name, config) in models {
        let dir = folder.path().join(name);
        write_random(config, &dir, 3);
        check_meshes(&dir, Selection::default(), &[&EXPERT_MESHES[..], &DENSE_MESHES].concat(), 11);
    }
}

#[test]
fn every_form_of_weights_can_be_divided() {
    let forms = [
        "llama4/scout_tiny_bf16_sharded",
        "llama4/maverick_tiny_meta_native",
        "quantised/fp8_channels",
        "quantised/fp8_fused",
        "gguf/llama4.gguf",
    ];
    for name in forms {
        // Some have two heads, some three experts.
        let config = config_of(&fixture(name));
        let fits = |mesh: &Mesh| sharding::check(&config, mesh).is_ok();
        let meshes: Vec<Mesh> = DENSE_MESHES.into_iter().chain(EXPERT_MESHES).filter(fits).collect();
        for axis in [Axis::Data, Axis::Pipeline, Axis::Expert, Axis::Tensor] {
            assert!(meshes.iter().any(|mesh| mesh.along(axis) > 1), "{name}: {axis:?}");
        }
        check_meshes(&fixture(name), Selection::TopK { k: 8 }, &meshes, 5);
    }
}

/// Weights as tensors, as devices beside the processor have them, instead of packed ones.
#[test]
fn weights_as_tensors_are_divided_as_packed_ones_are() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(4, 300, 2), &dir, 3);
    let (device, sequences) = (Device::flex().autodiff(), sequences(300, 7));
    let resident = ResidentTeacher::open(&dir, &device, Selection::TopK { k: 8 }, &[1.0, 2.0]).unwrap();
    let expected = joined(&resident.targets(&sequences, 5).unwrap());
    let meshes = [
        Mesh { expert: 3, ..ONE },
        Mesh { tensor: 4, ..ONE },
        Mesh { pipeline: 2, ..ONE },
        Mesh { expert: 2, tensor: 2, ..ONE },
    ];
    for mesh in meshes {
        let settings = settings(&dir, mesh, Selection::TopK { k: 8 });
        let mut teacher = ShardedTeacher::in_process(&settings, &vec![device.clone(); mesh.size()]).unwrap();
        let found = joined(&teacher.targets(&numbered(&sequences)).unwrap());
        assert_close(&mesh.to_string(), &found, &expected);
    }
}

#[test]
fn every_axis_at_once_and_ranks_without_sequences_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(4, 300, 2), &dir, 3);
    let meshes = [
        Mesh { expert: 2, tensor: 2, pipeline: 2, data: 2 },
        Mesh { expert: 3, tensor: 1, pipeline: 4, data: 1 },
        Mesh { expert: 12, ..ONE },
    ];
    // Two sequences on up to twelve ranks that attend.
    check_meshes(&dir, Selection::TopK { k: 8 }, &meshes, 2);
    check_meshes(&dir, Selection::TopK { k: 8 }, &meshes, 1);
    check_meshes(&dir, Selection::TopK { k: 8 }, &meshes[..2], 23);
}

#[test]
fn every_selection_is_made_from_a_head_in_pieces() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(2, 300, 1), &dir, 3);
    let selections = [
        Selection::TopK { k: 300 },
        Selection::MinProb { theta: 1e-3, cap: 128 },
        Selection::MinProb { theta: 1e-4, cap: 5 },
        Selection::TopP { p: 0.9, cap: 64 },
        Selection::ThresholdSampled { threshold: 0.01, seed: 3 },
        Selection::Sampled { draws: 9, seed: 4 },
    ];
    for selection in selections {
        check_meshes(&dir, selection, &[Mesh { tensor: 2, ..ONE }, Mesh { tensor: 3, ..ONE }], 7);
    }
}

#[test]
fn goldens_hold_on_every_mesh() {
    for name in ["llama4/scout_tiny", "llama4/maverick_tiny", "llama3_tiny"] {
        let dir = fixture(name);
        let golden = read_safetensors(dir.join("golden.safetensors")).unwrap();
        let [documents, length] = golden.info("input_ids").unwrap().shape[..] else { panic!("two axes") };
        let ids: Vec<u32> = golden.load_i64("input_ids").unwrap().into_iter().map(|id| id as u32).collect();
        let config = config_of(&dir);
        let vocab = config.vocab_size;
        let logits = golden.load_f32("logits", &golden.info("logits").unwrap().shape).unwrap();
        // A packed sequence has one token more than it has rows; here it stays in the document, so that each row counts.
        let sequences: Vec<PackedSequence> = ids
            .chunks(length)
            .map(|ids| PackedSequence { tokens: [ids, &[1]].concat(), segments: vec![0; length + 1] })
            .collect();
        assert_eq!(sequences.len(), documents);
        let experts = !config.expert_layers().is_empty();
        let meshes = DENSE_MESHES.iter().chain(if experts { &EXPERT_MESHES[..] } else { &[] });
        // The fixtures have four heads, and four or eight experts.
        let fit = |mesh: &&Mesh| mesh.tensor != 3 && mesh.expert != 3 && mesh.pipeline <= config.layers.len();
        for mesh in meshes.filter(fit) {
            let mut teacher = sharded_teacher(&dir, *mesh, Selection::TopK { k: vocab }).unwrap();
            let numbered: Vec<(u64, &PackedSequence)> = (0..).zip(&sequences).collect();
            let found = joined(&teacher.targets(&numbered).unwrap());
            for (row, logits) in logits.chunks(vocab).enumerate() {
                let log_sum = logits.iter().map(|&logit| (logit as f64).exp()).sum::<f64>().ln();
                let targets = found.slice(row, row + 1);
                assert_eq!(targets.ids.len(), vocab);
                for (&id, &log_prob) in targets.ids.iter().zip(&targets.captures[0].log_probs) {
                    let expected = logits[id as usize] as f64 - log_sum;
                    let difference = (log_prob as f64 - expected).abs();
                    assert!(difference < 2e-4, "{name} on {mesh}, row {row}, id {id}: {log_prob} {expected}");
                }
            }
        }
    }
}

#[test]
fn a_rank_reads_its_own_part_of_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(4, 300, 1), &dir, 3);
    let read = |mesh| sharded_teacher(&dir, mesh, Selection::TopK { k: 8 }).unwrap().bytes_read().to_vec();
    let all = CheckpointReader::open(&dir).unwrap().byte_count();
    let (hidden, width, layers) = (48u64, 24u64, 4u64);
    let norms = 4 * (layers * 2 * hidden + hidden);
    let routers = 4 * layers * 12 * hidden;
    let experts = 4 * layers * 12 * 3 * hidden * width;

    // Everything but norms and routers in halves; the vocabulary in blocks of 64: 128 and 172 ids.
    let tensor = read(Mesh { tensor: 2, ..ONE });
    let ends = 4 * 2 * 300 * hidden;
    let halves = (all - norms - routers - ends) / 2 + norms + routers;
    assert_eq!(tensor, [halves + 4 * 2 * 128 * hidden, halves + 4 * 2 * 172 * hidden]);
    // Half of the experts, and all else.
    assert_eq!(read(Mesh { expert: 2, ..ONE }), [all - experts / 2; 2]);
    assert_eq!(read(Mesh { data: 3, ..ONE }), [all; 3]);
    // The first stage embeds, the last has norm and head.
    let stages = read(Mesh { pipeline: 4, ..ONE });
    assert_eq!(stages.iter().sum::<u64>(), all);
    let layer = (all - ends - 4 * hidden) / layers;
    assert_eq!(stages, [layer + ends / 2, layer, layer, layer + ends / 2 + 4 * hidden]);
    // Twelve heads on six key heads over four ranks: three queries look at two of them, one of which two ranks have.
    let four = read(Mesh { tensor: 4, ..ONE });
    assert!(four.iter().all(|&bytes| bytes < all / 3), "{four:?} of {all}");
}

#[test]
fn uneven_loads_and_one_expert_that_takes_all_are_right() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    for (favourite, chosen) in [(7, 1), (11, 3)] {
        write_random(divisible(3, 300, chosen), &dir, 3);
        change(&dir, |name, shape, values| {
            if name.ends_with("router.weight") {
                // All logits are equal, but for what every third expert gets: few experts have most tokens, some none.
                values.chunks_mut(shape[1]).enumerate().for_each(|(expert, row)| {
                    let factor = if expert % 3 == favourite % 3 { 1.0 } else { 0.0 };
                    row.iter_mut().for_each(|value| *value *= factor);
                });
            }
        });
        check_meshes(&dir, Selection::TopK { k: 8 }, &EXPERT_MESHES, 9);
        change(&dir, |name, _, values| {
            if name.ends_with("router.weight") {
                values.fill(0.0);
            }
        });
        check_meshes(&dir, Selection::TopK { k: 8 }, &EXPERT_MESHES, 9);
    }
}

#[test]
fn the_cache_of_a_teacher_on_several_devices_is_that_of_one() {
    let small = small_run();
    let expected = cache(&small, "resident", &[]);
    let bytes = files(&expected);
    for (number, mesh) in
        ["{ expert = 4 }", "{ pipeline = 3 }", "{ data = 2 }", "{ expert = 2, pipeline = 2 }"].into_iter().enumerate()
    {
        let found = cache(&small, &format!("same{number}"), &[&format!("teacher.mesh={mesh}")]);
        assert!(files(&found) == bytes, "{mesh}");
    }
    for (number, mesh) in ["{ tensor = 2 }", "{ tensor = 3 }", "{ tensor = 2, expert = 2 }"].into_iter().enumerate() {
        let found = cache(&small, &format!("close{number}"), &[&format!("teacher.mesh={mesh}")]);
        for split in ["train", "held_out"] {
            assert_close(mesh, &all_targets(&found.join(split)), &all_targets(&expected.join(split)));
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_bytes_on_any_mesh() {
    let small = small_run();
    let shards = "cache.sequences_per_shard=9";
    let expected = files(&cache(&small, "whole", &[shards]));
    let (options, train) = (small.options("parts"), small.path("parts/cache/train/shards"));
    let sealed = || {
        let names = fs::read_dir(&train).into_iter().flatten().map(|entry| entry.unwrap().path());
        names.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).count()
    };
    let meshes = ["{ expert = 3 }", "{ pipeline = 2 }", "{ data = 2 }", "{}"];
    let mut interrupted = 0;
    loop {
        options.stop.store(false, Ordering::Relaxed);
        let recipe = small.recipe(&[shards, &format!("teacher.mesh={}", meshes[interrupted % meshes.len()])]);
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
    assert!(interrupted > 1, "it was interrupted {interrupted} times");
    assert!(files(&small.path("parts/cache")) == expected);
}

#[test]
fn a_rank_that_finds_its_weights_damaged_ends_the_run_and_seals_nothing() {
    let small = small_run();
    let teacher = small.path("teacher/model.safetensors");
    let whole = fs::read(&teacher).unwrap();
    let overrides = ["cache.sequences_per_shard=9", "teacher.mesh={ expert = 2, pipeline = 2 }"];
    // Not a number in an expert that the last rank alone has.
    let mut damaged = whole.clone();
    let header = u64::from_le_bytes(damaged[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&damaged[8..8 + header]).unwrap();
    let place = json["model.layers.3.feed_forward.experts.down_proj"]["data_offsets"][1].as_u64().unwrap() as usize;
    let end = 8 + header + place;
    damaged[end - 4..end].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&teacher, &damaged).unwrap();
    let message = precompute::run(&small.recipe(&overrides), &small.options("run")).unwrap_err().to_string();
    assert!(
        message.starts_with("rank 3 failed, seen by rank 0 in ")
            && message
                .contains("tensor `model.layers.3.feed_forward.experts.down_proj`: contains NaN or infinite values")
            && message.ends_with("; download it again, or go back to an earlier checkpoint"),
        "{message}"
    );
    let sealed = small.path("run/cache/train/shards");
    let shards = fs::read_dir(&sealed).into_iter().flatten().map(|entry| entry.unwrap().path());
    assert_eq!(shards.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).count(), 0);
    // Repaired, it makes the cache; what was begun belongs to other weights.
    fs::write(&teacher, &whole).unwrap();
    fs::remove_dir_all(small.path("run")).unwrap();
    assert!(files(&cache(&small, "run", &overrides)) == files(&cache(&small, "resident", &overrides[..1])));
}

#[test]
fn a_prediction_that_is_not_finite_is_the_same_error_wherever_it_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(4, 300, 1), &dir, 3);
    // Logits beyond what f32 holds.
    change(&dir, |name, _, values| {
        if name == "model.norm.weight" {
            values.fill(3e38);
        }
    });
    let sequences = sequences(300, 8);
    let meshes = [Mesh { data: 2, ..ONE }, Mesh { expert: 4, ..ONE }, Mesh { tensor: 2, ..ONE }];
    for mesh in [&meshes[..], &[Mesh { pipeline: 2, ..ONE }, Mesh { pipeline: 2, tensor: 2, ..ONE }]].concat() {
        let mut teacher = sharded_teacher(&dir, mesh, Selection::TopK { k: 8 }).unwrap();
        let message = teacher.targets(&numbered(&sequences)).unwrap_err().to_string();
        let own = "the teacher's prediction is not finite; check its weights with inspect, or run it in a wider type";
        assert!(message.ends_with(own), "{mesh}: {message}");
        // After a failure the ranks are gone, and it says so.
        let again = teacher.targets(&numbered(&sequences[..7])).unwrap_err().to_string();
        assert!(again.starts_with("the teacher's devices have failed before: "), "{again}");
        assert!(again.ends_with("; start the run again; it goes on from what is sealed"), "{again}");
    }
}

/// A rank's end that panics when it has taken some messages.
struct Frail {
    end: in_process::InProcess,
    left: Cell<usize>,
}

impl Collective for Frail {
    fn rank(&self) -> usize {
        self.end.rank()
    }
    fn size(&self) -> usize {
        self.end.size()
    }
    fn post(&self, to: usize, operation: Operation, bytes: Vec<u8>) -> Result<()> {
        self.end.post(to, operation, bytes)
    }
    fn take(&self, from: usize, operation: Operation) -> Result<Vec<u8>> {
        assert!(self.left.replace(self.left.get() - 1) > 1, "this rank is frail");
        self.end.take(from, operation)
    }
    fn fail(&self, rank: usize, failure: &str) {
        self.end.fail(rank, failure);
    }
}

#[test]
fn a_rank_that_panics_is_an_error_for_all_within_a_moment() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    write_random(divisible(4, 300, 1), &dir, 3);
    let sequences = sequences(300, 6);
    let mesh = Mesh { expert: 3, ..ONE };
    // While it loads, in the first layers, and in the last.
    for left in [2, 8, 20] {
        let settings = settings(&dir, mesh, Selection::TopK { k: 8 });
        let mut ends = in_process::world(3).into_iter();
        let first = Rc::new(ends.next().unwrap());
        let outcomes: Vec<String> = std::thread::scope(|scope| {
            let others: Vec<_> = ends
                .map(|end| {
                    let settings = &settings;
                    scope.spawn(move || {
                        let left = if end.rank() == 1 { left } else { usize::MAX };
                        sharded::serve(&Frail { end, left: Cell::new(left) }, settings).unwrap_err().to_string()
                    })
                })
                .collect();
            let result = ShardedTeacher::over(first, &settings).and_then(|mut teacher| {
                for _ in 0..4 {
                    teacher.targets(&numbered(&sequences))?;
                }
                Ok(())
            });
            let own = result.unwrap_err().to_string();
            std::iter::once(own).chain(others.into_iter().map(|other| other.join().unwrap())).collect()
        });
        let failure = "it panicked: this rank is frail; this is a mistake in the program, please report it";
        for (rank, outcome) in outcomes.iter().enumerate() {
            let start = format!("rank 1 failed, seen by rank {rank} in ");
            assert!(outcome.starts_with(&start) && outcome.ends_with(failure), "{left}: {outcome}");
        }
    }
}

#[test]
fn a_mesh_that_the_teacher_does_not_fit_is_refused_by_its_key() {
    let small = small_run();
    let refused = |overrides: &[&str]| {
        let overrides: Vec<&str> = overrides.iter().flat_map(|word| ["--set", word]).collect();
        let outcome = small.limbeck("precompute-teacher-logits", &overrides);
        assert_eq!(outcome.code, 2, "{}", outcome.stderr);
        let text = small.shortened(&outcome.stderr);
        text.split_once("`teacher.mesh").expect(&text).1.trim_end().to_string()
    };
    assert_eq!(
        refused(&["teacher.mesh={ tensor = 5 }"]),
        ".tensor` is 5, which does not divide the teacher's 12 attention heads; use a divisor of 12"
    );
    assert_eq!(
        refused(&["teacher.mesh={ expert = 8 }"]),
        ".expert` is 8, which does not divide the teacher's 12 experts; use a divisor of 12"
    );
    assert_eq!(
        refused(&["teacher.mesh={ pipeline = 5 }"]),
        ".pipeline` is 5, and the teacher has 4 layers; use at most 4"
    );
    assert_eq!(refused(&["teacher.mesh={ data = 0 }"]), ".data` is 0; use at least 1");
    assert!(refused(&["teacher.mesh={ data = 70000 }"]).starts_with("` has 70000 devices; use at most 65535"));
    let outcome = small.limbeck("precompute-teacher-logits", &["--set", "teacher.mesh={ experts = 2 }"]);
    assert!(outcome.code == 2 && outcome.stderr.contains("did you mean `expert`?"), "{}", outcome.stderr);
}
