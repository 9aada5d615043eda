//! Training that is stopped for real, at random steps, again and again, by Ctrl-C, by a scheduler and without warning: the
//! record and the weights are those of an undisturbed run. `LIMBECK_TEST_TRAIN_KILLS` says how many (`just kill-campaign` takes
//! 60).
#![cfg(unix)]

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use limbeck::checkpoint::{checkpoint_dir, latest_checkpoint};
use limbeck::distill;
use limbeck::train::metrics::{Metric, read_metrics};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use small_run::*;

const KILLS: &str = "LIMBECK_TEST_TRAIN_KILLS";
const STEPS: u64 = 40;

/// Everything that is remembered from step to step: moments of two kinds, a running mean, a weighting that follows the
/// losses, biases of routers, shares of loads, and the best checkpoint.
const OVERRIDES: [&str; 12] = [
    "train.steps=40",
    "train.checkpoint_every=5",
    "train.evaluate_every=4",
    "train.evaluate_tokens=128",
    "train.optimizer=muon",
    "train.ema=0.9",
    "train.router_balance={rate=0.01}",
    "train.router_z_weight=0.001",
    "train.guards={not_finite=\"rewind\", spike=\"rewind\", spike_window=6}",
    "train.tensorboard=true",
    "loss.weighting={kind=\"gradient_norm\"}",
    "control.enabled=false",
];

fn start(small: &SmallRun, run_dir: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_limbeck"));
    command.arg("distill").arg(small.path("recipe.toml")).arg("--run-dir").arg(run_dir);
    for word in OVERRIDES {
        command.args(["--set", word]);
    }
    let cache = format!("cache.dir={}", small.path("whole/cache").display());
    command.args(["--set", &cache]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// The step of the last whole line.
fn step_of(run_dir: &Path) -> u64 {
    let lines = read_metrics(run_dir.join("metrics.jsonl")).unwrap_or_default();
    lines.iter().map(Metric::step).max().unwrap_or(0)
}

fn send(process: &Child, signal: &str) {
    let status = Command::new("kill").args([signal, &process.id().to_string()]).status().unwrap();
    // A process that has just come to its end cannot be told anything.
    let _ = status;
}

/// What was logged, but for the clock.
fn record(run_dir: &Path) -> Vec<Metric> {
    let mut lines = read_metrics(run_dir.join("metrics.jsonl")).unwrap();
    for line in &mut lines {
        if let Metric::Step(step) = line {
            (step.tokens_per_second, step.data_wait) = (0.0, 0.0);
        }
    }
    lines
}

#[test]
fn stopping_at_random_steps_changes_no_bit_of_record_and_weights() {
    let wanted: u64 = std::env::var(KILLS).map_or(6, |count| count.parse().unwrap());
    let small = SmallRun::new();
    let whole = small.path("whole");
    let mut overrides = OVERRIDES.to_vec();
    let cache = format!("cache.dir={}", whole.join("cache").display());
    overrides.push(&cache);
    distill::run(&small.recipe(&overrides), &small.options("whole")).unwrap();
    let expected = record(&whole);
    assert_eq!(expected.iter().filter(|line| matches!(line, Metric::Step(_))).count() as u64, STEPS);

    let mut random = ChaCha8Rng::seed_from_u64(11);
    let (mut kills, mut by_signal, mut rounds) = (0, BTreeMap::new(), 0);
    while kills < wanted {
        let run_dir = small.path(&format!("round-{rounds}"));
        let mut last = 0;
        loop {
            let mut process = start(&small, &run_dir);
            // Steps are logged as they are done, so a process can be met in the middle of the one after.
            let ahead = random.random_range(0..9);
            let (signal, began) = (["-INT", "-TERM", "-KILL"][random.random_range(0..3)], Instant::now());
            while process.try_wait().unwrap().is_none() && kills < wanted && step_of(&run_dir) < last + ahead {
                std::thread::sleep(Duration::from_millis(2));
                assert!(began.elapsed() < Duration::from_secs(300), "the run hangs");
            }
            if kills < wanted {
                std::thread::sleep(Duration::from_millis(random.random_range(0..30)));
                send(&process, signal);
            }
            let output = process.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            last = step_of(&run_dir);
            match (output.status.code(), signal) {
                (Some(0), _) => break,
                (None, "-KILL") => {}
                (Some(130), "-INT" | "-TERM") => {
                    assert!(said.contains("interrupted; state saved in "), "{said}");
                }
                // A signal that comes before anybody listens.
                (None, _) if !said.contains("going on") && last == 0 => {}
                (None, _) if said.is_empty() => {}
                (code, _) => panic!("after {signal} it ended with {code:?}: {said}"),
            }
            kills += 1;
            *by_signal.entry(signal).or_insert(0) += 1;
            assert!(kills < 20 * wanted, "the run never comes to its end");
        }
        let (found, what) = (record(&run_dir), format!("round {rounds}"));
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found, expected, "{what}");
        }
        assert_eq!(found.len(), expected.len(), "{what}");
        let last = |dir: &Path| -> BTreeMap<PathBuf, Vec<u8>> { files(&checkpoint_dir(dir, STEPS)) };
        let (found, expected) = (last(&run_dir), last(&whole));
        assert!(found.keys().eq(expected.keys()), "{what}");
        for (path, bytes) in &found {
            assert!(*bytes == expected[path], "{what}: {} differs", path.display());
        }
        assert!(found.keys().any(|path| path.starts_with("ema")), "the running mean is there as well");
        let best = |dir: &Path| fs::read_link(dir.join("checkpoints/best")).unwrap();
        assert_eq!(best(&run_dir), best(&whole), "{what}");
        fs::remove_dir_all(&run_dir).unwrap();
        rounds += 1;
    }
    eprintln!("{kills} times stopped in {rounds} runs: {by_signal:?}");
}

#[test]
fn a_second_signal_ends_a_run_at_once() {
    let small = SmallRun::new();
    let run_dir = small.path("whole");
    let mut process = start(&small, &run_dir);
    let began = Instant::now();
    while step_of(&run_dir) == 0 && process.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
        assert!(began.elapsed() < Duration::from_secs(300), "the run hangs");
    }
    // Both before the step in progress can end, unless the machine is very busy.
    send(&process, "-TERM");
    send(&process, "-INT");
    let output = process.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("stopping as soon as the state is saved"), "{said}");
    match output.status.code() {
        Some(1) => assert!(said.contains("stopped before the state was saved"), "{said}"),
        code => assert_eq!(code, Some(130), "{said}"),
    }
}

#[test]
fn a_run_outlives_whoever_reads_its_log() {
    let small = SmallRun::new();
    // What it says has nowhere to go from the start.
    let mut process = start(&small, &small.path("unread"));
    drop(process.stderr.take());
    assert_eq!(process.wait().unwrap().code(), Some(0));
    assert_eq!(step_of(&small.path("unread")), STEPS);

    // And it stops with its state saved when it is asked to.
    let run_dir = small.path("stopped");
    let mut process = start(&small, &run_dir);
    drop(process.stderr.take());
    while step_of(&run_dir) < 3 {
        assert_eq!(process.try_wait().unwrap(), None, "it ended before its third step");
        std::thread::sleep(Duration::from_millis(2));
    }
    send(&process, "-TERM");
    let code = process.wait().unwrap().code();
    assert!(code == Some(130) || step_of(&run_dir) == STEPS, "{code:?}");
    assert!(latest_checkpoint(&run_dir).unwrap().is_some());
}
