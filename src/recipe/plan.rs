//! The plan: what a recipe amounts to in sequences, steps, bytes and files, said before anything is computed.
//!
//! Everything a run does follows from its plan, which holds the recipe with every default filled in.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use super::memory::MemoryEstimate;
use super::micro_batch_key::MicroBatch;
use super::schema::{Recipe, TeacherMode};
use crate::cache::Codec;
use crate::data::HeldOut;
use crate::error::Result;
use crate::quantity::{short_bytes, short_count, short_percent};
use crate::run::RunOptions;
use crate::schedule::{LearningRate, Schedule};

/// A recipe, resolved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Plan {
    /// The version of this program.
    pub program_version: String,
    pub run_dir: PathBuf,
    pub cache_dir: PathBuf,
    pub device: String,
    /// Fingerprint of the tokenizer, once it is known.
    pub tokenizer: Option<String>,
    /// Share of the documents that is held out, once it is known: what an amount of tokens comes to.
    pub held_out_share: Option<f64>,
    /// Packed training sequences.
    pub sequences: SequenceCount,
    /// Packed sequences in one optimizer step.
    pub sequences_per_step: u64,
    /// Packed sequences in memory at once.
    pub sequences_per_micro_batch: u64,
    pub micro_batches_per_step: u64,
    pub steps: u64,
    /// Tokens (predictions) the student is trained on, repeats included.
    pub trained_tokens: u64,
    /// Passes over the training sequences.
    pub epochs: f64,
    /// Bytes of the training cache.
    pub cache_bytes: u64,
    /// Those of them that a prediction's routers take, once the teacher is known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub router_bytes: u64,
    /// What is trained: `student`, and `control` when the recipe asks for it.
    pub arms: Vec<String>,
    /// The sizes of the models, once they are known.
    pub teacher: Option<ModelSize>,
    pub student: Option<ModelSize>,
    /// Memory, once the sizes are known.
    pub memory: Option<MemoryEstimate>,
    /// What is allowed but probably not meant.
    pub warnings: Vec<String>,
    /// The recipe as it was resolved.
    pub recipe: Recipe,
}

/// A number of packed sequences, and whether the text has been packed yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SequenceCount {
    /// From the tokens asked for.
    Estimated(u64),
    /// From the packed text.
    Counted(u64),
}

impl SequenceCount {
    pub fn get(self) -> u64 {
        match self {
            SequenceCount::Estimated(count) | SequenceCount::Counted(count) => count,
        }
    }
}

/// The numbers of a model that memory depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSize {
    /// What it is, in a word or two: `llama4, 4 layers`.
    pub description: String,
    pub total_parameters: u64,
    /// Parameters that take part in one token's prediction.
    pub active_parameters: u64,
    pub layers: u64,
    pub hidden: u64,
    pub heads: u64,
    pub vocab: u64,
}

/// About how many bytes a cache takes: `sequence_count` sequences of `seq_len` predictions, each with `kept_ids` on
/// average, captured at `temperature_count` temperatures. Without a teacher there are no captures and only tokens are
/// stored. File headers are not counted.
///
/// With `raw` exactly: per sequence `seq_len + 1` tokens and segments (4 bytes each); per prediction an offset (8), the
/// normaliser (4), ids (4 each) and, for each temperature, log-probabilities (4 each), tail (4) and label (4). With the
/// others what SmolLM2-135M's predictions took: `packed` 24 bits for an id and its level and 4 bytes for each token,
/// `compact` 8.4 bits for each id and 2 bytes for each token; a byte for each further temperature.
pub fn cache_bytes(codec: Codec, sequence_count: u64, seq_len: u64, kept_ids: f64, temperature_count: u64) -> u64 {
    let kept = (seq_len as f64 * kept_ids).round() as u64;
    let rounded = |per_token: f64, per_id: f64| {
        let (kept, further) = if temperature_count == 0 { (0, 0) } else { (kept, temperature_count - 1) };
        ((seq_len as f64) * (per_token + further as f64) + kept as f64 * per_id / 8.0).round() as u64
    };
    let bytes = match codec {
        Codec::Packed => rounded(4.0, 24.0),
        Codec::Compact => rounded(2.0, 8.4),
        _ => {
            let tokens = 8u64.saturating_mul(seq_len + 1);
            match temperature_count {
                0 => tokens,
                count => tokens
                    .saturating_add(seq_len.saturating_mul(12 + 8 * count))
                    .saturating_add(kept.saturating_mul(4 * (1 + count))),
            }
        }
    };
    sequence_count.saturating_mul(bytes)
}

