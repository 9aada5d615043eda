//! Whether this process is one of several that a launcher of MPI programs started. Looks at what launchers leave in
//! the environment, and starts nothing.

/// How many processes OpenMPI, MPICH and Slurm say they started.
const SIZE: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];
/// A process's number on its own machine, by OpenMPI, MPICH and Slurm.
const LOCAL_RANK: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// Whether `mpirun`, `mpiexec` or `srun` started this process and others beside it.
pub fn one_of_several() -> bool {
    number(&SIZE).is_some_and(|size| size > 1)
}

/// This process's number among those on its machine: which of the machine's devices is its own.
pub fn local_rank() -> Option<usize> {
    number(&LOCAL_RANK)
}

fn number(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}
