//! Any change to a finished cache is found, named, and survived.

mod cache_samples;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Error as IoError, ErrorKind};
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cache_samples::*;
use limbeck::Error;
use limbeck::cache::*;
use limbeck::targets::TargetSource;

const TIP: &str = "copy it again from where it was made, or delete the cache directory and run \
                   `limbeck precompute-teacher-logits` again";

/// What opening a cache and reading all of it says.
fn read_all(directory: &Path) -> Result<(), Error> {
    let reader = CacheReader::open(directory)?;
    let numbers: Vec<u64> = (0..reader.sequence_count()).collect();
    reader.read(&numbers).map(drop)
}

/// A cache in memory, whose bytes a test changes.
#[derive(Clone)]
struct Memory(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl CacheFiles for Memory {
    fn length(&self, name: &str) -> std::io::Result<Option<u64>> {
        Ok(self.0.lock().unwrap().get(name).map(|bytes| bytes.len() as u64))
    }

    fn open(&self, name: &str) -> std::io::Result<Box<dyn ShardSource>> {
        let bytes = self.0.lock().unwrap().get(name).cloned();
        Ok(Box::new(bytes.ok_or(IoError::from(ErrorKind::NotFound))?))
    }
}

impl Memory {
    fn of(directory: &Path) -> Memory {
        Memory(Arc::new(Mutex::new(files(directory))))
    }

    fn names(&self) -> Vec<(String, usize)> {
        self.0.lock().unwrap().iter().map(|(name, bytes)| (name.clone(), bytes.len())).collect()
    }

    fn set(&self, name: &str, bytes: Vec<u8>) {
        self.0.lock().unwrap().insert(name.into(), bytes);
    }

    fn flip(&self, name: &str, bit: usize) {
        self.0.lock().unwrap().get_mut(name).unwrap()[bit / 8] ^= 1 << (bit % 8);
    }

    fn open_cache(&self) -> Result<CacheReader, Error> {
        CacheReader::open_from(Box::new(self.clone()), "memory")
    }
}

fn edit_manifest(directory: &Path, change: impl FnOnce(&str) -> String) {
    let path = directory.join(MANIFEST_FILE);
    let text = fs::read_to_string(&path).unwrap();
    let changed = change(&text);
    assert_ne!(text, changed, "the edit found nothing to change");
    fs::write(path, changed).unwrap();
}

#[test]
fn every_flipped_bit_is_found_and_its_file_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 1, &[1.0]), 2);
    every_flip_is_found(&Memory::of(folder.path()), 3);
    for (codec, count) in [(Codec::Packed, 3), (Codec::Compact, 4)] {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &CacheSettings { codec, ..settings(3, 1, &[1.0]) }, 2);
        every_flip_is_found(&Memory::of(folder.path()), count);
    }
}

fn every_flip_is_found(memory: &Memory, count: usize) {
    assert_eq!(memory.names().len(), count);
    for (name, length) in memory.names() {
        for bit in 0..length * 8 {
            memory.flip(&name, bit);
            let verified = memory.open_cache().and_then(|cache| cache.verify().into_result().map(drop));
            let error = verified.expect_err(&format!("bit {bit} of {name}")).to_string();
            assert!(error.contains(name.as_str()), "bit {bit} of {name}: {error}");
            // Nobody reads past it either.
            memory.open_cache().and_then(|cache| cache.read(&[0, 1])).expect_err(&name);
            memory.flip(&name, bit);
        }
    }
    memory.open_cache().unwrap().verify().into_result().unwrap();
}

#[test]
fn every_truncation_is_found_and_its_file_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 1, &[1.0]), 2);
    let memory = Memory::of(folder.path());
    for (name, bytes) in &files(folder.path()) {
        let mut longer = bytes.clone();
        longer.push(b'\n');
        for content in (0..bytes.len()).map(|length| &bytes[..length]).chain([&longer[..]]) {
            memory.set(name, content.to_vec());
            // Opening is enough: nobody may start to train on it.
            let error = memory.open_cache().map(drop).expect_err(name).to_string();
            assert!(error.contains(name.as_str()), "{name} of {} bytes: {error}", content.len());
        }
        memory.set(name, bytes.clone());
    }
    memory.open_cache().unwrap();
    // The same from a directory, for some lengths: there a file is mapped.
    for (name, bytes) in &files(folder.path()) {
        for length in (0..bytes.len()).step_by(101) {
            fs::write(folder.path().join(name), &bytes[..length]).unwrap();
            let error = CacheReader::open(folder.path()).map(drop).expect_err(name).to_string();
            assert!(error.contains(name.as_str()), "{name} of {length} bytes: {error}");
        }
        fs::write(folder.path().join(name), bytes).unwrap();
    }
}

