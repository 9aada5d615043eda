//! The form of operations on a device: CubeCL kernels with hand-written backward passes, behind the same public functions
//! as on the processor. Nothing here decides when they are used but [`op::runs_on`].
//!
//! [`cube`] holds the kernels, which know nothing of burn; [`op`] is the bridge from burn's tensors, with its fusion and
//! without; [`tensors`] has what a driver needs to hand memory to a kernel. Each of the other modules drives one
//! operation's kernels. The fused loss, which asks the host between two passes, has its own node and its own drivers in
//! [`fused_linear_distill`](crate::fused_linear_distill).

#[cfg(feature = "device")]
pub mod adamw;
#[cfg(feature = "device")]
pub mod attention;
#[cfg(feature = "cube")]
pub mod cube;
#[cfg(feature = "device")]
pub mod gather_rows;
#[cfg(feature = "device")]
pub mod grouped_matmul;
#[cfg(feature = "device")]
pub mod op;
#[cfg(feature = "device")]
pub mod rms_norm;
#[cfg(feature = "device")]
pub mod rotary;
#[cfg(feature = "device")]
pub mod swiglu;
#[cfg(feature = "device")]
pub mod tensors;
