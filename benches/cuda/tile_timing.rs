//! Times attention and the grouped product, forward and backward apart, at Llama 4's sizes, for `device_timing` to print
//! as CSV after the operations that only memory limits. docs/performance.md has the FLOPs to put against these times.

use std::sync::Arc;

use burn::tensor::{DType, Device};
use burn_cubecl::tensor::CubeTensor;
use limbeck_kernels::{
    attention::{Heads, KeyRanges},
    device::{
        attention::{Attention, plans},
        grouped_matmul::{GroupedMatmul, cut},
    },
};

use crate::operation_timing::{Timer, fill};

const INNER: usize = 5120;
const OUTER: usize = 8192;

pub fn print_all(device: &Device, type_name: &str, dtype: DType, repeats: usize) {
    let burn::backend::DispatchDevice::Cube(cube_device) = device.as_dispatch() else {
        panic!("a device with kernels");
    };
    let timer = Timer { device, type_name, repeats };
    let tensor = |shape: &[usize]| fill(shape, dtype, cube_device);
    // Without tensor cores a step of this size takes seconds.
    let tokens = if dtype == DType::F32 { 2048 } else { 8192 };
    let heads = Heads { query_heads: 40, key_heads: 8, head_dim: 128 };
    for (name, sequence_len, window) in
        [("causal", tokens, tokens), ("causal in four documents", tokens / 4, tokens), ("window of 1024", tokens, 1024)]
    {
        let first_key = (0..tokens).map(|token: usize| {
            let start = token / sequence_len * sequence_len;
            start.max((token + 1).saturating_sub(window)) as u32
        });
        let ranges = KeyRanges { first_key: Arc::new(first_key.collect()), sequence_len };
        let plans = plans(device, dtype, heads).expect("kernels for Llama 4's heads");
        let operation = Attention { heads, ranges, plans };
        let [query, key, value] = [40, 8, 8].map(|heads| tensor(&[tokens, heads * 128]));
        let element = dtype.size();
        let (wide, narrow) = (tokens * 40 * 128 * element, tokens * 8 * 128 * element);
        let bytes = [2 * wide + 2 * narrow, 5 * wide + 4 * narrow];
        timer.both_ways(&format!("attention of {tokens} {name}"), &operation, &[query, key, value], bytes);
    }
    for experts in [16, 128] {
        if dtype == DType::F32 && experts == 128 {
            continue;
        }
        let x = tensor(&[tokens, INNER]);
        let weights: CubeTensor = tensor(&[experts, INNER, OUTER]);
        let offsets = Arc::new((0..=experts).map(|expert| expert * tokens / experts).collect::<Vec<_>>());
        let cut = cut(device, dtype, INNER, OUTER).expect("a kernel for Llama 4's experts");
        let element = dtype.size();
        let matrices = experts * INNER * OUTER * element;
        let rows = tokens * (INNER + OUTER) * element;
        let name = format!("grouped_matmul of {tokens} rows in {experts}");
        timer.both_ways(
            &name,
            &GroupedMatmul { offsets, cut },
            &[x, weights],
            [matrices + rows, 2 * (matrices + rows)],
        );
    }
}
