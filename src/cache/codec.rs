//! How the content of a shard becomes tensors and back. One variant and one file per codec; the rest of the cache
//! only sees a [`Block`] go in and a [`Block`] come out.
//!
//! A codec that learns from the data says so by [`Codec::calibration_tokens`]. It is given that much of the beginning
//! of the data, in the order of the sequences, and makes a file of tables of it, the [`Coder`]; the same data must give
//! the same bytes. [`calibration`](super::calibration) sees to the rest.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::manifest::{QuantiserError, ShardRecord};
use super::quantizer::RowKind;
use super::record::RecordShape;
use super::settings::{CacheSettings, RouterSettings};
use super::shard::{TensorBytes, TensorIndex, Tensors};
use super::{raw, records};
use crate::error::Result;
use crate::selection::Selection;
use crate::targets::{PackedSequence, SparseTargets, TargetKind};

/// Tokens that `compact` learns from: more of them made records hardly smaller.
const CALIBRATION_TOKENS: u64 = 262_144;

/// The encodings of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// 32-bit ids and 32-bit log-probabilities: exact, and large.
    #[default]
    Raw,
    /// Ids and levels in bit fields of fixed widths: a third of the bytes, and fast to read.
    Packed,
    /// Ids and levels entropy coded with tables that were learnt from the data: the smallest.
    Compact,
    /// `raw` with ids in the order of how often they are kept: a codec that learns, in little.
    #[cfg(test)]
    Ranked,
}

/// Some sequences in a row, with their targets: what a shard holds, or a part of it.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Block {
    /// `[sequences, seq_len + 1]`
    pub tokens: Vec<u32>,
    /// `[sequences, seq_len + 1]`
    pub segments: Vec<u32>,
    /// `sequences * seq_len` rows.
    pub targets: Option<SparseTargets>,
}

impl Block {
    /// No sequences yet, of a cache with these settings.
    pub(crate) fn empty(settings: &CacheSettings) -> Block {
        let targets = settings.soft_targets.as_ref().map(|soft| SparseTargets {
            kind: soft.selection.kind(),
            router: soft.router.as_ref().map(RouterSettings::empty),
            ..SparseTargets::empty(&soft.temperatures)
        });
        Block { tokens: vec![], segments: vec![], targets }
    }

    /// One of its sequences, with its rows.
    pub(crate) fn sequence(&self, number: usize, seq_len: usize) -> (PackedSequence, Option<SparseTargets>) {
        let places = number * (seq_len + 1)..(number + 1) * (seq_len + 1);
        let sequence =
            PackedSequence { tokens: self.tokens[places.clone()].to_vec(), segments: self.segments[places].to_vec() };
        (sequence, self.targets.as_ref().map(|targets| targets.slice(number * seq_len, (number + 1) * seq_len)))
    }
}

/// The sizes of a shard that the manifest implies; what a codec needs to know beside the tensors.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub sequences: usize,
    pub seq_len: usize,
    pub kept_ids: usize,
    pub vocab_size: usize,
    /// `None` in a cache of tokens only.
    pub temperatures: Option<Vec<f32>>,
    pub kind: TargetKind,
    pub router: Option<RouterSettings>,
    record: RecordShape,
}

impl Shape {
    /// Of one shard. [`CacheSettings::check`] and the manifest's own check keep the products inside 64 bits.
    pub(crate) fn of(settings: &CacheSettings, record: &ShardRecord) -> Shape {
        Shape {
            sequences: record.counts.sequences as usize,
            kept_ids: record.counts.kept_ids as usize,
            ..Shape::of_settings(settings)
        }
    }

    /// Of a shard without sequences.
    pub(crate) fn of_settings(settings: &CacheSettings) -> Shape {
        let soft_targets = settings.soft_targets.as_ref();
        let (seq_len, vocab_size) = (settings.seq_len, settings.tokenizer.vocab_size);
        let kind = match soft_targets {
            Some(soft) if settings.codec.default_levels().is_some() => row_kind(&soft.selection),
            _ => RowKind::Exact,
        };
        let record = RecordShape::new(seq_len, vocab_size, settings.temperatures(), kind, settings.levels());
        Shape {
            sequences: 0,
            seq_len,
            kept_ids: 0,
            vocab_size,
            temperatures: soft_targets.map(|soft_targets| soft_targets.temperatures.clone()),
            kind: soft_targets.map_or_else(TargetKind::default, |soft| soft.selection.kind()),
            router: settings.router().cloned(),
            record: record.expect("settings are checked before they are used"),
        }
    }

    pub(crate) fn record(&self) -> &RecordShape {
        &self.record
    }

    /// No sequences yet, of a shard of this shape.
    pub(crate) fn empty_block(&self) -> Block {
        let targets = self.temperatures.as_ref().map(|temperatures| SparseTargets {
            kind: self.kind,
            router: self.router.as_ref().map(RouterSettings::empty),
            ..SparseTargets::empty(temperatures)
        });
        Block { tokens: vec![], segments: vec![], targets }
    }

    pub(crate) fn rows(&self) -> usize {
        self.sequences * self.seq_len
    }
}

