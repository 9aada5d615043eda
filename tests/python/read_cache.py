"""Reads a soft-target cache (docs/cache-format.md) with json, numpy and safetensors alone."""
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file

def read(cache, number):
    """One sequence: its tokens, its segments, and per row (ids, [(log_probs, log_tail, label_log_prob), ...])."""
    settings = json.loads((Path(cache) / "manifest.json").read_text())["settings"]
    shard, place = divmod(number, settings["sequences_per_shard"])
    tensors = load_file(Path(cache) / f"shards/{shard:05}.safetensors")
    rows = []
    if settings["soft_targets"]:
        for row in range(place * settings["seq_len"], (place + 1) * settings["seq_len"]):
            kept = slice(int(tensors["offsets"][row]), int(tensors["offsets"][row + 1]))
            rows.append((tensors["ids"][kept], [
                (tensors[f"log_probs.{i}"][kept], tensors[f"log_tail.{i}"][row], tensors[f"label_log_prob.{i}"][row])
                for i in range(len(settings["soft_targets"]["temperatures"]))]))
    return tensors["tokens"][place], tensors["segments"][place], rows

if __name__ == "__main__":
    for number in range(json.loads((Path(sys.argv[1]) / "manifest.json").read_text())["counts"]["sequences"]):
        tokens, segments, rows = read(sys.argv[1], number)
        bits = lambda values: np.asarray(values, dtype="<f4").view("<u4").reshape(-1).tolist()
        print(json.dumps({"tokens": tokens.tolist(), "segments": segments.tolist(), "rows": [
            [ids.tolist(), [[bits(part) for part in capture] for capture in captures]] for ids, captures in rows]}))
