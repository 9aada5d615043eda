//! What a cache is made of and with: everything that must agree between the runs that write and read it.

use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::model::LARGEST_VOCABULARY;
use super::quantizer::MAX_STEPS;
use crate::error::{Error, Result};
pub use crate::selection::Selection;
use crate::targets::{RouterCodes, TargetKind};

/// The settings of one cache. Two caches with equal settings and equal data hold the same sequences.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheSettings {
    /// Which part of the data this is: `train` or `held_out`.
    pub split: String,
    /// Fingerprint of the sources and of how they are mixed, split and packed.
    pub data_fingerprint: String,
    pub tokenizer: TokenizerIdentity,
    /// Predictions per sequence; a sequence has one token more.
    pub seq_len: usize,
    /// Sequences per shard; only the last shard may hold fewer.
    pub sequences_per_shard: usize,
    pub codec: Codec,
    /// Levels that a probability's square root is rounded to; `None` with an exact codec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub levels: Option<u16>,
    /// Whether the log-sum-exp of the teacher's logits is kept of each row. `None`: under `raw`, where rows come with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_normalizer: Option<bool>,
    /// `None` in a cache of tokens only.
    pub soft_targets: Option<SoftTargetSettings>,
}

/// Most experts, of all layers together, whose probabilities a row may have.
const LARGEST_ROUTER_ROW: usize = 1 << 16;

/// Which tokenizer the token ids belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerIdentity {
    /// Of the tokenizer's content, not of its size.
    pub fingerprint: String,
    pub vocab_size: usize,
}

/// Where the soft targets come from and what of them was kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftTargetSettings {
    pub teacher: TeacherIdentity,
    pub selection: Selection,
    /// Temperatures the full rows were captured at.
    pub temperatures: Vec<f32>,
    /// The teacher's routers that were listened to; `None` for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterSettings>,
}

/// Layers of a teacher whose routers' probabilities are kept of each prediction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouterSettings {
    /// Numbers of the layers, from 0.
    pub layers: Vec<usize>,
    /// Routed experts of each.
    pub experts: usize,
}

impl RouterSettings {
    /// Bytes that a prediction takes.
    pub fn width(&self) -> usize {
        self.layers.len().saturating_mul(self.experts)
    }

    /// No rows yet.
    pub(crate) fn empty(&self) -> RouterCodes {
        RouterCodes::empty(self.layers.len(), self.experts)
    }
}

/// Which teacher spoke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherIdentity {
    pub name: String,
    /// Of its configuration and weights.
    pub fingerprint: String,
    /// The number format it ran in.
    pub dtype: String,
    /// Of a model in training: when it spoke. `None` of one that was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_training: Option<TrainingSteps>,
}

/// The steps of a training run whose forward passes targets come from, counted from 1: those of step `s` are of the
/// weights after `s - 1` steps. The sequences of one step follow those of the one before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingSteps {
    pub from_step: u64,
    /// From one step to the next.
    pub every: u64,
    /// Of the run, whether targets come from it or not.
    pub last_step: u64,
    pub sequences_per_step: u64,
}

impl TrainingSteps {
    /// Whether targets come from a step.
    pub fn has(&self, step: u64) -> bool {
        (self.from_step..=self.last_step).contains(&step) && (step - self.from_step).is_multiple_of(self.every)
    }

    /// Sequences of all steps.
    pub fn sequences(&self) -> u64 {
        self.sequences_until(self.last_step)
    }

    /// Sequences of the steps up to one, with its own.
    pub fn sequences_until(&self, step: u64) -> u64 {
        let step = step.min(self.last_step);
        if step < self.from_step { 0 } else { ((step - self.from_step) / self.every + 1) * self.sequences_per_step }
    }

    /// The step that a sequence of the cache comes from.
    pub fn step_of(&self, sequence: u64) -> u64 {
        self.from_step + sequence / self.sequences_per_step * self.every
    }

    /// Whether there is a sequence at all, and their number has 64 bits.
    fn is_possible(&self) -> bool {
        let steps = (1..=self.last_step).contains(&self.from_step) && self.every > 0 && self.sequences_per_step > 0;
        steps && self.last_step.checked_mul(self.sequences_per_step).is_some()
    }
}

