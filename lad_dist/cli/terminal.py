"""What the commands print to, and how errors are printed."""

from __future__ import annotations

import errno
import io
import sys
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lad_dist.errors import LadDistError

_OF_THE_NAME = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)  # what a path that was given may end in
_LONGEST_SHOWN = 200  # characters of a path in a message


class Commands(TyperGroup):
    """Reports the errors that are the user's to see; all others are bugs and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for. Raises typer.Exit with the error's exit code."""
        from lad_dist.errors import LadDistError, StorageError

        try:
            return super().invoke(ctx)
        except OSError as error:  # of a file that a verb only wanted to look at
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
            stderr().print("interrupted; what is finished is kept, and the same command continues")
            raise typer.Exit(130) from None


def tolerate_any_encoding() -> None:
    """A character that the terminal lacks must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def stdout() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def stderr() -> Console:
    """The console for messages."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def complain(error: LadDistError) -> None:
    """One message on stderr: ``error: ...``; several faults of a recipe on a line each."""
    from lad_dist.errors import RecipeError

    text = str(error)
    if isinstance(error, RecipeError) and len(error.faults) > 1:
        text = "\n  ".join([f"{len(error.faults)} faults", *error.faults])
    stderr().print(styled(text), soft_wrap=True)


def styled(text: str) -> Text:
    """``error: TEXT``, with the first word in red."""
    from rich.text import Text

    return Text.assemble(("error: ", "bold red"), text)
