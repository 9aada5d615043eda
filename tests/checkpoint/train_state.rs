//! The checkpoints of a run, and what a trainer keeps in them.

use super::*;

fn state(step: u64) -> TrainState {
    TrainState {
        step,
        tokens_seen: u64::MAX - 1,
        values: json!({ "position": { "source": 3, "record": 12_345 }, "best": null }),
        tensors: BTreeMap::from([
            ("adam.first/a".to_string(), (vec![2, 3], vec![1e-30, -0.0, 3.0, 1.0 / 3.0, f32::MIN_POSITIVE, 6.0])),
            ("count".to_string(), (vec![], vec![7.0])),
        ]),
    }
}

/// A checkpoint of a run, with its state of training.
fn save_step(run: &Path, step: u64) -> PathBuf {
    let dir = checkpoint_dir(run, step);
    let config = json!({});
    CheckpointWriter::new(&dir, &config, StoredDtype::F32)
        .with_extra(|partial| state(step).save(partial))
        .write(&[TensorSpec::new("w", [1])], &mut |_| Ok(vec![step as f32]))
        .unwrap();
    dir
}

#[test]
fn the_state_of_training_is_read_back_to_the_bit() {
    let run = temporary();
    let dir = save_step(run.path(), 2000);
    assert!(dir.ends_with("checkpoints/step-002000"));
    let read = TrainState::load(&dir).unwrap();
    assert_eq!(read, state(2000));
    assert!(read.tensors["adam.first/a"].1[1].is_sign_negative());
    assert_eq!(CheckpointReader::open(&dir).unwrap().names().collect::<Vec<_>>(), ["w"]);
}

#[test]
fn a_damaged_state_of_training_is_refused() {
    let run = temporary();
    let dir = save_step(run.path(), 10);
    let numbers = dir.join("train_state.json");
    let tensors = dir.join("train_state.safetensors");
    let text = fs::read_to_string(&numbers).unwrap();
    let again = "resume from another checkpoint of the run";
    let load_with = |text: &str| {
        fs::write(&numbers, text).unwrap();
        TrainState::load(&dir)
    };
    assert_eq!(
        message(load_with(&text.replace("\"step\": 10", "\"step\": 11")), &tensors),
        format!("belongs to step 10, train_state.json to step 11; {again}")
    );
    assert_eq!(
        message(load_with(&text.replace("\"tensor_count\": 2", "\"tensor_count\": 3")), &tensors),
        format!("holds 2 tensors, train_state.json counts 3; {again}")
    );
    assert_eq!(
        message(load_with(&text.replace("\"step\": 10", "\"step\": -10")), &numbers),
        format!("has no whole number `step`; {again}")
    );
    assert_eq!(
        message(load_with(&text.replace("\"format\": 1", "\"format\": 2")), &numbers),
        "has format 2, this version reads 1; resume with the version that wrote it"
    );
    assert_eq!(
        message(load_with(&text.replace("\"values\"", "\"value\"")), &numbers),
        format!("has no `values`; {again}")
    );
    fs::write(&numbers, &text).unwrap();
    fs::remove_file(&tensors).unwrap();
    assert_eq!(message(TrainState::load(&dir), &tensors), "does not exist; check the path, or download it");
    fs::remove_file(&numbers).unwrap();
    assert_eq!(
        message(TrainState::load(&dir), &numbers),
        "is missing; this checkpoint has weights only: resume from one that training wrote, or start a new run"
    );
}

#[test]
fn the_latest_complete_checkpoint_is_found() {
    let run = temporary();
    assert_eq!(latest_checkpoint(run.path()).unwrap(), None);
    save_step(run.path(), 999_999);
    let latest = save_step(run.path(), 1_000_000);
    save_step(run.path(), 500);
    let checkpoints = run.path().join("checkpoints");
    // None of these is a complete checkpoint of a step.
    small(&checkpoints.join("step-2000000.partial-77"));
    small(&checkpoints.join("step-+3000000"));
    small(&checkpoints.join("best"));
    fs::create_dir(checkpoints.join("step-4000000")).unwrap();
    fs::write(checkpoints.join("step-5000000"), "").unwrap();
    assert_eq!(latest_checkpoint(run.path()).unwrap(), Some((1_000_000, latest)));
}

#[test]
fn pruning_keeps_the_latest_and_removes_what_a_crash_left() {
    let run = temporary();
    assert!(keep_latest(run.path(), 2).unwrap().is_empty());
    for step in [100, 200, 300, 400] {
        save_step(run.path(), step);
    }
    let checkpoints = run.path().join("checkpoints");
    small(&checkpoints.join("step-000500.partial-77"));
    small(&checkpoints.join("best"));
    assert_eq!(keep_latest(run.path(), 2).unwrap(), [100, 200]);
    let mut names: Vec<String> =
        fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["best", "step-000300", "step-000400"]);
    assert_eq!(
        keep_latest(run.path(), 0).unwrap_err().to_string(),
        "keeping 0 checkpoints would lose the run; keep at least 1"
    );
}
