//! Element types of safetensors files, and the shape and type of one stored tensor.

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
}

/// Every type with its name in a header and its width in bits.
const DTYPES: [(Dtype, &str, u64); 22] = [
    (Dtype::Bool, "BOOL", 8),
    (Dtype::U8, "U8", 8),
    (Dtype::I8, "I8", 8),
    (Dtype::U16, "U16", 16),
    (Dtype::I16, "I16", 16),
    (Dtype::U32, "U32", 32),
    (Dtype::I32, "I32", 32),
    (Dtype::U64, "U64", 64),
    (Dtype::I64, "I64", 64),
    (Dtype::F4, "F4", 4),
    (Dtype::F6E2m3, "F6_E2M3", 6),
    (Dtype::F6E3m2, "F6_E3M2", 6),
    (Dtype::F8E4m3, "F8_E4M3", 8),
    (Dtype::F8E5m2, "F8_E5M2", 8),
    (Dtype::F8E8m0, "F8_E8M0", 8),
    (Dtype::F8E4m3Fnuz, "F8_E4M3FNUZ", 8),
    (Dtype::F8E5m2Fnuz, "F8_E5M2FNUZ", 8),
    (Dtype::F16, "F16", 16),
    (Dtype::Bf16, "BF16", 16),
    (Dtype::F32, "F32", 32),
    (Dtype::F64, "F64", 64),
    (Dtype::C64, "C64", 64),
];

impl Dtype {
    /// The type a header calls `name`, if there is one.
    pub fn from_name(name: &str) -> Option<Dtype> {
        DTYPES.iter().find(|(_, known, _)| *known == name).map(|(dtype, _, _)| *dtype)
    }

    /// Name in a header: `F32`, `BF16` ...
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// Width of one element, in bits (some types are narrower than a byte).
    pub fn bits(self) -> u64 {
        self.row().2
    }

    fn row(self) -> &'static (Dtype, &'static str, u64) {
        DTYPES.iter().find(|(dtype, _, _)| *dtype == self).expect("every type is listed")
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
    let bits = shape
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size))
        .and_then(|elements| elements.checked_mul(dtype.bits()))
        .ok_or_else(|| format!("shape {shape:?} of {dtype} overflows 64 bits"))?;
    if bits % 8 != 0 {
        return Err(format!("shape {shape:?} of {dtype} does not fill whole bytes"));
    }
    Ok(bits / 8)
}
