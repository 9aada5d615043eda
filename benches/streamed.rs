//! A streamed teacher beside the same one resident: tokens per second, peak memory and bytes read. Prints lines of JSON.
//!
//! ```sh
//! cargo bench --bench streamed -- write DIR [layers] [hidden] [vocab]      # a Scout with random bf16 weights
//! cargo bench --bench streamed -- read DIR                                 # the weights alone, as one thread reads ahead
//! cargo bench --bench streamed -- resident DIR [tokens] [sequence]
//! cargo bench --bench streamed -- streamed DIR MEMORY_MIB [tokens] [sequence] [sweep_tokens] [spill]
//! ```
//! Each in a process of its own, because a process's peak of memory stays. Without arguments all run on a small model, to
//! show that they work. `benches/streamed.sh` runs them on a large one, and `benches/peers/streamed_picture.py` draws it.

use std::path::Path;
use std::sync::{Arc, atomic::AtomicBool};
use std::time::Instant;

use burn::tensor::Device;
use limbeck::{
    Result,
    checkpoint::{CheckpointReader, CheckpointWriter, StoredDtype, TensorSpec},
    models::{
        DecoderConfig, Expert, RoutedLayer,
        config::FeedForwardConfig,
        ends::HeadBlock,
        llama4::{Llama4Config, shapes},
        parameter::{CheckpointWeights, Spare},
        read_config,
    },
    selection::Selection,
    targets::PackedSequence,
    teacher::{ResidentTeacher, Spill, StreamSettings, StreamedTeacher},
};
use limbeck_kernels::packed_matmul::Numbers;
use rayon::prelude::*;

/// Tokens of one forward pass in either mode.
const BATCH_TOKENS: usize = 2048;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let number = |place: usize, default: usize| {
        arguments.get(place).map_or(default, |text| text.parse().expect("a whole number"))
    };
    let dir = || Path::new(&arguments[1]);
    match arguments.first().map(String::as_str) {
        Some("write") => write(dir(), number(2, 8), number(3, 2560), number(4, 32_768)),
        Some("read") => read(dir()),
        Some("resident") => resident(dir(), number(2, 8192), number(3, 512)),
        Some("streamed") => {
            let spill = match arguments.get(6).map(String::as_str) {
                Some("always") => Spill::Always,
                Some("never") => Spill::Never,
                _ => Spill::Auto,
            };
            let sweep = arguments.get(5).and_then(|text| text.parse().ok());
            streamed(dir(), number(2, 2048), number(3, 8192), number(4, 512), sweep, spill)
        }
        _ => {
            let folder = tempfile::tempdir().expect("a temporary folder");
            let dir = folder.path().join("teacher");
            write(&dir, 2, 640, 2048)?;
            read(&dir)?;
            resident(&dir, 1024, 128)?;
            streamed(&dir, 1024, 1024, 128, Some(512), Spill::Auto)
        }
    }
}

/// Scout's proportions at another width: 16 experts of 1.6 times the width, heads of 128.
fn scout(layers: usize, hidden: usize, vocab: usize) -> Llama4Config {
    Llama4Config {
        hidden_size: hidden,
        num_hidden_layers: layers,
        num_attention_heads: hidden / 128,
        num_key_value_heads: (hidden / 128 / 5).max(1),
        intermediate_size: hidden / 5 * 8,
        intermediate_size_mlp: hidden / 5 * 16,
        moe_layers: (0..layers).collect(),
        rotary_layers: (1..=layers).map(|layer| !layer.is_multiple_of(4)).collect(),
        vocab_size: vocab,
        max_position_embeddings: 8192,
        bos_token_id: None,
        eos_token_ids: vec![],
        ..shapes::scout()
    }
}

/// Writes a checkpoint of random weights, one tensor in memory at a time.
fn write(dir: &Path, layers: usize, hidden: usize, vocab: usize) -> Result<()> {
    let config = scout(layers, hidden, vocab);
    let json = config.to_json();
    let specs = tensors(&config.decoder(dir)?, &config);
    let mut fill = |name: &str| {
        let shape = &specs.iter().find(|spec| spec.name == name).expect("asked for by its name").shape;
        let seed = blake3::hash(name.as_bytes()).as_bytes()[..8].try_into().map(u64::from_le_bytes).expect("8 bytes");
        Ok(random(seed, shape))
    };
    CheckpointWriter::new(dir, &json, StoredDtype::Bf16).with_max_shard_bytes(4 << 30).write(&specs, &mut fill)?;
    let bytes = CheckpointReader::open(dir)?.byte_count();
    println!("{{\"bench\": \"write\", \"layers\": {layers}, \"hidden\": {hidden}, \"bytes\": {bytes}}}");
    Ok(())
}

