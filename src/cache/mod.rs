//! The soft-target cache: a directory of packed sequences with the teacher's targets beside them, written once and
//! read many times. The bytes are specified in `docs/cache-format.md`; this module mirrors that page.
//!
//! It knows nothing of models, recipes or text: token ids and [`SparseTargets`](crate::targets::SparseTargets) go in
//! and come out, and nothing is trusted whose hash does not agree.
//!
//! - [`CacheWriter`] seals shard after shard and survives being killed at any moment;
//! - [`CacheReader`] gives any sequence in constant time, as a [`TargetSource`](crate::targets::TargetSource);
//! - [`convert()`] writes a cache once more in another encoding, [`write_whole`] one from whatever gives sequences;
//! - [`Manifest`] says what a cache is, and [`Manifest::expect`] whether it is the one that is wanted.

mod codec;
mod convert;
mod histogram;
mod manifest;
mod progress;
mod raw;
mod reader;
mod rows;
mod settings;
mod shard;
mod summary;
mod verify;
mod writer;

pub use codec::Codec;
pub use convert::{WholeSequence, convert, write_whole};
pub use histogram::Histogram;
pub use manifest::{Counts, Expectation, FORMAT_VERSION, MANIFEST_FILE, Manifest, ShardRecord};
pub use progress::{Position, is_unfinished};
pub use reader::CacheReader;
pub use settings::{CacheSettings, Selection, SoftTargetSettings, TeacherIdentity, TokenizerIdentity};
pub use summary::{CaptureSummary, Part, Summary};
pub use verify::Verification;
pub use writer::CacheWriter;

/// The way out of a damaged cache.
pub(crate) const DAMAGED: &str = "copy it again from where it was made, or delete the cache directory and run `limbeck precompute-teacher-logits` again";