impl CacheSettings {
    /// Refuses settings that no cache can have.
    ///
    /// # Errors
    /// [`Error::Usage`], naming the setting.
    pub fn check(&self) -> Result<()> {
        let vocab_size = self.tokenizer.vocab_size;
        for (name, value) in [
            ("seq_len", self.seq_len),
            ("sequences_per_shard", self.sequences_per_shard),
            ("tokenizer.vocab_size", vocab_size),
        ] {
            // Below 2^32 no product of two of them leaves 64 bits, and every id fits its u32.
            if value == 0 || value >= u32::MAX as usize {
                let problem = format!("the cache setting `{name}` is {value}");
                return Err(Error::usage(problem, format!("give a number from 1 to {}", u32::MAX - 1)));
            }
        }
        if self.split.is_empty() {
            return Err(Error::usage("the cache setting `split` is empty", "name it `train` or `held_out`"));
        }
        if let Some(levels) = self.levels {
            let Some(usual) = self.codec.default_levels() else {
                let problem = format!("the codec `{}` rounds nothing, and has no levels", self.codec.name());
                return Err(Error::usage(problem, "leave out [cache] levels, or choose packed or compact"));
            };
            if !(1..=MAX_STEPS).contains(&levels) {
                let problem = format!("probabilities cannot be rounded to {levels} levels");
                return Err(Error::usage(problem, format!("give [cache] levels from 1 to {MAX_STEPS}, as {usual}")));
            }
        }
        if self.codec == Codec::Compact && vocab_size > LARGEST_VOCABULARY {
            let problem = format!("the codec `compact` cannot hold a vocabulary of {vocab_size} tokens");
            let tip = format!("set [cache] codec = \"packed\", or use a tokenizer of at most {LARGEST_VOCABULARY}");
            return Err(Error::usage(problem, tip));
        }
        let Some(soft_targets) = &self.soft_targets else {
            return match self.log_normalizer {
                Some(true) => Err(Error::usage(
                    "a cache of tokens only has no logits whose log_normalizer could be kept",
                    "leave out [cache] log_normalizer, or name a teacher",
                )),
                _ => Ok(()),
            };
        };
        if let Some(steps) = soft_targets.teacher.in_training.as_ref().filter(|steps| !steps.is_possible()) {
            let problem = format!(
                "no targets come from every {} steps of {} sequences, from step {} to {}",
                steps.every, steps.sequences_per_step, steps.from_step, steps.last_step
            );
            return Err(Error::usage(problem, "count steps from 1, and give at least one that the run has"));
        }
        if let Some(router) = &soft_targets.router {
            // No product with it leaves 64 bits, and no shard is all routers by a slip.
            if router.width() == 0 || router.width() > LARGEST_ROUTER_ROW {
                let (layers, experts) = (router.layers.len(), router.experts);
                let problem = format!("the routers of {layers} layers with {experts} experts cannot be kept");
                let tip =
                    format!("name layers in [cache] router_layers, with at most {LARGEST_ROUTER_ROW} experts together");
                return Err(Error::usage(problem, tip));
            }
            if let Some(layer) = (1..router.layers.len()).find(|&i| router.layers[..i].contains(&router.layers[i])) {
                let problem = format!("the router of layer {} would be kept twice", router.layers[layer]);
                return Err(Error::usage(problem, "name each layer of [cache] router_layers once"));
            }
        }
        let rounds = self.codec.default_levels().is_some();
        if rounds && soft_targets.selection.kind() == TargetKind::Sampled && soft_targets.temperatures.len() > 1 {
            let problem = format!("the codec `{}` cannot hold drawn ids at several temperatures", self.codec.name());
            return Err(Error::usage(problem, "set [cache] codec = \"raw\", or give one temperature"));
        }
        if let (true, Selection::Sampled { draws, .. }) = (rounds, &soft_targets.selection)
            && *draws > usize::from(u16::MAX)
        {
            let problem = format!("the codec `{}` cannot hold {draws} draws", self.codec.name());
            return Err(Error::usage(problem, format!("draw at most {}, or set [cache] codec = \"raw\"", u16::MAX)));
        }
        soft_targets.selection.check(vocab_size).map_err(|unusable| {
            let (name, parameter) = (soft_targets.selection.name(), unusable.parameter);
            Error::usage(format!("the selection {name} has a {parameter} that {}", unusable.problem), unusable.tip)
        })?;
        let temperatures = &soft_targets.temperatures;
        if temperatures.is_empty() {
            return Err(Error::usage("no temperature to capture soft targets at", "set [cache] temperatures = [1.0]"));
        }
        for (i, temperature) in temperatures.iter().enumerate() {
            if !temperature.is_finite() || *temperature <= 0.0 {
                let problem = format!("soft targets cannot be captured at temperature {temperature}");
                return Err(Error::usage(problem, "give [cache] temperatures above 0"));
            }
            if temperatures[..i].contains(temperature) {
                let problem = format!("temperature {temperature} is captured twice");
                return Err(Error::usage(problem, "name each of [cache] temperatures once"));
            }
        }
        Ok(())
    }

