//! Documents with their rows, packed into sequences: each row goes where its label goes.

use super::rows::{CompleteRow, complete};
use super::{Document, ImportOptions, ImportReport, Origin, Source, vocab_size};
use crate::cache::WholeSequence;
use crate::data::Packer;
use crate::error::{Error, Result};
use crate::targets::SparseTargets;

/// After so many rows it is looked whether they are about their own tokens.
const LOOK_AFTER: u64 = 512;

/// The sequences of some documents, in their order.
pub(super) struct Sequences<'a, I> {
    documents: I,
    source: &'a Source,
    report: &'a mut ImportReport,
    vocab_size: usize,
    seq_len: usize,
    temperature: f32,
    token_bytes: Vec<u32>,
    packer: Packer,
    /// What is known at each place of the sequence being filled; `None` where the place predicts nothing of its document.
    rows: Vec<Option<CompleteRow>>,
    /// The document being packed, its rows, and the token that the next sequence starts with.
    pending: Option<(Document, Vec<CompleteRow>, usize)>,
    looked: bool,
    /// No more documents come.
    ended: bool,
}

impl<'a, I: Iterator<Item = Result<Document>>> Sequences<'a, I> {
    pub fn new(documents: I, source: &'a Source, options: &ImportOptions, report: &'a mut ImportReport) -> Self {
        Sequences {
            documents,
            source,
            report,
            vocab_size: vocab_size(options),
            seq_len: options.seq_len,
            temperature: options.temperature,
            token_bytes: options.tokenizer.token_byte_lengths(),
            packer: Packer::new(options.seq_len, 0),
            rows: vec![],
            pending: None,
            looked: false,
            ended: false,
        }
    }

    fn error(&self, origin: Origin, problem: String) -> Error {
        Error::Data {
            path: self.source.files[origin.file].clone(),
            record: origin.record,
            problem,
            tip: "correct the record, or leave it out; nothing after it was imported".into(),
        }
    }

    fn complete(&mut self, document: &Document) -> Result<Vec<CompleteRow>> {
        let (tokens, vocab_size) = (&document.tokens, self.vocab_size);
        if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab_size) {
            let problem = format!("the token {token} is outside the vocabulary of {vocab_size}");
            return Err(self.error(document.origin, problem));
        }
        debug_assert_eq!(document.rows.len() + 1, tokens.len());
        let mut rows = Vec::with_capacity(document.rows.len());
        for (place, row) in document.rows.iter().enumerate() {
            let row = row.as_ref();
            if let Some(row) = row {
                self.report.place(row, tokens[place], tokens[place + 1], tokens.get(place + 2).copied());
            }
            match complete(row, tokens[place + 1], vocab_size, self.source.largest_sum, self.report) {
                Ok(row) => rows.push(row),
                Err(problem) => {
                    let problem = format!("the row about token {} (from 0): {problem}", place + 1);
                    return Err(self.error(document.origin, problem));
                }
            }
        }
        if !self.looked && self.report.rows >= LOOK_AFTER {
            self.look()?;
        }
        Ok(rows)
    }

    fn look(&mut self) -> Result<()> {
        self.looked = true;
        match self.report.shifted() {
            None => Ok(()),
            Some(problem) => Err(Error::file(
                &self.source.files[0],
                problem,
                "make each row about the token that follows what the teacher had read (see docs/import.md)",
            )),
        }
    }

    /// Takes the sequence that is full, or the last one.
    fn take(&mut self) -> Option<WholeSequence> {
        let rows = std::mem::take(&mut self.rows);
        let sequence = self.packer.take()?;
        let mut targets = SparseTargets::empty(&[self.temperature]);
        let mut text_bytes = 0;
        for place in 0..self.seq_len {
            let row = rows.get(place).and_then(Option::as_ref).filter(|_| sequence.is_valid(place));
            let capture = &mut targets.captures[0];
            if let Some(row) = row {
                targets.ids.extend_from_slice(&row.ids);
                capture.log_probs.extend_from_slice(&row.log_probs);
                let label = sequence.tokens[place + 1] as usize;
                text_bytes += u64::from(self.token_bytes.get(label).copied().unwrap_or(0));
            }
            capture.log_tail.push(row.map_or(0.0, |row| row.log_tail));
            capture.label_log_prob.push(row.map_or(0.0, |row| row.label_log_prob));
            targets.offsets.push(targets.ids.len() as u64);
        }
        Some((sequence, Some(targets), text_bytes))
    }

    fn advance(&mut self) -> Result<Option<WholeSequence>> {
        loop {
            if self.packer.is_full()
                && let Some(sequence) = self.take()
            {
                return Ok(Some(sequence));
            }
            if let Some((document, rows, from)) = self.pending.take() {
                let next = self.packer.add(&document.tokens, from);
                let end = next.map_or(document.tokens.len(), |next| next + 1);
                // The row of the last token taken is about a token that is not here: it comes with the next sequence.
                self.rows.extend(rows[from..end - 1].iter().cloned().map(Some));
                self.rows.push(None);
                self.pending = next.map(|next| (document, rows, next));
                continue;
            }
            if self.ended {
                return Ok(self.take());
            }
            match self.documents.next() {
                None => {
                    self.ended = true;
                    self.look()?;
                }
                Some(document) => {
                    let document = document?;
                    self.report.documents += 1;
                    if document.tokens.len() < 2 {
                        self.report.documents_left_out += 1;
                        continue;
                    }
                    let rows = self.complete(&document)?;
                    self.pending = Some((document, rows, 0));
                }
            }
        }
    }
}

impl<I: Iterator<Item = Result<Document>>> Iterator for Sequences<'_, I> {
    type Item = Result<WholeSequence>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}
