//! The fused loss against f64 loops: every divergence, in value and gradient, however the work is cut.

mod linear_case;

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{
        LossSettings, NO_LABEL, RowMeasures, RowTargets, RowWeights, distill_logits,
        graph::SharedWeigh,
        host::{self, HostMatrix, Wanted},
        linear_distill, linear_distill_reference,
        logits::finish_logits,
    },
    oracle,
};
use linear_case::{Linear, assert_close, linear, linear_of, random, targets, truth, weigh};

#[test]
fn every_divergence_has_the_value_and_the_gradient_of_the_oracle() {
    let cases = [
        // vocabulary, kept, scale of the teacher's logits, scale of the student's, temperature
        (50, 7, 3.0, 3.0, 1.0),
        (50, 50, 3.0, 3.0, 1.0),
        (50, 1, 2.0, 2.0, 1.0),
        (300, 16, 12.0, 8.0, 1.0),
        (300, 16, 8.0, 8.0, 2.5),
        (64, 4, 53.0, 53.0, 1.0),  // logits up to 80, tails down to e^-60
        (64, 4, 0.0, 1.0, 1.0),    // a uniform teacher
        (97, 12, 200.0, 4.0, 1.0), // all but one-hot
        (300, 299, 1.0, 1.0, 0.5),
    ];
    for divergence in Divergence::EXAMPLES {
        for (number, &(vocab, k, teacher_scale, student_scale, temperature)) in cases.iter().enumerate() {
            for t_scale in [true, false] {
                let rows = 6;
                let labels = vec![0, 3, NO_LABEL, 7, (vocab - 1) as u32, 5];
                let teacher = random(rows * vocab, 3, teacher_scale);
                let mut logits = random(rows * vocab, 4, student_scale);
                let (targets, kept) = targets(&teacher, vocab, k, labels, temperature);
                targets.check(vocab).unwrap();
                let settings = LossSettings { divergence, temperature, t_scale };
                let exact: Vec<f64> = logits.iter().map(|&z| z as f64).collect();
                let truth = truth(&exact, vocab, &targets, &kept, &settings);
                let (loss, measures) = finish_logits(&mut logits, vocab, &targets, &settings, &weigh);
                let what = format!("{} case {number}", divergence.name());
                assert!((loss - truth.loss).abs() <= 1e-6 * truth.loss.abs(), "{what}: {loss} not {}", truth.loss);
                assert_close(&logits, &truth.logits_grad, 1e-5, &what);
                for (row, measured) in measures.iter().enumerate() {
                    let (measured, _) = measured.unwrap();
                    let near = |found: f64, truth: f64, name: &str| {
                        let bound = 2e-6 * truth.abs().max(1e-2);
                        assert!((found - truth).abs() <= bound, "{what} row {row}: {name} {found} instead of {truth}");
                    };
                    near(measured.soft, truth.soft[row], "soft");
                    near(measured.hard, truth.hard[row], "hard");
                    near(measured.soft_gradient_square, truth.soft_gradient_square[row], "soft gradient");
                    near(measured.hard_gradient_square, truth.hard_gradient_square[row], "hard gradient");
                    let row_logits = &exact[row * vocab..][..vocab];
                    near(measured.log_sum_exp, oracle::log_sum_exp(row_logits), "log-sum-exp");
                    assert_eq!(
                        row_logits[measured.argmax as usize],
                        row_logits.iter().copied().fold(f64::MIN, f64::max)
                    );
                }
            }
        }
    }
}

