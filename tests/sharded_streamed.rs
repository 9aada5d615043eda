//! A teacher that is streamed on several devices gives the bits of the same mesh with its layers in memory, in whatever
//! memory and sweeps; each device reads its own experts, and of these only those that a token chose; and what goes wrong
//! on the way leaves nothing wrong behind.

mod sharded_run;
mod small_run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use burn::tensor::Device;
use limbeck::models::llama4::sharding;
use limbeck::parallel::Mesh;
use limbeck::precompute;
use limbeck::selection::Selection;
use limbeck::teacher::{ResidentTeacher, ShardSettings, ShardedTeacher, Spill, StreamCounts, StreamSettings};
use limbeck_kernels::packed_matmul::Numbers;
use sharded_run::*;
use small_run::*;

const PLENTY: u64 = 1 << 30;
const STREAMED: &str = "teacher.mode=streamed";

fn stream_settings(memory: u64, spill_dir: &Path) -> StreamSettings {
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

fn streamed_teacher(
    checkpoint: &Path,
    mesh: Mesh,
    selection: &Selection,
    streaming: StreamSettings,
) -> limbeck::Result<ShardedTeacher> {
    let streaming = Some((LENGTH, streaming));
    let settings = ShardSettings { streaming, ..settings(checkpoint, mesh, selection.clone()) };
    ShardedTeacher::in_process(&settings, &vec![Device::flex(); mesh.size()])
}

/// A teacher in the least memory that its ranks say they need.
fn in_little(checkpoint: &Path, mesh: Mesh, selection: &Selection, spill: Spill, dir: &Path) -> ShardedTeacher {
    let mut memory = 0;
    for _ in 0..2 * mesh.size() {
        let error = match streamed_teacher(
            checkpoint,
            mesh,
            selection,
            StreamSettings { spill, ..stream_settings(memory, dir) },
        ) {
            Ok(teacher) => return teacher,
            Err(error) => error.to_string(),
        };
        // Each rank has its own least.
        let number = error.split("at least ").nth(1).and_then(|rest| rest.split(", by").next()).expect(&error);
        let digits: u64 = number.trim_end_matches(|c: char| c.is_alphabetic()).parse().unwrap();
        let asked = digits << if number.ends_with("KiB") { 10 } else { 20 };
        assert!(asked > memory, "{error}");
        memory = asked;
    }
    panic!("it always asks for more");
}

fn check(checkpoint: &Path, selection: &Selection, meshes: &[Mesh], count: usize, spill_dir: &Path) {
    let sequences = sequences(config_of(checkpoint).vocab_size, count);
    let numbered = numbered(&sequences);
    let resident = ResidentTeacher::open(checkpoint, &Device::flex(), selection.clone(), &[1.0, 2.0]).unwrap();
    let one = resident.targets(&sequences, 5).unwrap();
    for mesh in meshes {
        let expected = sharded_teacher(checkpoint, *mesh, selection.clone()).unwrap().targets(&numbered).unwrap();
        if mesh.tensor == 1 {
            assert!(expected == one);
        }
        let teacher = |settings| streamed_teacher(checkpoint, *mesh, selection, settings).unwrap();
        let plenty = || stream_settings(PLENTY, spill_dir);
        let cases = [
            ("plenty of memory", teacher(plenty()), false),
            ("the least memory", in_little(checkpoint, *mesh, selection, Spill::Auto, spill_dir), true),
            ("the least without a file", in_little(checkpoint, *mesh, selection, Spill::Never, spill_dir), false),
            ("sweeps of one sequence", teacher(StreamSettings { sweep_tokens: Some(1), ..plenty() }), false),
            (
                "sweeps of two in batches of one",
                teacher(StreamSettings { sweep_tokens: Some(64), batch_tokens: 1, ..plenty() }),
                false,
            ),
            ("a file", teacher(StreamSettings { spill: Spill::Always, ..plenty() }), true),
        ];
        for (what, mut teacher, spilled) in cases {
            let what = format!("{}, {selection:?}, {mesh}, {what}", checkpoint.display());
            assert!(teacher.targets(&numbered).unwrap() == expected, "{what}: other bits");
            let counts = teacher.stream_counts();
            assert_eq!(counts.len(), mesh.size());
            let tokens = counts.iter().map(|counts| counts.tokens).sum::<u64>();
            let passed = count * LENGTH * mesh.tensor * mesh.pipeline;
            assert_eq!(tokens, passed as u64, "{what}: each sequence passes one group of ranks");
            assert!(counts.iter().all(|counts| (counts.spilled_sweeps > 0) == spilled), "{what}: {counts:?}");
        }
    }
}

#[test]
fn every_mesh_memory_and_sweep_gives_the_bits_of_the_mesh_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let spill = folder.path().join("spill");
    let dense = folder.path().join("dense");
    write_dense(&dense, serde_json::json!({ "tie_word_embeddings": true }));
    let of_tensors = [
        Mesh { tensor: 2, ..ONE },
        Mesh { tensor: 3, ..ONE },
        Mesh { pipeline: 3, ..ONE },
        Mesh { data: 2, tensor: 2, ..ONE },
        Mesh { pipeline: 2, tensor: 2, ..ONE },
    ];
    check(&dense, &Selection::TopK { k: 8 }, &of_tensors, 9, &spill);
    let of_experts = [
        Mesh { expert: 2, ..ONE },
        Mesh { expert: 3, ..ONE },
        Mesh { expert: 4, ..ONE },
        Mesh { expert: 2, tensor: 2, ..ONE },
        Mesh { expert: 2, pipeline: 2, ..ONE },
        Mesh { expert: 2, data: 2, ..ONE },
        Mesh { expert: 2, tensor: 2, pipeline: 2, data: 1 },
        // More ranks than sequences.
        Mesh { expert: 12, ..ONE },
    ];
    for (name, chosen, meshes) in [("one", 1, &of_experts[..]), ("three", 3, &of_experts[..5])] {
        let dir = folder.path().join(name);
        let moe = divisible(4, 300, chosen);
        // One model with dense layers between those with experts.
        let moe_layers = if chosen == 1 { vec![1, 2] } else { moe.moe_layers.clone() };
        write_random(limbeck::models::llama4::Llama4Config { moe_layers, ..moe }, &dir, 3);
        check(&dir, &Selection::default(), meshes, 9, &spill);
        // What is drawn needs whole rows of logits.
        check(&dir, &Selection::Sampled { draws: 5, seed: 3 }, &meshes[3..4], 3, &spill);
    }
    assert_eq!(fs::read_dir(&spill).unwrap().count(), 0, "the files have no names");
}

