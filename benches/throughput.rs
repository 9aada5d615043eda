//! Tokens per second of the two things that take the time: a teacher's forward pass with its top-k, and a student's
//! training step. Prints one line of JSON; `benches/peers/` does the same in PyTorch.
//!
//! ```sh
//! cargo bench --bench throughput -- teacher CHECKPOINT TOKENS.safetensors [batch] [sequence] [top_k] [f32|bf16]
//! cargo bench --bench throughput -- student CONFIG.json [batch] [sequence] [top_k] [steps]
//! ```
//! Without arguments it measures a small model, to show that it works. With `--turns` it waits for a line of its input
//! before each run and answers with the seconds it took, by the clock and of the processor: so that another program can
//! take turns with it. A line with `body` is a teacher's forward pass alone, `head` its logits without summing them up.

use std::{path::Path, time::Instant};

use burn::tensor::Device;
use limbeck::{
    Result,
    checkpoint::{CheckpointReader, read_safetensors},
    loss::{DistillLossConfig, Divergence, Weighting},
    models::{
        Decoder, DecoderConfig, RandomWeights, TokenLayout, llama4::shapes, parameter::CheckpointWeights, read_config,
    },
    schedule::{LearningRate, Schedule},
    selection::Selection,
    targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind, TargetSource},
    teacher::ResidentTeacher,
    train::{TrainConfig, Trainer, balance::RouterConfig},
};
use limbeck_kernels::packed_matmul::Numbers;

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

fn teacher(model: Decoder, ids: Vec<u32>, batch: usize, sequence: usize, top_k: usize, turns: bool) -> Result<()> {
    let teacher = ResidentTeacher::new(model, Selection::TopK { k: top_k }, &[1.0])?;
    let sequences: Vec<PackedSequence> = (0..batch)
        .map(|number| {
            let tokens = (0..=sequence).map(|t| ids[(number * sequence + t) % ids.len()]).collect();
            PackedSequence { tokens, segments: vec![0; sequence + 1] }
        })
        .collect();
    teacher.targets(&sequences, 0)?;
    if turns {
        let batch = DistillBatch { sequences: sequences.clone(), targets: None, row_weights: None };
        return take_turns(|what| {
            let model = teacher.model();
            let forward = || model.forward(&TokenLayout::of_batch(&model.config, &batch)).0;
            match what {
                "body" => drop(forward()),
                "head" => {
                    let hidden = forward();
                    for first in (0..batch.row_count()).step_by(256) {
                        let count = 256.min(batch.row_count() - first);
                        drop(model.logits(hidden.clone().narrow(0, first, count)).into_data());
                    }
                }
                _ => drop(teacher.targets(&sequences, 0)?),
            }
            Ok(())
        });
    }
    let seconds = (0..5).map(|_| {
        let began = Instant::now();
        teacher.targets(&sequences, 0).map(|_| began.elapsed().as_secs_f64())
    });
    let seconds = median(seconds.collect::<Result<_>>()?);
    let rate = (batch * sequence) as f64 / seconds;
    println!(
        "{{\"bench\": \"teacher\", \"batch\": {batch}, \"sequence\": {sequence}, \"top_k\": {top_k}, \"tokens_per_second\": {rate:.0}}}"
    );
    Ok(())
}

/// Sequences with random but well-formed targets.
struct MadeUp {
    batch: DistillBatch,
}

impl TargetSource for MadeUp {
    fn sequence_count(&self) -> u64 {
        self.batch.sequences.len() as u64
    }
    fn seq_len(&self) -> usize {
        self.batch.seq_len()
    }
    fn read(&self, _: &[u64]) -> Result<DistillBatch> {
        Ok(self.batch.clone())
    }
}

fn student(
    config: DecoderConfig,
    batch: usize,
    sequence: usize,
    top_k: usize,
    steps: usize,
    turns: bool,
) -> Result<()> {
    let vocab = config.vocab_size as u32;
    let id = |n: usize| (n as u32).wrapping_mul(2_654_435_761) % vocab;
    let sequences: Vec<PackedSequence> = (0..batch)
        .map(|number| PackedSequence {
            tokens: (0..=sequence).map(|t| id(number * 1000 + t)).collect(),
            segments: vec![0; sequence + 1],
        })
        .collect();
    let rows = batch * sequence;
    let kept = 0.8f32 / top_k as f32;
    let targets = SparseTargets {
        offsets: (0..=rows as u64).map(|row| row * top_k as u64).collect(),
        ids: (0..rows * top_k)
            .map(|n| ((n % top_k) as u32 * (vocab / top_k as u32) + (n / top_k) as u32) % vocab)
            .collect(),
        captures: vec![Capture {
            temperature: 1.0,
            log_probs: vec![kept.ln(); rows * top_k],
            log_tail: vec![0.2f32.ln(); rows],
            label_log_prob: vec![-3.0; rows],
        }],

        kind: TargetKind::Exact,
        log_normalizer: None,
    };
    let source = MadeUp { batch: DistillBatch { sequences, targets: Some(targets), row_weights: None } };
    let weighting = Weighting::Constant { soft: 0.5 };
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, 1).init()?;
    let model = Decoder::load(config, &RandomWeights { seed: 1, std: 0.02 }, &Device::flex().autodiff())?;
    let train = TrainConfig {
        arm: "student".into(),
        steps: if turns { 1 << 20 } else { steps as u64 + 2 },
        sequences_per_step: batch as u64,
        sequences_per_micro_batch: batch as u64,
        learning_rate: LearningRate { warmup: 0, schedule: Schedule::Constant { value: 1e-4 } },
        router: RouterConfig { balance_weight: 0.001, ..RouterConfig::default() },
        seed: 1,
        checkpoint_every: 0,
        keep_checkpoints: 0,
        log_every: 0,
        evaluate_every: 0,
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(train, model, loss, batch as u64)?;
    trainer.train_step(&source)?;
    if turns {
        return take_turns(|_| trainer.train_step(&source).map(drop));
    }
    let seconds = (0..steps).map(|_| {
        let began = Instant::now();
        trainer.train_step(&source).map(|_| began.elapsed().as_secs_f64())
    });
    let rate = rows as f64 / median(seconds.collect::<Result<_>>()?);
    println!(
        "{{\"bench\": \"student\", \"batch\": {batch}, \"sequence\": {sequence}, \"top_k\": {top_k}, \"tokens_per_second\": {rate:.0}}}"
    );
    Ok(())
}
