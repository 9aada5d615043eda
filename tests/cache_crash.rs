//! A writer may die at any moment: started again, it finishes a cache that is byte-identical to an undisturbed one.

mod cache_samples;

use std::collections::BTreeMap;
use std::path::Path;

use cache_samples::*;
use limbeck::cache::*;

type Files = BTreeMap<String, Vec<u8>>;

const COUNT: u64 = 11;

fn small() -> CacheSettings {
    settings(4, 3, &[1.0, 2.0])
}

fn push(writer: &mut CacheWriter, number: u64) {
    assert_eq!(writer.next_push().unwrap(), Next::Sequence(number));
    let (sequence, targets, text_bytes) = sample(writer.settings(), number);
    writer.push(sequence, targets, text_bytes).unwrap();
}

/// The name of a writer whose process has died, made from that of a living one.
fn dead(owner: &str) -> String {
    // No process has this number.
    owner.replace(&format!("-{}-", std::process::id()), "-4194305-")
}

/// What a killed process leaves: the same files, the leases in them void.
fn killed(mut left: Files) -> Files {
    for (name, bytes) in &mut left {
        if name.starts_with("leases/") {
            *bytes = dead(std::str::from_utf8(bytes).unwrap()).into_bytes();
        }
    }
    left
}

/// The files of a writer that is still alive, as a kill leaves them.
fn left_by(directory: &Path) -> Files {
    killed(files(directory))
}

/// The finished cache, and the directory before the first push, and after each push.
fn undisturbed() -> (Files, Vec<Files>) {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = open(folder.path(), &small());
    let mut states = vec![left_by(folder.path())];
    for number in 0..COUNT {
        push(&mut writer, number);
        states.push(left_by(folder.path()));
    }
    writer.finish().unwrap();
    (files(folder.path()), states)
}

/// Resumes from what a crash left, and compares the finished cache.
fn resume(directory: &Path, left: &Files, finished: &Files, what: &str) -> Next {
    restore(directory, left);
    let next = open(directory, &small()).next_push().unwrap();
    write(directory, &small(), COUNT);
    let found = files(directory);
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&found), names(finished), "{what}");
    assert!(found == *finished, "{what}: the finished cache differs");
    next
}

fn with(left: &Files, extra: &[(&str, &[u8])]) -> Files {
    let mut left = left.clone();
    left.extend(extra.iter().map(|(name, bytes)| (name.to_string(), bytes.to_vec())));
    left
}

/// Names that a living writer gave in the files of a cache: its own, and the temporary one of a shard.
fn named(bytes: &[u8], key: &str) -> String {
    let text = std::str::from_utf8(bytes).unwrap();
    let start = text.find(&format!("\"{key}\":\"")).unwrap() + key.len() + 4;
    text[start..].split('"').next().unwrap().to_string()
}

