//! One layer of experts with a shared one, top-1, by the number of experts: routed evenly, so that what is measured is what
//! more experts cost and not how uneven a router is.

use std::{hint::black_box, ops::Range};

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::{
    Result,
    models::{
        config::FeedForwardConfig, feed_forward::FeedForward, linear::Weights, llama4::shapes, parameter::WeightSource,
    },
};
use rayon::prelude::*;

use super::{median, take_turns, timed};

/// Weights without a pattern that are made faster than random ones: there may be a thousand million.
struct Cheap;

impl WeightSource for Cheap {
    fn load(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.load_rows(name, shape, 0..shape[0])
    }

    fn load_rows(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<Vec<f32>> {
        let start = name.bytes().fold(17u64, |sum, byte| sum.wrapping_mul(31) + byte as u64);
        let value = |place: u64| {
            let mixed = (place + start).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        let width = shape[1..].iter().product::<usize>();
        Ok(((rows.start * width) as u64..(rows.end * width) as u64)
            .into_par_iter()
            .map(|place| 0.03 * value(place))
            .collect())
    }
}

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
    let random = Cheap;
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
