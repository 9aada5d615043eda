"""What a soft-target cache costs and what it does to the gradients: bytes per token against error, for every format.

    python benches/peers/cache_pareto.py targets WORK TEXT [--distillkit DIR] [--cache NAME=RAW[,STORED]] ...
    python benches/peers/cache_pareto.py measure WORK TEXT --student late=STATES.npy ... [--rows 102400]
    python benches/peers/cache_pareto.py draw

TEXT is a cache of limbeck's with codec `raw` (of any selection), whose tokens are measured; WORK a folder for what
comes between (under 3 GB at 102,400 rows), where `cache_states.py states TEACHER TEXT WORK/teacher.npy` has put the
teacher's hidden states. STATES.npy is the same of a student, with its head beside it. Logits are made anew from the
states chunk by chunk; nothing of the size rows x vocabulary is kept.

`targets` runs every configuration of cache_formats.py over the teacher's rows. --cache names a configuration, new or
known, whose values are read from a real cache of the same text instead (RAW, from `limbeck cache convert`, or the raw
cache itself), and whose bytes are the files of STORED. `measure` writes two files of CSV in benches/results, again at
each power of two of rows, and keeps in them what they have of other students and configurations; it may run while
cache_states.py still writes a student's states. `draw` makes cache_pareto.svg (for the student whose lines are last)
and cache_gradients.svg of them, in docs/pictures.

With p the teacher's row, q the student's, g = q - target the gradient in the logits and h the student's hidden state:

    kl               KL over kept ids and tail, from p to the cache's values, in nats; mean over rows
    logit_error      mean |g_cache - g_full| over mean |g_full| (Euclidean norms over the vocabulary)
    hidden_error     the same of the gradients in h, W^T g
    weight_error     |sum over the first N rows of (g_cache - g_full) h^T| over |sum g_full h^T|: the head's gradient
    projection_error the same of W^T g h^T: the gradient of a matrix applied to h just before the head

weight_error's two norms are in cache_gradients.csv by themselves: |sum g_full h^T| grows more slowly than N, so that the
error of the mean gradient, weight_error_norm / N, shows better what averages out; cache_gradients.svg has that.

The target of kept ids and tail has q's own shape within the tail (bucketed tail); sampled targets are weights as they
are. Hidden errors, the student's KL, and all of the configurations whose accumulated gradients are not measured (raw
and packed twins of compact ones) are over the first --hidden-rows. weight_error sums over some rows of the head: the
ids that have most of the teacher's mass, and a random share of the others with the reciprocal weight, so that it is an
unbiased estimate of the square; --all-ids takes all.
"""
import argparse
import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cache_formats import WIDTH, Rows, Targets, formats, from_cache, join, measured_bytes
from cache_states import Text

RESULTS = Path(__file__).resolve().parents[1] / "results"
POINTS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]  # and all rows
COLUMNS = ["student", "student_kl", "name", "family", "codec", "selection", "target", "rows", "kept", "bytes_per_token",
           "bytes_are", "table_bytes", "bytes_with_tables", "bits_per_kept", "bytes_at_202048", "kl",
           "logit_error", "hidden_error", "weight_error", "projection_error"]
GROWTH = ["student", "name", "family", "rows", "weight_error", "weight_error_norm", "weight_norm", "projection_error"]


def softmax(hidden, head):
    logits = hidden @ head.T
    logits -= logits.amax(-1, keepdim=True)
    logits.exp_()
    return logits.div_(logits.sum(-1, keepdim=True))


def chunks(row_count, size):
    return [range(first, min(first + size, row_count)) for first in range(0, row_count, size)]


# ---------------------------------------------------------------- targets