impl Plan {
    /// Resolves a recipe. Model sizes are added with [`Plan::set_models`], and what the text really amounts to with
    /// [`Plan::set_sequence_count`].
    ///
    /// # Errors
    /// [`crate::Error::Recipe`] when the warm-up is as long as the run.
    pub fn new(recipe: &Recipe, options: &RunOptions) -> Result<Plan> {
        let run_dir = options.run_dir(recipe);
        let seq_len = recipe.data.seq_len as u64;
        let micro_batch = recipe.train.micro_batch_tokens.and_then(MicroBatch::tokens);
        let micro_batch = micro_batch.unwrap_or(recipe.train.batch_tokens);
        let mut arms = vec!["student".to_string()];
        if recipe.has_control() {
            arms.push("control".to_string());
        }
        let mut plan = Plan {
            program_version: env!("CARGO_PKG_VERSION").to_string(),
            cache_dir: recipe
                .cache
                .train
                .as_ref()
                .or(recipe.cache.dir.as_ref())
                .cloned()
                .unwrap_or_else(|| run_dir.join("cache")),
            run_dir,
            device: options.device.clone(),
            tokenizer: None,
            held_out_share: None,
            sequences: SequenceCount::Estimated(recipe.data.tokens.div_ceil(seq_len)),
            sequences_per_step: recipe.train.batch_tokens / seq_len,
            sequences_per_micro_batch: micro_batch / seq_len,
            micro_batches_per_step: recipe.train.batch_tokens / micro_batch,
            steps: 0,
            trained_tokens: 0,
            epochs: 0.0,
            cache_bytes: 0,
            router_bytes: 0,
            arms,
            teacher: None,
            student: None,
            memory: None,
            warnings: warnings(recipe),
            recipe: recipe.clone(),
        };
        plan.count()?;
        Ok(plan)
    }

    /// Replaces the estimated number of training sequences by the packed one.
    pub fn set_sequence_count(&mut self, sequence_count: u64) -> Result<()> {
        self.sequences = SequenceCount::Counted(sequence_count);
        self.count()
    }

    /// Adds the models' sizes and the memory they ask for.
    pub fn set_models(&mut self, student: ModelSize, teacher: Option<ModelSize>) {
        let dtype = self.recipe.teacher.as_ref().map(|teacher| teacher.dtype).unwrap_or_default();
        let beside = teacher.as_ref().map(|teacher| (teacher, dtype));
        let seq_len = self.recipe.data.seq_len as u64;
        self.memory = Some(MemoryEstimate::new(&student, beside, self.sequences_per_micro_batch, seq_len));
        if teacher.as_ref().is_some_and(|teacher| teacher.active_parameters < student.active_parameters) {
            self.warnings.push("the student is larger than its teacher".to_string());
        }
        (self.student, self.teacher) = (Some(student), teacher);
    }

    /// Adds the bytes that each prediction's routers take in the cache.
    pub fn set_routers(&mut self, bytes: u64) -> Result<()> {
        self.router_bytes = bytes;
        self.count()
    }

    /// Where the student's own predictions go, if the recipe asks for them.
    pub fn tap_dir(&self) -> PathBuf {
        self.run_dir.join("tap")
    }

    /// The whole plan as JSON, as plan.json holds it.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan has no maps with keys other than text")
    }

    /// What follows from the number of sequences.
    fn count(&mut self) -> Result<()> {
        let recipe = &self.recipe;
        let (sequences, seq_len) = (self.sequences.get(), recipe.data.seq_len as u64);
        self.steps = match (recipe.train.steps, recipe.train.epochs) {
            (Some(steps), _) => steps,
            // A whole number of passes must not gain a step by rounding.
            (None, epochs) => {
                (epochs.unwrap_or(1.0) * sequences as f64 / self.sequences_per_step as f64 - 1e-9).ceil() as u64
            }
        }
        .max(1);
        recipe.check_warm_up(self.steps)?;
        recipe.check_tap(self.steps, usize::MAX)?;
        self.trained_tokens = self.steps.saturating_mul(self.sequences_per_step).saturating_mul(seq_len);
        self.epochs = (self.steps as f64) * self.sequences_per_step as f64 / sequences.max(1) as f64;
        let temperature_count = if recipe.has_soft_targets() { recipe.cache.temperatures.len() as u64 } else { 0 };
        let kept_ids = recipe.cache.selection().usual_ids();
        let normalizers = sequences.saturating_mul(4 * seq_len);
        let bytes = cache_bytes(recipe.cache.codec, sequences, seq_len, kept_ids, temperature_count);
        self.cache_bytes = match (recipe.has_soft_targets(), recipe.cache.codec, recipe.cache.log_normalizer) {
            (true, Codec::Raw, Some(false)) => bytes - normalizers,
            (true, Codec::Packed | Codec::Compact, Some(true)) => bytes.saturating_add(normalizers),
            _ => bytes,
        };
        let routers = sequences.saturating_mul(seq_len).saturating_mul(self.router_bytes);
        self.cache_bytes = self.cache_bytes.saturating_add(routers);
        Ok(())
    }
}

