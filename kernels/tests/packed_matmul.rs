//! Products with packed weights: right, and the same to the bit whoever computes them beside whatever.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use half::{bf16, f16};
use limbeck_kernels::packed_matmul::{
    Element, Instructions, K_BLOCK, Numbers, Order, PackedMatrix, grouped, linear, multiply, multiply_with, rows,
};
use proptest::prelude::*;

/// Numbers between -1 and 1 that follow from the seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// How an element is defined: chains of fused multiply-adds over blocks of k, added up in their order.
fn defined(rows: &[f32], weights: &[f32], inputs: usize) -> Vec<f32> {
    let element = |row: &[f32], weight: &[f32]| {
        let blocks = row.chunks(K_BLOCK).zip(weight.chunks(K_BLOCK));
        let sums = blocks.map(|(row, weight)| row.iter().zip(weight).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum)));
        sums.reduce(|all, block| all + block).unwrap()
    };
    rows.chunks(inputs).flat_map(|row| weights.chunks(inputs).map(move |weight| element(row, weight))).collect()
}

fn product(instructions: Instructions, rows: &[f32], weights: &PackedMatrix) -> Vec<f32> {
    let mut output = vec![f32::NAN; rows.len() / weights.inputs() * weights.outputs()];
    multiply_with(instructions, rows, weights, &mut output);
    output
}

fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

fn on_threads<R: Send>(count: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(count).build().unwrap().install(body)
}

fn round(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| bf16::from_f32(v).to_f32()).collect()
}

/// How an element is defined where rows and weights are rounded: blocks, added up in their order.
fn defined_rounded(instructions: Instructions, rows: &[f32], weights: &[f32], inputs: usize) -> Vec<f32> {
    let block = if instructions.sums_by_amx() { block_by_amx } else { block_of_pairs };
    let element = |row: &[f32], weight: &[f32]| {
        let sums = row.chunks(2 * K_BLOCK).zip(weight.chunks(2 * K_BLOCK)).map(|(row, weight)| block(row, weight));
        sums.reduce(|all, block| all + block).unwrap()
    };
    let (rows, weights) = (round(rows), round(weights));
    rows.chunks(inputs).flat_map(|row| weights.chunks(inputs).map(move |weight| element(row, weight))).collect()
}

/// A chain over pairs, the second of a pair first.
fn block_of_pairs(row: &[f32], weight: &[f32]) -> f32 {
    row.chunks(2).zip(weight.chunks(2)).fold(0.0f32, |sum, (x, w)| {
        let sum = x.get(1).map_or(sum, |second| second.mul_add(w[1], sum));
        x[0].mul_add(w[0], sum)
    })
}

/// Of 16 pairs at a time, a chain of the firsts and one of the seconds.
fn block_by_amx(row: &[f32], weight: &[f32]) -> f32 {
    row.chunks(32).zip(weight.chunks(32)).fold(0.0f32, |sum, (row, weight)| {
        let chain = |which: usize| {
            let factors = row.iter().zip(weight).skip(which).step_by(2);
            factors.fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum))
        };
        sum + (chain(0) + chain(1))
    })
}