    /// Levels of the quantiser; of no meaning with an exact codec.
    pub(crate) fn levels(&self) -> u16 {
        self.levels.or(self.codec.default_levels()).unwrap_or(1)
    }

    /// The routers that are kept, if any are.
    pub fn router(&self) -> Option<&RouterSettings> {
        self.soft_targets.as_ref().and_then(|soft_targets| soft_targets.router.as_ref())
    }

    /// Whether normalisers that rows come with are written.
    pub(crate) fn keeps_log_normalizer(&self) -> bool {
        self.log_normalizer.unwrap_or(self.codec.default_levels().is_none())
    }

    /// The temperatures captured; none in a cache of tokens only.
    pub fn temperatures(&self) -> &[f32] {
        self.soft_targets.as_ref().map_or(&[], |soft_targets| &soft_targets.temperatures)
    }

    /// The first setting in which `self` and `other` differ: its dotted name and both values.
    ///
    /// The teacher's name is for people and makes no difference. The data's fingerprint comes last: tokenizer and
    /// lengths are part of it, and whoever changed one of them should read its name.
    pub(crate) fn first_difference(&self, other: &CacheSettings) -> Option<(String, String, String)> {
        let mut renamed = self.clone();
        if let (Some(mine), Some(theirs)) = (&mut renamed.soft_targets, &other.soft_targets) {
            mine.teacher.name.clone_from(&theirs.teacher.name);
        }
        let same_data = CacheSettings { data_fingerprint: other.data_fingerprint.clone(), ..renamed.clone() };
        // Through text, because there a temperature of 0.7 reads 0.7, and not 0.699999988.
        let value = |settings: &CacheSettings| -> serde_json::Value {
            let text = serde_json::to_string(settings).expect("settings have no map with keys that are not strings");
            serde_json::from_str(&text).expect("what was serialised parses")
        };
        let other = value(other);
        first_difference("", &value(&same_data), &other).or_else(|| first_difference("", &value(&renamed), &other))
    }
}

