//! Steps that went wrong do not reach the weights: they are skipped, undone or end the run, as was asked for, and the record
//! says so.

mod small_training;

use std::fs;
use std::path::Path;

use limbeck::Error;
use limbeck::checkpoint::{checkpoint_dir, latest_checkpoint};
use limbeck::eval::report::{Curves, Report, Role};
use limbeck::loss::{DistillLossConfig, Divergence};
use limbeck::targets::TargetSource;
use limbeck::train::guard::{Guards, Reaction};
use limbeck::train::metrics::{GuardMetrics, Metric};
use limbeck::train::{TrainConfig, Trainer};
use small_training::*;

/// Weights of rows that make a gradient infinite, and a loss large.
const INFINITE: f32 = 1e30;
const LARGE: f32 = 60.0;

fn guarded(not_finite: Reaction, spike: Reaction) -> TrainConfig {
    let guards = Guards { not_finite, spike, spike_window: 4, ..Guards::default() };
    TrainConfig { guards, evaluate_every: 1, ..config() }
}

fn held_back(dir: &Path) -> Vec<GuardMetrics> {
    let guard = |line| match line {
        Metric::Guard(guard) => Some(guard),
        _ => None,
    };
    metrics(dir).into_iter().filter_map(guard).collect()
}

fn steps(dir: &Path) -> Vec<u64> {
    let step = |line: &Metric| matches!(line, Metric::Step(_)).then(|| line.step());
    metrics(dir).iter().filter_map(step).collect()
}

#[test]
fn a_gradient_that_is_not_finite_ends_the_run_before_it_reaches_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let source = Source::new().with_weights(&[(7, INFINITE)]);
    let error = train(dir, guarded(Reaction::Stop, Reaction::Off), &source).unwrap_err();
    assert!(matches!(error, Error::Diverged { .. }) && error.exit_code() == 1);
    assert_eq!(
        error.to_string(),
        "step 7 of the student: the gradient's norm is not finite; lower the learning rate and go on from the last checkpoint in \
         another --run-dir, or let train.guards skip such steps or rewind"
    );
    let [line] = &held_back(dir)[..] else { panic!("one line") };
    assert_eq!((line.step, line.reaction), (7, Reaction::Stop));
    assert_eq!(line.reason, "the gradient's norm is not finite");
    // The last line before it, and a checkpoint with weights that are numbers.
    assert_eq!(steps(dir), [1, 2, 3, 4, 5, 6]);
    let (step, _) = latest_checkpoint(dir).unwrap().unwrap();
    assert!(step <= 6 && tensors(dir, step).values().flatten().all(|value| value.is_finite()));
}

#[test]
fn a_loss_that_is_no_number_is_named() {
    let mut model = trainer(config(), 2).model();
    model.visit(&mut |name, mut parameter| {
        if name == "model.norm.weight" {
            let shape = parameter.shape();
            parameter.set(parameter.flat() * f32::NAN, &shape, true);
        } else {
            let (flat, shape) = (parameter.flat(), parameter.shape());
            parameter.set(flat, &shape, true);
        }
    });
    let loss = DistillLossConfig::new(Divergence::ForwardKl).init().unwrap();
    let source = Source::new();
    let mut trainer = Trainer::new(config(), model, loss, source.sequence_count()).unwrap();
    let error = trainer.train_step(&source).unwrap_err().to_string();
    assert!(error.starts_with("step 1 of the student: the loss is not finite; "), "{error}");
    assert_eq!(trainer.step_count(), 0);
}

#[test]
fn a_skipped_step_changes_nothing_and_an_interruption_changes_no_bit_of_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let config = || guarded(Reaction::Skip, Reaction::Skip);
    let source = || Source::new().with_weights(&[(4, INFINITE), (7, INFINITE), (9, LARGE)]);
    let whole = folder.path().join("whole");
    train(&whole, config(), &source()).unwrap();
    assert_eq!(steps(&whole), [1, 2, 3, 5, 6, 8, 10, 11, 12]);
    let lines = held_back(&whole);
    assert_eq!(lines.iter().map(|line| (line.step, line.number)).collect::<Vec<_>>(), [(4, 0), (7, 1), (9, 2)]);
    assert!(lines.iter().all(|line| line.reaction == Reaction::Skip && line.back_to.is_none()));
    assert!(lines[2].reason.starts_with("the loss is ") && lines[2].reason.contains("the median before it is "));

    // Skipping is as if the steps had not been there: their weights are those of the steps before them.
    let (six, seven) = (folder.path().join("six"), folder.path().join("seven"));
    let every = || TrainConfig { checkpoint_every: 1, ..config() };
    for (dir, evaluation) in [(&six, 6), (&seven, 7)] {
        train(dir, every(), &source().stopping_at(evaluation)).unwrap_err();
    }
    assert_eq!(largest_difference(&tensors(&six, 6), &tensors(&seven, 7)).0, 0.0);

    let parts = folder.path().join("parts");
    for (evaluation, stopped_at) in [(4, 4), (4, 8)] {
        let error = train(&parts, config(), &source().stopping_at(evaluation)).unwrap_err();
        let Error::Interrupted { saved } = error else { panic!("{error}") };
        assert_eq!(saved, checkpoint_dir(&parts, stopped_at));
    }
    train(&parts, config(), &source()).unwrap();
    assert_same_lines(&metrics(&parts), &metrics(&whole));
    assert!(files(&checkpoint_dir(&parts, STEPS)) == files(&checkpoint_dir(&whole, STEPS)));
}