#[test]
fn every_form_of_weights_is_streamed_in_parts() {
    let folder = tempfile::tempdir().unwrap();
    let forms = [
        "llama4/scout_tiny_bf16_sharded",
        "llama4/maverick_tiny_meta_native",
        "quantised/fp8_blocks",
        "quantised/fp8_channels",
        "quantised/fp8_fused",
        "gguf/llama4.gguf",
    ];
    let meshes = [
        Mesh { tensor: 2, ..ONE },
        Mesh { expert: 2, ..ONE },
        Mesh { expert: 3, ..ONE },
        Mesh { pipeline: 2, ..ONE },
        Mesh { expert: 2, tensor: 2, ..ONE },
    ];
    for name in forms {
        let config = config_of(&fixture(name));
        let fitting: Vec<Mesh> = meshes.into_iter().filter(|mesh| sharding::check(&config, mesh).is_ok()).collect();
        assert!(fitting.iter().any(|mesh| mesh.tensor > 1), "{name}: {fitting:?}");
        check(&fixture(name), &Selection::TopK { k: 8 }, &fitting, 5, folder.path());
    }
}

/// Sets the routers so that these experts of twelve share the tokens by the sign of one of their numbers; or one has all.
fn route_to(dir: &Path, wanted: &[usize]) {
    change(dir, |name, shape, values| {
        if name.ends_with("router.weight") {
            values.fill(0.0);
            // All logits are 0 but for these; with one alone, all others have a logit that is never above its own.
            for (expert, row) in values.chunks_mut(shape[1]).enumerate() {
                match wanted.iter().position(|&other| other == expert) {
                    Some(0) => row[0] = 1.0,
                    Some(_) => row[0] = -1.0,
                    None => {}
                }
            }
        }
    });
}

