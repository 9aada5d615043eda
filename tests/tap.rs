//! A run of training that writes its own predictions as a cache: what is in it, that no interruption changes it, and
//! that students learn from it.

mod small_run;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use burn::tensor::{Device, Tensor};
use limbeck::cache::{
    CacheReader, CacheSettings, Codec, SoftTargetSettings, TeacherIdentity, TokenizerIdentity, TrainingSteps,
};
use limbeck::checkpoint::checkpoint_dir;
use limbeck::eval::report::Role;
use limbeck::recipe::Recipe;
use limbeck::run::RunOptions;
use limbeck::selection::Selection;
use limbeck::tap::CacheTap;
use limbeck::targets::{DistillBatch, PackedSequence, TargetSource};
use limbeck::teacher::ResidentTeacher;
use limbeck::train::Tap;
use limbeck::train::metrics::{Metric, read_metrics};
use limbeck::train::order::SequenceOrder;
use limbeck::{Error, Result, distill, precompute};
use small_run::*;

/// Steps 2, 5, 8 .. 23 of the 24; shards of 5 sequences end in the middle of a step.
const TAP: &str = "[tap]\nevery = 3\nfrom_step = 2\ntop_k = 8\ntemperatures = [1.0, 2.0]\nsequences_per_shard = 5\n";
const STEPS: [u64; 8] = [2, 5, 8, 11, 14, 17, 20, 23];
const SEQUENCES_PER_STEP: u64 = 4;

/// The small run with a tap, and its caches filled; `more` are further lines of `[tap]`.
fn tapped(more: &str) -> SmallRun {
    let small = SmallRun::new();
    let recipe = RECIPE.replace("[control]\n", "") + TAP + more;
    fs::write(small.path("recipe.toml"), recipe).unwrap();
    small
}

/// All checkpoints, to compare with.
const EVERY_STEP: [&str; 2] = ["train.checkpoint_every=1", "train.keep_checkpoints=30"];

/// The run for one step, as if it was asked to stop in it.
fn one_step(small: &SmallRun, recipe: &Recipe, run: &str) -> Result<()> {
    let options = RunOptions { run_dir: Some(small.path(run)), ..RunOptions::default() };
    options.stop.store(true, Ordering::Relaxed);
    distill::run(recipe, &options).map(drop)
}

/// The tap of a run, as a finished cache.
fn tap(small: &SmallRun, run: &str) -> CacheReader {
    CacheReader::open(small.path(run).join("tap")).unwrap()
}

