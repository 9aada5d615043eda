//! The ways of running a teacher, each with its memory, its time and why it does not fit.

use std::path::PathBuf;

use limbeck_kernels::packed_matmul::Numbers;

use super::hardware::Hardware;
use super::work::{TeacherWork, WeightType};
use crate::models::DecoderConfig;
use crate::teacher::{MemoryParts, Spill, StreamSettings, resident_memory, streamed_memory};

/// Share of a device's memory that may be planned with; the rest is the driver's, the allocator's and the unforeseen.
const USABLE: f64 = 0.92;
/// Rows of logits in f32 at once.
const HEAD_ROWS: f64 = 256.0;
/// Hidden states are kept in f32.
const STATE_BYTES: f64 = 4.0;
/// What the program takes of the processor's memory beside a teacher: itself, text, tokenizer, a shard in the making.
const PROGRAM: u64 = 80 << 20;
/// Activations are sent between devices in bf16.
const SENT_BYTES: f64 = 2.0;

/// A way of running a teacher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All weights in the memory of one device, or of each group of so many devices; groups share the data. A group
    /// splits layers within a node, and takes them in turn between nodes.
    Resident { group: u64 },
    /// One layer in memory at a time, over a sweep of tokens, on each device or on each group of so many devices of a
    /// node, which split every layer. Groups have their own tokens, and those of a node take each layer from one reading.
    Streamed { group: u64 },
}

impl Mode {
    pub fn name(self) -> String {
        match self {
            Mode::Resident { group: 1 } => "resident".into(),
            Mode::Resident { group } => format!("resident on {group}"),
            Mode::Streamed { group: 1 } => "streamed".into(),
            Mode::Streamed { group } => format!("streamed on {group}"),
        }
    }
}

/// A number of bytes and what it is for.
pub type Part = (&'static str, f64);

/// What one way of running a teacher comes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    pub mode: Mode,
    /// Bytes on one device, by part.
    pub memory: Vec<Part>,
    /// Why it cannot be run, if so.
    pub obstacle: Option<String>,
    /// Tokens that are run together on one device, or on one group: a batch, or a sweep.
    pub tokens_at_once: f64,
    /// Seconds for that many tokens, by what takes them; those that overlap are told apart by `seconds`.
    pub times: Vec<Part>,
    /// Seconds for that many tokens.
    pub seconds: f64,
    /// Tokens per second of all devices.
    pub rate: f64,
    /// What takes longest.
    pub bottleneck: &'static str,
}

impl Estimate {
    pub fn fits(&self) -> bool {
        self.obstacle.is_none()
    }

    /// Bytes on one device.
    pub fn bytes(&self) -> f64 {
        self.memory.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Device-hours for a number of tokens.
    pub fn device_hours(&self, hardware: &Hardware, tokens: f64) -> f64 {
        tokens / self.rate * hardware.device_count() as f64 / 3600.0
    }
}

/// What is to be run.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    pub config: &'a DecoderConfig,
    pub weights: WeightType,
    /// Tokens of a sequence.
    pub seq_len: u64,
    /// Tokens of all sequences.
    pub tokens: f64,
    /// Tokens of one forward pass.
    pub batch_tokens: u64,
    /// Bytes that a streamed teacher may take on a device, if not all that can be planned with.
    pub memory: Option<f64>,
    /// Bytes of a shard in the making: as much as it may be, and as much as is usual.
    pub shard: (u64, u64),
}

/// Every way of running the teacher on the hardware: those that fit first, the cheapest (the fastest, for all devices
/// are paid for) of them first of all.
pub fn estimates(job: &Job<'_>, hardware: &Hardware) -> Vec<Estimate> {
    let work = &TeacherWork::new(job.config, job.seq_len);
    let (weights, batch) = (job.weights, job.batch_tokens as f64);
    let groups = (0..).map(|power| 1u64 << power).take_while(|group| *group <= hardware.device_count());
    let mut all: Vec<Estimate> = groups.map(|group| resident(work, weights, hardware, batch, group)).collect();
    // Devices that hold the teacher together need not stream it; else a layer may be too much for one of them.
    let too_large = !all.iter().any(Estimate::fits);
    let groups = (0..).map(|power| 1u64 << power).take_while(|group| *group <= hardware.devices);
    let groups = groups.filter(|group| *group == 1 || too_large);
    all.extend(groups.map(|group| streamed(work, weights, hardware, batch, job.memory, group)));
    if hardware.is_processor() && hardware.device_count() == 1 {
        all = all.into_iter().map(|estimate| on_the_processor(estimate, job, hardware, work)).collect();
    }
    all.sort_by(|a, b| b.fits().cmp(&a.fits()).then(b.rate.total_cmp(&a.rate)));
    all
}