#[test]
fn one_expert_that_takes_all_and_ranks_whose_experts_nobody_chose_are_right_and_read_nothing_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("teacher");
    let layers = 3;
    write_random(divisible(layers, 300, 1), &dir, 3);
    let sequences = sequences(300, 9);
    let (hidden, width) = (48u64, 24u64);
    let expert_bytes = 4 * 3 * hidden * width;
    let run = |mesh: Mesh, sweep_tokens: u64| -> Vec<StreamCounts> {
        let resident = ResidentTeacher::open(&dir, &Device::flex(), Selection::TopK { k: 8 }, &[1.0, 2.0]).unwrap();
        let expected = resident.targets(&sequences, 5).unwrap();
        let settings = StreamSettings { sweep_tokens: Some(sweep_tokens), ..stream_settings(PLENTY, folder.path()) };
        let mut teacher = streamed_teacher(&dir, mesh, &Selection::TopK { k: 8 }, settings).unwrap();
        let found = teacher.targets(&numbered(&sequences)).unwrap();
        match mesh.tensor {
            1 => assert!(found == expected, "{mesh}"),
            _ => assert_close(&mesh.to_string(), &joined(&found), &joined(&expected)),
        }
        teacher.stream_counts().to_vec()
    };
    // Ties go to the first experts: with all logits equal, expert 0 of each layer takes every token.
    route_to(&dir, &[]);
    for (mesh, sweep) in [
        (Mesh { expert: 2, ..ONE }, 1 << 20),
        (Mesh { expert: 4, ..ONE }, 64),
        (Mesh { expert: 12, ..ONE }, 1 << 20),
        (Mesh { expert: 2, tensor: 2, ..ONE }, 64),
        (Mesh { expert: 2, data: 2, ..ONE }, 1 << 20),
        (Mesh { expert: 3, pipeline: 3, ..ONE }, 64),
    ] {
        let counts = run(mesh, sweep);
        let stages = mesh.pipeline as u64;
        for (rank, counts) in counts.iter().enumerate() {
            let has_first = mesh.place(rank).expert == 0;
            let sweeps = counts.sweeps * layers as u64 / stages;
            assert_eq!(counts.experts_read, if has_first { sweeps } else { 0 }, "{mesh}, rank {rank}");
            assert_eq!(counts.experts_left_out, sweeps * 12 / mesh.expert as u64 - counts.experts_read);
        }
    }
    // What the ranks without work read less is that expert, once for every sweep and layer, and nothing else.
    let counts = run(Mesh { expert: 2, ..ONE }, 64);
    let (with, without) = (counts[0], counts[1]);
    assert_eq!(with.sweeps, without.sweeps);
    let embedded = |rank: usize| -> u64 {
        // Rows of the embedding are read for a rank's own tokens.
        counts[rank].bytes_read - counts[rank].experts_read * expert_bytes
    };
    let rows = embedded(0).abs_diff(embedded(1));
    assert!(rows.is_multiple_of(4 * hidden) && rows < 4 * hidden * 300 * with.sweeps, "rows of the embedding: {rows}");

    // Two experts, both with the second of three ranks; the first and the last have none.
    route_to(&dir, &[5, 6]);
    let counts = run(Mesh { expert: 3, ..ONE }, 1 << 20);
    let read: Vec<u64> = counts.iter().map(|counts| counts.experts_read).collect();
    assert_eq!(read, [0, 2 * layers as u64, 0]);
    // And with two of four ranks.
    let counts = run(Mesh { expert: 4, ..ONE }, 1 << 20);
    let read: Vec<u64> = counts.iter().map(|counts| counts.experts_read).collect();
    assert_eq!(read, [0, layers as u64, layers as u64, 0]);
}