/// A shard of some blocks: what is damaged is found by whoever touches it, and nobody else.
#[test]
fn a_damaged_block_is_named_and_the_sequences_outside_of_it_stay_readable() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(256, 200, &[1.0]), 210);
    let memory = Memory::of(folder.path());
    let cache = memory.open_cache().unwrap();
    let manifest = cache.manifest().clone();
    let intact: Vec<_> = (0..210).map(|number| cache.read(&[number]).unwrap()).collect();
    let name = manifest.shards[0].file.as_str();
    let length = manifest.shards[0].bytes as usize;
    let blocks = length.div_ceil(BLOCK_BYTES as usize + 32);
    assert!(blocks >= 20, "{blocks} blocks");
    let mut found = 0;
    for block in 0..blocks {
        let start = block * BLOCK_BYTES as usize;
        let end = (start + BLOCK_BYTES as usize).min(length - 32 * blocks);
        for place in [start, start + 1234, end - 1] {
            memory.flip(name, place * 8 + 3);
            let cache = memory.open_cache().unwrap();
            let damage = cache.verify().damage;
            assert_eq!(damage.len(), 1);
            let expected =
                format!("memory: shard {name}: block {block} (bytes {start} to {end}) is damaged: its list ");
            assert!(damage[0].to_string().starts_with(&expected), "{}", damage[0]);
            let mut refused = 0;
            for number in (0..210).step_by(5) {
                match cache.read(&[number]) {
                    Err(error) => {
                        assert!(number < 200 && error.to_string().starts_with(&expected), "{number}: {error}");
                        refused += 1;
                    }
                    Ok(batch) => assert_eq!(batch.targets, intact[number as usize].targets),
                }
            }
            // The first one has the header, which every sequence needs.
            assert!(block > 0 || refused == 40);
            found += usize::from(refused > 0 && refused < 40);
            memory.flip(name, place * 8 + 3);
        }
    }
    assert!(found >= 3 * 10, "{found}");
    for place in [length - 1, length - 32 * blocks] {
        memory.flip(name, place * 8);
        let error = memory.open_cache().unwrap().read(&[79]).unwrap_err().to_string();
        assert!(error.starts_with(&format!("memory: shard {name}: it is damaged: the manifest names the hash ")));
        memory.flip(name, place * 8);
    }
}

/// Bytes that are fetched, and not mapped, and counts how many.
struct Fetched(Vec<u8>, Arc<Mutex<u64>>);

impl ShardSource for Fetched {
    fn length(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, range: std::ops::Range<u64>) -> std::io::Result<std::borrow::Cow<'_, [u8]>> {
        *self.1.lock().unwrap() += range.end - range.start;
        self.0.read(range).map(|bytes| bytes.into_owned().into())
    }
}

struct Remote(BTreeMap<String, Vec<u8>>, Arc<Mutex<u64>>);

impl CacheFiles for Remote {
    fn length(&self, name: &str) -> std::io::Result<Option<u64>> {
        Ok(self.0.get(name).map(|bytes| bytes.len() as u64))
    }

    fn open(&self, name: &str) -> std::io::Result<Box<dyn ShardSource>> {
        let bytes = self.0.get(name).ok_or(IoError::from(ErrorKind::NotFound))?;
        Ok(Box::new(Fetched(bytes.clone(), self.1.clone())))
    }
}

