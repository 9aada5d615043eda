//! The device form against f64 loops and the processor's form, on whatever device `wgpu` finds, or on CUDA's first.

#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod linear_case;

use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
#[cfg(not(feature = "cuda"))]
use burn::tensor::DeviceKind;
use burn::tensor::{Device, FloatDType, Shape, Tensor, TensorData};
use burn_cubecl::{CubeBackend, CubeDevice, ops::into_data_sync, tensor::CubeTensor};
use half::{bf16, f16};
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{
        LossSettings, NO_LABEL, RowTargets,
        device::{DeviceShard, run},
        device_top_k::top_k,
        graph::SharedWeigh,
        host::{self, HostMatrix, Wanted},
        linear_distill,
        rows::RowStatistics,
        sharded::{ShardStatistics, finish},
        tiles::Tiles,
    },
    oracle,
};
use linear_case::{Linear, assert_close, linear, linear_of, random, weigh};

/// Relative to the loss, and to the largest gradient. CUDA multiplies f32 as TF32, which keeps 10 bits.
const VALUE_BOUND: f64 = if cfg!(feature = "cuda") { 2e-3 } else { 1e-6 };
const GRADIENT_BOUND: f64 = if cfg!(feature = "cuda") { 1e-2 } else { 1e-5 };

/// Of a log-probability, or absolute where that is below 1.
const TOP_K_BOUND: f64 = if cfg!(feature = "cuda") { 1e-2 } else { 5e-6 };

const SMALLEST: Tiles = Tiles { token_block: 256, vocab_tile: 256, piece: 256 };

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(not(feature = "cuda"))]
    return Device::wgpu(DeviceKind::DefaultDevice);
}

fn cube_device() -> CubeDevice {
    match device().as_dispatch() {
        burn::backend::DispatchDevice::Cube(device) => device.clone(),
        other => panic!("{other:?} has no kernels"),
    }
}

fn on_device(values: &[f32], width: usize) -> CubeTensor {
    let shape = Shape::from(vec![values.len() / width, width]);
    CubeBackend::float_from_data(TensorData::new(values.to_vec(), shape), &cube_device())
}

fn read(tensor: CubeTensor) -> Vec<f32> {
    into_data_sync(tensor).convert::<f32>().try_into_vec::<f32>().unwrap()
}

fn worst(found: &[f32], truth: &[f64]) -> f64 {
    let largest = truth.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    let off = found.iter().zip(truth).fold(0.0f64, |worst, (found, truth)| worst.max((*found as f64 - truth).abs()));
    off / largest
}

/// Loss and gradients of a case in given tiles.
fn run_in(case: &Linear, tiles: Tiles) -> (f64, Vec<f32>, Vec<f32>) {
    let (hidden, lm_head) = (on_device(&case.hidden, case.width), on_device(&case.lm_head, case.width));
    let shard = DeviceShard::new(hidden, lm_head, 0, &case.targets, &case.settings, Some(tiles));
    let finished = finish(&case.targets, &case.settings, &shard.statistics(), &weigh);
    let (hidden_grad, lm_head_grad) = shard.gradients(&finished, Wanted::BOTH);
    (finished.loss, read(hidden_grad.unwrap()), read(lm_head_grad.unwrap()))
}

#[test]
fn every_divergence_has_the_oracles_loss_and_gradients() {
    let (mut value, mut hidden, mut head) = (0.0f64, 0.0f64, 0.0f64);
    for divergence in Divergence::EXAMPLES {
        for temperature in [1.0, 2.0] {
            let settings = LossSettings { temperature, ..LossSettings::new(divergence) };
            let case = linear(23, 16, 301, 9, settings);
            let (loss, hidden_grad, lm_head_grad) = run_in(&case, SMALLEST);
            let what = format!("{} at temperature {temperature}", divergence.name());
            let off = (loss / case.loss - 1.0).abs();
            assert!(off <= VALUE_BOUND, "{what}: {loss} instead of {}", case.loss);
            assert_close(&hidden_grad, &case.hidden_grad, GRADIENT_BOUND, &format!("{what}: hidden"));
            assert_close(&lm_head_grad, &case.lm_head_grad, GRADIENT_BOUND, &format!("{what}: head"));
            value = value.max(off);
            hidden = hidden.max(worst(&hidden_grad, &case.hidden_grad));
            head = head.max(worst(&lm_head_grad, &case.lm_head_grad));
        }
    }
    println!("f32 against f64, worst: loss {value:.1e}, hidden {hidden:.1e}, head {head:.1e}");
}

