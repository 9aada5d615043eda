//! Times device forms on the device that was built for, and prints CSV.
//!
//! `device_timing TOKENS WIDTH VOCABULARY KEPT TYPE REPEATS` times the fused loss, forward and backward;
//! `device_timing operations TYPE REPEATS` the other operations. TYPE is bf16, f16 or f32.

mod operation_timing;
mod tile_timing;

use std::{sync::Arc, time::Instant};

use burn::tensor::{DType, Device, Distribution, Tensor};
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{
        LossSettings, RowMeasures, RowTargets, RowWeights,
        graph::SharedWeigh,
        linear_distill,
        tiles::{BUDGET, Problem, Tiles},
    },
};

fn device() -> Device {
    #[cfg(feature = "cuda")]
    return Device::cuda(0);
    #[cfg(all(feature = "wgpu", not(feature = "cuda")))]
    return Device::wgpu(Default::default());
}

fn element_type(name: &str) -> DType {
    match name {
        "bf16" => DType::BF16,
        "f16" => DType::F16,
        "f32" => DType::F32,
        other => panic!("{other} is none of bf16, f16 and f32"),
    }
}

/// Targets that keep ids spread over the vocabulary, with half of the teacher's mass.
fn targets(tokens: usize, vocab: usize, kept: usize) -> RowTargets {
    let log_prob = (0.5 / kept as f64).ln() as f32;
    RowTargets {
        labels: (0..tokens).map(|row| (row * 7919 % vocab) as u32).collect(),
        offsets: (0..=tokens).map(|row| row * kept).collect(),
        ids: (0..tokens)
            .flat_map(|row| (0..kept).map(move |place| ((row * 31 + place * (vocab / kept)) % vocab) as u32))
            .collect(),
        log_probs: vec![log_prob; tokens * kept],
        log_tail: vec![0.5f32.ln(); tokens],
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "operations") {
        let repeats = arguments.get(2).and_then(|count| count.parse().ok());
        let repeats = repeats.expect("usage: device_timing operations TYPE REPEATS");
        let (device, dtype) = (device(), element_type(&arguments[1]));
        operation_timing::print_all(&device, &arguments[1], dtype, repeats);
        return tile_timing::print_all(&device, &arguments[1], dtype, repeats);
    }
    let [tokens, width, vocab, kept, repeats] = [0, 1, 2, 3, 5].map(|place| {
        let argument = arguments.get(place).map(String::as_str).unwrap_or("");
        argument.parse::<usize>().expect("usage: device_timing TOKENS WIDTH VOCABULARY KEPT TYPE REPEATS")
    });
    let dtype = element_type(&arguments[4]);
    let targets = targets(tokens, vocab, kept);
    targets.check(vocab).expect("targets that fit");
    let targets = Arc::new(targets);
    let device = device().autodiff();
    let random = |rows: usize, scale: f64| {
        Tensor::<2>::random([rows, width], Distribution::Normal(0.0, scale), &device).cast(dtype).detach()
    };
    let hidden = random(tokens, 1.0).require_grad();
    let lm_head = random(vocab, 0.02).require_grad();
    let weigh: SharedWeigh = Arc::new(|_: usize, _: &RowMeasures| RowWeights { soft: 0.9, hard: 0.1 });
    let settings = LossSettings::new(Divergence::ForwardKl);
    let mut times = vec![];
    let mut value = 0.0;
    // The first calls compile kernels and choose among products.
    for _ in 0..repeats + 2 {
        device.sync().expect("a device that works");
        let start = Instant::now();
        let output = linear_distill(hidden.clone(), lm_head.clone(), targets.clone(), settings, weigh.clone());
        value = output.value / tokens as f64;
        let gradients = output.loss.backward();
        device.sync().expect("a device that works");
        times.push(start.elapsed().as_secs_f64() * 1e3);
        drop((hidden.grad(&gradients), lm_head.grad(&gradients)));
    }
    let mut times = times.split_off(2);
    times.sort_by(f64::total_cmp);
    let problem = Problem { rows: tokens, width, vocab, kept: tokens * kept, element: dtype.size(), gathers: false };
    let tiles = Tiles::fitting(&problem, BUDGET);
    let flops = 8.0 * (tokens * width) as f64 * vocab as f64;
    let median = times[times.len() / 2];
    println!("tokens,width,vocabulary,kept,type,rows_at_once,ids_at_once,working_mib,nats,median_ms,least_ms,tflops");
    println!(
        "{tokens},{width},{vocab},{kept},{},{},{},{:.1},{value:.6},{median:.3},{:.3},{:.1}",
        arguments[4],
        tiles.token_block,
        tiles.vocab_tile,
        tiles.bytes(&problem) as f64 / (1u64 << 20) as f64,
        times[0],
        flops / median / 1e9,
    );
}
