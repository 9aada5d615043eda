//! The processes that `mpirun` or `srun` started for a teacher's mesh: how they find each other, and what those do that
//! are not the first.

use std::path::PathBuf;
use std::rc::Rc;

use super::{Precomputed, live_teacher::shard_settings};
use crate::{
    checkpoint::CheckpointReader,
    error::Result,
    models::read_config,
    parallel::{Collective, Mesh, launch},
    recipe::Recipe,
    run::RunOptions,
    teacher::sharded,
};

/// The devices that a recipe's teacher is divided over, where they are several.
pub(super) fn mesh_of(recipe: &Recipe) -> Option<Mesh> {
    recipe.teacher.as_ref().map(|teacher| teacher.mesh).filter(|mesh| mesh.size() > 1)
}

/// What connects the processes that were started for a teacher's mesh; `None` where this process is the only one.
pub(super) fn world(recipe: &Recipe) -> Result<Option<Rc<dyn Collective>>> {
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
pub(super) fn serve(recipe: &Recipe, options: &RunOptions, world: &dyn Collective) -> Result<Precomputed> {
    let section = recipe.teacher.as_ref().expect("a mesh is the teacher's");
    let settings = || {
        let reader = CheckpointReader::open(&section.checkpoint)?;
        let config = read_config(reader.config_path(), reader.config())?;
        recipe.check_selection(config.vocab_size)?;
        recipe.check_mesh(&config)?;
        let device = options.device_numbered(launch::local_rank().unwrap_or(world.rank()))?;
        shard_settings(recipe, section, &config, &device, &options.run_dir(recipe), 1)
    };
    let settings = settings().inspect_err(|error| sharded::tell_failure(world, error))?;
    sharded::serve(world, &settings)?;
    Ok(Precomputed { cache_dir: PathBuf::new(), missing: vec![], is_first: false })
}
