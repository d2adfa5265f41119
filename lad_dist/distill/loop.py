"""The distillation loop, from the experts' buffer to the distilled set, on one rank or many.

Every rank runs this loop on its own share of the synthetic set (``shards.py``). Decisions that all ranks must share are
made by ``_agree``, once per iteration; rank 0 reports for all.

Shapes: S synthetic images of the whole set, s of this rank's share, K classes, P parameters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist import methods
from lad_dist.data import augment
from lad_dist.data.longtail import head_medium_tail
from lad_dist.data.prepare import PreparedData
from lad_dist.distill import statistics
from lad_dist.distill.alignment import alignment
from lad_dist.distill.early import Early
from lad_dist.distill.live import LiveExperts
from lad_dist.distill.memory import choose_path, faster
from lad_dist.distill.precision import cosines_to_float32
from lad_dist.distill.regression import RealBatches, kept_features, regress
from lad_dist.distill.replay import ReplayRecord, check_not_replayed, initial_experts
from lad_dist.distill.shards import Share
from lad_dist.distill.start import DataFacts, first_set, labeller, mean_logits, publish
from lad_dist.distill.state import State
from lad_dist.distill.student import Batch, GradientPath, Phase, PhaseResult, Student, SyntheticSet
from lad_dist.distill.update import Gradients, Mean, Optimizers, SetGradients, weighted_sum
from lad_dist.distill.windows import Window, Windows, counters
from lad_dist.errors import Interrupted, LadDistError, NumericalError, RecipeError, TrajectoryError
from lad_dist.interrupts import StopFlag, deferred
from lad_dist.models.convolution import set_precision
from lad_dist.models.network import build
from lad_dist.progress import Events, Screen
from lad_dist.ranks import ALONE, Ranks, groups_of, raise_first
from lad_dist.recipe import MOST_TEACHERS, PhaseName, Recipe
from lad_dist.rundir import RunDir, host_name
from lad_dist.seeds import rng
from lad_dist.teachers import check_network
from lad_dist.trajectories.kept import needed as needed_epochs
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage

CHECKPOINT_SECONDS = 60.0  # between checkpoints, in addition to those of distill.checkpoint_every
_ROWS = 128  # images whose gradients are squared at a time
_NORMS_BY_CLASS = 200  # classes up to which every iteration records each class's norm, else those of three groups
_FIRST_SECONDS = 1.0  # until a process's first checkpoint


@dataclass(frozen=True)
class NamedPhase:
    """One phase of an iteration: its expert stage, its weight lambda in the total gradient, and its window."""

    stage: Stage
    weight: float
    window: Window
    phase: Phase


@dataclass(frozen=True)
class Context:
    """Context of a distillation on one rank. ``flag`` requests a stop on one rank; all ranks stop after the iteration.

    ``record``: replay this record instead of drawing windows.
    """

    recipe: Recipe
    run: RunDir
    device: torch.device
    events: Events
    screen: Screen
    ranks: Ranks = ALONE
    flag: StopFlag = field(default_factory=StopFlag)
    record: ReplayRecord | None = None


def distill(context: Context, data: PreparedData | None, early: Early | None = None) -> None:
    """Distill from the last checkpoint on, and publish the distilled set. All ranks call it.

    Only rank 0 needs ``data``. ``early``, on rank 0: measures the set during distillation.

    Raises:
        RunDirError: the existing state was not distilled by ``record``, or was by another one.
        NumericalError: a loss or gradient is no longer finite; names the iteration. The last good state is kept.
        TrajectoryError: the buffer is damaged or lacks what the recipe needs.
        StorageError: a checkpoint cannot be written.
        RankError: another rank is gone; the last checkpoint is kept.
        Interrupted: a stop was requested; the state of the last whole iteration is kept.
    """
    c = context
    facts = c.ranks.share(None if data is None else DataFacts.of(data))
    assert facts is not None, "rank 0 has the data"
    buffer = Buffer(c.run.trajectories, expected_hash=c.recipe.experts_hash())
    buffer.check_keeps(needed_epochs(c.recipe))
    with ExitStack() as stack:
        live = None
        if c.recipe.buffer.start_after is not None and c.record is None:
            live = stack.enter_context(closing(LiveExperts(buffer, c.recipe, c.ranks, c.flag)))
            live.wait(c.screen, c.events)
        work = stack.enter_context(closing(Distillation(c, facts, buffer, live)))
        work.prepare_regression(data)
        work.prepare_statistics(data)
        _distill(work, data, early)


def _distill(work: Distillation, data: PreparedData | None, early: Early | None) -> None:
    recipe, run, ranks, events, screen = work.recipe, work.run, work.ranks, work.events, work.screen
    state = work.resume() or work.start(data)
    path, why = work.choose_path(state)
    members = ranks.gather([host_name(), os.getpid()])
    replayed = {} if work.record is None else {"replayed_from": work.record.run}
    events.emit("distill-started", iteration=state.iteration, gradient=path, why=why, ranks=members, **replayed)
    screen.say(f"distill: gradient path {path}: {why}")
    total = recipe.distill.iterations
    if recipe.distill.precision != "float32" and state.iteration < total:
        work.compare_precision(state, path)
    try:
        with screen.task("distill", total, "iterations", done=state.iteration) as task:
            while state.iteration < total:
                began = time.perf_counter()
                task.advance(1, **work.iterate(state, work.recorded_path(state.iteration) or path))
                seconds = time.perf_counter() - began
                regular = state.iteration % recipe.distill.checkpoint_every == 0
                if (regular or work.save_due) and state.iteration < total:
                    work.save(state)
                    if early is not None and early.wanted(seconds * ranks.world):
                        early.look(work.whole(state))
                if recipe.distill.select != "last" and state.iteration % recipe.distill.select_every == 0:
                    work.publish(state, run.candidate(state.iteration), data)
    except (Interrupted, NumericalError):
        work.write(state)
        raise
    final = run.distilled if recipe.distill.select == "last" else run.candidate(state.iteration)
    work.publish(state, final, data)
    events.emit("distill-finished", iteration=state.iteration, alpha=float(state.alpha))


class SaveClock:
    """Schedule of checkpoints by time, independent of the duration of iterations.

    The first is due after one second, the next after as long again as the process has worked, so that a run that is
    killed every few seconds still advances, and finally every CHECKPOINT_SECONDS. Saving takes at most a twentieth of
    the time.
    """

    def __init__(self) -> None:
        self._start = self._last = time.monotonic()
        self._cost = 0.0

    def due(self) -> bool:
        """Return whether a checkpoint is due."""
        between = min(CHECKPOINT_SECONDS, max(_FIRST_SECONDS, self._last - self._start))
        return time.monotonic() - self._last >= max(between, 20 * self._cost)

    def saved(self, seconds: float) -> None:
        """Record that a checkpoint has just been written, in ``seconds``."""
        self._last, self._cost = time.monotonic(), seconds


class Distillation:
    """Objects shared by all iterations of one recipe, on one rank."""

    def __init__(self, context: Context, facts: DataFacts, buffer: Buffer, live: LiveExperts | None = None) -> None:
        recipe, ranks, device, record = context.recipe, context.ranks, context.device, context.record
        self.recipe, self.run, self.device, self.ranks = recipe, context.run, device, ranks
        self.events, self.screen, self.flag, self.record = context.events, context.screen, context.flag, record
        self.facts, self._live = facts, live
        self.classes, self.size = len(facts.counts), facts.size
        self.groups = ranks.split(groups_of(recipe.distill.windows, ranks.world))
        # A group takes every count-th window: its own are these.
        self.own_windows = range(self.groups.index, recipe.distill.windows, self.groups.count)
        self.share = Share.of(self.classes * recipe.ipc, self.groups.within)
        shape = (facts.channels, facts.size, self.classes)
        module = build(recipe.model, *shape, seed=0, purpose=("template",))
        set_precision(module, recipe.distill.precision)
        self.student = Student(module.to(device), self.groups.within, methods.find(recipe.method).loss)
        if buffer.meta.data_fingerprint != facts.fingerprint:
            raise TrajectoryError(
                f"{buffer.folder}: these trajectories are from other training images (data_fingerprint "
                "differs); use another run folder, or delete this one to retrain the experts"
            )
        check_network(buffer, self.student.layout)
        self.windows = Windows(buffer, self.student.layout, recipe, device, record)
        if record is not None:
            record.check(buffer, recipe)
            self.windows.experts = record.experts
        d = recipe.distill
        weights_K = class_weights(facts.counts, d.class_weights, d.class_weight_offset)
        self._weights_K = weights_K.to(device) if d.weighted_loss else None
        self._clock, self.save_due = SaveClock(), False
        self._class_of_s = torch.from_numpy(self.share.classes(recipe.ipc)).to(device)
        self._real: RealBatches | None = None
        self._targets: dict[int, statistics.Target] = {}

    def close(self) -> None:
        """Stop reading ahead."""
        self.windows.close()

    # --- start and end ----------------------------------------------------------------------------------------------

    def resume(self) -> State | None:
        """Load this rank's share of the run's newest checkpoint; None without one."""
        state = State.load(self.run.distill_checkpoint, self.recipe, self.device, self.ranks, self.groups)
        if state is not None:
            if self.ranks.first and self.record is not None:
                self.record.check_continues(self.run, state.iteration)
            elif self.ranks.first:
                check_not_replayed(self.run)
            self.screen.say(f"distill: continuing after iteration {state.iteration}")
        return state

    def start(self, data: PreparedData | None) -> State:
        """Return this rank's share of the initial synthetic set, which rank 0 builds."""
        made = None
        self._look_for_experts()
        if data is not None:
            made = first_set(self.recipe, data, self.student, self.windows, self.screen, self.events)
        images_SCHH, logits_SK, source = self.ranks.share(made) or _never()
        images_sCHH = images_SCHH[self.share.rows].to(self.device)
        logits_sK = logits_SK[self.share.rows].to(self.device, copy=True)
        return State(
            self.recipe,
            images_sCHH.clone(),
            logits_sK,
            images_sCHH.clone(),
            source,
            initial_logits_SK=logits_sK.clone(),
        )

    def prepare_regression(self, data: PreparedData | None) -> None:
        """Prepare the regression phase's real batches, on rank 0, which alone has ``data``."""
        if data is None or "regression" not in self.recipe.phases:
            return
        teacher = None
        if self.recipe.distill.regression_targets == "soft":
            teacher = mean_logits(self.recipe, data, self.student, self.windows)
        self._real = RealBatches(self.recipe, data, teacher)

    def prepare_statistics(self, data: PreparedData | None) -> None:
        """Measure the training images under every teacher on rank 0, which alone has them. All ranks call it."""
        if "statistics" not in self.recipe.phases:
            return
        for expert in self.windows.experts:
            theta_P = self.windows.teacher(expert)
            made = None if data is None else statistics.measure(self.student, theta_P, data)
            self._targets[expert] = self.ranks.share(made) or _never()

    def recorded_path(self, iteration: int) -> GradientPath | None:
        """Return the gradient path of the replayed run, if the recipe does not set one."""
        if self.record is None or self.recipe.distill.gradient != "auto" or iteration >= len(self.record.paths):
            return None
        return self.record.paths[iteration]

    def choose_path(self, state: State) -> tuple[GradientPath, str]:
        """Return (gradient path that fits every rank's memory, reason)."""
        if state.iteration >= self.recipe.distill.iterations:
            return "keep", "no iteration is left"
        recorded = self.recorded_path(state.iteration)
        if recorded is not None:
            return recorded, "the replayed run took it"
        phases, here = self.phases(state.iteration), self.ranks.gather(host_name()).count(host_name())
        if not phases:
            return "keep", f"no student is trained in the {self.recipe.phases[0]} phase"
        chosen = choose_path(self.recipe, self.student, state.optimizers.synthetic_set(), phases[0].phase, here)
        every = self.ranks.gather(chosen)
        fitting, why = next((one for one in every if one[0] == "recompute"), every[0])
        tried = self.recipe.model.network == "convnet" and self.student.captured.applies(self.device)
        if self.recipe.distill.gradient != "auto" or not tried:
            return fitting, why
        path, measured = faster(
            [fitting, "captured"], lambda path: self._phases_by(state, path), self.ranks, self.device
        )
        if path != "captured":
            self.student.captured.clear()
        return path, f"{measured}; {why}"

    def _phases_by(self, state: State, path: GradientPath) -> None:
        """Compute the next iteration's gradients by ``path`` and wait for the device."""
        synthetic = state.optimizers.synthetic_set()
        for named in self.phases(state.iteration):
            self.student.run(synthetic, named.phase, path)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def publish(self, state: State, folder: Path, data: PreparedData | None) -> None:
        """Publish the whole current set; rank 0 reads the other ranks' shares from a checkpoint that this saves."""
        self.write(state)
        if data is not None:
            teachers = labeller(self.recipe, data, self.student, self.windows, self._first_experts()[:MOST_TEACHERS])
            publish(self.recipe, data, self.whole(state), self.run, folder, teachers)

    def _first_experts(self) -> Sequence[int]:
        """Return the experts that made the initial set; of ``buffer.start_after``, those that were complete then."""
        if self.record is not None or self.recipe.buffer.start_after is None:
            return self.windows.experts
        return initial_experts(self.run) or self.windows.experts

    def save(self, state: State) -> None:
        """Write a checkpoint. All ranks call it."""
        began = time.monotonic()
        self.write(state)
        self._clock.saved(time.monotonic() - began)

    def write(self, state: State) -> None:
        """Publish a checkpoint, whatever the clock says. All ranks call it."""
        state.save(self.run.distill_checkpoint, self.recipe, self.ranks, self.groups)

    def whole(self, state: State) -> State:
        """Return ``state``, which has just been saved, with the shares of all ranks."""
        if self.ranks.world == 1:
            return state
        loaded = State.load(self.run.distill_checkpoint, self.recipe, torch.device("cpu"))
        assert loaded is not None, "it has just been saved"
        return loaded

    def compare_precision(self, state: State, path: GradientPath) -> None:
        """Report the cosine between bfloat16 and float32 gradients of the next iteration."""
        named = self.phases(state.iteration)
        if not named:
            return
        synthetic = state.optimizers.synthetic_set()
        cosines = cosines_to_float32(self.student, synthetic, [p.phase for p in named], path, self.groups.within)
        by_phase = {p.stage: round(cosine, 6) for p, cosine in zip(named, cosines, strict=True)}
        self.events.emit(
            "precision", iteration=state.iteration, precision=self.recipe.distill.precision, cosine=by_phase
        )
        shown = ", ".join(f"{cosine:.5f} {stage}" for stage, cosine in by_phase.items())
        self.screen.say(f"distill: convolutions in bfloat16; cosine of the images' gradient to float32's: {shown}")

    # --- one iteration ----------------------------------------------------------------------------------------------

    def iterate(self, state: State, path: GradientPath) -> dict[str, Any]:
        """Run one iteration and return the values to display. If it raises, ``state`` is unchanged."""
        began, synthetic = time.perf_counter(), state.optimizers.synthetic_set()
        phases = self.phases(state.iteration)
        self.windows.read_ahead(self.recipe.phases, state.iteration + 1, self.own_windows)
        results, gradients = self._matched(state, path, phases)
        numbers = range(self.recipe.distill.windows)
        drawn: list[list[str | int]] = [
            [p.stage, *self.windows.choose(p.stage, state.iteration, n)] for n in numbers for p in phases
        ]
        others: dict[PhaseName, SetGradients] = {}
        if "regression" in self.recipe.phases:
            at = self.windows.checkpoint(state.iteration)
            others["regression"] = self._regress(synthetic, at.start_P, state.iteration)
            drawn.append(["regression", at.expert, at.epoch])
            gradients.append((self.recipe.distill.lambda_regression, self._shared(others["regression"])))
        if "statistics" in self.recipe.phases:
            expert, epoch = self.windows.choose("statistics", state.iteration)
            others["statistics"] = self._align(synthetic, expert, state.iteration)
            drawn.append(["statistics", expert, epoch])
            gradients.append((self.recipe.distill.lambda_statistics, self._shared(others["statistics"])))
        agreed = self._agree(results, gradients, state.optimizers)
        self.save_due = agreed.save
        self._check_finite(state, drawn, [g for _, g in gradients], agreed)
        kept, figures = state.optimizers.copy(whole=agreed.large), self._figures(results, gradients, agreed)
        aligned = self._alignment(state, results)
        for phase, other in others.items():
            figures |= {f"loss_{phase}": float(other.loss), f"accuracy_{phase}": float(other.accuracy)}
        with deferred():  # includes the event: an iteration without its record could not be replayed
            good = self._everywhere(state.optimizers.step_alpha(gradients))
            if good:
                state.optimizers.step_set(gradients, state.iteration)
                good = not agreed.large or self._everywhere(state.finite())
            if good:
                state.iteration += 1
            else:
                state.optimizers.restore(kept, state.iteration)
                raise NumericalError(
                    f"iteration {state.iteration + 1}: the step produced NaN or Inf or made alpha (it was "
                    f"{float(kept['alpha']):.3g}) zero or less; the last good state is kept; try a smaller "
                    "distill.lr_images or distill.lr_alpha"
                )
            self.events.emit(
                "iteration",
                iteration=state.iteration,
                alpha=float(state.alpha),
                seconds=round(time.perf_counter() - began, 4),
                windows=drawn,
                gradient=path,
                **figures,
                alignment=aligned,
                **self._norms(agreed.class_squares_K.sqrt()),
            )
        if agreed.stop:
            raise Interrupted(
                f"interrupted by {self.flag.name or 'a signal to another rank'}; finished work is kept, and the same "
                "command continues"
            )
        shown = {f"loss {phase}": figures[f"loss_{phase}"] for phase in self.recipe.phases}
        return {**shown, "alpha": float(state.alpha)}

    def _everywhere(self, good: bool) -> bool:
        """Return whether ``good`` holds on every rank. All ranks call it."""
        return float(self.ranks.total(torch.tensor(0.0 if good else 1.0, device=self.device))) == 0

    def _matched(
        self, state: State, path: GradientPath, phases: list[NamedPhase]
    ) -> tuple[list[tuple[NamedPhase, PhaseResult]], list[tuple[float, Gradients]]]:
        """Run this group's windows, the first of which are ``phases``. All ranks call it, and raise the same error.

        Returns the first window's results, with all windows' student losses; each phase's weight, and its gradients
        averaged over the windows of all groups.
        """
        synthetic, count = state.optimizers.synthetic_set(), self.recipe.distill.windows
        results: list[tuple[NamedPhase, PhaseResult]] = []
        sums: list[Mean] = []
        fault: LadDistError | None = None
        try:
            results = [(p, self.student.run(synthetic, p.phase, path)) for p in phases]
            if count == 1:
                return results, [(p.weight, result) for p, result in results]
            sums = [Mean.of(result, count) for _, result in results]
            for number in self.own_windows[1:]:
                for i, named in enumerate(self.phases(state.iteration, number)):
                    result = self.student.run(synthetic, named.phase, path)
                    sums[i] += Mean.of(result, count)
                    results[i][1].inner_losses.extend(result.inner_losses)
        except (NumericalError, RecipeError) as error:  # on all ranks of this group
            if self.groups.count == 1:
                raise
            fault = error
        if self.groups.count > 1 and not self._everywhere(fault is None):
            raise_first(self.ranks.gather(None if fault is None else (type(fault).__name__, str(fault))))
        return results, [(p.weight, mean.over(self.groups)) for (p, _), mean in zip(results, sums, strict=True)]

    def _shared(self, gradients: SetGradients) -> Gradients:
        """Return the gradients of a phase that every group has computed, with the same bits in all groups."""
        if self.groups.count == 1:
            return gradients
        return Mean.of(gradients, self.groups.count).over(self.groups)

    def _regress(self, synthetic: SyntheticSet, theta_P: Tensor, iteration: int) -> SetGradients:
        """Run the regression phase of an iteration. All ranks call it."""
        real = self.ranks.share(None if self._real is None else self._real.features(self.student, theta_P, iteration))
        assert real is not None, "rank 0 has the data"
        (batch,), (places,) = self._batches("regression", iteration, 1)
        kept_D = kept_features(self.recipe, real.features_RD.shape[1], iteration)
        ridge = self.recipe.distill.regression_ridge
        return regress(self.student, synthetic, batch, places, theta_P, real, ridge, kept_D)

    def _align(self, synthetic: SyntheticSet, expert: int, iteration: int) -> SetGradients:
        """Run the statistics phase of an iteration. All ranks call it."""
        (batch,), (places,) = self._batches("statistics", iteration, 1)
        (rows,) = self._rows("statistics", iteration, 1)
        labels_B = torch.from_numpy(rows // self.recipe.ipc)
        d, theta_P = self.recipe.distill, self.windows.teacher(expert)
        return statistics.align(
            self.student,
            synthetic,
            batch,
            places,
            labels_B,
            theta_P,
            self._targets[expert],
            d.statistics_weight,
            d.statistics_first,
            d.label_temperature,
        )

    def _agree(
        self,
        results: list[tuple[NamedPhase, PhaseResult]],
        gradients: list[tuple[float, Gradients]],
        optimizers: Optimizers,
    ) -> _Agreed:
        """Combine what depends on every rank, or on rank 0's clock: one sum of 3 + 2 x phases + K numbers."""
        total_sCHH = weighted_sum([(weight, g.by_rows, g.by_rows.images_TCHH) for weight, g in gradients])
        squares_s = total_sCHH.new_empty(len(total_sCHH), dtype=torch.float64)
        for images, squares in zip(total_sCHH.split(_ROWS), squares_s.split(_ROWS), strict=True):
            squares.copy_(images.flatten(1).double().square().sum(1))
        del total_sCHH  # as large as the set
        squares_s /= self.groups.count  # every group has them
        squares_K = squares_s.new_zeros(self.classes).index_add_(0, self._class_of_s, squares_s)
        broken = [
            torch.stack([g.loss, g.alpha_gradient, g.by_rows.images_TCHH.sum(), g.by_rows.labels_TK.sum()])
            .isfinite()
            .all()
            .logical_not()
            for _, g in gradients
        ]
        losses = [torch.stack(r.inner_losses).mean() / self.groups.count for _, r in results]
        stop = torch.tensor(float(self.flag.name is not None), device=self.device)
        save = torch.tensor(float(self.ranks.first and self._clock.due()), device=self.device)
        large = torch.tensor(float(optimizers.may_overflow(gradients)), device=self.device)
        told = torch.cat([torch.stack([stop, save, large, *broken, *losses]).double(), squares_K])
        stop, save, large, *rest = self.ranks.total(told.nan_to_num(0.0, 0.0, 0.0)).split(
            [1, 1, 1, len(broken), len(losses), self.classes]
        )
        said = (bool(stop > 0), bool(save > 0), bool(large > 0))
        return _Agreed(*said, rest[0].tolist(), rest[1].tolist(), rest[2].cpu())

    def phases(self, iteration: int, number: int | None = None) -> list[NamedPhase]:
        """Return the matching phases of a window of an iteration: representation and classifier, or the joint one.

        A function of (seed, iteration, number), and of the complete experts or the replayed windows. Without
        ``number``: of this group's first window, after a look at the experts.
        """
        if number is None:
            number = self.own_windows[0]
            self._look_for_experts()
        d, layout = self.recipe.distill, self.student.layout
        phases = []
        if "representation" in self.recipe.phases:
            window = self.windows.draw("representation", iteration, number)
            batches, _ = self._batches("representation", iteration, d.student_steps, number)
            span = layout.span("backbone" if d.matching == "decoupled" else "all")
            first = Phase(window.start_P, window.target_P, batches, span, self._weights_K)
            phases.append(NamedPhase("representation", d.lambda_representation, window, first))
        if "classifier" in self.recipe.phases:
            window = self.windows.draw("classifier", iteration, number)
            batches, _ = self._batches("classifier", iteration, d.student_steps_classifier, number)
            second = Phase(window.start_P, window.target_P, batches, layout.span("all"), classifier_only=True)
            phases.append(NamedPhase("classifier", d.lambda_classifier, window, second))
        return phases

    def _look_for_experts(self) -> None:
        """Update the experts to draw from while others are still being trained. All ranks call it."""
        if self._live is not None:
            self.windows.experts = self._live.now()

    def _batches(
        self, phase: PhaseName, iteration: int, steps: int, number: int = 0
    ) -> tuple[list[Batch], list[Tensor]]:
        """Return this rank's part of each batch, and the positions of its images in the whole batch.

        Batches split fresh permutations of the set, drawn again when used up; each batch has its own augmentation.
        """
        seed = self.recipe.seed
        batches, places = [], []
        for step, rows in enumerate(self._rows(phase, iteration, steps, number)):
            drawn = augment.draw(
                rng(seed, "distill", iteration, "augment", phase, step, *counters(number)),
                self.recipe.augment,
                len(rows),
                self.size,
            )
            own, part, at = self.share.part(rows, drawn)
            batches.append(Batch(torch.from_numpy(own).to(self.device), part, len(rows)))
            places.append(torch.from_numpy(at).to(self.device))
        return batches, places

    def _rows(self, phase: PhaseName, iteration: int, steps: int, number: int = 0) -> list[np.ndarray]:
        """Return the rows of each whole batch of a phase; equal on every rank."""
        count = self.classes * self.recipe.ipc
        size = min(self.recipe.distill.batch, count)
        generator = rng(self.recipe.seed, "distill", iteration, "batches", phase, *counters(number))
        chunks: list[np.ndarray] = []
        while len(chunks) < steps:
            chunks += np.split(generator.permutation(count), range(size, count, size))
        return chunks[:steps]

    def _check_finite(
        self, state: State, drawn: list[list[str | int]], gradients: list[Gradients], agreed: _Agreed
    ) -> None:
        count = self.recipe.distill.windows
        for phase, gradient, broken in zip(self.recipe.phases, gradients, agreed.broken, strict=True):
            if broken:
                at = [f"expert {expert}, start epoch {epoch}" for name, expert, epoch in drawn if name == phase]
                raise NumericalError(
                    f"iteration {state.iteration + 1}: the {phase} phase produced NaN or Inf (loss "
                    f"{float(gradient.loss):.3g}, {at[0] if len(at) == 1 else f'in one of {count} windows'}); the last "
                    "good state is kept; try a smaller distill.lr_images or distill.alpha"
                )

    # --- reported values --------------------------------------------------------------------------------------------

    @staticmethod
    def _figures(
        results: list[tuple[NamedPhase, PhaseResult]], gradients: list[tuple[float, Gradients]], agreed: _Agreed
    ) -> dict[str, float]:
        """Return per phase the matching loss, cosine and norm ratio of the displacements, and the student's loss.

        Of several windows both losses are means; cosine and norm ratio are the first one's.
        """
        figures: dict[str, float] = {}
        matching = zip(results, gradients[: len(results)], agreed.student_losses, strict=True)
        for (p, r), (_, gradient), student_loss in matching:
            figures[f"loss_{p.stage}"] = float(gradient.loss)
            figures[f"cosine_{p.stage}"] = float(r.match.cosine)
            figures[f"norm_ratio_{p.stage}"] = float(r.match.norm_ratio)
            figures[f"student_loss_{p.stage}"] = student_loss
        return figures

    def _norms(self, norms_K: Tensor) -> dict[str, Any]:
        """Return the pixels' gradient norms: of each class, or if there are many the means of three groups."""
        if self.classes <= _NORMS_BY_CLASS:
            return {"pixel_gradient_norm": [float(f"{x:.4g}") for x in norms_K.tolist()]}
        thirds = head_medium_tail(self.facts.counts)["by_thirds"]
        return {"pixel_gradient_norms": {part: float(f"{norms_K[list(of)].mean():.4g}") for part, of in thirds.items()}}

    def _alignment(self, state: State, results: list[tuple[NamedPhase, PhaseResult]]) -> dict[str, dict[str, float]]:
        """Return ``alignment`` per phase, for the state before the step. Equal on every rank."""
        alpha, layout, counts = state.alpha, self.student.layout, self.facts.counts
        return {
            p.stage: alignment(p.phase.start_P, p.phase.target_P, r.gradient_sum_P, alpha, layout, counts)
            for p, r in results
        }


@dataclass(frozen=True)
class _Agreed:
    """Values summed over the ranks.

    ``stop``: a rank was asked to stop. ``save``: a checkpoint is due by time. ``large``: a step may overflow on some
    rank; only then do all ranks copy the set first, which takes up to three times its memory more. Per phase: ``broken``,
    non-zero if not finite, and the student's mean loss. ``class_squares_K``: squared norm of each class's total pixel
    gradient.
    """

    stop: bool
    save: bool
    large: bool
    broken: list[float]
    student_losses: list[float]
    class_squares_K: Tensor


def _never() -> Any:
    raise AssertionError("rank 0 makes the initial set")


def class_weights(counts: tuple[int, ...], kind: str, offset: float) -> Tensor:
    """w_c = (n_c + f) / (sum n + f), shape (K,); ``mean-one`` scales the mean to 1 (LAD, weight mismatch avoidance)."""
    n_K = torch.tensor(counts, dtype=torch.float64)
    weights_K = (n_K + offset) / (n_K.sum() + offset)
    if kind == "mean-one":
        weights_K = weights_K / weights_K.mean()
    return weights_K.float()