def make_targets(a):
    work = Path(a.work)
    text = Text(a.text, a.rows_sequences)
    hidden = np.load(work / "teacher.npy", mmap_mode="r")
    head = torch.from_numpy(np.load(work / "teacher.head.npy"))
    row_count = text.count * text.seq_len
    vocab_size = len(head)
    listed = formats(vocab_size, a.distillkit)
    real = dict(word.split("=", 1) for word in a.cache)
    notes = {}
    made = {f.name: [] for f in listed if f.name not in real}
    if a.only_caches:
        made = {}
        notes = json.loads((work / "formats.json").read_text()) if (work / "formats.json").exists() else {}
    generator = torch.Generator().manual_seed(17)
    tops, mass = [], torch.zeros(vocab_size, dtype=torch.float64)
    for chunk in chunks(row_count, a.chunk) if made else []:
        p = softmax(torch.from_numpy(np.array(hidden[chunk.start : chunk.stop])), head)
        mass += p.sum(0)
        values, ids = p.topk(WIDTH)
        rest = 1 - values.double().sum(-1, keepdim=True)
        rest = torch.maximum(rest, p.scatter(1, ids, 0).sum(-1, keepdim=True).double())
        after = values.double().flip(-1).cumsum(-1).flip(-1)
        tails = (rest + torch.cat([after[:, 1:], torch.zeros(len(p), 1)], 1)).float()
        draws = torch.rand(len(p), 1, generator=generator, dtype=torch.float64)
        rows = Rows(ids, values.log(), tails, p, draws, generator)
        for f in listed:
            if f.name in made:
                made[f.name].append(f.keep(rows))
        tops.append(ids.int())
        print(f"targets: {chunk.stop}/{row_count} rows", flush=True)
    if made:
        np.save(work / "top.npy", torch.cat(tops).numpy())
        np.save(work / "mass.npy", mass.numpy())
    for f in listed:
        if f.name in made:
            targets = join(made.pop(f.name))
            targets.save(work / f"targets_{len(notes):03}.npz")
            kept = len(targets.ids) / row_count
            notes[f.name] = dict(
                file=f"targets_{len(notes):03}.npz", family=f.family, codec=f.codec, selection=f.selection, kept=kept,
                bytes=f.count(kept, math.ceil(math.log2(vocab_size))), bytes_are="counted", table_bytes=0,
                wide=f.count(kept, 18), accumulate=f.accumulate)
    known = {f.name: f for f in listed}
    for name, folders in real.items():
        raw, _, stored = folders.partition(",")
        if not torch.equal(Text(raw, text.count).tokens, text.tokens):
            raise SystemExit(f"{raw} holds other text than {a.text}")
        targets = from_cache(raw, row_count)
        old = notes.get(name)
        file = old["file"] if old else f"targets_{len(notes):03}.npz"
        targets.save(work / file)
        size, tables, whole, stored_kept = measured_bytes(stored or raw)
        codec, _, selection = name.partition(" ")
        kept = len(targets.ids) / int(text.valid.sum())
        bits = {"raw": 0, "packed": 18 - math.ceil(math.log2(vocab_size))}.get(codec, math.log2(202048 / vocab_size))
        notes[name] = dict(
            file=file, family=known[name].family if name in known else f"{codec} {selection.split(' ')[0]}",
            codec=codec, selection=selection, kept=kept, bytes=size, bytes_are="measured", table_bytes=tables,
            whole=whole, bits=8 * size / stored_kept, wide=size + (kept + 1) * bits / 8, accumulate=True)
    (work / "formats.json").write_text(json.dumps(notes, indent=1))


# ---------------------------------------------------------------- measuring


class Measured:
    """Sums of one configuration with one student."""

    def __init__(self, targets, note, dimension, ids):
        self.targets, self.note = targets, note
        self.logit = self.hidden = self.kl = 0.0
        self.sampled = targets.kind == "sampled"
        if note["accumulate"]:
            self.weight = torch.zeros(ids, dimension)
            self.projection = torch.zeros(dimension, dimension)
            self.waiting = []  # sparse parts of the head's gradient: (row of the chunk, place among ids, value)


class Student:
    def __init__(self, name, path):
        self.name = name
        self.states = np.load(path, mmap_mode="r")
        self.head = torch.from_numpy(np.load(str(path).removesuffix(".npy") + ".head.npy"))
        self.done = Path(str(path) + ".done")
        self.logit = self.short_logit = self.hidden = self.kl = 0.0

    def rows(self, rows, seq_len):
        """Hidden states of some rows; waits for cache_states.py where it is still at work."""
        while int(self.done.read_text() or 0) * seq_len <= rows[-1]:
            time.sleep(1)
        return torch.from_numpy(self.states[rows.numpy()])


