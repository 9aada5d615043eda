//! Made-up sequences and targets that any cache may hold, the same for the same number. Shared by the cache tests.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use limbeck::Result;
use limbeck::cache::*;
use limbeck::targets::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Settings with the captures at `temperatures`, of tokens only without any.
pub fn settings(seq_len: usize, sequences_per_shard: usize, temperatures: &[f32]) -> CacheSettings {
    CacheSettings {
        split: "train".into(),
        data_fingerprint: "data-0123456789abcdef".into(),
        tokenizer: TokenizerIdentity { fingerprint: "tokenizer-0123456789abcdef".into(), vocab_size: 50 },
        seq_len,
        sequences_per_shard,
        codec: Codec::Raw,
        levels: None,
        log_normalizer: None,
        soft_targets: (!temperatures.is_empty()).then(|| SoftTargetSettings {
            teacher: TeacherIdentity {
                name: "Scout".into(),
                fingerprint: "teacher-0123456789abcdef".into(),
                dtype: "bf16".into(),
                in_training: None,
            },
            selection: Selection::TopK { k: 4 },
            temperatures: temperatures.to_vec(),
            router: None,
        }),
    }
}

/// Sequence `number`: some documents, sometimes padding, rows with 0 to k kept ids, tails down to nothing.
pub fn sample(settings: &CacheSettings, number: u64) -> (PackedSequence, Option<SparseTargets>, u64) {
    let mut random = ChaCha8Rng::seed_from_u64(number);
    let vocab_size = settings.tokenizer.vocab_size as u32;
    let places = settings.seq_len + 1;
    let padding_from = if random.random_bool(0.2) { random.random_range(0..places) } else { places };
    let mut segment = 0;
    let segments = (0..places).map(|place| {
        segment += u32::from(random.random_bool(0.15));
        if place < padding_from { segment } else { PADDING }
    });
    let segments: Vec<u32> = segments.collect();
    let tokens = (0..places).map(|_| random.random_range(0..vocab_size)).collect();
    let sequence = PackedSequence { tokens, segments };
    let Some(soft_targets) = &settings.soft_targets else { return (sequence, None, number) };
    let k = soft_targets.selection.most_ids();
    let mut targets = SparseTargets::empty(&soft_targets.temperatures);
    for row in 0..settings.seq_len {
        let valid = sequence.is_valid(row);
        let kept = if valid { random.random_range(0..=k) } else { 0 };
        let first = random.random_range(0..vocab_size);
        // 7 has no factor in common with the 50 tokens, so that no id comes twice.
        targets.ids.extend((0..kept as u32).map(|i| (first + 7 * i) % vocab_size));
        targets.offsets.push(targets.ids.len() as u64);
        for capture in &mut targets.captures {
            let mut log_probs: Vec<f32> = (0..kept).map(|_| -random.random_range(0.0..20.0f32)).collect();
            log_probs.sort_by(|left, right| right.total_cmp(left));
            capture.log_probs.extend(log_probs);
            let tail = if random.random_bool(0.2) { f32::NEG_INFINITY } else { -random.random_range(0.0..30.0f32) };
            capture.log_tail.push(if valid { tail } else { 0.0 });
            capture.label_log_prob.push(if valid { -random.random_range(0.0..9.0f32) } else { 0.0 });
        }
    }
    (sequence, Some(targets), number)
}

/// Exact targets of one capture.
pub fn exact(offsets: Vec<u64>, ids: Vec<u32>, capture: Capture) -> SparseTargets {
    SparseTargets { offsets, ids, captures: vec![capture], kind: TargetKind::Exact, log_normalizer: None, router: None }
}

/// Opens a cache to write all of it.
pub fn open(directory: &Path, settings: &CacheSettings) -> CacheWriter {
    CacheWriter::create_or_resume(directory, settings.clone(), WriterPart::WHOLE).unwrap()
}

/// Pushes the samples that the writer asks for, of data with `count` sequences.
pub fn fill(writer: &mut CacheWriter, count: u64) -> Result<()> {
    loop {
        match writer.next_push()? {
            Next::Sequence(number) if number < count => {
                let (sequence, targets, text_bytes) = sample(writer.settings(), number);
                writer.push(sequence, targets, text_bytes)?;
            }
            Next::Sequence(_) => writer.end(count)?,
            Next::Wait => std::thread::sleep(std::time::Duration::from_millis(1)),
            Next::Done => return Ok(()),
        }
    }
}

/// Pushes the samples that are still missing, up to `count`, and finishes.
pub fn write(directory: &Path, settings: &CacheSettings, count: u64) -> Manifest {
    let mut writer = open(directory, settings);
    fill(&mut writer, count).unwrap();
    writer.finish().unwrap()
}

/// Every file below a directory, by its relative name.
pub fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, fs::read(&path).unwrap());
        }
    }
    found
}

/// Makes a directory hold exactly these files.
pub fn restore(directory: &Path, files: &BTreeMap<String, Vec<u8>>) {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory).unwrap();
    for (name, bytes) in files {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Gives an edited manifest a root that agrees with it, as a careful forger would.
pub fn reseal(manifest: &str) -> String {
    let before = &manifest[..manifest.len() - 68];
    format!("{before}{}\"\n}}\n", blake3::hash(before.as_bytes()).to_hex())
}

/// Asserts that two sets of rows are equal in every bit (-0.0 is not 0.0).
pub fn assert_same_bits(left: &SparseTargets, right: &SparseTargets) {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_eq!((&left.offsets, &left.ids, left.kind), (&right.offsets, &right.ids, right.kind));
    assert_eq!(left.log_normalizer.as_deref().map(bits), right.log_normalizer.as_deref().map(bits));
    assert_eq!(left.captures.len(), right.captures.len());
    for (left, right) in left.captures.iter().zip(&right.captures) {
        assert_eq!(left.temperature.to_bits(), right.temperature.to_bits());
        assert_eq!(bits(&left.log_probs), bits(&right.log_probs));
        assert_eq!(bits(&left.log_tail), bits(&right.log_tail));
        assert_eq!(bits(&left.label_log_prob), bits(&right.label_log_prob));
    }
}
