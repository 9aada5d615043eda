//! Which weights decay, and which learn at another rate: by what they are and by what they are called.

use glob::Pattern;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What is different for the weights whose names match a pattern.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ParameterGroup {
    /// A name as checkpoints have it, with `*` for anything: `model.layers.*.feed_forward.router.weight`.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Factor on the learning rate. Default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Weight decay in the place of the optimizer's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

impl ParameterGroup {
    /// # Errors
    /// For a pattern that is none, and for factors that are negative or not finite.
    pub fn check(&self) -> Result<()> {
        if let Err(error) = Pattern::new(&self.pattern) {
            let problem = format!("`{}` is no pattern: {}", self.pattern, error.msg);
            return Err(Error::usage(problem, "use a weight's name, with `*` for anything"));
        }
        for (name, value) in [("lr", self.lr), ("weight_decay", self.weight_decay)] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value >= 0.0)) {
                return Err(Error::usage(format!("{name} {value} is out of range"), "use a number of 0 or more"));
            }
        }
        Ok(())
    }
}

/// Embedding and head: rows of the vocabulary rather than maps between hidden states.
pub fn is_vocabulary(name: &str) -> bool {
    name == "model.embed_tokens.weight" || name == "lm_head.weight"
}

/// The groups, ready to be asked.
#[derive(Debug, Clone)]
pub struct Groups {
    weight_decay: f64,
    groups: Vec<(Pattern, ParameterGroup)>,
}

impl Groups {
    /// # Panics
    /// For patterns that [`ParameterGroup::check`] refuses.
    pub fn new(weight_decay: f64, groups: &[ParameterGroup]) -> Self {
        let compiled = |group: &ParameterGroup| (Pattern::new(&group.pattern).expect("checked"), group.clone());
        Groups { weight_decay, groups: groups.iter().map(compiled).collect() }
    }

    /// Factor on the learning rate, and decay. Norms, biases and the embedding do not decay unless a group says so; of
    /// several groups the last that matches has its say.
    pub fn of(&self, name: &str, is_vector: bool) -> (f64, f64) {
        let fixed = is_vector || name == "model.embed_tokens.weight";
        let mut found = (1.0, if fixed { 0.0 } else { self.weight_decay });
        for (_, group) in self.groups.iter().filter(|(pattern, _)| pattern.matches(name)) {
            found = (group.lr.unwrap_or(found.0), group.weight_decay.unwrap_or(found.1));
        }
        found
    }

    /// The first group that no weight belongs to: most likely a slip.
    pub fn unused<'a>(&'a self, names: &[String]) -> Option<&'a str> {
        let used = |pattern: &Pattern| names.iter().any(|name| pattern.matches(name));
        self.groups.iter().find(|(pattern, _)| !used(pattern)).map(|(_, group)| group.pattern.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(pattern: &str, lr: Option<f64>, weight_decay: Option<f64>) -> ParameterGroup {
        ParameterGroup { pattern: pattern.into(), lr, weight_decay }
    }

    #[test]
    fn norms_biases_and_the_embedding_do_not_decay_and_the_last_group_has_its_say() {
        let groups = Groups::new(
            0.1,
            &[
                group("*.router.weight", Some(0.5), None),
                group("model.layers.0.*", None, Some(0.0)),
                group("model.layers.0.*.router.weight", Some(0.25), Some(0.3)),
            ],
        );
        for (name, is_vector, expected) in [
            ("model.embed_tokens.weight", false, (1.0, 0.0)),
            ("lm_head.weight", false, (1.0, 0.1)),
            ("model.norm.weight", true, (1.0, 0.0)),
            ("model.layers.1.self_attn.q_proj.weight", false, (1.0, 0.1)),
            ("model.layers.1.self_attn.q_proj.bias", true, (1.0, 0.0)),
            ("model.layers.1.feed_forward.router.weight", false, (0.5, 0.1)),
            ("model.layers.0.self_attn.q_proj.weight", false, (1.0, 0.0)),
            ("model.layers.0.feed_forward.router.weight", false, (0.25, 0.3)),
        ] {
            assert_eq!(groups.of(name, is_vector), expected, "{name}");
        }
        assert_eq!(groups.unused(&["model.layers.0.feed_forward.router.weight".into()]), None);
        assert_eq!(groups.unused(&["model.norm.weight".into()]), Some("*.router.weight"));
    }

    #[test]
    fn groups_without_meaning_are_refused() {
        let message = |group: ParameterGroup| group.check().unwrap_err().to_string();
        assert_eq!(
            message(group("a***b", None, None)),
            "`a***b` is no pattern: wildcards are either regular `*` or recursive `**`; use a weight's name, with `*` for \
             anything"
        );
        assert_eq!(message(group("*", Some(-1.0), None)), "lr -1 is out of range; use a number of 0 or more");
    }
}
