//! `--profile` writes a trace that other programs can open, of the whole run and of nothing else, whatever the run comes to.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::Value;
use small_run::*;

/// A span of a trace, in nanoseconds.
#[derive(Debug, Clone)]
struct Span {
    name: String,
    thread: u64,
    start: u64,
    end: u64,
    processor: Option<f64>,
}

/// The spans of a trace, thread by thread in their order.
fn spans(file: &Path) -> Vec<Span> {
    let trace: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    for what in ["stages_left_out", "operations_left_out"] {
        assert_eq!(trace["otherData"][what], 0, "{what}");
    }
    let events = trace["traceEvents"].as_array().unwrap();
    let nanoseconds = |value: &Value| (value.as_f64().unwrap() * 1e3).round() as u64;
    let mut spans = vec![];
    for event in events {
        let (name, thread) = (event["name"].as_str().unwrap().to_string(), event["tid"].as_u64().unwrap());
        match event["ph"].as_str().unwrap() {
            "X" => {
                assert!(["stage", "op", "piece"].contains(&event["cat"].as_str().unwrap()), "{event}");
                let start = nanoseconds(&event["ts"]);
                let processor = event["args"]["processor_us"].as_f64();
                spans.push(Span { name, thread, start, end: start + nanoseconds(&event["dur"]), processor });
            }
            "M" => assert!(["process_name", "thread_name"].contains(&name.as_str()), "{event}"),
            other => panic!("an event of the kind {other}: {event}"),
        }
    }
    let named = events.iter().filter(|event| event["name"] == "thread_name").count();
    assert_eq!(named, spans.iter().map(|span| span.thread).collect::<std::collections::BTreeSet<_>>().len());
    spans
}

/// Panics unless every span ends within the one that was open when it began; gives each with the names of those around it.
fn nested(spans: &[Span]) -> Vec<(Vec<String>, Span)> {
    let mut open: BTreeMap<u64, Vec<Span>> = BTreeMap::new();
    let mut found = vec![];
    for span in spans {
        let around = open.entry(span.thread).or_default();
        while around.last().is_some_and(|outer| outer.end <= span.start && span.end > outer.end) {
            around.pop();
        }
        if let Some(outer) = around.last() {
            assert!(span.start >= outer.start && span.end <= outer.end, "{span:?} crosses {outer:?}");
        }
        found.push((around.iter().map(|span| span.name.clone()).collect(), span.clone()));
        around.push(span.clone());
    }
    found
}

const STAGES: [&str; 22] = [
    "open what the recipe names",
    "fill the cache",
    "fill the held-out cache",
    "read text",
    "tokenise",
    "load weights",
    "teacher batch",
    "layer",
    "attention",
    "experts",
    "head + top-k",
    "cache encode",
    "cache write",
    "cache sync",
    "train the student",
    "wait for data",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "evaluation",
    "checkpoint",
];

const OPERATIONS: [&str; 13] = [
    "matrix product",
    "matrix product backward",
    "attention backward",
    "rms_norm",
    "rms_norm backward",
    "swiglu",
    "swiglu backward",
    "grouped matmul",
    "grouped matmul backward",
    "packed product",
    "log-sum-exp + top-k",
    "fused loss",
    "adamw",
];

