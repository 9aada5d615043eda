//! The decoder: embedding, blocks, final norm and head, each usable on its own.

use std::path::Path;

use burn::tensor::{Device, Tensor};
use limbeck_kernels::{
    packed_matmul::{Instructions, PackedMatrix},
    rms_norm::rms_norm,
};

use super::{
    attention::Attention,
    config::DecoderConfig,
    feed_forward::{FeedForward, Routing},
    layout::TokenLayout,
    linear::{Linear, Weights},
    packed_block,
    parameter::{CheckpointWeights, ParameterRef, WeightSource},
    read_config,
};
use crate::{checkpoint::CheckpointReader, error::Result, profile::stage};

/// A model with all its weights on one device.
#[derive(Debug, Clone)]
pub struct Decoder {
    pub config: DecoderConfig,
    embedding: Linear,
    layers: Vec<Layer>,
    final_norm: Tensor<1>,
    /// `None` when tied to the embedding.
    head: Option<Linear>,
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
    /// Loads block `index` alone. A tracked device makes its weights trainable.
    pub fn load(config: &DecoderConfig, index: usize, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        Self::load_as(config, index, Weights::tensors(source, device))
    }

    /// Loads block `index` alone, never to be trained; see [`Decoder::load_for_inference`].
    pub fn load_for_inference(
        config: &DecoderConfig,
        index: usize,
        source: &dyn WeightSource,
        device: &Device,
    ) -> Result<Self> {
        Self::load_as(config, index, Weights::for_inference(source, device))
    }

    fn load_as(config: &DecoderConfig, index: usize, weights: Weights<'_>) -> Result<Self> {
        let prefix = layer_prefix(index);
        let layer = &config.layers[index];
        let norm = |name: &str| weights.vector(&format!("{prefix}{name}.weight"), config.hidden_size);
        Ok(Layer {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(config, layer, &format!("{prefix}self_attn."), weights)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::load(config, &layer.feed_forward, &prefix, weights)?,
            eps: config.rms_norm_eps,
        })
    }

    /// # Shapes
    /// - `hidden` `[N, hidden]`
    pub fn forward(&self, hidden: Tensor<2>, layout: &TokenLayout) -> LayerOutput {
        let hidden = match packed_block::block(hidden, self.norms(), &self.attention, &self.feed_forward, layout) {
            Ok(hidden) => return LayerOutput { hidden, routing: None },
            Err(hidden) => {
                let _span = stage("attention");
                packed_block::attended(hidden, &self.attention, self.norms()[0], layout)
            }
        };
        let (update, routing) = self.feed_forward_update(hidden.clone());
        LayerOutput { hidden: hidden + update, routing }
    }

    /// What the attention half adds to the hidden states.
    ///
    /// # Shapes
    /// - `hidden` and result `[N, hidden]`
    pub fn attention_update(&self, hidden: Tensor<2>, layout: &TokenLayout) -> Tensor<2> {
        let _span = stage("attention");
        packed_block::attention_update(hidden, &self.attention, self.norms()[0], layout)
    }

    /// What the feed-forward half adds to the hidden states after the attention half.
    ///
    /// # Shapes
    /// - `attended` and result `[N, hidden]`
    pub fn feed_forward_update(&self, attended: Tensor<2>) -> (Tensor<2>, Option<Routing>) {
        let _span = stage(self.feed_forward.name());
        packed_block::feed_forward_update(attended, &self.feed_forward, self.norms()[1])
    }

    /// Those before the attention and before the feed-forward half.
    fn norms(&self) -> [packed_block::Norm<'_>; 2] {
        [(&self.input_norm, self.eps), (&self.post_attention_norm, self.eps)]
    }
}

fn open_checkpoint(path: &Path) -> Result<(CheckpointReader, DecoderConfig)> {
    let reader = CheckpointReader::open(path)?;
    let config = read_config(reader.config_path(), reader.config())?;
    Ok((reader, config))
}

fn layer_prefix(index: usize) -> String {
    format!("model.layers.{index}.")
}

impl Decoder {
    /// Opens a checkpoint with all its weights. A tracked device makes the weights trainable.
    pub fn open(path: &Path, device: &Device) -> Result<Self> {
        let (reader, config) = open_checkpoint(path)?;
        Self::load(config, &CheckpointWeights::new(&reader), device)
    }

