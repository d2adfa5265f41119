"""Methods compared on one recipe, over distillation seeds: the tables of the README.

    python benchmarks/methods.py digits-lt --ipc 1 2 5 --methods lad-fr lad datm --others digits-lt-matching --write
    python benchmarks/methods.py fashion-mnist-lt --methods lad-fr --seeds 0 1 2 --write
    python benchmarks/methods.py fashion-mnist-lt-f50 --methods lad --factors 10 50 100 200 500 1000 --seeds 0 --write

The first method takes the recipe JOB, the others that of --others if it is given, whose experts should be the same.
The experts are trained once for each imbalance factor into a shared buffer; then --workers processes of one thread each take
the runs in turn. Every run is an ordinary `lad-dist` run folder under --out, so an interrupted comparison continues where it was,
and --report-only makes the table of what is there. The baselines (--baselines: real images, ways to train on the whole set) are
measured in the runs of the first method; `initial`, the set that a distillation starts from, in every run, as each method may start
from another. The column "over its start" is the distilled set's overall accuracy less that of its starting set, in points: the mean
over distillation seeds of the mean difference of paired networks, and the standard error of that mean. `--write` puts the
table into benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from machine import cpu

RESULTS = Path(__file__).parent / "results"
FIGURES = ("overall", "head", "medium", "tail")
NAMES = {
    "random-soft": "random real, soft labels",
    "random-soft-plain": "random real, soft labels, no augmentation",
    "herding-soft": "herding real, soft labels",
    "initial-adsa": "the first method's starting set, labels by ADSA",
    "random-soft-adsa": "random real, soft labels by ADSA",
    "distilled-teacher": "the first method's images, teacher labels",
    "initial-teacher": "its starting set, teacher labels",
    "random-teacher": "random real, teacher labels",
    "herding-teacher": "herding real, teacher labels",
    "distilled-hard": "the first method's images, hard labels",
    "distilled-plain": "the first method's set, no augmentation",
    "random-plain": "random real, no augmentation",
    "random": "random real",
    "k-center": "k-center real",
    "graph-cut": "graph-cut real",
    "herding": "herding real",
    "full": "the whole long-tailed set",
    "full-balanced": "the whole set, balanced sampling",
    "full-logit-adjusted": "the whole set, logit adjustment",
}


@dataclass(frozen=True)
class Run:
    """One distillation: a method at an IPC and an imbalance factor (None: the recipe's own) with a seed."""

    method: str
    ipc: int
    factor: float | None
    seed: int
    baselines: tuple[str, ...]

    def folder(self, out: Path) -> Path:
        factor = "" if self.factor is None else f"-f{self.factor:g}"
        return out / f"{self.method}{factor}-ipc{self.ipc}-seed{self.seed}"


def command(args: argparse.Namespace, verb: str, run: Run) -> list[str]:
    sets = [f"method={run.method}", f"ipc={run.ipc}", f"seed={run.seed}", *args.set]
    sets += [] if run.factor is None else [f"data.imbalance_factor={run.factor:g}"]
    sets += [f"evaluate.baselines=[{','.join(run.baselines)}]"]
    sets += [f"evaluate.architectures=[{','.join(args.architectures)}]"]
    options = [part for s in sets for part in ("--set", s)]
    return [
        sys.executable,
        "-m",
        "lad_dist.cli",
        verb,
        args.job if args.others is None or run.method == args.methods[0] else args.others,
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


def rows_of(args: argparse.Namespace, runs: list[Run], source: str, architecture: str) -> list[list[dict[str, float]]]:
    """Per run that has them the rows of one source and architecture."""
    found = []
    for run in runs:
        file = run.folder(args.out) / "evaluation" / "results.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        found.append([row for row in rows if row["source"] == source and row["architecture"] == architecture])
    return [rows for rows in found if rows]


def gain(args: argparse.Namespace, runs: list[Run], architecture: str) -> str:
    """``+2.3 ± 0.4``: over distillation seeds, the mean of what distilling added to the starting set and its standard error."""
    from lad_dist.results.paired import paired

    means = []
    for run in runs:
        rows = [row for s in ("distilled", "initial") for of in rows_of(args, [run], s, architecture) for row in of]
        found = paired(rows, rows, "overall", "distilled", architecture, "initial")
        if found is not None:
            means.append(100 * found.mean)
    if not means:
        return ""
    error = f" ± {statistics.stdev(means) / len(means) ** 0.5:.1f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):+.1f}{error}"


def trained(groups: list[list[dict[str, Any]]]) -> str:
    """``300, 0.0101 to 0.0104``: epochs and learning rates of the networks."""
    settings = [row["settings"] for rows in groups for row in rows]
    spans = []
    for name in ("epochs", "lr"):
        values = sorted({f"{s[name]:.3g}" if name == "lr" else str(s[name]) for s in settings}, key=float)
        spans.append(values[0] if len(values) == 1 else f"{values[0]} to {values[-1]}")
    return ", ".join(spans)


def line(name: str, groups: list[list[dict[str, float]]], more: str = "") -> str:
    """A table row: the mean over distillation seeds of the mean over networks, and the deviation over distillation seeds.

    ``more``: what distilling added.
    """
    cells = []
    for figure in FIGURES:
        means = [statistics.mean(row[figure] for row in rows) * 100 for rows in groups]
        spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
        cells.append(f"{statistics.mean(means):.1f}{spread}")
    networks = sum(len(rows) for rows in groups)
    return f"| {name} | {' | '.join(cells)} | {more} | {len(groups)} x {networks // len(groups)} | {trained(groups)} |"


def seconds_of(args: argparse.Namespace, run: Run) -> dict[str, float]:
    """Seconds per stage from the run's events."""
    spent: dict[str, float] = {}
    file = run.folder(args.out) / "events.jsonl"
    for text in file.read_text().splitlines() if file.exists() else ():
        event = json.loads(text)
        if event["kind"] in ("stage-finished", "stage-stopped"):
            spent[event["stage"]] = spent.get(event["stage"], 0.0) + event["seconds"]
    return spent


def table(args: argparse.Namespace, runs: list[Run]) -> str:
    """One table for all architectures; what has not been measured yet is left out."""
    lines = [
        "| network | factor | IPC | trained on | overall | head | medium | tail | over its start | seeds x networks | epochs, lr |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture in args.architectures:
        for factor in args.factors:
            there = [r for r in runs if r.factor == factor]
            for ipc in args.ipc:
                these = [r for r in there if r.ipc == ipc]
                wanted = [(m, [r for r in these if r.method == m], "distilled") for m in args.methods]
                wanted += [
                    (f"{m}, labels by ADSA", [r for r in these if r.method == m], "distilled-adsa")
                    for m in args.methods
                ]
                if "initial" in args.baselines:
                    wanted += [
                        (f"{m}, starting set", [r for r in these if r.method == m], "initial") for m in args.methods
                    ]
                real = [b for b in args.baselines if b != "initial" and not b.startswith("full")]
                wanted += [(NAMES.get(b, b), these, b) for b in real]
                # The whole set has no IPC: it is measured with the first.
                wanted += [
                    (NAMES.get(b, b), these, b) for b in args.baselines if b.startswith("full") and ipc == args.ipc[0]
                ]
                for name, among, source in wanted:
                    groups = rows_of(args, among, source, architecture)
                    if groups:
                        images = "" if source.startswith("full") else str(ipc)
                        shown = "own" if factor is None else f"{factor:g}"
                        more = gain(args, among, architecture) if source == "distilled" else ""
                        lines.append(line(f"{architecture} | {shown} | {images} | {name}", groups, more))
    return "\n".join(lines)


def cost(args: argparse.Namespace, runs: list[Run]) -> str:
    """Median seconds per stage and method, and the sum of everything."""
    lines = ["| method | factor | IPC | distillation, s | evaluation of its set, s |", "|---|---|---|---|---|"]
    for factor in args.factors:
        for ipc in args.ipc:
            for method in args.methods:
                spent = [seconds_of(args, r) for r in runs if (r.method, r.ipc, r.factor) == (method, ipc, factor)]
                spent = [s for s in spent if "distill" in s and "evaluate distilled" in s]
                if spent:
                    medians = [
                        f"{statistics.median(s[stage] for s in spent):.0f}"
                        for stage in ("distill", "evaluate distilled")
                    ]
                    shown = "own" if factor is None else f"{factor:g}"
                    lines.append(f"| {method} | {shown} | {ipc} | {' | '.join(medians)} |")
    whole = sum(sum(seconds_of(args, run).values()) for run in runs)
    lines += ["", f"All stages of these runs together: {whole / 3600:.1f} hours of one thread."]
    return "\n".join(lines)


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs, seed by seed, so that an interrupted comparison has whole seeds."""
    return [
        Run(method, ipc, factor, seed, tuple(b for b in args.baselines if b == "initial" or method == args.methods[0]))
        for seed in args.seeds
        for factor in args.factors
        for ipc in args.ipc
        for method in args.methods
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--others", default=None, help="the recipe of all methods but the first")
    parser.add_argument("--methods", nargs="+", default=["lad", "datm"])
    parser.add_argument("--ipc", nargs="+", type=int, default=None, help="default: the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--factors", nargs="+", type=float, default=[None], help="default: the recipe's own")
    parser.add_argument("--architectures", nargs="+", default=["convnet"])
    parser.add_argument("--baselines", nargs="*", default=["initial", "random-soft", "random", "full"])
    parser.add_argument("--set", action="append", default=[], help="passed on to every run")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/methods/JOB")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default=None, help="name of the results file; default: the job's")
    parser.add_argument("--report-only", action="store_true", help="the table of what is there; nothing is run")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    from lad_dist import recipe_file
    from lad_dist.catalog import find_job

    recipe = recipe_file.load(find_job(args.job).recipe)
    args.ipc = args.ipc or [recipe.ipc]
    args.out = args.out or Path("runs/methods") / recipe.name
    args.out.mkdir(parents=True, exist_ok=True)
    runs = plan(args)
    if not args.report_only:
        first = {run.factor: run for run in reversed(runs)}
        for factor in args.factors:
            execute(args, "experts", first[factor])
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda run: execute(args, "run", run), runs))
    expert_seconds = sum(seconds_of(args, run).get("experts", 0.0) for run in runs)
    experts = f"took {expert_seconds:.0f} s" if expert_seconds > 1 else "were in the buffer already"
    mine = {"--write", "--report-only", "--out", str(args.out)}  # what does not change the figures
    shown = " ".join([Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if a not in mine)])
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
