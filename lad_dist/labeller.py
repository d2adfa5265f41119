"""Labeller: networks whose mean logits label images; teachers that travel with a distilled set as one file.

Shapes: B images of a batch, C channels, H side, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from lad_dist.errors import DistilledError, first_line
from lad_dist.models import functional
from lad_dist.models.captured import Captured
from lad_dist.models.layout import Layout
from lad_dist.models.network import build
from lad_dist.recipe import ModelConfig
from lad_dist.rundir import load_tensors, save_tensors

FILE = "teachers.safetensors"
_KEY = "lad_dist_teachers"  # of the file's metadata
_Shape = tuple[int, int, int]


class Labeller:
    """Teachers of one architecture. Called with whitened images (B, C, H, H), returns probabilities (B, K).

    They are the softmax of the teachers' mean logits over ``temperature``. ``shape``: channels, side, classes.
    ``weights``: each teacher's parameters by name.
    """

    def __init__(
        self, model: ModelConfig, shape: _Shape, weights: Sequence[dict[str, Tensor]], temperature: float
    ) -> None:
        self.model, self.shape, self.weights, self.temperature = model, shape, list(weights), temperature
        self.where = FILE  # in messages
        self._network: nn.Module | None = None
        self._captured = Captured("teachers")

    def __call__(self, images_BCHH: Tensor) -> Tensor:
        return torch.softmax(self.logits(images_BCHH) / self.temperature, dim=1)

    @torch.no_grad()
    def logits(self, images_BCHH: Tensor) -> Tensor:
        """Return the teachers' mean logits (B, K) on whitened images (B, C, H, H)."""
        self._built(images_BCHH.device)
        (logits_BK,) = self._captured(self._mean_logits, images_BCHH)
        return logits_BK

    def _mean_logits(self, images_BCHH: Tensor) -> tuple[Tensor]:
        network = self._built(images_BCHH.device)
        return (torch.stack([functional.logits(network, views, images_BCHH) for views in self.weights]).mean(dim=0),)

    def _built(self, device: torch.device) -> nn.Module:
        """Return the network on the images' device, with the weights moved there."""
        if self._network is None or self.weights[0][next(iter(self.weights[0]))].device != device:
            channels, size, classes = self.shape
            self.release()  # graphs read the weights where they were
            self._network = build(self.model, channels, size, classes, seed=0, purpose=("template",)).to(device)
            self.weights = [{name: tensor.to(device) for name, tensor in one.items()} for one in self.weights]
        return self._network

    def release(self) -> None:
        """Free the memory of graphs on a GPU."""
        self._captured.clear()

    @property
    def bytes(self) -> int:
        """Size of all weights as float32."""
        return sum(4 * tensor.numel() for one in self.weights for tensor in one.values())

    def save(self, path: Path) -> None:
        """Write the file; its bytes are a function of the teachers."""
        tensors = {f"{i}.{name}": tensor for i, one in enumerate(self.weights) for name, tensor in one.items()}
        about = {
            "model": self.model.model_dump(mode="json"),
            "shape": list(self.shape),
            "temperature": self.temperature,
        }
        save_tensors(tensors, path, {_KEY: json.dumps(about, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> Labeller:
        """Read a file written by ``save``, without building its network, whose code may be elsewhere; see ``check``.

        Raises:
            DistilledError: the file is missing, damaged or no file of teachers.
        """
        try:
            tensors, metadata = load_tensors(path)
            about: dict[str, Any] = json.loads(metadata[_KEY])
            made = cls(
                ModelConfig.model_validate(about["model"]),
                TypeAdapter(_Shape).validate_python(tuple(about["shape"])),
                _by_teacher(tensors),
                TypeAdapter(float).validate_python(about["temperature"]),
            )
        except FileNotFoundError:
            raise DistilledError(f"{path}: is missing") from None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise DistilledError(f"{path}: is not a whole file of teachers ({first_line(error)})") from error
        if not made.weights or made.temperature <= 0:
            raise DistilledError(f"{path}: holds no teachers, or a temperature of {made.temperature:g}; valid: above 0")
        made.where = str(path)
        return made

    def check(self) -> None:
        """Raise DistilledError if a teacher's parameters are not those of the network; RecipeError if that cannot be built."""
        channels, size, classes = self.shape
        layout = Layout.of(build(self.model, channels, size, classes, seed=0, purpose=("template",)))
        expected = dict(zip(layout.names, layout.shapes, strict=True))
        for i, one in enumerate(self.weights):
            if {name: tuple(tensor.shape) for name, tensor in one.items()} != expected:
                raise DistilledError(f"{self.where}: the weights of teacher {i} are not those of its network")


def _by_teacher(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the parameters by name of each teacher: those of ``0.``, ``1.``, ... Raises ValueError for other numbers."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, parameter = name.partition(".")
        found.setdefault(int(number), {})[parameter] = tensor
    if sorted(found) != list(range(len(found))):
        raise ValueError(f"its teachers are numbered {sorted(found)}")
    return [found[i] for i in range(len(found))]
