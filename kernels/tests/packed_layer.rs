//! Halves of a block over packed weights: what they compute, in f64; and the same bits however rows are dealt out.

use std::sync::Arc;

use limbeck_kernels::{
    attention::{Heads, KeyRanges},
    packed_layer::{AttentionHalf, FeedForwardHalf, HeadNorm, Result, attend_with, feed_forward_with},
    packed_matmul::{Element, Instructions, Numbers, Order, PackedMatrix},
    rotary::{Pairing, RotaryTable},
};

const HIDDEN: usize = 40;
const INNER: usize = 70;
const EPS: f32 = 1e-5;

/// Numbers between -1 and 1 that follow from the seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A matrix, as it is and packed.
struct Matrix {
    values: Vec<f32>,
    inputs: usize,
    packed: PackedMatrix,
}

impl Matrix {
    fn new(inputs: usize, outputs: usize, seed: u64, numbers: Numbers) -> Self {
        let values = random(inputs * outputs, seed);
        let packed = match numbers {
            Numbers::F32 => PackedMatrix::pack_f32(&values, Order::OutputMajor, inputs, outputs),
            Numbers::Bf16 => {
                let bytes = bytemuck::cast_slice(&values);
                PackedMatrix::rounded(bytes, Element::F32, Order::OutputMajor, inputs, outputs)
            }
        };
        Matrix { values, inputs, packed }
    }

    fn times(&self, arithmetic: Arithmetic, row: &[f64]) -> Vec<f64> {
        let dot = |weights: &[f32]| arithmetic.sum(weights.iter().zip(row).map(|(&w, &x)| (w as f64, x)));
        self.values.chunks(self.inputs).map(dot).collect()
    }
}

/// How exactly the definition is followed: what becomes of a number after each operation, and of one that is multiplied
/// in a product of matrices.
#[derive(Clone, Copy)]
struct Arithmetic {
    result: fn(f64) -> f64,
    factor: fn(f64) -> f64,
}

impl Arithmetic {
    const F64: Arithmetic = Arithmetic { result: |x| x, factor: |x| x };
    /// Plain loops in f32, with fused multiply-adds.
    const F32: Arithmetic = Arithmetic { result: |x| x as f32 as f64, factor: |x| x };
    /// Exact but for factors, which are rounded to bfloat16.
    const ROUNDED: Arithmetic = Arithmetic { result: |x| x, factor: |x| half::bf16::from_f64(x).to_f64() };

    /// The sum of products, in their order.
    fn sum(self, factors: impl Iterator<Item = (f64, f64)>) -> f64 {
        factors.fold(0.0, |sum, (a, b)| (self.result)(sum + (self.factor)(a) * (self.factor)(b)))
    }

    fn norm(self, row: &[f64], weight: Option<&[f32]>) -> Vec<f64> {
        let keep = self.result;
        let squares = row.iter().fold(0.0, |sum, x| keep(sum + x * x));
        let scale = keep(keep(keep(squares / row.len() as f64) + EPS as f64).sqrt().recip());
        let scaled = row.iter().map(|x| keep(x * scale));
        scaled.enumerate().map(|(i, x)| keep(x * weight.map_or(1.0, |weight| weight[i] as f64))).collect()
    }
}

#[derive(Clone, Copy)]
struct Case {
    heads: Heads,
    length: usize,
    sequences: usize,
    /// How far back a token sees.
    window: usize,
    pairing: Pairing,
    /// 0: no norm of heads, 1: before the rotation, 2: after it.
    norm: usize,
    scaled: bool,
    numbers: Numbers,
}

struct Block {
    case: Case,
    matrices: [Matrix; 7],
    norms: [Vec<f32>; 2],
    head_norms: [Vec<f32>; 2],
    biases: [Vec<f32>; 3],
    rotary: RotaryTable,
    scales: Vec<f32>,
    ranges: KeyRanges,
    hidden: Vec<f32>,
}

