"""The student: N steps of SGD on synthetic batches from an expert's checkpoint, and the way back to pixels and labels.

Shapes: S synthetic images, B of one batch, C channels, H side, K classes, P parameters, D features.

Three ways back give the same numbers. *keep* holds every step's graph until the direction v is known: one forward and one
backward per step, then one backward through that backward. *recompute* holds nothing: it walks the N steps once for the
sum G, then again with graphs, one step at a time, so its memory does not grow with N. *captured* does the same with each
step as one CUDA graph (``captured.py``), for GPUs that would wait for the host between small kernels.

The classifier phase needs neither: the backbone is frozen at the expert's, so all augmented views go through it once, the
inner steps touch a linear layer only, and one backward pass per view returns to the pixels.

Over ranks (``ranks.py``) every rank holds the same student and its own share of the synthetic set. A step's loss is a sum
over images divided by the size of the *whole* batch, so the sum of the ranks' gradients is the gradient of one process,
however the batch falls on them; that sum is the only thing they exchange. Each rank then differentiates v . g of its own
images, which is v . g of all of them as far as its own pixels and labels are concerned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.distill.captured import Captured
from lad_dist.distill.losses import linear_gradient, soft_cross_entropy
from lad_dist.distill.matching import Match, match
from lad_dist.methods import MatchingLoss
from lad_dist.models import functional
from lad_dist.models.layout import Layout
from lad_dist.ranks import ALONE, Ranks

GradientPath = Literal["keep", "recompute", "captured"]


@dataclass(frozen=True)
class Batch:
    """This rank's part of one synthetic batch: rows of its share of the set, and how they are augmented (None: not at all).

    ``whole`` is the size of the batch over all ranks, by default that of this part.
    """

    rows_B: Tensor
    draw: augment.Draw | None = None
    whole: int | None = None

    @property
    def size(self) -> int:
        """Images in the whole batch."""
        return len(self.rows_B) if self.whole is None else self.whole

    def views(self, synthetic: SyntheticSet, with_graph: bool) -> tuple[Tensor, Tensor]:
        """(images (B, C, H, H), their augmented views), the second with a graph to the first on demand."""
        images_BCHH = synthetic.images_SCHH[self.rows_B].requires_grad_(with_graph)
        with torch.set_grad_enabled(with_graph):
            views_BCHH = (
                images_BCHH.view_as(images_BCHH) if self.draw is None else augment.apply(images_BCHH, self.draw)
            )
        return images_BCHH, views_BCHH


@dataclass(frozen=True)
class SyntheticSet:
    """What is distilled: ``images_SCHH`` (whitened), ``logits_SK`` of the soft labels, and the student's learning rate."""

    images_SCHH: Tensor
    logits_SK: Tensor
    alpha: Tensor


@dataclass(frozen=True)
class Phase:
    """One phase of one iteration: the window (flat vectors, P) and how the student trains on it.

    ``class_weights_K`` weights the student's loss (weight mismatch avoidance) or is None; ``span`` is the part of the
    parameters that is compared; ``classifier_only`` freezes the backbone.
    """

    start_P: Tensor
    target_P: Tensor
    batches: Sequence[Batch]
    span: slice
    class_weights_K: Tensor | None = None
    classifier_only: bool = False


