//! Attention and the grouped product on a device, whose kernels multiply tiles themselves, against f64 loops: on whatever
//! device `wgpu` finds, or on CUDA's first.

#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
#[cfg(not(feature = "cuda"))]
use burn::tensor::DeviceKind;
use burn::tensor::{DType, Device, Shape, Tensor, TensorData};
use burn_cubecl::{CubeBackend, CubeDevice, ops::into_data_sync, tensor::CubeTensor};
use half::{bf16, f16};
use limbeck_kernels::{
    attention::{Heads, KeyRanges, attention},
    device::{
        attention::{Attention, plans},
        cube::{
            attention::AttentionPlan,
            plans::{Cut, Plans},
            product::Tile,
        },
        grouped_matmul::{GroupedMatmul, cut},
    },
    grouped_matmul::grouped_matmul,
};

/// Of the largest sum of magnitudes that a number of an output or a gradient is the sum of. In half precision, weights and gradients of scores are rounded
/// before they are multiplied, and the results again.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 5e-6,
        DType::F16 => 1e-3,
        _ => 8e-3,
    }
}

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(not(feature = "cuda"))]
    return Device::wgpu(DeviceKind::DefaultDevice);
}

/// Types that the device knows: Mesa's lavapipe has no bf16.
fn types() -> Vec<DType> {
    let all = [DType::F32, DType::F16, DType::BF16];
    let known: Vec<DType> = all
        .into_iter()
        .filter(|&dtype| {
            let float = match dtype {
                DType::F16 => burn::tensor::FloatDType::F16,
                DType::BF16 => burn::tensor::FloatDType::BF16,
                _ => burn::tensor::FloatDType::F32,
            };
            device().supports_dtype(float)
        })
        .collect();
    assert!(known.contains(&DType::F32) && known.contains(&DType::F16), "{known:?}");
    known
}

/// Numbers between -`scale` and `scale`, as the type holds them.
fn random(count: usize, seed: u64, scale: f32, dtype: DType) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale;
        match dtype {
            DType::F16 => f16::from_f32(value).to_f32(),
            DType::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        }
    };
    (0..count).map(|_| next()).collect()
}

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], dtype: DType, device: &Device) -> Tensor<D> {
    Tensor::<D>::from_data(TensorData::new(values.to_vec(), shape), device).cast(dtype).detach()
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec::<f32>().unwrap()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value as f64).collect()
}

/// What numbers should be, and the largest sum of the magnitudes of what they are made of. Where most of that cancels,
/// as in the gradient of a query that sees one key, no sum of rounded numbers is near the truth as a share of the truth.
struct Truth {
    values: Vec<f64>,
    size: f64,
}

impl Truth {
    fn new(values: Vec<f64>, magnitudes: Vec<f64>) -> Truth {
        Truth { values, size: magnitudes.into_iter().fold(1e-30, f64::max) }
    }
}

/// The largest difference, of the largest sum of magnitudes.
fn assert_near(found: &[f32], truth: &Truth, dtype: DType, what: &str) -> f64 {
    assert_eq!(found.len(), truth.values.len(), "{what}");
    let mut worst = 0.0f64;
    for (place, (&found, value)) in found.iter().zip(&truth.values).enumerate() {
        let off = (found as f64 - value).abs() / truth.size;
        assert!(off <= bound(dtype), "{what}: {found} instead of {value} at {place}, {off:.1e} of what it is made of");
        worst = worst.max(off);
    }
    worst
}

#[derive(Clone, Copy)]
enum Mask {
    Causal,
    /// Llama 4's chunks.
    Chunks(usize),
    /// A sliding window.
    Window(usize),
    /// Documents of 5, 18, 1 and many tokens.
    Documents,
}

fn ranges(mask: Mask, length: usize, sequences: usize) -> KeyRanges {
    let first = |token: usize| match mask {
        Mask::Causal => 0,
        Mask::Chunks(size) => token / size * size,
        Mask::Window(size) => (token + 1).saturating_sub(size),
        Mask::Documents => [24, 23, 5, 0].into_iter().find(|&first| first <= token).unwrap(),
    };
    let first_key =
        (0..sequences * length).map(|token| (token / length * length + first(token % length)) as u32).collect();
    KeyRanges { first_key: Arc::new(first_key), sequence_len: length }
}

