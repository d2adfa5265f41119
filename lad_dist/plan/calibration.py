"""Seconds of a step of each kind, measured on this device: a few real steps with the recipe's shapes.

Each kind is timed on two batch sizes, which separates the cost per step from the cost per image. The larger is the
job's own, unless a few steps of it exceed the time budget; then it is smaller, and reported so. The least of several
timings counts: other processes can make a step longer, never shorter. On a busy CPU even the least is too long, since
a step is interrupted while others run; there CPU time, divided by the threads, replaces wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lad_dist.data import augment
from lad_dist.distill.student import Batch, GradientPath, Phase, Student, SyntheticSet
from lad_dist.experts.gsam import gsam_gradient
from lad_dist.experts.train import classifier_loss, network_loss
from lad_dist.models.captured import Captured
from lad_dist.models.convnet import flat_parameters
from lad_dist.models.network import build
from lad_dist.plan.scaling import StepTime
from lad_dist.plan.shapes import Shapes
from lad_dist.recipe import Recipe
from lad_dist.seeds import rng

_MOST_REPEATS = 20
_LEAST_REPEATS = 3
_SMALL_BATCH = 2
_SMALL_PART = 8  # 1/8 of a kind's time goes to the small batch
_GROWTH = 8  # from one batch size to the next
_ROUNDS = 3  # runs of a job that must fit in the time left: a warm-up, and timings
STUDENT_STEPS = 2


@dataclass(frozen=True)
class StepKind:
    """A kind of step to time, with the job's batch size and number of CPU threads."""

    kind: str
    images: int
    threads: int


@dataclass(frozen=True)
class Calibrated:
    """Measured time of a kind of step, and the number of images it was measured on."""

    step: StepTime
    images: int


def calibrate(
    recipe: Recipe, shapes: Shapes, wanted: list[StepKind], device: torch.device, seconds: float, busy: bool = False
) -> dict[str, Calibrated]:
    """Time every kind of ``wanted`` in about ``seconds`` in all, by CPU time if the CPU is ``busy``.

    Kinds for which no time is left, since steps of earlier kinds took twice the total, are missing from the result.
    """
    work = Steps(recipe, shapes, device)
    found: dict[str, Calibrated] = {}
    until = time.perf_counter() + seconds
    for left, want in zip(range(len(wanted), 0, -1), wanted, strict=True):
        if time.perf_counter() > until + seconds:
            break
        budget = max(until - time.perf_counter(), 0.05) / left
        with with_threads(want.threads if device.type == "cpu" else None):
            steps = 1 if want.kind.startswith(("experts/", "evaluate/")) else STUDENT_STEPS
            timer = Timer(device, want.threads if busy else None)
            found[want.kind] = _time(work.of(want.kind), steps, want.images, timer, budget)
    return found


def _time(
    make: Callable[[int], Callable[[], object]], steps: int, images: int, timer: Timer, budget: float
) -> Calibrated:
    """Time a kind's step on few and many images in about ``budget`` seconds; a job of ``make`` is ``steps`` steps."""
    few = min(_SMALL_BATCH, images)
    if timer.device.type == "cuda":
        make(few)()  # compiles kernels, once for all batch sizes
    until = time.perf_counter() + budget
    small = _least(make(few), timer, budget / _SMALL_PART)
    if images == few or time.perf_counter() > until:
        return Calibrated(StepTime(small / few / steps), few)
    many, large = few, small
    while many < images:  # the last measurement counts
        left = until - time.perf_counter()
        affordable = int(many * left / (_ROUNDS * large))
        larger = min(images, many * _GROWTH, max(affordable, few + 1))
        if larger <= many:
            break
        many = larger
        large = _least(make(many), timer, left if many == images else left / _SMALL_PART)
    small, large = small / steps, large / steps
    if timer.device.type == "cuda":  # asynchronous queue: a small batch takes as long as its launches
        return Calibrated(StepTime(large / many, launch=small), many)
    per_image = (large - small) / (many - few)
    if per_image <= 0:  # a busy machine: this is only an upper bound
        return Calibrated(StepTime(large / many), many)
    return Calibrated(StepTime(per_image, per_step=max(small - few * per_image, 0.0)), many)


def _least(job: Callable[[], object], timer: Timer, budget: float) -> float:
    """Return the least seconds of a job after a warm-up, in about ``budget`` seconds; it runs once more if that is longer."""
    until = time.perf_counter() + budget
    first, taken = timer.seconds(job), list[float]()
    while len(taken) < _MOST_REPEATS and (len(taken) < _LEAST_REPEATS or time.perf_counter() + min(taken) < until):
        taken.append(timer.seconds(job))
        if first > budget:
            break
    return min(taken)


