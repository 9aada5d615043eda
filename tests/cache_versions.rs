//! Caches that earlier programs wrote stay readable: the ones in `tests/fixtures/` were written by each version's own.

mod cache_samples;

use std::fs;
use std::path::{Path, PathBuf};

use cache_samples::*;
use limbeck::cache::*;
use limbeck::targets::TargetSource;

/// The caches of each version, with the settings and the number of sequences they were written with.
fn caches() -> [(&'static str, CacheSettings, u64); 2] {
    [("soft", settings(4, 2, &[1.0, 2.0]), 5), ("tokens", settings(4, 3, &[]), 4)]
}

fn fixture(version: u32, name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/cache_v{version}/{name}"))
}

#[test]
fn every_version_reads_back_what_it_was_made_of() {
    for (name, settings, count) in caches() {
        let mut roots = vec![];
        for version in OLDEST_VERSION..=FORMAT_VERSION {
            let cache = CacheReader::open(fixture(version, name)).unwrap();
            let manifest = cache.manifest();
            assert_eq!((manifest.format_version, &manifest.settings), (version, &settings));
            assert_eq!((cache.sequence_count(), manifest.coder.is_some(), manifest.error), (count, false, None));
            cache.verify().into_result().unwrap();
            cache.summary().unwrap();
            for number in (0..count).rev() {
                let (sequence, targets, _) = sample(&settings, number);
                let batch = cache.read(&[number]).unwrap();
                assert_eq!(batch.sequences, [sequence]);
                match (&batch.targets, &targets) {
                    (Some(read), Some(written)) => assert_same_bits(read, written),
                    (read, written) => assert_eq!(read, written),
                }
            }
            roots.push(manifest.root.clone());
        }
        roots.dedup();
        assert_eq!(roots.len() as u32, FORMAT_VERSION, "each has a root of its own");
    }
}

#[test]
fn the_newest_version_is_written_as_it_always_was() {
    for (name, settings, count) in caches() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &settings, count);
        let (mut now, mut then) = (files(folder.path()), files(&fixture(FORMAT_VERSION, name)));
        // The manifest names the program, which has versions of its own.
        let manifest = |files: &mut std::collections::BTreeMap<String, Vec<u8>>| {
            let text = String::from_utf8(files.remove(MANIFEST_FILE).unwrap()).unwrap();
            let lines = text.lines().filter(|line| !line.contains("\"program\"") && !line.contains("\"root\""));
            lines.map(String::from).collect::<Vec<_>>()
        };
        assert_eq!(manifest(&mut now), manifest(&mut then));
        assert!(now == then, "{name}: the shards differ");
    }
}

#[test]
fn a_finished_cache_of_version_1_is_finished_for_writers_too() {
    let folder = tempfile::tempdir().unwrap();
    let (name, settings, count) = &caches()[0];
    restore(folder.path(), &files(&fixture(1, name)));
    let mut writer = open(folder.path(), settings);
    assert!(writer.is_finished());
    assert_eq!(writer.next_push().unwrap(), Next::Done);
    assert_eq!(writer.finish().unwrap().counts.sequences, *count);
    assert_eq!(files(folder.path()), files(&fixture(1, name)), "it stays as it was");
}

#[test]
fn damage_in_a_cache_of_version_1_is_found_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let intact = files(&fixture(1, "soft"));
    restore(folder.path(), &intact);
    let verified = || CacheReader::open(folder.path()).and_then(|cache| cache.verify().into_result().map(drop));
    for (name, bytes) in &intact {
        let path = folder.path().join(name);
        for bit in (0..bytes.len() * 8).step_by(17) {
            let mut changed = bytes.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, changed).unwrap();
            let error = verified().expect_err(name).to_string();
            assert!(error.contains(name.as_str()), "bit {bit} of {name}: {error}");
        }
        for length in (0..bytes.len()).step_by(13) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(verified().unwrap_err().to_string().contains(name.as_str()));
        }
        fs::write(&path, bytes).unwrap();
    }
    let (first, second) = ("shards/00000.safetensors", "shards/00001.safetensors");
    if intact[first].len() == intact[second].len() {
        fs::write(folder.path().join(first), &intact[second]).unwrap();
        assert!(verified().unwrap_err().to_string().contains("the files were swapped"));
    }
}

#[test]
fn an_unfinished_cache_of_version_1_is_left_to_the_program_that_began_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("progress.log"), "something").unwrap();
    assert!(is_unfinished(folder.path()));
    let settings = &caches()[0].1;
    let error = CacheWriter::create_or_resume(folder.path(), settings.clone(), WriterPart::WHOLE).unwrap_err();
    let directory = folder.path().display();
    assert_eq!(
        error.to_string(),
        format!(
            "{directory}/progress.log: it belongs to an unfinished cache of format version 1; finish it with the limbeck \
             that began it, or delete {directory} to start afresh"
        )
    );
}
