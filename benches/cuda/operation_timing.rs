//! Times the device form of every operation beside the loss, forward and backward apart, at Llama 4 Scout's sizes, for
//! `device_timing` to print as CSV. The kernels alone are timed, without a graph.

use std::{sync::Arc, time::Instant};

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Device, FloatDType, Shape, TensorData};
use burn_cubecl::{CubeBackend, CubeDevice, tensor::CubeTensor};
use limbeck_kernels::{
    device::{
        adamw::{Numbers, update_tensors},
        gather_rows::GatherRows,
        op::DeviceOp,
        rms_norm::RmsNorm,
        rotary::Rotary,
        swiglu::Swiglu,
    },
    rotary::{Pairing, RotaryTable},
};

const ROWS: usize = 8192;
const WIDTH: usize = 5120;
const HEAD: usize = 128;
const EXPERT_WIDTH: usize = 8192;
const VOCABULARY: usize = 202_048;
/// Launches between two looks at the clock.
const AT_ONCE: usize = 20;

pub struct Timer<'a> {
    pub device: &'a Device,
    pub type_name: &'a str,
    pub repeats: usize,
}

impl Timer<'_> {
    /// Prints the median and the least time of one call, and what it reads and writes per second.
    fn print(&self, name: &str, bytes: usize, mut work: impl FnMut()) {
        let mut times = vec![];
        // The first calls compile kernels.
        for _ in 0..self.repeats + 2 {
            self.device.sync().expect("a device that works");
            let start = Instant::now();
            (0..AT_ONCE).for_each(|_| work());
            self.device.sync().expect("a device that works");
            times.push(start.elapsed().as_secs_f64() * 1e3 / AT_ONCE as f64);
        }
        let mut times = times.split_off(2);
        times.sort_by(f64::total_cmp);
        let median = times[times.len() / 2];
        println!(
            "{name},{},{:.3},{median:.4},{:.4},{:.0}",
            self.type_name,
            bytes as f64 / 1e9,
            times[0],
            bytes as f64 / median / 1e6
        );
    }

    pub fn both_ways(&self, name: &str, op: &dyn DeviceOp, inputs: &[CubeTensor], bytes: [usize; 2]) {
        let (output, saved) = op.forward(inputs);
        self.print(name, bytes[0], || drop(op.forward(inputs)));
        let needed = vec![true; inputs.len()];
        let inputs = if op.reads_inputs() { inputs } else { &[] };
        self.print(&format!("{name} backward"), bytes[1], || {
            drop(op.backward(inputs, &saved, output.clone(), &needed))
        });
    }
}

pub fn print_all(device: &Device, type_name: &str, dtype: DType, repeats: usize) {
    let burn::backend::DispatchDevice::Cube(cube_device) = device.as_dispatch() else {
        panic!("a device with kernels");
    };
    let timer = Timer { device, type_name, repeats };
    let tensor = |shape: &[usize], dtype: DType| fill(shape, dtype, cube_device);
    let element = dtype.size();
    let hidden = ROWS * WIDTH * element;
    println!("operation,type,gigabytes,median_ms,least_ms,gb_per_s");
    let norm = RmsNorm { eps: 1e-5 };
    let x = tensor(&[ROWS, WIDTH], dtype);
    timer.both_ways("rms_norm", &norm, &[x.clone(), tensor(&[WIDTH], dtype)], [2 * hidden, 3 * hidden]);
    let heads = tensor(&[ROWS * WIDTH / HEAD, HEAD], dtype);
    timer.both_ways("unit_rms", &norm, &[heads], [2 * hidden, 3 * hidden]);
    let positions: Vec<u32> = (0..ROWS as u32).collect();
    let frequencies: Vec<f32> = (0..HEAD / 2).map(|j| 500_000f32.powf(-2.0 * j as f32 / HEAD as f32)).collect();
    for (name, pairing) in [("rotary neighbours", Pairing::Interleaved), ("rotary halves", Pairing::Halves)] {
        let rotary = Rotary { head_dim: HEAD, table: RotaryTable::new(&positions, &frequencies, pairing) };
        timer.both_ways(name, &rotary, std::slice::from_ref(&x), [2 * hidden; 2]);
    }
    let expert = ROWS * EXPERT_WIDTH * element;
    timer.both_ways("swiglu", &Swiglu, &[tensor(&[ROWS, 2 * EXPERT_WIDTH], dtype)], [3 * expert, 5 * expert]);
    let (gate, up) = (tensor(&[ROWS, EXPERT_WIDTH], dtype), tensor(&[ROWS, EXPERT_WIDTH], dtype));
    timer.both_ways("gated_silu", &Swiglu, &[gate, up], [3 * expert, 5 * expert]);
    // Every row once, in another order.
    let dispatch =
        GatherRows { rows: Arc::new((0..ROWS as u32).map(|i| i * 3571 % ROWS as u32).collect()), row_count: ROWS };
    timer.both_ways("gather_rows to experts", &dispatch, &[x], [2 * hidden; 2]);
    let table = tensor(&[VOCABULARY, WIDTH], dtype);
    let rows = (0..ROWS).map(|i| (i * i % VOCABULARY) as u32).collect();
    let embedding = GatherRows { rows: Arc::new(rows), row_count: VOCABULARY };
    let gradient = VOCABULARY * WIDTH * element;
    timer.both_ways("gather_rows of an embedding", &embedding, &[table], [2 * hidden, hidden + gradient]);
    if dtype == DType::F32 {
        let mut state = Some([0; 3].map(|_| tensor(&[VOCABULARY * WIDTH], DType::F32)));
        let gradient = tensor(&[VOCABULARY * WIDTH], DType::F32);
        let numbers = Numbers {
            scale: 1.0,
            beta1: 0.9,
            rest1: 0.1,
            beta2: 0.95,
            rest2: 0.05,
            second_correction: 1.0,
            eps: 1e-8,
            keep: 1.0,
            rate: 1e-6,
        };
        timer.print("adamw in place", 28 * VOCABULARY * WIDTH, || {
            let [weight, first, second] = state.take().expect("put back below");
            let (weight, first, second) = update_tensors(weight, gradient.clone(), first, second, numbers);
            state = Some([weight, first, second]);
        });
    }
}

/// A tensor of numbers near 1 in size; which they are makes no difference to a time.
pub fn fill(shape: &[usize], dtype: DType, device: &CubeDevice) -> CubeTensor {
    let width = *shape.last().expect("at least one axis");
    let row: Vec<f32> = (0..width).map(|i| (i % 31) as f32 / 16.0 - 0.9).collect();
    let row = CubeBackend::float_from_data(TensorData::new(row, [width]), device);
    let row = CubeBackend::float_cast(row, FloatDType::from(dtype));
    let mut shape_of_row = vec![1; shape.len()];
    shape_of_row[shape.len() - 1] = width;
    let row = CubeBackend::float_reshape(row, Shape::from(shape_of_row));
    burn_cubecl::kernel::into_contiguous(CubeBackend::float_expand(row, Shape::from(shape.to_vec())))
}
