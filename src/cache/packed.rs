//! The codec `packed`: one sequence as bit fields of fixed widths. Fast to read, and small enough to check `compact` by.
//!
//! The layout is in docs/cache-records.md. Nothing but [`record`](super::record) is shared with the other codecs.

use super::bits::{BitReader, BitWriter, width_of};
use super::codec::Block;
use super::manifest::QuantiserError;
use super::quantizer::{HALVINGS, RowKind, TAIL_CODES};
use super::record::{
    QuantisedRow, RecordShape, check, prepare, push_empty_row, segment_after, segment_runs, segment_step,
};
use crate::targets::{PADDING, PackedSequence, SparseTargets};

const TAIL_BITS: u32 = 8;
const LABEL_BITS: u32 = 16;
const HALVING_BITS: u32 = 6;
const COUNT_WIDTH_BITS: u32 = 6;

/// Bits of a level's field.
fn level_bits(shape: &RecordShape) -> u32 {
    match shape.quantiser.kind {
        RowKind::Exact | RowKind::ThresholdSampled { .. } => width_of(u64::from(shape.quantiser.steps) + 1),
        RowKind::Sampled { draws } => width_of(u64::from(draws) + 1),
    }
}

/// Appends the record of a sequence that a cache may hold, and adds what its rows lost to `error`.
pub(crate) fn encode_sequence(
    sequence: &PackedSequence,
    targets: Option<&SparseTargets>,
    shape: &RecordShape,
    out: &mut Vec<u8>,
    error: &mut QuantiserError,
) {
    check(sequence, targets, shape);
    let mut bits = BitWriter::new(out);
    let runs = segment_runs(&sequence.segments);
    bits.put_number(runs.len() as u64 - 1);
    let mut before = 0;
    for (segment, length) in runs {
        bits.put_number(segment_step(before, segment));
        bits.put_number(length as u64 - 1);
        before = segment;
    }
    let id_bits = width_of(shape.vocab_size as u64);
    sequence.tokens.iter().for_each(|token| bits.put(u64::from(*token), id_bits));
    if let Some(targets) = targets {
        encode_rows(sequence, targets, shape, id_bits, &mut bits, error);
    }
    bits.finish();
}

fn encode_rows(
    sequence: &PackedSequence,
    targets: &SparseTargets,
    shape: &RecordShape,
    id_bits: u32,
    bits: &mut BitWriter<'_>,
    error: &mut QuantiserError,
) {
    let rows = || (0..shape.seq_len).filter(|row| sequence.is_valid(*row));
    let count = |row: usize| targets.offsets[row + 1] - targets.offsets[row];
    let count_bits = width_of(rows().map(count).max().unwrap_or(0) + 1);
    bits.put(u64::from(count_bits), COUNT_WIDTH_BITS);
    rows().for_each(|row| bits.put(count(row), count_bits));
    let level_bits = level_bits(shape);
    let steps = shape.quantiser.steps;
    let mut quantised = QuantisedRow::default();
    for row in rows() {
        let label = sequence.tokens[row + 1];
        quantised.quantise(shape, targets, row, label, error);
        quantised.tails.iter().for_each(|tail| bits.put(u64::from(*tail), TAIL_BITS));
        for (id, level) in quantised.ids.iter().zip(&quantised.levels) {
            bits.put(u64::from(*id), id_bits);
            if *level > steps && shape.quantiser.has_tail() {
                bits.put(0, level_bits);
                bits.put(u64::from(level - steps - 1), HALVING_BITS);
            } else {
                bits.put(u64::from(*level), level_bits);
            }
        }
        quantised.labels.iter().for_each(|label| bits.put(u64::from(*label), LABEL_BITS));
    }
}

/// Appends the sequence of a record to `block`.
///
/// # Errors
/// What is wrong with the record; `block` may then hold a part of it. Any bytes are read in time and memory bounded
/// by their number and the shape.
pub(crate) fn decode_sequence(bytes: &[u8], shape: &RecordShape, block: &mut Block) -> Result<(), String> {
    let mut bits = BitReader::new(bytes);
    let places = shape.seq_len + 1;
    let id_bits = width_of(shape.vocab_size as u64);
    let first = block.tokens.len();
    // Before room is made: all tokens are there.
    if bits.left()? / (id_bits.max(1) as usize) < places && id_bits > 0 {
        return Err(format!("{} bytes are too few for {places} tokens", bytes.len()));
    }
    let mut before = 0;
    let mut left = places;
    for run in (0..=bits.number()?).rev() {
        before = segment_after(before, bits.number()?)?;
        let length = bits.number()? as usize + 1;
        if length > left || (run == 0 && length != left) || (run > 0 && length == left) {
            return Err(format!("its segments are not {places}"));
        }
        block.segments.resize(block.segments.len() + length, before);
        left -= length;
    }
    for _ in 0..places {
        block.tokens.push(checked_id(bits.get(id_bits), shape)?);
    }
    let Block { tokens, segments, .. } = &*block;
    let (tokens, segments) = (tokens[first..].to_vec(), segments[first..].to_vec());
    if let Some(targets) = prepare(block, shape) {
        decode_rows(&mut bits, &tokens, &segments, shape, targets)?;
    }
    bits.finish()
}