impl Block {
    fn new(case: Case) -> Self {
        let Heads { query_heads, key_heads, head_dim } = case.heads;
        let (query, key) = (query_heads * head_dim, key_heads * head_dim);
        let tokens = case.length * case.sequences;
        let sizes = [
            (HIDDEN, query),
            (HIDDEN, key),
            (HIDDEN, key),
            (query, HIDDEN),
            (HIDDEN, INNER),
            (HIDDEN, INNER),
            (INNER, HIDDEN),
        ];
        let mut seed = 0;
        let matrices = sizes.map(|(inputs, outputs)| {
            seed += 1;
            Matrix::new(inputs, outputs, seed, case.numbers)
        });
        let positions: Vec<u32> = (0..tokens).map(|n| (n % case.length) as u32).collect();
        let frequencies: Vec<f32> = (0..head_dim / 2).map(|j| 0.3f32.powi(j as i32)).collect();
        let first_key = (0..tokens).map(|n| (n - (n % case.length).min(case.window - 1)) as u32).collect();
        Block {
            case,
            matrices,
            norms: [random(HIDDEN, 20), random(HIDDEN, 21)],
            head_norms: [random(head_dim, 22), random(head_dim, 23)],
            biases: [random(query, 24), random(key, 25), random(key, 26)],
            rotary: RotaryTable::new(&positions, &frequencies, case.pairing),
            scales: positions.iter().map(|&p| 1.0 + 0.001 * p as f32).collect(),
            ranges: KeyRanges { first_key: Arc::new(first_key), sequence_len: case.length },
            hidden: random(tokens * HIDDEN, 30),
        }
    }

    fn attention(&self) -> AttentionHalf<'_> {
        let [query, key, value, output, ..] = self.matrices.each_ref().map(|matrix| &matrix.packed);
        AttentionHalf {
            norm: &self.norms[0],
            eps: EPS,
            query,
            key,
            value,
            output,
            biases: self.case.scaled.then(|| self.biases.each_ref().map(Vec::as_slice)),
            head_norm: match self.case.norm {
                0 => HeadNorm::None,
                1 => HeadNorm::WeightedBeforeRotary(self.head_norms.each_ref().map(Vec::as_slice)),
                _ => HeadNorm::UnitAfterRotary,
            },
            rotary: Some(&self.rotary),
            query_scales: self.case.scaled.then_some(&self.scales),
            heads: self.case.heads,
            ranges: &self.ranges,
        }
    }

    fn feed_forward(&self) -> FeedForwardHalf<'_> {
        let [.., gate, up, down] = self.matrices.each_ref().map(|matrix| &matrix.packed);
        FeedForwardHalf { norm: &self.norms[1], eps: EPS, gate, up, down }
    }

    fn run(&self, instructions: Instructions) -> Vec<f32> {
        let mut hidden = self.hidden.clone();
        attend_with(instructions, &mut hidden, &self.attention(), Some(&self.feed_forward()), Result::Added);
        hidden
    }

    /// The same from the definitions.
    fn defined(&self, arithmetic: Arithmetic) -> Vec<f64> {
        let keep = arithmetic.result;
        let Heads { query_heads, key_heads, head_dim } = self.case.heads;
        let [query, key, value, output, gate, up, down] = &self.matrices;
        let hidden: Vec<Vec<f64>> =
            self.hidden.chunks(HIDDEN).map(|row| row.iter().map(|&x| x as f64).collect()).collect();
        let placed = |matrix: &Matrix, which: usize| -> Vec<Vec<f64>> {
            let rows = hidden.iter().enumerate().map(|(token, row)| {
                let mut row = matrix.times(arithmetic, &arithmetic.norm(row, Some(&self.norms[0])));
                if self.case.scaled {
                    row.iter_mut().zip(&self.biases[which]).for_each(|(x, &b)| *x = keep(*x + b as f64));
                }
                if which == 2 {
                    return row;
                }
                let heads = row.chunks(head_dim).flat_map(|head| {
                    let head = match self.case.norm {
                        1 => arithmetic.norm(head, Some(&self.head_norms[which])),
                        _ => head.to_vec(),
                    };
                    let head = self.turned(arithmetic, token, &head);
                    if self.case.norm == 2 { arithmetic.norm(&head, None) } else { head }
                });
                let scale = if which == 0 && self.case.scaled { self.scales[token] as f64 } else { 1.0 };
                heads.map(|x| keep(x * scale)).collect()
            });
            rows.collect()
        };
        let (queries, keys, values) = (placed(query, 0), placed(key, 1), placed(value, 2));
        let root = keep((head_dim as f64).sqrt().recip());
        let after = hidden.iter().enumerate().flat_map(|(token, row)| {
            let mixed: Vec<f64> = (0..query_heads)
                .flat_map(|head| {
                    let of = |rows: &'_ [Vec<f64>], token: usize, head: usize| {
                        rows[token][head * head_dim..][..head_dim].to_vec()
                    };
                    let key_head = head / (query_heads / key_heads);
                    let seen = self.ranges.first_key[token] as usize..token + 1;
                    let query: Vec<f64> = of(&queries, token, head).into_iter().map(|x| keep(x * root)).collect();
                    let scores: Vec<f64> = seen
                        .clone()
                        .map(|t| arithmetic.sum(of(&keys, t, key_head).into_iter().zip(query.iter().copied())))
                        .collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| keep(keep(s - most).exp())).collect();
                    let total = weights.iter().fold(0.0, |sum, weight| keep(sum + weight));
                    let seen: Vec<Vec<f64>> = seen.map(|t| of(&values, t, key_head)).collect();
                    let mix = |d: usize| arithmetic.sum(weights.iter().copied().zip(seen.iter().map(|v| v[d])));
                    (0..head_dim).map(|d| keep(mix(d) / total)).collect::<Vec<f64>>()
                })
                .collect();
            let update = output.times(arithmetic, &mixed);
            let attended: Vec<f64> = row.iter().zip(update).map(|(a, b)| keep(a + b)).collect();
            let normed = arithmetic.norm(&attended, Some(&self.norms[1]));
            let (gate, up) = (gate.times(arithmetic, &normed), up.times(arithmetic, &normed));
            let gated = |(g, u): (f64, f64)| keep(keep(g / keep(1.0 + keep((-g).exp()))) * u);
            let inner: Vec<f64> = gate.into_iter().zip(up).map(gated).collect();
            let update = down.times(arithmetic, &inner);
            attended.into_iter().zip(update).map(|(a, b)| keep(a + b)).collect::<Vec<f64>>()
        });
        after.collect()
    }

    fn turned(&self, arithmetic: Arithmetic, token: usize, head: &[f64]) -> Vec<f64> {
        let keep = arithmetic.result;
        let half = head.len() / 2;
        let mut turned = head.to_vec();
        for j in 0..half {
            let (a, b) = match self.case.pairing {
                Pairing::Interleaved => (2 * j, 2 * j + 1),
                Pairing::Halves => (j, half + j),
            };
            let (c, s) = (self.rotary.cosines[token * half + j] as f64, self.rotary.sines[token * half + j] as f64);
            turned[a] = keep(keep(head[a] * c) - keep(head[b] * s));
            turned[b] = keep(keep(head[a] * s) + keep(head[b] * c));
        }
        turned
    }
}

