"""Distillation on one device: the loop of verbs, from the experts' buffer to the distilled set.

Shapes: S synthetic images, N training images, K classes, P parameters.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist import __version__
from lad_dist.data import augment
from lad_dist.data.prepare import PreparedData
from lad_dist.distill import initial
from lad_dist.distill.memory import choose_path
from lad_dist.distill.state import State
from lad_dist.distill.student import Batch, GradientPath, Phase, PhaseResult, Student
from lad_dist.distill.windows import Window, Windows
from lad_dist.distilled import DistilledMeta, DistilledSet
from lad_dist.errors import Interrupted, NumericalError, TrajectoryError
from lad_dist.interrupts import deferred
from lad_dist.models import functional
from lad_dist.models.convnet import build
from lad_dist.progress import Events, Screen
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
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


def distill(recipe: Recipe, data: PreparedData, run: RunDir, events: Events, screen: Screen) -> None:
    """Distill from the last checkpoint on, and publish the distilled set.

    Raises:
        NumericalError: a loss or gradient is no longer finite; names the iteration. The last good state is kept.
        TrajectoryError: the buffer lacks what the recipe needs, or is damaged.
        StorageError: a checkpoint cannot be written.
        Interrupted: asked to stop; the state of the last whole iteration is kept.
    """
    work = Distillation(recipe, data, run)
    state = work.resume(screen) or work.start(screen, events)
    path, why = choose_path(recipe, work.student, state.optimizers.synthetic_set(), work.phases(0)[0].phase)
    events.emit("distill-started", iteration=state.iteration, gradient=path, why=why)
    screen.say(f"distill: gradient path {path}: {why}")
    total = recipe.distill.iterations
    try:
        with screen.task("distill", total, "iterations", done=state.iteration) as task:
            while state.iteration < total:
                task.advance(1, **work.iterate(state, path, events))
                if state.iteration % recipe.distill.checkpoint_every == 0 and state.iteration < total:
                    state.save(run.distill_checkpoint, recipe)
                if recipe.distill.select != "last" and state.iteration % recipe.distill.select_every == 0:
                    work.publish(state, run.candidate(state.iteration))
    except (Interrupted, NumericalError):
        state.save(run.distill_checkpoint, recipe)
        raise
    state.save(run.distill_checkpoint, recipe)
    final = run.distilled if recipe.distill.select == "last" else run.candidate(state.iteration)
    work.publish(state, final)
    events.emit("distill-finished", iteration=state.iteration, alpha=float(state.alpha))


class Distillation:
    """What stays the same over the iterations of one recipe."""

    def __init__(self, recipe: Recipe, data: PreparedData, run: RunDir) -> None:
        self.recipe, self.data, self.run = recipe, data, run
        images = data.splits.train
        self.size, self.classes = images.size, images.num_classes
        module = build(
            images.channels,
            images.size,
            images.num_classes,
            recipe.model.width,
            recipe.model.depth,
            seed=0,
            purpose=("template",),
        ).to(data.device)
        self.student = Student(module)
        buffer = Buffer(run.trajectories, expected_hash=recipe.experts_hash())
        if buffer.meta.data_fingerprint != images.fingerprint():
            raise TrajectoryError(
                f"{run.trajectories}: these trajectories are of other training images (data_fingerprint "
                "differs); choose another run folder, or remove this one to train the experts again"
            )
        self.windows = Windows(buffer, self.student.layout, recipe, data.device)
        d = recipe.distill
        weights_K = class_weights(data.counts, d.class_weights, d.class_weight_offset)
        self._weights_K = weights_K.to(data.device) if d.weighted_loss else None

    # --- where it begins --------------------------------------------------------------------------------------------

    def resume(self, screen: Screen) -> State | None:
        """The state of the run's checkpoint, if it has one."""
        path = self.run.distill_checkpoint
        if not path.exists():
            return None
        state = State.load(path, self.recipe, self.data.device)
        screen.say(f"distill: continuing after iteration {state.iteration}")
        return state

    def start(self, screen: Screen, events: Events) -> State:
        """The initial synthetic set: real images with the experts' logits as labels."""
        stage: Stage = "classifier" if self.recipe.uses_classifier_experts else "representation"
        how, cache = self.recipe.distill.initial, dict[int, Tensor]()

        def logits_of(expert: int, indices: np.ndarray) -> Tensor:
            if len(indices) <= len(cache.get(expert, ())):
                return cache[expert][torch.from_numpy(indices)]
            logits = self._expert_outputs(functional.logits, stage, expert, indices)
            if len(indices) == len(self.data.train):
                cache[expert] = logits
            return logits

        first = initial.build(
            logits_of,
            self.recipe.experts.count,
            self.data.train.labels_N.cpu().numpy(),
            self.recipe.ipc,
            self.classes,
            seed=self.recipe.seed,
            only_correct=how != "real-random",
            hard_labels=self.recipe.distill.labels == "hard",
            features_of=(lambda e: self._expert_outputs(functional.features, stage, e))
            if how == "real-herded"
            else None,
        )
        images_SCHH, _ = self.data.train.batch(torch.from_numpy(first.indices_S))
        source = {"images_no_expert_classified": first.without_expert, "images_repeated": first.repeated}
        events.emit("initial-set", indices=first.indices_S.tolist(), **source)
        screen.say(
            f"distill: {len(images_SCHH)} initial images; {first.without_expert} labelled by their class's mean logits, "
            f"{first.repeated} repeated"
        )
        d = self.recipe.distill
        logits_SK = first.logits_SK.to(self.data.device) / (d.label_temperature if d.labels == "soft" else 1.0)
        return State(self.recipe, images_SCHH.clone(), logits_SK, images_SCHH.clone(), source)

    @torch.no_grad()
    def _expert_outputs(
        self,
        function: Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor],
        stage: Stage,
        expert: int,
        indices: np.ndarray | None = None,
    ) -> Tensor:
        """What an expert's last checkpoint makes of training images (all of them by default), on the host."""
        views = self.student.layout.views(self.windows.last(stage, expert))
        rows = torch.arange(len(self.data.train)) if indices is None else torch.from_numpy(indices)
        batches = rows.split(1024)
        return torch.cat([function(self.student.module, views, self.data.train.batch(r)[0]) for r in batches]).cpu()

    # --- one iteration ----------------------------------------------------------------------------------------------

    def iterate(self, state: State, path: GradientPath, events: Events) -> dict[str, Any]:
        """One whole iteration; returns the figures to show. On NumericalError ``state`` is as it was before."""
        began, synthetic = time.perf_counter(), state.optimizers.synthetic_set()
        phases = self.phases(state.iteration)
        results = [(p, self.student.run(synthetic, p.phase, path)) for p in phases]
        for p, result in results:
            self._check_finite(state, p, result)
        kept = self._copy(state)
        with deferred():
            state.optimizers.step([(p.weight, result) for p, result in results])
            if state.finite():
                state.iteration += 1
            else:
                self._restore(state, kept)
                raise NumericalError(
                    f"iteration {state.iteration + 1}: the step left the finite numbers or made alpha (it was "
                    f"{float(kept[2]):.3g}) zero or less; the last good state is kept; try a smaller "
                    "distill.lr_images or distill.lr_alpha"
                )
        figures = self._figures(results)
        events.emit(
            "iteration",
            iteration=state.iteration,
            alpha=float(state.alpha),
            seconds=round(time.perf_counter() - began, 4),
            windows=[[p.stage, p.window.expert, p.window.epoch] for p in phases],
            **figures,
            pixel_gradient_norm=self._pixel_gradient_norm(results),
        )
        shown = {f"loss {stage}": value for stage, value in ((p.stage, figures[f"loss_{p.stage}"]) for p in phases)}
        return {**shown, "alpha": float(state.alpha)}

    def phases(self, iteration: int) -> list[NamedPhase]:
        """The phases of an iteration: representation and classifier, or the joint one; a function of (seed, iteration)."""
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
            batches.append(Batch(torch.from_numpy(rows).to(self.data.device), drawn))
        return batches

    def _check_finite(self, state: State, named: NamedPhase, result: PhaseResult) -> None:
        sums = torch.stack(
            [result.match.loss, result.match.alpha_gradient, result.image_grad_SCHH.sum(), result.label_grad_SK.sum()]
        )
        if not bool(sums.isfinite().all()):
            raise NumericalError(
                f"iteration {state.iteration + 1}: the {named.stage} phase left the finite numbers (matching loss "
                f"{float(result.match.loss):.3g}, expert {named.window.expert}, start epoch {named.window.epoch}); the last good "
                "state is kept; try a smaller distill.alpha or distill.lr_images"
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
    def _figures(results: list[tuple[NamedPhase, PhaseResult]]) -> dict[str, float]:
        """Per phase: matching loss, cosine and norm ratio of the student's displacement to the expert's, student's loss."""
        figures: dict[str, float] = {}
        for p, r in results:
            figures[f"loss_{p.stage}"] = float(r.match.loss)
            figures[f"cosine_{p.stage}"] = float(r.match.cosine)
            figures[f"norm_ratio_{p.stage}"] = float(r.match.norm_ratio)
            figures[f"student_loss_{p.stage}"] = float(torch.stack(r.inner_losses).mean())
        return figures

    def _pixel_gradient_norm(self, results: list[tuple[NamedPhase, PhaseResult]]) -> list[float]:
        """The norm of the total pixel gradient of each class, K numbers."""
        total_SCHH = torch.stack([p.weight * r.image_grad_SCHH for p, r in results]).sum(0)
        norms_K = total_SCHH.view(self.classes, -1).norm(dim=1)
        return [float(f"{x:.4g}") for x in norms_K.tolist()]

    # --- where it ends ----------------------------------------------------------------------------------------------

    def publish(self, state: State, folder: Any) -> None:
        """Publish the synthetic set as it is as a distilled set."""
        o, recipe, images = state.optimizers, self.recipe, self.data.splits.train
        labels_S = torch.arange(self.classes).repeat_interleave(recipe.ipc)
        meta = DistilledMeta(
            method=recipe.method,
            dataset=images.name,
            ipc=recipe.ipc,
            class_names=images.class_names,
            counts=images.counts,
            lr=float(o.alpha),
            iteration=state.iteration,
            selection=recipe.distill.select,
            recipe_hash=recipe.recipe_hash(),
            experts_hash=recipe.experts_hash(),
            data_fingerprint=images.fingerprint(),
            recipe=recipe.model_dump(mode="json"),
            versions={"lad_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
            label_source=state.label_source,
        )
        whole = DistilledSet(
            o.images_SCHH.cpu(),
            o.logits_SK.cpu(),
            labels_S,
            meta,
            self.data.whitening.to("cpu"),
            state.initial_SCHH.cpu(),
        )
        with self.run.publish_folder(folder) as temporary:
            whole.write(temporary)


def class_weights(counts: tuple[int, ...], kind: str, offset: float) -> Tensor:
    """w_c = (n_c + f) / (sum n + f), shape (K,); ``mean-one`` scales them to mean 1 (LAD, weight mismatch avoidance)."""
    n_K = torch.tensor(counts, dtype=torch.float64)
    weights_K = (n_K + offset) / (n_K.sum() + offset)
    if kind == "mean-one":
        weights_K = weights_K / weights_K.mean()
    return weights_K.float()
