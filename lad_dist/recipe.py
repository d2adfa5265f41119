"""The typed recipe: all fields of an experiment with default, unit and bounds; the only place for defaults.

A recipe defines *what* to compute; a cluster profile (``profile.py``) defines *where*. ``recipe_file.load`` reads YAML,
applies ``--set`` overrides and reports all faults at once. ``Recipe.experts_hash`` identifies a recipe's trajectory
buffer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from lad_dist import methods
from lad_dist.errors import RecipeError
from lad_dist.methods import GROUP, METHODS
from lad_dist.plugins import Name

Int = Annotated[int, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True, min_length=1)]
_REGRESSION_EPOCHS = 11
MOST = 1_000_000  # upper bound on epochs, images, steps, ...: above any real experiment, below an endless one
OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
Operation = Annotated[Text, AfterValidator(Name(OPERATIONS, "lad_dist.augmentations"))]
NETWORKS = ("convnet", "vgg11", "resnet18", "alexnet", "mlp", "vit")
Architecture = Annotated[Text, AfterValidator(Name(NETWORKS, "lad_dist.networks"))]
MOST_TEACHERS = 4  # experts that label batches by default, and that a distilled set carries
BASELINES = (
    "initial",
    "random-soft",
    "random",
    "k-center",
    "herding-soft",
    "herding",
    "graph-cut",
    "full",
    "full-balanced",
    "full-logit-adjusted",
    "teachers",
    "distilled-hard",
    "distilled-plain",
    "distilled-stored",
    "distilled-teacher",
    "initial-hard",
    "initial-adsa",
    "initial-stored",
    "initial-teacher",
    "random-soft-adsa",
    "random-stored",
    "random-teacher",
    "herding-stored",
    "herding-teacher",
    "random-soft-plain",
    "random-plain",
)
_ENDINGS = ("-soft-plain", "-soft-adsa", "-teacher-plain", "-soft", "-plain", "-stored", "-teacher")
BASELINE_NAMES = Name(BASELINES, "lad_dist.baselines", _ENDINGS)
Baseline = Annotated[Text, AfterValidator(BASELINE_NAMES)]
Method = Annotated[Text, AfterValidator(Name(tuple(METHODS), GROUP))]
ExpertStage = Literal["representation", "classifier"]
PhaseName = Literal["representation", "classifier", "regression", "statistics"]
SET_PHASES: tuple[PhaseName, ...] = ("regression", "statistics")  # without a student: once an iteration


Affects = Literal["experts", "distill", "evaluate", "nothing"]
_NOTHING: dict[str, Any] = {"affects": "nothing"}  # for fields of paths, save intervals, memory limits
_DISTILL: dict[str, Any] = {"affects": "distill"}


class _Section(BaseModel):
    """Base of recipe sections. ``AFFECTS``: first stage whose result depends on the fields; fields can override it."""

    AFFECTS: ClassVar[Affects] = "experts"
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(_Section):
    """Images, long-tail imbalance and whitening."""

    dataset: Literal[
        "digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "image-folder", "list", "parquet", "custom"
    ] = Field("cifar10", description="source of the images; custom: the data of data.source")
    source: Text | None = Field(
        None,
        description="data.dataset custom: module:attribute, or the name of an entry point of the group lad_dist.datasets; a "
        "function of this section that returns (train, test), each a torch Dataset, a Hugging Face Dataset or a pair of arrays",
    )
    root: Text | None = Field(
        None, description="data folder; default: $LAD_DIST_DATA, else ./data", json_schema_extra=_NOTHING
    )
    train: Text | None = Field(None, description="training split: file, folder or pattern under root")
    test: Text | None = Field(None, description="test split: file, folder or pattern under root")
    test_fraction: Annotated[Float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="image-folder without a test split: this share of each class's training images is the test set, at "
        "least one; a class of one image is not tested",
    )
    image_column: Text | None = Field(
        None, description="Parquet column of encoded images; default: found by type and name"
    )
    label_column: Text | None = Field(None, description="Parquet column of labels; default: found by name")
    image_size: Annotated[Int, Field(ge=4, le=1024)] | None = Field(
        None, description="resize to this many pixels a side"
    )
    channels: Literal[1, 3] | None = Field(
        None, description="convert to grey (1) or colour (3); default: as in the images"
    )
    fit: Literal["refuse", "center-crop"] = Field("refuse", description="what to do with an image that is not square")
    imbalance: Literal["exponential", "natural"] = Field(
        "exponential", description="exponential: n_c = trunc(n_max * factor^(-c/(K-1))); natural: all images"
    )
    imbalance_factor: Annotated[Float, Field(ge=1, le=1000)] = Field(100.0, description="largest over smallest class")
    n_max: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="images of the largest class; default: size of the smallest class of the training pool"
    )
    validation_per_class: Annotated[Int, Field(ge=0, le=MOST)] = Field(
        0,
        description="validation images per class, held out of the training pool; a class with no more keeps one for training",
    )
    download: Bool = Field(True, description="let torchvision download a missing data set", json_schema_extra=_NOTHING)
    whitening: Literal["zca", "standardize", "none"] = Field(
        "zca", description="fitted on the training set, applied to all"
    )
    zca_eps: Annotated[Float, Field(gt=0)] = Field(0.1, description="added to the eigenvalues of the covariance")
    normalize_before_zca: Literal["none", "fitted", "published"] = Field(
        "none",
        description="(x - mean) / std of each channel before ZCA; fitted: of the training set; published: the constants that the "
        "official code applies to CIFAR-100-LT",
    )


class ModelConfig(_Section):
    """Expert and student network; default: ``depth`` blocks of convolution, instance norm, ReLU, average pooling."""

    network: Architecture = Field(
        "convnet", description="one with instance norm, or module:attribute (docs/extending.md)"
    )
    width: Annotated[Int, Field(ge=1, le=4096)] = Field(128, description="convnet: channels of every convolution")
    depth: Annotated[Int, Field(ge=1, le=8)] = Field(3, description="convnet: blocks; each halves the image")


class AugmentConfig(_Section):
    """DSA augmentation: one operation per batch, uniform among ``operations``, parameters per image."""

    operations: tuple[Operation, ...] = Field(
        OPERATIONS,
        description="operations to draw from, module:attribute too; one given twice is drawn twice as often; an empty list "
        "switches augmentation off",
    )
    compose: Literal["one", "all"] = Field(
        "one",
        description="one: one operation per batch, as in DSA; all: every operation on every batch, in their order",
    )
    flip: Annotated[Float, Field(ge=0, le=1)] = Field(0.5, description="probability of a horizontal flip")
    scale: Annotated[Float, Field(ge=1, le=4)] = Field(1.2, description="scale factors lie in [1/scale, scale]")
    rotate: Annotated[Float, Field(ge=0, le=180)] = Field(15.0, description="degrees to either side")
    crop: Annotated[Float, Field(ge=0, le=1)] = Field(0.125, description="largest shift, as a fraction of the side")
    cutout: Annotated[Float, Field(ge=0, le=1)] = Field(0.5, description="side of the hole, as a fraction of the side")
    brightness: Annotated[Float, Field(ge=0)] = Field(1.0, description="width of the uniform brightness offset")
    saturation: Annotated[Float, Field(ge=0)] = Field(2.0, description="saturation factors lie in [0, saturation]")
    contrast: Annotated[Float, Field(ge=0, le=1)] = Field(0.5, description="contrast factors lie in 1 +- contrast")


class ExpertsConfig(_Section):
    """Both stages of the expert trajectories (stage 1: representation, stage 2: classifier)."""

    count: Annotated[Int, Field(ge=1, le=100_000)] = Field(
        100, description="experts to train", json_schema_extra=_DISTILL
    )
    seed: Annotated[Int, Field(ge=0)] = Field(
        0,
        description="seed of all experts; not tied to the recipe's seed, so that "
        "several distillations share one buffer",
    )
    epochs: Annotated[Int, Field(ge=1, le=MOST)] = Field(100, description="epochs of the representation stage")
    classifier_epochs: Annotated[Int, Field(ge=0, le=MOST)] = Field(
        10, description="epochs of the classifier stage; 0 leaves it out, where the method does not use it"
    )
    batch: Annotated[Int, Field(ge=1, le=MOST)] = Field(256, description="images per step")
    lr: Annotated[Float, Field(gt=0)] = Field(0.01, description="SGD learning rate, representation stage")
    classifier_lr: Annotated[Float, Field(gt=0)] = Field(0.01, description="SGD learning rate, classifier stage")
    weight_decay: Annotated[Float, Field(ge=0)] = Field(5e-3, description="representation stage")
    classifier_weight_decay: Annotated[Float, Field(ge=0)] = Field(0.0, description="classifier stage")
    momentum: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Nesterov momentum, representation stage; it starts anew with each epoch, so that the weights are an expert's "
        "whole state",
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of lr, representation stage; cosine falls to 0 at the last epoch"
    )
    warmup_epochs: Annotated[Int, Field(ge=0, le=MOST)] = Field(
        0, description="epochs over which lr rises from 0, representation stage"
    )
    logit_adjustment: Annotated[Float, Field(ge=0)] = Field(
        0.0,
        description="tau of the logit-adjusted loss (arXiv 2007.07314), representation stage: 1 makes a balanced expert of one "
        "stage, as a teacher should be; 0: the plain loss",
    )
    cutmix: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the batches mixed by CutMix (arXiv 1905.04899), representation stage"
    )
    mixup: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the batches mixed by mixup (arXiv 1710.09412), representation stage"
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the convolutions of convnet; bfloat16 is faster where the processor has it"
    )
    gsam_rho: Annotated[Float, Field(ge=0)] = Field(
        0.01, description="GSAM perturbation radius; 0 trains with plain SGD"
    )
    gsam_alpha: Annotated[Float, Field(ge=0)] = Field(0.3, description="GSAM weight of the orthogonal component")
    draws_per_class: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        4, description="consecutive draws per class, classifier stage"
    )
    epochs_per_part: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        5, description="epochs per part file, the most a crash can lose", json_schema_extra=_NOTHING
    )

    @property
    def last_epochs(self) -> dict[ExpertStage, int]:
        """Last epoch of each stage that the experts have."""
        stages: dict[ExpertStage, int] = {"representation": self.epochs, "classifier": self.classifier_epochs}
        return {stage: last for stage, last in stages.items() if last}


class BufferConfig(_Section):
    """The trajectory buffer between experts and distillation."""

    AFFECTS: ClassVar[Affects] = "distill"

    start_after: Annotated[Int, Field(ge=1, le=MOST)] | None = Field(
        None,
        description="experts that must be complete before distillation begins, which then adds new ones as they finish; "
        "default: all, so that the set depends on the recipe alone",
    )
    keep: Literal["all", "windows"] = Field(
        "all",
        description="epochs that a new buffer keeps; windows: only those that this recipe's windows, regression and teachers "
        "read, so that other windows need other experts; an existing buffer stays as it is",
        json_schema_extra=_NOTHING,
    )
    cache_mb: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        128,
        description="MiB of decoded checkpoints that each distillation process caches in host memory",
        json_schema_extra=_NOTHING,
    )


class DistillConfig(_Section):
    """The synthetic set and its matching to the experts."""

    AFFECTS: ClassVar[Affects] = "distill"

    iterations: Annotated[Int, Field(ge=1, le=100 * MOST)] = Field(10_000, description="outer iterations")
    matching: Literal["decoupled", "joint"] = Field(
        "decoupled",
        description="decoupled: a representation and a classifier phase; joint: one phase over all weights "
        "(set by method)",
    )
    weighted_loss: Bool = Field(
        True, description="weight mismatch avoidance in the representation phase (set by method)"
    )
    labels: Literal["soft", "hard"] = Field(
        "soft", description="soft labels are learned, hard ones fixed (set by method)"
    )
    class_weights: Literal["published", "mean-one"] = Field(
        "published",
        description="published: n_c / sum n; mean-one: the same scaled to mean 1, so that one alpha fits both phases",
    )
    class_weight_offset: Annotated[Float, Field(ge=0)] = Field(0.0, description="f in (n_c + f) / (sum n + f)")
    lambda_representation: Annotated[Float, Field(ge=0)] = Field(1.0, description="lambda_1")
    lambda_classifier: Annotated[Float, Field(ge=0)] = Field(1.0, description="lambda_2")
    lambda_regression: Annotated[Float, Field(ge=0)] = Field(
        0.0,
        description="weight of the regression phase (FRePo, arXiv 2206.00719): ridge regression on the set's features must "
        "predict real images. A phase of weight 0 is left out",
    )
    regression_batch: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        250, description="real images per iteration of the regression phase, every class equally often"
    )
    regression_ridge: Annotated[Float, Field(gt=0)] = Field(
        0.1, description="ridge of the regression, relative to the mean squared norm of the features"
    )
    regression_dropout: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="fraction of the features that each iteration drops from the regression, drawn anew each time"
    )
    regression_epoch_max: Annotated[Int, Field(ge=1, le=MOST)] | None = Field(
        None,
        description="features are from representation experts at epochs below this; default: 11, or all epochs if "
        "experts have fewer",
    )
    regression_targets: Literal["soft", "hard"] = Field(
        "soft",
        description="what the regression predicts: the mean soft labels of the classifier experts, at temperature 1 whatever "
        "distill.label_temperature, or the classes",
    )
    lambda_statistics: Annotated[Float, Field(ge=0)] = Field(
        0.0,
        description="weight of the statistics phase (RLDD, arXiv 2511.18858): the set's images must have the layer statistics of "
        "the class-balanced training set under an expert's last checkpoint, and be classified right by it",
    )
    statistics_weight: Annotated[Float, Field(ge=0)] = Field(
        0.01, description="weight of the statistics beside the cross-entropy, statistics phase"
    )
    statistics_first: Annotated[Float, Field(ge=0)] = Field(
        10.0, description="factor on the statistics of the first convolution's input, which are the pixels'"
    )
    student_steps: Annotated[Int, Field(ge=1, le=MOST)] = Field(80, description="N, representation (or joint) phase")
    student_steps_classifier: Annotated[Int, Field(ge=1, le=MOST)] = Field(80, description="N, classifier phase")
    batch: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        500, description="synthetic images per student step; the whole set if smaller"
    )
    windows: Annotated[Int, Field(ge=1, le=1024)] = Field(
        1,
        description="windows per iteration, whose gradients are averaged; ranks form gcd(windows, ranks) groups, which take a "
        "part of them each (docs/scaling.md)",
    )
    window_epochs: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        2, description="M, epochs between theta_t and its target"
    )
    start_epoch_min: Annotated[Int, Field(ge=0, le=MOST)] = Field(0, description="first start epoch of a window")
    start_epoch_max: Annotated[Int, Field(ge=1, le=MOST)] = Field(20, description="start epochs are below this")
    start_epoch_max_first: Annotated[Int, Field(ge=1, le=MOST)] | None = Field(
        None, description="the upper bound at iteration 0, if it grows; default: no growth"
    )
    start_epoch_growth: Annotated[Int, Field(ge=0, le=MOST)] = Field(
        0, description="iterations over which the upper bound grows"
    )
    classifier_start_epoch_max: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        1, description="classifier windows start below this epoch; 1: always at epoch 0"
    )
    optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="of pixels and labels; adam takes their momentum as its beta_1"
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the learning rates of pixels and labels; cosine falls to 0 at the last iteration"
    )
    lr_images: Annotated[Float, Field(ge=0)] = Field(100.0, description="learning rate of the pixels")
    momentum_images: Annotated[Float, Field(ge=0, lt=1)] = Field(0.5, description="momentum; beta_1 of adam")
    lr_labels: Annotated[Float, Field(ge=0)] = Field(2.0, description="learning rate of the label logits")
    momentum_labels: Annotated[Float, Field(ge=0, lt=1)] = Field(0.9, description="momentum; beta_1 of adam")
    lr_alpha: Annotated[Float, Field(ge=0)] = Field(
        1e-5, description="SGD learning rate of the student's learning rate"
    )
    momentum_alpha: Annotated[Float, Field(ge=0, lt=1)] = Field(0.5, description="momentum of lr_alpha's SGD")
    alpha: Annotated[Float, Field(gt=0)] = Field(0.01, description="the student's learning rate at the start")
    gradient: Literal["auto", "keep", "recompute", "captured"] = Field(
        "auto",
        description="keep the graphs of all student steps, or recompute them in constant memory, or that with every step "
        "captured as a CUDA graph; same numbers. auto: keep if it fits, on a GPU the faster one at the start",
        json_schema_extra=_NOTHING,
    )
    memory_gb: Annotated[Float, Field(gt=0)] | None = Field(
        None,
        description="memory available to auto; default: 60% of the free memory of the device",
        json_schema_extra=_NOTHING,
    )
    initial: Literal["real-correct", "real-herded", "real-random", "real-crops"] = Field(
        "real-correct",
        description="real images that an expert classifies correctly, at random or by herding on its features; "
        "any real images of the class; or random crops of them, the ones with the least cross-entropy under an expert",
    )
    initial_crops: Annotated[Int, Field(ge=1, le=1000)] = Field(
        5, description="initial real-crops: crops of every training image to choose from"
    )
    initial_from: Text | None = Field(
        None,
        description="a run folder, or a distilled set's folder: start from its images and labels instead of real ones",
    )
    initial_labels: Literal["correct-experts", "one-expert"] = Field(
        "correct-experts",
        description="correct-experts: mean logits of the experts that classify the image correctly; one-expert: raw logits of "
        "one expert drawn at random, wrong ones included, as the official code does for CIFAR-100-LT and Tiny-ImageNet-LT",
    )
    label_temperature: Annotated[Float, Field(gt=0)] = Field(
        1.0,
        description="the experts' mean logits are divided by this before they become soft labels; above 1 is softer",
    )
    select: Literal["last", "validation", "test-as-published"] = Field(
        "last", description="which iteration's set is kept; test-as-published selects on the test set and reports it"
    )
    select_every: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        500, description="iterations between the candidates of select"
    )
    checkpoint_every: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        100,
        description="iterations between checkpoints for resuming, also written every minute",
        json_schema_extra=_NOTHING,
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="of the student's convolutions; the start logs how far bfloat16's gradient is from float32's",
    )
    early_evaluation: Annotated[Float, Field(ge=0, le=0.5)] = Field(
        0.02,
        description="share of the time for quick measurements of the set, at checkpoints; shown and "
        "recorded, not used for selection; 0: none",
        json_schema_extra=_NOTHING,
    )


class EvaluateConfig(_Section):
    """Training of networks on a set to evaluate it."""

    AFFECTS: ClassVar[Affects] = "evaluate"

    seeds: Annotated[Int, Field(ge=1, le=1000)] = Field(5, description="networks trained per source and architecture")
    epochs: Annotated[Int, Field(ge=1, le=MOST)] = Field(1000, description="training epochs on a small set")
    batch: Annotated[Int, Field(ge=1, le=MOST)] = Field(128, description="images per step, on a small set")
    lr: Annotated[Float, Field(gt=0)] | None = Field(
        None,
        description="learning rate on distilled and random sets; default: the learned alpha (random: distill.alpha)",
    )
    momentum: Annotated[Float, Field(ge=0, lt=1)] = Field(0.9, description="SGD momentum")
    weight_decay: Annotated[Float, Field(ge=0)] = Field(5e-4, description="weight decay on a small set")
    decay: Annotated[Float, Field(gt=0, le=1)] = Field(
        0.1, description="factor on the learning rate at half of the epochs"
    )
    tune_lr: tuple[Annotated[Float, Field(gt=0)], ...] = Field(
        (),
        description="learning rates to choose from, for every source alike, by accuracy on data.validation_per_class; for the "
        "distilled set and its start also the learned alpha; default: lr and full_lr unchanged",
    )
    tune_epochs: tuple[Annotated[Int, Field(ge=1, le=MOST)], ...] = Field(
        (), description="epochs to choose from, likewise (the whole set keeps full_epochs); default: epochs"
    )
    full_epochs: Annotated[Int, Field(ge=1, le=MOST)] = Field(200, description="epochs on the whole long-tailed set")
    full_lr: Annotated[Float, Field(gt=0)] = Field(0.01, description="learning rate on the whole long-tailed set")
    full_batch: Annotated[Int, Field(ge=1, le=MOST)] = Field(256, description="images per step on the whole set")
    full_weight_decay: Annotated[Float, Field(ge=0)] = Field(5e-4, description="weight decay on the whole set")
    baselines: tuple[Baseline, ...] = Field(
        ("initial", "random-soft", "random", "full"),
        description="what `run` measures beside the distilled set: the set it started from (initial), real images chosen at the "
        "same IPC with hard or with the experts' labels (...-soft), ways to train on the whole long-tailed set, the distilled "
        "images with hard labels, a set without augmentation (...-plain), a set with stored views, each with its own label "
        "(...-stored), a set whose augmented batches the experts label anew (...-teacher), the labelling experts themselves "
        "(teachers), or module:attribute, also with -soft, -soft-adsa, -stored, -teacher, and with -plain after nothing, -soft or "
        "-teacher",
    )
    split: Literal["test", "validation"] = Field("test", description="split that accuracy is measured on")
    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)] = Field(
        ("convnet",),
        description="networks trained on every set, module:attribute too; convnet has the width and depth of "
        "`model`; follows model.network unless set",
    )
    norm: Literal["instance", "batch"] = Field(
        "instance", description="normalisation of convnet, vgg11, resnet18 and alexnet when they are evaluated"
    )
    protocol: Literal["lad", "rldd"] = Field(
        "lad",
        description="how networks are trained on a small set, as a preset of the fields of this section (docs/evaluation.md); "
        "each reports the last epoch",
    )
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="on a small set (set by protocol)")
    schedule: Literal["half", "late"] = Field(
        "half",
        description="half: lr times decay at half of the epochs; late: halved at 80, 90 and 95 % (set by protocol)",
    )
    augmentation: Literal["dsa", "randaugment"] = Field(
        "dsa", description="dsa: by `augment`; randaugment: with random resized crops and flips (set by protocol)"
    )
    cutmix: Annotated[Float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the batches mixed by CutMix (set by protocol)"
    )
    label_loss: Literal["cross-entropy", "logits"] = Field(
        "cross-entropy",
        description="logits: where a teacher labels, the squared distance to its logits and 0.025 of the classes' cross-entropy "
        "(set by protocol)",
    )
    ema: Annotated[Float, Field(ge=0, lt=1)] = Field(
        0.0, description="decay of the moving average of the weights, which is then measured (set by protocol)"
    )
    teachers: Annotated[Int, Field(ge=1)] | None = Field(
        None, description="experts whose mean logits label the batches of ...-teacher; default: all, at most 4"
    )
    teachers_from: Text | None = Field(
        None, description="a run folder on the same images, whose experts label instead of this run's"
    )
    stored_views: Annotated[Int, Field(ge=1, le=MOST)] = Field(
        20, description="augmented views of an image, each with a stored label, of ...-stored"
    )
    label_adjustment: Literal["none", "adsa"] = Field(
        "none",
        description="adsa: measure the distilled set a second time, with soft labels adjusted for the long tail after "
        "distillation (arXiv 2511.17914), as the source distilled-adsa",
    )
    logit_adjustment: Annotated[Float, Field(gt=0)] = Field(
        1.0, description="tau of the baseline full-logit-adjusted (arXiv 2007.07314)"
    )
    together: Literal["auto", "on", "off"] = Field(
        "auto",
        description="on: all seeds of ConvNet train at once by grouped convolutions, the same numbers to rounding; auto: on a "
        "CPU if one network's batch is so small that this is faster, and a trial gives the same bits; neither with "
        "RandAugment nor ema",
    )


PROTOCOLS: dict[str, dict[str, Any]] = {
    "lad": {},
    "rldd": {
        "batch": 25,
        "lr": 0.001,
        "weight_decay": 0.01,
        "optimizer": "adamw",
        "schedule": "late",
        "augmentation": "randaugment",
        "cutmix": 1.0,
        "label_loss": "logits",
        "ema": 0.99,
    },
}
"""Fields of ``evaluate`` that a protocol sets; ``lad`` has the defaults. RLDD: arXiv 2511.18858."""


class Recipe(_Section):
    """One experiment. ``seed`` drives distillation and evaluation; ``experts.seed`` drives the experts."""

    AFFECTS: ClassVar[Affects] = "distill"

    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "unnamed", description="default run folder", json_schema_extra=_NOTHING
    )
    method: Method = Field(
        "lad",
        description="a preset of fields of distill (below), and its matching loss",
    )
    ipc: Annotated[Int, Field(ge=1, le=10_000)] = Field(10, description="synthetic images per class")
    seed: Annotated[Int, Field(ge=0)] = Field(0, description="of distillation and evaluation")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    experts: ExpertsConfig = ExpertsConfig()
    buffer: BufferConfig = BufferConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand_method(cls, doc: Any) -> Any:
        if not isinstance(doc, dict) or not isinstance(doc.get("distill", {}), dict | None | DistillConfig):
            return doc
        if isinstance(doc.get("distill"), DistillConfig):
            return doc
        method = doc.get("method", cls.model_fields["method"].default)
        preset = methods.preset(method)
        strange = [k for k in preset if k not in DistillConfig.model_fields]
        if strange:
            raise RecipeError(
                f"method: {method}: sets distill.{strange[0]}, which is not a field; valid: fields of distill"
            )
        own = {k: v for k, v in (doc.get("distill") or {}).items() if not (k in preset and v is None)}
        return {**doc, "distill": {**preset, **own}}

    @model_validator(mode="before")
    @classmethod
    def _evaluate_the_own_network(cls, doc: Any) -> Any:
        model, evaluate = (doc.get(s) or {} for s in ("model", "evaluate")) if isinstance(doc, dict) else ({}, {})
        name = (
            model.network
            if isinstance(model, ModelConfig)
            else model.get("network")
            if isinstance(model, dict)
            else None
        )
        if name is None or not isinstance(evaluate, dict) or evaluate.get("architectures") is not None:
            return doc
        return {**doc, "evaluate": {**evaluate, "architectures": (name,)}}

    @model_validator(mode="before")
    @classmethod
    def _expand_protocol(cls, doc: Any) -> Any:
        evaluate = doc.get("evaluate") if isinstance(doc, dict) else None
        if not isinstance(evaluate, dict) or evaluate.get("protocol") not in PROTOCOLS:
            return doc
        return {**doc, "evaluate": {**PROTOCOLS[evaluate["protocol"]], **evaluate}}

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Recipe:
        faults = list(_cross_faults(self))
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def uses_classifier_experts(self) -> bool:
        """Whether distillation needs the classifier stage of the experts."""
        return self.distill.matching == "decoupled"

    @property
    def labelling(self) -> tuple[ExpertStage, int]:
        """The stage of the experts whose last epoch labels images, and that epoch."""
        stage: ExpertStage = "classifier" if self.uses_classifier_experts else "representation"
        return stage, self.experts.last_epochs[stage]

    @property
    def phases(self) -> tuple[PhaseName, ...]:
        """The phases of an iteration with weight above 0, in order."""
        d = self.distill
        found: list[PhaseName] = ["representation"] if d.lambda_representation > 0 else []
        if self.uses_classifier_experts and d.lambda_classifier > 0:
            found.append("classifier")
        found += ["regression"] if d.lambda_regression > 0 else []
        found += ["statistics"] if d.lambda_statistics > 0 else []
        return tuple(found)

    @property
    def matching_phases(self) -> tuple[PhaseName, ...]:
        """The phases that train a student on a window."""
        return tuple(phase for phase in self.phases if phase not in SET_PHASES)

    @property
    def drawn_phases(self) -> tuple[PhaseName, ...]:
        """The phases that an iteration draws experts for, in order: each window's, then those without a student."""
        return self.matching_phases * self.distill.windows + self.phases[len(self.matching_phases) :]

    @property
    def can_grow(self) -> bool:
        """Whether iterations are independent of their total number; with a cosine, every step depends on it."""
        return self.distill.schedule == "constant"

    @property
    def regression_epochs(self) -> int:
        """Bound on epochs: the regression phase uses features of representation experts at epochs below this."""
        given = self.distill.regression_epoch_max
        return min(_REGRESSION_EPOCHS, self.experts.epochs + 1) if given is None else given

    def experts_document(self) -> dict[str, Any]:
        """Return the part of the recipe that, with the data's own fingerprint, determines the experts' rows."""
        doc = self.model_dump(mode="json")
        return {
            name: without_later_defaults(name, fields_that_affect("experts", name, doc[name]))
            for name in ("data", "model", "augment", "experts")
        }

    def experts_hash(self) -> str:
        """Return the SHA-256 (hex) of ``experts_document``: equal hashes mean interchangeable experts."""
        return _digest(self.experts_document())

    def recipe_hash(self) -> str:
        """Return the SHA-256 (hex) of the whole recipe except ``data.root`` and ``data.download``."""
        doc = self.model_dump(mode="json")
        doc["data"] = {k: v for k, v in doc["data"].items() if k not in ("root", "download")}
        for section in _LATER:
            doc[section] = without_later_defaults(section, doc[section])
        return _digest(doc)


