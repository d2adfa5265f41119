"""The stages in order. Read this page first.

    data set -> long-tailed subset -> whitening -> experts -> trajectory buffer
        -> distillation -> distilled set -> evaluation -> report

Stages do not know each other: they communicate through files in the run folder (``rundir.py``). Each finds out from
those files what is done and does the rest, so any of them can be killed, resumed, or run on another machine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lad_dist import cores
from lad_dist.errors import DistilledError, RankError, RecipeError, RunDirError
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen, shortened
from lad_dist.recipe import NETWORKS, OPERATIONS, Recipe
from lad_dist.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from lad_dist.callbacks import Listener
    from lad_dist.data.prepare import PreparedData
    from lad_dist.distill.early import Early
    from lad_dist.distill.loop import Context
    from lad_dist.distill.replay import ReplayRecord
    from lad_dist.ranks import ProcessRank
    from lad_dist.results import Row, Source

_MOST_NOTES = 10  # notes on the data to print
_LOOK_SECONDS = 1.0  # between checks whether another process is still running
_UNSHOWN_SECONDS = 2.0  # of decoding images


@dataclass
class Pipeline:
    """The stages of one recipe in one run folder on one device."""

    recipe: Recipe
    run: RunDir
    profile: Profile
    device: torch.device
    screen: Screen
    events: Events
    _data: PreparedData | None = None
    _accepted: PreparedData | None = None  # loaded before the run folder was made, not reported yet

    def all(self) -> None:
        """Run all stages not done yet. With ``buffer.start_after``, distillation begins while experts still train.

        Raises RunDirError if another process does the same in this folder.
        """
        with self._alone("run"):
            self._all()

    def _all(self) -> None:
        if self._imported():
            self.distill()
        elif self._experts_needed_live():
            self._distill_while_experts_train()
        else:
            self.experts()
            self.distill()
        self.evaluate_all()
        self.report()

    def experts(self) -> None:
        """Train the experts into the buffer: many at a time by a fleet, or one after the other in this process."""
        from lad_dist.experts.scheduler import ExpertLog, ExpertQueue, choose, train_here
        from lad_dist.experts.train import ExpertTrainer

        e, device = self.recipe.experts, self.device.type
        trainer = ExpertTrainer(self.recipe, self.data, self.run.trajectories)
        trainer.declare_kept()
        left = trainer.left(range(e.count))
        todo = [expert for expert, epochs in left.items() if epochs]
        if not todo:
            return self._already("experts", f"{e.count} experts are in {self.run.trajectories}")
        choice = choose(self.profile, device == "cuda", len(todo))
        self.screen.say(f"experts: trained {'by a fleet' if choice.fleet else 'in this process'}: {choice.why}")
        queue, record = ExpertQueue(trainer, todo), ExpertLog(e, left, self.events, self.screen)
        with self._stage("experts", remaining=len(todo)):
            with self.screen.board("experts", record.total_epochs, "epochs", done=record.epochs_trained) as board:
                record.show_on(board)
                if choice.fleet:
                    from lad_dist.experts import fleet

                    fleet.train(trainer, self.profile, self.run.root.name, queue, record, self.events, self.screen)
                else:
                    train_here(trainer, queue, record, self.screen)
            error = record.error(self.profile.expert_retries + 1)
            if error is not None:
                raise error

    def _imported(self) -> bool:
        """Return whether the distilled set was made elsewhere, so that experts are not needed."""
        from lad_dist.distilled import DistilledSet

        return self.run.distilled.exists() and DistilledSet.load(self.run.distilled).meta.imported

    def _experts_needed_live(self) -> bool:
        """Return whether distillation may begin with a part of the experts, and neither of the two is done.

        Ranks that a launcher started run one after the other: else each rank would start an expert process.
        """
        from lad_dist import ranks
        from lad_dist.trajectories.reader import Buffer

        if self.recipe.buffer.start_after is None or self.run.distilled.exists() or ranks.place() is not None:
            return False
        e = self.recipe.experts
        return len(Buffer(self.run.trajectories).complete(e.last_epochs, range(e.count))) < e.count

    def _distill_while_experts_train(self) -> None:
        """Distill here while a separate process trains the experts; if one of them fails, both end."""
        from lad_dist.experts.background import in_background

        _ = self.data  # fits and stores the whitening, for the other process
        with in_background(self.run.root, self.profile, self.screen.say):  # the experts' events reach the record only
            self.distill()

    def distill(self, replay: Path | None = None) -> None:
        """Match the experts with a synthetic set, over the profile's ranks, and select the iteration to keep.

        ``replay``: a run folder; its recorded windows are used instead of drawing them, which makes the same set.
        Raises RunDirError if another process distils in this folder.
        """
        from lad_dist import ranks, results
        from lad_dist.distill.replay import ReplayRecord
        from lad_dist.distilled import DistilledSet

        record = None if replay is None else ReplayRecord.read(replay, self.recipe, self.run)
        if self.run.distilled.exists():
            made = DistilledSet.load(self.run.distilled).meta
            if not made.grows_into(self.recipe):
                how = f"iteration {made.iteration}" if made.method == self.recipe.method else made.method
                return self._already("distill", f"{self.run.distilled} exists ({how})")
            self.screen.say(
                f"distill: {self.run.distilled} has {made.iterations} iterations; continues to {self.recipe.distill.iterations}"
            )
        where, d = ranks.place(), self.recipe.distill
        first = where is None or where.rank == 0
        with self._alone("distill"), self._stage("distill"):
            if first:  # rows of a smaller set
                results.forget(self.run.results, lambda row: str(row["source"]).startswith("distilled"))
            self._distill(record)
            if first and d.select != "last":
                from lad_dist.evaluate.select import select

                select(self.recipe, self.data, self.run, self.events, self.screen)
        if not first:  # rank 0 publishes a moment later, or once it has selected
            self._await(self._has_grown, 1 if d.select == "last" else 1 + d.iterations // d.select_every)

    def _distill(self, record: ReplayRecord | None) -> None:
        """Distill in this process, as one of the ranks that a launcher started, or over ranks started here."""
        from lad_dist import ranks
        from lad_dist.distill.loop import distill

        if ranks.place() is not None:
            distill_as_rank(self, record)
        elif self.profile.world > 1:
            self.screen.say(f"distill: {self.profile.world} ranks")
            self._say_threads(self.profile.world)
            what = (self.recipe, self.run, self.profile, self.device.type, record)
            with self.events.from_others():
                ranks.launch(self.profile.world, distill_rank, what, self.profile.rank_restarts, self.screen.say)
        else:
            distill(self.context(record=record), self.data, self.early())

    def context(self, **more: Any) -> Context:
        """Return the context of a distillation; ``more``: fields that differ from a single process without a record."""
        from lad_dist.distill.loop import Context

        return Context(self.recipe, self.run, self.device, self.events, self.screen, **more)

    def early(self) -> Early:
        """Return the evaluation during distillation, limited in time so that other ranks never wait long for it."""
        from lad_dist.distill.early import Early
        from lad_dist.evaluate.early import EarlyEvaluation

        longest = self.profile.rank_timeout / 10
        return Early(self.recipe, EarlyEvaluation(self.recipe, self.data), self.events, self.screen, longest)

    def evaluate_all(self) -> None:
        """Measure the distilled set and the recipe's baselines."""
        from lad_dist import results

        sources = results.wanted(self.recipe, self.run)
        for source in sources:
            self._evaluate(source)
        left_out = [b for b in dict.fromkeys(self.recipe.evaluate.baselines) if b not in sources]
        if left_out:
            self.screen.say(
                f"evaluate: {', '.join(left_out)} left out: an imported set has no known starting set and no experts; one of an "
                "older version lacks the labels it started from"
            )

    def evaluate(self, source: str) -> None:
        """Train networks on a source (``evaluate/sources.py``) and measure them: one row per architecture and seed.

        With ``evaluate.label_adjustment`` the distilled set is also measured with adjusted labels, as its own source.
        """
        self._evaluate(source)
        if source == "distilled" and self.recipe.evaluate.label_adjustment == "adsa":
            self._evaluate("distilled-adsa")

    def ask(self, recipe: Recipe, sources: Sequence[str]) -> None:
        """Measure sources by ``recipe``, which may differ from the run's own; rewrite the report, if there is one."""
        asking = dataclasses.replace(self, recipe=recipe)
        for source in dict.fromkeys(sources):
            asking.evaluate(source)
        self.refresh_report()

    def _evaluate(self, source: Source) -> None:
        """Measure a source in this process, as one of the ranks that a launcher started, or over ranks started here."""
        from lad_dist import ranks, results
        from lad_dist.evaluate.measure import candidate_rows, not_done, planned_rows
        from lad_dist.evaluate.sources import of_distilled

        if ranks.place() is not None and of_distilled(source):
            self._await(self.run.distilled.exists)
        candidates = candidate_rows(self.recipe, self.data, self.run, source)
        if candidates and not_done(self.run, candidates):
            self._measure(f"tune {source}", source, candidates)
        planned = planned_rows(self.recipe, self.data, self.run, source)
        for row in planned if candidates else ():
            if row["seed"] == 0:
                pair = f"lr {row['settings']['lr']:.4g}, {row['settings']['epochs']} epochs"
                self.screen.say(f"tune {source}, {row['architecture']}: {pair}, best on the validation images")
        if not not_done(self.run, planned):
            results.merge(self.run.results)
            return self._already(f"evaluate {source}", f"{len(planned)} networks are in {self.run.results}")
        self._measure(f"evaluate {source}", source, planned)

    def _measure(self, name: str, source: Source, planned: list[Row]) -> None:
        """Measure the rows that are missing, as a stage ``name``."""
        from lad_dist import ranks, results
        from lad_dist.evaluate.measure import evaluate, not_done, table_of
        from lad_dist.evaluate.sources import prepare_shared

        where, profile, left = ranks.place(), self.profile, not_done(self.run, planned)
        with self._stage(name, networks=len(left)):
            world = min(profile.world, len(left))
            if where is not None:
                evaluate_as_rank(self, source, planned, where, awaited=False)
            elif world > 1:
                prepare_shared(self.recipe, self.data, self.run, source)
                self.screen.say(f"{name}: {len(left)} networks over {world} ranks")
                self._say_threads(world)
                what = (self.recipe, self.run, profile, self.device.type, source, left)
                with self.events.from_others():
                    ranks.launch(world, evaluate_rank, what, profile.rank_restarts, self.screen.say)
                results.merge(table_of(self.run, planned))
            else:
                evaluate(self.recipe, self.data, self.run, source, self.events, self.screen, planned)

    def _await(self, published: Callable[[], bool], times: int = 1) -> None:
        """Wait for rank 0 to publish the distilled set, ``times`` the profile's limit. Raises RankError if it does not."""
        limit = times * self.profile.rank_timeout
        until = time.monotonic() + limit
        while not published():
            if time.monotonic() > until:
                raise RankError(f"{self.run.distilled}: no other rank has published it within {limit:g} seconds")
            time.sleep(0.1)

    def _has_grown(self) -> bool:
        """Return whether the distilled set has all the recipe's iterations: an older one stays until replaced."""
        from lad_dist.distilled import DistilledSet

        try:
            return not DistilledSet.load(self.run.distilled).meta.grows_into(self.recipe)
        except DistilledError:  # between the two renames that replace it
            return False

    def report(self) -> None:
        """Write tables, pictures and the page, by the run's own recipe: ``ask`` with another recipe changes no page."""
        from lad_dist import recipe_file
        from lad_dist.report.page import write_report

        with self._stage("report"):
            write_report(recipe_file.load(self.run.recipe), self.run)

    def refresh_report(self) -> None:
        """Rewrite the page if there is one; among ranks that a launcher started, rank 0 does."""
        from lad_dist import ranks
        from lad_dist.report.page import INDEX

        where = ranks.place()
        if (where is None or where.rank == 0) and (self.run.report / INDEX).exists():
            self.report()

    @property
    def data(self) -> PreparedData:
        """The recipe's data, loaded on first use."""
        if self._data is None:
            from lad_dist.data.prepare import prepare

            began = time.perf_counter()
            if self._accepted is None:
                with _decoding_shown(self.screen) as on_progress:
                    self._data = prepare(self.recipe, self.run.whitening, self.device, on_progress)
            else:
                self._data = self._accepted
            images = self._data.splits.train
            self.events.emit(
                "data",
                name=images.name,
                fingerprint=images.fingerprint(),
                counts=list(images.counts),
                test=len(self._data.splits.test),
                notes=list(self._data.splits.notes[:_MOST_NOTES]),
                seconds=round(time.perf_counter() - began, 3),
            )
            self.screen.say(
                f"data: {images.name}, {len(images)} training images ({max(images.counts)} to {min(images.counts)} per "
                f"class), {len(self._data.splits.test)} test images, {images.channels}x{images.size}x{images.size}"
            )
            for note in shortened(self._data.splits.notes, _MOST_NOTES):
                self.screen.say(f"data: {note}")
            self._choose_threads(*images.shape)
        return self._data

    def _say_threads(self, world: int) -> None:
        """Print if ``world`` ranks on this machine get fewer threads than the profile requests."""
        _, fewer = cores.of_each_rank(self.profile.threads, world)
        if fewer:
            self.screen.say(fewer)

    def _choose_threads(self, channels: int, size: int, classes: int) -> None:
        """Use the run's earlier number of CPU threads, else the fastest by a few timed steps.

        The profile's number, and that of a rank among others, is left unchanged.
        """
        from lad_dist import ranks
        from lad_dist.plan import threads
        from lad_dist.plan.shapes import Shapes

        if self.device.type != "cpu" or self.profile.threads is not None or self.profile.world > 1 or ranks.place():
            return
        import torch

        file = self.run.threads
        if file.exists():
            team = threads.Team.load(file)
            self.screen.say(
                f"threads: {team.threads}, as at the start of the run (--threads N changes it, and the last bits)"
            )
        else:
            most = threads.most_threads(self.profile)
            team = threads.choose(self.recipe, Shapes.of(self.recipe.model, channels, size, classes), most)
            team.save(file)
            if most > 1:
                self.screen.say(f"threads: {team.threads}: {team.why}")
        self.events.emit("threads", threads=team.threads, why=team.why)
        torch.set_num_threads(team.threads)

    @contextmanager
    def _alone(self, verb: str) -> Iterator[None]:
        """Keep other processes from doing ``verb`` in this run folder meanwhile; among ranks, rank 0 checks.

        Experts and result rows have claims and names of their own, so that any number of processes share them. A claim
        of a dead process is void: at once on its own host, else after claims.STALE_SECONDS.
        """
        from lad_dist import ranks
        from lad_dist.trajectories import claims

        where = ranks.place()
        if where is not None and where.rank > 0:
            yield
            return
        owner, said = claims.owner_id(), False
        until = time.monotonic() + claims.STALE_SECONDS + claims.REFRESH_SECONDS
        while True:
            with claims.hold(self.run.root, verb, owner) as held:
                if held:
                    yield
                    return
            other = claims.foreign(self.run.root, verb, owner)
            if other is not None and (other.lives_here() or time.monotonic() > until):
                raise RunDirError(
                    f"{self.run.root}: another process runs `lad-dist {verb}` in this folder ({other}); wait until it "
                    "has ended, or stop it and run this command again, which continues"
                )
            if other is not None and not said:
                self.screen.say(f"{verb}: checking whether another process is still running here ({other})")
                said = True
            time.sleep(_LOOK_SECONDS)

    def _already(self, stage: str, what: str) -> None:
        self.screen.say(f"{stage}: done, {what}")

    def _stage(self, name: str, **fields: int) -> _Stage:
        """Return the recorder of a stage; among ranks that a launcher started, only rank 0 records: it leaves last."""
        from lad_dist import ranks

        where = ranks.place()
        return _Stage(self.events if where is None or where.rank == 0 else Events.nowhere(), name, fields)


