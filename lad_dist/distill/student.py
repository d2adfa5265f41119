"""The student: N steps of SGD on synthetic batches from an expert's checkpoint, and its gradients by pixels and labels.

Shapes: S synthetic images, B of one batch, C channels, H side, K classes, P parameters, D features.

Three gradient paths give the same numbers. *keep* holds every step's graph until the direction v is known: one forward
and one backward per step, then one backward through that backward. *recompute* holds no graphs: it runs the N steps
once for the sum G, then again with graphs, one step at a time, so its memory does not grow with N. *captured* keeps every
step's weights and computes each step's graph again as one CUDA graph (``models/captured.py``), for GPUs that would wait for
the host between small kernels.

The classifier phase is simpler: the backbone is frozen at the expert's, so all augmented views pass through it once,
the inner steps update only a linear layer, and one backward pass per view reaches the pixels.

With several ranks (``ranks.py``) every rank holds the same student and its own share of the synthetic set. A step's
loss is a sum over images divided by the size of the *whole* batch, so the sum of the ranks' gradients equals the
gradient of a single process, however the batch is distributed; that sum is all they exchange. Each rank then
differentiates v . g of its own images, which with respect to its own pixels and labels has the same gradient as v . g
of all images.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.distill.losses import linear_gradient, soft_cross_entropy
from lad_dist.distill.matching import Match, match
from lad_dist.methods import MatchingLoss
from lad_dist.models import functional
from lad_dist.models.captured import Captured
from lad_dist.models.layout import Layout
from lad_dist.ranks import ALONE, Ranks

GradientPath = Literal["keep", "recompute", "captured"]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one synthetic batch: rows of its share of the set, and their augmentation (None: none).

    ``whole`` is the size of the batch over all ranks; by default that of this part.
    """

    rows_B: Tensor
    draw: augment.Draw | None = None
    whole: int | None = None

    @property
    def size(self) -> int:
        """Number of images in the whole batch."""
        return len(self.rows_B) if self.whole is None else self.whole

    def views(self, synthetic: SyntheticSet, with_graph: bool) -> tuple[Tensor, Tensor]:
        """Return (images (B, C, H, H), their augmented views); optionally with a graph from images to views."""
        images_BCHH = synthetic.images_SCHH[self.rows_B].requires_grad_(with_graph)
        with torch.set_grad_enabled(with_graph):
            views_BCHH = (
                images_BCHH.view_as(images_BCHH) if self.draw is None else augment.apply(images_BCHH, self.draw)
            )
        return images_BCHH, views_BCHH


@dataclass(frozen=True)
class SyntheticSet:
    """The distilled tensors: ``images_SCHH`` (whitened), ``logits_SK`` of soft labels, the student's learning rate."""

    images_SCHH: Tensor
    logits_SK: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Phase:
    """One phase of one iteration: the window (flat vectors, P) and the student's training on it.

    ``class_weights_K`` weights the student's loss (weight mismatch avoidance) or is None; ``span`` is the compared part
    of the parameters; ``classifier_only`` freezes the backbone.
    """

    start_P: Tensor
    target_P: Tensor
    batches: Sequence[Batch]
    span: slice
    class_weights_K: Tensor | None = None
    classifier_only: bool = False


@dataclass(frozen=True)
class RowGradients:
    """Gradients of some rows of the set: ``rows_T`` without repeats, images (T, C, H, H), label logits (T, K).

    ``count``: S, the rows of the whole share; the others have the gradient zero.
    """

    rows_T: Tensor
    images_TCHH: Tensor
    labels_TK: Tensor
    count: int

    @property
    def images_SCHH(self) -> Tensor:
        """The images' gradients, of all rows."""
        return self._spread(self.images_TCHH)

    @property
    def labels_SK(self) -> Tensor:
        """The label logits' gradients, of all rows."""
        return self._spread(self.labels_TK)

    def _spread(self, part_T: Tensor) -> Tensor:
        whole = part_T.new_zeros(self.count, *part_T.shape[1:])
        whole[self.rows_T] = part_T
        return whole


@dataclass
class PhaseResult:
    """The gradients of one phase's matching loss (before lambda) and statistics of its student.

    ``match``, ``gradient_sum_P`` and ``final_P`` are equal on every rank; the gradients are those of this rank's
    images, and ``inner_losses`` the contribution of this rank's images to the loss of each student step.
    """

    match: Match
    by_rows: RowGradients
    gradient_sum_P: Tensor
    final_P: Tensor
    inner_losses: list[Tensor] = field(default_factory=list)

    @property
    def loss(self) -> Tensor:
        """L."""
        return self.match.loss

    @property
    def alpha_gradient(self) -> Tensor:
        """dL/dalpha."""
        return self.match.alpha_gradient


