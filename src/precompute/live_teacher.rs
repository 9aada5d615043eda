//! The teacher of a run, whatever kind it is: loaded or connected when its targets are needed, and how many of them it is
//! asked for at once. Knows recipes and teachers; what is written where is not its business.

use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use burn::tensor::Device;
use limbeck_kernels::packed_matmul::Numbers;

use super::served;
use crate::{
    cache::{CacheWriter, TeacherIdentity},
    checkpoint::CheckpointReader,
    error::Result,
    inputs::Inputs,
    memory,
    models::{Decoder, DecoderConfig, parameter::CheckpointWeights},
    parallel::{Collective, launch},
    profile::stage,
    recipe::{Dtype, Recipe, TeacherMode, TeacherSection},
    remote::RemoteTeacher,
    run::RunOptions,
    selection::Selection,
    targets::{PackedSequence, SparseTargets},
    teacher::{ResidentTeacher, ShardSettings, ShardedTeacher, StreamSettings, StreamedTeacher},
};

/// A recipe's teacher, and what it takes to load it.
pub(super) struct LiveTeacher<'a> {
    recipe: &'a Recipe,
    inputs: &'a Inputs,
    options: &'a RunOptions,
    device: Device,
    reader: Option<Arc<CheckpointReader>>,
    /// What connects this process with others that have parts of the teacher.
    world: Option<&'a Rc<dyn Collective>>,
    /// Loaded when the first missing target asks for it; a remote one is there from the start, unless nothing is missing.
    teacher: Option<Teacher>,
}

/// A teacher of any kind.
enum Teacher {
    Resident(Box<ResidentTeacher>),
    Sharded(Box<ShardedTeacher>),
    Streamed(Box<StreamedTeacher>),
    Remote(Box<RemoteTeacher>),
}

impl<'a> LiveTeacher<'a> {
    /// Opens the checkpoint, or connects with the servers unless all that they would be asked for is there.
    pub(super) fn new(
        recipe: &'a Recipe,
        inputs: &'a Inputs,
        options: &'a RunOptions,
        world: Option<&'a Rc<dyn Collective>>,
    ) -> Result<Self> {
        let reader = match recipe.teacher_checkpoint() {
            Some(checkpoint) => Some(Arc::new(CheckpointReader::open(checkpoint)?)),
            None => None,
        };
        Ok(LiveTeacher { recipe, inputs, options, device: options.device()?, reader, world, teacher: None })
    }

    /// What the cache says of the teacher, if the recipe has one.
    pub(super) fn identity(&mut self) -> Result<Option<TeacherIdentity>> {
        let _span = stage("identify the teacher");
        Ok(match (&self.recipe.teacher, &self.reader) {
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
            (Some(section), None) => Some(match served::finished(section, self.inputs) {
                Some(identity) => identity,
                None => {
                    let remote = served::connect(self.recipe, section, self.inputs, self.options)?;
                    let (fingerprint, dtype) = (remote.fingerprint(), remote.precision());
                    self.teacher = Some(Teacher::Remote(Box::new(remote)));
                    let name = section.model.clone().unwrap_or_default();
                    TeacherIdentity { name, fingerprint, dtype, in_training: None }
                }
            }),
        })
    }

