//! The loss against the f64 oracle and the goldens, in value and gradient.

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::{
    checkpoint::read_safetensors,
    loss::{DistillLossConfig, Divergence, LossOutput, Weighting},
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind},
};
use limbeck_kernels::{
    oracle::{self, KeptRow},
    top_k::top_k,
};

fn random(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (next() + next() + next() - 1.5) * scale).collect()
}

/// Rows of a teacher as the cache keeps them, for the rows of `sequences` that count.
fn batch_of(sequences: Vec<PackedSequence>, teacher: &[f32], vocab: usize, k: usize, temperature: f32) -> DistillBatch {
    let mut targets = SparseTargets::empty(&[temperature]);
    let mut row = 0;
    for sequence in &sequences {
        for t in 0..sequence.seq_len() {
            let logits = &teacher[row * vocab..][..vocab];
            row += 1;
            let mut offsets = vec![0, 0];
            let mut capture =
                Capture { temperature, log_probs: vec![], log_tail: vec![0.0], label_log_prob: vec![0.0] };
            let mut ids = vec![];
            if sequence.is_valid(t) {
                let kept = top_k(logits, vocab, &[sequence.tokens[t + 1]], k, &[temperature]).remove(0);
                offsets[1] = k as u64;
                ids = kept.ids;
                let summary = kept.summaries.into_iter().next().unwrap();
                capture.log_probs = summary.log_probs;
                capture.log_tail = vec![summary.log_tail];
                capture.label_log_prob = vec![summary.label_log_prob];
            }
            targets.extend(&SparseTargets {
                offsets,
                ids,
                captures: vec![capture],
                kind: TargetKind::Exact,
                log_normalizer: None,
                router: None,
            });
        }
    }
    DistillBatch { sequences, targets: Some(targets), row_weights: None }
}

fn forward(config: DistillLossConfig, logits: &[f32], vocab: usize, batch: &DistillBatch) -> (LossOutput, Vec<f32>) {
    let rows = logits.len() / vocab;
    let tensor = Tensor::<2>::from_data(TensorData::new(logits.to_vec(), [rows, vocab]), &Device::flex());
    let tensor = tensor.autodiff().require_grad();
    let output = config.init().unwrap().forward_logits(0, tensor.clone(), batch).unwrap();
    let gradients = output.sum.backward();
    let gradient = tensor.grad(&gradients).unwrap().into_data().try_into_vec().unwrap();
    (output, gradient)
}

fn documents(vocab: usize) -> Vec<PackedSequence> {
    let tokens = |from: usize| (0..9).map(|i| ((from + i * 7) % vocab) as u32).collect();
    vec![
        PackedSequence { tokens: tokens(1), segments: vec![0, 0, 0, 1, 1, 1, 1, 2, 2] },
        PackedSequence { tokens: tokens(5), segments: vec![0, 0, 0, 0, 0, u32::MAX, u32::MAX, u32::MAX, u32::MAX] },
    ]
}

#[test]
fn values_and_gradients_equal_the_oracle() {
    for (vocab, k, scale, temperature) in [
        (50, 7, 3.0, 1.0),
        (50, 50, 3.0, 1.0),
        (300, 16, 12.0, 1.0),
        (300, 16, 8.0, 2.5),
        (64, 1, 40.0, 1.0),
        (3000, 64, 0.1, 4.0),
    ] {
        let sequences = documents(vocab);
        let rows = 16;
        let (teacher, student) = (random(rows * vocab, 3, scale), random(rows * vocab, 4, scale));
        let batch = batch_of(sequences, &teacher, vocab, k, temperature);
        let weighting = Weighting::Constant { soft: 0.7 };
        let config = DistillLossConfig::new(Divergence::ForwardKl)
            .with_temperature(temperature, true)
            .with_weighting(weighting, 1);
        let (output, gradient) = forward(config, &student, vocab, &batch);

        let (mut soft, mut hard, mut count) = (0.0, 0.0, 0);
        let mut truth = vec![0.0f64; rows * vocab];
        for (row, truth) in truth.chunks_mut(vocab).enumerate() {
            let sequence = &batch.sequences[row / 8];
            if !sequence.is_valid(row % 8) {
                continue;
            }
            count += 1;
            let label = sequence.tokens[row % 8 + 1];
            let logits: Vec<f64> = student[row * vocab..][..vocab].iter().map(|&v| v as f64).collect();
            let kept: KeptRow = oracle::top_k(&teacher[row * vocab..][..vocab], k, label, temperature as f64);
            let (kl, ce) =
                (oracle::forward_kl(&logits, &kept, temperature as f64), oracle::hard_cross_entropy(&logits, label));
            soft += kl.value;
            hard += ce.value;
            for ((truth, soft), hard) in truth.iter_mut().zip(kl.logits_grad).zip(ce.logits_grad) {
                *truth = 0.7 * (temperature as f64).powi(2) * soft + 0.3 * hard;
            }
        }
        let close = |a: f64, b: f64, what: &str| {
            assert!((a - b).abs() <= 2e-6 * b.abs().max(1.0), "vocab {vocab} k {k}: {what} {a} instead of {b}");
        };
        assert_eq!(output.token_count, count);
        close(output.soft.unwrap().sum, soft, "soft");
        close(output.hard.sum, hard, "hard");
        let largest = truth.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (i, (a, b)) in gradient.iter().zip(&truth).enumerate() {
            assert!((*a as f64 - b).abs() <= 1e-5 * largest, "vocab {vocab} k {k}: gradient[{i}] {a} instead of {b}");
        }
    }
}

