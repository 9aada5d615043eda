//! One operation of a layer, or of the optimizer, alone: forward, and forward and backward, at the sizes of SmolLM2-135M.
//! Attention and experts have benches of their own.

use std::{hint::black_box, sync::Arc};

use burn::tensor::{Device, Tensor, TensorData};
use limbeck::Result;
use limbeck_kernels::{
    adamw::{AdamwState, AdamwStep},
    gather_rows::gather_rows,
    rms_norm::rms_norm,
    rotary::{Pairing, RotaryTable, rotary},
    swiglu::swiglu,
};
use rayon::prelude::*;

use super::{attention::numbers, median, take_turns, timed};

const WIDTH: usize = 576;
const INNER: usize = 1536;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49_152;

type Apply = Box<dyn Fn(&[Tensor<2>]) -> Tensor<2>>;

/// What is applied, and to what.
struct Operation {
    inputs: Vec<Tensor<2>>,
    apply: Apply,
}

pub fn operation(name: &str, rows: usize, turns: bool) -> Result<()> {
    if name == "adamw" {
        let mut update = adamw();
        return measure(name, rows, turns, &mut |_| update());
    }
    let operation = of_a_layer(name, rows);
    measure(name, rows, turns, &mut |backward| {
        if !backward {
            let inputs: Vec<_> = operation.inputs.iter().map(|input| input.clone().inner()).collect();
            drop(black_box((operation.apply)(&inputs)));
            return;
        }
        let inputs: Vec<_> = operation.inputs.iter().map(|input| input.clone().require_grad()).collect();
        // Ones are the gradient of what is not one number.
        let gradients = (operation.apply)(&inputs).backward();
        inputs.iter().for_each(|input| drop(black_box(input.grad(&gradients).expect("tracked"))));
    })
}

fn of_a_layer(name: &str, rows: usize) -> Operation {
    let device = Device::flex().autodiff();
    let tensor = |shape: [usize; 2], seed: u32| {
        Tensor::<2>::from_data(TensorData::new(numbers(shape[0] * shape[1], seed), shape), &device)
    };
    let (inputs, apply): (_, Apply) = match name {
        "rms_norm" => (
            vec![tensor([rows, WIDTH], 1), tensor([1, WIDTH], 2)],
            Box::new(|x| rms_norm(x[0].clone(), x[1].clone().reshape([WIDTH]), 1e-5)),
        ),
        "rotary" => {
            let positions: Vec<u32> = (0..rows as u32).collect();
            let frequency = |j: usize| 10_000f32.powf(-2.0 * j as f32 / HEAD_DIM as f32);
            let frequencies: Vec<f32> = (0..HEAD_DIM / 2).map(frequency).collect();
            let table = RotaryTable::new(&positions, &frequencies, Pairing::Halves);
            (vec![tensor([rows, WIDTH], 1)], Box::new(move |x| rotary(x[0].clone(), HEAD_DIM, &table)))
        }
        "swiglu" => (vec![tensor([rows, 2 * INNER], 1)], Box::new(|x| swiglu(x[0].clone()))),
        // Every row once, in another order: 3,571 is prime.
        "dispatch" => {
            let order: Arc<Vec<u32>> = Arc::new((0..rows).map(|row| (row * 3571 % rows) as u32).collect());
            (vec![tensor([rows, WIDTH], 1)], Box::new(move |x| gather_rows(x[0].clone(), order.clone())))
        }
        "embedding" => {
            let ids: Arc<Vec<u32>> = Arc::new((0..rows).map(|row| (row * row % VOCABULARY) as u32).collect());
            (vec![tensor([VOCABULARY, WIDTH], 1)], Box::new(move |x| gather_rows(x[0].clone(), ids.clone())))
        }
        other => panic!("rms_norm, rotary, swiglu, dispatch, embedding or adamw, not {other}"),
    };
    Operation { inputs, apply }
}

/// One update of the embedding, with a gradient of its own: an update takes it, as it does in a step, and so each begins with
/// a copy.
fn adamw() -> impl FnMut() {
    let device = Device::flex();
    let give = move |values: Vec<f32>| Tensor::<1>::from_data(TensorData::new(values, [VOCABULARY * WIDTH]), &device);
    let tensor = |seed: u32| give(numbers(VOCABULARY * WIDTH, seed));
    let mut update = 0;
    let gradient = numbers(VOCABULARY * WIDTH, 2);
    let mut state = Some((tensor(1), AdamwState { first_moment: tensor(3), second_moment: tensor(4).abs() }));
    move || {
        update += 1;
        let step = AdamwStep {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            update,
            gradient_scale: 1.0,
        };
        let (weight, moments) = state.take().expect("put back below");
        let gradient = give(gradient.par_iter().copied().collect());
        state = Some(step.apply(weight, gradient, moments));
    }
}

/// `run` is told whether to go back too.
fn measure(name: &str, rows: usize, turns: bool, run: &mut dyn FnMut(bool)) -> Result<()> {
    run(true);
    if turns {
        return take_turns(|what| {
            // One pass is too little to time.
            let (what, passes) = what.rsplit_once(' ').expect("a pass and how many of it");
            for _ in 0..passes.parse().expect("a whole number") {
                run(what != "forward");
            }
            Ok(())
        });
    }
    let [forward, both] = [false, true].map(|both| median((0..21).map(|_| timed(|| run(both))).collect()));
    let json = serde_json::json!({
        "bench": name, "rows": rows, "forward_seconds": forward, "forward_and_backward_seconds": both,
    });
    println!("{json}");
    Ok(())
}
