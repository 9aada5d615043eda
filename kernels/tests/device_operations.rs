//! Every operation's device form against f64 loops, in value and gradient, on whatever device `wgpu` finds, or on CUDA's
//! first: f32, and half precision where the device has it.

#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
#[cfg(not(feature = "cuda"))]
use burn::tensor::DeviceKind;
use burn::tensor::{DType, Device, FloatDType, Shape, Tensor, TensorData};
use burn_cubecl::{CubeBackend, CubeDevice, ops::into_data_sync, tensor::CubeTensor};
use limbeck_kernels::{
    adamw::{AdamwState, AdamwStep},
    device::{
        self,
        gather_rows::{GatherRows, Sorted},
        op::DeviceOp,
    },
    gather_rows::gather_rows,
    rms_norm::{rms_norm, unit_rms},
    rotary::{Pairing, RotaryTable, rotary},
    swiglu::{gated_silu, swiglu},
};

/// Of the largest number of a result: f32 throughout, sums of a few thousand terms at most.
const BOUND: f64 = 3e-6;

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

/// What one rounding to a type may change a number by, relative to it. Twice half a unit in the last place: a device may
/// cut where it should round.
fn rounding(dtype: FloatDType) -> f64 {
    match dtype {
        FloatDType::F16 => 2.0f64.powi(-10),
        FloatDType::BF16 => 2.0f64.powi(-7),
        _ => 0.0,
    }
}

/// The types that the device has: lavapipe knows no bf16.
fn types() -> Vec<FloatDType> {
    let mut types = vec![FloatDType::F32, FloatDType::F16];
    if device().supports_dtype(FloatDType::BF16) {
        types.push(FloatDType::BF16);
    }
    types
}

/// Numbers near 1 in size that all types hold exactly.
fn random(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Seven bits and a sign, so that bf16 holds them.
            ((state >> 56) as f64 - 127.5).trunc() / 64.0
        })
        .collect()
}

fn tensor(values: &[f64], shape: [usize; 2], dtype: FloatDType, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::<2>::from_data(TensorData::new(values, shape), device).cast(dtype)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}

/// The largest error beyond one rounding of each number, relative to the largest number.
fn worst(found: &[f32], truth: &[f64], rounding: f64) -> f64 {
    assert_eq!(found.len(), truth.len());
    let largest = truth.iter().fold(0.0f64, |largest, value| largest.max(value.abs()));
    assert!(largest > 0.0, "nothing to compare");
    let errors = found.iter().zip(truth).map(|(&found, truth)| {
        assert!(found.is_finite());
        (found as f64 - truth).abs() - rounding * truth.abs()
    });
    errors.fold(0.0f64, f64::max) / largest
}

/// Operands of an operation, and what it should make of them.
struct Case {
    inputs: Vec<(Vec<f64>, [usize; 2])>,
    output: Vec<f64>,
    /// Of the sum of the outputs, each times its slope.
    grads: Vec<Vec<f64>>,
    slopes: Vec<f64>,
}

/// Compares value and gradients in every type, and gives the worst of f32 for the record.
fn check(what: &str, case: &Case, run: impl Fn(&[Tensor<2>]) -> Tensor<2>) {
    for dtype in types() {
        let device = device().autodiff();
        let inputs: Vec<Tensor<2>> = case
            .inputs
            .iter()
            .map(|(values, shape)| tensor(values, *shape, dtype, &device).detach().require_grad())
            .collect();
        let output = run(&inputs);
        assert_eq!(output.dtype(), DType::from(dtype), "{what}");
        let shape = output.dims();
        let slopes = tensor(&case.slopes, shape, FloatDType::F32, &device);
        let grads = (output.clone().cast(FloatDType::F32) * slopes).sum().backward();
        let mut off = vec![worst(&values(output), &case.output, rounding(dtype))];
        for (input, truth) in inputs.iter().zip(&case.grads) {
            let grad = input.grad(&grads).expect("a gradient for each operand");
            assert_eq!((grad.dims(), grad.dtype()), (input.dims(), input.dtype()), "{what}");
            off.push(worst(&values(grad), truth, rounding(dtype)));
        }
        let written = off.iter().map(|off| format!("{off:.1e}")).collect::<Vec<_>>().join(", ");
        println!("{what} {dtype:?}: {written}");
        assert!(off.iter().all(|&off| off <= BOUND), "{what} {dtype:?}: {written}");
    }
}

