//! A writer may die at any moment: started again, it finishes a cache that is byte-identical to an undisturbed one.

mod cache_samples;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use cache_samples::*;
use limbeck::cache::*;
use rand::{RngExt, SeedableRng};

type Files = BTreeMap<String, Vec<u8>>;

const COUNT: u64 = 11;

fn small() -> CacheSettings {
    settings(4, 3, &[1.0, 2.0])
}

fn push(writer: &mut CacheWriter, number: u64) {
    let (sequence, targets, text_bytes) = sample(writer.settings(), number);
    writer.push(sequence, targets, text_bytes).unwrap();
}

/// The finished cache, and the directory before the first push, after each push, and at the end.
fn undisturbed() -> (Files, Vec<Files>) {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    let mut states = vec![files(folder.path())];
    for number in 0..COUNT {
        push(&mut writer, number);
        states.push(files(folder.path()));
    }
    writer.finish().unwrap();
    states.push(files(folder.path()));
    (files(folder.path()), states)
}

/// Resumes from what a crash left, and compares the finished cache.
fn resume(directory: &Path, left: &Files, finished: &Files, what: &str) -> u64 {
    restore(directory, left);
    let next = CacheWriter::create_or_resume(directory, small()).unwrap().next_sequence();
    write(directory, &small(), COUNT);
    assert!(files(directory) == *finished, "{what}: the finished cache differs");
    next
}

#[test]
fn dropping_the_writer_after_any_push_gives_the_same_bytes() {
    let (finished, _) = undisturbed();
    for pushed in 0..=COUNT {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
        (0..pushed).for_each(|number| push(&mut writer, number));
        assert_eq!(writer.next_sequence(), pushed);
        drop(writer);
        let resumed = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
        assert_eq!(resumed.next_sequence(), pushed / 3 * 3, "only whole shards are kept");
        drop(resumed);
        write(folder.path(), &small(), COUNT);
        assert_eq!(files(folder.path()), finished);
    }
}

#[test]
fn dying_at_any_operation_gives_the_same_bytes() {
    let (finished, states) = undisturbed();
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("cache");
    let mut tried = 0;
    let mut check = |left: Files, what: &str| {
        tried += 1;
        resume(&directory, &left, &finished, what)
    };
    // While the cache is begun.
    let log = &states[0]["progress.log"];
    check(Files::new(), "an empty directory");
    for length in (0..=log.len()).step_by(7) {
        check([("progress.log.tmp".to_string(), log[..length].to_vec())].into(), "a torn first line");
    }
    // While the second shard is sealed, by the sixth push.
    let (before, after) = (&states[5], &states[6]);
    let shard = &after["shards/00001.safetensors"];
    let with = |extra: &[(&str, &[u8])]| {
        let mut left = before.clone();
        left.extend(extra.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())));
        left
    };
    for length in (0..=shard.len()).step_by(31).chain([shard.len()]) {
        let next = check(with(&[("shards/00001.safetensors.tmp", &shard[..length])]), "a torn temporary shard");
        assert_eq!(next, 3);
    }
    let unlisted = ("shards/00001.safetensors", &shard[..]);
    assert_eq!(check(with(&[unlisted]), "a shard that is not listed"), 3);
    let (log_before, log_after) = (before["progress.log"].len(), &after["progress.log"]);
    for length in log_before..log_after.len() {
        assert_eq!(check(with(&[unlisted, ("progress.log", &log_after[..length])]), "a torn line"), 3);
    }
    // Blocks of the last line that reached the disk in another order.
    let mut holes = log_after.clone();
    holes[log_before + 20..log_before + 40].fill(0);
    assert_eq!(check(with(&[unlisted, ("progress.log", &holes)]), "a line with a hole"), 3);
    assert_eq!(check(after.clone(), "a sealed shard"), 6);
    // Shards far beyond, as another run with the same directory may have left them.
    check(with(&[("shards/00009.safetensors", b"old"), ("shards/00002.safetensors.tmp", b"")]), "stray files");
    // While it is finished: the short shard sealed, the manifest torn, renamed, and the log not yet removed.
    let mut sealed = states[COUNT as usize].clone();
    let interrupted = tempfile::tempdir().unwrap();
    restore(interrupted.path(), &sealed);
    let mut writer = CacheWriter::create_or_resume(interrupted.path(), small()).unwrap();
    (9..COUNT).for_each(|number| push(&mut writer, number));
    // The manifest cannot replace a folder, so that finishing stops after the last shard.
    fs::create_dir(interrupted.path().join("manifest.json.tmp")).unwrap();
    writer.finish().unwrap_err();
    fs::remove_dir(interrupted.path().join("manifest.json.tmp")).unwrap();
    sealed = files(interrupted.path());
    assert!(sealed.contains_key("shards/00003.safetensors"));
    assert_eq!(check(sealed.clone(), "all shards sealed"), COUNT);
    let manifest = &finished["manifest.json"];
    for length in (0..=manifest.len()).step_by(97).chain([manifest.len()]) {
        let mut left = sealed.clone();
        left.insert("manifest.json.tmp".into(), manifest[..length].to_vec());
        assert_eq!(check(left, "a torn temporary manifest"), COUNT);
    }
    let mut left = sealed.clone();
    left.insert("manifest.json".into(), manifest.clone());
    assert_eq!(check(left, "a manifest beside the log"), COUNT);
    assert_eq!(check(finished.clone(), "a finished cache"), COUNT);
    assert!(tried > 200, "{tried}");
}