#[test]
fn one_sequence_of_a_fetched_cache_costs_its_blocks_alone() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(256, 400, &[1.0]), 400);
    let local = CacheReader::open(folder.path()).unwrap();
    let fetched = Arc::new(Mutex::new(0));
    let remote = Remote(files(folder.path()), fetched.clone());
    let remote = CacheReader::open_from(Box::new(remote), "remote").unwrap();
    let length = local.manifest().shards[0].bytes;
    assert!(length > 20 * BLOCK_BYTES, "{length}");
    remote.read(&[0]).unwrap();
    *fetched.lock().unwrap() = 0;
    let batch = remote.read(&[300]).unwrap();
    assert_eq!(batch.targets, local.read(&[300]).unwrap().targets);
    // Seven tensors, each in one block or at the border of two.
    let cost = *fetched.lock().unwrap();
    assert!(cost <= 14 * BLOCK_BYTES, "{cost} of {length} bytes were fetched");
    remote.verify().into_result().unwrap();
}

#[test]
fn the_messages_say_what_is_wrong_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().display().to_string();
    let message = || read_all(folder.path()).unwrap_err().to_string();
    let manifest = write(folder.path(), &settings(3, 2, &[]), 5);
    let shard = folder.path().join("shards/00001.safetensors");
    let bytes = fs::read(&shard).unwrap();

    fs::write(&shard, &bytes[..bytes.len() - 1]).unwrap();
    let (short, full) = (bytes.len() - 1, bytes.len());
    assert_eq!(
        message(),
        format!("{cache}: shard shards/00001.safetensors: it has {short} bytes, and was sealed with {full}; {TIP}")
    );
    fs::remove_file(&shard).unwrap();
    assert_eq!(message(), format!("{cache}: shard shards/00001.safetensors: it is missing; {TIP}"));

    // In the list of hashes, which the manifest vouches for.
    let mut flipped = bytes.clone();
    flipped[full - 1] ^= 1;
    fs::write(&shard, &flipped).unwrap();
    let hash = blake3::hash(&flipped[full - 32..]).to_hex();
    assert_eq!(
        message(),
        format!(
            "{cache}: shard shards/00001.safetensors: it is damaged: the manifest names the hash {}..., its bytes have \
             {}...; {TIP}",
            &manifest.shards[1].blake3[..16],
            &hash[..16]
        )
    );

    // In the only block, which the list vouches for.
    let mut flipped = bytes.clone();
    flipped[full - 33] ^= 1;
    fs::write(&shard, &flipped).unwrap();
    let listed = blake3::hash(&bytes[..full - 32]).to_hex();
    let hash = blake3::hash(&flipped[..full - 32]).to_hex();
    assert_eq!(
        message(),
        format!(
            "{cache}: shard shards/00001.safetensors: block 0 (bytes 0 to {}) is damaged: its list names the hash {}..., the \
             bytes have {}...; {TIP}",
            full - 32,
            &listed[..16],
            &hash[..16]
        )
    );

    // The length of both is the same, so that only the hash can tell them apart.
    let other = fs::read(folder.path().join("shards/00000.safetensors")).unwrap();
    assert_eq!(other.len(), full);
    fs::write(&shard, &other).unwrap();
    assert_eq!(
        message(),
        format!(
            "{cache}: shard shards/00001.safetensors: it holds the content of shards/00000.safetensors: the files were \
             swapped; {TIP}"
        )
    );
    fs::write(folder.path().join("shards/00000.safetensors"), &bytes).unwrap();
    let damage = CacheReader::open(folder.path()).unwrap().verify().damage;
    assert_eq!(damage.len(), 2, "both swapped shards are named");
}

#[test]
fn a_damaged_shard_does_not_keep_the_others_from_being_read() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 2, &[1.0]), 5);
    let path = folder.path().join("shards/00001.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x80;
    fs::write(&path, bytes).unwrap();
    let reader = CacheReader::open(folder.path()).unwrap();
    reader.read(&[0, 1, 4]).unwrap();
    for number in [2, 3, 2] {
        assert!(reader.read(&[number]).unwrap_err().to_string().contains("shards/00001.safetensors"));
    }
    reader.verify_shard(0).unwrap();
    reader.verify_shard(1).unwrap_err();
    let outside = reader.verify_shard(3).unwrap_err().to_string();
    assert_eq!(outside, "shard 3 of a cache of 3 shards; shards are numbered from 0");
}

