"""What more experts cost: a layer of 128 experts beside one of 16, in turns, at equal tokens.

    python benches/peers/experts.py [--quick] [--rounds 7] [--tokens 8192] [--hidden 512] [--width 1024]

Top-1 with a shared expert, as in Llama 4. Every expert has 64 tokens on average, so that a product with its weights is worth
one. Ends with 1 when 128 experts take more than --most times as long as 16, forward with tensors, forward with packed weights
(as a teacher has them) or forward and backward, and when others are so busy on the machine that this cannot be told.
"""
import sys

from turns import Limbeck, Others, arguments_of, bench_binary, report, rounds


def main():
    arguments = arguments_of(__doc__, 7)
    arguments.add_argument("--tokens", type=int, default=8192)
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--width", type=int, default=1024)
    arguments.add_argument("--most", type=float, default=1.15)
    a = arguments.parse_args()
    if a.quick:
        a.rounds = 3
    binary = a.binary or bench_binary()
    met = True
    for way in ("forward", "packed", "training"):
        layers = {
            count: Limbeck("experts", a.tokens, count, a.hidden, a.width, way, binary=binary, threads=a.threads)
            for count in (16, 128)
        }
        sides = {f"{count} experts": layer.run for count, layer in layers.items()}
        others = Others()
        seconds = rounds(sides, a.rounds, others)
        for layer in layers.values():
            layer.close()
        pairs = [("128 experts", "16 experts", 1 / a.most)]
        met &= report(f"experts, {way}", seconds, a.tokens, pairs, others, a.results)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
