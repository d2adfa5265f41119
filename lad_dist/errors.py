"""Hierarchy of all errors shown to users.

    LadDistError                 exit code 1; ``cli/`` prints it as one message, without a traceback
    |-- RecipeError              2   a recipe or profile field is unknown, mistyped or out of bounds
    |-- DataError                3   images or labels cannot be used as they are
    |-- RunDirError              4   the run folder cannot be written, or belongs to another recipe
    |-- TrajectoryError          5   a trajectory part is missing, damaged or made by another recipe
    |-- DistilledError           6   a distilled set is missing, damaged or inconsistent
    |-- NumericalError           7   training or matching produced NaN or infinity
    |-- StorageError             8   the disk is full, or a file could not be published
    |-- ExpertError              9   an expert kept failing, or the Ray cluster that trains experts is gone
    |-- RankError               10   a rank of a distributed distillation is gone, or never joined
    |-- ClusterError            11   SLURM refused a job, cannot be reached, or a job of the chain did not finish
    |-- DoctorError             12   a check of `lad-dist doctor` failed
    |-- SharingError            13   the address of a shared set is wrong, cannot be reached, or refuses
    `-- Interrupted            130   Ctrl-C or SIGTERM; finished work is kept

Messages follow one pattern: *where* (file or field), *what* is wrong, *what* is valid or what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class LadDistError(Exception):
    """Base of all errors shown to users. ``exit_code`` is the exit status of the command line."""

    exit_code = 1


class RecipeError(LadDistError):
    """One or more faults in a recipe or profile; ``faults`` holds one line for each."""

    exit_code = 2

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class DataError(LadDistError):
    """A data set, an image or a label cannot be used."""

    exit_code = 3


class RunDirError(LadDistError):
    """The run folder cannot be used."""

    exit_code = 4


class TrajectoryError(LadDistError):
    """The trajectory buffer cannot be used."""

    exit_code = 5


class DistilledError(LadDistError):
    """A distilled set cannot be used."""

    exit_code = 6


class NumericalError(LadDistError):
    """A computation produced NaN or Inf."""

    exit_code = 7


class StorageError(LadDistError):
    """The file system refused a write."""

    exit_code = 8


class ExpertError(LadDistError):
    """Training of the experts failed for a reason not covered above."""

    exit_code = 9


class RankError(LadDistError):
    """The ranks of a distributed job could not connect, or lost one of them."""

    exit_code = 10


class ClusterError(LadDistError):
    """SLURM refused a job, cannot be reached, or a job did not finish."""

    exit_code = 11


class DoctorError(LadDistError):
    """Checks of the environment failed; the message names them."""

    exit_code = 12


class SharingError(LadDistError):
    """A distilled set cannot be pushed to or pulled from an address."""

    exit_code = 13


class Interrupted(LadDistError):
    """The user or the scheduler asked to stop."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, without its full stop; else its type."""
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return said.strip().removesuffix(".")