    /// The numbers of the sequences that are computed at once, from the one that the writer asks for next.
    ///
    /// What is computed at once ends where a shard does with a resident teacher, for on some devices a row's last bit
    /// depends on the batch it is in; a streamed one computes sweeps of any shards.
    pub(super) fn at_once(&mut self, writer: &CacheWriter, seq_len: u64) -> Result<Vec<Range<u64>>> {
        if let Some(Teacher::Remote(teacher)) = &self.teacher {
            return Ok(writer.upcoming((teacher.tokens_at_once() / seq_len).max(1)));
        }
        let section = self.recipe.teacher.as_ref();
        let batch = (section.map_or(65_536, |teacher| teacher.batch_tokens) / seq_len).max(1);
        // Only these two say themselves how much they take; a resident one is loaded when a target is missing.
        let streamed = section.is_some_and(|teacher| teacher.mode == TeacherMode::Streamed);
        let grouped = streamed || section.is_some_and(|teacher| teacher.mesh.size() > 1);
        let most = match grouped.then(|| self.loaded()).transpose()? {
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

    /// Computes targets, each beside its number in the whole data set, and gives each with its place in `sequences`, in
    /// order. `more`: whether others will follow. `false` when it was asked to stop before it had given them all.
    pub(super) fn targets(
        &mut self,
        selection: Selection,
        sequences: &[(u64, &PackedSequence)],
        more: bool,
        give: &mut dyn FnMut(usize, SparseTargets) -> Result<()>,
    ) -> Result<bool> {
        let stop = self.options.stop.clone();
        match self.loaded()? {
            Teacher::Resident(teacher) => {
                teacher.set_selection(selection)?;
                let mut place = 0;
                for run in sequences.chunk_by(|a, b| a.0 + 1 == b.0) {
                    let own: Vec<PackedSequence> = run.iter().map(|(_, sequence)| (*sequence).clone()).collect();
                    for targets in teacher.targets(&own, run[0].0)? {
                        give(place, targets)?;
                        place += 1;
                    }
                }
            }
            Teacher::Sharded(teacher) => {
                teacher.set_selection(selection)?;
                teacher.each_targets(sequences, give)?;
            }
            Teacher::Streamed(teacher) => {
                teacher.set_selection(selection)?;
                return teacher.targets(sequences, more, &stop, give);
            }
            Teacher::Remote(teacher) => {
                teacher.set_selection(selection)?;
                let _span = stage("ask the servers").with("sequences", sequences.len() as u64);
                let Some(found) = teacher.targets(sequences, &stop)? else { return Ok(false) };
                found.into_iter().enumerate().try_for_each(|(place, targets)| give(place, targets))?;
            }
        }
        Ok(true)
    }

    /// The teacher, loaded if it is not.
    fn loaded(&mut self) -> Result<&mut Teacher> {
        if self.teacher.is_none() {
            let (recipe, inputs, options, device) = (self.recipe, self.inputs, self.options, &self.device);
            let (Some(reader), Some(config), Some(section)) = (&self.reader, &inputs.teacher, &recipe.teacher) else {
                unreachable!("soft targets come with a teacher");
            };
            let selection = recipe.cache.selection();
            let temperatures: Vec<f32> = recipe.cache.temperatures.iter().map(|&t| t as f32).collect();
            if section.dtype == Dtype::Bf16 && *device != Device::flex() {
                let problem = "is `bf16`, in which a teacher computes on the processor alone";
                return Err(recipe.error("teacher.dtype", problem, "use `f32`, or run it with --device cpu"));
            }
            self.teacher = Some(if section.mode == TeacherMode::Streamed && section.mesh.size() == 1 {
                let settings = stream_settings(recipe, section, &inputs.plan.run_dir, 1)?;
                let (config, reader, seq_len) = (config.clone(), reader.clone(), recipe.data.seq_len);
                let streamed =
                    StreamedTeacher::new(config, reader, device, selection, &temperatures, seq_len, settings)?;
                Teacher::Streamed(Box::new(streamed))
            } else if section.mesh.size() > 1 {
                let parts = if self.world.is_some() { 1 } else { section.mesh.size() };
                let settings = shard_settings(recipe, section, config, device, &inputs.plan.run_dir, parts)?;
                Teacher::Sharded(Box::new(match self.world {
                    Some(world) => ShardedTeacher::over(world.clone(), &settings)?,
                    None => {
                        let devices = (0..section.mesh.size()).map(|number| options.device_numbered(number));
                        ShardedTeacher::in_process(&settings, &devices.collect::<Result<Vec<_>>>()?)?
                    }
                }))
            } else {
                let weights = CheckpointWeights::new(reader).in_numbers(numbers_of(section));
                let model = Decoder::load_for_inference(config.clone(), &weights, device)?;
                let teacher = ResidentTeacher::new(model, selection, &temperatures)?;
                Teacher::Resident(Box::new(teacher.with_router_layers(&recipe.cache.router_layers)?))
            });
        }
        Ok(self.teacher.as_mut().expect("just loaded"))
    }
}

/// What a teacher's matrices are multiplied in.
fn numbers_of(section: &TeacherSection) -> Numbers {
    match section.dtype {
        Dtype::F32 => Numbers::F32,
        Dtype::Bf16 => Numbers::Bf16,
    }
}

/// What every rank of a sharded teacher has to know.
/// `parts`: how many of them are in this process, whose memory they share.
pub(super) fn shard_settings(
    recipe: &Recipe,
    section: &TeacherSection,
    config: &DecoderConfig,
    device: &Device,
    run_dir: &Path,
    parts: usize,
) -> Result<ShardSettings> {
    let streaming = match section.mode {
        TeacherMode::Streamed => Some((recipe.data.seq_len, stream_settings(recipe, section, run_dir, parts)?)),
        _ => None,
    };
    Ok(ShardSettings {
        checkpoint: section.checkpoint.clone(),
        config: config.clone(),
        mesh: section.mesh,
        device: device.clone(),
        selection: recipe.cache.selection(),
        temperatures: recipe.cache.temperatures.iter().map(|&t| t as f32).collect(),
        numbers: numbers_of(section),
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
        None => memory::free().map(|free| own + free / 4 * 3 / launch::processes_here() as u64).ok_or_else(|| {
            recipe.error("teacher.memory", "is missing, and this system does not say what is free", "give a size")
        })?,
    };
    let shard = recipe.shard_bytes(recipe.cache.selection().most_ids() as u64);
    Ok(StreamSettings {
        memory: memory / parts,
        numbers: numbers_of(section),
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