@dataclass
class PhaseResult:
    """The gradients of one phase's matching loss (before lambda) and what is worth knowing about its student.

    ``match``, ``gradient_sum_P`` and ``final_P`` are the same on every rank; the gradients are of this rank's images, and
    ``inner_losses`` what this rank's images contribute to the loss of each student step.
    """

    match: Match
    image_grad_SCHH: Tensor
    label_grad_SK: Tensor
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
    """Unrolls phases for one network architecture. Its module supplies the computation, never the weights.

    ``loss`` is what phases match by; see ``methods.Method``.

    All ranks must run the same phases in the same order, each with its own part of the batches.
    """

    def __init__(self, module: nn.Module, ranks: Ranks = ALONE, loss: MatchingLoss | None = None) -> None:
        self.module, self.ranks, self.loss = module, ranks, loss
        self.layout = Layout.of(module)
        self._backbone = self.layout.span("backbone")
        self._classifier = self.layout.span("classifier")
        self._replica: Replica | None = None
        self.captured = Captured()

    def run(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        """The matching loss of one phase and its gradients.

        Raises:
            NumericalError: the window's two checkpoints are equal.
        """
        if path == "captured":
            return self._captured_phase(synthetic, phase)
        if phase.classifier_only:
            return self._classifier_phase(synthetic, phase, path)
        return self._full_phase(synthetic, phase, path)

    # --- all weights train ------------------------------------------------------------------------------------------

    def step_gradient(
        self,
        theta_P: Tensor,
        images_BCHH: Tensor,
        label_logits_BK: Tensor,
        class_weights_K: Tensor | None,
        create_graph: bool,
        whole: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(g, loss) of one student step: the flat gradient (P,) of the loss at theta, with its own graph on demand.

        Of the images given, as part of a batch of ``whole`` images.
        """
        logits_BK = functional.logits(self.module, self.layout.views(theta_P), images_BCHH)
        loss = soft_cross_entropy(logits_BK, label_logits_BK, class_weights_K, whole)
        (gradient_P,) = torch.autograd.grad(loss, theta_P, create_graph=create_graph)
        return gradient_P, loss.detach()

    def _full_phase(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        kept: list[_KeptStep] = []
        theta_P, sum_P, losses = phase.start_P, torch.zeros_like(phase.start_P), []
        for batch in phase.batches:
            if path == "recompute" and self.ranks.world > 1:
                gradient_P, loss = self._replicated_gradient(synthetic, phase, batch, theta_P)
            else:
                step = self._step(synthetic, phase, batch, theta_P, create_graph=path == "keep")
                gradient_P, loss = self.ranks.total(step.gradient_P.detach()), step.loss
                if path == "keep":
                    kept.append(step)
            losses.append(loss)
            sum_P, theta_P = sum_P + gradient_P, theta_P - synthetic.alpha * gradient_P
        matched = match(phase.start_P, phase.target_P, sum_P, synthetic.alpha, phase.span, self.loss)
        result = _empty_result(matched, synthetic, sum_P, theta_P, losses)
        steps = iter(kept) if path == "keep" else self._again(synthetic, phase)
        for batch, step in zip(phase.batches, steps, strict=True):
            if len(batch.rows_B):
                image_grad, label_grad = torch.autograd.grad(
                    step.gradient_P, [step.images_BCHH, step.labels_BK], grad_outputs=matched.direction_P
                )
                result.image_grad_SCHH.index_add_(0, batch.rows_B, image_grad)
                result.label_grad_SK.index_add_(0, batch.rows_B, label_grad)
            step.release()
        return result

    def _again(self, synthetic: SyntheticSet, phase: Phase) -> Iterator[_KeptStep]:
        """The same steps a second time, each with its graph, each released before the next is made."""
        theta_P = phase.start_P
        for batch in phase.batches:
            step = self._step(synthetic, phase, batch, theta_P, create_graph=True)
            theta_P = theta_P - synthetic.alpha * self.ranks.total(step.gradient_P.detach())
            yield step

    def _step(
        self, synthetic: SyntheticSet, phase: Phase, batch: Batch, theta_P: Tensor, create_graph: bool
    ) -> _KeptStep:
        """One step on this rank's part of a batch; of no images, a gradient of zeros without a graph."""
        images_BCHH = synthetic.images_SCHH[batch.rows_B].requires_grad_(create_graph)
        labels_BK = synthetic.logits_SK[batch.rows_B].requires_grad_(create_graph)
        if not len(batch.rows_B):
            return _KeptStep(images_BCHH, labels_BK, torch.zeros_like(theta_P), theta_P.new_zeros(()))
        theta_P = theta_P.detach().requires_grad_()
        views_BCHH = images_BCHH if batch.draw is None else augment.apply(images_BCHH, batch.draw)
        gradient_P, loss = self.step_gradient(
            theta_P, views_BCHH, labels_BK, phase.class_weights_K, create_graph, batch.size
        )
        return _KeptStep(images_BCHH, labels_BK, gradient_P, loss)

    def _replicated_gradient(
        self, synthetic: SyntheticSet, phase: Phase, batch: Batch, theta_P: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same without a graph, through DistributedDataParallel: (gradient of the whole batch, this rank's loss)."""
        if self._replica is None:
            self._replica = Replica(self.module, theta_P, self.ranks)
        images_BCHH, labels_BK = synthetic.images_SCHH[batch.rows_B], synthetic.logits_SK[batch.rows_B]
        if batch.draw is not None:
            images_BCHH = augment.apply(images_BCHH, batch.draw)
        return self._replica.gradient(theta_P, images_BCHH, labels_BK, phase.class_weights_K, batch.size)

    # --- only the classifier trains ---------------------------------------------------------------------------------

    def _classifier_phase(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        shapes = self._classifier_shapes()
        kept: list[_View] = []
        classifiers = [phase.start_P[self._classifier]]  # theta_i of every step: a linear layer each
        sum_P, losses = torch.zeros_like(classifiers[0]), []
        for batch in phase.batches:
            view = self._view(synthetic, phase, batch, with_graph=path == "keep")
            gradient_P, loss = linear_gradient(
                classifiers[-1],
                view.features_BD.detach(),
                synthetic.logits_SK[batch.rows_B],
                phase.class_weights_K,
                shapes,
                batch.size,
            )
            gradient_P = self.ranks.total(gradient_P)
            losses.append(loss)
            sum_P = sum_P + gradient_P
            classifiers.append(classifiers[-1] - synthetic.alpha * gradient_P)
            if path == "keep":
                kept.append(view)
        whole_sum_P, final_P = torch.zeros_like(phase.start_P), phase.start_P.clone()
        whole_sum_P[self._classifier], final_P[self._classifier] = sum_P, classifiers[-1]
        matched = match(phase.start_P, phase.target_P, whole_sum_P, synthetic.alpha, phase.span, self.loss)
        result = _empty_result(matched, synthetic, whole_sum_P, final_P, losses)
        direction_P = matched.direction_P[self._classifier]
        views = (
            iter(kept) if path == "keep" else (self._view(synthetic, phase, b, with_graph=True) for b in phase.batches)
        )
        for batch, view, classifier_P in zip(phase.batches, views, classifiers[:-1], strict=True):
            if len(batch.rows_B):
                features_BD = view.features_BD.detach().requires_grad_()
                labels_BK = synthetic.logits_SK[batch.rows_B].requires_grad_()
                gradient_P, _ = linear_gradient(
                    classifier_P, features_BD, labels_BK, phase.class_weights_K, shapes, batch.size
                )
                feature_grad, label_grad = torch.autograd.grad(
                    gradient_P, [features_BD, labels_BK], grad_outputs=direction_P
                )
                (image_grad,) = torch.autograd.grad(view.features_BD, view.images_BCHH, grad_outputs=feature_grad)
                result.image_grad_SCHH.index_add_(0, batch.rows_B, image_grad)
                result.label_grad_SK.index_add_(0, batch.rows_B, label_grad)
            view.release()
        return result

    def _classifier_shapes(self) -> list[tuple[int, ...]]:
        return [self.layout.shapes[self.layout.names.index(n)] for n in self.layout.classifier]

    # --- either, a step at a time as a function of tensors ----------------------------------------------------------

    def _captured_phase(self, synthetic: SyntheticSet, phase: Phase) -> PhaseResult:
        """The steps without graphs, each with its weights w kept, and then each step's way back."""
        span = self._classifier if phase.classifier_only else slice(len(phase.start_P))
        others = [t for t in (phase.class_weights_K, phase.start_P if phase.classifier_only else None) if t is not None]
        weights, losses = [phase.start_P[span]], []
        sum_w = torch.zeros_like(weights[0])
        for batch in phase.batches:
            gradient_w, loss = torch.zeros_like(sum_w), sum_w.new_zeros(())
            if len(batch.rows_B):
                _, views_BCHH = batch.views(synthetic, with_graph=False)
                tensors = (weights[-1], views_BCHH, synthetic.logits_SK[batch.rows_B], *others)
                gradient_w, loss = self.captured(self._step_of(phase, batch.size, back=False), *tensors)
            gradient_w = self.ranks.total(gradient_w)
            losses.append(loss)
            sum_w = sum_w + gradient_w
            weights.append(weights[-1] - synthetic.alpha * gradient_w)
        sum_P, final_P = torch.zeros_like(phase.start_P), phase.start_P.clone()
        sum_P[span], final_P[span] = sum_w, weights[-1]
        matched = match(phase.start_P, phase.target_P, sum_P, synthetic.alpha, phase.span, self.loss)
        result = _empty_result(matched, synthetic, sum_P, final_P, losses)
        for batch, w in zip(phase.batches, weights[:-1], strict=True):
            if not len(batch.rows_B):
                continue
            images_BCHH, views_BCHH = batch.views(synthetic, with_graph=True)
            tensors = (w, views_BCHH.detach(), synthetic.logits_SK[batch.rows_B], matched.direction_P[span], *others)
            view_grad, label_grad = self.captured(self._step_of(phase, batch.size, back=True), *tensors)
            (image_grad,) = torch.autograd.grad(views_BCHH, images_BCHH, view_grad)
            result.image_grad_SCHH.index_add_(0, batch.rows_B, image_grad)
            result.label_grad_SK.index_add_(0, batch.rows_B, label_grad)
        return result

    def _step_of(self, phase: Phase, whole: int, back: bool) -> StepFunction:
        rounded = any(getattr(m, "rounded", False) for m in self.module.modules())
        return StepFunction(self, phase.classifier_only, phase.class_weights_K is not None, whole, back, rounded)

    def _view(self, synthetic: SyntheticSet, phase: Phase, batch: Batch, with_graph: bool) -> _View:
        """The features of this rank's augmented views of one batch under the frozen backbone."""
        with torch.set_grad_enabled(with_graph):
            images_BCHH = synthetic.images_SCHH[batch.rows_B].requires_grad_(with_graph)
            if not len(batch.rows_B):
                weight_shape = self.layout.shapes[self.layout.names.index(self.layout.classifier[0])]
                return _View(images_BCHH, images_BCHH.new_zeros(0, weight_shape[1]))
            views_BCHH = images_BCHH if batch.draw is None else augment.apply(images_BCHH, batch.draw)
            features_BD = functional.features(self.module, self.layout.views(phase.start_P.detach()), views_BCHH)
        return _View(images_BCHH, features_BD)


@dataclass(frozen=True)
class StepFunction:
    """One student step as a function of tensors alone: equal ones compute the same.

    Of w (all weights, or the classifier's), the views (B, C, H, H), the label logits (B, K), on the way back the direction
    v (as w), then the class weights where there are any, and where only the classifier trains all weights (P,). Gives
    (g, loss), or on the way back the gradients of v . g by the views and the label logits.
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
                layout, shapes = self.student.layout, self.student._classifier_shapes()
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
    """A copy of the student's module under DistributedDataParallel, whose reducer sums gradients while it computes them.

    It serves steps that need no graph of their gradient; the reducer cannot serve the others.
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
        """(g (P,) of the whole batch at ``theta_P``, loss of the images given). Every rank must call it, with images or not."""
        with torch.no_grad():
            pieces = theta_P.split([p.numel() for p in self._parameters])
            for parameter, piece in zip(self._parameters, pieces, strict=True):
                parameter.copy_(piece.view_as(parameter))
        self._network.zero_grad()
        if len(images_BCHH):
            logits_BK = self._network(images_BCHH)
            loss = soft_cross_entropy(logits_BK, label_logits_BK, class_weights_K, whole)
        else:  # the reducer waits for every rank: a picture of nothing takes part without weight
            loss = 0 * self._network(images_BCHH.new_zeros(1, *images_BCHH.shape[1:])).sum()
        (loss * self._world).backward()  # the reducer averages over the ranks; wanted is the sum
        gradients = [p.grad for p in self._parameters]
        return torch.cat([g.reshape(-1) for g in gradients if g is not None]), loss.detach()


@dataclass
class _KeptStep:
    images_BCHH: Tensor
    labels_BK: Tensor
    gradient_P: Tensor
    loss: Tensor

    def release(self) -> None:
        """Let go of the step's graph, so that memory falls as the way back proceeds."""
        del self.gradient_P


@dataclass
class _View:
    images_BCHH: Tensor
    features_BD: Tensor

    def release(self) -> None:
        del self.features_BD


def _empty_result(
    matched: Match, synthetic: SyntheticSet, sum_P: Tensor, final_P: Tensor, losses: list[Tensor]
) -> PhaseResult:
    return PhaseResult(
        match=matched,
        image_grad_SCHH=torch.zeros_like(synthetic.images_SCHH),
        label_grad_SK=torch.zeros_like(synthetic.logits_SK),
        gradient_sum_P=sum_P,
        final_P=final_P,
        inner_losses=losses,
    )
