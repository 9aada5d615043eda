//! Which documents are trained on and which are held out, decided by what a document says.
//!
//! A document is held out when the BLAKE3 hash of the seed and its text falls below a cut. So a document is on the same
//! side wherever it stands, in whatever order or mixture, and an exact copy of a held-out document is held out as well.

use super::amount::parse_count;
use super::source::{CHUNK_BYTES, DataSource, OpenSource, open_all};
use crate::error::{Error, Result};
use crate::profile::stage;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, HashSet};
use std::fmt;

/// Cuts are multiples of 2^-40, so that they survive being written as decimal numbers.
const CUT_BITS: u32 = 40;

/// What is held out of training.
///
/// In a recipe: `held_out = "20M"` (tokens), `"1%"` or `0.01` (share of documents), a list of sources, or `"none"`.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum HeldOut {
    #[default]
    None,
    /// The documents of lowest hash that together have at least this many tokens.
    ///
    /// Finding the cut takes a pass over the data. When sources are added later the cut gets lower: documents that were
    /// trained on are never held out afterwards, but some held-out ones may come into training. To keep the split as
    /// it is, keep the share that [`super::DataConfig::resolve_held_out`] returns.
    Tokens(u64),
    /// Documents whose hash falls below this share, 0 < share < 1. Never changes for a document.
    Share(f64),
    /// Documents of other files; exact copies of them are left out of training.
    Sources(Vec<DataSource>),
}

impl HeldOut {
    pub fn is_none(&self) -> bool {
        *self == HeldOut::None
    }
}

impl Serialize for HeldOut {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            HeldOut::None => serializer.serialize_str("none"),
            HeldOut::Tokens(tokens) => serializer.serialize_u64(*tokens),
            HeldOut::Share(share) => serializer.serialize_f64(*share),
            HeldOut::Sources(sources) => sources.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for HeldOut {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<HeldOut, D::Error> {
        struct HeldOutVisitor;
        impl<'de> Visitor<'de> for HeldOutVisitor {
            type Value = HeldOut;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("tokens (\"20M\"), a share (\"1%\"), a list of sources or \"none\"")
            }

            fn visit_u64<E: de::Error>(self, tokens: u64) -> Result<HeldOut, E> {
                Ok(HeldOut::Tokens(tokens))
            }

            fn visit_i64<E: de::Error>(self, tokens: i64) -> Result<HeldOut, E> {
                let negative = |_| E::invalid_value(de::Unexpected::Signed(tokens), &self);
                Ok(HeldOut::Tokens(u64::try_from(tokens).map_err(negative)?))
            }

            fn visit_f64<E: de::Error>(self, share: f64) -> Result<HeldOut, E> {
                Ok(HeldOut::Share(share))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<HeldOut, E> {
                if text == "none" {
                    return Ok(HeldOut::None);
                }
                if let Some(percent) = text.strip_suffix('%') {
                    let percent: f64 =
                        percent.trim().parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))?;
                    return Ok(HeldOut::Share(percent / 100.0));
                }
                let tokens = parse_count(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))?;
                Ok(HeldOut::Tokens(tokens))
            }

            fn visit_unit<E: de::Error>(self) -> Result<HeldOut, E> {
                Ok(HeldOut::None)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, sequence: A) -> Result<HeldOut, A::Error> {
                Deserialize::deserialize(de::value::SeqAccessDeserializer::new(sequence)).map(HeldOut::Sources)
            }
        }
        deserializer.deserialize_any(HeldOutVisitor)
    }
}

/// One of the two sides of the split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Training,
    HeldOut,
}

/// The rule with its cut found and its held-out files read.
#[derive(Debug, Clone)]
pub(super) struct Split {
    seed: u64,
    /// Hashes below this, of 2^40, are held out.
    pub cut: u64,
    /// Documents of held-out sources.
    copies: HashSet<u128>,
}

