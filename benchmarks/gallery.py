"""Sets that come with the repository: gallery/NAME/ each as `lad-dist push` writes it, and the page docs/gallery.md.

    python benchmarks/gallery.py                                  # all of them, from runs/gallery/NAME, run where missing
    python benchmarks/gallery.py digits-lt-ipc2                   # one of them
    python benchmarks/gallery.py NAME-ipcN --run RUN --command "lad-dist run JOB ..." --license mit   # another finished run
    python benchmarks/gallery.py --page                           # the page alone

Every run is an ordinary `lad-dist run` of one thread; one that was interrupted continues. gallery/gallery.json keeps what the page
says of a set and the set itself does not: command, date, machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GALLERY, PAGE, PICTURES = ROOT / "gallery", ROOT / "docs" / "gallery.md", ROOT / "docs" / "images"
LEDGER = GALLERY / "gallery.json"
COMMANDS = {
    **{f"digits-lt-ipc{ipc}": f"lad-dist run digits-lt --set ipc={ipc} --threads 1" for ipc in (1, 2, 5)},
    "fashion-mnist-lt-ipc10": "lad-dist run fashion-mnist-lt --set evaluate.baselines=[initial,random] --threads 1",
}
COLUMNS = {
    "distilled": "distilled",
    "initial": "starting set",
    "random": "random real, hard labels",
    "full": "whole set",
}

_TEXT = """# Gallery

Distilled sets that come with a clone, as `lad-dist push` writes them ([sharing.md](sharing.md)):

    from lad_dist import load

    images, soft_labels, lr = load("gallery/digits-lt-ipc2")

Test accuracy in percent, overall (tail: the third of the classes with the fewest training images), mean over networks trained
on one set. One distillation seed each, so differences of a point or two mean little; [results.md](results.md) has several
seeds. A command that changes more of its recipe than `ipc` is a shorter run than the recipe's own. The starting set is the
real images that the distillation began with, which are not in the gallery: where it is as good, distilling added nothing.
A dash: not measured.

| set | images | kB | {columns} |
|---|---|---|{rules}|
{rows}

`sha256sum --check SHA256SUMS` in a set's folder verifies its files; tests load every set. The licence of the sets is not
stated: the terms of the data sets that they were made from may apply. `python benchmarks/gallery.py` makes the sets and this page.
{sections}"""
_SECTION = """
## {name}

![A column per class, the one with the most training images first, whitening undone](images/gallery-{name}.png)

[gallery/{name}](../gallery/{name}), {size}, {teachers}. SHA-256 of its `SHA256SUMS`:
`{sum}`. Made on {date} ({machine}) by:
`{command}`
"""


@dataclass(frozen=True)
class Entry:
    """What the ledger keeps of a set."""

    command: str
    date: str
    machine: str


def make(name: str, run: Path | None, command: str, license_name: str) -> None:
    """Run the command unless ``run`` is given, push the run into gallery/NAME, and write the ledger."""
    from lad_dist.sharing import transfer

    folder = run or ROOT / "runs" / "gallery" / name
    if run is None:
        words = [sys.executable, "-m", "lad_dist.cli", *shlex.split(command)[1:], "--out", str(folder)]
        subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    done = transfer.push(folder, str(GALLERY / name), license_name, force=True)
    print(f"gallery/{name}: {done.files} files, {done.size / 1e3:.0f} kB")
    when = date.fromtimestamp((folder / "distilled" / "meta.json").stat().st_mtime)
    ledger = {**entries(), name: Entry(command, when.isoformat(), f"{platform.machine()}, one thread")}
    LEDGER.write_text(json.dumps({n: asdict(ledger[n]) for n in sorted(ledger, key=_order)}, indent=1) + "\n")


def entries() -> dict[str, Entry]:
    """The ledger."""
    return {n: Entry(**e) for n, e in json.loads(LEDGER.read_text()).items()} if LEDGER.exists() else {}


def _order(name: str) -> tuple[str, int]:
    stem, _, ipc = name.rpartition("-ipc")
    return stem, int(ipc)


def page() -> str:
    """The text of docs/gallery.md."""
    rows, sections = [], []
    for name, entry in entries().items():
        from lad_dist import load

        distilled, folder = load(GALLERY / name), GALLERY / name
        size = sum(file.stat().st_size for file in folder.iterdir())
        shown = [_cell(folder, source) for source in COLUMNS]
        rows.append(f"| [{name}](#{name}) | {len(distilled)} | {size / 1e3:.0f} | {' | '.join(shown)} |")
        count = 0 if distilled.teachers is None else len(distilled.teachers.weights)
        sections.append(
            _SECTION.format(
                name=name,
                size="x".join(map(str, distilled.images.shape)),
                teachers=f"with {count} teachers" if count else "without teachers",
                sum=hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest(),
                **asdict(entry),
            )
        )
    return _TEXT.format(
        columns=" | ".join(COLUMNS.values()), rules="---|" * (len(COLUMNS) - 1) + "---", rows="\n".join(rows),
        sections="".join(sections),
    )  # fmt: skip


def _cell(folder: Path, source: str) -> str:
    file = folder / "results.json"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    found = next((row for row in results if row["source"] == source and row["architecture"] == "convnet"), None)
    return "–" if found is None else f"{100 * found['overall']:.1f} ({100 * found['tail']:.1f})"


def picture(name: str) -> bytes:
    """A column per class, the largest first, as PNG."""
    from lad_dist import load
    from lad_dist.exchange.pictures import pixels, png_grid

    distilled = load(GALLERY / name)
    counts, shown = distilled.meta.counts, pixels(distilled)
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    of_class = [(distilled.labels == c).nonzero()[:, 0].tolist() for c in order]
    return png_grid([shown[[members[i] for members in of_class]] for i in range(distilled.meta.ipc)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of COMMANDS")
    parser.add_argument("--run", type=Path, help="a finished run folder")
    parser.add_argument("--command", help="the command that made it")
    parser.add_argument("--license", default="unknown", help="as for lad-dist push")
    parser.add_argument("--page", action="store_true", help="write the page and its pictures alone")
    args = parser.parse_args()
    if args.run is not None and (len(args.names) != 1 or args.command is None):
        parser.error("--run: give one NAME, and --command")
    for name in args.names or ([] if args.page else COMMANDS):
        if args.run is None and name not in COMMANDS:
            parser.error(f"{name}: unknown; valid: {', '.join(COMMANDS)}, or --run and --command")
        make(name, args.run, args.command or COMMANDS[name], args.license)
    for name in entries():
        (PICTURES / f"gallery-{name}.png").write_bytes(picture(name))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
