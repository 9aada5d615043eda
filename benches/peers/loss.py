"""Time and peak memory of a fused distillation loss, beside PyTorch, Liger and DistillKit doing the same work on CPU.

    python benches/peers/loss.py [--distillkit DIR] [--limbeck CMD] [--rounds 3] [--only NAME,NAME]
    python benches/peers/loss.py --quick     # smaller shapes, under a minute, exits 1 when limbeck misses a target

The work: hidden [T, D] times lm_head [V, D] gives the student's logits, whose loss is the forward KL from a teacher's
top k and tail (k + 1 outcomes, student's softmax over all of V) mixed half and half with cross-entropy against a label;
then the gradients in hidden and lm_head. All f32, all threads. Targets are random but well formed.

Every contender runs in a process of its own, in turn, --rounds times. Within a process: a tiny problem warms the code,
inputs are made and touched, one whole run gives the peak, --repeats further runs give times. What compiles is warmed at
its own shape, and compiling is in neither time nor peak. The peak is VmHWM, reset by writing 5 to
/proc/self/clear_refs, minus the resident size just before the run; "above inputs and gradients" subtracts the bytes of
dHidden and dLmHead, which every contender must return. Times are medians over all rounds.

The command given by --limbeck is run with `T D V K` appended and must print one line of JSON with the keys `seconds`
(a list), `peak_bytes_above_inputs` and `peak_bytes_above_inputs_and_gradients`, as its last line that starts with a
brace. --distillkit (or DISTILLKIT in the environment) names a checkout of DistillKit. Rows are appended to --csv.
"""
import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time

SHAPES = [(2048, 576, 49152, 64), (512, 512, 202048, 64)]
QUICK_SHAPES = [(768, 192, 49152, 64), (192, 192, 202048, 64)]
TIME_TARGET = 0.7  # of torch-dense's median time
PEAK_TARGET = 0.1  # of torch-dense's peak above inputs and gradients
SOFT_WEIGHT = 0.5
SAME_LOSS = 1e-4  # relative; contenders on the same inputs that differ by more say so in their note
CHUNK = 256  # tokens a chunk of torch-chunked; Liger has its own, printed in its note
MIB = 1024.0**2
CONTENDERS = ["torch-dense", "torch-chunked", "torch-compiled", "liger", "distillkit", "limbeck"]
QUICK_CONTENDERS = [name for name in CONTENDERS if name != "torch-compiled"]  # compiling takes longer than the rest
COLUMNS = ["date", "machine", "contender", "version", "T", "D", "V", "k", "median_seconds", "best_seconds",
           "ratio_to_torch_dense", "peak_mib_above_inputs", "peak_mib_above_inputs_and_gradients", "note"]
NOTES = {
    "torch-dense": "logits whole, log_softmax, gather, autograd",
    "torch-chunked": f"the same under torch.utils.checkpoint, {CHUNK} tokens at a time",
    "torch-compiled": "as torch-dense, logits and loss under torch.compile",
    "distillkit": "sparse_kl_div on whole logits, tail as one outcome (symmetric_uniform), sparse_chunk_length 1024 as "
                  "its README advises; plus F.cross_entropy",
}


# ---------------------------------------------------------------- one contender, in its own process

