//! `[tap]`: which steps of the student's training become a cache, and what of them is kept.

use serde::{Deserialize, Serialize};

use super::schema::Recipe;
use crate::cache::{CacheSettings, Codec, SoftTargetSettings, TeacherIdentity, TokenizerIdentity, TrainingSteps};
use crate::error::{Error, Result};
use crate::selection::Selection;

/// `[tap]`: what the student predicts while it is trained, as a cache for other students.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TapSection {
    /// Steps from one that is taken to the next. Default 1.
    pub every: u64,
    /// The first step that is taken, from 1. Default 1.
    pub from_step: u64,
    /// Which ids are kept per prediction: a name, or a table of `kind` and parameters. Default `min_prob`.
    #[serde(with = "super::selection_key", skip_serializing_if = "Option::is_none")]
    pub selection: Option<Selection>,
    /// In place of `selection`: as many of the most probable ids.
    pub top_k: Option<usize>,
    /// Temperatures at which probabilities and tail are captured. Default `[1.0]`.
    pub temperatures: Vec<f64>,
    /// How the targets are stored: `raw` exactly, `packed` and `compact` rounded and smaller. Default `raw`.
    pub codec: Codec,
    /// Levels that the square root of a probability is rounded to, with `packed` (default 63) and `compact` (128).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub levels: Option<u16>,
    /// Packed sequences in one shard file. Default 512.
    pub sequences_per_shard: usize,
}

impl Default for TapSection {
    fn default() -> Self {
        TapSection {
            every: 1,
            from_step: 1,
            selection: None,
            top_k: None,
            temperatures: vec![1.0],
            codec: Codec::Raw,
            levels: None,
            sequences_per_shard: 512,
        }
    }
}

impl TapSection {
    /// What is kept of each prediction.
    pub fn selection(&self) -> Selection {
        match (&self.selection, self.top_k) {
            (Some(selection), _) => selection.clone(),
            (None, Some(k)) => Selection::TopK { k },
            (None, None) => Selection::default(),
        }
    }

    /// What its cache is made with and of: whose predictions, on which data, in which token ids.
    pub fn settings(
        &self,
        teacher: TeacherIdentity,
        data_fingerprint: String,
        tokenizer: TokenizerIdentity,
        seq_len: usize,
    ) -> CacheSettings {
        CacheSettings {
            split: "train".into(),
            data_fingerprint,
            tokenizer,
            seq_len,
            sequences_per_shard: self.sequences_per_shard,
            codec: self.codec,
            levels: self.levels,
            log_normalizer: None,
            soft_targets: Some(SoftTargetSettings {
                teacher,
                selection: self.selection(),
                temperatures: self.temperatures.iter().map(|&temperature| temperature as f32).collect(),
                router: None,
            }),
        }
    }

    /// The steps that are taken of a run.
    pub fn steps(&self, last_step: u64, sequences_per_step: u64) -> TrainingSteps {
        TrainingSteps { from_step: self.from_step, every: self.every, last_step, sequences_per_step }
    }
}

/// No codec holds more ids.
const LARGEST_VOCABULARY: usize = 1 << 27;

/// What can be checked before the run's length and vocabulary are known.
pub(super) fn check(recipe: &Recipe) -> Result<()> {
    let Some(tap) = &recipe.tap else { return Ok(()) };
    for (key, value) in
        [("every", tap.every), ("from_step", tap.from_step), ("sequences_per_shard", tap.sequences_per_shard as u64)]
    {
        recipe.positive(&format!("tap.{key}"), value)?;
    }
    if tap.top_k.is_some() && tap.selection.is_some() {
        return Err(recipe.error("tap.top_k", "is given beside `tap.selection`", "give only one of the two"));
    }
    recipe.check_temperatures("tap", &tap.temperatures)?;
    recipe.check_tap(u64::MAX, usize::MAX)?;
    // Now, and not when a teacher has run for hours.
    let largest = TokenizerIdentity { fingerprint: String::new(), vocab_size: LARGEST_VOCABULARY };
    let anyone =
        TeacherIdentity { name: String::new(), fingerprint: String::new(), dtype: String::new(), in_training: None };
    tap.settings(anyone, String::new(), largest, 1).check().map_err(|error| match error {
        Error::Usage { problem, tip } => {
            recipe.error("tap", format!("cannot be written: {problem}"), tip.replace("[cache]", "[tap]"))
        }
        error => error,
    })
}

impl Recipe {
    /// Refuses a tap that begins after the run, or keeps nothing, or more ids than the student has.
    pub fn check_tap(&self, steps: u64, vocab_size: usize) -> Result<()> {
        let Some(tap) = &self.tap else { return Ok(()) };
        if tap.from_step > steps {
            let problem = format!("is {}, but the run has {steps} steps", tap.from_step);
            return Err(self.error("tap.from_step", problem, format!("use at most {steps}")));
        }
        tap.selection().check(vocab_size).map_err(|unusable| {
            let key = match tap.top_k {
                Some(_) => "tap.top_k".to_string(),
                None => format!("tap.selection.{}", unusable.parameter),
            };
            self.error(&key, unusable.problem, unusable.tip)
        })
    }
}