#[test]
fn tails_from_a_billionth_to_nearly_everything_keep_their_digits() {
    let vocab = 500;
    for tail in [1e-9f64, 1e-7, 1e-4, 0.02, 0.5, 0.9] {
        // One kept id against many equal ones that make up the tail, in teacher and student.
        let level = (tail / (1.0 - tail) / (vocab - 1) as f64).ln() as f32;
        let mut teacher = vec![level; vocab];
        teacher[3] = 0.0;
        let mut student = random(vocab, 8, 1.0);
        student.iter_mut().for_each(|z| *z += level + 0.5);
        student[3] = 0.3;
        let (targets, kept) = targets(&teacher, vocab, 1, vec![3], 1.0);
        for divergence in Divergence::EXAMPLES {
            let settings = LossSettings::new(divergence);
            let exact: Vec<f64> = student.iter().map(|&z| z as f64).collect();
            let truth = oracle::divergence(divergence, &exact, &kept[0], 1.0);
            let mut gradient = student.clone();
            let soft_alone = |_: usize, _: &RowMeasures| RowWeights { soft: 1.0, hard: 0.0 };
            let (_, rows) = finish_logits(&mut gradient, vocab, &targets, &settings, &soft_alone);
            let soft = rows[0].unwrap().0.soft;
            let what = format!("{} at a tail of {tail}", divergence.name());
            assert!(
                (soft - truth.value).abs() <= 1e-6 * truth.value.abs() + 1e-15,
                "{what}: {soft} not {}",
                truth.value
            );
            assert_close(&gradient, &truth.logits_grad, 1e-5, &what);
        }
    }
}

#[test]
fn pieces_of_any_size_give_the_oracles_gradients() {
    for divergence in Divergence::EXAMPLES {
        // Where the gradient of the head is wanted it has the logits of none, of 16 or of all 22 rows.
        for (width, vocab) in [(8, 301), (16, 301), (40, 5000)] {
            let case = linear(23, width, vocab, 9, LossSettings::new(divergence));
            for (piece_rows, (hidden, lm_head)) in
                [(1, (true, true)), (4, (true, true)), (7, (true, false)), (23, (false, true)), (5, (false, false))]
            {
                let output = in_pieces(&case, piece_rows, Wanted { hidden, lm_head });
                let what = format!("{} {vocab} wide in pieces of {piece_rows}", divergence.name());
                let ratio = output.loss / case.loss;
                assert!((ratio - 1.0).abs() < 1e-6, "{what}: {} instead of {}", output.loss, case.loss);
                assert_eq!((output.hidden_grad.is_some(), output.lm_head_grad.is_some()), (hidden, lm_head), "{what}");
                for (found, truth) in
                    [(output.hidden_grad, &case.hidden_grad), (output.lm_head_grad, &case.lm_head_grad)]
                {
                    if let Some(found) = found {
                        assert_eq!(found.len(), truth.len(), "{what}");
                        assert_close(&found, truth, 1e-5, &what);
                    }
                }
                assert!(output.rows[1].is_none() && output.rows.iter().flatten().count() == 22);
            }
        }
    }
}

#[test]
fn no_sum_depends_on_the_number_of_threads() {
    let case = linear(40, 24, 9000, 9, LossSettings { temperature: 2.0, ..LossSettings::new(Divergence::ReverseKl) });
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| in_pieces(&case, 16, Wanted::BOTH))
    };
    let (one, three) = (with(1), with(3));
    assert_eq!(one.loss.to_bits(), three.loss.to_bits());
    assert_eq!((one.rows, one.hidden_grad, one.lm_head_grad), (three.rows, three.hidden_grad, three.lm_head_grad));
}

fn in_pieces(case: &Linear, rows: usize, wanted: Wanted) -> host::Output {
    host::run_in_pieces(
        HostMatrix::F32(&case.hidden),
        HostMatrix::F32(&case.lm_head),
        case.width,
        &case.targets,
        &case.settings,
        &weigh,
        wanted,
        rows * 4 * case.vocab,
    )
}

#[test]
fn half_precision_operands_are_accumulated_in_single() {
    let narrow = |values: Vec<f32>| -> Vec<half::bf16> { values.into_iter().map(half::bf16::from_f32).collect() };
    let wide = |values: &[half::bf16]| -> Vec<f32> { values.iter().map(|value| value.to_f32()).collect() };
    let (rows, width, vocab) = (9, 32, 400);
    let (hidden, lm_head) = (narrow(random(rows * width, 1, 1.5)), narrow(random(vocab * width, 2, 1.0)));
    let case =
        linear_of(wide(&hidden), wide(&lm_head), rows, width, vocab, 6, LossSettings::new(Divergence::ForwardKl));
    let output = host::run(
        HostMatrix::Bf16(&hidden),
        HostMatrix::Bf16(&lm_head),
        width,
        &case.targets,
        &case.settings,
        &weigh,
        Wanted::BOTH,
    );
    assert!((output.loss / case.loss - 1.0).abs() < 1e-6, "{} instead of {}", output.loss, case.loss);
    assert_close(&output.hidden_grad.unwrap(), &case.hidden_grad, 1e-5, "hidden");
    assert_close(&output.lm_head_grad.unwrap(), &case.lm_head_grad, 1e-5, "head");
}