#[test]
fn tiles_of_any_size_give_the_oracles_gradients() {
    // Several blocks of rows, neither rows, width nor vocabulary a multiple of anything.
    let settings = LossSettings { temperature: 2.0, ..LossSettings::new(Divergence::ReverseKl) };
    let case = linear(301, 33, 643, 5, settings);
    for (token_block, vocab_tile, piece) in [(256, 256, 256), (256, 512, 256), (512, 768, 768)] {
        let (loss, hidden_grad, lm_head_grad) = run_in(&case, Tiles { token_block, vocab_tile, piece });
        let what = format!("{token_block} rows by {vocab_tile} ids");
        assert!((loss / case.loss - 1.0).abs() <= VALUE_BOUND, "{what}: {loss} instead of {}", case.loss);
        assert_close(&hidden_grad, &case.hidden_grad, GRADIENT_BOUND, &format!("{what}: hidden"));
        assert_close(&lm_head_grad, &case.lm_head_grad, GRADIENT_BOUND, &format!("{what}: head"));
    }
}

#[test]
fn the_device_and_the_processor_agree_on_every_measure() {
    for (temperature, k) in [(1.0, 7), (2.0, 7), (1.0, 701)] {
        let settings = LossSettings { temperature, ..LossSettings::new(Divergence::Jsd { beta: 0.5 }) };
        let case = linear(40, 24, 701, k, settings);
        let host = host::run(
            HostMatrix::F32(&case.hidden),
            HostMatrix::F32(&case.lm_head),
            case.width,
            &case.targets,
            &settings,
            &weigh,
            Wanted::BOTH,
        );
        // Three tiles, so that what is joined from tile to tile is seen.
        let (hidden, lm_head) = (on_device(&case.hidden, case.width), on_device(&case.lm_head, case.width));
        let shard = DeviceShard::new(hidden, lm_head, 0, &case.targets, &settings, Some(SMALLEST));
        let found = finish(&case.targets, &settings, &shard.statistics(), &weigh);
        let (hidden_grad, lm_head_grad) = shard.gradients(&found, Wanted::BOTH);
        assert!((found.loss / host.loss - 1.0).abs() <= VALUE_BOUND);
        let exact = |values: &Option<Vec<f32>>| -> Vec<f64> {
            values.as_ref().unwrap().iter().map(|&value| value as f64).collect()
        };
        assert_close(&read(hidden_grad.unwrap()), &exact(&host.hidden_grad), GRADIENT_BOUND, "hidden");
        assert_close(&read(lm_head_grad.unwrap()), &exact(&host.lm_head_grad), GRADIENT_BOUND, "head");
        for (row, (found, host)) in found.rows.iter().zip(&host.rows).enumerate() {
            let (Some((found, _)), Some((host, _))) = (found, host) else {
                assert!(found.is_none() && host.is_none() && row == 1);
                continue;
            };
            let near = |found: f64, host: f64, name: &str| {
                let same = found == host || (found - host).abs() <= 5e-6 * host.abs().max(0.1);
                assert!(same, "row {row}: {name} {found} instead of {host}");
            };
            near(found.soft, host.soft, "soft");
            near(found.hard, host.hard, "hard");
            near(found.log_sum_exp, host.log_sum_exp, "log-sum-exp");
            near(found.log_tail, host.log_tail, "tail");
            near(found.squared_probabilities, host.squared_probabilities, "squares");
            near(found.soft_gradient_square, host.soft_gradient_square, "soft gradient");
            near(found.hard_gradient_square, host.hard_gradient_square, "hard gradient");
            assert_eq!(found.argmax, host.argmax, "row {row}");
        }
    }
}

