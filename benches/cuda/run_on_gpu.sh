#!/usr/bin/env bash
# Everything about the fused loss that needs an NVIDIA GPU: that it is right there, and how long it takes.
# Writes benches/results/cuda.csv. Needs a driver, CUDA 12 and a Rust toolchain; an H100 or H200 takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv,noheader

# The same tests as on any other device, against f64 loops, bf16 among them.
cargo test --release -p limbeck-kernels --features cuda,fusion --test device_form -- --nocapture
cargo test --release -p limbeck-kernels --features cuda --test device_form
# And by way of the CUDA C++ that benches/cuda/nvrtc.py compiles; without this, cubecl makes PTX by way of LLVM.
cargo test --release -p limbeck-kernels --features cuda,cubecl/cuda-cpp --test device_form

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
echo "written to $results; the target for the first line is 45 ms on an H100"
