"""Draws where the time of a teacher's batch, of a training step or of both goes, from profiles (`--profile`), as
docs/pictures/profile.svg. Prints the shares.

    limbeck precompute-teacher-logits recipes/smollm2/scout.toml --set data.tokens=40k --profile=teacher.json
    limbeck distill recipes/quickstart/scout.toml --profile=student.json
    python benches/profile_picture.py --teacher teacher.json --student student.json

Shares are of processor time, of all threads together: for each operation what they computed meanwhile, without the
operations inside it; what a fused block's pieces have of it is in the proportion of the time that they ran.
"""
import argparse
import json
from collections import defaultdict
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OTHER = "everything else"
TEACHER = {
    "norm, gate and up products, swiglu": ("norm, gate and up products, SwiGLU", "#0b6e4f"),
    "down product": ("down product", "#5fa777"),
    "norm, query, key and value products, rotary": ("norm, query, key and value products, rotary", "#1d6fa5"),
    "attention": ("attention", "#7fb2d6"),
    "output product": ("output product", "#7b2d8b"),
    "packed product": ("head", "#bc6c25"),
    "log-sum-exp + top-k": ("log-sum-exp and top 64", "#f2b880"),
}
STUDENT = {
    "matrix product": ("matrix products", "#0b6e4f"),
    "matrix product backward": ("matrix products, backward", "#5fa777"),
    "grouped matmul": ("products of experts", "#1d6fa5"),
    "grouped matmul backward": ("products of experts, backward", "#7fb2d6"),
    "attention": ("attention", "#7b2d8b"),
    "attention backward": ("attention, backward", "#c49bd0"),
    "fused loss": ("fused loss, with its gradients", "#bc6c25"),
    "adamw": ("AdamW", "#c1121f"),
}
# Smaller ones, which share a colour.
for name in ("rms_norm", "swiglu", "rotary", "gather rows"):
    for end in ("", " backward"):
        STUDENT[name + end] = ("RMSNorm, SwiGLU, rotary, rows of experts", "#f2b880")
STUDENT["gradient norm"] = ("AdamW", "#c1121f")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--teacher", type=Path)
    arguments.add_argument("--student", type=Path)
    arguments.add_argument("--output", type=Path, default=ROOT / "docs/pictures/profile.svg")
    given = arguments.parse_args()
    kinds = [(given.teacher, "teacher batch", TEACHER, "A teacher's batch of {} tokens: processor time of all threads"),
             (given.student, "training step", STUDENT, "A training step of {} tokens: processor time of all threads")]
    out, top, told = [], 34, []
    for path, window, groups, title in kinds:
        if path:
            found = shares(path, window, groups)
            told.append((window, found))
            title = title.format(f"{found['tokens']:,}")
            top = panel(out, top, title, found["parts"]) + 36
    height = top - 22
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" width="760" height="{height}" '
            f'font-family="Helvetica, Arial, sans-serif">\n<rect width="760" height="{height}" fill="#ffffff"/>')
    given.output.write_text("\n".join([head, *out, "</svg>"]) + "\n")
    for name, found in told:
        print(f"{name}: median {found['seconds']:.4f} s of {found['count']}, {found['tokens']} tokens, "
              f"{found['busy']:.3f} threads busy")
        for (label, _), share in found["parts"]:
            print(f"  {share:6.1%}  {label}")


