//! Writing a cache: push sequences in order, be killed at any moment, start again, finish.

use std::fs;
use std::path::{Path, PathBuf};

use super::DAMAGED;
use super::codec::{Block, Shape};
use super::manifest::{Counts, MANIFEST_FILE, Manifest, ShardRecord, short};
use super::progress::{PROGRESS_FILE, Position, Progress};
use super::rows::{self, Problem};
use super::settings::CacheSettings;
use super::shard::{self, SHARD_FOLDER};
use crate::durable::{self, TEMPORARY};
use crate::error::{Error, Result};
use crate::targets::{PackedSequence, SparseTargets};

/// Writes one cache. Dropping it at any point loses at most the sequences of the shard being filled.
#[derive(Debug)]
pub struct CacheWriter {
    directory: PathBuf,
    state: State,
    block: Block,
    counts: Counts,
    /// The last position given at or before the shard being filled was complete.
    position: Option<Position>,
}

#[derive(Debug)]
enum State {
    Unfinished(Progress),
    Finished(Manifest),
}

impl CacheWriter {
    /// Begins a cache in `directory`, or goes on with the one that was begun there with equal settings.
    ///
    /// What a crash left behind (temporary files, shards that were not listed yet) is removed. A cache that was begun
    /// and has no sealed shard yet takes on the new settings.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible settings; [`Error::Mismatch`] when the cache there was begun with others;
    /// [`Error::Shard`] when a sealed shard is gone; [`Error::File`] when its log is damaged.
    pub fn create_or_resume(directory: impl AsRef<Path>, settings: CacheSettings) -> Result<CacheWriter> {
        let directory = directory.as_ref().to_path_buf();
        settings.check()?;
        let shards = directory.join(SHARD_FOLDER);
        let begun = directory.join(PROGRESS_FILE).is_file();
        let state = if directory.join(MANIFEST_FILE).is_file() {
            let manifest = Manifest::load(&directory)?;
            same_settings(&directory, "the finished cache", &manifest.settings, &settings)?;
            State::Finished(manifest)
        } else if begun {
            let progress = Progress::open(&directory)?;
            if progress.shards.is_empty() && progress.settings.first_difference(&settings).is_some() {
                // Nothing is lost: who mends a teacher or a text after a failed start is not held to that start.
                State::Unfinished(Progress::begin(&directory, settings.clone())?)
            } else {
                same_settings(&directory, "the unfinished cache", &progress.settings, &settings)?;
                State::Unfinished(progress)
            }
        } else {
            if shard_files(&shards)?.iter().any(|name| !name.ends_with(TEMPORARY)) {
                return Err(Error::file(
                    &directory,
                    "there are shards here, but neither manifest.json nor progress.log",
                    "restore the one that is missing, or delete the directory to start afresh",
                ));
            }
            fs::create_dir_all(&directory).map_err(Error::io(&directory))?;
            if let Some(parent) = directory.parent() {
                durable::sync_directory(parent)?;
            }
            State::Unfinished(Progress::begin(&directory, settings.clone())?)
        };
        fs::create_dir_all(&shards).map_err(Error::io(&shards))?;
        let position = match &state {
            State::Unfinished(progress) => progress.position.clone(),
            State::Finished(_) => None,
        };
        let block = empty_block(&settings);
        let writer = CacheWriter { directory, state, block, counts: Counts::default(), position };
        writer.discard_leftovers()?;
        writer.check_sealed()?;
        Ok(writer)
    }

