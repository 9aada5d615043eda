//! The whole line, from a recipe and some text to a report: what each part gives the next, and what is left on disk.

mod small_run;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use burn::tensor::Device;
use limbeck::Error;
use limbeck::cache::{CacheReader, WriterPart};
use limbeck::checkpoint::{CheckpointReader, checkpoint_dir};
use limbeck::eval::report::{Report, Role};
use limbeck::models::{Decoder, TokenLayout};
use limbeck::recipe::Recipe;
use limbeck::run::RunOptions;
use limbeck::selection::Selection;
use limbeck::targets::{PADDING, PackedSequence, TargetKind, TargetSource};
use limbeck::train::metrics::{EvalMetrics, Metric, StepMetrics, read_metrics};
use limbeck::{distill, precompute};
use limbeck_kernels::oracle;
use small_run::*;

/// The steps and the evaluations that one arm logged.
fn logged(run_dir: &Path, arm: &str) -> (Vec<StepMetrics>, Vec<EvalMetrics>) {
    let (mut steps, mut evaluations) = (vec![], vec![]);
    for metric in read_metrics(run_dir.join("metrics.jsonl")).unwrap() {
        match metric {
            Metric::Step(metrics) if metrics.arm == arm => steps.push(metrics),
            Metric::Evaluation(metrics) if metrics.arm == arm => evaluations.push(metrics),
            _ => {}
        }
    }
    (steps, evaluations)
}

/// When each file below a directory was last written.
fn times(directory: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let time = |path: &PathBuf| fs::metadata(directory.join(path)).unwrap().modified().unwrap();
    files(directory).into_keys().map(|path| (path.clone(), time(&path))).collect()
}

