"""The actor of a fleet: trains one expert on the images passed to it. Does not import Ray; ``fleet.py`` wraps it."""

from __future__ import annotations

import os
import socket
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lad_dist import allocator, errors
from lad_dist.data.datasets import DataSplits, ImageSet
from lad_dist.data.prepare import PreparedData
from lad_dist.data.prepared import PreparedSet
from lad_dist.data.whitening import Kind, Whitening
from lad_dist.errors import LadDistError, StorageError
from lad_dist.experts.scheduler import Failure, Process, in_words, name_of
from lad_dist.experts.train import Epoch, ExpertTrainer
from lad_dist.recipe import ExpertsConfig, Recipe
from lad_dist.trajectories import claims
from lad_dist.trajectories.files import is_lasting


@dataclass(frozen=True)
class SharedData:
    """The training images and their whitening as arrays, which all processes of a host can share without copying."""

    images_NCHW: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    name: str
    kind: Kind
    eps: float
    whitening: tuple[npt.NDArray[np.float32], ...]  # mean, matrix, inverse

    @classmethod
    def of(cls, data: PreparedData) -> SharedData:
        """Return the part of ``data`` that experts use."""
        train, w = data.splits.train, data.whitening
        return cls(
            train.images_NCHW.contiguous().numpy(),
            train.labels_N.numpy(),
            train.class_names,
            train.name,
            w.kind,
            w.eps,
            tuple(tensor.cpu().numpy() for tensor in (w.mean, w.matrix, w.inverse)),
        )

    @property
    def nbytes(self) -> int:
        """Size of all arrays in bytes."""
        return self.images_NCHW.nbytes + self.labels_N.nbytes + sum(array.nbytes for array in self.whitening)

    def prepared(self, device: torch.device) -> PreparedData:
        """Return training data on ``device``, whitened there as in any other process. It contains no test images."""
        images_NCHW, labels_N = _tensor(self.images_NCHW), _tensor(self.labels_N)
        train = ImageSet(images_NCHW, labels_N, self.class_names, self.name)
        nothing = ImageSet(images_NCHW[:0], labels_N[:0], self.class_names, f"{self.name} (none)")
        channels, height, width = self.images_NCHW.shape[1:]
        mean, matrix, inverse = (_tensor(array) for array in self.whitening)
        whitening = Whitening(self.kind, self.eps, (channels, height, width), mean, matrix, inverse).to(device)
        splits = DataSplits(train, None, nothing, train.counts)
        return PreparedData(splits, whitening, PreparedSet(images_NCHW, labels_N, whitening, device), device)


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    """Return a tensor that shares the array's memory, which may be read-only: nothing writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


@dataclass(frozen=True)
class Orders:
    """Instructions to every actor of a fleet: what to compute, where to write it, and the owner of its claims."""

    recipe: Recipe
    location: Path | str
    owner: str
    device: str
    threads: int


@dataclass(frozen=True)
class Started:
    """Training has started in this process."""

    process: Process


@dataclass(frozen=True)
class Claimed:
    """Another driver is training this expert; nothing was done."""


@dataclass(frozen=True)
class Finished:
    """All epochs are in the buffer."""


Report = Started | Epoch | Claimed | Failure | Finished


class ExpertActor:
    """Train ``expert`` and report progress. Needs the buffer's location, but no file of the data set.

    ``trained``: the expert's epochs when the actor starts, for its name on Ray's dashboard. Ray reads the name once,
    after the constructor; the actor logs its progress, one line per epoch.
    """

    def __init__(self, orders: Orders, data: SharedData, expert: int, trained: int = 0) -> None:
        torch.set_num_threads(orders.threads)
        allocator.keep_freed_memory()
        self._orders, self._data, self._expert, self._trained = orders, data, expert, trained

    def __repr__(self) -> str:
        e = self._orders.recipe.experts
        return f"expert {self._expert}, from epoch {self._trained} of {e.epochs + e.classifier_epochs}"

    def train(self) -> Iterator[Report]:
        """Yield ``Started``, an ``Epoch`` per epoch, and ``Finished`` or a ``Failure``; or only ``Claimed``.

        Errors are reported as text, so that their types need not be pickled.
        """
        for report in self._reports():
            _log(self._orders.recipe.experts, self._expert, report)
            yield report

    def _reports(self) -> Iterator[Report]:
        o, expert = self._orders, self._expert
        try:
            with claims.hold(o.location, name_of(expert), o.owner) as held:
                if not held:
                    yield Claimed()
                    return
                yield Started(Process(socket.gethostname(), os.getpid()))
                trainer = ExpertTrainer(o.recipe, self._data.prepared(torch.device(o.device)), o.location)
                with closing(trainer.train(expert)) as epochs:
                    yield from epochs
            yield Finished()
        except Exception as error:
            yield failure_of(expert, error)


def _log(experts: ExpertsConfig, expert: int, report: Report) -> None:
    """Print a line to stdout, which Ray keeps in the actor's log."""
    match report:
        case Started(process):
            text = f"begins: {process}"
        case Epoch():
            text = in_words(report, experts)
        case Claimed():
            text = "another driver is training it; nothing to do"
        case Failure():
            text = f"failed: {report.trace or report.message}".rstrip()
        case Finished():
            text = "finished: all its epochs are in the buffer"
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} expert {expert}: {text}", flush=True)


def failure_of(expert: int, error: Exception) -> Failure:
    """Convert an error to text, with its traceback."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, LadDistError):
        known = next(t.__name__ for t in type(error).__mro__ if getattr(errors, t.__name__, None) is t)
        lasting = isinstance(error, StorageError) and is_lasting(error.__cause__)
        return Failure(expert, str(error), known, trace, lasting)
    return Failure(expert, f"{type(error).__name__}: {error}", None, trace)