class Student:
    """Unroll phases for one network architecture. The module supplies the computation, never the weights.

    ``loss`` is the matching loss of the phases; see ``methods.Method``.

    All ranks must run the same phases in the same order, each with its own part of the batches.
    """

    def __init__(self, module: nn.Module, ranks: Ranks = ALONE, loss: MatchingLoss | None = None) -> None:
        self.module, self.ranks, self.loss = module, ranks, loss
        self.layout = Layout.of(module)
        self._replica: Replica | None = None
        self.captured = Captured("student steps")

    def run(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        """Return the matching loss of one phase and its gradients.

        Raises:
            NumericalError: the window's two checkpoints are equal.
        """
        steps = self._steps(synthetic, phase, path)
        w, losses = phase.start_P[steps.span], []
        sum_w = torch.zeros_like(w)
        for batch in phase.batches:
            gradient_w, loss = steps.take(batch, w)
            losses.append(loss)
            sum_w, w = sum_w + gradient_w, w - synthetic.alpha * gradient_w
        sum_P, final_P = torch.zeros_like(phase.start_P), phase.start_P.clone()
        sum_P[steps.span], final_P[steps.span] = sum_w, w
        matched = match(phase.start_P, phase.target_P, sum_P, synthetic.alpha, phase.span, self.loss)
        rows_T = torch.cat([batch.rows_B for batch in phase.batches]).unique()
        by_rows = RowGradients(
            rows_T,
            torch.zeros_like(synthetic.images_SCHH[rows_T]),
            torch.zeros_like(synthetic.logits_SK[rows_T]),
            len(synthetic.images_SCHH),
        )
        for batch, back in zip(phase.batches, steps.ways_back(), strict=True):
            if back is not None:
                image_grad, label_grad = back(matched.direction_P[steps.span])
                places_B = torch.searchsorted(rows_T, batch.rows_B)
                by_rows.images_TCHH.index_add_(0, places_B, image_grad)
                by_rows.labels_TK.index_add_(0, places_B, label_grad)
        return PhaseResult(matched, by_rows, sum_P, final_P, losses)

    def _steps(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> _Steps:
        if path == "captured":
            return _CapturedSteps(self, synthetic, phase)
        if phase.classifier_only:
            return _ClassifierSteps(self, synthetic, phase, keep=path == "keep")
        return _Steps(self, synthetic, phase) if path == "keep" else _RecomputedSteps(self, synthetic, phase)

    def step_gradient(
        self,
        theta_P: Tensor,
        images_BCHH: Tensor,
        label_logits_BK: Tensor,
        class_weights_K: Tensor | None,
        create_graph: bool,
        whole: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (g, loss) of one student step: the flat gradient (P,) of the loss at theta, optionally with its graph.

        For the given images, as part of a batch of ``whole`` images.
        """
        logits_BK = functional.logits(self.module, self.layout.views(theta_P), images_BCHH)
        loss = soft_cross_entropy(logits_BK, label_logits_BK, class_weights_K, whole)
        (gradient_P,) = torch.autograd.grad(loss, theta_P, create_graph=create_graph)
        return gradient_P, loss.detach()

    def classifier_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the classifier's parameters, in the layout's order."""
        return [self.layout.shapes[self.layout.names.index(n)] for n in self.layout.classifier]

    def step_function(self, phase: Phase, whole: int, back: bool) -> StepFunction:
        """Return a step of ``phase`` on a batch of ``whole`` images, or its backward, as a function of tensors."""
        rounded = any(getattr(m, "rounded", False) for m in self.module.modules())
        return StepFunction(self, phase.classifier_only, phase.class_weights_K is not None, whole, back, rounded)

    def replicated_gradient(
        self, theta_P: Tensor, synthetic: SyntheticSet, phase: Phase, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Return (g of the whole batch, this rank's loss) of a step without graph, through DistributedDataParallel."""
        if self._replica is None:
            self._replica = Replica(self.module, theta_P, self.ranks)
        _, views_BCHH = batch.views(synthetic, with_graph=False)
        labels_BK = synthetic.logits_SK[batch.rows_B]
        return self._replica.gradient(theta_P, views_BCHH, labels_BK, phase.class_weights_K, batch.size)


Back = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Backward through one step, callable once: from v to the gradients of v . g by the batch's images and label logits."""


class _Steps:
    """Forward steps and backward passes of one phase; this class keeps every step's graph (*keep*).

    ``span``: the trained weights w.
    """

    def __init__(self, student: Student, synthetic: SyntheticSet, phase: Phase) -> None:
        self.student, self.synthetic, self.phase = student, synthetic, phase
        self.span = student.layout.span("classifier") if phase.classifier_only else slice(len(phase.start_P))
        self._ways = deque[Back | None]()

    def take(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return (g of the whole batch at ``w``, this rank's loss)."""
        gradient_w, loss, back = self.step(batch, w)
        self._ways.append(back)
        return self.student.ranks.total(gradient_w), loss

    def ways_back(self) -> Iterator[Back | None]:
        """Yield each step's backward in order, releasing it at the next; None if this rank has no images in it."""
        while self._ways:
            yield self._ways.popleft()

    def step(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor, Back | None]:
        """Return (this rank's part of g, its loss, its backward)."""
        if not len(batch.rows_B):
            return torch.zeros_like(w), w.new_zeros(()), None
        return self._graphed_step(batch, w)

    def _graphed_step(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor, Back]:
        images_BCHH, views_BCHH = batch.views(self.synthetic, with_graph=True)
        labels_BK = self.labels(batch).requires_grad_()
        weights_K, w = self.phase.class_weights_K, w.detach().requires_grad_()
        gradient_w, loss = self.student.step_gradient(w, views_BCHH, labels_BK, weights_K, True, batch.size)

        def back(direction_w: Tensor) -> tuple[Tensor, Tensor]:
            image_grad, label_grad = torch.autograd.grad(gradient_w, [images_BCHH, labels_BK], direction_w)
            return image_grad, label_grad

        return gradient_w.detach(), loss, back

    def labels(self, batch: Batch) -> Tensor:
        """Return the label logits (B, K) of a batch."""
        return self.synthetic.logits_SK[batch.rows_B]


class _RecomputedSteps(_Steps):
    """*recompute*: a first pass without graphs, through the reducer with several ranks; backward repeats the steps."""

    def take(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.student.ranks.world > 1:
            return self.student.replicated_gradient(w, self.synthetic, self.phase, batch)
        _, views_BCHH = batch.views(self.synthetic, with_graph=False)
        weights_K, w = self.phase.class_weights_K, w.detach().requires_grad_()
        return self.student.step_gradient(w, views_BCHH, self.labels(batch), weights_K, False, batch.size)

    def ways_back(self) -> Iterator[Back | None]:
        w = self.phase.start_P[self.span]
        for batch in self.phase.batches:
            gradient_w, _, back = self.step(batch, w)
            w = w - self.synthetic.alpha * self.student.ranks.total(gradient_w)
            del gradient_w
            yield back
            del back


class _ClassifierSteps(_Steps):
    """Steps of the classifier alone: they update a linear layer on features of the frozen backbone.

    Without ``keep`` the backward computes the features again.
    """

    def __init__(self, student: Student, synthetic: SyntheticSet, phase: Phase, keep: bool) -> None:
        super().__init__(student, synthetic, phase)
        self._keep, self._shapes = keep, student.classifier_shapes()

    def _graphed_step(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor, Back]:
        images_BCHH, features_BD = self._features(batch, self._keep)
        gradient_w, loss = self._gradient(batch, w, features_BD.detach(), self.labels(batch))
        kept = (images_BCHH, features_BD) if self._keep else None

        def back(direction_w: Tensor) -> tuple[Tensor, Tensor]:
            images_BCHH, features_BD = kept or self._features(batch, with_graph=True)
            leaf_BD, labels_BK = features_BD.detach().requires_grad_(), self.labels(batch).requires_grad_()
            gradient_w, _ = self._gradient(batch, w, leaf_BD, labels_BK)
            feature_grad, label_grad = torch.autograd.grad(gradient_w, [leaf_BD, labels_BK], direction_w)
            (image_grad,) = torch.autograd.grad(features_BD, images_BCHH, feature_grad)
            return image_grad, label_grad

        return gradient_w, loss, back

    def _features(self, batch: Batch, with_graph: bool) -> tuple[Tensor, Tensor]:
        """Return (images (B, C, H, H), features (B, D) of their views under the frozen backbone)."""
        images_BCHH, views_BCHH = batch.views(self.synthetic, with_graph)
        backbone = self.student.layout.views(self.phase.start_P.detach())
        with torch.set_grad_enabled(with_graph):
            return images_BCHH, functional.features(self.student.module, backbone, views_BCHH)

    def _gradient(self, batch: Batch, w: Tensor, features_BD: Tensor, labels_BK: Tensor) -> tuple[Tensor, Tensor]:
        return linear_gradient(w, features_BD, labels_BK, self.phase.class_weights_K, self._shapes, batch.size)


class _CapturedSteps(_Steps):
    """*captured*: steps and their backwards are functions of tensors, with no autograd graph between them."""

    def _graphed_step(self, batch: Batch, w: Tensor) -> tuple[Tensor, Tensor, Back]:
        captured, function = self.student.captured, self.student.step_function
        weights_P = self.phase.start_P if self.phase.classifier_only else None
        others = [t for t in (self.phase.class_weights_K, weights_P) if t is not None]
        _, views_BCHH = batch.views(self.synthetic, with_graph=False)
        forth = function(self.phase, batch.size, back=False)
        gradient_w, loss = captured(forth, w, views_BCHH, self.labels(batch), *others)

        def back(direction_w: Tensor) -> tuple[Tensor, Tensor]:
            images_BCHH, views_BCHH = batch.views(self.synthetic, with_graph=True)
            tensors = (w, views_BCHH.detach(), self.labels(batch), direction_w, *others)
            view_grad, label_grad = captured(function(self.phase, batch.size, back=True), *tensors)
            (image_grad,) = torch.autograd.grad(views_BCHH, images_BCHH, view_grad)
            return image_grad, label_grad

        return gradient_w, loss, back


@dataclass(frozen=True)
class StepFunction:
    """One student step as a function of tensors only; equal instances compute the same.

    Arguments: w (all weights, or the classifier's), the views (B, C, H, H), the label logits (B, K); for the backward
    the direction v (shaped like w); the class weights, if any; all weights (P,), if only the classifier is trained.
    Returns (g, loss), or for the backward the gradients of v . g by the views and the label logits.
    """

    student: Student = field(repr=False)
    classifier_only: bool
    weighted: bool
    whole: int
    back: bool
    rounded: bool

    def __call__(self, w: Tensor, views_BCHH: Tensor, labels_BK: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        others = list(rest)
        direction = others.pop(0) if self.back else None
        class_weights_K = others.pop(0) if self.weighted else None
        with torch.enable_grad():
            views_BCHH, labels_BK = (t.detach().requires_grad_(self.back) for t in (views_BCHH, labels_BK))
            if self.classifier_only:
                layout, shapes = self.student.layout, self.student.classifier_shapes()
                features_BD = functional.features(self.student.module, layout.views(others[0].detach()), views_BCHH)
                gradient, loss = linear_gradient(
                    w.detach(), features_BD, labels_BK, class_weights_K, shapes, self.whole
                )
            else:
                gradient, loss = self.student.step_gradient(
                    w.detach().requires_grad_(), views_BCHH, labels_BK, class_weights_K, self.back, self.whole
                )
            if direction is None:
                return gradient.detach(), loss
            return torch.autograd.grad(gradient, [views_BCHH, labels_BK], grad_outputs=direction)


class Replica:
    """A copy of the student's module under DistributedDataParallel, whose reducer sums gradients during backward.

    Usable only for steps that need no graph of their gradient.
    """

    def __init__(self, module: nn.Module, theta_P: Tensor, ranks: Ranks) -> None:
        network = copy.deepcopy(module).to(theta_P.device, theta_P.dtype).requires_grad_()
        self._parameters = [network.get_parameter(name) for name in Layout.of(network).names]
        self._world = ranks.world
        self._network = ranks.replicate(network)

    def gradient(
        self,
        theta_P: Tensor,
        images_BCHH: Tensor,
        label_logits_BK: Tensor,
        class_weights_K: Tensor | None,
        whole: int,
    ) -> tuple[Tensor, Tensor]:
        """Return (g (P,) of the whole batch at ``theta_P``, loss of the given images).

        Every rank must call it, even without images.
        """
        with torch.no_grad():
            pieces = theta_P.split([p.numel() for p in self._parameters])
            for parameter, piece in zip(self._parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))
        self._network.zero_grad()
        if len(images_BCHH):
            logits_BK = self._network(images_BCHH)
            loss = soft_cross_entropy(logits_BK, label_logits_BK, class_weights_K, whole)
        else:  # the reducer waits for every rank: contribute a blank image with weight 0
            loss = 0 * self._network(images_BCHH.new_zeros(1, *images_BCHH.shape[1:])).sum()
        (loss * self._world).backward()  # the reducer averages over the ranks; the sum is needed
        gradients = [p.grad for p in self._parameters]
        return torch.cat([g.reshape(-1) for g in gradients if g is not None]), loss.detach()