const EPS: f64 = 1e-5;

fn rms_case(rows: usize, width: usize, weighted: bool) -> Case {
    let (x, weight, slopes) = (random(rows * width, 1), random(width, 2), random(rows * width, 3));
    let weight = if weighted { weight } else { vec![1.0; width] };
    let (mut output, mut x_grad, mut weight_grad) = (vec![], vec![], vec![0.0; width]);
    for (x, slopes) in x.chunks(width).zip(slopes.chunks(width)) {
        let inverse = (x.iter().map(|x| x * x).sum::<f64>() / width as f64 + EPS).sqrt().recip();
        let along = (0..width).map(|i| slopes[i] * weight[i] * x[i]).sum::<f64>() / width as f64;
        for i in 0..width {
            output.push(x[i] * inverse * weight[i]);
            x_grad.push(slopes[i] * weight[i] * inverse - x[i] * inverse.powi(3) * along);
            weight_grad[i] += slopes[i] * x[i] * inverse;
        }
    }
    let mut inputs = vec![(x, [rows, width])];
    let mut grads = vec![x_grad];
    if weighted {
        inputs.push((weight, [1, width]));
        grads.push(weight_grad);
    }
    Case { inputs, output, grads, slopes }
}

#[test]
fn rms_norm_has_the_value_and_gradients_of_f64_loops() {
    // One row, rows of one cube and of many, widths that are no multiple of anything, rows summed one after the other.
    for (rows, width) in [(1, 1030), (3, 33), (70, 48), (601, 514), (2, 5120), (9000, 16)] {
        check(&format!("rms_norm {rows} x {width}"), &rms_case(rows, width, true), |x| {
            rms_norm(x[0].clone(), x[1].clone().reshape([width]), EPS as f32)
        });
        check(&format!("unit_rms {rows} x {width}"), &rms_case(rows, width, false), |x| {
            unit_rms(x[0].clone(), EPS as f32)
        });
    }
}

