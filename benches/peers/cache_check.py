"""Checks the sums of cache_pareto.py against gradients by autograd, in f64, row by row and over the whole vocabulary.

    python benches/peers/cache_check.py WORK TEXT STUDENT=STATES.npy [--rows 256] [--distillkit DIR]

Takes the targets in WORK (made by `cache_pareto.py targets`), measures their first rows with --all-ids, and compares
every error with the one that autograd gives for the loss as it is written: cross-entropy with kept ids and one tail
outcome, or with the sampled weights. With --distillkit, DistillKit's targets go through its own `sparse_kl_div`.
Exits 1 where two differ by more than 1e-3 of their value.
"""
import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from cache_formats import Targets
from cache_states import Text

KEYS = ["logit_error", "hidden_error", "weight_error", "projection_error"]


def states(path, rows):
    stored = torch.from_numpy(np.load(path, mmap_mode="r")[rows].copy()).double()
    return stored, torch.from_numpy(np.load(path.removesuffix(".npy") + ".head.npy")).double()


def gradient(logits, ids, values, targets, row):
    """In the logits, by autograd."""
    logits = logits.clone().requires_grad_()
    log_q = logits.log_softmax(-1)
    if targets.kind == "sampled":  # linear in the weights, whatever they sum to
        return (log_q.exp() - torch.zeros_like(log_q).index_add_(0, ids, values)).detach()
    loss = -(values * log_q[ids]).sum()
    if targets.kind == "bucket":
        rest = torch.ones(len(logits), dtype=torch.bool)
        rest[ids] = False
        loss = loss - float(targets.tail[row]) * log_q[rest].logsumexp(0)
    loss.backward()
    return logits.grad


def distillkit_gradient(logits, ids, values, kind):
    from distillkit.lossfuncs import MissingProbabilityHandling, sparse_kl_div

    missing = MissingProbabilityHandling.ZERO if kind == "zero" else MissingProbabilityHandling.SYMMETRIC_UNIFORM
    logits = logits.float().clone().requires_grad_()
    sparse_kl_div(logits[None, None], ids[None, None], values.log().float()[None, None], missing=missing).backward()
    return logits.grad.double()


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("work")
    arguments.add_argument("text")
    arguments.add_argument("student")
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--distillkit")
    arguments.add_argument("--only", default="")
    a = arguments.parse_args()
    if a.distillkit:
        sys.path.insert(0, a.distillkit)
    notes = json.loads((Path(a.work) / "formats.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cache_pareto.py")), "measure", a.work,
                   a.text, "--student", a.student, "--rows", str(a.rows), "--all-ids", "--results", folder]
        subprocess.run(command + (["--only", a.only] if a.only else []), check=True, stdout=subprocess.DEVNULL)
        with open(Path(folder) / "cache_pareto.csv", newline="") as stored:
            measured = {line["name"]: line for line in csv.DictReader(stored)}
    text = Text(a.text, -(-a.rows // Text(a.text, 1).seq_len))
    rows = text.valid.flatten()[: a.rows].nonzero().flatten().numpy()
    hidden, head = states(str(Path(a.work) / "teacher.npy"), rows)
    p = (hidden @ head.T).softmax(-1)
    h, head = states(a.student.split("=", 1)[1], rows)
    logits = h @ head.T
    full = logits.softmax(-1) - p
    worst = 0
    for name, line in measured.items():
        targets = Targets.load(Path(a.work) / notes[name]["file"])
        errors = []
        for place, row in enumerate(rows):
            kept = slice(targets.offsets[row], targets.offsets[row + 1])
            ids = torch.from_numpy(targets.ids[kept]).long()
            values = torch.from_numpy(targets.values[kept]).double().exp()
            if a.distillkit and notes[name]["codec"] == "DistillKit":
                got = distillkit_gradient(logits[place], ids, values, targets.kind)
            else:
                got = gradient(logits[place], ids, values, targets, row)
            errors.append(got - full[place])
        error = torch.stack(errors)
        rate = lambda change: (change(error) / change(full)).item()
        expected = [
            rate(lambda g: g.norm(dim=-1).sum()), rate(lambda g: (g @ head).norm(dim=-1).sum()),
            rate(lambda g: (g.T @ h).norm()), rate(lambda g: ((g @ head).T @ h).norm())]
        pairs = [(want, float(line[key])) for want, key in zip(expected, KEYS) if line[key]]
        difference = max(abs(want / found - 1) for want, found in pairs)
        worst = max(worst, difference)
        print(f"{name}: {difference:.1e}  " + "  ".join(f"{found:.5g}" for _, found in pairs), flush=True)
    print(f"largest difference {worst:.1e} of the value")
    return worst > 1e-3


if __name__ == "__main__":
    sys.exit(main())
