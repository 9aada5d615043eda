//! The first driver: text in, caches of packed tokens and soft targets out. Fills only what is missing, alone or as one
//! of several writers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use burn::tensor::Device;

use crate::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Expectation, Missing, Next, Outcome, Reuse, SoftTargetSettings,
        TeacherIdentity, TokenizerIdentity, inside, is_url,
    },
    checkpoint::CheckpointReader,
    data::{DataLoader, HeldOut, Position},
    error::{Error, Result},
    inputs::Inputs,
    models::{Decoder, parameter::CheckpointWeights},
    progress::{Progress, Unit},
    recipe::{Recipe, TeacherSection},
    remote::{ApiKey, Attempts, RemoteConfig, RemoteTeacher, SERVED},
    run::RunOptions,
    selection::Selection,
    targets::{PackedSequence, SparseTargets, TargetKind, TargetSource},
    teacher::ResidentTeacher,
};

/// The finished caches of a run.
pub struct Caches {
    pub train: CacheReader,
    pub held_out: Option<CacheReader>,
}

/// What the writing of a part of the caches came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Precomputed {
    /// The directory that holds the caches.
    pub cache_dir: PathBuf,
    /// The caches that lack the parts of other writers, and what they lack; empty when all are finished.
    pub missing: Vec<(PathBuf, Missing)>,
}

/// Fills the caches of a recipe. Gives the directory that holds them.
///
/// # Errors
/// Whatever is wrong with the recipe's files; [`Error::Interrupted`] when asked to stop, with what was sealed kept;
/// [`Error::File`] when other writers are at work on the caches and have not finished.
pub fn run(recipe: &Recipe, options: &RunOptions) -> Result<PathBuf> {
    let mut inputs = Inputs::open(recipe, options)?;
    fill(recipe, &mut inputs, options)?;
    Ok(inputs.plan.cache_dir)
}

/// Fills one part of the caches of a recipe, [`RunOptions::part`], and finishes them if the other parts are written.
///
/// # Errors
/// As of [`run`], without the last one.
pub fn run_part(recipe: &Recipe, options: &RunOptions) -> Result<Precomputed> {
    let mut inputs = Inputs::open(recipe, options)?;
    let filled = fill_part(recipe, &mut inputs, options)?;
    let missing = filled.into_iter().filter_map(|(dir, filled)| match filled {
        Filled::Whole(_) => None,
        Filled::Part(missing) => Some((dir, missing)),
    });
    Ok(Precomputed { missing: missing.collect(), cache_dir: inputs.plan.cache_dir })
}

/// Fills what the caches lack, and opens them. Completes the plan with what the text came to.
pub fn fill(recipe: &Recipe, inputs: &mut Inputs, options: &RunOptions) -> Result<Caches> {
    if recipe.cache.train.is_some() {
        return open(inputs);
    }
    let mut caches = vec![];
    for (dir, filled) in fill_part(recipe, inputs, options)? {
        match filled {
            Filled::Whole(cache) => caches.push(*cache),
            Filled::Part(missing) => {
                let problem = format!("this cache is unfinished: {missing}");
                return Err(Error::file(dir, problem, "wait for the other writers, or start those that died again"));
            }
        }
    }
    let mut caches = caches.into_iter();
    let train = caches.next().expect("there is always a training side");
    inputs.plan.set_sequence_count(train.sequence_count())?;
    Ok(Caches { train, held_out: caches.next() })
}

/// A cache after this writer's part of it was filled.
enum Filled {
    Whole(Box<CacheReader>),
    Part(Missing),
}

