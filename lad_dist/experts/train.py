"""Train one expert, both stages: a function of (recipe, expert id) that writes checkpoints to the buffer, without Ray.

Any process that trains expert 7 writes the same rows: its initialisation, image order and augmentation are
counter-based (``seeds.py``), and SGD has no state but the weights: momentum starts anew with each epoch. So an expert
continues from its last published checkpoint, bit for bit on a CPU with the same number of threads, and training it
twice does no harm.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist import __version__
from lad_dist.data import augment
from lad_dist.data.longtail import log_priors
from lad_dist.data.mixing import Mixed, draw_mix, mix
from lad_dist.data.prepare import PreparedData
from lad_dist.errors import NumericalError, TrajectoryError
from lad_dist.experts.gsam import LossOf, gsam_gradient, sgd_step
from lad_dist.experts.sampling import class_aware_order, shuffled_order
from lad_dist.models import functional
from lad_dist.models.captured import Captured
from lad_dist.models.convnet import flat_parameters
from lad_dist.models.convolution import set_precision
from lad_dist.models.layout import Layout
from lad_dist.models.network import build
from lad_dist.recipe import Recipe
from lad_dist.seeds import rng
from lad_dist.trajectories import kept
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import BufferMeta, Stage
from lad_dist.trajectories.writer import PartWriter


@dataclass(frozen=True)
class Epoch:
    """Results of one epoch of an expert: mean training loss, training accuracy (fraction), images per second."""

    expert: int
    stage: Stage
    epoch: int
    loss: float
    accuracy: float
    images_per_second: float


def network_loss(
    module: nn.Module,
    layout: Layout,
    images_BCHH: Tensor,
    labels_B: Tensor,
    shift_K: Tensor | None = None,
    others_B: Tensor | None = None,
    shares_2: Tensor | None = None,
) -> LossOf:
    """Return the cross-entropy of the whole network on one batch, as a function of all weights (P,).

    ``shift_K``: added to the logits in the loss, as the logit-adjusted loss does. ``others_B``, ``shares_2``: the images
    are mixed with others (``mixing.mix``) of these labels, and the two labels have these shares of the loss.
    """

    def loss_of(weights_P: Tensor) -> tuple[Tensor, Tensor]:
        logits_BK = functional.logits(module, layout.views(weights_P), images_BCHH)
        shifted_BK = logits_BK if shift_K is None else logits_BK + shift_K
        loss = F.cross_entropy(shifted_BK, labels_B)
        if others_B is not None and shares_2 is not None:
            loss = shares_2[0] * loss + shares_2[1] * F.cross_entropy(shifted_BK, others_B)
        return loss, logits_BK

    return loss_of


def classifier_loss(
    module: nn.Module, layout: Layout, weights_P: Tensor, images_BCHH: Tensor, labels_B: Tensor
) -> LossOf:
    """Return the cross-entropy on one batch as a function of the classifier's weights only.

    The backbone is frozen at ``weights_P``: its features are computed once, without a graph, and shared by GSAM's
    passes.
    """
    views = layout.views(weights_P)
    with torch.no_grad():
        features_BD = functional.features(module, views, images_BCHH)
    names = layout.classifier
    shapes = [views[n].shape for n in names]
    sizes = [s.numel() for s in shapes]

    def loss_of(classifier_P: Tensor) -> tuple[Tensor, Tensor]:
        weight_KD, bias_K = (p.view(s) for p, s in zip(classifier_P.split(sizes), shapes, strict=True))
        logits_BK = F.linear(features_BD, weight_KD, bias_K)
        return F.cross_entropy(logits_BK, labels_B), logits_BK

    return loss_of


class ExpertTrainer:
    """Train experts of one recipe into one buffer.

    Args:
        recipe: determines every row.
        data: the recipe's data on the training device.
        folder: the buffer: a local folder, or a URI (``trajectories.files.resolve``).
    """

    def __init__(self, recipe: Recipe, data: PreparedData, folder: Path | str) -> None:
        self.recipe, self.data, self.folder = recipe, data, folder
        self.module = build(recipe.model, *data.splits.train.shape, seed=0, purpose=("template",)).to(data.device)
        set_precision(self.module, recipe.experts.precision)
        self.layout = Layout.of(self.module)
        self.meta = buffer_meta(recipe, data, self.layout)
        self._labels_N = data.splits.train.labels_N.numpy()
        tau = recipe.experts.logit_adjustment
        self._shift_K = torch.from_numpy(tau * log_priors(data.counts)).float().to(data.device) if tau else None
        self._captured = Captured("experts' steps")

    def declare_kept(self) -> None:
        """Begin a new buffer with ``buffer.keep``: windows. One that has parts or says what it keeps stays as it is."""
        if self.recipe.buffer.keep == "windows":
            buffer = self._buffer()
            if buffer.kept.all and not buffer.parts:
                kept.write(buffer.filesystem, buffer.root, kept.needed(self.recipe))

    def left(self, experts: Iterable[int]) -> dict[int, int]:
        """Return per expert the number of epochs still to be trained, both stages together."""
        buffer, wanted, left = self._buffer(), self.recipe.experts.last_epochs, {}
        for i in experts:
            done = [(buffer.last_contiguous_epoch(stage, i), last) for stage, last in wanted.items()]
            left[i] = sum(last if at is None else last - min(at, last) for at, last in done)
        return left

    def _buffer(self) -> Buffer:
        """Open the buffer. Raises TrajectoryError if it belongs to another recipe, or if the images have changed."""
        buffer = Buffer(self.folder, expected_hash=self.meta.experts_hash)
        buffer.check_keeps(kept.needed(self.recipe))
        changed = self.meta.differences(buffer.meta) if buffer.parts else []
        if changed:
            raise TrajectoryError(
                f"{buffer.folder}: these trajectories are from other training images or another network "
                f"({', '.join(changed)} differ); use another run or buffer folder, or delete this one to retrain the experts"
            )
        return buffer

    def train(self, expert: int) -> Generator[Epoch, None, None]:
        """Train both stages of one expert from its last published checkpoint on; yield each epoch once trained.

        Training advances only as the epochs are consumed. Closing the generator publishes the epochs trained so far: a
        caller that may stop early uses ``with closing(trainer.train(expert)) as epochs``.

        Raises:
            NumericalError: the loss or the weights are no longer finite.
            StorageError: a part cannot be written; earlier parts are kept.
            TrajectoryError: the buffer belongs to another recipe or is damaged where it must be read.
        """
        weights_P = yield from self._train_stage("representation", expert, None)
        yield from self._train_stage("classifier", expert, weights_P)

    def _train_stage(self, stage: Stage, expert: int, start_P: Tensor | None) -> Generator[Epoch, None, Tensor]:
        e = self.recipe.experts
        if stage not in e.last_epochs:
            assert start_P is not None
            return start_P
        last = e.last_epochs[stage]
        buffer = self._buffer()
        done = buffer.last_contiguous_epoch(stage, expert)
        weights_P = self._initial(expert) if start_P is None else start_P.clone()
        trained = self.layout.span("all" if stage == "representation" else "classifier")
        if done is not None:
            weights_P[trained] = torch.from_numpy(buffer.read(stage, expert, min(done, last))).to(self.data.device)
        if done is not None and done >= last:
            return weights_P
        with PartWriter(self.folder, self.meta, stage, expert, e.epochs_per_part) as writer:
            if done is None:
                writer.append(0, weights_P[trained].cpu().numpy())
            for epoch in range(1 if done is None else done + 1, last + 1):
                began = time.perf_counter()
                loss, accuracy, images = self._epoch(stage, expert, epoch, weights_P)
                seconds = time.perf_counter() - began
                if not (np.isfinite(loss) and bool(weights_P.isfinite().all())):
                    raise NumericalError(
                        f"expert {expert}, {stage} stage, epoch {epoch}: the loss is {loss}; the checkpoints before it are "
                        "kept; try a smaller experts.lr"
                    )
                writer.append(epoch, weights_P[trained].cpu().numpy(), loss, accuracy, seconds)
                yield Epoch(expert, stage, epoch, loss, accuracy, images / seconds)
        return weights_P

    def _initial(self, expert: int) -> Tensor:
        seed, shape = self.recipe.experts.seed, self.data.splits.train.shape
        network = build(self.recipe.model, *shape, seed=seed, purpose=("expert", expert))
        return flat_parameters(network).to(self.data.device)

    def _epoch(self, stage: Stage, expert: int, epoch: int, weights_P: Tensor) -> tuple[float, float, int]:
        """Train one epoch, in place on ``weights_P``, and return (mean loss, accuracy, images seen).

        Synchronises only at its end.
        """
        e, counters = self.recipe.experts, ("expert", expert, stage, epoch)
        representation = stage == "representation"
        order_rng = rng(e.seed, *counters, "order")
        order = (
            shuffled_order(order_rng, len(self._labels_N))
            if representation
            else class_aware_order(order_rng, self._labels_N, e.draws_per_class)
        )
        decay = e.weight_decay if representation else e.classifier_weight_decay
        steps = -(-len(order) // e.batch)
        mixing = rng(e.seed, *counters, "mix") if representation and e.cutmix + e.mixup else None
        velocity_P = None
        trained = self.layout.span("all" if representation else "classifier")
        loss_sum = torch.zeros((), device=self.data.device)
        correct = torch.zeros((), device=self.data.device)
        for step, begin in enumerate(range(0, len(order), e.batch)):
            rows_B = torch.from_numpy(order[begin : begin + e.batch])
            images_BCHH, labels_B = self.data.train.batch(rows_B)
            drawn = augment.draw(
                rng(e.seed, *counters, "augment", step), self.recipe.augment, len(rows_B), images_BCHH.shape[2]
            )
            views_BCHH, mixed = augment.apply(images_BCHH, drawn), None
            if mixing is not None:
                mixed = draw_mix(mixing, e.cutmix, e.mixup, len(rows_B), views_BCHH.shape[2])
                views_BCHH = views_BCHH if mixed is None else mix(views_BCHH, mixed)
            of = self._network_gradient if representation else self._classifier_gradient
            gradient_P, loss, logits_BK = self._captured(
                of, weights_P, views_BCHH, labels_B, *_mixed_labels(mixed, labels_B)
            )
            lr = self.rate(epoch, step, steps) if representation else e.classifier_lr
            weights_P[trained], velocity_P = sgd_step(
                weights_P[trained], gradient_P, velocity_P, lr, decay, e.momentum if representation else 0.0
            )
            loss_sum += loss * len(rows_B)
            correct += (logits_BK.argmax(dim=1) == labels_B).sum()
        return float(loss_sum) / len(order), float(correct) / len(order), len(order)

    def _network_gradient(
        self, weights_P: Tensor, views_BCHH: Tensor, labels_B: Tensor, *mixed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (gradient (P,), loss, logits (B, K)) of a step of the representation stage."""
        e = self.recipe.experts
        loss_of = network_loss(self.module, self.layout, views_BCHH, labels_B, self._shift_K, *mixed)
        step = gsam_gradient(loss_of, weights_P, e.gsam_rho, e.gsam_alpha)
        return step.gradient_P, step.loss, step.logits_BK

    def _classifier_gradient(
        self, weights_P: Tensor, views_BCHH: Tensor, labels_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``_network_gradient`` of the classifier stage, by the classifier's weights."""
        e = self.recipe.experts
        loss_of = classifier_loss(self.module, self.layout, weights_P, views_BCHH, labels_B)
        step = gsam_gradient(loss_of, weights_P[self.layout.span("classifier")], e.gsam_rho, e.gsam_alpha)
        return step.gradient_P, step.loss, step.logits_BK

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """Return the representation stage's learning rate at a step (from 0) of an epoch (from 1) of ``steps`` steps."""
        e = self.recipe.experts
        passed = epoch - 1 + step / steps
        rate = e.lr if e.schedule == "constant" else e.lr * (1 + math.cos(math.pi * passed / e.epochs)) / 2
        return rate * min(1.0, (passed + 1 / steps) / e.warmup_epochs) if e.warmup_epochs else rate


def _mixed_labels(mixed: Mixed | None, labels_B: Tensor) -> tuple[Tensor, ...]:
    """Return the labels that a batch is mixed with, and the shares of its own and of those; nothing if not mixed."""
    if mixed is None:
        return ()
    shares_2 = torch.tensor([mixed.share, 1 - mixed.share], device=labels_B.device)
    return labels_B[mixed.others_B.to(labels_B.device)], shares_2


def buffer_meta(recipe: Recipe, data: PreparedData, layout: Layout) -> BufferMeta:
    """Return the metadata stored in every part of the recipe's buffer."""
    return BufferMeta(
        experts_hash=recipe.experts_hash(),
        data_fingerprint=data.splits.train.fingerprint(),
        class_counts=data.counts,
        parameters=tuple(zip(layout.names, layout.shapes, strict=True)),
        classifier_parameters=layout.classifier,
        recipe=recipe.experts_document(),
        versions={
            "lad_dist": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pyarrow": version("pyarrow"),
            "python": platform.python_version(),
        },
    )
