"""What ranks gain: time of an iteration on one rank and on several, collectives, DDP's buckets; and the model of it.

    python benchmarks/ranks.py                      # measure: 2 ranks, 1 thread each, gloo
    python benchmarks/ranks.py --device cuda        # measure: NCCL over the GPUs at hand
    python benchmarks/ranks.py --write              # measure, write benchmarks/results/ranks.{json,md}, refresh docs/scaling.md
    python benchmarks/ranks.py --model [--write]    # no measuring: the tables of docs/scaling.md from what was measured

An iteration is both phases of the student on synthetic weights and images, with augmentation. The ranks of one launch take
turns: rank 0 alone on the whole set while the others wait (``alone``); every rank on its share without a word to the others
(``apart``); all ranks together (``together``). So a machine whose speed drifts slows all three alike. Medians over --repeats.
Parallel efficiency is alone / (ranks x together).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machine import processor

from lad_dist import allocator, recipe_file
from lad_dist import ranks as ranks_module
from lad_dist.data import augment
from lad_dist.distill.shards import Share
from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
from lad_dist.models.convnet import build, flat_parameters
from lad_dist.plan import estimate
from lad_dist.plan.dataset_info import published
from lad_dist.plan.memory import Batches
from lad_dist.plan.scaling import RANK_COUNTS, Link, Network, Scaling, advice, phases_of, scaling, several_of
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.speed import CARDS, LINKS, gpu_step
from lad_dist.ranks import ALONE, ProcessRank, Ranks, groups_of
from lad_dist.recipe import AugmentConfig
from lad_dist.seeds import rng

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "scaling.md"
PATHS = ("keep", "recompute")
SIZES = (2**10, 2**14, 2**17, 2**19, 2**20, 2**22)  # bytes of a sum
BUCKETS_MB = (0.1, 0.25, 0.5, 1.0, 25.0)
BUCKET_WIDTHS = (64, 128)
PREDICTED = ("cifar10-lt-f100-ipc50", "imagenet-lt-f256-ipc10")
FEW_IMAGES = "cifar10-lt-f100-ipc10"  # where more ranks stop helping first
CARD = "a100"


class Problem:
    """Random weights, images and labels of the sizes asked for, and the phases on this rank's share of them."""

    def __init__(self, ranks: Ranks, device: torch.device, s: argparse.Namespace, world: int | None = None) -> None:
        """``world`` overrides how many ranks the set is split over; the collectives stay those of ``ranks``."""
        channels, size, _ = (int(n) for n in s.shape.split("x"))
        total, batch = s.classes * s.ipc, min(s.batch, s.classes * s.ipc)
        generator = torch.Generator().manual_seed(0)
        share = Share.of(total, Ranks(ranks.rank, world or ranks.world))
        images = torch.randn(total, channels, size, size, generator=generator)[share.rows]
        labels = torch.randn(total, s.classes, generator=generator)[share.rows]
        self.synthetic = SyntheticSet(images.to(device), labels.to(device), torch.tensor(0.01, device=device))
        module = build(channels, size, s.classes, s.width, s.depth, seed=0, purpose=("benchmark",)).to(device)
        self.student = Student(module, ranks)
        layout, start = self.student.layout, flat_parameters(module)
        target, tail = start + 0.01, start.clone()
        tail[layout.span("classifier")] += 0.01
        weights = torch.linspace(2, 0.1, s.classes, device=device)
        batches = [self._batch(share, total, batch, size, step, device) for step in range(s.steps)]
        self.phases = (
            Phase(start, target, batches, layout.span("backbone"), weights),
            Phase(start, tail, batches, layout.span("all"), classifier_only=True),
        )

    @staticmethod
    def _batch(share: Share, total: int, batch: int, size: int, step: int, device: torch.device) -> Batch:
        rows = rng(0, "rows", step).permutation(total)[:batch]
        own, drawn, _ = share.part(rows, augment.draw(rng(0, "augment", step), AugmentConfig(), len(rows), size))
        return Batch(torch.from_numpy(own).to(device), drawn, len(rows))

    def iterate(self, path: str) -> None:
        """Both phases of one iteration."""
        for phase in self.phases:
            self.student.run(self.synthetic, phase, path)  # type: ignore[arg-type]


