"""The plan of a job: memory, disk and hours of each stage, the choices of ``auto``, and how many ranks help."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lad_dist import cores
from lad_dist.data import decoded
from lad_dist.distill.memory import fitting_path
from lad_dist.errors import RecipeError
from lad_dist.plan import limits, memory
from lad_dist.plan.dataset_info import DatasetInfo
from lad_dist.plan.memory import PATHS, Batches
from lad_dist.plan.resources import Resources
from lad_dist.plan.scaling import (
    RANK_COUNTS,
    PhaseCost,
    Scaling,
    Several,
    StepTime,
    advice,
    best,
    iteration,
    phases_of,
    scaling,
    several_of,
)
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.units import duration, size
from lad_dist.recipe import MOST_TEACHERS, SET_PHASES, Recipe
from lad_dist.results import TEACHERS, WHOLE, asked, base_source, labelled_online

if TYPE_CHECKING:
    import torch

_ZCA_FLOPS = {"cpu": 15e9, "cuda": 1e12}  # assumed; per thread on a CPU. Eigenvectors use little of a device

_WORTH_SAYING = 1.5  # times the efficiency of one window


@dataclass(frozen=True)
class Need:
    """Bytes needed, and where: ``device`` (of one rank), ``host`` or ``disk``."""

    stage: str
    what: str
    where: str
    bytes: int


@dataclass(frozen=True)
class Duration:
    """Seconds of a stage or of a part of it, and how they were estimated, in words."""

    stage: str
    what: str
    seconds: float
    how: str


@dataclass(frozen=True)
class Rate:
    """Seconds of one step of a kind on ``images`` images, and the source of the number."""

    kind: str
    images: int
    seconds: float
    source: str


@dataclass(frozen=True)
class Plan:
    """Everything that ``lad-dist plan`` shows. ``durations``, ``rates``, ``scaling``: empty if something cannot fit."""

    job: str
    data: str
    network: str
    place: str
    world: int
    path: str
    why: str
    needs: tuple[Need, ...]
    durations: tuple[Duration, ...]
    rates: tuple[Rate, ...]
    scaling: tuple[Scaling, ...]
    advice: str
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values: bytes, seconds, words."""
        return asdict(self)


def shapes_of(recipe: Recipe, info: DatasetInfo) -> Shapes:
    """Return the shapes of the recipe's network on its data."""
    return Shapes.of(recipe.model, info.channels, info.size, info.classes)


def refuse_what_cannot_fit(recipe: Recipe, info: DatasetInfo, resources: Resources, buffer: Path | None) -> None:
    """Raise RecipeError if the memory, or the total disk space of ``buffer``, is too small for the job."""
    shapes = shapes_of(recipe, info)
    needed, free = _disk(recipe, shapes, buffer)
    room = (
        None if buffer is None or free is None else shutil.disk_usage(_existing(buffer)).total or None
    )  # 0: not a disk
    faults = limits.faults(recipe, info, shapes, resources, (needed, room))
    if faults:
        raise RecipeError(faults)


def make_plan(
    recipe: Recipe,
    info: DatasetInfo,
    resources: Resources,
    device: torch.device | None,
    buffer: Path | None,
    calibrate: float | None,
) -> Plan:
    """Return the plan. ``buffer``: where the trajectory buffer will lie (None: in an object store); ``calibrate``:
    seconds to measure this device; None: use the table (also if ``device`` is None).
    """
    shapes = shapes_of(recipe, info)
    notes = [shapes.note] if shapes.note else []
    if calibrate is not None and resources.chooses_threads:
        from lad_dist.plan import threads

        team = threads.choose(recipe, shapes, resources.threads, min(threads.SECONDS, calibrate / 3))
        resources = replace(resources, team=team.threads)
        notes.append(f"threads: {team.threads} of {resources.threads}: {team.why}")
    batches = Batches.of(recipe, shapes, resources.world)
    path, why = choose_path(recipe, shapes, resources.rank_memory, batches)
    disk = _disk(recipe, shapes, buffer)
    faults = limits.faults(recipe, info, shapes, resources, disk)
    needs = _needs(recipe, info, shapes, resources, batches)
    times = None if faults else _Times(recipe, info, shapes, resources, path)
    if times is not None:
        notes += times.measure(device if resources.here else None, calibrate)
    notes.append(f"disk: {_disk_words(disk, buffer)}")
    return Plan(
        job=recipe.name,
        data=f"{info.train} training images of {info.classes} classes ({max(info.counts)} to {min(info.counts)} each), "
        f"{info.test} test images, {info.channels}x{info.size}x{info.size}; from {info.source}",
        network=f"{shapes.name}: {shapes.parameters} weights, {shapes.classifier} of them in the classifier",
        place=resources.name if resources.here else f"{resources.name} (not here)",
        world=resources.world,
        path=path,
        why=why,
        needs=tuple(needs),
        durations=tuple(times.durations()) if times else (),
        rates=tuple(times.rates()) if times else (),
        scaling=times.scaling() if times else (),
        advice=times.advice() if times else "",
        notes=tuple(notes),
        faults=tuple(faults),
    )


