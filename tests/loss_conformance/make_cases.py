"""Writes the loss conformance cases: inputs, and what a right implementation answers, computed in f64 with numpy.

    python tests/loss_conformance/make_cases.py [--out tests/loss_conformance/cases] [--check]

--check writes nothing: it makes everything again, compares it with the files, and holds every gradient against
complex-step derivatives (exact to rounding) of a second, plainer way to write the same divergence. README.md beside the
cases says what the fields and tensors mean. Nothing here is shared with the library that is tested.
"""
import argparse
import json
import os
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

NEGATIVE_INFINITY = float("-inf")
TOLERANCE = {"value_relative": 1e-6, "value_absolute": 1e-6, "gradient": 1e-5, "gradient_absolute": 1e-6}


# ---------------------------------------------------------------- reference in f64

def logsumexp(x):
    if len(x) == 0:
        return NEGATIVE_INFINITY
    top = np.max(np.real(x))
    return top + np.log(np.sum(np.exp(x - top)))


def p_log_p_over(log_p, log_r):
    """sum p (log p - log r) with 0 log 0 = 0."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        return np.sum(np.where(p > 0, p * (np.where(p > 0, log_p, 0) - log_r), 0))


def divergence_and_slopes(divergence, log_p, log_q, has_tail):
    """The divergence of one row and its derivative in each log q; outcomes are the kept ids, then the tail if any."""
    kind, p, q = divergence["kind"], np.exp(log_p), np.exp(log_q)
    if kind == "forward_kl":
        return p_log_p_over(log_p, log_q), -p
    if kind == "soft_cross_entropy":
        return -np.sum(p * log_q), -p
    if kind == "reverse_kl":
        gap = log_q - log_p
        return np.sum(q * gap), q * (gap + 1)
    if kind == "jsd":
        beta = divergence["beta"]
        log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
        value = beta * p_log_p_over(log_p, log_m) + (1 - beta) * np.sum(q * (log_q - log_m))
        return value, (1 - beta) * q * (log_q - log_m)
    if kind == "skew_forward_kl":
        alpha = divergence["alpha"]
        m = alpha * p + (1 - alpha) * q
        return p_log_p_over(log_p, np.log(m)), -p * (1 - alpha) * q / m
    if kind == "skew_reverse_kl":
        alpha = divergence["alpha"]
        m = alpha * q + (1 - alpha) * p
        gap = log_q - np.log(m)
        return np.sum(q * gap), q * (gap + 1 - alpha * q / m)
    if kind == "total_variation":
        return 0.5 * np.sum(np.abs(p - q)), 0.5 * q * np.sign(q - p)
    if kind in ("renyi", "amari"):
        alpha = divergence["alpha"]
        weights = np.exp(np.where(p > 0, alpha * np.where(p > 0, log_p, 0) + (1 - alpha) * log_q, NEGATIVE_INFINITY))
        total = np.sum(weights)
        if kind == "renyi":
            return np.log(total) / (alpha - 1), -weights / total
        return (total - 1) / (alpha * (alpha - 1)), -weights / alpha
    if kind == "conditional_forward_kl":
        kept = slice(0, len(p) - 1) if has_tail else slice(None)
        inner_p, inner_q = log_p[kept] - logsumexp(log_p[kept]), log_q[kept] - logsumexp(log_q[kept])
        slopes = np.zeros_like(p)
        slopes[kept] = np.exp(inner_q) - np.exp(inner_p)
        return p_log_p_over(inner_p, inner_q), slopes
    raise ValueError(kind)


def plain_value(divergence, log_p, z, ids, tail_ids):
    """The same divergence written out from probabilities, for complex z. The second opinion of --check."""
    e = np.exp(z - np.max(np.real(z)))
    q = np.append(e[ids], np.sum(e[tail_ids])) / np.sum(e) if len(tail_ids) else e[ids] / np.sum(e)
    p = np.exp(log_p)
    kind, alpha, beta = divergence["kind"], divergence.get("alpha"), divergence.get("beta")
    safe = np.where(p > 0, p, 1)
    if kind == "forward_kl":
        return np.sum(p * (np.log(safe) - np.log(q)))
    if kind == "soft_cross_entropy":
        return np.sum(p * -np.log(q))
    if kind == "reverse_kl":
        return np.sum(q * (np.log(q) - log_p))
    if kind == "jsd":
        m = beta * p + (1 - beta) * q
        return np.sum(beta * p * (np.log(safe) - np.log(m)) + (1 - beta) * q * (np.log(q) - np.log(m)))
    if kind == "skew_forward_kl":
        return np.sum(p * (np.log(safe) - np.log(alpha * p + (1 - alpha) * q)))
    if kind == "skew_reverse_kl":
        return np.sum(q * (np.log(q) - np.log(alpha * q + (1 - alpha) * p)))
    if kind == "total_variation":
        return 0.5 * np.sum((p - q) * np.sign(p - np.real(q)))
    if kind == "renyi":
        return np.log(np.sum(p**alpha * q ** (1 - alpha))) / (alpha - 1)
    if kind == "amari":
        return (np.sum(p**alpha * q ** (1 - alpha)) - 1) / (alpha * (alpha - 1))
    count = len(ids)
    p, q = p[:count] / np.sum(p[:count]), q[:count] / np.sum(q[:count])
    return np.sum(p * (np.log(p) - np.log(q)))


def row_parts(inputs, row):
    """Student logits of the true vocabulary, kept ids, tail ids and the teacher's log-probabilities of the outcomes."""
    z = inputs["student_logits"][row, : inputs["vocab"]].astype(np.float64)
    count = int(inputs["counts"][row])
    ids = inputs["ids"][row, :count]
    outside = np.ones(len(z), dtype=bool)
    outside[ids] = False
    tail_ids = np.flatnonzero(outside)
    log_p = inputs["log_probs"][row, :count].astype(np.float64)
    if len(tail_ids):
        log_p = np.append(log_p, np.float64(inputs["log_tail"][row]))
    return z, ids, tail_ids, log_p


