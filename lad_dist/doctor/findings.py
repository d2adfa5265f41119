"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """``name`` of what was looked at, ``found`` in words, and ``todo``: what to do about it, where it is not ok."""

    level: Level
    name: str
    found: str
    todo: str = ""

    def line(self) -> str:
        """``warn  disk  12 GB are free -> point --out elsewhere``."""
        return f"{self.level:<5} {self.name:<14} {self.found}{f' -> {self.todo}' if self.todo else ''}"


def ok(name: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", name, found)


def warn(name: str, found: str, todo: str) -> Finding:
    """It may work."""
    return Finding("warn", name, found, todo)


def fail(name: str, found: str, todo: str) -> Finding:
    """It will not work."""
    return Finding("fail", name, found, todo)
