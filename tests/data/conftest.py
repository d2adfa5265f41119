from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lad_dist.recipe import DataConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "lad_golden.npz"
sys.path.insert(0, str(Path(__file__).parent))  # for small_datasets.py, whichever import mode pytest runs in


@pytest.fixture(scope="session")
def golden() -> Any:
    return np.load(GOLDEN)


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    """A data section that never downloads; by default as mild a long tail as there is."""

    def make(**fields: Any) -> DataConfig:
        return DataConfig(**{"imbalance_factor": 1.0, "download": False} | fields)

    return make