#[test]
fn dropping_the_writer_after_any_push_gives_the_same_bytes() {
    let (finished, _) = undisturbed();
    for pushed in 0..=COUNT {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = open(folder.path(), &small());
        (0..pushed).for_each(|number| push(&mut writer, number));
        assert_eq!(writer.next_push().unwrap(), Next::Sequence(pushed));
        drop(writer);
        let mut resumed = open(folder.path(), &small());
        assert_eq!(resumed.next_push().unwrap(), Next::Sequence(pushed / 3 * 3), "only whole shards are kept");
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
    let owner = named(&states[0]["leases/00000"], "owner");
    assert!(owner.contains("-4194305-"), "{owner}");
    // While the cache is begun.
    let begun = &states[0]["begun.json"];
    check(Files::new(), "an empty directory");
    for length in (0..=begun.len()).step_by(53) {
        check([(format!("begun.json.{owner}.tmp"), begun[..length].to_vec())].into(), "a torn first file");
    }
    check([("begun.json".to_string(), begun.clone())].into(), "a cache that is only begun");
    let both = [("begun.json".to_string(), begun.clone()), (format!("begun.json.{owner}.tmp"), begun.clone())];
    check(both.into(), "a first file with both its names");
    let lease = &states[0]["leases/00000"];
    for length in [0, 10, lease.len()] {
        let name = format!("leases/00000.{owner}.tmp");
        let left = [("begun.json".to_string(), begun.clone()), (name, lease[..length].to_vec())];
        check(left.into(), "a torn lease");
    }
    // While the second shard is sealed, by the sixth push. First the lease of the next is taken.
    let (before, after) = (&states[5], &states[6]);
    let before = &with(before, &[("leases/00002", &after["leases/00002"])]);
    let (shard, record) = (&after["shards/00001.safetensors"], &after["sealed/00001.json"]);
    let temporary = format!("shards/00001.safetensors.{owner}.tmp");
    for length in (0..=shard.len()).step_by(97).chain([shard.len()]) {
        let next = check(with(before, &[(&temporary, &shard[..length])]), "a torn temporary shard");
        assert_eq!(next, Next::Sequence(3));
    }
    let written_as = format!("shards/{}", named(record, "written_as"));
    let record_name = format!("sealed/00001.json.{owner}.tmp");
    for length in (0..=record.len()).step_by(41).chain([record.len()]) {
        let left = with(before, &[(&temporary, shard), (&record_name, &record[..length])]);
        assert_eq!(check(left, "a torn record"), Next::Sequence(3));
    }
    let sealed = with(before, &[(&written_as, shard), ("sealed/00001.json", record)]);
    assert_eq!(check(with(&sealed, &[(&record_name, record)]), "a record with both its names"), Next::Sequence(6));
    assert_eq!(check(sealed, "a sealed shard without its name"), Next::Sequence(6));
    let unlisted = with(before, &[("shards/00001.safetensors", shard)]);
    assert_eq!(check(unlisted, "a shard without a record"), Next::Sequence(3));
    let lease = ("leases/00001", &before["leases/00001"][..]);
    assert_eq!(check(with(after, &[lease]), "a lease that was not given back"), Next::Sequence(6));
    assert_eq!(check(after.clone(), "a sealed shard"), Next::Sequence(6));
    // Shards far beyond, as another run with the same directory may have left them.
    check(with(before, &[("shards/00009.safetensors", b"old"), ("shards/00002.safetensors.tmp", b"")]), "stray files");
    // While it is finished.
    let interrupted = tempfile::tempdir().unwrap();
    restore(interrupted.path(), &states[COUNT as usize]);
    let mut writer = open(interrupted.path(), &small());
    fill(&mut writer, COUNT).unwrap();
    let sealed = left_by(interrupted.path());
    drop(writer);
    let end = &sealed["end.json"];
    for length in (0..=end.len()).step_by(17).chain([end.len()]) {
        let name = format!("end.json.{owner}.tmp");
        let left = with(&states[COUNT as usize], &[(&name, &end[..length])]);
        assert_eq!(check(left, "a torn end"), Next::Sequence(9));
    }
    let left = with(&states[COUNT as usize], &[("end.json", end)]);
    assert_eq!(check(left, "an end before its last shard"), Next::Sequence(9));
    assert!(sealed.contains_key("shards/00003.safetensors"));
    let mut left = sealed.clone();
    left.remove("end.json");
    assert_eq!(check(left, "all shards, and no end"), Next::Sequence(12));
    assert_eq!(check(sealed.clone(), "all shards sealed"), Next::Done);
    let manifest = &finished["manifest.json"];
    let name = format!("manifest.json.{owner}.tmp");
    for length in (0..=manifest.len()).step_by(211).chain([manifest.len()]) {
        let left = with(&sealed, &[(&name, &manifest[..length])]);
        assert_eq!(check(left, "a torn temporary manifest"), Next::Done);
    }
    // The manifest is there, and some of what is removed after it.
    let mut left = with(&sealed, &[("manifest.json", manifest), (&name, manifest)]);
    let unfinished: Vec<String> = left.keys().filter(|name| !finished.contains_key(*name)).cloned().collect();
    assert!(unfinished.len() >= 7, "{unfinished:?}");
    for name in unfinished {
        assert_eq!(check(left.clone(), "a manifest beside the rest"), Next::Done);
        left.remove(&name);
    }
    assert_eq!(check(left, "a finished cache"), Next::Done);
    assert!(tried > 80, "{tried}");
}

#[test]
fn a_cache_that_lacks_only_its_manifest_takes_no_further_sequence() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = open(folder.path(), &small());
    (0..4).for_each(|number| push(&mut writer, number));
    writer.end(4).unwrap();
    assert!(is_unfinished(folder.path()));
    let expected = format!(
        "{}: the cache ends with 4 sequences, and more are given; the data has grown since the cache was begun: restore \
         it, or delete the cache directory to start afresh",
        folder.path().display()
    );
    let more = |mut writer: CacheWriter| {
        assert_eq!((writer.next_push().unwrap(), writer.room()), (Next::Done, 0));
        let (sequence, targets, text_bytes) = sample(&small(), 4);
        (writer.push(sequence, targets, text_bytes).unwrap_err().to_string(), writer)
    };
    let (error, writer) = more(writer);
    assert_eq!(error, expected);
    drop(writer);
    let (error, writer) = more(open(folder.path(), &small()));
    assert_eq!(error, expected);
    let manifest = writer.finish().unwrap();
    let (error, writer) = more(open(folder.path(), &small()));
    assert_eq!(error, expected);
    assert!(writer.is_finished());
    assert_eq!(writer.finish().unwrap(), manifest);
}

