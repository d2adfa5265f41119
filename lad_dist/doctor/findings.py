"""Result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """Result of one check: its ``name``, what was ``found``, and ``todo``: the remedy if it is not ok."""

    level: Level
    name: str
    found: str
    todo: str = ""

    def line(self) -> str:
        """Return ``warn  disk  12 GB are free -> point --out elsewhere``."""
        return f"{self.level:<5} {self.name:<14} {self.found}{f' -> {self.todo}' if self.todo else ''}"


def ok(name: str, found: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding("ok", name, found)


def warn(name: str, found: str, todo: str) -> Finding:
    """Return a finding that may cause a failure."""
    return Finding("warn", name, found, todo)


def fail(name: str, found: str, todo: str) -> Finding:
    """Return a finding that will cause a failure."""
    return Finding("fail", name, found, todo)
