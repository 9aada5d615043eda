//! `silu(gate) * up` and its gradients, of one operand that holds both, the gate first in each row, or of two. One thread
//! for each vector of the result.

// Operands, which a launch takes by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

/// `1 / (1 + e^-gate)`. Below -80 it is taken for what it is there, 2e-35, since not every device knows infinity.
#[cube]
fn sigmoid<N: Size>(gate: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(f32::new(1.0));
    let bounded = max(gate, Vector::new(f32::new(-80.0)));
    one / (one + (-bounded).exp())
}

#[cube]
fn forward<N: Size>(gate: Vector<f32, N>, up: Vector<f32, N>) -> Vector<f32, N> {
    gate * sigmoid(gate) * up
}

/// Derivative of the result in the gate, over `up`.
#[cube]
fn gate_slope<N: Size>(gate: Vector<f32, N>) -> Vector<f32, N> {
    let share = sigmoid(gate);
    let one = Vector::<f32, N>::new(f32::new(1.0));
    share + gate * share * (one - share)
}

#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn swiglu<E: Float, N: Size>(
    gate_up: &[Vector<E, N>],
    output: &mut [Vector<E, N>],
    count: usize,
    width: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let place = at + at / width * width;
        let gate = Vector::<f32, N>::cast_from(gate_up[place]);
        let up = Vector::<f32, N>::cast_from(gate_up[place + width]);
        output[at] = Vector::cast_from(forward(gate, up));
    }
}

#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn swiglu_backward<E: Float, N: Size>(
    gate_up: &[Vector<E, N>],
    grad: &[Vector<E, N>],
    gate_up_grad: &mut [Vector<E, N>],
    count: usize,
    width: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let place = at + at / width * width;
        let gate = Vector::<f32, N>::cast_from(gate_up[place]);
        let up = Vector::<f32, N>::cast_from(gate_up[place + width]);
        let slope = Vector::<f32, N>::cast_from(grad[at]);
        gate_up_grad[place] = Vector::cast_from(slope * up * gate_slope(gate));
        gate_up_grad[place + width] = Vector::cast_from(slope * gate * sigmoid(gate));
    }
}

#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn gated_silu<E: Float, N: Size>(
    gate: &[Vector<E, N>],
    up: &[Vector<E, N>],
    output: &mut [Vector<E, N>],
    count: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let value = forward(Vector::<f32, N>::cast_from(gate[at]), Vector::<f32, N>::cast_from(up[at]));
        output[at] = Vector::cast_from(value);
    }
}

#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn gated_silu_backward<E: Float, N: Size>(
    gate: &[Vector<E, N>],
    up: &[Vector<E, N>],
    grad: &[Vector<E, N>],
    gate_grad: &mut [Vector<E, N>],
    up_grad: &mut [Vector<E, N>],
    count: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let gate = Vector::<f32, N>::cast_from(gate[at]);
        let slope = Vector::<f32, N>::cast_from(grad[at]);
        gate_grad[at] = Vector::cast_from(slope * Vector::<f32, N>::cast_from(up[at]) * gate_slope(gate));
        up_grad[at] = Vector::cast_from(slope * gate * sigmoid(gate));
    }
}
