//! `loss.divergence`: a name, or a table of a name and its parameters.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::loss::Divergence;

/// Reads `"forward_kl"` and `{ kind = "jsd", beta = 0.5 }`.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Divergence, D::Error> {
    deserializer.deserialize_any(NameOrTable)
}

/// Writes what has no parameters by its name.
pub(super) fn serialize<S: Serializer>(divergence: &Divergence, serializer: S) -> Result<S::Ok, S::Error> {
    match divergence {
        Divergence::ForwardKl
        | Divergence::ReverseKl
        | Divergence::TotalVariation
        | Divergence::SoftCrossEntropy
        | Divergence::ConditionalKl => serializer.serialize_str(divergence.name()),
        _ => divergence.serialize(serializer),
    }
}

struct NameOrTable;

impl<'de> Visitor<'de> for NameOrTable {
    type Value = Divergence;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the name of a divergence, or a table with its `kind`")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Divergence, E> {
        Divergence::deserialize(MapDeserializer::new([("kind", name)].into_iter()))
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Divergence, A::Error> {
        Divergence::deserialize(MapAccessDeserializer::new(table))
    }
}
