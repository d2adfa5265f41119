"""lad-dist: a large long-tailed image data set into a few synthetic images per class that train a good, fair classifier.

    from lad_dist import Recipe, Run, load

    run = Run.open("runs/digits", "digits-lt")               # stages: train_experts, distill, evaluate, report
    images, soft_labels, lr = run.distill()
    images, soft_labels, lr = load("runs/digits/distilled")  # anywhere else

Importing this package is cheap: torch is imported by what needs it, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lad_dist.api import Run, change
    from lad_dist.callbacks import Callback
    from lad_dist.distilled import DistilledSet
    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Callback", "Profile", "Recipe", "Run", "__version__", "change", "load"]

_HOMES = {"Run": "api", "change": "api", "Recipe": "recipe", "Profile": "profile", "Callback": "callbacks"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def load(path: str | Path) -> DistilledSet:
    """The distilled set in a folder, as a ``torch.utils.data.Dataset`` that also unpacks to (images, soft labels, lr).

    ``path`` may be an address: ``hf://OWNER/NAME``, ``hf://OWNER/NAME@REVISION`` or ``https://HOST/FOLDER``. Its
    checksums are verified; what comes from the hub stays in that library's cache.

    Raises:
        lad_dist.errors.DistilledError: it is not a whole distilled set.
        lad_dist.errors.SharingError: the address is wrong or cannot be reached, or a file of it is damaged.
    """
    if isinstance(path, str) and (path.startswith("hf:") or "://" in path):
        from lad_dist.sharing import transfer

        return transfer.load(path)
    from lad_dist.distilled import DistilledSet

    return DistilledSet.load(path)
