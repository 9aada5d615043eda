#!/usr/bin/env python3
"""What the device forms have to compute and to move, and the time that takes at an H100's limits.

The loss is counted from its tiles, which are those of kernels/src/fused_linear_distill/tiles.rs; the other operations from
their operands, read and written once by the kernels in kernels/src/device/cube. Computed, not measured: nothing here has seen a GPU.
"""

FLOPS = 989e12  # bf16, dense
BANDWIDTH = 3.35e12
CACHE = 50 << 20
STEP, TOKEN_BLOCK, PIECE, NARROWEST, BUDGET = 256, 2048, 1024, 512, 62 << 20
ROW_BYTES, KEPT_BYTES = 60, 8
MIB = 1 << 20


def round_up(count):
    return -(-count // STEP) * STEP


def tiles(rows, width, vocab, kept, element):
    """Rows and columns at once, and the bytes of working memory: `Tiles::fitting`."""

    def used(block, tile):
        room = 4 * max(block * piece, tile * STEP)
        return room + block * tile * element + 4 * block * width + ROW_BYTES * rows + KEPT_BYTES * kept

    piece = min(PIECE, round_up(vocab))
    block = min(TOKEN_BLOCK, round_up(rows))
    while used(block, piece) > BUDGET and block > STEP:
        block -= STEP
    widest = min(max(block * piece // NARROWEST, piece), round_up(vocab))
    more = max(0, BUDGET - used(block, piece)) // (block * element * piece)
    tile = max(min(piece * (1 + more), widest // piece * piece), piece)
    return block, tile, used(block, tile)


def count(rows, width, vocab, kept, element):
    block, tile, working = tiles(rows, width, vocab, kept, element)
    blocks, tile_count = -(-rows // block), -(-vocab // tile)
    logits = rows * vocab
    flops = 4 * 2 * rows * width * vocab
    # What has to come from and go to memory even if every tile stays in the cache.
    head = 3 * blocks * vocab * width * element
    hidden = 2 * rows * width * element + tile_count * rows * width * element
    head_grad = vocab * width * element * (2 * blocks)
    hidden_sums = rows * width * 4 * 2 * tile_count
    least = head + hidden + head_grad + hidden_sums
    # What goes through tiles: logits written and read in each pass, their gradient written and read by two products, and
    # both products written and read.
    through = logits * 4 * (2 + 2) + logits * element * 3
    through += rows * width * 4 * 2 * tile_count + vocab * width * 4 * 2 * blocks
    return block, tile, working, flops, least, through


def main():
    print("| | T 8192, H 4096, V 128,256 | T 8192, D 5120, V 202,048 |")
    print("|---|---|---|")
    found = [count(8192, 4096, 128_256, 8192 * 64, 2), count(8192, 5120, 202_048, 8192 * 64, 2)]
    lines = [
        ("rows x ids at once", lambda f: f"{f[0]} x {f[1]}"),
        ("working memory beside operands and gradients", lambda f: f"{f[2] / MIB:.1f} MiB"),
        ("FLOPs, four products", lambda f: f"{f[3] / 1e12:.1f} T"),
        ("at 989 TFLOP/s", lambda f: f"{1e3 * f[3] / FLOPS:.1f} ms"),
        ("bytes that cannot stay in the cache", lambda f: f"{f[4] / 1e9:.1f} GB"),
        ("at 3.35 TB/s", lambda f: f"{1e3 * f[4] / BANDWIDTH:.1f} ms"),
        ("bytes through tiles of at most 16 MiB, in a cache of 50 MiB", lambda f: f"{f[5] / 1e9:.1f} GB"),
        ("at 3.35 TB/s, if none of them stayed there", lambda f: f"{1e3 * f[5] / BANDWIDTH:.1f} ms"),
        ("roofline: the larger of products and memory", lambda f: f"{1e3 * max(f[3] / FLOPS, f[4] / BANDWIDTH):.1f} ms"),
        ("products and memory one after the other", lambda f: f"{1e3 * (f[3] / FLOPS + f[4] / BANDWIDTH):.1f} ms"),
    ]
    for name, cell in lines:
        print(f"| {name} | " + " | ".join(cell(f) for f in found) + " |")
    print()
    print_operations()


VECTOR_FLOPS = 67e12  # f32, outside the tensor cores
SUMMING_CUBES = 512


def operations(rows=8192, width=5120, heads=40, head=128, expert=8192, vocab=202_048, element=2):
    """Name, launches, bytes read and written once, and FLOPs, of the operations beside the loss at Scout's sizes."""
    hidden = rows * width
    inverse, table, weight = 4 * rows, 2 * 4 * rows * head // 2, width * element
    partials = 4 * SUMMING_CUBES * width
    hidden_expert = rows * expert
    matrix = vocab * width
    return [
        ("`rms_norm` of the hidden states", 1, 2 * hidden * element + weight + inverse, 5 * hidden),
        ("its gradients, the weight's too", 2, 3 * hidden * element + 2 * weight + inverse + 2 * partials, 12 * hidden),
        ("`unit_rms` of the queries", 1, 2 * hidden * element + inverse * heads, 4 * hidden),
        ("its gradient", 1, 3 * hidden * element + inverse * heads, 8 * hidden),
        ("`rotary` of the queries, and its gradient, each", 1, 2 * hidden * element + table, 3 * hidden),
        ("`swiglu` or `gated_silu`", 1, 3 * hidden_expert * element, 7 * hidden_expert),
        ("its gradients", 1, 5 * hidden_expert * element, 16 * hidden_expert),
        ("`gather_rows` of an embedding, or to experts", 1, 2 * hidden * element + 4 * rows, 0),
        ("gradient of rows sent to experts", 1, 2 * hidden * element + 8 * rows, hidden),
        ("gradient of the embedding", 1, (hidden + matrix) * element + 4 * (rows + vocab), hidden),
        ("`adamw` of the embedding, f32", 1, 28 * matrix, 13 * matrix),
    ]


def print_operations():
    print("| | launches | GB | at 3.35 TB/s | FLOPs | at 67 TFLOP/s |")
    print("|---|---|---|---|---|---|")
    for name, launches, size, flops in operations():
        memory, compute = 1e6 * size / BANDWIDTH, 1e6 * flops / VECTOR_FLOPS
        print(f"| {name} | {launches} | {size / 1e9:.3f} | {memory:.0f} µs | {flops / 1e9:.2f} G | {compute:.0f} µs |")


if __name__ == "__main__":
    main()