#[test]
fn the_tap_holds_what_the_run_saw_and_what_its_weights_predicted_then() {
    let small = tapped("");
    distill::run(&small.recipe(&EVERY_STEP), &small.options("run")).unwrap();
    let tap = tap(&small, "run");
    let settings = &tap.manifest().settings;
    let soft_targets = settings.soft_targets.as_ref().unwrap();
    assert_eq!((settings.split.as_str(), settings.seq_len), ("train", 32));
    assert_eq!(soft_targets.selection, Selection::TopK { k: 8 });
    assert_eq!(soft_targets.temperatures, [1.0, 2.0]);
    assert_eq!(soft_targets.teacher.name, "small");
    assert!(soft_targets.teacher.fingerprint.starts_with("training:"), "{}", soft_targets.teacher.fingerprint);
    let steps = TrainingSteps { from_step: 2, every: 3, last_step: 24, sequences_per_step: SEQUENCES_PER_STEP };
    assert_eq!(soft_targets.teacher.in_training, Some(steps.clone()));
    assert_eq!(tap.sequence_count(), STEPS.len() as u64 * SEQUENCES_PER_STEP);

    let train = CacheReader::open(small.path("run/cache/train")).unwrap();
    let mut order = SequenceOrder::new(17, train.sequence_count());
    let (mut rows, mut of_log_probs, mut of_tails) = (0, 0.0f64, 0.0f64);
    for (place, step) in STEPS.into_iter().enumerate() {
        let first = place as u64 * SEQUENCES_PER_STEP;
        let numbers: Vec<u64> = (first..first + SEQUENCES_PER_STEP).collect();
        assert!(numbers.iter().all(|&number| steps.step_of(number) == step));
        let found = tap.read(&numbers).unwrap();
        let seen = order.take((step - 1) * SEQUENCES_PER_STEP, SEQUENCES_PER_STEP);
        assert_eq!(found.sequences, train.read(&seen).unwrap().sequences, "step {step}");

        // The weights that a step starts from are those of the checkpoint before it.
        let checkpoint = checkpoint_dir(small.path("run"), step - 1);
        let teacher =
            ResidentTeacher::open(&checkpoint, &Device::flex(), Selection::TopK { k: 8 }, &[1.0, 2.0]).unwrap();
        let expected = teacher.targets(&found.sequences, first).unwrap();
        let found_rows = found.targets.unwrap();
        for (number, expected) in expected.iter().enumerate() {
            let found_rows = found_rows.slice(number * 32, (number + 1) * 32);
            assert_eq!(found_rows.offsets, expected.offsets);
            for (mine, theirs) in found_rows.captures.iter().zip(&expected.captures) {
                let pairs = mine.log_probs.iter().zip(&theirs.log_probs).zip(found_rows.ids.iter().zip(&expected.ids));
                for ((mine, theirs), (id, other)) in pairs {
                    let distance = f64::from(mine - theirs).abs();
                    of_log_probs = of_log_probs.max(distance);
                    assert!(id == other || distance < 1e-5, "other ids, and no tie");
                }
                let valid = (0..32).filter(|&row| found.sequences[number].is_valid(row));
                for row in valid {
                    rows += 1;
                    let tails = f64::from(mine.log_tail[row]).exp() - f64::from(theirs.log_tail[row]).exp();
                    of_tails = of_tails.max(tails.abs());
                    let labels = f64::from(mine.label_log_prob[row] - theirs.label_log_prob[row]).abs();
                    of_log_probs = of_log_probs.max(labels);
                }
            }
        }
    }
    assert!(rows > 1000, "{rows}");
    println!("{rows} rows: log-probabilities {of_log_probs:.1e}, tails {of_tails:.1e}");
    assert!(of_log_probs < 1e-5 && of_tails < 1e-6, "{of_log_probs:.1e} {of_tails:.1e}");
}

#[test]
fn tapping_changes_no_weight() {
    let small = tapped("");
    distill::run(&small.recipe(&[]), &small.options("tapped")).unwrap();
    fs::write(small.path("recipe.toml"), RECIPE.replace("[control]\n", "")).unwrap();
    distill::run(&small.recipe(&[]), &small.options("plain")).unwrap();
    assert!(files(&checkpoint_dir(small.path("tapped"), 24)) == files(&checkpoint_dir(small.path("plain"), 24)));
    assert!(!small.path("plain/tap").exists());
}

#[test]
fn a_run_that_stops_after_every_step_writes_the_same_bytes() {
    for codec in ["", "codec = \"compact\"\n", "codec = \"packed\"\nselection = { kind = \"sampled\", draws = 9 }\n"] {
        let small = tapped("");
        let one_temperature = codec.contains("sampled");
        let tap = if one_temperature {
            TAP.replace("top_k = 8\n", "").replace("temperatures = [1.0, 2.0]\n", "")
        } else {
            TAP.to_string()
        };
        fs::write(small.path("recipe.toml"), RECIPE.replace("[control]\n", "") + &tap + codec).unwrap();
        let recipe = small.recipe(&[]);
        distill::run(&recipe, &small.options("whole")).unwrap();
        precompute::run(&recipe, &small.options("parts")).unwrap();
        for step in 1..24 {
            let error = one_step(&small, &recipe, "parts").unwrap_err();
            let Error::Interrupted { saved } = error else { panic!("{error}") };
            assert_eq!(saved, checkpoint_dir(small.path("parts"), step));
        }
        one_step(&small, &recipe, "parts").unwrap();
        assert!(files(&small.path("whole/tap")) == files(&small.path("parts/tap")), "{codec}");
        let last = |run: &str| files(&checkpoint_dir(small.path(run), 24));
        assert!(last("whole") == last("parts"), "{codec}");
        assert!(!last("whole").keys().any(|path| path.starts_with("tap")), "all is sealed at the end");
    }
}

