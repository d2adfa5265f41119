"""results.json: one row per (source, architecture, seed), published whole after every network."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lad_dist.errors import RunDirError
from lad_dist.rundir import published

Row = dict[str, Any]
FIGURES = ("overall", "head", "medium", "tail")


def read(path: Path) -> list[Row]:
    """The rows of a results file; none where it does not exist. Raises RunDirError where it is damaged."""
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path}: is not a results file ({error}); remove it to evaluate again") from error


def write(path: Path, rows: list[Row]) -> None:
    """Publish the rows."""
    with published(path) as temporary:
        temporary.write_text(json.dumps({"format_version": 1, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def same_measurement(row: Row, other: Row) -> bool:
    """Whether two rows measure the same thing in the same way (all but what came out)."""
    return all(row.get(k) == other.get(k) for k in ("source", "architecture", "seed", "split", "settings", "set_id"))


def replace(rows: list[Row], new: Row) -> list[Row]:
    """``rows`` with ``new`` in place of an older row of the same (source, architecture, seed)."""
    name = ("source", "architecture", "seed")
    return [r for r in rows if any(r[k] != new[k] for k in name)] + [new]


def summary(rows: Iterable[Row]) -> list[Row]:
    """Per (source, architecture): mean and sample standard deviation over seeds of every figure, in the order of rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["architecture"]), []).append(row)
    out = []
    for (source, architecture), members in groups.items():
        entry: Row = {
            "source": source,
            "architecture": architecture,
            "seeds": len(members),
            "split": members[0]["split"],
            "selection": members[0]["selection"],
            "method": members[0]["method"],
        }
        for figure in FIGURES:
            values = [m[figure] for m in members if m[figure] is not None]
            entry[figure] = statistics.mean(values) if values else None
            entry[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
        out.append(entry)
    return out