#[test]
fn a_run_that_goes_back_sees_other_sequences_and_an_interruption_changes_no_bit_of_it() {
    let folder = tempfile::tempdir().unwrap();
    // Checkpoints of steps 5 and 10; the loss of step 8 is a spike.
    let config = || guarded(Reaction::Rewind, Reaction::Rewind);
    let source = || Source::new().with_weights(&[(8, LARGE)]);
    let whole = folder.path().join("whole");
    train(&whole, config(), &source()).unwrap();
    assert_eq!(steps(&whole), (1..=STEPS).collect::<Vec<_>>(), "each step that counts is there once");
    let [line] = &held_back(&whole)[..] else { panic!("one line") };
    assert_eq!((line.step, line.reaction, line.back_to), (8, Reaction::Rewind, Some(5)));

    // Up to the checkpoint it is the run without the spike, and after it another.
    let plain = folder.path().join("plain");
    train(&plain, config(), &Source::new().with_weights(&[(8, 1.0)])).unwrap();
    let loss = |dir: &Path| -> Vec<f64> {
        let loss = |line| match line {
            Metric::Step(step) => Some(step.loss),
            _ => None,
        };
        metrics(dir).into_iter().filter_map(loss).collect()
    };
    let (with, without) = (loss(&whole), loss(&plain));
    assert_eq!(with[..5], without[..5]);
    assert!(with[5..].iter().zip(&without[5..]).all(|(with, without)| with != without));

    // Interrupted before the spike and after it, where no scheduled checkpoint is.
    for (name, evaluations) in [("before", vec![7]), ("after", vec![9]), ("both", vec![6, 3, 2])] {
        let dir = folder.path().join(name);
        for evaluation in evaluations {
            let error = train(&dir, config(), &source().stopping_at(evaluation)).unwrap_err();
            assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        }
        train(&dir, config(), &source()).unwrap();
        assert_same_lines(&metrics(&dir), &metrics(&whole));
        let last = |dir: &Path| files(&checkpoint_dir(dir, STEPS));
        assert!(last(&dir) == last(&whole), "{name}");
    }

    // The report says so.
    let mut report = Report::new("guarded");
    report.curves = vec![Curves::from_metrics(Role::Student, &metrics(&whole))];
    let html = report.html();
    assert!(html.contains("Steps held back") && html.contains("went back to step 5"), "the page says what happened");
}

#[test]
fn before_the_first_checkpoint_a_run_goes_back_to_where_it_began() {
    let folder = tempfile::tempdir().unwrap();
    let source = Source::new().with_weights(&[(3, INFINITE)]);
    train(folder.path(), guarded(Reaction::Rewind, Reaction::Off), &source).unwrap();
    assert_eq!(held_back(folder.path())[0].back_to, Some(0));
    assert_eq!(steps(folder.path()), (1..=STEPS).collect::<Vec<_>>());
}

#[test]
fn too_many_steps_in_a_row_end_the_run_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let bad = [(4, INFINITE), (5, INFINITE), (6, INFINITE), (7, INFINITE)];
    for reaction in [Reaction::Skip, Reaction::Rewind] {
        let dir = folder.path().join(format!("{reaction:?}"));
        let error = train(&dir, guarded(reaction, Reaction::Off), &Source::new().with_weights(&bad)).unwrap_err();
        assert!(matches!(error, Error::Diverged { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains("the gradient's norm is not finite, after 3 others that did not count; "), "{said}");
        assert!(said.ends_with(", or raise train.guards.limit"), "it skips or rewinds already: {said}");
        let reactions: Vec<Reaction> = held_back(&dir).iter().map(|line| line.reaction).collect();
        assert_eq!(reactions, [reaction, reaction, reaction, Reaction::Stop]);
    }
}

#[test]
fn a_target_that_is_no_number_is_refused_by_its_sequence() {
    let folder = tempfile::tempdir().unwrap();
    type Change = fn(&mut limbeck::targets::SparseTargets);
    let changes: [(&str, Change); 3] = [
        ("kept", |targets| {
            let place = targets.offsets[3] as usize;
            targets.captures[0].log_probs[place] = f32::NAN;
        }),
        ("tail", |targets| targets.captures[0].log_tail[3] = f32::INFINITY),
        ("label", |targets| targets.captures[0].label_log_prob[3] = f32::NAN),
    ];
    for (name, change) in changes {
        let dir = folder.path().join(name);
        // Skipping steps is no way around data that is broken.
        let source = Source::new().with_targets(20, change);
        let error = train(&dir, guarded(Reaction::Skip, Reaction::Off), &source).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a teacher's log-probability in row 3 of sequence 20 of the training targets is not finite; check the cache with \
             `limbeck inspect --verify`, and precompute or import it again",
            "{name}"
        );
    }
}

#[cfg(unix)]
#[test]
fn latest_and_best_lead_to_checkpoints_that_are_there() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let keeping = TrainConfig { keep_checkpoints: 1, checkpoint_every: 2, evaluate_every: 3, ..config() };
    train(dir, keeping, &Source::new()).unwrap();
    let name = |pointer: &str| fs::read_link(dir.join("checkpoints").join(pointer)).unwrap();
    assert_eq!(name("latest"), Path::new("step-000012"));
    let measured = |line: &Metric| match line {
        Metric::Evaluation(line) => Some((line.step, line.cross_entropy)),
        _ => None,
    };
    let evaluations: Vec<(u64, f64)> = metrics(dir).iter().filter_map(measured).collect();
    assert_eq!(evaluations.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [3, 6, 9, 12]);
    let (best, _) = evaluations.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert_eq!(name("best"), Path::new(&format!("step-{best:06}")));
    for pointer in ["latest", "best"] {
        assert!(dir.join("checkpoints").join(pointer).join("model.safetensors").is_file());
    }
    let kept = fs::read_dir(dir.join("checkpoints")).unwrap().filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("step-")
    });
    assert_eq!(kept.count(), if *best == STEPS { 1 } else { 2 }, "one is kept, and the best beyond it");
}