#[test]
fn an_edited_manifest_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 2, &[1.0]), 3);
    let intact = files(folder.path());
    for (from, to) in [("\"k\": 4", "\"k\": 5"), ("Scout", "Mouse"), ("\"train\"", "\"held_out\""), ("\n  ", "\n   ")] {
        edit_manifest(folder.path(), |text| text.replacen(from, to, 1));
        let error = read_all(folder.path()).unwrap_err().to_string();
        assert!(error.contains("manifest.json: it was edited or damaged: it names the root "), "{error}");
        assert!(error.ends_with(TIP), "{error}");
        restore(folder.path(), &intact);
    }
}

#[test]
fn an_edited_manifest_with_a_root_that_agrees_must_still_make_sense() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 2, &[1.0]), 3);
    let intact = files(folder.path());
    for (from, to, expected) in [
        ("\"k\": 4", "\"k\": 51", "the selection top_k has a k that is 51, but the teacher's vocabulary has 50 tokens"),
        ("\"k\": 4", "\"l\": 4", "it is not a manifest of format version 2: unknown field `l`"),
        ("\"split\"", "\"spilt\"", "it is not a manifest of format version 2: unknown field `spilt`"),
        ("\"raw\"", "\"cooked\"", "it is not a manifest of format version 2: unknown variant `cooked`"),
        ("\"sequences\": 3", "\"sequences\": 4", "its counts are not the sum of its shards' counts"),
        ("\"first_sequence\": 2", "\"first_sequence\": 1", "`shards/00001.safetensors` starts with sequence 1, not 2"),
        ("shards/00001", "../../00001", "shard 1 is called `../../00001.safetensors`, not `shards/00001.safetensors`"),
        (
            "\"sequences_per_shard\": 2",
            "\"sequences_per_shard\": 3",
            "`shards/00000.safetensors` holds 2 sequences, not 3",
        ),
        ("\"seq_len\": 3", "\"seq_len\": 18446744073709551615", "the cache setting `seq_len` is 18446744073709551615"),
        (
            "limbeck soft-target cache",
            "another thing",
            "its format is `another thing`, not `limbeck soft-target cache`",
        ),
        (
            "\"format_version\": 2",
            "\"format_version\": 3",
            "the cache is of format version 3, this program reads 1 and 2; read it with the limbeck that wrote it, or",
        ),
        (
            "\"coder\": null",
            "\"coder\": { \"file\": \"coder.safetensors\", \"bytes\": 1, \"blake3\": \"\" }",
            "it names `coder.safetensors`, but its codec `raw` has none",
        ),
        (
            "\"error\": null",
            "\"error\": { \"rows\": 1, \"kl_sum\": 0.0, \"kl_max\": 0.0, \"squared_error\": 0.0, \"squared_norm\": 0.0, \
             \"tail_max\": 0.0, \"label_max\": 0.0 }",
            "its error is not the sum of its shards' errors",
        ),
    ] {
        edit_manifest(folder.path(), |text| reseal(&text.replacen(from, to, 1)));
        let error = read_all(folder.path()).unwrap_err().to_string();
        assert!(error.contains("manifest.json: ") && error.contains(expected), "{error}");
        restore(folder.path(), &intact);
    }
    // The settings make sense, but are not those of the shards.
    for (from, to, expected) in [
        ("\"seq_len\": 3", "\"seq_len\": 4", "tensor `offsets` is U64 [7], the manifest implies U64 [9]"),
        ("1.0\n", "1.0,\n        2.0\n", "tensor `log_probs.1` is missing"),
        ("\"format_version\": 2", "\"format_version\": 1", "it is damaged: the manifest names the hash "),
        ("\"vocab_size\": 50", "\"vocab_size\": 5", "outside the vocabulary of 5"),
    ] {
        edit_manifest(folder.path(), |text| reseal(&text.replacen(from, to, 1)));
        let error = read_all(folder.path()).unwrap_err().to_string();
        assert!(error.contains("shard shards/00000.safetensors: ") && error.contains(expected), "{error}");
        restore(folder.path(), &intact);
    }
}

