//! Rows times packed weights, where a row's result does not depend on the rows beside it.
//!
//! Every element of the result is one fixed sequence of operations: blocks of [`K_BLOCK`] products, each a chain of
//! fused multiply-adds from zero in the order of k, added up in their order. Instruction sets, numbers of threads and
//! numbers of rows decide who computes an element, and when, but not how. So they give equal bits, which the crate
//! `gemm` does not promise: it cuts its sums by the shape of the whole product.
//!
//! Weights are laid out once, for this and nothing else: panels of [`PANEL`] output columns, inside of which all
//! columns of one k lie together. Those that are exact in bfloat16 take two bytes each; widening them is exact.
//!
//! Matrices [packed for bfloat16](PackedMatrix::rounded) are another definition, faster where the processor has products
//! of bfloat16: weights and rows are rounded to it, pairs of products are added to a chain in f32, the second of the pair
//! first, and a block is 2 [`K_BLOCK`] products. A product of two such numbers is exact, so each step rounds once.
//! (Numbers below 1.2e-38, the smallest normal one, count as zero for some instruction sets and not for others.)
//!
//! AMX is the one that cannot give these bits: its instruction fixes another order. Of 16 pairs the first products are
//! summed in one chain from zero, the second ones in another, then both together, then these sums in their order; a block
//! is the same. That is a definition as well, of which a row's bits are the same alone, among others and on any number of
//! threads. So bits of these matrices are the same on all processors without AMX, and on all with it.

// Other processors have nothing to ask with yet.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
mod ahead;
mod amx;
mod amx_emulation;
mod host;
mod instructions;
mod left;
mod operand;
mod pack;
mod place;
mod rounding;
mod row_tiles;
mod squares;
mod tasks;
mod tiles;

#[cfg(target_arch = "x86_64")]
mod amx_assembly;
#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod amx_trap;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

pub use host::{grouped, linear, rows};
pub use instructions::Instructions;
pub use pack::{Element, Order};
pub use tiles::{K_BLOCK, PANEL};

pub(crate) use operand::Operand;
pub(crate) use rounding::nearest;
pub(crate) use row_tiles::{RowForm, RowTiles, product};
pub(crate) use tasks::{Product, multiply_then};
pub(crate) use tiles::{Line, MAX_TILE_ROWS, NO_SUMS, NO_TILE, Panel, TileRows};

/// What rows are multiplied in. Sums are f32 in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Numbers {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bfloat16, and the weights with them.
    Bf16,
}

/// The weights of one linear map, laid out for [`multiply`].
#[derive(Debug, Clone)]
pub struct PackedMatrix {
    inputs: usize,
    outputs: usize,
    panels: Panels,
    /// What rows are multiplied in; bf16 only with panels of that.
    rows: Numbers,
}

/// Panels one after the other. The last one's missing columns are zeros.
#[derive(Debug, Clone)]
enum Panels {
    /// A line for each k.
    F32(Vec<Line<f32>>),
    /// A line for two k.
    Bf16(Vec<Line<u32>>),
}

impl PackedMatrix {
    /// Values of a row that is multiplied.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Values of a row of the result.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether the weights take two bytes each.
    pub fn is_bf16(&self) -> bool {
        matches!(self.panels, Panels::Bf16(_))
    }

    /// What rows are multiplied in.
    pub fn numbers(&self) -> Numbers {
        self.rows
    }

    /// Bytes of memory that the weights take.
    pub fn bytes(&self) -> u64 {
        (match &self.panels {
            Panels::F32(lines) => size_of_val(lines.as_slice()),
            Panels::Bf16(lines) => size_of_val(lines.as_slice()),
        }) as u64
    }
}

/// Multiplies each row by the weights: `output[n][o]` is the sum over k of `rows[n][k] * weights[o][k]`.
///
/// # Shapes
/// - `rows` `[N, inputs]`, `output` `[N, outputs]`, both row-major
///
/// # Panics
/// When the slices do not have these shapes for the same N.
pub fn multiply(rows: &[f32], weights: &PackedMatrix, output: &mut [f32]) {
    multiply_with(Instructions::best(), rows, weights, output);
}

/// [`multiply`] by a given instruction set. All give the same bits, but for AMX with matrices packed for bfloat16.
pub fn multiply_with(instructions: Instructions, rows: &[f32], weights: &PackedMatrix, output: &mut [f32]) {
    multiply_then(instructions, vec![Product::new(rows, Operand::Packed(weights), output)], |_| ());
}
