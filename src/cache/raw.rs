//! The codec `raw`: every number as it is, 32 bits each, offsets 64. The tensor `log_normalizer` is there when the rows
//! came with it.

use std::borrow::Cow;
use std::ops::Range;

use safetensors::Dtype;

use super::codec::{Block, Shape};
use super::shard::{TensorBytes, TensorIndex, Tensors, little_endian};
use crate::error::Result;
use crate::targets::SparseTargets;

/// Of the normalisers, in every codec.
pub(crate) const LOG_NORMALIZER: &str = "log_normalizer";
/// What routers said, in every codec.
pub(crate) const ROUTER: &str = "router";

/// Name, type and shape of each tensor, in the order of their bytes (64-bit ones first, so that all are aligned).
fn layout(shape: &Shape, log_normalizer: bool) -> Vec<(String, Dtype, Vec<usize>)> {
    let places = vec![shape.sequences, shape.seq_len + 1];
    let mut layout = vec![("tokens".into(), Dtype::U32, places.clone()), ("segments".into(), Dtype::U32, places)];
    let Some(temperatures) = &shape.temperatures else { return layout };
    layout.insert(0, ("offsets".into(), Dtype::U64, vec![shape.rows() + 1]));
    layout.push(("ids".into(), Dtype::U32, vec![shape.kept_ids]));
    for i in 0..temperatures.len() {
        layout.push((format!("log_probs.{i}"), Dtype::F32, vec![shape.kept_ids]));
        layout.push((format!("log_tail.{i}"), Dtype::F32, vec![shape.rows()]));
        layout.push((format!("label_log_prob.{i}"), Dtype::F32, vec![shape.rows()]));
    }
    if log_normalizer {
        layout.push((LOG_NORMALIZER.into(), Dtype::F32, vec![shape.rows()]));
    }
    layout.extend(router_layout(shape));
    layout
}

/// The tensor of what routers said, where the cache keeps it.
pub(crate) fn router_layout(shape: &Shape) -> Option<(String, Dtype, Vec<usize>)> {
    let router = shape.router.as_ref()?;
    Some((ROUTER.into(), Dtype::U8, vec![shape.rows(), router.layers.len(), router.experts]))
}

pub(crate) fn encode<'a>(block: &'a Block, shape: &Shape) -> Vec<TensorBytes<'a>> {
    let u32s = |values: &'a [u32]| little_endian(values, |value| value.to_le_bytes());
    let f32s = |values: &'a [f32]| little_endian(values, |value| value.to_le_bytes());
    let mut parts = vec![u32s(&block.tokens), u32s(&block.segments)];
    if let Some(targets) = &block.targets {
        parts.insert(0, little_endian(&targets.offsets, |value| value.to_le_bytes()));
        parts.push(u32s(&targets.ids));
        for capture in &targets.captures {
            parts.extend([f32s(&capture.log_probs), f32s(&capture.log_tail), f32s(&capture.label_log_prob)]);
        }
        parts.extend(targets.log_normalizer.as_deref().map(f32s));
        parts.extend(targets.router.as_ref().map(|router| Cow::Borrowed(&router.codes[..])));
    }
    let log_normalizer = block.targets.as_ref().is_some_and(|targets| targets.log_normalizer.is_some());
    let layout = layout(shape, log_normalizer);
    debug_assert_eq!(layout.len(), parts.len());
    layout
        .into_iter()
        .zip(parts)
        .map(|((name, dtype, shape), bytes)| TensorBytes { name, dtype, shape, bytes })
        .collect()
}

pub(crate) fn check(index: &TensorIndex, shape: &Shape) -> Result<(), String> {
    index.check(&layout(shape, index.has(LOG_NORMALIZER)))?;
    if shape.temperatures.is_none() && shape.kept_ids != 0 {
        return Err("tokens only, but the manifest counts kept ids".into());
    }
    Ok(())
}