/// Output, and gradients of query, key and value under the gradient `grad` of the output: loops over everything.
fn attention_oracle(
    [query, key, value, grad]: [&[f64]; 4],
    Heads { query_heads, key_heads, head_dim }: Heads,
    ranges: &KeyRanges,
) -> [Truth; 4] {
    let tokens = ranges.first_key.len();
    let sums = |count: usize| (vec![0.0f64; count], vec![0.0f64; count]);
    let [mut output, mut query_grad] = [(); 2].map(|()| sums(query.len()));
    let [mut key_grad, mut value_grad] = [(); 2].map(|()| sums(key.len()));
    let scale = (head_dim as f64).sqrt().recip();
    for token in 0..tokens {
        for head in 0..query_heads {
            let at = (token * query_heads + head) * head_dim;
            let own = at..at + head_dim;
            let places: Vec<usize> = (ranges.first_key[token] as usize..=token)
                .map(|seen| (seen * key_heads + head / (query_heads / key_heads)) * head_dim)
                .collect();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let scores: Vec<f64> =
                places.iter().map(|&place| scale * dot(&query[own.clone()], &key[place..place + head_dim])).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp() / total).collect();
            let slopes: Vec<f64> =
                places.iter().map(|&place| dot(&grad[own.clone()], &value[place..place + head_dim])).collect();
            let along = dot(&weights, &slopes);
            for ((&place, weight), slope) in places.iter().zip(&weights).zip(&slopes) {
                // The difference of two numbers that are each a sum.
                let (rise, of) = (scale * weight * (slope - along), scale * weight * (slope.abs() + along.abs()));
                for d in 0..head_dim {
                    for (sums, place, left, size, right) in [
                        (&mut output, at + d, *weight, *weight, value[place + d]),
                        (&mut value_grad, place + d, *weight, *weight, grad[at + d]),
                        (&mut query_grad, at + d, rise, of, key[place + d]),
                        (&mut key_grad, place + d, rise, of, query[at + d]),
                    ] {
                        sums.0[place] += left * right;
                        sums.1[place] += size * right.abs();
                    }
                }
            }
        }
    }
    [output, query_grad, key_grad, value_grad].map(|(values, magnitudes)| Truth::new(values, magnitudes))
}

struct AttentionCase {
    heads: Heads,
    ranges: KeyRanges,
    /// Query, key, value, and the gradient of the output.
    arrays: [Vec<f32>; 4],
    truth: [Truth; 4],
    dtype: DType,
    what: String,
}

fn attention_case(
    (query_heads, key_heads, head_dim): (usize, usize, usize),
    (length, sequences): (usize, usize),
    mask: Mask,
    scale: f32,
    dtype: DType,
) -> AttentionCase {
    let heads = Heads { query_heads, key_heads, head_dim };
    let ranges = ranges(mask, length, sequences);
    let tokens = length * sequences;
    let array = |seed, heads: usize, scale| random(tokens * heads * head_dim, seed, scale, dtype);
    let arrays = [
        array(1, query_heads, scale),
        array(2, key_heads, scale),
        array(3, key_heads, 1.0),
        array(4, query_heads, 1.0),
    ];
    let exact = arrays.each_ref().map(|array| wide(array));
    let truth = attention_oracle(exact.each_ref().map(Vec::as_slice), heads, &ranges);
    let what = format!("{query_heads}/{key_heads} heads of {head_dim}, {sequences} x {length} tokens, {dtype:?}");
    AttentionCase { heads, ranges, arrays, truth, dtype, what }
}

const NAMES: [&str; 4] = ["output", "query", "key", "value"];

fn check_attention(case: &AttentionCase) -> [f64; 4] {
    let device = device().autodiff();
    assert!(plans(&device, case.dtype, case.heads).is_some(), "{}: kernels for these heads", case.what);
    let Heads { query_heads, key_heads, head_dim } = case.heads;
    let tokens = case.ranges.first_key.len();
    let shape = |heads: usize| [tokens, heads * head_dim];
    let [query, key, value, grad] = [(0, query_heads), (1, key_heads), (2, key_heads), (3, query_heads)]
        .map(|(which, heads)| tensor(&case.arrays[which], shape(heads), case.dtype, &device));
    let inputs = [query, key, value].map(|input| input.require_grad());
    let [query, key, value] = inputs.clone();
    let output = attention(query, key, value, case.heads, &case.ranges);
    assert_eq!(output.dtype(), case.dtype);
    let found = read(output.clone().inner());
    let grads = (output * grad).sum().backward();
    let [query, key, value] = inputs.map(|input| read(input.grad(&grads).unwrap()));
    let found = [found, query, key, value];
    std::array::from_fn(|place| {
        assert_near(&found[place], &case.truth[place], case.dtype, &format!("{}: {}", case.what, NAMES[place]))
    })
}

