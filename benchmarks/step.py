"""Seconds per student step and per GSAM step, beside the textbook loop, in one run on this machine.

    python benchmarks/step.py --width 128 --shape 3x32x32 --classes 10 --batch 100 --steps 4 [--device cuda] [--json]

Rows: each phase by the textbook loop (two passes over the steps, each with the graph of the gradient) and by lad_dist's paths;
a GSAM step of each expert stage, beside a plain loop. On a GPU also CUDA graphs ("captured"), and lad_dist's paths without Triton's
kernels ("torch's block"). The plain loops run as a script runs them, in a process of its own with
torch's own operations and the C library's memory as it comes; lad_dist's rows in another, with memory kept (allocator.py). "memory
kept" rows are the plain loops in that process too: what is left of the gain without the memory's. Medians over --repeats;
all rows take turns, so a machine whose speed drifts slows all alike. Floor: see floor.py. Peak memory is the resident
high-water mark of a fresh process per row (--no-memory skips it), or the GPU's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import processor
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import floor

from lad_dist import allocator
from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet, soft_cross_entropy
from lad_dist.experts.gsam import gsam_gradient
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models import functional
from lad_dist.models.captured import Captured
from lad_dist.models.convnet import ConvNet, build, flat_parameters
from lad_dist.progress import peak_memory_bytes

KEEPING = ", memory kept"
SCRIPT = ("representation/textbook", "classifier/textbook", "gsam/plain loop", "gsam/plain loop of the classifier")
ROWS = (
    "representation/textbook",
    f"representation/textbook{KEEPING}",
    "representation/keep",
    "representation/recompute",
    "classifier/textbook",
    f"classifier/textbook{KEEPING}",
    "classifier/keep",
    "classifier/recompute",
    "gsam/plain loop",
    f"gsam/plain loop{KEEPING}",
    "gsam/representation",
    "gsam/plain loop of the classifier",
    "gsam/classifier",
)
TORCH = ", torch's block"
GPU_ROWS = (
    "representation/captured",
    f"representation/keep{TORCH}",
    f"representation/captured{TORCH}",
    "classifier/captured",
    f"classifier/keep{TORCH}",
    f"classifier/captured{TORCH}",
    "gsam/captured",
    "gsam/captured classifier",
)


def base_of(row: str) -> str:
    """The row that ``row`` is compared with."""
    if row.startswith("gsam"):
        return SCRIPT[3] if "classifier" in row else SCRIPT[2]
    return f"{row.split('/')[0]}/textbook"


def rows_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What is measured on this device; freed memory is kept on CPUs only."""
    if args.device == "cpu":
        return ROWS
    return tuple(row for row in (*ROWS, *GPU_ROWS) if KEEPING not in row)


def square(args: argparse.Namespace) -> tuple[int, int]:
    """Channels and side of the images."""
    channels, height, width = (int(n) for n in args.shape.split("x"))
    if height != width:
        sys.exit(f"--shape {args.shape}: images must be square, as in 3x32x32")
    return channels, height


