"""Consoles of the commands, and how errors are printed."""

from __future__ import annotations

import errno
import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lad_dist.errors import LadDistError

_OF_THE_NAME = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # errors of a path that the user gave
_LONGEST_SHOWN = 200  # characters of a path in a message


class Commands(TyperGroup):
    """Command group that prints the errors meant for the user; all others are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the requested command. Raises typer.Exit with the error's exit code."""
        from lad_dist.errors import LadDistError, StorageError

        try:
            return super().invoke(ctx)
        except OSError as error:  # from a file that a verb only reads
            if error.filename is None or error.errno not in _OF_THE_NAME:
                raise
            name = str(error.filename)
            shown = name if len(name) <= _LONGEST_SHOWN else f"{name[:_LONGEST_SHOWN]}..."
            refused = StorageError(f"{shown}: {error.strerror}; valid: a file or folder that you may use")
            complain(refused)
            raise typer.Exit(refused.exit_code) from None
        except LadDistError as error:
            complain(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            stderr().print("interrupted; finished work is kept, and the same command continues")
            raise typer.Exit(130) from None


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the block, and the command, without a message. Raises typer.Exit."""
    from lad_dist.errors import Interrupted
    from lad_dist.interrupts import as_exceptions

    try:
        with as_exceptions():
            yield
    except Interrupted as interrupted:
        raise typer.Exit(interrupted.exit_code) from None


def tolerate_any_encoding() -> None:
    """Replace characters that the terminal lacks, which must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def stdout() -> Console:
    """Return the console for results."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def print_json(document: object) -> None:
    """Print one JSON document for other programs, never wrapped or styled."""
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


def stderr() -> Console:
    """Return the console for messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def complain(error: LadDistError) -> None:
    """Print one message on stderr: ``error: ...``; several faults of a recipe on a line each."""
    from lad_dist.errors import RecipeError

    text = str(error)
    if isinstance(error, RecipeError) and len(error.faults) > 1:
        text = "\n  ".join([f"{len(error.faults)} faults", *error.faults])
    stderr().print(styled(text), soft_wrap=True)


def styled(text: str) -> Text:
    """Return ``error: TEXT``, with the first word in red."""
    from rich.text import Text

    return Text.assemble(("error: ", "bold red"), text)
