//! Everything that can go wrong, one variant for each thing a user can act on.
//!
//! Messages are one line, in lower case, name the file, tensor, key or line, and end with the way out.
//! Libraries return these; only `bin/` prints them and turns them into exit codes.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read or write a path.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    /// A recipe says something unknown, contradictory or impossible.
    #[error("{}: {problem}; {tip}", path.display())]
    Recipe { path: PathBuf, problem: String, tip: String },

    /// The command line asks for something that cannot be done.
    #[error("{problem}; {tip}")]
    Usage { problem: String, tip: String },

    /// A file is there but is not what it should be (truncated, malformed, too large a header ...).
    #[error("{}: {problem}; {tip}", path.display())]
    File { path: PathBuf, problem: String, tip: String },

    /// One tensor of a checkpoint is missing, misshapen, of an unknown type or not finite.
    #[error("{}: tensor `{tensor}`: {problem}; {tip}", path.display())]
    Tensor { path: PathBuf, tensor: String, problem: String, tip: String },

    /// A model configuration has a missing, unsupported or contradictory key.
    #[error("{}: `{key}`: {problem}; {tip}", path.display())]
    Config { path: PathBuf, key: String, problem: String, tip: String },

    /// A line or record of a text source cannot be used.
    #[error("{}: record {record}: {problem}; {tip}", path.display())]
    Data { path: PathBuf, record: u64, problem: String, tip: String },

    /// A cache shard is corrupt, missing or not the one the manifest names.
    #[error("{}: shard {shard}: {problem}; {tip}", cache.display())]
    Shard { cache: PathBuf, shard: String, problem: String, tip: String },

    /// Two things that must agree do not (fingerprints of teacher, tokenizer, data, settings).
    #[error("{what} differs: {left_name} has {left}, {right_name} has {right}; {tip}")]
    Mismatch { what: String, left_name: String, left: String, right_name: String, right: String, tip: String },

    /// A server cannot be reached, refuses, or gives what is no answer.
    #[error("{url}: {problem}; {tip}")]
    Server { url: String, problem: String, tip: String },

    /// A number that must be finite is not.
    #[error("{what} is not finite; {tip}")]
    NotFinite { what: String, tip: String },

    /// Training went wrong, and what was asked for in such a case is to end.
    #[error("{what}; {tip}")]
    Diverged { what: String, tip: String },

    /// One of the devices or processes that work on a model together failed, or was lost.
    #[error("rank {rank} failed, seen by rank {seen_by} in {operation}: {failure}")]
    Rank { rank: usize, seen_by: usize, operation: String, failure: String },

    /// The user interrupted the run; its state is saved.
    #[error("interrupted; state saved in {}, run the same command again to go on", saved.display())]
    Interrupted { saved: PathBuf },
}

impl Error {
    /// Wraps an input/output error with the path it happened on.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }

    /// A malformed file.
    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>, tip: impl Into<String>) -> Error {
        Error::File { path: path.as_ref().to_path_buf(), problem: problem.into(), tip: tip.into() }
    }

    /// A request that cannot be carried out.
    pub fn usage(problem: impl Into<String>, tip: impl Into<String>) -> Error {
        Error::Usage { problem: problem.into(), tip: tip.into() }
    }

    /// 1 failed, 2 the recipe or the command is wrong, 130 interrupted with state saved.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Recipe { .. } | Error::Usage { .. } => 2,
            Error::Interrupted { .. } => 130,
            _ => 1,
        }
    }
}
