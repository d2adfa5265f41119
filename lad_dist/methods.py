"""Trajectory-matching methods: the phases, losses, windows and labels of each, as fields of a recipe's ``distill``.

A recipe may override any of these fields, and packages may offer more methods as entry points of the group
``lad_dist.methods``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lad_dist import plugins
from lad_dist.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "lad_dist.methods"


class MatchingLoss(Protocol):
    """Distance of a student from its expert: a scalar differentiable by ``student_p``.

    Both arguments are displacements since the window's start, over the p weights that a phase compares: the student's
    after its last step, and the expert's at the window's end. They are equal on every rank, so the loss must depend on
    nothing else.
    """

    def __call__(self, student_p: Tensor, expert_p: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """A method: its ``title`` in tables, the fields of ``distill`` that it sets, and the publications to ``cite``.

    ``loss``: the matching loss of its phases; None: the squared distance, relative to the expert's (MTT, LAD).
    """

    title: str
    distill: Mapping[str, Any] = field(default_factory=dict)
    cite: tuple[str, ...] = ()
    loss: MatchingLoss | None = None


_LAD = "Zhao et al., Distilling Long-tailed Datasets, CVPR 2025, arXiv:2408.14506"
_FREPO = "Zhou et al., Dataset Distillation using Neural Feature Regression, NeurIPS 2022, arXiv:2206.00719"
_DATM = "Guo et al., Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching, ICLR 2024, arXiv:2310.05773"
_MTT = "Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022, arXiv:2203.11932"
_RLDD = "Rethinking Long-tailed Dataset Distillation, AAAI 2026, arXiv:2511.18858"
_SRE2L = (
    "Yin et al., Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale, NeurIPS 2023, arXiv:2306.13092"
)
_TESLA = "Cui et al., Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory, ICML 2023, arXiv:2211.10586"

METHODS: dict[str, Method] = {
    "lad": Method(
        "LAD",
        {"matching": "decoupled", "weighted_loss": True, "labels": "soft"},
        (_LAD, _DATM, _MTT, _TESLA),
    ),
    "lad-fr": Method(  # LAD's experts and labels with feature regression instead of matching
        "LAD with feature regression",
        {
            "matching": "decoupled",
            "weighted_loss": True,
            "labels": "soft",
            "lambda_representation": 0.0,
            "lambda_classifier": 0.0,
            "lambda_regression": 1.0,
        },
        (_LAD, _FREPO),
    ),
    "aligned": Method(  # experts are teachers: see jobs/*-aligned.yaml for their settings
        "Statistical alignment",
        {
            "matching": "joint",
            "weighted_loss": False,
            "labels": "soft",
            "lambda_representation": 0.0,
            "lambda_classifier": 0.0,
            "lambda_statistics": 1.0,
            "iterations": 75,
            "optimizer": "adam",
            "schedule": "cosine",
            "lr_images": 0.05,
            "momentum_images": 0.5,
            "lr_labels": 0.2,
            "momentum_labels": 0.5,
            "initial": "real-crops",
        },
        (_RLDD, _SRE2L),
    ),
    "datm": Method(
        "DATM",
        {"matching": "joint", "weighted_loss": False, "labels": "soft"},
        (_DATM, _MTT, _TESLA),
    ),
    "mtt": Method(
        "MTT",
        {"matching": "joint", "weighted_loss": False, "labels": "hard"},
        (_MTT, _TESLA),
    ),
    "lad-without-wma": Method(
        "LAD without weight mismatch avoidance",
        {"matching": "decoupled", "weighted_loss": False, "labels": "soft"},
        (_LAD, _DATM, _MTT, _TESLA),
    ),
    "lad-without-adm": Method(
        "LAD without decoupled matching",
        {"matching": "joint", "weighted_loss": True, "labels": "soft"},
        (_LAD, _DATM, _MTT, _TESLA),
    ),
}


def find(name: str) -> Method:
    """Return the method that a recipe's ``method`` names. Raises RecipeError if there is none."""
    if name in METHODS:
        return METHODS[name]
    found = plugins.load(name, GROUP, "method")
    if not isinstance(found, Method):
        raise RecipeError(f"method: {name}: is a {type(found).__name__}; valid: a lad_dist.methods.Method")
    return found


def preset(name: object) -> Mapping[str, Any]:
    """Return the fields of ``distill`` that a method sets; none for an unknown name. Raises as ``find``."""
    known = isinstance(name, str) and (name in METHODS or ":" in name or name in plugins.offered(GROUP))
    return find(str(name)).distill if known else {}


def title(name: str) -> str:
    """Return a method's display title; its name if it cannot be loaded here or is no method (``imported``)."""
    try:
        return find(name).title
    except RecipeError:
        return name


def cited(name: str) -> tuple[str, ...]:
    """Return the publications to cite for a set made by this method; none if the method is unknown here."""
    try:
        return find(name).cite
    except RecipeError:
        return ()
