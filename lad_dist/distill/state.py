"""The state of a distillation between iterations, as checkpoints store it; sufficient to resume a run.

    checkpoints/distill/iteration-000100/shard-000-of-002.safetensors

Every rank writes its own share of the synthetic set; the folder is published atomically, by one rename. Any number of
ranks can read it, each its own share, so a run may continue with more or fewer ranks than before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from lad_dist.distill.shards import Share
from lad_dist.distill.update import Optimizers
from lad_dist.errors import DistilledError
from lad_dist.ranks import ALONE, Groups, Ranks
from lad_dist.recipe import Recipe, fields_that_affect, without_later_defaults
from lad_dist.rundir import load_tensors, publish_shared_folder, remove, rows_of, save_tensors

_SHARD = re.compile(r"shard-(\d{3,})-of-(\d{3,})\.safetensors")
_FOLDER = re.compile(r"iteration-(\d{6,})")
_SHARED = ("alpha", "momentum_alpha")  # equal on every rank, single numbers; all others are rows of the set
_DIMENSIONS = {"images": 4, "logits": 2, "labels": 2}  # by the last word of a tensor's name


class State:
    """A rank's share of the synthetic set, its optimizers and the number of completed iterations.

    ``initial_SCHH`` are the initial images and ``initial_logits_SK`` their label logits (None: resumed from a
    checkpoint of an older version, which lacks them); ``label_source`` holds statistics of the initial labels.
    """

    def __init__(
        self,
        recipe: Recipe,
        images_SCHH: Tensor,
        logits_SK: Tensor,
        initial_SCHH: Tensor,
        label_source: dict[str, int],
        alpha: Tensor | None = None,
        iteration: int = 0,
        initial_logits_SK: Tensor | None = None,
    ) -> None:
        d = recipe.distill
        alpha = torch.tensor(d.alpha, dtype=torch.float32, device=images_SCHH.device) if alpha is None else alpha
        self.iteration, self.initial_SCHH, self.label_source = iteration, initial_SCHH, label_source
        self.initial_logits_SK = initial_logits_SK
        self.optimizers = Optimizers(images_SCHH, logits_SK, alpha, d)

    @property
    def alpha(self) -> Tensor:
        return self.optimizers.alpha

    def finite(self) -> bool:
        """Return whether all values of the share are finite and the learning rate is positive."""
        o = self.optimizers
        return bool(o.images_SCHH.isfinite().all() & o.logits_SK.isfinite().all() & o.alpha.isfinite() & (o.alpha > 0))

    def save(self, folder: Path, recipe: Recipe, ranks: Ranks = ALONE, groups: Groups | None = None) -> None:
        """Publish the checkpoint in ``folder`` and remove older ones. All ranks call it, at the same iteration.

        ``groups``: each holds the whole set, and the first writes it.

        Raises:
            StorageError: on every rank, if any rank cannot write (the previous checkpoint stays).
        """
        final = folder / f"iteration-{self.iteration:06d}"
        o = self.optimizers
        tensors = {
            "images": o.images_SCHH,
            "label_logits": o.logits_SK,
            "alpha": o.alpha,
            "initial_images": self.initial_SCHH,
            **o.momentum_tensors(),
        }
        if self.initial_logits_SK is not None:
            tensors["initial_label_logits"] = self.initial_logits_SK
        metadata = {
            "iteration": str(self.iteration),
            "recipe_hash": _trajectory_hash(recipe),
            **{f"label_source.{k}": str(v) for k, v in self.label_source.items()},
        }

        def write(temporary: Path) -> list[Path]:
            if groups is not None and groups.index > 0:
                return []
            within = ranks if groups is None else groups.within
            path = temporary / f"shard-{within.rank:03d}-of-{within.world:03d}.safetensors"
            save_tensors(tensors, path, metadata)
            return [path]

        if ranks.share(final.exists()):  # the run stopped right after a checkpoint
            return
        publish_shared_folder(final, write, ranks.rank, ranks.share, ranks.gather)
        if ranks.first:
            for older in _folders(folder)[:-1]:
                remove(older)

    @classmethod
    def load(
        cls,
        folder: Path,
        recipe: Recipe,
        device: torch.device,
        ranks: Ranks = ALONE,
        groups: Groups | None = None,
    ) -> State | None:
        """Load this rank's share of the newest checkpoint in ``folder``; None if there is none.

        Raises:
            DistilledError: it is damaged, incomplete, or of another recipe.
        """
        newest = ranks.share(next(reversed(_folders(folder)), None))
        if newest is None:
            return None
        try:
            tensors, metadata = _read_rows(_shards(newest), ranks if groups is None else groups.within)
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            state = cls(
                recipe,
                tensors["images"],
                tensors["label_logits"],
                tensors["initial_images"],
                {k.removeprefix("label_source."): int(v) for k, v in metadata.items() if k.startswith("label_source.")},
                tensors["alpha"],
                int(metadata["iteration"]),
                tensors.get("initial_label_logits"),
            )
            said = metadata["recipe_hash"]
            if state.iteration < 0:
                raise ValueError(f"it says iteration {state.iteration}")
        except (KeyError, ValueError, OSError, RuntimeError) as error:
            raise DistilledError(
                f"{newest}: is not a readable checkpoint ({error}); remove it to distill from the start"
            ) from error
        if said != _trajectory_hash(recipe):
            raise DistilledError(f"{newest}: was made by another recipe; remove it to distill from the start")
        state.optimizers.load_momentum(tensors, state.iteration)
        return state


def _folders(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, oldest first."""
    found = [p for p in folder.iterdir() if _FOLDER.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def _shards(folder: Path) -> list[Path]:
    """Return the files of one checkpoint in rank order. Raises ValueError if any is missing."""
    found = {int(m[1]): (int(m[2]), p) for p in folder.iterdir() if (m := _SHARD.fullmatch(p.name))}
    worlds = {world for world, _ in found.values()}
    if len(worlds) != 1 or set(found) != set(range(worlds.pop())):
        names = ", ".join(sorted(p.name for _, p in found.values())) or "none"
        raise ValueError(f"shards are missing (found {names})")
    return [found[rank][1] for rank in sorted(found)]


def _read_rows(shards: list[Path], ranks: Ranks) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a rank's rows of the whole set, and the metadata, which all shards share. Holds one shard at a time.

    Raises ValueError, KeyError.
    """
    counts = []
    for path in shards:
        with _named(path):
            counts.append(rows_of(path, "images"))
    rows, begin = Share.of(sum(counts), ranks).rows, 0
    parts: dict[str, list[Tensor]] = {}
    known: dict[str, str] | None = None
    for path, count in zip(shards, counts, strict=True):
        tensors, metadata = _read(path)
        if known not in (None, metadata):
            raise ValueError("its shards are from different checkpoints")
        known = metadata
        own = slice(max(rows.start - begin, 0), max(rows.stop - begin, 0))
        for name, tensor in tensors.items():
            whole = 0 if name in _SHARED else _DIMENSIONS.get(name.rpartition("_")[2], 0)
            if tensor.dim() != whole or (whole and len(tensor) != count) or not tensor.is_floating_point():
                kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
                raise ValueError(f"{path.name}: {name} is {kind}; valid: floats, a row for each of {count} images")
            if name not in _SHARED and len(tensor[own]) < count:
                tensor = tensor[own].clone()  # a view would hold the whole
            parts.setdefault(name, []).append(tensor)
        begin += count
    alone = len(shards) == 1
    return {name: of[0] if alone or name in _SHARED else torch.cat(of) for name, of in parts.items()}, known or {}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a shard and verify its checksum, which older versions did not write, and its entries. Raises ValueError."""
    with _named(path):
        tensors, metadata = load_tensors(path)
    known = {"iteration", "recipe_hash", "sha256"}
    strange = [name for name in metadata if name not in known and not name.startswith("label_source.")]
    if strange:
        raise ValueError(f"{path.name} has the unknown entry {strange[0]!r}")
    return tensors, {name: value for name, value in metadata.items() if name != "sha256"}


@contextmanager
def _named(shard: Path) -> Iterator[None]:
    """Have every ValueError of the block name the shard."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{shard.name}: {error}") from error


def _trajectory_hash(recipe: Recipe) -> str:
    """Hash the fields that determine the course of a distillation, excluding how it is evaluated or saved."""
    doc = recipe.model_dump(mode="json", include={"method", "ipc", "seed", "distill"})
    doc["distill"] = without_later_defaults("distill", fields_that_affect("distill", "distill", doc["distill"]))
    if recipe.can_grow:
        del doc["distill"]["iterations"]
    doc["buffer"] = {"start_after": recipe.buffer.start_after}
    doc["experts"] = recipe.experts_hash()
    doc["experts_count"] = recipe.experts.count
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
