"""Size and time of an installation: ``python benchmarks/install.py [--extras ray ...] [--write]``.

Installs the checkout with pip into a new environment, without extras and then with each that is named, and prints megabytes,
seconds and the largest packages as Markdown; ``--write`` puts them into ``benchmarks/results/install.md``. pip's cache is used
if there is one, and the time says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "install.md"
LARGEST = 6


def megabytes(folder: Path) -> float:
    """Return the bytes of a folder's files, links not followed, / 1e6."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def largest(packages: Path, count: int = LARGEST) -> str:
    """Return the largest packages with their megabytes: ``torch 750, pyarrow 170``."""
    sizes = sorted(((megabytes(f), f.name) for f in packages.iterdir() if f.is_dir()), reverse=True)
    return ", ".join(f"{name} {size:.0f}" for size, name in sizes[:count])


def row(extra: str, folder: Path) -> str:
    """Install into ``folder``; return a row of the table."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    what = f"{ROOT}[{extra}]" if extra else str(ROOT)
    began = time.monotonic()
    quiet = ["--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", *quiet, what], check=True)
    seconds = time.monotonic() - began
    subprocess.run([folder / "bin" / "lad-dist", "--version"], check=True, capture_output=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    return f"| {extra or 'none'} | {megabytes(folder):.0f} | {seconds:.0f} | {largest(packages)} |"


def table(extras: Sequence[str]) -> str:
    """Return the page: a row for each installation."""
    rows = []
    for extra in ("", *extras):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(extra, Path(folder) / "venv"))
    load = os.getloadavg()[0]
    return "\n".join([
        "# Size and time of an installation", "",
        f"{date.today()}, {os.cpu_count()} cores, load {load:.1f}, Python {sys.version.split()[0]}, torch as the index at hand "
        "has it (here its CPU build; a CUDA build takes several GB more): `python benchmarks/install.py"
        f"{' --extras ' + ' '.join(extras) if extras else ''}`.", "",
        "| extras | MB | s | largest packages, MB |", "|---|---|---|---|", *rows, "",
    ])  # fmt: skip


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", nargs="*", default=[])
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    text = table(asked.extras)
    print(text)
    if asked.write:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
