"""Draws the results of cache_pareto.py as SVG, with nothing but the standard library."""
import csv
import math
from html import escape

COLOURS = {
    "compact min_prob": "#0b6e4f", "compact top_k": "#5fa777", "compact top_p": "#a3b18a",
    "compact threshold_sampled": "#c1121f", "raw threshold_sampled": "#f28482", "raw sampled": "#8d5524",
    "packed min_prob": "#1d6fa5", "raw min_prob": "#7fb2d6", "packed threshold_sampled": "#9d0208",
    "u32 + f16": "#555555", "DistillKit, symmetric_uniform tail": "#7b2d8b", "DistillKit, zero tail": "#c49bd0"}
OTHERS = ["#bc6c25", "#606c38", "#3a0ca3", "#ff006e"]
GROWING = ["raw threshold_sampled 0.01", "raw threshold_sampled 0.003", "compact threshold_sampled 0.012",
           "u32 + f16 top 128", "raw sampled 50", "compact min_prob 0.003", "compact min_prob 0.001 cap 128",
           "compact min_prob 0.0005 cap 256", "compact min_prob 0.0002 cap 768",
           "DistillKit recommended, symmetric_uniform"]


class Panel:
    """Log-log axes in a rectangle of a picture."""

    def __init__(self, box, x_range, y_range, title, x_name, y_name, y_words=lambda value: f"{100 * value:g}%"):
        (self.left, self.top, self.width, self.height), self.x_range, self.y_range = box, x_range, y_range
        self.out, self.taken, self.crossed, self.labels = [], [], [], []
        self.rectangle(self.left, self.top, self.width, self.height)
        self.text(self.left, self.top - 10, title, size=14, weight="bold")
        self.text(self.left + self.width / 2, self.top + self.height + 36, x_name, anchor="middle")
        middle = self.top + self.height / 2
        self.out.append(f'<text x="{self.left - 44}" y="{middle}" font-size="12" text-anchor="middle" '
                        f'transform="rotate(-90 {self.left - 44} {middle})">{escape(y_name)}</text>')
        for value in ticks(x_range):
            x = self.x(value)
            self.line([(x, self.top), (x, self.top + self.height)], "#e4e4e4", 1)
            self.text(x, self.top + self.height + 16, short(value), anchor="middle", size=11)
        for value in ticks(y_range):
            y = self.y(value)
            self.line([(self.left, y), (self.left + self.width, y)], "#e4e4e4", 1)
            self.text(self.left - 6, y + 4, y_words(value), anchor="end", size=11)

    def x(self, value):
        low, high = map(math.log, self.x_range)
        return self.left + self.width * (math.log(value) - low) / (high - low)

    def y(self, value):
        low, high = map(math.log, self.y_range)
        return self.top + self.height * (high - math.log(value)) / (high - low)

    def rectangle(self, x, y, width, height):
        self.out.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="#ffffff" stroke="#999999"/>')

    def text(self, x, y, words, anchor="start", size=12, colour="#222222", weight="normal"):
        self.out.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
                        f'font-weight="{weight}">{escape(words)}</text>')

    def line(self, places, colour, width=1.8, dashes=""):
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" '
                        f'stroke-dasharray="{dashes}"/>')

    def curve(self, values, colour, labels=(), hollow=False):
        places = [(self.x(x), self.y(y)) for x, y in values]
        self.line(places, colour)
        for (x, y), (to_x, to_y) in zip(places, places[1:]):
            steps = 1 + int(math.hypot(to_x - x, to_y - y) / 3)
            self.crossed += [(x + (to_x - x) * n / steps, y + (to_y - y) * n / steps) for n in range(steps)]
        for x, y in places:
            self.out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{"#ffffff" if hollow else colour}" '
                            f'stroke="{colour}" stroke-width="1.4"/>')
            self.taken.append((x - 5, y - 5, x + 5, y + 5))
        self.labels += [(x, y, words, colour) for (x, y), words in zip(places, labels)]

    def finish(self):
        """Writes the labels, when all points have their places."""
        for label in self.labels:
            self.label(*label)
        return self.out

    def label(self, x, y, words, colour):
        """At the place beside the point where it covers no point, no other label, and as little of curves as can be."""
        wide = 5.4 * len(words)
        places = []
        for dx, dy in ((7, -5), (7, 12), (-7 - wide, -5), (-7 - wide, 12), (7, -15), (7, 22), (-7 - wide, -15),
                       (-7 - wide, 22), (-wide / 2, -20), (-wide / 2, 28), (12, 34), (12, -28)):
            box = (x + dx, y + dy - 10, x + dx + wide, y + dy + 2)
            inside = self.left <= box[0] and box[2] <= self.left + self.width
            inside = inside and self.top <= box[1] and box[3] <= self.top + self.height
            free = all(box[0] >= t[2] or t[0] >= box[2] or box[1] >= t[3] or t[1] >= box[3] for t in self.taken)
            if inside and free:
                over = sum(box[0] < c[0] < box[2] and box[1] < c[1] < box[3] for c in self.crossed)
                places.append((over, len(places), box))
        if places:
            box = min(places)[2]
            self.taken.append(box)
            self.text(box[0], box[3] - 2, words, size=10, colour=colour)


def ticks(span):
    decades = range(math.floor(math.log10(span[0])), math.ceil(math.log10(span[1])) + 1)
    steps = (1, 2, 5) if span[1] / span[0] < 500 else (1,)
    return [m * 10.0**d for d in decades for m in steps if span[0] <= m * 10.0**d <= span[1] * 1.0001]


