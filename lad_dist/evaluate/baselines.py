"""Baselines of real images: IPC images of every class of the long-tailed training set, with hard labels.

    random      drawn anew for every evaluation seed
    k-center    greedy k-center: each next image is the one farthest from those chosen (Sener and Savarese, "Active
                Learning for Convolutional Neural Networks: A Core-Set Approach", arXiv 1708.00489)
    herding     keeps the mean of the chosen images closest to the class mean (data/herding.py)
    graph-cut   greedily maximises sum_{i in V, j in A} s_ij - sum_{i, j in A} s_ij, s_ij = (1 + cosine) / 2 (Iyer and
                Bilmes, "Submodular Optimization with Submodular Cover and Submodular Knapsack Constraints", arXiv
                1311.2106; with lambda 1 as in DeepCore's GraphCut)

All but random select class by class in the feature space of one network and depend on nothing else, as in DeepCore (Guo
et al., arXiv 2204.08499, github.com/PatrickZH/DeepCore) and DC-BENCH (Cui et al., arXiv 2207.09639), where the network
is trained on the whole training set for a few epochs. Here it is the last epoch of expert 0, trained on the same
long-tailed images, if the run's buffer has it; otherwise a network trained on them with the settings of the source
``full``. The row's settings name the network. Classes with fewer than IPC images repeat them.

Shapes: N training images, n of one class, D features.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lad_dist import plugins
from lad_dist.data.herding import herd
from lad_dist.data.longtail import positions_by_class
from lad_dist.data.prepare import PreparedData
from lad_dist.errors import LadDistError, RecipeError, RunDirError
from lad_dist.models import functional
from lad_dist.models.convnet import flat_parameters
from lad_dist.models.network import build
from lad_dist.recipe import Recipe
from lad_dist.results import file_word
from lad_dist.rundir import RunDir, published
from lad_dist.seeds import rng
from lad_dist.teachers import outputs

EXPERT = 0
_FIELD = "evaluate.baselines"


def random_real(recipe: Recipe, data: PreparedData, seed: int | str) -> np.ndarray:
    """Return IPC random training images of every class, class-major; smaller classes repeat their images."""
    labels_N = data.splits.train.labels_N.numpy()
    chosen = []
    for c, members in enumerate(positions_by_class(labels_N, data.classes)):
        shuffled = rng(recipe.seed, "evaluate", "random", seed, c).permutation(members)
        chosen.append(np.resize(shuffled, recipe.ipc))
    return np.concatenate(chosen)


# --- selection in a feature space -------------------------------------------------------------------------------------


def k_center(features_nD: Tensor, count: int) -> np.ndarray:
    """Return at most ``count`` rows: the one closest to the mean, then always the one farthest from its nearest pick.

    Ties go to the first row.
    """
    rows = features_nD.double()
    picked = [int((rows - rows.mean(dim=0)).square().sum(dim=1).argmin())]
    nearest_n = (rows - rows[picked[0]]).square().sum(dim=1)
    while len(picked) < min(count, len(rows)):
        nearest_n[picked[-1]] = -1.0  # never pick a row twice, even if only duplicates remain
        best = int(nearest_n.argmax())
        picked.append(best)
        nearest_n = torch.minimum(nearest_n, (rows - rows[best]).square().sum(dim=1))
    return np.array(picked, dtype=np.int64)


def graph_cut(features_nD: Tensor, count: int) -> np.ndarray:
    """Return at most ``count`` rows, greedily by gain_j = sum_{i in V} s_ij - 2 sum_{i in A} s_ij; ties: the first."""
    rows = torch.nn.functional.normalize(features_nD.double(), dim=1)
    to_all_n = (len(rows) + rows @ rows.sum(dim=0)) / 2
    to_chosen_n, free_n = torch.zeros_like(to_all_n), torch.ones(len(rows), dtype=torch.bool)
    picked: list[int] = []
    while len(picked) < min(count, len(rows)):
        best = int(torch.where(free_n, to_all_n - 2 * to_chosen_n, -torch.inf).argmax())
        picked.append(best)
        free_n[best] = False
        to_chosen_n += (1 + rows @ rows[best]) / 2
    return np.array(picked, dtype=np.int64)


GROUP = "lad_dist.baselines"


class Chooser(Protocol):
    """Selects images of one class: at most ``count`` distinct row numbers from features (n, D), best first.

    A pure function of its arguments. If a class yields fewer than ``count``, its images are repeated.
    """

    def __call__(self, features_nD: Tensor, count: int, /) -> np.ndarray: ...


CHOOSERS: dict[str, Chooser] = {
    "k-center": k_center,
    "herding": herd,
    "graph-cut": graph_cut,
}


def chooser(source: str) -> Chooser:
    """Return the chooser of a source. Raises RecipeError if it does not exist."""
    what = "a callable (features of a class, count) -> row numbers"
    found: Chooser = CHOOSERS.get(source) or plugins.load_callable(source, GROUP, _FIELD, what)
    return found


def _picks(source: str, choose: Chooser, features_nD: Tensor, count: int) -> np.ndarray:
    """Return the row numbers that ``choose`` selects for a class. Raises RecipeError if they are invalid."""
    try:
        picks = np.asarray(choose(features_nD, count))
    except LadDistError:
        raise
    except Exception as error:  # user code: may raise anything
        raise RecipeError(f"{_FIELD}: {source} raised {type(error).__name__}: {error}") from error
    rows = len(features_nD)
    numbers = picks.ndim == 1 and picks.dtype.kind in "iu" and 1 <= len(picks) <= count
    if not numbers or picks.min() < 0 or picks.max() >= rows or len(set(picks.tolist())) < len(picks):
        shown = np.array2string(picks, threshold=8, edgeitems=3).replace("\n", " ")
        raise RecipeError(
            f"{_FIELD}: {source}: chose {shown} of a class of {rows} images; valid: 1 to {count} different row numbers below {rows}"
        )
    return picks.astype(np.int64)


@dataclass(frozen=True)
class FeatureSpace:
    """Network whose feature space is used for selection.

    ``expert_epoch`` is expert 0's last representation epoch, or None if a network is trained for this purpose. ``name``
    appears in a row's settings.
    """

    expert_epoch: int | None
    name: str


def feature_space(recipe: Recipe, run: RunDir, whole: dict[str, Any]) -> FeatureSpace:
    """Return the feature space of the run; ``whole``: settings of a network on the whole set, for want of an expert.

    Raises TrajectoryError if the run's buffer belongs to other experts.
    """
    from lad_dist.trajectories.reader import Buffer

    buffer, last = Buffer(run.trajectories, recipe.experts_hash()), recipe.experts.epochs
    if buffer.has("representation", EXPERT, last):
        return FeatureSpace(last, f"expert {EXPERT}, representation epoch {last}")
    digest = hashlib.sha256(json.dumps([whole, recipe.model.model_dump()], sort_keys=True).encode()).hexdigest()
    how = f"{whole['epochs']} epochs, lr {whole['lr']:g}, batch {whole['batch']}, settings {digest[:8]}"
    network = "ConvNet" if recipe.model.network == "convnet" else recipe.model.network
    return FeatureSpace(None, f"{network} trained on the long-tailed set: {how}")


def chosen_real(
    recipe: Recipe,
    data: PreparedData,
    run: RunDir,
    source: str,
    trained: Callable[[], nn.Module],
    whole: dict[str, Any],
) -> np.ndarray:
    """Return the training images (K * IPC,) selected by ``source``, class-major; stored beside the results for reuse.

    ``trained`` trains the network of a feature space that is not an expert's, with the settings ``whole``.

    Raises:
        RecipeError: the source does not exist, or its selection is invalid.
        RunDirError: the file of an earlier selection is damaged.
        TrajectoryError: the buffer belongs to other experts, or is damaged.
    """
    space = feature_space(recipe, run, whole)
    of = [source, recipe.ipc, recipe.seed, space.name, recipe.experts_hash(), data.splits.train.fingerprint()]
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()
    name = source if source in CHOOSERS else file_word(source)
    file = run.results.parent / "chosen" / f"{name}.json"
    try:
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["key"] == key and "sha256" in kept:  # older versions wrote no checksum: select again, same outcome
                if kept["sha256"] != _sum_of(kept):
                    raise ValueError("it does not match its own checksum")
                return np.array(kept["images"], dtype=np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{file}: is not a selection of images ({error}); remove it to select again") from error
    choose = chooser(source)
    features_ND = _features(recipe, data, run, space, trained)
    labels_N, chosen = data.splits.train.labels_N.numpy(), []
    for members in positions_by_class(labels_N, data.classes):
        picks = _picks(source, choose, features_ND[torch.from_numpy(members)], recipe.ipc)
        chosen.append(np.resize(members[picks], recipe.ipc))
    images = np.concatenate(chosen)
    with published(file) as temporary:
        doc = {"key": key, "features": space.name, "images": images.tolist()}
        temporary.write_text(json.dumps({**doc, "sha256": _sum_of(doc)}) + "\n", encoding="utf-8")
    return images


def _sum_of(doc: dict[str, Any]) -> str:
    """Return the checksum of a stored selection's content."""
    said = {k: v for k, v in doc.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def _features(
    recipe: Recipe, data: PreparedData, run: RunDir, space: FeatureSpace, trained: Callable[[], nn.Module]
) -> Tensor:
    """Return features (N, D) of all training images, on the host."""
    if space.expert_epoch is None:
        with torch.enable_grad():
            network = trained()
        weights_P = flat_parameters(network)
    else:
        from lad_dist.trajectories.reader import Buffer

        buffer = Buffer(run.trajectories, recipe.experts_hash())
        weights_P = torch.from_numpy(buffer.read("representation", EXPERT, space.expert_epoch).copy()).to(data.device)
        network = build(recipe.model, *data.splits.train.shape, seed=0, purpose=("features",)).to(data.device)
    return outputs(functional.features, network, weights_P, data)