fn print_worst(what: &str, dtype: DType, worst: &[[f64; 4]]) {
    let worst: [f64; 4] = std::array::from_fn(|place| worst.iter().map(|one| one[place]).fold(0.0, f64::max));
    let worst = NAMES.iter().zip(worst).map(|(name, worst)| format!("{name} {worst:.1e}"));
    println!("{what}, {dtype:?} against f64, worst: {}", worst.collect::<Vec<_>>().join(", "));
}

#[test]
fn attention_of_every_shape_of_heads_has_the_oracles_values_and_gradients() {
    for dtype in types() {
        let mut worst = vec![];
        for (heads, key_heads, head_dim) in [(4, 2, 32), (8, 1, 64), (5, 5, 21), (4, 2, 128)] {
            for length in [1, 7, 64, 130] {
                let case = attention_case((heads, key_heads, head_dim), (length, 1), Mask::Causal, 1.5, dtype);
                worst.push(check_attention(&case));
            }
        }
        print_worst("attention", dtype, &worst);
    }
}

#[test]
fn documents_chunks_and_windows_hide_what_they_hide() {
    for dtype in types() {
        let mut worst = vec![];
        for mask in [Mask::Chunks(16), Mask::Chunks(50), Mask::Window(9), Mask::Window(40), Mask::Documents] {
            let case = attention_case((4, 2, 32), (130, 2), mask, 1.5, dtype);
            worst.push(check_attention(&case));
        }
        print_worst("masked attention", dtype, &worst);
    }
}

#[test]
fn scores_that_keep_growing_move_the_reference_and_lose_nothing() {
    for dtype in types() {
        let mut case = attention_case((4, 2, 32), (130, 1), Mask::Causal, 1.0, dtype);
        // Keys along the query, each longer than the one before: scores rise to about 60.
        for (place, key) in case.arrays[1].iter_mut().enumerate() {
            *key = (place / 64 / 8) as f32 * 0.25;
        }
        for query in &mut case.arrays[0] {
            *query = query.abs() + 0.5;
        }
        let round = |value: f32| if dtype == DType::F16 { f16::from_f32(value).to_f32() } else { value };
        let round = |value: f32| if dtype == DType::BF16 { bf16::from_f32(value).to_f32() } else { round(value) };
        case.arrays[0].iter_mut().for_each(|value| *value = round(*value));
        let exact = case.arrays.each_ref().map(|array| wide(array));
        case.truth = attention_oracle(exact.each_ref().map(Vec::as_slice), case.heads, &case.ranges);
        print_worst("growing scores", dtype, &[check_attention(&case)]);
    }
}

fn cube_device() -> CubeDevice {
    match device().as_dispatch() {
        burn::backend::DispatchDevice::Cube(device) => device.clone(),
        other => panic!("{other:?} has no kernels"),
    }
}

fn on_device(values: &[f32], shape: &[usize], dtype: DType) -> CubeTensor {
    let tensor =
        CubeBackend::float_from_data(TensorData::new(values.to_vec(), Shape::from(shape.to_vec())), &cube_device());
    match dtype {
        DType::F16 => CubeBackend::float_cast(tensor, burn::tensor::FloatDType::F16),
        _ => tensor,
    }
}

fn read_cube(tensor: CubeTensor) -> Vec<f32> {
    into_data_sync(tensor).convert::<f32>().try_into_vec::<f32>().unwrap()
}

/// Tiles as tensor cores would have them in all but the products, whose operands are read several elements at once.
fn square(side: usize, heads: Heads) -> AttentionPlan {
    let workers = if side == 64 { 16 } else { 8 };
    AttentionPlan {
        tile: Tile {
            rows: side,
            columns: side,
            inner: side,
            row_workers: workers,
            column_workers: workers,
            tensor_cores: false,
        },
        head_dim: heads.head_dim,
        group: heads.query_heads / heads.key_heads,
        key_heads: heads.key_heads,
    }
}