fn tensors(decoder: &DecoderConfig, config: &Llama4Config) -> Vec<TensorSpec> {
    let (hidden, width, experts) = (config.hidden_size, config.intermediate_size, config.num_local_experts);
    let (query, key) =
        (decoder.heads.query_heads * decoder.heads.head_dim, decoder.heads.key_heads * decoder.heads.head_dim);
    let mut specs = vec![
        TensorSpec::new("model.embed_tokens.weight", vec![config.vocab_size, hidden]),
        TensorSpec::new("model.norm.weight", vec![hidden]),
        TensorSpec::new("lm_head.weight", vec![config.vocab_size, hidden]),
    ];
    for layer in 0..config.num_hidden_layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            specs.push(TensorSpec::new(format!("model.layers.{layer}.{name}"), shape));
        };
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        add("self_attn.q_proj.weight", vec![query, hidden]);
        add("self_attn.k_proj.weight", vec![key, hidden]);
        add("self_attn.v_proj.weight", vec![key, hidden]);
        add("self_attn.o_proj.weight", vec![hidden, query]);
        add("feed_forward.router.weight", vec![experts, hidden]);
        add("feed_forward.experts.gate_up_proj", vec![experts, hidden, 2 * width]);
        add("feed_forward.experts.down_proj", vec![experts, width, hidden]);
        add("feed_forward.shared_expert.gate_proj.weight", vec![width, hidden]);
        add("feed_forward.shared_expert.up_proj.weight", vec![width, hidden]);
        add("feed_forward.shared_expert.down_proj.weight", vec![hidden, width]);
    }
    specs
}