fn is_zero(bytes: &u64) -> bool {
    *bytes == 0
}

/// What a recipe may say but hardly means.
fn warnings(recipe: &Recipe) -> Vec<String> {
    let mut warnings = vec![];
    let mut warn = |text: String| warnings.push(text);
    if !recipe.has_held_out() {
        let key = if recipe.cache.train.is_some() { "cache.held_out" } else { "data.held_out" };
        warn(format!("nothing is held out, so there will be no evaluation; add {key}"));
    }
    if recipe.has_soft_targets() {
        let unused = recipe.cache.temperatures.iter().filter(|temperature| **temperature != recipe.loss.temperature);
        let unused: Vec<String> = unused.map(|temperature| format!("{temperature:?}")).collect();
        if !unused.is_empty() && recipe.cache.train.is_none() {
            warn(format!("cache.temperatures captures {}, which loss.temperature does not use", unused.join(", ")));
        }
        if recipe.has_sampled_targets() && recipe.cache.temperatures[0] != recipe.loss.temperature {
            // Unbiased all the same, but a weight of p_tau / p_1 has no bound.
            warn("cache.selection draws at the first of cache.temperatures; put loss.temperature there".into());
        }
        if !recipe.weighting().needs_soft_targets() {
            warn("the soft target has no weight throughout, so the teacher is of no use".into());
        }
    }
    let mut rates = vec![("train.lr", &recipe.train.lr)];
    rates.extend(recipe.control.iter().filter_map(|control| Some(("control.lr", control.lr.as_ref()?))));
    for (key, lr) in rates {
        if lr.from > 0.1 {
            warn(format!("{key}.from = {:?} is very high for AdamW", lr.from));
        }
        if lr.to.is_some_and(|to| to > lr.from) {
            warn(format!("{key} rises from {:?} to {:?}", lr.from, lr.to.unwrap_or_default()));
        }
    }
    warnings
}

fn rate(rate: &LearningRate) -> String {
    let schedule = match rate.schedule {
        Schedule::Constant { value } => format!("{value:?}"),
        Schedule::Linear { from, to } => format!("{from:?}, in a straight line to {to:?}"),
        Schedule::Cosine { from, to } => format!("{from:?}, by a cosine to {to:?}"),
        Schedule::Wsd { from, to, decay } => format!("{from:?}, in the last {:.0}% to {to:?}", decay * 100.0),
    };
    let warm_up = if rate.warmup > 0 { format!(", after {} steps of warm-up", rate.warmup) } else { String::new() };
    format!("learning rate {schedule}{warm_up}")
}

