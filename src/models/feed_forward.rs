//! Feed-forward blocks: dense SwiGLU, and routed experts beside a shared one.
//!
//! Each expert multiplies only the tokens that chose it. The router's sigmoid scales an expert's *input*.

use std::sync::Arc;

use burn::tensor::{Int, Tensor, TensorData, activation::sigmoid};
use limbeck_kernels::{
    gather_rows::gather_rows,
    packed_layer::FeedForwardHalf,
    swiglu::{gated_silu, swiglu},
};

use super::{
    config::{DecoderConfig, FeedForwardConfig, Names},
    linear::{Linear, Stack, Weights},
    parameter::ParameterRef,
};
use crate::error::Result;

#[derive(Debug, Clone)]
pub enum FeedForward {
    Dense(Box<Mlp>),
    Experts(Box<Experts>),
}

/// `down(silu(gate x) * up x)`; weights `[out, in]`.
#[derive(Debug, Clone)]
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Debug, Clone)]
pub struct Experts {
    router: Linear,
    /// `[experts, hidden, 2 * width]`, gate half first, input-major as checkpoints store it.
    gate_up: Stack,
    /// `[experts, width, hidden]`
    down: Stack,
    shared: Mlp,
    chosen: usize,
    /// Added to the scores where experts are chosen, in training that balances their load in this way.
    selection_bias: Option<Arc<Vec<f32>>>,
}

/// Where the router sent each token of a batch.
#[derive(Debug, Clone)]
pub struct Routing {
    /// `[N, experts]`, part of the graph.
    pub logits: Tensor<2>,
    /// `[N, chosen]` row-major expert numbers, largest logit first.
    pub experts: Vec<u32>,
}

impl Routing {
    pub fn expert_count(&self) -> usize {
        self.logits.dims()[1]
    }

    /// How many of the choices fell on each expert.
    pub fn loads(&self) -> Vec<u64> {
        let mut loads = vec![0; self.expert_count()];
        self.experts.iter().for_each(|&expert| loads[expert as usize] += 1);
        loads
    }
}

impl FeedForward {
    pub fn load(config: &DecoderConfig, layer: &FeedForwardConfig, prefix: &str, weights: Weights<'_>) -> Result<Self> {
        let hidden = config.hidden_size;
        let block = format!("{prefix}{}", block_name(config.names));
        match *layer {
            FeedForwardConfig::Dense { width } => {
                Ok(FeedForward::Dense(Box::new(Mlp::load(hidden, width, &block, weights)?)))
            }
            FeedForwardConfig::Experts { width, expert_count, chosen } => Ok(FeedForward::Experts(Box::new(Experts {
                // Which expert a token goes to is not left to rounding.
                router: weights.exact().linear(&format!("{block}router.weight"), [expert_count, hidden])?,
                gate_up: weights.stack(&format!("{block}experts.gate_up_proj"), [expert_count, hidden, 2 * width])?,
                down: weights.stack(&format!("{block}experts.down_proj"), [expert_count, width, hidden])?,
                shared: Mlp::load(hidden, width, &format!("{block}shared_expert."), weights)?,
                chosen,
                selection_bias: None,
            }))),
        }
    }

    /// What profiles call it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            FeedForward::Dense(_) => "feed-forward",
            FeedForward::Experts(_) => "experts",
        }
    }

    /// # Shapes
    /// - `x` `[N, hidden]`, result `[N, hidden]`
    pub fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Option<Routing>) {
        match self {
            FeedForward::Dense(mlp) => (mlp.forward(x), None),
            FeedForward::Experts(experts) => {
                let (y, routing) = experts.forward(x);
                (y, Some(routing))
            }
        }
    }

    pub fn visit(&mut self, prefix: &str, names: Names, visitor: &mut dyn FnMut(&str, ParameterRef<'_>)) {
        let block = format!("{prefix}{}", block_name(names));
        match self {
            FeedForward::Dense(mlp) => mlp.visit(&block, visitor),
            FeedForward::Experts(experts) => {
                visitor(&format!("{block}router.weight"), experts.router.parameter());
                visitor(&format!("{block}experts.gate_up_proj"), experts.gate_up.parameter());
                visitor(&format!("{block}experts.down_proj"), experts.down.parameter());
                experts.shared.visit(&format!("{block}shared_expert."), visitor);
            }
        }
    }
}

pub(super) fn block_name(names: Names) -> &'static str {
    match names {
        Names::Llama4 => "feed_forward.",
        Names::Llama => "mlp.",
    }
}

impl Mlp {
    pub(super) fn load(hidden: usize, width: usize, prefix: &str, weights: Weights<'_>) -> Result<Self> {
        let matrix = |part: &str, shape| weights.linear(&format!("{prefix}{part}_proj.weight"), shape);
        Ok(Mlp {
            gate: matrix("gate", [width, hidden])?,
            up: matrix("up", [width, hidden])?,
            down: matrix("down", [hidden, width])?,
        })
    }

    pub(super) fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(gated_silu(self.gate.forward(x.clone()), self.up.forward(x)))
    }

    pub(super) fn is_packed(&self) -> bool {
        self.gate.packed().is_some()
    }

    /// The same weights as a half of a block, where they are packed.
    pub(super) fn packed<'a>(&'a self, norm: &'a [f32], eps: f32) -> Option<FeedForwardHalf<'a>> {
        let (gate, up, down) = (self.gate.packed()?, self.up.packed()?, self.down.packed()?);
        Some(FeedForwardHalf { norm, eps, gate, up, down })
    }

    fn visit(&mut self, prefix: &str, visitor: &mut dyn FnMut(&str, ParameterRef<'_>)) {
        for (part, matrix) in [("gate", &mut self.gate), ("up", &mut self.up), ("down", &mut self.down)] {
            visitor(&format!("{prefix}{part}_proj.weight"), matrix.parameter());
        }
    }
}

