//! Attention alone, forward and backward, and the memory it takes beside its operands and their gradients.

use std::{hint::black_box, sync::Arc};

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::Result;
use limbeck_kernels::attention::{Heads, KeyRanges, attention as attend};

use super::{median, take_turns, timed};

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub tokens: usize,
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    /// Tokens of a chunk that sees nothing before it; 0 for one sequence that sees all of itself.
    pub chunk: usize,
}

/// Numbers from -1 to 1 that are the same in every run.
pub fn numbers(count: usize, seed: u32) -> Vec<f32> {
    (0..count as u32)
        .map(|n| (n.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
        .collect()
}

pub fn attention(shape: Shape, turns: bool) -> Result<()> {
    let Shape { tokens, query_heads, key_heads, head_dim, chunk } = shape;
    let span = if chunk == 0 { tokens } else { chunk };
    let heads = Heads { query_heads, key_heads, head_dim };
    let first_key = (0..tokens).map(|token| (token / span * span) as u32);
    let ranges = KeyRanges { first_key: Arc::new(first_key.collect()), sequence_len: tokens };
    let device = Device::flex().autodiff();
    let operand = |heads: usize, seed: u32| {
        let width = heads * head_dim;
        Tensor::<2>::from_data(TensorData::new(numbers(tokens * width, seed), [tokens, width]), &device)
    };
    let [query, key, value] = [operand(query_heads, 1), operand(key_heads, 2), operand(key_heads, 3)];
    let slope = operand(query_heads, 4).inner();
    let forward = || {
        let [query, key, value] = [&query, &key, &value].map(|x| x.clone().inner());
        black_box(attend(query, key, value, heads, &ranges));
    };
    let both = || {
        let [query, key, value] = [&query, &key, &value].map(|x| x.clone().require_grad());
        let output = attend(query.clone(), key.clone(), value.clone(), heads, &ranges);
        let gradients = (output * Tensor::from_inner(slope.clone())).sum().backward();
        let _ = [query, key, value].map(|x| black_box(x.grad(&gradients).expect("tracked")));
    };
    if turns {
        forward();
        return take_turns(|what| {
            // A turn is as many passes as are asked for: one of a short sequence is too little to time.
            let (what, passes) = what.rsplit_once(' ').expect("a pass and how many of it");
            for _ in 0..passes.parse().expect("a whole number") {
                if what == "forward" { forward() } else { both() }
            }
            Ok(())
        });
    }
    let before = memory("VmRSS:");
    let cleared = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    both();
    let peak = (cleared && before > 0).then(|| memory("VmHWM:").saturating_sub(before));
    let operands = tokens * (query_heads + 2 * key_heads) * head_dim * 4;
    let seconds = [median((0..3).map(|_| timed(forward)).collect()), median((0..3).map(|_| timed(both)).collect())];
    let json = serde_json::json!({
        "bench": "attention", "tokens": tokens, "query_heads": query_heads, "key_heads": key_heads, "head_dim": head_dim,
        "chunk": chunk, "forward_seconds": seconds[0], "forward_and_backward_seconds": seconds[1],
        "bytes_of_operands": operands, "peak_bytes_beyond_operands": peak,
    });
    println!("{json}");
    Ok(())
}

/// A line of this process's memory in bytes; 0 where the system does not tell.
fn memory(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)).and_then(|text| text.parse().ok()).unwrap_or(0usize) * 1024
}
