//! Text out of a decoder, one token after the other.

use burn::tensor::Tensor;
use rand::{RngExt, SeedableRng};

use super::{Decoder, TokenLayout};
use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most probable token.
    pub temperature: f64,
    /// Only the so many most probable tokens are drawn from; 0 for all.
    pub top_k: usize,
    pub seed: u64,
}

impl Sampling {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Sampling { temperature: 0.0, top_k: 0, seed: 0 }
    }
}

/// Continues `prompt` by at most `count` tokens, calling `each` with every new one; stops at an end token.
pub fn generate(
    model: &Decoder,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    each: &mut dyn FnMut(u32) -> Result<()>,
) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::usage("the prompt has no tokens", "give some text to continue"));
    }
    model.config.check_seq_len(prompt.len() + count)?;
    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(sampling.seed);
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let layout = TokenLayout::of_documents(&model.config, tokens.clone(), tokens.len());
        let (hidden, _) = model.forward(&layout);
        let last = hidden.narrow(0, tokens.len() - 1, 1);
        let next = choose(model.logits(last), sampling, &mut generator)?;
        if model.config.end_tokens.contains(&next) {
            break;
        }
        each(next)?;
        tokens.push(next);
    }
    Ok(())
}

fn choose(logits: Tensor<2>, sampling: &Sampling, generator: &mut rand_chacha::ChaCha8Rng) -> Result<u32> {
    let logits = logits.into_data().try_into_vec::<f32>().expect("logits are f32");
    if logits.iter().any(|logit| logit.is_nan()) {
        return Err(Error::NotFinite { what: "a logit".into(), tip: "check the weights with inspect".into() });
    }
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    if sampling.temperature <= 0.0 {
        return Ok(order[0]);
    }
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k);
    }
    let largest = logits[order[0] as usize];
    let weight = |id: u32| (((logits[id as usize] - largest) as f64) / sampling.temperature).exp();
    let total: f64 = order.iter().map(|&id| weight(id)).sum();
    let mut left = generator.random::<f64>() * total;
    for &id in &order {
        left -= weight(id);
        if left <= 0.0 {
            return Ok(id);
        }
    }
    Ok(order[order.len() - 1])
}