#[test]
fn the_goldens_of_the_bucketed_divergence_are_met() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama4/distill.safetensors");
    let file = read_safetensors(&path).unwrap();
    let load = |key: &str| file.load_f32(key, &file.info(key).unwrap().shape.clone()).unwrap();
    let shape = file.info("teacher_logits").unwrap().shape.clone();
    let vocab = shape[shape.len() - 1];
    let (teacher, student) = (load("teacher_logits"), load("student_logits"));
    let rows = teacher.len() / vocab;
    let labels = file.load_i64("labels").unwrap();
    let sequences: Vec<PackedSequence> =
        labels.iter().map(|&label| PackedSequence { tokens: vec![0, label as u32], segments: vec![0, 0] }).collect();
    assert_eq!(sequences.len(), rows);
    for temperature in [1.0f32, 2.0] {
        let batch = batch_of(sequences.clone(), &teacher, vocab, 16, temperature);
        let config = DistillLossConfig::new(Divergence::ForwardKl)
            .with_temperature(temperature, false)
            .with_weighting(Weighting::Constant { soft: 1.0 }, 1);
        let (output, gradient) = forward(config, &student, vocab, &batch);
        let golden = load(&format!("loss.topk16_ghost_T{temperature}"));
        let sum: f64 = golden.iter().map(|&v| v as f64).sum();
        assert!((output.soft.unwrap().sum - sum).abs() < 1e-5 * sum, "{:?} instead of {sum}", output.soft);
        let hard: f64 = load("loss.ce_hard").iter().map(|&v| v as f64).sum();
        assert!((output.hard.sum - hard).abs() < 1e-5 * hard);
        for (i, (a, b)) in gradient.iter().zip(load(&format!("grad.topk16_ghost_T{temperature}"))).enumerate() {
            assert!((a - b).abs() < 1e-5, "gradient[{i}] {a} instead of {b}");
        }
    }
}

#[test]
fn a_tiny_tail_keeps_its_gradient() {
    let vocab = 40;
    let mut teacher = vec![-18.0f32; vocab];
    teacher[0] = 2.0;
    let mut student = vec![-19.0f32; vocab];
    student[0] = 3.0;
    let sequences = vec![PackedSequence { tokens: vec![1, 0], segments: vec![0, 0] }];
    let batch = batch_of(sequences, &teacher, vocab, 1, 1.0);
    let config = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(Weighting::Constant { soft: 1.0 }, 1);
    let (_, gradient) = forward(config, &student, vocab, &batch);
    let logits: Vec<f64> = student.iter().map(|&v| v as f64).collect();
    let truth = oracle::forward_kl(&logits, &oracle::top_k(&teacher, 1, 0, 1.0), 1.0).logits_grad;
    assert!(gradient[7] < 0.0, "the tail is pulled up");
    assert!((gradient[7] as f64 / truth[7] - 1.0).abs() < 1e-4, "{} instead of {}", gradient[7], truth[7]);
}

#[test]
fn missing_soft_targets_are_an_error_not_a_fallback() {
    let vocab = 50;
    let logits = Tensor::<2>::from_data(TensorData::new(random(16 * vocab, 1, 1.0), [16, vocab]), &Device::flex());
    let loss = |temperature: f32| {
        DistillLossConfig::new(Divergence::ForwardKl).with_temperature(temperature, true).init().unwrap()
    };
    let message = |temperature, batch: &DistillBatch| {
        loss(temperature).forward_logits(0, logits.clone(), batch).unwrap_err().to_string()
    };
    let bare = DistillBatch { sequences: documents(vocab), targets: None, row_weights: None };
    assert_eq!(
        message(1.0, &bare),
        "the loss weighs soft targets but the batch has none; precompute them, or set the soft weight to 0"
    );
    let full = batch_of(documents(vocab), &random(16 * vocab, 2, 1.0), vocab, 4, 1.0);
    assert_eq!(
        message(2.0, &full),
        "no soft targets at temperature 2, only at 1; capture them at the loss's temperature: add it to cache.temperatures"
    );
    let mut gap = full;
    let targets = gap.targets.as_mut().unwrap();
    let first = targets.slice(0, 0);
    let mut with_gap = first;
    let empty = SparseTargets {
        offsets: vec![0, 0],
        ids: vec![],
        captures: vec![Capture { temperature: 1.0, log_probs: vec![], log_tail: vec![0.0], label_log_prob: vec![0.0] }],
        kind: TargetKind::Exact,
        log_normalizer: None,
        router: None,
    };
    with_gap.extend(&empty);
    with_gap.extend(&targets.slice(1, 16));
    *targets = with_gap;
    assert!(message(1.0, &gap).starts_with("row 0 counts but has no soft target"));
}

