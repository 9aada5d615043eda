//! The forward kernel of attention. Counts are of elements, not of vectors. A row is one query head of one token; the
//! heads that share a key head lie next to each other, so that row `r` of a sequence is of token `r / group`. A cube holds
//! a tile of rows and passes once over the tiles of keys that any of them sees, with a running maximum and sum per row.
//!
//! Sums of values are kept relative to a reference that follows the maximum only when that has grown by [`SLACK`]: what
//! has been added up is then scaled once, which fragments take shared memory for, and otherwise stays as it is.

// Their operands are what they are, and a launch takes them by position.
#![allow(clippy::too_many_arguments)]

use cubecl::prelude::*;

use super::product::{self, Layout, Tile};

/// Stands for the maximum of no scores. Finite, since not every device knows infinity.
pub const NOTHING: f32 = -3.0e38;

/// How far a score may exceed the reference: its weight is then at most `exp(SLACK)`, which f16 holds with ease.
pub const SLACK: f32 = 6.0;

/// Sizes of the heads and how a cube's work is cut. Tiles are square, and a head is cut into as many panels as it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AttentionPlan {
    pub tile: Tile,
    pub head_dim: usize,
    /// Query heads per key head.
    pub group: usize,
    pub key_heads: usize,
}

impl AttentionPlan {
    pub const fn side(&self) -> usize {
        self.tile.rows
    }

    pub const fn panels(&self) -> usize {
        self.head_dim.div_ceil(self.tile.rows)
    }

    /// Units that look at one row of scores.
    pub const fn lanes(&self) -> usize {
        self.tile.units() / self.tile.rows
    }

    /// Rows of queries, keys or values in shared memory.
    pub const fn operand(&self) -> Layout {
        Layout { stride: self.panels() * self.tile.rows + self.tile.pad(), turned: false }
    }

    /// The same, seen as their transpose.
    pub const fn operand_turned(&self) -> Layout {
        Layout { turned: true, ..self.operand() }
    }

    /// Weights of a tile.
    pub const fn weights(&self) -> Layout {
        Layout { stride: self.tile.rows + self.tile.pad(), turned: false }
    }

    pub const fn weights_turned(&self) -> Layout {
        Layout { turned: true, ..self.weights() }
    }

    /// Elements of an operand's tile.
    pub const fn operand_size(&self) -> usize {
        self.tile.rows * self.operand().stride
    }

    pub const fn weights_size(&self) -> usize {
        self.tile.rows * self.weights().stride
    }

    pub const fn sums_size(&self) -> usize {
        self.tile.rows * self.tile.sums_stride()
    }
}

/// Where a cube is: the first token of its sequence, the tokens of a sequence, and the key head.
#[derive(CubeType, Clone, Copy)]
pub struct Seat {
    pub start: usize,
    pub length: usize,
    pub key_head: usize,
}

#[cube]
impl Seat {
    /// The first element of row `row` of the sequence, in an array of `group` heads per key head.
    pub fn element(&self, row: usize, #[comptime] group: usize, #[comptime] plan: AttentionPlan) -> usize {
        self.number(row, group, plan) * comptime!(plan.head_dim)
    }

    /// The place of a row's own number in an array of one number per token and head.
    pub fn number(&self, row: usize, #[comptime] group: usize, #[comptime] plan: AttentionPlan) -> usize {
        let token = self.start + row / group;
        (token * comptime!(plan.key_heads) + self.key_head) * group + row % group
    }
}

/// Brings a tile of rows to shared memory, with zeros beyond row `end` and beyond the head.
#[cube]
pub fn read_rows<E: Float, N: Size>(
    source: &[Vector<E, N>],
    tile: &mut [Vector<E, N>],
    first: usize,
    end: usize,
    seat: &Seat,
    #[comptime] group: usize,
    #[comptime] plan: AttentionPlan,
) {
    let size = N::value();
    let across = comptime!(plan.panels() * plan.side() / size);
    let count = comptime!(plan.side() * across);
    let units = comptime!(plan.tile.units());
    // Several reads on their way at once where that is worth the text, which some compilers take long for.
    #[unroll(comptime!(plan.tile.tensor_cores && count / units <= 16))]
    for turn in 0..comptime!(count.div_ceil(units)) {
        let place = turn * units + UNIT_POS as usize;
        if place < count {
            let row = place / across;
            let column = place % across;
            let mut value = Vector::<E, N>::new(E::from_int(0));
            if first + row < end && column < comptime!(plan.head_dim / size) {
                value = source[seat.element(first + row, group, plan) / size + column];
            }
            tile[row * comptime!(plan.operand().stride / size) + column] = value;
        }
    }
}

