"""Means over seeds of what `limbeck compare --csv` wrote, with 95% intervals (Student's t), as a table in Markdown.

    python3 benches/proof/summary.py proof.csv

Runs are grouped by their names without the seed. The last column is the mean difference to the control of the same seed: the
intervals of two rows may overlap though each seed says the same.
"""

import csv
import math
import re
import sys
from collections import defaultdict

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def interval(values):
    """Mean, and half the width of its interval; None with a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    quantile = T[min(len(values) - 2, len(T) - 1)]
    return mean, quantile * spread / math.sqrt(len(values))


def shown(values, sign=""):
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def main():
    with open(sys.argv[1], newline="") as file:
        lines = list(csv.DictReader(file))
    cells, controls = defaultdict(dict), {}
    for line in lines:
        name, seed = re.fullmatch(r"(.*)-seed(\d+)(?: \(\d+\))?", line["run"]).groups()
        if line["arm"] == "control":
            controls[seed] = line
        elif line["arm"] in ("student", "averaged"):
            cells[(name, line["arm"])][seed] = line
    if controls:
        cells[("hard target alone", "control")] = controls
    ordered = sorted(cells.items(), key=lambda cell: interval([float(l["cross_entropy"]) for l in cell[1].values()])[0])
    print("| run | arm | seeds | cross-entropy | KL to teacher | top-1 | difference to the control |")
    print("|---|---|---|---|---|---|---|")
    for (name, arm), by_seed in ordered:
        column = lambda key: [float(line[key]) for line in by_seed.values() if line[key]]
        difference = [
            float(line["cross_entropy"]) - float(controls[seed]["cross_entropy"])
            for seed, line in by_seed.items()
            if seed in controls and arm != "control"
        ]
        print(
            f"| {name} | {arm} | {len(by_seed)} | {shown(column('cross_entropy'))} | {shown(column('kl_to_teacher'))} "
            f"| {shown(column('top1_agreement'))} | {shown(difference, '+')} |"
        )


main()
