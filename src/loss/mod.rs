//! The loss: soft targets from a teacher and hard targets from the text, weighted through training.
//!
//! Losses return sums and counts; whoever steps the optimizer divides once, so that micro-batches and ranks of any
//! size add up to the same gradient. Knows nothing of recipes, models or files.

pub mod distill;
pub mod weighting;

pub use distill::{DistillLoss, DistillLossConfig, Divergence, LossOutput, Tail};
pub use weighting::{Weighting, Weights};
