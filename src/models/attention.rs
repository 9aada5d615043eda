//! Attention of one block: projections, rotation, query-key norm, temperature, and the attention itself.

use burn::tensor::{Tensor, TensorData};
use limbeck_kernels::{
    attention::{Heads, attention},
    packed_layer::{AttentionHalf, HeadNorm},
    rms_norm::{rms_norm, unit_rms},
    rotary::rotary,
};

use super::{
    config::{AttentionTemperature, DecoderConfig, LayerConfig, QueryKeyNorm, Span},
    layout::TokenLayout,
    linear::{Linear, Weights},
    packed_block,
    parameter::ParameterRef,
};
use crate::error::Result;

/// The weights of one attention block; linear weights are `[out, in]`.
#[derive(Debug, Clone)]
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    /// Query, key and value biases.
    biases: Option<[Tensor<1>; 3]>,
    /// Query and key norm weights.
    norms: Option<[Tensor<1>; 2]>,
    settings: Settings,
}

/// Biases, norms and temperatures as numbers.
pub(super) struct Vectors {
    biases: Option<[Vec<f32>; 3]>,
    norms: Option<[Vec<f32>; 2]>,
    scales: Option<Vec<f32>>,
}

#[derive(Debug, Clone)]
struct Settings {
    heads: Heads,
    eps: f32,
    rotary: bool,
    span: Span,
    query_key_norm: QueryKeyNorm,
    temperature: Option<AttentionTemperature>,
}

impl Attention {
    pub fn load(config: &DecoderConfig, layer: &LayerConfig, prefix: &str, weights: Weights<'_>) -> Result<Self> {
        let (hidden, heads) = (config.hidden_size, config.heads);
        let (query, key) = (heads.query_heads * heads.head_dim, heads.key_heads * heads.head_dim);
        let matrix = |part: &str, shape| weights.linear(&format!("{prefix}{part}_proj.weight"), shape);
        let bias = |part: &str, width| weights.vector(&format!("{prefix}{part}_proj.bias"), width);
        let norm = |part: &str| weights.vector(&format!("{prefix}{part}_norm.weight"), heads.head_dim);
        let norms = match layer.query_key_norm {
            QueryKeyNorm::WeightedBeforeRotary => Some([norm("q")?, norm("k")?]),
            QueryKeyNorm::None | QueryKeyNorm::UnitAfterRotary => None,
        };
        Ok(Attention {
            query: matrix("q", [query, hidden])?,
            key: matrix("k", [key, hidden])?,
            value: matrix("v", [key, hidden])?,
            output: matrix("o", [hidden, query])?,
            biases: if layer.bias { Some([bias("q", query)?, bias("k", key)?, bias("v", key)?]) } else { None },
            norms,
            settings: Settings {
                heads,
                eps: config.rms_norm_eps,
                rotary: layer.rotary,
                span: layer.span,
                query_key_norm: layer.query_key_norm,
                temperature: layer.temperature,
            },
        })
    }

    /// # Shapes
    /// - `x` `[N, hidden]`, result `[N, hidden]`
    pub fn forward(&self, x: Tensor<2>, layout: &TokenLayout) -> Tensor<2> {
        let settings = &self.settings;
        let project = |weight: &Linear, which: usize| {
            let y = weight.forward(x.clone());
            match &self.biases {
                Some(biases) => y + biases[which].clone().unsqueeze(),
                None => y,
            }
        };
        let value = project(&self.value, 2);
        let query = self.place(project(&self.query, 0), 0, layout);
        let key = self.place(project(&self.key, 1), 1, layout);
        let query = match settings.temperature {
            Some(temperature) => scale_by_position(query, temperature, &layout.positions),
            None => query,
        };
        let mixed = attention(query, key, value, settings.heads, layout.ranges(settings.span));
        self.output.forward(mixed)
    }

    pub(super) fn is_packed(&self) -> bool {
        self.query.packed().is_some()
    }

