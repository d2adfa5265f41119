"""Find recipes, cluster profiles and run folders by name or path.

A wheel contains ``jobs/`` and ``cluster/`` inside the package; a checkout has them beside it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lad_dist.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parent
_PURPOSE = re.compile(r"^#\s*purpose:\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class JobFile:
    """A recipe file, and its run folder if the user named one."""

    recipe: Path
    run: Path | None = None


def folder(kind: Literal["jobs", "cluster"]) -> Path:
    """Return the folder of shipped files: in the installed package, else in the checkout around it."""
    installed = _PACKAGE / f"_{kind}"
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def jobs() -> dict[str, Path]:
    """Return the shipped recipes by file name, sorted."""
    return {file.stem: file for file in sorted(folder("jobs").rglob("*.yaml"), key=lambda file: _natural(file.stem))}


def profiles() -> dict[str, Path]:
    """Return the shipped cluster profiles by name, without the deployment files in subfolders."""
    return {file.stem: file for file in sorted(folder("cluster").glob("*.yaml"))}


def find_job(text: str) -> JobFile:
    """Resolve JOB of the command line: a shipped recipe's name, else a recipe file, else a run folder.

    A shipped name takes precedence over a folder of that name; ``./name`` is the folder. Raises RecipeError with the
    nearest names.
    """
    shipped, path = jobs(), Path(text).expanduser()
    if text in shipped:
        return JobFile(shipped[text])
    if path.is_dir():
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(
                f"{text}: is a folder without recipe.yaml; valid as JOB: a recipe file, a run folder, or "
                "a name that `lad-dist jobs` lists"
            )
        return JobFile(path / "recipe.yaml", run=path)
    if path.is_file():
        return JobFile(path)
    raise RecipeError(_unknown("job", text, shipped, "lad-dist jobs"))


def find_profile(text: str) -> Path:
    """Return the file of a shipped profile's name, or of a path. Raises RecipeError with the nearest names."""
    shipped, path = profiles(), Path(text).expanduser()
    if text in shipped:
        return shipped[text]
    if path.is_file():
        return path
    raise RecipeError(_unknown("profile", text, shipped, "lad-dist clusters"))


def purpose(file: Path) -> str:
    """Return the ``# Purpose:`` line of a recipe's or profile's header; empty where there is none."""
    found = _PURPOSE.search(file.read_text(encoding="utf-8"))
    return found[1] if found else ""


def family(name: str) -> str:
    """Return a recipe's name with wildcards for factor and IPC: ``cifar10-lt-f*-ipc*``."""
    return re.sub(r"-(f|ipc)\d+(?=-|$)", r"-\1*", name)


def data_set(name: str) -> str:
    """Return the data set that a recipe's name begins with: ``cifar10`` of ``cifar10-lt-f100-ipc10``."""
    return name.partition("-lt")[0]


def _unknown(kind: str, text: str, shipped: Mapping[str, Path], command: str) -> str:
    if "/" in text or text.endswith(_SUFFIXES):
        return f"{text}: no such file; valid: a {kind} file, or a name that `{command}` lists"
    near = difflib.get_close_matches(text, shipped, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(list(shipped)[:5]) or 'none'}"
    return f"{text}: unknown {kind}; {hint} (`{command}` lists all; a path to a YAML file is valid too)"


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a natural sort key: ipc2 before ipc10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]
