//! Which keys each section has, asked of the section's own type, so that messages, documentation and parsing cannot
//! disagree.

use serde::de::{Deserialize, Deserializer, Visitor};

use super::router::RouterSection;
use super::schema::{
    CacheSection, ControlSection, DataSection, LearningRateSection, LossSection, Recipe, RunSection, Shape,
    StudentSection, TeacherSection, TrainSection,
};
use super::student_init::StudentInit;
use super::tap::TapSection;
use super::training::{GuardsSection, RouterBalance};
use crate::data::DataSource;
use crate::parallel::Mesh;
use crate::train::groups::ParameterGroup;

/// A table of the recipe: its path, with `[]` after a list, and its keys.
pub(super) struct Section {
    pub path: &'static str,
    pub keys: &'static [&'static str],
}

/// Of all kinds together, for an enum is not asked for its fields; parsing says which are for which kind.
const SELECTION_KEYS: &[&str] = &["kind", "theta", "cap", "k", "p", "threshold", "draws", "seed"];

/// Every table a recipe can hold, in pipeline order; the first is the recipe itself.
pub(super) fn sections() -> Vec<Section> {
    fn section<T: for<'de> Deserialize<'de>>(path: &'static str) -> Section {
        Section { path, keys: keys_of::<T>() }
    }
    vec![
        section::<Recipe>(""),
        section::<DataSection>("data"),
        section::<DataSource>("data.sources[]"),
        section::<DataSource>("data.held_out[]"),
        section::<TeacherSection>("teacher"),
        section::<Mesh>("teacher.mesh"),
        section::<CacheSection>("cache"),
        Section { path: "cache.selection", keys: SELECTION_KEYS },
        section::<StudentSection>("student"),
        section::<Shape>("student.shape"),
        section::<StudentInit>("student.init"),
        section::<ControlSection>("control"),
        section::<LearningRateSection>("control.lr"),
        section::<LossSection>("loss"),
        Section { path: "loss.divergence", keys: &["kind", "beta", "alpha", "head", "teacher"] },
        Section {
            path: "loss.weighting",
            keys: &["kind", "soft", "from", "to", "decay", "ratio", "momentum", "rate", "power", "scale", "floor"],
        },
        section::<RouterSection>("loss.router"),
        section::<TrainSection>("train"),
        section::<LearningRateSection>("train.lr"),
        section::<ParameterGroup>("train.groups[]"),
        section::<RouterBalance>("train.router_balance"),
        section::<GuardsSection>("train.guards"),
        section::<TapSection>("tap"),
        Section { path: "tap.selection", keys: SELECTION_KEYS },
        section::<RunSection>("run"),
    ]
}

/// Every key of a recipe, with its section: `cache.top_k`, `data.sources[].path`, ...
pub fn all_keys() -> Vec<String> {
    let keys = sections().into_iter().flat_map(|section| {
        section.keys.iter().map(move |key| match section.path {
            "" => key.to_string(),
            path => format!("{path}.{key}"),
        })
    });
    keys.collect()
}

/// The fields that a derived `Deserialize` asks its deserializer for.
fn keys_of<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // Asking is all that is wanted: the answer is always an error.
    let _ = T::deserialize(KeyProbe { keys: &mut keys });
    keys
}

/// Notes the fields of the struct it is asked for, and answers with an error.
struct KeyProbe<'a> {
    keys: &'a mut &'static [&'static str],
}

impl<'de> Deserializer<'de> for KeyProbe<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(serde::de::Error::custom("only structs are probed"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.keys = fields;
        Err(serde::de::Error::custom("noted"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

/// The tip for a key that its section does not have: a near miss, the section it belongs to, or what there is.
pub(super) fn tip_for_unknown(key: &str, section: &Section) -> String {
    let nearest = section
        .keys
        .iter()
        .map(|legal| (strsim::normalized_damerau_levenshtein(key, legal).max(shared_words(key, legal)), legal))
        .max_by(|left, right| left.0.total_cmp(&right.0));
    if let Some((_, legal)) = nearest.filter(|(likeness, _)| *likeness >= 0.6) {
        return format!("did you mean `{legal}`?");
    }
    if let Some(other) = sections().iter().find(|other| other.keys.contains(&key)) {
        return format!("`{key}` is a key of {}", heading(other.path));
    }
    let keys: Vec<String> = section.keys.iter().map(|key| format!("`{key}`")).collect();
    format!("the keys of {} are {}", heading(section.path), keys.join(", "))
}

/// 0.7 when one name holds all the words of the other, as `sequences` and `sequences_per_shard` do.
fn shared_words(left: &str, right: &str) -> f64 {
    let (shorter, longer) = if left.len() < right.len() { (left, right) } else { (right, left) };
    let long: Vec<&str> = longer.split('_').collect();
    if shorter.split('_').all(|word| long.contains(&word)) { 0.7 } else { 0.0 }
}

/// How a section is called in a message.
pub(super) fn heading(path: &str) -> String {
    if path.is_empty() { "the recipe".to_string() } else { format!("[{}]", path.trim_end_matches("[]")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_knows_its_keys() {
        for section in sections() {
            assert!(!section.keys.is_empty(), "[{}] has no keys", section.path);
        }
        let keys = all_keys();
        for key in ["name", "data.sources[].weight", "cache.top_k", "train.lr.warmup", "student.shape.like"] {
            assert!(keys.iter().any(|known| known == key), "{key}");
        }
        assert!(!keys.iter().any(|key| key == "origin"));
    }
}
