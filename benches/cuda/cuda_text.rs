//! Writes the CUDA C++ of every kernel into a folder, one file each, for `nvrtc.py` to compile. Needs
//! no GPU and no CUDA: the device is described here by hand, as cubecl's runtime describes an H100.

mod cuda_text_tiles;
mod operations_text;

use std::{path::PathBuf, sync::Arc};

use cubecl::prelude::*;
use cubecl_core::{
    Compiler, CubeKernel,
    cmma::MatrixLayout,
    device::{DeviceId, ServiceId},
    environment::stream::StreamId,
    ir::{features::Plane, *},
    profile::TimingMethod,
    server::Handle,
};
use cubecl_cpp::{
    cuda::mma::manual::contiguous_elements_cuda,
    register_supported_types,
    shared::{CompilationOptions, CppCompiler, CppSupportedFeatures},
    target::Cuda,
};
use limbeck_kernels::fused_linear_distill::{cube::*, cube_top_k::keep_largest};

/// Rows of a step, Llama 4's width, and the tiles that the device form takes there whatever the vocabulary.
const WIDTH: usize = 5120;
const ROWS: usize = 8192;
const KEPT: usize = 64;
const BLOCK: usize = 2048;
const TILE: usize = 2048;
const PIECE: usize = 1024;

fn device() -> Arc<DeviceProperties> {
    let hardware = HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 232_448,
        max_cube_count: (i32::MAX as u32, 65_535, 65_535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(132),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    };
    let identity = DeviceIdentity { name: "H100, described".into(), fingerprint: "ptx_sm90".into(), physical: None };
    let memory = MemoryDeviceProperties::new(16 << 30, 512);
    let mut properties = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::Device, identity);
    register_supported_types(&mut properties);
    for feature in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        properties.features.plane.insert(feature);
    }
    properties.features.memory_reinterpret = true;
    properties.features.alignment = true;
    Arc::new(properties)
}

fn target() -> Arc<TargetProperties> {
    Arc::new(TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: 32,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    })
}

/// An operand of `count` elements, of which nothing is ever read.
fn operand(count: usize) -> BufferArg {
    let handle = Handle::new(ServiceId::of::<()>(DeviceId::new(0, 0)), StreamId::current(), (count * 32) as u64);
    // SAFETY: thirty-two bytes per element are claimed above, and no kernel is launched.
    unsafe { BufferArg::from_raw_parts(handle, count) }
}

struct Writer {
    folder: PathBuf,
}

