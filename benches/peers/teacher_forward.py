"""How fast `transformers` on PyTorch makes soft targets from a teacher on this machine.

    python benches/peers/teacher_forward.py CHECKPOINT [--batch 4] [--sequence 512] [--dtype f32|bf16] [--threads 2]

Times forward, logits, logsumexp and the top 64 of each position, the work of `precompute-teacher-logits` without its
writing. The logsumexp is taken in f32 whatever the dtype. Prints one line of JSON; tokens/s is the median of --repeats.
"""
import argparse
import json
import os
import statistics
import time

import torch
import transformers
from transformers import AutoModelForCausalLM


def targets(model, ids, stage, top_k):
    hidden = model.model(ids, use_cache=False).last_hidden_state
    if stage == "body":
        return hidden
    if stage == "logits":
        return model.lm_head(hidden)
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
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint")
    arguments.add_argument("--tokens", help="safetensors with `input_ids` [B,T]; random ids without it")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--sequence", type=int, default=512)
    arguments.add_argument("--top-k", type=int, default=64)
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    arguments.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    arguments.add_argument("--stage", choices=["body", "logits", "targets"], default="targets", help="to stop after")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--warmup", type=int, default=1)
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[a.dtype]
    model = AutoModelForCausalLM.from_pretrained(a.checkpoint, dtype=dtype, attn_implementation=a.attention).eval()
    if a.tokens:
        from safetensors.torch import load_file

        ids = load_file(a.tokens)["input_ids"].flatten()[: a.batch * a.sequence].reshape(a.batch, a.sequence)
    else:
        generator = torch.Generator().manual_seed(17)
        ids = torch.randint(model.config.vocab_size, (a.batch, a.sequence), generator=generator)
    load_before = os.getloadavg()[0]
    seconds = []
    for repeat in range(a.warmup + a.repeats):
        start = time.perf_counter()
        targets(model, ids, a.stage, a.top_k)
        if repeat >= a.warmup:
            seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(
        json.dumps(
            dict(
                what="teacher_forward",
                peer="transformers",
                tokens_per_second=round(ids.numel() / median, 1),
                best_tokens_per_second=round(ids.numel() / min(seconds), 1),
                worst_tokens_per_second=round(ids.numel() / max(seconds), 1),
                stage=a.stage,
                dtype=a.dtype,
                batch=a.batch,
                sequence=a.sequence,
                top_k=a.top_k,
                attention=a.attention,
                threads=a.threads,
                repeats=a.repeats,
                parameters=sum(p.numel() for p in model.parameters()),
                load_average_before=round(load_before, 2),
                torch=torch.__version__,
                transformers=transformers.__version__,
            )
        )
    )


if __name__ == "__main__":
    main()
