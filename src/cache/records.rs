//! Shards of the codecs that write one record for each sequence, `packed` and `compact`: an index and the records.
//!
//! Knows where records lie, which codec reads them and in which threads; what is in one is `record.rs`'s business.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::calibrate::CalibrationSettings;
use super::codec::{Block, Codec, Coder as CodecCoder, Encoded, Shape};
use super::coder::Coder;
use super::compact::RecordParts;
use super::manifest::QuantiserError;
use super::record::RecordShape;
use super::settings::CacheSettings;
use super::shard::{TensorBytes, TensorIndex, Tensors, little_endian};
use super::walk::Workspace;
use super::{compact, packed, raw};
use crate::error::{Error, Result};
use crate::targets::{PackedSequence, SparseTargets};

const OFFSETS: &str = "record_offsets";
pub(crate) const RECORDS: &str = "records";

/// A coder, and room for each thread that has used it.
#[derive(Debug)]
pub(crate) struct CompactCoder {
    coder: Coder,
    shape: RecordShape,
    spaces: Mutex<Vec<Workspace>>,
}

impl CompactCoder {
    /// With room that is kept from sequence to sequence: more of it than a sequence has bytes.
    fn with_workspace<R>(&self, use_it: impl FnOnce(&Coder, &mut Workspace) -> R) -> R {
        // A thread that panicked left none behind.
        let spare = self.spaces.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut space = spare.unwrap_or_else(|| Workspace::new(&self.shape, &self.coder.model));
        let made = use_it(&self.coder, &mut space);
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).push(space);
        made
    }
}

/// The tables of a `compact` cache, learnt from the blocks of its first shards.
pub(crate) fn learn(settings: &CacheSettings, blocks: &mut dyn Iterator<Item = Result<Block>>) -> Result<Vec<u8>> {
    let shape = Shape::of_settings(settings);
    let mut sample: Vec<(PackedSequence, Option<SparseTargets>)> = vec![];
    for block in blocks {
        let block = block?;
        sample
            .extend((0..block.tokens.len() / (shape.seq_len + 1)).map(|number| block.sequence(number, shape.seq_len)));
    }
    let sequences = sample.iter().map(|(sequence, targets)| (sequence, targets.as_ref()));
    let coder =
        Coder::calibrate(sequences, shape.record(), CalibrationSettings::of_kind(shape.record().quantiser.kind));
    let tensors = coder.to_tensors();
    let views = tensors.iter().map(|(name, bytes)| {
        (*name, TensorView::new(Dtype::U8, vec![bytes.len()], bytes).expect("bytes have the length they have"))
    });
    safetensors::serialize(views, None)
        .map_err(|error| Error::usage(format!("the coder cannot be written: {error}"), "this is a mistake in limbeck"))
}

/// Reads what [`learn`] wrote.
pub(crate) fn read_coder(settings: &CacheSettings, bytes: &[u8]) -> Result<CompactCoder, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|error| format!("it is not a safetensors file: {error}"))?;
    let tensor = |name: &str| file.tensor(name).ok().map(|tensor| tensor.data().to_vec());
    let coder = Coder::from_tensors(tensor, settings.tokenizer.vocab_size)?;
    Ok(CompactCoder { coder, shape: Shape::of_settings(settings).record().clone(), spaces: Mutex::default() })
}

pub(crate) fn encode<'a>(codec: Codec, block: &'a Block, shape: &Shape, coder: Option<&CodecCoder>) -> Encoded<'a> {
    let record_shape = shape.record();
    let encoded: Vec<(Vec<u8>, QuantiserError)> = (0..shape.sequences)
        .into_par_iter()
        .map(|number| {
            let (sequence, targets) = block.sequence(number, shape.seq_len);
            let (mut record, mut error) = (vec![], QuantiserError::default());
            let targets = targets.as_ref();
            match (codec, coder) {
                (Codec::Compact, Some(CodecCoder::Compact(coder))) => coder.with_workspace(|coder, space| {
                    compact::encode_sequence(&sequence, targets, record_shape, coder, space, &mut record, &mut error);
                }),
                (Codec::Compact, _) => panic!("encoded before it has learnt"),
                _ => packed::encode_sequence(&sequence, targets, record_shape, &mut record, &mut error),
            }
            (record, error)
        })
        .collect();
    let mut offsets = vec![0u64];
    let (mut records, mut error) = (vec![], QuantiserError::default());
    // In the order of the sequences, so that the sums do not depend on the threads.
    for (record, lost) in &encoded {
        records.extend_from_slice(record);
        offsets.push(records.len() as u64);
        error = error.joined(*lost);
    }
    // JSON has no infinity.
    (error.kl_sum, error.kl_max) = (error.kl_sum.min(f64::MAX), error.kl_max.min(f64::MAX));
    let offsets: Vec<u8> = offsets.into_iter().flat_map(u64::to_le_bytes).collect();
    let log_normalizer = block.targets.as_ref().and_then(|targets| targets.log_normalizer.as_deref());
    let mut parts = vec![Cow::Owned(offsets)];
    parts.extend(log_normalizer.map(|values| little_endian(values, |value| value.to_le_bytes())));
    let router = block.targets.as_ref().and_then(|targets| targets.router.as_ref());
    parts.extend(router.map(|router| Cow::Borrowed(&router.codes[..])));
    let layout = layout(shape, log_normalizer.is_some(), records.len());
    parts.push(Cow::Owned(records));
    let tensors = layout
        .into_iter()
        .zip(parts)
        .map(|((name, dtype, shape), bytes)| TensorBytes { name, dtype, shape, bytes })
        .collect();
    let error = shape.temperatures.is_some().then_some(error);
    Encoded { tensors, error }
}

