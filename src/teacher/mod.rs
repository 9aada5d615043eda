//! Running a teacher and summing up its predictions as [`SparseTargets`]. Never imports `train`.
//!
//! [`SparseTargets`]: crate::targets::SparseTargets

pub mod resident;

pub use resident::ResidentTeacher;
