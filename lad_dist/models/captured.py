"""Functions of tensors as CUDA graphs, captured at their first call and replayed afterwards.

A training step launches about a hundred small kernels, and a GPU that is faster than its host idles between them; a
graph is one launch. A graph computes on its own tensors, so arguments are copied in and results out. It is used only
after its results have matched the function's; otherwise, or where it cannot be captured, the function is called
directly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lad_dist.errors import first_line

Function = Callable[..., tuple[Tensor, ...]]
MOST = 16  # graphs held at a time: batch sizes times kinds of steps
_WARM_UPS = 3
_TOLERANCE = 1e-3  # relative to the largest value
_log = logging.getLogger(__name__)


class Captured:
    """Call hashable functions; on a GPU through one graph per function and set of shapes.

    A function's results must depend only on its arguments, on what its equality compares, and on tensors that keep
    their place in memory, such as parameters updated in place. ``what`` names the functions in messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._known: dict[Hashable, Function] = {}
        self._pool: Any = None
        self._warned = False

    def __call__(self, function: Function, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self.applies(tensors[0].device):
            return function(*tensors)
        key = (function, *((t.shape, t.dtype, t.device) for t in tensors))
        if key not in self._known:
            if len(self._known) >= MOST:
                return function(*tensors)
            self._known[key] = self._trusted(function, tensors)
        return self._known[key](*tensors)

    @staticmethod
    def applies(device: torch.device) -> bool:
        """Return whether graphs are used on this device."""
        return device.type == "cuda"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the graphs out of copies and pickles; they are captured anew."""
        return {"_what": self._what, "_known": {}, "_pool": None, "_warned": self._warned}

    def clear(self) -> None:
        """Free the graphs' memory."""
        self._known.clear()
        self._pool = None

    def _trusted(self, function: Function, tensors: tuple[Tensor, ...]) -> Function:
        try:
            replay = self._replay(function, tensors)
            for _ in range(2):  # the second replay shows whether the first left state behind
                far = max(_far(ours, theirs) for ours, theirs in zip(replay(*tensors), function(*tensors), strict=True))
                if not far <= _TOLERANCE:
                    raise RuntimeError(f"replayed results differ by {far:.1e}")
        except Exception as error:  # capture errors have many types; the function itself still works
            if not self._warned:
                self._warned = True
                _log.warning("%s without CUDA graphs, slower: %s", self._what, first_line(error))
            return function
        return replay

    def _replay(self, function: Function, tensors: tuple[Tensor, ...]) -> Function:
        held = [t.detach().clone() for t in tensors]
        results, launch = self._capture(function, held)

        def replay(*given: Tensor) -> tuple[Tensor, ...]:
            for mine, theirs in zip(held, given, strict=True):
                mine.copy_(theirs)
            launch()
            return tuple(t.clone() for t in results)

        return replay

    def _capture(self, function: Function, held: list[Tensor]) -> tuple[tuple[Tensor, ...], Callable[[], object]]:
        """Return (result tensors, function that recomputes them from ``held``)."""
        device = held[0].device
        with torch.cuda.device(device):
            here, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):  # libraries choose algorithms and compile kernels before the capture
                for _ in range(_WARM_UPS):
                    function(*held)
            here.wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # thread_local: CUDA calls of other threads, such as NCCL's, do not abort the capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                results = function(*held)
        return results, graph.replay


def _far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30)) if ours.numel() else 0.0
