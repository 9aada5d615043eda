//! The codec `raw`: every number as it is, 32 bits each, offsets 64. The tensor `log_normalizer` is there when the rows
//! came with it.

use std::ops::Range;

use safetensors::Dtype;

use super::codec::{Block, Shape};
use super::shard::{TensorBytes, TensorIndex, Tensors, little_endian};
use crate::error::Result;
use crate::targets::{Capture, SparseTargets, TargetKind};

const LOG_NORMALIZER: &str = "log_normalizer";

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
    layout
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

pub(crate) fn check(index: &TensorIndex, tensors: &Tensors<'_>, shape: &Shape) -> Result<(), String> {
    index.check(&layout(shape, index.has(LOG_NORMALIZER)))?;
    if shape.temperatures.is_none() {
        return if shape.kept_ids == 0 { Ok(()) } else { Err("tokens only, but the manifest counts kept ids".into()) };
    }
    let offsets = tensors.u64s("offsets", 0..shape.rows() + 1)?;
    let starts = offsets.first() == Some(&0) && offsets.last() == Some(&(shape.kept_ids as u64));
    if starts && offsets.is_sorted() { Ok(()) } else { Err("its offsets do not follow each other".into()) }
}

pub(crate) fn decode(tensors: &Tensors<'_>, shape: &Shape, range: Range<usize>) -> Result<Block, String> {
    let places = range.start * (shape.seq_len + 1)..range.end * (shape.seq_len + 1);
    let rows = range.start * shape.seq_len..range.end * shape.seq_len;
    let tokens = tensors.u32s("tokens", places.clone())?;
    let segments = tensors.u32s("segments", places)?;
    let targets = match &shape.temperatures {
        None => None,
        Some(temperatures) => Some(decode_targets(tensors, temperatures, shape.kind, rows)?),
    };
    let ids = targets.iter().flat_map(|targets| &targets.ids);
    if let Some(id) = tokens.iter().chain(ids).find(|id| **id as usize >= shape.vocab_size) {
        return Err(format!("it holds the id {id}, outside the vocabulary of {}", shape.vocab_size));
    }
    Ok(Block { tokens, segments, targets })
}

fn decode_targets(
    tensors: &Tensors<'_>,
    temperatures: &[f32],
    kind: TargetKind,
    rows: Range<usize>,
) -> Result<SparseTargets, String> {
    let mut offsets = tensors.u64s("offsets", rows.start..rows.end + 1)?;
    let first = offsets[0];
    let kept = first as usize..offsets[offsets.len() - 1] as usize;
    offsets.iter_mut().for_each(|offset| *offset -= first);
    let captures = temperatures.iter().enumerate().map(|(i, &temperature)| {
        Ok(Capture {
            temperature,
            log_probs: tensors.f32s(&format!("log_probs.{i}"), kept.clone())?,
            log_tail: tensors.f32s(&format!("log_tail.{i}"), rows.clone())?,
            label_log_prob: tensors.f32s(&format!("label_log_prob.{i}"), rows.clone())?,
        })
    });
    let captures = captures.collect::<Result<Vec<_>, String>>()?;
    let log_normalizer = if tensors.has(LOG_NORMALIZER) { Some(tensors.f32s(LOG_NORMALIZER, rows)?) } else { None };
    Ok(SparseTargets { offsets, ids: tensors.u32s("ids", kept)?, captures, kind, log_normalizer })
}
