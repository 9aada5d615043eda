//! One layer of experts with a shared one, top-1, by the number of experts: routed evenly, so that what is measured is what
//! more experts cost and not how uneven a router is.

use std::hint::black_box;

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::{
    Result,
    models::{
        RandomWeights, config::FeedForwardConfig, feed_forward::FeedForward, linear::Weights, llama4::shapes,
        parameter::WeightSource,
    },
};

use super::{median, take_turns, timed};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Tensors, forward.
    Forward,
    /// Tensors, forward and backward.
    Training,
    /// Packed weights, as a teacher has them.
    Packed,
}

pub fn experts(tokens: usize, count: usize, hidden: usize, width: usize, way: Way, turns: bool) -> Result<()> {
    let mut config = shapes::tiny().decoder(std::path::Path::new("tiny"))?;
    config.hidden_size = hidden;
    let layer = FeedForwardConfig::Experts { width, expert_count: count, chosen: 1 };
    let device = if way == Way::Training { Device::flex().autodiff() } else { Device::flex() };
    let random = RandomWeights { seed: 1, std: 0.02 };
    let weights = match way {
        Way::Packed => Weights::for_inference(&random, &device),
        _ => Weights::tensors(&random, &device),
    };
    let block = FeedForward::load(&config, &layer, "", weights)?;
    // Each token is an expert's row of the router and something of its own, so that it goes to that expert.
    let router = random.load("feed_forward.router.weight", &[count, hidden])?;
    let own = |n: usize| ((n as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0;
    let value = |n: usize| 20.0 * router[n / hidden % count * hidden + n % hidden] + 0.1 * own(n);
    let values = TensorData::new((0..tokens * hidden).map(value).collect::<Vec<f32>>(), [tokens, hidden]);
    let x = Tensor::<2>::from_data(values, &device);
    let loads = block.forward(x.clone()).1.expect("a layer of experts").loads();
    assert!(loads.iter().all(|&load| load as usize == tokens / count), "tokens are spread evenly: {loads:?}");
    let run = || match way {
        Way::Training => {
            let x = x.clone().require_grad();
            let gradients = block.forward(x.clone()).0.sum().backward();
            drop(black_box(x.grad(&gradients)));
        }
        _ => drop(black_box(block.forward(x.clone()).0.into_data())),
    };
    run();
    if turns {
        return take_turns(|_| {
            run();
            Ok(())
        });
    }
    let seconds = median((0..7).map(|_| timed(run)).collect());
    let json = serde_json::json!({
        "bench": "experts", "tokens": tokens, "experts": count, "hidden": hidden, "width": width,
        "tokens_of_an_expert": tokens / count, "seconds": seconds,
    });
    println!("{json}");
    Ok(())
}