/// Fills this writer's part of the training and, if there is one, the held-out side.
fn fill_part(recipe: &Recipe, inputs: &mut Inputs, options: &RunOptions) -> Result<Vec<(PathBuf, Filled)>> {
    if recipe.cache.train.is_some() {
        return Err(Error::Recipe {
            path: recipe.path().to_path_buf(),
            problem: "`cache.train` names a finished cache, so there is nothing to compute".into(),
            tip: "train on it, with `limbeck distill`".into(),
        });
    }
    // First what costs nothing: the share that is held out may take a reading of all the text, and the teacher's
    // fingerprint one of all its weights.
    inputs.check_text(recipe)?;
    inputs.resolve_held_out()?;
    let mut filler = Filler::new(recipe, inputs, options)?;
    let splits: &[&str] = if inputs.data.held_out.is_none() { &["train"] } else { &["train", "held_out"] };
    splits.iter().map(|split| filler.fill(split)).collect()
}

/// The caches as a finished run left them, without computing anything.
pub fn open(inputs: &Inputs) -> Result<Caches> {
    let captured = &inputs.plan.recipe.cache;
    if let Some(train) = &captured.train {
        let held_out = captured.held_out.as_ref().map(CacheReader::open).transpose()?;
        return Ok(Caches { train: CacheReader::open(train)?, held_out });
    }
    let expectation = Expectation {
        tokenizer_fingerprint: Some(inputs.tokenizer.fingerprint()),
        seq_len: Some(inputs.data.seq_len),
        ..Expectation::default()
    };
    let open = |split: &str| CacheReader::open_expecting(inside(&inputs.plan.cache_dir, split), &expectation);
    let held_out = if inputs.data.held_out.is_none() { None } else { Some(open("held_out")?) };
    Ok(Caches { train: open("train")?, held_out })
}

struct Filler<'a> {
    recipe: &'a Recipe,
    inputs: &'a Inputs,
    options: &'a RunOptions,
    device: Device,
    teacher_reader: Option<CheckpointReader>,
    soft_targets: Option<SoftTargetSettings>,
    /// Loaded when the first missing target asks for it.
    teacher: Option<ResidentTeacher>,
    /// Of a recipe that says so, unless its caches are finished.
    remote: Option<RemoteTeacher>,
    token_bytes: Vec<u32>,
}

