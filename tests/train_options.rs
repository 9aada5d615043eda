//! What a run may be asked for beside its loss: recomputed activations, a running mean of the weights, balance without a loss.

mod small_training;

use std::collections::BTreeMap;

use burn::tensor::Device;
use limbeck::checkpoint::checkpoint_dir;
use limbeck::models::Decoder;
use limbeck::train::TrainConfig;
use limbeck::train::balance::RouterConfig;
use limbeck::train::metrics::{EvalMetrics, Metric};
use limbeck::train::trainer::AVERAGE_DIR;
use small_training::*;

/// The balance loss, the z-loss and a selection bias, with weights at which each is felt.
fn routed() -> RouterConfig {
    RouterConfig { balance_weight: 0.05, z_weight: 0.01, bias_rate: 0.02, bias_release: 0.25 }
}

#[test]
fn recomputed_layers_give_the_weights_that_kept_ones_give() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, checkpoint_activations| {
        let dir = folder.path().join(name);
        let config = TrainConfig { router: routed(), checkpoint_activations, ..config() };
        train(&dir, config, &Source::new()).unwrap();
        (tensors(&dir, STEPS), metrics(&dir))
    };
    let ((kept, kept_lines), (again, again_lines)) = (run("kept", false), run("again", true));
    let (relative, tensor) = largest_difference(&kept, &again);
    assert!(relative <= 1e-6, "{tensor} differs by {relative:e} of its norm");
    for (kept, again) in kept_lines.iter().zip(&again_lines) {
        let (Metric::Step(kept), Metric::Step(again)) = (kept, again) else { continue };
        assert!((kept.loss - again.loss).abs() < 1e-5 && (kept.grad_norm - again.grad_norm).abs() < 1e-5);
        assert_eq!(kept.expert_load, again.expert_load);
    }
}

#[test]
fn the_running_mean_follows_the_weights_and_is_a_model_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let config =
        TrainConfig { average: Some(0.8), checkpoint_every: 1, keep_checkpoints: 20, evaluate_every: 4, ..config() };
    let start: BTreeMap<String, Vec<f32>> = {
        let (mut model, mut found) = (trainer(config.clone(), 2).model(), BTreeMap::new());
        model.visit(&mut |name, parameter| {
            found.insert(name.to_string(), parameter.flat().into_data().try_into_vec::<f32>().unwrap());
        });
        found
    };
    train(dir, config, &Source::new()).unwrap();
    let mut mean: BTreeMap<String, Vec<f64>> =
        start.into_iter().map(|(name, values)| (name, values.into_iter().map(f64::from).collect())).collect();
    for step in 1..=STEPS {
        let decay = 0.8f64.min((1 + step) as f64 / (10 + step) as f64);
        for (name, weight) in tensors(dir, step) {
            let mean = mean.get_mut(&name).unwrap();
            mean.iter_mut()
                .zip(weight)
                .for_each(|(mean, weight)| *mean = decay * *mean + (1.0 - decay) * weight as f64);
        }
    }
    // Beside the weights of a checkpoint, in the form of any checkpoint.
    let model = checkpoint_dir(dir, STEPS).join(AVERAGE_DIR);
    let mut averaged = Decoder::open(&model, &Device::flex()).unwrap();
    averaged.visit(&mut |name, parameter| {
        let found = parameter.flat().into_data().try_into_vec::<f32>().unwrap();
        let difference = norm(found.iter().zip(&mean[name]).map(|(a, b)| *a as f64 - b));
        assert!(difference <= 1e-6 * norm(mean[name].iter().copied()).max(1e-3), "{name}: {difference:e}");
    });
    assert!(model.join("tokenizer.json").is_file(), "it can be used as it is");
    let evaluations: Vec<EvalMetrics> = metrics(dir)
        .into_iter()
        .filter_map(|line| match line {
            Metric::Evaluation(line) => Some(line),
            _ => None,
        })
        .collect();
    assert_eq!(evaluations.len(), 3);
    for line in evaluations {
        let averaged = line.averaged_cross_entropy.unwrap();
        assert!(averaged.is_finite() && averaged != line.cross_entropy && line.averaged_kl_to_teacher.is_some());
    }
}

/// The largest share that an expert has, averaged over blocks, over the last steps.
fn busiest(lines: &[Metric]) -> f64 {
    let shares = lines.iter().filter_map(|line| match line {
        Metric::Step(step) if step.step > STEPS - 6 => {
            let largest = |load: &Vec<f32>| load.iter().fold(0.0f32, |a, &b| a.max(b)) as f64;
            Some(step.expert_load.iter().map(largest).sum::<f64>() / step.expert_load.len() as f64)
        }
        _ => None,
    });
    shares.sum::<f64>() / 6.0
}

#[test]
fn a_bias_alone_evens_the_load_and_is_gone_from_what_is_exported() {
    let folder = tempfile::tempdir().unwrap();
    let run = |name: &str, bias_rate| {
        let dir = folder.path().join(name);
        let router = RouterConfig { bias_rate, bias_release: 0.0, ..RouterConfig::default() };
        train(&dir, TrainConfig { router, evaluate_every: 0, ..config() }, &Source::new()).unwrap();
        busiest(&metrics(&dir))
    };
    let (without, with) = (run("without", 0.0), run("with", 0.01));
    assert!(
        with < without - 0.03,
        "the busiest of 4 experts has {with:.3} of the tokens, and {without:.3} without a bias"
    );
    // What is written is a model of the family, which has no such bias; a run that goes on has it.
    let (plain, biased) = (tensors(&folder.path().join("without"), STEPS), tensors(&folder.path().join("with"), STEPS));
    assert!(plain.keys().eq(biased.keys()));
    let state = std::fs::read_to_string(checkpoint_dir(folder.path().join("with"), STEPS).join("train_state.json"));
    let state: serde_json::Value = serde_json::from_str(&state.unwrap()).unwrap();
    assert_eq!(state["values"]["expert_biases"].as_array().unwrap().len(), 2);
}