/// What the values of rows are that were selected so.
fn row_kind(selection: &Selection) -> RowKind {
    match *selection {
        Selection::MinProb { .. } | Selection::TopK { .. } | Selection::TopP { .. } => RowKind::Exact,
        Selection::ThresholdSampled { threshold, .. } => {
            RowKind::ThresholdSampled { log_threshold: threshold.ln() as f32 }
        }
        Selection::Sampled { draws, .. } => RowKind::Sampled { draws: draws.min(usize::from(u16::MAX)) as u16 },
    }
}

/// What a codec learnt from the data, ready for use.
#[derive(Debug, Clone)]
pub(crate) enum Coder {
    Compact(Arc<records::CompactCoder>),
    #[cfg(test)]
    Ranked(super::ranked::Ranks),
}

/// A shard's content as tensors.
pub(crate) struct Encoded<'a> {
    /// In the order of their bytes.
    pub tensors: Vec<TensorBytes<'a>>,
    /// What quantising did; `None` where nothing was rounded.
    pub error: Option<QuantiserError>,
}

impl Codec {
    pub fn name(self) -> &'static str {
        match self {
            Codec::Raw => "raw",
            Codec::Packed => "packed",
            Codec::Compact => "compact",
            #[cfg(test)]
            Codec::Ranked => "ranked",
        }
    }

    /// Levels of its quantiser when the settings do not say; `None` for codecs that round nothing.
    pub fn default_levels(self) -> Option<u16> {
        match self {
            Codec::Raw => None,
            // A field of six bits.
            Codec::Packed => Some(63),
            Codec::Compact => Some(128),
            #[cfg(test)]
            Codec::Ranked => None,
        }
    }

    /// How many tokens it learns from before it encodes anything; `None` if it has nothing to learn.
    pub(crate) fn calibration_tokens(self) -> Option<u64> {
        match self {
            Codec::Raw | Codec::Packed => None,
            Codec::Compact => Some(CALIBRATION_TOKENS),
            #[cfg(test)]
            Codec::Ranked => Some(30),
        }
    }

    /// The bytes of `coder.safetensors`, learnt from the blocks of the first shards, given in their order.
    ///
    /// Called only if [`calibration_tokens`](Self::calibration_tokens) says so. Equal blocks must give equal bytes.
    pub(crate) fn learn(
        self,
        settings: &CacheSettings,
        blocks: &mut dyn Iterator<Item = Result<Block>>,
    ) -> Result<Vec<u8>> {
        match self {
            Codec::Raw | Codec::Packed => unreachable!("it says that it has nothing to learn"),
            Codec::Compact => records::learn(settings, blocks),
            #[cfg(test)]
            Codec::Ranked => super::ranked::learn(settings, blocks),
        }
    }

    /// Reads what [`learn`](Self::learn) wrote. The hash of the bytes agreed; what is wrong with them all the same is
    /// said in the error.
    pub(crate) fn read_coder(self, settings: &CacheSettings, bytes: &[u8]) -> Result<Coder, String> {
        match self {
            Codec::Raw | Codec::Packed => Err(format!("the codec `{}` has no coder", self.name())),
            Codec::Compact => records::read_coder(settings, bytes).map(Arc::new).map(Coder::Compact),
            #[cfg(test)]
            Codec::Ranked => super::ranked::read(settings, bytes).map(Coder::Ranked),
        }
    }

    /// The tensors of a shard.
    pub(crate) fn encode<'a>(self, block: &'a Block, shape: &Shape, coder: Option<&Coder>) -> Encoded<'a> {
        match self {
            Codec::Raw => Encoded { tensors: raw::encode(block, shape), error: None },
            Codec::Packed | Codec::Compact => records::encode(self, block, shape, coder),
            #[cfg(test)]
            Codec::Ranked => super::ranked::encode(block, shape, coder),
        }
    }

    /// Whether a shard has the tensors it must have, by its header alone. Once per shard, when it is opened.
    pub(crate) fn check(self, index: &TensorIndex, shape: &Shape) -> Result<(), String> {
        match self {
            Codec::Raw => raw::check(index, shape),
            Codec::Packed | Codec::Compact => records::check(index, shape),
            #[cfg(test)]
            Codec::Ranked => raw::check(index, shape),
        }
    }

    /// Whether the content of a shard makes sense throughout, after every block was checked.
    pub(crate) fn verify(self, tensors: &Tensors<'_>, shape: &Shape, coder: Option<&Coder>) -> Result<(), String> {
        match self {
            Codec::Raw => raw::verify(tensors, shape),
            Codec::Packed | Codec::Compact => records::verify(self, tensors, shape, coder),
            #[cfg(test)]
            Codec::Ranked => raw::verify(tensors, shape),
        }
    }

    /// Appends sequences `range` of a shard to `into`, in time that does not depend on the size of the shard. After an
    /// error `into` may hold a part of them.
    pub(crate) fn decode(
        self,
        tensors: &Tensors<'_>,
        shape: &Shape,
        coder: Option<&Coder>,
        range: Range<usize>,
        into: &mut Block,
    ) -> Result<(), String> {
        match self {
            Codec::Raw => raw::decode(tensors, shape, range, into),
            Codec::Packed | Codec::Compact => records::decode(self, tensors, shape, coder, range, into),
            #[cfg(test)]
            Codec::Ranked => super::ranked::decode(tensors, shape, coder, range, into),
        }
    }
}