def durations_of(recipe: Recipe, info: DatasetInfo, resources: Resources) -> list[Duration]:
    """Return the durations of all stages by the table of devices, whether the job fits or not."""
    shapes = shapes_of(recipe, info)
    path, _ = choose_path(recipe, shapes, resources.rank_memory, Batches.of(recipe, shapes, resources.world))
    return _Times(recipe, info, shapes, resources, path).durations()


def choose_path(recipe: Recipe, shapes: Shapes, free: int, batches: Batches) -> tuple[str, str]:
    """Return (gradient path, reason), as ``distill/memory.py`` will choose it with ``free`` bytes for a rank."""
    d = recipe.distill
    if d.gradient != "auto":
        path = "recompute" if d.gradient == "captured" else d.gradient  # the same work and memory
        return path, f"distill.gradient is {d.gradient}"
    if not recipe.matching_phases:
        return "keep", f"no student is trained in the {recipe.phases[0]} phase"
    steps = d.student_steps if "representation" in recipe.matching_phases else d.student_steps_classifier
    return fitting_path(d, steps, memory.auto_bytes(shapes, batches, steps), free)


def _needs(recipe: Recipe, info: DatasetInfo, shapes: Shapes, resources: Resources, batches: Batches) -> list[Need]:
    device = resources.device
    on_device, on_host = memory.data_bytes(info, shapes, recipe.data.whitening)
    here = "device" if device == "cuda" else "host"
    needs = [
        Need("data", "unwhitened images (uint8)", "host", on_host),
        Need("data", "whitened training images and whitening", here, on_device),
    ]
    kept = decoded.planned_bytes(recipe.data.dataset, [info.train, info.test], shapes.image)
    if kept:
        needs.append(Need("data", f"decoded images, kept in {decoded.folder()}", "disk", kept))
    if recipe.data.whitening == "zca":
        fit = memory.whitening_bytes(shapes, "zca")
        needs.append(Need("data", f"fitting ZCA, {shapes.image} x {shapes.image}", here, fit))
    one = limits.expert_process_bytes(recipe, info, shapes, device, recipe.experts.batch)
    needs.append(Need("experts", "one expert's process, total", here, one))
    needs.append(Need("experts", "trajectory buffer", "disk", memory.buffer_bytes(recipe, shapes)))
    for path in PATHS:
        for phase, count in memory.phases_of(recipe, shapes, batches, path, device).items():
            needs.append(Need("distill", f"{phase} phase, {path}", here, count))
    for path in PATHS:
        whole = limits.rank_bytes(recipe, info, shapes, device, batches, path)
        needs.append(Need("distill", f"one rank, total, {path}", here, whole))
    return needs


