"""Distillation: the loop of verbs, from the experts' buffer to the distilled set, on one rank or many.

Every rank runs this loop on its own share of the synthetic set (``shards.py``). What must be decided together is decided by
``_agree``, once per iteration; rank 0 speaks for all.

Shapes: S synthetic images of the whole set, s of this rank's share, K classes, P parameters.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lad_dist.data import augment
from lad_dist.data.prepare import PreparedData
from lad_dist.distill.alignment import alignment
from lad_dist.distill.early import Early
from lad_dist.distill.live import LiveExperts
from lad_dist.distill.memory import choose_path, faster
from lad_dist.distill.precision import cosines_to_float32, set_precision
from lad_dist.distill.replay import Record, check_not_replayed
from lad_dist.distill.shards import Share
from lad_dist.distill.start import Facts, first_set, publish
from lad_dist.distill.state import State
from lad_dist.distill.student import Batch, GradientPath, Phase, PhaseResult, Student
from lad_dist.distill.windows import Window, Windows
from lad_dist.errors import Interrupted, NumericalError, TrajectoryError
from lad_dist.interrupts import StopFlag, deferred
from lad_dist.models.convnet import build
from lad_dist.progress import Events, Screen
from lad_dist.ranks import ALONE, Ranks
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir, host_name
from lad_dist.seeds import rng
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage


@dataclass(frozen=True)
class NamedPhase:
    """One phase of an iteration: its expert stage, its weight lambda in the total gradient, and where it starts."""

    stage: Stage
    weight: float
    window: Window
    phase: Phase


def distill(
    recipe: Recipe,
    data: PreparedData | None,
    run: RunDir,
    events: Events,
    screen: Screen,
    device: torch.device,
    ranks: Ranks = ALONE,
    flag: StopFlag | None = None,
    record: Record | None = None,
    early: Early | None = None,
) -> None:
    """Distill from the last checkpoint on, and publish the distilled set. All ranks call it.

    Only rank 0 needs ``data``. ``flag`` is what tells a rank among several to stop (all stop together, after an iteration).
    ``record``: replay this one, instead of drawing windows. ``early``, on rank 0: measure the set on its way.

    Raises:
        RunDirError: what is there already was not distilled by ``record``, or by another one.
        NumericalError: a loss or gradient is no longer finite; names the iteration. The last good state is kept.
        TrajectoryError: the buffer lacks what the recipe needs, or is damaged.
        StorageError: a checkpoint cannot be written.
        RankError: another rank is gone; the last checkpoint is kept.
        Interrupted: asked to stop; the state of the last whole iteration is kept.
    """
    facts = ranks.share(None if data is None else Facts.of(data))
    assert facts is not None, "rank 0 has the data"
    buffer = Buffer(run.trajectories, expected_hash=recipe.experts_hash())
    with ExitStack() as stack:
        live = None
        if recipe.buffer.start_after is not None and record is None:
            live = stack.enter_context(closing(LiveExperts(buffer, recipe, ranks, flag)))
            live.wait(screen, events)
        work = stack.enter_context(closing(Distillation(recipe, facts, run, device, ranks, flag, buffer, live, record)))
        _distill(work, data, events, screen, early)


def _distill(
    work: Distillation, data: PreparedData | None, events: Events, screen: Screen, early: Early | None
) -> None:
    recipe, run, ranks = work.recipe, work.run, work.ranks
    state = work.resume(screen) or work.start(data, screen, events)
    path, why = work.choose_path(state)
    members = ranks.gather([host_name(), os.getpid()])
    replayed = {} if work.record is None else {"replayed_from": work.record.run}
    events.emit("distill-started", iteration=state.iteration, gradient=path, why=why, ranks=members, **replayed)
    screen.say(f"distill: gradient path {path}: {why}")
    total = recipe.distill.iterations
    if recipe.distill.precision != "float32" and state.iteration < total:
        work.compare_precision(state, path, screen, events)
    try:
        with screen.task("distill", total, "iterations", done=state.iteration) as task:
            while state.iteration < total:
                began = time.perf_counter()
                task.advance(1, **work.iterate(state, work.recorded_path(state.iteration) or path, events))
                seconds = time.perf_counter() - began
                if state.iteration % recipe.distill.checkpoint_every == 0 and state.iteration < total:
                    state.save(run.distill_checkpoint, recipe, ranks)
                    if early is not None and early.wanted(seconds * ranks.world):
                        early.look(work.whole(state))
                if recipe.distill.select != "last" and state.iteration % recipe.distill.select_every == 0:
                    work.publish(state, run.candidate(state.iteration), data)
    except (Interrupted, NumericalError):
        state.save(run.distill_checkpoint, recipe, ranks)
        raise
    final = run.distilled if recipe.distill.select == "last" else run.candidate(state.iteration)
    work.publish(state, final, data)
    events.emit("distill-finished", iteration=state.iteration, alpha=float(state.alpha))


class Distillation:
    """What stays the same over the iterations of one recipe, on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        facts: Facts,
        run: RunDir,
        device: torch.device,
        ranks: Ranks = ALONE,
        flag: StopFlag | None = None,
        buffer: Buffer | None = None,
        live: LiveExperts | None = None,
        record: Record | None = None,
    ) -> None:
        self.recipe, self.facts, self.run, self.device = recipe, facts, run, device
        self.ranks, self.flag, self.record, self._live = ranks, flag or StopFlag(), record, live
        self.classes, self.size = len(facts.counts), facts.size
        self.share = Share.of(self.classes * recipe.ipc, ranks)
        m = recipe.model
        module = build(facts.channels, facts.size, self.classes, m.width, m.depth, seed=0, purpose=("template",))
        set_precision(module, recipe.distill.precision)
        self.student = Student(module.to(device), ranks)
        buffer = buffer or Buffer(run.trajectories, expected_hash=recipe.experts_hash())
        if buffer.meta.data_fingerprint != facts.fingerprint:
            raise TrajectoryError(
                f"{buffer.folder}: these trajectories are of other training images (data_fingerprint "
                "differs); choose another run folder, or remove this one to train the experts again"
            )
        self.windows = Windows(buffer, self.student.layout, recipe, device, record)
        if record is not None:
            record.check(buffer, recipe)
            self.windows.experts = record.experts
        d = recipe.distill
        weights_K = class_weights(facts.counts, d.class_weights, d.class_weight_offset)
        self._weights_K = weights_K.to(device) if d.weighted_loss else None
        self._class_of_s = torch.from_numpy(self.share.classes(recipe.ipc)).to(device)

    def close(self) -> None:
        """End the reading ahead."""
        self.windows.close()

    # --- where it begins and ends -----------------------------------------------------------------------------------

    def resume(self, screen: Screen) -> State | None:
        """This rank's share of the run's newest checkpoint, if it has one."""
        state = State.load(self.run.distill_checkpoint, self.recipe, self.device, self.ranks)
        if state is not None:
            if self.ranks.first and self.record is not None:
                self.record.check_continues(self.run, state.iteration)
            elif self.ranks.first:
                check_not_replayed(self.run)
            screen.say(f"distill: continuing after iteration {state.iteration}")
        return state

    def start(self, data: PreparedData | None, screen: Screen, events: Events) -> State:
        """This rank's share of the initial synthetic set, which rank 0 makes."""
        made = None
        self._look_for_experts()
        if data is not None:
            made = first_set(self.recipe, data, self.student, self.windows, screen, events)
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

    def recorded_path(self, iteration: int) -> GradientPath | None:
        """The gradient path that a replayed run took, where the recipe names none itself."""
        if self.record is None or self.recipe.distill.gradient != "auto" or iteration >= len(self.record.paths):
            return None
        return self.record.paths[iteration]

    def choose_path(self, state: State) -> tuple[GradientPath, str]:
        """The gradient path that fits every rank's memory, and why."""
        recorded = self.recorded_path(state.iteration)
        if recorded is not None:
            return recorded, "the replayed run took it"
        first, here = self.phases(state.iteration)[0].phase, self.ranks.gather(host_name()).count(host_name())
        chosen = choose_path(self.recipe, self.student, state.optimizers.synthetic_set(), first, here)
        every = self.ranks.gather(chosen)
        fitting, why = next((one for one in every if one[0] == "recompute"), every[0])
        if self.recipe.distill.gradient != "auto" or not self.student.captured.applies(self.device):
            return fitting, why
        path, measured = faster([fitting, "captured"], lambda path: self._phases_by(state, path), self.ranks, self.device)
        if path != "captured":
            self.student.captured.clear()
        return path, f"{measured}; {why}"

    def _phases_by(self, state: State, path: GradientPath) -> None:
        """The next iteration's gradients, to the end."""
        synthetic = state.optimizers.synthetic_set()
        for named in self.phases(state.iteration):
            self.student.run(synthetic, named.phase, path)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def publish(self, state: State, folder: Path, data: PreparedData | None) -> None:
        """Publish the whole set as it is; it passes through a checkpoint, from which rank 0 reads the other shares."""
        state.save(self.run.distill_checkpoint, self.recipe, self.ranks)
        if data is not None:
            publish(self.recipe, data, self.whole(state), self.run, folder)

    def whole(self, state: State) -> State:
        """Every rank's share of ``state``, which has just been saved."""
        if self.ranks.world == 1:
            return state
        loaded = State.load(self.run.distill_checkpoint, self.recipe, torch.device("cpu"))
        assert loaded is not None, "it has just been saved"
        return loaded

    def compare_precision(self, state: State, path: GradientPath, screen: Screen, events: Events) -> None:
        """Say how far bfloat16 turns the next iteration's gradients."""
        named = self.phases(state.iteration)
        synthetic = state.optimizers.synthetic_set()
        cosines = cosines_to_float32(self.student, synthetic, [p.phase for p in named], path, self.ranks)
        by_phase = {p.stage: round(cosine, 6) for p, cosine in zip(named, cosines, strict=True)}
        events.emit("precision", iteration=state.iteration, precision=self.recipe.distill.precision, cosine=by_phase)
        shown = ", ".join(f"{cosine:.5f} {stage}" for stage, cosine in by_phase.items())
        screen.say(f"distill: convolutions in bfloat16; cosine of the images' gradient to float32's: {shown}")

    # --- one iteration ----------------------------------------------------------------------------------------------

    def iterate(self, state: State, path: GradientPath, events: Events) -> dict[str, Any]:
        """One whole iteration; returns the figures to show. Where it raises, ``state`` is as it was before."""
        began, synthetic = time.perf_counter(), state.optimizers.synthetic_set()
        phases = self.phases(state.iteration)
        self.windows.read_ahead([p.stage for p in phases], state.iteration + 1)
        results = [(p, self.student.run(synthetic, p.phase, path)) for p in phases]
        agreed = self._agree(results)
        self._check_finite(state, results, agreed)
        kept, figures, aligned = self._copy(state), self._figures(results, agreed), self._alignment(state, results)
        with deferred():  # the record too: an iteration that was done and not recorded could not be replayed
            state.optimizers.step([(p.weight, result) for p, result in results])
            if float(self.ranks.total(torch.tensor(0.0 if state.finite() else 1.0, device=self.device))) == 0:
                state.iteration += 1
            else:
                self._restore(state, kept)
                raise NumericalError(
                    f"iteration {state.iteration + 1}: the step left the finite numbers or made alpha (it was "
                    f"{float(kept[2]):.3g}) zero or less; the last good state is kept; try a smaller "
                    "distill.lr_images or distill.lr_alpha"
                )
            events.emit(
                "iteration",
                iteration=state.iteration,
                alpha=float(state.alpha),
                seconds=round(time.perf_counter() - began, 4),
                windows=[[p.stage, p.window.expert, p.window.epoch] for p in phases],
                gradient=path,
                **figures,
                alignment=aligned,
                pixel_gradient_norm=[float(f"{x:.4g}") for x in agreed.class_squares_K.sqrt().tolist()],
            )
        if agreed.stop:
            raise Interrupted(
                f"interrupted by {self.flag.name or 'a signal to another rank'}; what is finished is kept, and the same "
                "command continues"
            )
        shown = {f"loss {stage}": value for stage, value in ((p.stage, figures[f"loss_{p.stage}"]) for p in phases)}
        return {**shown, "alpha": float(state.alpha)}

    def _agree(self, results: list[tuple[NamedPhase, PhaseResult]]) -> _Agreed:
        """What needs every rank's word: one sum of 1 + 2 x phases + K numbers."""
        squares_s = torch.stack([p.weight * r.image_grad_SCHH for p, r in results]).sum(0).flatten(1).double()
        squares_s = squares_s.square().sum(1)
        squares_K = squares_s.new_zeros(self.classes).index_add_(0, self._class_of_s, squares_s)
        broken = [
            torch.stack([r.match.loss, r.match.alpha_gradient, r.image_grad_SCHH.sum(), r.label_grad_SK.sum()])
            .isfinite()
            .all()
            .logical_not()
            for _, r in results
        ]
        losses = [torch.stack(r.inner_losses).mean() for _, r in results]
        stop = torch.tensor(float(self.flag.name is not None), device=self.device)
        told = torch.cat([torch.stack([stop, *broken, *losses]).double(), squares_K]).nan_to_num(0.0, 0.0, 0.0)
        stop, *rest = self.ranks.total(told).split([1, len(results), len(results), self.classes])
        return _Agreed(bool(stop > 0), rest[0].tolist(), rest[1].tolist(), rest[2].cpu())

    def phases(self, iteration: int) -> list[NamedPhase]:
        """The phases of an iteration: representation and classifier, or the joint one.

        A function of (seed, iteration), and of the experts that are complete or the windows that are replayed.
        """
        self._look_for_experts()
        d, layout = self.recipe.distill, self.student.layout
        decoupled = d.matching == "decoupled"
        window = self.windows.draw("representation", iteration)
        batches = self._batches("representation", iteration, d.student_steps)
        first = Phase(
            window.start_P, window.target_P, batches, layout.span("backbone" if decoupled else "all"), self._weights_K
        )
        phases = [NamedPhase("representation", d.lambda_representation, window, first)]
        if decoupled:
            window = self.windows.draw("classifier", iteration)
            batches = self._batches("classifier", iteration, d.student_steps_classifier)
            second = Phase(window.start_P, window.target_P, batches, layout.span("all"), classifier_only=True)
            phases.append(NamedPhase("classifier", d.lambda_classifier, window, second))
        return phases

    def _look_for_experts(self) -> None:
        """All ranks call it, where experts are still in training: these are the ones to draw from."""
        if self._live is not None:
            self.windows.experts = self._live.now()

    def _batches(self, stage: Stage, iteration: int, steps: int) -> list[Batch]:
        """Fresh permutations of the set, split into batches and refilled when used up, each with its augmentation."""
        count, seed = self.classes * self.recipe.ipc, self.recipe.seed
        size = min(self.recipe.distill.batch, count)
        generator = rng(seed, "distill", iteration, "batches", stage)
        chunks: list[np.ndarray] = []
        while len(chunks) < steps:
            chunks += np.split(generator.permutation(count), range(size, count, size))
        batches = []
        for step, rows in enumerate(chunks[:steps]):
            drawn = augment.draw(
                rng(seed, "distill", iteration, "augment", stage, step), self.recipe.augment, len(rows), self.size
            )
            own, part = self.share.part(rows, drawn)
            batches.append(Batch(torch.from_numpy(own).to(self.device), part, len(rows)))
        return batches

    def _check_finite(self, state: State, results: list[tuple[NamedPhase, PhaseResult]], agreed: _Agreed) -> None:
        for (named, result), broken in zip(results, agreed.broken, strict=True):
            if broken:
                raise NumericalError(
                    f"iteration {state.iteration + 1}: the {named.stage} phase left the finite numbers (matching loss "
                    f"{float(result.match.loss):.3g}, expert {named.window.expert}, start epoch {named.window.epoch}); the last "
                    "good state is kept; try a smaller distill.alpha or distill.lr_images"
                )

    @staticmethod
    def _copy(state: State) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        o = state.optimizers
        momentum = {k: t.clone() for k, t in o.momentum_tensors().items()}
        return o.images_SCHH.clone(), o.logits_SK.clone(), o.alpha.clone(), momentum

    @staticmethod
    def _restore(state: State, kept: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]) -> None:
        o = state.optimizers
        for tensor, before in zip((o.images_SCHH, o.logits_SK, o.alpha), kept[:3], strict=True):
            tensor.copy_(before)
        o.load_momentum(kept[3])

    # --- what is worth knowing --------------------------------------------------------------------------------------

    @staticmethod
    def _figures(results: list[tuple[NamedPhase, PhaseResult]], agreed: _Agreed) -> dict[str, float]:
        """Per phase: matching loss, cosine and norm ratio of the student's displacement to the expert's, student's loss."""
        figures: dict[str, float] = {}
        for (p, r), student_loss in zip(results, agreed.student_losses, strict=True):
            figures[f"loss_{p.stage}"] = float(r.match.loss)
            figures[f"cosine_{p.stage}"] = float(r.match.cosine)
            figures[f"norm_ratio_{p.stage}"] = float(r.match.norm_ratio)
            figures[f"student_loss_{p.stage}"] = student_loss
        return figures

    def _alignment(self, state: State, results: list[tuple[NamedPhase, PhaseResult]]) -> dict[str, dict[str, float]]:
        """Per phase: how far the student follows the expert, by class group. The same on every rank, before the step."""
        alpha, layout, counts = state.alpha, self.student.layout, self.facts.counts
        return {
            p.stage: alignment(p.phase.start_P, p.phase.target_P, r.gradient_sum_P, alpha, layout, counts)
            for p, r in results
        }


@dataclass(frozen=True)
class _Agreed:
    """Summed over the ranks: whether one was asked to stop; per phase, which is not finite and the student's mean loss; the
    squared norm of the total pixel gradient of each class."""

    stop: bool
    broken: list[float]
    student_losses: list[float]
    class_squares_K: Tensor


def _never() -> Any:
    raise AssertionError("rank 0 makes the initial set")


def class_weights(counts: tuple[int, ...], kind: str, offset: float) -> Tensor:
    """w_c = (n_c + f) / (sum n + f), shape (K,); ``mean-one`` scales them to mean 1 (LAD, weight mismatch avoidance)."""
    n_K = torch.tensor(counts, dtype=torch.float64)
    weights_K = (n_K + offset) / (n_K.sum() + offset)
    if kind == "mean-one":
        weights_K = weights_K / weights_K.mean()
    return weights_K.float()
