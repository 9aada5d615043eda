//! Every host operation gives what its plain-tensor form gives, forward and backward.

use std::sync::Arc;

use burn::tensor::{Device, Distribution, Tensor};
use limbeck_kernels::{
    adamw::{AdamwState, AdamwStep},
    attention::{Heads, KeyRanges, attention, attention_reference},
    gather_rows::{gather_rows, gather_rows_reference},
    grouped_matmul::{grouped_matmul, grouped_matmul_reference},
    linear::{linear, linear_reference},
    logsumexp_gather::{RowEntries, logsumexp_gather, logsumexp_gather_reference},
    rms_norm::{rms_norm, rms_norm_reference, unit_rms},
    rotary::{Pairing, RotaryTable, rotary, rotary_reference},
    swiglu::{gated_silu, swiglu, swiglu_reference},
};

fn device() -> Device {
    let device = Device::flex().autodiff();
    device.seed(7);
    device
}

fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device().inner()).autodiff().require_grad()
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().unwrap()
}

fn assert_close(what: &str, a: Vec<f32>, b: Vec<f32>, tolerance: f32) {
    assert_eq!(a.len(), b.len(), "{what}");
    let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(largest > 0.0, "{what}: nothing to compare");
    for (i, (a, b)) in a.iter().zip(&b).enumerate() {
        assert!((a - b).abs() <= tolerance * largest.max(1.0), "{what}[{i}]: {a} {b}");
    }
}

/// Compares outputs and, under a fixed random output gradient, the gradients of all inputs.
fn compare<const A: usize>(
    what: &str,
    inputs: &[Tensor<2>],
    extra: Option<Tensor<A>>,
    fast: impl Fn(&[Tensor<2>], Option<Tensor<A>>) -> Tensor<2>,
    plain: impl Fn(&[Tensor<2>], Option<Tensor<A>>) -> Tensor<2>,
) {
    let (a, b) = (fast(inputs, extra.clone()), plain(inputs, extra.clone()));
    assert_close(what, values(a.clone()), values(b.clone()), 2e-6);
    let weight = random(a.dims()).detach();
    let (a, b) = ((a * weight.clone()).sum().backward(), (b * weight).sum().backward());
    for (i, input) in inputs.iter().enumerate() {
        let pair = (input.grad(&a).unwrap(), input.grad(&b).unwrap());
        assert_close(&format!("{what}: gradient {i}"), values(pair.0), values(pair.1), 5e-6);
    }
    if let Some(extra) = extra {
        let pair = (extra.grad(&a).unwrap(), extra.grad(&b).unwrap());
        assert_close(&format!("{what}: gradient of the weight"), values(pair.0), values(pair.1), 5e-6);
    }
}

#[test]
fn linear_equals_its_plain_form() {
    for (rows, inputs, outputs) in [(70, 48, 33), (1, 20, 5), (1024, 256, 96)] {
        compare::<1>(
            "linear",
            &[random([rows, inputs]), random([outputs, inputs])],
            None,
            |x, _| linear(x[0].clone(), x[1].clone()),
            |x, _| linear_reference(x[0].clone(), x[1].clone()),
        );
    }
}

#[test]
fn rms_norm_equals_its_plain_form() {
    compare::<1>(
        "rms_norm",
        &[random([77, 48])],
        Some(random([48])),
        |x, w| rms_norm(x[0].clone(), w.unwrap(), 1e-5),
        |x, w| rms_norm_reference(x[0].clone(), 1e-5) * w.unwrap().unsqueeze(),
    );
    compare::<1>(
        "unit_rms",
        &[random([500, 40])],
        None,
        |x, _| unit_rms(x[0].clone(), 1e-5),
        |x, _| rms_norm_reference(x[0].clone(), 1e-5),
    );
}

#[test]
fn rotary_equals_its_plain_form() {
    let positions: Vec<u32> = (0..70).map(|i| i * 3 % 41).collect();
    let frequencies: Vec<f32> = (0..8).map(|j| 10_000f32.powf(-(j as f32) / 8.0)).collect();
    for pairing in [Pairing::Interleaved, Pairing::Halves] {
        let table = RotaryTable::new(&positions, &frequencies, pairing);
        compare::<1>(
            "rotary",
            &[random([70, 48])],
            None,
            |x, _| rotary(x[0].clone(), 16, &table),
            |x, _| rotary_reference(x[0].clone(), 16, &table),
        );
    }
}