    /// Whether the cache was finished before; nothing is left to push.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished(_))
    }

    pub fn settings(&self) -> &CacheSettings {
        match &self.state {
            State::Unfinished(progress) => &progress.settings,
            State::Finished(manifest) => &manifest.settings,
        }
    }

    /// Number of the sequence to push next. Right after [`create_or_resume`](Self::create_or_resume), the number of
    /// sequences in sealed shards.
    pub fn next_sequence(&self) -> u64 {
        match &self.state {
            State::Unfinished(progress) => progress.sequences() + self.counts.sequences,
            State::Finished(manifest) => manifest.counts.sequences,
        }
    }

    /// Notes where the data loader is: about to give sequence [`next_sequence`](Self::next_sequence).
    ///
    /// Recorded with the shard that is sealed next, so that a resumed run need not read the data from its start. It does
    /// not enter the finished cache.
    pub fn set_position(&mut self, loader: serde_json::Value) {
        self.position = Some(Position { sequence: self.next_sequence(), loader });
    }

    /// The last position recorded with a sealed shard: at or before [`next_sequence`](Self::next_sequence) of a resumed
    /// writer. Put the loader there, and skip `next_sequence - position.sequence` sequences.
    pub fn position(&self) -> Option<&Position> {
        match &self.state {
            State::Unfinished(progress) => progress.position.as_ref(),
            State::Finished(_) => None,
        }
    }

    /// Appends the next sequence with its rows (`seq_len` of them; `None` in a cache of tokens only); seals the shard when
    /// that fills it. `text_bytes`: bytes of text that its valid rows predict.
    ///
    /// `log_tail` and `label_log_prob` of rows that are not valid are stored as 0. After an error about the sequence the
    /// writer is as before.
    ///
    /// # Errors
    /// [`Error::NotFinite`] or [`Error::File`] naming the sequence and row that no cache may hold; [`Error::Usage`] when
    /// the cache is finished or its last, short shard is sealed; [`Error::Io`].
    pub fn push(&mut self, sequence: PackedSequence, targets: Option<SparseTargets>, text_bytes: u64) -> Result<()> {
        let number = self.next_sequence();
        let settings = match &self.state {
            State::Unfinished(progress) => &progress.settings,
            State::Finished(_) => return Err(self.too_many()),
        };
        let full = settings.sequences_per_shard as u64;
        if self.counts.sequences == 0 && !number.is_multiple_of(full) {
            return Err(self.too_many());
        }
        let mut counts = rows::check(settings, &sequence, targets.as_ref()).map_err(|problem| match problem {
            Problem::NotFinite(what) => Error::NotFinite {
                what: format!("{}: sequence {number}: {what}", self.directory.display()),
                tip: "look for NaN or infinity in the teacher's weights and in its number format".into(),
            },
            Problem::Wrong(problem) => Error::file(
                &self.directory,
                format!("sequence {number} cannot be stored: {problem}"),
                "correct what makes the sequences; nothing of this one was written",
            ),
        })?;
        counts.text_bytes = text_bytes;
        let summed = self.counts.checked_add(counts).ok_or_else(|| {
            Error::usage(
                format!("sequence {number} predicts {text_bytes} bytes of text"),
                "give the bytes of its own text",
            )
        })?;
        if let (Some(mine), Some(mut rows)) = (&mut self.block.targets, targets) {
            for row in (0..sequence.seq_len()).filter(|row| !sequence.is_valid(*row)) {
                for capture in &mut rows.captures {
                    capture.log_tail[row] = 0.0;
                    capture.label_log_prob[row] = 0.0;
                }
            }
            mine.extend(&rows);
        }
        self.block.tokens.extend_from_slice(&sequence.tokens);
        self.block.segments.extend_from_slice(&sequence.segments);
        self.counts = summed;
        if self.counts.sequences == full { self.seal() } else { Ok(()) }
    }

    /// Seals what is left, writes the manifest, and returns it. On a cache that was finished before: returns its manifest.
    ///
    /// # Errors
    /// [`Error::Usage`] when no sequence was pushed; [`Error::Io`].
    pub fn finish(mut self) -> Result<Manifest> {
        if self.counts.sequences > 0 {
            self.seal()?;
        }
        let progress = match self.state {
            State::Finished(manifest) => return Ok(manifest),
            State::Unfinished(progress) => progress,
        };
        if progress.shards.is_empty() {
            let problem = format!("{}: the cache would hold no sequence", self.directory.display());
            return Err(Error::usage(problem, "give more text, or a shorter [data] seq_len"));
        }
        let manifest = Manifest::new(&self.directory, progress.settings, progress.shards)?;
        manifest.save()?;
        remove(&self.directory.join(PROGRESS_FILE))?;
        durable::sync_directory(&self.directory)?;
        Ok(manifest)
    }

    /// Writes the shard being filled and records it.
    fn seal(&mut self) -> Result<()> {
        let State::Unfinished(progress) = &mut self.state else { return Ok(()) };
        let settings = &progress.settings;
        let number = progress.shards.len();
        let first_sequence = progress.sequences();
        let mut record = ShardRecord {
            file: shard::file_name(number),
            first_sequence,
            bytes: 0,
            blake3: String::new(),
            counts: self.counts,
        };
        let tensors = settings.codec.encode(&self.block, &Shape::of(settings, &record));
        let (bytes, hash) = shard::write(&self.directory, settings.codec, number, first_sequence, &tensors)?;
        record.bytes = bytes;
        record.blake3 = hash.to_hex().to_string();
        drop(tensors);
        self.block = empty_block(settings);
        self.counts = Counts::default();
        progress.append(record, self.position.clone())
    }

    fn too_many(&self) -> Error {
        Error::usage(
            format!(
                "{}: the cache ends with {} sequences, and more are given",
                self.directory.display(),
                self.next_sequence()
            ),
            "the data has grown since the cache was begun: restore it, or delete the cache directory to start afresh",
        )
    }

    fn sealed(&self) -> &[ShardRecord] {
        match &self.state {
            State::Unfinished(progress) => &progress.shards,
            State::Finished(manifest) => &manifest.shards,
        }
    }

    /// Removes what a crash left: temporary files, shards that were not listed yet, the log of a finished cache.
    fn discard_leftovers(&self) -> Result<()> {
        for name in [MANIFEST_FILE, PROGRESS_FILE] {
            remove(&durable::temporary_path(&self.directory.join(name)))?;
        }
        if self.is_finished() {
            remove(&self.directory.join(PROGRESS_FILE))?;
        }
        let shards = self.directory.join(SHARD_FOLDER);
        for name in shard_files(&shards)? {
            let number: Option<usize> = name.split('.').next().and_then(|number| number.parse().ok());
            let listed =
                number.is_some_and(|number| number < self.sealed().len() && shard::file_name(number).ends_with(&name));
            if !listed {
                remove(&shards.join(name))?;
            }
        }
        Ok(())
    }

    /// Whether each sealed shard is there with its length. Its hash is checked when it is read.
    fn check_sealed(&self) -> Result<()> {
        self.sealed().iter().try_for_each(|record| check_length(&self.directory, record))
    }
}