    /// Opens a checkpoint directory, never to be trained; see [`Decoder::load_for_inference`].
    pub fn open_for_inference(dir: &Path, device: &Device) -> Result<Self> {
        let (reader, config) = open_checkpoint(dir)?;
        Self::load_for_inference(config, &CheckpointWeights::new(&reader), device)
    }

    /// Loads all weights from a source.
    pub fn load(config: DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        Self::load_as(config, Weights::tensors(source, device))
    }

    /// Loads all weights to be run and never trained. On the processor they are packed: what a sequence comes to does
    /// then not depend on those it is run with, and weights that bfloat16 holds exactly take two bytes.
    pub fn load_for_inference(config: DecoderConfig, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        tracing::debug!("packed matrices are multiplied by {}", Instructions::best());
        if let Err(why) = Instructions::amx() {
            tracing::debug!("bfloat16 is not multiplied by AMX: {why}");
        }
        Self::load_as(config, Weights::for_inference(source, device))
    }

    fn load_as(config: DecoderConfig, weights: Weights<'_>) -> Result<Self> {
        let _span = stage("load weights");
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let embedding = weights.linear("model.embed_tokens.weight", [vocab, hidden])?;
        let layers = (0..config.layers.len()).map(|i| Layer::load_as(&config, i, weights)).collect::<Result<_>>()?;
        let final_norm = weights.vector("model.norm.weight", hidden)?;
        let head = match config.tied {
            true => None,
            false => Some(weights.linear("lm_head.weight", [vocab, hidden])?),
        };
        Ok(Decoder { config, embedding, layers, final_norm, head })
    }

    pub fn layer_count(&self) -> usize {
        self.layers.len()
    }

    /// # Shapes
    /// - result `[N, hidden]`
    pub fn embed(&self, layout: &TokenLayout) -> Tensor<2> {
        self.embedding.rows(&layout.ids)
    }

    pub fn layer(&self, index: usize, hidden: Tensor<2>, layout: &TokenLayout) -> LayerOutput {
        let _span = stage("layer").with("index", index as u64);
        self.layers[index].forward(hidden, layout)
    }

    pub fn final_norm(&self, hidden: Tensor<2>) -> Tensor<2> {
        rms_norm(hidden, self.final_norm.clone(), self.config.rms_norm_eps)
    }

    fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The head's weights, where they are packed.
    pub fn packed_head(&self) -> Option<&PackedMatrix> {
        self.head().packed()
    }

    /// The head's weights; a copy of them when they are packed.
    ///
    /// # Shapes
    /// - result `[V, hidden]`
    pub fn lm_head(&self) -> Tensor<2> {
        self.head().tensor()
    }

    /// All blocks and the final norm: what the head multiplies, and the routing of each block with experts.
    ///
    /// # Shapes
    /// - result `[N, hidden]`
    pub fn forward(&self, layout: &TokenLayout) -> (Tensor<2>, Vec<Routing>) {
        let mut hidden = self.embed(layout);
        let mut routings = Vec::new();
        for index in 0..self.layers.len() {
            let output = self.layer(index, hidden, layout);
            hidden = output.hidden;
            routings.extend(output.routing);
        }
        (self.final_norm(hidden), routings)
    }

    /// # Shapes
    /// - `hidden` `[N, hidden]` after the final norm, result `[N, V]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.head().forward(hidden)
    }

    /// Every weight under its checkpoint name, in a fixed order.
    ///
    /// # Panics
    /// When the model was loaded for inference and its weights are packed.
    pub fn visit(&mut self, visitor: &mut dyn FnMut(&str, ParameterRef<'_>)) {
        let names = self.config.names;
        visitor("model.embed_tokens.weight", self.embedding.parameter());
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
            visitor("lm_head.weight", head.parameter());
        }
    }

    /// What is added to the scores of experts where they are chosen, for each block that has some; nothing for an empty
    /// list. No part of the weights: a checkpoint has none of it.
    pub fn set_selection_biases(&mut self, biases: &[Vec<f32>]) {
        let mut blocks = biases.iter();
        for layer in &mut self.layers {
            if let FeedForward::Experts(experts) = &mut layer.feed_forward {
                experts.set_selection_bias(blocks.next().cloned());
            }
        }
    }

    /// The same weights outside any graph, for evaluation; shares their memory.
    ///
    /// # Panics
    /// As [`Decoder::visit`].
    pub fn frozen(&self) -> Self {
        let mut copy = self.clone();
        copy.visit(&mut |_, mut parameter| {
            let (flat, shape) = (parameter.flat(), parameter.shape());
            parameter.set(flat, &shape, false);
        });
        copy
    }
}