#[test]
fn a_profile_has_every_stage_nested_and_covers_the_run() {
    let small = SmallRun::new();
    let began = std::time::Instant::now();
    let outcome = small.limbeck("distill", &["--profile"]);
    let wall = began.elapsed();
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let file = small.path("run/profile.json");
    assert!(outcome.stderr.contains(&format!("profile: {}", file.display())), "{}", outcome.stderr);
    let nested = nested(&spans(&file));
    for name in STAGES.iter().chain(&OPERATIONS) {
        assert!(nested.iter().any(|(_, span)| span.name == *name), "no `{name}` in the profile");
    }

    let (_, whole) = &nested[0];
    let duration = |span: &Span| (span.end - span.start) as f64;
    assert_eq!(whole.name, "distill");
    assert!(duration(whole) > 0.8 * wall.as_nanos() as f64, "{whole:?} of {wall:?}");
    let inside: f64 =
        nested.iter().filter(|(around, _)| around.as_slice() == ["distill"]).map(|(_, span)| duration(span)).sum();
    assert!(inside > 0.8 * duration(whole), "stages have {inside} ns of {}", duration(whole));

    // 24 steps of two micro-batches, of the student and of the control, each where it belongs.
    let under = |name: &str, outer: &str| {
        nested.iter().filter(|(around, span)| span.name == name && around.iter().any(|around| around == outer)).count()
    };
    assert_eq!(under("training step", "train the student"), 24);
    assert_eq!(under("training step", "train the control"), 24);
    assert_eq!(under("backward", "training step"), 2 * 2 * 24);
    assert_eq!(under("matrix product backward", "backward") % (2 * 2 * 24), 0);
    assert_eq!(under("adamw", "optimizer") % (2 * 24), 0);
    assert!(under("packed product", "teacher batch") > 0 && under("checkpoint", "train the control") > 0);
    let measured = whole.processor.unwrap();
    assert!(measured > 0.0 && nested.iter().all(|(_, span)| span.processor.is_none_or(|part| part <= measured)));

    // What is done already is in no later profile.
    let elsewhere = small.path("elsewhere/again.json");
    let flag = format!("--profile={}", elsewhere.display());
    let outcome = small.limbeck("evaluate", &[&flag]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let names: Vec<String> = spans(&elsewhere).into_iter().map(|span| span.name).collect();
    assert_eq!(names[0], "evaluate");
    assert!(names.iter().any(|name| name == "evaluation") && !names.iter().any(|name| name == "training step"));
}

#[test]
fn profiling_changes_no_byte_of_a_cache_and_without_the_flag_nothing_is_written() {
    let small = SmallRun::new();
    let outcome = small.limbeck("precompute-teacher-logits", &[]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let plain = files(&small.path("run"));
    assert!(plain.keys().all(|path| !path.to_string_lossy().contains("profile")), "{:?}", plain.keys());
    fs::remove_dir_all(small.path("run")).unwrap();

    let outcome = small.limbeck("precompute-teacher-logits", &["--profile"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let mut profiled = files(&small.path("run"));
    assert!(profiled.remove(Path::new("profile.json")).is_some());
    assert!(plain == profiled, "the same files otherwise");
    fs::remove_dir_all(small.path("run")).unwrap();

    // Processes that share a cache do not share the file.
    let outcome = small.limbeck("precompute-teacher-logits", &["--profile", "--shard", "1/2"]);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert_eq!(spans(&small.path("run/profile-1-of-2.json"))[0].name, "precompute-teacher-logits");
}

#[test]
fn a_profile_that_cannot_be_written_is_refused_before_the_run_starts() {
    let small = SmallRun::new();
    let flag = |path: &str| format!("--profile={}", small.path(path).display());
    let cases = [("text.jsonl/profile.json", "not a directory"), ("teacher", "is a directory")];
    for (path, why) in cases {
        let outcome = small.limbeck("distill", &[&flag(path)]);
        let expected = format!(
            "error: the profile DIR/{path} cannot be written: {why}; give --profile=FILE a file in a directory that can be \
             written\n"
        );
        assert_eq!((outcome.code, small.shortened(&outcome.stderr)), (2, expected));
        assert!(!small.path("run").exists(), "nothing was begun");
    }
}

#[test]
fn a_run_that_fails_leaves_its_profile() {
    let small = SmallRun::new();
    let weights = small.path("teacher/model.safetensors");
    fs::write(&weights, b"torn").unwrap();
    let outcome = small.limbeck("distill", &["--profile"]);
    assert_ne!(outcome.code, 0);
    assert!(outcome.stderr.contains("model.safetensors"), "{}", outcome.stderr);
    let names: Vec<String> = nested(&spans(&small.path("run/profile.json"))).into_iter().map(|(_, s)| s.name).collect();
    assert_eq!(names[..2], ["distill", "open what the recipe names"]);
    assert!(!small.path("run/profile.json.tmp").exists());
}

#[cfg(unix)]
#[test]
fn a_run_that_is_interrupted_leaves_its_profile() {
    use std::process::{Command, Stdio};
    let small = SmallRun::new();
    let run_dir = small.path("run");
    let process = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .arg("distill")
        .arg(small.path("recipe.toml"))
        .arg("--run-dir")
        .arg(&run_dir)
        .args(["--profile", "--set", "train.steps=100000", "--set", "train.evaluate_every=0"])
        .args(["--set", "train.checkpoint_every=0"])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = std::time::Instant::now();
    let metrics = || fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
    while !metrics().contains("\"step\":3,") {
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert!(began.elapsed().as_secs() < 300, "the run hangs: {}", metrics());
    }
    assert!(!run_dir.join("profile.json").exists(), "written in the end, in one piece");
    Command::new("kill").args(["-INT", &process.id().to_string()]).status().unwrap();
    let output = process.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let nested = nested(&spans(&run_dir.join("profile.json")));
    assert_eq!(nested[0].1.name, "distill");
    assert!(nested.iter().any(|(around, span)| span.name == "checkpoint" && around[1] == "train the student"));
}