def distill_rank(recipe: Recipe, run: RunDir, profile: Profile, kind: str, record: ReplayRecord | None) -> None:
    """Worker process that ``Pipeline.distill`` starts on this machine. ``kind`` of device: cpu or cuda."""
    import torch

    prepare_rank(profile, profile.world)
    distill_as_rank(Pipeline(recipe, run, profile, torch.device(kind), Screen(), Events(run.events)), record)


def prepare_rank(profile: Profile, world: int) -> None:
    """Set torch's threads and keep freed memory in a process that is one of ``world`` on this machine."""
    import torch

    from lad_dist import allocator

    torch.set_num_threads(cores.of_each_rank(profile.threads, world)[0])
    allocator.keep_freed_memory()


def distill_as_rank(pipeline: Pipeline, record: ReplayRecord | None) -> None:
    """Distill as the rank that the environment names: only rank 0 reads images, reports and publishes.

    Raises:
        RecipeError: fewer GPUs on this host than ranks.
        LadDistError: any error of the distillation.
    """
    from lad_dist import ranks
    from lad_dist.distill.loop import distill
    from lad_dist.interrupts import as_flag

    where = ranks.place()
    assert where is not None
    device = own_device(pipeline.device, where)
    p = pipeline if where.rank == 0 else dataclasses.replace(pipeline, screen=Screen.silent(), events=Events.nowhere())
    p = dataclasses.replace(p, device=device)
    with as_flag() as flag, ranks.joined(where, device, pipeline.profile.rank_timeout) as joined:
        data = p.data if joined.first else None
        early = p.early() if joined.first else None
        distill(p.context(ranks=joined, flag=flag, record=record), data, early)


