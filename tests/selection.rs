//! What is kept of a teacher's row, against plain loops in f64 written from docs/cache-format.md; and what the fused loss
//! makes of drawn ids, against the gradient of the whole distribution.

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
use limbeck::targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind};
use limbeck_kernels::oracle;
use limbeck_kernels::selection::{RowPlace, Rule, SelectedRow, select};
use proptest::prelude::*;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Relative distance of a probability from a bound below which rounding may decide.
const NEAR: f64 = 1e-5;

/// The row's own randomness, by the page.
fn uniforms(seed: u64, place: &RowPlace) -> impl FnMut() -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&place.sequence.to_le_bytes());
    key[16..24].copy_from_slice(&place.row.to_le_bytes());
    let mut generator = ChaCha8Rng::from_seed(key);
    move || (generator.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

struct Reference {
    ids: Vec<u32>,
    /// Per temperature: log-probabilities or weights, tail, label.
    captures: Vec<(Vec<f64>, f64, f64)>,
    log_normalizer: f64,
}

/// By the page; `None` where a bound is met so nearly that f32 may see it otherwise.
fn reference(row: &[f32], place: &RowPlace, rule: Rule, temperatures: &[f32]) -> Option<Reference> {
    let wide: Vec<f64> = row.iter().map(|&z| z as f64).collect();
    let log_ps: Vec<Vec<f64>> = temperatures.iter().map(|&t| oracle::log_softmax(&wide, t as f64)).collect();
    let p: Vec<f64> = log_ps[0].iter().map(|log| log.exp()).collect();
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    order.sort_by(|&a, &b| row[b as usize].total_cmp(&row[a as usize]).then(a.cmp(&b)));
    let at_least = |bound: f64| -> Option<Vec<u32>> {
        let clear = p.iter().all(|p| (p / bound - 1.0).abs() > NEAR);
        clear.then(|| order.iter().copied().filter(|&id| p[id as usize] >= bound).collect())
    };
    // Ids, and the log of the chance each was kept with where it was drawn.
    let mut chances: Option<Vec<f64>> = None;
    let ids: Vec<u32> = match rule {
        Rule::TopK { k } => order[..k].to_vec(),
        Rule::MinProb { theta, cap } => {
            let mut ids = at_least(theta)?;
            ids.truncate(cap);
            if ids.is_empty() { order[..1].to_vec() } else { ids }
        }
        Rule::TopP { p: mass, cap } => {
            let (mut sum, mut ids) = (0.0, vec![]);
            for &id in order.iter().take(cap) {
                sum += p[id as usize];
                ids.push(id);
                if (sum - mass).abs() < NEAR {
                    return None;
                }
                if sum >= mass {
                    break;
                }
            }
            ids
        }
        Rule::ThresholdSampled { threshold, seed } => {
            let mut ids = at_least(threshold)?;
            let certain = ids.len();
            let (mut tooth, mut sum) = (uniforms(seed, place)() * threshold, 0.0);
            for id in (0..row.len() as u32).filter(|&id| p[id as usize] < threshold) {
                sum += p[id as usize];
                if (sum - tooth).abs() < NEAR * threshold {
                    return None;
                }
                if sum > tooth {
                    ids.push(id);
                    tooth += threshold;
                }
            }
            chances = Some(
                ids.iter()
                    .enumerate()
                    .map(|(at, &id)| if at < certain { 0.0 } else { log_ps[0][id as usize] - threshold.ln() })
                    .collect(),
            );
            ids
        }
        Rule::Sampled { draws, seed } => {
            let mut next = uniforms(seed, place);
            let mut counts = vec![0usize; row.len()];
            for _ in 0..draws {
                let (mut left, mut found) = (next(), row.len() - 1);
                for (id, p) in p.iter().enumerate() {
                    if left.abs() < 1e-6 {
                        return None;
                    }
                    left -= p;
                    if left < 0.0 {
                        found = id;
                        break;
                    }
                }
                if left.abs() < 1e-6 {
                    return None;
                }
                counts[found] += 1;
            }
            let mut ids: Vec<u32> = (0..row.len() as u32).filter(|&id| counts[id as usize] > 0).collect();
            ids.sort_by_key(|&id| (std::cmp::Reverse(counts[id as usize]), id));
            chances = Some(
                ids.iter()
                    .map(|&id| log_ps[0][id as usize] - (counts[id as usize] as f64 / draws as f64).ln())
                    .collect(),
            );
            ids
        }
    };
    let captures = log_ps.iter().map(|log_p| {
        let label = log_p[place.label as usize];
        let kept = ids.iter().map(|&id| log_p[id as usize]);
        match &chances {
            None => {
                let rest: Vec<f64> = (0..row.len()).filter(|v| !ids.contains(&(*v as u32))).map(|v| log_p[v]).collect();
                (kept.collect(), oracle::log_sum_exp(&rest), label)
            }
            Some(chances) => {
                (kept.zip(chances).map(|(log_p, chance)| log_p - chance).collect(), f64::NEG_INFINITY, label)
            }
        }
    });
    Some(Reference { captures: captures.collect(), ids, log_normalizer: oracle::log_sum_exp(&wide) })
}

fn close(found: f32, truth: f64) -> bool {
    found as f64 == truth || (found as f64 - truth).abs() <= 3e-6 * truth.abs().max(1.0)
}

fn compare(found: &SelectedRow, truth: &Reference) -> Result<(), TestCaseError> {
    prop_assert_eq!(&found.ids, &truth.ids);
    prop_assert!(close(found.log_normalizer, truth.log_normalizer));
    for (found, (log_probs, log_tail, label)) in found.summaries.iter().zip(&truth.captures) {
        for (found, truth) in found.log_probs.iter().zip(log_probs) {
            prop_assert!(close(*found, *truth), "{} instead of {}", found, truth);
        }
        prop_assert!(close(found.log_tail, *log_tail), "tail {} instead of {}", found.log_tail, log_tail);
        prop_assert!(close(found.label_log_prob, *label), "label {} instead of {}", found.label_log_prob, label);
    }
    Ok(())
}

fn rules(vocab: usize) -> impl Strategy<Value = Rule> {
    let share = || (1e-4f64.ln()..0.0).prop_map(f64::exp);
    prop_oneof![
        (1..=vocab).prop_map(|k| Rule::TopK { k }),
        (share(), 1..vocab + 20).prop_map(|(theta, cap)| Rule::MinProb { theta, cap }),
        (0.01..1.0, 1..vocab + 20).prop_map(|(p, cap)| Rule::TopP { p, cap }),
        (share(), any::<u64>()).prop_map(|(threshold, seed)| Rule::ThresholdSampled { threshold, seed }),
        (1usize..80, any::<u64>()).prop_map(|(draws, seed)| Rule::Sampled { draws, seed }),
    ]
}

/// Rows of any length: flat, peaked, with ties (steps above 0), and with ids that cannot be.
fn rows() -> impl Strategy<Value = Vec<f32>> {
    let scales = prop_oneof![Just(0.0f32), Just(1.0), Just(6.0), Just(30.0), Just(120.0)];
    let steps = prop_oneof![Just(0.0f32), Just(0.5), Just(4.0)];
    (1usize..400, scales, steps, any::<u64>(), any::<bool>()).prop_map(|(vocab, scale, step, seed, holes)| {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut next = || (generator.next_u64() >> 40) as f32 / (1u64 << 24) as f32;
        let mut row: Vec<f32> = (0..vocab)
            .map(|_| {
                let value = (next() + next() + next() - 1.5) * scale;
                if step > 0.0 { (value / step).round() * step } else { value }
            })
            .collect();
        if holes {
            row.iter_mut().skip(1).step_by(3).for_each(|value| *value = f32::NEG_INFINITY);
        }
        row
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_selection_keeps_what_plain_loops_keep(
        (row, rule) in rows().prop_flat_map(|row| { let rules = rules(row.len()); (Just(row), rules) }),
        temperatures in prop_oneof![Just(vec![1.0f32]), Just(vec![2.0, 1.0, 0.5]), Just(vec![0.7]), Just(vec![1.0, 3.0])],
        (label, sequence, number) in (any::<u32>(), any::<u64>(), 0u64..5000),
    ) {
        let place = RowPlace { label: label % row.len() as u32, sequence, row: number };
        // Where ids that cannot be are asked for by their number, their log-probabilities are -inf.
        let found = select(&row, row.len(), &[place], rule, &temperatures).remove(0);
        if let Some(truth) = reference(&row, &place, rule, &temperatures) {
            compare(&found, &truth)?;
        }
        let first = &found.summaries[0];
        prop_assert!(first.log_probs.is_sorted_by(|a, b| a >= b), "{:?} do not descend", first.log_probs);
        let mass: f64 = first.log_probs.iter().chain([&first.log_tail]).map(|&log| (log as f64).exp()).sum();
        let most = match rule {
            // A comb of this spacing has one tooth more or less than the mass is wide.
            Rule::ThresholdSampled { threshold, .. } => threshold,
            _ => 0.0,
        };
        prop_assert!((mass - 1.0).abs() <= most + 1e-5, "weights add up to {}", mass);
    }

    #[test]
    fn not_a_number_anywhere_is_never_a_number_after(
        mut row in rows(), at in any::<usize>(), bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY)],
    ) {
        let at = at % row.len();
        row[at] = bad;
        let place = RowPlace { label: 0, sequence: 0, row: 0 };
        for rule in every_rule() {
            let found = select(&row, row.len(), &[place], rule, &[1.0, 2.0]).remove(0);
            prop_assert!(found.summaries.iter().all(|summary| summary.log_probs[0].is_nan() && summary.log_tail.is_nan()));
            prop_assert!(found.log_normalizer.is_nan());
        }
    }
}

fn every_rule() -> [Rule; 5] {
    [
        Rule::TopK { k: 1 },
        Rule::MinProb { theta: 0.01, cap: 16 },
        Rule::TopP { p: 0.9, cap: 16 },
        Rule::ThresholdSampled { threshold: 0.05, seed: 3 },
        Rule::Sampled { draws: 20, seed: 3 },
    ]
}

#[test]
fn rows_of_one_id_and_rows_without_a_favourite() {
    let place = RowPlace { label: 7, sequence: 1, row: 2 };
    let mut certain = vec![-200.0f32; 1001];
    certain[500] = 50.0;
    let level = vec![3.0f32; 1001];
    for rule in every_rule() {
        let kept = select(&certain, 1001, &[place], rule, &[1.0]).remove(0);
        assert_eq!(kept.ids, [500], "{rule:?}");
        assert_eq!(kept.summaries[0].log_probs, [0.0]);
        assert!((kept.summaries[0].label_log_prob + 250.0).abs() < 1e-4);
        let kept = select(&level, 1001, &[place], rule, &[1.0]).remove(0);
        assert!((kept.log_normalizer as f64 - (3.0 + 1001f64.ln())).abs() < 1e-6);
        let count = kept.ids.len();
        match rule {
            Rule::TopK { .. } | Rule::MinProb { .. } => assert_eq!(kept.ids, [0], "always the likeliest"),
            Rule::TopP { cap, .. } => assert_eq!(kept.ids, (0..cap as u32).collect::<Vec<_>>()),
            Rule::ThresholdSampled { .. } => assert!(count == 20 || count == 21, "{count} teeth of 0.05"),
            Rule::Sampled { draws, .. } => assert!(count > 15 && count <= draws, "{count} of {draws} draws"),
        }
    }
    // A tail below what f32 exponentials reach is still there.
    let tail = select(&certain, 1001, &[place], Rule::TopK { k: 1 }, &[1.0])[0].summaries[0].log_tail;
    assert!((tail as f64 - (-250.0 + 1000f64.ln())).abs() < 1e-4, "{tail}");
}

#[test]
fn the_same_is_drawn_in_any_batch_and_order() {
    let (vocab, count) = (777, 24);
    let mut generator = ChaCha8Rng::seed_from_u64(5);
    let logits: Vec<f32> =
        (0..vocab * count).map(|_| (generator.next_u64() >> 40) as f32 / (1u64 << 22) as f32).collect();
    let places: Vec<RowPlace> = (0..count as u64).map(|n| RowPlace { label: 3, sequence: n / 5, row: n % 5 }).collect();
    for rule in every_rule() {
        let whole = select(&logits, vocab, &places, rule, &[1.0, 2.0]);
        for (number, place) in places.iter().enumerate().rev() {
            let alone = select(&logits[number * vocab..][..vocab], vocab, &[*place], rule, &[1.0, 2.0]);
            assert_eq!(alone[0], whole[number], "{rule:?}");
        }
        let parts: Vec<SelectedRow> = (0..count)
            .step_by(7)
            .flat_map(|from| {
                let to = (from + 7).min(count);
                select(&logits[from * vocab..to * vocab], vocab, &places[from..to], rule, &[1.0, 2.0])
            })
            .collect();
        assert_eq!(parts, whole, "{rule:?}");
    }
    // Another seed, sequence or row draws other ids.
    let drawn = |seed, sequence, row| {
        let place = RowPlace { label: 3, sequence, row };
        select(&logits[..vocab], vocab, &[place], Rule::Sampled { draws: 40, seed }, &[1.0]).remove(0).ids
    };
    let others = [drawn(1, 0, 0), drawn(0, 1, 0), drawn(0, 0, 1)];
    assert!(others.iter().all(|other| *other != drawn(0, 0, 0)) && others[0] != others[1] && others[1] != others[2]);
}

const VOCAB: usize = 40;
const WIDTH: usize = 12;
const DRAWS: usize = 100_000;

/// Numbers from a bell curve, near enough.
fn random(count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let mut next = || (generator.next_u64() >> 40) as f32 / (1u64 << 24) as f32;
    (0..count).map(|_| (next() + next() + next() - 1.5) * scale).collect()
}

/// `DRAWS` rows with one teacher and one student, each with its own draws.
fn drawn_batch(teacher: &[f32], rule: Rule, temperatures: &[f32]) -> DistillBatch {
    let length = 1000;
    let sequences = vec![PackedSequence { tokens: vec![0; length + 1], segments: vec![0; length + 1] }; DRAWS / length];
    let mut targets = SparseTargets::empty(temperatures);
    let places: Vec<RowPlace> = (0..DRAWS)
        .map(|row| RowPlace { label: 0, sequence: (row / length) as u64, row: (row % length) as u64 })
        .collect();
    for kept in select(&teacher.repeat(DRAWS), VOCAB, &places, rule, temperatures) {
        let captures = kept.summaries.into_iter().zip(temperatures).map(|(summary, &temperature)| Capture {
            temperature,
            log_probs: summary.log_probs,
            log_tail: vec![summary.log_tail],
            label_log_prob: vec![summary.label_log_prob],
        });
        targets.extend(&SparseTargets {
            offsets: vec![0, kept.ids.len() as u64],
            ids: kept.ids,
            captures: captures.collect(),
            kind: TargetKind::Sampled,
            log_normalizer: None,
            router: None,
        });
    }
    DistillBatch { sequences, targets: Some(targets), row_weights: None }
}

/// How far the mean over the draws of the fused loss's gradient in the hidden states is from the gradient of the whole
/// distribution: the sum over the coordinates of squared distances in standard errors, its expectation when there is no
/// bias (the number of coordinates) and three standard deviations of it. Coordinates are correlated with matrix R, so
/// that sum has the variance `2 |R|^2`.
fn distance_from_the_whole(
    rule: Rule,
    divergence: Divergence,
    temperature: f32,
    spoil: impl Fn(&mut SparseTargets),
) -> (f64, f64, f64) {
    let teacher = random(VOCAB, 71, 3.0);
    let (hidden, lm_head) = (random(WIDTH, 72, 1.5), random(VOCAB * WIDTH, 73, 1.5));
    let mut batch = drawn_batch(&teacher, rule, &[1.0, 2.0]);
    spoil(batch.targets.as_mut().unwrap());
    let device = Device::flex().autodiff();
    let tensor = |values: Vec<f32>| {
        let shape = [values.len() / WIDTH, WIDTH];
        Tensor::<2>::from_data(TensorData::new(values, shape), &device).require_grad()
    };
    let (rows, head) = (tensor(hidden.repeat(DRAWS)), tensor(lm_head.clone()));
    let loss = DistillLossConfig::new(divergence)
        .with_temperature(temperature, false)
        .with_weighting(Weighting::Constant { soft: 1.0 }, 1)
        .with_sampled_targets()
        .init()
        .unwrap();
    let output = loss.forward(0, rows.clone(), head, &batch).unwrap();
    assert_eq!((output.token_count, output.agreed), (DRAWS as u64, None));
    let gradients = rows.grad(&output.sum.backward()).unwrap().into_data().try_into_vec::<f32>().unwrap();

    let dot = |w: &[f32]| w.iter().zip(&hidden).map(|(&w, &h)| w as f64 * h as f64).sum::<f64>();
    let z: Vec<f64> = lm_head.chunks(WIDTH).map(dot).collect();
    let everything = oracle::top_k(&teacher, VOCAB, 0, temperature as f64);
    let slope = oracle::forward_kl(&z, &everything, temperature as f64).logits_grad;
    let truth = |d: usize| slope.iter().zip(lm_head.chunks(WIDTH)).map(|(slope, w)| slope * w[d] as f64).sum::<f64>();

    let count = DRAWS as f64;
    let column = |d: usize| gradients[d..].iter().step_by(WIDTH).map(|&value| value as f64);
    let means: Vec<f64> = (0..WIDTH).map(|d| column(d).sum::<f64>() / count).collect();
    let covariance = |a: usize, b: usize| {
        column(a).zip(column(b)).map(|(x, y)| (x - means[a]) * (y - means[b])).sum::<f64>() / (count - 1.0)
    };
    let deviations: Vec<f64> = (0..WIDTH).map(|d| covariance(d, d).sqrt()).collect();
    let sum = (0..WIDTH).map(|d| count * ((means[d] - truth(d)) / deviations[d]).powi(2)).sum();
    let mut correlations = 0.0;
    for a in 0..WIDTH {
        for b in 0..WIDTH {
            correlations += (covariance(a, b) / (deviations[a] * deviations[b])).powi(2);
        }
    }
    (sum, WIDTH as f64, 3.0 * (2.0 * correlations).sqrt())
}

#[test]
fn the_mean_gradient_of_drawn_targets_is_that_of_the_whole_distribution() {
    for rule in [
        Rule::ThresholdSampled { threshold: 0.05, seed: 11 },
        Rule::ThresholdSampled { threshold: 0.3, seed: 11 },
        Rule::Sampled { draws: 8, seed: 11 },
    ] {
        for (divergence, temperature) in
            [(Divergence::ForwardKl, 1.0), (Divergence::SoftCrossEntropy, 1.0), (Divergence::ForwardKl, 2.0)]
        {
            let (sum, expected, three_sigma) = distance_from_the_whole(rule, divergence, temperature, |_| {});
            let what = format!("{rule:?}, {} at {temperature}", divergence.name());
            assert!(sum <= expected + three_sigma, "{what}: {sum} is above {expected} + {three_sigma}");
            assert!(sum > 0.0, "{what}: nothing was drawn");
        }
    }
}

#[test]
fn weights_a_tenth_too_small_are_found_out() {
    let rule = Rule::ThresholdSampled { threshold: 0.05, seed: 11 };
    let spoil = |targets: &mut SparseTargets| {
        let log_weights = targets.captures[0].log_probs.iter_mut();
        log_weights.filter(|log| **log == 0.05f64.ln() as f32).for_each(|log| *log += 0.9f32.ln());
    };
    let (sum, expected, three_sigma) = distance_from_the_whole(rule, Divergence::ForwardKl, 1.0, spoil);
    assert!(sum > expected + 10.0 * three_sigma, "{sum} is within reach of {expected} + {three_sigma}");
}
