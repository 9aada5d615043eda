//! The kernels of the operations beside the loss, at Llama 4's sizes, for `cuda_text` to write.

use std::sync::Arc;

use cubecl::prelude::*;
use cubecl_core::ir::{AddressType, DeviceProperties, ElemType, FloatKind, TargetProperties};
use limbeck_kernels::device::cube::{
    UNITS,
    adamw::adamw,
    gather_rows::{pick_rows, sum_picked_rows},
    lanes,
    rms_norm::{rms_norm, rms_norm_backward, sum_partials},
    rotary::{turn_halves, turn_neighbours},
    swiglu::{gated_silu, gated_silu_backward, swiglu, swiglu_backward},
};

use super::{ROWS, WIDTH, Writer, operand};

const HEAD: usize = 128;
const EXPERT_WIDTH: usize = 8192;
const VOCABULARY: usize = 202_048;
/// Rows one after the other where a weight's gradient is summed, and the sums that are left.
const ROWS_EACH: usize = 16;
const PARTIALS: usize = ROWS / ROWS_EACH;

pub fn write(writer: &Writer, device: &Arc<DeviceProperties>, target: &Arc<TargetProperties>) {
    let dim = CubeDim::new_1d(UNITS as u32);
    let threads = |count: usize| CubeCount::Static((count / UNITS) as u32, 1, 1);
    let places = AddressType::U32;
    // What a device reads at once is sixteen bytes.
    let element_types = [("f32", FloatKind::F32, 4), ("f16", FloatKind::F16, 8), ("bf16", FloatKind::BF16, 8)];
    for (element_name, kind, vector) in element_types {
        let element = ElemType::Float(kind);
        // Rows of the hidden states with a weight, and heads of queries without.
        for (name, rows, width, weighted) in [("rms_norm", ROWS, WIDTH, true), ("unit_rms", ROWS * 40, HEAD, false)] {
            let (all, vectors) = (rows * width / vector, width / vector);
            let lanes = lanes(vectors);
            let kernel = rms_norm::create_dummy_kernel(
                device.clone(),
                target.clone(),
                threads(rows * lanes),
                dim,
                places,
                vector,
                operand(all),
                operand(vectors),
                operand(all),
                operand(rows),
                rows,
                vectors,
                1.0,
                1e-5,
                weighted,
                lanes,
                element,
            );
            writer.write(&format!("{name}_{element_name}"), &kernel);
            let kernel = rms_norm_backward::create_dummy_kernel(
                device.clone(),
                target.clone(),
                threads(rows * lanes),
                dim,
                places,
                vector,
                operand(all),
                operand(vectors),
                operand(all),
                operand(rows),
                operand(all),
                operand(PARTIALS * width),
                rows,
                vectors,
                ROWS_EACH,
                1.0,
                weighted,
                weighted,
                lanes,
                vectors.div_ceil(lanes),
                element,
            );
            writer.write(&format!("{name}_backward_{element_name}"), &kernel);
        }
        let kernel = sum_partials::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(WIDTH * 8),
            dim,
            places,
            operand(PARTIALS * WIDTH),
            operand(WIDTH),
            PARTIALS,
            WIDTH,
            element,
        );
        writer.write(&format!("sum_partials_{element_name}"), &kernel);
        let (heads, half) = (WIDTH / HEAD, HEAD / 2);
        let kernel = turn_halves::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(ROWS * WIDTH / 8),
            dim,
            places,
            4,
            operand(ROWS * WIDTH / 4),
            operand(ROWS * half / 4),
            operand(ROWS * half / 4),
            operand(ROWS * WIDTH / 4),
            ROWS * WIDTH / 8,
            heads,
            half / 4,
            1.0,
            element,
        );
        writer.write(&format!("turn_halves_{element_name}"), &kernel);
        let all = ROWS * WIDTH / vector;
        let kernel = turn_neighbours::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(all),
            operand(ROWS * half),
            operand(ROWS * half),
            operand(all),
            all,
            heads,
            half,
            1.0,
            element,
        );
        writer.write(&format!("turn_neighbours_{element_name}"), &kernel);
        let (all, width) = (ROWS * EXPERT_WIDTH / vector, EXPERT_WIDTH / vector);
        let kernel = swiglu::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(2 * all),
            operand(all),
            all,
            width,
            element,
        );
        writer.write(&format!("swiglu_{element_name}"), &kernel);
        let kernel = swiglu_backward::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(2 * all),
            operand(all),
            operand(2 * all),
            all,
            width,
            element,
        );
        writer.write(&format!("swiglu_backward_{element_name}"), &kernel);
        let kernel = gated_silu::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(all),
            operand(all),
            operand(all),
            all,
            element,
        );
        writer.write(&format!("gated_silu_{element_name}"), &kernel);
        let kernel = gated_silu_backward::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(all),
            operand(all),
            operand(all),
            operand(all),
            operand(all),
            all,
            element,
        );
        writer.write(&format!("gated_silu_backward_{element_name}"), &kernel);
        let (all, table, width) = (ROWS * WIDTH / vector, VOCABULARY * WIDTH / vector, WIDTH / vector);
        let kernel = pick_rows::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            vector,
            operand(table),
            operand(ROWS),
            operand(all),
            all,
            width,
            element,
        );
        writer.write(&format!("pick_rows_{element_name}"), &kernel);
        let kernel = sum_picked_rows::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(table),
            dim,
            places,
            vector,
            operand(all),
            operand(ROWS),
            operand(VOCABULARY + 1),
            operand(table),
            table,
            width,
            element,
        );
        writer.write(&format!("sum_picked_rows_{element_name}"), &kernel);
    }
    let all = VOCABULARY * WIDTH / 4;
    for (name, in_place) in [("adamw_in_place", true), ("adamw", false)] {
        let output = |input| if in_place { BufferArg::alias(input, all) } else { operand(all) };
        let kernel = adamw::create_dummy_kernel(
            device.clone(),
            target.clone(),
            threads(all),
            dim,
            places,
            4,
            operand(all),
            operand(all),
            operand(all),
            operand(all),
            output(0),
            output(2),
            output(3),
            all,
            1.0,
            0.9,
            0.1,
            0.95,
            0.05,
            1.0,
            1e-8,
            1.0,
            1e-3,
        );
        writer.write(name, &kernel);
    }
}
