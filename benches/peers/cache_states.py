"""Final hidden states of a checkpoint over a cache's text, and the students that cache_pareto.py measures with.

    python benches/peers/cache_states.py states CHECKPOINT TEXT OUT.npy [--sequences 400]
    python benches/peers/cache_states.py cut CHECKPOINT TEXT OUT_DIR --drop 12,22 --steps 0,24 [--first 512]

TEXT is a finished cache of limbeck's with codec `raw`, read for its tokens and segments (and, by `cut`, for its soft
targets). `states` writes f32 [sequences * seq_len, D]: the states that the head is multiplied with, one for each row of
the cache; documents do not see each other. An interrupted run goes on where it stopped.

`cut` makes students: the teacher's checkpoint without some of its layers, then trained (AdamW, forward KL over the kept
ids and the tail) for some steps on the sequences from --first on, which nothing is measured on. It saves a checkpoint
at each of --steps.
"""
import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

PADDING = 4294967295


class Text:
    """Tokens [S, L + 1], segments [S, L + 1] and soft targets of the sequences of a raw cache."""

    def __init__(self, cache, count=None, first=0):
        self.cache = Path(cache)
        manifest = json.loads((self.cache / "manifest.json").read_text())
        self.settings = manifest["settings"]
        self.seq_len, self.per_shard = self.settings["seq_len"], self.settings["sequences_per_shard"]
        total = manifest["counts"]["sequences"]
        self.first, self.count = first, total - first if count is None else min(count, total - first)
        tokens, segments = [], []
        for shard in range(first // self.per_shard, -(-(first + self.count) // self.per_shard)):
            tensors = load_file(self.cache / f"shards/{shard:05}.safetensors")
            tokens.append(tensors["tokens"].long())
            segments.append(tensors["segments"].long())
        skip = first % self.per_shard
        self.tokens = torch.cat(tokens)[skip : skip + self.count]
        self.segments = torch.cat(segments)[skip : skip + self.count]
        same = self.segments[:, 1:] == self.segments[:, :-1]
        self.valid = same & (self.segments[:, :-1] != PADDING)

    def targets(self, number, width):
        """Ids [L, width], log-probabilities (-inf where fewer are kept) and log-tail [L] of sequence `number`."""
        shard, place = divmod(number, self.per_shard)
        tensors = load_file(self.cache / f"shards/{shard:05}.safetensors")
        rows = slice(place * self.seq_len, (place + 1) * self.seq_len)
        offsets = tensors["offsets"].long()[rows.start : rows.stop + 1]
        column = torch.arange(width)
        index = offsets[:-1, None] + column
        kept = index < offsets[1:, None]
        index = index.clamp(max=len(tensors["ids"]) - 1)
        ids = torch.where(kept, tensors["ids"].long()[index], 0)
        values = torch.where(kept, tensors["log_probs.0"][index], -torch.inf)
        return ids, values, tensors["log_tail.0"][rows]


def stretches(segments):
    """(first, end) of each document among the first L places of a sequence."""
    borders = (segments[1:-1] != segments[:-2]).nonzero().flatten().add(1).tolist()
    return list(zip([0] + borders, borders + [len(segments) - 1]))


@torch.no_grad()
def states(arguments):
    text = Text(arguments.text, arguments.sequences)
    model = load(arguments.checkpoint).eval()
    progress = Path(arguments.out + ".done")
    shape = (text.count * text.seq_len, model.config.hidden_size)
    resumed = progress.exists() and Path(arguments.out).exists()
    done = int(progress.read_text()) if resumed else 0
    out = np.lib.format.open_memmap(arguments.out, mode="r+" if resumed else "w+", dtype=np.float32, shape=shape)
    np.save(arguments.out.removesuffix(".npy") + ".head.npy", model.lm_head.weight.detach().float().numpy())
    begun, started = time.time(), done
    while done < text.count:
        batch = range(done, min(done + arguments.batch, text.count))
        plain = [s for s in batch if len(stretches(text.segments[s])) == 1]
        if plain:
            hidden = model.model(text.tokens[plain, :-1], use_cache=False).last_hidden_state
            for place, sequence in enumerate(plain):
                out[sequence * text.seq_len : (sequence + 1) * text.seq_len] = hidden[place].float().numpy()
        for sequence in set(batch) - set(plain):
            for first, end in stretches(text.segments[sequence]):
                hidden = model.model(text.tokens[sequence : sequence + 1, first:end], use_cache=False)
                base = sequence * text.seq_len
                out[base + first : base + end] = hidden.last_hidden_state[0].float().numpy()
        done = batch.stop
        out.flush()
        progress.write_text(str(done))
        rate = (done - started) * text.seq_len / (time.time() - begun)
        print(f"{done}/{text.count} sequences, {rate:.0f} tokens/s", flush=True)


def load(checkpoint):
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def bucketed_kl(logits, ids, values, tail):
    """Forward KL over kept ids and tail, per row."""
    log_q = logits.log_softmax(-1)
    student = log_q.gather(-1, ids)
    kept = values > -torch.inf
    rest = (1 - torch.where(kept, student.exp(), 0).sum(-1)).clamp_min(1e-9).log()
    return torch.where(kept, values.exp() * (values - student), 0).sum(-1) + tail.exp() * (tail - rest)


def cut(arguments):
    torch.manual_seed(17)
    model = load(arguments.checkpoint)
    dropped = {int(layer) for layer in arguments.drop.split(",")}
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in dropped]
    model.model.layers = torch.nn.ModuleList(kept)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(kept)]
    snapshots = sorted(int(step) for step in arguments.steps.split(","))
    text = Text(arguments.text, first=arguments.first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.01)
    order = torch.randperm(text.count)
    for step in range(snapshots[-1] + 1):
        if step in snapshots:
            folder = Path(arguments.out) / f"step-{step:06}"
            model.save_pretrained(folder)
            print(f"step {step}: saved {folder}", flush=True)
        if step == snapshots[-1]:
            break
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * min(1, (step + 1) / 5) * max(0.1, 1 - step / snapshots[-1])
        chosen = order[step * arguments.batch : (step + 1) * arguments.batch].tolist()
        targets = [text.targets(text.first + s, 64) for s in chosen]
        ids, values, tail = (torch.stack(part) for part in zip(*targets))
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            logits = model(text.tokens[chosen, :-1], use_cache=False).logits
        valid = text.valid[chosen]
        loss = bucketed_kl(logits.float(), ids, values, tail)[valid].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: KL {loss.item():.4f}", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["states", "cut"])
    arguments.add_argument("checkpoint")
    arguments.add_argument("text")
    arguments.add_argument("out")
    arguments.add_argument("--sequences", type=int, default=400)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--drop", default="12,22")
    arguments.add_argument("--steps", default="0,24")
    arguments.add_argument("--first", type=int, default=512)
    arguments.add_argument("--lr", type=float, default=3e-4)
    arguments.add_argument("--bf16", action="store_true", help="products of the training in bf16")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    dict(states=states, cut=cut)[a.what](a)


if __name__ == "__main__":
    main()