#[test]
fn the_position_of_the_loader_comes_back_with_the_sealed_shards() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = open(folder.path(), &small());
    assert_eq!(writer.position(0, 3).unwrap(), None);
    let position =
        |sequence: u64| Position { sequence, loader: serde_json::json!({ "file": "a.txt", "byte": sequence }) };
    // Batches of two, cut at the borders of shards.
    let mut next = 0;
    while next < 8 {
        let end = (next + writer.room().min(2)).min(8);
        let Position { sequence, loader } = position(end);
        writer.set_position(sequence, loader);
        (next..end).for_each(|number| push(&mut writer, number));
        next = end;
    }
    drop(writer);
    // Sequences 0 to 5 are sealed.
    let mut writer = open(folder.path(), &small());
    assert_eq!(writer.next_push().unwrap(), Next::Sequence(6));
    assert_eq!(writer.position(0, 6).unwrap(), Some(position(6)));
    assert_eq!(writer.position(0, 5).unwrap(), Some(position(3)));
    assert_eq!(writer.position(3, 5).unwrap(), None, "the loader is there already");
    assert_eq!(writer.position(0, 2).unwrap(), None);
    (6..COUNT).for_each(|number| push(&mut writer, number));
    writer.finish().unwrap();
    assert_eq!(files(folder.path()), undisturbed().0);
}

#[test]
fn the_end_that_is_given_must_be_one() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display();
    let mut writer = open(folder.path(), &small());
    (0..2).for_each(|number| push(&mut writer, number));
    assert_eq!(
        writer.end(1).unwrap_err().to_string(),
        format!("{directory}: 2 sequences were pushed of 1; count the data's sequences from its start")
    );
    writer.end(5).unwrap();
    assert_eq!(
        writer.end(6).unwrap_err().to_string(),
        format!(
            "the number of sequences differs: the unfinished cache {directory} has 5, this run has 6; restore the data it \
             was begun with, or delete {directory} to start afresh"
        )
    );
    drop(writer);
    let mut writer = open(folder.path(), &small());
    assert_eq!((writer.next_push().unwrap(), writer.room()), (Next::Sequence(0), 3));
    (0..4).for_each(|number| push(&mut writer, number));
    assert_eq!(
        writer.finish().unwrap_err().to_string(),
        format!("{directory}: sequence 4 was not pushed; push every sequence that `next_push` asks for")
    );
}