impl fmt::Display for Plan {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recipe = &self.recipe;
        let mut line = |name: &str, value: String| writeln!(formatter, "{name:<12}{value}");
        line("plan", format!("{}, from {}", recipe.name, recipe.path().display()))?;
        line("run", format!("{}, on {}", self.run_dir.display(), self.device))?;
        for (number, source) in recipe.data.sources.iter().enumerate() {
            let weight =
                if recipe.data.sources.len() > 1 { format!(", weight {}", source.weight) } else { String::new() };
            line(if number == 0 { "data" } else { "" }, format!("{}{weight}", source.path))?;
        }
        if let Some(cache) = &recipe.cache.train {
            line("data", format!("{}, as it is", cache.display()))?;
        }
        let (about, sequences) = match self.sequences {
            SequenceCount::Estimated(count) => ("about ", count),
            SequenceCount::Counted(count) => ("", count),
        };
        let (tokens, seq_len) = (short_count(recipe.data.tokens), recipe.data.seq_len);
        line("", format!("{tokens} tokens in {about}{sequences} sequences of {seq_len}"))?;
        let share = |share: f64| format!("{} of the documents", short_percent(share));
        let held_out = match &recipe.data.held_out {
            HeldOut::None => recipe.cache.held_out.as_ref().map_or("nothing".into(), |dir| dir.display().to_string()),
            HeldOut::Tokens(tokens) => {
                let share = self.held_out_share.map(|held_out| format!(", {}", share(held_out))).unwrap_or_default();
                format!("{} tokens{share}", short_count(*tokens))
            }
            HeldOut::Share(held_out) => share(*held_out),
            HeldOut::Sources(sources) => {
                sources.iter().map(|source| source.path.as_str()).collect::<Vec<_>>().join(", ")
            }
        };
        line("held out", held_out)?;
        match &recipe.teacher {
            None if recipe.has_soft_targets() => {
                let (selection, temperatures) = (recipe.cache.selection(), &recipe.cache.temperatures);
                line("soft target", format!("captured: {}, at temperature {temperatures:?}", selection.summary()))?;
            }
            None => line("teacher", "none: ordinary training on the text".into())?,
            Some(teacher) => {
                match recipe.remote_teacher() {
                    None => line("teacher", teacher.checkpoint.display().to_string())?,
                    Some(_) => {
                        let model = teacher.model.as_deref().unwrap_or_default();
                        line("teacher", format!("{model}, at {}", teacher.url.join(", ")))?;
                    }
                }
                if let Some(size) = &self.teacher {
                    line("", size.to_string())?;
                }
                if teacher.mode == TeacherMode::Streamed {
                    let memory = teacher.memory.map_or("three quarters of what is free".into(), short_bytes);
                    line("", format!("streamed, a layer at a time, in {memory} of memory"))?;
                }
                if teacher.mesh.size() > 1 {
                    line("", format!("on {} devices: {}", teacher.mesh.size(), teacher.mesh))?;
                }
                let (selection, temperatures) = (recipe.cache.selection(), &recipe.cache.temperatures);
                line("soft target", format!("{}, at temperature {temperatures:?}", selection.summary()))?;
                let bytes = self.cache_bytes as f64 / (self.sequences.get() * seq_len as u64).max(1) as f64;
                let usual = selection.usual_ids();
                line("", format!("about {usual:.0} ids and {bytes:.0} bytes for each token"))?;
            }
        }
        line("cache", format!("{}, {about}{}", self.cache_dir.display(), short_bytes(self.cache_bytes)))?;
        let student = match (&recipe.student.checkpoint, &recipe.student.shape) {
            (Some(checkpoint), _) => format!("{}, trained further", checkpoint.display()),
            (None, Some(shape)) => format!("new, like {}", format!("{:?}", shape.like).to_lowercase()),
            (None, None) => "nothing".to_string(),
        };
        line("student", student)?;
        if let Some(size) = &self.student {
            line("", size.to_string())?;
        }
        if recipe.has_soft_targets() {
            line("loss", format!("{}, weight {}", recipe.loss.divergence.name(), recipe.weighting().summary()))?;
        }
        line(
            "training",
            format!(
                "{} steps of {} tokens in {} micro-batch{}: {} tokens, {:.2} epochs",
                self.steps,
                recipe.train.batch_tokens,
                self.micro_batches_per_step,
                if self.micro_batches_per_step == 1 { "" } else { "es" },
                short_count(self.trained_tokens),
                self.epochs,
            ),
        )?;
        line("", rate(&recipe.train.lr.learning_rate()))?;
        if let Some(tap) = &recipe.tap {
            let sequences = tap.steps(self.steps, self.sequences_per_step).sequences();
            let (selection, temperatures) = (tap.selection(), &tap.temperatures);
            let bytes =
                cache_bytes(tap.codec, sequences, seq_len as u64, selection.usual_ids(), temperatures.len() as u64);
            line("tap", format!("{}, about {}", self.tap_dir().display(), short_bytes(bytes)))?;
            let (every, from_step) = (tap.every, tap.from_step);
            let steps = if every == 1 { "every step".to_string() } else { format!("every {every} steps") };
            let kept = format!("{}, at temperature {temperatures:?}", selection.summary());
            line("", format!("{sequences} sequences, of {steps} from step {from_step}: {kept}"))?;
        }
        if recipe.has_control() {
            line("control", "the same once more, on the text alone".into())?;
            line("", rate(&recipe.control_learning_rate()))?;
        }
        if let Some(memory) = &self.memory {
            let parts = [
                ("weights", memory.weights),
                ("gradients", memory.gradients),
                ("optimizer", memory.optimizer),
                ("activations", memory.activations),
            ];
            let parts: Vec<String> =
                parts.iter().map(|(name, bytes)| format!("{name} {}", short_bytes(*bytes))).collect();
            line("memory", format!("about {} in training ({})", short_bytes(memory.training()), parts.join(", ")))?;
            if memory.teacher_weights > 0 {
                let streamed = recipe.teacher.as_ref().is_some_and(|teacher| teacher.mode == TeacherMode::Streamed);
                let when = if streamed { "read for every sweep" } else { "before that" };
                line("", format!("{} for the teacher's weights, {when}", short_bytes(memory.teacher_weights)))?;
            }
        }
        for warning in &self.warnings {
            line("warning", warning.clone())?;
        }
        Ok(())
    }
}

