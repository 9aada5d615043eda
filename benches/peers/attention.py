"""limbeck and PyTorch attend, forward and backward, in turns, on this machine; and what memory limbeck takes at 32K tokens.

    python benches/peers/attention.py [--quick] [--rounds 5] [--lengths 512,2048,8192] [--long 32768]

Eight heads of queries, two of keys, 64 wide, in f32. PyTorch runs `scaled_dot_product_attention`, whose fused kernel for
processors is a flash attention; its keys and values are repeated for their heads outside the timing. `causal` is a whole
sequence; `chunks` is Llama 4's grid of 1,024 tokens, for which PyTorch is given a mask. Ends with 1 when limbeck is not
--target times as fast by the clock, when it takes a GiB beyond its operands at the long length or memory grows faster than
length, and when others are so busy on the machine that this cannot be told. `--quick` takes under a minute on two cores, once
the bench is built.
"""
import json
import subprocess
import sys

import torch
import torch.nn.functional as F

from turns import Limbeck, Others, arguments_of, bench_binary, report, rounds, timed

QUERY_HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 64
GIB = 1 << 30


class Peer:
    def __init__(self, tokens, chunk):
        generator = torch.Generator().manual_seed(17)
        random = lambda: torch.rand(1, QUERY_HEADS, tokens, HEAD_DIM, generator=generator) * 2 - 1
        self.operands = [random() for _ in range(3)]
        self.slope = random()
        self.mask = None
        if chunk:
            place = torch.arange(tokens)
            self.mask = (place[:, None] >= place) & (place[:, None] // chunk == place // chunk)

    def attend(self, operands):
        return F.scaled_dot_product_attention(*operands, attn_mask=self.mask, is_causal=self.mask is None)

    def forward(self):
        with torch.no_grad():
            self.attend(self.operands)

    def both(self):
        operands = [operand.detach().requires_grad_() for operand in self.operands]
        self.attend(operands).backward(self.slope)


def beyond_operands(binary, tokens, chunk=0):
    """Bytes at the peak of limbeck's forward and backward pass beyond its operands, the gradients among them."""
    command = [binary, "attention", *map(str, (tokens, QUERY_HEADS, KEY_HEADS, HEAD_DIM, chunk))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout)


def main():
    arguments = arguments_of(__doc__, 5, "three rounds, lengths 512 and 2048, a long one of 8192")
    arguments.add_argument("--lengths", default="512,2048,8192")
    arguments.add_argument("--long", type=int, default=32768)
    arguments.add_argument("--target", type=float, default=1.0)
    a = arguments.parse_args()
    if a.quick:
        a.rounds, a.lengths, a.long = 3, "512,2048", 8192
    torch.set_num_threads(a.threads)
    binary = a.binary or bench_binary()
    met = True
    for tokens in map(int, a.lengths.split(",")):
        for chunk in (0, 1024) if tokens > 1024 else (0,):
            ours = Limbeck("attention", tokens, QUERY_HEADS, KEY_HEADS, HEAD_DIM, chunk, binary=binary, threads=a.threads)
            peer = Peer(tokens, chunk)
            peer.both()
            for way in ("forward", "forward and backward"):
                others = Others()
                work = peer.forward if way == "forward" else peer.both
                passes = max(1, round((4096 / tokens) ** 2))
                sides = {
                    "limbeck": lambda: ours.run(f"{way} {passes}"),
                    "torch": lambda: timed(lambda: [work() for _ in range(passes)]),
                }
                seconds = rounds(sides, a.rounds, others)
                what = f"attention, {way}, {tokens} tokens, {'chunks' if chunk else 'causal'}"
                met &= report(what, seconds, tokens * passes, [("limbeck", "torch", a.target)], others, a.results)
            ours.close()
    half, whole = (beyond_operands(binary, tokens) for tokens in (a.long // 2, a.long))
    taken = whole["peak_bytes_beyond_operands"]
    if taken is None:
        sys.exit("the system does not tell how much memory a process takes")
    growth = taken / half["peak_bytes_beyond_operands"]
    fits = taken < GIB and growth < 2.5
    print(json.dumps(dict(what=f"attention, memory, {a.long} tokens", mib_beyond_operands=round(taken / 2**20),
                          of_which_gradients_and_output=round(whole["bytes_of_operands"] / 2**20 * 20 / 12),
                          growth_with_twice_the_tokens=round(growth, 2), verdict="met" if fits else "missed")))
    sys.exit(0 if met and fits else 1)


if __name__ == "__main__":
    main()