def log1mexp(x):
    """log(1 - exp(x)) for x < 0, by the branch that keeps its digits."""
    import torch

    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def make_inputs(T, D, V, k, seed=17):
    import torch

    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, D, generator=generator)
    lm_head = torch.randn(V, D, generator=generator).mul_(2 * D**-0.5)
    first = torch.randint(V, (T, 1), generator=generator)
    ids = (first + torch.arange(k) * max(1, V // (2 * k) - 1)) % V  # k different ids, scattered over the vocabulary
    log_p = (2 * torch.randn(T, k + 1, generator=generator)).log_softmax(-1)
    kept, tail = log_p[:, 1:].sort(-1, descending=True).values.contiguous(), log_p[:, 0].contiguous()
    labels = torch.randint(V, (T,), generator=generator)
    return hidden.requires_grad_(), lm_head.requires_grad_(), ids, kept, tail, labels


def loss_from_logits(logits, ids, kept, tail, labels):
    log_q = logits.log_softmax(-1)
    student = log_q.gather(-1, ids)
    student_tail = log1mexp(student.logsumexp(-1))
    soft = (kept.exp() * (kept - student)).sum() + (tail.exp() * (tail - student_tail)).sum()
    hard = -log_q.gather(-1, labels[:, None]).sum()
    return SOFT_WEIGHT * soft + (1 - SOFT_WEIGHT) * hard


def torch_dense(shape, arguments):
    def run(hidden, lm_head, *targets):
        loss = loss_from_logits(hidden @ lm_head.T, *targets)
        loss.backward()
        return loss.item()

    return run, lambda *s: make_inputs(*s), ""


def torch_chunked(shape, arguments):
    from torch.utils.checkpoint import checkpoint

    def chunk_loss(hidden, lm_head, *targets):
        return loss_from_logits(hidden @ lm_head.T, *targets)

    def run(hidden, lm_head, *targets):
        total = 0.0
        for part in zip(hidden.split(CHUNK), *(target.split(CHUNK) for target in targets)):
            total = total + checkpoint(chunk_loss, part[0], lm_head, *part[1:], use_reentrant=False)
        total.backward()
        return total.item()

    return run, lambda *s: make_inputs(*s), ""


def torch_compiled(shape, arguments):
    import torch

    compiled = torch.compile(lambda hidden, lm_head, *targets: loss_from_logits(hidden @ lm_head.T, *targets))

    def run(hidden, lm_head, *targets):
        loss = compiled(hidden, lm_head, *targets)
        loss.backward()
        return loss.item()

    return run, lambda *s: make_inputs(*s), ""


def liger(shape, arguments):
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    chunk = arguments.liger_chunk
    compiled = arguments.liger_compiled
    loss_function = LigerFusedLinearJSDLoss(weight_hard_loss=1 - SOFT_WEIGHT, weight_soft_loss=SOFT_WEIGHT, beta=0.0,
                                            compiled=compiled, chunk_size=chunk)

    def make(T, D, V, k):
        hidden, lm_head, _, _, _, labels = make_inputs(T, D, V, k)
        generator = torch.Generator().manual_seed(18)
        teacher = torch.randn(T, D, generator=generator), torch.randn(V, D, generator=generator).mul_(2 * D**-0.5)
        return hidden, lm_head, *teacher, labels

    def run(hidden, lm_head, teacher_hidden, teacher_head, labels):
        loss = loss_function(hidden, lm_head, teacher_hidden, teacher_head, labels)
        loss.backward()
        return loss.item()

    return run, make, (f"LigerFusedLinearJSDLoss beta=0: dense forward KL, mean over tokens; includes the teacher's "
                       f"head "
                       f"(D={shape[1]}) as it takes no stored targets; chunks of {chunk} tokens, "
                       f"torch.compile {'on' if compiled else 'off'}")


def distillkit(shape, arguments):
    if not arguments.distillkit:
        raise RuntimeError("no checkout given: pass --distillkit DIR or set DISTILLKIT")
    sys.path.insert(0, arguments.distillkit)
    import torch.nn.functional as F
    from distillkit.lossfuncs import MissingProbabilityHandling, sparse_kl_div

    def run(hidden, lm_head, ids, kept, tail, labels):
        logits = (hidden @ lm_head.T)[None]
        soft = sparse_kl_div(logits, ids[None], kept[None], missing=MissingProbabilityHandling.SYMMETRIC_UNIFORM,
                             chunk_length=1024)
        hard = F.cross_entropy(logits[0], labels, reduction="sum")
        loss = SOFT_WEIGHT * soft + (1 - SOFT_WEIGHT) * hard
        loss.backward()
        return loss.item()

    return run, lambda *s: make_inputs(*s), ""


def resident_kib(key):
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def work(name, shape, arguments):
    """Runs in the child: prints one line of JSON."""
    import gc

    import torch

    torch.set_num_threads(arguments.threads)
    T, D, V, k = shape
    setups = {"torch-dense": torch_dense, "torch-chunked": torch_chunked, "torch-compiled": torch_compiled,
              "liger": liger, "distillkit": distillkit}
    run, make, note = setups[name](shape, arguments)
    compiles = name == "torch-compiled" or name == "liger" and arguments.liger_compiled
    run(*make(*shape if compiles else (8, 32, 4 * k, k)))  # what is compiled is compiled for its shape
    inputs = make(*shape)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = resident_kib("VmRSS")
    loss = run(*inputs)
    peak = (resident_kib("VmHWM") - before) * 1024
    seconds, cpu_seconds = [], []
    for _ in range(arguments.repeats):
        inputs[0].grad = inputs[1].grad = None
        start, cpu_start = time.perf_counter(), time.process_time()
        run(*inputs)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    gradients = 4 * (T * D + V * D)
    print(json.dumps(dict(what=name, seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes_above_inputs=peak,
                          peak_bytes_above_inputs_and_gradients=peak - gradients, loss=loss, note=note)))


# ---------------------------------------------------------------- the parent

def last_json(text):
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError("printed no line of JSON")
    return json.loads(lines[-1])


def launch(name, shape, arguments):
    """One contender once; returns its numbers, or a dict with `failed`."""
    judged = name in ("torch-dense", "limbeck") or not arguments.quick
    repeats = arguments.repeats if judged else 1
    environment = dict(os.environ, OMP_NUM_THREADS=str(arguments.threads), RAYON_NUM_THREADS=str(arguments.threads))
    if name == "limbeck":
        command = shlex.split(arguments.limbeck) + [str(number) for number in shape]
    else:
        command = [sys.executable, os.path.abspath(__file__), "--worker", name, "--shape", ",".join(map(str, shape)),
                   "--repeats", str(repeats), "--threads", str(arguments.threads),
                   "--liger-chunk", str(arguments.liger_chunk), "--distillkit", arguments.distillkit or ""]
        command += ["--liger-compiled" if arguments.liger_compiled else "--no-liger-compiled"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.timeout)
        if done.returncode != 0:
            lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
            return dict(failed=(lines[-1].strip() if lines else f"exit code {done.returncode}")[:160])
        return last_json(done.stdout)
    except subprocess.TimeoutExpired:
        return dict(failed=f"took longer than {arguments.timeout} s")
    except (OSError, RuntimeError, ValueError) as error:
        return dict(failed=str(error)[:160])


def git(folder, *words):
    try:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def version_of(name, arguments):
    if name.startswith("torch"):
        return "torch " + importlib.metadata.version("torch")
    if name == "liger":
        try:
            return "liger-kernel " + importlib.metadata.version("liger-kernel")
        except importlib.metadata.PackageNotFoundError:
            return "liger-kernel"
    if name == "distillkit":
        commit = git(arguments.distillkit, "rev-parse", "--short=9", "HEAD") if arguments.distillkit else ""
        return f"DistillKit {commit}".strip()
    commit = git(os.path.dirname(os.path.abspath(__file__)), "rev-parse", "--short=9", "HEAD")
    return f"limbeck {commit}".strip()


def machine_name():
    try:
        with open("/proc/cpuinfo") as info:
            model = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def summarize(name, shape, runs, version, machine):
    good = [run for run in runs if "failed" not in run]
    row = dict(zip(("T", "D", "V", "k"), shape), date=datetime.date.today().isoformat(), machine=machine,
               contender=name, version=version)
    if not good:
        return dict(row, note="did not run: " + runs[-1]["failed"])
    seconds = [second for run in good for second in run["seconds"]]
    note = good[0].get("note") or NOTES.get(name, "")
    cpu = [second for run in good for second in run.get("cpu_seconds", [])]
    if cpu:
        note += f"; {statistics.median(cpu):.2f} CPU seconds"
    return dict(row, median_seconds=statistics.median(seconds), best_seconds=min(seconds),
                peak_mib_above_inputs=max(run["peak_bytes_above_inputs"] for run in good) / MIB,
                peak_mib_above_inputs_and_gradients=max(
                    run["peak_bytes_above_inputs_and_gradients"] for run in good) / MIB,
                note=note.removeprefix("; "))


def shown(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(shape, rows, baseline):
    print(f"\nT {shape[0]}, D {shape[1]}, V {shape[2]}, k {shape[3]}, f32, forward + backward")
    print(f"{'contender':<15}{'median s':>10}{'best s':>9}{'ratio':>8}{'MiB above inputs':>18}{'and gradients':>15}"
          f"{'ratio':>8}")
    for row in rows:
        peak = row.get("peak_mib_above_inputs_and_gradients")
        base = baseline.get("peak_mib_above_inputs_and_gradients") if baseline else None
        ratio = peak / base if peak is not None and base else None
        print(f"{row['contender']:<15}{shown(row.get('median_seconds'), 3):>10}{shown(row.get('best_seconds'), 3):>9}"
              f"{shown(row.get('ratio_to_torch_dense'), 2):>8}{shown(row.get('peak_mib_above_inputs'), 1):>18}"
              f"{shown(peak, 1):>15}{shown(ratio, 3):>8}")
    for row in rows:
        print(f"  {row['contender']} ({row['version']}): {row['note']}")


def append_csv(path, rows):
    new = not os.path.exists(path)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    digits = dict(median_seconds=4, best_seconds=4, ratio_to_torch_dense=4, peak_mib_above_inputs=1,
                  peak_mib_above_inputs_and_gradients=1)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            cells = {key: row.get(key, "") for key in COLUMNS}
            for key, places in digits.items():
                if cells[key] not in ("", None):
                    cells[key] = f"{cells[key]:.{places}f}"
            writer.writerow(cells)


def misses(rows, baseline, arguments):
    """What limbeck missed at one shape, in words."""
    row = next((row for row in rows if row["contender"] == "limbeck"), None)
    if row is None:
        return ["limbeck was not run"]
    if "median_seconds" not in row:
        return [f"limbeck {row['note']}"]
    if not baseline or "median_seconds" not in baseline:
        return ["torch-dense, which it is compared with, did not run"]
    found = []
    time_ratio = row["median_seconds"] / baseline["median_seconds"]
    if time_ratio > arguments.time_target:
        found.append(f"time {time_ratio:.2f}x torch-dense, target {arguments.time_target}x")
    key = "peak_mib_above_inputs_and_gradients"
    peak_ratio = row[key] / baseline[key]
    if peak_ratio > arguments.peak_target:
        found.append(f"peak {row[key]:.0f} MiB above inputs and gradients is {peak_ratio:.3f}x torch-dense's "
                     f"{baseline[key]:.0f} MiB, target {arguments.peak_target}x")
    return found


def main():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes; exit 1 when limbeck misses a target")
    parser.add_argument("--rounds", type=int, help="times that each contender gets its turn (3; with --quick 1)")
    parser.add_argument("--repeats", type=int, help="timed runs within one turn (3; with --quick 1 of "
                        "those that are not judged)")
    parser.add_argument("--only", help="contenders, with commas: " + ",".join(CONTENDERS))
    parser.add_argument("--shape", action="append", metavar="T,D,V,K", help="instead of the built-in shapes; "
                                                                            "repeatable")
    parser.add_argument("--limbeck", default="cargo bench --bench loss -- measure", metavar="CMD")
    parser.add_argument("--distillkit", default=os.environ.get("DISTILLKIT"), metavar="DIR")
    parser.add_argument("--liger-chunk", type=int, default=CHUNK, help="chunk_size of Liger's loss, its own default "
                                                                       "1024")
    parser.add_argument("--liger-compiled", action=argparse.BooleanOptionalAction,
                        help="torch.compile in Liger, as is its default (on, off with --quick)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--time-target", type=float, default=TIME_TARGET, help="of torch-dense's time")
    parser.add_argument("--peak-target", type=float, default=PEAK_TARGET,
                        help="of torch-dense's peak above inputs and gradients")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds one turn may take, building included")
    parser.add_argument("--machine", default=machine_name(), help="how the CSV calls this machine")
    parser.add_argument("--csv", default=os.path.join(root, "benches", "results", "loss.csv"), help="'' writes none")
    parser.add_argument("--worker", choices=CONTENDERS[:-1], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.liger_compiled is None:
        arguments.liger_compiled = not arguments.quick
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.repeats = arguments.repeats or 3
    shapes = QUICK_SHAPES if arguments.quick else SHAPES
    if arguments.shape:
        shapes = [tuple(int(number) for number in shape.split(",")) for shape in arguments.shape]
    if arguments.worker:
        return work(arguments.worker, shapes[0], arguments)

    names = arguments.only.split(",") if arguments.only else QUICK_CONTENDERS if arguments.quick else CONTENDERS
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"no contender is called {unknown[0]!r}; there are {', '.join(CONTENDERS)}")
    start = time.perf_counter()
    missed = []
    for shape in shapes:
        load = os.getloadavg()[0]
        runs = {name: [] for name in names}
        for _ in range(arguments.rounds):
            for name in names:
                if not (runs[name] and "failed" in runs[name][-1]):
                    runs[name].append(launch(name, shape, arguments))
        rows = [summarize(name, shape, runs[name], version_of(name, arguments), arguments.machine) for name in names]
        baseline = next((row for row in rows if row["contender"] == "torch-dense"), None)
        for row in rows:
            losses = [run["loss"] for run in runs[row["contender"]] + runs.get("torch-dense", []) if "loss" in run]
            if row["contender"] not in ("liger", "limbeck") and losses:
                if not max(losses) - min(losses) <= SAME_LOSS * abs(losses[0]):
                    row["note"] += f"; its loss {losses[0]:.6g} differs from torch-dense's {losses[-1]:.6g}"
        missed += [f"T {shape[0]}, V {shape[2]}: {miss}" for miss in misses(rows, baseline, arguments)]
        for row in rows:
            row["note"] += f"; load before {load:.1f}"
            if baseline and "median_seconds" in baseline and "median_seconds" in row:
                row["ratio_to_torch_dense"] = row["median_seconds"] / baseline["median_seconds"]
        print_table(shape, rows, baseline)
        sys.stdout.flush()
        if arguments.csv:
            append_csv(arguments.csv, rows)
    print(f"\n{time.perf_counter() - start:.0f} s for {arguments.rounds} round(s) of {arguments.repeats} timed runs")
    if arguments.quick and "limbeck" in names:
        for miss in missed:
            print("missed: " + miss)
        sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
