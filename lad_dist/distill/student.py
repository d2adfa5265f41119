"""The student: N steps of SGD on synthetic batches from an expert's checkpoint, and the way back to pixels and labels.

Shapes: S synthetic images, B of one batch, C channels, H side, K classes, P parameters, D features.

Two ways back give the same numbers. *keep* holds every step's graph until the direction v is known: one forward and one
backward per step, then one backward through that backward. *recompute* holds nothing: it walks the N steps once for the
sum G, then again with graphs, one step at a time, so its memory does not grow with N.

The classifier phase needs neither: the backbone is frozen at the expert's, so all augmented views go through it once, the
inner steps touch a linear layer only, and one backward pass per view returns to the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist.data import augment
from lad_dist.distill.matching import Match, match
from lad_dist.models import functional
from lad_dist.models.layout import Layout

GradientPath = Literal["keep", "recompute"]


@dataclass(frozen=True)
class Batch:
    """One synthetic batch: which rows of the set, and how they are augmented (None: not at all)."""

    rows_B: Tensor
    draw: augment.Draw | None = None


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
    """The gradients of one phase's matching loss (before lambda) and what is worth knowing about its student."""

    match: Match
    image_grad_SCHH: Tensor
    label_grad_SK: Tensor
    gradient_sum_P: Tensor
    final_P: Tensor
    inner_losses: list[Tensor] = field(default_factory=list)


def soft_cross_entropy(logits_BK: Tensor, label_logits_BK: Tensor, class_weights_K: Tensor | None) -> Tensor:
    """l = -(1/B) sum_b sum_c w_c p_bc log q_bc, p = softmax(label logits), q = softmax(student's logits); LAD, section 4.1.

    ``class_weights_K`` None means 1 for every class.
    """
    p_BK = F.softmax(label_logits_BK, dim=1)
    if class_weights_K is not None:
        p_BK = p_BK * class_weights_K
    return -(p_BK * F.log_softmax(logits_BK, dim=1)).sum() / len(logits_BK)


