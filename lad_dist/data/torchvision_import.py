"""Import torchvision, also beside a CPU-only torch.

The torchvision wheel of the package index is built for CUDA. Beside a CPU-only torch its compiled part ``_C`` cannot be
loaded (it needs the CUDA libraries), so the operators ``nms`` and ``qnms`` are never declared, and the import stops
with "operator torchvision::nms does not exist" although data sets, transforms and models need neither. Declaring the
two schemas beforehand lets the import finish. This is the only place of lad-dist that does so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision() -> ModuleType:
    """The module ``torchvision``, with its ``datasets``, ``transforms`` and ``models`` importable.

    Raises ``ImportError`` where torchvision is not installed.
    """
    if "torchvision" not in sys.modules and not _operators_load():
        _declare_operators()
    return importlib.import_module("torchvision")


def _operators_load() -> bool:
    """Whether torchvision will find its operators by itself (then declaring them again would be an error)."""
    if torch.version.cuda is not None:
        return True  # the wheel's own case; where it still fails, torchvision's message is the right one
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed: let the import say so
    # The file that torchvision/extension.py loads a moment later, in the same way; loading it twice is harmless.
    for library in Path(next(iter(spec.submodule_search_locations))).glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


@functools.cache  # a library fragment withdraws its schemas when it is collected, and must be made once
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
