//! Running a teacher and summing up its predictions as [`SparseTargets`]. Never imports `train`.
//!
//! [`ResidentTeacher`] has all layers in memory; [`StreamedTeacher`] has one or two, and runs each over many tokens.
//! Both give the same targets.
//!
//! [`SparseTargets`]: crate::targets::SparseTargets

mod ahead;
mod budget;
mod head;
mod predictions;
pub mod resident;
mod states;
pub mod streamed;
mod sweep;

pub use budget::{Spill, StreamSettings};
pub use head::HeadTargets;
pub use resident::ResidentTeacher;
pub use streamed::{StreamCounts, StreamedTeacher};