#[test]
fn one_recipe_goes_from_text_to_report_and_a_second_time_does_nothing() {
    let small = SmallRun::new();
    let recipe = small.recipe(&[]);
    let run_dir = small.path("run");
    let report = distill::run(&recipe, &small.options("run")).unwrap();
    for file in [
        "recipe.toml",
        "plan.json",
        "metrics.jsonl",
        "report.json",
        "report.html",
        "cache/train/manifest.json",
        "cache/held_out/manifest.json",
        "checkpoints/step-000016/model.safetensors",
        "checkpoints/step-000024/model.safetensors",
        "checkpoints/step-000024/config.json",
        "checkpoints/step-000024/tokenizer.json",
        "checkpoints/step-000024/train_state.json",
        "control/checkpoints/step-000024/model.safetensors",
    ] {
        assert!(run_dir.join(file).is_file(), "{file}");
    }
    assert!(!run_dir.join("checkpoints/step-000008").exists(), "only the last two are kept");
    let frozen = Recipe::load(run_dir.join("recipe.toml"), &[]).unwrap();
    assert_eq!(frozen.to_toml(), recipe.to_toml());

    let roles: Vec<Role> = report.arms.iter().map(|arm| arm.role).collect();
    assert_eq!(roles, [Role::Student, Role::Control, Role::Teacher]);
    let held_out = CacheReader::open(run_dir.join("cache/held_out")).unwrap();
    for arm in &report.arms {
        let evaluation = &arm.evaluation;
        assert_eq!(evaluation.token_count, held_out.manifest().counts.valid_rows);
        assert!(evaluation.cross_entropy.is_finite() && evaluation.bits_per_byte > 0.0, "{evaluation:?}");
        assert_eq!(evaluation.kl_to_teacher.is_some(), arm.role != Role::Teacher);
    }
    let seen = report.arms[0].tokens_seen.unwrap();
    assert!(seen > 0 && seen <= 24 * 128, "rows between documents predict nothing: {seen}");

    for arm in ["student", "control"] {
        let (steps, evaluations) = logged(&run_dir, arm);
        assert_eq!(steps.iter().map(|line| line.step).collect::<Vec<_>>(), (1..=24).collect::<Vec<_>>());
        assert_eq!(evaluations.iter().map(|line| line.step).collect::<Vec<_>>(), [8, 16, 24]);
        assert!(steps[23].loss < 0.8 * steps[0].loss, "{arm}: {} to {}", steps[0].loss, steps[23].loss);
        assert!(evaluations[1].cross_entropy < evaluations[0].cross_entropy, "{arm}");
        assert_eq!(steps[0].expert_load.len(), 2);
        assert_eq!(steps[0].soft_loss.is_some(), arm == "student");
    }

    // Once more: nothing is trained, nothing that was there is written anew, and the measures are the same.
    let (before, times_before) = (files(&run_dir), times(&run_dir));
    let again = distill::run(&recipe, &small.options("run")).unwrap();
    assert_eq!(again, report);
    let after = files(&run_dir);
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    for (path, bytes) in &after {
        assert!(*bytes == before[path], "{} is not as it was", path.display());
    }
    let again_written = ["recipe.toml", "plan.json", "report.json", "report.html"].map(PathBuf::from);
    for (path, time) in times(&run_dir) {
        assert!(again_written.contains(&path) || time == times_before[&path], "{} was written again", path.display());
    }

    // Measured from what is on disk, by another command.
    assert_eq!(distill::report(&recipe, &small.options("run")).unwrap(), report);
    assert_eq!(Report::read(run_dir.join("report.json")).unwrap(), report);
    let outcome = limbeck(&["evaluate".as_ref(), run_dir.as_os_str(), "--quiet".as_ref()]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let expected = format!("{}\nreport: {}\n", report.table().trim_end(), run_dir.join("report.html").display());
    assert_eq!(outcome.stdout, expected);
}

#[test]
fn a_recipe_without_teacher_trains_on_the_text_alone() {
    let small = SmallRun::new();
    let text: Vec<&str> = RECIPE.split_inclusive('\n').collect();
    let without: String = sections(&text, &["[teacher]", "[cache]", "[control]", "[loss]"]);
    fs::write(small.path("recipe.toml"), without).unwrap();
    let report = distill::run(&small.recipe(&[]), &small.options("run")).unwrap();
    assert_eq!(report.arms.len(), 1);
    assert_eq!((report.arms[0].role, report.arms[0].evaluation.kl_to_teacher), (Role::Student, None));
    assert!(report.cache.is_none());
    let (steps, _) = logged(&small.path("run"), "student");
    for line in &steps {
        assert!(line.soft_loss.is_none() && line.soft_weight == 0.0);
        let balance = 0.001 * line.aux_loss.expect("the model has experts");
        assert!((line.loss - line.hard_loss - balance).abs() < 1e-5, "{line:?}");
    }
    assert!(steps[23].loss < 0.8 * steps[0].loss);
    let cache = CacheReader::open(small.path("run/cache/train")).unwrap();
    assert!(cache.manifest().settings.soft_targets.is_none());

    // What it made is a teacher for another run.
    let made = checkpoint_dir(small.path("run"), 24);
    fs::write(small.path("recipe.toml"), RECIPE).unwrap();
    let teacher = format!("teacher.checkpoint={}", made.display());
    let next = distill::run(&small.recipe(&[&teacher, "train.steps=5"]), &small.options("next")).unwrap();
    let teacher = &next.arm(Role::Teacher).unwrap().evaluation;
    let difference = teacher.cross_entropy - report.arms[0].evaluation.cross_entropy;
    assert!(difference.abs() < 1e-4, "its cached predictions measure as it does, but for {difference}");
}

/// The lines of a recipe without some of its sections.
fn sections(lines: &[&str], left_out: &[&str]) -> String {
    let mut keep = true;
    let mut kept = String::new();
    for line in lines {
        if line.starts_with('[') {
            keep = !left_out.contains(&line.trim_end());
        }
        if keep {
            kept.push_str(line);
        }
    }
    kept
}

/// The weights of a run's arm after its last step.
fn weights(dir: &Path, step: u64) -> Vec<u8> {
    fs::read(checkpoint_dir(dir, step).join("model.safetensors")).unwrap()
}

#[test]
fn the_control_differs_from_the_student_by_its_loss_alone() {
    let small = SmallRun::new();
    // Without weight on the soft target nothing is left that could tell the two apart.
    let recipe = small.recipe(&["loss.weighting.soft=0.0", "train.steps=6"]);
    distill::run(&recipe, &small.options("same")).unwrap();
    assert!(weights(&small.path("same"), 6) == weights(&small.path("same/control"), 6));
    let (student, control) = (logged(&small.path("same"), "student").0, logged(&small.path("same"), "control").0);
    assert_eq!(student.len(), 6);
    for (student, control) in student.iter().zip(&control) {
        let StepMetrics { tokens_per_second, data_wait, .. } = *student;
        let expected = StepMetrics { arm: "student".into(), tokens_per_second, data_wait, ..control.clone() };
        assert_eq!(*student, expected);
    }

    // With it, both still begin with the same weights on the same rows, and see the same data.
    distill::run(&small.recipe(&["train.steps=6"]), &small.options("run")).unwrap();
    assert!(weights(&small.path("run"), 6) != weights(&small.path("run/control"), 6));
    let (student, control) = (logged(&small.path("run"), "student").0, logged(&small.path("run"), "control").0);
    // The student's kept ids are added up apart from the others, so the last digits may differ.
    assert!((student[0].hard_loss / control[0].hard_loss - 1.0).abs() < 1e-7);
    assert_eq!(student[0].expert_load, control[0].expert_load);
    assert_eq!((student[0].soft_weight, control[0].soft_weight), (0.5, 0.0));
    for (student, control) in student.iter().zip(&control) {
        assert_eq!(
            (student.step, student.tokens_seen, student.epoch),
            (control.step, control.tokens_seen, control.epoch)
        );
        assert_eq!((student.total_steps, student.learning_rate), (control.total_steps, control.learning_rate));
    }
}

/// The teacher's logits of every row, each document of the sequence run on its own; `None` for rows of no document.
fn logits_of_documents(model: &Decoder, sequence: &PackedSequence) -> Vec<Option<Vec<f32>>> {
    let (vocab, length) = (model.config.vocab_size, sequence.seq_len());
    let mut rows = vec![None; length];
    let mut start = 0;
    while start < length {
        let segment = sequence.segments[start];
        let end = (start..length).find(|&t| sequence.segments[t] != segment).unwrap_or(length);
        if segment != PADDING {
            let layout = TokenLayout::of_documents(&model.config, sequence.tokens[start..end].to_vec(), end - start);
            let logits = model.logits(model.forward(&layout).0).into_data().try_into_vec::<f32>().unwrap();
            for (row, logits) in (start..end).zip(logits.chunks(vocab)) {
                rows[row] = Some(logits.to_vec());
            }
        }
        start = end;
    }
    rows
}

#[test]
fn every_cached_row_is_what_the_oracle_makes_of_the_teachers_logits() {
    const TOLERANCE: f64 = 2e-5;
    let small = SmallRun::new();
    let recipe = small.recipe(&["data.tokens=2000"]);
    let cache_dir = precompute::run(&recipe, &small.options("run")).unwrap();
    let teacher = Decoder::open(&small.path("teacher"), &Device::flex()).unwrap();
    let near = |what: &str, cached: f32, truth: f64| {
        assert!((cached as f64 - truth).abs() < TOLERANCE, "{what}: {cached} in the cache, {truth} by the oracle");
    };
    let (mut rows, mut several_documents) = (0, 0);
    for split in ["train", "held_out"] {
        let cache = CacheReader::open(cache_dir.join(split)).unwrap();
        for number in 0..cache.sequence_count() {
            let batch = cache.read(&[number]).unwrap();
            let (sequence, targets) = (&batch.sequences[0], batch.targets.as_ref().unwrap());
            several_documents += u64::from(sequence.segments.iter().any(|&segment| segment != 0 && segment != PADDING));
            for (row, logits) in logits_of_documents(&teacher, sequence).into_iter().enumerate() {
                let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
                if !sequence.is_valid(row) {
                    assert!(kept.is_empty());
                    continue;
                }
                let (logits, label) = (logits.unwrap(), sequence.tokens[row + 1]);
                let wide: Vec<f64> = logits.iter().map(|&logit| logit as f64).collect();
                assert_eq!(kept.len(), 8);
                for (capture, temperature) in targets.captures.iter().zip([1.0, 2.0]) {
                    assert_eq!(capture.temperature as f64, temperature);
                    let what = format!("{split}: sequence {number}, row {row}, temperature {temperature}");
                    let truth = oracle::top_k(&logits, 8, label, temperature);
                    let all = oracle::log_softmax(&wide, temperature);
                    for (place, at) in kept.clone().enumerate() {
                        let cached = capture.log_probs[at];
                        // The value of the id that is kept, and that of the id which should be: equal, but for ids
                        // that are closer to each other than rounding.
                        near(&what, cached, all[targets.ids[at] as usize]);
                        near(&what, cached, truth.log_probs[place]);
                    }
                    near(&what, capture.log_tail[row], truth.log_tail);
                    near(&what, capture.label_log_prob[row], truth.label_log_prob);
                }
                rows += 1;
            }
        }
    }
    assert!(rows > 1000 && several_documents > 30, "{rows} rows, {several_documents} sequences of several documents");
}

#[test]
fn an_interrupted_precompute_goes_on_to_the_same_bytes() {
    let small = SmallRun::new();
    // Shards and batches of different lengths, so that a shard ends inside a batch and the other way round.
    for (shard, batch, selection) in
        [(2, 3, "cache.top_k=8"), (5, 3, "cache.selection=min_prob"), (5, 3, "cache.selection=threshold_sampled")]
    {
        let shard = format!("cache.sequences_per_shard={shard}");
        let batch = format!("teacher.batch_tokens={}", batch * 32);
        let recipe = small.recipe(&["data.tokens=1500", &shard, &batch, selection]);
        let name = format!("{shard} {selection}").replace('.', "_");
        let undisturbed = precompute::run(&recipe, &small.options(&format!("undisturbed {name}"))).unwrap();
        let undisturbed = files(&undisturbed);
        assert!(undisturbed.len() > 10);

        let options = small.options(&format!("disturbed {name}"));
        let cache_dir = options.run_dir(&recipe).join("cache");
        let mut interruptions = 0;
        while let Err(error) = precompute_until_a_shard_is_sealed(&recipe, &options, &cache_dir) {
            assert_eq!(error.exit_code(), 130, "{error}");
            let Error::Interrupted { saved } = &error else { panic!("{error}") };
            assert!(saved.starts_with(&cache_dir), "{error}");
            interruptions += 1;
            assert!(interruptions < 100, "each part seals a shard, so it comes to an end");
        }
        assert!(interruptions >= 1, "it was over before it was asked to stop");
        let disturbed = files(&cache_dir);
        assert_eq!(disturbed.keys().collect::<Vec<_>>(), undisturbed.keys().collect::<Vec<_>>());
        for (path, bytes) in &disturbed {
            assert!(*bytes == undisturbed[path], "{} differs after {interruptions} interruptions", path.display());
        }
    }
}

#[test]
fn drawn_targets_train_a_student_and_held_out_text_keeps_the_likeliest() {
    let small = SmallRun::new();
    let overrides = ["cache.selection={ kind = \"threshold_sampled\", threshold = 0.02 }", "train.steps=3"];
    let lr = ["train.lr.warmup=0", "control.enabled=false"];
    let recipe = small.recipe(&[&overrides[..], &lr].concat());
    let report = distill::run(&recipe, &small.options("run")).unwrap();
    let student = report.arms.iter().find(|arm| arm.role == Role::Student).unwrap();
    assert!(student.evaluation.kl_to_teacher.unwrap() > 0.0 && student.evaluation.top1_agreement.is_some());

    let selection = |split: &str| {
        let cache = CacheReader::open(small.path("run/cache").join(split)).unwrap();
        let batch = cache.read(&[0]).unwrap();
        let kept = cache.manifest().settings.soft_targets.clone().unwrap().selection;
        (kept, batch.targets.unwrap())
    };
    let (kept, targets) = selection("train");
    assert_eq!(kept, Selection::ThresholdSampled { threshold: 0.02, seed: 0 });
    assert_eq!(targets.kind, TargetKind::Sampled);
    assert!(targets.log_normalizer.unwrap().iter().any(|normalizer| *normalizer != 0.0));
    let (kept, targets) = selection("held_out");
    assert_eq!((kept, targets.kind), (Selection::default(), TargetKind::Exact));
    // The teacher's batches may be cut otherwise without another id being drawn.
    let again =
        small.recipe(&[&overrides[..], &lr, &["teacher.batch_tokens=32", "cache.sequences_per_shard=3"]].concat());
    let cache = precompute::run(&again, &small.options("again")).unwrap();
    let (one, other) = (small.path("run/cache/train"), cache.join("train"));
    let (one, other) = (CacheReader::open(one).unwrap(), CacheReader::open(other).unwrap());
    let rows = |cache: &CacheReader| -> Vec<Vec<u32>> {
        let numbers: Vec<u64> = (0..cache.sequence_count()).collect();
        let targets = cache.read(&numbers).unwrap().targets.unwrap();
        targets.offsets.windows(2).map(|pair| targets.ids[pair[0] as usize..pair[1] as usize].to_vec()).collect()
    };
    let (one, other) = (rows(&one), rows(&other));
    let differing = one.iter().zip(&other).filter(|(one, other)| one != other).count();
    // A logit's last bit may depend on the batch, and with it an id that a draw only just falls on.
    assert!(one.len() == other.len() && one.len() > 3000 && differing * 50 < one.len(), "{differing} rows differ");
}

#[test]
fn parts_of_a_precompute_give_the_bytes_of_one_and_the_last_to_end_finishes() {
    let small = SmallRun::new();
    let recipe = small.recipe(&["data.tokens=1500", "cache.sequences_per_shard=4", "teacher.batch_tokens=96"]);
    let expected = files(&precompute::run(&recipe, &small.options("alone")).unwrap());
    for count in [2, 3] {
        let name = format!("shared by {count}");
        let parts: Vec<_> = (0..count)
            .map(|index| RunOptions { part: WriterPart::new(index, count).unwrap(), ..small.options(&name) })
            .collect();
        // The last part first, then all at once.
        let ended = precompute::run_part(&recipe, &parts[count as usize - 1]).unwrap();
        assert_eq!(ended.missing.len(), 2, "{:?}", ended.missing);
        thread::scope(|scope| {
            let runs: Vec<_> =
                parts.iter().map(|options| scope.spawn(|| precompute::run_part(&recipe, options).unwrap())).collect();
            runs.into_iter().for_each(|run| drop(run.join().unwrap()));
        });
        let cache_dir = precompute::run(&recipe, &small.options(&name)).unwrap();
        assert!(files(&cache_dir) == expected, "{count} parts");
    }

    // From the command line.
    let directory = small.path("by hand");
    let run = |part: &str| {
        let arguments = ["precompute-teacher-logits", small.path("recipe.toml").to_str().unwrap(), "--run-dir"]
            .map(|argument| argument.to_string().into());
        let mut arguments: Vec<std::ffi::OsString> = arguments.to_vec();
        arguments.push(directory.clone().into());
        let rest = ["--shard", part, "--quiet", "--set", "data.tokens=1500", "--set", "cache.sequences_per_shard=4"];
        arguments.extend(rest.map(Into::into));
        limbeck(&arguments.iter().map(|argument| argument.as_os_str()).collect::<Vec<_>>())
    };
    let (cache, outcome) = (directory.join("cache"), run("2/2"));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""));
    let first = format!("cache: {}\npart 2/2 is written, other parts are still missing: ", cache.display());
    assert!(outcome.stdout.starts_with(&first), "{}", outcome.stdout);
    assert!(outcome.stdout.contains(" shards are missing (0, 2, 4, ...)\n"), "{}", outcome.stdout);
    assert_eq!(run("1/2").stdout, format!("cache: {}\n", cache.display()));
    assert!(files(&cache) == expected);
    let outcome = run("3/2");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (2, ""));
    assert!(outcome.stderr.contains("there is no part 3 of 2; parts are 1/N, 2/N, and so on to N/N"));
}

