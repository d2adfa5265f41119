"""Bytes: of a phase on one rank, of an expert's process, of the whitening, and of the buffer on disk.

Counted, per image: if a block's convolution outputs A values, the graph of a step that is differentiated again keeps
A (the convolution), A (its gradient), and a quarter of A twice (after pooling, and that gradient): 2.5 times all
activations. A graph for one backward pass keeps A and a quarter: 1.25. Added to these are the image itself, its
augmented view and one intermediate result of that. Kept graphs also hold theta and g, P values each, of every step.

Measured, on a CPU (tests/plan/test_memory.py measures it again): temporaries of the backward pass, as multiples of the
largest convolution's values. On a GPU they are counted instead, since ``models/block.py`` works there on the whole
batch at once: a, z, y, g, h, the masked h and two results, and as much as one for cuDNN's workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lad_dist.data.prepared import DEFAULT_BUDGET_BYTES
from lad_dist.plan.dataset_info import DatasetInfo
from lad_dist.plan.scaling import largest_share, mean_batch, spread
from lad_dist.plan.shapes import Shapes
from lad_dist.ranks import groups_of
from lad_dist.recipe import Recipe

PATHS = ("keep", "recompute")
_PASSING = {
    ("cpu", "representation"): 4.2,
    ("cpu", "classifier"): 2.2,
    ("cuda", "representation"): 9.0,
    ("cuda", "classifier"): 6.0,
}
_TRAINING = {"cpu": 2.0, "cuda": 5.0}  # temporaries of one backward pass, beside the graph
_IMAGES_PER_STEP = 3  # an image, its view, and one intermediate result of the augmentation
_VECTORS = 10  # of P values: the window, theta, the sum, the direction, and temporaries
_REPLICA_VECTORS = 3  # DistributedDataParallel: weights, gradients, bucket
_SMALL = 4 * 2**20  # not explained by shapes: compiled kernels, the allocator's own
_FLOAT64_UP_TO = 4096  # values per image up to which data/whitening.py computes in float64
PROCESS = {
    "cpu": 420 * 10**6,
    "cuda": 600 * 10**6,
}  # a process with torch and numba loaded (measured); a CUDA context (assumed)
RAY_BYTES = 600 * 10**6  # of Ray's own processes on a host, without the dashboard (measured)
COMPRESSION = 0.85  # of the trajectory buffer, BYTE_STREAM_SPLIT and zstd: benchmarks/results/buffer_encoding.md


@dataclass(frozen=True)
class Batches:
    """One rank's share of the student's batches: S images in all, ``batch`` per step, divided over ``world`` ranks."""

    total: int
    batch: int
    world: int = 1

    @classmethod
    def of(cls, recipe: Recipe, shapes: Shapes, world: int, batch: int | None = None) -> Batches:
        """Return the share of a rank of ``world``, of which each group of ranks divides the set."""
        d = recipe.distill
        within = world // groups_of(d.windows, world)
        return cls(shapes.classes * recipe.ipc, d.batch if batch is None else batch, within)

    @property
    def rows(self) -> int:
        """Images of the set on the rank with the most."""
        return math.ceil(self.total / self.world)

    def largest(self, steps: int) -> float:
        """Return the images of the largest share of one batch among all ranks and ``steps``."""
        return largest_share(self.total, self.batch, self.world, steps)

    def all_steps(self, steps: int) -> float:
        """Return the images of ``steps`` batches together on the rank with the most."""
        if self.total <= self.batch:
            return float(steps * self.rows)
        extra = largest_share(self.total, self.batch, self.world) - mean_batch(self.total, self.batch) / self.world
        assert extra >= 0 or spread(self.total, self.batch, self.world) == 0
        return steps * mean_batch(self.total, self.batch) / self.world + max(extra, 0.0) * math.sqrt(steps)


def graph_bytes(shapes: Shapes, phase: str, images: float) -> float:
    """Return the bytes of the graphs of student steps on ``images`` images in all, without vectors of P."""
    return 4 * images * (shapes.graph(phase) + _IMAGES_PER_STEP * shapes.image)


def phase_bytes(shapes: Shapes, batches: Batches, phase: str, path: str, steps: int, device: str) -> int:
    """Return one phase's peak bytes on a rank, beside the synthetic set's own tensors."""
    largest = batches.largest(steps)
    kept = batches.all_steps(steps) if path == "keep" else largest
    per_step = 2 * shapes.parameters if phase == "representation" else shapes.classifier
    vectors = _VECTORS * shapes.parameters + (steps if path == "keep" or phase == "classifier" else 1) * per_step
    if batches.world > 1 and path == "recompute" and phase == "representation":
        vectors += _REPLICA_VECTORS * shapes.parameters
    passing = _PASSING[device, phase] * shapes.largest * largest
    results = batches.rows * (shapes.image + shapes.classes)
    return int(graph_bytes(shapes, phase, kept) + 4 * (vectors + passing + results)) + _SMALL


def phases_of(recipe: Recipe, shapes: Shapes, batches: Batches, path: str, device: str) -> dict[str, int]:
    """Return ``phase_bytes`` of every phase of the recipe, by name.

    The regression phase: a classifier step's graph on the synthetic batch, or a graph-free pass over the real images,
    features of both, and matrices of the batch size. The statistics phase: a training step's graph on the batch.
    """
    d = recipe.distill
    steps = {"representation": d.student_steps, "classifier": d.student_steps_classifier}
    found: dict[str, int] = {}
    for phase in recipe.phases:
        if phase in steps:
            found[phase] = phase_bytes(shapes, batches, phase, path, steps[phase], device)
    if "regression" in recipe.phases:
        batch = min(d.batch, batches.total)
        features = (batch + d.regression_batch) * (shapes.classifier // shapes.classes + shapes.classes)
        real = 4 * int(d.regression_batch * (shapes.image * _IMAGES_PER_STEP + 2 * shapes.largest))
        synthetic = phase_bytes(shapes, batches, "classifier", path, 1, device)
        found["regression"] = max(synthetic, real) + 4 * (3 * features + 4 * batch**2)
    if "statistics" in recipe.phases:
        found["statistics"] = phase_bytes(shapes, batches, "classifier", path, 1, device)
    return found


def auto_bytes(shapes: Shapes, batches: Batches, steps: int) -> int:
    """Return the bytes that ``distill.gradient: auto`` compares with memory: the graphs of the first phase's steps."""
    return int(graph_bytes(shapes, "representation", batches.all_steps(steps)) + 4 * steps * shapes.parameters)


