//! `train.micro_batch_tokens`: a token amount, or `"auto"`.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::data::parse_count;

/// Tokens in memory at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MicroBatch {
    /// As many as the memory at hand allows.
    Auto,
    Tokens(u64),
}

impl MicroBatch {
    /// The number, where one was given.
    pub fn tokens(self) -> Option<u64> {
        match self {
            MicroBatch::Auto => None,
            MicroBatch::Tokens(tokens) => Some(tokens),
        }
    }
}

impl Serialize for MicroBatch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            MicroBatch::Auto => serializer.serialize_str("auto"),
            MicroBatch::Tokens(tokens) => serializer.serialize_u64(*tokens),
        }
    }
}

impl<'de> Deserialize<'de> for MicroBatch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Written;
        impl Visitor<'_> for Written {
            type Value = MicroBatch;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("\"auto\" or a count such as 20000, \"1.5M\" or \"10B\"")
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<MicroBatch, E> {
                Ok(MicroBatch::Tokens(value))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<MicroBatch, E> {
                let tokens = u64::try_from(value).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))?;
                Ok(MicroBatch::Tokens(tokens))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<MicroBatch, E> {
                if value == "auto" {
                    return Ok(MicroBatch::Auto);
                }
                let tokens = parse_count(value).ok_or_else(|| E::invalid_value(Unexpected::Str(value), &self))?;
                Ok(MicroBatch::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(Written)
    }
}
