//! How the content of a shard becomes tensors and back. One variant and one file per codec; the rest of the cache
//! only sees a [`Block`] go in and a [`Block`] come out.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::manifest::ShardRecord;
use super::raw;
use super::settings::CacheSettings;
use super::shard::{TensorBytes, TensorIndex, Tensors};
use crate::error::Result;
use crate::targets::{SparseTargets, TargetKind};

/// The encodings of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// 32-bit ids and 32-bit log-probabilities: exact, and large.
    #[default]
    Raw,
}

/// Some sequences in a row, with their targets: what a shard holds, or a part of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Block {
    /// `[sequences, seq_len + 1]`
    pub tokens: Vec<u32>,
    /// `[sequences, seq_len + 1]`
    pub segments: Vec<u32>,
    /// `sequences * seq_len` rows.
    pub targets: Option<SparseTargets>,
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
}

impl Shape {
    /// Of one shard. [`CacheSettings::check`] and the manifest's own check keep the products inside 64 bits.
    pub(crate) fn of(settings: &CacheSettings, record: &ShardRecord) -> Shape {
        Shape {
            sequences: record.counts.sequences as usize,
            seq_len: settings.seq_len,
            kept_ids: record.counts.kept_ids as usize,
            vocab_size: settings.tokenizer.vocab_size,
            temperatures: settings.soft_targets.as_ref().map(|soft_targets| soft_targets.temperatures.clone()),
            kind: settings.soft_targets.as_ref().map_or_else(TargetKind::default, |soft| soft.selection.kind()),
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.sequences * self.seq_len
    }
}

impl Codec {
    pub fn name(self) -> &'static str {
        match self {
            Codec::Raw => "raw",
        }
    }

    /// The tensors of a shard, in the order of their bytes.
    pub(crate) fn encode<'a>(self, block: &'a Block, shape: &Shape) -> Vec<TensorBytes<'a>> {
        match self {
            Codec::Raw => raw::encode(block, shape),
        }
    }

    /// Whether a shard has the tensors it must have and their offsets can be followed. Once per shard, after its hash.
    pub(crate) fn check(self, index: &TensorIndex, tensors: &Tensors<'_>, shape: &Shape) -> Result<(), String> {
        match self {
            Codec::Raw => raw::check(index, tensors, shape),
        }
    }

    /// Sequences `range` of a shard, in time that does not depend on the size of the shard.
    pub(crate) fn decode(self, tensors: &Tensors<'_>, shape: &Shape, range: Range<usize>) -> Result<Block, String> {
        match self {
            Codec::Raw => raw::decode(tensors, shape, range),
        }
    }
}