impl Writer {
    fn write(&self, name: &str, kernel: &dyn CubeKernel) {
        let options = CompilationOptions {
            warp_size: 32,
            supports_features: CppSupportedFeatures {
                fast_math: true,
                dp4a: true,
                grid_constants: true,
                clusters: true,
                elect_sync: true,
                fast_tanh: true,
            },
            ..Default::default()
        };
        let text = CppCompiler::<Cuda>::default().compile(kernel.define(), &options).expect("a kernel CUDA can have");
        let path = self.folder.join(format!("{name}.cu"));
        // It is asked for at the launch, so that the compiler cannot know of it.
        let shared = format!("// {} bytes of shared memory\n", text.shared_memory_size);
        std::fs::write(&path, shared + &text.to_string()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        println!("{name}");
    }
}

fn main() {
    let folder = PathBuf::from(std::env::args().nth(1).expect("usage: cuda_text FOLDER"));
    std::fs::create_dir_all(&folder).expect("the folder can be made");
    let writer = Writer { folder };
    let (device, target) = (device(), target());
    cuda_text_tiles::write(&writer, &cuda_text_tiles::with_tensor_cores(device.clone()), &target);
    let (few, many) = (CubeDim::new_1d(FEW_UNITS as u32), CubeDim::new_1d(UNITS as u32));
    let per_row = CubeCount::Static(BLOCK as u32, 1, 1);
    let per_number = |columns: usize| CubeCount::Static((columns / UNITS) as u32, BLOCK as u32, 1);
    let logits = || operand(BLOCK * PIECE);

    let kernel = gather_kept::create_dummy_kernel(
        device.clone(),
        target.clone(),
        per_row.clone(),
        few,
        logits(),
        operand(ROWS + 1),
        operand(ROWS * KEPT),
        operand(ROWS),
        operand(ROWS * KEPT),
        operand(ROWS),
        0,
        0,
        PIECE,
        FEW_UNITS,
    );
    writer.write("gather_kept", &kernel);
    for (name, scaled) in [("row_statistics", false), ("row_statistics_scaled", true)] {
        let kernel = row_statistics::create_dummy_kernel(
            device.clone(),
            target.clone(),
            per_row.clone(),
            many,
            logits(),
            operand(ROWS * STATISTICS),
            operand(ROWS),
            0,
            0,
            PIECE,
            1.0,
            scaled,
            UNITS,
        );
        writer.write(name, &kernel);
    }
    let kernel = keep_largest::create_dummy_kernel(
        device.clone(),
        target.clone(),
        per_row.clone(),
        many,
        logits(),
        operand(ROWS * KEPT),
        operand(ROWS * KEPT),
        0,
        0,
        PIECE,
        KEPT,
        UNITS,
    );
    writer.write("keep_largest", &kernel);
    for (element_name, kind) in [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16)] {
        let element = ElemType::Float(kind);
        for (name, scaled) in [("dense_gradient", false), ("dense_gradient_scaled", true)] {
            let kernel = dense_gradient::create_dummy_kernel(
                device.clone(),
                target.clone(),
                per_number(PIECE),
                many,
                logits(),
                operand(BLOCK * TILE),
                operand(ROWS * 4),
                0,
                BLOCK,
                PIECE,
                TILE,
                0,
                1.0,
                scaled,
                element,
            );
            writer.write(&format!("{name}_{element_name}"), &kernel);
        }
        let kernel = place_kept::create_dummy_kernel(
            device.clone(),
            target.clone(),
            per_row.clone(),
            few,
            operand(BLOCK * TILE),
            operand(ROWS + 1),
            operand(ROWS * KEPT),
            operand(ROWS),
            operand(ROWS * KEPT),
            operand(ROWS),
            0,
            0,
            TILE,
            FEW_UNITS,
            element,
        );
        writer.write(&format!("place_kept_{element_name}"), &kernel);
        for (name, keep) in [("add_product_first", false), ("add_product", true)] {
            let kernel = add_product::create_dummy_kernel(
                device.clone(),
                target.clone(),
                per_number(PIECE),
                many,
                operand(TILE * WIDTH),
                logits(),
                BLOCK,
                PIECE,
                WIDTH,
                0,
                1.0,
                keep,
                element,
            );
            writer.write(&format!("{name}_{element_name}"), &kernel);
        }
        for (width_name, address) in [("", AddressType::U32), ("_64", AddressType::U64)] {
            let kernel = gather_rows::create_dummy_kernel(
                device.clone(),
                target.clone(),
                per_number(WIDTH),
                many,
                address,
                operand(ROWS * WIDTH),
                operand(ROWS),
                operand(BLOCK * WIDTH),
                0,
                BLOCK,
                WIDTH,
                WIDTH,
                element,
            );
            writer.write(&format!("gather_rows{width_name}_{element_name}"), &kernel);
            let kernel = scatter_rows::create_dummy_kernel(
                device.clone(),
                target.clone(),
                per_number(WIDTH),
                many,
                address,
                operand(BLOCK * WIDTH),
                operand(ROWS),
                operand(ROWS * WIDTH),
                0,
                BLOCK,
                WIDTH,
                WIDTH,
                element,
            );
            writer.write(&format!("scatter_rows{width_name}_{element_name}"), &kernel);
        }
    }
    operations_text::write(&writer, &device, &target);
}
