"""lad-dist in Python: a run, its stages and its results.

    from lad_dist import Run

    run = Run.open("runs/mine", "digits-lt")
    run.train_experts()
    images, soft_labels, lr = run.distill()
    for result in run.evaluate():
        print(result.source, result.overall)
    run.report()

Each call does what is left of its stage, like the verbs of the command line; after an interruption (Ctrl-C, a
notebook's stop button) the same call continues. A script whose recipe or profile starts processes (a Ray fleet,
several ranks) needs ``if __name__ == "__main__":`` around its calls, as with Python's own multiprocessing.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lad_dist import callbacks, catalog, loggers, recipe_file, results
from lad_dist.callbacks import Callback, Event
from lad_dist.errors import LadDistError, RecipeError, RunDirError
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen, read_events
from lad_dist.recipe import Recipe
from lad_dist.results import Result
from lad_dist.rundir import RunDir

if TYPE_CHECKING:
    import pandas

    from lad_dist.distilled import DistilledSet
    from lad_dist.launch.slurm import Submitted
    from lad_dist.pipeline import Pipeline
    from lad_dist.status.read import RunStatus


def change(recipe: Recipe | str | Path, *sets: str) -> Recipe:
    """Return a recipe with fields changed as ``--set`` does: ``change(recipe, "method=mtt", "distill.iterations=500")``.

    ``recipe``: one, the name of a shipped one, or a file. What follows from a changed field (the presets of a method, a
    protocol or a network) changes with it. Raises RecipeError with all faults.
    """
    if isinstance(recipe, Recipe):
        return recipe_file.from_document(recipe.model_dump(mode="json"), sets)
    return recipe_file.load(catalog.find_job(str(recipe)).recipe, sets)


class Run:
    """A run folder and its recipe. Made by ``open``."""

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        profile: Profile,
        buffers: Path | str | None,
        own_callbacks: Sequence[Callback],
        screen: Screen,
    ) -> None:
        self.folder, self.recipe, self.profile = folder, recipe, profile
        self._buffers, self._screen = buffers, screen
        self._listener = callbacks.listener(own_callbacks) if own_callbacks else None
        self._busy = threading.Lock()
        self._pipeline: Pipeline | None = None

    @classmethod
    def open(
        cls,
        folder: Path | str,
        recipe: Recipe | Path | str | None = None,
        *,
        profile: Profile | Path | str = "local",
        buffers: Path | str | None = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ) -> Run:
        """Open the run in ``folder``. The first stage creates it if it does not exist; nothing is written before.

        ``recipe``: a ``Recipe``, a shipped one's name, or a file; default: that of the run in ``folder``. ``profile``:
        where to run and with which resources, likewise. ``buffers``: the folder or URI of trajectory buffers, or a
        run folder, to use its experts. ``callbacks`` receive the run's events. ``quiet``: show no progress.

        Raises:
            RecipeError: the recipe or the profile is not valid.
            RunDirError: without a recipe, ``folder`` is no run folder.
        """
        folder = Path(folder).expanduser()
        if recipe is None:
            recipe = recipe_file.load(RunDir.existing(folder).recipe)
        elif not isinstance(recipe, Recipe):
            recipe = recipe_file.load(catalog.find_job(str(recipe)).recipe)
        if not isinstance(profile, Profile):
            file = catalog.find_profile(str(profile))
            profile = recipe_file.validated(Profile, recipe_file.read_document(file), str(file))
        return cls(folder, recipe, profile, buffers, callbacks, Screen.silent() if quiet else Screen())

    # --- stages -------------------------------------------------------------------------------------------------------

    def run_all(self) -> list[Result]:
        """Run all stages not done yet: experts, distillation, evaluation, report. Return the results."""
        with self._working() as pipeline:
            pipeline.all()
        return self.results()

    def train_experts(self) -> None:
        """Train the experts into the trajectory buffer.

        Raises LadDistError (all errors here are of ``lad_dist.errors``) if the data or the buffer cannot be used, or an
        expert failed; ``Interrupted`` by a signal.
        """
        with self._working() as pipeline:
            pipeline.experts()

    def distill(self, replay: Path | str | None = None) -> DistilledSet:
        """Distill the synthetic set from the experts in the buffer, and return it.

        ``replay``: a run folder, whose recorded windows are used again. Raises as ``train_experts``; TrajectoryError if
        experts are missing.
        """
        with self._working() as pipeline:
            pipeline.distill(None if replay is None else Path(replay))
        return self.distilled()

    def evaluate(
        self, *sources: str, architectures: Sequence[str] | None = None, seeds: int | None = None
    ) -> list[Result]:
        """Train networks on ``sources`` and measure them; return all results of the run.

        Without sources: the distilled set and the recipe's baselines. ``architectures`` and ``seeds`` override the
        recipe for this call; the run's recipe stays unchanged. Raises as ``train_experts``; RecipeError for an unknown
        source or architecture.
        """
        for source in sources:
            results.check_source(source)
        changes: dict[str, Any] = {} if architectures is None else {"architectures": list(architectures)}
        changes |= {} if seeds is None else {"seeds": seeds}
        recipe = _with(self.recipe, {"evaluate": changes}) if changes else self.recipe
        with self._working(keep_recipe=True) as pipeline:
            if sources or changes:
                pipeline.ask(recipe, sources or tuple(results.wanted(recipe, pipeline.run)))
            else:
                pipeline.evaluate_all()
        return self.results()

    def report(self) -> Path:
        """Write the report, and return the path of its page."""
        from lad_dist.report.page import INDEX

        with self._working(keep_recipe=True) as pipeline:
            pipeline.report()
        return self._files.report / INDEX

    # --- results ------------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Return what is done, what any process is doing, and results. Raises RunDirError before the first stage."""
        from lad_dist.status.read import read_status

        return read_status(self.folder)

    def distilled(self) -> DistilledSet:
        """Return the distilled set: a torch Dataset that unpacks to (images, soft labels, lr).

        Raises DistilledError without one.
        """
        from lad_dist.distilled import DistilledSet

        return DistilledSet.load(self._files.distilled)

    def results(self) -> list[Result]:
        """Return one result per measured network; empty before. Raises RunDirError if the file is damaged."""
        return [Result.of(row) for row in results.read(self._files.results)]

    def frame(self) -> pandas.DataFrame:
        """Return ``results`` as a pandas frame, a row per network. Raises LadDistError without pandas."""
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise LadDistError(
                "Run.frame: pandas is not installed; pip install pandas, or use Run.results()"
            ) from error
        columns = [f.name for f in dataclasses.fields(Result)]
        return pandas.DataFrame([vars(result) for result in self.results()], columns=columns)

    def events(self) -> list[Event]:
        """Return the run's events so far, of all its processes, oldest first."""
        return list(read_events(self._files.events))

    # --- SLURM --------------------------------------------------------------------------------------------------------

    def submit(self, *stages: str) -> Submitted:
        """Submit stages to SLURM by the profile, each after those before it; default: all that are not done.

        Return what was submitted and what was queued already. Raises ClusterError if SLURM refuses or cannot be
        reached, RecipeError if the profile submits nothing.
        """
        from lad_dist.launch import slurm
        from lad_dist.launch.chain import StageSelection
        from lad_dist.rundir import STAGES

        if self.profile.launcher != "slurm":
            raise RecipeError(f"profile {self.profile.name}: launcher: submits no jobs; valid: a SLURM profile")
        for stage in stages:
            if stage not in STAGES:
                raise RecipeError(f"submit: stage {stage!r} is not known; valid: {', '.join(STAGES)}")
        wanted = StageSelection(tuple(s for s in STAGES if s in stages or not stages))
        return slurm.submit(self.recipe, self.folder, self.profile, self._buffers, wanted, self._screen.say)

    def cancel(self) -> int:
        """Cancel the run's queued and running SLURM jobs; return how many. Raises ClusterError."""
        from lad_dist.launch import slurm

        return len(slurm.cancel(RunDir.existing(self.folder)))

    # --- internal -----------------------------------------------------------------------------------------------------

    @property
    def _files(self) -> RunDir:
        return RunDir(self.folder)

    @contextmanager
    def _working(self, keep_recipe: bool = False) -> Iterator[Pipeline]:
        """Yield the pipeline, with the data that an earlier stage loaded; one stage of a run at a time in a process.

        Raises RunDirError if another thread uses it, RecipeError if the profile submits jobs.
        """
        from lad_dist.launch import local
        from lad_dist.pipeline import check_nobody_distils

        if self.profile.launcher == "slurm":
            raise RecipeError(
                f"profile {self.profile.name}: launcher: slurm runs no stage here; valid: submit(), or local"
            )
        if not self._busy.acquire(blocking=False):
            raise RunDirError(f"{self.folder}: another thread is using this run; wait until it has ended")
        try:
            if self._pipeline is not None and self._files.recipe.exists():
                check_nobody_distils(self._files, self.recipe)
                RunDir.open(self.folder, self.recipe, self._buffers, keep_recipe)
                local.prepare_device(self.profile)  # another run in this process may have set other threads
                with (
                    local.stopped_by_signals(self.folder),
                    closing(Events(self._files.events, self._listener)) as events,
                    loggers.attached(self.profile.log, self.folder, self.recipe, events),
                ):
                    self._pipeline = dataclasses.replace(self._pipeline, events=events)
                    yield self._pipeline
            else:
                where = self.recipe, self.folder, self.profile, self._buffers, self._screen
                with local.working(*where, keep_recipe, listener=self._listener) as self._pipeline:
                    yield self._pipeline
        finally:
            self._busy.release()


def _with(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    """Return ``recipe`` with other fields. Raises RecipeError, naming the field."""
    document = recipe.model_dump(mode="json")
    for section, fields in changes.items():
        document[section] |= fields
    return recipe_file.validated(Recipe, document, "the recipe")