def measure(a):
    work = Path(a.work)
    text = Text(a.text, a.rows_sequences)
    valid = text.valid.flatten()
    row_count = min(len(valid), a.rows or len(valid))
    notes = json.loads((work / "formats.json").read_text())
    if a.only:
        notes = {name: note for name, note in notes.items() if any(part in name for part in a.only.split(","))}
    all_targets = {name: Targets.load(work / note["file"]) for name, note in notes.items()}
    top = np.load(work / "top.npy", mmap_mode="r")
    teacher = np.load(work / "teacher.npy", mmap_mode="r")
    teacher_head = torch.from_numpy(np.load(work / "teacher.head.npy"))
    vocab_size = len(teacher_head)
    chosen, weights = choose_ids(np.load(work / "mass.npy"), a.frequent, 1 if a.all_ids else a.share)
    place = torch.full((vocab_size,), -1, dtype=torch.int64)
    place[chosen] = torch.arange(len(chosen))
    students = [Student(*word.split("=", 1)) for word in a.student]
    for s in students:
        s.configurations = {
            name: Measured(targets, notes[name], s.head.shape[1], len(chosen)) for name, targets in all_targets.items()}
        s.weight = torch.zeros(len(chosen), s.head.shape[1])
        s.base = torch.zeros_like(s.weight)
        s.projection = torch.zeros(s.head.shape[1], s.head.shape[1])
        s.base_projection = torch.zeros_like(s.projection)
        s.dense = [c for c in s.configurations.values() if c.note["accumulate"] and c.targets.kind == "bucket"]
        s.dense_weight = torch.zeros(len(chosen), len(s.dense) * s.head.shape[1])
    growth, used, seen = [], 0, 0
    points = [p for p in POINTS if p < row_count] + [row_count]
    marks = torch.zeros(a.chunk, vocab_size, dtype=torch.bool)
    borders = sorted({c.start for c in chunks(row_count, a.chunk)} | set(points) | {row_count})
    begun = time.time()
    hidden_rows = min(row_count, a.hidden_rows or row_count)
    for first, end in zip(borders, borders[1:]):
        rows = valid[first:end].nonzero().flatten() + first
        p = softmax(torch.from_numpy(teacher[rows.numpy()]), teacher_head)
        top_ids = torch.from_numpy(top[rows.numpy()]).long()
        p_top = p.gather(1, top_ids).double()
        with_hidden = end <= hidden_rows
        sparse = {name: slice_rows(t, rows, vocab_size) for name, t in all_targets.items()
                  if with_hidden or notes[name]["accumulate"]}
        for ids in sparse.values():
            flat = ids["flat"]
            marks.view(-1)[flat] = True
            ids["outside"] = ~marks[: len(rows)].gather(1, top_ids)  # top ids that are not kept
            marks.view(-1)[flat] = False
            marks.view(-1)[(top_ids + torch.arange(len(rows))[:, None] * vocab_size).flatten()] = True
            ids["beyond"] = ~marks.view(-1)[flat]  # kept ids that are not among the top
            marks.view(-1)[(top_ids + torch.arange(len(rows))[:, None] * vocab_size).flatten()] = False
            ids["p"] = p.view(-1)[flat].double()
        for number, s in enumerate(students):
            chunk_of_student(s, s.rows(rows, text.seq_len), p, top_ids, p_top, sparse, place, chosen,
                             with_hidden, number == 0)
        used += len(rows)
        seen += len(rows) if with_hidden else 0
        if end in points or end % a.flush == 0:
            for s in students:
                flush(s)
        if end in points:
            for s in students:
                growth += grown(s, weights, used, end <= hidden_rows)
            write_results(a, students, notes, used, seen, growth)
        print(f"measure: {end}/{row_count} rows, {time.time() - begun:.0f} s", flush=True)


