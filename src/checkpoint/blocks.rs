//! The block formats of GGUF, decoded: some values of few bits that share scales.
//!
//! Decoding only, and in the order of operations of the `gguf` Python package, so that both give the same bits. The
//! layouts are those of ggml (`ggml-common.h`). Knows nothing of files and tensors.

use half::f16;

use super::dtype::Dtype;

/// Decodes whole blocks; `values` has room for exactly them.
pub(super) fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::Q4_0 => each(bytes, values, q4_0),
        Dtype::Q4_1 => each(bytes, values, q4_1),
        Dtype::Q8_0 => each(bytes, values, q8_0),
        Dtype::Q4K => each(bytes, values, q4_k),
        Dtype::Q6K => each(bytes, values, q6_k),
        other => unreachable!("{other} has no blocks with scales"),
    }
}

fn each<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    values: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    for (bytes, values) in bytes.as_chunks().0.iter().zip(values.as_chunks_mut().0) {
        block(bytes, values);
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Scale, then 16 bytes: the first 16 values in the lower halves, the others in the upper ones.
fn q4_0(bytes: &[u8; 18], values: &mut [f32; 32]) {
    let scale = half(bytes, 0);
    for (place, &pair) in bytes[2..].iter().enumerate() {
        values[place] = scale * (f32::from(pair & 15) - 8.0);
        values[place + 16] = scale * (f32::from(pair >> 4) - 8.0);
    }
}

/// Scale and minimum, then as [`q4_0`], without its offset.
fn q4_1(bytes: &[u8; 20], values: &mut [f32; 32]) {
    let (scale, minimum) = (half(bytes, 0), half(bytes, 2));
    for (place, &pair) in bytes[4..].iter().enumerate() {
        values[place] = scale * f32::from(pair & 15) + minimum;
        values[place + 16] = scale * f32::from(pair >> 4) + minimum;
    }
}

/// Scale, then 32 signed bytes.
fn q8_0(bytes: &[u8; 34], values: &mut [f32; 32]) {
    let scale = half(bytes, 0);
    for (value, &stored) in values.iter_mut().zip(&bytes[2..]) {
        *value = f32::from(stored as i8) * scale;
    }
}

/// Scale of the scales, scale of the minima, eight scales and eight minima of 6 bits in 12 bytes, and 128 bytes: each
/// 32 of them have 32 values in their lower halves and the next 32 in their upper ones.
fn q4_k(bytes: &[u8; 144], values: &mut [f32; 256]) {
    let (scale, minimum) = (half(bytes, 0), half(bytes, 2));
    let packed = &bytes[4..16];
    for (group, (bytes, values)) in bytes[16..].chunks(32).zip(values.chunks_mut(64)).enumerate() {
        for (upper, values) in values.chunks_mut(32).enumerate() {
            let (factor, offset) = q4_k_scales(packed, 2 * group + upper);
            let (factor, offset) = (scale * f32::from(factor), minimum * f32::from(offset));
            for (value, &pair) in values.iter_mut().zip(bytes) {
                *value = factor * f32::from(pair >> (4 * upper) & 15) - offset;
            }
        }
    }
}

/// Scale and minimum of one of the eight groups: the last four have their upper two bits with the first four.
fn q4_k_scales(packed: &[u8], group: usize) -> (u8, u8) {
    match group {
        0..4 => (packed[group] & 63, packed[group + 4] & 63),
        _ => (packed[group + 4] & 15 | packed[group - 4] >> 6 << 4, packed[group + 4] >> 4 | packed[group] >> 6 << 4),
    }
}

/// 128 bytes of lower four bits, 64 bytes of upper two, sixteen signed scales, scale. Each half of the values takes 64
/// and 32 of those bytes, for four runs of 32 values: lower and upper halves of the bytes, pairs of bits from below.
fn q6_k(bytes: &[u8; 210], values: &mut [f32; 256]) {
    let (low, rest) = bytes.split_at(128);
    let (high, scales) = rest.split_at(64);
    let scale = half(bytes, 208);
    for (part, values) in values.chunks_mut(128).enumerate() {
        let (low, high) = (&low[64 * part..], &high[32 * part..]);
        for (run, values) in values.chunks_mut(32).enumerate() {
            for (place, value) in values.iter_mut().enumerate() {
                let lower = low[place + 32 * (run % 2)] >> (4 * (run / 2)) & 15;
                let upper = high[place] >> (2 * run) & 3;
                let factor = scales[8 * part + 2 * run + place / 16] as i8;
                *value = scale * f32::from(factor) * (f32::from(lower | upper << 4) - 32.0);
            }
        }
    }
}
