//! The first driver: text in, caches of packed tokens and soft targets out. Fills only what is missing.

use std::path::PathBuf;

use burn::tensor::Device;

use crate::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Expectation, SoftTargetSettings, TeacherIdentity, TokenizerIdentity,
    },
    checkpoint::CheckpointReader,
    data::{DataLoader, HeldOut, Position},
    error::{Error, Result},
    inputs::Inputs,
    models::{Decoder, parameter::CheckpointWeights},
    progress::{Progress, Unit},
    recipe::Recipe,
    run::RunOptions,
    selection::Selection,
    targets::{PackedSequence, TargetKind, TargetSource},
    teacher::ResidentTeacher,
};

/// The finished caches of a run.
pub struct Caches {
    pub train: CacheReader,
    pub held_out: Option<CacheReader>,
}

/// Fills the caches of a recipe. Gives the directory that holds them.
///
/// # Errors
/// Whatever is wrong with the recipe's files; [`Error::Interrupted`] when asked to stop, with what was sealed kept.
pub fn run(recipe: &Recipe, options: &RunOptions) -> Result<PathBuf> {
    let mut inputs = Inputs::open(recipe, options)?;
    fill(recipe, &mut inputs, options)?;
    Ok(inputs.plan.cache_dir)
}

/// Fills what the caches lack, and opens them. Completes the plan with what the text came to.
pub fn fill(recipe: &Recipe, inputs: &mut Inputs, options: &RunOptions) -> Result<Caches> {
    // First what costs nothing: the share that is held out may take a reading of all the text, and the teacher's
    // fingerprint one of all its weights.
    inputs.check_text(recipe)?;
    inputs.resolve_held_out()?;
    let mut filler = Filler::new(recipe, inputs, options)?;
    let train = filler.fill("train")?;
    let held_out = if inputs.data.held_out.is_none() { None } else { Some(filler.fill("held_out")?) };
    inputs.plan.set_sequence_count(train.sequence_count())?;
    Ok(Caches { train, held_out })
}

/// The caches as a finished run left them, without computing anything.
pub fn open(inputs: &Inputs) -> Result<Caches> {
    let expectation = Expectation {
        tokenizer_fingerprint: Some(inputs.tokenizer.fingerprint()),
        seq_len: Some(inputs.data.seq_len),
        ..Expectation::default()
    };
    let open = |split: &str| CacheReader::open_expecting(inputs.plan.cache_dir.join(split), &expectation);
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
    token_bytes: Vec<u32>,
}

impl<'a> Filler<'a> {
    fn new(recipe: &'a Recipe, inputs: &'a Inputs, options: &'a RunOptions) -> Result<Self> {
        let teacher_reader = match &recipe.teacher {
            Some(teacher) => Some(CheckpointReader::open(&teacher.checkpoint)?),
            None => None,
        };
        let soft_targets = match (&recipe.teacher, &teacher_reader) {
            (Some(teacher), Some(reader)) => Some(SoftTargetSettings {
                teacher: TeacherIdentity {
                    name: teacher.checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                    fingerprint: reader.fingerprint()?,
                    dtype: "f32".into(),
                },
                selection: recipe.cache.selection(),
                temperatures: recipe.cache.temperatures.iter().map(|&t| t as f32).collect(),
            }),
            _ => None,
        };
        Ok(Filler {
            recipe,
            inputs,
            options,
            device: options.device()?,
            teacher_reader,
            soft_targets,
            teacher: None,
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

    fn fill(&mut self, split: &str) -> Result<CacheReader> {
        let dir = self.inputs.plan.cache_dir.join(split);
        let mut loader = self.loader(split, None)?;
        let settings = self.settings(split, &loader)?;
        let mut writer = CacheWriter::create_or_resume(&dir, settings)?;
        if !writer.is_finished() {
            let mut sealed = 0;
            if let Some(position) = writer.position() {
                sealed = writer.next_sequence() - position.sequence;
                let position: Position = serde_json::from_value(position.loader.clone())
                    .map_err(|error| Error::file(&dir, format!("its position cannot be read: {error}"), "delete it"))?;
                loader = self.loader(split, Some(&position))?;
            }
            self.write(split, &mut loader, &mut writer, sealed)?;
        }
        let manifest = writer.finish()?;
        tracing::debug!("{}: {} sequences", dir.display(), manifest.counts.sequences);
        CacheReader::open(&dir)
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
        teacher.max(self.inputs.tokenizer.vocab_size())
    }

    /// Fills the cache from where the loader is. The first `sealed` sequences it gives are in the cache already: the
    /// batch they began is computed once more as a whole, for a row's last bit may depend on the batch it is in.
    fn write(&mut self, split: &str, loader: &mut DataLoader, writer: &mut CacheWriter, mut sealed: u64) -> Result<()> {
        let seq_len = loader.seq_len() as u64;
        let total = loader.sequence_limit().or_else(|| self.expected()).map(|sequences| sequences * seq_len);
        let label = if self.soft_targets.is_some() { "teacher" } else { "tokens" };
        let label = if split == "held_out" { format!("{label}, held out") } else { label.into() };
        let progress = Progress::new(&label, total, Unit::Tokens);
        let progress = progress.starting_at(writer.next_sequence() * seq_len);
        let batch_tokens = self.recipe.teacher.as_ref().map_or(65_536, |teacher| teacher.batch_tokens);
        let batch = (batch_tokens / seq_len).max(1);
        loop {
            if sealed == 0 {
                writer.set_position(serde_json::to_value(loader.position()).expect("a position is plain data"));
            }
            let mut sequences: Vec<PackedSequence> = Vec::with_capacity(batch as usize);
            while (sequences.len() as u64) < batch {
                match loader.next_sequence()? {
                    Some(sequence) => sequences.push(sequence),
                    None => break,
                }
            }
            if sequences.is_empty() {
                break;
            }
            let count = sequences.len() as u64;
            if count <= sealed {
                sealed -= count;
                continue;
            }
            let targets: Vec<_> = match &self.soft_targets {
                Some(_) => {
                    let first = writer.next_sequence() - sealed;
                    self.teacher(split)?.targets(&sequences, first)?.into_iter().map(Some).collect()
                }
                None => vec![None; sequences.len()],
            };
            for (sequence, targets) in sequences.into_iter().zip(targets).skip(sealed as usize) {
                let bytes = self.text_bytes(&sequence);
                writer.push(sequence, targets, bytes)?;
            }
            progress.advance((count - sealed) * seq_len);
            sealed = 0;
            if self.options.stop_requested() {
                return Err(Error::Interrupted { saved: self.inputs.plan.cache_dir.join(split) });
            }
        }
        progress.finish();
        Ok(())
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
