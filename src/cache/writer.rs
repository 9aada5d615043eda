//! Writing a cache: push sequences, be killed at any moment, start again, finish; beside any number of other writers.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::assignment::{Open, Target, find};
use super::codec::Block;
use super::lease::Leases;
use super::manifest::{Counts, MANIFEST_FILE, Manifest};
use super::part::WriterPart;
use super::reader::check_length;
use super::rows::{self, Problem};
use super::sealing::{Outcome, check_sealed, complete, same_settings};
use super::settings::CacheSettings;
use super::source::LocalFiles;
use super::unfinished::{CALIBRATION_FOLDER, Position, SEALED_FOLDER, Unfinished, tidy};
use crate::error::{Error, Result};
use crate::targets::{PackedSequence, SparseTargets};

/// Writes one part of a cache. Dropping it at any point loses at most the sequences of the shard being filled.
#[derive(Debug)]
pub struct CacheWriter {
    directory: PathBuf,
    settings: CacheSettings,
    part: WriterPart,
    state: State,
    block: Block,
    counts: Counts,
    /// The last position given at or before the end of the shard being filled.
    position: Option<Position>,
}

#[derive(Debug)]
enum State {
    Unfinished(Box<Open>),
    Finished(Box<Manifest>),
}

/// What a writer is to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// Push the sequence of this number.
    Sequence(u64),
    /// Other writers are at work on what this one needs; ask again in a while.
    Wait,
    /// Nothing is left for this writer.
    Done,
}

impl CacheWriter {
    /// Begins a cache in `directory`, or goes on with the one that was begun there with equal settings, as one of
    /// several writers ([`WriterPart::WHOLE`] if there is only this one).
    ///
    /// What dead writers left behind (temporary files, shards without a record, leases) is removed. A cache that was
    /// begun, has no sealed shard yet and no other writer takes on the new settings.
    ///
    /// # Errors
    /// [`Error::Usage`] for impossible settings; [`Error::Mismatch`] when the cache there was begun with others;
    /// [`Error::Shard`] when a sealed shard is gone; [`Error::File`] when a record is damaged, or when this part is
    /// being written by another process, which it names.
    pub fn create_or_resume(
        directory: impl AsRef<Path>,
        settings: CacheSettings,
        part: WriterPart,
    ) -> Result<CacheWriter> {
        settings.check()?;
        let directory = directory.as_ref();
        let opened = CacheWriter::open(directory, &settings, part);
        match opened {
            // Another process may have finished the cache while this one looked around.
            Err(_) if directory.join(MANIFEST_FILE).is_file() => CacheWriter::open(directory, &settings, part),
            opened => opened,
        }
    }

    fn open(directory: &Path, settings: &CacheSettings, part: WriterPart) -> Result<CacheWriter> {
        let named = |name: &str| format!("{name} {}", directory.display());
        let afresh = format!("delete {} to start afresh", directory.display());
        let this_run = || ("this run".to_string(), settings);
        let state = if directory.join(MANIFEST_FILE).is_file() {
            let manifest = Manifest::load(directory)?;
            same_settings((named("the finished cache"), &manifest.settings), this_run(), &afresh)?;
            let files = LocalFiles::new(directory);
            manifest.shards.iter().try_for_each(|record| check_length(&files, directory, record))?;
            tidy(directory, manifest.shards.len())?;
            State::Finished(Box::new(manifest))
        } else {
            let leases = Leases::new(directory, part);
            let mut files = Unfinished::begin_or_open(directory, settings, leases.owner())?;
            // Nothing is lost by beginning anew where nothing is sealed: who mends a teacher or a text after a failed
            // start is not held to that start.
            if files.settings.first_difference(settings).is_some() && !files.rebegin(settings, leases.owner())? {
                same_settings((named("the unfinished cache"), &files.settings), this_run(), &afresh)?;
            }
            check_sealed(&files)?;
            files.discard_leftovers()?;
            let end = files.end()?;
            State::Unfinished(Box::new(Open { files, leases, target: Target::Unknown, end, coder: None }))
        };
        let settings = match &state {
            State::Unfinished(open) => open.files.settings.clone(),
            State::Finished(manifest) => manifest.settings.clone(),
        };
        let (directory, block) = (directory.to_path_buf(), Block::empty(&settings));
        let counts = Counts::default();
        let mut writer = CacheWriter { directory, settings, part, state, block, counts, position: None };
        // Whoever writes this part already is named now, and not after the teacher was loaded.
        writer.next_push()?;
        Ok(writer)
    }

