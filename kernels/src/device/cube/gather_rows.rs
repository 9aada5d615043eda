//! Rows of a matrix picked by number, and the sum of what comes back to each row. One thread for each vector of the
//! result; no two write to one place.

use cubecl::prelude::*;

/// `output[i] = x[picks[i]]`, row by row.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn pick_rows<E: Float, N: Size>(
    x: &[Vector<E, N>],
    picks: &[u32],
    output: &mut [Vector<E, N>],
    count: usize,
    width: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        output[at] = x[picks[at / width] as usize * width + at % width];
    }
}

/// `x_grad[r]` is the sum of `grad[places[p]]` for `p` from `starts[r]` to `starts[r + 1]`, in that order; zeros for a row
/// that was never picked.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn sum_picked_rows<E: Float, N: Size>(
    grad: &[Vector<E, N>],
    places: &[u32],
    starts: &[u32],
    x_grad: &mut [Vector<E, N>],
    count: usize,
    width: usize,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count {
        let row = at / width;
        let column = at % width;
        let mut sum = Vector::<f32, N>::new(f32::new(0.0));
        let mut place = starts[row] as usize;
        let end = starts[row + 1] as usize;
        while place < end {
            sum += Vector::<f32, N>::cast_from(grad[places[place] as usize * width + column]);
            place += 1;
        }
        x_grad[at] = Vector::cast_from(sum);
    }
}
