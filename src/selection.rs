//! Which ids of a teacher's row become targets: what a recipe asks for, a teacher carries out and a cache remembers.
//!
//! Names and numbers alone; the arithmetic is in `limbeck_kernels::selection`. With several temperatures the first of
//! them decides which ids are kept.

use serde::{Deserialize, Serialize};

use crate::targets::TargetKind;

/// Which vocabulary ids of a row are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Selection {
    /// Every id with a probability of at least `theta`, the `cap` most probable when there are more, and always the
    /// likeliest.
    MinProb {
        #[serde(default = "theta")]
        theta: f64,
        #[serde(default = "cap")]
        cap: usize,
    },
    /// The `k` most probable.
    TopK {
        #[serde(default = "k")]
        k: usize,
    },
    /// The fewest most probable ids that hold `p` together, at most `cap`.
    TopP {
        #[serde(default = "p")]
        p: f64,
        #[serde(default = "cap")]
        cap: usize,
    },
    /// Every id with a probability p of at least `threshold`, and any other with probability `p / threshold`, at the
    /// weight `threshold`. Unbiased. A row keeps at most `1 / threshold + 1` ids, so it needs no cap; one that cut
    /// anything would bring the bias back.
    ThresholdSampled {
        #[serde(default = "threshold")]
        threshold: f64,
        #[serde(default)]
        seed: u64,
    },
    /// `draws` ids drawn with replacement, each weighing its share of the draws. Unbiased.
    Sampled {
        #[serde(default = "draws")]
        draws: usize,
        #[serde(default)]
        seed: u64,
    },
}

fn theta() -> f64 {
    1e-3
}
fn cap() -> usize {
    128
}
fn k() -> usize {
    64
}
fn p() -> f64 {
    0.95
}
fn threshold() -> f64 {
    1e-2
}
fn draws() -> usize {
    64
}

impl Default for Selection {
    /// About 54 ids a row at a mean entropy of 2.9 nats, where it is closer to the teacher than the 64 most probable are.
    fn default() -> Self {
        Selection::MinProb { theta: theta(), cap: cap() }
    }
}

/// A number that a selection cannot have: which, what is wrong with it, and the way out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unusable {
    pub parameter: &'static str,
    pub problem: String,
    pub tip: String,
}

impl Selection {
    /// Its name in recipes and manifests.
    pub fn name(&self) -> &'static str {
        match self {
            Selection::MinProb { .. } => "min_prob",
            Selection::TopK { .. } => "top_k",
            Selection::TopP { .. } => "top_p",
            Selection::ThresholdSampled { .. } => "threshold_sampled",
            Selection::Sampled { .. } => "sampled",
        }
    }

    /// What the targets it makes are.
    pub fn kind(&self) -> TargetKind {
        match self {
            Selection::MinProb { .. } | Selection::TopK { .. } | Selection::TopP { .. } => TargetKind::Exact,
            Selection::ThresholdSampled { .. } | Selection::Sampled { .. } => TargetKind::Sampled,
        }
    }

    /// The most ids it can keep of a row.
    pub fn most_ids(&self) -> usize {
        match *self {
            Selection::TopK { k } => k,
            Selection::MinProb { cap, .. } | Selection::TopP { cap, .. } => cap,
            Selection::ThresholdSampled { threshold, .. } => (1.0 / threshold) as usize + 1,
            Selection::Sampled { draws, .. } => draws,
        }
    }

    /// About how many ids it keeps of a row, for estimates alone: power laws through what SmolLM2-135M's predictions of
    /// English text and code keep, whose mean entropy is 2.9 nats. The most where that was not measured.
    pub fn usual_ids(&self) -> f64 {
        let usual = match self {
            Selection::MinProb { theta, .. } => 0.284 * theta.powf(-0.76),
            Selection::ThresholdSampled { threshold, .. } => 0.97 * threshold.powf(-0.76),
            _ => f64::INFINITY,
        };
        usual.max(1.0).min(self.most_ids() as f64)
    }

    /// Refuses numbers with which it would keep nothing, or not what it says.
    ///
    /// # Errors
    /// The number at fault.
    pub fn check(&self, vocab_size: usize) -> Result<(), Unusable> {
        let share = |parameter, value: f64, least: f64, range: &str| {
            // NaN compares as nothing, so it must not slip through.
            if (least..=1.0).contains(&value) {
                return Ok(());
            }
            Err(Unusable { parameter, problem: format!("is {value}"), tip: format!("use a number {range}") })
        };
        let count = |parameter, value: usize, most: usize, beyond: String| match value {
            0 => Err(Unusable { parameter, problem: "is 0".into(), tip: "keep at least 1 id per prediction".into() }),
            value if value > most => {
                Err(Unusable { parameter, problem: format!("is {value}{beyond}"), tip: format!("use at most {most}") })
            }
            _ => Ok(()),
        };
        match *self {
            Selection::TopK { k } => {
                count("k", k, vocab_size, format!(", but the teacher's vocabulary has {vocab_size} tokens"))
            }
            Selection::MinProb { theta, cap } => {
                share("theta", theta, f64::MIN_POSITIVE, "above 0 and at most 1, as in 0.001")?;
                count("cap", cap, u32::MAX as usize, String::new())
            }
            Selection::TopP { p, cap } => {
                share("p", p, f64::MIN_POSITIVE, "above 0 and at most 1, as in 0.95")?;
                count("cap", cap, u32::MAX as usize, String::new())
            }
            Selection::ThresholdSampled { threshold, seed } => {
                share("threshold", threshold, 1e-5, "from 0.00001 to 1, as in 0.01")?;
                check_seed(seed)
            }
            Selection::Sampled { draws, seed } => {
                count("draws", draws, 100_000, String::new())?;
                check_seed(seed)
            }
        }
    }
}