def evaluate_rank(recipe: Recipe, run: RunDir, profile: Profile, kind: str, source: Source, rows: list[Row]) -> None:
    """Worker process that ``Pipeline.evaluate`` starts on this machine: measures its share of ``rows``."""
    import torch

    from lad_dist import ranks
    from lad_dist.interrupts import as_exceptions

    where = ranks.place()
    assert where is not None
    prepare_rank(profile, where.world)
    screen = Screen() if where.rank == 0 else Screen.silent()
    with as_exceptions(), closing(Events(run.events)) as events:
        evaluate_as_rank(Pipeline(recipe, run, profile, torch.device(kind), screen, events), source, rows, where)


def evaluate_as_rank(
    pipeline: Pipeline, source: Source, rows: list[Row], where: ProcessRank, awaited: bool = True
) -> None:
    """Measure every ``world``-th of ``rows``. Ranks do not communicate: each publishes rows, the last the whole table.

    ``awaited`` False: no process waits until all ranks have ended, so rank 0 goes on until every row is there; if the
    rows choose learning rate and epochs, every rank does.

    Raises:
        RecipeError: fewer GPUs on this host than ranks.
        LadDistError: any error of the evaluation.
    """
    from lad_dist.evaluate.measure import evaluate, table_of, take_over

    p = pipeline
    device = own_device(p.device, where)
    if device != p.device:
        p = dataclasses.replace(p, device=device, _data=None)
    evaluate(p.recipe, p.data, p.run, source, p.events, p.screen, rows[where.rank :: where.world])
    if not awaited and (where.rank == 0 or table_of(p.run, rows) == p.run.tuning):
        take_over(p.recipe, p.data, p.run, source, p.events, p.screen, rows)


