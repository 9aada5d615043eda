//! A teacher whose ranks are processes that `mpirun` starts makes the cache that one process makes; and when one of them
//! fails or is killed, all end with an error, nothing wrong is sealed, and the same command goes on.

mod sharded_run;
mod small_run;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use sharded_run::*;
use small_run::*;

/// `mpirun` with the program on this folder's recipe, its results in `run`. More ranks than cores, on one machine.
fn mpirun(small: &SmallRun, ranks: usize, run: &str, overrides: &[&str]) -> Command {
    let mut command = Command::new("mpirun");
    let count = ranks.to_string();
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", &count]);
    // Containers often may not read each other's memory, and have no network to look at.
    command.args(["--mca", "btl_vader_single_copy_mechanism", "none", "--mca", "btl", "self,vader"]);
    command.args([env!("CARGO_BIN_EXE_limbeck"), "precompute-teacher-logits"]);
    command.arg(small.path("recipe.toml")).arg("--run-dir").arg(small.path(run));
    overrides.iter().for_each(|word| {
        command.args(["--set", word]);
    });
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn finished(child: Child) -> Output {
    child.wait_with_output().expect("mpirun ends")
}

fn run(small: &SmallRun, ranks: usize, run: &str, overrides: &[&str]) -> PathBuf {
    let output = finished(mpirun(small, ranks, run, overrides).spawn().expect("mpirun is installed"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{overrides:?}: {stderr}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let cache = small.path(run).join("cache");
    assert_eq!(stdout, format!("cache: {}\n", cache.display()), "one of the ranks speaks");
    cache
}

#[test]
fn two_and_four_processes_make_the_cache_of_one() {
    let small = small_run();
    let expected = cache(&small, "resident", &[]);
    let meshes = [
        (2, "{ expert = 2 }", false),
        (2, "{ tensor = 2 }", true),
        (2, "{ pipeline = 2 }", false),
        (4, "{ expert = 4 }", false),
        (4, "{ tensor = 2, expert = 2 }", true),
        (4, "{ pipeline = 2, data = 2 }", false),
    ];
    for (number, (ranks, mesh, adds_in_parts)) in meshes.into_iter().enumerate() {
        let overrides = [format!("teacher.mesh={mesh}")];
        let overrides = overrides.each_ref().map(String::as_str);
        let found = run(&small, ranks, &format!("mpi{number}"), &overrides);
        if !adds_in_parts {
            assert!(files(&found) == files(&expected), "{mesh}");
            continue;
        }
        // Threads and processes add up in the same order.
        let threads = cache(&small, &format!("threads{number}"), &overrides);
        assert!(files(&found) == files(&threads), "{mesh}");
        for split in ["train", "held_out"] {
            assert_close(mesh, &all_targets(&found.join(split)), &all_targets(&expected.join(split)));
        }
    }
}

#[test]
fn a_teacher_that_is_streamed_by_several_processes_makes_the_cache_of_the_mesh_in_memory() {
    let small = small_run();
    let meshes = [
        (2, "{ expert = 2 }", "teacher.sweep_tokens=640"),
        (2, "{ tensor = 2 }", "teacher.spill=always"),
        (2, "{ pipeline = 2 }", "teacher.sweep_tokens=64"),
        (4, "{ tensor = 2, expert = 2 }", "teacher.memory=\"2GiB\""),
    ];
    for (number, (ranks, mesh, more)) in meshes.into_iter().enumerate() {
        let mesh = format!("teacher.mesh={mesh}");
        let expected = files(&cache(&small, &format!("memory{number}"), &[&mesh]));
        let found = run(&small, ranks, &format!("streamed{number}"), &["teacher.mode=streamed", &mesh, more]);
        assert!(files(&found) == expected, "{mesh}");
    }
    // Each process has the whole of the memory, and says itself when it is too little.
    let overrides = ["teacher.mode=streamed", "teacher.memory=\"1MiB\"", "teacher.mesh={ expert = 2 }"];
    let output = finished(mpirun(&small, 2, "little", &overrides).spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0));
    assert!(stderr.contains("the streamed teacher does not fit into 1MiB of memory; it takes "), "{stderr}");
}

#[test]
fn a_finished_cache_is_recognised_and_all_ranks_end() {
    let small = small_run();
    let overrides = ["teacher.mesh={ data = 2 }"];
    let made = files(&run(&small, 2, "run", &overrides));
    assert!(files(&run(&small, 2, "run", &overrides)) == made);
}

#[test]
fn a_mesh_of_another_size_is_refused_with_the_number_to_start() {
    let small = small_run();
    let output = finished(mpirun(&small, 2, "run", &["teacher.mesh={ expert = 4 }"]).spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0));
    let message = "`teacher.mesh` has 4 devices (expert 4), and 2 processes were started; start 4, as in `mpirun -n 4`, or \
                   change the mesh";
    assert!(stderr.contains(message), "{stderr}");
    assert!(!small.path("run/cache/train/manifest.json").exists());
}

fn sealed(small: &SmallRun, run: &str) -> usize {
    let shards = fs::read_dir(small.path(run).join("cache/train/shards")).into_iter().flatten();
    let names = shards.map(|entry| entry.unwrap().path());
    names.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).count()
}