def soft_row(inputs, divergence, row, temperature):
    z, ids, tail_ids, log_p = row_parts(inputs, row)
    z = z / temperature
    lse = logsumexp(z)
    log_q = z[ids] - lse
    if len(tail_ids):
        tail_lse = logsumexp(z[tail_ids])
        log_q = np.append(log_q, tail_lse - lse)
    value, slopes = divergence_and_slopes(divergence, log_p, log_q, len(tail_ids) > 0)
    gradient = -np.exp(z - lse) * np.sum(slopes)
    gradient[ids] += slopes[: len(ids)]
    if len(tail_ids):
        gradient[tail_ids] += slopes[-1] * np.exp(z[tail_ids] - tail_lse)
    return value, gradient / temperature


def hard_row(inputs, row):
    z = inputs["student_logits"][row, : inputs["vocab"]].astype(np.float64)
    lse, label = logsumexp(z), int(inputs["label"][row])
    gradient = np.exp(z - lse)
    gradient[label] -= 1
    return lse - z[label], gradient


# ---------------------------------------------------------------- inputs

def log_softmax(z):
    return z - logsumexp(z)


def capture(teacher, ids, counts, label, temperature):
    """Kept log-probabilities, tail and label of the full row at a temperature, as f32. Unused places hold -inf."""
    T, k = ids.shape
    log_probs = np.full((T, k), NEGATIVE_INFINITY, dtype=np.float32)
    log_tail, label_log_prob = np.full(T, NEGATIVE_INFINITY, np.float32), np.zeros(T, np.float32)
    for t in range(T):
        log_p = log_softmax(teacher[t].astype(np.float64) / temperature)
        kept = ids[t, : counts[t]]
        log_probs[t, : counts[t]] = log_p[kept]
        outside = np.ones(len(log_p), dtype=bool)
        outside[kept] = False
        log_tail[t] = logsumexp(log_p[outside])
        label_log_prob[t] = log_p[label[t]] if label[t] >= 0 else 0
    return log_probs, log_tail, label_log_prob


def top(teacher, k):
    return np.argsort(-teacher.astype(np.float64), axis=1, kind="stable")[:, :k].astype(np.int64)


def inputs_from(student, teacher, k, label=None, mask=None, counts=None, temperature=1.0, vocab=None, seed=0):
    """`vocab` is the true vocabulary where either side has padding columns behind it."""
    vocab = vocab or min(student.shape[1], teacher.shape[1])
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    T = len(student)
    ids = top(teacher[:, :vocab], k)
    if label is None:
        label = np.random.default_rng(1000 + seed).integers(vocab, size=T)
    mask = np.ones(T, np.uint8) if mask is None else np.asarray(mask, np.uint8)
    counts = np.full(T, k, np.int64) if counts is None else np.asarray(counts, np.int64)
    counts = np.where(mask > 0, counts, 0)
    for t in range(T):
        ids[t, counts[t]:] = 0
    label = np.asarray(label, np.int64)
    log_probs, log_tail, label_log_prob = capture(teacher[:, :vocab], ids, counts, label, temperature)
    log_tail[mask == 0] = 0
    return dict(student_logits=student, teacher_logits=teacher, ids=ids, counts=counts, log_probs=log_probs,
                log_tail=log_tail, label=label, label_log_prob=label_log_prob, mask=mask, vocab=vocab)


def random_logits(T, V, scale, seed):
    return np.random.default_rng(seed).normal(size=(T, V)) * scale