def _disk(recipe: Recipe, shapes: Shapes, buffer: Path | None) -> tuple[int, int | None]:
    """Return (bytes of the buffer still to be written, bytes free at its location; None in an object store)."""
    needed = memory.buffer_bytes(recipe, shapes)
    if buffer is None:
        return needed, None
    there = sum(f.stat().st_size for f in buffer.rglob("*") if f.is_file()) if buffer.is_dir() else 0
    return max(needed - there, 0), shutil.disk_usage(_existing(buffer)).free


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest existing parent."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _disk_words(disk: tuple[int, int | None], buffer: Path | None) -> str:
    needed, free = disk
    if free is None:
        return f"{size(needed)} in an object store, whose free space is not checked"
    return f"{size(needed)} still to be written to {buffer}, where {size(free)} are free"


class _Times:
    """Durations, from the table or from a calibration."""

    def __init__(self, recipe: Recipe, info: DatasetInfo, shapes: Shapes, resources: Resources, path: str) -> None:
        self.recipe, self.info, self.shapes, self.resources, self.path = recipe, info, shapes, resources, path
        self.total = info.classes * recipe.ipc
        self.source, self._measured = resources.table_source, dict[str, StepTime]()
        share = Batches.of(recipe, shapes, resources.world).largest(1)
        rank_threads = max(1, int(resources.rank_threads(resources.world)))
        alone = resources.experts_at_a_time == 1
        expert_threads = (resources.team or resources.threads) if alone else resources.threads_per_expert
        # kind -> (images per step of the job, CPU threads)
        self.kinds = {
            f"representation/{path}": (max(1, round(share)), rank_threads),
            f"classifier/{path}": (max(1, round(share)), rank_threads),
            "experts/representation": (min(recipe.experts.batch, info.train), expert_threads),
            "experts/classifier": (min(recipe.experts.batch, info.train), expert_threads),
            "evaluate/train": (min(recipe.evaluate.batch, self.total), rank_threads),
        }
        if not {"classifier", *SET_PHASES} & set(recipe.phases):
            del self.kinds[f"classifier/{path}"]
        if "representation" not in recipe.phases:
            del self.kinds[f"representation/{path}"]

    def measure(self, device: torch.device | None, seconds: float | None) -> list[str]:
        """Calibrate if requested and possible; return notes about it."""
        if seconds is None or device is None:
            why = "" if seconds is None else " (the devices are not on this machine)"
            return [f"speed: {self.source}{why}"]
        from lad_dist.plan.calibration import StepKind, calibrate

        wanted = [StepKind(kind, *self.kinds[kind]) for kind in self.kinds]
        most = self.resources.threads
        free = float(most) if device.type != "cpu" else cores.obtained(most)
        busy = free < cores.FREE_ABOVE * most
        found = calibrate(self.recipe, self.shapes, wanted, device, seconds, busy)
        self._measured = {kind: c.step for kind, c in found.items()}
        self.source = "measured now on this machine"
        unmeasured = [kind for kind in self.kinds if kind not in found]
        scaled = [
            f"{kind} on {found[kind].images} images instead of {images}"
            for kind, (images, _) in self.kinds.items()
            if kind in found and found[kind].images < images
        ]
        notes = ["speed: the shortest of a few timings of a step, measured now on this device"]
        if busy:
            notes.append(
                f"the machine is busy: {free:.1f} of {most} cores are free. Times are from CPU time, as if the job ran "
                "alone; beside other processes it takes longer"
            )
        if unmeasured:
            notes.append(
                f"single steps took longer than the {seconds:g} s of calibration, so {', '.join(unmeasured)} are from the table "
                f"({self.resources.table_source}); --calibrate SECONDS gives it longer"
            )
        return notes + (
            [f"a whole step was too long for the calibration, so scaled up: {'; '.join(scaled)}"] * bool(scaled)
        )

    def step(self, kind: str) -> StepTime:
        """Return the time of a step of ``kind``, with the threads of ``kinds``."""
        if kind in self._measured:
            return self._measured[kind]
        return self.resources.table(kind, self.shapes, self.kinds[kind][1])

    def _student_step(self, kind: str, world: int) -> StepTime:
        """Return a student step's time on one of ``world`` ranks, by either path; CPU ranks share a host's cores."""
        known = f"{kind.partition('/')[0]}/{self.path}"
        step, threads = self.step(known), self.kinds[known][1]
        if kind != known:  # only the job's own path is measured
            here, other = (self.resources.table(k, self.shapes, threads) for k in (known, kind))
            step = StepTime(
                step.per_image * other.per_image / here.per_image,
                step.per_step,
                step.launch * (other.launch / here.launch if here.launch else 1.0),
            )
        return step if self.resources.device == "cuda" else step.slower(threads / self.resources.rank_threads(world))

    def rates(self) -> list[Rate]:
        """Return the rate of every kind of step at the job's batch size."""
        return [
            Rate(
                kind,
                images,
                self.step(kind).seconds(images),
                self.source if kind in self._measured else self.resources.table_source,
            )
            for kind, (images, _) in self.kinds.items()
        ]

    def phases(self, world: int) -> tuple[PhaseCost, ...]:
        """Return the phases of an iteration on one of ``world`` ranks, by the path that fits there."""
        batches = Batches.of(self.recipe, self.shapes, world)
        path, _ = choose_path(self.recipe, self.shapes, self.resources.rank_memory_of(world), batches)
        return phases_of(self.recipe, self.shapes, path, lambda kind: self._student_step(kind, world))

    @property
    def several(self) -> Several:
        """The windows of an iteration, and the bytes of a set's gradient."""
        return several_of(self.recipe, self.shapes)

    def scaling(self) -> tuple[Scaling, ...]:
        """Return the cost of an iteration for each relevant number of ranks."""
        resources = self.resources
        most = 64 if resources.device == "cuda" else max(resources.threads * resources.hosts, resources.world)
        worlds = sorted({resources.world, *(w for w in RANK_COUNTS if w <= most)})
        return scaling(self.phases, self.total, self.recipe.distill.batch, worlds, resources.network, self.several)

    def advice(self) -> str:
        """Return where more ranks stop helping, in words, and what several windows an iteration would then gain."""
        if self.resources.device == "cpu" and self.resources.hosts == 1:
            return "ranks on one host share its cores: they gain little over threads"
        rows, world = self.scaling(), self.resources.world
        said, here = advice(rows, world), next(row for row in rows if row.world == world)
        windows = max((n for n in range(2, world // best(rows).world + 1) if world % n == 0), default=1)
        if windows < 2 or self.recipe.distill.windows > 1 or not self.recipe.matching_phases:
            return said
        other = copy.copy(self)
        distill = self.recipe.distill.model_copy(update={"windows": windows})
        other.recipe = self.recipe.model_copy(update={"distill": distill})
        grouped = next(row for row in other.scaling() if row.world == world)
        if grouped.efficiency < _WORTH_SAYING * here.efficiency:
            return said
        return (
            f"{said}; distill.windows={windows}, which changes the result, would give {windows} groups of ranks a window "
            f"each (an efficiency of {grouped.efficiency:.0%} for {here.efficiency:.0%}; docs/scaling.md)"
        )

    def durations(self) -> list[Duration]:
        """Return the durations of all stages, from scratch."""
        return [*self._whitening(), *self._experts(), *self._distillation(), *self._evaluation()]

    def _whitening(self) -> list[Duration]:
        flops = memory.whitening_flops(self.shapes, self.info, self.recipe.data.whitening)
        device = self.resources.device
        rate = _ZCA_FLOPS[device] * (self.resources.threads if device == "cpu" else 1)
        return [Duration("data", "fitting ZCA", flops / rate, f"assumed: {rate / 1e9:.0f} GFLOP/s")] if flops else []

    def _experts(self) -> list[Duration]:
        e, resources = self.recipe.experts, self.resources
        drawn = max(self.info.counts) * self.info.classes  # images per epoch of the classifier stage
        stages = (
            ("representation stage", "experts/representation", e.epochs, self.info.train),
            ("classifier stage", "experts/classifier", e.classifier_epochs, drawn),
        )
        at_a_time = min(resources.experts_at_a_time, e.count)
        sharing = 1.0
        if resources.device == "cuda":  # experts on one GPU share its compute, not the host's launches
            sharing = max(1.0, at_a_time / (resources.hosts * resources.per_host))
        rounds = math.ceil(e.count / at_a_time)
        found = []
        for what, kind, epochs, images in stages:
            step = self.step(kind)
            step = StepTime(step.per_image * sharing, step.per_step * sharing, step.launch)
            one = epochs * _epoch(step, images, e.batch)
            how = (
                f"{e.count} experts of {epochs} epochs on {images} images, {at_a_time} at a time, {duration(one)} each"
            )
            found.append(Duration("experts", what, rounds * one, how))
        return found

    def _distillation(self) -> list[Duration]:
        d, world = self.recipe.distill, self.resources.world
        found = []
        for phase in self.phases(world):
            seconds, sums, share = iteration((phase,), self.total, d.batch, world, self.resources.network, self.several)
            what = f"{phase.steps} steps on {share:.3g} images a rank"
            if phase.name == "regression":
                what = f"{share:.3g} images a rank and {d.regression_batch} real ones"
            how = f"{d.iterations} iterations of {what}, {duration(seconds)} each"
            if d.windows > 1 and phase.name not in SET_PHASES:
                how += f", for {d.windows} windows on {self.several.groups(world)} groups of ranks"
            if world > 1:
                how += f" ({sums / seconds:.0%} of it waiting for sums)"
            found.append(Duration("distill", f"{phase.name} phase", d.iterations * seconds, how))
        return found

    def _evaluation(self) -> list[Duration]:
        e, step = self.recipe.evaluate, self.step("evaluate/train")
        networks = e.seeds * len(dict.fromkeys(e.architectures))
        turns = math.ceil(networks / self.resources.world)
        others = [name for name in dict.fromkeys(e.architectures) if name != self.recipe.model.network]
        alike = f"; {', '.join(others)} counted as {self.recipe.model.network}" if others else ""
        each = e.epochs * _epoch(step, self.total, e.batch)
        sources: list[tuple[str, float, str]] = []
        select = self.recipe.distill
        if select.select != "last":
            candidates = math.ceil(select.iterations / select.select_every)  # the last set is one
            sources.append(("select", candidates * each, f"{candidates} candidates, {e.epochs} epochs each"))
        epochs, most = e.epochs, ""
        if e.tune_epochs:  # the choice is not known yet
            epochs, most = max(e.tune_epochs), "at most "
        for source in asked(self.recipe):
            if source == TEACHERS:  # trains nothing
                continue
            whole = source in WHOLE
            count, images, batch = epochs, self.total, e.batch
            if whole:
                count, images, batch = e.full_epochs, self.info.train, e.full_batch
            epoch = _epoch(step, images, batch)
            if labelled_online(source):  # a forward pass by each teacher; a step is three
                epoch *= 1 + min(self.recipe.experts.count, e.teachers or MOST_TEACHERS) / 3
            bound = "" if whole else most
            how = (
                f"{networks} networks, {bound}{count} epochs on {images} images, {duration(count * epoch)} each{alike}"
            )
            sources += [(source, turns * count * epoch, how), *self._tuning(source, epoch, whole)]
        return [Duration("evaluate", what, seconds, how) for what, seconds, how in sources]

    def _tuning(self, source: str, epoch: float, whole: bool) -> list[tuple[str, float, str]]:
        """Return the time to tune learning rate and epochs for a source, given the seconds of an ``epoch``."""
        e = self.recipe.evaluate
        alpha = bool(e.tune_lr) and base_source(source) in ("distilled", "initial")
        rates = len(e.tune_lr or (None,)) + alpha
        epochs = (e.full_epochs,) if whole else e.tune_epochs or (e.epochs,)
        if rates * len(epochs) == 1:
            return []
        rounds = math.ceil(rates * len(epochs) * len(dict.fromkeys(e.architectures)) / self.resources.world)
        seconds = rounds * epoch * sum(epochs) / len(epochs)
        return [
            (f"tune {source}", seconds, f"{rates} learning rates x {len(epochs)} numbers of epochs, a network each")
        ]


def _epoch(step: StepTime, images: int, batch: int) -> float:
    """Return the seconds of an epoch over ``images`` in batches of ``batch``, the last one smaller."""
    steps = math.ceil(images / batch)
    return steps * step.seconds(images / steps)
