//! limbeck distils large language models.

pub mod cache;
pub mod checkpoint;
pub mod data;
pub mod distill;
pub mod error;
pub mod eval;
pub mod inputs;
pub mod loss;
pub mod models;
pub mod precompute;
pub mod recipe;
pub mod run;
pub mod schedule;
pub mod targets;
pub mod teacher;
pub mod tokenizer;
pub mod train;

pub use error::{Error, Result};