/// Writes one panel of sums to rows before `end`, each row times its factor of those from `first_factor` on. `scratch` has
/// room for stored sums. All units of the cube come here, after they met, and meet before they leave if they need to.
#[cube]
pub fn write_panel<E: Float, N: Size>(
    sums: &product::Sums,
    scratch: &mut [f32],
    factors: &[f32],
    first_factor: usize,
    target: &mut [Vector<E, N>],
    #[comptime] panel: usize,
    first: usize,
    end: usize,
    seat: &Seat,
    #[comptime] group: usize,
    #[comptime] plan: AttentionPlan,
) {
    let size = N::value();
    let tile = comptime!(plan.tile);
    if comptime!(!tile.tensor_cores && size == 1) {
        let own = comptime!(tile.own());
        #[unroll]
        for i in 0..comptime!(own.0) {
            let row = product::register_row(i, tile);
            if first + row < end {
                let at = seat.element(first + row, group, plan);
                let factor = factors[first_factor + row];
                #[unroll]
                for j in 0..comptime!(own.1) {
                    let column = product::register_column(j, tile) + comptime!(panel * plan.side());
                    if column < comptime!(plan.head_dim) {
                        let sum = sums.registers[comptime!(i * own.1 + j)];
                        target[at + column] = Vector::<E, N>::new(E::cast_from(sum * factor));
                    }
                }
            }
        }
    } else {
        product::store(sums, scratch, tile);
        sync_cube();
        let across = comptime!(plan.side() / size);
        let count = comptime!(plan.side() * across);
        let mut place = UNIT_POS as usize;
        while place < count {
            let row = place / across;
            let column = place % across * size;
            if first + row < end && column + comptime!(panel * plan.side()) < comptime!(plan.head_dim) {
                let from = row * comptime!(tile.sums_stride()) + column;
                let factor = factors[first_factor + row];
                let mut value = Vector::<E, N>::empty();
                #[unroll]
                for lane in 0..size {
                    value.insert(lane, E::cast_from(scratch[from + lane] * factor));
                }
                let at = seat.element(first + row, group, plan) + column + comptime!(panel * plan.side());
                target[at / size] = value;
            }
            place += comptime!(tile.units());
        }
        sync_cube();
    }
}

/// Scores of a tile of rows and a tile of keys, before they are scaled, to `output`.
#[cube]
pub fn products<E: Float, N: Size>(
    rows: &[Vector<E, N>],
    keys: &[Vector<E, N>],
    output: &mut [f32],
    #[comptime] plan: AttentionPlan,
) {
    let tile = comptime!(plan.tile);
    let mut sums = product::zero(tile);
    // Written out once where panels are small and many.
    #[unroll(comptime!(tile.tensor_cores))]
    for panel in 0..comptime!(plan.panels()) {
        let from = panel * comptime!(plan.side());
        product::multiply::<E, N, N>(
            &mut sums,
            rows,
            from,
            comptime!(plan.operand()),
            keys,
            from,
            comptime!(plan.operand_turned()),
            tile,
        );
    }
    product::store(&sums, output, tile);
}

/// The first and last key that a row sees, in its sequence; none for a row beyond the end.
#[cube]
pub fn seen(ranges: &[u32], row: usize, end: usize, seat: &Seat, #[comptime] group: usize) -> (usize, usize) {
    let mut first = 1usize;
    let mut last = 0usize;
    if row < end {
        last = row / group;
        first = ranges[seat.start + last] as usize - seat.start;
    }
    (first, last)
}

/// The place counted from the last of so many. Outside a kernel, where counts and places are constants that mean nothing,
/// a subtraction written out would be refused.
#[cube]
pub fn from_last(count: u32, place: u32) -> u32 {
    count - 1 - place
}

