"""A small layout and deterministic checkpoints: the same key always has the same weights, as real work units do."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from lad_dist.seeds import rng
from lad_dist.trajectories import BufferMeta, PartWriter, Stage

Weights = Callable[[Stage, int, int], npt.NDArray[np.float32]]
Write = Callable[..., Path]


@pytest.fixture
def meta() -> BufferMeta:
    return BufferMeta(
        experts_hash="aa11",
        data_fingerprint="ff00",
        class_counts=(50, 20, 5),
        parameters=(
            ("features.weight", (20, 7)),
            ("features.bias", (20,)),
            ("head.weight", (3, 20)),
            ("head.bias", (3,)),
        ),
        classifier_parameters=("head.weight", "head.bias"),
        recipe={"experts": {"epochs": 12, "lr": 0.01}, "augment": ["flip", "crop"]},
        versions={"torch": "2.13", "pyarrow": "26"},
    )


@pytest.fixture
def weights(meta: BufferMeta) -> Weights:
    def make(stage: Stage, expert: int, epoch: int) -> npt.NDArray[np.float32]:
        draws = rng(0, stage, expert, epoch).normal(size=meta.vector_length(stage))
        return draws.astype(np.float32)

    return make


@pytest.fixture
def write(tmp_path: Path, meta: BufferMeta, weights: Weights) -> Write:
    """Write epochs first..last of one expert; metrics at every epoch but 0. Returns the buffer's folder."""

    def run(
        last: int,
        stage: Stage = "representation",
        expert: int = 7,
        first: int = 0,
        per_part: int = 4,
        folder: Path | None = None,
        meta: BufferMeta = meta,
    ) -> Path:
        target = folder or tmp_path / "buffer"
        with PartWriter(target, meta, stage, expert, per_part) as writer:
            for epoch in range(first, last + 1):
                metrics = (None, None, None) if epoch == 0 else (1 / epoch, 1 - 1 / (epoch + 1), 0.5 * epoch)
                writer.append(epoch, weights(stage, expert, epoch), *metrics)
        return target

    return run
