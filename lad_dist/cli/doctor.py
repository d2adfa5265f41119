"""``lad-dist doctor``: check the environment."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions, JsonOption


def doctor(
    on: Annotated[
        str, typer.Option(metavar="PROFILE", help="Where jobs will run: a profile's name, or a file.")
    ] = "local",
    out: Annotated[Path, typer.Option(help="Parent folder of the run folders.")] = Path("runs"),
    wait: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time limit for the SLURM test job.")] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Check the environment: versions, GPUs, ranks, folders, Ray, SLURM; each line ok, warn or fail, with a remedy."""
    from rich.text import Text

    from lad_dist.doctor import examine
    from lad_dist.doctor.findings import Finding
    from lad_dist.errors import DoctorError
    from lad_dist.interrupts import as_exceptions

    profile = JobOptions("", on=on).profile()
    screen, colours = terminal.stdout(), {"ok": "green", "warn": "yellow", "fail": "bold red"}
    failed, found = list[str](), list[Finding]()
    with as_exceptions():
        for one in examine(profile, out, wait):
            failed += [one.name] if one.level == "fail" else []
            if as_json:
                found.append(one)
                continue
            line = Text(one.line())
            line.stylize(colours[one.level], 0, 5)
            screen.print(line, soft_wrap=True)
    if as_json:
        terminal.print_json([asdict(one) for one in found])
    if failed:
        raise DoctorError(
            f"{len(failed)} check{'s' if len(failed) > 1 else ''} failed: {', '.join(dict.fromkeys(failed))}"
        )
