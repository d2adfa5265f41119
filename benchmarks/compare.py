"""What changed between two results of benchmarks/all.py.

    python benchmarks/compare.py benchmarks/results/all.json new.json [--least 0.1]

A row of each: the old value, the new one, new / old, and for rows with a ratio old and new ratio. Ratios were taken within one
run, so they can be compared between machines and hours; values only on the same idle machine, and a difference is said.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any]:
    """A result of all.py. Ends with a message that names the file if it is none."""
    try:
        found = json.loads(path.read_text())
        rows = {row["name"]: row for row in found["rows"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a result of benchmarks/all.py ({type(error).__name__}: {error}); `--out FILE` makes one")
    return {**found, "rows": rows}


def verdict(old: dict[str, Any], new: dict[str, Any], least: float) -> str:
    """better, worse or nothing: of the ratio where there is one, of the value otherwise."""
    key = "ratio" if old["ratio"] is not None and new["ratio"] is not None else "value"
    factor = new[key] / old[key] if old[key] else float("inf")
    if old["better"] == "more":
        factor = 1 / factor if factor else float("inf")
    return "worse" if factor > 1 + least else "better" if factor < 1 / (1 + least) else ""


def compared(old: dict[str, Any], new: dict[str, Any], least: float) -> list[str]:
    """The lines to print."""
    lines = []
    for key in ("machine", "threads", "versions"):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key)} before, {new.get(key)} now: compare ratios, not values")
    lines.append(f"{old['date']} {old['commit']} -> {new['date']} {new['commit']}")
    lines.append(f"{'row':<74}{'old':>11}{'new':>11} {'unit':<10}{'new/old':>8}{'ratio':>16}")
    for name, after in new["rows"].items():
        before = old["rows"].get(name)
        if before is None:
            lines.append(f"{name:<74}{'':>11}{after['value']:>11.4f} {after['unit']:<10} new row")
            continue
        ratios = (
            f"{before['ratio']:.2f} -> {after['ratio']:.2f}" if None not in (before["ratio"], after["ratio"]) else ""
        )
        factor = after["value"] / before["value"] if before["value"] else float("nan")
        lines.append(
            f"{name:<74}{before['value']:>11.4f}{after['value']:>11.4f} {after['unit']:<10}{factor:>8.2f}{ratios:>16} "
            f"{verdict(before, after, least)}".rstrip()
        )
    lines += [f"{name}: no longer measured" for name in old["rows"] if name not in new["rows"]]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--least", type=float, default=0.1, help="the least relative change that is called one")
    args = parser.parse_args()
    print("\n".join(compared(load(args.old), load(args.new), args.least)))


if __name__ == "__main__":
    main()
