"""``lad-dist plan``: estimate what a job will need."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lad_dist.cli import terminal
from lad_dist.cli.options import JobOptions, JsonOption

if TYPE_CHECKING:
    import torch

    from lad_dist.profile import Profile
    from lad_dist.recipe import Recipe


def plan(
    asked: JobOptions,
    ranks: Annotated[int | None, typer.Option(min=1, help="Processes that share the distillation.")] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="Plan for this GPU (a100, h100, h200, l40s, rtx4090).")
    ] = None,
    calibrate: Annotated[
        float, typer.Option(min=0.5, metavar="SECONDS", help="How long to measure this device.")
    ] = 10.0,
    no_calibrate: Annotated[bool, typer.Option("--no-calibrate", help="Take rates from a table instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Estimate memory, disk and hours of every stage; refuse what cannot fit, with what would make it fit."""
    from lad_dist.errors import RecipeError
    from lad_dist.interrupts import as_exceptions
    from lad_dist.plan.dataset_info import dataset_info
    from lad_dist.plan.estimate import make_plan
    from lad_dist.plan.resources import resources_of

    if gpu is not None and asked.device == "cpu":
        raise RecipeError(f"--gpu {gpu}: plans for a GPU; valid: without --device cpu")
    recipe, profile = asked.recipe(), asked.profile(ranks=ranks)
    with as_exceptions():
        device = None if gpu is not None else _device_here(profile)
        place = resources_of(profile, device, gpu)
        buffer = _buffer(asked, recipe, profile)
        seconds = None if no_calibrate else calibrate
        made = make_plan(recipe, dataset_info(recipe.data), place, device, buffer, seconds)
    if as_json:
        terminal.print_json(made.to_json())
    else:
        from lad_dist.plan.show import tables

        terminal.stdout().print(tables(made))
    if made.faults:
        raise RecipeError(made.faults)


def _device_here(profile: Profile) -> torch.device | None:
    """Return the profile's device on this machine; None if it asks for GPUs that are elsewhere."""
    import torch

    from lad_dist.launch.local import prepare_device

    if profile.device == "cuda" and not torch.cuda.is_available():
        return None
    return prepare_device(profile)


def _buffer(asked: JobOptions, recipe: Recipe, profile: Profile) -> Path | None:
    """Return the folder of the run's trajectory buffer, which may not exist yet; None for one in an object store."""
    from lad_dist.launch.local import store_of
    from lad_dist.rundir import RunDir

    out, store = asked.folder(recipe), store_of(asked.buffers, profile)
    found = RunDir(out).trajectories if store is None else RunDir.buffer_to_come(out, recipe, store)
    return found if isinstance(found, Path) else None
