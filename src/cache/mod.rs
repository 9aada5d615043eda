//! The soft-target cache: a directory of packed sequences with the teacher's targets beside them, written once and
//! read many times. The bytes are specified in `docs/cache-format.md`; this module mirrors that page.
//!
//! It knows nothing of models, recipes or text: token ids and [`SparseTargets`](crate::targets::SparseTargets) go in
//! and come out, and nothing is trusted whose hash does not agree.
//!
//! - [`CacheWriter`] seals shard after shard, beside other writers and being killed at any moment;
//! - [`merge`] makes one cache of parts that were written in several directories;
//! - [`CacheReader`] gives any sequence in constant time, as a [`TargetSource`](crate::targets::TargetSource), from a
//!   directory, an address ([`CacheReader::open_url`]) or any other [`CacheFiles`];
//! - [`convert()`] writes a cache once more in another encoding, [`write_whole`] one from whatever gives sequences;
//! - [`Reuse`] finds targets that other caches have;
//! - [`Manifest`] says what a cache is, and [`Manifest::expect`] whether it is the one that is wanted.

mod assignment;
mod bits;
mod blocks;
mod calibrate;
mod calibration;
mod codec;
mod coder;
mod compact;
mod convert;
mod direction;
mod exact_math;
#[cfg(test)]
mod fuzz_tests;
mod histogram;
mod lease;
mod location;
mod manifest;
mod merge;
mod model;
mod narrow;
#[cfg(feature = "object-store")]
mod object_files;
mod owner;
mod packed;
mod part;
mod quantizer;
#[cfg(feature = "object-store")]
mod range_store;
#[cfg(test)]
mod ranked;
mod rans;
mod raw;
mod reader;
mod record;
#[cfg(test)]
mod record_tests;
mod records;
mod reuse;
mod row_ids;
mod rows;
mod scale;
mod sealing;
mod settings;
mod shard;
mod source;
mod summary;
mod unfinished;
mod verify;
mod walk;
mod writer;

pub use blocks::BLOCK_BYTES;
pub use codec::Codec;
pub use convert::{Conversion, WholeSequence, convert, write_whole};
pub use histogram::Histogram;
pub use location::{inside, is_url};
pub use manifest::{
    CoderRecord, Counts, Expectation, FORMAT_VERSION, MANIFEST_FILE, Manifest, OLDEST_VERSION, QuantiserError,
    ShardRecord,
};
pub use merge::merge;
#[cfg(feature = "object-store")]
pub use object_files::{ObjectCounts, ObjectFiles, ObjectOptions};
pub use part::WriterPart;
pub use reader::CacheReader;
pub use reuse::Reuse;
pub use sealing::{Missing, Outcome};
pub use settings::{
    CacheSettings, RouterSettings, Selection, SoftTargetSettings, TeacherIdentity, TokenizerIdentity, TrainingSteps,
};
pub use source::{CacheFiles, LocalFiles, ShardSource};
pub use summary::{CaptureSummary, Part, Summary};
pub use unfinished::{Position, is_unfinished};
pub use verify::Verification;
pub use writer::{CacheWriter, Next};

/// The way out of a damaged cache.
pub(crate) const DAMAGED: &str = "copy it again from where it was made, or delete the cache directory and run `limbeck precompute-teacher-logits` again";
