"""``lad-dist demo``: distil digits-LT and show what the result is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lad_dist.cli import terminal


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the runs and their experts.")] = Path(
        "runs/demo"
    ),
) -> None:
    """Distil digits-LT, IPC 2, in three minutes: LAD with feature regression beside DATM, real images and the whole set.

    Then statistical alignment, whose teachers label every batch: of its images and of random ones.

    Needs no data. An interrupted demo continues by the same command.
    """
    import subprocess
    import sys
    import time

    began, shared = time.monotonic(), ["--buffers", str(out / "buffers")]
    for command in commands(out, shared):
        typer.echo(f"\n$ lad-dist {' '.join(command)}")
        ended = subprocess.run([sys.executable, "-m", "lad_dist.cli", *command], check=False)  # noqa: S603 - this package
        if ended.returncode:
            raise typer.Exit(ended.returncode)
    page = (out / "lad" / "report" / "index.html").resolve()
    text = f"\nThe demo took {time.monotonic() - began:.0f} s. Open the report: file://{page}"
    terminal.stdout().print(text, soft_wrap=True)


def commands(out: Path, shared: list[str]) -> list[list[str]]:
    """Return the demo's commands: two runs on the same experts, one with teachers, and their comparison."""
    theirs = ["--set", "method=datm", "--set", "evaluate.baselines=[initial]"]
    shorter = ["--set", "evaluate.seeds=2", "--set", "evaluate.epochs=300"]
    shorter += ["--set", "evaluate.baselines=[teachers,initial-teacher,random-teacher,distilled-teacher]"]
    return [
        ["run", "digits-lt", "--out", str(out / "lad"), *shared],
        ["run", "digits-lt-matching", "--out", str(out / "datm"), *shared, *theirs],
        ["run", "digits-lt-aligned", "--out", str(out / "aligned"), *shared, *shorter],
        ["compare", str(out / "lad"), str(out / "datm")],
    ]