# Fields added after the first buffers and runs: at their defaults they are left out of hashes, which thus stay the
# same.
_LATER = {
    "data": ("normalize_before_zca", "test_fraction", "source"),
    "model": ("network",),
    "augment": ("compose",),
    "experts": ("momentum", "schedule", "warmup_epochs", "logit_adjustment", "cutmix", "mixup", "precision"),
    "buffer": ("keep",),
    "distill": (
        "lambda_statistics",
        "statistics_weight",
        "statistics_first",
        "initial_crops",
        "initial_from",
        "initial_labels",
        "lambda_regression",
        "regression_batch",
        "regression_ridge",
        "regression_dropout",
        "regression_epoch_max",
        "regression_targets",
        "optimizer",
        "schedule",
        "windows",
    ),
    "evaluate": (
        "protocol",
        "optimizer",
        "schedule",
        "augmentation",
        "cutmix",
        "label_loss",
        "ema",
        "teachers_from",
        "stored_views",
        "full_weight_decay",
    ),
}


def without_later_defaults(section: str, doc: dict[str, Any]) -> dict[str, Any]:
    """Return a section's fields without later-added ones (``_LATER``) at their defaults."""
    fields = section_of(section).model_fields
    return {k: v for k, v in doc.items() if k not in _LATER.get(section, ()) or v != fields[k].default}


