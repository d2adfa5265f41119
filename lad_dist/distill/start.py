"""Start and end of a distillation: building the initial synthetic set from real images, and publishing the result.

Rank 0 does both; the other ranks never hold a training image.

Shapes: S synthetic images, N training images, K classes.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lad_dist import __version__
from lad_dist.data.prepare import PreparedData
from lad_dist.distill import initial
from lad_dist.distill.crops import best_crops
from lad_dist.distill.state import State
from lad_dist.distill.student import Student
from lad_dist.distill.windows import Windows
from lad_dist.distilled import DistilledMeta, DistilledSet, hard_logits
from lad_dist.errors import DistilledError
from lad_dist.labeller import Labeller
from lad_dist.models import functional
from lad_dist.progress import Events, Screen
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
from lad_dist.teachers import Output, labeller_of
from lad_dist.teachers import outputs as outputs_of


@dataclass(frozen=True)
class DataFacts:
    """Properties of the training images for ranks that do not hold them. ``size`` is the side in pixels."""

    channels: int
    size: int
    counts: tuple[int, ...]
    fingerprint: str

    @classmethod
    def of(cls, data: PreparedData) -> DataFacts:
        images = data.splits.train
        return cls(images.channels, images.size, tuple(images.counts), images.fingerprint())


def first_set(
    recipe: Recipe, data: PreparedData, student: Student, windows: Windows, screen: Screen, events: Events
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return (images (S, C, H, H), label logits (S, K), label statistics), on the CPU.

    The images are real ones or crops of them, labelled with the experts' logits, or those of another set
    (``distill.initial_from``).
    """
    if recipe.distill.initial_from is not None:
        return _set_from(set_to_start_from(recipe, data), recipe, windows, screen, events)
    if recipe.distill.initial == "real-crops":
        return _crops(recipe, data, student, windows, screen, events)
    d, cache, chosen_by = recipe.distill, dict[int, Tensor](), set[int]()

    def outputs(function: Output, expert: int, indices: np.ndarray | None = None) -> Tensor:
        return outputs_of(function, student.module, windows.teacher(expert), data, indices)

    fits = 4 * len(data.train) * data.classes <= initial.MOST_BYTES

    def predicted_of(expert: int) -> Tensor | None:
        if fits:
            return None
        passes = torch.arange(len(data.train)).split(initial.PASS)
        said = torch.cat([outputs(functional.logits, expert, rows.numpy()).argmax(dim=1) for rows in passes])
        chosen_by.add(expert)
        return said

    def logits_of(expert: int, indices: np.ndarray) -> Tensor:
        if expert in chosen_by:
            return _of_whole_passes(lambda rows: outputs(functional.logits, expert, rows), indices, len(data.train))
        if len(indices) <= len(cache.get(expert, ())):
            return cache[expert][torch.from_numpy(indices)]
        logits = outputs(functional.logits, expert, indices)
        if len(indices) == len(data.train):
            cache[expert] = logits
        return logits

    first = initial.build(
        logits_of,
        windows.experts,
        data.train.labels_N.cpu().numpy(),
        recipe.ipc,
        data.classes,
        seed=recipe.seed,
        only_correct=d.initial != "real-random",
        hard_labels=d.labels == "hard",
        one_expert=d.initial_labels == "one-expert",
        predicted_of=predicted_of,
        features_of=(lambda e: outputs(functional.features, e)) if d.initial == "real-herded" else None,
    )
    images_SCHH, _ = data.train.batch(torch.from_numpy(first.indices_S))
    images_SCHH = initial.vary_repeats(images_SCHH, first.indices_S, recipe.seed, recipe.augment)
    source = {"images_no_expert_classified": first.without_expert, "images_repeated": first.repeated}
    events.emit("initial-set", indices=first.indices_S.tolist(), experts=list(windows.experts), **source)
    screen.say(
        f"distill: {len(images_SCHH)} initial images; {first.without_expert} labelled by their class's mean logits, "
        f"{first.repeated} are augmented copies of others"
    )
    logits_SK = first.logits_SK / (d.label_temperature if d.labels == "soft" else 1.0)
    return images_SCHH.cpu(), logits_SK, source