const WIDE: Heads = Heads { query_heads: 6, key_heads: 2, head_dim: 12 };
const PLAIN: Case = Case {
    heads: WIDE,
    length: 50,
    sequences: 3,
    window: usize::MAX,
    pairing: Pairing::Halves,
    norm: 0,
    scaled: false,
    numbers: Numbers::F32,
};

fn cases() -> Vec<Case> {
    let odd = Heads { query_heads: 3, key_heads: 3, head_dim: 34 };
    let interleaved = Case { pairing: Pairing::Interleaved, norm: 2, scaled: true, ..PLAIN };
    vec![
        PLAIN,
        interleaved,
        Case { norm: 1, scaled: true, heads: odd, ..PLAIN },
        // Longer than a tile of keys; and such that most rows see none of the first tiles.
        Case { length: 1100, sequences: 1, ..PLAIN },
        Case { length: 1100, sequences: 1, window: 90, ..interleaved },
        Case { length: 1, sequences: 3, ..PLAIN },
    ]
}

/// The largest difference, as a share of the largest number.
fn difference(found: &[f64], truth: &[f64]) -> f64 {
    let largest = truth.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    found.iter().zip(truth).fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / largest
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&value| value as f64).collect()
}

// What the scores come to decides how far off a block is: weights and keys are wide here, some scores are near 40, and
// the exponential makes a relative error of the weights of what is an absolute one of the scores. A thousand keys have
// larger ones than fifty. So no number is the bound, but what the same definition comes to in f32, and with factors in
// eight bits.
#[test]
fn a_block_is_no_further_from_f64_than_plain_loops_in_f32() {
    for (number, case) in cases().into_iter().enumerate() {
        let block = Block::new(case);
        let truth = block.defined(Arithmetic::F64);
        let found = difference(&widened(&block.run(Instructions::best())), &truth);
        let plain = difference(&block.defined(Arithmetic::F32), &truth);
        assert!(found < 1.5 * plain && plain < 2e-6, "case {number}: {found:e}, plain loops {plain:e}");
    }
}

