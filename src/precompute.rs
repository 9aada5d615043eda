//! The first driver: text in, caches of packed tokens and soft targets out. Fills only what is missing, alone or as one
//! of several writers.

mod served;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use limbeck_kernels::packed_matmul::Numbers;

use crate::{
    cache::{
        CacheReader, CacheSettings, CacheWriter, Codec, Expectation, Missing, Next, Outcome, Reuse, SoftTargetSettings,
        TeacherIdentity, TokenizerIdentity, inside, is_url,
    },
    checkpoint::CheckpointReader,
    data::{DataLoader, HeldOut, Position},
    error::{Error, Result},
    inputs::Inputs,
    memory,
    models::{Decoder, DecoderConfig, parameter::CheckpointWeights, read_config},
    parallel::{Collective, Mesh, launch},
    progress::{Progress, Unit},
    recipe::{Dtype, Recipe, TeacherMode, TeacherSection},
    remote::RemoteTeacher,
    run::RunOptions,
    selection::Selection,
    targets::{PackedSequence, SparseTargets, TargetKind, TargetSource},
    teacher::{ResidentTeacher, ShardSettings, ShardedTeacher, StreamSettings, StreamedTeacher, sharded},
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
    /// Whether this process is the first, or the only one. Others have computed for it, and know nothing of caches.
    pub is_first: bool,
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
///
/// Where the teacher has a mesh and this is one of the processes that `mpirun` or `srun` started for it, the first of
/// them fills the caches, and the others compute for it until it is done.
pub fn run_part(recipe: &Recipe, options: &RunOptions) -> Result<Precomputed> {
    let world = world(recipe)?;
    if let Some(world) = world.as_ref().filter(|world| world.rank() > 0) {
        return serve(recipe, options, &**world);
    }
    let fill = || {
        let mut inputs = Inputs::open(recipe, options)?;
        let filled = fill_part(recipe, &mut inputs, options, world.as_ref())?;
        let missing = filled.into_iter().filter_map(|(dir, filled)| match filled {
            Filled::Whole(_) => None,
            Filled::Part(missing) => Some((dir, missing)),
        });
        Ok(Precomputed { missing: missing.collect(), cache_dir: inputs.plan.cache_dir, is_first: true })
    };
    let result = fill();
    if let Some(world) = &world {
        match &result {
            Err(error) if !matches!(error, Error::Interrupted { .. }) => sharded::tell_failure(&**world, error),
            _ => sharded::dismiss(&**world),
        }
    }
    result
}

/// The devices that a recipe's teacher is divided over, where they are several.
fn mesh_of(recipe: &Recipe) -> Option<Mesh> {
    recipe.teacher.as_ref().map(|teacher| teacher.mesh).filter(|mesh| mesh.size() > 1)
}

/// What connects the processes that were started for a teacher's mesh; `None` where this process is the only one.
fn world(recipe: &Recipe) -> Result<Option<Rc<dyn Collective>>> {
    let Some(mesh) = mesh_of(recipe).filter(|_| launch::one_of_several()) else { return Ok(None) };
    #[cfg(feature = "mpi")]
    {
        let world = crate::parallel::mpi::Mpi::join()?;
        let (started, wanted) = (world.size(), mesh.size());
        if started != wanted {
            let problem = format!("has {wanted} devices ({mesh}), and {started} processes were started");
            let tip = format!("start {wanted}, as in `mpirun -n {wanted}`, or change the mesh");
            return Err(recipe.error("teacher.mesh", problem, tip));
        }
        Ok(Some(Rc::new(world)))
    }
    #[cfg(not(feature = "mpi"))]
    {
        let problem = format!("({mesh}) is for this and other processes together, and this build cannot talk to them");
        let tip = "build with `--features mpi`, or run one process without mpirun and srun";
        Err(recipe.error("teacher.mesh", problem, tip))
    }
}

/// Computes for the first process until it is done.
fn serve(recipe: &Recipe, options: &RunOptions, world: &dyn Collective) -> Result<Precomputed> {
    let section = recipe.teacher.as_ref().expect("a mesh is the teacher's");
    let settings = || {
        let reader = CheckpointReader::open(&section.checkpoint)?;
        let config = read_config(reader.config_path(), reader.config())?;
        recipe.check_selection(config.vocab_size)?;
        recipe.check_mesh(&config)?;
        let device = options.device_numbered(launch::local_rank().unwrap_or(world.rank()))?;
        shard_settings(recipe, section, &config, &device, 1)
    };
    let settings = settings().inspect_err(|error| sharded::tell_failure(world, error))?;
    sharded::serve(world, &settings)?;
    Ok(Precomputed { cache_dir: PathBuf::new(), missing: vec![], is_first: false })
}

/// Fills what the caches lack, and opens them. Completes the plan with what the text came to.
pub fn fill(recipe: &Recipe, inputs: &mut Inputs, options: &RunOptions) -> Result<Caches> {
    if recipe.cache.train.is_some() {
        return open(inputs);
    }
    let mut caches = vec![];
    if mesh_of(recipe).is_some() && launch::one_of_several() {
        let problem =
            "has several devices, and this is one of several processes, of which only one can go on after the teacher";
        let tip = "run `limbeck precompute-teacher-logits` with mpirun or srun first, and then this without them";
        return Err(recipe.error("teacher.mesh", problem, tip));
    }
    for (dir, filled) in fill_part(recipe, inputs, options, None)? {
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
fn fill_part(
    recipe: &Recipe,
    inputs: &mut Inputs,
    options: &RunOptions,
    world: Option<&Rc<dyn Collective>>,
) -> Result<Vec<(PathBuf, Filled)>> {
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
    let mut filler = Filler::new(recipe, inputs, options, world)?;
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
    teacher_reader: Option<Arc<CheckpointReader>>,
    soft_targets: Option<SoftTargetSettings>,
    /// What connects this process with others that have parts of the teacher.
    world: Option<&'a Rc<dyn Collective>>,
    /// Loaded when the first missing target asks for it; a remote one is there from the start, unless nothing is missing.
    teacher: Option<Teacher>,
    token_bytes: Vec<u32>,
    /// Time that went into encoding and writing the split that is being filled.
    writing: Duration,
}

impl<'a> Filler<'a> {
    fn new(
        recipe: &'a Recipe,
        inputs: &'a Inputs,
        options: &'a RunOptions,
        world: Option<&'a Rc<dyn Collective>>,
    ) -> Result<Self> {
        let teacher_reader = match recipe.teacher_checkpoint() {
            Some(checkpoint) => Some(Arc::new(CheckpointReader::open(checkpoint)?)),
            None => None,
        };
        let mut teacher = None;
        let identity = match (&recipe.teacher, &teacher_reader) {
            (None, _) => None,
            (Some(section), Some(reader)) => Some(TeacherIdentity {
                name: section.checkpoint.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                fingerprint: reader.fingerprint()?,
                dtype: match section.dtype {
                    Dtype::F32 => "f32".into(),
                    Dtype::Bf16 => "bf16".into(),
                },
                in_training: None,
            }),
            (Some(section), None) => Some(match served::finished(section, inputs) {
                Some(identity) => identity,
                None => {
                    let remote = served::connect(recipe, section, inputs, options)?;
                    let (fingerprint, dtype) = (remote.fingerprint(), remote.precision());
                    teacher = Some(Teacher::Remote(Box::new(remote)));
                    let name = section.model.clone().unwrap_or_default();
                    TeacherIdentity { name, fingerprint, dtype, in_training: None }
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
            world,
            teacher_reader,
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

    /// Fills this writer's shards. What is computed at once ends where a shard does with a resident teacher, for on some
    /// devices a row's last bit depends on the batch it is in; a streamed one computes sweeps of any shards.
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
            let ranges = if ended { vec![] } else { self.at_once(writer, seq_len)? };
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

    /// The numbers of the sequences that are computed at once, from the one that the writer asks for next.
    fn at_once(&mut self, writer: &CacheWriter, seq_len: u64) -> Result<Vec<Range<u64>>> {
        if let Some(Teacher::Remote(teacher)) = &self.teacher {
            return Ok(writer.upcoming((teacher.tokens_at_once() / seq_len).max(1)));
        }
        let section = self.recipe.teacher.as_ref();
        let batch = (section.map_or(65_536, |teacher| teacher.batch_tokens) / seq_len).max(1);
        // Only these two say themselves how much they take; a resident one is loaded when a target is missing.
        let streamed = section.is_some_and(|teacher| teacher.mode == TeacherMode::Streamed);
        let grouped = streamed || section.is_some_and(|teacher| teacher.mesh.size() > 1);
        let most = match grouped.then(|| self.teacher()).transpose()? {
            Some(Teacher::Streamed(teacher)) => return Ok(writer.upcoming(teacher.sweep_sequences() as u64)),
            Some(Teacher::Sharded(teacher)) => {
                let most = teacher.sequences_at_once() as u64;
                if streamed {
                    return Ok(writer.upcoming(most));
                }
                most
            }
            _ => batch,
        };
        let mut ranges = writer.upcoming(most);
        ranges.truncate(1);
        Ok(ranges)
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
            let stop = self.options.stop.clone();
            let numbered: Vec<(u64, &PackedSequence)> =
                missing.iter().map(|&place| (asked[place].number, &asked[place].sequence)).collect();
            let (recipe, inputs, options, device) = (self.recipe, self.inputs, self.options, &self.device);
            let reader = &self.teacher_reader;
            match teacher_of(&mut self.teacher, recipe, inputs, options, reader, device, self.world)? {
                Teacher::Resident(teacher) => {
                    teacher.set_selection(selection)?;
                    for run in missing.chunk_by(|a, b| a + 1 == *b) {
                        let sequences = run.iter().map(|&place| asked[place].sequence.clone());
                        let found = teacher.targets(&sequences.collect::<Vec<_>>(), asked[run[0]].number)?;
                        run.iter().zip(found).try_for_each(|(&place, targets)| push(place, Some(targets)))?;
                    }
                }
                Teacher::Sharded(teacher) => {
                    teacher.set_selection(selection)?;
                    let found = teacher.targets(&numbered)?;
                    missing.iter().zip(found).try_for_each(|(&place, targets)| push(place, Some(targets)))?;
                }
                Teacher::Streamed(teacher) => {
                    teacher.set_selection(selection)?;
                    let give = &mut |place: usize, targets| push(missing[place], Some(targets));
                    if !teacher.targets(&numbered, more, &stop, give)? {
                        return Ok(false);
                    }
                }
                Teacher::Remote(teacher) => {
                    teacher.set_selection(selection)?;
                    let sequences: Vec<(u64, &PackedSequence)> =
                        missing.iter().map(|&place| (asked[place].number, &asked[place].sequence)).collect();
                    let Some(found) = teacher.targets(&sequences, &stop)? else { return Ok(false) };
                    missing.iter().zip(found).try_for_each(|(&place, targets)| push(place, Some(targets)))?;
                }
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

    fn teacher(&mut self) -> Result<&mut Teacher> {
        let (recipe, inputs, options, device) = (self.recipe, self.inputs, self.options, &self.device);
        teacher_of(&mut self.teacher, recipe, inputs, options, &self.teacher_reader, device, self.world)
    }
}

/// A sequence that the writer asks for.
struct Asked {
    number: u64,
    sequence: PackedSequence,
    /// Where the loader is after it, at the ends of shards.
    position: Option<serde_json::Value>,
}

/// The teacher, loaded if it is not.
fn teacher_of<'a>(
    teacher: &'a mut Option<Teacher>,
    recipe: &Recipe,
    inputs: &Inputs,
    options: &RunOptions,
    reader: &Option<Arc<CheckpointReader>>,
    device: &Device,
    world: Option<&Rc<dyn Collective>>,
) -> Result<&'a mut Teacher> {
    if teacher.is_none() {
        let (Some(reader), Some(config), Some(section)) = (reader, &inputs.teacher, &recipe.teacher) else {
            unreachable!("soft targets come with a teacher");
        };
        let selection = recipe.cache.selection();
        let temperatures: Vec<f32> = recipe.cache.temperatures.iter().map(|&t| t as f32).collect();
        *teacher = Some(if section.mode == TeacherMode::Streamed && section.mesh.size() == 1 {
            let settings = stream_settings(recipe, section, &inputs.plan.run_dir, 1)?;
            let (config, reader, seq_len) = (config.clone(), reader.clone(), recipe.data.seq_len);
            let streamed = StreamedTeacher::new(config, reader, device, selection, &temperatures, seq_len, settings)?;
            Teacher::Streamed(Box::new(streamed))
        } else if section.mesh.size() > 1 {
            let parts = if world.is_some() { 1 } else { section.mesh.size() };
            let settings = shard_settings(recipe, section, config, device, parts)?;
            Teacher::Sharded(Box::new(match world {
                Some(world) => ShardedTeacher::over(world.clone(), &settings)?,
                None => {
                    let devices = (0..section.mesh.size()).map(|number| options.device_numbered(number));
                    ShardedTeacher::in_process(&settings, &devices.collect::<Result<Vec<_>>>()?)?
                }
            }))
        } else {
            let numbers = match section.dtype {
                Dtype::F32 => Numbers::F32,
                Dtype::Bf16 if *device == Device::flex() => Numbers::Bf16,
                Dtype::Bf16 => {
                    let problem = "is `bf16`, in which a teacher computes on the processor alone";
                    return Err(recipe.error("teacher.dtype", problem, "use `f32`, or run it with --device cpu"));
                }
            };
            let weights = CheckpointWeights::new(reader).in_numbers(numbers);
            let model = Decoder::load_for_inference(config.clone(), &weights, device)?;
            Teacher::Resident(Box::new(ResidentTeacher::new(model, selection, &temperatures)?))
        });
    }
    Ok(teacher.as_mut().expect("just loaded"))
}

/// What every rank of a sharded teacher has to know.
/// `parts`: how many of them are in this process.
fn shard_settings(
    recipe: &Recipe,
    section: &TeacherSection,
    config: &DecoderConfig,
    device: &Device,
    parts: usize,
) -> Result<ShardSettings> {
    let streaming = match section.mode {
        TeacherMode::Streamed => Some((recipe.data.seq_len, stream_settings(recipe, section, Path::new(""), parts)?)),
        _ => None,
    };
    Ok(ShardSettings {
        checkpoint: section.checkpoint.clone(),
        config: config.clone(),
        mesh: section.mesh,
        device: device.clone(),
        selection: recipe.cache.selection(),
        temperatures: recipe.cache.temperatures.iter().map(|&t| t as f32).collect(),
        batch_sequences: (section.batch_tokens as usize / recipe.data.seq_len).max(1),
        streaming,
    })
}

/// What a streamed teacher may take of this machine beside what is taken already.
/// When a process has several parts of it, for one of them.
fn stream_settings(recipe: &Recipe, section: &TeacherSection, run_dir: &Path, parts: usize) -> Result<StreamSettings> {
    let (own, parts) = (memory::of_this_process(), parts as u64);
    let memory = match section.memory {
        Some(memory) => memory,
        None => memory::free().map(|free| own + free / 4 * 3).ok_or_else(|| {
            recipe.error("teacher.memory", "is missing, and this system does not say what is free", "give a size")
        })?,
    };
    let shard = recipe.cache.sequences_per_shard as u64 * shard_sequence_bytes(recipe);
    Ok(StreamSettings {
        memory: memory / parts,
        // Buffers of the text and of what the allocator keeps come to that.
        taken: vec![
            ("the program", (own + OWN_GROWTH + memory / 16) / parts),
            ("a shard in the making", shard.div_ceil(parts)),
        ],
        batch_tokens: section.batch_tokens,
        sweep_tokens: section.sweep_tokens,
        spill: section.spill.unwrap_or_default(),
        spill_dir: run_dir.to_path_buf(),
    })
}

/// Bytes by which the program grows beside the teacher and the cache.
const OWN_GROWTH: u64 = 32 << 20;

/// The most that one sequence takes in a shard that is being filled or sealed.
fn shard_sequence_bytes(recipe: &Recipe) -> u64 {
    let (ids, captures) = (recipe.cache.selection().most_ids() as u64, recipe.cache.temperatures.len() as u64);
    let row = 12 + 8 + 4 * ids + captures * (4 * ids + 8);
    // Codecs other than `raw` make the bytes of a shard beside its numbers.
    let coded = if recipe.cache.codec == Codec::Raw { 0 } else { row / 2 };
    (recipe.data.seq_len as u64 + 1) * (row + coded)
}

/// A teacher of any kind.
enum Teacher {
    Resident(Box<ResidentTeacher>),
    Sharded(Box<ShardedTeacher>),
    Streamed(Box<StreamedTeacher>),
    Remote(Box<RemoteTeacher>),
}