impl fmt::Display for ModelSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (total, active) = (short_count(self.total_parameters), short_count(self.active_parameters));
        write!(formatter, "{}: {total} parameters, {active} active per token", self.description)
    }
}

#[cfg(test)]
mod tests {
    use super::super::schema::Dtype;
    use super::*;

    const RECIPE: &str = r#"
        name = "plan"
        [data]
        sources = [{ path = "text.txt" }]
        tokens = 100_000
        seq_len = 128
        held_out = "10k"
        [teacher]
        checkpoint = "teacher"
        [cache]
        top_k = 32
        [student]
        shape = { like = "scout" }
        [control]
        [train]
        epochs = 2
        batch_tokens = 1024
        micro_batch_tokens = 512
        lr = { schedule = "cosine", from = 3e-3, warmup = 50 }
    "#;

    fn plan(overrides: &[&str]) -> Result<Plan> {
        let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
        Plan::new(&Recipe::parse(RECIPE, "/recipes/plan.toml", &overrides)?, &RunOptions::default())
    }

    #[test]
    fn a_plan_counts_what_the_recipe_asks_for() {
        let mut plan = plan(&[]).unwrap();
        assert_eq!(plan.sequences, SequenceCount::Estimated(782));
        assert_eq!((plan.sequences_per_step, plan.sequences_per_micro_batch, plan.micro_batches_per_step), (8, 4, 2));
        assert_eq!(plan.steps, 196);
        assert_eq!(plan.trained_tokens, 196 * 1024);
        assert_eq!(plan.arms, ["student", "control"]);
        assert_eq!(plan.cache_dir, plan.run_dir.join("cache"));
        plan.set_sequence_count(800).unwrap();
        assert_eq!((plan.steps, plan.epochs), (200, 2.0));
        assert_eq!(plan.cache_bytes, cache_bytes(Codec::Raw, 800, 128, 32.0, 1));
    }

    #[test]
    fn the_raw_cache_costs_what_its_arrays_do() {
        // One sequence of 2 predictions, 3 kept ids: 3 tokens and segments, 2 offsets and normalisers, 6 ids, then per
        // temperature 6 log-probabilities, 2 tails, 2 labels.
        assert_eq!(cache_bytes(Codec::Raw, 1, 2, 3.0, 1), 3 * 8 + 2 * 12 + 6 * 4 + (6 + 2 + 2) * 4);
        assert_eq!(cache_bytes(Codec::Raw, 5, 2, 3.0, 2), 5 * (3 * 8 + 2 * 12 + 6 * 4 + 2 * (6 + 2 + 2) * 4));
        assert_eq!(cache_bytes(Codec::Raw, 1, 2, 2.5, 1), 3 * 8 + 2 * 12 + 5 * 4 + (5 + 2 + 2) * 4);
        assert_eq!(cache_bytes(Codec::Raw, 7, 2, 3.0, 0), 7 * 3 * 8);
        let packed = |temperatures| cache_bytes(Codec::Packed, 1, 100, 10.0, temperatures);
        assert_eq!((packed(0), packed(1), packed(3)), (400, 3400, 3600));
        assert_eq!(cache_bytes(Codec::Compact, 2, 100, 10.0, 1), 2 * (200 + 1050));
    }

