//! Tensor operations of limbeck. Knows tensors, not recipes, caches or models.
//!
//! Each operation has a plain-tensor form that runs on any burn backend, and a form over host slices with a
//! hand-written derivative that runs on burn's `flex`; the two are compared in value and gradient. With the features `wgpu`
//! or `cuda` there are forms of kernels for a device as well, in `device` and in [`fused_linear_distill`]. [`oracle`] holds
//! f64 loops for what a loss is made of: softmax, top-k, cross-entropy and divergences.
//!
//! Shape letters: N tokens, D width, V vocabulary, K kept ids, E groups (experts).

pub mod adamw;
pub mod attention;
#[cfg(feature = "cube")]
pub mod device;
pub mod divergence;
pub mod fused_linear_distill;
pub mod gather_rows;
mod gemm_call;
pub mod grouped_matmul;
pub mod host_op;
pub mod large_blocks;
pub mod linear;
pub mod logsumexp_gather;
pub mod norms;
pub mod oracle;
pub mod packed_layer;
pub mod packed_matmul;
pub mod profile;
pub mod rms_norm;
pub mod rotary;
mod row_masses;
mod rows;
pub mod selection;
pub mod selection_shard;
pub mod swiglu;
pub mod top_k;
pub mod vector_math;
