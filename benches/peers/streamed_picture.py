"""Draws benches/results/streamed.jsonl, which benches/streamed.sh writes: rate against length of a sweep, beside the
roofline; as docs/pictures/streamed.svg. Prints the lines of the table in docs/performance.md.

    python benches/peers/streamed_picture.py
"""
import json
from pathlib import Path

from cache_pictures import Panel, span, write

ROOT = Path(__file__).resolve().parents[2]


def main():
    lines = [json.loads(line) for line in (ROOT / "benches/results/streamed.jsonl").read_text().splitlines()]
    of = lambda kind: [line for line in lines if line["bench"] == kind]
    resident = sum(line["tokens_per_second"] for line in of("resident")) / len(of("resident"))
    bandwidth, processors = (of("read")[-1][key] for key in ("bytes_per_second", "processors"))
    in_memory = sorted((line for line in of("streamed") if not line["spilled"]), key=lambda line: line["sweep"])
    spilled = [line for line in of("streamed") if line["spilled"]]
    # Of the same tokens, every bit of the targets.
    digests = {}
    for line in of("resident") + of("streamed"):
        assert digests.setdefault(line["tokens"], line["digest"]) == line["digest"], line
    # What reading alone allows: a sweep's bytes at the rate at which one thread reads and packs.
    reading = [(line["sweep"], line["tokens"] / (line["bytes_read"] / bandwidth)) for line in in_memory]

    # The same where reading takes its time from the processors that compute.
    shared = [(sweep, min(rate, 1 / (1 / resident + 1 / rate / processors))) for sweep, rate in reading]

    low = min(line["tokens_per_second"] for line in in_memory)
    x_range, y_range = span([line["sweep"] for line in in_memory]), (low / 1.6, resident * 1.8)
    panel = Panel((70, 50, 620, 400), x_range, y_range, "Tokens per second against the length of a sweep",
                  "tokens of a sweep", "tokens per second", y_words=lambda value: f"{value:g}")
    roof = [(sweep, min(rate, resident)) for sweep, rate in reading]
    meet = crossing(reading, resident)
    roof = sorted(roof + ([meet] if meet else []))
    panel.line([(panel.x(x), panel.y(max(y, y_range[0]))) for x, y in roof], "#c1121f", 1.8, "7 4")
    panel.line([(panel.x(x), panel.y(y)) for x, y in shared], "#888888", 1.8, "2 4")
    panel.curve([(line["sweep"], line["tokens_per_second"]) for line in in_memory], "#0b6e4f",
                [f'{line["tokens_per_second"] / resident:.0%}' for line in in_memory])
    panel.curve([(line["sweep"], line["tokens_per_second"]) for line in spilled], "#1d6fa5", hollow=True)
    legend = [(f"streamed within {in_memory[0]['memory_mib']} MiB, of resident", "#0b6e4f", ""),
              (f"within {spilled[0]['memory_mib']} MiB, hidden states in a file", "#1d6fa5", ""),
              ("roofline: reading, then resident", "#c1121f", "7 4"),
              (f"reading and computing share {processors} processors", "#888888", "2 4")]
    places = [(70, 506), (70, 526), (400, 506), (400, 526)]
    write(ROOT / "docs/pictures/streamed.svg", (760, 550), [panel], legend, places)

    print(f"resident: {resident:.1f} tokens/s, peak {max(line['peak_mib'] for line in of('resident'))} MiB; "
          f"reading {bandwidth / 1e9:.2f} GB/s")
    for line, (_, bound), (_, together) in zip(in_memory, reading, shared):
        row(line, resident, f"{min(bound, resident):.0f} | {together:.0f}")
    for line in spilled:
        row(line, resident, " | ", " (file)")


def row(line, resident, bound, note=""):
    print(f"| {line['sweep']}{note} | {line['tokens_per_second']:.1f} | {line['tokens_per_second'] / resident:.1%} | "
          f"{bound} | {line['bytes_read'] / line['sweeps'] / 1e9:.2f} GB | "
          f"{line['experts_left_out'] / line['sweeps']:.1f} | {line['peak_mib']} MiB |")


def crossing(reading, resident):
    """Where the line of reading meets the resident rate."""
    for (x, y), (to_x, to_y) in zip(reading, reading[1:]):
        if y < resident <= to_y:
            return (x + (to_x - x) * (resident - y) / (to_y - y), resident)
    return None


if __name__ == "__main__":
    main()
