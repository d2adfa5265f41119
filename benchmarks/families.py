"""Images x labels: which images are worth distilling once a label is held equal, on one data set.

    python benchmarks/families.py cifar10-jpeg-lt-aligned --lad cifar10-jpeg-lt-laptop --set data.root=FOLDER --write
    python benchmarks/families.py digits-lt-aligned --lad digits-lt --ipc 1 2 5 --write

Images are random and herded real ones, the starting set, LAD's and aligned ones; labels are hard, one fixed soft label, stored
views, and a teacher that labels every batch. The teachers are the experts of JOB, a recipe of method aligned, for all images.
LAD's are made by the recipe --lad, with experts of its own, and imported into runs of JOB. So each network, of JOB's width, is
trained by the same protocol (evaluate.* of JOB), and measured on the test set after its last epoch; nothing is chosen on it.

Every run is an ordinary run folder under --out, so an interrupted comparison continues where it was; teachers and experts
are trained once per factor. --report-only makes the table of what is there; --write puts it into
benchmarks/results/families-JOB.md, or families-NAME.md with --table NAME.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from machine import cpu

from lad_dist.results.paired import paired, points, unlike

RESULTS = Path(__file__).parent / "results"
MACHINE = "machine.txt"  # in --out: when and where it was measured
FIGURES = ("overall", "head", "medium", "tail")
LABELS = ("hard", "fixed", "stored", "teacher")
# images -> source of each kind of labels; of LAD's run where they start with lad:
IMAGES: dict[str, dict[str, str]] = {
    "random real": {"hard": "random", "fixed": "random-soft", "stored": "random-stored", "teacher": "random-teacher"},
    "herded real": {
        "hard": "herding",
        "fixed": "herding-soft",
        "stored": "herding-stored",
        "teacher": "herding-teacher",
    },
    "best crops (aligned's start)": {
        "hard": "initial-hard",
        "fixed": "initial",
        "stored": "initial-stored",
        "teacher": "initial-teacher",
    },
    "aligned": {
        "hard": "distilled-hard",
        "fixed": "distilled",
        "stored": "distilled-stored",
        "teacher": "distilled-teacher",
    },
    "LAD": {
        "hard": "lad:distilled-hard",
        "fixed": "lad:distilled",
        "stored": "lad:distilled-stored",
        "teacher": "lad:distilled-teacher",
    },
    "aligned from LAD": {"fixed": "hybrid:distilled", "teacher": "hybrid:distilled-teacher"},
}


@dataclass(frozen=True)
class Cell:
    """One factor, IPC and seed. ``kind``: aligned, hybrid (aligned images that start from LAD's), lad, or theirs.

    A run of kind theirs evaluates the images of lad.
    """

    kind: str
    factor: float | None
    ipc: int
    seed: int

    @property
    def name(self) -> str:
        factor = "" if self.factor is None else f"-f{self.factor:g}"
        return f"{self.kind}{factor}-ipc{self.ipc}-seed{self.seed}"


def options(args: argparse.Namespace, cell: Cell) -> list[str]:
    """The options of a cell's run."""
    sets = [f"ipc={cell.ipc}", f"seed={cell.seed}"]
    sets += [] if cell.factor is None else [f"data.imbalance_factor={cell.factor:g}"]
    sets += args.set_lad if cell.kind == "lad" else args.set_aligned
    if cell.kind == "theirs":
        sets += [f"evaluate.teachers_from={args.out / replace(cell, kind='aligned').name}"]
    if cell.kind == "hybrid":
        sets += [f"distill.initial_from={args.out / replace(cell, kind='lad').name}"]
    sets += args.set
    job = args.lad if cell.kind == "lad" else args.job
    out = [
        "--out",
        str(args.out / cell.name),
        "--buffers",
        str(args.out / "buffers"),
        "--threads",
        "1",
        "--device",
        args.device,
    ]
    return [job, *out, *(part for s in (*sets, "evaluate.baselines=[]") for part in ("--set", s))]


def execute(args: argparse.Namespace, cell: Cell, verb: str, more: list[str]) -> None:
    """Run one command of a cell; its output goes to a log beside its folder."""
    words = [cell.name, verb, *(m for m in more if m[0] not in "-/")]
    log, began = args.out / f"{'-'.join(words)}.log", time.monotonic()
    given = options(args, cell) + (["--fleet", "off"] if verb == "experts" else [])
    with log.open("a") as file:
        code = subprocess.run(
            [sys.executable, "-m", "lad_dist.cli", verb, *given, *more],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        sys.exit(f"{cell.name}: {verb} ended with exit code {code}; see {log}")
    print(f"{log.stem}: {time.monotonic() - began:.0f} s", flush=True)


def kind_of(prefix: str) -> str:
    """The kind of the runs that measure a source of IMAGES."""
    return "theirs" if prefix == "lad" else prefix


def sources(args: argparse.Namespace, kind: str) -> list[str]:
    """The sources that runs of a kind measure, most wanted first."""
    found = []
    for labels in args.labels:
        for images in args.images:
            source = IMAGES[images].get(labels)
            prefix, colon, name = (source or "").rpartition(":")
            if source and kind_of(prefix if colon else "aligned") == kind:
                found.append(name)
    return found


def networks(args: argparse.Namespace, cell: Cell) -> list[list[str]]:
    """Options of ``evaluate`` for each source of a cell, most wanted first."""
    wanted = sources(args, cell.kind)
    found = [["--baseline", source] for source in (["teachers"] if cell.kind == "aligned" else []) + wanted]
    if args.architectures and cell.seed == args.seeds[0]:
        best = [s for s in ("distilled-teacher", "random-teacher") if s in wanted]
        found += [["--baseline", s, "--arch", ",".join(args.architectures), "--seeds", "1"] for s in best]
    return found


def rows_of(args: argparse.Namespace, cells: list[Cell], source: str, architecture: str) -> list[list[dict[str, Any]]]:
    """Per cell that has them, the rows of a source."""
    prefix, colon, name = source.rpartition(":")
    found = []
    for cell in cells:
        run = args.out / replace(cell, kind=kind_of(prefix if colon else "aligned")).name
        file = run / "evaluation" / "results.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        found.append([r for r in rows if r["source"] == name and r["architecture"] == architecture])
    return [rows for rows in found if rows]


def figures(groups: list[list[dict[str, Any]]]) -> str:
    """Overall with the deviation over seeds, and head/medium/tail."""
    means = {f: [statistics.mean(r[f] for r in rows) * 100 for rows in groups] for f in FIGURES}
    spread = f" ± {statistics.stdev(means['overall']):.1f}" if len(groups) > 1 else ""
    thirds = "/".join(f"{statistics.mean(means[f]):.0f}" for f in FIGURES[1:])
    return f"{statistics.mean(means['overall']):.1f}{spread} ({thirds})"


def kept(groups: list[list[dict[str, Any]]]) -> str:
    """Megabytes of images, labels and teachers."""
    keeps = groups[0][0]["keeps"]
    return " + ".join(f"{keeps[name] / 1e6:.2g}" for name in ("images", "labels", "teachers"))


def table(args: argparse.Namespace) -> str:
    """A row per factor, IPC, images and labels."""
    lines = [
        "| network | factor | IPC | images | labels | overall (head/medium/tail) | over random real, same labels "
        "| over herded real, same labels | MB kept: images + labels + teachers | s a network | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for architecture in ("convnet", *args.architectures):
        for factor in args.factors:
            for ipc in args.ipc:
                cells = [Cell("aligned", factor, ipc, seed) for seed in args.seeds]
                shown = "own" if factor is None else f"{factor:g}"
                if architecture == "convnet" and (groups := rows_of(args, cells, "teachers", args.network)):
                    lines.append(
                        f"| {args.network} | {shown} | | (the teachers themselves) | | {figures(groups)} | | | 0 + 0 + "
                        f"{groups[0][0]['keeps']['teachers'] / 1e6:.2g} | | {len(groups)} |"
                    )
                for labels in args.labels:
                    for images in args.images:
                        source = IMAGES[images].get(labels)
                        groups = rows_of(args, cells, source, architecture) if source else []
                        if groups:
                            seconds = statistics.median(r["seconds"] for rows in groups for r in rows)
                            lines.append(
                                f"| {architecture} | {shown} | {ipc} | {images} | {labels} | {figures(groups)} | "
                                f"{over('random real', args, cells, str(source), labels, architecture)} | "
                                f"{over('herded real', args, cells, str(source), labels, architecture)} | {kept(groups)} | "
                                f"{seconds:.0f} | {len(groups)} x {len(groups[0])} |"
                            )
    return "\n".join(lines)


def over(images: str, args: argparse.Namespace, cells: list[Cell], source: str, labels: str, architecture: str) -> str:
    """Paired difference to other images with the same labels; over seeds where there are several, else networks."""
    reference = IMAGES[images][labels]
    if source in (reference, IMAGES["random real"][labels]):
        return ""
    means, last = [], ""
    for cell in cells:
        first, second = (rows_of(args, [cell], s, architecture) for s in (source, reference))
        changed = unlike([*first[0], *second[0]]) if first and second else []
        if "labelled_by" in changed and source.startswith("lad:"):  # the same teachers, by evaluate.teachers_from
            changed.remove("labelled_by")
        if changed:
            sys.exit(
                f"{cell.name}: networks on {source} and {reference} were not trained alike: {', '.join(changed)} differ"
            )
        if first and second:
            name = source.rpartition(":")[2]
            found = paired(first[0], second[0], "overall", name, architecture, reference)
            if found is not None:
                means.append(100 * found.mean)
                last = points(found)
    if len(means) < 2:
        return last
    return f"{statistics.mean(means):+.1f} ± {statistics.stdev(means) / len(means) ** 0.5:.1f}"


def costs(args: argparse.Namespace) -> str:
    """Seconds of every stage but the networks', over the runs of the table."""
    lines = ["| run | stage | s |", "|---|---|---|"]
    kinds = ("aligned", "lad", "hybrid")
    cells = (Cell(k, f, i, s) for k in kinds for f in args.factors for i in args.ipc for s in args.seeds)
    for name in sorted(cell.name for cell in cells):
        file = args.out / name / "events.jsonl"
        if not file.exists():
            continue
        spent: dict[str, float] = {}
        for text in file.read_text().splitlines():
            event = json.loads(text)
            if event["kind"] in ("stage-finished", "stage-stopped") and event["stage"] in ("experts", "distill"):
                spent[event["stage"]] = spent.get(event["stage"], 0.0) + event["seconds"]
        lines += [
            f"| {file.parent.name} | {stage} | {seconds:.0f} |" for stage, seconds in spent.items() if seconds > 1
        ]
    return "\n".join(lines)


def gpu() -> str:
    """The GPU's name."""
    import torch

    return torch.cuda.get_device_name()


def work(args: argparse.Namespace, kinds: list[str]) -> None:
    """Teachers and experts, shared by all cells of a factor; then the sets; then the networks."""
    now = f"{date.today().isoformat()}, {cpu() if args.device == 'cpu' else gpu()}"
    file = args.out / MACHINE
    known = file.read_text().splitlines() if file.exists() else []
    file.write_text("\n".join(dict.fromkeys([*known, now])))

    def together(tasks: list[tuple[Cell, str, list[str]]]) -> None:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda task: execute(args, *task), tasks))

    trained = [k for k in kinds if k in ("aligned", "lad")]
    together([(Cell(k, f, args.ipc[0], args.seeds[0]), "experts", []) for f in args.factors for k in trained])
    cells = [Cell(k, f, ipc, seed) for seed in args.seeds for f in args.factors for ipc in args.ipc for k in kinds]
    for made in (trained, ["hybrid"]):  # hybrids start from the sets of LAD
        together([(cell, "distill", []) for cell in cells if cell.kind in made])
    for cell in cells:
        if cell.kind == "theirs" and not (args.out / cell.name / "distilled").exists():
            execute(args, cell, "import", [str(args.out / replace(cell, kind="lad").name), "--from", "set"])
    together([(cell, "evaluate", more) for cell in cells for more in networks(args, cell)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="a recipe of method aligned")
    parser.add_argument("--lad", required=True, help="the recipe of LAD's images")
    parser.add_argument("--images", nargs="+", choices=IMAGES, default=list(IMAGES))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--ipc", nargs="+", type=int, default=None, help="default: the recipe's own")
    parser.add_argument("--factors", nargs="+", type=float, default=[None], help="default: the recipe's own")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--architectures", nargs="*", default=[], help="further networks, on the best two sources")
    parser.add_argument("--set", action="append", default=[], help="passed on to every run")
    parser.add_argument("--set-aligned", action="append", default=[], help="passed on to runs of JOB")
    parser.add_argument("--set-lad", action="append", default=[], help="passed on to runs of --lad")
    parser.add_argument("--out", type=Path, default=None, help="default: runs/families/JOB")
    parser.add_argument("--workers", type=int, default=2, help="commands at a time, of one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--table", default=None, metavar="NAME", help="of --write: families-NAME.md; default: JOB")
    args = parser.parse_args()
    from lad_dist import recipe_file
    from lad_dist.catalog import find_job

    recipe = recipe_file.load(find_job(args.job).recipe)
    args.ipc, args.network = args.ipc or [recipe.ipc], recipe.model.network
    args.out = (args.out or Path("runs/families") / recipe.name).absolute()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = [k for k in ("aligned", "hybrid", "theirs") if sources(args, k)]
    kinds += ["lad"] if {"hybrid", "theirs"} & {*kinds} else []
    if not args.report_only:
        work(args, kinds)
    file = args.out / MACHINE
    machines = "; ".join(file.read_text().splitlines()) if file.exists() else "machine not recorded"
    mine = {"--write", "--report-only", "--out", str(args.out)}
    shown = shlex.join([Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if a not in mine)])
    text = (
        f"# {recipe.name}: images x labels\n\n{machines}, {args.workers} command{'s' * (args.workers > 1)} of one thread "
        f"at a time; command: `python benchmarks/{shown}`.\nPercent; mean over seeds (each the mean of its networks) ± the "
        "standard deviation over seeds; head, medium and tail\nare thirds of the classes by training count. Last epoch, test set. "
        f"Teachers and students are of {recipe.name} in all rows, LAD's images of {args.lad}."
        f"\n\n{table(args)}\n\n{costs(args)}\n"
    )
    print(text)
    if args.write:
        (RESULTS / f"families-{args.table or recipe.name}.md").write_text(text)


if __name__ == "__main__":
    main()