#[test]
fn half_precision_operands_are_accumulated_in_single() {
    let (rows, width, vocab) = (140, 32, 400);
    // Gradients of logits are rounded before they are multiplied, and the results again.
    for (dtype, bound) in [(FloatDType::F16, 2e-3), (FloatDType::BF16, 1.6e-2)] {
        if !device().supports_dtype(dtype) {
            // Mesa's lavapipe knows no bf16.
            assert_eq!(dtype, FloatDType::BF16);
            println!("no bf16 on this device");
            continue;
        }
        let round = |values: Vec<f32>| -> Vec<f32> {
            let narrow = |value| match dtype {
                FloatDType::F16 => f16::from_f32(value).to_f32(),
                _ => bf16::from_f32(value).to_f32(),
            };
            values.into_iter().map(narrow).collect()
        };
        let (hidden, lm_head) = (round(random(rows * width, 1, 1.5)), round(random(vocab * width, 2, 1.0)));
        let (mut value, mut hidden_worst, mut head_worst) = (0.0f64, 0.0f64, 0.0f64);
        for (divergence, temperature) in [(Divergence::ForwardKl, 1.0), (Divergence::ReverseKl, 2.0)] {
            let settings = LossSettings { temperature, ..LossSettings::new(divergence) };
            let case = linear_of(hidden.clone(), lm_head.clone(), rows, width, vocab, 6, settings);
            let narrow = |values: &[f32]| CubeBackend::float_cast(on_device(values, width), dtype);
            let (found, (hidden_grad, lm_head_grad)) =
                run(narrow(&hidden), narrow(&lm_head), &case.targets, &settings, &weigh, Wanted::BOTH);
            let (hidden_grad, lm_head_grad) = (hidden_grad.unwrap(), lm_head_grad.unwrap());
            assert!(hidden_grad.dtype == dtype.into() && lm_head_grad.dtype == dtype.into());
            let (hidden_grad, lm_head_grad) = (read(hidden_grad), read(lm_head_grad));
            value = value.max((found.loss / case.loss - 1.0).abs());
            hidden_worst = hidden_worst.max(worst(&hidden_grad, &case.hidden_grad));
            head_worst = head_worst.max(worst(&lm_head_grad, &case.lm_head_grad));
        }
        println!("{dtype:?} against f64, worst: loss {value:.1e}, hidden {hidden_worst:.1e}, head {head_worst:.1e}");
        assert!(value <= 1e-6 && hidden_worst <= bound && head_worst <= bound);
    }
}

#[test]
fn three_uneven_shards_equal_one_head() {
    let settings = LossSettings { temperature: 2.0, ..LossSettings::new(Divergence::SkewKl { alpha: 0.1 }) };
    let case = linear(30, 16, 500, 9, settings);
    let width = case.width;
    let hidden = || on_device(&case.hidden, width);
    let cuts = [0, 9, 333, 500];
    let shards: Vec<DeviceShard<'_>> = cuts
        .windows(2)
        .map(|cut| {
            let lm_head = on_device(&case.lm_head[cut[0] * width..cut[1] * width], width);
            DeviceShard::new(hidden(), lm_head, cut[0], &case.targets, &settings, None)
        })
        .collect();
    let joined = shards
        .iter()
        .map(DeviceShard::statistics)
        .reduce(|joined: ShardStatistics, part| joined.join(&part, &settings))
        .unwrap();
    let finished = finish(&case.targets, &settings, &joined, &weigh);
    assert!((finished.loss / case.loss - 1.0).abs() <= VALUE_BOUND, "{} not {}", finished.loss, case.loss);
    let mut hidden_grad = vec![0.0f32; case.hidden.len()];
    let mut lm_head_grad = vec![];
    for shard in &shards {
        let (part, rows_of_shard) = shard.gradients(&finished, Wanted::BOTH);
        hidden_grad.iter_mut().zip(read(part.unwrap())).for_each(|(sum, part)| *sum += part);
        lm_head_grad.extend(read(rows_of_shard.unwrap()));
    }
    assert_close(&hidden_grad, &case.hidden_grad, GRADIENT_BOUND, "hidden");
    assert_close(&lm_head_grad, &case.lm_head_grad, GRADIENT_BOUND, "head");
}

