"""Find what cannot fit, with the field at fault and the change that would make it fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lad_dist.plan import memory
from lad_dist.plan.dataset_info import DatasetInfo
from lad_dist.plan.memory import Batches
from lad_dist.plan.resources import Resources
from lad_dist.plan.shapes import Shapes
from lad_dist.recipe import Recipe

_MOST_RANKS = 4096


def rank_bytes(recipe: Recipe, info: DatasetInfo, shapes: Shapes, device: str, batches: Batches, path: str) -> int:
    """Return one rank's peak bytes on its device (on its host, for CPUs) during distillation, in all."""
    phases = memory.phases_of(recipe, shapes, batches, path, device)
    busiest = max(phases.values())
    return _standing(recipe, info, shapes, device) + memory.set_bytes(recipe, shapes, batches.rows) + busiest


def expert_process_bytes(recipe: Recipe, info: DatasetInfo, shapes: Shapes, device: str, batch: int) -> int:
    """Return the total bytes of one expert's process on its device (on the host, for CPUs)."""
    return _standing(recipe, info, shapes, device, windows=False) + memory.training_bytes(shapes, batch, device)


def _standing(recipe: Recipe, info: DatasetInfo, shapes: Shapes, device: str, windows: bool = True) -> int:
    """Return the bytes that any batch needs: the process, the data, and on the host the cache of windows."""
    on_device, on_host = memory.data_bytes(info, shapes, recipe.data.whitening)
    total = memory.PROCESS[device] + on_device
    if device == "cpu":
        total += on_host + (memory.window_cache_bytes(recipe, shapes) if windows else 0)
    return total


def faults(
    recipe: Recipe, info: DatasetInfo, shapes: Shapes, resources: Resources, disk: tuple[int, int | None]
) -> list[str]:
    """Return everything that cannot fit, worst first. ``disk``: (bytes to write, bytes free or None for a store)."""
    found = [
        *_whitening(recipe, shapes, resources),
        *_distillation(recipe, info, shapes, resources),
        *_experts(recipe, info, shapes, resources),
        *_disk(recipe, shapes, disk),
    ]
    return found


def _distillation(recipe: Recipe, info: DatasetInfo, shapes: Shapes, resources: Resources) -> list[str]:
    total, d, free = info.classes * recipe.ipc, recipe.distill, resources.rank_memory

    def needs(path: str, batch: int = d.batch, world: int = resources.world) -> int:
        return rank_bytes(recipe, info, shapes, resources.device, Batches.of(recipe, shapes, world, batch), path)

    ranks = f"each of {resources.world} ranks" if resources.world > 1 else "one rank"
    steps = max(d.student_steps, d.student_steps_classifier)
    if needs("recompute") <= free:
        if d.gradient == "keep" and needs("keep") > free:
            return [
                f"distill.gradient: keep needs {_gb(needs('keep'))} on {ranks} for the graphs of {steps} steps, where "
                f"{_gb(free)} are free; recompute needs {_gb(needs('recompute'))} and fits, and so does auto"
            ]
        return []
    fits = _largest(lambda batch: needs("recompute", batch) <= free, min(d.batch, total))
    ways = [f"distill.batch={fits} fits"] if fits else []
    if resources.device == "cuda":
        worlds = (w for w in range(resources.world + 1, _MOST_RANKS) if needs("recompute", world=w) <= free)
        enough = next(worlds, None)
        ways += [f"--ranks {enough} fits"] if enough else []
    elif resources.world > 1:
        alone = rank_bytes(recipe, info, shapes, "cpu", Batches.of(recipe, shapes, 1), "recompute")
        ways += ["--ranks 1 fits (the ranks of a host share its memory)"] if alone <= resources.memory else []
    advice = " and ".join(ways) or "a smaller model.width (or another model.network), data.image_size or ipc is needed"
    return [
        f"distill.batch: {min(d.batch, total)} images a step need {_gb(needs('recompute'))} on {ranks} even where graphs are "
        f"recomputed, where {_gb(free)} are free; {advice}"
    ]


def _experts(recipe: Recipe, info: DatasetInfo, shapes: Shapes, resources: Resources) -> list[str]:
    at_a_time = min(resources.experts_at_a_time, recipe.experts.count)
    devices = resources.hosts * (resources.per_host if resources.device == "cuda" else 1)
    sharing = -(-at_a_time // devices)  # experts per device, or per host

    def needs(batch: int, experts: int = sharing) -> int:
        ray = memory.RAY_BYTES if resources.device == "cpu" and experts > 1 else 0
        return ray + experts * expert_process_bytes(recipe, info, shapes, resources.device, batch)

    batch, free = recipe.experts.batch, resources.memory
    if needs(batch) <= free:
        return []
    smaller = _largest(lambda b: needs(b) <= free, batch)
    ways = [f"experts.batch={smaller} fits"] if smaller else []
    if needs(batch, 1) <= free:
        fit = _largest(lambda n: needs(batch, n) <= free, sharing)
        where = "experts_per_gpu" if resources.device == "cuda" else "threads_per_expert"
        value = fit if resources.device == "cuda" else -(-resources.threads // max(fit, 1))
        ways.append(f"{where}: {value} in the profile trains fewer at a time and fits")
    advice = " and ".join(ways) or "a smaller model.width (or another model.network) or data.image_size is needed"
    return [
        f"experts.batch: {sharing} expert{'s' if sharing > 1 else ''} at a time on {batch} images need {_gb(needs(batch))} "
        f"where {_gb(free)} are free; {advice}"
    ]


def _whitening(recipe: Recipe, shapes: Shapes, resources: Resources) -> list[str]:
    needed = memory.whitening_bytes(shapes, recipe.data.whitening)
    if needed <= resources.memory:
        return []
    side = _largest(
        lambda size: memory.whitening_bytes(replace(shapes, size=size), "zca") <= resources.memory, shapes.size
    )
    return [
        f"data.whitening: zca of {shapes.channels}x{shapes.size}x{shapes.size} images needs {_gb(needed)} for matrices of "
        f"{shapes.image} x {shapes.image}, where {_gb(resources.memory)} are free; data.whitening=standardize needs none"
        + (f", and data.image_size={side} fits" if side else "")
    ]


def _disk(recipe: Recipe, shapes: Shapes, disk: tuple[int, int | None]) -> list[str]:
    needed, free = disk
    if free is None or needed <= free:
        return []
    each = memory.buffer_bytes(recipe, shapes) // recipe.experts.count
    fits = free // each if each else 0
    few = f"experts.count={fits} fits, or " if fits else ""
    return [
        f"experts.count: the trajectory buffer of {recipe.experts.count} experts still needs {_gb(needed)} where the disk has "
        f"{_gb(free)} free; {few}choose another disk with --out or --buffers"
    ]


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits, 0 if none; if a number fits, all smaller ones must."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
