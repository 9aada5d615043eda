//! The decoder: embedding, blocks, final norm and head, each usable on its own.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use limbeck_kernels::{gather_rows::gather_rows, rms_norm::rms_norm};

use super::{
    attention::{Attention, linear},
    config::DecoderConfig,
    feed_forward::{FeedForward, Routing},
    layout::TokenLayout,
    parameter::{CheckpointWeights, ParameterRef, WeightSource, load},
    read_config,
};
use crate::{checkpoint::CheckpointReader, error::Result};

/// A model with all its weights on one device.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub config: DecoderConfig,
    embedding: Tensor<2>,
    layers: Vec<Layer>,
    final_norm: Tensor<1>,
    /// `None` when tied to the embedding.
    head: Option<Tensor<2>>,
}

/// One transformer block.
#[derive(Debug, Clone)]
pub struct Layer {
    input_norm: Tensor<1>,
    attention: Attention,
    post_attention_norm: Tensor<1>,
    feed_forward: FeedForward,
    eps: f32,
}

/// What a block gives.
#[derive(Debug)]
pub struct LayerOutput {
    /// `[N, hidden]`
    pub hidden: Tensor<2>,
    /// Where its router sent the tokens, for blocks that have one.
    pub routing: Option<Routing>,
}

impl Layer {
    /// Loads block `index` alone.
    pub fn load(config: &DecoderConfig, index: usize, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let prefix = layer_prefix(index);
        let layer = &config.layers[index];
        let norm = |name: &str| load(source, &format!("{prefix}{name}.weight"), [config.hidden_size], device);
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(config, layer, &format!("{prefix}self_attn."), source, device)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::load(config, &layer.feed_forward, &prefix, source, device)?,
            eps: config.rms_norm_eps,
        })
    }

    /// # Shapes
    /// - `hidden` `[N, hidden]`
    pub fn forward(&self, hidden: Tensor<2>, layout: &TokenLayout) -> LayerOutput {
        let normed = rms_norm(hidden.clone(), self.input_norm.clone(), self.eps);
        let hidden = hidden + self.attention.forward(normed, layout);
        let normed = rms_norm(hidden.clone(), self.post_attention_norm.clone(), self.eps);
        let (update, routing) = self.feed_forward.forward(normed);
        LayerOutput { hidden: hidden + update, routing }
    }
}

fn layer_prefix(index: usize) -> String {
    format!("model.layers.{index}.")
}

impl Decoder {
    /// Opens a checkpoint with all its weights. A tracked device makes the weights trainable.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let reader = CheckpointReader::open(path)?;
        let config = read_config(reader.config_path(), reader.config())?;
        Self::load(config, &CheckpointWeights::new(&reader), device)
    }

    /// Loads all weights from a source.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = load(source, "model.embed_tokens.weight", [vocab, hidden], device)?;
        let layers =
            (0..config.layers.len()).map(|i| Layer::load(&config, i, source, device)).collect::<Result<Vec<_>>>()?;
        let final_norm = load(source, "model.norm.weight", [hidden], device)?;
        let head = match config.tied {
            true => None,
            false => Some(load(source, "lm_head.weight", [vocab, hidden], device)?),
        };
        Ok(Decoder { config, embedding, layers, final_norm, head })
    }

    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// # Shapes
    /// - result `[N, hidden]`
    pub fn embed(&self, layout: &TokenLayout) -> Tensor<2> {
        gather_rows(self.embedding.clone(), layout.ids.clone())
    }

    pub fn layer(&self, index: usize, hidden: Tensor<2>, layout: &TokenLayout) -> LayerOutput {
        self.layers[index].forward(hidden, layout)
    }

    pub fn final_norm(&self, hidden: Tensor<2>) -> Tensor<2> {
        rms_norm(hidden, self.final_norm.clone(), self.config.rms_norm_eps)
    }

    /// # Shapes
    /// - result `[V, hidden]`
    pub fn lm_head(&self) -> Tensor<2> {
        self.head.clone().unwrap_or_else(|| self.embedding.clone())
    }

    /// All blocks and the final norm: what the head multiplies, and the routing of each block with experts.
    ///
    /// # Shapes
    /// - result `[N, hidden]`
    pub fn forward(&self, layout: &TokenLayout) -> (Tensor<2>, Vec<Routing>) {
        let mut hidden = self.embed(layout);
        let mut routings = Vec::new();
        for layer in &self.layers {
            let output = layer.forward(hidden, layout);
            hidden = output.hidden;
            routings.extend(output.routing);
        }
        (self.final_norm(hidden), routings)
    }

    /// # Shapes
    /// - `hidden` `[N, hidden]` after the final norm, result `[N, V]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        linear(hidden, &self.lm_head())
    }

    /// Every weight under its checkpoint name, in a fixed order.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&str, ParameterRef<'_>)) {
        let names = self.config.names;
        visitor("model.embed_tokens.weight", ParameterRef::Matrix(&mut self.embedding));
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let prefix = layer_prefix(index);
            visitor(&format!("{prefix}input_layernorm.weight"), ParameterRef::Vector(&mut layer.input_norm));
            layer.attention.visit(&format!("{prefix}self_attn."), visitor);
            let norm = &mut layer.post_attention_norm;
            visitor(&format!("{prefix}post_attention_layernorm.weight"), ParameterRef::Vector(norm));
            layer.feed_forward.visit(&prefix, names, visitor);
        }
        visitor("model.norm.weight", ParameterRef::Vector(&mut self.final_norm));
        if let Some(head) = &mut self.head {
            visitor("lm_head.weight", ParameterRef::Matrix(head));
        }
    }

    /// The same weights outside any graph, for evaluation; shares their memory.
    pub fn frozen(&self) -> Self {
        let mut copy = self.clone();
        copy.visit(&mut |_, mut parameter| {
            let (flat, shape) = (parameter.flat(), parameter.shape());
            parameter.set(flat, &shape, false);
        });
        copy
    }
}