def own_device(device: torch.device, where: ProcessRank) -> torch.device:
    """Return the device of a rank: the CPU, or the GPU of its number on this host.

    Raises:
        RecipeError: fewer GPUs on this host than ranks.
    """
    import torch

    if device.type != "cuda":
        return device
    if where.local_rank >= torch.cuda.device_count():
        raise RecipeError(
            f"profile: ranks: rank {where.rank} is number {where.local_rank} on this host, which has "
            f"{torch.cuda.device_count()} GPUs; valid: at most one rank per GPU"
        )
    device = torch.device("cuda", where.local_rank)
    torch.cuda.set_device(device)
    return device


class _Stage:
    """Context manager that records the start and end of a stage."""

    def __init__(self, events: Events, name: str, fields: dict[str, int]) -> None:
        self.events, self.name, self.fields = events, name, fields

    def __enter__(self) -> None:
        self.began = time.perf_counter()
        self.events.emit("stage-started", stage=self.name, **self.fields)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from lad_dist.allocator import give_back
        from lad_dist.progress import peak_memory_bytes

        give_back()
        seconds = round(time.perf_counter() - self.began, 3)
        ended = "stage-finished" if kind is None else "stage-stopped"
        self.events.emit(
            ended,
            stage=self.name,
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            **({"error": f"{kind.__name__}: {error}"} if kind else {}),
        )


