//! The attention half: norm, projections, rotation, and attention by tiles of keys, whose scores are never whole.

use std::ops::Range;

use rayon::prelude::*;

use super::{
    norm_into, normed, rows_at_once,
    workspace::{Workspace, with_workspace},
};
use crate::{
    attention::{Heads, KeyRanges},
    packed_matmul::{
        Instructions, Line, MAX_TILE_ROWS, NO_SUMS, NO_TILE, Numbers, PANEL, PackedMatrix, Panel, multiply_with,
        product,
    },
    profile,
    rms_norm::norm_row,
    rotary::RotaryTable,
    vector_math::{exp, vectorised},
};

/// How queries and keys are normed, head by head.
#[derive(Debug, Clone, Copy)]
pub enum HeadNorm<'a> {
    None,
    /// With weights `[head_dim]` of queries and keys, before the rotation (Qwen3).
    WeightedBeforeRotary([&'a [f32]; 2]),
    /// Without weights, after the rotation, and only where there is one (Llama 4).
    UnitAfterRotary,
}

/// The attention half of a block. Matrices are `[outputs, inputs]`.
#[derive(Debug, Clone, Copy)]
pub struct AttentionHalf<'a> {
    /// `[hidden]`
    pub norm: &'a [f32],
    pub eps: f32,
    pub query: &'a PackedMatrix,
    pub key: &'a PackedMatrix,
    pub value: &'a PackedMatrix,
    pub output: &'a PackedMatrix,
    /// Of queries, keys and values.
    pub biases: Option<[&'a [f32]; 3]>,
    pub head_norm: HeadNorm<'a>,
    pub rotary: Option<&'a RotaryTable>,
    /// What each token's query is multiplied by.
    pub query_scales: Option<&'a [f32]>,
    pub heads: Heads,
    pub ranges: &'a KeyRanges,
}

/// Keys whose scores are held at once, counted from the start of a sequence: what is summed with what follows from it.
const KEY_TILE: usize = 512;

/// Queries, keys and values of all tokens, side by side: `[N, (query_heads + 2 key_heads) * head_dim]`.
pub(super) struct Projected {
    values: Vec<f32>,
    width: usize,
}

impl AttentionHalf<'_> {
    fn widths(&self) -> [usize; 3] {
        [self.query.outputs(), self.key.outputs(), self.value.outputs()]
    }

    /// Queries and keys as they meet, and values.
    pub(super) fn project(&self, instructions: Instructions, hidden: &[f32]) -> Projected {
        let inputs = self.query.inputs();
        let (rows, width) = (hidden.len() / inputs, self.widths().iter().sum());
        let mut values = vec![0.0; rows * width];
        let matrices = [self.query, self.key, self.value];
        match rows_at_once(rows) {
            Some(count) => {
                let pieces = values.par_chunks_mut(count * width).zip(hidden.par_chunks(count * inputs)).enumerate();
                pieces.for_each(|(number, (values, hidden))| {
                    let _span = profile::piece("norm, query, key and value products, rotary");
                    with_workspace(instructions, |workspace| {
                        norm_into(instructions, hidden, self.norm, self.eps, self.query.numbers(), workspace);
                        let (mut before, mut sums) = (0, NO_SUMS);
                        for matrix in matrices {
                            for panel in 0..matrix.outputs().div_ceil(PANEL) {
                                let next = matrix.panel_after(panel);
                                let columns = PANEL.min(matrix.outputs() - panel * PANEL);
                                for tile in 0..workspace.rows.tile_count() {
                                    let weights = matrix.panel(panel);
                                    workspace.rows.product(instructions, tile, weights, next, &mut sums);
                                    let (first, count) = workspace.rows.rows_of(tile);
                                    for (row, sums) in (first..first + count).zip(&sums) {
                                        let place = row * width + before + panel * PANEL;
                                        values[place..][..columns].copy_from_slice(&sums[..columns]);
                                    }
                                }
                            }
                            before += matrix.outputs();
                        }
                        for (row, values) in values.chunks_mut(width).enumerate() {
                            self.place(number * count + row, values);
                        }
                    });
                });
            }
            None => {
                let normed = normed(hidden, self.norm, self.eps);
                let mut before = 0;
                for matrix in matrices {
                    let outputs = matrix.outputs();
                    let mut part = vec![0.0; rows * outputs];
                    multiply_with(instructions, &normed, matrix, &mut part);
                    for (values, part) in values.chunks_mut(width).zip(part.chunks(outputs)) {
                        values[before..][..outputs].copy_from_slice(part);
                    }
                    before += outputs;
                }
                values.par_chunks_mut(width).enumerate().for_each(|(row, values)| self.place(row, values));
            }
        }
        Projected { values, width }
    }

    /// Biases, norms, rotation and temperature of a token's queries and keys, in the order the family has them.
    fn place(&self, token: usize, row: &mut [f32]) {
        let [query_width, key_width, _] = self.widths();
        let head_dim = self.heads.head_dim;
        if let Some(biases) = self.biases {
            let mut rest = &mut *row;
            for bias in biases {
                let (part, after) = rest.split_at_mut(bias.len());
                part.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
                rest = after;
            }
        }
        let (query, rest) = row.split_at_mut(query_width);
        let parts = [query, &mut rest[..key_width]];
        let mut before = [0.0f32; 512];
        for (which, part) in parts.into_iter().enumerate() {
            if let HeadNorm::WeightedBeforeRotary(weights) = self.head_norm {
                for head in part.chunks_mut(head_dim) {
                    let before = &mut before[..head_dim];
                    before.copy_from_slice(head);
                    norm_row(before, Some(weights[which]), self.eps, head);
                }
            }
            if let Some(rotary) = self.rotary {
                rotary.turn_in_place(token, part, head_dim);
                if let HeadNorm::UnitAfterRotary = self.head_norm {
                    for head in part.chunks_mut(head_dim) {
                        let before = &mut before[..head_dim];
                        before.copy_from_slice(head);
                        norm_row(before, None, self.eps, head);
                    }
                }
            }
            if let (0, Some(scales)) = (which, self.query_scales) {
                part.iter_mut().for_each(|value| *value *= scales[token]);
            }
        }
    }

    /// What attention gives tokens `first..`.
    ///
    /// # Shapes
    /// - `mixed` `[tokens, query_heads * head_dim]`
    pub(super) fn mix(
        &self,
        instructions: Instructions,
        projected: &Projected,
        first: usize,
        mixed: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let width = self.output.inputs();
        let length = self.ranges.sequence_len;
        let (mut token, mut rest) = (first, mixed);
        // A piece of rows may hold ends of several sequences.
        while !rest.is_empty() {
            let count = (length - token % length).min(rest.len() / width);
            let (part, after) = rest.split_at_mut(count * width);
            for key_head in 0..self.heads.key_heads {
                match self.query.numbers() {
                    Numbers::F32 => self.mix_head::<false>(instructions, projected, token, part, key_head, workspace),
                    Numbers::Bf16 => self.mix_head::<true>(instructions, projected, token, part, key_head, workspace),
                }
            }
            (token, rest) = (token + count, after);
        }
    }

    /// The queries of some tokens of one sequence that share a head of keys.
    fn mix_head<const BF16: bool>(
        &self,
        instructions: Instructions,
        projected: &Projected,
        first: usize,
        mixed: &mut [f32],
        key_head: usize,
        workspace: &mut Workspace,
    ) {
        let Heads { query_heads, key_heads, head_dim } = self.heads;
        let (group, mixed_width) = (query_heads / key_heads, query_heads * head_dim);
        let count = mixed.len() / mixed_width;
        let numbers = if BF16 { Numbers::Bf16 } else { Numbers::F32 };
        let form = instructions.row_form(numbers);
        let sequence = first / self.ranges.sequence_len * self.ranges.sequence_len;
        let end = first + count;
        let first_key = |token: usize| self.ranges.first_key[token] as usize;
        let Workspace { keys, values, queries, scores, rounded, weighted, largest, total, .. } = workspace;
        let scale = (head_dim as f32).sqrt().recip();

        // All queries of the group, member after member, whose tiles do not cross members.
        let tile_height = instructions.tile_height(count, numbers);
        let tiles = count.div_ceil(tile_height);
        weighted.clear();
        weighted.resize(group * count * head_dim, 0.0);
        largest.clear();
        largest.resize(group * count, f32::NEG_INFINITY);
        total.clear();
        total.resize(group * count, 0.0);
        let score_blocks = KEY_TILE.div_ceil(crate::packed_matmul::K_BLOCK);
        scores.resize(score_blocks, NO_TILE);
        rounded.resize(1, NO_TILE);
        let mut query_row = [0.0f32; 512];
        let key_tile_of = |key: usize| (key - sequence) / KEY_TILE;
        for key_tile in key_tile_of(first_key(first))..=key_tile_of(end - 1) {
            let tile_start = sequence + key_tile * KEY_TILE;
            let tile_end = end.min(tile_start + KEY_TILE);
            let panels = self.pack::<BF16>(projected, key_head, tile_start, tile_end, keys, values);
            for member in 0..group {
                let head = key_head * group + member;
                for tile in 0..tiles {
                    let tile_first = first + tile * tile_height;
                    let tile_count = tile_height.min(end - tile_first);
                    let last_token = tile_first + tile_count - 1;
                    // Keys of this tile that any of the queries sees.
                    let from = first_key(tile_first).max(tile_start);
                    let to = (last_token + 1).min(tile_end);
                    if from >= to {
                        continue;
                    }
                    queries.resize(instructions, numbers, tile_count, head_dim);
                    for row in 0..tile_count {
                        let token = tile_first + row;
                        let query = &projected.values[token * projected.width + head * head_dim..][..head_dim];
                        let query_row = &mut query_row[..head_dim];
                        query_row.iter_mut().zip(query).for_each(|(place, value)| *place = value * scale);
                        queries.write_row(row, query_row);
                    }
                    let mut sums = NO_SUMS;
                    let first_panel = (from - tile_start) / PANEL;
                    let last_panel = (to - tile_start).div_ceil(PANEL);
                    for panel in first_panel..last_panel {
                        queries.product(instructions, 0, panels.keys(panel, numbers), None, &mut sums);
                        let column = panel * PANEL;
                        let block = &mut scores[column / crate::packed_matmul::K_BLOCK];
                        let place = column % crate::packed_matmul::K_BLOCK;
                        for (row, sums) in block[..tile_count].iter_mut().zip(&sums) {
                            row[place..place + PANEL].copy_from_slice(sums);
                        }
                    }
                    let mut shrink = [1.0f32; MAX_TILE_ROWS];
                    for (row, shrink) in shrink[..tile_count].iter_mut().enumerate() {
                        let token = tile_first + row;
                        let at = member * count + tile * tile_height + row;
                        let begin = first_key(token).clamp(tile_start, tile_end) - tile_start;
                        let stop = ((token + 1).clamp(tile_start, tile_end) - tile_start).max(begin);
                        *shrink = soften(
                            scores,
                            row,
                            [begin, stop],
                            (last_panel * PANEL).min(KEY_TILE),
                            &mut largest[at],
                            &mut total[at],
                        );
                    }
                    let used = to - tile_start;
                    let weights: &[_] = if BF16 {
                        for row in 0..tile_count {
                            for (block, part) in scores.iter().take(used.div_ceil(K)).enumerate() {
                                let columns = (used - block * K).min(K).next_multiple_of(2);
                                form.write(&part[row][..columns], &mut rounded[0][row][form.place(block * K)..]);
                            }
                            form.end(used, &mut rounded[0][row]);
                        }
                        rounded
                    } else {
                        scores
                    };
                    for column in (0..head_dim).step_by(PANEL) {
                        let columns = PANEL.min(head_dim - column);
                        product(
                            instructions,
                            tile_count,
                            weights.iter().map(|tile| &tile[..]),
                            panels.values(column / PANEL, used, numbers),
                            None,
                            &mut sums,
                        );
                        for row in 0..tile_count {
                            let at = member * count + tile * tile_height + row;
                            let place = &mut weighted[at * head_dim + column..][..columns];
                            for (place, sum) in place.iter_mut().zip(&sums[row]) {
                                *place = *place * shrink[row] + sum;
                            }
                        }
                    }
                }
            }
        }
        for member in 0..group {
            for row in 0..count {
                let at = member * count + row;
                let inverse = total[at].recip();
                let place = &mut mixed[row * mixed_width + (key_head * group + member) * head_dim..][..head_dim];
                let weighted = &weighted[at * head_dim..][..head_dim];
                place.iter_mut().zip(weighted).for_each(|(place, value)| *place = value * inverse);
            }
        }
    }

    /// Lays out keys and values `start..end` of a head.
    fn pack<'w, const BF16: bool>(
        &self,
        projected: &Projected,
        key_head: usize,
        start: usize,
        end: usize,
        keys: &'w mut Vec<Line<f32>>,
        values: &'w mut Vec<Line<f32>>,
    ) -> Panels<'w> {
        let head_dim = self.heads.head_dim;
        let [query_width, key_width, _] = self.widths();
        let key_at = query_width + key_head * head_dim;
        let value_at = query_width + key_width + key_head * head_dim;
        let row = |token: usize, at: usize| &projected.values[token * projected.width + at..][..head_dim];
        let per_line = if BF16 { 2 } else { 1 };
        let (count, key_lines) = (end - start, head_dim.div_ceil(per_line));
        let value_lines = count.div_ceil(per_line);
        let key_panels = count.div_ceil(PANEL);
        let value_panels = head_dim.div_ceil(PANEL);
        grow(keys, key_panels * key_lines);
        grow(values, value_panels * value_lines);
        for (panel, lines) in keys[..key_panels * key_lines].chunks_mut(key_lines).enumerate() {
            let first = start + panel * PANEL;
            let tokens = PANEL.min(end - first);
            for column in 0..PANEL {
                if column >= tokens {
                    lines.iter_mut().for_each(|line| line.0[column] = 0.0);
                    continue;
                }
                let key = row(first + column, key_at);
                match BF16 {
                    false => lines.iter_mut().zip(key).for_each(|(line, &value)| line.0[column] = value),
                    true => lines.iter_mut().zip(key.chunks(2)).for_each(|(line, pair)| {
                        line.0[column] = pair_of(pair[0], pair.get(1).copied().unwrap_or(0.0));
                    }),
                }
            }
        }
        for panel in 0..value_panels {
            let columns = PANEL.min(head_dim - panel * PANEL);
            let lines = &mut values[panel * value_lines..][..value_lines];
            for (number, line) in lines.iter_mut().enumerate() {
                let token = start + number * per_line;
                line.0[columns..].fill(0.0);
                let first = &row(token, value_at)[panel * PANEL..][..columns];
                match BF16 {
                    false => line.0[..columns].copy_from_slice(first),
                    true if token + 1 < end => {
                        let second = &row(token + 1, value_at)[panel * PANEL..][..columns];
                        line.0.iter_mut().zip(first).zip(second).for_each(|((place, &a), &b)| *place = pair_of(a, b));
                    }
                    true => line.0.iter_mut().zip(first).for_each(|(place, &a)| *place = pair_of(a, 0.0)),
                }
            }
        }
        Panels { keys, values, key_lines, value_lines }
    }
}