fn first_difference(
    name: &str,
    left: &serde_json::Value,
    right: &serde_json::Value,
) -> Option<(String, String, String)> {
    if let (Some(left), Some(right)) = (left.as_object(), right.as_object()) {
        // Both sides of one type have the same keys; a key that only one variant of an enum has reads as null.
        return left.keys().chain(right.keys()).find_map(|key| {
            let inner = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            let null = serde_json::Value::Null;
            first_difference(&inner, left.get(key).unwrap_or(&null), right.get(key).unwrap_or(&null))
        });
    }
    (left != right).then(|| (name.to_string(), left.to_string(), right.to_string()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cache) fn settings() -> CacheSettings {
        CacheSettings {
            split: "train".into(),
            data_fingerprint: "d".into(),
            tokenizer: TokenizerIdentity { fingerprint: "t".into(), vocab_size: 100 },
            seq_len: 8,
            sequences_per_shard: 2,
            codec: Codec::Raw,
            levels: None,
            log_normalizer: None,
            soft_targets: Some(SoftTargetSettings {
                teacher: TeacherIdentity {
                    name: "n".into(),
                    fingerprint: "f".into(),
                    dtype: "f32".into(),
                    in_training: None,
                },
                selection: Selection::TopK { k: 4 },
                temperatures: vec![1.0, 0.7],
                router: None,
            }),
        }
    }

    fn message(change: impl FnOnce(&mut CacheSettings)) -> String {
        let mut settings = settings();
        change(&mut settings);
        settings.check().unwrap_err().to_string()
    }

    #[test]
    fn impossible_settings_are_refused_by_name() {
        settings().check().unwrap();
        let soft = |settings: &mut CacheSettings, k, temperatures| {
            let soft_targets = settings.soft_targets.as_mut().unwrap();
            soft_targets.selection = Selection::TopK { k };
            soft_targets.temperatures = temperatures;
        };
        assert_eq!(
            message(|settings| soft(settings, 101, vec![1.0])),
            "the selection top_k has a k that is 101, but the teacher's vocabulary has 100 tokens; use at most 100"
        );
        assert_eq!(
            message(|settings| soft(settings, 0, vec![1.0])),
            "the selection top_k has a k that is 0; keep at least 1 id per prediction"
        );
        assert_eq!(
            message(|settings| soft(settings, 1, vec![])),
            "no temperature to capture soft targets at; set [cache] temperatures = [1.0]"
        );
        assert_eq!(
            message(|settings| soft(settings, 1, vec![0.0])),
            "soft targets cannot be captured at temperature 0; give [cache] temperatures above 0"
        );
        assert_eq!(
            message(|settings| soft(settings, 1, vec![2.0, 2.0])),
            "temperature 2 is captured twice; name each of [cache] temperatures once"
        );
        let routers = |layers: Vec<usize>, experts| {
            message(|settings| {
                settings.soft_targets.as_mut().unwrap().router = Some(RouterSettings { layers, experts })
            })
        };
        assert_eq!(
            routers(vec![1], 65_537),
            "the routers of 1 layers with 65537 experts cannot be kept; name layers in [cache] router_layers, with at most \
             65536 experts together"
        );
        assert!(routers(vec![], 4).starts_with("the routers of 0 layers with 4 experts cannot be kept"));
        assert_eq!(
            routers(vec![3, 1, 3], 4),
            "the router of layer 3 would be kept twice; name each layer of [cache] router_layers once"
        );
        let steps = TrainingSteps { from_step: 9, every: 2, last_step: 8, sequences_per_step: 4 };
        assert_eq!(
            message(|settings| settings.soft_targets.as_mut().unwrap().teacher.in_training = Some(steps)),
            "no targets come from every 2 steps of 4 sequences, from step 9 to 8; count steps from 1, and give at least one \
             that the run has"
        );
        assert_eq!(
            message(|settings| settings.seq_len = 0),
            "the cache setting `seq_len` is 0; give a number from 1 to 4294967294"
        );
        let huge = |settings: &mut CacheSettings| {
            settings.codec = Codec::Compact;
            settings.tokenizer.vocab_size = (1 << 27) + 1;
        };
        assert_eq!(
            message(huge),
            "the codec `compact` cannot hold a vocabulary of 134217729 tokens; \
             set [cache] codec = \"packed\", or use a tokenizer of at most 134217728"
        );
        assert_eq!(
            message(|settings| settings.split.clear()),
            "the cache setting `split` is empty; name it `train` or `held_out`"
        );
    }

    #[test]
    fn sequences_of_a_model_in_training_are_counted_by_steps() {
        let steps = TrainingSteps { from_step: 2, every: 3, last_step: 9, sequences_per_step: 4 };
        assert_eq!((1..=11).filter(|step| steps.has(*step)).collect::<Vec<_>>(), [2, 5, 8]);
        assert_eq!([0, 1, 2, 4, 5, 8, 9, 40].map(|step| steps.sequences_until(step)), [0, 0, 4, 4, 8, 12, 12, 12]);
        assert_eq!((steps.sequences(), [0, 3, 4, 11].map(|number| steps.step_of(number))), (12, [2, 2, 5, 8]));
    }

    #[test]
    fn the_first_difference_is_named_with_both_values() {
        let other = |change: fn(&mut CacheSettings)| {
            let mut other = settings();
            change(&mut other);
            settings().first_difference(&other).map(|(name, left, right)| format!("{name}: {left} {right}"))
        };
        assert_eq!(other(|_| ()), None);
        assert_eq!(other(|other| other.seq_len = 9).unwrap(), "seq_len: 8 9");
        assert_eq!(
            other(|other| other.soft_targets.as_mut().unwrap().temperatures[1] = 0.8).unwrap(),
            "soft_targets.temperatures: [1.0,0.7] [1.0,0.8]"
        );
        assert_eq!(
            other(|other| {
                other.tokenizer.fingerprint = "u".into();
                other.data_fingerprint = "with another tokenizer".into();
            })
            .unwrap(),
            "tokenizer.fingerprint: \"t\" \"u\""
        );
        assert_eq!(other(|other| other.data_fingerprint = "e".into()).unwrap(), "data_fingerprint: \"d\" \"e\"");
        assert_eq!(other(|other| other.soft_targets.as_mut().unwrap().teacher.name = "moved".into()), None);
        assert!(other(|other| other.soft_targets = None).unwrap().ends_with(" null"));
    }
}
