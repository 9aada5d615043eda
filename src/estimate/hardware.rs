//! Machines: what a device can hold, multiply and move. Presets of published limits, and files for others.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::work::TeacherWork;

use crate::error::{Error, Result};

/// Equal devices in equal nodes. Rates are per second; bytes are decimal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    pub name: String,
    /// Devices in one node.
    pub devices: u64,
    #[serde(default = "one")]
    pub nodes: u64,
    /// Bytes of memory of one device.
    pub device_memory: u64,
    /// Floating-point operations of one device's matrix products, at their published or measured peak.
    pub matmul_flops: f64,
    /// Share of that peak which a decoder's forward pass reaches.
    #[serde(default = "usual_efficiency")]
    pub efficiency: f64,
    /// Bytes that one device reads from its memory.
    pub memory_bandwidth: f64,
    /// Bytes that one device sends to others of its node.
    pub link_bandwidth: f64,
    /// Bytes that one device sends to other nodes.
    #[serde(default)]
    pub network_bandwidth: f64,
    /// Bytes of memory of a node, beside its devices'. 0 where the device is the processor itself.
    #[serde(default)]
    pub host_memory: u64,
    /// Bytes that go between a node's memory and one device. 0 where the device is the processor itself.
    #[serde(default)]
    pub host_bandwidth: f64,
    /// Bytes that a node reads from where checkpoints are.
    pub disk_bandwidth: f64,
    /// Price of one device for an hour, in whatever currency.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<f64>,
    /// What was measured of one device; where it is there, times follow from it and not from peak and `efficiency`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Rates>,
}

/// What a decoder's forward pass reaches, per second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Floating-point operations of products with weights.
    pub products: f64,
    /// Floating-point operations of attention.
    pub attention: f64,
    /// Numbers of states and inner rows that layers write.
    pub states: f64,
    /// Logits that targets are chosen from.
    pub logits: f64,
    /// Bytes of weights that one thread reads and makes ready to multiply by.
    pub loading: f64,
    /// Threads of the processor, of which a streamed teacher gives one to loading.
    pub threads: u64,
}

fn one() -> u64 {
    1
}

fn usual_efficiency() -> f64 {
    0.4
}

/// Names of the presets.
pub const PRESETS: [&str; 4] = ["1x24gb", "1xh100", "8xh100", "64xh100"];

impl Hardware {
    /// A preset by its name, else a TOML file of this struct's fields.
    ///
    /// # Errors
    /// [`Error::Usage`] when the word is neither; [`Error::File`] when the file cannot be read as hardware.
    pub fn named(word: &str) -> Result<Hardware> {
        if let Some(preset) = Hardware::preset(word) {
            return Ok(preset);
        }
        let path = Path::new(word);
        if !path.is_file() {
            let problem = format!("no hardware is called {word:?}, and there is no such file");
            let tip = format!("use {}, or a TOML file as docs/planning.md has it", PRESETS.join(", "));
            return Err(Error::usage(problem, tip));
        }
        let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
        let hardware: Hardware = toml::from_str(&text).map_err(|error| {
            let problem = error.message().lines().next().unwrap_or_default().to_string();
            Error::file(path, format!("is no description of hardware: {problem}"), "see docs/planning.md for its keys")
        })?;
        hardware.check(path)?;
        Ok(hardware)
    }

    fn preset(word: &str) -> Option<Hardware> {
        // One H100 SXM: dense bf16 products, HBM3, NVLink and PCIe 5 in one direction, as NVIDIA publishes them; the
        // rest is an assumption: 400 Gbit/s of network a device, 2 TB of host memory and 25 GB/s of disk a node.
        let h100 = |devices: u64, nodes: u64| Hardware {
            name: word.to_ascii_lowercase(),
            devices,
            nodes,
            device_memory: 80_000_000_000,
            matmul_flops: 989e12,
            efficiency: usual_efficiency(),
            memory_bandwidth: 3.35e12,
            link_bandwidth: 450e9,
            network_bandwidth: 50e9,
            host_memory: if devices == 1 { 256_000_000_000 } else { 2_000_000_000_000 },
            host_bandwidth: 55e9,
            disk_bandwidth: if devices == 1 { 6e9 } else { 25e9 },
            price: None,
            measured: None,
        };
        match word.to_ascii_lowercase().as_str() {
            // A desktop's card of the class of an RTX 4090, and a desktop around it.
            "1x24gb" => Some(Hardware {
                device_memory: 24_000_000_000,
                matmul_flops: 165e12,
                memory_bandwidth: 1.008e12,
                link_bandwidth: 0.0,
                network_bandwidth: 0.0,
                host_memory: 64_000_000_000,
                host_bandwidth: 25e9,
                disk_bandwidth: 6e9,
                ..h100(1, 1)
            }),
            "1xh100" => Some(h100(1, 1)),
            "8xh100" => Some(h100(8, 1)),
            "64xh100" => Some(h100(8, 8)),
            _ => None,
        }
    }

    fn check(&self, path: &Path) -> Result<()> {
        let positive = [
            ("devices", self.devices as f64),
            ("nodes", self.nodes as f64),
            ("device_memory", self.device_memory as f64),
            ("matmul_flops", self.matmul_flops),
            ("efficiency", self.efficiency),
            ("memory_bandwidth", self.memory_bandwidth),
            ("disk_bandwidth", self.disk_bandwidth),
        ];
        for (key, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::file(path, format!("`{key}` is {value}"), "give a number above 0"));
            }
        }
        if let Some(rates) = &self.measured {
            for (key, rate) in [
                ("products", rates.products),
                ("attention", rates.attention),
                ("states", rates.states),
                ("logits", rates.logits),
                ("loading", rates.loading),
                ("threads", rates.threads as f64),
            ] {
                if !(rate.is_finite() && rate > 0.0) {
                    let problem = format!("`measured.{key}` is {rate}");
                    return Err(Error::file(path, problem, "give a number above 0, or measure with --calibrate"));
                }
            }
        }
        if self.efficiency > 1.0 {
            let problem = format!("`efficiency` is {}", self.efficiency);
            return Err(Error::file(path, problem, "give a share of the peak, at most 1"));
        }
        if self.devices > 1 && self.link_bandwidth <= 0.0 {
            let problem = "`link_bandwidth` is 0, and a node has several devices";
            return Err(Error::file(path, problem, "give the bytes per second that a device sends to its neighbours"));
        }
        if self.nodes > 1 && self.network_bandwidth <= 0.0 {
            let problem = "`network_bandwidth` is 0, and there are several nodes";
            return Err(Error::file(path, problem, "give the bytes per second that a device sends to other nodes"));
        }
        Ok(())
    }

    /// Devices of all nodes.
    pub fn device_count(&self) -> u64 {
        self.devices * self.nodes
    }

    /// Whether the device is the processor: its memory is the node's.
    pub fn is_processor(&self) -> bool {
        self.host_memory == 0
    }

    /// Seconds that one device computes for one token, when nothing keeps it waiting.
    pub fn seconds_per_token(&self, work: &TeacherWork) -> f64 {
        match &self.measured {
            Some(rates) => rates.seconds(work.amounts()),
            None => work.flops() / (self.matmul_flops * self.efficiency),
        }
    }
}