impl Split {
    /// May pass over all the data ([`HeldOut::Tokens`]) or over the held-out sources.
    pub fn find(held_out: &HeldOut, seed: u64, sources: &[OpenSource], tokenizer: &Tokenizer) -> Result<Split> {
        let _span = stage("find held-out text");
        let mut split = Split { seed, cut: 0, copies: HashSet::new() };
        match held_out {
            HeldOut::None => {}
            HeldOut::Tokens(tokens) => split.cut = cut_for(*tokens, seed, sources, tokenizer)?,
            HeldOut::Share(share) if *share > 0.0 && *share < 1.0 => {
                split.cut = (share * (1u64 << CUT_BITS) as f64).round() as u64;
            }
            HeldOut::Share(share) => {
                let problem = format!("a held-out share of {share} is not between 0 and 1");
                return Err(Error::usage(problem, "write it like \"1%\" or 0.01, or tokens like \"20M\""));
            }
            HeldOut::Sources(declared) => {
                for source in open_all(declared, CHUNK_BYTES)? {
                    for &chunk in &source.chunks {
                        split.copies.extend(source.read(chunk)?.iter().map(|text| identity(text.as_bytes())));
                    }
                }
            }
        }
        Ok(split)
    }

    /// All documents are on the held-out side.
    pub fn everything() -> Split {
        Split { seed: 0, cut: 1 << CUT_BITS, copies: HashSet::new() }
    }

    /// The rule as one that needs no pass over the data, and that added sources do not change.
    pub fn fixed(&self, held_out: &HeldOut) -> HeldOut {
        match held_out {
            HeldOut::Tokens(_) => HeldOut::Share(self.cut as f64 / (1u64 << CUT_BITS) as f64),
            other => other.clone(),
        }
    }

    pub fn side(&self, text: &str) -> Side {
        let below = self.cut > 0 && rank(self.seed, text) >> (64 - CUT_BITS) < self.cut;
        let copy = !self.copies.is_empty() && self.copies.contains(&identity(text.as_bytes()));
        if below || copy { Side::HeldOut } else { Side::Training }
    }
}

fn rank(seed: u64, text: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"limbeck held-out 1").update(&seed.to_le_bytes()).update(text.as_bytes());
    let hash = hasher.finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// Equal exactly for equal bytes.
pub(super) fn identity(bytes: &[u8]) -> u128 {
    let hash = blake3::hash(bytes);
    u128::from_le_bytes(hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes"))
}

/// The lowest cut that holds out at least so many tokens, counting copies once. Does not depend on any order.
fn cut_for(wanted: u64, seed: u64, sources: &[OpenSource], tokenizer: &Tokenizer) -> Result<u64> {
    if wanted == 0 {
        return Err(Error::usage("0 tokens are to be held out", "leave `held_out` away, or write it like \"20M\""));
    }
    // The documents of lowest rank so far, no more of them than are needed.
    let mut lowest: BTreeMap<u64, u64> = BTreeMap::new();
    let mut total = 0;
    for source in sources {
        for &chunk in &source.chunks {
            let texts = source.read(chunk)?;
            let bound = if total >= wanted { *lowest.keys().next_back().expect("holds tokens") } else { u64::MAX };
            let counted: Vec<(u64, u64)> = texts
                .par_iter()
                .map(|text| (rank(seed, text), text))
                .filter(|(rank, _)| *rank <= bound)
                .map(|(rank, text)| Ok((rank, document_tokens(tokenizer, text)?.len() as u64)))
                .collect::<Result<_>>()?;
            for (rank, tokens) in counted {
                if lowest.insert(rank, tokens).is_none() {
                    total += tokens;
                }
                while let Some((&highest, &tokens)) = lowest.last_key_value()
                    && total - tokens >= wanted
                {
                    lowest.remove(&highest);
                    total -= tokens;
                }
            }
        }
    }
    if total < wanted {
        let problem = format!("{wanted} tokens are to be held out, but the data has only {total}");
        return Err(Error::usage(problem, "hold out less, for example \"1%\", or add data"));
    }
    Ok((lowest.keys().next_back().expect("holds tokens") >> (64 - CUT_BITS)) + 1)
}

/// Token ids of a document, between the tokenizer's document tokens.
pub(super) fn document_tokens(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let mut tokens: Vec<u32> = tokenizer.document_start().into_iter().collect();
    tokens.extend(tokenizer.encode_document(text)?);
    tokens.extend(tokenizer.document_end());
    Ok(tokens)
}
