//! `cache.selection`: a name, or a table of a name and its parameters.

use std::fmt;

use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::selection::Selection;

/// Reads `"min_prob"` and `{ kind = "min_prob", theta = 1e-3 }`.
pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Selection>, D::Error> {
    deserializer.deserialize_any(NameOrTable).map(Some)
}

/// Writes the table, every parameter in it.
pub(super) fn serialize<S: Serializer>(selection: &Option<Selection>, serializer: S) -> Result<S::Ok, S::Error> {
    selection.serialize(serializer)
}

struct NameOrTable;

impl<'de> Visitor<'de> for NameOrTable {
    type Value = Selection;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the name of a selection, or a table with its `kind`")
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Selection, E> {
        Selection::deserialize(MapDeserializer::new([("kind", name)].into_iter()))
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Selection, A::Error> {
        Selection::deserialize(MapAccessDeserializer::new(table))
    }
}
