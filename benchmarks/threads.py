"""A student step with one thread and with several, alone and beside busy processes: ``python benchmarks/threads.py [--write]``.

OpenMP's threads spin while they wait for each other (its default), or sleep (OMP_WAIT_POLICY=passive, which the command line of
lad-dist sets). Each figure is the mean over some seconds in a process of its own, so interruptions by other processes count.
``--write`` puts the table into results/threads.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
# name -> (kind of step, images, (channels, side, classes, width, depth))
STEPS = {
    "digits, width 32, 50 images": ("representation/keep", 50, (1, 8, 10, 32, 2)),
    "3x32x32, width 32, 100 images": ("representation/keep", 100, (3, 32, 10, 32, 3)),
    "digits, evaluation, 20 images": ("evaluate/train", 20, (1, 8, 10, 32, 2)),
}
WAITING = {"spinning": "active", "asleep": "passive"}


def measure(name: str, threads: int, seconds: float) -> float:
    """Mean seconds of a call in this process."""
    import torch

    from lad_dist import allocator
    from lad_dist.plan.calibration import Steps
    from lad_dist.plan.shapes import Shapes
    from lad_dist.recipe import Recipe

    torch.set_num_threads(threads)
    allocator.keep_freed_memory()
    kind, images, shape = STEPS[name]
    job = Steps(Recipe(), Shapes(*shape), torch.device("cpu")).of(kind)(images)
    job()
    began, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - began < seconds:
        job()
        calls += 1
    return (time.perf_counter() - began) / calls


def in_a_process(name: str, threads: int, waiting: str, seconds: float) -> float:
    """``measure`` in a process whose threads wait so."""
    environment = {**os.environ, "OMP_WAIT_POLICY": WAITING[waiting], "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    words = [sys.executable, __file__, "--one", name, str(threads), "--seconds", str(seconds)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """``count`` other processes that each keep a core busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def table(seconds: float, load: float) -> str:
    """Milliseconds of a call as a Markdown table."""
    from lad_dist.cores import obtained

    cores = len(os.sched_getaffinity(0))
    columns = [(1, "asleep"), (cores, "spinning"), (cores, "asleep")]
    lines = [
        "# Threads that wait for each other, beside busy processes",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {cores} cores, load {load:.1f} before: `python benchmarks/threads.py`. "
        "Milliseconds of a call (a student's calls are two steps), mean.",
        "",
        "| step | busy processes | cores free | "
        + " | ".join(f"{t} thread{'s' * (t > 1)}, {w}" for t, w in columns)
        + " |",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name in STEPS:
        for count in (0, 1, cores):
            with neighbours(count):
                free = obtained(cores)
                found = [in_a_process(name, threads, waiting, seconds) * 1e3 for threads, waiting in columns]
            lines.append(f"| {name} | {count} | {free:.1f} | " + " | ".join(f"{ms:.3g}" for ms in found) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("STEP", "THREADS"))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.seconds)))
        return
    text = table(args.seconds, os.getloadavg()[0])
    print(text)
    if args.write:
        (ROOT / "benchmarks" / "results" / "threads.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
