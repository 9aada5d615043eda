"""limbeck's operations and PyTorch's alone, forward and backward, in turns, on this machine.

    python benches/peers/operations.py [--quick] [--rounds 7] [--rows 2048] [--only rms_norm,swiglu]

At the sizes of SmolLM2-135M in f32: 576 wide, heads of 64, 1,536 inside of a layer, 49,152 ids. `dispatch` brings rows into
another order, as on their way to experts; `embedding` picks rows by id, and its gradient has all rows; `adamw` is an update of
28 million weights, fused in PyTorch. Attention, experts, products and the loss have scripts of their own. Ends with 1 when
limbeck is not --target times as fast by the clock, and when others are so busy on the machine that this cannot be told.
"""
import sys

import torch
import torch.nn.functional as F

from turns import Limbeck, Others, arguments_of, bench_binary, report, rounds, timed

WIDTH, INNER, HEAD_DIM, VOCABULARY = 576, 1536, 64, 49_152
# What one turn does, so that it is long enough to time.
PASSES = dict(rms_norm=100, rotary=100, swiglu=20, dispatch=100, embedding=40, adamw=2)


def random(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(17)) * 2 - 1


def rotary(x, cosines, sines):
    heads = x.view(len(x), -1, HEAD_DIM)
    first, second = heads.chunk(2, dim=-1)
    return (heads * cosines + torch.cat((-second, first), dim=-1) * sines).view(len(x), WIDTH)


class Peer:
    def __init__(self, name, rows):
        if name == "adamw":
            self.weight = torch.nn.Parameter(random(VOCABULARY * WIDTH))
            self.gradient = random(VOCABULARY * WIDTH)
            self.optimizer = torch.optim.AdamW(
                [self.weight], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
            )
            return
        self.optimizer = None
        if name == "rms_norm":
            self.inputs = [random(rows, WIDTH), random(WIDTH)]
            self.apply = lambda x, weight: F.rms_norm(x, (WIDTH,), weight, 1e-5)
        elif name == "rotary":
            frequencies = 10_000.0 ** (-2 * torch.arange(HEAD_DIM // 2) / HEAD_DIM)
            angles = (torch.arange(rows)[:, None] * frequencies).repeat(1, 2)[:, None]
            cosines, sines = angles.cos(), angles.sin()
            self.inputs = [random(rows, WIDTH)]
            self.apply = lambda x: rotary(x, cosines, sines)
        elif name == "swiglu":
            self.inputs = [random(rows, 2 * INNER)]
            self.apply = lambda x: F.silu(x[:, :INNER]) * x[:, INNER:]
        elif name == "dispatch":
            order = torch.arange(rows) * 3571 % rows
            self.inputs = [random(rows, WIDTH)]
            self.apply = lambda x: x.index_select(0, order)
        elif name == "embedding":
            ids = torch.arange(rows) ** 2 % VOCABULARY
            self.inputs = [random(VOCABULARY, WIDTH)]
            self.apply = lambda table: F.embedding(ids, table)
        self.slope = torch.ones_like(self.apply(*self.inputs))

    def forward(self):
        if self.optimizer:
            # A gradient of its own, as ours has.
            self.weight.grad = self.gradient.clone()
            return self.optimizer.step()
        with torch.no_grad():
            self.apply(*self.inputs)

    def both(self):
        inputs = [value.detach().requires_grad_() for value in self.inputs]
        self.apply(*inputs).backward(self.slope)


def main():
    arguments = arguments_of(__doc__, 7)
    arguments.add_argument("--rows", type=int, default=2048)
    arguments.add_argument("--only", default=",".join(PASSES))
    arguments.add_argument("--target", type=float, default=1.0)
    a = arguments.parse_args()
    if a.quick:
        a.rounds = 3
    torch.set_num_threads(a.threads)
    binary = a.binary or bench_binary()
    met = True
    for name in a.only.split(","):
        ours, peer = Limbeck("operation", name, a.rows, binary=binary, threads=a.threads), Peer(name, a.rows)
        for way in ("forward",) if peer.optimizer else ("forward", "forward and backward"):
            others, passes = Others(), PASSES[name]
            work = peer.forward if way == "forward" else peer.both
            work()
            sides = {
                "limbeck": lambda: ours.run(f"{way} {passes}"),
                "torch": lambda: timed(lambda: [work() for _ in range(passes)]),
            }
            seconds = rounds(sides, a.rounds, others)
            what = f"{name}, update" if peer.optimizer else f"{name}, {way}"
            met &= report(what, seconds, passes, [("limbeck", "torch", a.target)], others, a.results)
        ours.close()
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
