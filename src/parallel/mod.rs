//! Several devices that work on one model: how they are arranged ([`Mesh`]), and what they say to each other
//! ([`Collective`]).
//!
//! Two transports carry it: threads of one process ([`in_process`]), and processes on one machine or many that `mpirun`
//! or `srun` started (feature `mpi`). Everything but sending and receiving is written once, so both give equal bits.
//! Knows nothing of models, weights and tensors.

pub mod collective;
pub mod in_process;
pub mod launch;
pub mod mesh;
pub mod message;
#[cfg(feature = "mpi")]
pub mod mpi;

pub use collective::{Collective, Group, Operation};
pub use mesh::{Axis, Mesh, Place, share};
