//! Keeping the router's load even, and its logits small.
//!
//! The usual loss of one block is `E * sum_e f_e P_e` (Fedus et al. 2021, Switch Transformers, eq. 4), with `f_e` the
//! share of tokens sent to expert e and `P_e` the mean of softmax(router)_e. Only P has a gradient. Taking `f` from
//! the tokens of one micro-batch makes the result depend on how a batch was split; here `f` is that of the whole
//! previous step, which every micro-batch and rank agrees on, so that the sum over tokens is exact for any split.
//!
//! Without a loss, a bias per expert is added to the router's scores where experts are chosen, and nowhere else, and after
//! each step goes up by a fixed rate where an expert had less than its share and down where it had more (Wang et al. 2024,
//! arXiv 2408.15664). Llama 4 has no such bias, so it is taken back to zero over the last part of the run: the weights
//! that are exported choose as they did in the last steps.

use burn::tensor::{Tensor, TensorData, activation::softmax};
use serde::{Deserialize, Serialize};

use super::router::RouterDistillation;
use crate::models::feed_forward::Routing;

/// How routers are trained beside the loss on tokens.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RouterConfig {
    /// Weight of the load-balancing loss.
    pub balance_weight: f64,
    /// Weight of the mean squared log-sum-exp of the logits (Zoph et al. 2022, ST-MoE, eq. 5); 0 for none.
    pub z_weight: f64,
    /// What the selection bias of an expert changes by after each step; 0 for no bias.
    pub bias_rate: f64,
    /// Share (0..1) of the run, at its end, in which the bias goes back to 0.
    pub bias_release: f64,
    /// Which routers follow the teacher's; `None` for none.
    pub follow: Option<RouterDistillation>,
}

impl RouterConfig {
    /// What the selection bias is multiplied by at `step` of `total`: 1, and 0 at the last step.
    pub fn bias_share(&self, step: u64, total: u64) -> f64 {
        let left = total.saturating_sub(1).saturating_sub(step) as f64;
        let release = self.bias_release * total as f64;
        if left >= release { if left > 0.0 { 1.0 } else { 0.0 } } else { left / release }
    }
}

/// Loads of the step being gathered, the shares of the one before, and the selection biases.
#[derive(Debug, Clone, Default)]
pub struct LoadBalance {
    /// Per block with experts, each expert's share of the previous step's choices; empty before the first step.
    shares: Vec<Vec<f32>>,
    counts: Vec<Vec<u64>>,
    biases: Vec<Vec<f32>>,
}

impl LoadBalance {
    /// Goes on from saved shares and biases.
    pub fn with_state(shares: Vec<Vec<f32>>, biases: Vec<Vec<f32>>) -> Self {
        LoadBalance { shares, counts: vec![], biases }
    }

    pub fn shares(&self) -> &[Vec<f32>] {
        &self.shares
    }

    /// Per block with experts, what is added to each one's score where they are chosen; empty without such biases.
    pub fn biases(&self) -> &[Vec<f32>] {
        &self.biases
    }

    /// Counts the loads of a micro-batch.
    pub fn count(&mut self, routings: &[Routing]) {
        self.counts.resize(routings.len(), vec![]);
        for (counts, routing) in self.counts.iter_mut().zip(routings) {
            counts.resize(routing.expert_count(), 0);
            counts.iter_mut().zip(routing.loads()).for_each(|(count, load)| *count += load);
        }
    }