#[test]
fn a_teacher_that_is_streamed_on_several_devices_makes_the_same_cache() {
    let small = small_run();
    let expected = cache(&small, "resident", &[]);
    let bytes = files(&expected);
    let streamed = ["teacher.mode=streamed", "teacher.memory=\"4GiB\""];
    for (number, mesh) in
        ["{ expert = 4 }", "{ data = 2 }", "{ expert = 2, data = 2 }", "{ pipeline = 2 }"].into_iter().enumerate()
    {
        let mesh = format!("teacher.mesh={mesh}");
        let overrides = [&streamed[..], &[&mesh]].concat();
        assert!(files(&cache(&small, &format!("same{number}"), &overrides)) == bytes, "{mesh}");
    }
    // Sweeps of few sequences, and none for some ranks at the end.
    let overrides = [&streamed[..], &["teacher.mesh={ expert = 3 }", "teacher.sweep_tokens=200"]].concat();
    assert!(files(&cache(&small, "short", &overrides)) == bytes);
    let found = cache(&small, "close", &[&streamed[..], &["teacher.mesh={ tensor = 2, expert = 2 }"]].concat());
    for split in ["train", "held_out"] {
        assert_close("streamed", &all_targets(&found.join(split)), &all_targets(&expected.join(split)));
    }
    let recipe = small.recipe(&["teacher.mode=streamed", "teacher.memory=\"1MiB\"", "teacher.mesh={ expert = 2 }"]);
    let message = precompute::run(&recipe, &small.options("little")).unwrap_err().to_string();
    assert!(message.contains("the streamed teacher does not fit into 512KiB of memory; it takes "), "{message}");
}

fn sealed(small: &SmallRun, run: &str) -> usize {
    let shards = fs::read_dir(small.path(run).join("cache/train/shards")).into_iter().flatten();
    let names = shards.map(|entry| entry.unwrap().path());
    names.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).count()
}

fn arguments<'a>(overrides: &[&'a str]) -> Vec<&'a str> {
    overrides.iter().flat_map(|word| ["--set", word]).collect()
}

#[cfg(unix)]
#[test]
fn a_process_with_several_devices_that_is_killed_goes_on_to_the_same_bytes() {
    let small = small_run();
    let shards = "cache.sequences_per_shard=3";
    let expected = files(&cache(&small, "resident", &[shards]));
    for (number, mesh) in ["{ expert = 2 }", "{ pipeline = 2 }"].into_iter().enumerate() {
        let (name, mesh) = (format!("killed{number}"), format!("teacher.mesh={mesh}"));
        let overrides = [shards, STREAMED, "teacher.sweep_tokens=32", &mesh];
        let mut child = Command::new(env!("CARGO_BIN_EXE_limbeck"))
            .arg("precompute-teacher-logits")
            .arg(small.path("recipe.toml"))
            .arg("--run-dir")
            .arg(small.path(&name))
            .args(arguments(&overrides))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while sealed(&small, &name) < 2 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            assert!(began.elapsed() < Duration::from_secs(120), "nothing was sealed");
            std::thread::sleep(Duration::from_micros(100));
        }
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(!small.path(&name).join("cache/train/manifest.json").exists(), "it was killed before it was done");
        let left = sealed(&small, &name);
        assert!(files(&cache(&small, &name, &overrides)) == expected, "{mesh}, killed with {left} shards sealed");
    }
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_ends_all_ranks_with_the_same_words_and_seals_nothing_wrong() {
    let small = small_run();
    let overrides = [
        "cache.sequences_per_shard=2",
        STREAMED,
        "teacher.spill=always",
        "teacher.sweep_tokens=4k",
        "teacher.mesh={ expert = 2 }",
    ];
    let expected = files(&cache(&small, "resident", &overrides[..1]));
    // No file may grow beyond 96 KiB, which the hidden states do and the shards do not.
    let words = overrides.iter().map(|word| format!("--set '{word}'")).collect::<Vec<_>>().join(" ");
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
    assert!(small.shortened(&stderr).contains(message), "{stderr}");
    assert_eq!(sealed(&small, "run"), 0);
    assert!(files(&cache(&small, "run", &overrides)) == expected);
}

