"""``lad-dist buffer VERB``: look into trajectory buffers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal

if TYPE_CHECKING:
    from lad_dist.trajectories.reader import Buffer

RunOrBuffer = Annotated[str, typer.Argument(metavar="DIR", help="A run folder, a buffer folder, or a buffer's URI.")]


def inspect(
    folder: RunOrBuffer, as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False
) -> None:
    """Per stage and expert the epochs present, sizes, and a digest of all weights (reads every checkpoint)."""
    found = _buffer(folder).inspect()
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=1))
        return
    from rich.table import Table

    table = Table("stage", "expert", "epochs", "parts", "MB")
    for stage, members in found["stages"].items():
        for expert, has in members.items():
            table.add_row(stage, expert, _ranges(has["epochs"]), str(len(has["parts"])), f"{has['bytes'] / 1e6:.2f}")
    terminal.stdout().print(table)
    size = f"{found['bytes'] / 1e6:.2f} MB"
    terminal.stdout().print(
        f"{found['folder']}: {found['parts']} parts, {found['checkpoints']} checkpoints, {size}\n"
        f"experts: {found['meta']['experts_hash']}\ndigest:  {found['digest']}",
        soft_wrap=True,
    )


def verify(folder: RunOrBuffer) -> None:
    """Read every byte of every part; exit code 1 and the file's name on any damage."""
    buffer = _buffer(folder)
    problems = buffer.verify()
    if problems:
        for problem in problems:
            terminal.stderr().print(terminal.styled(problem), soft_wrap=True)
        raise typer.Exit(1)
    checkpoints = sum(part.last - part.first + 1 for part in buffer.parts)
    typer.echo(f"{len(buffer.parts)} parts, {checkpoints} checkpoints, all whole")


def _buffer(text: str) -> Buffer:
    """The buffer in a run folder, in a folder of its own, or at a URI. Raises TrajectoryError where there is none."""
    from lad_dist import recipe_file
    from lad_dist.errors import TrajectoryError
    from lad_dist.location import is_uri, shown
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories.reader import Buffer

    location = text if is_uri(text) else Path(text).expanduser()
    if isinstance(location, Path) and (location / "recipe.yaml").is_file():
        run = RunDir.existing(location)
        buffer = Buffer(run.trajectories, expected_hash=recipe_file.load(run.recipe).experts_hash())
    else:
        buffer = Buffer(location)
    misnamed = isinstance(location, Path) and any(location.rglob("*.parquet"))  # ``verify`` names them
    if not buffer.parts and not misnamed:
        raise TrajectoryError(
            f"{shown(location)}: holds no trajectory parts; valid: a run folder, a buffer folder, or a buffer's URI, which "
            "`lad-dist experts JOB` makes"
        )
    return buffer


def _ranges(epochs: Sequence[int]) -> str:
    """``0-4, 7`` for 0, 1, 2, 3, 4, 7."""
    pieces: list[list[int]] = []
    for epoch in epochs:
        if pieces and pieces[-1][-1] == epoch - 1:
            pieces[-1] = [pieces[-1][0], epoch]
        else:
            pieces.append([epoch, epoch])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in pieces)
