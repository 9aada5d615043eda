"""What the results of cache_pareto.py say: the cheapest cache at DistillKit's errors, and how fast errors fall.

    python benches/peers/cache_compare.py [--results benches/results]

Prints three tables for docs/performance.md. It measures and interpolates nothing: a cache is a line of
cache_pareto.csv whose bytes are those of files, tables and all, and it is as good as another where its error is at most
the other's.

- cheapest: for each setting of DistillKit's and plain f16, each measure and each student, the bytes of the cheapest
  compact cache of a truncating selection that is at least as good; last, of the cheapest that is so in all of them.
- sampled: the same of the drawn ones, in the sums over all rows.
- slopes: the exponent e of the error of the head's mean gradient, ~ rows^e, by least squares of the logarithms over the
  doublings of rows, with the size that the first and the last have.
"""
import argparse
import csv
import math
from pathlib import Path

MEASURES = ["logit_error", "hidden_error", "weight_error", "projection_error"]
STUDENTS = ["late", "middle", "early"]
SLOPES = ["raw threshold_sampled 0.003", "raw threshold_sampled 0.01", "raw threshold_sampled 0.012",
          "compact threshold_sampled 0.012", "raw sampled 50", "compact min_prob 0.01", "compact min_prob 0.003",
          "compact min_prob 0.001 cap 128", "compact min_prob 0.0005 cap 256", "compact min_prob 0.0002 cap 768",
          "u32 + f16 top 128", "DistillKit recommended, symmetric_uniform", "DistillKit Qwen3-235B, symmetric_uniform"]


def read(path):
    with open(path, newline="") as stored:
        return list(csv.DictReader(stored))


def cheapest(lines, chosen, needs):
    """Bytes and name of the cheapest of the chosen caches with at most these errors: {(student, measure): error}."""
    good = [(size, name) for size, name in chosen
            if all((student, name) in lines and float(lines[student, name][measure] or "inf") <= most
                   for (student, measure), most in needs.items())]
    return min(good, default=(None, "none"))


def bytes_of(found):
    return "–" if found[0] is None else f"{found[0]:.0f}"


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def tables(lines):
    names = list(dict.fromkeys(name for _, name in lines))
    rivals = [name for name in names if name.startswith(("DistillKit", "u32"))]
    real = [(float(lines["late", name]["bytes_with_tables"]), name) for name in names
            if lines["late", name]["codec"] == "compact" and lines["late", name]["bytes_are"] == "measured"]
    drawn = [found for found in real if lines["late", found[1]]["target"] == "sampled"]
    kept = [found for found in real if found not in drawn]
    rows, sampled = [], []
    for rival in rivals:
        errors = {(s, m): float(lines[s, rival][m]) for s in STUDENTS for m in MEASURES if lines[s, rival][m]}
        cells = [[cheapest(lines, kept, {(s, m): errors[s, m]}) for s in STUDENTS] for m in MEASURES]
        whole = cheapest(lines, kept, errors)
        rows.append([rival, f"{float(lines['late', rival]['bytes_per_token']):.0f}",
                     *(" / ".join(map(bytes_of, cell)) for cell in cells), f"{bytes_of(whole)} ({whole[1]})"])
        sums = [[bytes_of(cheapest(lines, drawn, {(s, m): errors[s, m]})) for s in STUDENTS]
                for m in ("weight_error", "projection_error")]
        sampled.append([rival, *(" / ".join(cell) for cell in sums)])
    table(["at most the error of", "B/token", "logits", "hidden states", "head", "last matrix", "all of these"], rows)
    table(["at most the error of", "head", "last matrix"], sampled)


def slope(points):
    """Exponent of y ~ x^e and its standard error."""
    x, y = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    square = sum((a - mean_x) ** 2 for a in x)
    exponent = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / square
    rest = sum((b - mean_y - exponent * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return exponent, math.sqrt(rest / (len(points) - 2) / square)


def slopes(growth):
    rows = []
    for name in SLOPES:
        row = [name]
        for student in STUDENTS:
            own = [line for line in growth if line["student"] == student]
            last = max(own, key=lambda line: int(line["rows"]))
            whole = float(last["weight_norm"]) / int(last["rows"])
            points = [(int(l["rows"]), float(l["weight_error_norm"]) / int(l["rows"]) / whole)
                      for l in own if l["name"] == name]
            if not points:
                row.append("–")
                continue
            exponent, spread = slope(points)
            row.append(f"{exponent:.2f} ± {spread:.2f} ({100 * points[0][1]:.3g}% to {100 * points[-1][1]:.3g}%)")
        rows.append(row)
    table(["error ~ tokens^e", *STUDENTS], rows)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--results", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    a = arguments.parse_args()
    tables({(line["student"], line["name"]): line for line in read(a.results / "cache_pareto.csv")})
    slopes(read(a.results / "cache_gradients.csv"))


if __name__ == "__main__":
    main()
