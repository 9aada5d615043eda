//! Training a student on the batches of a [`crate::targets::TargetSource`]. Never imports `teacher`.

pub mod average;
pub mod balance;
pub mod best;
pub mod config;
pub mod export;
pub mod groups;
pub mod guard;
mod journal;
pub mod metrics;
pub mod optimizer;
pub mod order;
mod pass;
pub mod prefetch;
pub mod router;
pub mod tap;
pub mod tensorboard;
pub mod trainer;
mod training_loop;
pub mod update;

pub use config::{TrainConfig, TrainOutput};
pub use tap::Tap;
pub use trainer::Trainer;
