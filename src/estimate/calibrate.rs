//! This machine's processor as hardware to plan for: what small teachers of different proportions really take on it, and
//! how fast files are read. Runs for some seconds, and is only as right as the machine is idle.
//!
//! Four rates are fitted to the times of the probes, each of which is mostly one of the four. So a model that is none
//! of the probes is planned by what it is made of.

use std::path::Path;
use std::time::Instant;

use burn::tensor::Device;
use serde_json::json;

use super::hardware::{Hardware, Rates};
use super::link::link_rate;
use super::reading::{loading_rate, read_rate};
use super::work::TeacherWork;
use crate::durable;
use crate::error::{Error, Result};
use crate::memory;
use crate::models::llama4::{Llama4Config, shapes};
use crate::models::{Decoder, DecoderConfig, RandomWeights, read_config};
use crate::selection::Selection;
use crate::targets::PackedSequence;
use crate::teacher::ResidentTeacher;

/// Seconds that each probe is run for, again and again: processors are faster for a moment than for a pass.
const PROBE_SECONDS: f64 = 1.5;

/// A small teacher, and how many sequences of which length it is run on at once.
struct Probe {
    name: &'static str,
    config: DecoderConfig,
    sequences: usize,
    seq_len: usize,
}

/// What running one probe took.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    pub name: &'static str,
    /// Seconds for one token.
    pub seconds: f64,
    /// What one token is made of.
    pub amounts: [f64; 4],
}

/// A machine and the probes that it was measured by.
#[derive(Debug, Clone)]
pub struct Calibration {
    pub hardware: Hardware,
    pub probes: Vec<Measured>,
}

/// Measures this machine. `directory` is where checkpoints are read from: a file of 256 MiB and a small checkpoint are
/// written there for a moment.
///
/// # Errors
/// [`Error::Io`] when the file cannot be written or read.
pub fn calibrate(directory: &Path) -> Result<Calibration> {
    let program = memory::of_this_process();
    let mut probes = vec![];
    for probe in all_probes()? {
        probes.push(run(&probe)?);
    }
    let (free, disk_bandwidth) = (memory::free().unwrap_or(0), read_rate(directory)?);
    let loading = loading_rate(directory)?;
    let rates = Rates { loading, threads: rayon::current_num_threads() as u64, ..fit(&probes) };
    let hardware = Hardware {
        name: "this machine".into(),
        devices: 1,
        nodes: 1,
        device_memory: free + program,
        matmul_flops: rates.products,
        efficiency: 1.0,
        // A batch of tokens reads weights from caches more than from memory; the probes' times have it in them.
        memory_bandwidth: 1e12,
        link_bandwidth: link_rate()?,
        network_bandwidth: 0.0,
        host_memory: 0,
        host_bandwidth: 0.0,
        disk_bandwidth,
        price: None,
        measured: Some(rates),
    };
    Ok(Calibration { hardware, probes })
}

impl Calibration {
    /// Writes the hardware as a file that `--hardware` takes.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let toml = toml::to_string(&self.hardware).expect("hardware is plain data");
        durable::write_bytes(file, format!("# Written by `limbeck plan --calibrate`.\n{toml}").as_bytes())
    }

    /// The rates, and how well they say what the probes took.
    pub fn text(&self) -> String {
        let rates = self.hardware.measured.as_ref().expect("a calibration has measured");
        let mut text = format!(
            "products {:.1} GFLOP/s, attention {:.1} GFLOP/s, states {:.2} G/s, logits {:.2} G/s, files {:.2} GB/s, links {:.2} GB/s, weights {:.2} GB/s a thread\n",
            rates.products / 1e9,
            rates.attention / 1e9,
            rates.states / 1e9,
            rates.logits / 1e9,
            self.hardware.disk_bandwidth / 1e9,
            self.hardware.link_bandwidth / 1e9,
            rates.loading / 1e9,
        );
        for probe in &self.probes {
            let planned = rates.seconds(probe.amounts);
            text.push_str(&format!(
                "  {:<22} {:>9.0} tokens/s, by these rates {:>9.0} ({:+.0}%)\n",
                probe.name,
                1.0 / probe.seconds,
                1.0 / planned,
                100.0 * (probe.seconds / planned - 1.0),
            ));
        }
        text
    }
}