class Problem:
    """Random images, labels and weights of the sizes asked for; both phases' windows."""

    def __init__(self, args: argparse.Namespace) -> None:
        channels, height = square(args)
        torch.manual_seed(0)
        self.device, self.args = torch.device(args.device), args
        module = build(channels, height, args.classes, args.width, args.depth, seed=0, purpose=("benchmark",)).to(
            self.device
        )
        self.student, self.module = Student(module), module
        self.plain = ConvNet(channels, height, args.classes, args.width, args.depth, fused=False).to(self.device)
        self.unfused = Student(self.plain)
        start = flat_parameters(module)
        self.synthetic = SyntheticSet(
            torch.randn(args.batch, channels, height, height, device=self.device),
            torch.randn(args.batch, args.classes, device=self.device),
            torch.tensor(0.01, device=self.device),
        )
        batches = [Batch(torch.randperm(args.batch, device=self.device)) for _ in range(args.steps)]
        layout = self.student.layout
        target, tail = start + 0.01 * torch.randn_like(start), start.clone()
        tail[layout.span("classifier")] += 0.01
        weights = torch.linspace(2, 0.1, args.classes, device=self.device)
        self.phases = {
            "representation": Phase(start, target, batches, layout.span("backbone"), weights),
            "classifier": Phase(start, tail, batches, layout.span("all"), classifier_only=True),
        }
        self.images = torch.randn(args.expert_batch, channels, height, height, device=self.device)
        self.labels = torch.randint(0, args.classes, (args.expert_batch,), device=self.device)
        self.start = start

    def textbook(self, phase: Phase) -> tuple[Tensor, Tensor]:
        """(pixel gradient, label gradient) by the double loop: pass one for G, pass two for v . g_i, both with graphs."""
        s, layout = self.synthetic, self.student.layout
        trained = layout.span("classifier" if phase.classifier_only else "all")

        def steps(direction: Tensor | None, image_grad: Tensor, label_grad: Tensor) -> Tensor:
            theta, total = phase.start_P, torch.zeros_like(phase.start_P)
            for batch in phase.batches:
                images = s.images_SCHH[batch.rows_B].requires_grad_()
                labels = s.logits_SK[batch.rows_B].requires_grad_()
                part = theta[trained].detach().requires_grad_()
                whole = torch.cat([theta[: trained.start].detach(), part])
                logits = functional.logits(self.plain, layout.views(whole), images)
                loss = soft_cross_entropy(logits, labels, phase.class_weights_K)
                (gradient,) = torch.autograd.grad(loss, part, create_graph=True)
                if direction is not None:
                    pixel, label = torch.autograd.grad(gradient @ direction[trained], [images, labels])
                    image_grad.index_add_(0, batch.rows_B, pixel)
                    label_grad.index_add_(0, batch.rows_B, label)
                step = torch.zeros_like(total)
                step[trained] = gradient.detach()
                total, theta = total + step, theta - s.alpha * step
            return total

        image_grad, label_grad = torch.zeros_like(s.images_SCHH), torch.zeros_like(s.logits_SK)
        from lad_dist.distill.matching import match

        total = steps(None, image_grad, label_grad)
        matched = match(phase.start_P, phase.target_P, total, s.alpha, phase.span)
        steps(matched.direction_P, image_grad, label_grad)
        return image_grad, label_grad

    def jobs(self) -> dict[str, Callable[[], object]]:
        """What is timed, by name, and (for the student's) how many steps one call takes."""
        out: dict[str, Callable[[], object]] = {}
        for name, phase in self.phases.items():
            out[f"{name}/textbook"] = lambda phase=phase: self.textbook(phase)
            for path in ("keep", "recompute"):
                out[f"{name}/{path}"] = lambda phase=phase, path=path: self.student.run(self.synthetic, phase, path)
            if self.device.type == "cuda":
                for path, block, student in (
                    ("captured", "", self.student),
                    ("keep", TORCH, self.unfused),
                    ("captured", TORCH, self.unfused),
                ):
                    out[f"{name}/{path}{block}"] = lambda phase=phase, path=path, student=student: student.run(
                        self.synthetic, phase, path
                    )
        out["gsam/representation"] = lambda: self.gsam(self.start)
        if self.device.type == "cuda":
            captured = Captured("steps")
            out["gsam/captured"] = lambda: captured(self.gsam, self.start)
            out["gsam/captured classifier"] = lambda: captured(self.gsam_classifier, self.start)
        out["gsam/plain loop"] = self.plain_gsam
        out["gsam/plain loop of the classifier"] = lambda: self.plain_gsam(frozen=True)
        out["gsam/classifier"] = lambda: self.gsam_classifier(self.start)
        return out

    def gsam(self, weights_P: Tensor) -> tuple[Tensor, ...]:
        """A GSAM step of the representation stage."""
        step = gsam_gradient(
            network_loss(self.module, self.student.layout, self.images, self.labels), weights_P, 0.01, 0.3
        )
        return step.gradient_P, step.loss, step.logits_BK

    def gsam_classifier(self, weights_P: Tensor) -> tuple[Tensor, ...]:
        """A GSAM step of the classifier stage."""
        layout = self.student.layout
        loss_of = classifier_loss(self.module, layout, weights_P, self.images, self.labels)
        step = gsam_gradient(loss_of, weights_P[layout.span("classifier")], 0.01, 0.3)
        return step.gradient_P, step.loss, step.logits_BK

    def plain_gsam(self, frozen: bool = False) -> None:
        """GSAM as research code writes it: a module, two backward passes on one batch, loops over the parameters.

        In the classifier stage the backbone needs no gradient, and both passes go through it.
        """
        module, trained = self.plain, list((self.plain.classifier if frozen else self.plain).parameters())
        module.features.requires_grad_(not frozen)
        with torch.no_grad():
            before = [p.clone() for p in trained]
        gradients = []
        for _ in range(2):
            module.zero_grad()
            F.cross_entropy(module(self.images), self.labels).backward()
            with torch.no_grad():
                gradients.append([p.grad.clone() for p in trained if p.grad is not None])
                for p, g in zip(trained, gradients[0], strict=True):
                    p.add_(p.square() * g, alpha=0.0)
        with torch.no_grad():
            norms = [torch.stack([g.norm() for g in one]).norm() for one in gradients]
            inner = torch.stack([(a * b).sum() for a, b in zip(*gradients, strict=True)]).sum()
            for p, start, a, b in zip(trained, before, *gradients, strict=True):
                p.copy_(start - 0.0 * (b - 0.3 * (a - inner / norms[1].square() * b)))


def seconds_of(problem: Problem, name: str, job: Callable[[], object]) -> float:
    """Seconds of one call: per student step for the phases, per step for GSAM."""
    began = time.perf_counter()
    job()
    if problem.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / (1 if name.startswith("gsam") else problem.args.steps)