#[test]
fn the_graph_scales_what_was_computed_and_computes_only_what_is_asked_for() {
    let case = linear(11, 8, 120, 5, LossSettings::new(Divergence::ReverseKl));
    let weigh: SharedWeigh = Arc::new(weigh);
    let tensor = |values: &[f32], device: &Device| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), [values.len() / case.width, case.width]), device)
    };
    let read = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    let plain = device();
    for device in [plain.clone().autodiff(), plain.clone().autodiff().gradient_checkpointing()] {
        let hidden = tensor(&case.hidden, &device).require_grad();
        let lm_head = tensor(&case.lm_head, &device).require_grad();
        // As in training: the hidden states come out of other operations, and the loss goes into others.
        let operand = hidden.clone() * 1.0;
        let output = linear_distill(operand, lm_head.clone(), case.targets.clone(), case.settings, weigh.clone());
        assert!((output.value / case.loss - 1.0).abs() <= VALUE_BOUND);
        assert_eq!(output.rows.iter().flatten().count(), 10);
        let gradients = (output.loss * 0.25).backward();
        let scaled = |truth: &[f64]| truth.iter().map(|value| value * 0.25).collect::<Vec<f64>>();
        assert_close(&read(hidden.grad(&gradients).unwrap()), &scaled(&case.hidden_grad), GRADIENT_BOUND, "hidden");
        assert_close(&read(lm_head.grad(&gradients).unwrap()), &scaled(&case.lm_head_grad), GRADIENT_BOUND, "head");
        // A frozen head.
        let lm_head = tensor(&case.lm_head, &device);
        let output =
            linear_distill(hidden.clone(), lm_head.clone(), case.targets.clone(), case.settings, weigh.clone());
        let gradients = output.loss.backward();
        assert_close(&read(hidden.grad(&gradients).unwrap()), &case.hidden_grad, GRADIENT_BOUND, "hidden");
        assert!(lm_head.grad(&gradients).is_none());
    }
    let (hidden, lm_head) = (tensor(&case.hidden, &plain), tensor(&case.lm_head, &plain));
    let untracked = linear_distill(hidden, lm_head, case.targets.clone(), case.settings, weigh);
    assert!((untracked.value / case.loss - 1.0).abs() <= VALUE_BOUND);
    assert!((untracked.loss.into_data().try_into_vec::<f32>().unwrap()[0] as f64 / case.loss - 1.0).abs() < 1e-6);
}

#[test]
fn of_equal_logits_the_smaller_id_is_the_likeliest() {
    let settings = LossSettings::new(Divergence::ForwardKl);
    let (width, vocab) = (8, 600);
    let mut lm_head = vec![0.1f32; vocab * width];
    // Twice in one tile, and once in another.
    for id in [201, 77, 555] {
        lm_head[id * width..][..width].fill(1.0);
    }
    let targets = RowTargets::labels(vec![3]);
    let head = on_device(&lm_head, width);
    let shard = DeviceShard::new(on_device(&vec![1.0; width], width), head, 0, &targets, &settings, Some(SMALLEST));
    assert_eq!(shard.statistics().rows[0].argmax, 77);
}