const K: usize = crate::packed_matmul::K_BLOCK;

#[inline(always)]
fn pair_of(first: f32, second: f32) -> f32 {
    use crate::packed_matmul::nearest;
    f32::from_bits(nearest(first) | nearest(second) << 16)
}

fn grow(lines: &mut Vec<Line<f32>>, count: usize) {
    if lines.len() < count {
        lines.resize(count, Line([0.0; PANEL]));
    }
}

/// Keys and values of a tile, laid out.
struct Panels<'a> {
    keys: &'a [Line<f32>],
    values: &'a [Line<f32>],
    key_lines: usize,
    value_lines: usize,
}

impl Panels<'_> {
    fn keys(&self, panel: usize, numbers: Numbers) -> Panel<'_> {
        Panel::of(&self.keys[panel * self.key_lines..][..self.key_lines], numbers)
    }

    /// The first `used` keys' values.
    fn values(&self, panel: usize, used: usize, numbers: Numbers) -> Panel<'_> {
        let used = match numbers {
            Numbers::F32 => used,
            Numbers::Bf16 => used.div_ceil(2),
        };
        Panel::of(&self.values[panel * self.value_lines..][..used], numbers)
    }
}

/// Turns a row's scores `[begin, stop)` into weights relative to its largest score so far, and all others before `end`
/// into zeros. Gives what earlier sums are multiplied by.
fn soften(
    scores: &mut [crate::packed_matmul::TileRows],
    row: usize,
    [begin, stop]: [usize; 2],
    end: usize,
    largest: &mut f32,
    total: &mut f32,
) -> f32 {
    vectorised(
        #[inline(always)]
        || {
            let mut most = f32::NEG_INFINITY;
            for block in blocks(begin, stop) {
                let part = &scores[block][row][part_of(block, begin, stop)];
                let mut lanes = [f32::NEG_INFINITY; 16];
                let (whole, rest) = part.as_chunks::<16>();
                for chunk in whole {
                    for lane in 0..16 {
                        lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
                    }
                }
                most = lanes.iter().chain(rest).fold(most, |most, &value| if value > most { value } else { most });
            }
            // What a row does not see of this tile leaves it as it was.
            let before = *largest;
            let most = if most > before { most } else { before };
            let shrink = if before == f32::NEG_INFINITY { 0.0 } else { exp(before - most) };
            let mut sum = 0.0;
            for block in blocks(begin, stop) {
                let part = &mut scores[block][row][part_of(block, begin, stop)];
                let mut lanes = [0.0f32; 16];
                let (whole, rest) = part.as_chunks_mut::<16>();
                for chunk in whole {
                    for lane in 0..16 {
                        chunk[lane] = exp(chunk[lane] - most);
                        lanes[lane] += chunk[lane];
                    }
                }
                for (lane, value) in rest.iter_mut().enumerate() {
                    *value = exp(*value - most);
                    lanes[lane] += *value;
                }
                sum += lanes.iter().sum::<f32>();
            }
            for (begin, end) in [(0, begin), (stop, end)] {
                for block in blocks(begin, end) {
                    scores[block][row][part_of(block, begin, end)].fill(0.0);
                }
            }
            *largest = most;
            *total = *total * shrink + sum;
            shrink
        },
    )
}

/// The blocks of k that `begin..end` has a part in. (No closure is called with each: in a closure inside another it would be
/// compiled for processors without wide vectors.)
#[inline(always)]
fn blocks(begin: usize, end: usize) -> Range<usize> {
    if begin < end { begin / K..end.div_ceil(K) } else { 0..0 }
}

/// Where in a block that part is.
#[inline(always)]
fn part_of(block: usize, begin: usize, end: usize) -> Range<usize> {
    let first = block * K;
    begin.max(first) - first..end.min(first + K) - first
}
