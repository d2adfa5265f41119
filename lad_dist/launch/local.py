"""Run a job in this process, on this machine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lad_dist import allocator, cores, host_memory, loggers, ranks
from lad_dist.callbacks import Listener
from lad_dist.errors import RecipeError, StorageError
from lad_dist.interrupts import as_exceptions
from lad_dist.location import is_remote, is_uri
from lad_dist.pipeline import Pipeline, open_pipeline
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir

if TYPE_CHECKING:
    import torch


_FOLDER_SECONDS = 120.0  # to wait for rank 0 to make the run folder


def run(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    screen: Screen,
    stages: Sequence[Callable[[Pipeline], None]],
    keep_recipe: bool = False,
    own_log: bool = False,
) -> Pipeline:
    """Run stages of a job one after the other; arguments and errors are those of ``working``."""
    with working(recipe, out, profile, buffers, screen, keep_recipe, own_log) as pipeline:
        for stage in stages:
            stage(pipeline)
    return pipeline


@contextmanager
def working(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    screen: Screen,
    keep_recipe: bool = False,
    own_log: bool = False,
    listener: Listener | None = None,
) -> Iterator[Pipeline]:
    """Open the pipeline of a job in this process by its profile. Inside the block Ctrl-C and SIGTERM raise Interrupted.

    ``buffers``: the folder or URI of trajectory buffers; default: the profile's. ``keep_recipe``: leave the recipe of
    an existing run unchanged. ``own_log``: every rank that a launcher started prints, since each has its own log;
    else only rank 0 does. ``listener`` receives the run's events.

    Raises:
        LadDistError: any error of a stage; an interruption outside a stage too.
    """
    with stopped_by_signals(out):
        device = prepare_device(profile)
        store = store_of(buffers, profile)
        where = ranks.place()
        if where is None or where.rank == 0:
            _, fewer = cores.of_each_rank(profile.threads, ranks.on_this_host())
            if fewer:
                screen.say(fewer)
            if not (out / "recipe.yaml").exists():
                _check_that_it_fits(recipe, out, profile, store, device)
            for name in profile.log:
                loggers.find(name)
            pipeline = open_pipeline(recipe, out, profile, store, device, screen, keep_recipe, listener)
        else:  # rank 0 makes the folder; where ranks share a terminal, it alone records and prints
            made = _awaited(out, profile)
            events = Events(made.events) if own_log else Events.nowhere()
            pipeline = Pipeline(recipe, made, profile, device, screen if own_log else Screen.silent(), events)
        names = profile.log if where is None or where.rank == 0 else ()
        # closing also writes, and may hit a full disk
        with closing(pipeline.events), loggers.attached(names, out, recipe, pipeline.events):
            yield pipeline


@contextmanager
def stopped_by_signals(out: Path) -> Iterator[None]:
    """Raise ``Interrupted`` on Ctrl-C and SIGTERM, and ``StorageError`` for an OSError."""
    with as_exceptions():
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{error.filename or out}: {error.strerror or error}; finished work is kept, "
                "and the same command continues"
            ) from error


def _check_that_it_fits(
    recipe: Recipe, out: Path, profile: Profile, store: Path | str | None, device: torch.device
) -> None:
    """Refuse a new run that exceeds this machine's totals, before hours are spent and a folder is made.

    Unlike in ``lad-dist plan``, what is merely in use at the moment does not count against it.
    Raises RecipeError, and DataError if the data cannot be used.
    """
    from lad_dist.plan.dataset_info import dataset_info
    from lad_dist.plan.estimate import refuse_what_cannot_fit
    from lad_dist.plan.resources import resources_of

    place = resources_of(profile, device)
    place = dataclasses.replace(place, memory=max(place.memory, _total_memory(device)))
    buffer = RunDir.whitening_to_come(out, recipe, store).parent
    remote = store is not None and is_remote(store)
    refuse_what_cannot_fit(recipe, dataset_info(recipe.data), place, None if remote else buffer)


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    return host_memory.total()


def _awaited(out: Path, profile: Profile) -> RunDir:
    """Wait for the run folder, which rank 0 makes once the data are loaded. Raises RunDirError if it does not."""
    until = time.monotonic() + max(_FOLDER_SECONDS, profile.rank_timeout)
    while not (out / "recipe.yaml").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return RunDir.existing(out)


def store_of(named: Path | str | None, profile: Profile) -> Path | str | None:
    """Return where buffers lie: ``named``, else the profile's; None: in each run.

    A folder becomes a path, with ``~`` expanded; a URI (``s3://bucket/prefix``) stays a string: a path would mangle it.
    """
    buffers = named or profile.buffers
    return buffers if buffers is None or is_uri(buffers) else Path(buffers).expanduser()


def prepare_device(profile: Profile) -> torch.device:
    """Return the profile's device; set torch's thread count and, for a CPU, keep freed memory.

    Raises:
        RecipeError: the profile requests a GPU that is not available.
    """
    import torch

    if profile.threads is not None:
        torch.set_num_threads(cores.of_each_rank(profile.threads, ranks.on_this_host())[0])
    if profile.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("profile: device: cuda, but torch sees no CUDA GPU here; auto or cpu are valid")
    name = profile.device if profile.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        allocator.keep_freed_memory()
    return torch.device(name)
