//! Any change to a finished cache is found, named, and survived.

mod cache_samples;

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::panic::catch_unwind;
use std::path::Path;

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

/// What opening a cache and verifying it says.
fn verify_all(directory: &Path) -> Result<(), Error> {
    CacheReader::open(directory)?.verify().into_result().map(drop)
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
    let intact = files(folder.path());
    assert_eq!(intact.len(), 3);
    for (name, bytes) in &intact {
        let path = folder.path().join(name);
        let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut put = |place: usize, byte: u8| {
            file.seek(SeekFrom::Start(place as u64)).unwrap();
            file.write_all(&[byte]).unwrap();
        };
        for bit in 0..bytes.len() * 8 {
            put(bit / 8, bytes[bit / 8] ^ (1 << (bit % 8)));
            let error = verify_all(folder.path()).expect_err(&format!("bit {bit} of {name}")).to_string();
            assert!(error.contains(name.as_str()), "bit {bit} of {name}: {error}");
            put(bit / 8, bytes[bit / 8]);
        }
    }
    verify_all(folder.path()).unwrap();
}

#[test]
fn every_truncation_is_found_and_its_file_named() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &settings(3, 1, &[1.0]), 2);
    for (name, bytes) in &files(folder.path()) {
        let path = folder.path().join(name);
        let mut longer = bytes.clone();
        longer.push(b'\n');
        for content in (0..bytes.len()).map(|length| &bytes[..length]).chain([&longer[..]]) {
            fs::write(&path, content).unwrap();
            // Opening is enough: nobody may start to train on it.
            let error = CacheReader::open(folder.path()).map(drop).expect_err(name).to_string();
            assert!(error.contains(name.as_str()), "{name} of {} bytes: {error}", content.len());
        }
        fs::write(&path, bytes).unwrap();
    }
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

    let mut flipped = bytes.clone();
    flipped[full - 1] ^= 1;
    fs::write(&shard, &flipped).unwrap();
    let hash = blake3::hash(&flipped).to_hex();
    assert_eq!(
        message(),
        format!(
            "{cache}: shard shards/00001.safetensors: it is damaged: the manifest names the hash {}..., its bytes have \
             {}...; {TIP}",
            &manifest.shards[1].blake3[..16],
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
        ("\"k\": 4", "\"l\": 4", "it is not a manifest of format version 1: unknown field `l`"),
        ("\"split\"", "\"spilt\"", "it is not a manifest of format version 1: unknown field `spilt`"),
        ("\"raw\"", "\"cooked\"", "it is not a manifest of format version 1: unknown variant `cooked`"),
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
            "\"format_version\": 1",
            "\"format_version\": 2",
            "the cache is of format version 2, this program reads version 1; read it with the limbeck that wrote it, or",
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
    let path = folder.path().join("shards/00000.safetensors");
    let bytes = fs::read(&path).unwrap();
    let text = fs::read_to_string(folder.path().join(MANIFEST_FILE)).unwrap();
    let forge = |content: &[u8]| {
        fs::write(&path, content).unwrap();
        let text = text.replace(&manifest.shards[0].blake3, blake3::hash(content).to_hex().as_str());
        let text = text.replace(&format!("\"bytes\": {}", bytes.len()), &format!("\"bytes\": {}", content.len()));
        fs::write(folder.path().join(MANIFEST_FILE), reseal(&text)).unwrap();
        catch_unwind(|| read_all(folder.path())).expect("reading panicked")
    };
    forge(&bytes).unwrap();
    let mut refused = 0;
    for bit in 0..bytes.len() * 8 {
        let mut content = bytes.clone();
        content[bit / 8] ^= 1 << (bit % 8);
        refused += usize::from(forge(&content).is_err());
    }
    assert!(refused > 1000, "almost no forged header or offset was refused ({refused})");
    for length in (0..bytes.len()).step_by(5) {
        forge(&bytes[..length]).unwrap_err();
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
    let mut writer = CacheWriter::create_or_resume(&path, settings.clone()).unwrap();
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
