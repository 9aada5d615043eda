//! Training a student on the batches of a [`crate::targets::TargetSource`]. Never imports `teacher`.

pub mod balance;
pub mod metrics;
pub mod optimizer;
pub mod order;
pub mod prefetch;
pub mod tap;
pub mod trainer;

pub use tap::Tap;
pub use trainer::{TrainConfig, TrainOutput, Trainer};
