//! Teachers that can be divided by 2, 3 and 4, and comparing their targets. Shared by the tests of teachers on several
//! devices.
//!
//! Sums that are added up in parts differ in their last bits. So log-probabilities are compared to 1e-5 relative
//! (absolute below 1), and kept ids may differ only where their log-probability is within [`TIE`] of the smallest that is
//! kept, and in one row of a hundred at most.
#![allow(dead_code)] // each test uses a part of it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use limbeck::cache::CacheReader;
use limbeck::models::llama4::Llama4Config;
use limbeck::precompute;
use limbeck::targets::{SparseTargets, TargetKind, TargetSource};

use crate::small_run::*;

/// How far below the smallest kept log-probability, or above it, an id may be kept by one and not by the other.
pub const TIE: f32 = 1e-4;
pub const CLOSE: f32 = 1e-5;

/// A Llama 4 whose sizes divide by 2, 3 and 4: twelve heads on six key heads, twelve experts.
pub fn divisible(layers: usize, vocab_size: usize, chosen: usize) -> Llama4Config {
    Llama4Config {
        hidden_size: 48,
        num_attention_heads: 12,
        num_key_value_heads: 6,
        num_local_experts: 12,
        num_experts_per_tok: chosen,
        ..scout(layers, vocab_size)
    }
}

/// Compares targets, by the rules that stand at the head of this file.
pub fn assert_close(what: &str, found: &SparseTargets, expected: &SparseTargets) {
    assert_eq!(found.row_count(), expected.row_count(), "{what}");
    let near = |a: f32, b: f32| a == b || (a - b).abs() <= CLOSE * b.abs().max(1.0);
    let mut others = 0;
    for row in 0..found.row_count() {
        let (found, expected) = (found.slice(row, row + 1), expected.slice(row, row + 1));
        let what = format!("{what}, row {row}");
        for (a, b) in found.captures.iter().zip(&expected.captures) {
            assert!(near(a.label_log_prob[0], b.label_log_prob[0]), "{what}: {a:?} {b:?}");
        }
        let (a, b) = (found.log_normalizer.as_ref().unwrap()[0], expected.log_normalizer.as_ref().unwrap()[0]);
        assert!(near(a, b), "{what}: normaliser {a} {b}");
        let log_probs = |targets: &SparseTargets, capture: usize| -> BTreeMap<u32, f32> {
            targets.ids.iter().copied().zip(targets.captures[capture].log_probs.iter().copied()).collect()
        };
        let (ours, theirs) = (log_probs(&found, 0), log_probs(&expected, 0));
        if ours.keys().eq(theirs.keys()) {
            for (number, (a, b)) in found.captures.iter().zip(&expected.captures).enumerate() {
                let (ours, theirs) = (log_probs(&found, number), log_probs(&expected, number));
                assert!(ours.values().zip(theirs.values()).all(|(a, b)| near(*a, *b)), "{what}: {ours:?} {theirs:?}");
                assert!(near(a.log_tail[0], b.log_tail[0]), "{what}: tails {} {}", a.log_tail[0], b.log_tail[0]);
            }
            continue;
        }
        others += 1;
        let drawn = expected.kind == TargetKind::Sampled;
        let border = theirs.values().copied().fold(f32::INFINITY, f32::min);
        for (id, log_prob) in ours.iter().filter(|(id, _)| !theirs.contains_key(id)) {
            assert!(drawn || (log_prob - border).abs() < TIE, "{what}: id {id} at {log_prob}, border {border}");
        }
    }
    assert!(others * 100 <= found.row_count(), "{what}: {others} of {} rows keep other ids", found.row_count());
}

/// A run whose teacher divides by 2, 3 and 4.
pub fn small_run() -> SmallRun {
    let small = SmallRun::new();
    write_random(divisible(4, small.vocab_size, 1), &small.path("teacher"), 5);
    small
}

/// A cache made by a recipe with these overrides.
pub fn cache(small: &SmallRun, run: &str, overrides: &[&str]) -> PathBuf {
    precompute::run(&small.recipe(overrides), &small.options(run)).unwrap()
}

pub fn all_targets(cache: &Path) -> SparseTargets {
    let cache = CacheReader::open(cache).unwrap();
    let numbers: Vec<u64> = (0..cache.sequence_count()).collect();
    cache.read(&numbers).unwrap().targets.unwrap()
}