def short(value):
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def span(values, margin=1.25):
    return min(values) / margin, max(values) * margin


def colour_of(family, families):
    return COLOURS.get(family) or OTHERS[families.index(family) % len(OTHERS)]


def number(line, key):
    return float(line[key]) if line[key] else None


def label_of(line):
    if line["family"].startswith("DistillKit"):
        return line["selection"]
    words = line["selection"].split(" ", 1)[1] if " " in line["selection"] else line["selection"]
    return words.replace(" cap ", "/").replace("top_k ", "")


def write(path, size, panels, legend, places):
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" '
           f'height="{size[1]}" font-family="Helvetica, Arial, sans-serif">',
           f'<rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>']
    for panel in panels:
        out += panel.finish()
    for (words, colour, dashes), (x, y) in zip(legend, places):
        out.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" stroke="{colour}" stroke-width="2.4" '
                   f'stroke-dasharray="{dashes}"/><text x="{x + 32}" y="{y}" font-size="12" fill="#222222">'
                   f'{escape(words)}</text>')
    path.write_text("\n".join(out + ["</svg>", ""]))


def draw_pareto(lines, path):
    student = lines[-1]["student"]
    lines = [line for line in lines if line["student"] == student and line["bytes_per_token"]]
    families = list(dict.fromkeys(line["family"] for line in lines))
    panels = []
    x_range = span([number(line, "bytes_with_tables") for line in lines])
    for place, (key, title) in enumerate((("logit_error", "Gradient in the logits, per token"),
                                          ("weight_error", "Gradient of the head, summed over all tokens"))):
        shown = [line for line in lines if line[key]]
        panel = Panel((70 + 610 * place, 50, 530, 470), x_range, span([number(line, key) for line in shown]),
                      f"{title} ({student} student)", "bytes per token, coder's tables included",
                      "error, of the full gradient")
        for family in families:
            points = sorted((number(line, "bytes_with_tables"), number(line, key), label_of(line))
                            for line in shown if line["family"] == family)
            if points:
                panel.curve([point[:2] for point in points], colour_of(family, families), [p[2] for p in points],
                            hollow=not family.startswith(("compact", "packed", "raw")))
        panels.append(panel)
    legend = []
    for family in families:
        counted = [line["bytes_are"] == "counted" for line in lines if line["family"] == family]
        words = " (bytes counted)" if all(counted) else " (bytes partly counted)" if any(counted) else ""
        legend.append((family + words, colour_of(family, families), ""))
    places = [(70 + 310 * (n % 4), 586 + 20 * (n // 4)) for n in range(len(legend))]
    write(path, (1280, 600 + 20 * -(-len(legend) // 4)), panels, legend, places)


def draw_gradients(lines, path):
    students = list(dict.fromkeys(line["student"] for line in lines))
    names = [name for name in GROWING if any(line["name"] == name for line in lines)]
    palette = ["#f28482", "#f4a261", "#c1121f", "#555555", "#8d5524", "#95d5b2", "#40916c", "#0b3d2e", "#1d6fa5",
               "#7b2d8b"]
    colours = {name: palette[GROWING.index(name)] for name in names}
    for student in students:  # the error of the mean gradient, of the full one's size over all rows
        own = [line for line in lines if line["student"] == student]
        last = max(own, key=lambda line: int(line["rows"]))
        whole = number(last, "weight_norm") / number(last, "rows")
        for line in own:
            line["mean_error"] = number(line, "weight_error_norm") / number(line, "rows") / whole
    shown = [line for line in lines if line["name"] in names]
    rows = span([number(line, "rows") for line in lines], 1.1)
    errors = span([line["mean_error"] for line in shown])
    panels = []
    for place, student in enumerate(students):
        panel = Panel((66 + 410 * place, 50, 340, 420), rows, errors, f"{student} student", "tokens",
                      "error of the head's mean gradient")
        start = 1.5 * max((l["mean_error"] for l in shown if l["student"] == student and "threshold" in l["name"]),
                          default=errors[1])
        ends = [(rows[0] * 1.1, start), (rows[1] / 1.1, start * math.sqrt(rows[0] * 1.21 / rows[1]))]
        panel.line([(panel.x(x), panel.y(max(y, errors[0]))) for x, y in ends], "#bbbbbb", 1.2, "2 4")
        for name in names:
            points = [(number(l, "rows"), l["mean_error"]) for l in shown
                      if l["student"] == student and l["name"] == name]
            panel.curve(points, colours[name])
        panels.append(panel)
    legend = [(name, colours[name], "") for name in names] + [("1 / sqrt(tokens)", "#bbbbbb", "2 4")]
    places = [(66 + 320 * (n % 4), 536 + 20 * (n // 4)) for n in range(len(legend))]
    write(path, (66 + 410 * max(3, len(students)), 550 + 20 * -(-len(legend) // 4)), panels, legend, places)


def draw(results, pictures):
    pictures.mkdir(parents=True, exist_ok=True)
    for file, picture, make in (("cache_pareto.csv", "cache_pareto.svg", draw_pareto),
                                ("cache_gradients.csv", "cache_gradients.svg", draw_gradients)):
        with open(results / file, newline="") as stored:
            make(list(csv.DictReader(stored)), pictures / picture)
        print(pictures / picture)