def with_tail(T, V, k, tails, seed, shuffle=True):
    """Logits whose probability outside the top k is exactly as asked, row by row, before rounding to f32."""
    rng = np.random.default_rng(seed)
    logits = np.zeros((T, V))
    for t, tail in enumerate(tails):
        spread = 1 if tail < 0.4 else 0.1  # a large tail needs kept ids that are all barely ahead
        kept, rest = np.sort(rng.normal(size=k))[::-1] * spread, rng.normal(size=V - k) * 0.5 * spread
        kept = kept - logsumexp(kept) + np.log1p(-tail)
        rest = rest - logsumexp(rest) + np.log(tail)
        row = np.concatenate([kept, rest])
        logits[t] = row[rng.permutation(V)] if shuffle else row
    return logits


def bf16(x):
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


TAILS = [1e-9, 1e-8, 1e-7, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9]
FORWARD, REVERSE = {"kind": "forward_kl"}, {"kind": "reverse_kl"}
JSD = {"kind": "jsd", "beta": 0.5}
TOTAL_VARIATION, SOFT_CROSS_ENTROPY = {"kind": "total_variation"}, {"kind": "soft_cross_entropy"}
CONDITIONAL = {"kind": "conditional_forward_kl"}


def skew(alpha):
    return {"kind": "skew_forward_kl", "alpha": alpha}


def skew_reverse(alpha):
    return {"kind": "skew_reverse_kl", "alpha": alpha}


def title(divergence):
    parameter = divergence.get("alpha", divergence.get("beta"))
    word = "" if parameter is None else ("_beta_" if "beta" in divergence else "_alpha_") + f"{parameter:g}"
    return divergence["kind"] + word.replace(".", "_").replace("-", "minus_")


