"""``lad-dist cache``: what is kept of decoded data sets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.table import Table

    from lad_dist.data.decoded import Kept


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all entries; not while runs on other hosts use them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the decoded images kept on this machine for the next run on the same data: where, and how large."""
    from lad_dist.data import decoded
    from lad_dist.plan.units import size

    at = decoded.folder()
    if clear:
        freed = decoded.clear()
        if as_json:
            return terminal.print_json({"folder": at and str(at), "freed": freed})
        return typer.echo(f"{size(freed)} freed in {at}" if at is not None else _off())
    entries = decoded.listed()
    if as_json:
        plain = [{"where": e.where, "shape": list(e.shape), "bytes": e.bytes, "used": e.used} for e in entries]
        return terminal.print_json({"folder": at and str(at), "entries": plain})
    if entries:
        terminal.stdout().print(_table(entries))
    total = size(sum(entry.bytes for entry in entries))
    typer.echo(f"{total} in {at} (LAD_DIST_CACHE names another folder, or off)" if at is not None else _off())


def _table(entries: Sequence[Kept]) -> Table:
    from rich.table import Table

    from lad_dist.plan.units import size

    table = Table("images of", "pixels", "last used")
    table.add_column("size", justify="right")
    for entry in entries:
        count, *pixels = entry.shape
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(entry.where, f"{count:,} of {'x'.join(map(str, pixels))}", used, size(entry.bytes))
    return table


def _off() -> str:
    return "nothing is kept, as LAD_DIST_CACHE is off"