/// Whether all offsets follow each other; a reader looks at those it follows.
pub(crate) fn verify(tensors: &Tensors<'_>, shape: &Shape) -> Result<(), String> {
    if shape.temperatures.is_none() {
        return Ok(());
    }
    let offsets = tensors.u64s("offsets", 0..shape.rows() + 1)?;
    let ends = offsets.first() == Some(&0) && offsets.last() == Some(&(shape.kept_ids as u64));
    if ends && offsets.is_sorted() { Ok(()) } else { Err("its offsets do not follow each other".into()) }
}

/// Appends sequences `range` of a shard to `into`.
pub(crate) fn decode(
    tensors: &Tensors<'_>,
    shape: &Shape,
    range: Range<usize>,
    into: &mut Block,
) -> Result<(), String> {
    let places = range.start * (shape.seq_len + 1)..range.end * (shape.seq_len + 1);
    let rows = range.start * shape.seq_len..range.end * shape.seq_len;
    let first = into.tokens.len();
    tensors.extend_u32s("tokens", places.clone(), &mut into.tokens)?;
    tensors.extend_u32s("segments", places, &mut into.segments)?;
    check_ids(&into.tokens[first..], shape)?;
    match &mut into.targets {
        Some(targets) => decode_targets(tensors, shape, rows, targets),
        None => Ok(()),
    }
}

fn check_ids(ids: &[u32], shape: &Shape) -> Result<(), String> {
    // The largest first: one pass without a branch.
    match ids.iter().copied().max() {
        Some(id) if id as usize >= shape.vocab_size => {
            Err(format!("it holds the id {id}, outside the vocabulary of {}", shape.vocab_size))
        }
        _ => Ok(()),
    }
}

fn decode_targets(
    tensors: &Tensors<'_>,
    shape: &Shape,
    rows: Range<usize>,
    into: &mut SparseTargets,
) -> Result<(), String> {
    let offsets = tensors.u64s("offsets", rows.start..rows.end + 1)?;
    if !offsets.is_sorted() {
        return Err("its offsets do not follow each other".into());
    }
    let (from, base) = (offsets[0], into.ids.len() as u64);
    let kept = from as usize..offsets[offsets.len() - 1] as usize;
    tensors.extend_u32s("ids", kept.clone(), &mut into.ids)?;
    check_ids(&into.ids[base as usize..], shape)?;
    for (i, capture) in into.captures.iter_mut().enumerate() {
        tensors.extend_f32s(&format!("log_probs.{i}"), kept.clone(), &mut capture.log_probs)?;
        tensors.extend_f32s(&format!("log_tail.{i}"), rows.clone(), &mut capture.log_tail)?;
        tensors.extend_f32s(&format!("label_log_prob.{i}"), rows.clone(), &mut capture.label_log_prob)?;
    }
    decode_log_normalizer(tensors, rows.clone(), into)?;
    decode_router(tensors, rows, into)?;
    into.offsets.extend(offsets[1..].iter().map(|offset| base + (offset - from)));
    Ok(())
}

/// Appends what routers said of rows, where it is kept.
pub(crate) fn decode_router(tensors: &Tensors<'_>, rows: Range<usize>, into: &mut SparseTargets) -> Result<(), String> {
    let Some(router) = &mut into.router else { return Ok(()) };
    let width = router.width();
    router.codes.extend_from_slice(&tensors.u8s(ROUTER, rows.start * width..rows.end * width)?);
    Ok(())
}

/// Appends the normalisers of rows whose offsets are yet to be appended.
pub(crate) fn decode_log_normalizer(
    tensors: &Tensors<'_>,
    rows: Range<usize>,
    into: &mut SparseTargets,
) -> Result<(), String> {
    match &mut into.log_normalizer {
        Some(normalizers) if tensors.has(LOG_NORMALIZER) => tensors.extend_f32s(LOG_NORMALIZER, rows, normalizers),
        normalizers @ None if into.offsets.len() == 1 && tensors.has(LOG_NORMALIZER) => {
            tensors.extend_f32s(LOG_NORMALIZER, rows, normalizers.insert(vec![]))
        }
        // Normalisers stay where all rows have them.
        normalizers => {
            *normalizers = None;
            Ok(())
        }
    }
}
