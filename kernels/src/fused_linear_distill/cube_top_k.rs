//! The kernel that finds a row's largest logits while they pass by in tiles.

// Kernels look at both sides of an `&&`, and there is nothing before the first entry.
#![allow(clippy::collapsible_if)]
// Operands, which a launch takes by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

/// Keeps the `kept` largest logits of all tiles so far, in descending order, of equal ones the smaller id, in `values`
/// and `ids`. A logit that is kept leaves the tile, and the one that it pushes out takes its place there, so that what
/// remains of all tiles is the rest. One cube per row; tiles come in ascending order of their ids.
#[cube(launch, create_dummy_kernel)]
pub fn keep_largest(
    logits: &mut [f32],
    values: &mut [f32],
    ids: &mut [u32],
    first_row: usize,
    first_id: usize,
    width: usize,
    #[comptime] kept: usize,
    #[comptime] units: usize,
) {
    let row = first_row + CUBE_POS_X as usize;
    let base = CUBE_POS_X as usize * width;
    let list = row * kept;
    let unit = UNIT_POS as usize;

    let mut value_of = Shared::<[f32]>::new_slice(kept);
    let mut id_of = Shared::<[u32]>::new_slice(kept);
    let mut at = unit;
    while at < kept {
        value_of[at] = values[list + at];
        id_of[at] = ids[list + at];
        at += units;
    }
    let mut largest_of = Shared::<[f32]>::new_slice(units);
    let mut place_of = Shared::<[u32]>::new_slice(units);
    sync_cube();

    let mut more = true;
    while more {
        // The largest logit that is left. Each unit looks at its own columns, and writes to no others.
        let last = value_of[kept - 1];
        let mut largest = last;
        let mut place = width;
        let mut column = unit;
        while column < width {
            let z = logits[base + column];
            if z > largest {
                largest = z;
                place = column;
            }
            column += units;
        }
        largest_of[unit] = largest;
        place_of[unit] = place as u32;
        sync_cube();
        let mut half = comptime!(units / 2).runtime();
        while half > 0 {
            if unit < half {
                let other = largest_of[unit + half];
                let other_place = place_of[unit + half];
                if other > largest_of[unit] || (other == largest_of[unit] && other_place < place_of[unit]) {
                    largest_of[unit] = other;
                    place_of[unit] = other_place;
                }
            }
            sync_cube();
            half /= 2;
        }
        let largest = largest_of[0];
        let place = place_of[0] as usize;
        more = largest > last;
        if more && place % units == unit {
            logits[base + place] = last;
        }
        // Into the list, behind what is as large: from the end on, so that nothing is read after it was written.
        let mut chunk = comptime!(kept.div_ceil(units)).runtime();
        while chunk > 0 {
            chunk -= 1;
            let at = chunk * units + unit;
            let mut value = f32::new(0.0);
            let mut id = place_of[0];
            let mut moves = false;
            if more && at < kept {
                moves = value_of[at] < largest;
                value = largest;
                id = (first_id + place) as u32;
                if at > 0 {
                    if value_of[at - 1] < largest {
                        value = value_of[at - 1];
                        id = id_of[at - 1];
                    }
                }
            }
            sync_cube();
            if moves {
                value_of[at] = value;
                id_of[at] = id;
            }
            sync_cube();
        }
    }
    let mut at = unit;
    while at < kept {
        values[list + at] = value_of[at];
        ids[list + at] = id_of[at];
        at += units;
    }
}
