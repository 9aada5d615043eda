//! The fused distillation loss, forward and backward, through the library's public interface.
//!
//! ```sh
//! cargo bench --bench loss                            # criterion: divergences, weightings, soft beside hard
//! cargo bench --bench loss -- measure T D V K         # one line of JSON: seconds, and peak memory above the inputs
//! cargo bench --bench loss -- compare T D V K [N]     # N rounds of each divergence and of the hard loss alone, in turn
//! ```
//! `benches/peers/loss.py` runs the second beside PyTorch, Liger and DistillKit.

use std::{hint::black_box, time::Instant};

use burn::tensor::{Device, Tensor, TensorData};
use criterion::{BenchmarkId, Criterion, Throughput};
use limbeck::{
    loss::{DistillLoss, DistillLossConfig, Divergence, Weighting},
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind},
};

const MIB: f64 = 1024.0 * 1024.0;
/// Repeats of a measurement, after one that warms up.
const REPEATS: usize = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if let Some(mode @ ("measure" | "compare")) = arguments.first().map(String::as_str) {
        let numbers: Vec<usize> =
            arguments[1..].iter().map(|text| text.parse().expect("T D V K as whole numbers")).collect();
        let [rows, width, vocab, kept, ref rounds @ ..] = numbers[..] else { panic!("give T D V K") };
        let problem = Problem::new(rows, width, vocab, kept);
        if mode == "measure" {
            measure(&problem)
        } else {
            compare(&problem, rounds.first().copied().unwrap_or(5))
        }
        return;
    }
    let mut criterion = Criterion::default().sample_size(10).configure_from_args();
    divergences(&mut criterion);
    targets(&mut criterion);
    criterion.final_summary();
}

/// Inputs of the loss.
struct Problem {
    hidden: Tensor<2>,
    lm_head: Tensor<2>,
    batch: DistillBatch,
    shape: [usize; 4],
}

impl Problem {
    fn new(rows: usize, width: usize, vocab: usize, kept: usize) -> Self {
        let mut state = 0x2545_F491_4F6C_DD1Du64;
        let mut next = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        let device = Device::flex().autodiff();
        let mut random =
            |count: usize, scale: f32| -> Vec<f32> { (0..count).map(|_| (next() - 0.5) * scale).collect() };
        let hidden = TensorData::new(random(rows * width, 2.0), [rows, width]);
        let lm_head = TensorData::new(random(vocab * width, 0.2), [vocab, width]);
        let (mut ids, mut log_probs) = (Vec::with_capacity(rows * kept), Vec::with_capacity(rows * kept));
        for row in 0..rows {
            // Spread over the vocabulary, all different, with the mass that a power law leaves them.
            ids.extend((0..kept).map(|j| ((row * 7919 + j * (vocab / kept) + j) % vocab) as u32));
            log_probs.extend((0..kept).map(|j| (0.3 / (1.0 + j as f32).powf(1.5)).ln()));
        }
        let mass: f32 = log_probs[..kept].iter().map(|log_prob: &f32| log_prob.exp()).sum();
        let capture = Capture {
            temperature: 1.0,
            log_probs,
            log_tail: vec![(1.0 - mass).ln(); rows],
            label_log_prob: vec![-1.2; rows],
        };
        let targets = SparseTargets {
            offsets: (0..=rows).map(|row| (row * kept) as u64).collect(),
            ids,
            captures: vec![capture],
            kind: TargetKind::Exact,
            log_normalizer: None,
            router: None,
        };
        let tokens = (0..=rows).map(|row| (row * 104_729 % vocab) as u32).collect();
        let sequences = vec![PackedSequence { tokens, segments: vec![0; rows + 1] }];
        Problem {
            hidden: Tensor::from_data(hidden, &device).require_grad(),
            lm_head: Tensor::from_data(lm_head, &device).require_grad(),
            batch: DistillBatch { sequences, targets: Some(targets), row_weights: None },
            shape: [rows, width, vocab, kept],
        }
    }

    fn run(&self, loss: &DistillLoss) -> f64 {
        let output = loss.forward(0, self.hidden.clone(), self.lm_head.clone(), &self.batch).expect("well formed");
        let gradients = output.sum.backward();
        black_box(self.hidden.grad(&gradients).expect("tracked"));
        black_box(self.lm_head.grad(&gradients).expect("tracked"));
        output.value
    }
}