#[test]
fn the_graph_scales_what_was_computed_and_computes_only_what_is_asked_for() {
    let case = linear(11, 8, 120, 5, LossSettings::new(Divergence::ReverseKl));
    let weigh: SharedWeigh = Arc::new(weigh);
    let tensor = |values: &[f32], device: &Device| {
        Tensor::<2>::from_data(TensorData::new(values.to_vec(), [values.len() / case.width, case.width]), device)
    };
    let read = |tensor: Tensor<2>| tensor.into_data().try_into_vec::<f32>().unwrap();
    let plain = Device::flex();
    for device in [plain.clone().autodiff(), plain.clone().autodiff().gradient_checkpointing()] {
        let hidden = tensor(&case.hidden, &device).require_grad();
        let lm_head = tensor(&case.lm_head, &device).require_grad();
        // As in training: the hidden states come out of other operations, and the loss goes into others.
        let operand = hidden.clone() * 1.0;
        let output = linear_distill(operand, lm_head.clone(), case.targets.clone(), case.settings, weigh.clone());
        let reference =
            linear_distill_reference(hidden.clone(), lm_head.clone(), &case.targets, &case.settings, &weigh);
        assert!((output.value / case.loss - 1.0).abs() < 1e-6 && (reference.value / case.loss - 1.0).abs() < 1e-6);
        for found in [output, reference] {
            let gradients = (found.loss * 0.25).backward();
            let scaled = |truth: &[f64]| truth.iter().map(|value| value * 0.25).collect::<Vec<f64>>();
            assert_close(&read(hidden.grad(&gradients).unwrap()), &scaled(&case.hidden_grad), 1e-5, "hidden");
            assert_close(&read(lm_head.grad(&gradients).unwrap()), &scaled(&case.lm_head_grad), 1e-5, "head");
        }
        // A frozen head.
        let lm_head = tensor(&case.lm_head, &device);
        let output =
            linear_distill(hidden.clone(), lm_head.clone(), case.targets.clone(), case.settings, weigh.clone());
        let gradients = output.loss.backward();
        assert_close(&read(hidden.grad(&gradients).unwrap()), &case.hidden_grad, 1e-5, "hidden");
        assert!(lm_head.grad(&gradients).is_none());
    }
    let untracked = linear_distill(
        tensor(&case.hidden, &plain),
        tensor(&case.lm_head, &plain),
        case.targets.clone(),
        case.settings,
        weigh.clone(),
    );
    assert!((untracked.value / case.loss - 1.0).abs() < 1e-6);
    let logits = tensor(&case.hidden, &plain).matmul(tensor(&case.lm_head, &plain).transpose());
    let from_logits = distill_logits(logits, &case.targets, &case.settings, &weigh);
    assert!((from_logits.value / case.loss - 1.0).abs() < 1e-6);
}

#[test]
fn targets_that_do_not_fit_are_named() {
    let good = || RowTargets {
        labels: vec![1, NO_LABEL],
        offsets: vec![0, 2, 3],
        ids: vec![4, 0, 2],
        log_probs: vec![-0.5, -1.5, -0.1],
        log_tail: vec![-1.7, -2.4],
    };
    good().check(5).unwrap();
    assert_eq!(good().check(4).unwrap_err(), "row 0 keeps id 4, beyond the vocabulary of 4");
    let mut twice = good();
    twice.ids[1] = 4;
    assert_eq!(twice.check(5).unwrap_err(), "row 0 keeps id 4 twice");
    let mut label = good();
    label.labels[0] = 9;
    assert_eq!(label.check(5).unwrap_err(), "row 0 has label 9, beyond the vocabulary of 5");
    let mut short = good();
    short.log_probs.pop();
    assert_eq!(short.check(5).unwrap_err(), "3 ids and 2 log-probabilities");
}