impl Experts {
    pub(super) fn set_selection_bias(&mut self, bias: Option<Vec<f32>>) {
        self.selection_bias = bias.map(Arc::new);
    }

    fn forward(&self, x: Tensor<2>) -> (Tensor<2>, Routing) {
        let [tokens, hidden] = x.dims();
        let logits = self.router.forward(x.clone());
        let chosen = match &self.selection_bias {
            None => choose(&logits, self.chosen),
            Some(bias) => choose_biased(&logits, bias, self.chosen),
        };
        let expert_count = logits.dims()[1];

        // Assignments (token, choice) sorted by expert; equal experts keep token order.
        let mut offsets = vec![0usize; expert_count + 1];
        chosen.iter().for_each(|&expert| offsets[expert as usize + 1] += 1);
        (0..expert_count).for_each(|expert| offsets[expert + 1] += offsets[expert]);
        let mut next = offsets.clone();
        let (mut sorted_tokens, mut place) = (vec![0u32; chosen.len()], vec![0u32; chosen.len()]);
        let mut sorted = vec![0u32; chosen.len()];
        for (assignment, &expert) in chosen.iter().enumerate() {
            let at = next[expert as usize];
            next[expert as usize] += 1;
            sorted_tokens[at] = (assignment / self.chosen) as u32;
            sorted[at] = assignment as u32;
            place[assignment] = at as u32;
        }

        let scores = gather_rows(scores(&logits, &chosen, self.chosen), Arc::new(sorted));
        let input = gather_rows(x.clone(), Arc::new(sorted_tokens)) * scores;
        let offsets = Arc::new(offsets);
        let inner = swiglu(self.gate_up.forward(input, offsets.clone()));
        let place = by_expert(&chosen, place, self.chosen);
        let output = gather_rows(self.down.forward(inner, offsets), Arc::new(place));
        // One after the other and by the experts' numbers: an order that does not depend on who computes which expert
        // when, and that whoever has one expert in memory at a time can keep.
        let shared = self.shared.forward(x);
        if self.chosen == 1 {
            return (shared + output, Routing { logits, experts: chosen });
        }
        let output = output.reshape([tokens, self.chosen, hidden]);
        let update = (0..self.chosen)
            .fold(shared, |update, choice| update + output.clone().narrow(1, choice, 1).reshape([tokens, hidden]));
        (update, Routing { logits, experts: chosen })
    }
}

/// What each choice multiplies its expert's input by: the sigmoid of its logit.
///
/// # Shapes
/// - `logits` `[N, experts]`, `chosen` `[N, k]` row-major, result `[N * k, 1]`
pub(super) fn scores(logits: &Tensor<2>, chosen: &[u32], k: usize) -> Tensor<2> {
    let tokens = logits.dims()[0];
    let ids: Vec<i64> = chosen.iter().map(|&expert| expert as i64).collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [tokens, k]), &logits.device());
    sigmoid(logits.clone().gather(1, ids)).reshape([tokens * k, 1])
}

/// Each token's places in the order of the numbers of the experts it chose, rather than of their logits.
fn by_expert(chosen: &[u32], mut place: Vec<u32>, k: usize) -> Vec<u32> {
    if k > 1 {
        for (places, chosen) in place.chunks_mut(k).zip(chosen.chunks(k)) {
            let mut pairs: Vec<(u32, u32)> = chosen.iter().copied().zip(places.iter().copied()).collect();
            pairs.sort_unstable();
            places.iter_mut().zip(pairs).for_each(|(place, (_, at))| *place = at);
        }
    }
    place
}

/// The `k` largest scores of each row, a score being the sigmoid of a logit and its expert's bias.
fn choose_biased(logits: &Tensor<2>, bias: &[f32], k: usize) -> Vec<u32> {
    let [_, experts] = logits.dims();
    let mut values = logits.clone().detach().into_data().try_into_vec::<f32>().expect("router logits are f32");
    for row in values.chunks_mut(experts) {
        row.iter_mut().zip(bias).for_each(|(value, bias)| *value = 1.0 / (1.0 + (-*value).exp()) + bias);
    }
    largest(&values, experts, k)
}

/// The `k` largest logits of each row; of equal ones the smaller expert number.
pub(super) fn choose(logits: &Tensor<2>, k: usize) -> Vec<u32> {
    let [_, experts] = logits.dims();
    let values = logits.clone().detach().into_data().try_into_vec::<f32>().expect("router logits are f32");
    largest(&values, experts, k)
}

fn largest(values: &[f32], experts: usize, k: usize) -> Vec<u32> {
    let mut chosen = Vec::with_capacity(values.len() / experts * k);
    let mut order: Vec<u32> = Vec::with_capacity(experts);
    for row in values.chunks(experts) {
        order.clear();
        order.extend(0..experts as u32);
        let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
        if k < experts {
            order.select_nth_unstable_by(k - 1, by_logit);
            order.truncate(k);
        }
        order.sort_unstable_by(by_logit);
        chosen.extend_from_slice(&order);
    }
    chosen
}
