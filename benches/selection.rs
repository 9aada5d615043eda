//! What it costs to say in short what a teacher's row of logits holds, for each selection.
//!
//! ```sh
//! cargo bench --bench selection               # V 49,152
//! cargo bench --bench selection -- V [N]      # another vocabulary, N rounds
//! ```
//! One line per selection: the median over rounds of its time relative to the 64 likeliest ids, all selections once in
//! each round so that a slow minute of the machine is slow for all; then microseconds a row, on one thread.

use std::{hint::black_box, time::Instant};

use limbeck_kernels::selection::{RowPlace, Rule, select};

/// Rows in one measurement, more than the caches hold.
const ROWS: usize = 96;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let (vocab, rounds) = (numbers.first().copied().unwrap_or(49_152), numbers.get(1).copied().unwrap_or(31));
    let logits = rows(vocab);
    let places: Vec<RowPlace> =
        (0..ROWS as u64).map(|row| RowPlace { label: row as u32, sequence: row / 16, row: row % 16 }).collect();
    let rules = [
        Rule::TopK { k: 64 },
        Rule::MinProb { theta: 1e-3, cap: 128 },
        Rule::MinProb { theta: 1e-4, cap: 512 },
        Rule::TopP { p: 0.95, cap: 128 },
        Rule::ThresholdSampled { threshold: 1e-2, seed: 1 },
        Rule::ThresholdSampled { threshold: 3e-3, seed: 1 },
        Rule::Sampled { draws: 64, seed: 1 },
    ];
    let run = |rule: Rule, temperatures: &[f32]| -> f64 {
        let began = Instant::now();
        // Row by row, so that no second thread takes part.
        for (row, place) in logits.chunks(vocab).zip(&places) {
            black_box(select(row, vocab, std::slice::from_ref(place), rule, temperatures));
        }
        began.elapsed().as_secs_f64() / ROWS as f64
    };
    let kept = |rule: Rule| {
        let kept = select(&logits, vocab, &places, rule, &[1.0]);
        kept.iter().map(|row| row.ids.len()).sum::<usize>() as f64 / ROWS as f64
    };
    let mut seconds = vec![vec![]; rules.len()];
    for _ in 0..rounds + 1 {
        for (seconds, &rule) in seconds.iter_mut().zip(&rules) {
            seconds.push(run(rule, &[1.0]));
        }
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    println!("V {vocab}, {rounds} rounds of {ROWS} rows");
    for (number, &rule) in rules.iter().enumerate() {
        let ratios = seconds[number].iter().zip(&seconds[0]).skip(1).map(|(own, first)| own / first).collect();
        let micro = median(seconds[number][1..].to_vec()) * 1e6;
        let name = format!("{rule:?}");
        println!("{name:<55}{:>7.3}{micro:>9.1} us{:>8.1} ids", median(ratios), kept(rule));
    }
}

/// Logits whose probabilities fall with the rank by a power, the ranks strewn over the vocabulary, no two rows alike.
fn rows(vocab: usize) -> Vec<f32> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 33
    };
    (0..ROWS)
        .flat_map(|row| {
            let mut ids: Vec<usize> = (0..vocab).collect();
            for place in (1..vocab).rev() {
                ids.swap(place, next() as usize % (place + 1));
            }
            let slope = 1.1 + row as f32 / ROWS as f32;
            ids.into_iter().map(move |rank| 8.0 - slope * (1.0 + rank as f32).ln())
        })
        .collect()
}