def choose_ids(mass, frequent, share):
    """Ids with the most mass, then one in `share` of the others; and their weights in sums of squares."""
    order = torch.from_numpy(mass).argsort(descending=True)
    others = order[frequent:]
    picked = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(18))[: len(others) // share]]
    weight = len(others) / max(1, len(picked))
    weights = torch.cat([torch.ones(len(order[:frequent])), torch.full((len(picked),), weight)])
    return torch.cat([order[:frequent], picked]), weights.double()


def slice_rows(targets, rows, vocab_size):
    """The kept entries of some rows, as flat positions in [rows, V]."""
    begins, ends = targets.offsets[rows.numpy()], targets.offsets[rows.numpy() + 1]
    counts = ends - begins
    index = np.repeat(begins - np.concatenate([[0], counts.cumsum()[:-1]]), counts) + np.arange(counts.sum())
    row = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
    ids = torch.from_numpy(targets.ids[index]).long()
    return dict(row=row, ids=ids, flat=row * vocab_size + ids, offsets=torch.from_numpy(counts.cumsum() - counts),
                value=torch.from_numpy(targets.values[index]).double().exp(),
                log_value=torch.from_numpy(targets.values[index]).double(),
                tail=torch.from_numpy(targets.tail[rows.numpy()]).double())


def row_sums(row, values, count):
    return torch.zeros(count, dtype=torch.float64).index_add_(0, row, values)


def chunk_of_student(s, h, p, top_ids, p_top, sparse, place, chosen, with_hidden, with_kl):
    q = softmax(h, s.head)
    count = len(h)
    q_top = q.gather(1, top_ids).double()
    p_kept = p_top.float()
    p.scatter_(1, top_ids, 0)
    q.scatter_(1, top_ids, 0)
    if with_hidden:
        s.kl += (p_top * (p_top / q_top.clamp_min(1e-30)).log()).sum().item()
        s.kl += (p * (p.clamp_min(1e-30) / q.clamp_min(1e-30)).log_()).sum(-1).double().sum().item()
    rest = dict(pp=dot(p, p), pq=dot(p, q), qq=dot(q, q), p=p.sum(-1).double(), q=q.sum(-1).double())
    p.scatter_(1, top_ids, p_kept)
    q.scatter_(1, top_ids, q_top.float())
    full = ((q_top - p_top) ** 2).sum(-1) + rest["qq"] - 2 * rest["pq"] + rest["pp"]
    size = full.clamp_min(0).sqrt().sum().item()
    s.logit += size
    s.short_logit += size if with_hidden else 0
    p_rows, q_rows = p[:, chosen], q[:, chosen]
    s.base.addmm_(p_rows.T, h)
    s.weight.addmm_((q_rows - p_rows).T, h)
    if with_hidden:
        p_hidden, q_hidden = p @ s.head, q @ s.head
        s.hidden += (q_hidden - p_hidden).norm(dim=-1).double().sum().item()
        s.projection.addmm_((q_hidden - p_hidden).T, h)
    scaled = []
    for name, c in s.configurations.items():
        if not (with_hidden or c.note["accumulate"]):
            continue
        kept = sparse[name]
        row, p_i, value = kept["row"], kept["p"], kept["value"]
        q_i = q.view(-1)[kept["flat"]].double()
        beyond = kept["beyond"]
        missing = {}
        for letter, whole, of_top, of_kept in (("p", rest["p"], p_top, p_i), ("q", rest["q"], q_top, q_i)):
            part = whole + (of_top * kept["outside"]).sum(-1)
            missing[letter] = part - row_sums(row[beyond], of_kept[beyond], count) if beyond.any() else part
        if c.targets.kind == "bucket":
            total = row_sums(row, value, count) + kept["tail"]
            share = total - kept["tail"] / missing["q"].clamp_min(1e-12) - 1  # where nothing is kept: p + share q
            error = total[row] * q_i - value - (q_i - p_i)
            if with_kl:
                true_tail = missing["p"].clamp_min(1e-30)
                c.kl += (p_i * (p_i.clamp_min(1e-30).log() - kept["log_value"])).sum().item()
                c.kl += (true_tail * (true_tail.log() - kept["tail"].clamp_min(1e-30).log())).sum().item()
        else:
            share = torch.zeros(count, dtype=torch.float64)
            error = p_i - value
        unkept = p_top + share[:, None] * q_top
        square = ((unkept * kept["outside"]) ** 2).sum(-1) + row_sums(row, error**2, count)
        square += rest["pp"] + 2 * share * rest["pq"] + share**2 * rest["qq"]
        if beyond.any():
            base = p_i[beyond] + share[row[beyond]] * q_i[beyond]
            square -= row_sums(row[beyond], base**2, count)
        c.logit += square.clamp_min(0).sqrt().sum().item()
        entry = (error - p_i - share[row] * q_i).float()  # beyond p + share q, at the kept ids
        if with_hidden:
            hidden = F.embedding_bag(kept["ids"], s.head, kept["offsets"], mode="sum", per_sample_weights=entry)
            hidden += p_hidden + share.float()[:, None] * q_hidden
            c.hidden += hidden.norm(dim=-1).double().sum().item()
            if c.note["accumulate"]:
                c.projection.addmm_(hidden.T, h)
        if c.note["accumulate"]:
            at = place[kept["ids"]]
            inside = at >= 0
            c.waiting.append((row[inside], at[inside], entry[inside], h))
            if c.targets.kind == "bucket":
                scaled.append(h * share.float()[:, None])
    if scaled:
        s.dense_weight.addmm_(q_rows.T, torch.cat(scaled, 1))


def dot(x, y):
    return torch.einsum("tv,tv->t", x, y).double()


def flush(s):
    """Adds the sparse parts of the head's gradients that wait."""
    for c in s.configurations.values():
        if not c.note["accumulate"] or not c.waiting:
            continue
        base, rows, at, values = 0, [], [], []
        for row, place, value, h in c.waiting:
            rows.append(row + base)
            at.append(place)
            values.append(value)
            base += len(h)
        states = torch.cat([part[3] for part in c.waiting])
        indices = torch.stack([torch.cat(at), torch.cat(rows)])
        matrix = torch.sparse_coo_tensor(indices, torch.cat(values), (len(c.weight), base))
        c.weight += torch.sparse.mm(matrix.to_sparse_csr(), states)
        c.waiting = []


def grown(s, weights, rows, with_projection):
    norm = lambda matrix: math.sqrt((matrix.double().pow(2).sum(-1) * weights).sum().item())
    whole = norm(s.weight)
    lines = []
    dimension = s.head.shape[1]
    for name, c in s.configurations.items():
        if not c.note["accumulate"]:
            continue
        error = c.weight + s.base
        if c in s.dense:
            first = s.dense.index(c) * dimension
            error += s.dense_weight[:, first : first + dimension]
        size = norm(error)
        c.weight_error = size / whole
        if with_projection:
            c.projection_error = (c.projection.norm() / s.projection.norm()).item()
        lines.append(dict(student=s.name, name=name, family=c.note["family"], rows=rows, weight_error=size / whole,
                          weight_error_norm=size, weight_norm=whole,
                          projection_error=c.projection_error if with_projection else None))
    return lines


def write_results(a, students, notes, used, seen, growth):
    lines = []
    for s in students:
        for name, c in s.configurations.items():
            n = c.note
            measured_rows = used if n["accumulate"] else seen
            kl = students[0].configurations[name].kl / measured_rows
            logit = s.logit if n["accumulate"] else s.short_logit
            lines.append(dict(
                student=s.name, student_kl=s.kl / seen, name=name, family=n["family"], codec=n["codec"],
                selection=n["selection"], target=c.targets.kind, rows=measured_rows, kept=n["kept"],
                bytes_per_token=n["bytes"], bytes_are=n["bytes_are"] if n["bytes"] else None,
                table_bytes=n["table_bytes"], bytes_with_tables=n.get("whole", n["bytes"]),
                bits_per_kept=n.get("bits", n["bytes"] and 8 * n["bytes"] / n["kept"]), bytes_at_202048=n["wide"],
                kl=kl if c.targets.kind == "bucket" else None, logit_error=c.logit / logit,
                hidden_error=c.hidden / s.hidden if s.hidden else None,
                weight_error=getattr(c, "weight_error", None), projection_error=getattr(c, "projection_error", None)))
    RESULTS.mkdir(exist_ok=True)
    for file, columns, table in (("cache_pareto.csv", COLUMNS, lines), ("cache_gradients.csv", GROWTH, growth)):
        path = Path(a.results or RESULTS) / file
        measured = {(line["student"], line["name"]) for line in table}
        others = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
        order = list(dict.fromkeys(line["student"] for line in others + table))
        others = [line for line in others if (line["student"], line["name"]) not in measured]
        with open(path, "w", newline="") as out:
            writer = csv.DictWriter(out, columns, lineterminator="\n")
            writer.writeheader()
            for line in sorted(others + table, key=lambda line: order.index(line["student"])):
                writer.writerow({key: f"{v:.5g}" if isinstance(v, float) else v for key, v in line.items()})


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=["targets", "measure", "draw"])
    arguments.add_argument("work", nargs="?")
    arguments.add_argument("text", nargs="?")
    arguments.add_argument("--distillkit", help="a checkout of DistillKit")
    arguments.add_argument("--cache", action="append", default=[], metavar="NAME=RAW[,STORED]")
    arguments.add_argument("--only-caches", action="store_true", help="keep the other targets of an earlier run")
    arguments.add_argument("--student", action="append", default=[], metavar="NAME=STATES.npy")
    arguments.add_argument("--only", help="configurations whose names contain one of these, separated by commas")
    arguments.add_argument("--sequences", dest="rows_sequences", type=int, default=400)
    arguments.add_argument("--rows", type=int, help="measure only the first of the rows")
    arguments.add_argument("--hidden-rows", type=int,
                           help="rows of hidden gradients, and of configurations without accumulated ones")
    arguments.add_argument("--frequent", type=int, default=4096)
    arguments.add_argument("--share", type=int, default=16)
    arguments.add_argument("--all-ids", action="store_true")
    arguments.add_argument("--chunk", type=int, default=2048)
    arguments.add_argument("--flush", type=int, default=16384)
    arguments.add_argument("--results", help="folder of the CSV files, benches/results otherwise")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    if a.what == "draw":
        from cache_pictures import draw

        return draw(Path(a.results or RESULTS), RESULTS.parents[1] / "docs/pictures")
    with torch.no_grad():
        dict(targets=make_targets, measure=measure)[a.what](a)


if __name__ == "__main__":
    main()
