"""Text for the proof, out of documentation that comes with Debian and with Rust: one page, one document.

    python3 benches/proof/text.py OUT_DIR --python /usr/share/doc/python3.11/html --rust "$(rustc --print sysroot)/share/doc/rust/html"

`apt-get install python3.11-doc` brings the first (under the PSF licence), `rustup component add rust-docs` the second (MIT or
Apache-2.0). Writes OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl. Which side a page is on follows from its path alone, so
that held-out pages are whole and the same everywhere; a paragraph that occurs twice is kept where it is seen first, held-out
pages first. Code listings, lists of names and paragraphs with addresses are left out.
"""

import argparse
import hashlib
import html
import json
import re
from pathlib import Path

BOOKS = ("book", "reference", "nomicon", "cargo", "rustc", "edition-guide", "embedded-book", "rustdoc", "rust-by-example")
ADDRESS = re.compile(r"://|\b[\w-]+\.(?:io|org|com|net|dev)\b")
SHORTEST = 80


def pages(folder, names):
    for path in sorted(folder.rglob("*.html")):
        place = path.relative_to(folder)
        if place.parts[0] in names and path.name not in ("print.html", "toc.html", "404.html", "genindex.html"):
            yield path, str(place)


def paragraphs(page):
    """The paragraphs of prose of a page."""
    body = re.search(r"(?is)<main[^>]*>(.*?)</main>", page) or re.search(r'(?is)<div class="body" role="main">(.*?)<div class="sphinxsidebar"', page)
    page = body.group(1) if body else page
    page = re.sub(r"(?is)<(script|style|nav|head|pre|table)\b.*?</\1>", "\n\n", page)
    page = re.sub(r'(?is)<a class="headerlink".*?</a>', "", page)
    page = re.sub(r"(?i)</(p|div|h\d|li|tr|dt|dd|blockquote)>", "\n\n", page)
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = re.sub(r"\s+", " ", paragraph).strip()
        words = sum(letter.isalpha() or letter == " " for letter in paragraph)
        if len(paragraph) >= SHORTEST and words >= 0.8 * len(paragraph) and not ADDRESS.search(paragraph):
            yield paragraph


def is_held_out(work):
    return hashlib.sha256(work.encode()).digest()[0] < 10  # of 256


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--python", type=Path, required=True)
    arguments.add_argument("--rust", type=Path, required=True)
    a = arguments.parse_args()
    found = []
    parts = ("library", "reference", "tutorial", "howto", "c-api", "extending", "faq", "whatsnew", "using", "distutils", "installing")
    for source, folder, names in (("python", a.python, parts), ("rust", a.rust, BOOKS)):
        for path, place in pages(folder, names):
            work = f"{source}/{place}"
            found.append((work, list(paragraphs(path.read_text(errors="replace")))))
    found.sort(key=lambda page: (not is_held_out(page[0]), page[0]))
    a.out.mkdir(parents=True, exist_ok=True)
    seen = set()
    sizes = {}
    with open(a.out / "train.jsonl", "w") as train, open(a.out / "held_out.jsonl", "w") as held_out:
        for work, text in found:
            text = [paragraph for paragraph in text if not (paragraph in seen or seen.add(paragraph))]
            if len(text) < 2:
                continue
            side, name = (held_out, "held_out") if is_held_out(work) else (train, "train")
            side.write(json.dumps({"work": work, "text": "\n\n".join(text)}, ensure_ascii=False) + "\n")
            count, size = sizes.get(name, (0, 0))
            sizes[name] = (count + 1, size + sum(len(paragraph.encode()) + 2 for paragraph in text))
    for name, (count, size) in sorted(sizes.items()):
        print(f"{name}: {count} pages, {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