fn checked_id(id: u64, shape: &RecordShape) -> Result<u32, String> {
    if (id as usize) < shape.vocab_size {
        return Ok(id as u32);
    }
    Err(format!("it holds the id {id}, outside the vocabulary of {}", shape.vocab_size))
}

fn decode_rows(
    bits: &mut BitReader<'_>,
    tokens: &[u32],
    segments: &[u32],
    shape: &RecordShape,
    targets: &mut SparseTargets,
) -> Result<(), String> {
    let valid = |row: usize| segments[row] != PADDING && segments[row] == segments[row + 1];
    let count_bits = bits.get(COUNT_WIDTH_BITS) as u32;
    if count_bits > width_of(shape.vocab_size as u64 + 1) {
        return Err(format!("counts of {count_bits} bits"));
    }
    let counts: Vec<usize> =
        (0..shape.seq_len).map(|row| if valid(row) { bits.get(count_bits) as usize } else { 0 }).collect();
    let kept: usize = counts.iter().sum();
    let (id_bits, level_bits) = (width_of(shape.vocab_size as u64), level_bits(shape));
    let field_bits = id_bits + level_bits;
    let id_mask = (1 << id_bits) - 1;
    let least = u16::from(matches!(shape.quantiser.kind, RowKind::Sampled { .. }));
    // Before room is made: all fields are there.
    if bits.left()? / (field_bits as usize) < kept {
        return Err(format!("it ends before its {kept} kept ids"));
    }
    targets.ids.reserve(kept);
    targets.captures.iter_mut().for_each(|capture| capture.log_probs.reserve(kept));
    let mut row_codes = QuantisedRow::default();
    for (row, &count) in counts.iter().enumerate() {
        if !valid(row) {
            push_empty_row(targets);
            continue;
        }
        let label = tokens[row + 1];
        row_codes.clear();
        for _ in 0..shape.tail_count() {
            let tail = bits.get(TAIL_BITS) as u8;
            if tail as usize >= TAIL_CODES {
                return Err(format!("row {row} has the tail {tail}"));
            }
            row_codes.tails.push(tail);
        }
        // Few rows have levels that take more than their field: all are read as if none had, and those once more.
        row_codes.ids.resize(count, 0);
        row_codes.levels.resize(count, 0);
        let (mut largest, mut lowest, mut highest, mut kept_label) = (0, u16::MAX, 0, false);
        let places = row_codes.ids.iter_mut().zip(&mut row_codes.levels);
        for ((id, level), field) in places.zip(bits.peek(field_bits, count)) {
            (*id, *level) = ((field & id_mask) as u32, (field >> id_bits) as u16);
            (largest, kept_label) = (largest.max(*id), kept_label | (*id == label));
            (lowest, highest) = (lowest.min(*level), highest.max(*level));
        }
        if lowest == 0 && shape.quantiser.has_tail() {
            (largest, kept_label, lowest, highest) = (0, false, 1, 0);
            for (id, level) in row_codes.ids.iter_mut().zip(&mut row_codes.levels) {
                let field = bits.get(field_bits);
                *id = (field & id_mask) as u32;
                *level = match (field >> id_bits) as u16 {
                    0 => shape.quantiser.steps + 1 + (bits.get(HALVING_BITS) as u16).min(HALVINGS),
                    level => level,
                };
                (largest, kept_label, highest) = (largest.max(*id), kept_label | (*id == label), highest.max(*level));
            }
        } else {
            bits.skip(field_bits, count);
        }
        if count > 0 && (lowest < least || highest as usize >= shape.quantiser.level_count()) {
            let level = if lowest < least { lowest } else { highest };
            return Err(format!("row {row} has the level {level}"));
        }
        checked_id(u64::from(largest), shape)?;
        if !kept_label {
            row_codes.labels.extend((0..shape.label_count(count)).map(|_| bits.get(LABEL_BITS) as u16));
        }
        row_codes.decode(shape, label, targets);
    }
    Ok(())
}