fn loss(divergence: Divergence, weighting: Weighting) -> DistillLoss {
    DistillLossConfig::new(divergence).with_weighting(weighting, 100).init().expect("sound settings")
}

fn half() -> Weighting {
    Weighting::Constant { soft: 0.5 }
}

fn divergences(criterion: &mut Criterion) {
    let problem = Problem::new(256, 256, 16_384, 64);
    let mut group = criterion.benchmark_group("divergence");
    group.throughput(Throughput::Elements(256));
    for divergence in Divergence::EXAMPLES {
        let loss = loss(divergence, half());
        group.bench_function(divergence.name(), |bencher| bencher.iter(|| problem.run(&loss)));
    }
}

fn targets(criterion: &mut Criterion) {
    let problem = Problem::new(256, 256, 16_384, 64);
    let mut group = criterion.benchmark_group("targets");
    group.throughput(Throughput::Elements(256));
    let kinds = [
        ("hard", Weighting::hard_only()),
        ("soft and hard", half()),
        ("soft and hard by token", Weighting::Llama4 { from: 0.9, to: 0.3, floor: 0.5 }),
    ];
    for (name, weighting) in kinds {
        let loss = loss(Divergence::ForwardKl, weighting);
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| bencher.iter(|| problem.run(&loss)));
    }
}

/// Prints seconds and peak memory of forward and backward.
fn measure(problem: &Problem) {
    let loss = loss(Divergence::ForwardKl, half());
    // Threads and code paths first, on next to nothing.
    Problem::new(8, problem.shape[1], 1024, 8).run(&loss);
    let before = memory("VmRSS");
    let cleared = std::fs::write("/proc/self/clear_refs", "5").is_ok();
    let value = problem.run(&loss);
    let peak = (cleared && before > 0.0).then(|| memory("VmHWM") - before);
    let (seconds, cpu_seconds): (Vec<f64>, Vec<f64>) = (0..REPEATS)
        .map(|_| {
            let (began, cpu_began) = (Instant::now(), cpu_seconds());
            black_box(problem.run(&loss));
            (began.elapsed().as_secs_f64(), cpu_seconds() - cpu_began)
        })
        .unzip();
    let [rows, width, vocab, kept] = problem.shape;
    let gradients = ((rows + vocab) * width * 4) as f64;
    let json = serde_json::json!({
        "what": "limbeck", "T": rows, "D": width, "V": vocab, "k": kept, "loss": value, "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes_above_inputs": peak,
        "peak_bytes_above_inputs_and_gradients": peak.map(|peak| peak - gradients),
        "peak_mib_above_inputs_and_gradients": peak.map(|peak| ((peak - gradients) / MIB).round()),
    });
    println!("{json}");
}

/// Prints the median time of each loss relative to forward KL with cross-entropy, each loss once in every round.
fn compare(problem: &Problem, rounds: usize) {
    let mut losses = vec![("hard alone".to_string(), loss(Divergence::ForwardKl, Weighting::hard_only()))];
    losses.extend(Divergence::EXAMPLES.map(|divergence| (divergence.name().to_string(), loss(divergence, half()))));
    let mut ratios = vec![vec![]; losses.len()];
    problem.run(&losses[0].1);
    for _ in 0..rounds {
        let seconds: Vec<f64> = losses
            .iter()
            .map(|(_, loss)| {
                let began = Instant::now();
                black_box(problem.run(loss));
                began.elapsed().as_secs_f64()
            })
            .collect();
        // Within a round, so that a slow minute of the machine is slow for all.
        for (ratios, seconds_of_one) in ratios.iter_mut().zip(&seconds) {
            ratios.push(seconds_of_one / seconds[1]);
        }
    }
    for ((name, _), mut ratios) in losses.into_iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        println!("{name:<20}{:>8.3}  ({:.3} to {:.3})", ratios[rounds / 2], ratios[0], ratios[rounds - 1]);
    }
}

/// A line of this process's memory in bytes; 0 where the system does not tell.
fn memory(name: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(name));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|text| text.parse::<f64>().ok());
    kilobytes.unwrap_or(0.0) * 1024.0
}

/// Processor time of this process, in user and system, in steps of a hundredth; 0 where the system does not tell.
fn cpu_seconds() -> f64 {
    let status = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The program's name comes second, in parentheses, and may have spaces.
    let numbers = status.rsplit(')').next().unwrap_or_default().split_whitespace();
    numbers.skip(11).take(2).filter_map(|text| text.parse::<f64>().ok()).sum::<f64>() / 100.0
}