/// Asks the run to stop as soon as it has sealed one more shard.
fn precompute_until_a_shard_is_sealed(recipe: &Recipe, options: &RunOptions, cache_dir: &Path) -> limbeck::Result<()> {
    options.stop.store(false, Ordering::Relaxed);
    let over = AtomicBool::new(false);
    let before = shard_count(cache_dir);
    thread::scope(|scope| {
        scope.spawn(|| {
            while shard_count(cache_dir) == before && !over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_micros(100));
            }
            options.stop.store(true, Ordering::Relaxed);
        });
        let result = precompute::run(recipe, options);
        over.store(true, Ordering::Relaxed);
        result.map(drop)
    })
}

/// Sealed shards of all splits.
fn shard_count(cache_dir: &Path) -> usize {
    let shards = ["train", "held_out"].map(|split| fs::read_dir(cache_dir.join(split).join("shards")));
    let sealed = shards.into_iter().flatten().flatten().flatten();
    sealed.filter(|entry| entry.path().extension().is_some_and(|ending| ending == "safetensors")).count()
}

#[test]
fn a_refused_run_keeps_the_recipe_it_was_made_with() {
    let small = SmallRun::new();
    distill::run(&small.recipe(&["train.steps=5"]), &small.options("run")).unwrap();
    let before = files(&small.path("run"));
    let error = distill::run(&small.recipe(&["train.steps=6"]), &small.options("run")).unwrap_err();
    assert_eq!(
        small.shortened(&error.to_string()),
        "`steps` of the run differs: DIR/run/checkpoints/step-000005 has 5, this run has 6; go back to the settings the \
         run began with, or start afresh with another --run-dir"
    );
    assert!(files(&small.path("run")) == before);
}

