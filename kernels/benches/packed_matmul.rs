//! Products with packed weights beside those of the crate `gemm`, which packs both operands every time, in turn; medians.
//! Prints a row per shape: GFLOP per second of processor time, on the number of threads given (two without one), and
//! the same by the clock. Then the same for rows and weights in bfloat16 by each instruction set that is worth a column,
//! AMX among them where the machine has it.
//!
//! ```sh
//! cargo bench -p limbeck-kernels --bench packed_matmul -- [threads]
//! ```

use std::time::Instant;

use limbeck_kernels::packed_matmul::{Element, Instructions, Order, PackedMatrix, multiply, multiply_with};

/// Rows, inputs, outputs: the layers of SmolLM2-135M and its head, expert-like layers, and few rows.
const SHAPES: [[usize; 3]; 14] = [
    [2048, 576, 576],
    [2048, 576, 1536],
    [2048, 1536, 576],
    [256, 576, 49_152],
    [2048, 576, 49_152],
    [64, 5120, 1024],
    [64, 1024, 5120],
    [512, 5120, 1024],
    [2048, 5120, 1024],
    [2048, 1024, 5120],
    [1, 5120, 8192],
    [4, 5120, 8192],
    [8, 5120, 8192],
    [1, 576, 49_152],
];
/// Work of one shape in one measurement of one kind.
const FLOPS: f64 = 6e10;

fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// Processor time of all threads so far, which other programs on the machine disturb less than they do the clock.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a place for what the call writes.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(failed, 0, "the processor time is known");
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// By the clock, and of the processor.
fn seconds(work: impl FnOnce()) -> [f64; 2] {
    let (began, spent) = (Instant::now(), processor_seconds());
    work();
    [began.elapsed().as_secs_f64(), processor_seconds() - spent]
}

fn median(times: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|which| {
        let mut times: Vec<f64> = times.iter().map(|time| time[which]).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    })
}

fn gemm_product(rows: &[f32], weights: &[f32], output: &mut [f32], [row_count, inputs, outputs]: [usize; 3]) {
    assert!(rows.len() == row_count * inputs && weights.len() == inputs * outputs);
    assert_eq!(output.len(), row_count * outputs);
    let parallel = match rayon::current_num_threads() {
        1 => gemm::Parallelism::None,
        _ => gemm::Parallelism::Rayon(0),
    };
    let (row, column) = (inputs as isize, outputs as isize);
    // SAFETY: the lengths were compared with the shape, and the strides are those of row-major matrices, the weights'
    // turned.
    unsafe {
        let output = output.as_mut_ptr();
        let (rows, weights) = (rows.as_ptr(), weights.as_ptr());
        gemm::gemm(
            row_count, outputs, inputs, output, 1, column, false, rows, 1, row, weights, row, 1, 0.0, 1.0, false,
            false, false, parallel,
        );
    }
}

fn main() {
    let threads = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(2);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().expect("no pool was made before");
    println!(
        "| rows x in x out | gemm | packed f32 | of gemm | packed bf16 | of f32 | AVX2, f32 | GB/s of bf16 weights | by the clock: gemm | f32 of it | bf16 of f32 |"
    );
    println!("|{}", "---|".repeat(11));
    SHAPES.iter().for_each(|&shape| exact(shape));
    println!();
    match Instructions::amx() {
        Ok(()) => println!("Best: {}.", Instructions::best()),
        Err(why) => println!("Best: {}. No AMX: {why}.", Instructions::best()),
    }
    println!();
    println!(
        "| rows x in x out, all in bfloat16 |{}",
        sets().map(|set| format!(" {set} | by the clock |")).collect::<String>()
    );
    println!("|{}", "---|".repeat(1 + 2 * sets().count()));
    SHAPES.iter().for_each(|&shape| rounded(shape));
}

/// Those without AVX-512 where there are others are left out.
fn sets() -> impl Iterator<Item = Instructions> {
    let all = Instructions::available();
    all[all.len().saturating_sub(1).min(2)..].iter().copied()
}

/// Products of rows and weights that are rounded to bfloat16.
fn rounded([row_count, inputs, outputs]: [usize; 3]) {
    let rows = random(row_count * inputs, 1);
    let weights = random(inputs * outputs, 2);
    let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let packed = PackedMatrix::rounded(&bytes, Element::F32, Order::OutputMajor, inputs, outputs);
    let mut output = vec![0.0f32; row_count * outputs];
    let flops = 2.0 * (row_count * inputs * outputs) as f64;
    let rounds = ((FLOPS / flops) as usize).clamp(5, 60);
    let mut times = vec![Vec::new(); sets().count()];
    for _ in 0..rounds {
        for (set, times) in sets().zip(&mut times) {
            times.push(seconds(|| multiply_with(set, &rows, &packed, &mut output)));
        }
    }
    let rates = times.iter().map(|times| {
        let [clock, processor] = median(times).map(|seconds| flops / seconds / 1e9);
        format!(" {processor:.1} | {clock:.1} |")
    });
    println!("| {row_count} x {inputs} x {outputs} |{}", rates.collect::<String>());
}

fn exact(shape: [usize; 3]) {
    let [row_count, inputs, outputs] = shape;
    let rows = random(row_count * inputs, 1);
    let weights = random(inputs * outputs, 2);
    let narrow: Vec<f32> = weights.iter().map(|weight| f32::from_bits(weight.to_bits() & 0xffff_0000)).collect();
    let pack = |values: &[f32]| PackedMatrix::pack_f32(values, Order::OutputMajor, inputs, outputs);
    let (wide, narrow) = (pack(&weights), pack(&narrow));
    assert!(narrow.is_bf16() && !wide.is_bf16());
    let mut output = vec![0.0f32; row_count * outputs];
    let flops = 2.0 * (row_count * inputs * outputs) as f64;
    let rounds = ((FLOPS / flops) as usize).clamp(5, 60);
    let avx2 = Instructions::available().get(1).copied();
    let mut times: [Vec<[f64; 2]>; 4] = Default::default();
    for _ in 0..rounds {
        times[0].push(seconds(|| gemm_product(&rows, &weights, &mut output, shape)));
        times[1].push(seconds(|| multiply(&rows, &wide, &mut output)));
        times[2].push(seconds(|| multiply(&rows, &narrow, &mut output)));
        if let Some(avx2) = avx2 {
            times[3].push(seconds(|| multiply_with(avx2, &rows, &wide, &mut output)));
        }
    }
    let [gemm, wide, narrow_time, avx2] = times.map(|times| median(&times));
    let rate = |seconds: f64| flops / seconds / 1e9;
    println!(
        "| {row_count} x {inputs} x {outputs} | {:.1} | {:.1} | {:.2} | {:.1} | {:.2} | {:.1} | {:.1} | {:.1} | {:.2} | {:.2} |",
        rate(gemm[1]),
        rate(wide[1]),
        gemm[1] / wide[1],
        rate(narrow_time[1]),
        wide[1] / narrow_time[1],
        rate(avx2[1]),
        narrow.bytes() as f64 / narrow_time[0] / 1e9,
        rate(gemm[0]),
        gemm[0] / wide[0],
        wide[0] / narrow_time[0],
    );
}
