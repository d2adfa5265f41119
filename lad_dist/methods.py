"""Methods of trajectory matching: which phases, losses, windows and labels each means, as fields of a recipe's ``distill``.

A recipe may set any of these fields itself, and ``lad_dist.methods`` is the group of entry points where packages offer more.
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
    """How far a student is from its expert: a scalar that is differentiable by ``student_p``.

    Both are displacements since the window's start, over the p weights that a phase compares: the student's after its last
    step, and the expert's at the window's end. The same on every rank, so it must depend on nothing else.
    """

    def __call__(self, student_p: Tensor, expert_p: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Method:
    """One method: its ``title`` in tables, the fields of ``distill`` that it sets, and whom to ``cite``.

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
    """The method that a recipe's ``method`` names. Raises RecipeError where there is none."""
    if name in METHODS:
        return METHODS[name]
    found = plugins.load(name, GROUP, "method")
    if not isinstance(found, Method):
        raise RecipeError(f"method: {name}: is a {type(found).__name__}; valid: a lad_dist.methods.Method")
    return found


def preset(name: object) -> Mapping[str, Any]:
    """The fields of ``distill`` that a method sets; none for what is no method's name. Raises as ``find``."""
    known = isinstance(name, str) and (name in METHODS or ":" in name or name in plugins.offered(GROUP))
    return find(str(name)).distill if known else {}


def title(name: str) -> str:
    """A method for people; one whose module is not here, or that is none (``imported``), by its name."""
    try:
        return find(name).title
    except RecipeError:
        return name


def cited(name: str) -> tuple[str, ...]:
    """Whom a publication with a set of this method should cite; nobody where the method is not known here."""
    try:
        return find(name).cite
    except RecipeError:
        return ()
