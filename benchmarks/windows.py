"""What several windows an iteration are worth: LAD on digits-LT with V windows, and with V times the iterations.

    python benchmarks/windows.py            # a quarter of an hour of one thread; interrupted, it goes on
    python benchmarks/windows.py --write    # and writes benchmarks/results/windows.md

Both take the same student steps. On V groups of ranks the first takes the time of one window, the second V times that. Measured
on the test set after the last iteration; nothing is chosen on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
from datetime import date
from pathlib import Path

from machine import cpu

from lad_dist import Profile, Recipe, Run, recipe_file
from lad_dist.api import Result
from lad_dist.catalog import find_job

JOB = "digits-lt-matching"
RESULTS = Path(__file__).parent / "results" / "windows.md"


def run(out: Path, windows: int, times: int, seed: int, given: list[str]) -> list[Result]:
    """Return the results of one run: the distilled set's networks and its starting set's."""
    known = recipe_file.load(find_job(JOB).recipe, given)
    doc = known.model_dump(mode="json")
    doc["distill"] |= {"windows": windows, "iterations": known.distill.iterations * times}
    doc["evaluate"]["baselines"] = ["initial"]
    doc["seed"] = seed
    folder = out / f"windows{windows}-times{times}-seed{seed}"
    one = Run.open(
        folder,
        Recipe.model_validate(doc),
        profile=Profile(threads=1, device="cpu", fleet="off"),
        buffers=out / "buffers",
        quiet=True,
    )
    one.train_experts()
    one.distill()
    return one.evaluate()


def overall(results: list[Result], source: str) -> tuple[float, float]:
    """Mean overall and tail accuracy in percent."""
    own = [r for r in results if r.source == source]
    return 100 * statistics.mean(r.overall for r in own), 100 * statistics.mean(r.tail for r in own)


def shown(values: list[float], difference: bool = False) -> str:
    """The mean ± the standard deviation; of a difference, with its sign, ± the standard error."""
    mean, sign = statistics.mean(values), "+" if difference else ""
    if len(values) < 2:
        return f"{mean:{sign}.1f}"
    spread = statistics.stdev(values) / (len(values) ** 0.5 if difference else 1)
    return f"{mean:{sign}.1f} ± {spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=4, help="windows, a power of two")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="passed on to every run")
    parser.add_argument("--out", type=Path, default=Path("runs/windows"))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    powers = [2**i for i in range(args.most.bit_length())]
    cases = [(1, 1), *((v, 1) for v in powers[1:]), *((1, v) for v in powers[1:])]
    lines = [
        "| windows an iteration | iterations | student steps | overall | tail | over its starting set "
        "| over one window, as many iterations |",
        "|---|---|---|---|---|---|---|",
    ]
    base = recipe_file.load(find_job(JOB).recipe, args.set).distill.iterations
    single: dict[int, list[float]] = {}
    for windows, times in sorted(cases, key=lambda case: case[0]):
        found = [run(args.out, windows, times, seed, args.set) for seed in args.seeds]
        sets, tails = zip(*(overall(results, "distilled") for results in found), strict=True)
        starts = [overall(results, "initial")[0] for results in found]
        if windows == 1:
            single[times] = list(sets)
        gains = [a - b for a, b in zip(sets, starts, strict=True)]
        against = [a - b for a, b in zip(sets, single[times], strict=True)]
        lines.append(
            f"| {windows} | {base * times} | x {windows * times} | {shown(list(sets))} | {shown(list(tails))} "
            f"| {shown(gains, True)} | {shown(against, True) if windows > 1 else ''} |"
        )
        print(lines[-1], flush=True)
    given = "".join(f" --set {value}" for value in args.set)
    text = (
        f"# Several windows an iteration\n\nMade by `python benchmarks/windows.py{given} --write`, {date.today().isoformat()}, "
        f"{cpu()}, one thread. {JOB} (LAD, IPC 2), {len(args.seeds)} distillation seeds of several networks,\n"
        "percent on the test set after the last iteration ± the standard deviation over seeds; of differences, the standard\n"
        "error of the paired seeds.\n\n" + "\n".join(lines) + "\n"
    )
    print(text)
    if args.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
