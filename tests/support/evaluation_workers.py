"""What rank processes of tests/evaluate/ run; importable by name, as spawned processes need."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lad_dist import pipeline, ranks


def dies_once(recipe: Any, run: Any, profile: Any, kind: str, source: Any, rows: list[Any], marker: str) -> None:
    """As ``pipeline.evaluate_rank``; rank 1 is killed after its first row, once."""
    where = ranks.place()
    assert where is not None
    if where.rank == 1 and not Path(marker).exists():
        Path(marker).touch()
        from lad_dist.evaluate import measure

        original = measure.results.put

        def put(path: Path, row: Any) -> Path:
            original(path, row)
            os.kill(os.getpid(), 9)
            raise AssertionError

        measure.results.put = put  # type: ignore[assignment]
    pipeline.evaluate_rank(recipe, run, profile, kind, source, rows)