def section_of(name: str) -> type[_Section]:
    """Return the model of a recipe's section."""
    found = Recipe.model_fields[name].annotation
    assert isinstance(found, type) and issubclass(found, _Section)
    return found


def affects(field: str) -> Affects:
    """Return the first stage whose result depends on a field: ``affects("distill.iterations")`` is ``distill``."""
    section, dot, name = field.rpartition(".")
    model = section_of(section) if dot else Recipe
    extra = model.model_fields[name].json_schema_extra
    return extra["affects"] if isinstance(extra, dict) else model.AFFECTS  # type: ignore[return-value]


def fields_that_affect(stage: Affects, section: str, doc: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a dumped section that affect ``stage`` first."""
    return {name: value for name, value in doc.items() if affects(f"{section}.{name}") == stage}


@dataclass(frozen=True)
class Difference:
    """A field that differs between two recipes. ``there``: its value in the first, ``here``: in the second."""

    field: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.field} is {_shown(self.there)} there, {_shown(self.here)} here"


def differences(there: Recipe, here: Recipe) -> list[Difference]:
    """Return all fields in which two recipes differ, in field order."""
    first, second = (dict(flat(r.model_dump(mode="json"))) for r in (there, here))
    return [Difference(field, first[field], value) for field, value in second.items() if value != first[field]]


def flat(doc: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field of a dumped recipe, whose only mappings are its sections."""
    for name, value in doc.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(doc: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()


def _cross_faults(recipe: Recipe) -> list[str]:
    """Return faults that concern several fields, each as ``field: what is wrong; what is valid``."""
    d, e, faults = recipe.distill, recipe.experts, []
    if recipe.buffer.start_after is not None and recipe.buffer.start_after > e.count:
        faults.append(
            f"buffer.start_after: {recipe.buffer.start_after} is above experts.count {e.count}; at most {e.count} is valid"
        )
    if d.start_epoch_max <= d.start_epoch_min:
        faults.append(
            f"distill.start_epoch_max: {d.start_epoch_max} is not above distill.start_epoch_min {d.start_epoch_min}"
        )
    if not recipe.phases:
        faults.append("distill.lambda_representation: every phase has weight 0; at least one must be above 0")
    if d.initial == "real-crops" and d.initial_labels == "one-expert":
        faults.append(f"distill.initial_labels: {d.initial_labels}, but crops are labelled by all experts; remove it")
    if d.windows > 1 and not recipe.matching_phases:
        faults.append(f"distill.windows: {d.windows}, but no phase of method {recipe.method} has windows; valid: 1")
    if d.lambda_regression > 0:
        faults += _regression_faults(recipe)
    if d.lambda_statistics > 0 and recipe.buffer.start_after is not None:
        faults.append("buffer.start_after: the statistics phase uses all experts' last checkpoints; remove it")
    if e.classifier_epochs == 0 and recipe.uses_classifier_experts:
        faults.append(
            f"experts.classifier_epochs: 0, but method {recipe.method} (distill.matching decoupled) needs classifier experts; "
            "valid: 1 or more, or a method of one stage"
        )
    if e.cutmix + e.mixup > 1:
        faults.append(
            f"experts.mixup: {e.mixup:g} and experts.cutmix {e.cutmix:g} are shares of the same batches; at most 1 together"
        )
    if e.warmup_epochs > e.epochs:
        faults.append(f"experts.warmup_epochs: {e.warmup_epochs} is above experts.epochs {e.epochs}")
    last = d.start_epoch_max - 1 + d.window_epochs
    if "representation" in recipe.phases and last > e.epochs:
        faults.append(
            f"distill.start_epoch_max: a window from epoch {d.start_epoch_max - 1} over {d.window_epochs} epochs ends at {last}, "
            f"past experts.epochs {e.epochs}; at most {e.epochs - d.window_epochs + 1} is valid"
        )
    if (d.start_epoch_max_first is None) != (d.start_epoch_growth == 0):
        faults.append(
            f"distill.start_epoch_growth: {d.start_epoch_growth} with distill.start_epoch_max_first {d.start_epoch_max_first}; the "
            "bound on start epochs grows from the one over the other: valid: both, or neither"
        )
    if d.start_epoch_max_first is not None and not d.start_epoch_min < d.start_epoch_max_first <= d.start_epoch_max:
        faults.append(
            f"distill.start_epoch_max_first: {d.start_epoch_max_first} must lie above distill.start_epoch_min "
            f"{d.start_epoch_min} and not above distill.start_epoch_max {d.start_epoch_max}"
        )
    last = d.classifier_start_epoch_max - 1 + d.window_epochs
    if "classifier" in recipe.phases and 0 < e.classifier_epochs < last:
        faults.append(
            f"distill.classifier_start_epoch_max: a window ends at epoch {last}, past experts.classifier_epochs "
            f"{e.classifier_epochs}"
        )
    for field in ("tune_lr", "tune_epochs"):
        if getattr(recipe.evaluate, field) and recipe.data.validation_per_class == 0:
            faults.append(f"evaluate.{field}: tunes on held-out images and needs data.validation_per_class above 0")
    for field, value in (("evaluate.split", recipe.evaluate.split), ("distill.select", d.select)):
        if value == "validation" and recipe.data.validation_per_class == 0:
            faults.append(f"{field}: validation needs data.validation_per_class above 0")
    if recipe.data.dataset == "list":
        for field, file in (("train", recipe.data.train), ("test", recipe.data.test)):
            if file is None:
                faults.append(
                    f"data.{field}: must name the {field} split's file for data.dataset {recipe.data.dataset}"
                )
    if recipe.data.dataset in ("digits", "fashion-mnist", "cifar10", "cifar100"):  # arrays of square images
        default = DataConfig()
        faults += [
            f"data.{field}: has no meaning with data.dataset {recipe.data.dataset}; remove it"
            for field in ("train", "test", "image_column", "label_column", "fit")
            if getattr(recipe.data, field) != getattr(default, field)
        ]
    if (recipe.data.dataset == "custom") != (recipe.data.source is not None):
        faults.append("data.source: names the data of data.dataset custom; valid: both, or neither")
    if recipe.data.test_fraction is not None and (
        recipe.data.dataset != "image-folder" or recipe.data.test is not None
    ):
        faults.append(
            "data.test_fraction: takes test images out of an image folder's training split; valid with data.dataset image-folder "
            "and without data.test"
        )
    if recipe.data.normalize_before_zca != "none" and recipe.data.whitening != "zca":
        faults.append(
            f"data.normalize_before_zca: {recipe.data.normalize_before_zca} has no meaning with data.whitening "
            f"{recipe.data.whitening}; valid: none, or data.whitening zca"
        )
    faults += _network_faults(recipe)
    default = DataConfig.model_fields["imbalance_factor"].default  # a saved recipe spells it out
    if recipe.data.imbalance == "natural" and recipe.data.imbalance_factor != default:
        faults.append("data.imbalance_factor: has no meaning with data.imbalance natural; remove it")
    if recipe.data.imbalance == "natural" and recipe.data.n_max is not None:
        faults.append("data.n_max: has no meaning with data.imbalance natural; remove it")
    return faults


def _network_faults(recipe: Recipe) -> list[str]:
    """Return faults of settings that only ConvNet supports."""
    m, faults = recipe.model, list[str]()
    if m.network == "convnet":
        return faults
    if "convnet" not in recipe.evaluate.architectures:
        faults += [
            f"model.{field}: has no meaning with model.network {m.network}; remove it"
            for field in ("width", "depth")
            if getattr(m, field) != ModelConfig.model_fields[field].default  # a saved recipe spells it out
        ]
    for section, precision in (("distill", recipe.distill.precision), ("experts", recipe.experts.precision)):
        if precision != "float32":
            faults.append(f"{section}.precision: {precision} is convnet's; valid with {m.network}: float32")
    return faults


def _regression_faults(recipe: Recipe) -> list[str]:
    d, e, faults = recipe.distill, recipe.experts, []
    if d.regression_epoch_max is not None and d.regression_epoch_max - 1 > e.epochs:
        faults.append(
            f"distill.regression_epoch_max: {d.regression_epoch_max} reaches past experts.epochs {e.epochs}; at most "
            f"{e.epochs + 1} is valid"
        )
    if d.regression_targets == "soft" and recipe.buffer.start_after is not None:
        faults.append(
            "buffer.start_after: soft targets of the regression phase come from all experts; remove it, or set "
            "distill.regression_targets to hard"
        )
    return faults
