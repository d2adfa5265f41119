"""Choice of the gradient path, from the memory of the student steps' graphs, measured on one step before the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lad_dist import host_memory
from lad_dist.distill.student import Batch, GradientPath, Phase, Student, SyntheticSet
from lad_dist.ranks import Ranks
from lad_dist.recipe import DistillConfig, Recipe

FREE_FRACTION = 0.6  # of the free memory, unless distill.memory_gb is set


def step_bytes(student: Student, synthetic: SyntheticSet, phase: Phase, batch: Batch) -> int:
    """Return the bytes that the graph of one student step keeps alive: distinct storages saved for backward."""
    if not len(batch.rows_B):  # a rank without images in this batch
        return 0
    images_BCHH = synthetic.images_SCHH[batch.rows_B].requires_grad_()
    labels_BK = synthetic.logits_SK[batch.rows_B].requires_grad_()
    theta_P = phase.start_P.detach().requires_grad_()
    with saved_for_backward() as counted:
        gradient_P, _ = student.step_gradient(theta_P, images_BCHH, labels_BK, phase.class_weights_K, create_graph=True)
    del gradient_P
    return counted()


@contextmanager
def saved_for_backward() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes of the distinct storages saved for backward in the block so far."""
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        yield lambda: sum(storages.values())


def fitting_path(d: DistillConfig, steps: int, needed: int, free: int) -> tuple[GradientPath, str]:
    """Return (path, reason) of ``auto``: keep if the graphs of all ``steps`` fit; ``needed`` and ``free`` are bytes."""
    limit = int(d.memory_gb * 1e9) if d.memory_gb is not None else int(free * FREE_FRACTION)
    why = f"the graphs of {steps} steps need {needed / 1e9:.3g} GB of the {limit / 1e9:.3g} GB available"
    return ("keep" if needed <= limit else "recompute"), why


def choose_path(
    recipe: Recipe, student: Student, synthetic: SyntheticSet, phase: Phase, sharing: int = 1
) -> tuple[GradientPath, str]:
    """Return (path, reason): the recipe's choice, or for ``auto`` keep if the graphs of all steps fit into memory.

    ``sharing`` ranks of this host share its memory; a GPU belongs to one rank.
    """
    if recipe.distill.gradient != "auto":
        return recipe.distill.gradient, f"distill.gradient is {recipe.distill.gradient}"
    largest = max(phase.batches, key=lambda b: len(b.rows_B))
    needed = step_bytes(student, synthetic, phase, largest) * len(phase.batches)
    device = synthetic.images_SCHH.device
    free = free_bytes(device) // (sharing if device.type == "cpu" else 1)
    return fitting_path(recipe.distill, len(phase.batches), needed, free)


def faster(
    paths: Sequence[GradientPath], run: Callable[[GradientPath], object], ranks: Ranks, device: torch.device
) -> tuple[GradientPath, str]:
    """Return (path, reason): the path with the shortest second ``run``, equal on all ranks. All ranks call it."""
    seconds: dict[GradientPath, float] = {}
    for path in paths:
        run(path)
        began = time.perf_counter()
        run(path)
        taken = torch.tensor(time.perf_counter() - began, device=device)
        seconds[path] = float(ranks.total(taken)) / ranks.world
    shown = ", ".join(f"{path} {taken:.3g} s" for path, taken in seconds.items())
    return min(paths, key=lambda path: seconds[path]), f"time per iteration: {shown}"


def free_bytes(device: torch.device) -> int:
    """Return the free memory of the device: of the GPU, or of the host."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.free()
