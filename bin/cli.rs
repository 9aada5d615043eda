//! Every flag and every word of help. Says what was typed; what it means is the commands' business.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};
use limbeck::cache::{Codec, WriterPart};

/// Distil large language models: keep a teacher's soft targets, train students from them
#[derive(Debug, Parser)]
#[command(
    name = "limbeck",
    version,
    arg_required_else_help = true,
    after_help = "Results go to stdout, progress and errors to stderr.\n\
                  Exit codes: 0 done, 1 failed, 2 the recipe or the command is wrong, 130 interrupted with its state saved."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    #[command(flatten)]
    pub verbosity: Verbosity,
}

#[derive(Debug, Args)]
pub struct Verbosity {
    /// Log more; twice for everything
    #[arg(short, long, action = ArgAction::Count, global = true, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Log errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the teacher over the text and keep its soft targets in a cache
    ///
    /// A run that was interrupted picks up where it stopped. A finished cache is left as it is.
    PrecomputeTeacherLogits(PrecomputeArgs),

    /// Train a student as a recipe says, and report how it did
    ///
    /// Fills what its cache lacks first, when the recipe names a teacher. Prints a table of the held-out results and the path
    /// of the report. A run that was interrupted picks up where it stopped.
    Distill(RunArgs),

    /// Measure the latest checkpoints of a run on its held-out text again
    Evaluate(EvaluateArgs),

    /// Put runs beside each other: a table of their held-out results, and their curves in one page
    ///
    /// Reads what the runs left; one that is still training is shown as far as it is.
    Compare(CompareArgs),

    /// Estimate what the teacher's pass of a recipe takes on some hardware: memory, time, and the way to run it
    ///
    /// Computed from shapes and rates, without loading anything; docs/planning.md has the arithmetic. Ways that do not fit are
    /// listed with the reason.
    Plan(PlanArgs),

    /// Say what a recipe, cache, checkpoint or run directory holds
    Inspect(InspectArgs),

    /// Convert, import and compare caches of soft targets
    Cache(CacheArgs),

    /// Make tokenizers
    Tokenizer(TokenizerArgs),

    /// Continue a prompt with a model
    Generate(GenerateArgs),

    /// Compute a model's logits for given token ids, to compare with another implementation
    Logits(LogitsArgs),

    /// Write a checkpoint once more for use elsewhere, without its training state
    Export(ExportArgs),

    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// What every command that runs a recipe takes.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The recipe, a TOML file
    pub recipe: PathBuf,

    #[command(flatten)]
    pub run: RunFlags,

    /// Print the plan and stop
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct PrecomputeArgs {
    #[command(flatten)]
    pub run: RunArgs,

    /// Fill one part of N of the cache, for N processes that share the work; the last to end finishes the cache
    #[arg(long, value_name = "I/N", default_value_t = WriterPart::WHOLE)]
    pub shard: WriterPart,
}

#[derive(Debug, Args)]
pub struct RunFlags {
    /// Override one key of the recipe, as in --set cache.top_k=32; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Where results go [default: the recipe's run.dir, else runs/<name>]
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,

    #[command(flatten)]
    pub device: DeviceFlag,

    /// Record where the time goes, for ui.perfetto.dev or chrome://tracing [default: profile.json in the run directory]
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true)]
    pub profile: Option<Option<PathBuf>>,
}

#[derive(Debug, Args)]
pub struct DeviceFlag {
    /// Where to compute: cpu, cuda, cuda:N, wgpu or tch; all but cpu need a build with that feature
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    pub device: String,
}

#[derive(Debug, Args)]
pub struct EvaluateArgs {
    /// The recipe, or the run directory
    #[arg(value_name = "RECIPE|RUN_DIR")]
    pub target: PathBuf,

    #[command(flatten)]
    pub run: RunFlags,

    /// Print the plan and stop
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Run directories
    #[arg(value_name = "RUN", required = true)]
    pub runs: Vec<PathBuf>,

    /// Write a page with the table and the students' curves over each other
    #[arg(long, value_name = "OUT.html")]
    pub html: Option<PathBuf>,

    /// Write the measures of all arms as comma-separated values
    #[arg(long, value_name = "OUT.csv")]
    pub csv: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The recipe, a TOML file
    #[arg(required_unless_present = "calibrate")]
    pub recipe: Option<PathBuf>,

    /// Override one key of the recipe, as in --set data.tokens=1T; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Where it is to run: 1x24gb, 1xh100, 8xh100, 64xh100 or a TOML file; may be given several times [default: all four]
    #[arg(long, value_name = "NAME|FILE")]
    pub hardware: Vec<String>,

    /// Measure this machine for some seconds and write it as hardware into a TOML file; a recipe is then planned for it
    #[arg(long, value_name = "FILE")]
    pub calibrate: Option<PathBuf>,

    /// With --calibrate: the directory to read from, where checkpoints are [default: that of the file]
    #[arg(long, value_name = "DIR", requires = "calibrate")]
    pub disk: Option<PathBuf>,

