//! The first driver: text in, caches of packed tokens and soft targets out. Fills only what is missing, alone or as one
//! of several writers.
//!
//! Here is what a run consists of; [`filler`] fills one cache, [`live_teacher`] is whatever teacher it asks, and
//! [`processes`] are those that a mesh was started as.

mod filler;
mod live_teacher;
mod processes;
mod served;

use std::path::PathBuf;
use std::rc::Rc;

use self::{
    filler::Filler,
    processes::{mesh_of, serve, world},
};
use crate::{
    cache::{CacheReader, Expectation, Missing, inside},
    error::{Error, Result},
    inputs::Inputs,
    parallel::{Collective, launch},
    profile::record,
    recipe::Recipe,
    run::RunOptions,
    targets::TargetSource,
    teacher::sharded,
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
    record(options.profile.as_deref(), COMMAND, || {
        let mut inputs = Inputs::open(recipe, options)?;
        fill(recipe, &mut inputs, options)?;
        Ok(inputs.plan.cache_dir)
    })
}

/// What profiles call this.
const COMMAND: &str = "precompute-teacher-logits";

/// Fills one part of the caches of a recipe, [`RunOptions::part`], and finishes them if the other parts are written.
///
/// # Errors
/// As of [`run`], without the last one.
///
/// Where the teacher has a mesh and this is one of the processes that `mpirun` or `srun` started for it, the first of
/// them fills the caches, and the others compute for it until it is done. The first alone writes a profile.
pub fn run_part(recipe: &Recipe, options: &RunOptions) -> Result<Precomputed> {
    let world = world(recipe)?;
    if let Some(world) = world.as_ref().filter(|world| world.rank() > 0) {
        return serve(recipe, options, &**world);
    }
    let result = record(options.profile.as_deref(), COMMAND, || {
        let mut inputs = Inputs::open(recipe, options)?;
        let filled = fill_part(recipe, &mut inputs, options, world.as_ref())?;
        let missing = filled.into_iter().filter_map(|(dir, filled)| match filled {
            Filled::Whole(_) => None,
            Filled::Part(missing) => Some((dir, missing)),
        });
        Ok(Precomputed { missing: missing.collect(), cache_dir: inputs.plan.cache_dir, is_first: true })
    });
    if let Some(world) = &world {
        match &result {
            Err(error) if !matches!(error, Error::Interrupted { .. }) => sharded::tell_failure(&**world, error),
            _ => sharded::dismiss(&**world),
        }
    }
    result
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