#[test]
fn a_run_that_died_after_its_last_checkpoint_writes_the_same_bytes() {
    let small = tapped("");
    let recipe = small.recipe(&EVERY_STEP);
    distill::run(&recipe, &small.options("whole")).unwrap();
    precompute::run(&recipe, &small.options("died")).unwrap();
    for _ in 0..15 {
        one_step(&small, &recipe, "died").unwrap_err();
    }
    // Shards of 15 steps are sealed, and the checkpoint to go on from is that of step 6, or there is none.
    for kept in [6, 0] {
        for step in kept + 1..=24 {
            let _ = fs::remove_dir_all(checkpoint_dir(small.path("died"), step));
        }
        for _ in 0..9 {
            one_step(&small, &recipe, "died").unwrap_err();
        }
    }
    distill::run(&recipe, &small.options("died")).unwrap();
    assert!(files(&small.path("whole/tap")) == files(&small.path("died/tap")));
    // The manifest alone is missing: the process died between the last checkpoint and its end.
    fs::remove_dir_all(small.path("died/tap")).unwrap();
    for step in 1..=24 {
        let _ = fs::remove_dir_all(checkpoint_dir(small.path("died"), step));
    }
    distill::run(&recipe, &small.options("died")).unwrap();
    assert!(files(&small.path("whole/tap")) == files(&small.path("died/tap")));
}

/// A recipe that trains on the tap of `run`, with the student's shape changed.
fn student_of(small: &SmallRun, run: &str, layers: usize) -> Recipe {
    let (before, rest) = RECIPE.split_once("[data]").unwrap();
    let (_, after) = rest.split_once("[student]").unwrap();
    let caches = format!("train = \"{run}/tap\"\nheld_out = \"{run}/cache/held_out\"");
    let text = format!("{before}[data]\ntokenizer = \"tokenizer\"\n[cache]\n{caches}\n[student]{after}")
        .replace("layers = 2", &format!("layers = {layers}"))
        .replace("steps = 24", "steps = 60");
    let path = small.path(&format!("student{layers}.toml"));
    fs::write(&path, text).unwrap();
    Recipe::load(path, &[]).unwrap()
}

#[test]
fn several_students_learn_from_one_tap() {
    let small = tapped("");
    let sets = ["tap.every=1", "tap.from_step=13", "train.lr.from=3e-2"];
    distill::run(&small.recipe(&sets), &small.options("run")).unwrap();
    let before = files(&small.path("run/tap"));
    for layers in [1, 3] {
        let run = format!("student{layers}");
        let report = distill::run(&student_of(&small, "run", layers), &small.options(&run)).unwrap();
        assert_eq!(report.arms[0].role, Role::Student);
        let soft: Vec<f64> = read_metrics(small.path(&run).join("metrics.jsonl"))
            .unwrap()
            .into_iter()
            .filter_map(|metric| match metric {
                Metric::Step(step) if step.arm == "student" => step.soft_loss,
                _ => None,
            })
            .collect();
        let (first, last) = (soft[0], soft[soft.len() - 1]);
        assert!(last < 0.7 * first, "{layers} layers: a soft loss of {first} and then {last}");
    }
    assert!(files(&small.path("run/tap")) == before, "nothing writes to it");
}

#[test]
fn a_tap_that_cannot_be_whole_is_refused() {
    let small = tapped("");
    let without = |sets: &[&str]| {
        let sets: Vec<String> = sets.iter().map(|set| set.to_string()).collect();
        Recipe::parse(&RECIPE.replace("[control]\n", ""), small.path("plain.toml"), &sets).unwrap()
    };
    precompute::run(&without(&[]), &small.options("run")).unwrap();
    for _ in 0..6 {
        one_step(&small, &without(&[]), "run").unwrap_err();
    }
    let message = |sets: &[&str]| {
        let error = distill::run(&small.recipe(sets), &small.options("run")).unwrap_err();
        small.shortened(&error.to_string())
    };
    assert_eq!(
        message(&[]),
        "DIR/run/tap: it lacks sequences 0 to 7, which the run has gone past; set tap.from_step to a later step, or start \
         afresh with another --run-dir"
    );
    // From the next step on it can be had.
    one_step(&small, &small.recipe(&["tap.from_step=7", "tap.every=1", "tap.sequences_per_shard=1"]), "run")
        .unwrap_err();
    let other = message(&["tap.from_step=7", "tap.every=1", "tap.sequences_per_shard=1", "tap.top_k=4"]);
    let expected = "the cache setting `soft_targets.selection.k` differs: the unfinished cache DIR/run/tap has 8, this run has 4; ";
    assert!(other.starts_with(expected), "{other}");
    let past = message(&["tap.from_step=25"]);
    assert!(past.ends_with("`tap.from_step` is 25, but the run has 24 steps; use at most 24"), "{past}");
}