/// A recipe is TOML, whose numbers end there.
fn check_seed(seed: u64) -> Result<(), Unusable> {
    let most = i64::MAX;
    if seed <= most as u64 {
        return Ok(());
    }
    Err(Unusable { parameter: "seed", problem: format!("is {seed}"), tip: format!("use at most {most}") })
}

impl std::fmt::Display for Selection {
    /// As it is written in a recipe.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = self.name();
        match self {
            Selection::TopK { k } => write!(formatter, "top_k = {k}"),
            Selection::MinProb { theta, cap } => {
                write!(formatter, "selection = {{ kind = \"{name}\", theta = {theta:?}, cap = {cap} }}")
            }
            Selection::TopP { p, cap } => {
                write!(formatter, "selection = {{ kind = \"{name}\", p = {p:?}, cap = {cap} }}")
            }
            Selection::ThresholdSampled { threshold, seed } => {
                write!(formatter, "selection = {{ kind = \"{name}\", threshold = {threshold:?}, seed = {seed} }}")
            }
            Selection::Sampled { draws, seed } => {
                write!(formatter, "selection = {{ kind = \"{name}\", draws = {draws}, seed = {seed} }}")
            }
        }
    }
}

impl Selection {
    /// What it keeps, in words.
    pub fn summary(&self) -> String {
        match self {
            Selection::MinProb { theta, cap } => {
                format!("ids of probability {theta:?} and above (at most {cap}) and the tail")
            }
            Selection::TopK { k } => format!("top {k} and the tail"),
            Selection::TopP { p, cap } => format!("likeliest ids up to a mass of {p:?} (at most {cap}) and the tail"),
            Selection::ThresholdSampled { threshold, seed } => {
                format!("ids of probability {threshold:?} and above, others drawn by seed {seed}")
            }
            Selection::Sampled { draws, seed } => format!("{draws} draws by seed {seed}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selection_is_written_as_it_is_read() {
        let all = [
            Selection::default(),
            Selection::TopK { k: 3 },
            Selection::TopP { p: 0.5, cap: 9 },
            Selection::ThresholdSampled { threshold: 0.003, seed: 5 },
            Selection::Sampled { draws: 7, seed: 1 },
        ];
        for selection in all {
            let json = serde_json::to_string(&selection).unwrap();
            assert!(json.starts_with(&format!("{{\"kind\":\"{}\"", selection.name())), "{json}");
            assert_eq!(serde_json::from_str::<Selection>(&json).unwrap(), selection);
            if !matches!(selection, Selection::TopK { .. }) {
                let recipe: std::collections::BTreeMap<String, Selection> =
                    toml::from_str(&selection.to_string()).unwrap();
                assert_eq!(recipe["selection"], selection);
            }
            selection.check(3).unwrap();
        }
    }

    #[test]
    fn numbers_that_keep_nothing_are_refused_by_name() {
        let message = |selection: Selection| {
            let unusable = selection.check(50).unwrap_err();
            format!("{} {}; {}", unusable.parameter, unusable.problem, unusable.tip)
        };
        assert_eq!(message(Selection::TopK { k: 0 }), "k is 0; keep at least 1 id per prediction");
        assert_eq!(
            message(Selection::TopK { k: 51 }),
            "k is 51, but the teacher's vocabulary has 50 tokens; use at most 50"
        );
        let min_prob = |theta, cap| Selection::MinProb { theta, cap };
        let range = "use a number above 0 and at most 1, as in 0.001";
        assert_eq!(message(min_prob(0.0, 8)), format!("theta is 0; {range}"));
        assert_eq!(message(min_prob(f64::NAN, 8)), format!("theta is NaN; {range}"));
        assert_eq!(message(min_prob(0.1, 0)), "cap is 0; keep at least 1 id per prediction");
        assert!(message(Selection::TopP { p: 1.5, cap: 8 }).starts_with("p is 1.5; use a number above 0"));
        let threshold = Selection::ThresholdSampled { threshold: 0.0, seed: 0 };
        assert_eq!(message(threshold), "threshold is 0; use a number from 0.00001 to 1, as in 0.01");
        let seed = Selection::Sampled { draws: 5, seed: u64::MAX };
        assert_eq!(message(seed), format!("seed is {}; use at most {}", u64::MAX, i64::MAX));
        assert!(message(Selection::Sampled { draws: 0, seed: 0 }).starts_with("draws is 0"));
    }

    #[test]
    fn usual_numbers_of_ids_are_those_measured() {
        let near = |selection: Selection, measured: f64| {
            let usual = selection.usual_ids();
            assert!((usual / measured - 1.0).abs() < 0.05, "{usual} instead of {measured}");
        };
        for (theta, measured) in [(1e-2, 9.4), (5e-3, 16.0), (3e-3, 23.7), (2e-3, 32.4), (1e-3, 53.9), (5e-4, 91.8)] {
            near(Selection::MinProb { theta, cap: 256 }, measured);
        }
        near(Selection::ThresholdSampled { threshold: 1e-2, seed: 0 }, 33.0);
        near(Selection::ThresholdSampled { threshold: 3e-3, seed: 0 }, 78.0);
        assert_eq!(Selection::MinProb { theta: 1e-3, cap: 16 }.usual_ids(), 16.0);
        assert_eq!(Selection::TopK { k: 64 }.usual_ids(), 64.0);
    }
}