def _crops(
    recipe: Recipe, data: PreparedData, student: Student, windows: Windows, screen: Screen, events: Events
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """``first_set`` for ``distill.initial`` real-crops: the labels are the mean logits of all experts."""
    d = recipe.distill
    teachers = labeller(recipe, data, student, windows, windows.experts)
    images_SCHH, indices_S = best_crops(data, teachers.logits, recipe.ipc, d.initial_crops, recipe.seed)
    if d.labels == "hard":
        logits_SK = hard_logits(data.splits.train.labels_N[torch.from_numpy(indices_S)], data.classes)
    else:
        on_device = images_SCHH.to(data.device)
        logits_SK = torch.cat([teachers.logits(x) for x in on_device.split(512)]).cpu() / d.label_temperature
    teachers.release()
    source = {"images_no_expert_classified": 0, "images_repeated": 0}
    events.emit("initial-set", indices=indices_S.tolist(), experts=list(windows.experts), **source)
    screen.say(f"distill: {len(images_SCHH)} initial images: crops of real ones")
    return images_SCHH, logits_SK, source


def set_to_start_from(recipe: Recipe, data: PreparedData) -> DistilledSet:
    """Return the set that ``distill.initial_from`` names.

    Raises DistilledError if there is none, or it is of other images, another whitening or another IPC.
    """
    folder = Path(recipe.distill.initial_from or "").expanduser()
    folder = folder / "distilled" if (folder / "recipe.yaml").is_file() else folder
    other, where = DistilledSet.load(folder), f"distill.initial_from: {folder}"
    if other.meta.data_fingerprint != data.splits.train.fingerprint():
        raise DistilledError(f"{where}: was made from other training images than this recipe's")
    if not data.whitening.agrees(other.whitening):
        raise DistilledError(f"{where}: its images are whitened otherwise; valid: a set of the same data.whitening")
    if other.meta.ipc != recipe.ipc:
        raise DistilledError(f"{where}: has {other.meta.ipc} images per class; valid: a set of ipc {recipe.ipc}")
    return other


def _set_from(
    other: DistilledSet, recipe: Recipe, windows: Windows, screen: Screen, events: Events
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """``first_set`` from another set: its images class after class, with its labels, or hard ones as the method has.

    Raises DistilledError if a replayed run started from another set.
    """
    source = {"images_no_expert_classified": 0, "images_repeated": 0}
    digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in (other.images, other.label_logits)))
    start, record = digest.hexdigest(), windows.record
    if record is not None and record.start not in (None, start):
        raise DistilledError(
            f"distill.initial_from: {recipe.distill.initial_from}: is not the set that {record.run} started from; valid: that set"
        )
    about = {"taken_from": other.meta.recipe_hash, "start": start}
    events.emit("initial-set", indices=[], experts=list(windows.experts), **about, **source)
    screen.say(f"distill: starts from another set ({other.meta.method}, iteration {other.meta.iteration})")
    order_S = other.labels.argsort(stable=True)
    logits_SK = other.label_logits[order_S]
    if recipe.distill.labels == "hard":
        logits_SK = hard_logits(other.labels[order_S], logits_SK.shape[1])
    return other.images[order_S], logits_SK, source


def mean_logits(
    recipe: Recipe, data: PreparedData, student: Student, windows: Windows
) -> Callable[[np.ndarray], Tensor]:
    """Return a function from indices of training images to logits (N, K).

    The logits are the mean over the last checkpoints of the experts that label images.
    """

    def of_part(indices: np.ndarray) -> Tensor:
        each = [
            outputs_of(functional.logits, student.module, windows.teacher(e), data, indices) for e in windows.experts
        ]
        return torch.stack(each).mean(dim=0)

    def of(indices: np.ndarray) -> Tensor:
        step = initial.rows_at_a_time(len(windows.experts), data.classes)
        return torch.cat([of_part(part) for part in np.split(indices, range(step, len(indices), step))])

    return of


def _of_whole_passes(logits_of: Callable[[np.ndarray], Tensor], indices: np.ndarray, count: int) -> Tensor:
    """Return logits (S, K) as a pass over all ``count`` images would give them, computing only the batches needed.

    The last bit of a row depends on the batch it is computed in.
    """
    out_SK: Tensor | None = None
    for number in np.unique(indices // initial.PASS).tolist():
        start = number * initial.PASS
        logits_BK = logits_of(np.arange(start, min(start + initial.PASS, count)))
        here = np.flatnonzero(indices // initial.PASS == number)
        out_SK = logits_BK.new_empty(len(indices), logits_BK.shape[1]) if out_SK is None else out_SK
        out_SK[torch.from_numpy(here)] = logits_BK[torch.from_numpy(indices[here] - start)]
    assert out_SK is not None, "a set has images"
    return out_SK


def labeller(
    recipe: Recipe, data: PreparedData, student: Student, windows: Windows, experts: Sequence[int]
) -> Labeller:
    """Return ``experts`` as teachers."""
    weights = [windows.teacher(expert).cpu() for expert in experts]
    return labeller_of(recipe, data, student.layout, weights)


def publish(recipe: Recipe, data: PreparedData, state: State, run: RunDir, folder: Path, teachers: Labeller) -> None:
    """Publish the whole synthetic set of ``state`` as a distilled set in ``folder``."""
    o, images = state.optimizers, data.splits.train
    meta = DistilledMeta(
        method=recipe.method,
        dataset=images.name,
        ipc=recipe.ipc,
        class_names=images.class_names,
        counts=images.counts,
        lr=float(o.alpha),
        iteration=state.iteration,
        selection=recipe.distill.select,
        recipe_hash=recipe.recipe_hash(),
        experts_hash=recipe.experts_hash(),
        data_fingerprint=images.fingerprint(),
        recipe=recipe.model_dump(mode="json"),
        versions={"lad_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
        label_source=state.label_source,
    )
    whole = DistilledSet(
        o.images_SCHH.cpu(),
        o.logits_SK.cpu(),
        torch.arange(data.classes).repeat_interleave(recipe.ipc),
        meta,
        data.whitening.to("cpu"),
        state.initial_SCHH.cpu(),
        None if state.initial_logits_SK is None else state.initial_logits_SK.cpu(),
        teachers,
    )
    with run.publish_folder(folder) as temporary:
        whole.write(temporary)
