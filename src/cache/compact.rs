//! The codec `compact`: one sequence, entropy coded with the tables of a [`Coder`], as the [`walk`](super::walk) over
//! it says.

use super::codec::Block;
use super::coder::{Coder, context};
use super::direction::{Reading, Writing};
use super::manifest::QuantiserError;
use super::model::Model;
use super::rans::{Decoder, Encoder, Sink, Tables};
use super::record::{
    QuantisedRow, RecordShape, check, prepare, push_empty_row, segment_after, segment_runs, segment_step,
};
use super::walk::{Walk, Workspace};
use crate::targets::{PADDING, PackedSequence, SparseTargets};

/// A sequence with its rows quantised, in the order of its valid rows.
pub(crate) struct QuantisedSequence {
    pub sequence: PackedSequence,
    pub rows: Vec<QuantisedRow>,
}

impl QuantisedSequence {
    pub(crate) fn new(
        sequence: &PackedSequence,
        targets: Option<&SparseTargets>,
        shape: &RecordShape,
        error: &mut QuantiserError,
    ) -> Self {
        check(sequence, targets, shape);
        let mut rows = vec![];
        if let Some(targets) = targets {
            for row in (0..shape.seq_len).filter(|row| sequence.is_valid(*row)) {
                let label = sequence.tokens[row + 1];
                let mut quantised = QuantisedRow::default();
                quantised.quantise(shape, targets, row, label, error);
                rows.push(quantised);
            }
        }
        QuantisedSequence { sequence: sequence.clone(), rows }
    }
}

/// Walks over a sequence, putting its symbols into `sink`.
pub(crate) fn write_sequence<S: Sink>(
    quantised: &QuantisedSequence,
    shape: &RecordShape,
    model: &Model,
    space: &mut Workspace,
    sink: S,
) -> S {
    let mut walk = Walk::new(Writing(sink), model, shape, space);
    let sequence = &quantised.sequence;
    let runs = segment_runs(&sequence.segments);
    walk.plain(runs.len() as u64 - 1);
    let mut before = 0;
    for (segment, length) in runs {
        walk.plain(segment_step(before, segment));
        walk.plain(length as u64 - 1);
        before = segment;
    }
    let mut rows = quantised.rows.iter();
    let fine = "what is written can be written";
    walk.first_token(sequence.tokens[0]);
    for place in 0..shape.seq_len {
        let (previous, label) = (sequence.tokens[place], sequence.tokens[place + 1]);
        walk.token(previous, label);
        if shape.has_targets() && sequence.is_valid(place) {
            walk.space.row.clone_from(rows.next().expect("a row for each valid place"));
            walk.row(place, previous, label).expect(fine);
        }
    }
    walk.direction.0
}

/// Appends the record of a sequence that a cache may hold, and adds what its rows lost to `error`.
pub(crate) fn encode_sequence(
    sequence: &PackedSequence,
    targets: Option<&SparseTargets>,
    shape: &RecordShape,
    coder: &Coder,
    space: &mut Workspace,
    out: &mut Vec<u8>,
    error: &mut QuantiserError,
) {
    let quantised = QuantisedSequence::new(sequence, targets, shape, error);
    write_sequence(&quantised, shape, &coder.model, space, Encoder::new(&coder.tables)).finish(out);
}

/// What the parts of records cost, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RecordParts {
    pub tokens: f64,
    /// How many ids are kept, and which.
    pub ids: f64,
    pub levels: f64,
    pub tails: f64,
    pub labels: f64,
}

impl RecordParts {
    /// Adds the parts of one sequence's record, but for its 8 bytes of states and the segments.
    pub(crate) fn add(
        &mut self,
        sequence: &PackedSequence,
        targets: Option<&SparseTargets>,
        shape: &RecordShape,
        coder: &Coder,
        space: &mut Workspace,
    ) {
        let quantised = QuantisedSequence::new(sequence, targets, shape, &mut QuantiserError::default());
        let costs = Costs { tables: &coder.tables, bits: [0.0; context::KINDS.len()], kind: None };
        let bits = write_sequence(&quantised, shape, &coder.model, space, costs).bits;
        for (start, bits) in context::KINDS.iter().zip(bits) {
            let part = match *start {
                context::TOKEN | context::TOKEN_OTHER => &mut self.tokens,
                context::TOP_LEVEL | context::LEVEL | context::LEVEL_LAST => &mut self.levels,
                context::TAIL | context::TAIL_MORE => &mut self.tails,
                context::LABEL => &mut self.labels,
                _ => &mut self.ids,
            };
            *part += bits / 8.0;
        }
    }
}

/// Sums what symbols cost, by the kind of their context.
struct Costs<'a> {
    tables: &'a Tables,
    bits: [f64; context::KINDS.len()],
    /// The kind that raw bits belong to.
    kind: Option<usize>,
}

impl Sink for Costs<'_> {
    fn symbol(&mut self, context: usize, symbol: u8) {
        self.kind = context::KINDS.iter().rposition(|start| *start <= context);
        self.bits[self.kind.unwrap_or(0)] += self.tables.cost(context, symbol);
    }

    fn raw(&mut self, _: u32, bits: u32) {
        if let Some(kind) = self.kind {
            self.bits[kind] += f64::from(bits);
        }
    }
}

/// Appends the sequence of a record to `block`.
///
/// # Errors
/// What is wrong with the record; `block` may then hold a part of it.
pub(crate) fn decode_sequence(
    bytes: &[u8],
    shape: &RecordShape,
    coder: &Coder,
    space: &mut Workspace,
    block: &mut Block,
) -> Result<(), String> {
    if coder.model.vocab_size != shape.vocab_size {
        return Err(format!("a coder for {} tokens, not {}", coder.model.vocab_size, shape.vocab_size));
    }
    let direction = Reading(Decoder::new(&coder.tables, bytes)?);
    let mut walk = Walk::new(direction, &coder.model, shape, space);
    let places = shape.seq_len + 1;
    let mut segments: Vec<u32> = vec![];
    let mut before = 0;
    for run in (0..=walk.plain(0)).rev() {
        before = segment_after(before, walk.plain(0))?;
        let (length, left) = (walk.plain(0) as usize + 1, places - segments.len());
        if length > left || (run == 0 && length != left) || (run > 0 && length == left) {
            return Err(format!("its segments are not {places}"));
        }
        segments.resize(segments.len() + length, before);
    }
    let mut previous = walk.first_token(0);
    block.tokens.push(previous);
    for place in 0..shape.seq_len {
        let label = walk.token(previous, 0);
        block.tokens.push(label);
        if let Some(targets) = prepare(block, shape) {
            if segments[place] != PADDING && segments[place] == segments[place + 1] {
                walk.space.row.clear();
                walk.row(place, previous, label)?;
                walk.space.row.decode(shape, label, targets);
            } else {
                push_empty_row(targets);
            }
        }
        walk.checked()?;
        previous = label;
    }
    block.segments.extend_from_slice(&segments);
    walk.direction.0.finish()
}