#[test]
fn any_split_into_micro_batches_gives_the_same_gradient() {
    let vocab = 80;
    let sequences = documents(vocab);
    let (teacher, student) = (random(16 * vocab, 5, 4.0), random(16 * vocab, 6, 4.0));
    let config = || DistillLossConfig::new(Divergence::ForwardKl);
    let whole = batch_of(sequences.clone(), &teacher, vocab, 9, 1.0);
    let (output, gradient) = forward(config(), &student, vocab, &whole);
    let half = 8 * vocab;
    let mut parts = vec![];
    let mut count = 0;
    for part in 0..2 {
        let batch = batch_of(vec![sequences[part].clone()], &teacher[part * half..][..half], vocab, 9, 1.0);
        let (output, gradient) = forward(config(), &student[part * half..][..half], vocab, &batch);
        parts.extend(gradient);
        count += output.token_count;
    }
    assert_eq!(count, output.token_count);
    assert_eq!(parts, gradient, "a row's gradient does not know its neighbours");
}

/// One row of drawn ids.
fn drawn(ids: &[u32], weights: &[f32]) -> DistillBatch {
    let log_probs = weights.iter().map(|weight| weight.ln()).collect();
    let capture =
        Capture { temperature: 1.0, log_probs, log_tail: vec![f32::NEG_INFINITY], label_log_prob: vec![-1.0] };
    let targets = SparseTargets {
        offsets: vec![0, ids.len() as u64],
        ids: ids.to_vec(),
        captures: vec![capture],
        kind: TargetKind::Sampled,
        log_normalizer: None,
        router: None,
    };
    let sequences = vec![PackedSequence { tokens: vec![0, 1], segments: vec![0, 0] }];
    DistillBatch { sequences, targets: Some(targets), row_weights: None }
}

#[test]
fn drawn_targets_pull_by_their_weights_and_have_no_tail() {
    let vocab = 30;
    let student = random(vocab, 8, 4.0);
    let config = || {
        DistillLossConfig::new(Divergence::ForwardKl)
            .with_weighting(Weighting::Constant { soft: 1.0 }, 1)
            .with_sampled_targets()
    };
    // Weights need not add up to one.
    let (ids, weights) = ([7u32, 2, 20], [0.5f32, 0.3, 0.3]);
    let (output, gradient) = forward(config(), &student, vocab, &drawn(&ids, &weights));
    let wide: Vec<f64> = student.iter().map(|&v| v as f64).collect();
    let log_q = oracle::log_softmax(&wide, 1.0);
    for (v, gradient) in gradient.iter().enumerate() {
        let weight = ids.iter().position(|&id| id as usize == v).map_or(0.0, |at| weights[at] as f64);
        let truth = 1.1 * log_q[v].exp() - weight;
        assert!((*gradient as f64 - truth).abs() < 1e-6, "gradient[{v}] {gradient} instead of {truth}");
    }
    let value: f64 = ids.iter().zip(weights).map(|(&id, w)| w as f64 * ((w as f64).ln() - log_q[id as usize])).sum();
    assert!((output.value - value).abs() < 1e-6 * value.abs(), "{} instead of {value}", output.value);
    assert_eq!(output.agreed, None);

    // Draws that were not merged are, whatever their order.
    let (merged, same) = forward(config(), &student, vocab, &drawn(&[2, 7, 20, 7, 2], &[0.1, 0.25, 0.3, 0.25, 0.2]));
    assert!((merged.value - output.value).abs() < 1e-6);
    assert!(gradient.iter().zip(same).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn drawn_targets_are_refused_where_they_would_be_biased() {
    let vocab = 30;
    let logits = Tensor::<2>::from_data(TensorData::new(random(vocab, 8, 4.0), [1, vocab]), &Device::flex());
    let batch = drawn(&[3, 4], &[0.5, 0.5]);
    let loss = DistillLossConfig::new(Divergence::ForwardKl).init().unwrap();
    assert_eq!(
        loss.forward_logits(0, logits.clone(), &batch).unwrap_err().to_string(),
        "the targets were drawn from the teacher, and the loss expects its likeliest ids; make the loss with \
         `with_sampled_targets`"
    );
    let message = |config: DistillLossConfig| config.with_sampled_targets().init().unwrap_err().to_string();
    for divergence in Divergence::EXAMPLES {
        if divergence.is_linear_in_the_teacher() {
            limbeck::loss::divergence(divergence, 1.0, logits.clone(), &batch).unwrap();
            continue;
        }
        let expected = format!(
            "{} of sampled targets is biased; use `forward_kl` or `soft_cross_entropy`, or keep the likeliest ids",
            divergence.name()
        );
        assert_eq!(message(DistillLossConfig::new(divergence)), expected);
        let error = limbeck::loss::divergence(divergence, 1.0, logits.clone(), &batch).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}
