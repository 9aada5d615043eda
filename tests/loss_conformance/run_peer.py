"""Runs the loss conformance cases through another project's own functions and prints what agrees.

    python tests/loss_conformance/run_peer.py --peer torch-dense|trl|liger|distillkit [--distillkit DIR] [--json]

A row of the table is one case in one function of the peer: `pass`, `differs` with the relative difference of the value
and of the gradient in the student's logits, or `not expressible` with the reason, which may be that it raises. Values
and gradients are sums over the rows that count, or means where the case is about normalisation. Cases that ought to be
refused say what came instead. The functions are called as their projects call them, on CPU in f32.

Exits with 0 whatever is found; --json prints JSON. --distillkit (or DISTILLKIT) names a checkout of DistillKit.

`torch-dense` is not a project but this file's own f32 autograd, once with a subtracted tail and once with a summed one:
it shows that the tolerances can be met.
"""
import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import types
import warnings

import numpy as np
import torch
from safetensors.numpy import load_file

CASES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cases")
IGNORED = -100


class NotExpressible(Exception):
    """The peer has no way to ask for this; the message says which part."""


class Case:
    """One case, with its tensors under plain names."""

    def __init__(self, entry, folder):
        self.entry = entry
        stored = load_file(os.path.join(folder, entry["file"]))
        self.tensors = {name: stored[key] for name, key in entry["tensors"].items()}
        for name, formula in entry.get("generated", {}).items():
            self.tensors[name] = generated(formula)
        self.kind = entry["divergence"]["kind"]
        self.temperature, self.t_scale, self.vocab = entry["temperature"], entry["t_scale"], entry["vocab"]
        self.rows = np.flatnonzero(self["mask"])
        self.sampled = entry.get("targets") == "sampled"
        counts = self["counts"][self.rows]
        self.dense = bool(np.all(counts == self.vocab)) and not self.sampled
        self.ragged = len(set(counts.tolist())) > 1

    def __getitem__(self, name):
        return self.tensors[name]

    def __contains__(self, name):
        return name in self.tensors

    def torch(self, name):
        return torch.from_numpy(np.ascontiguousarray(self[name]))

    def parameter(self, name):
        return self.entry["divergence"][name]

    def student(self):
        return self.torch("student_logits").clone().requires_grad_()

    def labels(self, rows=slice(None)):
        """Labels with the ignored index in rows that do not count."""
        return torch.from_numpy(np.where(self["mask"] > 0, self["label"], IGNORED))[rows]

    def need_no_scale(self, who):
        if self.t_scale and self.temperature != 1:
            raise NotExpressible(f"{who} does not multiply by tau^2; the caller would")


def generated(formula):
    t, v = np.arange(formula["T"], dtype=np.int64)[:, None], np.arange(formula["V"], dtype=np.int64)[None]
    place = (formula["a"] * v + formula["b"] * t + formula["c"]) % formula["m"]
    logits = (formula["scale"] * (place / formula["m"] - 0.5)).astype(np.float32)
    for row, column, value in formula["overrides"]:
        logits[row, column] = value
    return logits


def gradient_of(loss, student):
    gradient = torch.autograd.grad(loss, student, allow_unused=True)[0]
    return (torch.zeros_like(student) if gradient is None else gradient).detach().numpy().astype(np.float64)


def summed(loss, student):
    return dict(value=float(loss), gradient=gradient_of(loss, student), mean=False)


def averaged(loss, student):
    return dict(summed(loss, student), mean=True)


# ---------------------------------------------------------------- torch, as a check of the cases