#[test]
fn going_on_with_other_settings_is_refused_naming_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display();
    let mut writer = open(folder.path(), &small());
    (0..4).for_each(|number| push(&mut writer, number));
    drop(writer);
    let left = files(folder.path());
    let message = |change: fn(&mut CacheSettings)| {
        let mut other = small();
        change(&mut other);
        CacheWriter::create_or_resume(folder.path(), other, WriterPart::WHOLE).unwrap_err().to_string()
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
    drop(open(folder.path(), &other));
    write(folder.path(), &small(), COUNT);
    assert_eq!(files(folder.path()), undisturbed().0);
}

#[test]
fn a_teacher_whose_folder_was_renamed_is_the_same_teacher() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = open(folder.path(), &small());
    (0..4).for_each(|number| push(&mut writer, number));
    drop(writer);
    let mut renamed = small();
    renamed.soft_targets.as_mut().unwrap().teacher.name = "Scout-moved".into();
    write(folder.path(), &renamed, COUNT);
    assert_eq!(files(folder.path()), undisturbed().0);
    assert!(open(folder.path(), &renamed).is_finished());
}

#[test]
fn what_no_crash_leaves_is_refused_and_nothing_removed() {
    let (finished, states) = undisturbed();
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().display();
    let message = |left: &Files| {
        restore(folder.path(), left);
        let opened = CacheWriter::create_or_resume(folder.path(), small(), WriterPart::WHOLE);
        let error = opened.unwrap_err().to_string();
        assert_eq!(files(folder.path()), *left);
        error
    };
    let nine = &states[9];
    let afresh = format!("delete {directory} to start afresh");
    for name in ["begun.json", "sealed/00001.json"] {
        let expected = format!("{directory}/{name}: it was edited or damaged; {afresh}");
        for place in [5, 100] {
            let mut left = nine.clone();
            left.get_mut(name).unwrap()[place] ^= 1;
            assert_eq!(message(&left), expected);
        }
        assert_eq!(message(&with(nine, &[(name, b"")])), expected);
    }
    let expected = format!("{directory}/end.json: it was edited or damaged; {afresh}");
    assert_eq!(message(&with(nine, &[("end.json", b"{}")])), expected);
    // A record in the place of another.
    let swapped = with(nine, &[("sealed/00001.json", &nine["sealed/00000.json"])]);
    let expected =
        "sealed/00001.json: it is the record of `shards/00000.safetensors`, not of `shards/00001.safetensors`; ";
    assert!(message(&swapped).starts_with(&format!("{directory}/{expected}")));

    let mut left = nine.clone();
    left.remove("begun.json");
    assert_eq!(
        message(&left),
        format!(
            "{directory}: there are files in shards/, but neither manifest.json nor begun.json; restore the one that is \
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
    left = finished.clone();
    left.remove("shards/00001.safetensors");
    assert!(message(&left).starts_with(&format!("{directory}: shard shards/00001.safetensors: it is missing; ")));

    // Begun by another version of the program, in order otherwise.
    left = nine.clone();
    let line = String::from_utf8(left["begun.json"].clone()).unwrap();
    let json = line.trim_end()[65..].replace(concat!("limbeck ", env!("CARGO_PKG_VERSION")), "limbeck 0.0.1");
    let line = format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex());
    left.insert("begun.json".into(), line.into_bytes());
    let error = message(&left);
    assert!(error.starts_with(&format!("the program differs: the unfinished cache {directory} has limbeck 0.0.1 (")));
    assert!(error.ends_with(&format!("finish it with the program that began it, or {afresh}")), "{error}");
}