#[test]
fn a_cache_that_lacks_only_its_manifest_takes_no_further_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    (0..4).for_each(|number| push(&mut writer, number));
    fs::create_dir(folder.path().join("manifest.json.tmp")).unwrap();
    writer.finish().unwrap_err();
    fs::remove_dir(folder.path().join("manifest.json.tmp")).unwrap();
    let expected = format!(
        "{}: the cache ends with 4 sequences, and more are given; the data has grown since the cache was begun: restore \
         it, or delete the cache directory to start afresh",
        folder.path().display()
    );
    let more = || {
        let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
        assert_eq!(writer.next_sequence(), 4);
        let (sequence, targets, text_bytes) = sample(&small(), 4);
        (writer.push(sequence, targets, text_bytes).unwrap_err().to_string(), writer)
    };
    let (error, writer) = more();
    assert_eq!(error, expected);
    let manifest = writer.finish().unwrap();
    let (error, writer) = more();
    assert_eq!(error, expected);
    assert!(writer.is_finished());
    assert_eq!(writer.finish().unwrap(), manifest);
}

#[test]
fn the_position_of_the_loader_comes_back_with_the_sealed_shards() {
    let folder = tempfile::tempdir().unwrap();
    let batch_of_two = |writer: &mut CacheWriter, first: u64| {
        writer.set_position(serde_json::json!({ "file": "a.txt", "byte": 1000 + first }));
        push(writer, first);
        push(writer, first + 1);
    };
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    assert_eq!(writer.position(), None);
    for first in [0, 2, 4, 6] {
        batch_of_two(&mut writer, first);
    }
    drop(writer);
    // Sequences 0 to 5 are sealed; the loader had last said where it was before sequence 4.
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    assert_eq!(writer.next_sequence(), 6);
    let position = writer.position().unwrap().clone();
    assert_eq!(position, Position { sequence: 4, loader: serde_json::json!({ "file": "a.txt", "byte": 1004 }) });
    (6..COUNT).for_each(|number| push(&mut writer, number));
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), undisturbed().0);
}