    /// Plan for another teacher than the recipe's: scout, maverick, behemoth, or the directory of a model
    #[arg(long, value_name = "SHAPE|DIR")]
    pub teacher: Option<String>,

    /// How its weights are stored while it runs
    #[arg(long, value_enum, default_value_t = WeightsFlag::Bf16)]
    pub weights: WeightsFlag,

    /// Memory that a streamed teacher may take on each device, in GB [default: 92% of it]
    #[arg(long, value_name = "GB")]
    pub memory: Option<f64>,

    /// Price of one device for an hour
    #[arg(long, value_name = "PRICE")]
    pub price: Option<f64>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum WeightsFlag {
    F32,
    Bf16,
    Fp8,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A recipe, the directory of a cache, a checkpoint or a run, a .gguf file, a model as hf:org/name, or the address of a
    /// cache
    pub path: PathBuf,

    /// Override one key of the recipe, as in --set cache.top_k=32; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,

    /// Read every byte of a cache and check it against its checksums
    #[arg(long)]
    pub verify: bool,

    /// Print what is in a cache as JSON, one line for each split
    #[arg(long)]
    pub json: bool,

    /// Write what is in a cache as a page with pictures
    #[arg(long, value_name = "OUT.html")]
    pub html: Option<PathBuf>,

    /// List every tensor of a checkpoint
    #[arg(long)]
    pub tensors: bool,
}

#[derive(Debug, Args)]
pub struct CacheArgs {
    #[command(subcommand)]
    pub command: CacheCommand,
}

#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Write a cache once more, in another encoding
    ///
    /// With --theta and --cap, keeps fewer of its ids. Everything else stays, the fingerprints of teacher, tokenizer and data as well. Also brings a cache of an older format
    /// version to the present one. A conversion that was interrupted goes on where it stopped.
    Convert(CacheConvertArgs),

    /// Put the parts of a cache together that were written in directories of their own
    ///
    /// For writers that share no disk: give each its own --run-dir and its --shard I/N, and name the directories of their caches
    /// here. The bytes are those that one writer would have written. Parts that were killed serve as far as they came; what no
    /// part has is named. A merge that was interrupted goes on where it stopped.
    Merge(CacheMergeArgs),

    /// Make a cache of soft targets that another program captured
    ///
    /// What such files do not say is filled in, and the manifest says so: tails are one minus the sum of the kept probabilities,
    /// at least 1e-8, and a label that is not kept gets an even share of the tail.
    Import(Box<CacheImportArgs>),

    /// Compare a cache with its teacher, run over some of its sequences
    ///
    /// Prints the Kullback-Leibler divergence of the cache from the live teacher over kept ids and tail, and the largest errors.
    /// Exits with 1 when the mean divergence is beyond the tolerance.
    Stats(CacheStatsArgs),
}

#[derive(Debug, Args)]
pub struct CacheConvertArgs {
    /// The cache to read
    pub input: PathBuf,

    /// The directory to write
    pub output: PathBuf,

    /// The encoding to write
    #[arg(long, value_name = "CODEC", value_parser = codec)]
    pub codec: Codec,

    /// Levels that the square root of a probability is rounded to [default: 63 with packed, 128 with compact]
    #[arg(long, value_name = "COUNT")]
    pub levels: Option<u16>,

    /// Whether to keep the log-sum-exp of the teacher's logits, 4 bytes for each prediction [default: with raw only]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub log_normalizer: Option<bool>,

    /// Keep only ids of at least this probability; the rest joins the tail
    #[arg(long, value_name = "PROBABILITY")]
    pub theta: Option<f64>,

    /// Keep at most as many ids of a row
    #[arg(long, value_name = "COUNT")]
    pub cap: Option<usize>,
}

#[derive(Debug, Args)]
pub struct CacheMergeArgs {
    /// The directory to write
    pub output: PathBuf,

    /// Directories with parts, finished or not
    #[arg(required = true)]
    pub parts: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CacheImportArgs {
    #[command(subcommand)]
    pub command: CacheImportCommand,
}

#[derive(Debug, Subcommand)]
pub enum CacheImportCommand {
    /// From the Parquet files that DistillKit captures a teacher into
    #[command(name = "distillkit")]
    DistillKit(ImportDistillKitArgs),

    /// From JSON Lines with the most probable tokens of each place, as vLLM and axolotl have them
    Jsonl(ImportJsonlArgs),
}

#[derive(Debug, Args)]
pub struct ImportDistillKitArgs {
    /// The directory that DistillKit wrote, or Parquet files in their order
    #[arg(value_name = "DIR|FILE", required = true)]
    pub input: Vec<PathBuf>,

    #[command(flatten)]
    pub import: ImportFlags,

    /// How the rows are compressed [default: compression_config.yaml beside the files]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ImportJsonlArgs {
    /// JSON Lines files in their order
    #[arg(value_name = "FILE", required = true)]
    pub input: Vec<PathBuf>,

    #[command(flatten)]
    pub import: ImportFlags,

