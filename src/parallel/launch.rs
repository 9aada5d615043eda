//! Whether this process is one of several that a launcher of MPI programs started. Looks at what launchers leave in
//! the environment, and starts nothing.

/// How many processes OpenMPI, MPICH and Slurm say they started.
const SIZE: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];
/// A process's number on its own machine, by OpenMPI, MPICH and Slurm.
const LOCAL_RANK: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"];

/// How many processes of it are on this machine, by OpenMPI, MPICH and Slurm.
const LOCAL_SIZE: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"];

/// Whether `mpirun`, `mpiexec` or `srun` started this process and others beside it.
pub fn one_of_several() -> bool {
    number(&SIZE).is_some_and(|size| size > 1)
}

/// This process's number among those on its machine: which of the machine's devices is its own.
pub fn local_rank() -> Option<usize> {
    number(&LOCAL_RANK)
}

/// How many processes share this machine; 1 where no launcher says so.
pub fn processes_here() -> usize {
    number(&LOCAL_SIZE).unwrap_or(1).max(1)
}

fn number(names: &[&str]) -> Option<usize> {
    names.iter().find_map(|name| std::env::var(name).ok()?.parse().ok())
}