def measure_on_rank(out: str, settings: dict[str, Any]) -> None:
    """What every process runs; rank 0 writes ``out``."""
    s = argparse.Namespace(**settings)
    where = ranks_module.place() or ProcessRank(0, 1, 0)
    device = torch.device("cpu") if s.device == "cpu" else torch.device("cuda", where.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        allocator.keep_freed_memory()
    torch.set_num_threads(s.threads)
    if where.world == 1:
        raise SystemExit("benchmarks/ranks.py: one rank has nobody to share with; at least 2 are needed")
    with ranks_module.joined(where, device) as ranks:
        found = {
            "iterations": {path: iterations(ranks, device, s, path) for path in PATHS},
            "sums": {str(count): sums(ranks, device, count) for count in s.sums},
            "buckets": {str(width): buckets(ranks, device, s, width) for width in s.bucket_widths},
        }
    if ranks.first:
        Path(out).write_text(json.dumps(found))


def iterations(ranks: Ranks, device: torch.device, s: argparse.Namespace, path: str) -> dict[str, float]:
    """Seconds of one iteration: on one rank alone, on every rank's share apart, and together."""
    alone = Problem(ALONE, device, s)
    apart, together = (
        Problem(dataclasses.replace(ALONE, rank=ranks.rank), device, s, ranks.world),
        Problem(ranks, device, s),
    )
    modes: dict[str, Callable[[], None]] = {
        "alone": lambda: alone.iterate(path) if ranks.first else None,
        "share_alone": lambda: apart.iterate(path) if ranks.first else None,
        "apart": lambda: apart.iterate(path),
        "together": lambda: together.iterate(path),
    }
    taken: dict[str, list[float]] = {mode: [] for mode in modes}
    for repeat in range(s.repeats + 1):
        for mode, job in modes.items():
            seconds = timed(ranks, device, job)
            if repeat:  # the first round warms up
                taken[mode].append(seconds)
    return {mode: statistics.median(seconds) for mode, seconds in taken.items()}


def timed(ranks: Ranks, device: torch.device, job: Callable[[], object]) -> float:
    """Seconds of ``job`` on the rank that takes longest; all begin at the same time."""
    ranks.gather(None)
    began = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(ranks.gather(time.perf_counter() - began))


def sums(ranks: Ranks, device: torch.device, count: int) -> float:
    """Median seconds of the sum of ``count`` bytes."""
    tensor = torch.ones(count // 4, device=device)
    taken = []
    for repeat in range(60):
        seconds = timed_call(device, lambda: ranks.total(tensor))
        tensor.fill_(1)
        if repeat >= 10:
            taken.append(seconds)
    return statistics.median(taken)


def timed_call(device: torch.device, job: Callable[[], object]) -> float:
    """Seconds of ``job`` on this rank."""
    began = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def buckets(ranks: Ranks, device: torch.device, s: argparse.Namespace, width: int) -> dict[str, float]:
    """Median seconds of one forward and backward pass on a share, with its gradients summed: by DDP with buckets of some
    sizes (MB, also of the first), and by one sum of the flat gradient afterwards."""
    from torch.nn.parallel import DistributedDataParallel

    channels, size, _ = (int(n) for n in s.shape.split("x"))
    images = torch.randn(max(1, s.batch // ranks.world), channels, size, size, device=device)

    def network() -> torch.nn.Module:
        return build(channels, size, s.classes, width, s.depth, seed=0, purpose=("benchmark",)).to(device)

    plain = network()

    def flat() -> None:
        plain.zero_grad()
        plain(images).square().sum().backward()
        ranks.total(torch.cat([p.grad.reshape(-1) for p in plain.parameters() if p.grad is not None]))

    def reduced(wrapped: torch.nn.Module) -> Callable[[], None]:
        def job() -> None:
            wrapped.zero_grad()
            wrapped(images).square().sum().backward()

        return job

    jobs: dict[str, Callable[[], None]] = {"one sum afterwards": flat}
    for cap in BUCKETS_MB:
        wrapped = DistributedDataParallel(network(), gradient_as_bucket_view=True, bucket_cap_mb=cap)  # type: ignore[arg-type]
        jobs[f"{cap:g} MB"] = reduced(wrapped)
    jobs["as torch has it"] = reduced(DistributedDataParallel(network(), gradient_as_bucket_view=True))
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(2 * s.repeats + 2):
        for name, job in jobs.items():
            seconds = timed(ranks, device, job)
            if repeat >= 2:  # DDP rebuilds its buckets after the first backward pass
                taken[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


# --- the model beside it ----------------------------------------------------------------------------------------------


def fitted_link(results: dict[str, Any]) -> Link:
    """Latency from the smallest sum that was measured, bandwidth from the largest."""
    world, found = results["settings"]["world"], {int(k): v for k, v in results["sums"].items()}
    small, large = min(found), max(found)
    sent = 2 * (world - 1) / world * (large - small)
    bandwidth = sent / max(found[large] - found[small], 1e-9)
    return Link("measured", bandwidth, found[small], 0.0, "benchmarks/results/ranks.json")


def shapes_of(settings: dict[str, Any]) -> Shapes:
    channels, size, _ = (int(n) for n in settings["shape"].split("x"))
    return Shapes(channels, size, settings["classes"], settings["width"], settings["depth"])


def modelled(results: dict[str, Any], path: str) -> tuple[float, float]:
    """(seconds of an iteration on all ranks, seconds of its sums) by the cost model from the shares' own time."""
    settings, shapes = results["settings"], shapes_of(results["settings"])
    world, link = settings["world"], fitted_link(results)
    network = Network(link, link, world)
    first = network.allreduce(4 * shapes.parameters, world) * (2 if path == "recompute" else 1)
    waiting = settings["steps"] * (first + network.allreduce(4 * shapes.classifier, world))
    return results["iterations"][path]["apart"] + waiting, waiting


def efficiency(results: dict[str, Any], path: str) -> float:
    """alone / (ranks x together)."""
    found = results["iterations"][path]
    return float(found["alone"] / (results["settings"]["world"] * found["together"]))


def measured_table(results: dict[str, Any]) -> str:
    """The model against what was measured, as Markdown."""
    world = results["settings"]["world"]
    lines = [
        f"| path | 1 rank | a share, alone | a share, {world} at a time | sums (model) | {world} ranks (model) | {world} ranks "
        "(measured) | model / measured | efficiency |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in PATHS:
        found, (model, waiting) = results["iterations"][path], modelled(results, path)
        cells = (found["alone"], found["share_alone"], found["apart"], waiting, model, found["together"])
        times = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in cells)
        lines.append(f"| {path} | {times} | {model / found['together']:.2f} | {efficiency(results, path):.2f} |")
    return "\n".join(lines)


def sums_table(results: dict[str, Any]) -> str:
    """Sums of several sizes, measured and by the model fitted to the smallest and the largest."""
    link, world = fitted_link(results), results["settings"]["world"]
    network = Network(link, link, world)
    lines = ["| bytes | measured | model |", "|---|---|---|"]
    for count, seconds in results["sums"].items():
        lines.append(
            f"| {int(count):,} | {1e3 * seconds:.3f} ms | {1e3 * network.allreduce(int(count), world):.3f} ms |"
        )
    return "\n".join(lines)


def buckets_table(results: dict[str, Any]) -> str:
    """A forward and backward pass with its gradients summed, by bucket size."""
    widths = list(results["buckets"])
    lines = ["| buckets | " + " | ".join(f"width {w}" for w in widths) + " |", "|---" * (1 + len(widths)) + "|"]
    for name in results["buckets"][widths[0]]:
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * results['buckets'][w][name]:.1f} ms" for w in widths) + " |")
    return "\n".join(lines)


NETWORKS = {
    "NVLink": Network(LINKS["nvlink"], LINKS["nvlink"], 64),
    "Ethernet, 8 GPUs a host": Network(LINKS["nvlink"], LINKS["ethernet"], 8),
    "Ethernet, 1 GPU a host": Network(LINKS["ethernet"], LINKS["ethernet"], 1),
}


def predicted(job: str, network: Network, windows: int = 1, worlds: Sequence[int] = RANK_COUNTS) -> tuple[Scaling, ...]:
    """An iteration of a shipped recipe on 1 to 64 GPUs of ``CARD``, from what is published about its data."""
    recipe = recipe_file.load(ROOT / "jobs" / f"{job}.yaml", [f"distill.windows={windows}"])
    facts = published(recipe.data)
    assert facts is not None
    shapes, total = estimate.shapes_of(recipe, facts), facts.classes * recipe.ipc
    free = int(CARDS[CARD].memory * 0.95)

    def phases(world: int) -> Any:
        path, _ = estimate.choose_path(recipe, shapes, free, Batches.of(recipe, shapes, world))
        return phases_of(recipe, shapes, path, lambda kind: gpu_step(kind, shapes, CARDS[CARD]))

    return scaling(phases, total, recipe.distill.batch, worlds, network, several_of(recipe, shapes))


def predicted_table(job: str) -> str:
    """Predictions of one recipe, and where more ranks stop helping, as Markdown."""
    rows = {name: predicted(job, network) for name, network in NETWORKS.items()}
    first = next(iter(rows.values()))
    lines = [f"| GPUs | images a step | path | {' | '.join(NETWORKS)} |", "|---" * (3 + len(rows)) + "|"]
    for i, row in enumerate(first):
        cells = (f"{r[i].seconds:.3g} s ({r[i].efficiency:.0%})" for r in rows.values())
        lines.append(f"| {row.world} | {row.share:.3g} | {row.path} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {advice(r, r[-1].world)}." for name, r in rows.items())]
    return "\n".join(lines)


def windows_table() -> str:
    """Several windows at a time on groups of ranks, for the smallest shipped set of CIFAR-10-LT, as Markdown."""
    lines = [
        f"| GPUs | windows an iteration | groups x GPUs | images a step | {' | '.join(NETWORKS)} |",
        "|---" * (4 + len(NETWORKS)) + "|",
    ]
    for world in (8, 64):
        for windows in (1, 4, 8, 16, 64):
            rows = [predicted(FEW_IMAGES, network, windows, (world,))[0] for network in NETWORKS.values()]
            groups = groups_of(windows, world)
            cells = " | ".join(f"{r.seconds:.3g} s ({r.efficiency:.0%})" for r in rows)
            lines.append(f"| {world} | {windows} | {groups} x {world // groups} | {rows[0].share:.3g} | {cells} |")
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """The generated parts of docs/scaling.md, by name."""
    results = json.loads((RESULTS / "ranks.json").read_text())
    made = {"measured": f"{heading(results)}\n\n{measured_table(results)}", "sums": sums_table(results)}
    made["buckets"] = buckets_table(results)
    return made | {job: predicted_table(job) for job in PREDICTED} | {"windows": windows_table()}


def refreshed(page: str, made: dict[str, str]) -> str:
    """``page`` with every block between ``<!-- NAME -->`` and ``<!-- end NAME -->`` replaced by what is ``made``."""
    for name, text in made.items():
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        assert begin and end, f"{PAGE}: has no block {name}"
        page = f"{before}{begin}{text}\n{end}{after}"
    return page


def heading(results: dict[str, Any]) -> str:
    """Where, when and how it was measured."""
    s = results["settings"]
    images = s["classes"] * s["ipc"]
    return (
        f"{results['date']}, {results['machine']}, {results['versions']}: `{results['command']}`. {s['world']} ranks, "
        f"{s['threads']} thread each; width {s['width']}, {s['shape']}, {images} images, batch {s['batch']}, {s['steps']} "
        f"student steps a phase; medians of {s['repeats']}."
    )


def report(results: dict[str, Any]) -> str:
    """benchmarks/results/ranks.md."""
    return "\n\n".join([
        "# Ranks\n\nMade by `python benchmarks/ranks.py --write`; what it means is in docs/scaling.md.",
        heading(results),
        "## An iteration\n\n" + measured_table(results),
        "## Sums\n\n" + sums_table(results),
        "## One forward and backward pass with summed gradients\n\n" + buckets_table(results),
    ]) + "\n"  # fmt: skip


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured, with where and how."""
    keys = ("width", "depth", "shape", "classes", "ipc", "batch", "steps", "repeats", "world", "threads", "device")
    settings = {key: getattr(args, key) for key in keys} | {"sums": SIZES, "bucket_widths": BUCKET_WIDTHS}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        ranks_module.launch(args.world, measure_on_rank, (str(out), settings), restarts=0, say=print)
        found = json.loads(out.read_text())
    cuda = args.device == "cuda"
    return {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name() if cuda else f"{processor()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, {'NCCL' if cuda else 'gloo'}",
        "command": " ".join(["python benchmarks/ranks.py", *sys.argv[1:]]),
        "settings": settings,
        **found,
    }


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--shape", default="3x32x32")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100, help="synthetic images per student step")
    parser.add_argument("--steps", type=int, default=3, help="student steps of each phase")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--world", type=int, help="ranks; default: the GPUs at hand, else 2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each rank")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    parser.add_argument("--model", action="store_true", help="measure nothing; the tables of docs/scaling.md")
    parser.add_argument("--write", action="store_true", help="write the results and refresh docs/scaling.md")
    args = parser.parse_args(given)
    args.world = args.world or (max(torch.cuda.device_count(), 1) if args.device == "cuda" else 2)
    if args.world < 2 and not args.model:
        parser.error(
            f"--world {args.world}: one rank has nobody to share with; valid: 2 or more (GPUs, with --device cuda)"
        )
    return args


def main() -> None:
    args = arguments()
    if not args.model:
        results = measure(args)
        print(json.dumps(results, indent=1) if args.json else report(results))
        if args.write:
            (RESULTS / "ranks.json").write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "ranks.md").write_text(report(results))
    if args.model:
        for name, text in blocks().items():
            print(f"{name}\n\n{text}\n")
    if args.write:
        PAGE.write_text(refreshed(PAGE.read_text(), blocks()))


if __name__ == "__main__":
    main()