class Student:
    """Unrolls phases for one network architecture. Its module supplies the computation, never the weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout = Layout.of(module)
        self._backbone = self.layout.span("backbone")
        self._classifier = self.layout.span("classifier")

    def run(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        """The matching loss of one phase and its gradients.

        Raises:
            NumericalError: the window's two checkpoints are equal.
        """
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
    ) -> tuple[Tensor, Tensor]:
        """(g, loss) of one student step: the flat gradient (P,) of the loss at theta, with its own graph on demand."""
        logits_BK = functional.logits(self.module, self.layout.views(theta_P), images_BCHH)
        loss = soft_cross_entropy(logits_BK, label_logits_BK, class_weights_K)
        (gradient_P,) = torch.autograd.grad(loss, theta_P, create_graph=create_graph)
        return gradient_P, loss.detach()

    def _full_phase(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        kept: list[_KeptStep] = []
        theta_P, sum_P, losses = phase.start_P, torch.zeros_like(phase.start_P), []
        for batch in phase.batches:
            step = self._step(synthetic, phase, batch, theta_P, create_graph=path == "keep")
            losses.append(step.loss)
            gradient_P = step.gradient_P.detach()
            sum_P, theta_P = sum_P + gradient_P, theta_P - synthetic.alpha * gradient_P
            if path == "keep":
                kept.append(step)
        matched = match(phase.start_P, phase.target_P, sum_P, synthetic.alpha, phase.span)
        result = _empty_result(matched, synthetic, sum_P, theta_P, losses)
        steps = iter(kept) if path == "keep" else self._again(synthetic, phase)
        for batch, step in zip(phase.batches, steps, strict=True):
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
            theta_P = theta_P - synthetic.alpha * step.gradient_P.detach()
            yield step

    def _step(
        self, synthetic: SyntheticSet, phase: Phase, batch: Batch, theta_P: Tensor, create_graph: bool
    ) -> _KeptStep:
        images_BCHH = synthetic.images_SCHH[batch.rows_B].requires_grad_(create_graph)
        labels_BK = synthetic.logits_SK[batch.rows_B].requires_grad_(create_graph)
        theta_P = theta_P.detach().requires_grad_()
        views_BCHH = images_BCHH if batch.draw is None else augment.apply(images_BCHH, batch.draw)
        gradient_P, loss = self.step_gradient(theta_P, views_BCHH, labels_BK, phase.class_weights_K, create_graph)
        return _KeptStep(images_BCHH, labels_BK, gradient_P, loss)

    # --- only the classifier trains ---------------------------------------------------------------------------------

    def _classifier_phase(self, synthetic: SyntheticSet, phase: Phase, path: GradientPath) -> PhaseResult:
        weight_shape, bias_shape = (self.layout.shapes[self.layout.names.index(n)] for n in self.layout.classifier)
        classifier_P, kept = phase.start_P[self._classifier], []
        sum_P, losses = torch.zeros_like(classifier_P), []
        for batch in phase.batches:
            view = self._view(synthetic, phase, batch, with_graph=path == "keep")
            gradient_P, loss = _linear_gradient(
                classifier_P,
                view.features_BD.detach(),
                synthetic.logits_SK[batch.rows_B],
                phase.class_weights_K,
                weight_shape,
                bias_shape,
            )
            losses.append(loss)
            sum_P, classifier_P = sum_P + gradient_P, classifier_P - synthetic.alpha * gradient_P
            if path == "keep":
                kept.append(view)
        whole_sum_P, final_P = torch.zeros_like(phase.start_P), phase.start_P.clone()
        whole_sum_P[self._classifier], final_P[self._classifier] = sum_P, classifier_P
        matched = match(phase.start_P, phase.target_P, whole_sum_P, synthetic.alpha, phase.span)
        result = _empty_result(matched, synthetic, whole_sum_P, final_P, losses)
        direction_P, classifier_P = matched.direction_P[self._classifier], phase.start_P[self._classifier]
        views = (
            iter(kept) if path == "keep" else (self._view(synthetic, phase, b, with_graph=True) for b in phase.batches)
        )
        for batch, view in zip(phase.batches, views, strict=True):
            features_BD = view.features_BD.detach().requires_grad_()
            labels_BK = synthetic.logits_SK[batch.rows_B].requires_grad_()
            gradient_P, _ = _linear_gradient(
                classifier_P, features_BD, labels_BK, phase.class_weights_K, weight_shape, bias_shape
            )
            feature_grad, label_grad = torch.autograd.grad(
                gradient_P, [features_BD, labels_BK], grad_outputs=direction_P
            )
            (image_grad,) = torch.autograd.grad(view.features_BD, view.images_BCHH, grad_outputs=feature_grad)
            view.release()
            classifier_P = classifier_P - synthetic.alpha * gradient_P.detach()
            result.image_grad_SCHH.index_add_(0, batch.rows_B, image_grad)
            result.label_grad_SK.index_add_(0, batch.rows_B, label_grad)
        return result

    def _view(self, synthetic: SyntheticSet, phase: Phase, batch: Batch, with_graph: bool) -> _View:
        """The features of one batch's augmented views under the frozen backbone."""
        with torch.set_grad_enabled(with_graph):
            images_BCHH = synthetic.images_SCHH[batch.rows_B].requires_grad_(with_graph)
            views_BCHH = images_BCHH if batch.draw is None else augment.apply(images_BCHH, batch.draw)
            features_BD = functional.features(self.module, self.layout.views(phase.start_P.detach()), views_BCHH)
        return _View(images_BCHH, features_BD)


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


def _linear_gradient(
    classifier_P: Tensor,
    features_BD: Tensor,
    label_logits_BK: Tensor,
    class_weights_K: Tensor | None,
    weight_shape: tuple[int, ...],
    bias_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """(g, loss): the classifier's gradient in closed form, so that differentiating it again costs one small graph.

    With r_bc = w_c p_bc, dl/dlogits_b = (sum_c r_bc) q_b - r_b, over B; the linear layer then gives dW = dlogits^T F.
    """
    count = weight_shape[0] * weight_shape[1]
    weight_KD, bias_K = classifier_P[:count].view(weight_shape), classifier_P[count:].view(bias_shape)
    r_BK = F.softmax(label_logits_BK, dim=1)
    if class_weights_K is not None:
        r_BK = r_BK * class_weights_K
    logq_BK = F.log_softmax(F.linear(features_BD, weight_KD, bias_K), dim=1)
    dlogits_BK = (r_BK.sum(dim=1, keepdim=True) * logq_BK.exp() - r_BK) / len(features_BD)
    gradient_P = torch.cat([(dlogits_BK.T @ features_BD).reshape(-1), dlogits_BK.sum(dim=0)])
    return gradient_P, -(r_BK * logq_BK).sum().detach() / len(features_BD)


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