#[test]
fn swiglu_equals_its_plain_form() {
    compare::<1>(
        "swiglu",
        &[random([70, 96])],
        None,
        |x, _| swiglu(x[0].clone()),
        |x, _| swiglu_reference(x[0].clone()),
    );
    compare::<1>(
        "gated_silu",
        &[random([70, 33]), random([70, 33])],
        None,
        |x, _| gated_silu(x[0].clone(), x[1].clone()),
        |x, _| swiglu_reference(Tensor::cat(vec![x[0].clone(), x[1].clone()], 1)),
    );
}

#[test]
fn gathered_rows_equal_the_plain_form() {
    let rows = Arc::new(vec![3u32, 3, 0, 9, 3, 1, 0, 8]);
    compare::<1>(
        "gather_rows",
        &[random([10, 24])],
        None,
        |x, _| gather_rows(x[0].clone(), rows.clone()),
        |x, _| gather_rows_reference(x[0].clone(), &rows),
    );
}

#[test]
fn grouped_products_equal_the_plain_form_with_empty_groups() {
    for offsets in [vec![0usize, 5, 5, 30, 40], vec![0, 0, 0, 0, 40], vec![0, 10, 20, 30, 40]] {
        let offsets = Arc::new(offsets);
        compare::<3>(
            "grouped_matmul",
            &[random([40, 24])],
            Some(random([4, 24, 36])),
            |x, w| grouped_matmul(x[0].clone(), w.unwrap(), offsets.clone()),
            |x, w| grouped_matmul_reference(x[0].clone(), w.unwrap(), &offsets),
        );
    }
}

#[test]
fn attention_equals_its_plain_form_over_documents_chunks_and_windows() {
    let heads = Heads { query_heads: 4, key_heads: 2, head_dim: 16 };
    let (sequences, length) = (3usize, 150usize);
    let causal = |token: usize| token / length * length;
    let documents = |token: usize| (token / 37 * 37).max(causal(token));
    let chunks = |token: usize| causal(token) + token % length / 16 * 16;
    let window = |token: usize| token.saturating_sub(9).max(causal(token));
    let kinds: [&dyn Fn(usize) -> usize; 4] = [&causal, &documents, &chunks, &window];
    for first_key in kinds {
        let tokens = sequences * length;
        let first_key = Arc::new((0..tokens).map(|token| first_key(token) as u32).collect::<Vec<u32>>());
        let ranges = KeyRanges { first_key, sequence_len: length };
        compare::<1>(
            "attention",
            &[random([tokens, 64]), random([tokens, 32]), random([tokens, 32])],
            None,
            |x, _| attention(x[0].clone(), x[1].clone(), x[2].clone(), heads, &ranges),
            |x, _| attention_reference(x[0].clone(), x[1].clone(), x[2].clone(), heads, &ranges),
        );
    }
}

#[test]
fn logsumexp_gather_equals_its_plain_form() {
    let rows = 20;
    let kept: Vec<u32> = (0..rows * 5).map(|i| (i % 5 * 19 + i / 5) as u32 % 99).collect();
    let entries = RowEntries {
        labels: Arc::new((0..rows as u32).map(|row| row * 7 % 99).collect()),
        kept: Arc::new(kept),
        counts: Arc::new((0..rows as u32).map(|row| row % 6).collect()),
    };
    compare::<1>(
        "logsumexp_gather",
        &[random([rows, 99])],
        None,
        |x, _| logsumexp_gather(x[0].clone() * 5.0, &entries),
        |x, _| logsumexp_gather_reference(x[0].clone() * 5.0, &entries),
    );
}

#[test]
fn adamw_on_the_host_equals_its_plain_form() {
    let step = AdamwStep {
        learning_rate: 3e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        update: 3,
        gradient_scale: 0.25,
    };
    let fresh = || random::<1>([1000]).detach().inner();
    let (weight, gradient) = (fresh(), fresh());
    let state = || AdamwState { first_moment: fresh(), second_moment: fresh().abs() };
    let state = state();
    let (a, a_state) = step.apply(weight.clone(), gradient.clone(), state.clone());
    let (b, b_state) = step.reference(weight, gradient, state);
    assert_close("weight", values(a), values(b), 1e-6);
    assert_close("first moment", values(a_state.first_moment), values(b_state.first_moment), 1e-6);
    assert_close("second moment", values(a_state.second_moment), values(b_state.second_moment), 1e-6);
}
