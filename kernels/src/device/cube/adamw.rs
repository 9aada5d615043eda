//! One update of AdamW, one thread for each vector of weights. An output may be the memory of its input.

// Operands, which a launch takes by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

/// `rate` has the first moment's bias correction in it, `keep` is what the decay leaves of a weight.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn adamw<N: Size>(
    weight: &[Vector<f32, N>],
    gradient: &[Vector<f32, N>],
    first: &[Vector<f32, N>],
    second: &[Vector<f32, N>],
    new_weight: &mut [Vector<f32, N>],
    new_first: &mut [Vector<f32, N>],
    new_second: &mut [Vector<f32, N>],
    count: usize,
    scale: f32,
    beta1: f32,
    rest1: f32,
    beta2: f32,
    rest2: f32,
    second_correction: f32,
    eps: f32,
    keep: f32,
    rate: f32,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let gradient = gradient[at] * Vector::new(scale);
        let first = Vector::new(beta1) * first[at] + Vector::new(rest1) * gradient;
        let second = Vector::new(beta2) * second[at] + Vector::new(rest2) * gradient * gradient;
        let direction = first / ((second * Vector::new(second_correction)).sqrt() + Vector::new(eps));
        new_weight[at] = weight[at] * Vector::new(keep) - Vector::new(rate) * direction;
        new_first[at] = first;
        new_second[at] = second;
    }
}