    /// The same weights as a half of a block, where they are packed.
    pub(super) fn packed<'a>(
        &'a self,
        (norm, eps): (&'a [f32], f32),
        vectors: &'a Vectors,
        layout: &'a TokenLayout,
    ) -> Option<AttentionHalf<'a>> {
        let settings = &self.settings;
        Some(AttentionHalf {
            norm,
            eps,
            query: self.query.packed()?,
            key: self.key.packed()?,
            value: self.value.packed()?,
            output: self.output.packed()?,
            biases: vectors.biases.as_ref().map(|biases| biases.each_ref().map(Vec::as_slice)),
            head_norm: match (settings.query_key_norm, &vectors.norms) {
                (QueryKeyNorm::WeightedBeforeRotary, Some(norms)) => {
                    HeadNorm::WeightedBeforeRotary(norms.each_ref().map(Vec::as_slice))
                }
                (QueryKeyNorm::UnitAfterRotary, _) => HeadNorm::UnitAfterRotary,
                _ => HeadNorm::None,
            },
            rotary: settings.rotary.then(|| layout.rotary()),
            query_scales: vectors.scales.as_deref(),
            heads: settings.heads,
            ranges: layout.ranges(settings.span),
        })
    }

    /// What [`packed`](Self::packed) refers to: the numbers of small tensors.
    pub(super) fn vectors(&self, layout: &TokenLayout) -> Vectors {
        let values = |tensor: &Tensor<1>| packed_block::numbers(tensor.clone());
        Vectors {
            biases: self.biases.as_ref().map(|biases| biases.each_ref().map(values)),
            norms: self.norms.as_ref().map(|norms| norms.each_ref().map(values)),
            scales: self.settings.temperature.and_then(|temperature| scales(temperature, &layout.positions)),
        }
    }

    /// Norm and rotation of queries (`which` 0) or keys (1), in the order the family has them.
    fn place(&self, x: Tensor<2>, which: usize, layout: &TokenLayout) -> Tensor<2> {
        let settings = &self.settings;
        let [tokens, width] = x.dims();
        let head_dim = settings.heads.head_dim;
        let by_head = |x: Tensor<2>| x.reshape([tokens * width / head_dim, head_dim]);
        let x = match &self.norms {
            Some(norms) => rms_norm(by_head(x), norms[which].clone(), settings.eps).reshape([tokens, width]),
            None => x,
        };
        if !settings.rotary {
            return x;
        }
        let x = rotary(x, head_dim, layout.rotary());
        match settings.query_key_norm {
            QueryKeyNorm::UnitAfterRotary => unit_rms(by_head(x), settings.eps).reshape([tokens, width]),
            QueryKeyNorm::None | QueryKeyNorm::WeightedBeforeRotary => x,
        }
    }

    pub fn visit(&mut self, prefix: &str, visitor: &mut dyn FnMut(&str, ParameterRef<'_>)) {
        let matrices = [("q", &mut self.query), ("k", &mut self.key), ("v", &mut self.value), ("o", &mut self.output)];
        for (part, matrix) in matrices {
            visitor(&format!("{prefix}{part}_proj.weight"), matrix.parameter());
        }
        for (part, tensor) in ["q", "k", "v"].into_iter().zip(self.biases.iter_mut().flatten()) {
            visitor(&format!("{prefix}{part}_proj.bias"), ParameterRef::Vector(tensor));
        }
        for (part, tensor) in ["q", "k"].into_iter().zip(self.norms.iter_mut().flatten()) {
            visitor(&format!("{prefix}{part}_norm.weight"), ParameterRef::Vector(tensor));
        }
    }
}

/// Multiplies each query by its position's temperature; leaves the tensor alone where all are one.
fn scale_by_position(query: Tensor<2>, temperature: AttentionTemperature, positions: &[u32]) -> Tensor<2> {
    let Some(scales) = scales(temperature, positions) else { return query };
    let count = scales.len();
    let scales = Tensor::<2>::from_data(TensorData::new(scales, [count, 1]), &query.device());
    query * scales
}

/// Each position's temperature; `None` where all are one.
fn scales(temperature: AttentionTemperature, positions: &[u32]) -> Option<Vec<f32>> {
    let scale = |position: u32| {
        let steps = ((position as f64 + 1.0) / temperature.floor_scale).floor();
        (1.0 + temperature.scale * steps.ln_1p()) as f32
    };
    let scales: Vec<f32> = positions.iter().map(|&position| scale(position)).collect();
    scales.iter().any(|&scale| scale != 1.0).then_some(scales)
}