    /// Which token row i is about, where there are as many rows as tokens: token i, or the next [default: what the records
    /// show]
    #[arg(long, value_enum, value_name = "PLACE")]
    pub rows: Option<RowsFlag>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum RowsFlag {
    Token,
    Next,
}

/// What captured files do not say.
#[derive(Debug, Args)]
pub struct ImportFlags {
    /// The directory to write the cache into
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// The tokenizer whose ids the files hold: tokenizer.json or its directory
    #[arg(long, value_name = "PATH")]
    pub tokenizer: PathBuf,

    /// What the teacher is called
    #[arg(long, value_name = "NAME")]
    pub teacher_name: String,

    /// The teacher's model directory, where it is at hand, for its fingerprint
    #[arg(long, value_name = "DIR")]
    pub teacher: Option<PathBuf>,

    /// Predictions in one packed sequence
    #[arg(long, value_name = "COUNT")]
    pub seq_len: usize,

    /// Number of ids the teacher could name [default: the tokenizer's]
    #[arg(long, value_name = "COUNT")]
    pub vocab_size: Option<usize>,

    /// The temperature the probabilities were taken at
    #[arg(long, value_name = "NUMBER", default_value_t = 1.0)]
    pub temperature: f32,

    /// Which part of a run's data this is: train or held_out
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub split: String,

    /// The encoding to write
    #[arg(long, value_name = "CODEC", value_parser = codec, default_value = "raw")]
    pub codec: Codec,

    /// Sequences in one file of the cache
    #[arg(long, value_name = "COUNT", default_value_t = 512)]
    pub sequences_per_shard: usize,
}

#[derive(Debug, Args)]
pub struct CacheStatsArgs {
    /// The cache
    pub cache: PathBuf,

    /// The teacher, a model directory
    #[arg(long, value_name = "CHECKPOINT")]
    pub against: PathBuf,

    /// Sequences to compare, evenly spread over the cache
    #[arg(long, value_name = "COUNT", default_value_t = 8)]
    pub sequences: u64,

    /// Largest mean divergence that passes, in nats per prediction
    #[arg(long, value_name = "NATS", default_value_t = 1e-3)]
    pub tolerance: f64,

    #[command(flatten)]
    pub device: DeviceFlag,
}

/// An encoding by its name in manifests.
fn codec(name: &str) -> Result<Codec, String> {
    serde_json::from_value(serde_json::Value::from(name)).map_err(|error| error.to_string())
}

#[derive(Debug, Args)]
pub struct TokenizerArgs {
    #[command(subcommand)]
    pub command: TokenizerCommand,
}

#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Train a byte-level BPE tokenizer on text
    Train(TokenizerTrainArgs),
}

#[derive(Debug, Args)]
pub struct TokenizerTrainArgs {
    /// Text, JSON Lines or Parquet files, or patterns such as 'text/*.jsonl'; may be given several times
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    pub input: Vec<PathBuf>,

    /// Field or column that holds the text [default: text]
    #[arg(long, value_name = "NAME")]
    pub field: Option<String>,

    /// Number of tokens, the 256 bytes and the special tokens among them
    #[arg(long, value_name = "COUNT")]
    pub vocab_size: usize,

    /// A token that text never becomes by itself; may be given several times
    #[arg(long, value_name = "TOKEN", default_values_t = ["<|begin_of_text|>".to_string(), "<|end_of_text|>".to_string()])]
    pub special_token: Vec<String>,

    /// The directory to write tokenizer.json into
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// A model directory, a .gguf file, or a model on the hub as hf:org/name
    pub checkpoint: PathBuf,

    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: String,

    /// Most tokens to add
    #[arg(long, value_name = "COUNT", default_value_t = 128)]
    pub max_tokens: usize,

    /// 0 always takes the most probable token; higher is more varied
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0)]
    pub temperature: f64,

    /// Choose among the most probable tokens only; 0 for all
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    pub top_k: usize,

    /// Seed of the choices
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub seed: u64,

    #[command(flatten)]
    pub device: DeviceFlag,
}

#[derive(Debug, Args)]
pub struct LogitsArgs {
    /// A model directory, a .gguf file, or a model on the hub as hf:org/name
    pub checkpoint: PathBuf,

    /// Safetensors file with `input_ids`, i64 of shape [batch, sequence]
    #[arg(long, value_name = "IN.safetensors")]
    pub tokens: PathBuf,

    /// Safetensors file to write `logits` to, f32 of shape [batch, sequence, vocabulary]
    #[arg(long, value_name = "OUT.safetensors")]
    pub output: PathBuf,

    #[command(flatten)]
    pub device: DeviceFlag,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A model directory, a .gguf file, or a model on the hub as hf:org/name
    pub checkpoint: PathBuf,

    /// The directory to write
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// Number format of the weights
    #[arg(long, value_enum, default_value_t = ExportDtype::Bf16)]
    pub dtype: ExportDtype,

    /// Most bytes in one file of weights
    #[arg(long, value_name = "BYTES", default_value = "5B")]
    pub max_shard_bytes: String,

    /// Replace a checkpoint that is there already
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum ExportDtype {
    F32,
    Bf16,
    F16,
}

#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    pub shell: clap_complete::Shell,
}