#[test]
fn a_block_in_bfloat16_is_as_far_from_f64_as_rounded_factors_alone_make_it() {
    for (number, case) in cases().into_iter().enumerate() {
        let block = Block::new(Case { numbers: Numbers::Bf16, ..case });
        let (truth, rounded) = (block.defined(Arithmetic::F64), block.defined(Arithmetic::ROUNDED));
        let alone = difference(&rounded, &truth);
        for set in [Instructions::best(), Instructions::emulated_amx()] {
            let apart = difference(&widened(&block.run(set)), &truth);
            assert!(apart < 1.01 * alone && alone < 3e-2, "case {number}, {set}: {apart:e}, rounding alone {alone:e}");
        }
    }
}

#[test]
fn instruction_sets_without_amx_give_equal_bits() {
    for numbers in [Numbers::F32, Numbers::Bf16] {
        for case in cases() {
            let block = Block::new(Case { numbers, ..case });
            let run = |set: Instructions| block.run(set).into_iter().map(f32::to_bits).collect::<Vec<u32>>();
            let (with, without): (Vec<_>, Vec<_>) =
                Instructions::available().iter().copied().partition(|set| set.sums_by_amx());
            let first = run(without[0]);
            without[1..].iter().for_each(|&set| assert!(run(set) == first, "{set}"));
            let emulated = run(Instructions::emulated_amx());
            with.iter().for_each(|&set| assert!(run(set) == emulated, "{set}"));
        }
    }
}

#[test]
fn halves_give_the_same_bits_apart_and_together_on_any_number_of_threads_and_in_any_batch() {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    let (best, amx) = (Instructions::best(), Instructions::emulated_amx());
    for (numbers, set) in [(Numbers::F32, best), (Numbers::Bf16, best), (Numbers::Bf16, amx)] {
        for case in cases() {
            let block = Block::new(Case { numbers, ..case });
            let on = |threads: usize| {
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| block.run(set))
            };
            let whole = bits(&on(1));
            // With many threads each has few rows, and shares columns instead.
            for threads in [2, 3, 40] {
                assert!(bits(&on(threads)) == whole, "{threads} threads");
            }
            let (attention, then) = (block.attention(), block.feed_forward());
            let mut apart = block.hidden.clone();
            for half in 0..2 {
                let mut update = apart.clone();
                match half {
                    0 => attend_with(set, &mut update, &attention, None, Result::Instead),
                    _ => feed_forward_with(set, &mut update, &then, Result::Instead),
                }
                apart.iter_mut().zip(update).for_each(|(place, update)| *place += update);
            }
            assert!(bits(&apart) == whole, "halves apart");
            if case.sequences > 1 {
                // The first sequence alone.
                let mut first = block.hidden[..case.length * HIDDEN].to_vec();
                let ranges = KeyRanges {
                    first_key: Arc::new(block.ranges.first_key[..case.length].to_vec()),
                    sequence_len: case.length,
                };
                attend_with(
                    set,
                    &mut first,
                    &AttentionHalf { ranges: &ranges, ..attention },
                    Some(&then),
                    Result::Added,
                );
                assert!(bits(&first) == whole[..first.len()], "one sequence");
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_seen() {
    for (numbers, set) in [
        (Numbers::F32, Instructions::best()),
        (Numbers::Bf16, Instructions::best()),
        (Numbers::Bf16, Instructions::emulated_amx()),
    ] {
        let mut block = Block::new(Case { numbers, ..PLAIN });
        block.hidden[3 * HIDDEN + 1] = f32::NAN;
        let found = block.run(set);
        for row in found[3 * HIDDEN..PLAIN.length * HIDDEN].chunks(HIDDEN) {
            assert!(row.iter().all(|value| value.is_nan()), "{set}: it and later ones do");
        }
        assert!(found[PLAIN.length * HIDDEN..].iter().all(|value| value.is_finite()), "{set}: other sequences do not");
    }
}