#[test]
fn a_rank_that_fails_ends_all_with_its_own_words() {
    let small = small_run();
    let teacher = small.path("teacher/model.safetensors");
    let whole = fs::read(&teacher).unwrap();
    let mut damaged = whole.clone();
    let header = u64::from_le_bytes(damaged[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&damaged[8..8 + header]).unwrap();
    let place = json["model.layers.3.feed_forward.experts.down_proj"]["data_offsets"][1].as_u64().unwrap() as usize;
    let end = 8 + header + place;
    damaged[end - 4..end].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&teacher, &damaged).unwrap();
    let began = Instant::now();
    let output = finished(mpirun(&small, 4, "run", &["teacher.mesh={ expert = 4 }"]).spawn().unwrap());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("experts.down_proj`: contains NaN or infinite values"), "{stderr}");
    assert!(began.elapsed() < Duration::from_secs(120));
    assert_eq!(sealed(&small, "run"), 0);
}

/// The processes that `mpirun` started, by their ranks.
fn ranks_of(mpirun: &Child) -> Vec<(usize, u32)> {
    let read = |pid: u32, name: &str| fs::read(Path::new("/proc").join(pid.to_string()).join(name)).unwrap_or_default();
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let mut ranks: Vec<(usize, u32)> = all
        .filter_map(|pid| {
            let stat = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
            let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            let environment = String::from_utf8_lossy(&read(pid, "environ")).into_owned();
            let rank = environment.split('\0').find_map(|entry| entry.strip_prefix("OMPI_COMM_WORLD_RANK="))?;
            (parent == mpirun.id()).then_some((rank.parse().ok()?, pid))
        })
        .collect();
    ranks.sort_unstable();
    ranks
}

#[test]
fn a_killed_rank_ends_all_others_and_the_same_command_goes_on() {
    kill_each_rank(&["teacher.mesh={ expert = 2 }"]);
}

#[test]
fn a_rank_that_is_killed_while_it_streams_ends_all_others_and_the_same_command_goes_on() {
    kill_each_rank(&["teacher.mesh={ expert = 2 }", "teacher.mode=streamed", "teacher.sweep_tokens=32"]);
}

fn kill_each_rank(more: &[&str]) {
    let small = small_run();
    let overrides = [&["cache.sequences_per_shard=3"], more].concat();
    let expected = files(&cache(&small, "resident", &overrides[..1]));
    for killed in [1, 0] {
        let name = format!("killed{killed}");
        let mut child = mpirun(&small, 2, &name, &overrides).spawn().unwrap();
        let began = Instant::now();
        while sealed(&small, &name) < 2 {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it was killed");
            assert!(began.elapsed() < Duration::from_secs(120), "nothing was sealed");
            std::thread::sleep(Duration::from_millis(1));
        }
        let ranks = ranks_of(&child);
        assert_eq!(ranks.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [0, 1]);
        let (pid, began) = (ranks[killed].1.to_string(), Instant::now());
        assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
        let output = finished(child);
        assert_ne!(output.status.code(), Some(0));
        assert!(began.elapsed() < Duration::from_secs(60), "all end within a minute");
        for (_, pid) in ranks {
            // One whose end nobody has asked about yet is a zombie, and as good as gone.
            let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
            let state = stat.rsplit_once(") ").map_or("", |(_, rest)| &rest[..1]);
            assert!(["", "Z", "X"].contains(&state), "process {pid} is still there: {state}");
        }
        assert!(!small.path(&name).join("cache/train/manifest.json").exists(), "it was killed before it was done");
        assert!(files(&run(&small, 2, &name, &overrides)) == expected, "rank {killed} was killed");
    }
}
