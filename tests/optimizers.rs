//! Optimizers make of weights and gradients what PyTorch's make of them, a matrix of a stack is a matrix of its own, and each
//! trains a model and goes on to the same bits.

mod small_training;

use std::collections::BTreeMap;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::Error;
use limbeck::checkpoint::{TrainState, checkpoint_dir};
use limbeck::schedule::{LearningRate, Schedule};
use limbeck::train::TrainConfig;
use limbeck::train::groups::ParameterGroup;
use limbeck::train::metrics::Metric;
use limbeck::train::optimizer::{OptimizerConfig, OptimizerKind, Precision};
use limbeck::train::update::{State, Update};
use serde::Deserialize;
use small_training::*;

#[derive(Deserialize)]
struct Case {
    optimizer: String,
    shape: Vec<usize>,
    weight: Vec<f32>,
    gradients: Vec<Vec<f32>>,
    after: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Fixture {
    cases: Vec<Case>,
}

fn flat(values: &[f32]) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &Device::flex())
}

fn values(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().unwrap()
}

const UPDATE: Update = Update {
    learning_rate: 1e-2,
    weight_decay: 0.1,
    betas: [0.9, 0.95],
    eps: 1e-8,
    momentum: 0.95,
    number: 1,
    gradient_scale: 1.0,
};

fn apply(
    update: Update,
    kind: &str,
    weight: Tensor<1>,
    gradient: Tensor<1>,
    shape: [usize; 3],
    state: &mut State,
) -> Tensor<1> {
    match kind {
        "adamw" => update.adamw(weight, gradient, state),
        "lion" => update.lion(weight, gradient, state),
        "muon" => update.muon(weight, gradient, shape, state),
        "adafactor" => update.adafactor(weight, gradient, shape, state),
        other => panic!("{other}"),
    }
}

#[test]
fn each_optimizer_does_what_pytorch_does() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/optimizers.json")).unwrap();
    assert_eq!(fixture.cases.len(), 11);
    for case in &fixture.cases {
        let shape = match case.shape[..] {
            [count] => [1, 1, count],
            [rows, columns] => [1, rows, columns],
            _ => panic!(),
        };
        let (mut weight, mut state) = (flat(&case.weight), State::new());
        for (step, (gradient, truth)) in case.gradients.iter().zip(&case.after).enumerate() {
            // Given as sums over four tokens: the division is a part of the update.
            let gradient: Vec<f32> = gradient.iter().map(|value| value * 4.0).collect();
            let update = Update { number: step as u64 + 1, gradient_scale: 0.25, ..UPDATE };
            weight = apply(update, &case.optimizer, weight, flat(&gradient), shape, &mut state);
            let found = values(weight.clone());
            for (found, truth) in found.iter().zip(truth) {
                let error = (*found as f64 - truth).abs();
                assert!(error < 2e-5, "{} of {:?}, step {}: {found} {truth}", case.optimizer, case.shape, step + 1);
            }
        }
    }
}

#[test]
fn a_matrix_of_a_stack_is_updated_as_if_it_stood_alone() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/optimizers.json")).unwrap();
    let case = fixture.cases.iter().find(|case| case.optimizer == "muon").unwrap();
    let [rows, columns] = case.shape[..] else { panic!() };
    let other: Vec<f32> = case.weight.iter().map(|value| value * -3.0 + 0.1).collect();
    let (mut alone, mut stacked) = ((State::new(), State::new()), State::new());
    let both = flat(&[case.weight.clone(), other.clone()].concat());
    let gradients = flat(&[case.gradients[0].clone(), case.gradients[1].clone()].concat());
    let together = values(UPDATE.muon(both, gradients, [2, rows, columns], &mut stacked));
    let first = UPDATE.muon(flat(&case.weight), flat(&case.gradients[0]), [1, rows, columns], &mut alone.0);
    let second = UPDATE.muon(flat(&other), flat(&case.gradients[1]), [1, rows, columns], &mut alone.1);
    for (found, truth) in together.iter().zip([values(first), values(second)].concat()) {
        assert!((found - truth).abs() < 1e-6, "{found} {truth}");
    }
}

#[test]
fn an_expert_that_got_no_token_only_decays() {
    let kinds = ["adamw", "lion", "muon", "adafactor"];
    for kind in kinds {
        let weight = [0.5f32, -1.0, 2.0, 0.25, 0.0, -0.125];
        let found = values(apply(UPDATE, kind, flat(&weight), flat(&[0.0; 6]), [1, 2, 3], &mut State::new()));
        for (found, weight) in found.iter().zip(weight) {
            assert!((found - weight * 0.999).abs() < 1e-6, "{kind}: {found} of {weight}");
        }
    }
}

fn losses(lines: &[Metric]) -> Vec<f64> {
    let loss = |line: &Metric| match line {
        Metric::Step(step) => Some(step.hard_loss),
        _ => None,
    };
    lines.iter().filter_map(loss).collect()
}

/// The text is noise; what can be learnt in some steps is the teacher's predictions of it.
fn divergences(lines: &[Metric]) -> Vec<f64> {
    let divergence = |line: &Metric| match line {
        Metric::Step(step) => step.soft_loss,
        _ => None,
    };
    lines.iter().filter_map(divergence).collect()
}

