"""Running a job in this process, on this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from lad_dist.errors import RecipeError, StorageError
from lad_dist.interrupts import as_exceptions
from lad_dist.pipeline import Pipeline, open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import Screen
from lad_dist.recipe import Recipe

if TYPE_CHECKING:
    import torch


def run(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | None,
    screen: Screen,
    stages: Sequence[Callable[[Pipeline], None]],
) -> Pipeline:
    """Run stages of a job one after the other, as the profile says. Ctrl-C and SIGTERM raise Interrupted.

    Raises:
        LadDistError: whatever a stage raises; an interruption outside a stage too.
    """
    with as_exceptions():
        device = prepare_device(profile)
        store = buffers or (Path(profile.buffers).expanduser() if profile.buffers else None)
        try:
            pipeline = open_pipeline(recipe, out, profile, store, device, screen)
            with closing(pipeline.events):  # closing writes too, and may find the disk full
                for stage in stages:
                    stage(pipeline)
        except OSError as error:
            raise StorageError(
                f"{error.filename or out}: {error.strerror or error}; what was finished before is kept, "
                "and the same command continues"
            ) from error
    return pipeline


def prepare_device(profile: Profile) -> torch.device:
    """The device of a profile, with torch's thread count set. Raises RecipeError for a GPU that is not there."""
    import torch

    if profile.threads is not None:
        torch.set_num_threads(profile.threads)
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("profile: device: cuda, but torch sees no CUDA GPU here; auto or cpu are valid")
    name = profile.device if profile.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
