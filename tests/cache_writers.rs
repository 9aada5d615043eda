//! Several writers make the cache that one makes: beside each other in one directory, or apart and merged.

mod cache_samples;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cache_samples::*;
use limbeck::cache::*;

const COUNT: u64 = 23;

fn small() -> CacheSettings {
    settings(4, 2, &[1.0, 2.0])
}

fn alone() -> BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &small(), COUNT);
    files(folder.path())
}

fn part(directory: &Path, index: u64, count: u64) -> limbeck::Result<CacheWriter> {
    CacheWriter::create_or_resume(directory, small(), WriterPart::new(index, count).unwrap())
}

/// One step of a writer: a push, or the end. Whether anything is left to do.
fn step(writer: &mut CacheWriter, count: u64) -> bool {
    match writer.next_push().unwrap() {
        Next::Sequence(number) if number < count => {
            let (sequence, targets, text_bytes) = sample(writer.settings(), number);
            writer.push(sequence, targets, text_bytes).unwrap();
            true
        }
        Next::Sequence(_) => {
            writer.end(count).unwrap();
            true
        }
        Next::Wait => true,
        Next::Done => false,
    }
}

#[test]
fn writers_in_turn_give_the_bytes_of_one() {
    let expected = alone();
    for count in [1, 2, 3, 7, 20] {
        let folder = tempfile::tempdir().unwrap();
        let mut writers: Vec<_> = (0..count).map(|index| part(folder.path(), index, count).unwrap()).collect();
        let mut turn = 0;
        let mut outcomes = vec![];
        while !writers.is_empty() {
            turn = (turn + 5) % writers.len();
            if step(&mut writers[turn], COUNT) {
                continue;
            }
            outcomes.push(writers.remove(turn).finish_part().unwrap());
        }
        assert_eq!(outcomes.len() as u64, count);
        for outcome in &outcomes {
            match outcome {
                Outcome::Finished(manifest) => assert_eq!(manifest.counts.sequences, COUNT),
                Outcome::Missing(missing) => assert!(!missing.shards.is_empty(), "{missing:?}"),
            }
        }
        assert!(matches!(outcomes.last(), Some(Outcome::Finished(_))), "the last of {count} finishes the cache");
        assert!(files(folder.path()) == expected, "{count} writers");
    }
}

#[test]
fn a_part_says_what_others_have_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = part(folder.path(), 1, 3).unwrap();
    fill(&mut writer, COUNT).unwrap();
    let Outcome::Missing(missing) = writer.finish_part().unwrap() else { panic!("it is not finished") };
    assert_eq!((missing.total, missing.shards.len()), (Some(12), 8));
    assert_eq!(missing.to_string(), "8 of 12 shards are missing (0, 2, 3, ...)");
    // One writer without a part fills all that is missing, and writes nothing again.
    let sealed = files(folder.path())["shards/00001.safetensors"].clone();
    let mut writer = open(folder.path(), &small());
    let mut asked = vec![];
    while let Next::Sequence(number) = writer.next_push().unwrap() {
        asked.push(number);
        assert!(step(&mut writer, COUNT));
    }
    assert!(asked.starts_with(&[0, 1, 4, 5, 6, 7, 10]), "{asked:?}");
    writer.finish().unwrap();
    let found = files(folder.path());
    assert!(found == alone() && found["shards/00001.safetensors"] == sealed);
    // Before anybody came to the end of the data, nobody knows how much is missing.
    let folder = tempfile::tempdir().unwrap();
    let mut writer = part(folder.path(), 1, 2).unwrap();
    (0..3).for_each(|_| assert!(step(&mut writer, COUNT)));
    let error = part(folder.path(), 0, 2).unwrap().finish_part().unwrap();
    assert_eq!(error, Outcome::Missing(Missing { shards: vec![0], total: None }));
    let Outcome::Missing(missing) = error else { unreachable!() };
    assert_eq!(missing.to_string(), "1 shard is missing (0), and the end of the data");
}

