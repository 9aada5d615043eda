//! What reading a cache costs on one core: verification, decoding, and finding one sequence among few and many.
//!
//! `cargo bench --bench cache`, or `cargo bench --bench cache -- CACHE_DIR...` to read caches that are there, as they are:
//! what a made-up cache keeps is as good as random, and says nothing of how fast `compact` is on text. The numbers are of a warm page cache: they measure this program and not a disk.

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use limbeck::cache::*;
use limbeck::targets::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 49_152;
const KEPT: usize = 24;
const REPEATS: usize = 7;
const TIMED_BATCHES: usize = 32;
const BATCH_REPEATS: usize = 50;

fn settings(seq_len: usize, sequences_per_shard: usize, codec: Codec, has_targets: bool) -> CacheSettings {
    CacheSettings {
        split: "train".into(),
        data_fingerprint: "bench".into(),
        tokenizer: TokenizerIdentity { fingerprint: "bench".into(), vocab_size: VOCAB },
        seq_len,
        sequences_per_shard,
        codec,
        levels: None,
        log_normalizer: None,
        soft_targets: has_targets.then(|| SoftTargetSettings {
            teacher: TeacherIdentity {
                name: "bench".into(),
                fingerprint: "bench".into(),
                dtype: "f32".into(),
                in_training: None,
            },
            selection: Selection::TopK { k: KEPT },
            temperatures: vec![1.0],
            router: None,
        }),
    }
}

/// Sequences of one document, each row with [`KEPT`] ids.
fn write(directory: &Path, settings: CacheSettings, count: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let length = settings.seq_len;
    let has_targets = settings.soft_targets.is_some();
    let mut writer = CacheWriter::create_or_resume(directory, settings, WriterPart::WHOLE).unwrap();
    for _ in 0..count {
        let tokens = (0..=length).map(|_| random.random_range(0..VOCAB as u32)).collect();
        let sequence = PackedSequence { tokens, segments: vec![0; length + 1] };
        let targets = has_targets.then(|| {
            let mut targets = SparseTargets::empty(&[1.0]);
            for _ in 0..length {
                let first = random.random_range(0..VOCAB as u32);
                // No id twice: the step has no factor in common with the vocabulary.
                targets.ids.extend((0..KEPT as u32).map(|i| (first + 1013 * i) % VOCAB as u32));
                targets.offsets.push(targets.ids.len() as u64);
                let capture = &mut targets.captures[0];
                capture.log_probs.extend((0..KEPT).map(|i| -0.5 - 0.3 * i as f32));
                capture.log_tail.push(-3.0);
                capture.label_log_prob.push(-2.0);
            }
            targets
        });
        writer.push(sequence, targets, length as u64).unwrap();
    }
    writer.finish().unwrap();
}

/// The shortest of some runs, and what was run.
fn best<T>(mut run: impl FnMut() -> T) -> (Duration, T) {
    let mut shortest: Option<(Duration, T)> = None;
    for _ in 0..REPEATS {
        let started = Instant::now();
        let made = run();
        let elapsed = started.elapsed();
        if shortest.as_ref().is_none_or(|(before, _)| elapsed < *before) {
            shortest = Some((elapsed, made));
        }
    }
    shortest.expect("at least one run")
}

fn verify_and_decode(directory: &Path) {
    let cache = CacheReader::open(directory).unwrap();
    let manifest = cache.manifest();
    let (name, count) = (manifest.settings.codec.name(), manifest.counts.sequences);
    let bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
    let tokens = (count * manifest.settings.seq_len as u64) as f64;
    let kept = manifest.counts.kept_ids as f64 / tokens;
    let one_core = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (elapsed, _) = best(|| one_core.install(|| cache.verify().into_result().unwrap()));
    let seconds = elapsed.as_secs_f64();
    println!(
        "{name}: verify {:.2} GB/s, {:.2} M tokens/s per core ({bytes} bytes)",
        bytes as f64 / 1e9 / seconds,
        tokens / 1e6 / seconds
    );
    // Each batch by itself and often, for the sum of the shortest times: other work on the machine is then left out.
    let batches: Vec<Vec<u64>> =
        (0..count).collect::<Vec<_>>().chunks(8).take(TIMED_BATCHES).map(<[u64]>::to_vec).collect();
    let mut shortest = vec![Duration::MAX; batches.len()];
    for _ in 0..BATCH_REPEATS {
        for (batch, shortest) in batches.iter().zip(&mut shortest) {
            let started = Instant::now();
            black_box(cache.read(batch).unwrap());
            *shortest = started.elapsed().min(*shortest);
        }
    }
    let tokens = batches.iter().map(|batch| batch.len() * manifest.settings.seq_len).sum::<usize>() as f64;
    let rate = tokens / 1e6 / shortest.iter().sum::<Duration>().as_secs_f64();
    println!("{name}: decode {rate:.2} M tokens/s per core, {kept:.1} ids kept per token");
}

fn made_up(codec: Codec) {
    let folder = tempfile::tempdir().unwrap();
    let (length, count) = (512, 2048);
    let started = Instant::now();
    write(folder.path(), settings(length, 128, codec, true), count);
    let rate = (count * length as u64) as f64 / 1e6 / started.elapsed().as_secs_f64();
    println!("{}: make up and write {rate:.2} M tokens/s", codec.name());
    verify_and_decode(folder.path());
}

fn find(count: u64) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), settings(8, 10_000, Codec::Raw, false), count);
    let (opening, cache) = best(|| CacheReader::open(folder.path()).unwrap());
    let (first, _) = best(|| CacheReader::open(folder.path()).unwrap().read(&[count / 2]).unwrap());
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let numbers: Vec<u64> = (0..10_000).map(|_| random.random_range(0..count)).collect();
    let (elapsed, _) = best(|| numbers.iter().for_each(|number| drop(black_box(cache.read(&[*number]).unwrap()))));
    println!(
        "{count} sequences in {} shards: open {:.0} us, open and read one {:.0} us, read one {:.2} us",
        cache.manifest().shards.len(),
        opening.as_secs_f64() * 1e6,
        first.as_secs_f64() * 1e6,
        elapsed.as_secs_f64() * 1e6 / numbers.len() as f64
    );
}

fn main() {
    let directories: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    if !directories.is_empty() {
        directories.iter().for_each(|directory| verify_and_decode(Path::new(directory)));
        return;
    }
    made_up(Codec::Raw);
    made_up(Codec::Packed);
    made_up(Codec::Compact);
    find(100);
    find(1_000_000);
}
