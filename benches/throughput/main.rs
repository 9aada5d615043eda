//! Tokens per second of the two things that take the time: a teacher's forward pass with its top-k, and a student's
//! training step; and what single operations take: attention, a layer of experts, and each of the others. Prints one line of
//! JSON; `benches/peers/` does the same in PyTorch.
//!
//! ```sh
//! cargo bench --bench throughput -- teacher CHECKPOINT TOKENS.safetensors [batch] [sequence] [top_k] [f32|bf16]
//! cargo bench --bench throughput -- student CONFIG.json [batch] [sequence] [top_k] [steps]
//! cargo bench --bench throughput -- attention [tokens] [query_heads] [key_heads] [head_dim] [chunk, 0 for none]
//! cargo bench --bench throughput -- experts [tokens] [experts] [hidden] [width] [forward|training|packed]
//! cargo bench --bench throughput -- operation [rms_norm|rotary|swiglu|dispatch|embedding|adamw] [rows]
//! ```
//! Without arguments it measures a small model, to show that it works. With `--turns` it waits for a line of its input
//! before each run and answers with the seconds it took, by the clock and of the processor: so that another program can
//! take turns with it. For a teacher a line with `body` is the forward pass alone, `logits` the head's product with hidden
//! states that are there, and `head` the targets of these.

mod attention;
mod experts;
mod operations;
mod student;
mod teacher;

use std::{path::Path, time::Instant};

use burn::tensor::Device;
use limbeck::{
    Result,
    checkpoint::{CheckpointReader, read_safetensors},
    models::{Decoder, RandomWeights, llama4::shapes, parameter::CheckpointWeights, read_config},
};
use limbeck_kernels::{large_blocks::LargeBlocks, packed_matmul::Numbers};
use student::student;
use teacher::teacher;

/// As the program has it.
#[global_allocator]
static ALLOCATOR: LargeBlocks = LargeBlocks;

fn main() -> Result<()> {
    let mut arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let turns = arguments.iter().position(|argument| argument == "--turns").map(|place| arguments.remove(place));
    let turns = turns.is_some();
    let number = |place: usize, default: usize| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a whole number"))
    };
    match arguments.first().map(String::as_str) {
        Some("teacher") => {
            let numbers = match arguments.get(6).map(String::as_str) {
                None | Some("f32") => Numbers::F32,
                Some("bf16") => Numbers::Bf16,
                Some(other) => panic!("f32 or bf16, not {other}"),
            };
            let reader = CheckpointReader::open(Path::new(&arguments[1]))?;
            let config = read_config(reader.config_path(), reader.config())?;
            let weights = CheckpointWeights::new(&reader).in_numbers(numbers);
            let model = Decoder::load_for_inference(config, &weights, &Device::flex())?;
            let ids = read_safetensors(Path::new(&arguments[2]))?.load_i64("input_ids")?;
            let ids = ids.into_iter().map(|id| id as u32).collect();
            teacher(model, ids, number(3, 4), number(4, 512), number(5, 64), turns)
        }
        Some("student") => {
            let path = Path::new(&arguments[1]);
            let json = serde_json::from_slice(&std::fs::read(path).expect("a readable config.json"));
            let config = read_config(path, &json.expect("a config.json holds JSON"))?;
            student(config, number(2, 8), number(3, 128), number(4, 32), number(5, 20), turns)
        }
        Some("attention") => {
            let shape = attention::Shape {
                tokens: number(1, 2048),
                query_heads: number(2, 8),
                key_heads: number(3, 2),
                head_dim: number(4, 64),
                chunk: number(5, 0),
            };
            attention::attention(shape, turns)
        }
        Some("experts") => {
            let way = match arguments.get(5).map(String::as_str) {
                None | Some("forward") => experts::Way::Forward,
                Some("training") => experts::Way::Training,
                Some("packed") => experts::Way::Packed,
                Some(other) => panic!("forward, training or packed, not {other}"),
            };
            experts::experts(number(1, 1024), number(2, 16), number(3, 512), number(4, 1024), way, turns)
        }
        Some("operation") => {
            operations::operation(arguments.get(1).map_or("rms_norm", String::as_str), number(2, 2048), turns)
        }
        _ => {
            let config = shapes::tiny().decoder(Path::new("tiny"))?;
            let weights = RandomWeights { seed: 1, std: 0.02 };
            let model = Decoder::load_for_inference(config.clone(), &weights, &Device::flex())?;
            teacher(model, (0..1024).map(|i| i * 7 % 2048).collect(), 2, 128, 32, false)?;
            student(config, 2, 128, 32, 5, false)
        }
    }
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Seconds by the clock.
fn timed(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_secs_f64()
}

/// User and system time of this process so far; 0 where the system does not say.
fn processor_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |place: usize| fields.get(place).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

/// Runs when it is told to, until its input ends.
fn take_turns(mut run: impl FnMut(&str) -> Result<()>) -> Result<()> {
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line.expect("readable input");
        let (began, busy) = (Instant::now(), processor_seconds());
        run(line.trim())?;
        println!("{} {}", began.elapsed().as_secs_f64(), processor_seconds() - busy);
    }
    Ok(())
}
