//! Numbers to and from their stored form, in parallel when there are many.

use std::io::{self, Write};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::blocks;
use super::dtype::Dtype;

/// Elements that one task converts: enough to pay for its scheduling, few enough to stay in a core's cache. A multiple
/// of the elements of every type's blocks.
pub(super) const CHUNK: usize = 1 << 16;
/// Elements encoded before they are written; bounds the memory of writing.
const BLOCK: usize = 1 << 22;

/// Whether a type holds numbers that are whole by themselves, without a scale stored elsewhere.
pub(super) fn is_float(dtype: Dtype) -> bool {
    use Dtype::{Bf16, F16, F32, F64, Q4_0, Q4_1, Q4K, Q6K, Q8_0};
    matches!(dtype, F32 | Bf16 | F16 | F64 | Q4_0 | Q4_1 | Q8_0 | Q4K | Q6K)
}

/// Whether a type holds numbers that mean something once they are multiplied by a scale.
pub(super) fn needs_scale(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F8E4m3 | Dtype::F8E5m2)
}

/// Values of `bytes` as f32, and whether all of them are finite. `dtype` is one of [`is_float`] or [`needs_scale`],
/// and `bytes` are whole blocks of it.
pub(super) fn decode_chunk(dtype: Dtype, bytes: &[u8], values: &mut [f32]) -> bool {
    let mut finite = true;
    match dtype {
        Dtype::F32 => {
            for (value, &stored) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_le_bytes(stored);
                finite &= value.is_finite();
            }
        }
        Dtype::Bf16 => {
            for (value, &stored) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes(stored)) << 16);
                finite &= value.is_finite();
            }
        }
        Dtype::F16 => {
            // The processor's own conversion works on aligned numbers, which a file does not promise.
            let mut aligned = [f16::ZERO; 256];
            for (values, bytes) in values.chunks_mut(aligned.len()).zip(bytes.chunks(2 * aligned.len())) {
                let aligned = &mut aligned[..values.len()];
                for (number, &stored) in aligned.iter_mut().zip(bytes.as_chunks().0) {
                    *number = f16::from_le_bytes(stored);
                }
                aligned.convert_to_f32_slice(values);
                finite &= values.iter().all(|value| value.is_finite());
            }
        }
        Dtype::F64 => {
            for (value, &stored) in values.iter_mut().zip(bytes.as_chunks().0) {
                *value = f64::from_le_bytes(stored) as f32;
                finite &= value.is_finite();
            }
        }
        Dtype::F8E4m3 | Dtype::F8E5m2 => {
            let table = if dtype == Dtype::F8E4m3 { &E4M3 } else { &E5M2 };
            for (value, &stored) in values.iter_mut().zip(bytes) {
                *value = table[usize::from(stored)];
                finite &= value.is_finite();
            }
        }
        Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q8_0 | Dtype::Q4K | Dtype::Q6K => {
            blocks::decode(dtype, bytes, values);
            finite = values.iter().all(|value| value.is_finite());
        }
        other => unreachable!("{other} is not a type that is read as numbers"),
    }
    finite
}

/// The 256 numbers of FP8 E4M3 in its finite form: 4 bits of exponent with bias 7, no infinities, and NaN where all
/// bits but the sign are set (Micikevicius et al. 2022, FP8 Formats for Deep Learning).
const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        let (exponent, mantissa) = (code as u32 >> 3 & 15, code as u32 & 7);
        let size = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa as f32 / 512.0,
            _ => f32::from_bits((exponent + 127 - 7) << 23 | mantissa << 20),
        };
        table[code] = if code >= 128 { -size } else { size };
        code += 1;
    }
    table
};

/// The 256 numbers of FP8 E5M2, which are those of f16 whose lower byte is 0.
const E5M2: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = f16::from_bits((code as u16) << 8).to_f32_const();
        code += 1;
    }
    table
};

/// Values of integers as i64; none for other types and for an unsigned number beyond i64.
pub(super) fn decode_i64(dtype: Dtype, bytes: &[u8]) -> Option<Vec<i64>> {
    fn all<const WIDTH: usize>(bytes: &[u8], read: impl Fn([u8; WIDTH]) -> i64) -> Option<Vec<i64>> {
        Some(bytes.as_chunks().0.iter().map(|&stored| read(stored)).collect())
    }
    match dtype {
        Dtype::Bool | Dtype::U8 => all(bytes, |stored| u8::from_le_bytes(stored).into()),
        Dtype::I8 => all(bytes, |stored| i8::from_le_bytes(stored).into()),
        Dtype::U16 => all(bytes, |stored| u16::from_le_bytes(stored).into()),
        Dtype::I16 => all(bytes, |stored| i16::from_le_bytes(stored).into()),
        Dtype::U32 => all(bytes, |stored| u32::from_le_bytes(stored).into()),
        Dtype::I32 => all(bytes, |stored| i32::from_le_bytes(stored).into()),
        Dtype::I64 => all(bytes, i64::from_le_bytes),
        Dtype::U64 => bytes.as_chunks().0.iter().map(|&stored| u64::from_le_bytes(stored).try_into().ok()).collect(),
        _ => None,
    }
}

/// Writes values in a stored type (F32, BF16 or F16), rounding to nearest, ties to even.
pub(super) fn write_f32(values: &[f32], dtype: Dtype, out: &mut impl Write) -> io::Result<()> {
    match dtype {
        Dtype::F32 => write_encoded(values, out, |value| value.to_le_bytes()),
        Dtype::Bf16 => write_encoded(values, out, |value| bf16::from_f32(value).to_le_bytes()),
        Dtype::F16 => write_encoded(values, out, |value| f16::from_f32(value).to_le_bytes()),
        other => unreachable!("{other} is not a type that weights are written in"),
    }
}

/// Writes integers as I64.
pub(super) fn write_i64(values: &[i64], out: &mut impl Write) -> io::Result<()> {
    write_encoded(values, out, |value| value.to_le_bytes())
}

fn write_encoded<T: Copy + Sync, const WIDTH: usize>(
    values: &[T],
    out: &mut impl Write,
    encode: impl Fn(T) -> [u8; WIDTH] + Sync,
) -> io::Result<()> {
    let mut buffer = vec![0; values.len().min(BLOCK) * WIDTH];
    for block in values.chunks(BLOCK) {
        let encoded = &mut buffer[..block.len() * WIDTH];
        encoded.par_chunks_mut(CHUNK * WIDTH).zip(block.par_chunks(CHUNK)).for_each(|(encoded, values)| {
            for (stored, &value) in encoded.as_chunks_mut().0.iter_mut().zip(values) {
                *stored = encode(value);
            }
        });
        out.write_all(encoded)?;
    }
    Ok(())
}

/// Place of the first value that would not be finite once stored as F32, BF16 or F16.
pub(super) fn first_unstorable(values: &[f32], dtype: Dtype) -> Option<usize> {
    let stays_finite = |value: f32| match dtype {
        Dtype::F16 => f16::from_f32(value).is_finite(),
        Dtype::Bf16 => bf16::from_f32(value).is_finite(),
        _ => value.is_finite(),
    };
    values.par_iter().with_min_len(CHUNK).position_first(|&value| !stays_finite(value))
}