#[test]
fn a_second_process_of_the_same_part_is_refused_naming_the_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = part(folder.path(), 0, 2).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_string());
    let mut pushed = 0;
    while first.next_push().unwrap() != Next::Done {
        let error = part(folder.path(), 0, 2).map(drop).unwrap_err().to_string();
        if let Ok(host) = &host {
            assert_eq!(
                error,
                format!(
                    "{}: part 1/2 of this cache is being written by process {} on {host}; wait for it to end, or stop \
                     it and start this one again",
                    folder.path().display(),
                    std::process::id()
                ),
                "after {pushed} pushes"
            );
        }
        assert!(step(&mut first, COUNT));
        pushed += 1;
    }
    assert_eq!(pushed, 13, "twelve sequences and the end");
    // Another part is welcome, and so is the same one as soon as the first has ended.
    let mut other = part(folder.path(), 1, 2).unwrap();
    drop(first);
    let mut again = part(folder.path(), 0, 2).unwrap();
    while step(&mut again, COUNT) {}
    again.finish_part().unwrap();
    while step(&mut other, COUNT) {}
    other.finish_part().unwrap();
    assert!(files(folder.path()) == alone());
}

#[test]
fn two_writers_that_both_believe_in_their_lease_cannot_both_seal() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = part(folder.path(), 0, 1).unwrap();
    assert!(step(&mut first, COUNT));
    // As if the first one had been silent for long.
    let steal = || {
        for name in files(folder.path()).keys().filter(|name| name.starts_with("leases/")) {
            fs::remove_file(folder.path().join(name)).unwrap();
        }
    };
    steal();
    let mut second = part(folder.path(), 0, 1).unwrap();
    let mut turns = 0;
    loop {
        steal();
        let one = step(&mut first, COUNT);
        steal();
        let other = step(&mut second, COUNT);
        turns += 1;
        if !one && !other {
            break;
        }
    }
    assert!(turns > COUNT / 2, "{turns}");
    let manifest = first.finish().unwrap();
    // The late one finds the cache finished.
    assert_eq!(second.finish().unwrap(), manifest);
    assert!(files(folder.path()) == alone());
}

#[test]
fn a_writer_that_comes_late_finds_the_cache_finished() {
    let folder = tempfile::tempdir().unwrap();
    // It holds a lease of a shard that does not exist, while others finish.
    let mut late = part(folder.path(), 19, 20).unwrap();
    assert_eq!(late.next_push().unwrap(), Next::Sequence(38));
    write(folder.path(), &small(), COUNT);
    late.end(COUNT).unwrap();
    assert_eq!(late.next_push().unwrap(), Next::Done);
    assert!(matches!(late.finish_part().unwrap(), Outcome::Finished(_)));
    assert!(files(folder.path()) == alone());
}

/// Parts in directories of their own.
fn apart(root: &Path, count: u64) -> Vec<PathBuf> {
    let directories: Vec<_> = (0..count).map(|index| root.join(format!("part-{index}"))).collect();
    for (index, directory) in (0..).zip(&directories) {
        let mut writer = part(directory, index, count).unwrap();
        fill(&mut writer, COUNT).unwrap();
        let outcome = writer.finish_part().unwrap();
        assert_eq!(matches!(outcome, Outcome::Finished(_)), count == 1);
    }
    directories
}

#[test]
fn merged_parts_are_the_cache_of_one_writer() {
    let expected = alone();
    for count in [1, 2, 3, 7] {
        let folder = tempfile::tempdir().unwrap();
        let mut inputs = apart(folder.path(), count);
        let before: Vec<_> = inputs.iter().map(|input| files(input)).collect();
        let out = folder.path().join("merged");
        // In any order, and with shards that several have.
        inputs.reverse();
        inputs.push(inputs[0].clone());
        let manifest = merge(&out, &inputs).unwrap();
        assert!(files(&out) == expected, "{count} parts");
        CacheReader::open(&out).unwrap().verify().into_result().unwrap();
        // Once more: it is there.
        assert_eq!(merge(&out, &inputs).unwrap(), manifest);
        inputs.pop();
        inputs.reverse();
        assert_eq!(inputs.iter().map(|input| files(input)).collect::<Vec<_>>(), before, "the parts stay as they are");
    }
}

#[test]
fn a_finished_cache_is_a_part_too() {
    let folder = tempfile::tempdir().unwrap();
    let mut inputs = apart(folder.path(), 3);
    write(&folder.path().join("whole"), &small(), COUNT);
    inputs[1] = folder.path().join("whole");
    merge(folder.path().join("merged"), &inputs).unwrap();
    assert!(files(&folder.path().join("merged")) == alone());
}

