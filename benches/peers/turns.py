"""Programs that take turns: how limbeck and PyTorch are compared on a machine that has other things to do.

limbeck runs as a process that computes once for each line it is sent (`throughput -- ... --turns`), PyTorch in this one.
A round is one run of each, one right after the other; the ratio of a round is PyTorch's time over limbeck's, and the
result the median of the rounds. Times by the clock and of the processor (user and system, all threads) are both given;
targets are about the clock, which is what a user sees. It says nothing while others compute on the machine, so what they
took is measured too, and where that is more than a tenth of the processors no target counts as met.
"""
import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time


def arguments_of(description, rounds, quick="three rounds"):
    """What every such script is told; it adds its own."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help=quick)
    arguments.add_argument("--rounds", type=int, default=rounds)
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--binary", help="a built `throughput` bench")
    arguments.add_argument("--results", help="a file that the line is appended to")
    return arguments


def bench_binary(name="throughput"):
    """Builds a bench and gives the path of its program."""
    build = ["cargo", "bench", "--workspace", "--no-run", "--bench", name]
    found = subprocess.run(build, capture_output=True, text=True, cwd=os.path.join(os.path.dirname(__file__), "../.."))
    if found.returncode != 0:
        sys.exit(found.stderr)
    return re.search(r"Executable \S+ \((.*)\)", found.stderr).group(1)


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Limbeck:
    """One process of limbeck that waits for its turns."""

    def __init__(self, *arguments, binary=None, threads=2):
        environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
        command = [binary or bench_binary(), *map(str, arguments), "--turns"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd="/"
        )
        while (line := self.process.stdout.readline()) != "ready\n":
            if not line:
                sys.exit(f"{command} ended before it was ready")

    def run(self, what=""):
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        clock, processor = map(float, self.process.stdout.readline().split())
        return clock, processor

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def timed(work):
    clock, processor = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - clock, processor_seconds() - processor


class Others:
    """What programs other than the two took of the processors while these ran."""

    def __init__(self):
        self.seconds = self.clock = 0.0

    @staticmethod
    def busy_seconds():
        with open("/proc/stat") as file:
            user, nice, system, _, _, interrupts, soft, stolen = map(int, file.readline().split()[1:9])
        return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")

    def beside(self, work):
        busy, began = self.busy_seconds(), time.perf_counter()
        clock, processor = work()
        self.clock += time.perf_counter() - began
        self.seconds += self.busy_seconds() - busy - processor
        return clock, processor

    def share(self):
        return max(0.0, self.seconds / self.clock / os.cpu_count())


def rounds(sides, count, others):
    """`sides` maps names to functions that give (clock, processor) seconds; every other round goes backwards."""
    seconds = {name: [] for name in sides}
    for number in range(count):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(others.beside(sides[name]))
    return seconds


def ratio(seconds, ours, theirs, which):
    """Median over the rounds of their time over ours: 0 by the clock, 1 of the processor."""
    pairs = zip(seconds[ours], seconds[theirs])
    return statistics.median(their[which] / our[which] for our, their in pairs)


MOST_FOR_OTHERS = 0.1


def report(what, seconds, amount, pairs, others, results=None):
    """Prints one line of JSON; True where all targets are met. `pairs` has (ours, theirs, target)."""
    lines = []
    for ours, theirs, target in pairs:
        by_clock, by_processor = (ratio(seconds, ours, theirs, which) for which in (0, 1))
        lines.append(dict(limbeck=ours, peer=theirs, clock=round(by_clock, 3), processor=round(by_processor, 3),
                          target=target))
    quiet = others.share() <= MOST_FOR_OTHERS
    met = all(line["clock"] >= line["target"] for line in lines)
    rates = {
        name: dict(
            per_second=round(amount / statistics.median(run[0] for run in runs), 1),
            per_processor_second=round(amount / statistics.median(run[1] for run in runs), 1),
        )
        for name, runs in seconds.items()
    }
    verdict = ("met" if met else "missed") if quiet else "cannot tell: others are busy on this machine"
    line = json.dumps(dict(what=what, ratios=lines, rates=rates, others=round(others.share(), 2), verdict=verdict))
    print(line)
    if results:
        with open(results, "a") as file:
            file.write(line + "\n")
    return met and quiet
