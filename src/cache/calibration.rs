//! Learning a coder: which shards it learns from, where they are kept, and that it is learnt once.
//!
//! Knows no codec; what is learnt from the blocks is the codec's business ([`Codec::learn`](super::Codec)).

use super::codec::{Block, Codec};
use super::manifest::{CODER_FILE, Counts};
use super::reader::{OpenShard, refusal};
use super::sealing::{LearntCoder, learnt_coder, shard_count};
use super::settings::CacheSettings;
use super::source::LocalFiles;
use super::unfinished::{CALIBRATION_FOLDER, Position, Unfinished};
use crate::durable;
use crate::error::{Error, Result};

/// How many shards the coder learns from: as many as hold the codec's number of tokens, fewer if the data ends.
pub(crate) fn calibration_shards(settings: &CacheSettings, end: Option<u64>) -> u64 {
    let Some(tokens) = settings.codec.calibration_tokens() else { return 0 };
    let shards = tokens.div_ceil(settings.sequences_per_shard as u64 * settings.seq_len as u64);
    end.map_or(shards, |sequences| shards.min(shard_count(settings, sequences)))
}

/// Settings under which the shards to learn from are kept.
fn raw(settings: &CacheSettings) -> CacheSettings {
    CacheSettings { codec: Codec::Raw, levels: None, ..settings.clone() }
}

/// A shard to learn from.
pub(crate) struct Sample {
    pub block: Block,
    pub counts: Counts,
    pub position: Option<Position>,
}

/// Reads a shard to learn from, all of it checked; `None` if it is not there.
pub(crate) fn sample(files: &Unfinished, number: u64) -> Result<Option<Sample>> {
    let Some(sealed) = files.record(CALIBRATION_FOLDER, number)? else { return Ok(None) };
    let settings = raw(&files.settings);
    let local = LocalFiles::new(&files.directory);
    let record = sealed.shard;
    let block = OpenShard::open(&local, super::FORMAT_VERSION, &settings, number, &record)
        .map_err(|why| refusal(why, &record, &[]))
        .and_then(|shard| shard.block(&settings, None))
        .map_err(|problem| Error::Shard {
            cache: files.directory.clone(),
            shard: record.file,
            problem,
            tip: format!("delete {} to start afresh", files.directory.display()),
        })?;
    Ok(Some(Sample { block, counts: record.counts, position: sealed.position }))
}

/// Learns the coder from `count` shards that are all there, and writes it down, unless somebody has.
pub(crate) fn learn(files: &Unfinished, count: u64, owner: &str) -> Result<LearntCoder> {
    let settings = &files.settings;
    let mut blocks = (0..count).map(|number| {
        let gone = || Error::file(files.record_path(CALIBRATION_FOLDER, number), "is missing", "run the same again");
        sample(files, number)?.map(|sample| sample.block).ok_or_else(gone)
    });
    let learnt = settings.codec.learn(settings, &mut blocks);
    let path = files.directory.join(CODER_FILE);
    match learnt {
        Ok(bytes) => durable::write_new(&path, owner, &bytes).map(drop)?,
        // Somebody else was done first, and has begun to remove what it was learnt from.
        Err(_) if path.is_file() => {}
        Err(error) => return Err(error),
    }
    learnt_coder(&files.directory, settings)?.ok_or_else(|| Error::file(path, "is missing", "run the same again"))
}

