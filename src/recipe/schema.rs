//! The recipe as it is written: one struct for each section, in pipeline order. Defaults and types live here; what a
//! value may be lives in `check`, and what the values amount to lives in `plan`. A value that the library has a type for is of
//! that type.
//!
//! Unknown keys are errors. `docs/recipes.md` describes every key for users, and a test keeps it complete.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::load::Origin;
use super::router::RouterSection;
use super::student_init::StudentInit;
use super::tap::TapSection;
pub use super::train_section::{LearningRateKind, LearningRateSection, TrainSection};
use crate::cache::Codec;
use crate::data::{DataSource, HeldOut, deserialize_count, deserialize_optional_count};
use crate::loss::{Divergence, Tail, Weighting};
use crate::parallel::Mesh;
use crate::schedule::LearningRate;
use crate::selection::Selection;
use crate::targets::TargetKind;
use crate::teacher::Spill;

/// A whole recipe, with its defaults filled in and its paths absolute.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the run; the run directory is `runs/<name>` unless something else is asked for.
    pub name: String,
    /// Seeds the order of the data and, unless `student.init_seed` says otherwise, the student. Default 0.
    #[serde(default)]
    pub seed: u64,
    pub data: DataSection,
    /// The model that is distilled. Without it the run is ordinary training on the text itself.
    pub teacher: Option<TeacherSection>,
    #[serde(default)]
    pub cache: CacheSection,
    pub student: StudentSection,
    /// When present, the same student is also trained on the hard target alone, for comparison.
    pub control: Option<ControlSection>,
    #[serde(default)]
    pub loss: LossSection,
    pub train: TrainSection,
    /// When present, what the student predicts while it is trained becomes a cache.
    pub tap: Option<TapSection>,
    #[serde(default)]
    pub run: RunSection,
    /// Which file, line or `--set` each key came from, for messages.
    #[serde(skip)]
    pub(super) origin: Origin,
}

/// `[data]`: which text, how much of it, and how it is cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Text files, mixed by weight.
    #[serde(default)]
    pub sources: Vec<DataSource>,
    /// Training tokens to take from the sources, as the student's own count: `"10B"`, `"1.5M"` or an integer.
    #[serde(default, deserialize_with = "deserialize_count")]
    pub tokens: u64,
    /// Predictions in one packed sequence.
    #[serde(default)]
    pub seq_len: usize,
    /// What is kept apart for evaluation. Default: nothing.
    #[serde(default, skip_serializing_if = "HeldOut::is_none")]
    pub held_out: HeldOut,
    /// `tokenizer.json`, or a directory that holds one. Default: the teacher's, else the student checkpoint's.
    pub tokenizer: Option<PathBuf>,
    /// Token put before each document, by its text; `""` for none. Default: what the tokenizer says.
    pub document_start: Option<String>,
    /// Token put after each document, by its text; `""` for none. Default: what the tokenizer says.
    pub document_end: Option<String>,
}

/// `[teacher]`: the model whose probabilities are kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherSection {
    /// A model directory, a GGUF file or a model on the hub. Empty with `remote`.
    #[serde(default, skip_serializing_if = "path_is_empty")]
    pub checkpoint: PathBuf,
    /// How the teacher is run: `resident`, or `streamed` where it is larger than memory. Default `resident`.
    #[serde(default)]
    pub mode: TeacherMode,
    /// What its matrix products are computed in. Default `f32`.
    #[serde(default)]
    pub dtype: Dtype,
    /// Tokens in one forward pass; at least one whole sequence is always run. Default 4096.
    #[serde(default = "teacher_batch_tokens", deserialize_with = "deserialize_count")]
    pub batch_tokens: u64,
    /// For `streamed`: memory of the whole program, as `"2GiB"`. Default: three quarters of what is free.
    #[serde(default, with = "super::memory_key", skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// For `streamed`: most tokens that pass a layer before the next is read. Default: what the memory allows.
    #[serde(default, deserialize_with = "deserialize_optional_count", skip_serializing_if = "Option::is_none")]
    pub sweep_tokens: Option<u64>,
    /// For `streamed`: whether hidden states that do not fit into memory go to a file in the run directory. Default `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spill: Option<Spill>,
    /// The devices it is divided over, by axis. Default: one device.
    #[serde(default, skip_serializing_if = "is_one_device")]
    pub mesh: Mesh,
    /// For `remote`: the server's address, or several that share the work, as `"http://host:8000/v1"`.
    #[serde(default, deserialize_with = "super::url_key::deserialize", skip_serializing_if = "Vec::is_empty")]
    pub url: Vec<String>,
    /// For `remote`: the model's name on the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// For `remote`: requests under way at once. Default 8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<usize>,
    /// For `remote`: seconds that one answer may take. Default 300.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
    /// For `remote`: how often a request that failed is made again. Default 7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// For `remote`: most requests begun in a second. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<f64>,
    /// For `remote`: name of the environment variable that holds the server's key. Default: no key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_key_env: Option<String>,
}