#[test]
fn every_optimizer_trains_and_an_interruption_changes_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let faster = LearningRate { warmup: 2, schedule: Schedule::Constant { value: 1e-2 } };
    use OptimizerKind::{Adafactor, Adamw, Lion, Muon};
    for (kind, precision) in [
        (Adamw, Precision::F32),
        (Muon, Precision::F32),
        (Lion, Precision::F32),
        (Adafactor, Precision::F32),
        (Adamw, Precision::Bf16),
        (Muon, Precision::Bf16),
    ] {
        let name = format!("{kind:?} {precision:?}");
        let config = || {
            let groups =
                vec![ParameterGroup { pattern: "*router.weight".into(), lr: Some(0.5), weight_decay: Some(0.0) }];
            let optimizer = OptimizerConfig { kind, precision, groups, ..OptimizerConfig::default() };
            TrainConfig { learning_rate: faster.clone(), optimizer, average: Some(0.9), evaluate_every: 1, ..config() }
        };
        let (whole, parts) = (folder.path().join(&name), folder.path().join(format!("{name} parts")));
        train(&whole, config(), &Source::new().first(4)).unwrap();
        let found = divergences(&metrics(&whole));
        assert!(found[11] < 0.97 * found[0], "{name}: {found:?}");
        for evaluation in [7, 2] {
            let error = train(&parts, config(), &Source::new().first(4).stopping_at(evaluation)).unwrap_err();
            assert!(matches!(error, Error::Interrupted { .. }), "{error}");
        }
        train(&parts, config(), &Source::new().first(4)).unwrap();
        assert_same_lines(&metrics(&parts), &metrics(&whole));
        let last = |dir: &std::path::Path| files(&checkpoint_dir(dir, STEPS));
        assert!(last(&parts) == last(&whole), "{name}");
    }
}

#[test]
fn rounded_weights_are_bfloat16_and_train_almost_as_well() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, precision| {
        let dir = folder.path().join(name);
        let optimizer = OptimizerConfig { precision, ..OptimizerConfig::default() };
        train(&dir, TrainConfig { optimizer, ..config() }, &Source::new()).unwrap();
        (tensors(&dir, STEPS), losses(&metrics(&dir)))
    };
    let (full, full_losses) = run("f32", Precision::F32);
    let (rounded, rounded_losses) = run("bf16", Precision::Bf16);
    let is_bf16 = |value: &f32| value.to_bits() & 0xffff == 0;
    assert!(rounded.values().flatten().all(is_bf16), "an export in bfloat16 loses nothing");
    assert!(!full.values().flatten().all(is_bf16));
    // A weight is off by at most 2^-9 of itself by rounding; the rest is what other gradients made of it.
    let (relative, tensor) = largest_difference(&full, &rounded);
    assert!((5e-4..0.01).contains(&relative), "{tensor} differs by {relative} of its norm");
    let losses = full_losses.iter().zip(&rounded_losses).map(|(full, rounded)| (full - rounded).abs());
    let loss = losses.fold(0.0, f64::max);
    assert!((1e-6..2e-3).contains(&loss), "a loss differs by {loss}");

    // Updates add up in weights of more digits, which the model's are the rounded ones of.
    let state = TrainState::load(checkpoint_dir(folder.path().join("bf16"), STEPS)).unwrap();
    let mut between = 0;
    for (name, rounded) in &rounded {
        let (_, master) = &state.tensors[&format!("master.{name}")];
        for (rounded, master) in rounded.iter().zip(master) {
            assert_eq!(*rounded, half::bf16::from_f32(*master).to_f32(), "{name}");
            between += usize::from(rounded != master);
        }
    }
    let count = rounded.values().map(Vec::len).sum::<usize>();
    assert!(between > count * 9 / 10, "{between} of {count} weights are between two of bfloat16");
    let (relative, tensor) = {
        let master = |name: &String| (name.clone(), state.tensors[&format!("master.{name}")].1.clone());
        largest_difference(&full, &rounded.keys().map(master).collect())
    };
    assert!(relative < 0.01, "the unrounded {tensor} differs by {relative} of its norm");
}

#[test]
fn groups_have_rates_of_their_own_and_one_that_nothing_belongs_to_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let group = |pattern: &str| ParameterGroup { pattern: pattern.into(), lr: Some(0.0), weight_decay: None };
    let with = |pattern: &str| {
        let optimizer = OptimizerConfig { groups: vec![group(pattern)], ..OptimizerConfig::default() };
        TrainConfig { optimizer, ..config() }
    };
    let frozen = "model.layers.0.*";
    let before: BTreeMap<String, Vec<f32>> = {
        let (mut model, mut found) = (trainer(config(), 2).model(), BTreeMap::new());
        model.visit(&mut |name, parameter| drop(found.insert(name.to_string(), values(parameter.flat()))));
        found
    };
    train(folder.path(), with(frozen), &Source::new()).unwrap();
    for (name, after) in tensors(folder.path(), STEPS) {
        assert_eq!(after == before[&name], name.starts_with("model.layers.0."), "{name}");
    }
    let other = folder.path().join("other");
    let refused = std::panic::catch_unwind(|| train(&other, with("model.layer.0.*"), &Source::new()));
    let message = *refused.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains("train.groups: no weight of the student is called `model.layer.0.*`"), "{message}");
    assert!(message.contains("`limbeck inspect --tensors CHECKPOINT` lists the names"), "{message}");
}
