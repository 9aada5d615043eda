//! The two ends of a model in pieces: rows of the embedding, the final norm, blocks of the head. For those who do not
//! keep a whole vocabulary in memory; [`Decoder`](super::Decoder) has them in one piece.

use std::ops::Range;

use burn::tensor::{Device, Tensor};
use limbeck_kernels::rms_norm::rms_norm;

use super::{
    config::DecoderConfig,
    linear::{Linear, Weights},
    parameter::WeightSource,
};
use crate::error::Result;

const EMBEDDING: &str = "model.embed_tokens.weight";

/// Rows of the embedding, for token ids in a row.
///
/// # Shapes
/// - result `[ids, hidden]` row-major
pub fn embedding_rows(config: &DecoderConfig, source: &dyn WeightSource, ids: Range<usize>) -> Result<Vec<f32>> {
    source.load_rows(EMBEDDING, &[config.vocab_size, config.hidden_size], ids)
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
