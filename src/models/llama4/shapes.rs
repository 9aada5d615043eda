//! The family's shapes. Scout and Maverick are Meta's published configurations; Behemoth is this project's assumption.

use super::Llama4Config;
use crate::models::config::{AttentionTemperature, Llama3Scaling};

fn rotary_layers(count: usize, interval: usize) -> Vec<bool> {
    (0..count).map(|layer| !(layer + 1).is_multiple_of(interval)).collect()
}

/// Llama 4 Scout: 17B active of 109B, 16 experts in every layer, query-key norm.
pub fn scout() -> Llama4Config {
    Llama4Config {
        hidden_size: 5120,
        num_hidden_layers: 48,
        num_attention_heads: 40,
        num_key_value_heads: 8,
        head_dim: 128,
        intermediate_size: 8192,
        intermediate_size_mlp: 16_384,
        num_local_experts: 16,
        num_experts_per_tok: 1,
        moe_layers: (0..48).collect(),
        rotary_layers: rotary_layers(48, 4),
        attention_chunk_size: 8192,
        use_qk_norm: true,
        temperature: Some(AttentionTemperature { scale: 0.1, floor_scale: 8192.0 }),
        rope_theta: 500_000.0,
        rope_scaling: Some(Llama3Scaling {
            factor: 16.0,
            low_freq_factor: 1.0,
            high_freq_factor: 1.0,
            original_max_position: 8192.0,
        }),
        max_position_embeddings: 10_485_760,
        rms_norm_eps: 1e-5,
        vocab_size: 202_048,
        tie_word_embeddings: false,
        initializer_range: 0.02,
        router_aux_loss_coef: 0.001,
        bos_token_id: Some(200_000),
        eos_token_ids: vec![200_001, 200_007, 200_008],
    }
}

/// Llama 4 Maverick: 17B active of 400B, 128 experts in every second layer, no query-key norm.
pub fn maverick() -> Llama4Config {
    Llama4Config {
        num_local_experts: 128,
        moe_layers: (1..48).step_by(2).collect(),
        use_qk_norm: false,
        rope_scaling: None,
        max_position_embeddings: 1_048_576,
        ..scout()
    }
}

/// An assumption, not Meta's: Behemoth was never released. Only 288B active, 16 experts and nearly 2T in all are
/// public; this shape meets them (287.7B and 1.979T) and takes everything else from Scout.
pub fn behemoth() -> Llama4Config {
    let layers = 128;
    Llama4Config {
        hidden_size: 14_336,
        num_hidden_layers: layers,
        num_attention_heads: 112,
        intermediate_size: 20_480,
        intermediate_size_mlp: 40_960,
        moe_layers: (0..layers).collect(),
        rotary_layers: rotary_layers(layers, 4),
        ..scout()
    }
}

/// A Scout small enough for a laptop: the quick start's student before its recipe changes anything.
pub fn tiny() -> Llama4Config {
    let layers = 4;
    Llama4Config {
        hidden_size: 128,
        num_hidden_layers: layers,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        intermediate_size: 176,
        intermediate_size_mlp: 352,
        num_local_experts: 4,
        moe_layers: (0..layers).collect(),
        rotary_layers: rotary_layers(layers, 4),
        attention_chunk_size: 64,
        max_position_embeddings: 4096,
        vocab_size: 2048,
        bos_token_id: None,
        eos_token_ids: vec![],
        ..scout()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn presets_have_the_published_parameter_counts() {
        let counts = |config: Llama4Config| config.decoder(Path::new("preset")).unwrap().parameter_counts();
        // 871,932,416 of Scout's and Maverick's published totals are vision tower and projector.
        assert_eq!(counts(scout()), (108_641_793_536 - 871_932_416, 17_172_894_720));
        assert_eq!(counts(maverick()), (401_583_781_376 - 871_932_416, 17_184_691_200));
        let (total, active) = counts(behemoth());
        let billions = |count: u64| (count as f64 / 1e8).round() / 10.0;
        assert_eq!((billions(total).round(), billions(active)), (1979.0, 287.7));
    }

    #[test]
    fn written_configurations_read_back() {
        for config in [scout(), maverick(), behemoth(), tiny()] {
            assert_eq!(Llama4Config::from_json(Path::new("preset"), &config.to_json()).unwrap(), config);
        }
    }
}