/// Norms are one; everything else is even noise of a size that keeps hidden states about as large as they are.
fn random(seed: u64, shape: &[usize]) -> Vec<f32> {
    if shape.len() == 1 {
        return vec![1.0; shape[0]];
    }
    let size = 1.7 / (shape[shape.len() - 1] as f32).sqrt();
    let count: usize = shape.iter().product();
    (0..count as u64)
        .into_par_iter()
        .map(|place| {
            // SplitMix64.
            let mut bits = seed.wrapping_add(place.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((bits ^ (bits >> 31)) as u32 as f32 / u32::MAX as f32 - 0.5) * 2.0 * size
        })
        .collect()
}

fn sequences(vocab: usize, tokens: usize, length: usize) -> Vec<PackedSequence> {
    let id = |place: usize| (place as u32).wrapping_mul(2_654_435_761) % vocab as u32;
    (0..tokens.div_ceil(length))
        .map(|number| PackedSequence {
            tokens: (0..=length).map(|t| id(number * 4099 + t)).collect(),
            segments: vec![0; length + 1],
        })
        .collect()
}

/// Loads every part of the model once, on one thread, and drops it; an expert's memory is the next one's.
fn read(dir: &Path) -> Result<()> {
    let reader = CheckpointReader::open(dir)?;
    let config = read_config(&dir.join("config.json"), reader.config())?;
    let (source, device, spare) = (CheckpointWeights::new(&reader), Device::flex(), Spare::default());
    let experts = CheckpointWeights::new(&reader).reusing(&spare);
    let all = || -> Result<()> {
        for (index, layer) in config.layers.iter().enumerate() {
            drop(RoutedLayer::load(&config, index, &source, &device)?);
            if let FeedForwardConfig::Experts { expert_count, .. } = layer.feed_forward {
                for expert in 0..expert_count {
                    Expert::load(&config, index, expert, &experts, &device)?.give_back(&spare);
                }
            }
        }
        drop(HeadBlock::load(&config, 0..config.vocab_size, &source, &device)?);
        Ok(())
    };
    let thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let (began, before) = (Instant::now(), reader.bytes_read());
    thread.install(all)?;
    let (bytes, seconds) = (reader.bytes_read() - before, began.elapsed().as_secs_f64());
    println!(
        "{{\"bench\": \"read\", \"bytes_read\": {bytes}, \"bytes_per_second\": {:.0}, \"processors\": {}, \
         \"peak_mib\": {}}}",
        bytes as f64 / seconds,
        rayon::current_num_threads(),
        peak_mib()
    );
    Ok(())
}

const SELECTION: Selection = Selection::TopK { k: 64 };

fn resident(dir: &Path, tokens: usize, length: usize) -> Result<()> {
    let teacher = ResidentTeacher::open(dir, &Device::flex(), SELECTION, &[1.0])?;
    let sequences = sequences(teacher.model().config.vocab_size, tokens, length);
    let (mut digest, began) = (blake3::Hasher::new(), Instant::now());
    for (number, batch) in sequences.chunks((BATCH_TOKENS / length).max(1)).enumerate() {
        let first = (number * (BATCH_TOKENS / length).max(1)) as u64;
        teacher.targets(batch, first)?.iter().for_each(|targets| note(&mut digest, targets));
    }
    let rate = (sequences.len() * length) as f64 / began.elapsed().as_secs_f64();
    println!(
        "{{\"bench\": \"resident\", \"tokens\": {}, \"sequence\": {length}, \"tokens_per_second\": {rate:.2}, \
         \"peak_mib\": {}, \"digest\": \"{}\"}}",
        sequences.len() * length,
        peak_mib(),
        &digest.finalize().to_hex()[..16]
    );
    Ok(())
}

fn streamed(
    dir: &Path,
    memory_mib: usize,
    tokens: usize,
    length: usize,
    sweep_tokens: Option<u64>,
    spill: Spill,
) -> Result<()> {
    let reader = Arc::new(CheckpointReader::open(dir)?);
    let config = read_config(&dir.join("config.json"), reader.config())?;
    let sequences = sequences(config.vocab_size, tokens, length);
    let memory = (memory_mib as u64) << 20;
    let settings = StreamSettings {
        memory,
        numbers: Numbers::F32,
        // As the program counts them: itself, and what grows beside the teacher.
        taken: vec![("the program", (resident_mib() << 20) + (32 << 20) + memory / 16)],
        batch_tokens: BATCH_TOKENS as u64,
        sweep_tokens,
        spill,
        spill_dir: std::env::temp_dir(),
    };
    let mut teacher = StreamedTeacher::new(config, reader, &Device::flex(), SELECTION, &[1.0], length, settings)?;
    let numbered: Vec<(u64, &PackedSequence)> = (0..).zip(&sequences).collect();
    let (mut digest, began) = (blake3::Hasher::new(), Instant::now());
    teacher.targets(&numbered, false, &AtomicBool::new(false), &mut |_, targets| {
        note(&mut digest, &targets);
        Ok(())
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let counts = teacher.counts();
    println!(
        "{{\"bench\": \"streamed\", \"memory_mib\": {memory_mib}, \"tokens\": {}, \"sequence\": {length}, \
         \"sweep\": {}, \"sweeps\": {}, \"spilled\": {}, \"tokens_per_second\": {:.2}, \"bytes_read\": {}, \
         \"experts_read\": {}, \"experts_left_out\": {}, \"peak_mib\": {}, \"digest\": \"{}\"}}",
        counts.tokens,
        teacher.sweep_sequences() * length,
        counts.sweeps,
        counts.spilled_sweeps > 0,
        counts.tokens as f64 / seconds,
        counts.bytes_read,
        counts.experts_read,
        counts.experts_left_out,
        peak_mib(),
        &digest.finalize().to_hex()[..16]
    );
    Ok(())
}

/// All bits of the targets, so that lines of two modes can be compared.
fn note(digest: &mut blake3::Hasher, targets: &limbeck::targets::SparseTargets) {
    for id in &targets.ids {
        digest.update(&id.to_le_bytes());
    }
    for capture in &targets.captures {
        let numbers = [&capture.log_probs, &capture.log_tail, &capture.label_log_prob];
        for number in numbers.into_iter().flatten() {
            digest.update(&number.to_le_bytes());
        }
    }
}

/// A line of what Linux says of this process, in MiB; 0 elsewhere.
fn status_mib(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = status.lines().find_map(|text| text.strip_prefix(line)?.split_whitespace().next()?.parse().ok());
    value.unwrap_or(0u64) >> 10
}

fn peak_mib() -> u64 {
    status_mib("VmHWM:")
}

fn resident_mib() -> u64 {
    status_mib("VmRSS:")
}