#[test]
fn going_on_with_other_settings_is_refused_naming_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display();
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    (0..4).for_each(|number| push(&mut writer, number));
    drop(writer);
    let left = files(folder.path());
    let message = |change: fn(&mut CacheSettings)| {
        let mut other = small();
        change(&mut other);
        CacheWriter::create_or_resume(folder.path(), other).unwrap_err().to_string()
    };
    let tip = format!("run with the settings it was begun with, or delete {directory} to start afresh");
    assert_eq!(
        message(|other| other.soft_targets.as_mut().unwrap().teacher.fingerprint = "new".into()),
        format!(
            "the teacher differs: the unfinished cache {directory} has `Scout`, fingerprint teacher-01234567..., this run \
             has `Scout`, fingerprint new; use the teacher it was begun with, or delete {directory} to start afresh"
        )
    );
    assert_eq!(
        message(|other| {
            other.tokenizer.fingerprint = "new".into();
            other.data_fingerprint = "with the new tokenizer".into();
        }),
        format!(
            "the tokenizer differs: the unfinished cache {directory} has 50 tokens, fingerprint tokenizer-012345..., this \
             run has 50 tokens, fingerprint new; use the tokenizer it was begun with, or delete {directory} to start afresh"
        )
    );
    assert_eq!(
        message(|other| other.data_fingerprint = "new".into()),
        format!(
            "the data differs: the unfinished cache {directory} has fingerprint data-0123456789a..., this run has \
             fingerprint new; restore the [data] section, the seed and the files it was begun with, or delete {directory} \
             to start afresh"
        )
    );
    assert_eq!(
        message(|other| other.sequences_per_shard = 4),
        format!(
            "the cache setting `sequences_per_shard` differs: the unfinished cache {directory} has 3, this run has 4; {tip}"
        )
    );
    assert_eq!(files(folder.path()), left, "a refusal removes nothing");
    write(folder.path(), &small(), COUNT);
    assert_eq!(
        message(|other| other.seq_len = 5),
        format!("the cache setting `seq_len` differs: the finished cache {directory} has 4, this run has 5; {tip}")
    );
}

#[test]
fn a_start_that_sealed_nothing_binds_nobody() {
    let folder = tempfile::tempdir().unwrap();
    let mut other = small();
    other.soft_targets.as_mut().unwrap().teacher.fingerprint = "a broken teacher".into();
    drop(CacheWriter::create_or_resume(folder.path(), other).unwrap());
    write(folder.path(), &small(), COUNT);
    assert_eq!(files(folder.path()), undisturbed().0);
}

#[test]
fn a_teacher_whose_folder_was_renamed_is_the_same_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    (0..4).for_each(|number| push(&mut writer, number));
    drop(writer);
    let mut renamed = small();
    renamed.soft_targets.as_mut().unwrap().teacher.name = "Scout-moved".into();
    write(folder.path(), &renamed, COUNT);
    assert_eq!(files(folder.path()), undisturbed().0);
    assert!(CacheWriter::create_or_resume(folder.path(), renamed).unwrap().is_finished());
}

#[test]
fn what_no_crash_leaves_is_refused_and_nothing_removed() {
    let (finished, states) = undisturbed();
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display();
    let message = |left: &Files| {
        restore(folder.path(), left);
        let error = CacheWriter::create_or_resume(folder.path(), small()).unwrap_err().to_string();
        assert_eq!(files(folder.path()), *left);
        error
    };
    let nine = &states[9];
    let mut left = nine.clone();
    let second_line = left["progress.log"].iter().position(|byte| *byte == b'\n').unwrap() + 1;
    left.get_mut("progress.log").unwrap()[second_line + 100] ^= 1;
    let afresh = format!("delete {directory} to start afresh");
    assert_eq!(message(&left), format!("{directory}/progress.log: line 2 is damaged; {afresh}"));
    left.get_mut("progress.log").unwrap()[5] ^= 1;
    assert_eq!(message(&left), format!("{directory}/progress.log: line 1 is damaged; {afresh}"));
    left.insert("progress.log".into(), vec![]);
    assert_eq!(message(&left), format!("{directory}/progress.log: it is empty; {afresh}"));

    left = nine.clone();
    left.remove("progress.log");
    assert_eq!(
        message(&left),
        format!(
            "{directory}: there are shards here, but neither manifest.json nor progress.log; restore the one that is \
             missing, or delete the directory to start afresh"
        )
    );
    left = nine.clone();
    left.remove("shards/00001.safetensors");
    assert!(message(&left).starts_with(&format!("{directory}: shard shards/00001.safetensors: it is missing; ")));
    left = nine.clone();
    left.get_mut("shards/00002.safetensors").unwrap().pop();
    assert!(message(&left).contains("shard shards/00002.safetensors: it has "));
    left = finished.clone();
    left.get_mut("manifest.json").unwrap()[30] ^= 1;
    assert!(message(&left).starts_with(&format!("{directory}/manifest.json: ")));

    // A log of another version of the program, in order otherwise.
    left = nine.clone();
    let log = String::from_utf8(left["progress.log"].clone()).unwrap();
    let (first, rest) = log.split_once('\n').unwrap();
    let json = first[65..].replace(concat!("limbeck ", env!("CARGO_PKG_VERSION")), "limbeck 0.0.1");
    let log = format!("{} {json}\n{rest}", blake3::hash(json.as_bytes()).to_hex());
    left.insert("progress.log".into(), log.into_bytes());
    let error = message(&left);
    assert!(error.starts_with(&format!("the program differs: the unfinished cache {directory} has limbeck 0.0.1 (")));
    assert!(error.ends_with(&format!("finish it with the program that began it, or {afresh}")), "{error}");
}

