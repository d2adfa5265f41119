"""Loggers by name (``--log``, or ``log`` in a profile): factories of callbacks that send events to a tracking service.

A name is a built-in one, an entry point of the group ``lad_dist.loggers`` or ``module:attribute``; each is called with
the run's folder and recipe, and returns a ``Callback``. Every process that works on a run creates its own: the one on
this machine, or each job on SLURM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lad_dist.callbacks import Callback, Evaluation, ExpertEpoch, Iteration, StageEnd, listener
from lad_dist.errors import RecipeError, first_line
from lad_dist.plugins import load_callable
from lad_dist.progress import Events
from lad_dist.recipe import Recipe

GROUP = "lad_dist.loggers"
Logger = Callable[[Path, Recipe], Callback]


class Wandb(Callback):
    """Weights & Biases: a run of project ``lad-dist`` (or WANDB_PROJECT), grouped by the run folder's name.

    A process that continues a run creates a new one in the same group. Files are in ``wandb/`` of the run folder, and
    with WANDB_MODE=offline stay there.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Raise RecipeError if wandb is not installed or refuses, for example without a login."""
        try:
            import wandb
        except ImportError as error:
            raise RecipeError(f"--log wandb: {error}; valid: pip install 'lad-dist[wandb]'") from error
        try:
            self._run: Any = wandb.init(
                project=wandb.Settings().project or "lad-dist",
                group=folder.resolve().name,
                dir=str(folder),
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            raise RecipeError(f"--log wandb: {first_line(error)}; valid: wandb login, or WANDB_MODE=offline") from error
        self._failed = False
        for part, counter in (("distill", "iteration"), ("experts", "epoch"), ("evaluation", "seed")):
            self._run.define_metric(f"{part}/{counter}")
            self._run.define_metric(f"{part}/*", step_metric=f"{part}/{counter}")

    def on_epoch(self, epoch: ExpertEpoch) -> None:
        of = f"experts/{epoch.expert}/{epoch.stage}"
        figures = {f"{of}/loss": epoch.loss, f"{of}/accuracy": epoch.accuracy}
        self._run.log({"experts/epoch": epoch.epoch, **{k: v for k, v in figures.items() if v is not None}})

    def on_iteration(self, iteration: Iteration) -> None:
        losses = {f"distill/loss/{phase}": loss for phase, loss in iteration.losses.items()}
        self._run.log({"distill/iteration": iteration.number, "distill/alpha": iteration.alpha, **losses})

    def on_evaluation(self, evaluation: Evaluation) -> None:
        of = f"evaluation/{evaluation.source}/{evaluation.architecture}"
        groups = {f"{of}/{name}": getattr(evaluation, name) for name in ("overall", "head", "medium", "tail")}
        self._run.log({"evaluation/seed": evaluation.seed, **groups})

    def on_stage_end(self, end: StageEnd) -> None:
        self._run.summary[f"seconds/{end.stage}"] = end.seconds
        self._failed = end.error is not None

    def close(self) -> None:
        self._run.finish(exit_code=int(self._failed))


KNOWN: dict[str, Logger] = {"wandb": Wandb}


def find(name: str) -> Logger:
    """Return the logger factory of a name. Raises RecipeError if the name is unknown."""
    return KNOWN.get(name) or load_callable(
        name, GROUP, "log", f"{', '.join(KNOWN)}, or a function of (folder, recipe)"
    )


@contextmanager
def attached(names: Sequence[str], folder: Path, recipe: Recipe, events: Events) -> Iterator[None]:
    """Inside the block, pass the run's events to these loggers; close each at the end.

    Raises RecipeError for an unknown name, or a logger that cannot start.
    """
    with ExitStack() as stack:
        for name in names:
            logger = find(name)(folder, recipe)
            if not isinstance(logger, Callback):
                raise RecipeError(f"log: {name}: returned a {type(logger).__name__}; valid: a lad_dist.Callback")
            stack.callback(logger.close)
            events.tell(listener([logger]))
        yield