#[test]
fn parts_that_do_not_belong_together_are_refused_naming_both() {
    let folder = tempfile::tempdir().unwrap();
    let inputs = apart(folder.path(), 3);
    let out = folder.path().join("merged");
    let names: Vec<String> = inputs.iter().map(|input| input.display().to_string()).collect();
    let message = |inputs: &[PathBuf]| {
        let error = merge(&out, inputs).map(drop).unwrap_err().to_string();
        assert!(!out.exists(), "{error}");
        error
    };
    let shown = out.display();
    assert_eq!(message(&[]), "no parts to merge; name the directories they are in");
    assert_eq!(
        message(&inputs[1..]),
        format!(
            "{shown}: cannot be merged: `shards/00000.safetensors` and 3 more of 12 shards are in none of the parts; name all \
             parts, or run the writers of those that are missing"
        )
    );
    let nothing = folder.path().join("nothing");
    assert_eq!(
        message(std::slice::from_ref(&nothing)),
        format!(
            "{}: there is no part of a cache here (no begun.json); name the directories that `limbeck \
             precompute-teacher-logits` wrote parts into",
            nothing.display()
        )
    );
    let other = |name: &str, settings: CacheSettings, count: u64| {
        let directory = folder.path().join(name);
        let mut writer = CacheWriter::create_or_resume(&directory, settings, WriterPart::new(1, 3).unwrap()).unwrap();
        fill(&mut writer, count).unwrap();
        writer.finish_part().unwrap();
        directory
    };
    let mut settings = small();
    settings.soft_targets.as_mut().unwrap().teacher.fingerprint = "another".into();
    let teacher = other("teacher", settings, COUNT);
    assert_eq!(
        message(&[inputs[0].clone(), teacher.clone(), inputs[2].clone()]),
        format!(
            "the teacher differs: {} has `Scout`, fingerprint teacher-01234567..., {} has `Scout`, fingerprint another; use \
             the teacher it was begun with, or merge only parts of one cache",
            names[0],
            teacher.display()
        )
    );
    let longer = other("longer", small(), COUNT + 1);
    assert_eq!(
        message(&[inputs[0].clone(), longer.clone(), inputs[2].clone()]),
        format!(
            "the number of sequences differs: {} has 23, {} has 24; merge only parts of one cache",
            names[0],
            longer.display()
        )
    );
    // The same shard with other content.
    let again = folder.path().join("again");
    let mut writer = part(&again, 0, 3).unwrap();
    while let Next::Sequence(number) = writer.next_push().unwrap() {
        if number >= COUNT {
            writer.end(COUNT).unwrap();
            continue;
        }
        let (sequence, targets, text_bytes) = sample(&small(), number);
        writer.push(sequence, targets, text_bytes + 1).unwrap();
    }
    writer.finish_part().unwrap();
    let error = message(&[inputs[0].clone(), again.clone()]);
    assert!(error.starts_with(&format!("`shards/00000.safetensors` differs: {} has ", names[0])), "{error}");
    assert!(error.contains(&format!("{} has ", again.display())), "{error}");

    // Damage in a part is found on its way, and nothing of it is kept.
    let shard = inputs[1].join("shards/00004.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    bytes[200] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let error = merge(&out, &inputs).map(drop).unwrap_err().to_string();
    let expected = format!("{}: shard shards/00004.safetensors: block 0 (bytes 0 to ", names[1]);
    assert!(error.starts_with(&expected) && error.ends_with("write this part again"), "{error}");
    assert!(!out.join("shards/00004.safetensors").exists() && is_unfinished(&out));
    // The part is written again, and the merge goes on.
    fs::remove_dir_all(&inputs[1]).unwrap();
    let mut writer = part(&inputs[1], 1, 3).unwrap();
    fill(&mut writer, COUNT).unwrap();
    writer.finish_part().unwrap();
    merge(&out, &inputs).unwrap();
    assert!(files(&out) == alone());
    let error = merge(&inputs[0], &inputs).map(drop).unwrap_err().to_string();
    assert_eq!(
        error,
        format!(
            "{} is both a part and where the parts are merged; name another directory for the merged cache",
            names[0]
        )
    );
}
