"""Means over seeds of what `limbeck compare --csv` wrote, with 95% intervals (Student's t), as tables in Markdown.

    python3 benches/proof/summary.py proof.csv [cosine-top_k]

Runs are grouped by their names without the seed. The last column is the mean difference to the control of the same seed: the
intervals of two rows may overlap though each seed says the same.

With two seeds such an interval says little. The second table compares students with one of them, over the seeds that all have:
what a seed does to all of them is taken off first, and what is left scatters alike for all, so that the interval of a difference
rests on (students - 1) (seeds - 1) degrees of freedom.
"""

import csv
import math
import re
import sys
from collections import defaultdict

# Two-sided 95% quantiles of Student's t by degrees of freedom.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


def quantile(freedom):
    return T[min(freedom, len(T)) - 1]


def interval(values):
    """Mean, and half the width of its interval; None with a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return mean, quantile(len(values) - 1) * spread / math.sqrt(len(values))


def shown(values, sign=""):
    if not values:
        return "–"
    mean, half = interval(values)
    return f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")


def compare_with(reference, students):
    """Prints differences of cross-entropy to one student, seeds taken off."""
    seeds = sorted(set.intersection(*map(set, students.values())))
    if reference not in students or len(students) < 2 or len(seeds) < 2:
        return
    rows = {name: [float(by_seed[seed]["cross_entropy"]) for seed in seeds] for name, by_seed in students.items()}
    means = {name: sum(row) / len(row) for name, row in rows.items()}
    mean = sum(means.values()) / len(means)
    of_seeds = [sum(row[place] for row in rows.values()) / len(rows) - mean for place in range(len(seeds))]
    left = [value - means[name] - of_seeds[place] for name, row in rows.items() for place, value in enumerate(row)]
    freedom = (len(rows) - 1) * (len(seeds) - 1)
    half = quantile(freedom) * math.sqrt(sum(value**2 for value in left) / freedom * 2 / len(seeds))
    print(f"\n| student | difference to {reference}, ± {half:.4f} | of each seed: {', '.join(seeds)} |")
    print("|---|---|---|")
    for name in sorted(means, key=means.get):
        if name != reference:
            each = ", ".join(f"{ours - theirs:+.4f}" for ours, theirs in zip(rows[name], rows[reference]))
            print(f"| {name} | {means[name] - means[reference]:+.4f} | {each} |")


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
    students = {name: by_seed for (name, arm), by_seed in cells.items() if arm == "student"}
    compare_with(sys.argv[2] if len(sys.argv) > 2 else "cosine-top_k", students)


main()
