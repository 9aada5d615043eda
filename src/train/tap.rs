//! Where a run's forward passes can be seen from outside: by what makes soft targets of them. The trainer does not know
//! what becomes of them, and sees to it that nothing is lost when the run is interrupted.

use std::path::Path;

use burn::tensor::Tensor;

use crate::{error::Result, models::Decoder, targets::DistillBatch};

/// Takes the forward passes of some steps.
///
/// A step that is done again after an interruption is given again, and is the same to the last bit.
pub trait Tap {
    /// Whether it takes a step; the first is step 1, as in the metrics.
    fn takes(&self, step: u64) -> bool;

    /// One micro-batch of a step that it takes, in the order in which they are trained on. The weights are those before
    /// the step: what a checkpoint of the step before holds.
    ///
    /// # Shapes
    /// - `hidden` `[N, hidden]` after the final norm, outside any graph
    ///
    /// # Errors
    /// The run ends with it.
    fn take(&mut self, step: u64, batch: &DistillBatch, hidden: Tensor<2>, model: &Decoder) -> Result<()>;

    /// Puts into a checkpoint's directory, synced, what would be lost if the run went on from there.
    fn keep(&mut self, checkpoint: &Path) -> Result<()>;
}
