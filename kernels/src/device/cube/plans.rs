//! How the kernels that multiply tiles themselves cut their work on a device: as large as its memory allows.

use cubecl::ir::{DeviceProperties, ElemType, FloatKind};

use super::{
    attention::AttentionPlan,
    grouped_matmul::GroupedPlan,
    product::{FRAGMENT, PLANE, Tile},
};
use crate::attention::Heads;

/// Whether the device has instructions that multiply fragments of this type and add them up in f32.
pub fn has_matrix_instructions(properties: &DeviceProperties, element: ElemType) -> bool {
    let sums = ElemType::Float(FloatKind::F32);
    let hardware = &properties.hardware;
    let planes = hardware.plane_size_min as usize == PLANE && hardware.plane_size_max as usize == PLANE;
    // f32 operands would be rounded to TF32, which is not what was asked for.
    let whole = element == sums;
    planes
        && !whole
        && properties.features.matmul.cmma.iter().any(|config| {
            let sides = [config.m, config.n, config.k].map(|side| side as usize);
            (config.a_type, config.b_type, config.cd_type) == (element, element, sums) && sides == [FRAGMENT; 3]
        })
}

/// Elements that 16 bytes hold, or fewer where they do not divide all of these widths.
pub fn vector_size(widths: &[usize], element: ElemType) -> usize {
    let fits = |size: &usize| widths.iter().all(|width| width.is_multiple_of(*size));
    [8, 4, 2].into_iter().find(|size| size * element.size() <= 16 && fits(size)).unwrap_or(1)
}

/// How the kernels of a call are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plans {
    pub forward: AttentionPlan,
    pub backward: AttentionPlan,
    /// Elements read at once.
    pub vector: usize,
}

/// What of its padded width a head may leave empty: a wider tile would do work for nothing.
const MOST_EMPTY: usize = 4;

impl Plans {
    /// The widest tiles that a device has memory for, or `None` where not even the smallest fit.
    pub fn fitting(properties: &DeviceProperties, element: ElemType, heads: Heads) -> Option<Plans> {
        let tensor_cores = has_matrix_instructions(properties, element);
        let memory = properties.hardware.max_shared_memory_size;
        let most_units = properties.hardware.max_units_per_cube as usize;
        let fitting = |operands: usize, weights: usize, planes: usize| {
            let tile = |side: usize| -> Tile {
                let (row_workers, column_workers) = match (tensor_cores, side) {
                    (true, 64) => (2, planes / 2),
                    (true, 32) => (2, 2),
                    (true, _) => (1, 1),
                    (false, 64) => (16, 16),
                    (false, _) => (8, 8),
                };
                Tile { rows: side, columns: side, inner: side, row_workers, column_workers, tensor_cores }
            };
            let sides: &[usize] = if tensor_cores { &[64, 32, 16] } else { &[64, 32, 16, 8] };
            let plans = sides.iter().map(|&side| AttentionPlan {
                tile: tile(side),
                head_dim: heads.head_dim,
                group: heads.query_heads / heads.key_heads,
                key_heads: heads.key_heads,
            });
            let smallest = *sides.last().expect("there are sides");
            plans.into_iter().find(|plan| {
                let padded = plan.panels() * plan.side();
                let bytes = (operands * plan.operand_size() + weights * plan.weights_size()) * element.size()
                    + (plan.sums_size() + plan.tile.units() + 2 * plan.side() + 2) * 4;
                let empty = (padded - heads.head_dim) * MOST_EMPTY;
                bytes <= memory
                    && plan.tile.units() <= most_units
                    && (empty <= heads.head_dim || plan.side() == smallest)
            })
        };
        let planes = if heads.head_dim <= 128 { 4 } else { 8 };
        let vector = if tensor_cores { vector_size(&[heads.head_dim], element) } else { 1 };
        Some(Plans { forward: fitting(3, 1, planes)?, backward: fitting(4, 2, 8)?, vector })
    }
}

/// How a cube's work is cut, and how many elements are read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub tile: Tile,
    pub vector: usize,
}

impl Cut {
    /// The largest tile that a device has memory for, or `None` where not even the smallest fits.
    pub fn fitting(properties: &DeviceProperties, element: ElemType, inner: usize, outer: usize) -> Option<Cut> {
        let tensor_cores = has_matrix_instructions(properties, element);
        let memory = properties.hardware.max_shared_memory_size;
        let most_units = properties.hardware.max_units_per_cube as usize;
        let tile = |side: usize, inner: usize, row_workers: usize, column_workers: usize| Tile {
            rows: side,
            columns: side,
            inner,
            row_workers,
            column_workers,
            tensor_cores,
        };
        let tiles = if tensor_cores {
            [tile(128, 32, 2, 4), tile(64, 32, 2, 2), tile(32, 32, 2, 2)]
        } else {
            [tile(64, 16, 16, 16), tile(32, 16, 8, 8), tile(16, 16, 8, 8)]
        };
        let fits = |tile: &Tile| {
            // The form that takes most.
            let plan = GroupedPlan { tile: *tile, left_turned: false, right_turned: true };
            let bytes = 2 * (plan.left_size() + plan.right_size()) * element.size()
                + tile.rows * tile.sums_stride() * size_of::<f32>();
            bytes <= memory && tile.units() <= most_units
        };
        let vector = if tensor_cores { vector_size(&[inner, outer], element) } else { 1 };
        tiles.into_iter().find(fits).map(|tile| Cut { tile, vector })
    }
}
