//! Recomputing layers takes less memory at its peak, measured on a process that does nothing else.
#![cfg(target_os = "linux")]

use std::path::Path;
use std::process::Command;

use burn::tensor::Device;
use limbeck::Result;
use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
use limbeck::models::llama4::{Llama4Config, shapes};
use limbeck::models::{Decoder, RandomWeights};
use limbeck::targets::{DistillBatch, PackedSequence, TargetSource};
use limbeck::train::{TrainConfig, Trainer};

const RECOMPUTE: &str = "LIMBECK_TEST_RECOMPUTE";
const SEQUENCES: u64 = 8;
const SEQ_LEN: usize = 256;
const LAYERS: usize = 12;

/// Made-up text, without soft targets: what counts is what the layers keep.
struct Text;

impl TargetSource for Text {
    fn sequence_count(&self) -> u64 {
        SEQUENCES
    }

    fn seq_len(&self) -> usize {
        SEQ_LEN
    }

    fn read(&self, numbers: &[u64]) -> Result<DistillBatch> {
        let sequence = |number: &u64| PackedSequence {
            tokens: (0..=SEQ_LEN as u32).map(|place| (place * 31 + *number as u32 * 7) % 500).collect(),
            segments: vec![0; SEQ_LEN + 1],
        };
        Ok(DistillBatch { sequences: numbers.iter().map(sequence).collect(), targets: None, row_weights: None })
    }
}

/// Kilobytes of memory from `/proc/self/status`.
fn kilobytes(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Not a test of its own: the process that `recomputed_layers_take_less_memory` measures.
#[test]
fn child_process_trains_a_step() {
    let Some(recompute) = std::env::var_os(RECOMPUTE) else { return };
    let config = Llama4Config {
        num_hidden_layers: LAYERS,
        moe_layers: (0..LAYERS).collect(),
        rotary_layers: (1..=LAYERS).map(|layer| !layer.is_multiple_of(4)).collect(),
        vocab_size: 512,
        ..shapes::tiny()
    };
    let config = config.decoder(Path::new("student")).unwrap();
    let device = Device::flex().autodiff();
    let model = Decoder::load(config, &RandomWeights { seed: 1, std: 0.02 }, &device).unwrap();
    let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(Weighting::hard_only(), 1).init().unwrap();
    let config = TrainConfig {
        sequences_per_step: SEQUENCES,
        sequences_per_micro_batch: SEQUENCES,
        checkpoint_activations: recompute == "1",
        ..TrainConfig::default()
    };
    let mut trainer = Trainer::new(config, model, loss, SEQUENCES).unwrap();
    let before = kilobytes("VmRSS:");
    let metrics = trainer.train_step(&Text).unwrap();
    println!("measured {} {}", kilobytes("VmHWM:") - before, metrics.grad_norm);
}

#[test]
fn recomputed_layers_take_less_memory() {
    let run = |recompute: &str| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_process_trains_a_step", "--nocapture"])
            .env(RECOMPUTE, recompute)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = said.lines().find_map(|line| line.split_once("measured ")).map(|(_, rest)| rest.to_string());
        let line = line.unwrap_or_else(|| panic!("{said}{}", String::from_utf8_lossy(&output.stderr)));
        let mut numbers = line.split_whitespace();
        let kilobytes: u64 = numbers.next().unwrap().parse().unwrap();
        let norm: f64 = numbers.next().unwrap().parse().unwrap();
        (kilobytes, norm)
    };
    let ((kept, norm), (recomputed, again)) = (run("0"), run("1"));
    eprintln!(
        "{LAYERS} layers, {} tokens: {kept} kB with all kept, {recomputed} kB recomputed",
        SEQUENCES * SEQ_LEN as u64
    );
    assert!((norm / again - 1.0).abs() < 1e-5, "{norm} {again}");
    assert!(recomputed * 2 < kept, "{recomputed} kB, and {kept} kB with everything kept");
}