def _try_own(recipe: Recipe, channels: int, size: int, classes: int) -> None:
    """Try once each user-defined component that the recipe names. Raises RecipeError or DataError if unusable."""
    from lad_dist.data import augment
    from lad_dist.distill import statistics
    from lad_dist.evaluate import sources
    from lad_dist.models import network, zoo

    made = network.build(recipe.model, channels, size, classes, seed=0, purpose=("template",))
    if recipe.distill.lambda_statistics > 0:
        statistics.check(made, channels, size)
    for name in recipe.evaluate.architectures:
        if name not in NETWORKS:
            zoo.network(name, channels, size, classes, seed=0, purpose=("template",))
    for name in recipe.augment.operations:
        if name not in OPERATIONS:
            augment.check(name, channels, size)
    for name in recipe.evaluate.baselines:
        sources.check_baseline(name)


def open_pipeline(
    recipe: Recipe,
    out: Path,
    profile: Profile,
    buffers: Path | str | None,
    device: torch.device,
    screen: Screen,
    keep_recipe: bool = False,
    listener: Listener | None = None,
) -> Pipeline:
    """Open the pipeline of a recipe in the run folder ``out``.

    ``keep_recipe``: see ``RunDir.open``; ``listener``: see ``Events``. For a new folder, the data are loaded
    first, and networks and sets that the recipe names are tried, so that nothing is written if they are refused:
    the corrected recipe finds the folder free. Raises DataError, DistilledError, RecipeError, RunDirError, and what
    ``RunDir.open`` raises.
    """
    accepted = None
    if (out / "recipe.yaml").exists():
        check_nobody_distils(RunDir(out), recipe)
    else:
        from lad_dist.data.prepare import accept

        RunDir.check_free(out)
        with _decoding_shown(screen) as on_progress:
            accepted = accept(recipe, RunDir.whitening_to_come(out, recipe, buffers), device, on_progress)
        _try_own(recipe, *accepted.splits.train.shape)
        if recipe.distill.initial_from is not None:
            from lad_dist.distill.start import set_to_start_from

            set_to_start_from(recipe, accepted)
    run = RunDir.open(out, recipe, buffers, keep_recipe)
    if accepted is not None:
        accepted.keep_whitening(run.whitening)
    return Pipeline(recipe, run, profile, device, screen, Events(run.events, listener), _accepted=accepted)


