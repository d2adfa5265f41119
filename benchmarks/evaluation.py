"""How the networks of several seeds are trained fastest: one by one, at once in one process, or spread over processes.

    python benchmarks/evaluation.py --write

Trains ConvNets on sets of random images by evaluate/train.py, with augmentation, in the sizes of the shipped jobs, and prints
seconds per network and epoch and their ratios. Ways: one by one; together (grouped convolutions, evaluate.together); spread (one
process of one thread per core, profile ranks). Every way is timed --repeats times in turn and the least counts, so that other
work on the machine weighs less; with one thread the processor's time is measured too, which other work hardly changes.
`--write` puts the table into benchmarks/results/evaluation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from machine import cpu

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "evaluation.md"
CLASSES, SEEDS = 10, 4
ALONE_1, TOGETHER_1 = "one by one, 1 thread", "together, 1 thread"


@dataclass(frozen=True)
class Case:
    """The size of a job's evaluation: S images of C channels and H pixels a side, in batches of 128."""

    name: str
    images: int
    channels: int
    size: int
    width: int
    depth: int
    epochs: int


CASES = (
    Case("width 4, depth 2, 1x8x8, 20 images", 20, 1, 8, 4, 2, 40),
    Case("digits-lt: width 32, depth 2, 1x8x8, 20 images", 20, 1, 8, 32, 2, 20),
    Case("digits, IPC 10: width 32, depth 2, 1x8x8, 100 images", 100, 1, 8, 32, 2, 8),
    Case("fashion-mnist-lt: width 32, depth 3, 1x28x28, 100 images", 100, 1, 28, 32, 3, 2),
    Case("cifar10, narrow: width 64, depth 3, 3x32x32, 100 images", 100, 3, 32, 64, 3, 1),
    Case("cifar10: width 128, depth 3, 3x32x32, 100 images", 100, 3, 32, 128, 3, 1),
)


def measure(case: Case, way: str, threads: int, seeds: list[int], device: str) -> tuple[float, float]:
    """(seconds, processor seconds) of training the networks of ``seeds`` once, after one epoch to warm up."""
    import torch

    from lad_dist.allocator import keep_freed_memory
    from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train, train_together
    from lad_dist.models.convnet import build
    from lad_dist.recipe import AugmentConfig

    torch.set_num_threads(threads)
    if device == "cpu":
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(case.images, case.channels, case.size, case.size, generator=generator).to(device)
    p_SK = torch.randn(case.images, CLASSES, generator=generator).softmax(1).to(device)
    images = TrainingSet(rows_of(pixels, p_SK), case.images)

    def once(epochs: int) -> tuple[float, float]:
        nets = [
            build(case.channels, case.size, CLASSES, case.width, case.depth, seed=s, purpose=("benchmark",)).to(device)
            for s in seeds
        ]
        settings = Settings(epochs, 128, 0.01, 0.9, 5e-4, 0.1, AugmentConfig())
        counters: list[tuple[int | str, ...]] = [("benchmark", s) for s in seeds]
        began, used = time.perf_counter(), time.process_time()
        if way == "together":
            train_together(nets, [images] * len(nets), settings, 0, counters, lambda: None)
        else:
            for net, c in zip(nets, counters, strict=True):
                train(net, images, settings, 0, c, lambda: None)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - used

    once(1)
    return once(case.epochs)


def worker(args: argparse.Namespace) -> None:
    """One process: waits for a line, trains, prints its seconds, and so on until the input ends."""
    for line in sys.stdin:
        index, way, threads, seeds = json.loads(line)
        print(json.dumps(measure(CASES[index], way, threads, seeds, args.device)), flush=True)


def timings(args: argparse.Namespace, index: int, pool: list[subprocess.Popen[str]]) -> dict[str, float]:
    """Seconds per network and epoch of every way; the least of the repeats."""
    cores, every = len(pool), list(range(SEEDS))
    ways = {ALONE_1: ("alone", 1, [every]), TOGETHER_1: ("together", 1, [every])}
    if args.device == "cpu" and cores > 1:
        ways[f"one by one, {cores} threads"] = ("alone", cores, [every])
        ways[f"spread over {cores} processes"] = ("alone", 1, [every[i::cores] for i in range(cores)])
    found: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for name, (way, threads, shares) in ways.items():
            for process, share in zip(pool, shares, strict=False):
                assert process.stdin is not None
                process.stdin.write(json.dumps([index, way, threads, share]) + "\n")
                process.stdin.flush()
            spent = [
                json.loads(p.stdout.readline()) for p, _ in zip(pool, shares, strict=False) if p.stdout is not None
            ]
            each = SEEDS * CASES[index].epochs
            found.setdefault(name, []).append(max(wall for wall, _ in spent) / each)
            if name in (ALONE_1, TOGETHER_1) and args.device == "cpu":
                found.setdefault(f"{name}: processor", []).append(spent[0][1] / each)
    return {name: min(several) for name, several in found.items()}


def table(measured: dict[str, dict[str, float]]) -> str:
    """Milliseconds per network and epoch, and how many times as fast as one by one."""
    ways = list(next(iter(measured.values())))
    lines = ["| case | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for case, found in measured.items():
        cells = []
        for way in ways:
            base = f"{ALONE_1}: processor" if way.endswith("processor") else ALONE_1
            cells.append(f"{1e3 * found[way]:.1f} ms ({found[base] / found[way]:.2f})")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), help="by number, from 0")
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    import torch

    cores = os.cpu_count() or 1 if args.device == "cpu" else 1
    command = [sys.executable, __file__, "--worker", "--device", args.device]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pool = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(cores)
    ]
    measured, load = {}, []
    try:
        for index in args.cases:
            measured[CASES[index].name] = timings(args, index, pool)
            load.append(os.getloadavg()[0])
            print(CASES[index].name, measured[CASES[index].name], flush=True)
    finally:
        for process in pool:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
    where = cpu() if args.device == "cpu" else torch.cuda.get_device_name(0)
    text = (
        f"# Evaluation: {SEEDS} networks one by one, at once, and over processes\n\n{date.today().isoformat()}, {where}, torch "
        f"{torch.__version__}; `python benchmarks/evaluation.py --repeats {args.repeats} --device {args.device}`. Milliseconds per "
        f"network and epoch, the least of {args.repeats}; in brackets how many times as fast as one by one with one thread. "
        f"The machine's load was {statistics.mean(load):.1f} on average.\n\n{table(measured)}\n"
    )
    print(text)
    if args.json:
        args.json.write_text(json.dumps(measured))
    if args.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