def build():
    """All input sets and cases: ({set name: inputs}, [case])."""
    sets, cases = {}, []

    def add(set_name, divergence, why, name=None, **fields):
        fields.setdefault("temperature", 1.0)
        fields.setdefault("t_scale", True)
        cases.append(dict(name=name or f"{set_name}.{title(divergence)}", why=why, file=f"{set_name}.safetensors",
                          divergence=divergence, **fields))

    # Every divergence on one plain set. 61 is a prime, so no tile divides the vocabulary.
    student, teacher = random_logits(6, 61, 2.5, 1), random_logits(6, 61, 2.5, 2)
    order = np.argsort(-teacher, axis=1)
    label = [order[0, 0], order[1, 3], order[2, 7], order[3, 8], order[4, 60], order[0, 0]]
    sets["plain"] = inputs_from(student, teacher, 8, label)
    add("plain", FORWARD,
        "labels that are kept first, in the middle and last, barely and far from kept, and repeated; the gradient of "
        "ids outside the kept ones is q_v (1 - p_0 / q_0), not zero")
    add("plain", REVERSE, "forward and reverse swapped, in value or in gradient only")
    add("plain", JSD, "a mixture of the wrong sides, or a gradient that forgets that the mixture contains the student")
    add("plain", {"kind": "jsd", "beta": 0.1}, "beta weights the teacher: flipped, this is beta 0.9")
    add("plain", {"kind": "jsd", "beta": 0.9}, "beta weights the teacher: flipped, this is beta 0.1")
    add("plain", skew(0.1), "alpha on the wrong side of the mixture")
    add("plain", skew(0.0), "at alpha 0 this is forward KL, to the last digits")
    add("plain", skew_reverse(0.1), "alpha belongs to the student here, to the teacher in the forward form")
    add("plain", TOTAL_VARIATION, "half the absolute difference: the factor and the tail outcome are both forgotten")
    add("plain", {"kind": "renyi", "alpha": 0.5}, "the logarithm and the 1 / (alpha - 1), with their signs")
    add("plain", {"kind": "renyi", "alpha": 2.0}, "alpha above 1 weighs q^(-1): the tail must not be clamped")
    add("plain", {"kind": "amari", "alpha": 0.5}, "1 / (alpha (alpha - 1)) is negative between 0 and 1")
    add("plain", {"kind": "amari", "alpha": 2.0}, "alpha and 1 - alpha swapped")
    add("plain", {"kind": "amari", "alpha": -1.0}, "outside 0..1 the powers of p are negative")
    add("plain", SOFT_CROSS_ENTROPY, "no entropy of the teacher in the value; the gradient is that of forward KL")
    add("plain", CONDITIONAL,
        "both sides renormalised over the kept ids: what the student puts elsewhere is free, so the gradient there is "
        "exactly zero; it may be offered under a name that says so, and never be the default")
    for divergence, why in [({"kind": "jsd", "beta": 0.0}, "beta 0 is not forward KL but zero: refuse, name the KL"),
                            ({"kind": "jsd", "beta": 1.0}, "beta 1 is not reverse KL but zero: refuse, name the KL"),
                            ({"kind": "renyi", "alpha": 1.0}, "divides by alpha - 1: refuse, name forward KL")]:
        add("plain", divergence, why, refused=True)

    # k from 1 to V
    sets["all_kept"] = inputs_from(random_logits(4, 37, 2, 3), random_logits(4, 37, 2, 4), 37, seed=3)
    for divergence in (FORWARD, REVERSE, JSD, {"kind": "jsd", "beta": 0.25}, TOTAL_VARIATION, skew(0.1), CONDITIONAL):
        add("all_kept", divergence,
            "k = V has no tail and equals the dense divergence: a tail of 1 - sum is noise or log(0), and 0 times "
            "-inf is NaN")
    sets["one_kept"] = inputs_from(random_logits(5, 61, 2, 5), random_logits(5, 61, 2, 6), 1, seed=5)
    for divergence in (FORWARD, REVERSE, JSD):
        add("one_kept", divergence,
            "k = 1: without a tail outcome the renormalised loss is zero whatever the student does")
    sets["all_but_one"] = inputs_from(random_logits(3, 24, 2, 7), random_logits(3, 24, 2, 8), 23, seed=7)
    add("all_but_one", FORWARD, "a tail of one id")
    sets["ragged"] = inputs_from(random_logits(5, 61, 2, 9), random_logits(5, 61, 2, 10), 8, counts=[8, 1, 3, 7, 2],
                                 seed=9)
    for divergence in (FORWARD, REVERSE):
        add("ragged", divergence,
            "rows keep different numbers of ids: places past the count hold id 0 and -inf, and must not be read as an "
            "id")

    # numbers of rows
    sets["one_row"] = inputs_from(random_logits(1, 61, 2, 11), random_logits(1, 61, 2, 12), 8, seed=11)
    add("one_row", FORWARD, "T = 1")
    sets["many_rows"] = inputs_from(random_logits(64, 29, 2, 13), random_logits(64, 29, 2, 14), 5, seed=13)
    for divergence in (FORWARD, JSD):
        add("many_rows", divergence, "more rows than a tile holds, and sums over rows in low precision")

    # tails from 1e-9 to 0.9, of either side and of both
    sets["teacher_tails"] = inputs_from(random_logits(10, 128, 1, 15), with_tail(10, 128, 8, TAILS, 16), 8, seed=15)
    assert np.allclose(np.exp(sets["teacher_tails"]["log_tail"]), TAILS, rtol=0.01)
    for divergence in (FORWARD, REVERSE, JSD, TOTAL_VARIATION):
        add("teacher_tails", divergence,
            "teacher's tails from 1e-9 to 0.9: 1 - sum of f32 probabilities has no digits below 1e-7, and log of the "
            "difference is -inf or a clamp")
    teacher = with_tail(10, 40, 8, [0.01] * 10, 17, shuffle=False)
    student = with_tail(10, 40, 8, TAILS, 18, shuffle=False)
    sets["student_tails"] = inputs_from(student, teacher, 8, seed=17)
    for divergence in (FORWARD, REVERSE, JSD):
        add("student_tails", divergence,
            "student's tails from 1e-9 to 0.9 against a teacher's of 0.01: a clamped tail stops pulling the student "
            "back exactly where it has collapsed onto the kept ids")
    tails = [1e-9, 1e-8, 1e-7, 1e-6]
    student, teacher = with_tail(4, 40, 8, tails[::-1], 19, False), with_tail(4, 40, 8, tails, 20, False)
    sets["both_tails"] = inputs_from(student, teacher, 8, seed=19)
    for divergence in (FORWARD, REVERSE):
        add("both_tails", divergence,
            "both tails tiny: the gradient of the ids outside is held against its own size",
            tolerance=dict(TOLERANCE, tail_gradient=1e-4))

    # extreme teachers
    teacher = np.full((3, 31), -1e30)
    teacher[[0, 1, 2], [4, 0, 30]] = 0
    sets["one_hot"] = inputs_from(random_logits(3, 31, 2, 21), teacher, 1, label=[4, 7, 30])
    for divergence in (FORWARD, JSD, TOTAL_VARIATION, skew(0.1), SOFT_CROSS_ENTROPY):
        add("one_hot", divergence,
            "all of the teacher's mass on one id: the tail's logarithm is -inf, and 0 times it is 0")
    teacher = random_logits(3, 31, 1, 22) - 120
    teacher[[0, 1, 2], [4, 0, 30]] = 0
    sets["nearly_one_hot"] = inputs_from(random_logits(3, 31, 2, 23), teacher, 4, seed=23)
    for divergence in (FORWARD, REVERSE, JSD):
        add("nearly_one_hot", divergence, "kept probabilities that underflow in f32 while their logarithms do not")
    sets["uniform"] = inputs_from(random_logits(3, 64, 1, 24), np.zeros((3, 64)), 8, label=[3, 8, 63])
    for divergence in (FORWARD, REVERSE, TOTAL_VARIATION):
        add("uniform", divergence, "equal probabilities: ties between kept and dropped ids lose no mass")
    logits = random_logits(4, 41, 1.5, 25)
    sets["equal"] = inputs_from(logits, logits, 6, seed=25)
    for divergence in (FORWARD, REVERSE, JSD):
        add("equal", divergence, "teacher and student agree: zero in value and gradient, up to the targets' rounding")

    # extreme logits
    rng = np.random.default_rng(26)
    student, teacher = rng.uniform(-80, 80, (4, 53)), rng.uniform(-80, 80, (4, 53))
    student[1, :] = np.where(rng.random(53) < 0.5, 80, -80)
    sets["wide_logits"] = inputs_from(student, teacher, 8, seed=26)
    for divergence in (FORWARD, REVERSE, JSD):
        add("wide_logits", divergence,
            "logits from -80 to 80: exp without the row's maximum overflows, and kept ids of the student underflow",
            tolerance=dict(TOLERANCE, value_absolute=2e-5))

    # bf16-hostile
    rng = np.random.default_rng(27)
    student, teacher = 60 + rng.normal(size=(3, 128)) * 0.3, 50 + rng.normal(size=(3, 128)) * 0.3
    sets["bf16_hostile"] = inputs_from(student, teacher, 16, seed=27)
    for divergence in (FORWARD, REVERSE):
        add("bf16_hostile", divergence,
            "differences of 0.3 on top of 60 vanish in bf16 (steps of 0.25), and so do sums of 128 near-equal terms",
            tolerance=dict(TOLERANCE, value_absolute=1e-5))
    inputs = inputs_from(random_logits(5, 40, 1, 28), with_tail(5, 40, 16, [1e-4, 1e-3, 1e-2, 0.1, 0.5], 29), 16,
                         seed=28)
    inputs["log_probs"] = bf16(inputs["log_probs"])
    sets["rounded_values"] = inputs
    for divergence in (FORWARD, REVERSE):
        add("rounded_values", divergence,
            "log-probabilities stored in bf16 with the true tail beside them: a tail made of 1 - sum is wrong by up "
            "to its own size, or negative")

    # masks and positions
    mask = np.array([1, 0, 1, 1, 0, 1, 0], np.uint8)
    student, teacher = random_logits(7, 43, 2, 30), random_logits(7, 43, 2, 31)
    student[1] *= 30
    label = np.where(mask > 0, np.random.default_rng(32).integers(43, size=7), -100)
    sets["masked"] = inputs_from(student, teacher, 6, label=label, mask=mask)
    for divergence in (FORWARD, JSD):
        add("masked", divergence,
            "masked rows keep nothing, have no label and large logits: neither loss, count nor gradient")
    tokens = np.array([5, 11, 3, 42, 7, 7, 19, 0, 23], np.int64)
    token_labels = np.array([-100, -100, -100, 42, 7, 7, 19, -100, 23], np.int64)
    inputs = inputs_from(random_logits(8, 43, 2, 33), random_logits(8, 43, 2, 34), 6,
                         label=np.where(token_labels[1:] >= 0, tokens[1:], -100), mask=token_labels[1:] >= 0)
    inputs["tokens"], inputs["token_labels"] = tokens, token_labels
    sets["mask_position"] = inputs
    add("mask_position", FORWARD,
        "row t predicts token t + 1, so it counts when token t + 1 does: the prompt's last row counts, and the row of "
        "a token before a masked one does not")

    # temperature
    student, teacher = random_logits(4, 61, 3, 35), random_logits(4, 61, 3, 36)
    for temperature in (2.0, 0.5):
        name = f"temperature_{temperature:g}".replace(".", "_")
        sets[name] = inputs_from(student, teacher, 8, temperature=temperature, seed=35)
        first = capture(teacher.astype(np.float32), sets[name]["ids"], sets[name]["counts"], sets[name]["label"], 1.0)
        sets[name]["log_probs_at_1"], sets[name]["log_tail_at_1"] = first[0], first[1]
        for divergence in (FORWARD, JSD) if temperature == 2 else (FORWARD,):
            for t_scale in (True, False):
                add(name, divergence,
                    "the soft gradient shrinks with tau^2, which t_scale multiplies back, once, on the soft side "
                    "alone; cross-entropy stays at temperature 1",
                    temperature=temperature, t_scale=t_scale,
                    name=f"{name}.{title(divergence)}.t_scale_{'on' if t_scale else 'off'}")
    add("temperature_2", FORWARD,
        "only a capture at temperature 1 is given (log_probs_at_1, log_tail_at_1): the tail at 2 does not follow from "
        "it; refuse. The values are the true ones",
        name="temperature_2.from_a_capture_at_1", temperature=2.0, t_scale=True, refused=True, capture="log_probs_at_1")
    sets["temperature_2_all_kept"] = inputs_from(random_logits(3, 23, 3, 37), random_logits(3, 23, 3, 38), 23,
                                                 temperature=2.0, seed=37)
    for t_scale in (True, False):
        add("temperature_2_all_kept", FORWARD,
            "temperature on a dense pair, with and without tau^2",
            temperature=2.0, t_scale=t_scale,
            name=f"temperature_2_all_kept.forward_kl.t_scale_{'on' if t_scale else 'off'}")

    # normalisation
    mask, label = [1, 1, 0, 1, 0, 0, 1, 1, 1], [1, 2, -100, 3, -100, -100, 30, 5, 6]
    sets["micro_batches"] = inputs_from(random_logits(9, 31, 2, 39), random_logits(9, 31, 2, 40), 5, label, mask)
    for parts in ([1, 2, 6], [6, 2, 1], [3, 3, 3]):
        add("micro_batches", FORWARD,
            "the step's mean is all sums over all counts: a mean of the micro-batches' means weighs a row by the "
            "company it came in",
            micro_batches=parts, stem="forward_kl", name="micro_batches.forward_kl." + "_".join(map(str, parts)))
    mask, label = [1, 1, 0, 1, 1, 1], [1, 2, -100, 3, 4, 5]
    student, teacher = random_logits(6, 19, 2, 41), random_logits(6, 19, 2, 42)
    sets["micro_batches_all_kept"] = inputs_from(student, teacher, 19, label, mask)
    add("micro_batches_all_kept", FORWARD,
        "the same for losses over dense pairs",
        micro_batches=[1, 5], name="micro_batches_all_kept.forward_kl.1_5")

    # padded vocabularies
    student, teacher = random_logits(4, 64, 2, 43), random_logits(4, 50, 2, 44)
    student[:, 50:] = 0
    sets["padded_student"] = inputs_from(student, teacher, 8, seed=43)
    add("padded_student", FORWARD,
        "14 rows of the head are padding with logit 0: each would add exp(0) to the sum; their gradient is exactly "
        "zero")
    student = student.copy()
    student[:, 50:] = 30
    sets["padded_student_large"] = inputs_from(student, teacher, 8, seed=43)
    add("padded_student_large", FORWARD, "padding that was never trained can be anything, here logit 30")
    teacher = random_logits(4, 40, 2, 45)
    teacher[:, 29:] = -30
    sets["padded_teacher"] = inputs_from(random_logits(4, 29, 2, 46), teacher, 29, seed=45)
    for divergence in (FORWARD, JSD):
        add("padded_teacher", divergence,
            "the teacher's head is longer than the student's: its padding counts for nothing, and the student's side "
            "is not filled up with zeros")

    # sampled targets: weights that sum to one, no tail
    inputs = inputs_from(random_logits(4, 61, 2, 47), random_logits(4, 61, 2, 48), 6, seed=47)
    weights = np.random.default_rng(49).multinomial(12, np.full(6, 1 / 6), size=4)
    weights = np.where(weights == 0, 1, weights).astype(np.float64)
    weights = -np.sort(-weights / weights.sum(1, keepdims=True), axis=1)
    inputs["log_probs"] = np.log(weights).astype(np.float32)
    inputs["log_tail"] = np.full(4, NEGATIVE_INFINITY, np.float32)
    sets["sampled"] = inputs
    for divergence in (FORWARD, SOFT_CROSS_ENTROPY):
        add("sampled", divergence,
            "weights of sampled ids sum to one and have no tail: the ids that were not drawn get q_v, not zero",
            targets="sampled")
    for divergence in (REVERSE, JSD):
        add("sampled", divergence,
            "a sampled row is an unbiased estimate for losses linear in p alone: refuse",
            targets="sampled", refused=True)
    inputs = inputs_from(random_logits(3, 31, 2, 50), random_logits(3, 31, 2, 51), 4, counts=[4, 0, 4], seed=50)
    inputs["log_tail"][1] = 0
    sets["targets_missing"] = inputs
    add("targets_missing", FORWARD,
        "a row that counts has no targets: refuse, instead of training on the label alone",
        refused=True)

    # ids that need 18 bits, in a vocabulary of 202,048 given by a formula
    sets["wide_ids"] = wide_inputs()
    for divergence in (FORWARD, REVERSE, JSD):
        add("wide_ids", divergence,
            "ids above 2^17 do not fit 17 bits: cut off, 131077 reads as 5, which is kept as well",
            tolerance=dict(TOLERANCE, value_relative=2e-6, value_absolute=2e-6))
    return sets, cases


