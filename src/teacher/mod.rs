//! Running a teacher and summing up its predictions as [`SparseTargets`]. Never imports `train`.
//!
//! [`ResidentTeacher`] has all layers in memory; [`StreamedTeacher`] has one or two, and runs each over many tokens.
//! Both give the same targets. [`ShardedTeacher`] is on several devices.
//!
//! [`SparseTargets`]: crate::targets::SparseTargets

mod ahead;
mod budget;
mod dispatch;
mod head;
mod part_bytes;
mod passing;
mod predictions;
mod rank;
mod rank_model;
pub mod resident;
mod rounds;
pub mod sharded;
mod sharded_head;
mod slices;
mod states;
pub mod streamed;
mod sweep;
mod sweep_experts;
mod wire;

pub use budget::{MemoryParts, Spill, StreamPlan, StreamSettings, resident_memory, streamed_memory};
pub use head::HeadTargets;
pub use resident::ResidentTeacher;
pub use sharded::{ShardSettings, ShardedTeacher};
pub use streamed::{StreamCounts, StreamedTeacher};