/// Whether a shard's file is there and has the length it was sealed with.
pub(crate) fn check_length(directory: &Path, record: &ShardRecord) -> Result<()> {
    let problem = match fs::metadata(directory.join(&record.file)) {
        Ok(metadata) if metadata.len() == record.bytes => return Ok(()),
        Ok(metadata) => format!("it has {} bytes, and was sealed with {}", metadata.len(), record.bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => "it is missing".into(),
        Err(error) => return Err(Error::io(directory.join(&record.file))(error)),
    };
    let (cache, shard) = (directory.to_path_buf(), record.file.clone());
    Err(Error::Shard { cache, shard, problem, tip: DAMAGED.into() })
}

fn same_settings(directory: &Path, name: &str, theirs: &CacheSettings, ours: &CacheSettings) -> Result<()> {
    let Some((setting, left, right)) = theirs.first_difference(ours) else { return Ok(()) };
    let teacher = |settings: &CacheSettings| {
        settings.soft_targets.as_ref().map_or("none".into(), |soft_targets| {
            format!("`{}`, fingerprint {}", soft_targets.teacher.name, short(&soft_targets.teacher.fingerprint))
        })
    };
    let tokenizer = |settings: &CacheSettings| {
        format!("{} tokens, fingerprint {}", settings.tokenizer.vocab_size, short(&settings.tokenizer.fingerprint))
    };
    let data = |settings: &CacheSettings| format!("fingerprint {}", short(&settings.data_fingerprint));
    let (what, left, right, way_out) = match setting.as_str() {
        "tokenizer.fingerprint" => {
            ("the tokenizer".into(), tokenizer(theirs), tokenizer(ours), "use the tokenizer it was begun with")
        }
        "soft_targets.teacher.fingerprint" => {
            ("the teacher".into(), teacher(theirs), teacher(ours), "use the teacher it was begun with")
        }
        "data_fingerprint" => {
            let way_out = "restore the [data] section, the seed and the files it was begun with";
            ("the data".into(), data(theirs), data(ours), way_out)
        }
        _ => (format!("the cache setting `{setting}`"), left, right, "run with the settings it was begun with"),
    };
    let directory = directory.display();
    Err(Error::Mismatch {
        what,
        left_name: format!("{name} {directory}"),
        left,
        right_name: "this run".into(),
        right,
        tip: format!("{way_out}, or delete {directory} to start afresh"),
    })
}

/// Names in the folder of shards that are a shard's or its temporary file's; other files are not the cache's.
fn shard_files(shards: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(shards) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(Error::io(shards)(error)),
    };
    let mut names = vec![];
    for entry in entries {
        let name = entry.map_err(Error::io(shards))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let sealed = name.strip_suffix(TEMPORARY).unwrap_or(name);
        let number = sealed.strip_suffix(".safetensors");
        if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
            names.push(name.to_string());
        }
    }
    Ok(names)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}

fn empty_block(settings: &CacheSettings) -> Block {
    let targets = settings.soft_targets.as_ref().map(|soft_targets| SparseTargets::empty(&soft_targets.temperatures));
    Block { tokens: vec![], segments: vec![], targets }
}