/// Removes a shard that was learnt from; its sealed form has taken its place.
pub(crate) fn discard(files: &Unfinished, number: u64) -> Result<()> {
    durable::remove(&files.record_path(CALIBRATION_FOLDER, number))?;
    durable::remove(&files.directory.join(super::shard::file_in(CALIBRATION_FOLDER, number)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::super::*;
    use crate::targets::{PackedSequence, SparseTargets, TargetSource};

    /// The coder learns from 30 tokens: four shards of two sequences of four.
    fn settings() -> CacheSettings {
        let mut settings = super::super::settings::tests::settings();
        settings.tokenizer.vocab_size = 40;
        settings.soft_targets = settings.soft_targets.map(|soft_targets| SoftTargetSettings {
            selection: Selection::TopK { k: 3 },
            temperatures: vec![1.0],
            ..soft_targets
        });
        CacheSettings { seq_len: 4, codec: Codec::Ranked, ..settings }
    }

    fn sample(number: u64) -> (PackedSequence, SparseTargets) {
        let number = number as u32;
        let mut targets = SparseTargets::empty(&[1.0]);
        for row in 0..4 {
            // Two ids or three, none twice, some often.
            let ids = [(7 * number + row) % 20, 20 + (number * number + row) % 10, 30 + number % 3];
            targets.ids.extend(&ids[..2 + (number as usize + 1) % 2]);
            targets.offsets.push(targets.ids.len() as u64);
            let capture = &mut targets.captures[0];
            let row_start = capture.log_probs.len();
            capture.log_probs.extend((row_start..targets.ids.len()).map(|i| -1.0 - (i - row_start) as f32));
            capture.log_tail.push(-2.0);
            capture.label_log_prob.push(-3.0);
        }
        (PackedSequence { tokens: (0..5).map(|i| (number + i) % 40).collect(), segments: vec![0; 5] }, targets)
    }

    fn open(directory: &Path, index: u64, count: u64) -> CacheWriter {
        CacheWriter::create_or_resume(directory, settings(), WriterPart::new(index, count).unwrap()).unwrap()
    }

    /// One step; counts the sequences pushed.
    fn step(writer: &mut CacheWriter, total: u64, pushed: &mut u64) -> Next {
        let next = writer.next_push().unwrap();
        match next {
            Next::Sequence(number) if number < total => {
                let (sequence, targets) = sample(number);
                writer.push(sequence, Some(targets), 1).unwrap();
                *pushed += 1;
            }
            Next::Sequence(_) => writer.end(total).unwrap(),
            Next::Wait | Next::Done => {}
        }
        next
    }

    fn fill(writer: &mut CacheWriter, total: u64) -> u64 {
        let mut pushed = 0;
        while step(writer, total, &mut pushed) != Next::Done {}
        pushed
    }

    fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let name = PathBuf::from(path.file_name().unwrap());
            if path.is_dir() {
                found.extend(files(&path).into_iter().map(|(inner, bytes)| (name.join(inner), bytes)));
            } else {
                found.insert(name, fs::read(&path).unwrap());
            }
        }
        found
    }

    fn alone(directory: &Path, total: u64) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut writer = open(directory, 0, 1);
        assert_eq!(fill(&mut writer, total), total, "nothing is asked for twice");
        writer.finish().unwrap();
        files(directory)
    }

    #[test]
    fn what_was_encoded_with_a_learnt_coder_comes_back() {
        for total in [1, 2, 3, 7, 8, 9, 13] {
            let folder = tempfile::tempdir().unwrap();
            let found = alone(folder.path(), total);
            let names: Vec<String> = found.keys().map(|name| name.display().to_string()).collect();
            assert_eq!(names[..2], ["coder.safetensors", "manifest.json"]);
            assert_eq!(names.len() as u64, 2 + total.div_ceil(2), "{names:?}");
            let cache = CacheReader::open(folder.path()).unwrap();
            cache.verify().into_result().unwrap();
            let manifest = cache.manifest();
            assert_eq!(manifest.coder.as_ref().unwrap().bytes, 160);
            assert_eq!(manifest.error.unwrap().rows, 4 * total);
            for number in 0..total {
                let batch = cache.read(&[number]).unwrap();
                let (sequence, targets) = sample(number);
                assert_eq!((&batch.sequences[0], batch.targets.as_ref()), (&sequence, Some(&targets)));
            }
        }
    }

    #[test]
    fn any_number_of_writers_learn_one_coder() {
        for total in [3, 13] {
            let folder = tempfile::tempdir().unwrap();
            let expected = alone(&folder.path().join("alone"), total);
            for count in [2, 3, 7] {
                let directory = folder.path().join(count.to_string());
                let mut writers: Vec<_> = (0..count).map(|index| open(&directory, index, count)).collect();
                let (mut turn, mut pushed) = (0, 0);
                while !writers.is_empty() {
                    turn = (turn + 5) % writers.len();
                    match step(&mut writers[turn], total, &mut pushed) {
                        Next::Done => drop(writers.remove(turn).finish_part().unwrap()),
                        Next::Wait | Next::Sequence(_) => {}
                    }
                }
                assert_eq!(files(&directory), expected, "{count} writers of {total} sequences");
                assert_eq!(pushed, total, "nothing is computed twice");

                // Apart: each learns by itself.
                let parts: Vec<_> = (0..count).map(|index| folder.path().join(format!("{count}-{index}"))).collect();
                for (index, part) in (0..).zip(&parts) {
                    let mut writer = open(part, index, count);
                    fill(&mut writer, total);
                    writer.finish_part().unwrap();
                }
                let merged = folder.path().join(format!("{count} merged"));
                merge(&merged, &parts).unwrap();
                assert_eq!(files(&merged), expected, "{count} parts of {total} sequences, merged");
            }
        }
    }

    #[test]
    fn a_writer_waits_for_what_others_let_the_coder_learn_from() {
        let folder = tempfile::tempdir().unwrap();
        let expected = alone(&folder.path().join("alone"), 13);
        let directory = folder.path().join("two");
        let (mut slow, mut fast, mut pushed) = (open(&directory, 0, 2), open(&directory, 1, 2), 0);
        step(&mut slow, 13, &mut pushed);
        while step(&mut fast, 13, &mut pushed) != Next::Wait {}
        assert_eq!((pushed, fast.room()), (7, 0), "three of the four shards are there, and one sequence of the other");
        assert_eq!(step(&mut fast, 13, &mut pushed), Next::Wait);
        step(&mut slow, 13, &mut pushed);
        while step(&mut fast, 13, &mut pushed) != Next::Done {}
        fast.finish_part().unwrap();
        while step(&mut slow, 13, &mut pushed) != Next::Done {}
        slow.finish_part().unwrap();
        assert_eq!((files(&directory), pushed), (expected, 13));
    }

    #[test]
    fn stopping_after_any_step_gives_the_same_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let expected = alone(&folder.path().join("alone"), 13);
        for steps in 0..16 {
            let directory = folder.path().join(steps.to_string());
            let mut writer = open(&directory, 0, 1);
            let mut pushed = 0;
            (0..steps).for_each(|_| assert_ne!(step(&mut writer, 13, &mut pushed), Next::Wait));
            drop(writer);
            let mut writer = open(&directory, 1, 2);
            (0..2).for_each(|_| assert_ne!(step(&mut writer, 13, &mut pushed), Next::Wait));
            drop(writer);
            let mut writer = open(&directory, 0, 1);
            fill(&mut writer, 13);
            writer.finish().unwrap();
            assert_eq!(files(&directory), expected, "after {steps} steps");
        }
    }

    #[test]
    fn a_damaged_coder_is_named_and_refused() {
        let folder = tempfile::tempdir().unwrap();
        let found = alone(folder.path(), 5);
        let path = folder.path().join("coder.safetensors");
        let coder = &found[Path::new("coder.safetensors")];
        for bit in 0..coder.len() * 8 {
            let mut changed = coder.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            fs::write(&path, changed).unwrap();
            let error = CacheReader::open(folder.path()).map(drop).unwrap_err().to_string();
            let expected = format!("{}: it is damaged: the manifest names the hash ", path.display());
            assert!(error.starts_with(&expected), "{error}");
        }
        fs::write(&path, &coder[1..]).unwrap();
        assert!(CacheReader::open(folder.path()).is_err());
        fs::remove_file(&path).unwrap();
        let error = CacheReader::open(folder.path()).map(drop).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: it cannot be read: ", path.display())), "{error}");
    }

    #[test]
    fn parts_with_different_coders_are_not_merged() {
        let folder = tempfile::tempdir().unwrap();
        let parts = [folder.path().join("a"), folder.path().join("b")];
        for (index, part) in (0..).zip(&parts) {
            let mut writer = open(part, index, 2);
            while let Next::Sequence(number) = writer.next_push().unwrap() {
                if number >= 13 {
                    writer.end(13).unwrap();
                    continue;
                }
                // As if the teacher were another each time.
                let (sequence, targets) = sample(number + 5 * index);
                writer.push(sequence, Some(targets), 1).unwrap();
            }
            writer.finish_part().unwrap();
        }
        let error = merge(folder.path().join("merged"), &parts).map(drop).unwrap_err().to_string();
        let [a, b] = parts.map(|part| part.display().to_string());
        assert!(error.starts_with(&format!("the coder differs: {a} has ")), "{error}");
        assert!(
            error.contains(&format!(", {b} has ")) && error.ends_with("; merge only parts of one cache"),
            "{error}"
        );
    }
}