def shares(path, window, groups):
    """Shares of the processor time of all spans called `window` but the first tenth of them."""
    trace = json.loads(path.read_text())
    by_thread = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            by_thread[event["tid"]].append(event)
    windows = [event for events in by_thread.values() for event in events if event["name"] == window]
    windows = sorted(windows, key=lambda event: event["ts"])
    windows = windows[-(-len(windows) // 10):] or windows
    size = max(tokens(by_thread, event) for event in windows)
    windows = [event for event in windows if tokens(by_thread, event) == size]
    pieces = sorted((e for events in by_thread.values() for e in events if e["cat"] == "piece"), key=lambda e: e["ts"])
    sums, clock, processor, piece = defaultdict(float), 0.0, 0.0, 0
    for event in windows:
        clock += event["dur"]
        processor += event["args"]["processor_us"]
    # Whole spans of the windows' threads, each with its time without the spans in it.
    for events in by_thread.values():
        for event, own in own_times(events, windows):
            within = []
            if event["cat"] == "op":
                while piece < len(pieces) and pieces[piece]["ts"] < event["ts"]:
                    piece += 1
                end = event["ts"] + event["dur"]
                for other in pieces[piece:]:
                    if other["ts"] >= end:
                        break
                    within.append(other)
            if within and event["name"] not in groups:
                total = sum(other["dur"] for other in within)
                for other in within:
                    sums[groups.get(other["name"], (OTHER, "#a0a0a0"))] += own * other["dur"] / total
            else:
                sums[groups.get(event["name"], (OTHER, "#a0a0a0"))] += own
    order = list(dict.fromkeys(groups.values())) + [(OTHER, "#a0a0a0")]
    parts = [(group, sums[group] / sum(sums.values())) for group in order if sums[group] > 0]
    seconds = sorted(event["dur"] for event in windows)[len(windows) // 2] / 1e6
    return {"parts": parts, "seconds": seconds, "count": len(windows), "tokens": size, "busy": processor / clock}


def tokens(by_thread, window):
    """Tokens of a batch, or of the forward passes of a step."""
    if "tokens" in window["args"]:
        return window["args"]["tokens"]
    if "_tokens" not in window:
        end = window["ts"] + window["dur"]
        window["_tokens"] = sum(event["args"]["tokens"] for event in forward_passes(by_thread, window["tid"])
                                if window["ts"] <= event["ts"] < end)
    return window["_tokens"]


def forward_passes(by_thread, thread, found={}):
    key = (id(by_thread), thread)
    if key not in found:
        found[key] = [event for event in by_thread[thread] if event["name"] == "forward"]
    return found[key]


def own_times(events, windows):
    """Each span of one thread inside a window, with its processor time without that of the spans in it."""
    stack, done = [], []
    own_windows = {id(event) for event in windows}
    for event in events:
        if event["cat"] == "piece":
            continue
        while stack and stack[-1][0]["ts"] + stack[-1][0]["dur"] <= event["ts"]:
            done.append(stack.pop())
        inside = id(event) in own_windows or bool(stack and stack[-1][2])
        if stack:
            stack[-1][1] -= event["args"]["processor_us"]
        stack.append([event, event["args"]["processor_us"], inside])
    done += stack
    return sorted(((event, max(own, 0.0)) for event, own, inside in done if inside), key=lambda it: it[0]["ts"])


def panel(out, top, title, parts):
    """One bar and the names of its parts; gives where it ends."""
    left, width, tall = 30, 700, 44
    text(out, left, top, title, 14, "bold")
    bar, x = top + 14, left
    for (label, colour), share in parts:
        wide = width * share
        out.append(f'<rect x="{x:.1f}" y="{bar}" width="{wide:.1f}" height="{tall}" fill="{colour}" stroke="#ffffff" '
                   f'stroke-width="0.8"/>')
        if share >= 0.045:
            dark = colour in ("#f2b880", "#7fb2d6", "#c49bd0", "#a0a0a0")
            text(out, x + wide / 2, bar + tall / 2 + 4, f"{share:.0%}", 12, "normal", "middle",
                 "#222222" if dark else "#ffffff")
        x += wide
    out.append(f'<rect x="{left}" y="{bar}" width="{width}" height="{tall}" fill="none" stroke="#999999"/>')
    rows = -(-len(parts) // 2)
    for number, ((label, colour), share) in enumerate(parts):
        x, y = left + 360 * (number // rows), bar + tall + 26 + 20 * (number % rows)
        out.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}" stroke="#999999" '
                   f'stroke-width="0.6"/>')
        text(out, x + 20, y, label, 12)
        text(out, x + 335, y, f"{share:.1%}", 12, "normal", "end")
    return bar + tall + 26 + 20 * (rows - 1)


def text(out, x, y, words, size, weight="normal", anchor="start", colour="#222222"):
    out.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
               f'font-weight="{weight}">{escape(words)}</text>')


if __name__ == "__main__":
    main()
