"""``lad-dist push`` and ``lad-dist pull``: distilled sets to and from an address."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal

if TYPE_CHECKING:
    from lad_dist.sharing.transfer import Transferred


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or the folder of a distilled set.")],
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="hf://OWNER/NAME, or a folder.")],
    license_name: Annotated[
        str, typer.Option("--license", metavar="NAME", help="The licence on the card, as the hub names it.")
    ] = "unknown",
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace another shared set.")] = False,
) -> None:
    """Share a run's distilled set, with a card, on the Hugging Face hub or as a folder."""
    from lad_dist.interrupts import as_exceptions
    from lad_dist.sharing import transfer

    with as_exceptions():
        done = transfer.push(run.expanduser(), address, license_name, private, force)
    _say("pushed", done)


def pull(
    address: Annotated[
        str, typer.Argument(metavar="ADDRESS", help="hf://OWNER/NAME, with @REVISION; https://HOST/FOLDER; a folder.")
    ],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The new folder; default: named after the address.")
    ] = None,
) -> None:
    """Fetch a shared distilled set into a folder, and verify every checksum."""
    from lad_dist.interrupts import as_exceptions
    from lad_dist.sharing import transfer

    with as_exceptions():
        done = transfer.pull(address, None if folder is None else folder.expanduser())
    _say("verified, and already in" if done.was_there else "pulled", done)


def _say(what: str, done: Transferred) -> None:
    place = done.place if what.endswith(" in") else f"to {done.place}"
    terminal.stdout().print(
        f"{what} {place}: {done.files} files, {done.size / 1e6:.2f} MB, {len(done.distilled)} images", soft_wrap=True
    )