def log1mexp(x):
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def torch_row(case, log_q_all, row, sum_tail):
    """One row in f32: outcomes are the kept ids and, unless all are kept, the tail."""
    count = int(case["counts"][row])
    ids = case.torch("ids")[row, :count]
    log_p = case.torch("log_probs")[row, :count]
    log_q = log_q_all[ids]
    has_tail = count < case.vocab
    if has_tail:
        if sum_tail:
            outside = torch.ones(case.vocab, dtype=torch.bool)
            outside[ids] = False
            tail = log_q_all[outside].logsumexp(-1)
        else:
            tail = log1mexp(log_q.logsumexp(-1))
        log_p, log_q = torch.cat([log_p, case.torch("log_tail")[row, None]]), torch.cat([log_q, tail[None]])
    if case.kind == "conditional_forward_kl":
        log_p, log_q = log_p[:count].log_softmax(-1), log_q[:count].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    there = p > 0
    finite_p = torch.where(there, log_p, torch.zeros_like(log_p))
    divergence = case.entry["divergence"]
    if case.kind in ("forward_kl", "conditional_forward_kl"):
        return (p * (finite_p - log_q)).sum()
    if case.kind == "soft_cross_entropy":
        return -(p * log_q).sum()
    if case.kind == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    if case.kind == "jsd":
        beta = torch.tensor(divergence["beta"])
        log_m = torch.logaddexp(log_p + beta.log(), log_q + torch.log1p(-beta))
        return (beta * p * (finite_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum()
    if case.kind == "skew_forward_kl":
        return (p * (finite_p - (divergence["alpha"] * p + (1 - divergence["alpha"]) * q).log())).sum()
    if case.kind == "skew_reverse_kl":
        return (q * (log_q - (divergence["alpha"] * q + (1 - divergence["alpha"]) * p).log())).sum()
    if case.kind == "total_variation":
        return 0.5 * (p - q).abs().sum()
    alpha = divergence["alpha"]
    total = torch.where(there, (alpha * finite_p + (1 - alpha) * log_q).exp(), torch.zeros_like(p)).sum()
    return total.log() / (alpha - 1) if case.kind == "renyi" else (total - 1) / (alpha * (alpha - 1))


class TorchDense:
    def __init__(self, arguments):
        self.version = "torch " + torch.__version__

    def attempts(self, case):
        return [("autograd, tail by log1mexp", lambda: self.run(case, False)),
                ("autograd, tail summed", lambda: self.run(case, True))]

    def run(self, case, sum_tail):
        if case.entry["refused"]:
            raise NotExpressible("nothing here refuses")
        z = case.student()
        factor = case.temperature**2 if case.t_scale else 1.0
        scaled = z[:, : case.vocab] / case.temperature
        scaled = scaled - scaled.detach().max(-1, keepdim=True).values  # or the log-sum has too few digits near 80
        log_q = scaled - scaled.logsumexp(-1, keepdim=True)
        return summed(factor * sum(torch_row(case, log_q[row], row, sum_tail) for row in case.rows), z)


# ---------------------------------------------------------------- TRL

def jsd_weight(case):
    """The beta that GKD's function takes for a divergence: 0 is forward KL, 1 reverse KL."""
    if case.kind == "forward_kl":
        return 0.0
    if case.kind == "reverse_kl":
        return 1.0
    if case.kind == "jsd":
        return case.parameter("beta")
    raise NotExpressible(f"no {case.kind.replace('_', ' ')}")


class Trl:
    def __init__(self, arguments):
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
        from trl.experimental.sdft import loss_utils
        from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        self.gkd, self.server, self.loss_utils = GKDTrainer, ServerDistillationTrainer, loss_utils
        self.chunked = _chunked_divergence_loss
        self.version = "TRL " + importlib.metadata.version("trl")

    def attempts(self, case):
        if case.dense:
            return [("GKDTrainer.generalized_jsd_loss", lambda: self.dense(case, self.gkd_loss)),
                    ("_chunked_divergence_loss", lambda: self.dense(case, self.chunked_loss)),
                    ("ServerDistillationTrainer", lambda: self.sparse(case))]
        found = [("ServerDistillationTrainer", lambda: self.sparse(case))]
        if case.kind in ("reverse_kl", "jsd"):
            found.append(("sdft.loss_utils", lambda: self.tail_bucket(case)))
        return found

    def gkd_loss(self, case, student, teacher, labels, count):
        return self.gkd.generalized_jsd_loss(student[None], teacher[None], labels[None], beta=jsd_weight(case),
                                             temperature=case.temperature, num_items_in_batch=count)

    def chunked_loss(self, case, student, teacher, labels, count):
        mask = (labels != IGNORED).long()[None]
        return self.chunked(student[None], teacher[None], torch.eye(student.shape[1]), torch.eye(teacher.shape[1]),
                            mask,
                            jsd_weight(case), num_items_in_batch=count, temperature=case.temperature)[0]

    def dense(self, case, loss):
        jsd_weight(case)
        case.need_no_scale("it")
        student, teacher, labels = case.student(), case.torch("teacher_logits"), case.labels()
        if "tokens" in case:
            raise NotExpressible("takes rows that are aligned already")
        if "micro_batches" not in case.entry:
            return summed(loss(case, student, teacher, labels, 1), student)
        total = 0  # its trainers pass the count of the whole step to every micro-batch
        for part in np.split(np.arange(len(student)), np.cumsum(case.entry["micro_batches"])[:-1]):
            total = total + loss(case, student[part], teacher[part], labels[part], len(case.rows))
        return averaged(total, student)

    def teacher_result(self, case, rows):
        """What the server would answer; unused places are -inf, as its own padding."""
        log_probs = case.torch(case.entry.get("capture", "log_probs"))[rows]
        return dict(topk_logprobs=log_probs[None], topk_token_ids=case.torch("ids")[rows][None],
                    actual_logprobs=case.torch("label_log_prob")[rows][None])

    def sparse(self, case):
        if "tokens" in case:
            raise NotExpressible("takes rows that are aligned already")
        if case.sampled and case.kind != "forward_kl":
            raise NotExpressible("the server gives top-k, not samples")
        if case.entry.get("capture"):
            raise NotExpressible("the server is asked for log-probabilities at the temperature itself")
        if case.kind not in ("forward_kl", "conditional_forward_kl") and not (
                case.kind in ("reverse_kl", "jsd") and case["ids"].shape[1] == 1):
            raise NotExpressible("forward KL alone beyond top-1" if case.kind in ("reverse_kl", "jsd")
                                 else f"no {case.kind.replace('_', ' ')}")
        case.need_no_scale("it")
        student = case.student()
        trainer = types.SimpleNamespace(loss_add_tail=case.kind != "conditional_forward_kl", beta=jsd_weight(case)
                                        if case.kind in ("reverse_kl", "jsd") else 0.0, reverse_kl_top_1_mode="sampled",
                                        _reduce_divergence_loss=self.server._reduce_divergence_loss)

        def loss(rows):
            log_q = (student[rows] / case.temperature).log_softmax(-1)[None]
            result, labels = self.teacher_result(case, rows), case.labels(rows)[None]
            if trainer.beta == 0:
                return self.server._compute_server_forward_kl_loss(trainer, result, log_q, labels)
            top, top_log_p = result["topk_token_ids"][..., 0], result["topk_logprobs"][..., 0]
            sparse = self.server._compute_sparse_top_1_divergence_loss
            return sparse(trainer, log_q, top, top_log_p, top, top_log_p, labels)

        if "micro_batches" not in case.entry:
            return summed(loss(np.arange(len(student))) * len(case.rows), student)
        parts = np.split(np.arange(len(student)), np.cumsum(case.entry["micro_batches"])[:-1])
        return averaged(sum(loss(part) for part in parts) / len(parts), student)

    def tail_bucket(self, case):
        if case.ragged:
            raise NotExpressible("one k for all rows")
        if case.entry["refused"] and not case.sampled:
            raise NotExpressible("takes 0 and 1 as names of the two KLs")
        if case.sampled:
            raise NotExpressible("adds a tail to both sides, samples have none")
        case.need_no_scale("it")
        student, rows = case.student(), case.rows
        log_q = (student[rows] / case.temperature).log_softmax(-1).gather(-1, case.torch("ids")[rows])
        both = [self.loss_utils.add_tail_bucket(log) for log in (log_q, case.torch("log_probs")[rows])]
        return summed(self.loss_utils.compute_divergence(*both, jsd_weight(case)).sum(), student)


# ---------------------------------------------------------------- Liger

class Liger:
    def __init__(self, arguments):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        self.loss = LigerFusedLinearJSDLoss
        self.version = "liger-kernel " + importlib.metadata.version("liger-kernel")

    def attempts(self, case):
        return [("LigerFusedLinearJSDLoss", lambda: self.run(case))]

    def run(self, case):
        if not case.dense:
            raise NotExpressible("takes a teacher's dense logits (hidden states and head), no kept ids and tail")
        weight = jsd_weight(case)
        if "micro_batches" in case.entry:
            raise NotExpressible("divides by the count of its own call; the caller has to weigh micro-batches")
        case.need_no_scale("it")
        student, teacher, labels = case.student(), case.torch("teacher_logits"), case.labels()
        loss = self.loss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=weight, temperature=case.temperature,
                         compiled=False, ignore_index=IGNORED, return_soft_hard_loss=True)
        count = len(case.rows)
        heads = torch.eye(student.shape[1]), teacher, torch.eye(teacher.shape[1])
        total, soft, hard = loss(student, *heads, labels)
        gradient = gradient_of(total * count, student)
        return dict(value=float(soft) * count, hard=float(hard) * count, gradient=gradient, mean=False, both=True)


# ---------------------------------------------------------------- DistillKit

class DistillKit:
    def __init__(self, arguments):
        if not arguments.distillkit:
            sys.exit("no checkout of DistillKit given: pass --distillkit DIR or set DISTILLKIT")
        sys.path.insert(0, arguments.distillkit)
        from distillkit import lossfuncs
        from distillkit.signals import DenseSignal, SparseSignal

        self.lossfuncs, self.dense_signal, self.sparse_signal = lossfuncs, DenseSignal, SparseSignal
        try:
            from distillkit.trainer import DistillationTrainer

            self.trainer, self.no_trainer = DistillationTrainer, None
        except (ImportError, RuntimeError) as error:
            self.trainer, self.no_trainer = None, str(error).splitlines()[-1]
        commit = subprocess.run(["git", "-C", arguments.distillkit, "rev-parse", "--short=9", "HEAD"],
                                capture_output=True, text=True).stdout.strip()
        self.version = f"DistillKit {commit}".strip()

    def attempts(self, case):
        missing = self.lossfuncs.MissingProbabilityHandling
        if "tokens" in case:
            return [("DistillationTrainer, symmetric_uniform", lambda: self.through_trainer(case))]
        handling = missing.ZERO if case.sampled else missing.SYMMETRIC_UNIFORM
        found = [(f"{self.name(case)}, {handling.value}", lambda: self.run(case, handling, False))]
        if case.dense:
            found.append((f"{self.name(case)}, dense", lambda: self.run(case, handling, True)))
        return found

    def name(self, case):
        return dict(forward_kl="KLDLoss", jsd="JSDLoss", total_variation="TVDLoss").get(case.kind, "lossfuncs")

    def loss_class(self, case):
        if case.kind == "jsd" and case.parameter("beta") != 0.5:
            raise NotExpressible("JSD has beta 0.5 alone")
        classes = dict(forward_kl=self.lossfuncs.KLDLoss, jsd=self.lossfuncs.JSDLoss,
                       total_variation=self.lossfuncs.TVDLoss)
        if case.kind not in classes:
            raise NotExpressible(f"no {case.kind.replace('_', ' ')}" + (
                ": zero handling renormalises the teacher alone" if case.kind.startswith("conditional") else ""))
        return classes[case.kind]

    def signal(self, case, rows, dense):
        common = dict(hidden_states=None, vocab_size=case.vocab)
        if dense:
            logits = case.torch("teacher_logits")[rows, : case.vocab][None]
            return self.dense_signal(generation_temperature=1.0, logits=logits, **common)
        at_one = "capture" in case.entry
        ids, values = case.torch("ids").clone(), case.torch("log_probs_at_1" if at_one else "log_probs").clone()
        masked = torch.from_numpy(case["mask"] == 0)
        if masked.any():  # its captures hold a teacher's row wherever there is a token
            log_p = (case.torch("teacher_logits")[masked, : case.vocab] / case.temperature).log_softmax(-1)
            values[masked], ids[masked] = log_p.topk(ids.shape[1], dim=-1)
        return self.sparse_signal(generation_temperature=1.0 if at_one else case.temperature, log_values=True,
                                  sparse_ids=ids[rows][None], sparse_values=values[rows][None], **common)

    def run(self, case, handling, dense):
        loss_class = self.loss_class(case)
        if case.sampled and case.kind == "jsd":
            raise NotExpressible("zero handling takes this JSD of a sampled row without remark")
        if not case.t_scale and case.temperature != 1:
            raise NotExpressible("tau^2 is always on")
        loss = loss_class(case.temperature, handling)
        student = case.student()

        def part_loss(rows, count):
            # its trainer cuts the logits down to the true vocabulary and masks with [batch, rows, 1]
            outputs = types.SimpleNamespace(logits=student[rows, : case.vocab][None])
            mask = torch.from_numpy(case["mask"][rows] > 0)[None, :, None]
            return loss(outputs, self.signal(case, rows, dense), mask=mask, num_items_in_batch=count)

        if "micro_batches" not in case.entry:
            return summed(part_loss(np.arange(len(student)), 1), student)
        parts = np.split(np.arange(len(student)), np.cumsum(case.entry["micro_batches"])[:-1])
        return averaged(sum(part_loss(part, None) for part in parts) / len(parts), student)

    def through_trainer(self, case):
        """total_distillation_loss of its trainer, with labels as a data collator gives them, one longer than the "
          "rows."""
        if self.trainer is None:
            raise NotExpressible(f"its trainer does not import here: {self.no_trainer}")
        student = case.student()
        rows = np.append(np.arange(len(student)), len(student) - 1)  # the last position predicts what is not there
        signal = self.signal(case, rows, False)
        config = types.SimpleNamespace(loss_functions=[
            types.SimpleNamespace(function=types.SimpleNamespace(value="kl"), weight=1.0)])
        trainer = types.SimpleNamespace(
            config=config, log=lambda entries: None, need_hidden_states=False, hidden_state_mapping=None,
            signal_source=types.SimpleNamespace(get_signal=lambda inputs, return_hidden_states: signal),
            loss_functions=[self.loss_class(case)(1.0, self.lossfuncs.MissingProbabilityHandling.SYMMETRIC_UNIFORM)])
        outputs = types.SimpleNamespace(logits=student[rows, : case.vocab][None])
        inputs = dict(labels=case.torch("token_labels")[None])
        return averaged(self.trainer.total_distillation_loss(trainer, outputs, inputs), student)


# ---------------------------------------------------------------- comparing

def largest(x):
    return float(np.max(np.abs(x))) if x.size else 0.0


def compare(case, result):
    """(status, words, numbers) of one result against the case."""
    entry, expected, tolerance = case.entry, case.entry.get("expected"), case.entry["tolerance"]
    if entry["refused"] and expected is None:
        return "differs", f"not refused: gave {result['value']:.6g}", dict(value=result["value"])
    rows = expected["count"]
    factor, divisor = expected["soft_factor"], rows if result["mean"] else 1
    value = expected["soft_sum"] * factor / divisor
    gradient = case["gradient_soft"] / divisor
    if result.get("both"):
        gradient = gradient + case["gradient_hard"]
    got = result["gradient"]
    if "gradient_ids" in case:
        got = got[:, case["gradient_ids"]]
    value_error, gradient_error = abs(result["value"] - value), largest(got - gradient)
    numbers = dict(value=result["value"], expected_value=value, value_relative=value_error / max(abs(value), 1e-12),
                   gradient_relative=gradient_error / max(largest(gradient), 1e-12))
    value_bound = tolerance["value_absolute"] * max(factor, 1) * rows / divisor
    value_bound += tolerance["value_relative"] * abs(value)
    wrong = []
    if not value_error <= value_bound:
        wrong.append(f"value {result['value']:.6g}, right {value:.6g} ({numbers['value_relative']:.1e})")
    if not gradient_error <= tolerance["gradient_absolute"] + tolerance["gradient"] * largest(gradient):
        where = f" in {int(np.isnan(got).any(axis=1).sum())} of {rows} rows" if np.isnan(got).any() else ""
        wrong.append(f"gradient off by {numbers['gradient_relative']:.1e} of its largest{where}")
    if "tail_gradient" in tolerance:
        outside = np.ones(gradient.shape, dtype=bool)
        for row in case.rows:
            outside[row, case["ids"][row, : case["counts"][row]]] = False
        relative = max(largest((got - gradient)[row][outside[row]]) / largest(gradient[row][outside[row]])
                       for row in case.rows)
        numbers["tail_gradient_relative"] = relative
        if not relative <= tolerance["tail_gradient"]:
            wrong.append(f"gradient outside the kept ids off by {relative:.1e} of its own largest")
    if "hard" in result:
        hard_error = abs(result["hard"] - expected["hard_sum"])
        if not hard_error <= tolerance["value_absolute"] * rows + tolerance["value_relative"] * expected["hard_sum"]:
            wrong.append(f"cross-entropy {result['hard']:.6g}, right {expected['hard_sum']:.6g}")
    if entry["refused"]:
        wrong.append("not refused")
    return ("differs" if wrong else "pass"), "; ".join(wrong), numbers


PEERS = {"torch-dense": TorchDense, "trl": Trl, "liger": Liger, "distillkit": DistillKit}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, choices=sorted(PEERS))
    parser.add_argument("--distillkit", default=os.environ.get("DISTILLKIT"), metavar="DIR")
    parser.add_argument("--cases", default=CASES, metavar="DIR")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        peer = PEERS[arguments.peer](arguments)
    except ImportError as error:
        print(f"{arguments.peer} does not import here: {error}")
        return
    with open(os.path.join(arguments.cases, "cases.json")) as file:
        entries = [entry for entry in json.load(file) if not arguments.only or arguments.only in entry["name"]]
    found = []
    for entry in entries:
        case = Case(entry, arguments.cases)
        for function, attempt in peer.attempts(case):
            numbers = {}
            try:
                status, words, numbers = compare(case, attempt())
            except NotExpressible as reason:
                status, words = "not expressible", str(reason)
            except Exception as error:  # no wrong number, and its own words say why
                status = "pass" if entry["refused"] else "not expressible"
                words = f"raises {type(error).__name__}: {error}"[:160]
            found.append(dict(case=entry["name"], function=function, status=status, words=words, **numbers))
    tally = {status: sum(row["status"] == status for row in found) for status in ("pass", "differs", "not expressible")}
    if arguments.json:
        for row in found:  # JSON has no NaN; the words say it
            row.update({key: None for key, x in row.items() if isinstance(x, float) and not np.isfinite(x)})
        print(json.dumps(dict(peer=peer.version, torch=torch.__version__, tally=tally, results=found)))
        return
    print(f"{peer.version}, on torch {torch.__version__}, CPU, f32")
    for row in found:
        print(f"{row['case']:<52} {row['function']:<34} {row['status']:<16} {row['words']}")
    print(", ".join(f"{count} {status}" for status, count in tally.items()))


if __name__ == "__main__":
    main()
