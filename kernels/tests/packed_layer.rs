//! Halves of a block over packed weights: what they compute, in f64; and the same bits however rows are dealt out.

use std::sync::Arc;

use limbeck_kernels::{
    attention::{Heads, KeyRanges},
    packed_layer::{AttentionHalf, FeedForwardHalf, HeadNorm, Result, attend, feed_forward},
    packed_matmul::{Element, Numbers, Order, PackedMatrix},
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

    fn times(&self, row: &[f64]) -> Vec<f64> {
        let dot = |weights: &[f32]| weights.iter().zip(row).map(|(&w, x)| w as f64 * x).sum();
        self.values.chunks(self.inputs).map(dot).collect()
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

    fn run(&self) -> Vec<f32> {
        let mut hidden = self.hidden.clone();
        attend(&mut hidden, &self.attention(), Some(&self.feed_forward()), Result::Added);
        hidden
    }

    /// The same in f64, from the definitions.
    fn truth(&self) -> Vec<f64> {
        let Heads { query_heads, key_heads, head_dim } = self.case.heads;
        let [query, key, value, output, gate, up, down] = &self.matrices;
        let hidden: Vec<Vec<f64>> =
            self.hidden.chunks(HIDDEN).map(|row| row.iter().map(|&x| x as f64).collect()).collect();
        let placed = |matrix: &Matrix, which: usize| -> Vec<Vec<f64>> {
            let rows = hidden.iter().enumerate().map(|(token, row)| {
                let mut row = matrix.times(&norm(row, Some(&self.norms[0])));
                if self.case.scaled {
                    row.iter_mut().zip(&self.biases[which]).for_each(|(x, &b)| *x += b as f64);
                }
                if which == 2 {
                    return row;
                }
                let heads = row.chunks(head_dim).flat_map(|head| {
                    let head = match self.case.norm {
                        1 => norm(head, Some(&self.head_norms[which])),
                        _ => head.to_vec(),
                    };
                    let head = self.turned(token, &head);
                    if self.case.norm == 2 { norm(&head, None) } else { head }
                });
                let scale = if which == 0 && self.case.scaled { self.scales[token] as f64 } else { 1.0 };
                heads.map(|x| x * scale).collect()
            });
            rows.collect()
        };
        let (queries, keys, values) = (placed(query, 0), placed(key, 1), placed(value, 2));
        let after = hidden.iter().enumerate().flat_map(|(token, row)| {
            let mixed: Vec<f64> = (0..query_heads)
                .flat_map(|head| {
                    let of = |rows: &[Vec<f64>], token: usize, head: usize| {
                        rows[token][head * head_dim..][..head_dim].to_vec()
                    };
                    let key_head = head / (query_heads / key_heads);
                    let seen = self.ranges.first_key[token] as usize..token + 1;
                    let query = of(&queries, token, head);
                    let scores: Vec<f64> = seen
                        .clone()
                        .map(|t| {
                            let key = of(&keys, t, key_head);
                            key.iter().zip(&query).map(|(a, b)| a * b).sum::<f64>() / (head_dim as f64).sqrt()
                        })
                        .collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                    let mut mixed = vec![0.0; head_dim];
                    for (t, score) in seen.zip(scores) {
                        let weight = (score - most).exp() / total;
                        mixed.iter_mut().zip(of(&values, t, key_head)).for_each(|(m, v)| *m += weight * v);
                    }
                    mixed
                })
                .collect();
            let attended: Vec<f64> = row.iter().zip(output.times(&mixed)).map(|(a, b)| a + b).collect();
            let normed = norm(&attended, Some(&self.norms[1]));
            let inner: Vec<f64> =
                gate.times(&normed).iter().zip(up.times(&normed)).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            attended.into_iter().zip(down.times(&inner)).map(|(a, b)| a + b).collect::<Vec<f64>>()
        });
        after.collect()
    }

    fn turned(&self, token: usize, head: &[f64]) -> Vec<f64> {
        let half = head.len() / 2;
        let mut turned = head.to_vec();
        for j in 0..half {
            let (a, b) = match self.case.pairing {
                Pairing::Interleaved => (2 * j, 2 * j + 1),
                Pairing::Halves => (j, half + j),
            };
            let (c, s) = (self.rotary.cosines[token * half + j] as f64, self.rotary.sines[token * half + j] as f64);
            (turned[a], turned[b]) = (head[a] * c - head[b] * s, head[a] * s + head[b] * c);
        }
        turned
    }
}

fn norm(row: &[f64], weight: Option<&[f32]>) -> Vec<f64> {
    let scale = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + EPS as f64).sqrt().recip();
    row.iter().enumerate().map(|(i, x)| x * scale * weight.map_or(1.0, |weight| weight[i] as f64)).collect()
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
fn difference(found: &[f32], truth: &[f64]) -> f64 {
    let largest = truth.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    found.iter().zip(truth).fold(0.0f64, |most, (&a, b)| most.max((a as f64 - b).abs())) / largest
}

#[test]
fn a_block_is_what_f64_makes_of_its_definition() {
    for (number, case) in cases().into_iter().enumerate() {
        let block = Block::new(case);
        let apart = difference(&block.run(), &block.truth());
        assert!(apart < 2e-6, "case {number}: {apart:e}");
    }
}

#[test]
fn a_block_in_bfloat16_is_as_close_as_its_eight_bits() {
    for (number, case) in cases().into_iter().enumerate() {
        let block = Block::new(Case { numbers: Numbers::Bf16, ..case });
        let apart = difference(&block.run(), &block.truth());
        assert!(apart < 2e-2, "case {number}: {apart:e}");
    }
}

#[test]
fn halves_give_the_same_bits_apart_and_together_on_any_number_of_threads_and_in_any_batch() {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<u32>>();
    for numbers in [Numbers::F32, Numbers::Bf16] {
        for case in cases() {
            let block = Block::new(Case { numbers, ..case });
            let on = |threads: usize| {
                rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| block.run())
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
                    0 => attend(&mut update, &attention, None, Result::Instead),
                    _ => feed_forward(&mut update, &then, Result::Instead),
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
                attend(&mut first, &AttentionHalf { ranges: &ranges, ..attention }, Some(&then), Result::Added);
                assert!(bits(&first) == whole[..first.len()], "one sequence");
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_seen() {
    let mut block = Block::new(PLAIN);
    block.hidden[3 * HIDDEN + 1] = f32::NAN;
    let found = block.run();
    for row in found[3 * HIDDEN..PLAIN.length * HIDDEN].chunks(HIDDEN) {
        assert!(row.iter().all(|value| value.is_nan()), "it and later ones do");
    }
    assert!(found[PLAIN.length * HIDDEN..].iter().all(|value| value.is_finite()), "other sequences do not");
}