@contextmanager
def _decoding_shown(screen: Screen) -> Iterator[Callable[[int, int], None]]:
    """Yield a receiver of (images done, images in total) that shows them once decoding has taken _UNSHOWN_SECONDS."""
    began, before, task = time.monotonic(), 0, None
    with ExitStack() as shown:

        def on_progress(done: int, total: int) -> None:
            nonlocal before, task
            if task is None and done < total and time.monotonic() - began > _UNSHOWN_SECONDS:
                task = shown.enter_context(screen.task("data", total, "images", before))
            if task is not None:
                task.advance(done - before)
            before = done

        yield on_progress


def check_nobody_distils(run: RunDir, recipe: Recipe) -> None:
    """Raise RunDirError if a process distils in ``run`` by a recipe that distils another set than ``recipe``."""
    from lad_dist import recipe_file
    from lad_dist.recipe import affects, differences
    from lad_dist.trajectories import claims

    changed = [d for d in differences(recipe_file.load(run.recipe), recipe) if affects(d.field) == "distill"]
    if changed and (other := claims.foreign(run.root, "distill", claims.owner_id())) is not None:
        raise RunDirError(
            f"{run.root}: is being distilled by {other}, and {'; '.join(map(str, changed))}; wait until it has ended, or stop it"
        )