STUDENT_FORMULA = dict(a=48271, b=7919, c=11, m=65521, scale=12.0)
TEACHER_FORMULA = dict(a=16807, b=104729, c=5, m=65521, scale=10.0)
WIDE_VOCAB = 202048
WIDE_IDS = [[131077, 5, 202047, 150000, 131071, 131072, 65536, 199999], [200000, 68928, 0, 131072, 170000, 38928,
                                                                         202046, 1]]


def formula_logits(formula, T, V, overrides):
    """f32(scale * (((a v + b t + c) mod m) / m - 0.5)), then the overrides [t, v, value]."""
    t, v = np.arange(T, dtype=np.int64)[:, None], np.arange(V, dtype=np.int64)[None]
    place = (formula["a"] * v + formula["b"] * t + formula["c"]) % formula["m"]
    logits = (formula["scale"] * (place / formula["m"] - 0.5)).astype(np.float32)
    for row, column, value in overrides:
        logits[row, column] = value
    return logits


def wide_inputs():
    teacher_overrides = [[t, v, 18.0 - 0.75 * j] for t, ids in enumerate(WIDE_IDS) for j, v in enumerate(ids)]
    student_overrides = [[t, v, 9.0 + 0.5 * ((3 * j + t) % 8)] for t, ids in enumerate(WIDE_IDS) for j,
                         v in enumerate(ids)]
    student = formula_logits(STUDENT_FORMULA, 2, WIDE_VOCAB, student_overrides)
    teacher = formula_logits(TEACHER_FORMULA, 2, WIDE_VOCAB, teacher_overrides)
    inputs = inputs_from(student, teacher, 8, label=[202047, 131073])
    assert [list(row) for row in inputs["ids"]] == WIDE_IDS
    rng = np.random.default_rng(52)
    shown = set(rng.choice(WIDE_VOCAB, 40, replace=False).tolist()) | {v for ids in WIDE_IDS for v in ids} | {131073,
                                                                                                              202047}
    inputs["gradient_ids"] = np.array(sorted(shown | {v % 131072 for v in shown}), np.int64)
    inputs["generated"] = dict(
        student_logits=dict(STUDENT_FORMULA, T=2, V=WIDE_VOCAB, overrides=student_overrides),
        teacher_logits=dict(TEACHER_FORMULA, T=2, V=WIDE_VOCAB, overrides=teacher_overrides))
    return inputs


