//! train

pub mod metrics;
pub mod progress;
