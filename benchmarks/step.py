"""Seconds per student step and per GSAM step, beside the textbook loop, in one run on this machine.

    python benchmarks/step.py --width 128 --shape 3x32x32 --classes 10 --batch 100 --steps 4 [--device cuda] [--json]

Rows: each phase by the textbook loop (two passes over the steps, each with the graph of the gradient) and by lad_dist's paths;
a GSAM step of each expert stage. Medians over --repeats; the paths take turns, so a machine whose speed drifts slows all alike.
Peak memory is the process's resident high-water mark (measured in a fresh process per path with --memory), or the GPU's.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet, soft_cross_entropy
from lad_dist.experts.gsam import gsam_gradient
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models import functional
from lad_dist.models.convnet import ConvNet, build, flat_parameters
from lad_dist.progress import peak_memory_bytes


class Problem:
    """Random images, labels and weights of the sizes asked for; both phases' windows."""

    def __init__(self, args: argparse.Namespace) -> None:
        channels, height, width = (int(n) for n in args.shape.split("x"))
        if height != width:
            sys.exit(f"--shape {args.shape}: images must be square, as in 3x32x32")
        torch.manual_seed(0)
        self.device, self.args = torch.device(args.device), args
        module = build(channels, height, args.classes, args.width, args.depth, seed=0, purpose=("benchmark",)).to(
            self.device
        )
        self.student, self.module = Student(module), module
        self.plain = ConvNet(channels, height, args.classes, args.width, args.depth, fused=False).to(self.device)
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
        layout, trained = self.student.layout, self.student.layout.span("classifier")
        out["gsam/representation"] = lambda: gsam_gradient(
            network_loss(self.module, layout, self.images, self.labels), self.start, 0.01, 0.3
        )
        out["gsam/representation-plain-loop"] = self.plain_gsam
        out["gsam/one-forward-and-backward"] = self.forward_backward
        out["gsam/classifier"] = lambda: gsam_gradient(
            classifier_loss(self.module, layout, self.start, self.images, self.labels), self.start[trained], 0.01, 0.3
        )
        return out

    def forward_backward(self) -> None:
        """One forward and backward of the whole network: the unit a representation-stage step is made of."""
        self.plain.zero_grad()
        F.cross_entropy(self.plain(self.images), self.labels).backward()

    def plain_gsam(self) -> None:
        """GSAM as research code writes it: a module, two backward passes, one loop over the parameters."""
        for _ in range(2):
            self.forward_backward()
            with torch.no_grad():
                for p in self.plain.parameters():
                    assert p.grad is not None
                    p.add_(p.square() * p.grad, alpha=0.0)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds: per student step for the phases, per step for GSAM."""
    problem = Problem(args)
    jobs = {n: f for n, f in problem.jobs().items() if not args.only or n in args.only}
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(args.repeats + 1):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            if problem.device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                times[name].append((time.perf_counter() - began) / (1 if name.startswith("gsam") else args.steps))
    return {name: statistics.median(t) for name, t in times.items()}


def peak_memory(args: argparse.Namespace, name: str) -> int:
    """Peak bytes of one job alone in a fresh process (on a GPU: of the device's allocator)."""
    command = [sys.executable, __file__, "--json", "--only", name, "--repeats", "1", "--no-memory"]
    for key in ("width", "depth", "shape", "classes", "batch", "steps", "device", "threads", "expert_batch"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = json.loads(done.stdout)["peak_memory_bytes_of_process"]
    return int(peaks.get("device", peaks["host"]))


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
    parser.add_argument("--only", nargs="*", default=[], help="measure these rows only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds = measure(args)
    ratios = {n: s / seconds[base] for n, s in seconds.items() if (base := f"{n.split('/')[0]}/textbook") in seconds}
    ratios |= {
        n: s / seconds["gsam/one-forward-and-backward"]
        for n, s in seconds.items()
        if n.startswith("gsam") and "gsam/one-forward-and-backward" in seconds
    }
    report = {
        "date": date.today().isoformat(),
        "machine": machine(args),
        "torch": torch.__version__,
        "settings": {
            k: getattr(args, k)
            for k in ("width", "depth", "shape", "classes", "batch", "expert_batch", "steps", "threads", "repeats")
        },
        "seconds": seconds,
        "ratio": ratios,
        "peak_memory_bytes": {n: peak_memory(args, n) for n in seconds} if args.memory else {},
        "peak_memory_bytes_of_process": peak_memory_bytes(),
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{report['machine']}, torch {torch.__version__}, {report['date']}")
    print(f"{'row':<34}{'seconds':>10}{'ratio':>8}{'peak MB':>9}")
    for name, s in seconds.items():
        memory = f"{report['peak_memory_bytes'][name] / 1e6:9.0f}" if args.memory else ""
        print(f"{name:<34}{s:>10.4f}{ratios.get(name, float('nan')):>8.2f}{memory}")
    print(
        "seconds: per student step (phases) or per step (gsam); ratio: to the textbook loop, or to one forward and backward"
    )


def machine(args: argparse.Namespace) -> str:
    """What it was measured on."""
    if args.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{processor()}, {args.threads} threads"


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