#[test]
fn a_mended_teacher_goes_on_where_the_broken_one_failed() {
    let small = SmallRun::new();
    let weights = small.path("teacher/model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let mut broken = whole.clone();
    let last = broken.len() - 4;
    broken[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, broken).unwrap();
    let recipe = small.recipe(&["data.tokens=500"]);
    let error = precompute::run(&recipe, &small.options("run")).unwrap_err();
    assert!(error.to_string().contains("NaN"), "{error}");
    fs::write(&weights, whole).unwrap();
    let cache = precompute::run(&recipe, &small.options("run")).unwrap();
    let named = CacheReader::open(cache.join("train")).unwrap().manifest().settings.soft_targets.clone().unwrap();
    let teacher = CheckpointReader::open(small.path("teacher")).unwrap();
    assert_eq!(named.teacher.fingerprint, teacher.fingerprint().unwrap());
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_the_state_and_the_same_command_goes_on() {
    use std::process::{Command, Stdio};
    let small = SmallRun::new();
    let (recipe, run_dir) = (small.path("recipe.toml"), small.path("run"));
    let arguments = ["--set", "train.steps=200", "--set", "control.enabled=false", "--set", "train.checkpoint_every=0"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_limbeck"))
        .args(["distill", recipe.to_str().unwrap(), "--run-dir", run_dir.to_str().unwrap()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = run_dir.join("metrics.jsonl");
    while !fs::read(&metrics).is_ok_and(|text| text.iter().filter(|&&byte| byte == b'\n').count() >= 3) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it trained");
        thread::sleep(Duration::from_millis(2));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]), "{stderr}");
    let (step, saved) = limbeck::checkpoint::latest_checkpoint(&run_dir).unwrap().unwrap();
    assert!((3..200).contains(&step), "stopped at step {step}");
    assert!(
        stderr.contains("stopping as soon as the state is saved; press Ctrl-C again to stop at once\n")
            && stderr.ends_with(&format!(
                "error: interrupted; state saved in {}, run the same command again to go on\n",
                saved.display()
            )),
        "{stderr}"
    );
    let outcome = small.limbeck("distill", &arguments);
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    let going_on = format!("student: going on from {}", saved.display());
    assert!(outcome.stderr.contains(&going_on), "{}", outcome.stderr);
    let (steps, _) = logged(&run_dir, "student");
    assert_eq!(steps.iter().map(|line| line.step).collect::<Vec<_>>(), (1..=200).collect::<Vec<_>>());
}

#[test]
fn a_finished_cache_at_an_address_trains_the_same_student_and_nothing_is_written_there() {
    let small = SmallRun::new();
    let keys = ["train.steps=4", "train.lr.warmup=1", "loss.temperature=1.0"];
    distill::run(&small.recipe(&keys), &small.options("near")).unwrap();
    let cache = small.path("near/cache");
    let before = times(&cache);
    let dir = format!("cache.dir=file://{}", cache.display());
    let with_address = |more: &str| small.recipe(&[keys[0], keys[1], keys[2], &dir, more]);
    distill::run(&with_address("seed=17"), &small.options("far")).unwrap();
    assert!(weights(&small.path("far"), 4) == weights(&small.path("near"), 4));
    assert_eq!(times(&cache), before);
    assert!(!small.path("far/cache").exists());

    // It has to be the cache that the recipe would make.
    let error = distill::run(&with_address("cache.top_k=4"), &small.options("other")).unwrap_err().to_string();
    let name = cache.join("train").display().to_string();
    assert!(
        error.contains(&name)
            && error.ends_with("give the address of another cache, or the settings that this one was made with"),
        "{error}"
    );
    let nothing = format!("cache.dir=file://{}", small.path("nothing").display());
    let recipe = small.recipe(&[keys[0], keys[1], keys[2], &nothing]);
    let error = distill::run(&recipe, &small.options("nothing")).unwrap_err().to_string();
    assert!(error.contains("there is no cache here (no manifest.json)"), "{error}");
    assert!(!small.path("nothing/train").exists());
}

#[cfg(not(feature = "object-store"))]
#[test]
fn an_address_asks_for_a_build_that_can_read_it() {
    let small = SmallRun::new();
    let recipe = small.recipe(&["cache.dir=s3://bucket/cache"]);
    let error = distill::run(&recipe, &small.options("far")).unwrap_err();
    let expected = "s3://bucket/cache/train: this limbeck was built without object stores; build it with \
                    `--features object-store`, or copy the cache to this machine";
    assert_eq!((error.to_string().as_str(), error.exit_code()), (expected, 2));
}
