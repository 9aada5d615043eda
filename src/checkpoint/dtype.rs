//! Element types of safetensors and GGUF files, and the shape and type of one stored tensor.

use serde::{Deserialize, Serialize};

/// How the elements of a tensor are stored. Little-endian, row-major.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F4,
    F6E2m3,
    F6E3m2,
    F8E4m3,
    F8E5m2,
    F8E8m0,
    F8E4m3Fnuz,
    F8E5m2Fnuz,
    F16,
    Bf16,
    F32,
    F64,
    C64,
    /// Blocks of 32 values that share one f16 scale: GGUF's `Q4_0`.
    Q4_0,
    /// Blocks of 32 values with an f16 scale and an f16 minimum.
    Q4_1,
    /// Blocks of 32 bytes that share one f16 scale.
    Q8_0,
    /// Blocks of 256 values: eight scales and minima of 6 bits, under an f16 scale each.
    Q4K,
    /// Blocks of 256 values: sixteen scales of 8 bits under an f16 scale.
    Q6K,
}

/// Every type of safetensors with its name in a header, and the elements and bytes of its smallest piece.
const DTYPES: [(Dtype, &str, u64, u64); 22] = [
    (Dtype::Bool, "BOOL", 1, 1),
    (Dtype::U8, "U8", 1, 1),
    (Dtype::I8, "I8", 1, 1),
    (Dtype::U16, "U16", 1, 2),
    (Dtype::I16, "I16", 1, 2),
    (Dtype::U32, "U32", 1, 4),
    (Dtype::I32, "I32", 1, 4),
    (Dtype::U64, "U64", 1, 8),
    (Dtype::I64, "I64", 1, 8),
    (Dtype::F4, "F4", 2, 1),
    (Dtype::F6E2m3, "F6_E2M3", 4, 3),
    (Dtype::F6E3m2, "F6_E3M2", 4, 3),
    (Dtype::F8E4m3, "F8_E4M3", 1, 1),
    (Dtype::F8E5m2, "F8_E5M2", 1, 1),
    (Dtype::F8E8m0, "F8_E8M0", 1, 1),
    (Dtype::F8E4m3Fnuz, "F8_E4M3FNUZ", 1, 1),
    (Dtype::F8E5m2Fnuz, "F8_E5M2FNUZ", 1, 1),
    (Dtype::F16, "F16", 1, 2),
    (Dtype::Bf16, "BF16", 1, 2),
    (Dtype::F32, "F32", 1, 4),
    (Dtype::F64, "F64", 1, 8),
    (Dtype::C64, "C64", 1, 8),
];

/// The types that GGUF has beside those, likewise.
const BLOCK_DTYPES: [(Dtype, &str, u64, u64); 5] = [
    (Dtype::Q4_0, "Q4_0", 32, 18),
    (Dtype::Q4_1, "Q4_1", 32, 20),
    (Dtype::Q8_0, "Q8_0", 32, 34),
    (Dtype::Q4K, "Q4_K", 256, 144),
    (Dtype::Q6K, "Q6_K", 256, 210),
];

impl Dtype {
    /// The type a safetensors header calls `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Dtype> {
        DTYPES.iter().find(|(_, known, ..)| *known == name).map(|(dtype, ..)| *dtype)
    }

    /// Name in a header: `F32`, `BF16`, `Q4_K` ...
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Elements that are stored together: 1, unless they are narrower than a byte or share a scale.
    pub fn block_elements(self) -> u64 {
        self.row().2
    }

    /// Bytes of [`Dtype::block_elements`] elements.
    pub fn block_bytes(self) -> u64 {
        self.row().3
    }

    fn row(self) -> &'static (Dtype, &'static str, u64, u64) {
        DTYPES.iter().chain(&BLOCK_DTYPES).find(|(dtype, ..)| *dtype == self).expect("every type is listed")
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

/// The types that weights are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoredDtype {
    F32,
    /// Rounded to nearest, ties to even.
    Bf16,
    /// Rounded to nearest, ties to even; values beyond ±65504 are refused.
    F16,
}

impl From<StoredDtype> for Dtype {
    fn from(stored: StoredDtype) -> Dtype {
        match stored {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::Bf16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
        }
    }
}

/// Type and shape of one stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Number of elements; 1 for a scalar (empty shape).
    pub fn element_count(&self) -> u64 {
        self.shape.iter().map(|&size| size as u64).product()
    }
}

/// Bytes that a tensor of this type and shape occupies, or what is wrong with it. Never overflows.
pub(super) fn byte_count(dtype: Dtype, shape: &[u64]) -> Result<u64, String> {
    let too_large = || format!("shape {shape:?} of {dtype} overflows 64 bits");
    let elements = shape.iter().try_fold(1u64, |product, &size| product.checked_mul(size)).ok_or_else(too_large)?;
    if elements % dtype.block_elements() != 0 {
        return Err(match dtype.block_bytes() {
            0..=3 => format!("shape {shape:?} of {dtype} does not fill whole bytes"),
            _ => format!("shape {shape:?} of {dtype} does not fill whole blocks of {}", dtype.block_elements()),
        });
    }
    // In bits, so that what overflows does not depend on the width of a block.
    elements.checked_mul(8).ok_or_else(too_large)?;
    (elements / dtype.block_elements()).checked_mul(dtype.block_bytes()).ok_or_else(too_large)
}
