//! The loss: soft targets from a teacher and hard targets from the text, weighted through training.
//!
//! Losses return sums and counts; whoever steps the optimizer divides once, so that micro-batches and ranks of any
//! size add up to the same gradient. Knows nothing of recipes, models or files.
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
//! use limbeck::targets::{Capture, DistillBatch, PackedSequence, SparseTargets, TargetKind};
//!
//! # fn main() -> limbeck::Result<()> {
//! // Two predictions of one document; the teacher's two likeliest ids of each, and the mass of all others.
//! let batch = DistillBatch {
//!     sequences: vec![PackedSequence { tokens: vec![5, 1, 3], segments: vec![0, 0, 0] }],
//!     targets: Some(SparseTargets {
//!         offsets: vec![0, 2, 4],
//!         ids: vec![1, 2, 3, 0],
//!         captures: vec![Capture {
//!             temperature: 1.0,
//!             log_probs: [0.6f32, 0.3, 0.5, 0.2].map(f32::ln).to_vec(),
//!             log_tail: [0.1f32, 0.3].map(f32::ln).to_vec(),
//!             label_log_prob: [0.6f32, 0.5].map(f32::ln).to_vec(),
//!         }],
//!         kind: TargetKind::Exact,
//!         log_normalizer: None,
//!         router: None,
//!     }),
//!     row_weights: None,
//! };
//! let device = Device::flex().autodiff();
//! let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad();
//! let (hidden, lm_head) = (random([2, 8]), random([16, 8]));
//!
//! let loss = DistillLossConfig::new(Divergence::Jsd { beta: 0.3 })
//!     .with_weighting(Weighting::Llama4 { from: 0.9, to: 0.3, floor: 0.5 }, 1000)
//!     .init()?;
//! let output = loss.forward(0, hidden.clone(), lm_head, &batch)?;
//! let gradients = (output.sum / output.token_count as f64).backward();
//! assert_eq!(hidden.grad(&gradients).unwrap().dims(), [2, 8]);
//! # Ok(())
//! # }
//! ```

pub mod distill;
pub mod taps;
pub mod weighting;

pub use distill::{DistillLoss, DistillLossConfig, LossOutput, Tail, TargetSums, divergence};
pub use limbeck_kernels::divergence::Divergence;
pub use weighting::{Weighting, WeightingState, Weights};