    /// Whether the cache is finished; nothing is left to push.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Finished(_))
    }

    pub fn settings(&self) -> &CacheSettings {
        &self.settings
    }

    /// What is to be done next. Its number goes up by one with each push inside of a shard, and anywhere at the borders of
    /// shards, where those of other writers and those that were sealed before are left out.
    ///
    /// # Errors
    /// [`Error::File`] when another process writes this part; [`Error::Io`].
    pub fn next_push(&mut self) -> Result<Next> {
        let State::Unfinished(open) = &mut self.state else { return Ok(Next::Done) };
        if matches!(open.target, Target::Unknown | Target::Wait) {
            match find(open, self.part, None) {
                Ok(target) => open.target = target,
                Err(error) => {
                    self.finished_by_others(error)?;
                    return Ok(Next::Done);
                }
            }
            if self.directory.join(MANIFEST_FILE).is_file() {
                self.finished_by_others(self.late())?;
                return Ok(Next::Done);
            }
        }
        let State::Unfinished(open) = &self.state else { return Ok(Next::Done) };
        Ok(match open.target {
            Target::Shard(number) | Target::Calibration(number) => {
                Next::Sequence(number * self.settings.sequences_per_shard as u64 + self.counts.sequences)
            }
            Target::Wait => Next::Wait,
            _ => Next::Done,
        })
    }

    /// The numbers of the sequences that are going to be asked for, `most` of them together at most, in ranges that each
    /// end where a shard does (or the data, or `most`): for whoever computes many at once. What other writers do
    /// meanwhile may leave some of them out, so [`next_push`](Self::next_push) decides.
    ///
    /// Nothing when nothing is to be pushed now, and one range at most as long as the coder has something to learn.
    pub fn upcoming(&self, most: u64) -> Vec<Range<u64>> {
        let State::Unfinished(open) = &self.state else { return vec![] };
        let full = self.settings.sequences_per_shard as u64;
        let (mut number, only_one) = match open.target {
            Target::Shard(number) => (number, false),
            Target::Calibration(number) => (number, true),
            _ => return vec![],
        };
        let (mut ranges, mut left, mut start) = (vec![], most, number * full + self.counts.sequences);
        loop {
            let end = ((number + 1) * full).min(open.end.unwrap_or(u64::MAX)).min(start + left);
            if end > start {
                ranges.push(start..end);
                left -= end - start;
            }
            if only_one || left == 0 {
                return ranges;
            }
            // Those that are sealed, or whose targets the coder has learnt from, are not asked for.
            let is_there =
                |number| open.files.is_sealed(number) || open.files.record_path(CALIBRATION_FOLDER, number).is_file();
            number += self.part.count();
            while is_there(number) {
                number += self.part.count();
            }
            start = number * full;
            if open.end.is_some_and(|end| start >= end) {
                return ranges;
            }
        }
    }

    /// How many sequences the shard being filled still takes; batches must end there. 0 if there is none.
    pub fn room(&self) -> u64 {
        match &self.state {
            State::Unfinished(open) => {
                open.length(&self.settings).map_or(0, |length| length.saturating_sub(self.counts.sequences))
            }
            State::Finished(_) => 0,
        }
    }

    /// Notes where the data loader is: about to give `sequence`.
    ///
    /// Recorded with the shard that is being filled, so that whoever goes on after it need not read the data from its
    /// start. It does not enter the finished cache.
    pub fn set_position(&mut self, sequence: u64, loader: serde_json::Value) {
        self.position = Some(Position { sequence, loader });
    }

    /// The newest position recorded with a sealed shard, by any writer, that is at or before `sequence` and after
    /// `after`. Put the loader there, and skip `sequence - position.sequence` sequences.
    ///
    /// # Errors
    /// [`Error::File`] when a record is damaged.
    pub fn position(&self, after: u64, sequence: u64) -> Result<Option<Position>> {
        let State::Unfinished(open) = &self.state else { return Ok(None) };
        let full = self.settings.sequences_per_shard as u64;
        // A shard's position is near its end, so that those before `after` have nothing to say.
        for number in (after / full..sequence / full).rev() {
            for folder in [SEALED_FOLDER, CALIBRATION_FOLDER] {
                let sealed = open.files.record(folder, number)?;
                let position = sealed.and_then(|sealed| sealed.position);
                if let Some(position) = position.filter(|it| it.sequence > after && it.sequence <= sequence) {
                    return Ok(Some(position));
                }
            }
        }
        Ok(None)
    }

    /// Appends the sequence that [`next_push`](Self::next_push) asks for, with its rows (`seq_len` of them; `None` in a cache of
    /// tokens only); seals the shard when that fills it. `text_bytes`: bytes of text that its valid rows predict.
    ///
    /// `log_tail`, `label_log_prob` and codes of routers of rows that are not valid are stored as 0. After an error about the sequence the
    /// writer is as before.
    ///
    /// # Errors
    /// [`Error::NotFinite`] or [`Error::File`] naming the sequence and row that no cache may hold; [`Error::Usage`] when
    /// nothing is left to push; [`Error::Io`].
    pub fn push(&mut self, sequence: PackedSequence, targets: Option<SparseTargets>, text_bytes: u64) -> Result<()> {
        let number = match self.next_push()? {
            Next::Sequence(number) => number,
            _ => return Err(self.too_many()),
        };
        let mut counts = rows::check(&self.settings, &sequence, targets.as_ref()).map_err(|problem| match problem {
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
            if !self.settings.keeps_log_normalizer() {
                rows.log_normalizer = None;
            }
            if self.settings.router().is_none() {
                rows.router = None;
            }
            for row in (0..sequence.seq_len()).filter(|row| !sequence.is_valid(*row)) {
                for capture in &mut rows.captures {
                    capture.log_tail[row] = 0.0;
                    capture.label_log_prob[row] = 0.0;
                }
                if let Some(router) = &mut rows.router {
                    let width = router.width();
                    router.codes[row * width..(row + 1) * width].fill(0);
                }
            }
            mine.extend(&rows);
        }
        self.block.tokens.extend_from_slice(&sequence.tokens);
        self.block.segments.extend_from_slice(&sequence.segments);
        self.counts = summed;
        self.seal_if_full()
    }

    /// What was pushed and is in no sealed shard yet, in its order: all that dropping the writer loses.
    pub fn unsealed(&self) -> impl Iterator<Item = (PackedSequence, Option<SparseTargets>)> {
        (0..self.counts.sequences as usize).map(|number| self.block.sequence(number, self.settings.seq_len))
    }

    /// Says how many sequences there are in all the data, and seals the last shard if that fills it. Whoever comes to
    /// the end of the data calls this.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is none, or when more were pushed; [`Error::Mismatch`] when another writer came to
    /// another end; [`Error::Io`].
    pub fn end(&mut self, sequences: u64) -> Result<()> {
        if sequences == 0 {
            let problem = format!("{}: the cache would hold no sequence", self.directory.display());
            return Err(Error::usage(problem, "give more text, or a shorter [data] seq_len"));
        }
        if let Next::Sequence(next) = self.next_push()?
            && self.counts.sequences > 0
            && next > sequences
        {
            let problem = format!("{}: {next} sequences were pushed of {sequences}", self.directory.display());
            return Err(Error::usage(problem, "count the data's sequences from its start"));
        }
        let full = self.settings.sequences_per_shard as u64;
        let State::Unfinished(open) = &mut self.state else { return Ok(()) };
        let ended = open.files.set_end(sequences, open.leases.owner());
        if let Err(error) = ended {
            return self.finished_by_others(error);
        }
        if self.directory.join(MANIFEST_FILE).is_file() {
            return self.finished_by_others(self.late());
        }
        open.end = Some(sequences);
        if let Target::Shard(number) | Target::Calibration(number) = open.target
            && number * full >= sequences
        {
            // There is no such shard.
            open.leases.release(number);
            open.target = Target::Unknown;
        }
        self.seal_if_full()
    }

    /// Writes the manifest if this writer's part was the last one, and says what is still missing if not.
    ///
    /// # Errors
    /// [`Error::Io`], and whatever is found to be wrong with the records of sealed shards.
    pub fn finish_part(mut self) -> Result<Outcome> {
        let outcome = match &mut self.state {
            State::Finished(manifest) => return Ok(Outcome::Finished(manifest.clone())),
            State::Unfinished(open) => {
                let outcome = complete(&open.files, open.leases.owner());
                open.leases.release_all();
                outcome
            }
        };
        let late = match outcome {
            Ok(Outcome::Missing(_)) if self.directory.join(MANIFEST_FILE).is_file() => self.late(),
            Ok(outcome) => return Ok(outcome),
            Err(error) => error,
        };
        self.finished_by_others(late)?;
        self.finish_part()
    }

    /// Ends the data after what was pushed, if nothing said where it ends, and writes the manifest: for whoever writes
    /// a cache alone. On a cache that was finished before: returns its manifest.
    ///
    /// # Errors
    /// [`Error::Usage`] when no sequence was pushed, or when sequences are still to be pushed; [`Error::File`] when
    /// shards of other writers are missing; [`Error::Io`].
    pub fn finish(mut self) -> Result<Manifest> {
        let next = self.next_push()?;
        if let (Next::Sequence(next), State::Unfinished(open)) = (next, &self.state)
            && open.end.is_none()
        {
            self.end(next)?;
        }
        if let Next::Sequence(next) = self.next_push()? {
            let problem = format!("{}: sequence {next} was not pushed", self.directory.display());
            return Err(Error::usage(problem, "push every sequence that `next_push` asks for"));
        }
        let directory = self.directory.clone();
        match self.finish_part()? {
            Outcome::Finished(manifest) => Ok(*manifest),
            Outcome::Missing(missing) => Err(Error::file(
                directory,
                format!("this cache is unfinished: {missing}"),
                "wait for the other writers, or start those that died again",
            )),
        }
    }

    /// Seals the shard being filled when nothing more goes into it, and finds the next.
    fn seal_if_full(&mut self) -> Result<()> {
        let (part, counts) = (self.part, self.counts);
        let State::Unfinished(open) = &mut self.state else { return Ok(()) };
        if counts.sequences == 0 || open.length(&self.settings) != Some(counts.sequences) {
            return Ok(());
        }
        let sealed = open.seal(part, counts, &self.block, self.position.take());
        if let Err(error) = sealed {
            return self.finished_by_others(error);
        }
        self.block = Block::empty(&self.settings);
        self.counts = Counts::default();
        Ok(())
    }

    /// What is said if a cache that another process finished cannot be opened for some other reason.
    fn late(&self) -> Error {
        Error::file(&self.directory, "it was finished by another process", "run the same again")
    }

    /// Turns to the finished cache if another process has finished it, which explains any error; else gives it back.
    fn finished_by_others(&mut self, error: Error) -> Result<()> {
        if !self.directory.join(MANIFEST_FILE).is_file() {
            return Err(error);
        }
        let manifest = Manifest::load(&self.directory)?;
        if let State::Unfinished(open) = &mut self.state {
            open.leases.release_all();
        }
        tidy(&self.directory, manifest.shards.len())?;
        self.state = State::Finished(Box::new(manifest));
        self.block = Block::empty(&self.settings);
        self.counts = Counts::default();
        Ok(())
    }

    /// The error of pushing where nothing is left to push.
    fn too_many(&self) -> Error {
        let sequences = match &self.state {
            State::Finished(manifest) => manifest.counts.sequences,
            State::Unfinished(open) => open.end.unwrap_or_default(),
        };
        Error::usage(
            format!("{}: the cache ends with {sequences} sequences, and more are given", self.directory.display()),
            "the data has grown since the cache was begun: restore it, or delete the cache directory to start afresh",
        )
    }
}