# ---------------------------------------------------------------- answers and files

STORED = ["student_logits", "teacher_logits", "ids", "counts", "log_probs", "log_tail", "label", "label_log_prob",
          "mask",
          "tokens", "token_labels", "log_probs_at_1", "log_tail_at_1", "gradient_ids"]


def padded(inputs, gradient):
    """Padding columns of the student get an exact zero."""
    full = np.zeros(inputs["student_logits"].shape[1])
    full[: len(gradient)] = gradient
    return full


def narrowed(inputs, tensors, prefix, gradients):
    """Stores the gradient whole, or at chosen ids with each row's sum and norm where it is too wide."""
    if "gradient_ids" in inputs:
        tensors[prefix] = np.ascontiguousarray(gradients[:, inputs["gradient_ids"]])
        tensors[prefix + "_row_norm"] = np.sqrt(np.sum(gradients**2, axis=1))
    else:
        tensors[prefix] = gradients


def answer(sets, cases):
    """Fills in the expected tensors: ({file: tensors}, [finished case])."""
    files, finished = {}, []
    for name, inputs in sets.items():
        tensors = {key: np.ascontiguousarray(inputs[key]) for key in STORED if key in inputs}
        if "generated" in inputs:
            del tensors["student_logits"], tensors["teacher_logits"]
        T = len(inputs["mask"])
        hard, gradients = np.zeros(T), np.zeros(inputs["student_logits"].shape)
        for t in np.flatnonzero(inputs["mask"]):
            hard[t], gradient = hard_row(inputs, t)
            gradients[t] = padded(inputs, gradient)
        tensors["hard"] = hard
        narrowed(inputs, tensors, "gradient_hard", gradients)
        files[f"{name}.safetensors"] = tensors

    for case in cases:
        name = case["file"].removesuffix(".safetensors")
        inputs, tensors = sets[name], files[case["file"]]
        case = dict(case, vocab=int(inputs["vocab"]))
        case.setdefault("tolerance", TOLERANCE)
        case.setdefault("refused", False)
        names = {key: key for key in tensors if "." not in key}
        divergence, temperature = case["divergence"], case["temperature"]
        factor = temperature**2 if case["t_scale"] else 1.0
        computable = not case["refused"] or "capture" in case
        if computable:
            stem = case.get("stem") or case["name"].split(".", 1)[1]
            T = len(inputs["mask"])
            soft, gradients = np.zeros(T), np.zeros(inputs["student_logits"].shape)
            for t in np.flatnonzero(inputs["mask"]):
                soft[t], gradient = soft_row(inputs, divergence, t, temperature)
                gradients[t] = padded(inputs, gradient) * factor
            tensors[f"{stem}.soft"] = soft
            narrowed(inputs, tensors, f"{stem}.gradient_soft", gradients)
            for key in ("soft", "gradient_soft", "gradient_soft_row_norm"):
                if f"{stem}.{key}" in tensors:
                    names[key] = f"{stem}.{key}"
            count, hard = int(np.sum(inputs["mask"])), tensors["hard"]
            case["expected"] = dict(soft_sum=float(np.sum(soft)), hard_sum=float(np.sum(hard)), count=count,
                                    soft_factor=factor, mean_soft=float(np.sum(soft)) / count,
                                    mean_hard=float(np.sum(hard)) / count)
        if "generated" in inputs:
            case["generated"] = inputs["generated"]
        case["tensors"] = names
        order = ["name", "why", "file", "divergence", "temperature", "t_scale", "vocab", "refused", "targets",
                 "capture",
                 "micro_batches", "expected", "tolerance", "tensors", "generated"]
        finished.append({key: case[key] for key in order if key in case})
    return files, finished


