//! A block with experts in pieces: what every token passes, and one expert at a time. For those who do not keep all
//! experts in memory; [`Layer`](super::Layer) is the block in one piece, and both give the same numbers.

use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::{rms_norm::rms_norm, swiglu::swiglu};

use super::{
    attention::Attention,
    config::{DecoderConfig, FeedForwardConfig},
    feed_forward::{Mlp, block_name, choose, scores},
    layout::TokenLayout,
    linear::{Linear, Stack, Weights},
    packed_block,
    parameter::{Spare, WeightSource},
};
use crate::error::Result;

/// A block without its routed experts.
#[derive(Debug, Clone)]
pub struct RoutedLayer {
    input_norm: Tensor<1>,
    attention: Attention,
    post_attention_norm: Tensor<1>,
    router: Linear,
    shared: Mlp,
    chosen: usize,
    eps: f32,
}

/// One routed expert.
#[derive(Debug, Clone)]
pub struct Expert {
    /// One matrix `[hidden, 2 * width]`, gate half first.
    gate_up: Stack,
    /// One matrix `[width, hidden]`.
    down: Stack,
}

/// Where a batch of tokens goes.
#[derive(Debug, Clone)]
pub struct Choices {
    /// `[N, chosen]` row-major expert numbers, largest logit first.
    pub experts: Vec<u32>,
    /// `[N, chosen]`: what each choice multiplies the expert's input by.
    pub scores: Vec<f32>,
}

impl RoutedLayer {
    /// Loads block `index` without its routed experts, never to be trained.
    ///
    /// # Panics
    /// When the block has no experts.
    pub fn load(config: &DecoderConfig, index: usize, source: &dyn WeightSource, device: &Device) -> Result<Self> {
        let (layer, hidden) = (&config.layers[index], config.hidden_size);
        let FeedForwardConfig::Experts { width, expert_count, chosen } = layer.feed_forward else {
            panic!("block {index} has no experts");
        };
        let prefix = format!("model.layers.{index}.");
        let block = format!("{prefix}{}", block_name(config.names));
        let weights = Weights::for_inference(source, device);
        let norm = |name: &str| weights.vector(&format!("{prefix}{name}.weight"), hidden);
        Ok(RoutedLayer {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(config, layer, &format!("{prefix}self_attn."), weights)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            router: weights.exact().linear(&format!("{block}router.weight"), [expert_count, hidden])?,
            shared: Mlp::load(hidden, width, &format!("{block}shared_expert."), weights)?,
            chosen,
            eps: config.rms_norm_eps,
        })
    }

    /// The hidden states after the attention half.
    ///
    /// # Shapes
    /// - `hidden` and result `[N, hidden]`
    pub fn attend(&self, hidden: Tensor<2>, layout: &TokenLayout) -> Tensor<2> {
        packed_block::attended(hidden, &self.attention, (&self.input_norm, self.eps), layout)
    }

    /// What the attention half adds to the hidden states.
    ///
    /// # Shapes
    /// - `hidden` and result `[N, hidden]`
    pub fn attention_update(&self, hidden: Tensor<2>, layout: &TokenLayout) -> Tensor<2> {
        packed_block::attention_update(hidden, &self.attention, (&self.input_norm, self.eps), layout)
    }

    /// Where the tokens go, from their hidden states after the attention half.
    ///
    /// # Shapes
    /// - `attended` `[N, hidden]`
    pub fn choose(&self, attended: Tensor<2>) -> Choices {
        let logits = self.router.forward(self.normed(attended));
        let experts = choose(&logits, self.chosen);
        let scores = scores(&logits, &experts, self.chosen).into_data();
        Choices { experts, scores: scores.try_into_vec::<f32>().expect("scores are f32") }
    }

    /// What the shared expert gives; the first summand of a token's update.
    ///
    /// # Shapes
    /// - `attended` and result `[N, hidden]`
    pub fn shared(&self, attended: Tensor<2>) -> Tensor<2> {
        self.shared.forward(self.normed(attended))
    }

    /// What a routed expert gives; added to a token's update in the order of the experts' numbers.
    ///
    /// # Shapes
    /// - `attended` `[N, hidden]`, `scores` `[N]`, result `[N, hidden]`
    pub fn routed(&self, expert: &Expert, attended: Tensor<2>, scores: Vec<f32>) -> Tensor<2> {
        let rows = attended.dims()[0];
        let scores = Tensor::<2>::from_data(TensorData::new(scores, [rows, 1]), &attended.device());
        let all = Arc::new(vec![0, rows]);
        let inner = swiglu(expert.gate_up.forward(self.normed(attended) * scores, all.clone()));
        expert.down.forward(inner, all)
    }

    fn normed(&self, attended: Tensor<2>) -> Tensor<2> {
        rms_norm(attended, self.post_attention_norm.clone(), self.eps)
    }
}

impl Expert {
    /// Loads expert `expert` of block `index` alone.
    ///
    /// # Panics
    /// When the block has no experts.
    pub fn load(
        config: &DecoderConfig,
        index: usize,
        expert: usize,
        source: &dyn WeightSource,
        device: &Device,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let FeedForwardConfig::Experts { width, expert_count, .. } = config.layers[index].feed_forward else {
            panic!("block {index} has no experts");
        };
        let block = format!("model.layers.{index}.{}experts.", block_name(config.names));
        let weights = Weights::for_inference(source, device);
        let stack = |name: &str, shape| weights.stack_rows(&format!("{block}{name}"), shape, expert..expert + 1);
        Ok(Expert {
            gate_up: stack("gate_up_proj", [expert_count, hidden, 2 * width])?,
            down: stack("down_proj", [expert_count, width, hidden])?,
        })
    }

    /// Puts what it takes of memory where those that are loaded next can have it.
    pub fn give_back(self, spare: &Spare) {
        [self.gate_up, self.down].into_iter().flat_map(Stack::into_packed).for_each(|matrix| spare.put(matrix));
    }
}