#[test]
fn tiles_of_any_side_read_in_vectors_of_any_size_give_the_same() {
    // Single elements of vectors are read slowly on most devices, so that the shapes are small.
    for (dtype, side, vector) in [(DType::F32, 8, 4), (DType::F32, 16, 2), (DType::F16, 32, 4), (DType::F16, 16, 1)] {
        let case = attention_case((6, 2, 20), (37, 2), Mask::Window(17), 1.5, dtype);
        let plan = square(side, case.heads);
        let operation = Attention {
            heads: case.heads,
            ranges: case.ranges.clone(),
            plans: Plans { forward: plan, backward: plan, vector },
        };
        let heads = [case.heads.query_heads, case.heads.key_heads, case.heads.key_heads, case.heads.query_heads];
        let tensors: [CubeTensor; 4] =
            std::array::from_fn(|place| on_device(&case.arrays[place], &[74, heads[place] * 20], dtype));
        let [query, key, value, grad] = &tensors;
        let run = || {
            let (output, log_sums) = operation.run(query, key, value);
            let grads = operation.gradients([query, key, value], &output, &log_sums, grad, [true; 3]);
            let [query, key, value] = grads.map(|grad| read_cube(grad.unwrap()));
            [read_cube(output), query, key, value]
        };
        let found = run();
        for (place, found) in found.iter().enumerate() {
            let what = format!("side {side}, vectors of {vector}, {dtype:?}: {}", NAMES[place]);
            assert_near(found, &case.truth[place], dtype, &what);
        }
        assert_eq!(found, run(), "the same sums in the same order");
        let grads = operation.gradients(
            [query, key, value],
            query,
            &operation.run(query, key, value).1,
            grad,
            [false, true, false],
        );
        assert!(grads[0].is_none() && grads[1].is_some() && grads[2].is_none());
    }
}

#[test]
fn frozen_keys_and_values_take_no_gradient_and_leave_the_queries() {
    let case = attention_case((4, 2, 32), (64, 1), Mask::Causal, 1.5, DType::F32);
    let device = device().autodiff().gradient_checkpointing();
    let array = |which: usize, heads: usize| tensor(&case.arrays[which], [64, heads * 32], DType::F32, &device);
    let (query, key, value) = (array(0, 4).require_grad(), array(1, 2), array(2, 2));
    let output = attention(query.clone() * 1.0, key.clone(), value, case.heads, &case.ranges);
    let grads = (output * array(3, 4)).sum().backward();
    assert_near(&read(query.grad(&grads).unwrap()), &case.truth[1], DType::F32, "query");
    assert!(key.grad(&grads).is_none());
}

/// Output, and gradients of rows and matrices.
fn grouped_oracle([x, weights, grad]: [&[f64]; 3], [inner, outer]: [usize; 2], offsets: &[usize]) -> [Truth; 3] {
    let rows = *offsets.last().unwrap();
    let sums = |count: usize| (vec![0.0f64; count], vec![0.0f64; count]);
    let (mut output, mut x_grad, mut weights_grad) = (sums(rows * outer), sums(rows * inner), sums(weights.len()));
    for (group, bounds) in offsets.windows(2).enumerate() {
        for row in bounds[0]..bounds[1] {
            for i in 0..inner {
                for o in 0..outer {
                    let place = (group * inner + i) * outer + o;
                    for (sums, place, term) in [
                        (&mut output, row * outer + o, x[row * inner + i] * weights[place]),
                        (&mut x_grad, row * inner + i, grad[row * outer + o] * weights[place]),
                        (&mut weights_grad, place, grad[row * outer + o] * x[row * inner + i]),
                    ] {
                        sums.0[place] += term;
                        sums.1[place] += term.abs();
                    }
                }
            }
        }
    }
    [output, x_grad, weights_grad].map(|(values, magnitudes)| Truth::new(values, magnitudes))
}

const OFFSETS: [&[usize]; 5] = [
    // Uneven, with none at the beginning, in the middle and at the end.
    &[0, 0, 33, 33, 34, 100, 100],
    // One has all.
    &[0, 0, 130, 130],
    &[0, 130],
    // One row, and tiles that are just full.
    &[0, 1, 1],
    &[0, 32, 64, 128],
];

