//! A block with experts in pieces: what every token passes, and one expert at a time. For those who do not keep all
//! experts in memory; [`Layer`](super::Layer) is the block in one piece, and both give the same numbers.

use burn::tensor::{Device, Tensor, TensorData};
use limbeck_kernels::{rms_norm::rms_norm, swiglu::swiglu};

use super::{
    attention::{Attention, linear},
    config::{DecoderConfig, FeedForwardConfig},
    feed_forward::{Mlp, block_name, choose, scores},
    layout::TokenLayout,
    parameter::{WeightSource, load, load_row},
};
use crate::error::Result;

/// A block without its routed experts.
#[derive(Debug, Clone)]
pub struct RoutedLayer {
    input_norm: Tensor<1>,
    attention: Attention,
    post_attention_norm: Tensor<1>,
    router: Tensor<2>,
    shared: Mlp,
    chosen: usize,
    eps: f32,
}

/// One routed expert.
#[derive(Debug, Clone)]
pub struct Expert {
    /// `[hidden, 2 * width]`, gate half first.
    gate_up: Tensor<2>,
    /// `[width, hidden]`
    down: Tensor<2>,
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
    /// Loads block `index` without its routed experts.
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
        let norm = |name: &str| load(source, &format!("{prefix}{name}.weight"), [hidden], device);
        Ok(RoutedLayer {
            input_norm: norm("input_layernorm")?,
            attention: Attention::load(config, layer, &format!("{prefix}self_attn."), source, device)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            router: load(source, &format!("{block}router.weight"), [expert_count, hidden], device)?,
            shared: Mlp::load(hidden, width, &format!("{block}shared_expert."), source, device)?,
            chosen,
            eps: config.rms_norm_eps,
        })
    }

    /// The hidden states after the attention half.
    ///
    /// # Shapes
    /// - `hidden` and result `[N, hidden]`
    pub fn attend(&self, hidden: Tensor<2>, layout: &TokenLayout) -> Tensor<2> {
        let normed = rms_norm(hidden.clone(), self.input_norm.clone(), self.eps);
        hidden + self.attention.forward(normed, layout)
    }

    /// Where the tokens go, from their hidden states after the attention half.
    ///
    /// # Shapes
    /// - `attended` `[N, hidden]`
    pub fn choose(&self, attended: Tensor<2>) -> Choices {
        let logits = linear(self.normed(attended), &self.router);
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
        let scores = Tensor::<2>::from_data(TensorData::new(scores, [attended.dims()[0], 1]), &attended.device());
        let inner = swiglu((self.normed(attended) * scores).matmul(expert.gate_up.clone()));
        inner.matmul(expert.down.clone())
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
        let stack = |name: &str, shape| load_row(source, &format!("{block}{name}"), shape, expert, device);
        Ok(Expert {
            gate_up: stack("gate_up_proj", [expert_count, hidden, 2 * width])?,
            down: stack("down_proj", [expert_count, width, hidden])?,
        })
    }
}