def set_bytes(recipe: Recipe, shapes: Shapes, rows: int) -> int:
    """Return a rank's bytes of the set: images and labels, momentum, the initial images, one phase's gradients.

    Of several windows, also the first window's and the means of all phases' gradients, and one of them in transit.
    """
    means = 2 * len(recipe.phases) + 1 if recipe.distill.windows > 1 else 0
    return (4 + means) * rows * 4 * (shapes.image + shapes.classes)


def data_bytes(info: DatasetInfo, shapes: Shapes, whitening: str) -> tuple[int, int]:
    """Return (device bytes, host bytes): whitened training set, if kept whole, and whitening; uint8 images."""
    whitened = 4 * info.train * shapes.image
    matrices = {"zca": 2 * shapes.image**2, "standardize": 2 * shapes.channels, "none": 0}[whitening]
    on_device = (whitened if whitened <= DEFAULT_BUDGET_BYTES else 0) + 4 * matrices
    return on_device, (info.train + info.test) * shapes.image


def whitening_bytes(shapes: Shapes, whitening: str) -> int:
    """Return the peak bytes of fitting ZCA: about 5 matrices of D x D (data/whitening.py); 0 for other whitenings."""
    if whitening != "zca":
        return 0
    return 5 * shapes.image**2 * (8 if shapes.image <= _FLOAT64_UP_TO else 4)


def whitening_flops(shapes: Shapes, info: DatasetInfo, whitening: str) -> float:
    """Return the FLOPs of fitting ZCA: 2 N D^2 for the covariance, about 10 D^3 for the eigenvectors."""
    return 2.0 * info.train * shapes.image**2 + 10.0 * shapes.image**3 if whitening == "zca" else 0.0


def window_cache_bytes(recipe: Recipe, shapes: Shapes) -> int:
    """Return the bytes of the decoded checkpoints that distillation keeps on the host."""
    rows = recipe.experts.count * (recipe.distill.start_epoch_max + recipe.distill.window_epochs)
    return int(min(recipe.buffer.cache_mb * 2**20, 4 * rows * shapes.parameters))


def training_bytes(shapes: Shapes, images: int, device: str) -> int:
    """Return the bytes of one forward and backward pass of a network on ``images`` images."""
    graph = shapes.graph("classifier") + _IMAGES_PER_STEP * shapes.image + _TRAINING[device] * shapes.largest
    return int(4 * (images * graph + _VECTORS * shapes.parameters)) + _SMALL


def buffer_bytes(recipe: Recipe, shapes: Shapes) -> int:
    """Return the trajectory buffer's bytes on disk: whole networks in the first stage, classifiers in the second."""
    e = recipe.experts
    values = (e.epochs + 1) * shapes.parameters + (e.classifier_epochs + 1) * shapes.classifier
    return int(e.count * values * 4 * COMPRESSION)
