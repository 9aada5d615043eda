//! The commands around a cache: written once more, looked at, compared with its teacher, and read without any model.

mod cache_samples;
#[allow(dead_code)] // its `main`
#[path = "../examples/read_cache.rs"]
mod read_cache;
mod small_run;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use burn::tensor::Device;
use cache_samples::{sample, settings, write};
use limbeck::cache::{CacheReader, Codec, Conversion, Selection, convert, write_whole};
use limbeck::fidelity;
use serde_json::Value;
use small_run::{SmallRun, limbeck};

fn words<'a>(words: &[&'a str]) -> Vec<&'a OsStr> {
    words.iter().map(|word| OsStr::new(*word)).collect()
}

#[test]
fn a_conversion_keeps_every_number_and_every_identity() {
    for temperatures in [vec![], vec![1.0, 0.7]] {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let manifest = write(&from, &settings(6, 3, &temperatures), 8);
        let converted =
            convert(&CacheReader::open(&from).unwrap(), &to, &Conversion { codec: Codec::Raw, ..Default::default() })
                .unwrap();
        assert_eq!(small_run::files(&from), small_run::files(&to));
        assert_eq!((converted.root, converted.counts), (manifest.root, manifest.counts));
    }
}

#[test]
fn an_interrupted_conversion_goes_on_to_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (from, to) = (folder.path().join("from"), folder.path().join("to"));
    let settings = settings(6, 2, &[1.0]);
    write(&from, &settings, 7);
    // As far as three sequences: one shard is sealed.
    let stopped = write_whole(&to, settings.clone(), |first| {
        let stop = || Err(limbeck::Error::usage("stopped", "go on"));
        (first..3).map(|number| Ok(sample(&settings, number))).chain(std::iter::once_with(stop))
    });
    assert_eq!(stopped.unwrap_err().to_string(), "stopped; go on");
    convert(&CacheReader::open(&from).unwrap(), &to, &Conversion { codec: Codec::Raw, ..Default::default() }).unwrap();
    assert_eq!(small_run::files(&from), small_run::files(&to));
}

#[test]
fn the_program_converts_and_refuses_unknown_codecs() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    write(Path::new(&path("from")), &settings(6, 3, &[1.0]), 4);
    let outcome = limbeck(&words(&["cache", "convert", &path("from"), &path("to"), "--codec", "raw"]));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    assert!(outcome.stdout.starts_with(&format!("cache: {}\nraw: ", path("to"))), "{}", outcome.stdout);
    let outcome = limbeck(&words(&["cache", "convert", &path("from"), &path("to"), "--codec", "zip"]));
    assert_eq!(outcome.code, 2);
    assert!(outcome.stderr.contains("unknown variant `zip`, expected "), "{}", outcome.stderr);
}

#[test]
fn what_is_not_said_of_a_narrower_selection_stays() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    write(Path::new(&path("top_k")), &settings(6, 3, &[1.0]), 4);
    let narrowed = |from: &str, to: &str, flags: &[&str]| {
        let (from, to) = (path(from), path(to));
        let arguments = [&["cache", "convert", &from, &to, "--codec", "raw"], flags].concat();
        let outcome = limbeck(&words(&arguments));
        assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
        CacheReader::open(to).unwrap().manifest().settings.soft_targets.clone().unwrap().selection
    };
    assert_eq!(narrowed("top_k", "fewer", &["--cap", "2"]), Selection::TopK { k: 2 });
    assert_eq!(narrowed("top_k", "likely", &["--theta", "0.01"]), Selection::MinProb { theta: 0.01, cap: 4 });
    assert_eq!(narrowed("likely", "both", &["--cap", "3"]), Selection::MinProb { theta: 0.01, cap: 3 });
}

#[test]
fn a_cache_is_described_as_json_and_as_a_page_without_scripts() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    let manifest = write(&cache, &settings(6, 3, &[1.0, 0.7]), 8);
    let (cache, page) = (cache.to_str().unwrap(), folder.path().join("page.html"));
    let outcome = limbeck(&words(&["inspect", cache, "--json", "--html", page.to_str().unwrap()]));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let said: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!(said["root"], manifest.root.as_str());
    assert_eq!(said["settings"]["soft_targets"]["teacher"]["name"], "Scout");
    let summary = &said["summary"];
    let rows = manifest.counts.valid_rows;
    let counted = |histogram: &Value| -> u64 {
        let (edges, counts) = (histogram["edges"].as_array().unwrap(), histogram["counts"].as_array().unwrap());
        assert_eq!(edges.len(), counts.len() + 1);
        counts.iter().map(|count| count.as_u64().unwrap()).sum()
    };
    assert_eq!(counted(&summary["kept_histogram"]), rows);
    for capture in 0..2 {
        assert_eq!(counted(&summary["captures"][capture]["tail_histogram"]), rows);
        assert_eq!(counted(&summary["captures"][capture]["entropy_histogram"]), rows);
    }
    let bytes = manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>() as f64;
    let close = |value: &Value, expected: f64| assert!((value.as_f64().unwrap() - expected).abs() < 1e-9);
    close(&summary["bytes_per_token"], bytes / rows as f64);
    close(&summary["bits_per_kept"], 8.0 * bytes / manifest.counts.kept_ids as f64);

    let page = fs::read_to_string(page).unwrap();
    for part in ["<h1>cache</h1>", "bits per kept id", "Tail mass at temperature 0.7", "Kept ids", "label_log_prob.1"] {
        assert!(page.contains(part), "the page lacks {part}");
    }
    for foreign in ["<script", "http://", "https://", "@import", "url("] {
        assert!(!page.contains(foreign), "the page has {foreign}");
    }
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());

    let text = limbeck(&words(&["inspect", cache])).stdout;
    assert!(text.contains("bits per kept id, entropy "), "{text}");
    assert!(text.contains("tail mass\n") && text.contains('#'), "{text}");
}