#[test]
fn a_weights_gradient_has_the_same_bits_each_time() {
    let device = device().autodiff();
    let case = rms_case(2000, 96, true);
    let run = || {
        let [x, weight] =
            [0, 1].map(|i| tensor(&case.inputs[i].0, case.inputs[i].1, FloatDType::F32, &device).require_grad());
        let grads = rms_norm(x, weight.clone().reshape([96]), EPS as f32).square().sum().backward();
        values(weight.grad(&grads).unwrap()).into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    let first = run();
    assert!((0..3).all(|_| run() == first));
}

fn rotary_case(tokens: usize, heads: usize, head_dim: usize, table: &RotaryTable) -> Case {
    let (half, width) = (head_dim / 2, heads * head_dim);
    let (x, slopes) = (random(tokens * width, 1), random(tokens * width, 2));
    let turn = |x: &[f64], sign: f64| {
        let mut output = vec![0.0; x.len()];
        for token in 0..tokens {
            for head in 0..heads {
                for j in 0..half {
                    let (cosine, sine) =
                        (table.cosines[token * half + j] as f64, sign * table.sines[token * half + j] as f64);
                    let first = token * width + head * head_dim;
                    let (a, b) = match table.pairing {
                        Pairing::Interleaved => (first + 2 * j, first + 2 * j + 1),
                        Pairing::Halves => (first + j, first + half + j),
                    };
                    output[a] = x[a] * cosine - x[b] * sine;
                    output[b] = x[a] * sine + x[b] * cosine;
                }
            }
        }
        output
    };
    let (output, grad) = (turn(&x, 1.0), turn(&slopes, -1.0));
    Case { inputs: vec![(x, [tokens, width])], output, grads: vec![grad], slopes }
}

#[test]
fn rotary_turns_both_pairings_as_f64_loops_do() {
    for (tokens, heads, head_dim) in [(1, 1, 2), (5, 3, 6), (70, 5, 16), (33, 2, 128)] {
        let positions: Vec<u32> = (0..tokens).map(|i| (i * 3 % 41) as u32).collect();
        let frequencies: Vec<f32> =
            (0..head_dim / 2).map(|j| 10_000f32.powf(-2.0 * j as f32 / head_dim as f32)).collect();
        for pairing in [Pairing::Interleaved, Pairing::Halves] {
            let table = RotaryTable::new(&positions, &frequencies, pairing);
            let case = rotary_case(tokens, heads, head_dim, &table);
            check(&format!("rotary {pairing:?} {tokens} x {heads} x {head_dim}"), &case, |x| {
                rotary(x[0].clone(), head_dim, &table)
            });
        }
    }
}

/// Result, and derivatives in gate and up.
fn silu_times(gate: f64, up: f64) -> [f64; 3] {
    let sigmoid = 1.0 / (1.0 + (-gate).exp());
    [gate * sigmoid * up, up * (sigmoid + gate * sigmoid * (1.0 - sigmoid)), gate * sigmoid]
}

#[test]
fn gated_activations_have_the_value_and_gradients_of_f64_loops() {
    for (rows, width) in [(1, 1), (7, 33), (70, 48), (3, 1030)] {
        let count = rows * width;
        let (mut gate, up, slopes) = (random(count, 1), random(count, 2), random(count, 3));
        // Far to both sides, where an exponential would overflow or vanish.
        (gate[0], gate[count - 1]) = (-120.0, 120.0);
        let found: Vec<[f64; 3]> = gate.iter().zip(&up).map(|(&gate, &up)| silu_times(gate, up)).collect();
        let grad = |which: usize| found.iter().zip(&slopes).map(|(f, s)| f[which] * s).collect::<Vec<f64>>();
        let joined = |gate: &[f64], up: &[f64]| -> Vec<f64> {
            gate.chunks(width).zip(up.chunks(width)).flat_map(|(gate, up)| [gate, up].concat()).collect()
        };
        let case = Case {
            inputs: vec![(joined(&gate, &up), [rows, 2 * width])],
            output: found.iter().map(|f| f[0]).collect(),
            grads: vec![joined(&grad(1), &grad(2))],
            slopes: slopes.clone(),
        };
        check(&format!("swiglu {rows} x {width}"), &case, |x| swiglu(x[0].clone()));
        let shape = [rows, width];
        let grads = vec![grad(1), grad(2)];
        let case = Case { inputs: vec![(gate, shape), (up, shape)], grads, ..case };
        check(&format!("gated_silu {rows} x {width}"), &case, |x| gated_silu(x[0].clone(), x[1].clone()));
    }
}

#[test]
fn gathered_rows_and_their_gradient_are_those_of_f64_loops() {
    let every_third = (0..90).map(|i| i * 7 % 30 / 3 * 3).collect::<Vec<u32>>();
    for (row_count, width, picks) in
        [(10, 24, vec![3u32, 3, 0, 9, 3, 1, 0, 8]), (1, 1, vec![0]), (30, 37, every_third), (5, 1030, vec![4; 300])]
    {
        let x = random(row_count * width, 1);
        let slopes = random(picks.len() * width, 2);
        let output = picks.iter().flat_map(|&row| x[row as usize * width..][..width].to_vec()).collect();
        let mut grad = vec![0.0; x.len()];
        for (slopes, &row) in slopes.chunks(width).zip(&picks) {
            grad[row as usize * width..][..width].iter_mut().zip(slopes).for_each(|(sum, slope)| *sum += slope);
        }
        let case = Case { inputs: vec![(x, [row_count, width])], output, grads: vec![grad], slopes };
        let picks = Arc::new(picks);
        check(&format!("gather_rows {row_count} x {width}"), &case, |x| gather_rows(x[0].clone(), picks.clone()));
    }
}

fn on_device(values: &[f64], width: usize, dtype: FloatDType) -> CubeTensor {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    let shape = Shape::from(vec![values.len() / width, width]);
    CubeBackend::float_cast(CubeBackend::float_from_data(TensorData::new(values, shape), &cube_device()), dtype)
}

fn read(tensor: CubeTensor) -> Vec<f32> {
    into_data_sync(tensor).convert::<f32>().try_into_vec::<f32>().unwrap()
}

#[test]
fn picks_of_a_row_stay_in_their_order() {
    let sorted = Sorted::new(&[3, 3, 0, 4, 3, 0], 5);
    assert_eq!(sorted, Sorted { places: vec![2, 5, 0, 1, 4, 3], starts: vec![0, 2, 2, 2, 5, 6] });
    assert_eq!(Sorted::new(&[], 2), Sorted { places: vec![], starts: vec![0, 0, 0] });
}

#[test]
fn no_picks_give_no_rows_and_a_gradient_of_zeros() {
    let op = GatherRows { rows: Arc::new(vec![]), row_count: 3 };
    let (output, saved) = op.forward(&[on_device(&random(12, 1), 4, FloatDType::F32)]);
    assert_eq!(output.meta.shape()[..], [0, 4]);
    let grads = op.backward(&[], &saved, output, &[true]);
    assert_eq!(read(grads.into_iter().flatten().next().unwrap()), [0.0; 12]);
}

#[test]
fn more_cubes_than_one_row_of_a_grid_holds_reach_every_place() {
    // More than 65,535 cubes of 256 threads, and of 16 rows.
    let row_count = 65_536 * 256 + 1000;
    let last = row_count as u32 - 1;
    let op = GatherRows { rows: Arc::new(vec![last, 7, last]), row_count };
    let grad = op.backward(&[], &[], on_device(&[1.0, 2.0, 4.0], 1, FloatDType::F16), &[true]);
    let grad = read(grad.into_iter().flatten().next().unwrap());
    assert!((grad[7], grad[last as usize]) == (2.0, 5.0));
    assert_eq!(grad.iter().filter(|&&value| value != 0.0).count(), 2);
    let rows = 65_536 * 16 + 100;
    let norm = device::rms_norm::RmsNorm { eps: 0.0 };
    let (output, _) = norm.forward(&[on_device(&vec![-2.0; rows], 1, FloatDType::F32)]);
    assert!(read(output).iter().all(|value| (value + 1.0).abs() < 1e-6));
}

#[test]
fn operands_out_of_order_are_put_in_order_first() {
    let device = device().autodiff();
    let case = rms_case(12, 20, false);
    let x = tensor(&case.inputs[0].0, [12, 20], FloatDType::F32, &device);
    // The same rows, by way of a transposed tensor and of columns of a wider one.
    let transposed = tensor(
        &values(x.clone().transpose()).iter().map(|&x| x as f64).collect::<Vec<f64>>(),
        [20, 12],
        FloatDType::F32,
        &device,
    );
    let wide = Tensor::cat(vec![x.clone(), x.clone(), x.clone()], 1);
    for (what, x) in [("transposed", transposed.transpose()), ("columns", wide.narrow(1, 20, 20))] {
        let x = x.detach().require_grad();
        let output = unit_rms(x.clone(), EPS as f32);
        let slopes = tensor(&case.slopes, [12, 20], FloatDType::F32, &device);
        let grads = (output.clone().transpose() * slopes.transpose()).sum().backward();
        assert!(worst(&values(output), &case.output, 0.0) <= BOUND, "{what}");
        assert!(worst(&values(x.grad(&grads).unwrap()), &case.grads[0], 0.0) <= BOUND, "{what}");
    }
}

/// All operations in one graph, among burn's own.
fn chain(device: &Device, x: &[f64], weight: &[f64], frozen: bool) -> (Vec<f32>, Vec<f32>, Option<Vec<f32>>) {
    let (tokens, width) = (24, 32);
    let x = tensor(x, [tokens, width], FloatDType::F32, device).require_grad();
    let weight = tensor(weight, [1, width], FloatDType::F32, device);
    let weight = if frozen { weight } else { weight.require_grad() };
    let positions: Vec<u32> = (0..tokens as u32).collect();
    let table = RotaryTable::new(&positions, &[1.0, 0.3, 0.1, 0.02], Pairing::Interleaved);
    let picks = Arc::new((0..tokens as u32).map(|i| i * 5 % 13).collect::<Vec<u32>>());
    let h = gather_rows(x.clone() * 0.5, picks);
    let h = rms_norm(h.clone() + x.clone(), weight.clone().reshape([width]), 1e-5);
    let h = rotary(h, 8, &table) + x.clone();
    let h = Tensor::cat(vec![swiglu(h.clone()), gated_silu(h.clone().narrow(1, 0, 16), h.narrow(1, 16, 16))], 1);
    let output = unit_rms(h.matmul(x.clone().transpose()), 1e-5);
    let grads = (output.clone() * output.clone() * output.clone()).sum().backward();
    (values(output), values(x.grad(&grads).unwrap()), weight.grad(&grads).map(values))
}

#[test]
fn a_graph_of_all_operations_has_the_processors_gradients() {
    let (x, weight) = (random(24 * 32, 5), random(32, 6));
    let flex = chain(&Device::flex().autodiff(), &x, &weight, false);
    let wide = |values: &[f32]| values.iter().map(|&value| value as f64).collect::<Vec<f64>>();
    // The product in between is f32 on wgpu, TF32 on CUDA.
    let bound = if cfg!(feature = "cuda") { 1e-2 } else { 2e-5 };
    for device in [device().autodiff(), device().autodiff().gradient_checkpointing()] {
        let found = chain(&device, &x, &weight, false);
        assert!(worst(&found.0, &wide(&flex.0), 0.0) <= bound);
        assert!(worst(&found.1, &wide(&flex.1), 0.0) <= bound);
        assert!(worst(&found.2.unwrap(), &wide(flex.2.as_ref().unwrap()), 0.0) <= bound);
        let (.., weight_grad) = chain(&device, &x, &weight, true);
        assert!(weight_grad.is_none(), "a frozen weight has no gradient");
    }
}

fn vector(values: &[f64]) -> Tensor<1> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &device())
}