fn is_one_device(mesh: &Mesh) -> bool {
    *mesh == Mesh::default()
}

/// Where the teacher's weights are while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TeacherMode {
    /// All layers in memory.
    #[default]
    Resident,
    /// One layer after the other, each over many tokens.
    Streamed,
    /// Behind a server.
    Remote,
}

/// A floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    F32,
    Bf16,
}

/// `[cache]`: what is kept of each teacher prediction.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheSection {
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
    /// Whether the log-sum-exp of the teacher's logits is kept beside each prediction. Default: with `raw`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_normalizer: Option<bool>,
    /// Numbers of the teacher's layers whose routers are kept beside each prediction. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub router_layers: Vec<usize>,
    /// Packed sequences in one shard file. Default 512.
    pub sequences_per_shard: usize,
    /// Directories of finished caches of other runs, from which equal sequences take their targets. Default: none.
    pub reuse: Vec<PathBuf>,
    /// The cache directory. Default `cache` in the run directory.
    pub dir: Option<PathBuf>,
    /// A finished cache to train on as it is, such as an import; it takes the place of text and teacher.
    pub train: Option<PathBuf>,
    /// Beside `train`: a finished cache to evaluate on. Default: nothing.
    pub held_out: Option<PathBuf>,
}

impl Default for CacheSection {
    fn default() -> Self {
        CacheSection {
            selection: None,
            top_k: None,
            temperatures: vec![1.0],
            codec: Codec::Raw,
            levels: None,
            log_normalizer: None,
            router_layers: vec![],
            reuse: vec![],
            sequences_per_shard: 512,
            dir: None,
            train: None,
            held_out: None,
        }
    }
}

impl CacheSection {
    /// What is kept of each prediction.
    pub fn selection(&self) -> Selection {
        match (&self.selection, self.top_k) {
            (Some(selection), _) => selection.clone(),
            (None, Some(k)) => Selection::TopK { k },
            (None, None) => Selection::default(),
        }
    }
}

/// `[student]`: the model that is trained; exactly one of `shape` and `checkpoint`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentSection {
    /// A new model of this shape.
    pub shape: Option<Shape>,
    /// A Hugging Face model directory to go on from.
    pub checkpoint: Option<PathBuf>,
    /// Beside `shape`: a model whose layers a new one begins with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<StudentInit>,
    /// Standard deviation of a new model's weights. Default 0.02.
    pub init_std: Option<f64>,
    /// Seed of a new model's weights. Default: the recipe's `seed`.
    pub init_seed: Option<u64>,
}

/// `student.shape`: a named shape, and what differs from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// The shape that supplies whatever is not said here.
    pub like: ShapeName,
    /// Decoder layers (`num_hidden_layers`).
    pub layers: Option<usize>,
    /// Width of the residual stream (`hidden_size`).
    pub hidden: Option<usize>,
    /// Query heads (`num_attention_heads`).
    pub heads: Option<usize>,
    /// Key and value heads (`num_key_value_heads`).
    pub kv_heads: Option<usize>,
    /// Width of one head (`head_dim`).
    pub head_dim: Option<usize>,
    /// Routed experts in a mixture layer (`num_local_experts`).
    pub experts: Option<usize>,
    /// Routed experts each token visits (`num_experts_per_tok`).
    pub experts_per_token: Option<usize>,
    /// Width of an expert and of the shared expert (`intermediate_size`).
    pub expert_width: Option<usize>,
    /// Width of a dense feed-forward layer (`intermediate_size_mlp`, or `intermediate_size` of a dense model).
    pub dense_width: Option<usize>,
    /// Every how manieth layer is a mixture (`interleave_moe_layer_step`).
    pub moe_interval: Option<usize>,
    /// Positions in one attention chunk (`attention_chunk_size`).
    pub chunk: Option<usize>,
    /// Every how manieth layer attends without positions to everything before it (`no_rope_layer_interval`).
    pub nope_interval: Option<usize>,
    /// Whether queries and keys are normalised (`use_qk_norm`).
    pub qk_norm: Option<bool>,
    /// Base of the rotary frequencies (`rope_theta`).
    pub rope_theta: Option<f64>,
    /// The constant inside the norms (`rms_norm_eps`).
    pub norm_eps: Option<f64>,
    /// Vocabulary size. Default: the tokenizer's.
    pub vocab: Option<usize>,
    /// Whether input and output embeddings are one matrix (`tie_word_embeddings`).
    pub tie_embeddings: Option<bool>,
    /// Longest sequence the model is made for (`max_position_embeddings`).
    pub max_position: Option<usize>,
}

