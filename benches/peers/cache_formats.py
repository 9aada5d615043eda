"""Soft targets as caches keep them: selections and quantisers of limbeck's, DistillKit by its own code, u32 + f16.

Every configuration turns rows of teacher probabilities into `Targets`: what a trainer gets back from such a cache. The
bytes here are counted from the layouts (`counted`); cache_pareto.py takes measured ones where it is given real caches.
"""
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

WIDTH = 256  # of the teacher's largest probabilities, kept beside the rows: no selection keeps more


@dataclasses.dataclass
class Targets:
    """Row r keeps ids[offsets[r]:offsets[r + 1]] with log-probabilities (or weights) `values`; `tail` is a probability.

    kind: `bucket` (the tail is one more outcome), `zero` (what is not kept has probability 0), `sampled` (weights of an
    unbiased sample: no tail).
    """

    kind: str
    offsets: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    tail: np.ndarray

    def save(self, path):
        np.savez(path, kind=np.array(self.kind), offsets=self.offsets, ids=self.ids, values=self.values, tail=self.tail)

    @staticmethod
    def load(path):
        with np.load(path) as stored:
            return Targets(str(stored["kind"]), *(stored[key] for key in ("offsets", "ids", "values", "tail")))


@dataclasses.dataclass(frozen=True)
class Format:
    """One point of the Pareto. `keep` makes the targets of a chunk; `count` its bytes per token from the mean kept ids
    at an id width in bits, or None where only a real cache can say."""

    name: str
    family: str
    codec: str
    selection: str
    keep: object
    count: object
    accumulate: bool = True  # whether the accumulated gradients are measured too


@dataclasses.dataclass
class Rows:
    """A chunk: top ids and log-probabilities [n, WIDTH] in descending order, dense p [n, V], a uniform draw per row."""

    ids: torch.Tensor
    log_p: torch.Tensor
    tails: torch.Tensor  # probability outside the first j + 1 of the top ids, [n, WIDTH]
    p: torch.Tensor
    draws: torch.Tensor  # [n, 1], f64
    generator: torch.Generator


def ragged(kind, kept, ids, values, tail):
    """Targets of rows from padded tensors and a mask."""
    offsets = np.concatenate([[0], kept.sum(-1).cumsum(0).numpy()]).astype(np.int64)
    return Targets(kind, offsets, ids[kept].int().numpy(), values[kept].float().numpy(), tail.float().numpy())


def join(parts):
    offsets = [parts[0].offsets]
    for part in parts[1:]:
        offsets.append(part.offsets[1:] + offsets[-1][-1])
    fields = (np.concatenate([getattr(part, key) for part in parts]) for key in ("ids", "values", "tail"))
    return Targets(parts[0].kind, np.concatenate(offsets), *fields)


# ---------------------------------------------------------------- selections


def min_prob(theta, cap):
    return lambda rows: (rows.log_p >= math.log(theta)) & (torch.arange(WIDTH) < cap)


def top_k(k):
    return lambda rows: (torch.arange(WIDTH) < k).expand(rows.ids.shape)


def top_p(mass, cap):
    def choose(rows):
        before = 1 - torch.cat([torch.ones(len(rows.ids), 1), rows.tails[:, :-1]], 1)
        return (before < mass) & (torch.arange(WIDTH) < cap)

    return choose


# ---------------------------------------------------------------- what is kept of the values


def exact(choose, step=None):
    """Kept ids and tail. `step`: values uniform in sqrt(p), at least one step, then scaled to 1 - tail."""

    def keep(rows):
        kept = choose(rows) & (rows.log_p > -80)
        kept[:, 0] = True
        tail = rows.tails.gather(1, kept.sum(-1, keepdim=True) - 1)[:, 0]
        values = rows.log_p
        if step:
            level = (rows.log_p.mul(0.5).exp() / step).round().clamp_min(1)
            p = torch.where(kept, (level * step) ** 2, 0)
            values = (p * ((1 - tail) / p.sum(-1))[:, None]).log()
        return ragged("bucket", kept, rows.ids, values, tail)

    return keep


