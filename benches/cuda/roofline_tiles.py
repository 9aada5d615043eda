#!/usr/bin/env python3
"""What attention and the grouped product have to compute and to move on a device, and the time that takes at an H100's
limits: counted from the tiles of kernels/src/device/cube/plans.rs, with tensor cores and bf16.

Computed, not measured: nothing here has seen a GPU.
"""

FLOPS = 989e12  # bf16, dense
BANDWIDTH = 3.35e12
# 128 bytes a clock for each of 132 multiprocessors at 1.755 GHz.
SHARED = 128 * 132 * 1.755e9
ELEMENT = 2
SIDE = 64
TILE, STEP = 128, 32


def fragments(rows, columns, inner, row_workers, column_workers):
    """Bytes that planes load from shared memory for one product of tiles."""
    planes = row_workers * column_workers
    return planes * (rows // row_workers + columns // column_workers) * inner * ELEMENT


def attention(tokens, query_heads, key_heads, head_dim, sees):
    """Products of tiles in forward and backward, and bytes, when `sees(token)` is the first key of a token."""
    group = query_heads // key_heads
    rows = tokens * group
    steps = 0
    for first in range(0, rows, SIDE):
        last = min(first + SIDE, rows) - 1
        steps += -(-(last // group + 1 - sees(first // group)) // SIDE)
    last_seen, end = [], 0
    for key in range(tokens):
        while end < tokens and sees(end) <= key:
            end += 1
        last_seen.append(end - 1)
    back_steps = 0
    for first in range(0, tokens, SIDE):
        last = min(first + SIDE, tokens) - 1
        back_steps += -(-((last_seen[last] + 1) * group - first * group) // SIDE)
    panels = -(-head_dim // SIDE)
    product = 2 * SIDE**3 * panels * key_heads
    needed = sum(token - sees(token) + 1 for token in range(tokens))
    query_bytes, key_bytes = (tokens * heads * head_dim * ELEMENT for heads in (query_heads, key_heads))
    scores = SIDE * SIDE * 4
    weights = SIDE * SIDE * ELEMENT
    operand = panels * SIDE * SIDE * ELEMENT
    planes = 4 if head_dim <= 128 else 8
    forward_product = panels * fragments(SIDE, SIDE, SIDE, 2, planes // 2)
    backward_product = panels * fragments(SIDE, SIDE, SIDE, 2, 4)
    forward_shared = steps * key_heads * (2 * forward_product + 2 * operand + 3 * scores + weights)
    backward_shared = key_heads * (
        steps * (3 * backward_product + 2 * operand + 4 * scores + weights)
        + back_steps * (4 * backward_product + 2 * operand + 4 * scores + 2 * weights)
    )
    return {
        "FLOPs, forward, as the mask needs them": 4 * needed * query_heads * head_dim,
        "forward FLOPs": 2 * steps * product,
        "backward FLOPs": (3 * steps + 4 * back_steps) * product,
        "forward bytes": 2 * query_bytes + 2 * key_bytes + 4 * tokens * query_heads,
        "backward bytes": (2 + 2 + 2 + 1) * query_bytes + (2 + 2 + 2) * key_bytes + 20 * tokens * query_heads,
        "forward shared": forward_shared,
        "backward shared": backward_shared,
    }


def grouped(rows, experts, inner, outer):
    """All three products of a gated layer of experts, with rows spread evenly."""
    each = rows // experts
    tiles = experts * -(-each // TILE)

    def product(row_tiles, columns, depth):
        steps = row_tiles * -(-columns // TILE) * -(-depth // STEP)
        shared = fragments(TILE, TILE, STEP, 2, 4) + 2 * TILE * STEP * ELEMENT
        return steps * 2 * TILE * TILE * STEP, steps * shared

    matrices = experts * inner * outer * ELEMENT
    wide, narrow = rows * outer * ELEMENT, rows * inner * ELEMENT
    forward = [product(tiles, outer, inner), product(tiles, outer, inner), product(tiles, inner, outer)]
    # Rows of a group are not padded where they are added up, but for the last step.
    weight_tiles = experts * -(-inner // TILE)
    backward = [product(tiles, inner, outer), product(tiles, inner, outer), product(tiles, outer, inner)]
    backward += [product(weight_tiles, outer, -(-each // STEP) * STEP) for _ in range(3)]
    return {
        "FLOPs, forward, as the rows need them": 6 * rows * inner * outer,
        "forward FLOPs": sum(flops for flops, _ in forward),
        "backward FLOPs": sum(flops for flops, _ in backward),
        "forward bytes": 3 * matrices + 3 * (wide + narrow),
        "backward bytes": 6 * matrices + 6 * (wide + narrow),
        "forward shared": sum(shared for _, shared in forward),
        "backward shared": sum(shared for _, shared in backward),
    }


def main():
    cases = [
        ("attention, 8192 tokens, causal", attention(8192, 40, 8, 128, lambda token: 0)),
        ("attention, 32,768 tokens in chunks of 8192", attention(32_768, 40, 8, 128, lambda token: token // 8192 * 8192)),
        ("Scout's experts, 8192 tokens, 16 of 5120 x 8192", grouped(8192, 16, 5120, 8192)),
        ("Maverick's experts, 8192 tokens, 128 of 5120 x 8192", grouped(8192, 128, 5120, 8192)),
    ]
    print("| one layer | pass | TFLOP | of them needed | at 989 TFLOP/s | GB | at 3.35 TB/s | GB of shared memory | at its 29.6 TB/s | the largest |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, found in cases:
        needed = next(value for key, value in found.items() if "need" in key)
        for direction, factor in (("forward", 1), ("backward", None)):
            flops, moved, shared = (found[f"{direction} {what}"] for what in ("FLOPs", "bytes", "shared"))
            # Attention's gradients need five products where the output needs two; the grouped product's two for one.
            factor = factor or (2.5 if "attention" in name else 2)
            times = [1e3 * flops / FLOPS, 1e3 * moved / BANDWIDTH, 1e3 * shared / SHARED]
            print(
                f"| {name} | {direction} | {flops / 1e12:.2f} | {100 * factor * needed / flops:.0f}% | {times[0]:.2f} ms"
                f" | {moved / 1e9:.2f} | {times[1]:.2f} ms | {shared / 1e9:.0f} | {times[2]:.2f} ms | {max(times):.2f} ms |"
            )


if __name__ == "__main__":
    main()