/// The shapes a student can start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShapeName {
    /// Llama 4 Scout: a mixture in every layer, normalised queries and keys.
    Scout,
    /// Llama 4 Maverick: dense layers and mixtures in turn.
    Maverick,
    /// Llama 4 Behemoth, as far as it has been described.
    Behemoth,
    /// A Scout small enough for a test.
    Tiny,
    /// A dense decoder of the Llama 2 and 3 family.
    Llama,
}

/// `[control]`: the same student, data, order and steps, trained on the hard target alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControlSection {
    /// Default true: naming the section is enough.
    pub enabled: bool,
    /// Learning rate of the control, whole. Default: the student's.
    pub lr: Option<LearningRateSection>,
}

impl Default for ControlSection {
    fn default() -> Self {
        ControlSection { enabled: true, lr: None }
    }
}

/// `[loss]`: how the student is compared with the teacher and with the text.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossSection {
    /// A name, or a table of `kind` and parameters. Default `forward_kl`.
    #[serde(with = "super::divergence_key")]
    pub divergence: Divergence,
    /// What becomes of the probability outside the kept ids. Default `bucket`.
    pub tail: Tail,
    /// Divides the logits of both sides before the divergence; must be one of `cache.temperatures`. Default 1.
    pub temperature: f64,
    /// Multiplies the soft loss by the squared temperature, so that its gradients keep their size. Default true.
    pub t_scale: bool,
    /// Weight of the soft target through the run; the hard target has the rest. Default with a teacher:
    /// linear from 0.9 to 0.5.
    pub weighting: Option<Weighting>,
    /// Routers of the student that follow the teacher's. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router: Option<RouterSection>,
}

impl Default for LossSection {
    fn default() -> Self {
        LossSection {
            divergence: Divergence::ForwardKl,
            tail: Tail::Bucket,
            temperature: 1.0,
            t_scale: true,
            weighting: None,
            router: None,
        }
    }
}

/// `[run]`: where the results go.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunSection {
    /// The run directory. Default `runs/<name>` in the current directory.
    pub dir: Option<PathBuf>,
}

impl Recipe {
    /// Whether a control is trained beside the student.
    pub fn has_control(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.enabled)
    }

    /// Whether there are soft targets to learn from: a teacher's, or those of a finished cache.
    pub fn has_soft_targets(&self) -> bool {
        self.teacher.is_some() || self.cache.train.is_some()
    }

    /// Whether something is kept apart for evaluation.
    pub fn has_held_out(&self) -> bool {
        !self.data.held_out.is_none() || self.cache.held_out.is_some()
    }

    /// The weight of the soft target through the run; 0 throughout without one. The hard target has the rest.
    pub fn weighting(&self) -> Weighting {
        match (self.has_soft_targets(), &self.loss.weighting) {
            (false, _) => Weighting::hard_only(),
            (true, None) => Weighting::Linear { from: 0.9, to: 0.5 },
            (true, Some(weighting)) => weighting.clone(),
        }
    }

    /// Whether the student learns from ids that were drawn from the teacher.
    pub fn has_sampled_targets(&self) -> bool {
        self.has_soft_targets() && self.cache.selection().kind() == TargetKind::Sampled
    }

    /// The teacher that runs behind a server, if it does.
    pub fn remote_teacher(&self) -> Option<&TeacherSection> {
        self.teacher.as_ref().filter(|teacher| teacher.mode == TeacherMode::Remote)
    }

    /// Bytes of a shard of the cache that is being filled or sealed, where each row keeps so many ids.
    pub fn shard_bytes(&self, ids: u64) -> u64 {
        let captures = self.cache.temperatures.len() as u64;
        let row = 12 + 8 + 4 * ids + captures * (4 * ids + 8);
        // Codecs other than `raw` make the bytes of a shard beside its numbers.
        let coded = if self.cache.codec == Codec::Raw { 0 } else { row / 2 };
        let length = self.data.seq_len as u64;
        let sequences = (self.cache.sequences_per_shard as u64).min(self.data.tokens.div_ceil(length));
        sequences * (length + 1) * (row + coded)
    }

    /// The directory of the teacher that runs here, if one does.
    pub fn teacher_checkpoint(&self) -> Option<&PathBuf> {
        self.teacher.as_ref().filter(|teacher| teacher.mode != TeacherMode::Remote).map(|teacher| &teacher.checkpoint)
    }

    /// The learning rate of the control: its own, else the student's.
    pub fn control_learning_rate(&self) -> LearningRate {
        let own = self.control.as_ref().and_then(|control| control.lr.as_ref());
        own.unwrap_or(&self.train.lr).learning_rate()
    }
}

impl StudentSection {
    /// Standard deviation of a new model's weights.
    pub fn init_std(&self) -> f64 {
        self.init_std.unwrap_or(0.02)
    }
}

fn path_is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}
fn teacher_batch_tokens() -> u64 {
    4096
}