/// Instruction sets of this processor, and AMX whether it has it or not.
fn all_instructions() -> impl Iterator<Item = Instructions> {
    Instructions::available().iter().copied().chain([Instructions::emulated_amx()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_instruction_set_gives_the_bits_that_are_defined(
        row_count in 1usize..40, inputs in 1usize..(3 * K_BLOCK), outputs in 1usize..100, narrow: bool, seed: u64,
    ) {
        let values = random(row_count * inputs, seed);
        let mut weights = random(outputs * inputs, seed ^ 1);
        if narrow {
            weights.iter_mut().for_each(|weight| *weight = bf16::from_f32(*weight).to_f32());
        }
        let packed = PackedMatrix::pack_f32(&weights, Order::OutputMajor, inputs, outputs);
        prop_assert!(packed.is_bf16() == narrow || inputs * outputs < 4);
        let wanted = defined(&values, &weights, inputs);
        for &instructions in Instructions::available() {
            let found = product(instructions, &values, &packed);
            prop_assert_eq!(bits(&found), bits(&wanted), "{:?}", instructions);
        }
        // And what is defined is the product.
        for (row, found) in values.chunks(inputs).zip(wanted.chunks(outputs)) {
            for (weight, &found) in weights.chunks(inputs).zip(found) {
                let terms = || row.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w));
                let (truth, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                prop_assert!((f64::from(found) - truth).abs() <= 2e-6 * size, "{} instead of {}", found, truth);
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_bits_that_are_defined_for_rounded_weights(
        row_count in 1usize..40, inputs in 1usize..(5 * K_BLOCK), outputs in 1usize..100, seed: u64,
    ) {
        let (values, weights) = (random(row_count * inputs, seed), random(outputs * inputs, seed ^ 1));
        let bytes: &[u8] = bytemuck::cast_slice(&weights);
        let packed = PackedMatrix::rounded(bytes, Element::F32, Order::OutputMajor, inputs, outputs);
        prop_assert!(packed.is_bf16());
        let rounded = (round(&values), round(&weights));
        for instructions in all_instructions() {
            let found = product(instructions, &values, &packed);
            let wanted = defined_rounded(instructions, &values, &weights, inputs);
            prop_assert_eq!(bits(&found), bits(&wanted), "{}", instructions);
            // As many roundings as a product passes through: its chain, where two chains meet, the chain of those.
            let blocks = inputs.div_ceil(2 * K_BLOCK);
            let roundings = if instructions.sums_by_amx() { 16 + 1 + 16 + blocks } else { 2 * K_BLOCK + blocks };
            let rows = values.chunks(inputs).zip(rounded.0.chunks(inputs));
            for ((row, rounded_row), found) in rows.zip(found.chunks(outputs)) {
                let columns = weights.chunks(inputs).zip(rounded.1.chunks(inputs));
                for ((weight, rounded_weight), &found) in columns.zip(found) {
                    let sums = |row: &[f32], weight: &[f32]| -> (f64, f64) {
                        let terms = || row.iter().zip(weight).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        (terms().sum(), terms().map(f64::abs).sum())
                    };
                    let (truth, size) = sums(rounded_row, rounded_weight);
                    let bound = 1.001 * roundings as f64 * 2f64.powi(-24) * size;
                    prop_assert!((f64::from(found) - truth).abs() <= bound, "{} instead of {}", found, truth);
                    // Two roundings to eight bits of each term.
                    let (truth, size) = sums(row, weight);
                    prop_assert!((f64::from(found) - truth).abs() <= 0.0079 * size, "{} instead of {}", found, truth);
                }
            }
        }
    }

    #[test]
    fn packing_keeps_every_number(
        inputs in 1usize..70, outputs in 1usize..70, kind in 0usize..3, input_major: bool, seed: u64,
    ) {
        let (element, round): (_, fn(f32) -> f32) = [
            (Element::F32, (|v| v) as fn(f32) -> f32),
            (Element::Bf16, |v| bf16::from_f32(v).to_f32()),
            (Element::F16, |v| f16::from_f32(v).to_f32()),
        ][kind];
        let weights: Vec<f32> = random(inputs * outputs, seed).into_iter().map(round).collect();
        let (order, laid_out) = match input_major {
            false => (Order::OutputMajor, weights.clone()),
            true => (Order::InputMajor, transposed(&weights, inputs)),
        };
        let bytes: Vec<u8> = match element {
            Element::F32 => laid_out.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Element::Bf16 => laid_out.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            Element::F16 => laid_out.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        };
        let packed = PackedMatrix::pack(&bytes, element, order, inputs, outputs);
        prop_assert_eq!((packed.inputs(), packed.outputs()), (inputs, outputs));
        prop_assert_eq!(bits(&packed.unpacked()), bits(&weights));
        let numbers = [outputs as u32 - 1, 0];
        let looked_up = rows(&packed, &numbers, &Device::flex()).into_data().try_into_vec::<f32>().unwrap();
        let wanted = numbers.iter().flat_map(|&number| &weights[number as usize * inputs..][..inputs]).copied();
        prop_assert_eq!(bits(&looked_up), bits(&wanted.collect::<Vec<f32>>()));
    }
}

#[test]
fn a_row_has_the_same_bits_alone_among_others_and_on_any_number_of_threads() {
    let (row_count, inputs, outputs) = (300, 700, 330);
    let values = random(row_count * inputs, 3);
    let (exact, rounded) = (Instructions::best(), all_instructions());
    let kinds = [(Element::F32, exact), (Element::Bf16, exact)].map(|(element, set)| (element, Numbers::F32, set));
    for (element, numbers, set) in kinds.into_iter().chain(rounded.map(|set| (Element::F32, Numbers::Bf16, set))) {
        let mut weights = random(inputs * outputs, 4);
        if element == Element::Bf16 {
            weights = round(&weights);
        }
        let pack = |weights: &[f32]| {
            let (bytes, outputs) = (bytemuck::cast_slice(weights), weights.len() / inputs);
            PackedMatrix::pack_into(None, bytes, Element::F32, Order::OutputMajor, inputs, outputs, numbers)
        };
        let packed = pack(&weights);
        let whole = on_threads(1, || product(set, &values, &packed));
        for threads in [2, 3] {
            let again = on_threads(threads, || product(set, &values, &packed));
            assert_eq!(bits(&again), bits(&whole), "{set}, {threads} threads");
        }
        for count in [1, 2, 7, 13, 14, 15, 16, 17, 29, 32, 33, 112, 113] {
            let first = row_count - count;
            let some = product(set, &values[first * inputs..], &packed);
            assert_eq!(bits(&some), bits(&whole[first * outputs..]), "{set}, the last {count} rows");
        }
        // A head in blocks of the vocabulary.
        for (first, last) in [(0, 100), (100, 101), (101, outputs)] {
            let some = product(set, &values, &pack(&weights[first * inputs..last * inputs]));
            for (some, whole) in some.chunks(last - first).zip(whole.chunks(outputs)) {
                assert_eq!(bits(some), bits(&whole[first..last]), "{set}, columns {first} to {last}");
            }
        }
    }
}

#[test]
fn instruction_sets_have_names_and_the_best_is_one_of_this_processor() {
    let sets = Instructions::available();
    assert!(sets.contains(&Instructions::best()), "{} is not among {sets:?}", Instructions::best());
    let names: std::collections::BTreeSet<String> = all_instructions().map(|set| set.to_string()).collect();
    assert_eq!(names.len(), sets.len() + 1);
    assert_eq!(Instructions::amx().is_ok(), sets.iter().any(|set| set.sums_by_amx()), "{:?}", Instructions::amx());
    if let Err(why) = Instructions::amx() {
        eprintln!("the processor's AMX is not tested ({why}): the emulation is");
    }
}

#[test]
fn weights_take_two_bytes_where_bf16_is_exact_and_four_elsewhere() {
    let weights = vec![1.5f32; 64 * 64];
    let packed = PackedMatrix::pack_f32(&weights, Order::OutputMajor, 64, 64);
    assert!(packed.is_bf16());
    assert_eq!(packed.bytes(), 2 * 64 * 64);
    let mut finer = weights;
    finer[4095] = 1.0 + 2f32.powi(-9);
    assert_eq!(PackedMatrix::pack_f32(&finer, Order::OutputMajor, 64, 64).bytes(), 4 * 64 * 64);
}

#[test]
fn numbers_that_are_not_finite_are_seen() {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    assert!(Element::F32.all_finite(&bytes(&[1.0, -2.0])));
    assert!(!Element::F32.all_finite(&bytes(&[1.0, f32::NAN])));
    assert!(!Element::Bf16.all_finite(&bf16::INFINITY.to_le_bytes()));
    assert!(!Element::F16.all_finite(&f16::NEG_INFINITY.to_le_bytes()));
}

#[test]
fn no_rows_are_no_result() {
    let packed = PackedMatrix::pack_f32(&[1.0], Order::OutputMajor, 1, 1);
    multiply(&[], &packed, &mut []);
}

#[test]
fn groups_and_gradients_are_those_of_plain_products() {
    let (inputs, outputs, offsets) = (70, 45, vec![0, 3, 3, 10]);
    let matrices: Vec<Vec<f32>> = (0..3).map(|seed| random(inputs * outputs, seed + 10)).collect();
    let pack = |values: &Vec<f32>| Arc::new(PackedMatrix::pack_f32(values, Order::OutputMajor, inputs, outputs));
    let packed: Vec<Arc<PackedMatrix>> = matrices.iter().map(pack).collect();
    let tensor = |values: &[f32], width: usize, device: &Device| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), [values.len() / width, width]), device)
    };
    let tracked = Device::flex().autodiff();
    let values = random(10 * inputs, 20);
    let x = || tensor(&values, inputs, &Device::flex()).autodiff().require_grad();
    let read = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    let close = |found: Vec<f32>, wanted: Vec<f32>| {
        assert_eq!(found.len(), wanted.len());
        found.iter().zip(&wanted).for_each(|(a, b)| assert!((a - b).abs() < 1e-4, "{a} instead of {b}"));
    };

    let (ours, plain) = (x(), x());
    let output = grouped(ours.clone(), &packed, Arc::new(offsets.clone()));
    let parts = offsets.windows(2).zip(&matrices).filter(|(bounds, _)| bounds[0] < bounds[1]);
    let parts = parts.map(|(bounds, weights)| {
        let weights = tensor(weights, inputs, &tracked);
        plain.clone().narrow(0, bounds[0], bounds[1] - bounds[0]).matmul(weights.transpose())
    });
    let wanted = Tensor::cat(parts.collect(), 0);
    close(read(output.clone()), read(wanted.clone()));
    let along = tensor(&random(10 * outputs, 21), outputs, &tracked);
    let gradients = (output * along.clone()).sum().backward();
    let wanted = (wanted * along).sum().backward();
    close(read(ours.grad(&gradients).unwrap()), read(plain.grad(&wanted).unwrap()));

    let alone = linear(tensor(&values, inputs, &Device::flex()), &packed[0]);
    assert_eq!(bits(&read(alone)), bits(&product(Instructions::best(), &values, &packed[0])));
}