    /// The balance loss of one block, summed over the tokens of a micro-batch, `[1]`.
    pub fn block_loss(&self, block: usize, routing: &Routing) -> Tensor<1> {
        let experts = routing.expert_count();
        let chosen = routing.experts.len() as f32 / routing.logits.dims()[0] as f32;
        // Before the first step the load is taken as even: the loss is 1 and its gradient 0.
        let weights = match self.shares.get(block) {
            Some(shares) => shares.iter().map(|share| share * experts as f32 * chosen).collect(),
            None => vec![chosen; experts],
        };
        let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, experts]), &routing.logits.device());
        (softmax(routing.logits.clone(), 1) * weights).sum()
    }

    /// What the router of one block is trained by beside the loss on tokens, summed over the tokens of a micro-batch and
    /// divided by the number of blocks, `[1]`; `None` when nothing has a weight.
    pub fn router_loss(
        &self,
        config: &RouterConfig,
        block: usize,
        blocks: usize,
        routing: &Routing,
    ) -> Option<Tensor<1>> {
        let balance = (config.balance_weight != 0.0).then(|| self.block_loss(block, routing) * config.balance_weight);
        let z = (config.z_weight != 0.0).then(|| z_loss(routing) * config.z_weight);
        let sum = match (balance, z) {
            (Some(balance), Some(z)) => Some(balance + z),
            (balance, z) => balance.or(z),
        };
        sum.map(|sum| sum / blocks as f64)
    }

    /// Ends a step: its loads become the shares of the next, and biases follow them.
    pub fn end_step(&mut self, config: &RouterConfig) {
        self.shares = std::mem::take(&mut self.counts)
            .into_iter()
            .map(|counts| {
                let total = counts.iter().sum::<u64>().max(1) as f32;
                counts.into_iter().map(|count| count as f32 / total).collect()
            })
            .collect();
        if config.bias_rate == 0.0 {
            return;
        }
        self.biases.resize(self.shares.len(), vec![]);
        for (biases, shares) in self.biases.iter_mut().zip(&self.shares) {
            biases.resize(shares.len(), 0.0);
            let even = 1.0 / shares.len() as f32;
            for (bias, share) in biases.iter_mut().zip(shares) {
                let direction = if *share < even { 1.0 } else { -1.0 };
                *bias += if *share == even { 0.0 } else { direction * config.bias_rate as f32 };
            }
        }
    }

    /// Forgets what was counted of a step that does not count.
    pub fn drop_step(&mut self) {
        self.counts.clear();
    }
}

/// Sum over tokens of the squared log-sum-exp of a router's logits, `[1]`.
pub fn z_loss(routing: &Routing) -> Tensor<1> {
    let logits = routing.logits.clone();
    // A row's largest logit is a constant to the gradient: it comes in and goes out again.
    let largest = logits.clone().detach().max_dim(1);
    let log_sum = (logits - largest.clone()).exp().sum_dim(1).log() + largest;
    log_sum.square().sum()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn routing(logits: Vec<f32>, experts: Vec<u32>, device: &Device) -> Routing {
        let width = logits.len() / experts.len();
        let logits = Tensor::<2>::from_data(TensorData::new(logits, [experts.len(), width]), device);
        Routing { logits: if device.is_autodiff() { logits.require_grad() } else { logits }, experts }
    }

    #[test]
    fn the_z_loss_is_the_squared_log_sum_and_has_its_gradient() {
        let values = [1.0f32, -2.0, 0.5, 40.0, 41.0, -3.0];
        let routing = routing(values.to_vec(), vec![0, 1], &Device::flex().autodiff());
        let loss = z_loss(&routing);
        let log_sum = |row: &[f32]| {
            let largest = row.iter().fold(f32::MIN, |a, &b| a.max(b)) as f64;
            row.iter().map(|&z| (z as f64 - largest).exp()).sum::<f64>().ln() + largest
        };
        let sums: Vec<f64> = values.chunks(3).map(log_sum).collect();
        let truth: f64 = sums.iter().map(|sum| sum * sum).sum();
        let found = loss.clone().into_data().convert::<f64>().try_into_vec::<f64>().unwrap()[0];
        assert!((found / truth - 1.0).abs() < 1e-5, "{found} {truth}");
        let gradients = loss.backward();
        let gradient = routing.logits.grad(&gradients).unwrap().into_data().try_into_vec::<f32>().unwrap();
        for (place, (&z, found)) in values.iter().zip(gradient).enumerate() {
            let sum = sums[place / 3];
            let truth = 2.0 * sum * (z as f64 - sum).exp();
            assert!((found as f64 - truth).abs() < 1e-4 * truth.abs().max(1e-3), "{place}: {found} {truth}");
        }
    }

    #[test]
    fn biases_lift_idle_experts_and_are_gone_at_the_last_step() {
        let config = RouterConfig { bias_rate: 0.25, bias_release: 0.2, ..RouterConfig::default() };
        let mut balance = LoadBalance::default();
        for _ in 0..3 {
            balance.count(&[routing(vec![0.0; 16], vec![0, 0, 0, 1], &Device::flex())]);
            balance.end_step(&config);
        }
        // Expert 1 had exactly its share, a fourth.
        assert_eq!(balance.biases(), [vec![-0.75, 0.0, 0.75, 0.75]]);
        let shares: Vec<f64> = [0, 78, 79, 89, 98, 99].map(|step| config.bias_share(step, 100)).to_vec();
        assert_eq!(shares, [1.0, 1.0, 1.0, 0.5, 0.05, 0.0]);
        assert_eq!(RouterConfig { bias_release: 0.0, ..config }.bias_share(99, 100), 0.0);
    }
}
