"""The state of a distillation between iterations: what a checkpoint holds, and all that a resumed run needs."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from lad_dist.distill.update import Optimizers
from lad_dist.errors import DistilledError
from lad_dist.recipe import Recipe
from lad_dist.rundir import published, save_tensors


class State:
    """Synthetic set, optimizers and the number of iterations done.

    ``initial_SCHH`` are the images it started from; ``label_source`` counts how the labels came about.
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
    ) -> None:
        d = recipe.distill
        alpha = torch.tensor(d.alpha, dtype=torch.float32, device=images_SCHH.device) if alpha is None else alpha
        self.iteration, self.initial_SCHH, self.label_source = iteration, initial_SCHH, label_source
        self.optimizers = Optimizers(
            images_SCHH,
            logits_SK,
            alpha,
            lr=(d.lr_images, d.lr_labels, d.lr_alpha),
            momentum=(d.momentum_images, d.momentum_labels, d.momentum_alpha),
            learn_labels=d.labels == "soft",
        )

    @property
    def alpha(self) -> Tensor:
        return self.optimizers.alpha

    def finite(self) -> bool:
        """Whether every number of the synthetic set is finite, and the learning rate positive."""
        o = self.optimizers
        return bool(o.images_SCHH.isfinite().all() & o.logits_SK.isfinite().all() & o.alpha.isfinite() & (o.alpha > 0))

    def save(self, path: Path, recipe: Recipe) -> None:
        """Publish the checkpoint. Raises StorageError where it cannot be written (the previous one stays)."""
        o = self.optimizers
        tensors = {
            "images": o.images_SCHH,
            "label_logits": o.logits_SK,
            "alpha": o.alpha,
            "initial_images": self.initial_SCHH,
            **o.momentum_tensors(),
        }
        metadata = {
            "iteration": str(self.iteration),
            "recipe_hash": _trajectory_hash(recipe),
            **{f"label_source.{k}": str(v) for k, v in self.label_source.items()},
        }
        with published(path) as temporary:
            save_tensors({k: t.clone() for k, t in tensors.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: Path, recipe: Recipe, device: torch.device) -> State:
        """What ``save`` wrote. Raises DistilledError where it is damaged or of another recipe."""
        try:
            raw = path.read_bytes()
            # clones: tensors parsed in place lie where the file put them, and alignment changes the last bits of some sums
            tensors = {k: t.to(device).clone() for k, t in parse_tensors(raw).items()}
            metadata = _metadata(raw)
            state = cls(
                recipe,
                tensors["images"],
                tensors["label_logits"],
                tensors["initial_images"],
                {k.removeprefix("label_source."): int(v) for k, v in metadata.items() if k.startswith("label_source.")},
                tensors["alpha"],
                int(metadata["iteration"]),
            )
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise DistilledError(
                f"{path}: is not a readable checkpoint ({error}); remove it to distill from the start"
            ) from error
        if metadata["recipe_hash"] != _trajectory_hash(recipe):
            raise DistilledError(f"{path}: was made by another recipe; remove it to distill from the start")
        state.optimizers.load_momentum(tensors)
        return state


def _metadata(raw: bytes) -> dict[str, str]:
    import json

    length = int.from_bytes(raw[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(raw[8 : 8 + length])
    return header.get("__metadata__", {})


def _trajectory_hash(recipe: Recipe) -> str:
    """The hash of what determines the course of a distillation: how it is evaluated or saved does not."""
    import hashlib
    import json

    doc = recipe.model_dump(mode="json", include={"method", "ipc", "seed", "distill"})
    free = ("gradient", "memory_gb", "checkpoint_every", "iterations")
    doc["distill"] = {k: v for k, v in doc["distill"].items() if k not in free}
    doc["experts"] = recipe.experts_hash()
    doc["experts_count"] = recipe.experts.count
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()
