//! Rotation of pairs of channels. `sign` is 1 to turn forward and -1 to turn back, which is the derivative. One thread for
//! each vector of channels, or for the two vectors whose channels turn together.

// Operands, which a launch takes by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

/// Channels `j` and `j + d / 2` of a head turn together. `half` is d / 2 in vectors, `count` how many threads have work.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn turn_halves<E: Float, N: Size>(
    x: &[Vector<E, N>],
    cosines: &[Vector<f32, N>],
    sines: &[Vector<f32, N>],
    output: &mut [Vector<E, N>],
    count: usize,
    heads: usize,
    half: usize,
    sign: f32,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let channel = at % half;
        let head = at / half;
        let angle = head / heads * half + channel;
        let low = head * 2 * half + channel;
        let high = low + half;
        let cosine = cosines[angle];
        let sine = sines[angle] * Vector::new(sign);
        let a = Vector::<f32, N>::cast_from(x[low]);
        let b = Vector::<f32, N>::cast_from(x[high]);
        output[low] = Vector::cast_from(a * cosine - b * sine);
        output[high] = Vector::cast_from(a * sine + b * cosine);
    }
}

/// Channels `2 j` and `2 j + 1` turn together: the vectors are of two at least. `half` is d / 2 in pairs, `count` how many
/// vectors there are.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn turn_neighbours<E: Float, N: Size>(
    x: &[Vector<E, N>],
    cosines: &[f32],
    sines: &[f32],
    output: &mut [Vector<E, N>],
    count: usize,
    heads: usize,
    half: usize,
    sign: f32,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    let size = N::value();
    let pairs = comptime!(size / 2);
    if at < count {
        let pair = at * pairs;
        let angle = pair / half / heads * half + pair % half;
        let value = Vector::<f32, N>::cast_from(x[at]);
        let mut turned = Vector::<f32, N>::empty();
        #[unroll]
        for member in 0..pairs {
            let cosine = cosines[angle + member];
            let sine = sines[angle + member] * sign;
            let a = value.extract(comptime!(2 * member));
            let b = value.extract(comptime!(2 * member + 1));
            turned.insert(comptime!(2 * member), a * cosine - b * sine);
            turned.insert(comptime!(2 * member + 1), a * sine + b * cosine);
        }
        output[at] = Vector::cast_from(turned);
    }
}
