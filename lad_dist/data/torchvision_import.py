"""Import torchvision, even with a CPU-only torch.

The torchvision wheel on the package index is built for CUDA. With a CPU-only torch its compiled part ``_C`` cannot be
loaded (it needs the CUDA libraries), so the operators ``nms`` and ``qnms`` are never declared, and the import fails
with "operator torchvision::nms does not exist" although data sets, transforms and models need neither. Declaring the
two schemas beforehand lets the import succeed. This is the only place in lad-dist that does so.
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
    """Return the module ``torchvision``, with its ``datasets``, ``transforms`` and ``models`` importable.

    Raises ``ImportError`` if torchvision is not installed.
    """
    if "torchvision" not in sys.modules and not _operators_load():
        _declare_operators()
    return importlib.import_module("torchvision")


def _operators_load() -> bool:
    """Return whether torchvision will find its operators itself (declaring them again would then be an error)."""
    if torch.version.cuda is not None:
        return True  # matches the wheel; if the import still fails, torchvision's own message applies
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # not installed: the import reports it
    # The file that torchvision/extension.py loads next, in the same way; loading it twice is harmless.
    for library in Path(next(iter(spec.submodule_search_locations))).glob("_C*"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        return True
    return False


@functools.cache  # a library fragment withdraws its schemas when garbage-collected, and must be created only once
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
