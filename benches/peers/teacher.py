"""limbeck and PyTorch make soft targets of a teacher, in turns, on this machine.

    python benches/peers/teacher.py CHECKPOINT [--quick] [--rounds 5] [--dtypes f32,bf16] [--batch 4] [--sequence 512]

The work is that of `precompute-teacher-logits` without its writing: forward, logits, log-sum-exp and the 64 likeliest
ids of every position. PyTorch runs `transformers` with SDPA; its log-sum-exp is in f32 whatever the dtype, one sequence at
a time. Then the head alone: hidden states to targets, beside the product with its weights and nothing else. Ends with 1 when
limbeck is not --target times as fast by the clock, when its head takes more than --most of the product's time, and when others
are so busy on the machine that this cannot be told. `--quick` takes under a minute on two cores, once the bench is built.
"""
import os
import sys
import tempfile

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from turns import Limbeck, Others, arguments_of, bench_binary, report, rounds, timed


def targets(model, ids, top_k):
    hidden = model.model(ids, use_cache=False).last_hidden_state
    kept = []
    for row in hidden:  # one sequence at a time: [T,V] in f32 rather than [B,T,V]
        logits = model.lm_head(row)
        values, ids = logits.topk(top_k, dim=-1)
        lse = logits.float().logsumexp(-1)
        log_p = values.float() - lse[:, None]
        tail = torch.log1p(-log_p.exp().sum(-1).clamp(max=1 - 1e-7))
        kept.append((ids.int(), log_p, tail, lse))
    return kept


@torch.inference_mode()
def main():
    arguments = arguments_of(__doc__, 5, "three rounds of two sequences, and no parts")
    arguments.add_argument("checkpoint")
    arguments.add_argument("--dtypes", default="f32,bf16")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--sequence", type=int, default=512)
    arguments.add_argument("--top-k", type=int, default=64)
    arguments.add_argument("--target", type=float, default=1.2)
    arguments.add_argument("--most", type=float, default=1.05, help="of the logits' time that the head may take")
    a = arguments.parse_args()
    if a.quick:
        a.rounds, a.batch = 3, 2
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    binary = a.binary or bench_binary()
    ids = torch.randint(49152, (a.batch, a.sequence + 1), generator=torch.Generator().manual_seed(17))
    met = True
    with tempfile.TemporaryDirectory() as folder:
        tokens = os.path.join(folder, "tokens.safetensors")
        save_file({"input_ids": ids}, tokens)
        shape = (a.batch, a.sequence, a.top_k)
        for dtype in a.dtypes.split(","):
            ours = Limbeck("teacher", os.path.abspath(a.checkpoint), tokens, *shape, dtype, binary=binary, threads=a.threads)
            torch_dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[dtype]
            model = AutoModelForCausalLM.from_pretrained(a.checkpoint, dtype=torch_dtype, attn_implementation="sdpa")
            model.eval()
            short = ids[:, :-1].contiguous()
            targets(model, short[:1], a.top_k)
            sides = {
                f"limbeck {dtype}": ours.run,
                f"torch {dtype}": lambda: timed(lambda: targets(model, short, a.top_k)),
            }
            if not a.quick:
                sides["body"] = lambda: ours.run("body")
            others = Others()
            seconds = rounds(sides, a.rounds, others)
            pairs = [(f"limbeck {dtype}", f"torch {dtype}", a.target)]
            met &= report(f"teacher {dtype}", seconds, a.batch * a.sequence, pairs, others, a.results)
            # The head alone, which is over sooner: log-sum-exp, top k and tails beside nothing but the logits.
            others = Others()
            sides = {what: lambda what=what: ours.run(what) for what in ("head", "logits")}
            seconds = rounds(sides, 3 * a.rounds, others)
            ours.close()
            pairs = [("head", "logits", 1 / a.most)]
            met &= report(f"head {dtype}", seconds, a.batch * a.sequence, pairs, others, a.results)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
