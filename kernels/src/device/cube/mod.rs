//! The kernels, each generic in the type of its operands' elements; sums are f32 whatever that is. They guard every access
//! themselves, and the width of a place in memory is that of whoever launches them.

/// Threads of a group, and the least that a device must offer.
pub const UNITS: usize = 256;

pub mod attention;
pub mod attention_gradients;
pub mod grouped_matmul;
pub mod plans;
pub mod product;