def worker(args: argparse.Namespace) -> None:
    """A process of its own: for every name on stdin the seconds of that row on stdout, until stdin ends."""
    if args.worker == "lad-dist" and args.device == "cpu":
        allocator.keep_freed_memory()
    problem = Problem(args)
    jobs = problem.jobs()
    for line in sys.stdin:
        name = line.strip()
        print(seconds_of(problem, name, jobs[name]), flush=True)


def started(args: argparse.Namespace, kind: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--worker", kind, *as_options(args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def as_options(args: argparse.Namespace) -> list[str]:
    keys = ("width", "depth", "shape", "classes", "batch", "steps", "device", "threads", "expert_batch")
    return [text for key in keys for text in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of every row; the two processes and their rows take turns."""
    workers = {kind: started(args, kind) for kind in ("script", "lad-dist")}
    times: dict[str, list[float]] = {name: [] for name in args.only or rows_of(args)}
    for repeat in range(args.repeats + 1):
        for name, found in times.items():
            process = workers["script" if name in SCRIPT else "lad-dist"]
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(name.removesuffix(KEEPING) + "\n")
            process.stdin.flush()
            seconds = float(process.stdout.readline())
            if repeat:  # the first round warms up
                found.append(seconds)
    for process in workers.values():
        process.communicate()
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(args: argparse.Namespace, name: str) -> int:
    """Peak bytes of one job alone in a fresh process (on a GPU: of the device's allocator)."""
    command = [sys.executable, __file__, "--peak-of", name, *as_options(args)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(args: argparse.Namespace) -> None:
    """What ``peak_memory`` starts."""
    if args.peak_of not in SCRIPT and args.device == "cpu":
        allocator.keep_freed_memory()
    Problem(args).jobs()[args.peak_of.removesuffix(KEEPING)]()
    peaks = peak_memory_bytes()
    print(peaks.get("device", peaks["host"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--shape", default="3x32x32")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=100, help="synthetic images per student step")
    parser.add_argument("--expert-batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the peak memory of each path")
    parser.add_argument("--only", nargs="*", default=[], choices=(*ROWS, *GPU_ROWS), help="measure these rows only")
    parser.add_argument("--worker", choices=("script", "lad-dist"), help=argparse.SUPPRESS)
    parser.add_argument("--peak-of", choices=(*ROWS, *GPU_ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.worker:
        return worker(args)
    if args.peak_of:
        return print_peak(args)
    square(args)
    report = measured(args)
    print(json.dumps(report, indent=1) if args.json else table(report))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is to be kept of one run."""
    seconds = measure(args)
    least, found = floor_of(args)
    return {
        "date": date.today().isoformat(),
        "machine": machine(args),
        "torch": torch.__version__,
        "settings": {
            k: getattr(args, k)
            for k in ("width", "depth", "shape", "classes", "batch", "expert_batch", "steps", "threads", "repeats")
        },
        "seconds": seconds,
        "ratio": {n: s / seconds[base] for n, s in seconds.items() if (base := base_of(n)) in seconds},
        "floor": {n: least[n] for n in seconds if n in least},
        "rates": {"convolutions": found.convolutions, "copy": found.copy},
        "peak_memory_bytes": {n: peak_memory(args, n) for n in seconds} if args.memory else {},
    }


def floor_of(args: argparse.Namespace) -> tuple[dict[str, float], floor.Rates]:
    """(floor in seconds of each row, the rates they come from), with memory kept as lad_dist does."""
    if args.device == "cpu":
        allocator.keep_freed_memory()
    problem = Problem(args)
    backbone, image = problem.plain.features, problem.images[:1]
    found = floor.rates(backbone, image, args.batch)
    batches = {row: args.expert_batch if row.startswith("gsam") else args.batch for row in floor.COUNTS}
    return floor.floors(backbone, image, found, batches), found


def table(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    rates = report["rates"]
    lines = [
        f"{report['machine']}, torch {report['torch']}, {report['date']}",
        f"convolutions at {', '.join(f'{r / 1e9:.0f}' for r in rates['convolutions'])} GFLOP/s by layer, "
        f"copies at {rates['copy'] / 1e9:.1f} GB/s read and written",
        f"{'row':<38}{'seconds':>10}{'ratio':>8}{'floor':>10}{'of floor':>10}{'peak MB':>9}",
    ]
    for name, s in report["seconds"].items():
        least = report["floor"].get(name)
        memory = report["peak_memory_bytes"].get(name)
        lines.append(
            f"{name:<38}{s:>10.4f}{report['ratio'].get(name, float('nan')):>8.2f}"
            + (f"{least:>10.4f}{s / least:>10.2f}" if least else " " * 20)
            + (f"{memory / 1e6:>9.0f}" if memory else "")
        )
    lines.append(
        "seconds: per student step (phases) or per step (gsam); ratio: to the textbook or plain loop of the same kind"
    )
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> str:
    """What it was measured on."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {args.threads} threads"


if __name__ == "__main__":
    main()