def check_derivatives(sets, cases):
    """Complex-step derivatives and a plainer value, at random places of every case; returns the largest difference."""
    rng, worst = np.random.default_rng(99), 0.0
    for case in cases:
        inputs = sets[case["file"].removesuffix(".safetensors")]
        if case.get("refused"):
            continue
        for t in np.flatnonzero(inputs["mask"])[:10]:
            z, ids, tail_ids, log_p = row_parts(inputs, t)
            value, gradient = soft_row(inputs, case["divergence"], t, case["temperature"])
            plain = plain_value(case["divergence"], log_p, z / case["temperature"], ids, tail_ids)
            # Values that are zero but for the rounding of the targets are differences of numbers near 1.
            difference = abs(value - plain) / max(1.0, abs(value))
            places = np.concatenate([ids[:3], tail_ids[:2], rng.choice(len(z), 3)]).astype(int)
            for v in places:
                step = z.astype(np.complex128)
                step[v] += 1e-30j
                slope = np.imag(plain_value(case["divergence"], log_p, step / case["temperature"], ids,
                                            tail_ids)) / 1e-30
                difference = max(difference, abs(slope - gradient[v]) / max(np.max(np.abs(gradient)), 1e-3))
            if difference > 1e-9:
                sys.exit(f"{case['name']}, row {t}: the two ways to write it differ by {difference:.2e}")
            worst = max(worst, difference)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases"))
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    arguments = parser.parse_args()
    sets, cases = build()
    files, finished = answer(sets, cases)
    names = [case["name"] for case in finished]
    assert len(names) == len(set(names)), "two cases have one name"
    worst = check_derivatives(sets, cases)
    text = "[\n" + ",\n".join(json.dumps(case) for case in finished) + "\n]\n"
    if arguments.check:
        with open(os.path.join(arguments.out, "cases.json")) as file:
            there = json.load(file)
        if [case["name"] for case in there] != names:
            sys.exit("cases.json lists other cases than this script makes: run it without --check")
        for name, tensors in files.items():
            stored = load_file(os.path.join(arguments.out, name))
            if stored.keys() != tensors.keys():
                sys.exit(f"{name} holds other tensors than this script makes: run it without --check")
            for key, tensor in tensors.items():  # another libm may differ in the last bits
                if not np.allclose(stored[key], tensor, rtol=1e-9, atol=1e-12, equal_nan=True):
                    sys.exit(f"{name}: {key} differs from what this script makes")
    else:
        os.makedirs(arguments.out, exist_ok=True)
        for name, tensors in files.items():
            save_file(tensors, os.path.join(arguments.out, name))
            os.chmod(os.path.join(arguments.out, name), 0o644)
        with tempfile.NamedTemporaryFile("w", dir=arguments.out, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, os.path.join(arguments.out, "cases.json"))
    size = sum(os.path.getsize(os.path.join(arguments.out, name)) for name in os.listdir(arguments.out))
    print(f"{len(finished)} cases on {len(files)} sets of inputs, {size / 1000:.0f} kB; largest difference of two ways "
          f"to "
          f"write a divergence or its gradient: {worst:.1e}")


if __name__ == "__main__":
    main()
