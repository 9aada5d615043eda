//! The two ends of a model in pieces: rows of the embedding, the final norm, blocks of the head. For those who do not
//! keep a whole vocabulary in memory; [`Decoder`](super::Decoder) has them in one piece.

use std::{ops::Range, sync::Arc};

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::rms_norm::rms_norm;

use super::{
    config::DecoderConfig,
    linear::{Linear, Weights},
    parameter::WeightSource,
};
use crate::error::Result;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Rows of the embedding, for token ids in a row; rounded where those of a model loaded for inference are.
///
/// # Shapes
/// - result `[ids, hidden]` row-major
pub fn embedding_rows(
    config: &DecoderConfig,
    source: &dyn WeightSource,
    ids: Range<usize>,
    device: &Device,
) -> Result<Vec<f32>> {
    let mut rows = source.load_rows(EMBEDDING, &[config.vocab_size, config.hidden_size], ids)?;
    Weights::for_inference(source, device).round(&mut rows);
    Ok(rows)
}

/// The embedding's rows for token ids in a row.
#[derive(Debug, Clone)]
pub struct EmbeddingBlock {
    weight: Linear,
    ids: Range<usize>,
}

impl EmbeddingBlock {
    pub fn load(config: &DecoderConfig, ids: Range<usize>, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let shape = [config.vocab_size, config.hidden_size];
        let weight = Weights::for_inference(source, device).linear_rows(EMBEDDING, shape, ids.clone())?;
        Ok(EmbeddingBlock { weight, ids })
    }

    /// The rows of some tokens; zeros for those whose ids are not in the block.
    ///
    /// # Shapes
    /// - result `[tokens, hidden]`
    pub fn rows(&self, tokens: &[u32]) -> Tensor<2> {
        let is_own = |id: &u32| self.ids.contains(&(*id as usize));
        let numbers = tokens.iter().map(|id| if is_own(id) { id - self.ids.start as u32 } else { 0 });
        let rows = self.weight.rows(&Arc::new(numbers.collect()));
        if tokens.iter().all(is_own) {
            return rows;
        }
        let own: Vec<f32> = tokens.iter().map(|id| if is_own(id) { 1.0 } else { 0.0 }).collect();
        let own = Tensor::<2>::from_data(TensorData::new(own, [tokens.len(), 1]), &rows.device());
        rows * own
    }

    /// The same weights as a block of the head, for models whose head is the embedding; shares their memory.
    pub fn head(&self) -> HeadBlock {
        HeadBlock { weight: self.weight.clone() }
    }
}

/// The norm between the last block and the head.
#[derive(Debug, Clone)]
pub struct FinalNorm {
    weight: Tensor<1>,
    eps: f32,
}

impl FinalNorm {
    pub fn load(config: &DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let weight = Weights::for_inference(source, device).vector("model.norm.weight", config.hidden_size)?;
        Ok(FinalNorm { weight, eps: config.rms_norm_eps })
    }

    /// # Shapes
    /// - `hidden` and result `[N, hidden]`
    pub fn forward(&self, hidden: Tensor<2>) -> Tensor<2> {
        rms_norm(hidden, self.weight.clone(), self.eps)
    }
}

/// The head's rows for token ids in a row.
#[derive(Debug, Clone)]
pub struct HeadBlock {
    weight: Linear,
}

impl HeadBlock {
    pub fn load(config: &DecoderConfig, ids: Range<usize>, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let name = if config.tied { EMBEDDING } else { "lm_head.weight" };
        let shape = [config.vocab_size, config.hidden_size];
        Ok(HeadBlock { weight: Weights::for_inference(source, device).linear_rows(name, shape, ids)? })
    }

    /// # Shapes
    /// - `hidden` `[N, hidden]` after the final norm, result `[N, ids]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.weight.forward(hidden)
    }
}
