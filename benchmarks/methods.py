"""Methods compared on one recipe, over distillation seeds: the tables of the README.

    python benchmarks/methods.py digits-lt --ipc 2 5 --methods lad datm --seeds 0 1 2 --write
    python benchmarks/methods.py fashion-mnist-lt --methods lad datm mtt --seeds 0 1 2 --write

The experts are trained once into a shared buffer; then --workers processes of one thread each take the runs in turn. Every
run is an ordinary `lad-dist` run folder under --out, so an interrupted comparison continues where it was.
Random real images and the whole set are measured in the runs of the first method. `--write` puts the table into
benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FIGURES = ("overall", "head", "medium", "tail")


@dataclass(frozen=True)
class Run:
    """One distillation: a method at an IPC with a seed."""

    method: str
    ipc: int
    seed: int
    baselines: bool

    def folder(self, out: Path) -> Path:
        return out / f"{self.method}-ipc{self.ipc}-seed{self.seed}"


def command(args: argparse.Namespace, verb: str, run: Run) -> list[str]:
    sets = [f"method={run.method}", f"ipc={run.ipc}", f"seed={run.seed}", *args.set]
    sets += [] if run.baselines else ["evaluate.baselines=[]"]
    options = [part for s in sets for part in ("--set", s)]
    return [
        sys.executable,
        "-m",
        "lad_dist.cli",
        verb,
        args.job,
        "--out",
        str(run.folder(args.out)),
        "--buffers",
        str(args.out / "buffers"),
        "--threads",
        "1",
        *options,
    ]


def execute(args: argparse.Namespace, verb: str, run: Run) -> float:
    """Seconds that the run took; its output goes to a log beside its folder."""
    log, began = args.out / f"{run.folder(args.out).name}.log", time.monotonic()
    with log.open("a") as file:
        code = subprocess.run(command(args, verb, run), stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{run.folder(args.out).name} ended with exit code {code}; see {log}")
    print(f"{verb} {run.folder(args.out).name}: {time.monotonic() - began:.0f} s", flush=True)
    return time.monotonic() - began


def rows_of(args: argparse.Namespace, runs: list[Run], source: str) -> list[list[dict[str, float]]]:
    """Per run the rows of one source."""
    found = []
    for run in runs:
        doc = json.loads((run.folder(args.out) / "evaluation" / "results.json").read_text())
        found.append([row for row in doc["rows"] if row["source"] == source])
    return [rows for rows in found if rows]


def line(name: str, ipc: str, groups: list[list[dict[str, float]]]) -> str:
    """A table row: the mean over distillation seeds of the mean over networks, and the deviation over distillation seeds."""
    cells = []
    for figure in FIGURES:
        means = [statistics.mean(row[figure] for row in rows) * 100 for rows in groups]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        cells.append(f"{statistics.mean(means):.1f}{spread}")
    networks = sum(len(rows) for rows in groups)
    return f"| {name} | {ipc} | {' | '.join(cells)} | {len(groups)} x {networks // len(groups)} |"


def cpu() -> str:
    names = [
        text.split(":")[1].strip()
        for text in Path("/proc/cpuinfo").read_text().splitlines()
        if text.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {len(names)} cores"


def seconds_of(args: argparse.Namespace, run: Run) -> dict[str, float]:
    """Seconds per stage from the run's events."""
    spent: dict[str, float] = {}
    for text in (run.folder(args.out) / "events.jsonl").read_text().splitlines():
        event = json.loads(text)
        if event["kind"] in ("stage-finished", "stage-stopped"):
            spent[event["stage"]] = spent.get(event["stage"], 0.0) + event["seconds"]
    return spent


def table(args: argparse.Namespace, runs: list[Run]) -> str:
    lines = ["| method | IPC | overall | head | medium | tail | seeds x networks |", "|---|---|---|---|---|---|---|"]
    for ipc in args.ipc:
        for method in args.methods:
            lines.append(
                line(
                    method,
                    str(ipc),
                    rows_of(args, [r for r in runs if (r.method, r.ipc) == (method, ipc)], "distilled"),
                )
            )
        lines.append(line("random real", str(ipc), rows_of(args, [r for r in runs if r.ipc == ipc], "random")))
    full = rows_of(args, [r for r in runs if r.ipc == args.ipc[0]], "full")
    lines.append(line("the whole long-tailed set", "", full))
    return "\n".join(lines)


def cost(args: argparse.Namespace, runs: list[Run]) -> str:
    """Median seconds per stage and method."""
    lines = ["| method | IPC | distillation, s | evaluation of its set, s |", "|---|---|---|---|"]
    for ipc in args.ipc:
        for method in args.methods:
            spent = [seconds_of(args, r) for r in runs if (r.method, r.ipc) == (method, ipc)]
            medians = [
                f"{statistics.median(s[stage] for s in spent):.0f}" for stage in ("distill", "evaluate distilled")
            ]
            lines.append(f"| {method} | {ipc} | {' | '.join(medians)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--methods", nargs="+", default=["lad", "datm"])
    parser.add_argument("--ipc", nargs="+", type=int, default=None, help="default: the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="passed on to every run")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/methods/JOB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default=None, help="name of the results file; default: the job's")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    from lad_dist import recipe_file
    from lad_dist.catalog import find_job

    recipe = recipe_file.load(find_job(args.job).recipe)
    args.ipc = args.ipc or [recipe.ipc]
    args.out = args.out or Path("runs/methods") / recipe.name
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [
        Run(method, ipc, seed, method == args.methods[0])
        for ipc in args.ipc
        for seed in args.seeds
        for method in args.methods
    ]
    execute(args, "experts", runs[0])
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda run: execute(args, "run", run), runs))
    expert_seconds = seconds_of(args, runs[0]).get("experts", 0.0)
    experts = f"took {expert_seconds:.0f} s" if expert_seconds > 1 else "were in the buffer already"
    shown = " ".join([Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if a != "--write")])
    text = (
        f"# {recipe.name}: methods compared\n\n{date.today().isoformat()}, {cpu()}, {args.workers} processes of one thread; "
        f"command: `python benchmarks/{shown}`.\nPercent; mean over distillation seeds (each the mean of its networks) ± the "
        f"standard deviation over distillation seeds.\nHead, medium and tail are thirds of the classes by training count. The last "
        f"iteration is measured, on the test set.\n\n{table(args, runs)}\n\nOne thread; the experts, shared by all runs, "
        f"{experts}.\n\n{cost(args, runs)}\n"
    )
    print(text)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.name or recipe.name}.md").write_text(text)


if __name__ == "__main__":
    main()