fn all_probes() -> Result<Vec<Probe>> {
    let dense = |name, [hidden, layers, width, heads, vocab]: [usize; 5], sequences, seq_len| {
        let config = json!({
            "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": width,
            "num_attention_heads": heads, "num_key_value_heads": heads, "vocab_size": vocab,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        });
        let config = read_config(Path::new("probe"), &config)?;
        Ok::<_, Error>(Probe { name, config, sequences, seq_len })
    };
    let experts = Llama4Config {
        hidden_size: 512,
        num_hidden_layers: 2,
        num_attention_heads: 8,
        num_key_value_heads: 2,
        head_dim: 64,
        intermediate_size: 1024,
        intermediate_size_mlp: 2048,
        num_local_experts: 8,
        moe_layers: vec![0, 1],
        rotary_layers: vec![true, true],
        vocab_size: 512,
        ..shapes::tiny()
    };
    let wide = Llama4Config {
        hidden_size: 1024,
        head_dim: 128,
        num_hidden_layers: 1,
        intermediate_size: 1536,
        moe_layers: vec![0],
        rotary_layers: vec![true],
        ..experts.clone()
    };
    let narrow = Llama4Config {
        hidden_size: 128,
        head_dim: 32,
        num_attention_heads: 4,
        intermediate_size: 176,
        ..experts.clone()
    };
    let [experts, wide, narrow] = [experts, wide, narrow].map(|config| config.decoder(Path::new("probe")));
    Ok(vec![
        dense("wide layers", [1024, 1, 4096, 16, 512], 2, 256)?,
        dense("narrow layers", [256, 8, 768, 4, 512], 4, 256)?,
        dense("many narrow layers", [128, 12, 384, 2, 512], 16, 128)?,
        dense("long sequences", [256, 2, 512, 4, 512], 1, 4096)?,
        dense("large vocabulary", [64, 1, 128, 1, 65_536], 2, 128)?,
        dense("vocabulary and layers", [576, 2, 1536, 9, 16_384], 2, 256)?,
        Probe { name: "experts", config: experts?, sequences: 4, seq_len: 256 },
        Probe { name: "wide experts", config: wide?, sequences: 4, seq_len: 256 },
        Probe { name: "narrow experts", config: narrow?, sequences: 16, seq_len: 256 },
    ])
}

fn run(probe: &Probe) -> Result<Measured> {
    let weights = RandomWeights { seed: 1, std: 0.02 };
    let model = Decoder::load_for_inference(probe.config.clone(), &weights, &Device::flex())?;
    let teacher = ResidentTeacher::new(model, Selection::default(), &[1.0])?;
    let vocab = probe.config.vocab_size as u32;
    let sequences: Vec<PackedSequence> = (0..probe.sequences as u32)
        .map(|number| PackedSequence {
            tokens: (0..=probe.seq_len as u32).map(|place| (place * 37 + number * 101) % vocab).collect(),
            segments: vec![0; probe.seq_len + 1],
        })
        .collect();
    // The first run is there to fill caches and start threads.
    teacher.targets(&sequences, 0)?;
    let (begun, mut tokens) = (Instant::now(), 0);
    while tokens == 0 || begun.elapsed().as_secs_f64() < PROBE_SECONDS {
        teacher.targets(&sequences, 0)?;
        tokens += probe.sequences * probe.seq_len;
    }
    let seconds = begun.elapsed().as_secs_f64() / tokens as f64;
    let amounts = TeacherWork::new(&probe.config, probe.seq_len as u64).amounts();
    Ok(Measured { name: probe.name, seconds, amounts })
}

/// Seconds for each unit of the four amounts, none below 0, that make the least squares of the probes' relative errors.
/// Loading of weights is no part of them.
fn fit(probes: &[Measured]) -> Rates {
    // Amounts by time, so that each probe's sum should be 1; each column by its size, so that steps suit all of them.
    let scales: [f64; 4] = std::array::from_fn(|column| {
        probes.iter().map(|probe| probe.amounts[column] / probe.seconds).fold(f64::MIN_POSITIVE, f64::max)
    });
    let rows: Vec<[f64; 4]> = probes
        .iter()
        .map(|probe| std::array::from_fn(|column| probe.amounts[column] / probe.seconds / scales[column]))
        .collect();
    let mut shares = [0.25f64; 4];
    // One coordinate at a time to its best, which for least squares without negatives ends at the least.
    for _ in 0..20_000 {
        for column in 0..4 {
            let square: f64 = rows.iter().map(|row| row[column] * row[column]).sum();
            let missing: f64 = rows
                .iter()
                .map(|row| row[column] * (1.0 - row.iter().zip(&shares).map(|(x, share)| x * share).sum::<f64>()))
                .sum();
            shares[column] = (shares[column] + missing / square).max(0.0);
        }
    }
    // What costs nothing beside the rest has a rate that no model reaches.
    let rate = |column: usize| (scales[column] / shares[column].max(1e-9)).min(1e18);
    let loading = f64::INFINITY;
    Rates { products: rate(0), attention: rate(1), states: rate(2), logits: rate(3), loading, threads: 1 }
}

impl Rates {
    /// Seconds for one token of these amounts.
    pub(super) fn seconds(&self, amounts: [f64; 4]) -> f64 {
        let rates = [self.products, self.attention, self.states, self.logits];
        amounts.iter().zip(rates).map(|(amount, rate)| amount / rate).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_that_made_the_times_are_found_again() {
        let truth = Rates { products: 2e11, attention: 3e10, states: 4e9, logits: 5e8, loading: 1e9, threads: 2 };
        let probes: Vec<Measured> = all_probes()
            .unwrap()
            .iter()
            .map(|probe| {
                let amounts = TeacherWork::new(&probe.config, probe.seq_len as u64).amounts();
                Measured { name: probe.name, seconds: truth.seconds(amounts), amounts }
            })
            .collect();
        let found = fit(&probes);
        for (found, truth) in [
            (found.products, truth.products),
            (found.attention, truth.attention),
            (found.states, truth.states),
            (found.logits, truth.logits),
        ] {
            assert!((found / truth - 1.0).abs() < 0.02, "{found} {truth}");
        }
    }
}
