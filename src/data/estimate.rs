//! How many tokens the sources have, from a small sample of them: what a plan needs to know.

use super::loader::DataConfig;
use super::source::{CHUNK_BYTES, OpenSource, open_all};
use super::split::document_tokens;
use crate::error::Result;
use crate::tokenizer::Tokenizer;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Sources up to this size are counted, larger ones estimated.
const COUNTED_BYTES: u64 = 16 << 20;
/// Chunks sampled of a larger source, spread evenly over it.
const SAMPLE_CHUNKS: usize = 16;
/// Bytes of text tokenised of each sampled chunk.
const SAMPLE_BYTES: usize = 256 << 10;

/// Size of one source, held-out documents included.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceCount {
    pub path: String,
    pub files: u64,
    /// On disk.
    pub bytes: u64,
    /// With at least one character.
    pub documents: u64,
    /// Of UTF-8 text.
    pub text_bytes: u64,
    /// With the tokenizer's document tokens.
    pub tokens: u64,
    /// Whether everything was counted; otherwise documents, text and tokens are projected from a sample.
    pub is_exact: bool,
}

/// Counts the documents and tokens of each source, or estimates them for sources above 16 MiB.
///
/// # Errors
/// As [`super::DataLoader::new`], and a sampled record that cannot be used.
pub fn count(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Vec<SourceCount>> {
    open_all(&config.sources, CHUNK_BYTES)?.iter().map(|source| count_source(source, tokenizer)).collect()
}

fn count_source(source: &OpenSource, tokenizer: &Tokenizer) -> Result<SourceCount> {
    let bytes = source.sizes.iter().sum();
    let is_exact = bytes <= COUNTED_BYTES;
    let step = if is_exact { 1 } else { source.chunks.len().div_ceil(SAMPLE_CHUNKS) };
    let (mut documents, mut text_bytes, mut tokens, mut size) = (0.0, 0.0, 0.0, 0.0);
    for &chunk in source.chunks.iter().step_by(step) {
        let texts = source.read(chunk)?;
        let chunk_bytes: usize = texts.iter().map(String::len).sum();
        let mut sampled_bytes = 0;
        let sample: Vec<&String> = texts
            .iter()
            .take_while(|text| {
                let wanted = is_exact || sampled_bytes < SAMPLE_BYTES;
                sampled_bytes += if wanted { text.len() } else { 0 };
                wanted
            })
            .collect();
        let sampled_tokens: usize =
            sample.par_iter().map(|text| Ok(document_tokens(tokenizer, text)?.len())).sum::<Result<usize>>()?;
        documents += texts.len() as f64;
        text_bytes += chunk_bytes as f64;
        if sampled_bytes > 0 {
            // A product first, so that a whole sample gives its count exactly.
            tokens += sampled_tokens as f64 * chunk_bytes as f64 / sampled_bytes as f64;
        }
        size += chunk.size() as f64;
    }
    let whole: f64 = source.chunks.iter().map(|chunk| chunk.size() as f64).sum();
    let scale = |sampled: f64| if is_exact { sampled.round() as u64 } else { (sampled * whole / size).round() as u64 };
    Ok(SourceCount {
        path: source.declared.path.clone(),
        files: source.files.len() as u64,
        bytes,
        documents: scale(documents),
        text_bytes: scale(text_bytes),
        tokens: scale(tokens),
        is_exact,
    })
}