#[test]
fn predictions_that_are_not_finite_end_the_run_by_its_step() {
    let folder = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let model = random_model(scout(1, 64).decoder(folder.path()).unwrap(), 5, &device);
    let steps = TrainingSteps { from_step: 3, every: 1, last_step: 9, sequences_per_step: 2 };
    let settings = CacheSettings {
        split: "train".into(),
        data_fingerprint: "the data".into(),
        tokenizer: TokenizerIdentity { fingerprint: "the tokenizer".into(), vocab_size: 64 },
        seq_len: 4,
        sequences_per_shard: 8,
        codec: Codec::Raw,
        levels: None,
        log_normalizer: None,
        soft_targets: Some(SoftTargetSettings {
            teacher: TeacherIdentity {
                name: "small".into(),
                fingerprint: "training:".into(),
                dtype: "f32".into(),
                in_training: Some(steps),
            },
            selection: Selection::TopK { k: 4 },
            temperatures: vec![1.0],
            router: None,
        }),
    };
    let mut tap = CacheTap::resume(folder.path(), settings, vec![1; 64], 0, None).unwrap();
    assert!(!tap.takes(2) && tap.takes(3));
    let sequence = PackedSequence { tokens: vec![1, 2, 3, 4, 5], segments: vec![0; 5] };
    let batch = DistillBatch { sequences: vec![sequence; 2], targets: None, row_weights: None };
    let hidden = |value: f32| Tensor::<2>::full([8, 32], value, &device);
    tap.take(3, &batch, hidden(1.0), &model).unwrap();
    let error = tap.take(4, &batch, hidden(f32::NAN), &model).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the forward pass of step 4 is not finite; lower the learning rate, and start again from the last checkpoint"
    );
}

#[test]
fn keys_of_the_tap_that_make_no_sense_are_refused() {
    let small = tapped("");
    let refused = |set: &str| {
        let error = Recipe::load(small.path("recipe.toml"), &[set.to_string()]).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string().rsplit_once(": `").map(|(_, rest)| format!("`{rest}")).unwrap()
    };
    assert_eq!(refused("tap.every=0"), "`tap.every` is 0; use at least 1");
    assert_eq!(refused("tap.from_step=0"), "`tap.from_step` is 0; use at least 1");
    let both = RECIPE.replace("[control]\n", "") + TAP + "selection = \"min_prob\"\n";
    let error = Recipe::parse(&both, small.path("both.toml"), &[]).map(drop).unwrap_err().to_string();
    assert!(error.ends_with("`tap.top_k` is given beside `tap.selection`; give only one of the two"), "{error}");
    let replaced = Recipe::load(small.path("recipe.toml"), &["tap.selection=min_prob".to_string()]).unwrap();
    assert_eq!(replaced.tap.unwrap().selection(), Selection::default());
    assert_eq!(refused("tap.temperatures=[]"), "`tap.temperatures` is empty; use [1.0]");
    assert_eq!(refused("tap.temperatures=[1.0, 1.0]"), "`tap.temperatures` has 1 twice; name each temperature once");
    assert_eq!(refused("tap.top_k=0"), "`tap.top_k` is 0; keep at least 1 id per prediction");
    assert_eq!(
        refused("tap.levels=40"),
        "`tap` cannot be written: the codec `raw` rounds nothing, and has no levels; leave out [tap] levels, or choose packed \
         or compact"
    );
    let path: PathBuf = small.path("recipe.toml");
    let recipe = Recipe::load(&path, &[]).unwrap();
    assert_eq!(Recipe::parse(&recipe.to_toml(), &path, &[]).unwrap().to_toml(), recipe.to_toml());
}