def threshold_sampled(c, step=None):
    """p >= c is kept as it is (`step`: to the nearest level in sqrt(p)), a smaller p with probability p / c at c: where
    the points (u + 0) c, (u + 1) c, ... fall in the running sum of the smaller ones, u one draw per row."""

    def keep(rows):
        parts = []
        for first in range(0, len(rows.p), 256):
            p, draws = rows.p[first : first + 256], rows.draws[first : first + 256]
            sums = torch.where(p < c, p, 0).cumsum(-1, dtype=torch.float64)
            points = (draws + torch.arange(math.ceil(1 / c))) * c
            row, column = (points < sums[:, -1:]).nonzero().T
            light = row * p.shape[1] + torch.searchsorted(sums, points, right=True)[row, column]
            heavy = (p >= c).flatten().nonzero()[:, 0]
            keys = torch.cat([light, heavy]).sort().values
            where = torch.stack([keys // p.shape[1], keys % p.shape[1]], 1)
            p = p.flatten()[keys]
            level = (p.sqrt() / step).round() * step if step else p.sqrt()
            parts.append(flat("sampled", where, torch.where(p >= c, level**2, c).log(), len(draws)))
        return join(parts)

    return keep


def sampled(draw_count):
    def keep(rows):
        ids = torch.multinomial(rows.p, draw_count, replacement=True, generator=rows.generator)
        keys = ids + torch.arange(len(ids))[:, None] * rows.p.shape[1]
        keys, counts = keys.flatten().unique(return_counts=True)
        where = torch.stack([keys // rows.p.shape[1], keys % rows.p.shape[1]], 1)
        return flat("sampled", where, (counts / draw_count).log(), len(rows.p))

    return keep


def flat(kind, where, values, row_count):
    counts = torch.bincount(where[:, 0], minlength=row_count)
    offsets = np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int64)
    return Targets(kind, offsets, where[:, 1].int().numpy(), values.float().numpy(), np.zeros(row_count, np.float32))


# ---------------------------------------------------------------- other formats


def plain_f16(k):
    """u32 ids and f16 log-probabilities; the tail is what is missing to 1."""

    def keep(rows):
        values = rows.log_p[:, :k].half().float()
        tail = (1 - values.exp().sum(-1)).clamp_min(1e-8)
        return ragged("bucket", torch.ones_like(values, dtype=torch.bool), rows.ids[:, :k], values, tail)

    return keep


DISTILLKIT = {
    "recommended": dict(k=128, exact_k=16, exact_dtype="bfloat16", polynomial_terms=[0, 1, 2, 3, 4, "sqrt"],
                        delta_encoding=False),
    "budget": dict(k=50, exact_k=1, exact_dtype="bfloat16", polynomial_terms=[0, 1, "sqrt"], delta_encoding=False),
    "Qwen3-235B": dict(k=128, exact_k=32, exact_dtype="float32", polynomial_terms=[0, 1, 2], delta_encoding=True),
}


def distillkit(setting, kind, vocab_size):
    """Through DistillKit's own compressor and back; the tail as its sparse_kl_div makes it from the values."""
    from distillkit.compression.compressor import LogprobCompressor
    from distillkit.compression.config import DistributionQuantizationConfig, SpecialTerm

    words = dict(DISTILLKIT[setting])
    words["polynomial_terms"] = [SpecialTerm.SQRT if t == "sqrt" else t for t in words["polynomial_terms"]]
    config = DistributionQuantizationConfig(
        d=vocab_size, term_dtype="float32", residual_bins=[], error_diffusion=False, **words)
    compressor = LogprobCompressor(config)

    def keep(rows):
        packed = compressor.compress_from_sparse(rows.ids[:, : config.k].long(), rows.log_p[:, : config.k])
        assert sum(part.shape[-1] for part in packed.values()) * 8 == config.total_bits()
        ids, values = compressor.decompress_to_sparse(packed)
        values = values.float()
        if kind == "zero":
            values, tail = values.log_softmax(-1), torch.zeros(len(values))
        else:
            tail = 1 - values.exp().sum(-1).clamp(1e-8, 1 - 1e-8)
        return ragged(kind, torch.ones_like(values, dtype=torch.bool), ids, values, tail)

    return keep, lambda kept, id_bits: (config.total_bits() + (config.k * id_bits + 7) // 8 * 8
                                        - (config.k * compressor.vocab_index_bits + 7) // 8 * 8) / 8


# ---------------------------------------------------------------- the list


def raw_bytes(kept, id_bits):
    """Offset, tail, label, token, segment; id and value of each kept."""
    return 8 + 4 + 4 + 4 + 4 + 8 * kept


def packed_bytes(kept, id_bits):
    """Token, count (8 bits), tail (16 bits), label (16 bits, in a quarter of the rows), 6 bits of level per id."""
    return id_bits / 8 + 1 + 2 + 0.5 + kept * (id_bits + 6) / 8


def formats(vocab_size, distillkit_folder=None):
    """All configurations; DistillKit's only where a checkout of it is given."""
    listed = []

    def add(*words, **options):
        listed.append(Format(*words, **options))

    unknown = lambda kept, id_bits: None
    mins = [(1e-2, 128, 48), (5e-3, 128, 64), (3e-3, 128, 64), (2e-3, 128, 96), (1e-3, 64, 96), (1e-3, 128, 96),
            (5e-4, 256, 160)]
    for theta, cap, steps in mins:
        choice = f"min_prob {theta:g}" + (f" cap {cap}" if theta <= 1e-3 else "")
        add(f"compact {choice}", "compact min_prob", "compact", choice, exact(min_prob(theta, cap), 1 / steps), unknown)
    for theta, cap, _ in mins:
        choice = f"min_prob {theta:g}" + (f" cap {cap}" if theta <= 1e-3 else "")
        add(f"packed {choice}", "packed min_prob", "packed", choice, exact(min_prob(theta, cap), 1 / 63), packed_bytes,
            accumulate=(theta, cap) in ((1e-2, 128), (3e-3, 128), (1e-3, 128)))
        add(f"raw {choice}", "raw min_prob", "raw", choice, exact(min_prob(theta, cap)), raw_bytes, accumulate=False)
    for k in (16, 32, 50, 64, 128):
        add(f"compact top_k {k}", "compact top_k", "compact", f"top_k {k}",
            exact(top_k(k), 1 / (64 if k <= 50 else 96)), unknown)
    for mass in (0.8, 0.9):
        add(f"compact top_p {mass}", "compact top_p", "compact", f"top_p {mass} cap 128",
            exact(top_p(mass, 128), 1 / 64), unknown)
    for c, steps in ((1e-2, 64), (3e-3, 96)):
        add(f"raw threshold_sampled {c:g}", "raw threshold_sampled", "raw", f"threshold_sampled {c:g}",
            threshold_sampled(c), raw_bytes)
        add(f"compact threshold_sampled {c:g}", "compact threshold_sampled", "compact", f"threshold_sampled {c:g}",
            threshold_sampled(c, 1 / steps), unknown)
    add("raw sampled 50", "raw sampled", "raw", "sampled 50", sampled(50), raw_bytes)
    for k in (50, 128):
        add(f"u32 + f16 top {k}", "u32 + f16", "u32 + f16", f"top_k {k}", plain_f16(k), lambda kept, id_bits: 6 * kept)
    if distillkit_folder:
        sys.path.insert(0, distillkit_folder)
        for setting in DISTILLKIT:
            for kind, tail in (("bucket", "symmetric_uniform"), ("zero", "zero")):
                keep, count = distillkit(setting, kind, vocab_size)
                add(f"DistillKit {setting}, {tail}", f"DistillKit, {tail} tail", "DistillKit", setting, keep, count)
    return listed


def from_cache(raw_folder, row_count):
    """Targets of the first rows of a finished cache of limbeck's with codec `raw` (any other: convert it first)."""
    raw_folder = Path(raw_folder)
    manifest = json.loads((raw_folder / "manifest.json").read_text())
    codec = manifest["settings"]["codec"]
    if (codec if isinstance(codec, str) else codec.get("kind")) != "raw":
        raise SystemExit(f"{raw_folder} is not raw; convert it first: limbeck cache convert")
    kind = "sampled" if "sampled" in manifest["settings"]["soft_targets"]["selection"]["kind"] else "bucket"
    parts, rows = [], 0
    for shard in manifest["shards"]:
        tensors = load_file(raw_folder / shard["file"])
        offsets = tensors["offsets"].astype(np.int64)
        count = min(len(offsets) - 1, row_count - rows)
        end = offsets[count]
        tail = np.exp(tensors["log_tail.0"][:count]) if kind == "bucket" else np.zeros(count, np.float32)
        parts.append(Targets(kind, offsets[: count + 1], tensors["ids"][:end].astype(np.int32),
                             tensors["log_probs.0"][:end], tail))
        rows += count
        if rows == row_count:
            return join(parts)
    raise SystemExit(f"{raw_folder} has {rows} rows, fewer than the {row_count} that are measured")


def measured_bytes(folder):
    """Of a finished cache: bytes per valid row without the coder's tables, the bytes of these tables, bytes per valid
    row with them, kept ids per valid row."""
    folder = Path(folder)
    counts = json.loads((folder / "manifest.json").read_text())["counts"]
    tables = folder / "coder.safetensors"
    fixed = tables.stat().st_size if tables.exists() else 0
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    rows = counts["valid_rows"]
    return (total - fixed) / rows, fixed, total / rows, counts["kept_ids"] / rows