/// Attention of a tile of rows: x counts tiles from the last row on, which sees most, y key heads, z sequences. `ranges`
/// begins with the first key of every token; `log_sums` has a number per token and head, token by token.
#[cube(launch, create_dummy_kernel, address_type = "dynamic")]
pub fn attention_forward<E: Float, N: Size>(
    query: &[Vector<E, N>],
    key: &[Vector<E, N>],
    value: &[Vector<E, N>],
    ranges: &[u32],
    output: &mut [Vector<E, N>],
    log_sums: &mut [f32],
    length: usize,
    scale: f32,
    #[comptime] plan: AttentionPlan,
    #[define(E)] _element: ElemType,
) {
    let tile = comptime!(plan.tile);
    let side = comptime!(plan.side());
    let group = comptime!(plan.group);
    let lanes = comptime!(plan.lanes());
    let size = N::value();
    let seat = Seat { start: CUBE_POS_Z as usize * length, length, key_head: CUBE_POS_Y as usize };
    let end = length * group;
    let first_row = from_last(CUBE_COUNT_X, CUBE_POS_X) as usize * side;
    let last_row = min(first_row + side, end) - 1;

    let mut rows = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut keys = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut values = Shared::<[Vector<E, N>]>::new_aligned_slice(comptime!(plan.operand_size() / size), 32usize);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(plan.sums_size()), 32usize);
    let mut weights = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(plan.weights_size()), 32usize);
    let mut partial = Shared::<[f32]>::new_slice(comptime!(tile.units()));
    let mut factors = Shared::<[f32]>::new_slice(side);
    // Whether any reference has moved, in turns, so that one can be taken back while the other is read.
    let mut moved = Shared::<[u32]>::new_slice(2usize);

    let unit = UNIT_POS as usize;
    let row = unit / lanes;
    let lane = unit % lanes;
    let (first_key, last_key) = seen(ranges, first_row + row, end, &seat, group);
    let mut reference = f32::new(NOTHING);
    let mut sum = f32::new(0.0);
    if unit < 2 {
        moved[unit] = 0u32;
    }
    let mut turn = 0usize;
    let mut outputs = Sequence::<product::Sums>::new();
    #[unroll]
    for _ in 0..comptime!(plan.panels()) {
        outputs.push(product::zero(tile));
    }
    read_rows::<E, N>(query, &mut rows, first_row, end, &seat, group, plan);

    let keys_end = last_row / group + 1;
    let mut first = ranges[seat.start + first_row / group] as usize - seat.start;
    while first < keys_end {
        read_rows::<E, N>(key, &mut keys, first, keys_end, &seat, 1usize, plan);
        read_rows::<E, N>(value, &mut values, first, keys_end, &seat, 1usize, plan);
        sync_cube();
        products::<E, N>(&rows, &keys, &mut scores, plan);
        sync_cube();

        let mut largest = f32::new(NOTHING);
        for step in 0..comptime!(side / lanes) {
            let column = lane + step * lanes;
            if first + column >= first_key && first + column <= last_key {
                largest = max(largest, scores[row * comptime!(tile.sums_stride()) + column] * scale);
            }
        }
        partial[unit] = largest;
        sync_cube();
        #[unroll]
        for other in 0..lanes {
            largest = max(largest, partial[row * lanes + other]);
        }
        let mut factor = f32::new(1.0);
        if largest > reference + f32::new(SLACK) {
            factor = (reference - largest).exp();
            reference = largest;
            moved[turn] = 1u32;
        }
        if lane == 0 {
            factors[row] = factor;
        }
        sum *= factor;
        for step in 0..comptime!(side / lanes) {
            let column = lane + step * lanes;
            let mut weight = f32::new(0.0);
            if first + column >= first_key && first + column <= last_key {
                weight = (scores[row * comptime!(tile.sums_stride()) + column] * scale - reference).exp();
            }
            sum += weight;
            weights[row * comptime!(plan.weights().stride) + column] = Vector::<E, Const<1>>::new(E::cast_from(weight));
        }
        sync_cube();

        if moved[turn] == 1u32 {
            #[unroll]
            for panel in 0..comptime!(plan.panels()) {
                product::scale_rows(outputs.index_mut(panel), &factors, &mut scores, tile);
            }
        }
        turn = 1 - turn;
        if unit == 0 {
            moved[turn] = 0u32;
        }
        #[unroll]
        for panel in 0..comptime!(plan.panels()) {
            product::multiply::<E, Const<1>, N>(
                outputs.index_mut(panel),
                &weights,
                0usize,
                comptime!(plan.weights()),
                &values,
                comptime!(panel * side).runtime(),
                comptime!(plan.operand()),
                tile,
            );
        }
        sync_cube();
        first += side;
    }

    partial[unit] = sum;
    sync_cube();
    if lane == 0 {
        let mut total = f32::new(0.0);
        #[unroll]
        for other in 0..lanes {
            total += partial[row * lanes + other];
        }
        if first_row + row < end {
            factors[row] = f32::new(1.0) / total;
            log_sums[seat.number(first_row + row, group, plan)] = reference + total.ln();
        }
    }
    sync_cube();
    #[unroll]
    for panel in 0..comptime!(plan.panels()) {
        write_panel::<E, N>(
            outputs.index(panel),
            &mut scores,
            &factors,
            0usize,
            output,
            panel,
            first_row,
            end,
            &seat,
            group,
            plan,
        );
    }
}