#[test]
fn rows_without_targets_cost_nothing_and_get_nothing() {
    let settings = LossSettings::new(Divergence::ForwardKl);
    let (hidden, lm_head) = (random(5 * 8, 1, 1.0), random(50 * 8, 2, 1.0));
    let none = RowTargets::labels(vec![NO_LABEL; 5]);
    let shard = DeviceShard::new(on_device(&hidden, 8), on_device(&lm_head, 8), 0, &none, &settings, None);
    let statistics = shard.statistics();
    assert!(statistics.rows.iter().all(|row| *row == RowStatistics::NONE));
    let finished = finish(&none, &settings, &statistics, &weigh);
    assert_eq!(finished.loss, 0.0);
    let (hidden_grad, lm_head_grad) = shard.gradients(&finished, Wanted::BOTH);
    assert!(read(hidden_grad.unwrap()).iter().chain(&read(lm_head_grad.unwrap())).all(|&value| value == 0.0));
}

#[test]
fn a_logit_that_is_no_number_shows_in_the_loss() {
    let settings = LossSettings::new(Divergence::ForwardKl);
    let mut case = linear(6, 8, 300, 4, settings);
    case.hidden[3 * 8] = f32::NAN;
    let (loss, ..) = run_in(&case, SMALLEST);
    assert!(loss.is_nan(), "{loss}");
}

#[test]
fn the_largest_logits_are_found_without_all_logits() {
    let (rows, width) = (140, 16);
    for (vocab, k, temperature, scale) in [(1500, 9, 1.0, 1.0), (1500, 64, 2.0, 3.0), (300, 300, 1.0, 1.0)] {
        let (hidden, lm_head) = (random(rows * width, 1, 1.5), random(vocab * width, 2, scale));
        let labels: Vec<u32> = (0..rows).map(|row| (row * 37 % vocab) as u32).collect();
        let found = top_k(on_device(&hidden, width), on_device(&lm_head, width), &labels, k, temperature);
        for (row, found) in found.iter().enumerate() {
            let hidden = &hidden[row * width..][..width];
            let logit = |head: &[f32]| hidden.iter().zip(head).map(|(&a, &b)| a as f64 * b as f64).sum::<f64>() as f32;
            let logits: Vec<f32> = lm_head.chunks(width).map(logit).collect();
            let truth = oracle::top_k(&logits, k, labels[row], temperature as f64);
            let near = |found: f32, truth: f64| (found as f64 - truth).abs() <= TOP_K_BOUND * truth.abs().max(1.0);
            if !cfg!(feature = "cuda") {
                let same = found.ids.iter().zip(&truth.ids).all(|(&found, &truth)| {
                    // Two logits that differ by less than a product's rounding may change places.
                    (logits[found as usize] - logits[truth as usize]).abs() <= 1e-5
                });
                assert!(same, "row {row}: {:?} instead of {:?}", found.ids, truth.ids);
            }
            let summary = &found.summaries[0];
            assert!(summary.log_probs.iter().zip(&truth.log_probs).all(|(&found, &truth)| near(found, truth)));
            assert!(near(summary.label_log_prob, truth.label_log_prob), "row {row}");
            let wide: Vec<f64> = logits.iter().map(|&logit| logit as f64).collect();
            assert!(near(found.log_normalizer, oracle::log_sum_exp(&wide)), "row {row}: {}", found.log_normalizer);
            if k == vocab {
                assert_eq!(summary.log_tail, f32::NEG_INFINITY);
            } else {
                assert!(near(summary.log_tail, truth.log_tail), "{} not {}", summary.log_tail, truth.log_tail);
            }
        }
    }
}

#[test]
fn equal_logits_keep_the_smaller_ids_and_lose_no_mass() {
    let (vocab, width) = (1300, 8);
    let found = top_k(
        on_device(&vec![0.0; 2 * width], width),
        on_device(&vec![1.0; vocab * width], width),
        &[0, 1299],
        10,
        1.0,
    );
    for row in found {
        assert_eq!(row.ids, (0..10).collect::<Vec<u32>>());
        let summary = &row.summaries[0];
        assert!((summary.log_tail as f64 - (1290.0f64 / 1300.0).ln()).abs() < 1e-6);
        assert!((summary.label_log_prob as f64 + 1300.0f64.ln()).abs() < 1e-6);
    }
}