impl<'a> Filler<'a> {
    fn new(recipe: &'a Recipe, inputs: &'a Inputs, options: &'a RunOptions) -> Result<Self> {
        let teacher_reader = match recipe.teacher_checkpoint() {
            Some(checkpoint) => Some(CheckpointReader::open(checkpoint)?),
            None => None,
        };
        let mut remote = None;
        let identity = match (&recipe.teacher, &teacher_reader) {
            (None, _) => None,
            (Some(teacher), Some(reader)) => Some(TeacherIdentity {
                name: teacher.checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                fingerprint: reader.fingerprint()?,
                dtype: "f32".into(),
            }),
            (Some(section), None) => Some(match finished_remote_teacher(section, inputs) {
                Some(identity) => identity,
                None => {
                    let teacher = connect(recipe, section, inputs, options)?;
                    let (fingerprint, dtype) = (teacher.fingerprint(), teacher.precision());
                    remote = Some(teacher);
                    TeacherIdentity { name: section.model.clone().unwrap_or_default(), fingerprint, dtype }
                }
            }),
        };
        let soft_targets = identity.map(|teacher| SoftTargetSettings {
            teacher,
            selection: recipe.cache.selection(),
            temperatures: recipe.cache.temperatures.iter().map(|&t| t as f32).collect(),
        });
        Ok(Filler {
            recipe,
            inputs,
            options,
            device: options.device()?,
            teacher_reader,
            soft_targets,
            teacher: None,
            remote,
            token_bytes: inputs.tokenizer.token_byte_lengths(),
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

    fn fill(&mut self, split: &str) -> Result<(PathBuf, Filled)> {
        let dir = inside(&self.inputs.plan.cache_dir, split);
        let loader = self.loader(split, None)?;
        let settings = self.settings(split, &loader)?;
        if is_url(&dir) {
            // What is elsewhere is read only.
            let cache = CacheReader::open(&dir)?;
            cache.expect_settings(&settings)?;
            return Ok((dir, Filled::Whole(Box::new(cache))));
        }
        let mut writer = CacheWriter::create_or_resume(&dir, settings, self.options.part)?;
        if !writer.is_finished() {
            self.write(split, &dir, loader, &mut writer)?;
        }
        let filled = match writer.finish_part()? {
            Outcome::Missing(missing) => Filled::Part(missing),
            Outcome::Finished(manifest) => {
                tracing::debug!("{}: {} sequences", dir.display(), manifest.counts.sequences);
                Filled::Whole(Box::new(CacheReader::open(&dir)?))
            }
        };
        Ok((dir, filled))
    }

    fn settings(&self, split: &str, loader: &DataLoader) -> Result<CacheSettings> {
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
            soft_targets: self
                .soft_targets
                .clone()
                .map(|soft_targets| SoftTargetSettings { selection: self.selection(split), ..soft_targets }),
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
            Some(_) => remote_vocab_size(self.inputs),
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

    /// Fills this writer's shards. Batches end where shards do, for a row's last bit may depend on the batch it is in.
    fn write(&mut self, split: &str, dir: &Path, mut loader: DataLoader, writer: &mut CacheWriter) -> Result<()> {
        let reuse = &self.reuse(split, writer.settings())?;
        let seq_len = loader.seq_len() as u64;
        let total = loader.sequence_limit().or_else(|| self.expected()).map(|sequences| sequences * seq_len);
        let label = if self.soft_targets.is_some() { "teacher" } else { "tokens" };
        let label = if split == "held_out" { format!("{label}, held out") } else { label.into() };
        let mut progress = None;
        let batch_tokens = match &self.remote {
            Some(remote) => remote.tokens_at_once(),
            None => self.recipe.teacher.as_ref().map_or(65_536, |teacher| teacher.batch_tokens),
        };
        let batch = (batch_tokens / seq_len).max(1);
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
            let wanted = if given == next { batch.min(writer.room()) } else { 0 };
            let mut sequences: Vec<PackedSequence> = Vec::with_capacity(wanted as usize);
            while (sequences.len() as u64) < wanted {
                match loader.next_sequence()? {
                    Some(sequence) => sequences.push(sequence),
                    None => break,
                }
            }
            let count = sequences.len() as u64;
            given += count;
            if count > 0 {
                writer.set_position(given, serde_json::to_value(loader.position()).expect("a position is plain data"));
                let targets = match &self.soft_targets {
                    Some(_) => self.targets(split, reuse, &sequences, next)?,
                    None => Some(vec![None; sequences.len()]),
                };
                let Some(targets) = targets else { continue };
                for (sequence, targets) in sequences.into_iter().zip(targets) {
                    let bytes = self.text_bytes(&sequence);
                    writer.push(sequence, targets, bytes)?;
                }
                progress.advance(count * seq_len);
            }
            // Fewer than were asked for, or the loader ended before it came there.
            if count < wanted || given < next {
                writer.end(given)?;
            }
        }
        if let Some(progress) = progress {
            progress.finish();
        }
        Ok(())
    }

    /// The targets of sequences in a row, the first of them with the number `first`: from other caches where they have
    /// them, else from the teacher. `None` when the run was asked to stop meanwhile.
    fn targets(
        &mut self,
        split: &str,
        reuse: &Reuse,
        sequences: &[PackedSequence],
        first: u64,
    ) -> Result<Option<Vec<Option<SparseTargets>>>> {
        let mut targets = sequences.iter().map(|sequence| reuse.targets(sequence)).collect::<Result<Vec<_>>>()?;
        let mut start = 0;
        while start < targets.len() {
            let missing = targets[start..].iter().take_while(|targets| targets.is_none()).count();
            if missing > 0 {
                let (wanted, first) = (&sequences[start..start + missing], first + start as u64);
                let selection = self.selection(split);
                let found = match &mut self.remote {
                    None => self.teacher(split)?.targets(wanted, first)?,
                    Some(remote) => {
                        remote.set_selection(selection)?;
                        let Some(found) = remote.targets(wanted, first, &self.options.stop)? else { return Ok(None) };
                        found
                    }
                };
                targets[start..start + missing].iter_mut().zip(found).for_each(|(place, found)| *place = Some(found));
            }
            start += missing.max(1);
        }
        Ok(Some(targets))
    }

    /// Sequences the held-out split may have, for the progress bar alone.
    fn expected(&self) -> Option<u64> {
        match self.recipe.data.held_out {
            HeldOut::Tokens(tokens) => Some(tokens.div_ceil(self.recipe.data.seq_len as u64)),
            _ => None,
        }
    }

    /// Bytes of raw text that the predicted tokens stand for.
    fn text_bytes(&self, sequence: &PackedSequence) -> u64 {
        let predicted = (0..sequence.seq_len()).filter(|&t| sequence.is_valid(t)).map(|t| sequence.tokens[t + 1]);
        predicted.map(|id| self.token_bytes.get(id as usize).copied().unwrap_or(0) as u64).sum()
    }

    fn teacher(&mut self, split: &str) -> Result<&ResidentTeacher> {
        let selection = self.selection(split);
        if self.teacher.is_none() {
            let (Some(reader), Some(config)) = (&self.teacher_reader, &self.inputs.teacher) else {
                unreachable!("soft targets come with a teacher");
            };
            let model = Decoder::load(config.clone(), &CheckpointWeights::new(reader), &self.device)?;
            let temperatures: Vec<f32> = self.recipe.cache.temperatures.iter().map(|&t| t as f32).collect();
            self.teacher = Some(ResidentTeacher::new(model, selection.clone(), &temperatures)?);
        }
        let teacher = self.teacher.as_mut().expect("just loaded");
        teacher.set_selection(selection)?;
        Ok(&*teacher)
    }
}

/// Ids that a remote teacher may name. Servers do not say how many there are; the student predicts as many.
fn remote_vocab_size(inputs: &Inputs) -> usize {
    inputs.student.vocab_size.max(inputs.tokenizer.vocab_size())
}

/// What finished caches say of their remote teacher, if it is the recipe's: its server need not run any more.
fn finished_remote_teacher(section: &TeacherSection, inputs: &Inputs) -> Option<TeacherIdentity> {
    let teacher = |split: &str| {
        let cache = CacheReader::open(inside(&inputs.plan.cache_dir, split)).ok()?;
        let teacher = cache.manifest().settings.soft_targets.as_ref()?.teacher.clone();
        (Some(&teacher.name) == section.model.as_ref() && teacher.fingerprint.starts_with(SERVED)).then_some(teacher)
    };
    let train = teacher("train")?;
    (inputs.data.held_out.is_none() || teacher("held_out")? == train).then_some(train)
}

/// Asks the servers of a recipe's remote teacher what they serve.
fn connect(recipe: &Recipe, section: &TeacherSection, inputs: &Inputs, options: &RunOptions) -> Result<RemoteTeacher> {
    let api_key = match &section.api_key_env {
        None => None,
        Some(name) => {
            let key = std::env::var(name).ok().and_then(ApiKey::new).ok_or_else(|| {
                let problem = format!("names `{name}`, which holds no key in this environment");
                recipe.error("teacher.api_key_env", problem, format!("export {name}, or correct the name"))
            })?;
            Some(key)
        }
    };
    let config = RemoteConfig {
        urls: section.url.clone(),
        model: section.model.clone().unwrap_or_default(),
        api_key,
        concurrency: section.concurrency.unwrap_or(8),
        request_tokens: section.batch_tokens,
        timeout: Duration::from_secs_f64(section.timeout.unwrap_or(300.0)),
        requests_per_second: section.requests_per_second,
        attempts: Attempts { retries: section.retries.unwrap_or(Attempts::default().retries), ..Attempts::default() },
    };
    let (vocab_size, longest) = (remote_vocab_size(inputs), inputs.data.seq_len + 1);
    let teacher = RemoteTeacher::connect(config, recipe.cache.selection(), vocab_size, longest, &options.stop)?;
    teacher.ok_or_else(|| Error::Interrupted { saved: inputs.plan.cache_dir.clone() })
}
