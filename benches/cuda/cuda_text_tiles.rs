//! The kernels that multiply tiles themselves, in the forms they take on the device described in `cuda_text`: with tensor
//! cores for f16 and bf16, with registers for f32.

use super::*;
use cubecl_cpp::{
    cuda::{arch::CudaArchitecture, mma::CudaCmmaCompiler},
    shared::register_wmma_features,
};
use limbeck_kernels::{
    attention::Heads,
    device::cube::{
        attention::attention_forward,
        attention_gradients::{attention_key_gradients, attention_query_gradient, row_numbers},
        grouped_matmul::{GroupedPlan, grouped_product},
        plans::{Cut, Plans},
    },
};

const TOKENS: usize = 8192;
const EXPERTS: usize = 16;
const OUTER: usize = 8192;

/// Tensor cores as cubecl's runtime finds them on an H100.
pub fn with_tensor_cores(device: Arc<DeviceProperties>) -> Arc<DeviceProperties> {
    let mut device = Arc::unwrap_or_clone(device);
    let architecture = CudaArchitecture { version: 90, tensor_cores: true };
    register_wmma_features(CudaCmmaCompiler::Cpp.supported_cmma_combinations(&architecture), &mut device);
    Arc::new(device)
}

pub fn write(writer: &Writer, device: &Arc<DeviceProperties>, target: &Arc<TargetProperties>) {
    for (name, kind) in [("f32", FloatKind::F32), ("f16", FloatKind::F16), ("bf16", FloatKind::BF16)] {
        let element = ElemType::Float(kind);
        // Llama 4's heads, and those of smaller models.
        for (query_heads, key_heads, head_dim) in [(40, 8, 128), (32, 8, 64)] {
            let heads = Heads { query_heads, key_heads, head_dim };
            write_attention(writer, device, target, heads, name, element);
        }
        write_grouped(writer, device, target, name, element);
    }
}

fn write_attention(
    writer: &Writer,
    device: &Arc<DeviceProperties>,
    target: &Arc<TargetProperties>,
    heads: Heads,
    name: &str,
    element: ElemType,
) {
    let plans = Plans::fitting(device, element, heads).expect("an H100 has room");
    let Heads { query_heads, key_heads, head_dim } = heads;
    let queries = || operand(TOKENS * query_heads * head_dim);
    let keys = || operand(TOKENS * key_heads * head_dim);
    let cubes = || CubeCount::Static((TOKENS / 64) as u32, key_heads as u32, 1);
    let units = |units: usize| CubeDim::new_1d(units as u32);
    let kernel = attention_forward::create_dummy_kernel(
        device.clone(),
        target.clone(),
        cubes(),
        units(plans.forward.tile.units()),
        AddressType::U32,
        plans.vector,
        queries(),
        keys(),
        keys(),
        operand(TOKENS),
        queries(),
        operand(TOKENS * query_heads),
        TOKENS,
        1.0,
        plans.forward,
        element,
    );
    writer.write(&format!("attention_forward_{head_dim}_{name}"), &kernel);
    let kernel = row_numbers::create_dummy_kernel(
        device.clone(),
        target.clone(),
        cubes(),
        units(UNITS),
        AddressType::U32,
        plans.vector,
        queries(),
        queries(),
        operand(TOKENS * query_heads),
        operand(2 * TOKENS * query_heads),
        TOKENS * query_heads,
        head_dim,
        element,
    );
    writer.write(&format!("row_numbers_{head_dim}_{name}"), &kernel);
    let kernel = attention_query_gradient::create_dummy_kernel(
        device.clone(),
        target.clone(),
        cubes(),
        units(plans.backward.tile.units()),
        AddressType::U32,
        plans.vector,
        queries(),
        keys(),
        keys(),
        queries(),
        operand(2 * TOKENS * query_heads),
        operand(2 * TOKENS),
        queries(),
        TOKENS,
        1.0,
        plans.backward,
        element,
    );
    writer.write(&format!("attention_query_gradient_{head_dim}_{name}"), &kernel);
    let kernel = attention_key_gradients::create_dummy_kernel(
        device.clone(),
        target.clone(),
        cubes(),
        units(plans.backward.tile.units()),
        AddressType::U32,
        plans.vector,
        queries(),
        keys(),
        keys(),
        queries(),
        operand(2 * TOKENS * query_heads),
        operand(2 * TOKENS),
        keys(),
        keys(),
        TOKENS,
        1.0,
        plans.backward,
        element,
    );
    writer.write(&format!("attention_key_gradients_{head_dim}_{name}"), &kernel);
}

fn write_grouped(
    writer: &Writer,
    device: &Arc<DeviceProperties>,
    target: &Arc<TargetProperties>,
    name: &str,
    element: ElemType,
) {
    let cut = Cut::fitting(device, element, WIDTH, OUTER).expect("an H100 has room");
    for (form, left_turned, right_turned) in [
        ("grouped_product", false, false),
        ("grouped_rows_gradient", false, true),
        ("grouped_weights_gradient", true, false),
    ] {
        // Maverick's 128 matrices have more elements than 32 bits count.
        for (width_name, address) in [("", AddressType::U32), ("_64", AddressType::U64)] {
            let kernel = grouped_product::create_dummy_kernel(
                device.clone(),
                target.clone(),
                CubeCount::Static(TOKENS as u32 / 128, OUTER as u32 / 128, 1),
                CubeDim::new_1d(cut.tile.units() as u32),
                address,
                cut.vector,
                operand(TOKENS * WIDTH),
                operand(EXPERTS * WIDTH * OUTER),
                operand(TOKENS * OUTER),
                operand(6 * TOKENS),
                0,
                OUTER,
                WIDTH,
                OUTER,
                GroupedPlan { tile: cut.tile, left_turned, right_turned },
                element,
            );
            writer.write(&format!("{form}{width_name}_{name}"), &kernel);
        }
    }
}