#[test]
fn adamw_takes_the_steps_of_f64_loops_whoever_else_holds_the_weights() {
    for count in [1, 1030, 70_000] {
        let (mut weight, mut first, mut second) = (random(count, 1), vec![0.0; count], vec![0.0; count]);
        let on_device = |values: &[f64]| vector(values);
        let mut found = on_device(&weight);
        let mut state = AdamwState { first_moment: on_device(&first), second_moment: on_device(&second) };
        for update in 1..=4 {
            let step = AdamwStep {
                learning_rate: 3e-3,
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
                update,
                gradient_scale: 0.25,
            };
            let gradient = random(count, 10 + update);
            // From the second update on somebody else holds the weight, and at the last the moments too.
            let held = (update >= 2).then(|| (found.clone(), weight.clone()));
            let held_state = (update == 4).then(|| state.clone());
            let before = (first.clone(), second.clone());
            (found, state) = step.apply(found, on_device(&gradient), state);
            let correction = |beta: f64| 1.0 - beta.powi(update as i32);
            for i in 0..count {
                let g = gradient[i] * 0.25;
                first[i] = 0.9 * first[i] + 0.1 * g;
                second[i] = 0.95 * second[i] + 0.05 * g * g;
                let direction = first[i] / correction(0.9) / ((second[i] / correction(0.95)).sqrt() + 1e-8);
                weight[i] = weight[i] * (1.0 - 3e-4) - 3e-3 * direction;
            }
            let close = |what: &str, found: Tensor<1>, truth: &[f64]| {
                let off = worst(&values(found), truth, 0.0);
                assert!(off <= BOUND, "{what} of {count} after {update} updates: {off:.1e}");
            };
            close("weight", found.clone(), &weight);
            close("first moment", state.first_moment.clone(), &first);
            close("second moment", state.second_moment.clone(), &second);
            if let Some((held, truth)) = held {
                close("weight that was held", held, &truth);
            }
            if let Some(held) = held_state {
                close("first moment that was held", held.first_moment, &before.0);
                close("second moment that was held", held.second_moment, &before.1);
            }
        }
    }
}

#[test]
fn adamw_writes_where_the_weights_were() {
    let numbers = device::adamw::Numbers {
        scale: 1.0,
        beta1: 0.9,
        rest1: 0.1,
        beta2: 0.9,
        rest2: 0.1,
        second_correction: 1.0,
        eps: 1e-8,
        keep: 1.0,
        rate: 0.1,
    };
    let fresh = |seed| on_device(&random(64, seed), 64, FloatDType::F32);
    let place = |tensor: &CubeTensor| tensor.handle.clone().binding().memory.id();
    let (weight, first, second) = (fresh(1), fresh(2), fresh(3));
    let before = [&weight, &first, &second].map(place);
    let shared = first.clone();
    let (weight, first, second) = device::adamw::update_tensors(weight, fresh(4), first, second, numbers);
    let after = [&weight, &first, &second].map(place);
    assert!(before[0] == after[0] && before[2] == after[2], "weight and second moment are nobody else's");
    assert!(before[1] != after[1] && place(&shared) == before[1], "the first moment is");
}