@dataclass(frozen=True)
class Timer:
    """Timer of one call, including its queued device work; ``share``: use CPU time, divided by that many threads."""

    device: torch.device
    share: int | None = None

    def seconds(self, job: Callable[[], object]) -> float:
        """Return the seconds of one call of ``job``."""
        clock = time.perf_counter if self.share is None else time.process_time
        began = clock()
        job()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (clock() - began) / (self.share or 1)


@contextmanager
def with_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of CPU threads inside the block; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Steps:
    """Random images and weights of a recipe's shapes, and each kind of step on them."""

    def __init__(self, recipe: Recipe, shapes: Shapes, device: torch.device) -> None:
        self.recipe, self.shapes, self.device = recipe, shapes, device
        model = recipe.model
        if model.network == "convnet":
            model = model.model_copy(update={"width": shapes.width, "depth": shapes.depth})
        shape = (shapes.channels, shapes.size, shapes.classes)
        network = build(model, *shape, seed=0, purpose=("template",))
        self.module = network.to(device)
        self.student = Student(self.module)
        self.start_P = flat_parameters(self.module)
        self.generator = torch.Generator().manual_seed(0)

    def of(self, kind: str) -> Callable[[int], Callable[[], object]]:
        """Return a function from a number of images to a step of ``kind`` on them (student: STUDENT_STEPS steps)."""
        stage, _, what = kind.partition("/")
        if stage == "experts":
            return lambda images: self._expert(what, images)
        if stage == "evaluate":
            return self._training
        path: GradientPath = "keep" if what == "keep" else "recompute"
        asked, convnet = self.recipe.distill.gradient, self.recipe.model.network == "convnet"
        if self.device.type == "cuda" and (asked == "captured" or (asked == "auto" and convnet)):
            path = "captured"
        return lambda images: self._student(stage, path, images)

    def _images(self, count: int) -> torch.Tensor:
        s = self.shapes
        return torch.randn(count, s.channels, s.size, s.size, generator=self.generator).to(self.device)

    def _labels(self, count: int) -> torch.Tensor:
        return torch.randint(0, self.shapes.classes, (count,), generator=self.generator).to(self.device)

    def _draw(self, count: int, step: int = 0) -> augment.Draw:
        return augment.draw(rng(0, "calibrate", step), self.recipe.augment, count, self.shapes.size)

    def _student(self, phase: str, path: GradientPath, count: int) -> Callable[[], object]:
        layout, whole = self.student.layout, phase == "representation"
        target_P = self.start_P.clone()
        target_P[layout.span("classifier")] += 0.01
        target_P[layout.span("backbone")] += 0.01 if whole else 0.0
        rows = torch.arange(count, device=self.device)
        batches = [Batch(rows, self._draw(count, step)) for step in range(STUDENT_STEPS)]
        span = layout.span("backbone" if whole else "all")
        weights = torch.ones(self.shapes.classes, device=self.device) if whole else None
        piece = Phase(self.start_P, target_P, batches, span, weights, classifier_only=not whole)
        logits = torch.randn(count, self.shapes.classes, generator=self.generator).to(self.device)
        synthetic = SyntheticSet(self._images(count), logits, torch.tensor(0.01, device=self.device))
        return lambda: self.student.run(synthetic, piece, path)

    def _expert(self, stage: str, count: int) -> Callable[[], object]:
        e, layout = self.recipe.experts, self.student.layout
        images, labels = self._images(count), self._labels(count)

        def gradient(start_P: torch.Tensor, views: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if stage == "representation":
                loss_of, weights_P = network_loss(self.module, layout, views, labels), start_P
            else:
                loss_of = classifier_loss(self.module, layout, start_P, views, labels)
                weights_P = start_P[layout.span("classifier")]
            return (gsam_gradient(loss_of, weights_P, e.gsam_rho, e.gsam_alpha).gradient_P,)

        captured = Captured("experts' steps")
        return lambda: captured(gradient, self.start_P, augment.apply(images, self._draw(count)), labels)

    def _training(self, count: int) -> Callable[[], object]:
        images, labels, weights = self._images(count), self._labels(count), list(self.module.parameters())

        def gradients(views: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = torch.autograd.grad(F.cross_entropy(self.module(views), labels), weights)
            return (torch.cat([g.flatten() for g in found]),)  # compared as a whole: some of it is rounding errors

        captured = Captured("networks' steps")
        return lambda: captured(gradients, augment.apply(images, self._draw(count)), labels)
