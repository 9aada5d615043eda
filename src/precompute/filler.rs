//! Fills one cache: asks the writer which sequences it wants next, the loader for them, and other caches or the teacher
//! for their targets.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{Filled, live_teacher::LiveTeacher, served};
use crate::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Next, Outcome, Reuse, SoftTargetSettings, TokenizerIdentity, inside,
        is_url,
    },
    data::{DataLoader, HeldOut, Position},
    error::{Error, Result},
    inputs::Inputs,
    parallel::Collective,
    profile::stage,
    progress::{Progress, Unit},
    recipe::Recipe,
    run::RunOptions,
    selection::Selection,
    targets::{PackedSequence, SparseTargets, TargetKind},
};

/// Fills the caches of a run, one after the other.
pub(super) struct Filler<'a> {
    recipe: &'a Recipe,
    inputs: &'a Inputs,
    options: &'a RunOptions,
    teacher: LiveTeacher<'a>,
    soft_targets: Option<SoftTargetSettings>,
    token_bytes: Vec<u32>,
    /// Time that went into encoding and writing the split that is being filled.
    writing: Duration,
}

impl<'a> Filler<'a> {
    pub(super) fn new(
        recipe: &'a Recipe,
        inputs: &'a Inputs,
        options: &'a RunOptions,
        world: Option<&'a Rc<dyn Collective>>,
    ) -> Result<Self> {
        let mut teacher = LiveTeacher::new(recipe, inputs, options, world)?;
        let identity = teacher.identity()?;
        let router = inputs.teacher.as_ref().map(|teacher| recipe.kept_routers(teacher)).transpose()?.flatten();
        let soft_targets = identity.map(|teacher| SoftTargetSettings {
            teacher,
            selection: recipe.cache.selection(),
            temperatures: recipe.cache.temperatures.iter().map(|&t| t as f32).collect(),
            router,
        });
        Ok(Filler {
            recipe,
            inputs,
            options,
            soft_targets,
            teacher,
            token_bytes: inputs.tokenizer.token_byte_lengths(),
            writing: Duration::ZERO,
        })
    }

    fn loader(&self, split: &str, position: Option<&Position>) -> Result<DataLoader> {
        let (data, tokenizer) = (&self.inputs.data, &self.inputs.tokenizer);
        match position {
            Some(position) => DataLoader::resume(data, tokenizer, position),
            None if split == "held_out" => DataLoader::held_out(data, tokenizer),
            None => DataLoader::new(data, tokenizer),
        }
    }

    /// Fills this writer's part of one cache. Gives its directory with it.
    pub(super) fn fill(&mut self, split: &str) -> Result<(PathBuf, Filled)> {
        let _span = stage(if split == "held_out" { "fill the held-out cache" } else { "fill the cache" });
        let dir = inside(&self.inputs.plan.cache_dir, split);
        let loader = self.loader(split, None)?;
        let settings = self.settings(split, &loader)?;
        if is_url(&dir) {
            // What is elsewhere is read only.
            let cache = CacheReader::open(&dir)?;
            cache.expect_settings(&settings)?;
            return Ok((dir, Filled::Whole(Box::new(cache))));
        }
        let began = Instant::now();
        self.writing = Duration::ZERO;
        let mut writer = CacheWriter::create_or_resume(&dir, settings, self.options.part)?;
        if !writer.is_finished() {
            self.write(split, &dir, loader, &mut writer)?;
        }
        let finishing = Instant::now();
        let outcome = writer.finish_part()?;
        let (writing, whole) = (self.writing + finishing.elapsed(), began.elapsed());
        let share = 100.0 * writing.as_secs_f64() / whole.as_secs_f64();
        tracing::debug!("{}: {share:.2}% of {:.1} s went into writing", dir.display(), whole.as_secs_f64());
        let filled = match outcome {
            Outcome::Missing(missing) => Filled::Part(missing),
            Outcome::Finished(manifest) => {
                tracing::debug!("{}: {} sequences", dir.display(), manifest.counts.sequences);
                Filled::Whole(Box::new(CacheReader::open(&dir)?))
            }
        };
        Ok((dir, filled))
    }

