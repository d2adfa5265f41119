"""Which rank holds which synthetic images: contiguous shares of the class-major set, as even as they can be.

Shapes: S synthetic images, B of one batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lad_dist.data import augment
from lad_dist.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """Rows ``first`` to ``end`` (exclusive) of the ``total`` rows of the whole set.

    A boundary may fall inside a class, a share may be smaller than a class, and with more ranks than images it is empty.
    """

    first: int
    end: int
    total: int

    @classmethod
    def of(cls, total: int, ranks: Ranks) -> Share:
        """The share of a rank: sizes differ by one at most."""
        bounds = [total * r // ranks.world for r in (ranks.rank, ranks.rank + 1)]
        return cls(bounds[0], bounds[1], total)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    def part(self, rows_B: np.ndarray, drawn: augment.Draw) -> tuple[np.ndarray, augment.Draw, np.ndarray]:
        """The part of a batch that lies in this share: its rows counted from the share's first, their augmentation, and their
        places in the batch.

        ``rows_B`` are rows of the whole set and ``drawn`` the parameters of all of them, so a row is augmented alike on
        whichever rank it lies.
        """
        places = np.flatnonzero((rows_B >= self.first) & (rows_B < self.end))
        return rows_B[places] - self.first, drawn.rows(places), places

    def classes(self, ipc: int) -> np.ndarray:
        """The class of each row of the share, where every class has ``ipc`` rows."""
        return np.arange(self.first, self.end) // ipc
