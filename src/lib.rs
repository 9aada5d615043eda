//! limbeck distils large language models: a teacher reads a text once, what it holds likely at each place is kept on
//! disk, and students are trained from that.
//!
//! - [`recipe`] says what a run is, in one TOML file; [`inputs`] opens what it names and checks that it fits together.
//! - [`data`] turns text into packed sequences, [`teacher`] turns those into [`SparseTargets`](targets::SparseTargets),
//!   and [`cache`] keeps both.
//! - [`models`] runs Llama 4 and the dense Llama family, [`loss`] compares a student with its targets, [`train`] steps.
//! - [`checkpoint`] reads and writes Hugging Face directories; [`eval`] measures and reports.
//! - [`remote`] asks a teacher that a server runs for the same targets.
//! - [`import`] makes caches of what other programs captured; [`fidelity`] compares a cache with a live teacher.
//!
//! [`distill::run`] is all of it in one call. By hand it is this:
//!
//! ```no_run
//! use limbeck::{cache::CacheReader, inputs::Inputs, recipe::Recipe, run::RunOptions, targets::TargetSource};
//! use limbeck::loss::{DistillLossConfig, Divergence, Weighting};
//! use limbeck::models::{Decoder, RandomWeights};
//! use limbeck::schedule::{LearningRate, Schedule};
//! use limbeck::train::{TrainConfig, Trainer, balance::RouterConfig, optimizer::OptimizerConfig};
//!
//! # fn main() -> limbeck::Result<()> {
//! let (options, steps) = (RunOptions::default(), 480);
//! let recipe = Recipe::load("recipes/quickstart/scout.toml", &["cache.top_k=16".to_string()])?;
//! let inputs = Inputs::open(&recipe, &options)?; // tokenizer, configurations, plan
//! let caches = limbeck::precompute::run(&recipe, &options)?; // the teacher runs here, over what is missing
//! let cache = CacheReader::open(caches.join("train"))?; // packed tokens with soft targets, checked as they are read
//!
//! let weights = RandomWeights { seed: 17, std: 0.02 };
//! let student = Decoder::load(inputs.student.clone(), &weights, &options.device()?.autodiff())?;
//! let weighting = Weighting::Cosine { from: 0.9, to: 0.5 }; // the teacher's share; the text has the rest
//! let loss = DistillLossConfig::new(Divergence::ForwardKl).with_weighting(weighting, steps).init()?;
//! let config = TrainConfig {
//!     learning_rate: LearningRate { warmup: 50, schedule: Schedule::Linear { from: 3e-3, to: 6e-5 } },
//!     optimizer: OptimizerConfig { weight_decay: 0.05, ..OptimizerConfig::default() },
//!     router: RouterConfig { balance_weight: 0.001, ..RouterConfig::default() },
//!     sequences_per_step: 8,
//!     data: cache.manifest().root.clone(), // compared when the run goes on
//!     steps,
//!     ..TrainConfig::default() // ... how often to log, evaluate and save, what guards do, and more
//! };
//! let mut trainer = Trainer::new(config, student, loss, cache.sequence_count())?;
//! for _ in 0..steps {
//!     let metrics = trainer.train_step(&cache)?;
//!     println!("step {}: {:.3} nats per token", metrics.step, metrics.loss);
//! }
//! trainer.save("runs/by_hand".as_ref(), &inputs.tokenizer_files()?)?; // a directory that `transformers` loads
//! # Ok(())
//! # }
//! ```
//!
//! What this crate is not: a server, a training framework for anything but distillation, or a home for tensor
//! operations, which are in `limbeck-kernels`. The library prints nothing and ends no process; the program of the same
//! name does. `docs/architecture.md` in the repository says how the parts fit together and what has to stay true.

pub mod cache;
pub mod checkpoint;
pub mod data;
pub mod distill;
mod durable;
pub mod error;
pub mod estimate;
pub mod eval;
pub mod fidelity;
pub mod hub;
pub mod import;
pub mod inputs;
pub mod loss;
mod memory;
pub mod models;
pub mod parallel;
mod positioned;
pub mod precompute;
pub mod profile;
pub mod progress;
mod quantity;
pub mod recipe;
pub mod remote;
pub mod run;
pub mod schedule;
pub mod selection;
pub mod tap;
pub mod targets;
pub mod teacher;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};

/// The README's examples are tests as well.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