/// The same on the processor this program runs on, whose memory is counted as the runners themselves count it.
fn on_the_processor(mut estimate: Estimate, job: &Job<'_>, hardware: &Hardware, work: &TeacherWork) -> Estimate {
    let weight = job.weights.bytes().max(2.0) as u64;
    let usable = USABLE * hardware.device_memory as f64;
    let (parts, usable): (MemoryParts, f64) = match estimate.mode {
        Mode::Resident { .. } => (resident_memory(job.config, job.seq_len, job.batch_tokens, weight), usable),
        Mode::Streamed { .. } => {
            let memory = job.memory.unwrap_or(usable);
            let settings = StreamSettings {
                memory: memory as u64,
                numbers: Numbers::F32,
                taken: vec![("the program", PROGRAM + memory as u64 / 16), ("a shard in the making", job.shard.0)],
                batch_tokens: job.batch_tokens,
                sweep_tokens: None,
                spill: Spill::Auto,
                spill_dir: PathBuf::new(),
            };
            match streamed_memory(job.config, job.seq_len, &settings, weight) {
                Ok(mut plan) => {
                    // The end of the data ends a sweep as well, and takes of it what it has tokens.
                    let tokens = (plan.sweep_tokens as f64).min(job.tokens.max(job.seq_len as f64));
                    let share = tokens / plan.sweep_tokens as f64;
                    plan.memory[1].1 = (plan.memory[1].1 as f64 * share) as u64;
                    let sweeps = (job.tokens / tokens).max(1.0);
                    let compute = tokens * hardware.seconds_per_token(work);
                    let experts = work.experts.min(tokens * work.chosen_experts);
                    let head = work.head_product * (share * plan.head_reads as f64).ceil();
                    let read = (work.dense + experts + work.embedding + head) * job.weights.bytes();
                    // Weights are read by one of the threads that otherwise compute.
                    let (loading, threads) =
                        hardware.measured.as_ref().map_or((f64::INFINITY, 1), |rates| (rates.loading, rates.threads));
                    let disk = read / hardware.disk_bandwidth.min(loading);
                    let compute = compute + read / loading / threads as f64;
                    estimate.times = vec![("products", compute), ("disk", disk)];
                    estimate.seconds = compute.max(disk);
                    estimate.tokens_at_once = tokens;
                    estimate.rate = job.tokens / (sweeps * estimate.seconds);
                    estimate.bottleneck = if compute >= disk { "products" } else { "disk" };
                    (plan.memory, memory)
                }
                Err(error) => {
                    estimate.obstacle = Some(error.to_string());
                    return estimate;
                }
            }
        }
    };
    estimate.memory = parts.into_iter().map(|(name, bytes)| (name, bytes as f64)).collect();
    estimate.memory.push(("the program", PROGRAM as f64));
    estimate.memory.push(("a shard in the making", job.shard.1 as f64));
    estimate.obstacle = obstacle(estimate.bytes(), usable);
    estimate
}

/// Activations of a batch while one layer works: the states, a normed copy, and the widest inner row twice.
fn activations(work: &TeacherWork, tokens: f64, group: f64) -> f64 {
    tokens * STATE_BYTES * (2.0 * work.hidden as f64 + 2.0 * work.inner as f64 / group)
}

fn head_rows(work: &TeacherWork, group: f64) -> f64 {
    HEAD_ROWS * work.vocab as f64 * STATE_BYTES / group
}

fn resident(work: &TeacherWork, weights: WeightType, hardware: &Hardware, tokens: f64, group: u64) -> Estimate {
    let width = group as f64;
    let memory = vec![
        ("weights", work.total() * weights.bytes() / width),
        ("activations", activations(work, tokens, width)),
        ("logits", head_rows(work, width)),
    ];
    let compute = tokens * hardware.seconds_per_token(work) / width;
    // A batch reads the dense weights once, and no more experts than there are or its tokens choose.
    let experts_read = work.experts.min(tokens * work.chosen_experts);
    let read = (work.dense + work.head_product + experts_read) * weights.bytes() / (width * hardware.memory_bandwidth);
    // Inside of a node a group splits every layer, outside of it the nodes take some layers each, one after the other.
    let (inside, stages) = (width.min(hardware.devices as f64), (width / hardware.devices as f64).max(1.0));
    // Two sums over the node a layer; in a ring each device sends what the others hold twice. Dispatch and combination of
    // experts are within that.
    let states = tokens * work.hidden as f64 * SENT_BYTES;
    let sums = 2.0 * (work.layers as f64 / stages) * 2.0 * (inside - 1.0) / inside * states;
    let link = if inside > 1.0 { sums / hardware.link_bandwidth } else { 0.0 };
    let hop = if stages > 1.0 { states / (inside * hardware.network_bandwidth) } else { 0.0 };
    let seconds = compute.max(read) + link + hop;
    let groups = (hardware.device_count() / group) as f64;
    finish(
        Mode::Resident { group },
        memory,
        hardware.device_memory as f64 * USABLE,
        tokens,
        vec![("products", compute), ("memory", read), ("links", link + hop)],
        seconds,
        groups * tokens / seconds,
    )
}

