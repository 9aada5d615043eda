//! What a teacher is made of and what one of its tokens takes: parameters by part, operations, bytes.

use crate::models::DecoderConfig;
use crate::models::config::{FeedForwardConfig, Span};

/// How a weight is stored while the teacher runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    Bf16,
    Fp8,
}

impl WeightType {
    pub fn bytes(self) -> f64 {
        match self {
            WeightType::F32 => 4.0,
            WeightType::Bf16 => 2.0,
            WeightType::Fp8 => 1.0,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
            WeightType::Fp8 => "fp8",
        }
    }
}

/// Parameters and operations of a decoder's forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherWork {
    /// The embedding, a table that is looked up.
    pub embedding: f64,
    /// The head; 0 where it is the embedding.
    pub head: f64,
    /// What every token passes in the layers: attention, norms, routers, dense and shared feed-forward blocks.
    pub dense: f64,
    /// Routed experts.
    pub experts: f64,
    /// Parameters of the head as a product, tied or not.
    pub head_product: f64,
    /// Experts' parameters that one token multiplies.
    pub chosen_experts: f64,
    /// The largest layer: what every token passes in it, and one of its experts.
    pub largest_layer: f64,
    pub largest_expert: f64,
    /// Operations of one token: two for each weight it multiplies.
    pub product_flops: f64,
    /// Operations of one token's attention, by the mean number of keys that it sees.
    pub attention_flops: f64,
    /// Numbers of states and inner rows that one token's layers write beside products: norms, rotations, gates, sums.
    pub state_values: f64,
    pub layers: u64,
    pub hidden: u64,
    /// Widest inner row of a layer: queries, keys and values, or gate and up.
    pub inner: u64,
    pub vocab: u64,
    pub expert_layers: u64,
}

impl TeacherWork {
    /// The work of a model on sequences of `seq_len` tokens, each one document.
    pub fn new(config: &DecoderConfig, seq_len: u64) -> TeacherWork {
        let hidden = config.hidden_size as f64;
        let query = (config.heads.query_heads * config.heads.head_dim) as f64;
        let key = (config.heads.key_heads * config.heads.head_dim) as f64;
        let embedding = config.vocab_size as f64 * hidden;
        let mut work = TeacherWork {
            embedding,
            head: if config.tied { 0.0 } else { embedding },
            dense: 0.0,
            experts: 0.0,
            head_product: embedding,
            chosen_experts: 0.0,
            largest_layer: 0.0,
            largest_expert: 0.0,
            product_flops: 0.0,
            attention_flops: 0.0,
            state_values: 0.0,
            layers: config.layers.len() as u64,
            hidden: config.hidden_size as u64,
            inner: (query + 2.0 * key) as u64,
            vocab: config.vocab_size as u64,
            expert_layers: 0,
        };
        for layer in &config.layers {
            let mut dense = 2.0 * hidden + 2.0 * hidden * query + 2.0 * hidden * key;
            work.state_values += 6.0 * hidden + 3.0 * (query + key);
            match layer.feed_forward {
                FeedForwardConfig::Dense { width } => {
                    work.state_values += 3.0 * width as f64;
                    dense += 3.0 * hidden * width as f64;
                    work.inner = work.inner.max(2 * width as u64);
                }
                FeedForwardConfig::Experts { width, expert_count, chosen } => {
                    let expert = 3.0 * hidden * width as f64;
                    // Each chosen expert's row is gathered and its output added up.
                    work.state_values += (1 + chosen) as f64 * 3.0 * width as f64 + chosen as f64 * 8.0 * hidden;
                    dense += expert + expert_count as f64 * hidden;
                    work.experts += expert_count as f64 * expert;
                    work.chosen_experts += chosen as f64 * expert;
                    work.largest_expert = work.largest_expert.max(expert);
                    work.expert_layers += 1;
                    work.inner = work.inner.max(2 * width as u64);
                }
            }
            work.dense += dense;
            work.largest_layer = work.largest_layer.max(dense);
            work.attention_flops += 4.0 * query * mean_keys(layer.span, seq_len);
        }
        work.product_flops = 2.0 * (work.dense + work.chosen_experts + work.head_product);
        work
    }

    /// Parameters in all.
    pub fn total(&self) -> f64 {
        self.embedding + self.head + self.dense + self.experts
    }

    /// What one token is made of, by what takes its time: operations of products and of attention, numbers of states,
    /// logits.
    pub(super) fn amounts(&self) -> [f64; 4] {
        [self.product_flops, self.attention_flops, self.state_values, self.vocab as f64]
    }

    /// Operations of one token.
    pub fn flops(&self) -> f64 {
        self.product_flops + self.attention_flops
    }
}

/// Keys that a token sees on the mean over a sequence that is one document.
fn mean_keys(span: Span, seq_len: u64) -> f64 {
    let length = seq_len as f64;
    match span {
        Span::Full => (length + 1.0) / 2.0,
        Span::Chunk(chunk) => {
            let chunk = (chunk as f64).min(length);
            let (whole, rest) = ((length / chunk).floor(), length % chunk);
            (whole * chunk * (chunk + 1.0) + rest * (rest + 1.0)) / (2.0 * length)
        }
        Span::Window(window) => {
            let window = (window as f64).min(length);
            (window * (window + 1.0) / 2.0 + (length - window) * window) / length
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::models::llama4::shapes;

    #[test]
    fn keys_are_counted_as_one_by_one() {
        for (span, seen) in [
            (Span::Full, Box::new(|t: u64| t + 1) as Box<dyn Fn(u64) -> u64>),
            (Span::Chunk(5), Box::new(|t| t % 5 + 1)),
            (Span::Window(4), Box::new(|t| (t + 1).min(4))),
        ] {
            for length in [1u64, 4, 5, 17] {
                let mean = (0..length).map(&seen).sum::<u64>() as f64 / length as f64;
                assert!((mean_keys(span, length) - mean).abs() < 1e-12, "{span:?} {length}");
            }
        }
    }

    #[test]
    fn parts_add_up_to_the_published_counts() {
        for config in [shapes::scout(), shapes::maverick(), shapes::behemoth(), shapes::tiny()] {
            let config = config.decoder(Path::new("preset")).unwrap();
            let work = TeacherWork::new(&config, 8192);
            let (total, active) = config.parameter_counts();
            // The final norm is in the count, and in no product.
            assert_eq!(work.total() + work.hidden as f64, total as f64);
            let multiplied = active as f64 - work.hidden as f64 - work.embedding;
            assert_eq!(work.product_flops, 2.0 * multiplied);
        }
    }
}
