//! Documents in, packed sequences out: one deterministic, resumable order.
//!
//! ```text
//! DataSource (text, jsonl, parquet; a glob)  ->  documents  ->  Split (training | held out)
//!   ->  shuffled per source  ->  mixed by weight  ->  token ids  ->  PackedSequence
//! ```
//! Nothing here knows of models, caches or recipes, and no more than one shuffle window of text per source is in memory.

mod amount;
mod estimate;
mod loader;
mod packing;
mod read;
mod source;
mod split;
mod stream;

pub use amount::{deserialize_count, deserialize_optional_count, parse_count};
pub use estimate::{SourceCount, count};
pub use loader::{DataConfig, DataLoader, DocumentPosition, Position};
pub use packing::{Packer, pack};
pub use source::DataSource;
pub use split::{HeldOut, Side};
pub use stream::StreamPosition;

/// Every text of some sources, in the order of their files: what a tokenizer is trained on, for example.
///
/// # Errors
/// The sources are wrong as a whole; what is wrong with one record comes out of the iterator.
pub fn texts(
    sources: &[DataSource],
) -> crate::error::Result<impl Iterator<Item = crate::error::Result<String>> + Send> {
    let opened = source::open_all(sources, source::CHUNK_BYTES)?;
    Ok(opened.into_iter().flat_map(|source| {
        let chunks = source.chunks.clone();
        chunks.into_iter().flat_map(move |chunk| match source.read(chunk) {
            Ok(documents) => documents.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    }))
}