/// The hash keeps accidents out; this is about shards whose hash was made to agree.
#[test]
fn a_forged_shard_is_an_error_or_readable_and_never_a_panic() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = write(folder.path(), &settings(3, 2, &[1.0]), 2);
    let bytes = fs::read(folder.path().join("shards/00000.safetensors")).unwrap();
    let text = fs::read_to_string(folder.path().join(MANIFEST_FILE)).unwrap();
    let memory = Memory::of(folder.path());
    let forge = |data: &[u8]| {
        let list: Vec<u8> =
            data.chunks(BLOCK_BYTES as usize).flat_map(|block| *blake3::hash(block).as_bytes()).collect();
        let content = [data, &list].concat();
        memory.set("shards/00000.safetensors", content.clone());
        let text = text.replace(&manifest.shards[0].blake3, blake3::hash(&list).to_hex().as_str());
        let text = text.replace(&format!("\"bytes\": {}", bytes.len()), &format!("\"bytes\": {}", content.len()));
        memory.set(MANIFEST_FILE, reseal(&text).into_bytes());
        catch_unwind(|| {
            let cache = memory.open_cache()?;
            let numbers: Vec<u64> = (0..cache.sequence_count()).collect();
            cache.read(&numbers)?;
            cache.verify().into_result().map(drop)
        })
        .expect("reading panicked")
    };
    let data = &bytes[..bytes.len() - 32];
    forge(data).unwrap();
    let mut refused = 0;
    for bit in 0..data.len() * 8 {
        let mut content = data.to_vec();
        content[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(forge(&content).is_err());
    }
    assert!(refused > 1000, "almost no forged header or offset was refused ({refused})");
    for length in (0..data.len()).step_by(5) {
        forge(&data[..length]).unwrap_err();
    }
    // Headers that promise absurd sizes.
    for header in [
        r#"{"tokens":{"dtype":"U32","shape":[18446744073709551615,4],"data_offsets":[0,4]}}"#,
        r#"{"tokens":{"dtype":"U32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551612]}}"#,
        // Eight tensors that together end just below 2^64.
        &format!(
            "{{{}}}",
            (0..8u64)
                .map(|i| {
                    let size = (1u64 << 61) - 1;
                    let (from, to) = (size * i, size * (i + 1));
                    format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{from},{to}]}}"#)
                })
                .chain([r#""__metadata__":{}"#.to_string()])
                .collect::<Vec<_>>()
                .join(",")
        ),
        "not json",
    ] {
        let mut content = (header.len() as u64).to_le_bytes().to_vec();
        content.extend_from_slice(header.as_bytes());
        forge(&content).unwrap_err();
    }
    let error = forge(&[0xff; 64]).unwrap_err().to_string();
    assert!(error.contains("shard shards/00000.safetensors: its header is longer than the file"), "{error}");
}

#[test]
fn what_is_not_a_finished_cache_says_what_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cache");
    let message = || CacheReader::open(&path).map(drop).unwrap_err().to_string();
    let nothing = format!(
        "{}: there is no cache here (no manifest.json); check the path, or run `limbeck precompute-teacher-logits` to make \
         one",
        path.display()
    );
    assert_eq!(message(), nothing);
    let settings = settings(3, 2, &[1.0]);
    let mut writer = open(&path, &settings);
    for number in 0..3 {
        let (sequence, targets, text_bytes) = sample(&settings, number);
        writer.push(sequence, targets, text_bytes).unwrap();
    }
    assert!(is_unfinished(&path));
    assert_eq!(
        message(),
        format!(
            "{}: this cache is unfinished; run `limbeck precompute-teacher-logits` again with the same recipe; it \
             continues where it stopped",
            path.display()
        )
    );
    writer.finish().unwrap();
    assert!(!is_unfinished(&path));
    read_all(&path).unwrap();
}

#[test]
fn verification_reports_its_speed() {
    let folder = tempfile::tempdir().unwrap();
    let manifest = write(folder.path(), &settings(3, 2, &[1.0]), 5);
    let verification = CacheReader::open(folder.path()).unwrap().verify().into_result().unwrap();
    assert_eq!(verification.shards, 3);
    assert_eq!(verification.bytes, manifest.shards.iter().map(|shard| shard.bytes).sum::<u64>());
    assert!(verification.megabytes_per_second() > 0.0);
}