#[test]
fn tokens_alone_are_described_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("cache");
    write(&cache, &settings(6, 3, &[]), 4);
    let (cache, page) = (cache.to_str().unwrap(), folder.path().join("page.html"));
    let outcome = limbeck(&words(&["inspect", cache, "--html", page.to_str().unwrap()]));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    assert!(outcome.stdout.contains("none, tokens only") && outcome.stdout.contains("page "), "{}", outcome.stdout);
    assert!(!fs::read_to_string(page).unwrap().contains("Tail mass"));
}

#[test]
fn pictures_are_of_caches_only() {
    let run = SmallRun::new();
    let recipe = run.path("recipe.toml");
    let recipe = recipe.to_str().unwrap();
    for (arguments, flag) in
        [(vec!["inspect", recipe, "--json"], "--json"), (vec!["inspect", recipe, "--html", "x"], "--html")]
    {
        let outcome = limbeck(&words(&arguments));
        assert_eq!(outcome.code, 2);
        assert_eq!(outcome.stderr, format!("error: {recipe} is not a cache; use {flag} with caches only\n"));
    }
}

#[test]
fn a_cache_agrees_with_its_own_teacher_and_not_with_another() {
    let run = SmallRun::new();
    assert_eq!(run.limbeck("precompute-teacher-logits", &[]).code, 0);
    let (cache, teacher) = (run.path("run/cache/train"), run.path("teacher"));
    let reader = CacheReader::open(&cache).unwrap();
    let own = fidelity::compare(&reader, &teacher, &Device::flex(), 5).unwrap();
    assert!(own.same_teacher);
    assert_eq!((own.sequences.len(), own.sequences[0], own.control, own.captures.len()), (5, 0, 0.0, 2));
    assert!(own.rows > 100, "{}", own.rows);
    for capture in &own.captures {
        // Numbers of the cache are f32, and a row's last bit may depend on the batch it was computed in.
        assert!(capture.kl.abs() < 1e-6 && capture.worst_row.kl < 1e-5, "{capture:?}");
        assert!(
            capture.log_prob_error < 1e-4 && capture.tail_error < 1e-5 && capture.label_error < 1e-4,
            "{capture:?}"
        );
        assert!(capture.top1_agreement > 0.99, "{capture:?}");
    }
    let (cache, teacher) = (cache.to_str().unwrap().to_string(), teacher.to_str().unwrap().to_string());
    let arguments = ["cache", "stats", &cache, "--against", &teacher, "--sequences", "3"];
    let outcome = limbeck(&words(&arguments));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    assert!(outcome.stdout.contains("control     live against live: KL 0.000e0 nats\n"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains(", the cache's teacher\n"), "{}", outcome.stdout);

    run.write_teacher(6);
    let outcome = limbeck(&words(&arguments));
    assert_eq!(outcome.code, 1);
    assert!(outcome.stdout.contains(", not the teacher that the cache names\n"), "{}", outcome.stdout);
    assert!(
        outcome.stderr.starts_with(&format!("error: {cache}: at temperature 1.0 it is "))
            && outcome
                .stderr
                .contains(" nats per prediction from the live teacher, beyond the tolerance of 1e-3; sequence "),
        "{}",
        outcome.stderr
    );
    let tolerant = [&arguments[..], &["--tolerance", "1000"]].concat();
    assert_eq!(limbeck(&words(&tolerant)).code, 0);
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let run = SmallRun::new();
    let teacher = run.path("teacher");
    let message = |settings: &limbeck::cache::CacheSettings, name: &str, sequences: u64| {
        write(&run.path(name), settings, 3);
        let cache = CacheReader::open(run.path(name)).unwrap();
        let error = fidelity::compare(&cache, &teacher, &Device::flex(), sequences).unwrap_err();
        run.shortened(&error.to_string())
    };
    assert_eq!(
        message(&settings(6, 3, &[]), "tokens", 2),
        "DIR/tokens has no soft targets; compare a cache that a teacher made"
    );
    assert_eq!(message(&settings(6, 3, &[1.0]), "none", 0), "0 sequences were asked for; compare at least one");
    let mut wide = settings(6, 3, &[1.0]);
    wide.tokenizer.vocab_size = 5000;
    assert!(message(&wide, "wide", 3).starts_with("the vocabulary differs: the cache DIR/wide has the id "));
}

#[test]
fn a_cache_is_read_without_any_model() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = write(folder.path(), &settings(6, 3, &[1.0]), 4);
    let text = read_cache::describe(folder.path(), 1).unwrap();
    assert!(text.starts_with(&format!("4 sequences of 6, root {}\nsequence 1: ", manifest.root)), "{text}");
    assert!(text.contains("; likely were "), "{text}");
    assert!(read_cache::describe(folder.path(), 4).unwrap_err().to_string().ends_with("the cache has 4, from 0"));
}