#[test]
fn spare_memory_changes_nothing() {
    let exact = |values: Vec<f32>| values.into_iter().map(|value| bf16::from_f32(value).to_f32()).collect::<Vec<f32>>();
    let sizes = [(70, 33), (33, 70), (1, 1), (129, 40)];
    let matrices = sizes.iter().enumerate().flat_map(|(seed, &(inputs, outputs))| {
        let values = random(inputs * outputs, seed as u64);
        [(exact(values.clone()), inputs, outputs), (values, inputs, outputs)]
    });
    let matrices: Vec<(Vec<f32>, usize, usize)> = matrices.collect();
    for (old, old_inputs, old_outputs) in &matrices {
        for (new, inputs, outputs) in &matrices {
            let spare = PackedMatrix::pack_f32(old, Order::OutputMajor, *old_inputs, *old_outputs);
            let bytes: Vec<u8> = new.iter().flat_map(|value| value.to_le_bytes()).collect();
            let (order, numbers) = (Order::InputMajor, Numbers::F32);
            let packed = PackedMatrix::pack_into(Some(spare), &bytes, Element::F32, order, *inputs, *outputs, numbers);
            let fresh = PackedMatrix::pack_f32(new, Order::InputMajor, *inputs, *outputs);
            assert_eq!((packed.is_bf16(), packed.bytes()), (fresh.is_bf16(), fresh.bytes()));
            let rows = random(5 * inputs, 9);
            let both = [&packed, &fresh].map(|weights| {
                let mut output = vec![0.0; 5 * outputs];
                multiply(&rows, weights, &mut output);
                bits(&output)
            });
            assert_eq!(both[0], both[1], "{old_inputs} x {old_outputs} to {inputs} x {outputs}");
        }
    }
}