#[test]
fn grouped_products_have_the_oracles_values_and_gradients() {
    for dtype in types() {
        let mut worst = [0.0f64; 3];
        for offsets in OFFSETS {
            for [inner, outer] in [[40, 24], [33, 17], [64, 128]] {
                let (rows, groups) = (*offsets.last().unwrap(), offsets.len() - 1);
                let device = device().autodiff();
                assert!(cut(&device, dtype, inner, outer).is_some(), "a kernel for these matrices");
                let arrays = [(rows * inner, 1), (groups * inner * outer, 2), (rows * outer, 3)]
                    .map(|(count, seed)| random(count, seed, 1.0, dtype));
                let exact = arrays.each_ref().map(|array| wide(array));
                let truth = grouped_oracle(exact.each_ref().map(Vec::as_slice), [inner, outer], offsets);
                let x = tensor(&arrays[0], [rows, inner], dtype, &device).require_grad();
                let weights = tensor(&arrays[1], [groups, inner, outer], dtype, &device).require_grad();
                let grad = tensor(&arrays[2], [rows, outer], dtype, &device);
                let output = grouped_matmul(x.clone(), weights.clone(), Arc::new(offsets.to_vec()));
                assert_eq!(output.dtype(), dtype);
                let found = read(output.clone().inner());
                let grads = (output * grad).sum().backward();
                let found = [found, read(x.grad(&grads).unwrap()), read(weights.grad(&grads).unwrap())];
                for (place, name) in ["output", "rows", "matrices"].into_iter().enumerate() {
                    let what = format!("{name} of {inner} x {outer} in {offsets:?}, {dtype:?}");
                    worst[place] = worst[place].max(assert_near(&found[place], &truth[place], dtype, &what));
                }
                // Exactly zero, not what was in the memory before.
                for (group, bounds) in offsets.windows(2).enumerate().filter(|(_, bounds)| bounds[0] == bounds[1]) {
                    let own = &found[2][group * inner * outer..][..inner * outer];
                    assert!(own.iter().all(|&value| value == 0.0), "group {group} of {offsets:?}: {bounds:?}");
                }
            }
        }
        let [output, rows, matrices] = worst;
        println!(
            "grouped, {dtype:?} against f64, worst: output {output:.1e}, rows {rows:.1e}, matrices {matrices:.1e}"
        );
    }
}

#[test]
fn grouped_tiles_of_any_side_read_in_vectors_give_the_same() {
    let (offsets, [inner, outer]) = (vec![0, 0, 33, 33, 34, 100, 100], [40, 24]);
    for (dtype, side, inner_step, workers, vector) in
        [(DType::F32, 16, 16, 8, 4), (DType::F32, 32, 8, 8, 2), (DType::F16, 32, 32, 8, 4), (DType::F16, 64, 16, 16, 1)]
    {
        let tile = Tile {
            rows: side,
            columns: side,
            inner: inner_step,
            row_workers: workers,
            column_workers: workers,
            tensor_cores: false,
        };
        let operation = GroupedMatmul { offsets: Arc::new(offsets.clone()), cut: Cut { tile, vector } };
        let arrays = [(100 * inner, 1), (6 * inner * outer, 2), (100 * outer, 3)]
            .map(|(count, seed)| random(count, seed, 1.0, dtype));
        let exact = arrays.each_ref().map(|array| wide(array));
        let truth = grouped_oracle(exact.each_ref().map(Vec::as_slice), [inner, outer], &offsets);
        let x = on_device(&arrays[0], &[100, inner], dtype);
        let weights = on_device(&arrays[1], &[6, inner, outer], dtype);
        let grad = on_device(&arrays[2], &[100, outer], dtype);
        let found = [
            operation.product(&x, &weights),
            operation.rows_gradient(&grad, &weights),
            operation.weights_gradient(&x, &grad),
        ];
        for (place, found) in found.into_iter().enumerate() {
            let what = format!("side {side}, vectors of {vector}, {dtype:?}: {place}");
            assert_near(&read_cube(found), &truth[place], dtype, &what);
        }
    }
}

#[test]
fn no_rows_at_all_give_an_empty_product_and_a_gradient_of_zero() {
    let device = device().autodiff();
    let x = tensor(&[], [0, 16], DType::F32, &device).require_grad();
    let weights = tensor(&random(2 * 16 * 8, 1, 1.0, DType::F32), [2, 16, 8], DType::F32, &device).require_grad();
    let output = grouped_matmul(x, weights.clone(), Arc::new(vec![0, 0, 0]));
    assert_eq!(output.dims(), [0, 8]);
}
