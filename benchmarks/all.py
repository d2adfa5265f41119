"""Every row in one run: what each costs, as a ratio to the plain way in the same run, and to the floor where one is counted.

    python benchmarks/all.py                          # all of it, some ten minutes on two cores
    python benchmarks/all.py --only steps ranks       # some of it
    python benchmarks/all.py --write                  # and keep it as benchmarks/results/all.json
    python benchmarks/compare.py OLD.json NEW.json    # what changed between two results

It calls the benchmarks beside it, whose pages say how each number is made. Ratios are new over plain where less is better
(seconds, bytes), and new over plain where more is better (rates); the last column says which.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from machine import processor

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "all.json"
STEPS = {"128, 3x32x32": ["--width", "128", "--shape", "3x32x32"],
         "32, 1x28x28": ["--width", "32", "--shape", "1x28x28", "--repeats", "9"]}  # fmt: skip
Better = Literal["less", "more"]


@dataclass(frozen=True)
class Row:
    """One number: ``ratio`` to the row ``of``, and ``floor`` the least that this machine could take, in the same unit."""

    name: str
    value: float
    unit: str
    better: Better = "less"
    ratio: float | None = None
    of: str | None = None
    floor: float | None = None


def steps(args: argparse.Namespace) -> Iterator[Row]:
    """Student and GSAM steps, seconds and floors; peak memory of recompute at 10 and 80 student steps."""
    for size, options in STEPS.items():
        found = json.loads(called("step.py", "--json", "--no-memory", "--threads", str(args.threads), *options))
        for name, seconds in found["seconds"].items():
            base = "plain loop" if name.startswith("gsam") else "textbook"
            yield Row(
                f"step, {size}: {name}",
                seconds,
                "s",
                ratio=found["ratio"][name],
                of=base,
                floor=found["floor"].get(name),
            )
        for layer, rate in enumerate(found["rates"]["convolutions"], 1):
            yield Row(f"rate, {size}: convolution {layer}", rate / 1e9, "GFLOP/s", "more")
        yield Row(f"rate, {size}: copy", found["rates"]["copy"] / 1e9, "GB/s", "more")
    options = ["--width", "32", "--threads", str(args.threads), "--peak-of", "representation/recompute"]
    few, many = (
        statistics.median(int(called("step.py", *options, "--steps", n)) for _ in range(3)) for n in ("10", "80")
    )
    yield Row("peak memory, recompute, 10 student steps", few / 2**20, "MiB")
    yield Row("peak memory, recompute, 80 student steps", many / 2**20, "MiB", ratio=many / few, of="10 steps")


def experts(args: argparse.Namespace) -> Iterator[Row]:
    """Experts per hour of one process and of a fleet."""
    alone, fleet = from_file("fleet.py", "--epochs", "25", "--classifier-epochs", "5")
    yield Row(f"experts: {alone['way']}", alone["per_hour"], "experts/h", "more")
    ratio = fleet["per_hour"] / alone["per_hour"]
    yield Row(f"experts: {fleet['way']}", fleet["per_hour"], "experts/h", "more", ratio, alone["way"])
    yield Row("experts: memory of one more", fleet["pss"] / 2**20, "MiB")


def buffer(args: argparse.Namespace) -> Iterator[Row]:
    """Window reads beside .pt files of ten experts."""
    found = from_file("buffer.py", "--experts", "10", "--windows", "100")
    for kind in ("cold", "warm"):
        seconds, whole = found["windows"][kind][0], found["pt"][kind]
        yield Row(f"window read, {kind}, median", seconds, "s", ratio=seconds / whole, of="loading a .pt file")
    yield Row("window reads, 8 processes", found["processes"]["rate"], "windows/s", "more")
    peak, whole = found["windows"]["peak"] / 2**20, found["pt"]["peak"] / 2**20
    yield Row("window reads, peak memory", peak, "MiB", ratio=peak / whole, of="one .pt file loaded")


def ranks(args: argparse.Namespace) -> Iterator[Row]:
    """An iteration on two ranks beside half of one rank's."""
    found = json.loads(called("ranks.py", "--json", "--repeats", "5"))
    for path, times in found["iterations"].items():
        world = found["settings"]["world"]
        ratio = times["together"] / (times["alone"] / world)
        yield Row(f"iteration, {path}, {world} ranks", times["together"], "s", ratio=ratio, of=f"1 rank's / {world}")


def evaluation(args: argparse.Namespace) -> Iterator[Row]:
    """Training the networks of four seeds, one by one and otherwise."""
    for case, ways in from_file("evaluation.py", "--cases", "0", "3").items():
        base, *others = (way for way in ways if not way.endswith("processor"))
        yield Row(f"evaluation, {case}: {base}", ways[base], "s")
        for way in others:
            yield Row(f"evaluation, {case}: {way}", ways[way], "s", ratio=ways[way] / ways[base], of=base)


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    part.__name__: part for part in (steps, experts, buffer, ranks, evaluation)
}


def called(script: str, *options: str) -> str:
    """What one of the benchmarks beside this one printed. Raises SystemExit with its complaint if it fails."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *options], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"benchmarks/{script} failed with exit code {done.returncode}")
    return done.stdout


def from_file(script: str, *options: str) -> Any:
    """What it wrote with --json."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        called(script, *options, "--json", str(file))
        return json.loads(file.read_text())


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers hold for."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "-C", str(HERE), "status", "--porcelain", "--", "../lad_dist"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "threads": args.threads,
        "commit": (commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")) or "unknown",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numba", "ray", "pyarrow")},
        },
        "load_before": round(os.getloadavg()[0], 2),
    }


def line(row: Row) -> str:
    """One row of the table."""
    ratio = f"{row.ratio:.2f} of {row.of}" if row.ratio is not None else ""
    least = f"{row.value / row.floor:.2f} x {row.floor:.4f}" if row.floor else ""
    return f"{row.name:<74}{row.value:>12.4f} {row.unit:<10} {ratio:<34}{least:<16} {row.better}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, default=2, help="of the steps")
    parser.add_argument("--out", type=Path, help="write the result into this file")
    parser.add_argument("--write", action="store_true", help="write it as benchmarks/results/all.json")
    args = parser.parse_args()
    kept: dict[str, Any] = {**environment(args), "rows": []}
    print(f"{kept['machine']}, {kept['date']}, commit {kept['commit']}, {kept['versions']}", flush=True)
    print(f"{'row':<74}{'value':>12} {'unit':<10} {'ratio':<34}{'times its floor':<16} better")
    for part in args.only:
        for row in PARTS[part](args):
            kept["rows"].append(asdict(row))
            print(line(row), flush=True)
    for file in ([args.out] if args.out else []) + ([RESULTS] if args.write else []):
        file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