pub(crate) fn check(index: &TensorIndex, shape: &Shape) -> Result<(), String> {
    let bytes = index.length(RECORDS).ok_or_else(|| format!("tensor `{RECORDS}` is missing"))?;
    index.check(&layout(shape, index.has(raw::LOG_NORMALIZER), bytes))
}

/// Name, type and shape of each tensor, in the order of their bytes (wide ones first, so that all are aligned).
fn layout(shape: &Shape, log_normalizer: bool, record_bytes: usize) -> Vec<(String, Dtype, Vec<usize>)> {
    let mut layout = vec![(OFFSETS.into(), Dtype::U64, vec![shape.sequences + 1])];
    if log_normalizer {
        layout.push((raw::LOG_NORMALIZER.into(), Dtype::F32, vec![shape.rows()]));
    }
    layout.extend(raw::router_layout(shape));
    layout.push((RECORDS.into(), Dtype::U8, vec![record_bytes]));
    layout
}

/// Whether all records follow each other and can be read.
pub(crate) fn verify(
    codec: Codec,
    tensors: &Tensors<'_>,
    shape: &Shape,
    coder: Option<&CodecCoder>,
) -> Result<(), String> {
    let offsets = tensors.u64s(OFFSETS, 0..shape.sequences + 1)?;
    let end = tensors.index.length(RECORDS).unwrap_or(0) as u64;
    if offsets.first() != Some(&0) || offsets.last() != Some(&end) || !offsets.is_sorted() {
        return Err("its records do not follow each other".into());
    }
    let kept = (0..shape.sequences).into_par_iter().map(|number| {
        let mut block = shape.empty_block();
        decode(codec, tensors, shape, coder, number..number + 1, &mut block)?;
        Ok(block.targets.map_or(0, |targets| targets.ids.len()))
    });
    let kept = kept.try_reduce(|| 0, |left, right| Ok::<_, String>(left + right))?;
    if kept != shape.kept_ids {
        return Err(format!("it keeps {kept} ids, the manifest counts {}", shape.kept_ids));
    }
    Ok(())
}

/// Appends sequences `range` of a shard to `into`.
pub(crate) fn decode(
    codec: Codec,
    tensors: &Tensors<'_>,
    shape: &Shape,
    coder: Option<&CodecCoder>,
    range: Range<usize>,
    into: &mut Block,
) -> Result<(), String> {
    if let Some(targets) = &mut into.targets {
        let rows = range.start * shape.seq_len..range.end * shape.seq_len;
        raw::decode_log_normalizer(tensors, rows.clone(), targets)?;
        raw::decode_router(tensors, rows, targets)?;
    }
    let offsets = tensors.u64s(OFFSETS, range.start..range.end + 1)?;
    for (number, ends) in range.zip(offsets.windows(2)) {
        let bytes = tensors.u8s(RECORDS, ends[0] as usize..ends[1] as usize)?;
        let read = match (codec, coder) {
            (Codec::Compact, Some(CodecCoder::Compact(coder))) => coder
                .with_workspace(|coder, space| compact::decode_sequence(&bytes, shape.record(), coder, space, into)),
            (Codec::Compact, _) => Err("its coder was not read".into()),
            _ => packed::decode_sequence(&bytes, shape.record(), into),
        };
        read.map_err(|problem| format!("its sequence {number} cannot be read: {problem}"))?;
    }
    Ok(())
}

/// Adds to `parts` what the record of a sequence is made of. Whether that is known: of entropy coded records alone.
pub(crate) fn add_parts(
    parts: &mut RecordParts,
    sequence: &PackedSequence,
    targets: Option<&SparseTargets>,
    shape: &Shape,
    coder: &CodecCoder,
) -> bool {
    #[allow(irrefutable_let_patterns)] // Tests have another.
    let CodecCoder::Compact(coder) = coder else { return false };
    coder.with_workspace(|coder, space| parts.add(sequence, targets, shape.record(), coder, space));
    true
}
