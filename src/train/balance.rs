//! Keeping the router's load even.
//!
//! The usual loss of one block is `E * sum_e f_e P_e` (Fedus et al. 2021, Switch Transformers, eq. 4), with `f_e` the
//! share of tokens sent to expert e and `P_e` the mean of softmax(router)_e. Only P has a gradient. Taking `f` from
//! the tokens of one micro-batch makes the result depend on how a batch was split; here `f` is that of the whole
//! previous step, which every micro-batch and rank agrees on, so that the sum over tokens is exact for any split.

use burn::tensor::{Tensor, TensorData, activation::softmax};

use crate::models::feed_forward::Routing;

/// Loads of the step being gathered, and the shares of the one before.
#[derive(Debug, Clone, Default)]
pub struct LoadBalance {
    /// Per block with experts, each expert's share of the previous step's choices; empty before the first step.
    shares: Vec<Vec<f32>>,
    counts: Vec<Vec<u64>>,
}

impl LoadBalance {
    /// Goes on from saved shares.
    pub fn with_shares(shares: Vec<Vec<f32>>) -> Self {
        LoadBalance { shares, counts: vec![] }
    }

    pub fn shares(&self) -> &[Vec<f32>] {
        &self.shares
    }

    /// The balance loss summed over the tokens of a micro-batch and averaged over blocks, `[1]`; counts its loads.
    /// `None` for a model without experts.
    pub fn gather(&mut self, routings: &[Routing]) -> Option<Tensor<1>> {
        if routings.is_empty() {
            return None;
        }
        self.counts.resize(routings.len(), vec![]);
        let mut sum: Option<Tensor<1>> = None;
        for (block, routing) in routings.iter().enumerate() {
            let experts = routing.expert_count();
            let counts = &mut self.counts[block];
            counts.resize(experts, 0);
            counts.iter_mut().zip(routing.loads()).for_each(|(count, load)| *count += load);
            let chosen = routing.experts.len() as f32 / routing.logits.dims()[0] as f32;
            // Before the first step the load is taken as even: the loss is 1 and its gradient 0.
            let weights = match self.shares.get(block) {
                Some(shares) => shares.iter().map(|share| share * experts as f32 * chosen).collect(),
                None => vec![chosen; experts],
            };
            let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), &routing.logits.device());
            let loss = (softmax(routing.logits.clone(), 1) * weights).sum();
            sum = Some(match sum {
                Some(sum) => sum + loss,
                None => loss,
            });
        }
        sum.map(|sum| sum / routings.len() as f64)
    }

    /// Ends a step: its loads become the shares of the next.
    pub fn end_step(&mut self) {
        self.shares = std::mem::take(&mut self.counts)
            .into_iter()
            .map(|counts| {
                let total = counts.iter().sum::<u64>().max(1) as f32;
                counts.into_iter().map(|count| count as f32 / total).collect()
            })
            .collect();
    }
}
