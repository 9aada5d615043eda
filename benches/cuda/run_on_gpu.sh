#!/usr/bin/env bash
# Everything about the device forms that needs an NVIDIA GPU: that they are right there, and how long they take.
# Writes benches/results/cuda.csv (the fused loss) and cuda_operations.csv (all others). Needs a driver, CUDA 12 and a Rust
# toolchain; an H100 or H200 takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader

# The same tests as on any other device, against f64 loops, bf16 among them.
cargo test --release -p limbeck-kernels --features cuda,fusion --test device_form --test device_operations --test device_tiles -- --nocapture
cargo test --release -p limbeck-kernels --features cuda --test device_form --test device_operations --test device_tiles
# And by way of the CUDA C++ that benches/cuda/nvrtc.py compiles; without this, cubecl makes PTX by way of LLVM.
cargo test --release -p limbeck-kernels --features cuda,cubecl/cuda-cpp --test device_form --test device_operations --test device_tiles

cargo build --release -p limbeck-kernels --features cuda,burn/autotune --example device_timing
mkdir -p benches/results
results=benches/results/cuda.csv
: > "$results"
timing() {
    cargo run --quiet --release -p limbeck-kernels --features cuda,burn/autotune --example device_timing -- "$@" |
        tee /dev/stderr | if [ -s "$results" ]; then tail -n 1; else cat; fi >> "$results"
}
# Tokens, width, vocabulary, kept ids, type, repeats.
timing 8192 4096 128256 64 bf16 20
timing 8192 5120 202048 64 bf16 20
timing 8192 5120 202048 64 f16 20
timing 2048 5120 202048 64 bf16 20
timing 2048 576 49152 64 f32 20
operations=benches/results/cuda_operations.csv
: > "$operations"
for type in bf16 f16 f32; do
    # 202,048 rows of 5120 in f32, four times for AdamW, take 17 GB.
    cargo run --quiet --release -p limbeck-kernels --features cuda,burn/autotune --example device_timing -- \
        operations "$type" 20 | tee /dev/stderr | if [ -s "$operations" ]; then tail -n +2; else cat; fi >> "$operations"
done
echo "written to $operations; what memory allows at 3.35 TB/s is in docs/performance.md"
echo "written to $results; the target for the first line is 45 ms on an H100"
