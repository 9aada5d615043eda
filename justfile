# What is done often. `just` lists it; every line also works when typed by hand.

default:
    @just --list

# Format everything
fmt:
    cargo fmt --all

# Format check and lints, as continuous integration has them
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# Every test, documentation examples included
test:
    cargo test --workspace

# Kill cache writers a thousand times; `cargo test` does so thirty times
crash-campaign kills="1000":
    LIMBECK_TEST_KILLS={{kills}} cargo test --test cache_kill killing_writers -- --nocapture

# Stop training at random steps, by SIGINT, SIGTERM and SIGKILL; `cargo test` does so six times
kill-campaign kills="60":
    LIMBECK_TEST_TRAIN_KILLS={{kills}} cargo test --test train_kill stopping -- --nocapture

# Throw damaged bytes at everything that reads a cache; `cargo test` does so with a sample of them
fuzz-cache cases="10000000":
    LIMBECK_FUZZ_CASES={{cases}} cargo test --lib cache::fuzz_tests -- --nocapture

# The documentation, with warnings as errors
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# Lints over the kernels for other devices
device-lint:
    cargo clippy -p limbeck-kernels --features wgpu,fusion,cuda-text --all-targets -- -D warnings

# The kernels for other devices on the Vulkan driver at hand, without burn's fusion and with it
device-test:
    cargo test -p limbeck-kernels --features wgpu --test device_form
    cargo test -p limbeck-kernels --features wgpu,fusion --test device_form --test device_operations --test device_tiles

# Type-check the CUDA build; needs no CUDA
cuda-check:
    DOCS_RS=1 cargo check --features cuda

# Distil the bundled teacher; minutes on two cores
quickstart:
    cargo run --release -- distill recipes/quickstart/scout.toml

# Distil SmolLM2-135M by every weighting, from every kind of cache, with two seeds; many hours on two cores
proof out="runs/proof" *more="":
    cargo build --release
    benches/proof/run.sh {{out}} {{more}}

# All that continuous integration runs
ci:
    .ci/run