    fn settings(&self, split: &str, loader: &DataLoader) -> Result<CacheSettings> {
        let _span = stage("hash the text");
        // The number of tokens asked for decides where a cache ends, so it belongs to the data's identity.
        let mut identity = blake3::Hasher::new();
        identity.update(loader.data_fingerprint()?.as_bytes());
        if let Some(limit) = loader.sequence_limit() {
            identity.update(&limit.to_le_bytes());
        }
        Ok(CacheSettings {
            split: split.into(),
            data_fingerprint: identity.finalize().to_hex().to_string(),
            tokenizer: TokenizerIdentity {
                fingerprint: self.inputs.tokenizer.fingerprint(),
                vocab_size: self.vocab_size(),
            },
            seq_len: self.inputs.data.seq_len,
            sequences_per_shard: self.recipe.cache.sequences_per_shard,
            codec: self.recipe.cache.codec,
            levels: self.recipe.cache.levels,
            log_normalizer: self.recipe.cache.log_normalizer,
            soft_targets: self.soft_targets.clone().map(|soft_targets| SoftTargetSettings {
                selection: self.selection(split),
                // Routers are learnt from, and not measured.
                router: soft_targets.router.filter(|_| split != "held_out"),
                ..soft_targets
            }),
        })
    }

    /// What is kept of a split. What is measured on held-out text is no gradient that could be unbiased, so draws serve
    /// the training text alone.
    fn selection(&self, split: &str) -> Selection {
        let selection = self.recipe.cache.selection();
        if split == "held_out" && selection.kind() == TargetKind::Sampled { Selection::default() } else { selection }
    }

    /// Ids the soft targets may name: the teacher's, which may be padded beyond the tokenizer's.
    fn vocab_size(&self) -> usize {
        let teacher = self.inputs.teacher.as_ref().map_or(0, |teacher| teacher.vocab_size);
        match self.recipe.remote_teacher() {
            Some(_) => served::vocab_size(self.inputs),
            None => teacher.max(self.inputs.tokenizer.vocab_size()),
        }
    }

    /// The caches of other runs that may have some of the targets.
    fn reuse(&self, split: &str, settings: &CacheSettings) -> Result<Reuse> {
        if self.soft_targets.is_none() {
            return Ok(Reuse::default());
        }
        let directories: Vec<PathBuf> = self.recipe.cache.reuse.iter().map(|dir| dir.join(split)).collect();
        let reuse = Reuse::open(&directories, settings)?;
        if !directories.is_empty() {
            tracing::info!("{split}: targets of {} sequences are at hand in other caches", reuse.sequence_count());
        }
        Ok(reuse)
    }

