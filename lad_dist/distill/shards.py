"""Assignment of synthetic images to ranks: contiguous shares of the class-major set, of nearly equal size.

Shapes: S synthetic images, B of one batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lad_dist.data import augment
from lad_dist.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """Rows ``first`` to ``end`` (exclusive) of the whole set.

    A boundary may fall inside a class, a share may be smaller than a class, and with more ranks than images it may be
    empty.
    """

    first: int
    end: int

    @classmethod
    def of(cls, total: int, ranks: Ranks) -> Share:
        """Return a rank's share; sizes differ by at most one."""
        bounds = [total * r // ranks.world for r in (ranks.rank, ranks.rank + 1)]
        return cls(*bounds)

    @property
    def rows(self) -> slice:
        return slice(self.first, self.end)

    def part(self, rows_B: np.ndarray, drawn: augment.Draw) -> tuple[np.ndarray, augment.Draw, np.ndarray]:
        """Return the part of a batch in this share: (rows relative to its first, augmentation, positions in the batch).

        ``rows_B`` are rows of the whole set and ``drawn`` the parameters of all of them, so a row's augmentation does
        not depend on the rank that holds it.
        """
        places = np.flatnonzero((rows_B >= self.first) & (rows_B < self.end))
        return rows_B[places] - self.first, drawn.rows(places), places

    def classes(self, ipc: int) -> np.ndarray:
        """Return the class of each row of the share, given ``ipc`` rows per class."""
        return np.arange(self.first, self.end) // ipc