#[cfg(unix)]
#[test]
fn a_disk_that_is_full_when_a_shard_is_sealed_stops_any_teacher_and_leaves_what_is_sealed() {
    let small = small_run();
    let shards = "cache.sequences_per_shard=40";
    let expected = files(&cache(&small, "expected", &[shards]));
    let largest = expected.values().map(Vec::len).max().unwrap();
    let teachers: [&[&str]; 4] =
        [&[], &[STREAMED], &["teacher.mesh={ expert = 2 }"], &[STREAMED, "teacher.mesh={ expert = 2 }"]];
    for (number, more) in teachers.into_iter().enumerate() {
        let name = format!("full{number}");
        let overrides = [&[shards], more].concat();
        let words = overrides.iter().map(|word| format!("--set '{word}'")).collect::<Vec<_>>().join(" ");
        // A little less than a shard takes, in KiB; everything else of the run is smaller.
        let command = format!(
            "trap '' XFSZ; ulimit -f {}; exec {} precompute-teacher-logits {} --run-dir {} {words}",
            largest / 1024 - 1,
            env!("CARGO_BIN_EXE_limbeck"),
            small.path("recipe.toml").display(),
            small.path(&name).display()
        );
        let output = Command::new("bash").args(["-c", &command]).stdin(Stdio::null()).output().unwrap();
        let stderr = small.shortened(&String::from_utf8(output.stderr).unwrap());
        assert_eq!(output.status.code(), Some(1), "{overrides:?}: {stderr}");
        assert!(stderr.contains(&format!("DIR/{name}/cache/train/shards/00000.safetensors")), "{stderr}");
        assert!(stderr.contains("(os error 27)"), "{stderr}");
        assert_eq!(sealed(&small, &name), 0, "{overrides:?}");
        assert!(files(&cache(&small, &name, &overrides)) == expected, "{overrides:?}: it goes on to the same bytes");
    }
}

/// Where an expert of a layer has its last number in the small run's teacher.
fn last_number_of_the_experts(teacher: &Path, layer: usize) -> usize {
    let bytes = fs::read(teacher).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let name = format!("model.layers.{layer}.feed_forward.experts.down_proj");
    8 + header + json[&name]["data_offsets"][1].as_u64().unwrap() as usize - 4
}

#[test]
fn a_rank_that_finds_an_expert_damaged_in_the_middle_of_a_sweep_ends_the_run_and_seals_nothing() {
    let small = small_run();
    let teacher: PathBuf = small.path("teacher/model.safetensors");
    let whole = fs::read(&teacher).unwrap();
    let mut damaged = whole.clone();
    let place = last_number_of_the_experts(&teacher, 3);
    damaged[place..place + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&teacher, &damaged).unwrap();
    let overrides = ["cache.sequences_per_shard=9", STREAMED, "teacher.mesh={ expert = 2, tensor = 2 }"];
    let message = precompute::run(&small.recipe(&overrides), &small.options("run")).unwrap_err().to_string();
    // Ranks 2 and 3 have halves of the last expert, and rank 3 the half with its last number.
    assert!(
        (message.starts_with("rank 2 failed, seen by rank 0 in ")
            || message.starts_with("rank 3 failed, seen by rank 0 in "))
            && message.contains("tensor `model.layers.3.feed_forward.experts.down_proj`: contains NaN"),
        "{message}"
    );
    assert_eq!(sealed(&small, "run"), 0);
    fs::write(&teacher, &whole).unwrap();
    fs::remove_dir_all(small.path("run")).unwrap();
    let close = cache(&small, "run", &overrides);
    let expected = cache(&small, "resident", &overrides[..1]);
    assert_close("repaired", &all_targets(&close.join("train")), &all_targets(&expected.join("train")));
}
