"""lad-dist: a large long-tailed image data set into a few synthetic images per class that train a good, fair classifier.

    from lad_dist import load
    images, soft_labels, lr = load("runs/digits-lt/distilled")

Importing this package is cheap: torch is imported by ``load``, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lad_dist.distilled import DistilledSet

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path) -> DistilledSet:
    """The distilled set in a folder, as a ``torch.utils.data.Dataset`` that also unpacks to (images, soft labels, lr).

    Raises:
        lad_dist.errors.DistilledError: the folder is not a whole distilled set.
    """
    from lad_dist.distilled import DistilledSet

    return DistilledSet.load(path)