    #[test]
    fn a_micro_batch_takes_what_the_free_memory_holds() {
        let student = ModelSize {
            description: "llama4, 2 layers".into(),
            total_parameters: 1000,
            active_parameters: 600,
            layers: 2,
            hidden: 8,
            heads: 2,
            vocab: 50,
        };
        let sequences = |free: Option<u64>, more: &[&str]| {
            let mut plan = plan(&[&["train.micro_batch_tokens=auto"], more].concat()).unwrap();
            plan.set_models(student.clone(), None);
            plan.fit_micro_batch(free);
            (plan.sequences_per_micro_batch, plan.micro_batches_per_step, plan.warnings.len())
        };
        let needed = |sequences| MemoryEstimate::new(&student, None, sequences, 128).training();
        assert_eq!(sequences(Some(needed(8) / 3 * 4 + 8), &[]), (8, 1, 0));
        assert_eq!(sequences(Some(needed(8) / 3 * 4 - 8), &[]), (4, 2, 0), "a divisor of the 8 of a step");
        // Too little even for one, or not known: one, and a warning.
        assert_eq!(sequences(Some(1000), &[]), (1, 8, 1));
        assert_eq!(sequences(None, &[]), (1, 8, 1));
        let less = MemoryEstimate::checkpointed(&student, 8, 128);
        assert!(less < MemoryEstimate::new(&student, None, 8, 128).activations);
        let kept = Some(needed(8) / 3 * 4 - 8);
        assert_eq!(sequences(kept, &["train.checkpoint_activations=true"]).0, 8, "recomputed layers take less");
        assert_eq!(sequences(Some(needed(8) / 3 * 4 + 8), &["train.ema=0.9"]).0, 4, "the mean takes memory too");
    }

    #[test]
    fn a_warm_up_as_long_as_the_epochs_is_refused() {
        let error = plan(&["train.lr.warmup=196"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/recipes/plan.toml: --set train.lr.warmup=196: `train.lr.warmup` is 196, but the run has only 196 steps; \
             use fewer than 196"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn memory_is_weights_gradients_moments_and_activations() {
        let student = ModelSize {
            description: "llama4, 2 layers".into(),
            total_parameters: 1000,
            active_parameters: 600,
            layers: 2,
            hidden: 8,
            heads: 2,
            vocab: 50,
        };
        let teacher = ModelSize { total_parameters: 5000, active_parameters: 500, ..student.clone() };
        let memory = MemoryEstimate::new(&student, Some((&teacher, Dtype::Bf16)), 3, 4);
        assert_eq!((memory.weights, memory.gradients, memory.optimizer), (4000, 4000, 8000));
        assert_eq!(memory.teacher_weights, 10_000);
        assert_eq!(memory.activations, 4 * (2 * (12 * 17 * 8 + 12 * 2 * 2 * 4) + 12 * 3 * 50));
        assert_eq!(memory.peak(), memory.training());

        let mut plan = plan(&[]).unwrap();
        plan.set_models(student, Some(teacher));
        assert_eq!(plan.warnings, ["the student is larger than its teacher"]);
        assert!(plan.to_string().contains("llama4, 2 layers: 1k parameters, 600 active per token"));
        plan.held_out_share = Some(0.0123456);
        assert!(plan.to_string().contains("held out    10k tokens, 1.23% of the documents\n"), "{plan}");
        let again: Plan = serde_json::from_str(&plan.to_json()).unwrap();
        assert_eq!(again.to_json(), plan.to_json());
        let json: serde_json::Value = serde_json::from_str(&plan.to_json()).unwrap();
        assert_eq!(json["student"]["total_parameters"], 1000);
        assert_eq!(json["recipe"]["cache"]["top_k"], 32);
        assert_eq!(json["sequences"]["estimated"], 782);
    }

    #[test]
    fn what_is_hardly_meant_is_warned_about() {
        let plan = plan(&["cache.temperatures=[1.0, 2.0]", "train.lr.from=0.5", "train.lr.to=0.6"]).unwrap();
        assert_eq!(
            plan.warnings,
            [
                "cache.temperatures captures 2.0, which loss.temperature does not use",
                "train.lr.from = 0.5 is very high for AdamW",
                "train.lr rises from 0.5 to 0.6",
            ]
        );
    }
}
