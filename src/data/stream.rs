//! The documents of one source in their shuffled order, as token ids.
//!
//! Two shuffles, neither of which needs the data in memory or an index of it: the chunks of all files are put in random
//! order, then consecutive chunks are read until a window is full, and its documents are put in random order. A source
//! smaller than the window is shuffled fully. The order depends on the seed, the source's number and the epoch, so a
//! position is four numbers and going on from it reads one window again.

use super::source::OpenSource;
use super::split::{Side, Split, document_tokens};
use crate::error::{Error, Result};
use crate::profile::stage;
use crate::tokenizer::Tokenizer;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;

/// Documents tokenised at a time, in parallel.
const BATCH: usize = 64;

/// Where a source stands, before its next document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamPosition {
    /// Passes over the source that are complete.
    pub epoch: u64,
    /// First chunk of the window, in the epoch's order.
    pub first_chunk: u64,
    /// Next document, in the window's order.
    pub document: u64,
    /// Tokens given in all epochs.
    pub tokens: u64,
}

#[derive(Debug)]
pub(super) struct DocumentStream {
    pub source: OpenSource,
    number: usize,
    split: Arc<Split>,
    side: Side,
    seed: u64,
    epochs: u64,
    window_bytes: u64,
    position: StreamPosition,
    /// Chunk numbers in this epoch's order.
    order: Vec<usize>,
    /// The window: texts not yet tokenised, in reverse, and how far in the order it reaches. `None` before it is read.
    window: Option<Window>,
    tokenised: VecDeque<Vec<u32>>,
}

#[derive(Debug)]
struct Window {
    texts: Vec<String>,
    end: u64,
}

impl DocumentStream {
    pub fn new(source: OpenSource, number: usize, split: Arc<Split>, side: Side, shuffle: Shuffle) -> DocumentStream {
        let Shuffle { seed, epochs, window_bytes } = shuffle;
        let mut stream = DocumentStream {
            source,
            number,
            split,
            side,
            seed,
            epochs,
            window_bytes,
            position: StreamPosition::default(),
            order: vec![],
            window: None,
            tokenised: VecDeque::new(),
        };
        stream.seek(StreamPosition::default());
        stream
    }

    pub fn position(&self) -> StreamPosition {
        self.position
    }

    pub fn seek(&mut self, position: StreamPosition) {
        self.position = position;
        self.window = None;
        self.tokenised.clear();
        self.order = (0..self.source.chunks.len()).collect();
        if self.side == Side::Training {
            shuffle(&mut self.order, &[self.seed, self.number as u64, position.epoch]);
        }
    }

    /// The next document's token ids; `None` when the last epoch is over.
    pub fn next(&mut self, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
        loop {
            if let Some(tokens) = self.tokenised.pop_front() {
                self.position.document += 1;
                self.position.tokens += tokens.len() as u64;
                return Ok(Some(tokens));
            }
            match &mut self.window {
                Some(window) if !window.texts.is_empty() => {
                    let keep = window.texts.len().saturating_sub(BATCH);
                    let _span = stage("tokenise").with("documents", (window.texts.len() - keep) as u64);
                    let batch: Vec<String> = window.texts.drain(keep..).rev().collect();
                    let tokenised: Result<Vec<_>> =
                        batch.par_iter().map(|text| document_tokens(tokenizer, text)).collect();
                    self.tokenised.extend(tokenised?);
                }
                Some(window) => {
                    let end = window.end;
                    self.window = None;
                    self.position.first_chunk = end;
                    self.position.document = 0;
                }
                None if self.position.first_chunk < self.order.len() as u64 => self.window = Some(self.read_window()?),
                None => {
                    if self.position.tokens == 0 && self.side == Side::Training {
                        let tip = "give it more documents, hold out less, or leave the source out";
                        let problem = "no document of this source is left to train on";
                        return Err(Error::file(self.source.pattern(), problem, tip));
                    }
                    if self.position.epoch + 1 >= self.epochs {
                        return Ok(None);
                    }
                    let StreamPosition { epoch, tokens, .. } = self.position;
                    self.seek(StreamPosition { epoch: epoch + 1, tokens, ..StreamPosition::default() });
                }
            }
        }
    }

    fn read_window(&self) -> Result<Window> {
        let _span = stage("read text");
        let first = self.position.first_chunk;
        let (mut texts, mut bytes, mut end) = (vec![], 0, first);
        while end < self.order.len() as u64 && bytes < self.window_bytes {
            let mut read = self.source.read(self.source.chunks[self.order[end as usize]])?;
            bytes += read.iter().map(|text| text.len() as u64).sum::<u64>();
            let sides: Vec<Side> = read.par_iter().map(|text| self.split.side(text)).collect();
            let mut sides = sides.into_iter();
            read.retain(|_| sides.next() == Some(self.side));
            texts.append(&mut read);
            end += 1;
        }
        if self.side == Side::Training {
            shuffle(&mut texts, &[self.seed, self.number as u64, self.position.epoch, first]);
        }
        texts.drain(..self.position.document as usize);
        texts.reverse();
        Ok(Window { texts, end })
    }
}

/// How the documents of a source are put in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shuffle {
    pub seed: u64,
    pub epochs: u64,
    pub window_bytes: u64,
}

/// Fisher-Yates with ChaCha8, written out here so that no release of a library changes the order of a run.
fn shuffle<T>(items: &mut [T], key: &[u64]) {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"limbeck shuffle 1");
    key.iter().for_each(|part| {
        hasher.update(&part.to_le_bytes());
    });
    let mut random = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    for last in (1..items.len()).rev() {
        let chosen = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        items.swap(last, chosen as usize);
    }
}