fn streamed(
    work: &TeacherWork,
    weights: WeightType,
    hardware: &Hardware,
    batch_tokens: f64,
    budget: Option<f64>,
    group: u64,
) -> Estimate {
    let width = group as f64;
    let usable = budget.unwrap_or(hardware.device_memory as f64 * USABLE);
    // The layer that works and the one that is being read; of experts, two of each.
    let layer = 2.0 * (work.largest_layer + work.largest_expert) * weights.bytes() / width;
    let scratch = activations(work, batch_tokens, width);
    let (embedding, logits) = ((work.embedding + work.head) * weights.bytes() / width, head_rows(work, width));
    // Embedding and head are there at the ends of a sweep, when no layer is.
    let fixed = (layer + scratch).max(embedding + logits);
    // A state, and its normed copy that waits for its expert; every device of a group has those of its tokens.
    let per_token = work.hidden as f64 * STATE_BYTES * if work.expert_layers > 0 { 2.0 } else { 1.0 };
    let on_device = ((usable - fixed) / per_token).max(0.0);
    let on_host = 0.8 * hardware.host_memory as f64 / hardware.devices as f64 / per_token;
    // States stay on the device unless the host has room for many more.
    let (tokens, host) = if on_host > 4.0 * on_device { (on_host, true) } else { (on_device, false) };
    let tokens = (tokens / batch_tokens).floor() * batch_tokens;
    let compute = tokens * hardware.seconds_per_token(work) / width;
    let all_tokens = tokens * hardware.devices as f64 / width;
    let experts_read = work.experts.min(all_tokens * work.chosen_experts);
    let bytes = (work.dense + experts_read + work.embedding + work.head) * weights.bytes();
    let disk = bytes / hardware.disk_bandwidth;
    let states = if host { 2.0 * tokens * per_token * work.layers as f64 } else { 0.0 };
    let moved = if hardware.host_bandwidth > 0.0 { (bytes / width + states) / hardware.host_bandwidth } else { 0.0 };
    // As a resident group does, with every layer.
    let sums = 4.0 * work.layers as f64 * (width - 1.0) / width * tokens * work.hidden as f64 * SENT_BYTES;
    let link = if group > 1 { sums / hardware.link_bandwidth } else { 0.0 };
    let seconds = (compute + link).max(disk).max(moved);
    let memory = vec![
        ("two layers", layer),
        ("embedding and head", (fixed - layer - scratch).max(0.0)),
        ("activations", scratch),
        ("states of the sweep", if host { 0.0 } else { tokens * per_token }),
    ];
    let least = fixed + batch_tokens * per_token;
    let groups = (hardware.device_count() / group) as f64;
    let mut times = vec![("products", compute), ("disk", disk), ("host link", moved)];
    if group > 1 {
        times.push(("links", link));
    }
    let mut estimate = finish(
        Mode::Streamed { group },
        memory,
        usable,
        tokens,
        times,
        seconds,
        if tokens > 0.0 { groups * tokens / seconds } else { 0.0 },
    );
    if tokens < batch_tokens {
        estimate.obstacle =
            Some(format!("a sweep of one batch needs {:.1} GB, and {:.1} GB are there", least / 1e9, usable / 1e9));
    }
    estimate
}

fn finish(
    mode: Mode,
    memory: Vec<Part>,
    usable: f64,
    tokens_at_once: f64,
    times: Vec<Part>,
    seconds: f64,
    rate: f64,
) -> Estimate {
    let bytes: f64 = memory.iter().map(|(_, bytes)| bytes).sum();
    let obstacle = obstacle(bytes, usable);
    let bottleneck = times.iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or("nothing", |(name, _)| name);
    Estimate { mode, memory, obstacle, tokens_at_once, times, seconds, rate, bottleneck }
}

fn obstacle(bytes: f64, usable: f64) -> Option<String> {
    (bytes > usable)
        .then(|| format!("needs {:.1} GB on each device, and {:.1} GB are usable", bytes / 1e9, usable / 1e9))
}
