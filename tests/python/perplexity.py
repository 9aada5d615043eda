"""Mean cross-entropy and perplexity of a checkpoint on given token windows, by `transformers`.

    python tests/python/perplexity.py CHECKPOINT TOKENS.safetensors [--dtype f32|bf16] [--batch 1] [--threads 1]
                                      [--save-logits LOGITS.safetensors --windows 1]

TOKENS holds `input_ids` [B,T] i64. The mean is over the B*(T-1) predicted positions; each window stands alone. Prints
one line of JSON. --save-logits writes the `logits` [windows,T,V] in f32 of the first windows.
"""
import argparse
import json
import math

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint")
    arguments.add_argument("tokens")
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    arguments.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--save-logits")
    arguments.add_argument("--windows", type=int, default=1, help="how many windows --save-logits keeps")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[a.dtype]
    model = AutoModelForCausalLM.from_pretrained(a.checkpoint, dtype=dtype, attn_implementation=a.attention).eval()
    ids = load_file(a.tokens)["input_ids"]
    rows, correct, kept = [], 0, []
    for chunk in ids.split(a.batch):
        logits = model(chunk, use_cache=False).logits.float()
        if len(rows) < a.windows:
            kept.append(logits[: a.windows - len(rows)].clone())
        for row, row_ids in zip(logits, chunk):  # log-probabilities of one window at a time, summed in f64
            labels = row_ids[1:]
            loss = torch.nn.functional.cross_entropy(row[:-1], labels, reduction="none")
            rows.append(loss.double().sum().item())
            correct += (row[:-1].argmax(-1) == labels).sum().item()
    count = ids.shape[0] * (ids.shape[1] - 1)
    mean = math.fsum(rows) / count
    if a.save_logits:
        save_file({"logits": torch.cat(kept), "input_ids": ids[: a.windows].contiguous()}, a.save_logits)
    print(
        json.dumps(
            dict(
                checkpoint=a.checkpoint,
                dtype=a.dtype,
                attention=a.attention,
                windows=list(ids.shape),
                predicted_tokens=count,
                mean_cross_entropy=mean,
                perplexity=math.exp(mean),
                top1_accuracy=correct / count,
                window_cross_entropy=[value / (ids.shape[1] - 1) for value in rows],
                torch=torch.__version__,
                transformers=transformers.__version__,
            )
        )
    )


if __name__ == "__main__":
    main()
