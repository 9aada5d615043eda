//! A codec that learns, in little, for tests of how codecs learn: `raw` with each kept id replaced by its rank among all
//! ids, by how often the first shards keep them.

use std::borrow::Cow;
use std::ops::Range;

use super::codec::{Block, Coder, Encoded, Shape};
use super::manifest::QuantiserError;
use super::raw;
use super::settings::CacheSettings;
use super::shard::Tensors;
use crate::error::Result;

#[derive(Debug, Clone)]
pub(crate) struct Ranks {
    /// Id of each rank.
    ids: Vec<u32>,
    /// Rank of each id.
    ranks: Vec<u32>,
}

pub(crate) fn learn(settings: &CacheSettings, blocks: &mut dyn Iterator<Item = Result<Block>>) -> Result<Vec<u8>> {
    let mut counts = vec![0u64; settings.tokenizer.vocab_size];
    for block in blocks {
        for id in block?.targets.into_iter().flat_map(|targets| targets.ids) {
            counts[id as usize] += 1;
        }
    }
    let mut ids: Vec<u32> = (0..counts.len() as u32).collect();
    ids.sort_by_key(|id| (std::cmp::Reverse(counts[*id as usize]), *id));
    Ok(ids.into_iter().flat_map(u32::to_le_bytes).collect())
}

pub(crate) fn read(settings: &CacheSettings, bytes: &[u8]) -> Result<Ranks, String> {
    let ids: Vec<u32> = bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let mut ranks = vec![0; settings.tokenizer.vocab_size];
    if ids.len() != ranks.len() {
        return Err(format!("it has {} ranks", ids.len()));
    }
    for (rank, id) in ids.iter().enumerate() {
        *ranks.get_mut(*id as usize).ok_or("an id outside the vocabulary")? = rank as u32;
    }
    Ok(Ranks { ids, ranks })
}

fn ranks(coder: Option<&Coder>) -> &Ranks {
    let Some(Coder::Ranked(ranks)) = coder else { panic!("encoded before it has learnt") };
    ranks
}

pub(crate) fn encode<'a>(block: &'a Block, shape: &Shape, coder: Option<&Coder>) -> Encoded<'a> {
    let ranks = ranks(coder);
    let mut tensors = raw::encode(block, shape);
    for tensor in tensors.iter_mut().filter(|tensor| tensor.name == "ids") {
        let ids = tensor.bytes.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
        tensor.bytes = Cow::Owned(ids.flat_map(|id| ranks.ranks[id as usize].to_le_bytes()).collect());
    }
    let error = QuantiserError { rows: shape.rows() as u64, kl_sum: 0.1, kl_max: 0.1, ..Default::default() };
    Encoded { tensors, error: Some(error) }
}

pub(crate) fn decode(
    tensors: &Tensors<'_>,
    shape: &Shape,
    coder: Option<&Coder>,
    range: Range<usize>,
    into: &mut Block,
) -> Result<(), String> {
    let first = into.targets.as_ref().map_or(0, |targets| targets.ids.len());
    raw::decode(tensors, shape, range, into)?;
    for id in into.targets.iter_mut().flat_map(|targets| &mut targets.ids[first..]) {
        *id = ranks(coder).ids[*id as usize];
    }
    Ok(())
}