#[test]
fn a_second_writer_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut first = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    let mut second = CacheWriter::create_or_resume(folder.path(), small()).unwrap();
    (0..3).for_each(|number| push(&mut first, number));
    (0..2).for_each(|number| push(&mut second, number));
    let (sequence, targets, text_bytes) = sample(&small(), 2);
    let error = second.push(sequence, targets, text_bytes).unwrap_err().to_string();
    let path = folder.path().join("progress.log");
    assert_eq!(error, format!("{}: another process is writing this cache; let only one write it", path.display()));
    // The first one's temporary file is in the way of the second.
    let temporary = folder.path().join("shards/00001.safetensors.tmp");
    fs::write(&temporary, b"").unwrap();
    (3..5).for_each(|number| push(&mut first, number));
    let (sequence, targets, text_bytes) = sample(&small(), 5);
    let error = first.push(sequence, targets, text_bytes).unwrap_err().to_string();
    let expected = "another process is writing this cache; wait for it to end, or stop it";
    assert_eq!(error, format!("{}: {expected}", temporary.display()));
}

const KILLED_DIRECTORY: &str = "LIMBECK_TEST_CACHE_TO_WRITE";

/// Many small shards, so that a kill falls between any two operations.
fn many() -> (CacheSettings, u64) {
    (settings(4, 2, &[1.0]), 79)
}

/// Not a test of its own: the process that `killing_the_process_at_random_moments_gives_the_same_bytes` kills.
#[test]
fn child_process_writes_a_cache() {
    if let Some(directory) = std::env::var_os(KILLED_DIRECTORY) {
        let (settings, count) = many();
        let manifest = write(Path::new(&directory), &settings, count);
        assert_eq!(manifest.counts.sequences, count);
    }
}

#[test]
fn killing_the_process_at_random_moments_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (settings, count) = many();
    let started = std::time::Instant::now();
    write(&folder.path().join("undisturbed"), &settings, count);
    let whole = started.elapsed();
    let finished = files(&folder.path().join("undisturbed"));
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(9);
    let (mut kills, mut kills_in_the_middle, mut round) = (0, 0, 0);
    while kills < 25 {
        let directory = folder.path().join(format!("round-{round}"));
        round += 1;
        assert!(round < 200, "the child is never killed before it ends");
        loop {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_process_writes_a_cache", "--test-threads=1"])
                .env(KILLED_DIRECTORY, &directory)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            // From the moment it begins to write: starting a process takes longer than writing some shards.
            while child.try_wait().unwrap().is_none() && !directory.exists() {
                std::thread::sleep(Duration::from_micros(50));
            }
            std::thread::sleep(whole.mul_f64(random.random_range(0.0..0.5)));
            // On Unix this is SIGKILL.
            child.kill().unwrap();
            let status = child.wait().unwrap();
            if status.success() {
                break;
            }
            kills += 1;
            kills_in_the_middle += usize::from(is_unfinished(&directory));
        }
        assert!(files(&directory) == finished, "round {round}: the finished cache differs");
    }
    assert!(kills_in_the_middle >= 5, "{kills_in_the_middle} of {kills} kills left an unfinished cache");
}