    /// Fills this writer's shards.
    fn write(&mut self, split: &str, dir: &Path, mut loader: DataLoader, writer: &mut CacheWriter) -> Result<()> {
        let reuse = &self.reuse(split, writer.settings())?;
        let seq_len = loader.seq_len() as u64;
        let total = loader.sequence_limit().or_else(|| self.expected()).map(|sequences| sequences * seq_len);
        let label = if self.soft_targets.is_some() { "teacher" } else { "tokens" };
        let label = if split == "held_out" { format!("{label}, held out") } else { label.into() };
        let mut progress = None;
        // Sequences that the loader has given, or gone past.
        let mut given = 0;
        loop {
            if self.options.stop_requested() {
                return Err(Error::Interrupted { saved: dir.to_path_buf() });
            }
            let next = match writer.next_push()? {
                Next::Sequence(number) => number,
                // Others write what the coder learns from.
                Next::Wait => {
                    std::thread::sleep(Duration::from_millis(500));
                    continue;
                }
                Next::Done => break,
            };
            if next < given {
                (loader, given) = (self.loader(split, None)?, 0);
            }
            if let Some(position) = writer.position(given, next)? {
                let saved: Position = serde_json::from_value(position.loader)
                    .map_err(|error| Error::file(dir, format!("its position cannot be read: {error}"), "delete it"))?;
                (loader, given) = (self.loader(split, Some(&saved))?, position.sequence);
            }
            while given < next && !self.options.stop_requested() && loader.next_sequence()?.is_some() {
                given += 1;
            }
            let progress =
                progress.get_or_insert_with(|| Progress::new(&label, total, Unit::Tokens).starting_at(given * seq_len));
            if self.options.stop_requested() {
                continue;
            }
            // The loader may have ended before it came there.
            let (mut asked, mut ended) = (vec![], given < next);
            let ranges = if ended { vec![] } else { self.teacher.at_once(writer, seq_len)? };
            'ranges: for range in ranges {
                while given < range.end {
                    let Some(sequence) = loader.next_sequence()? else {
                        ended = true;
                        break 'ranges;
                    };
                    if given >= range.start {
                        asked.push(Asked { number: given, sequence, position: None });
                    }
                    given += 1;
                }
                if let Some(last) = asked.last_mut() {
                    last.position = Some(serde_json::to_value(loader.position()).expect("a position is plain data"));
                }
            }
            let more = !ended && loader.sequence_limit().is_none_or(|limit| given < limit);
            if !self.compute(split, reuse, &asked, more, writer, progress)? {
                continue;
            }
            if ended {
                writer.end(given)?;
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(())
    }

    /// Pushes sequences with their targets: from other caches where they have them, else from the teacher, which is told
    /// whether `more` will follow. Whether all of them were pushed, and not only those before a request to stop.
    fn compute(
        &mut self,
        split: &str,
        reuse: &Reuse,
        asked: &[Asked],
        more: bool,
        writer: &mut CacheWriter,
        progress: &Progress,
    ) -> Result<bool> {
        let mut missing = vec![];
        if self.soft_targets.is_some() {
            for (place, asked) in asked.iter().enumerate() {
                if reuse.targets(&asked.sequence)?.is_none() {
                    missing.push(place);
                }
            }
        }
        let selection = self.selection(split);
        let (token_bytes, writing) = (&self.token_bytes, &mut self.writing);
        let mut push_one = |asked: &Asked, targets: Option<SparseTargets>| {
            // Another writer may have finished the cache meanwhile.
            if writer.next_push()? == Next::Sequence(asked.number) {
                if let Some(position) = &asked.position {
                    writer.set_position(asked.number + 1, position.clone());
                }
                let bytes = asked.sequence.text_bytes(token_bytes);
                let began = Instant::now();
                writer.push(asked.sequence.clone(), targets, bytes)?;
                *writing += began.elapsed();
                progress.advance(asked.sequence.seq_len() as u64);
            }
            Ok(())
        };
        // Pushes in order: what is at hand up to `place`, and that of `place` itself.
        let mut pushed = 0;
        let mut push = |place: usize, targets: Option<SparseTargets>| -> Result<()> {
            while pushed < place {
                push_one(&asked[pushed], reuse.targets(&asked[pushed].sequence)?)?;
                pushed += 1;
            }
            if targets.is_some() {
                push_one(&asked[place], targets)?;
                pushed += 1;
            }
            Ok(())
        };
        if !missing.is_empty() {
            let numbered: Vec<(u64, &PackedSequence)> =
                missing.iter().map(|&place| (asked[place].number, &asked[place].sequence)).collect();
            let give = &mut |place: usize, targets| push(missing[place], Some(targets));
            if !self.teacher.targets(selection, &numbered, more, give)? {
                return Ok(false);
            }
        }
        push(asked.len(), None)?;
        Ok(true)
    }

    /// Sequences the held-out split may have, for the progress bar alone.
    fn expected(&self) -> Option<u64> {
        match self.recipe.data.held_out {
            HeldOut::Tokens(tokens) => Some(tokens.div_ceil(self.recipe.data.seq_len as u64)),
            _ => None,
        }
    }
}

/// A sequence that the writer asks for.
struct Asked {
    number: u64,
    sequence: PackedSequence,
    /// Where the loader is after it, at the ends of shards.
    position: Option<serde_json::Value>,
}
