"""Training sources for evaluation: images, labels and training settings of each source.

    distilled               the run's distilled set
    distilled-adsa          its images, with soft labels adjusted for the long tail (labels.py)
    distilled-hard          its images, with their class as label
    distilled-plain         the distilled set, trained on without augmentation
    initial                 the set that distillation started from: its images with their soft labels
    initial-hard, -adsa     its images with their class as label, and with soft labels adjusted for the long tail
    random, k-center, ...   real images at the same IPC (baselines.py)
    random-soft, ...        the images of random and of herding, labelled by the experts (teachers.py)
    random-plain, ...       the images of random, and of random-soft, without augmentation
    module:attribute        real images selected by user code; also with -soft, -plain and -soft-plain
    random-soft-adsa        with soft labels adjusted for the long tail
    ...-stored              images of a source, with the experts' labels of evaluate.stored_views views of each
    ...-teacher             images of a source; the experts label each augmented batch (teachers.py)
    teachers                nothing: the labelling experts, measured as one network
    full                    the whole long-tailed set
    full-balanced           the same, with class-balanced sampling
    full-logit-adjusted     the same, with the logit-adjusted loss

Label and training variants of a source share its draws: seed s of ``distilled-adsa`` starts from the weights of seed s
of ``distilled`` and sees the images in the same order, so the two can be compared as pairs. So does seed s of
``initial``: it differs from ``distilled`` only in images and labels, each of which was initialised from its counterpart
there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lad_dist import recipe_file, results
from lad_dist.data.prepare import PreparedData
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, RecipeError
from lad_dist.evaluate import baselines
from lad_dist.evaluate.labels import adsa
from lad_dist.evaluate.stored import StoredViews
from lad_dist.evaluate.strong import strong_augmentation
from lad_dist.evaluate.train import Settings, TrainingSet, rows_of, train
from lad_dist.labeller import FILE as TEACHERS_FILE
from lad_dist.labeller import Labeller
from lad_dist.models.network import build
from lad_dist.recipe import Recipe
from lad_dist.results import Source
from lad_dist.rundir import RunDir
from lad_dist.teachers import Teachers
from lad_dist.trajectories.reader import Buffer


def of_distilled(source: Source) -> bool:
    """Return whether the source is in the distilled set's folder: the distilled images, or their initialisation."""
    return results.base_source(source) in ("distilled", "initial")


def of_everything(source: Source) -> bool:
    """Return whether the source is the whole training set."""
    return source in results.WHOLE


def drawn_as(source: Source) -> str:
    """Return the source whose initialisation, order and augmentation draws (real: also images) this one shares."""
    if of_distilled(source):
        return "distilled"
    return "full" if of_everything(source) else results.base_source(source)


def _chosen(source: Source) -> bool:
    """Return whether the source's images are selected in a feature space, once for all seeds."""
    return drawn_as(source) not in ("distilled", "full", "random", results.TEACHERS)


def check_baseline(source: Source) -> None:
    """Raise RecipeError if a baseline's chooser does not exist."""
    if _chosen(source):
        baselines.chooser(drawn_as(source))


def settings_of(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> Settings:
    """Return the training settings for networks on a source.

    The learning rate is ``evaluate.lr``; by default the learned alpha for the distilled set and its initialisation, and
    ``distill.alpha`` for other real images, which have no learned one.
    """
    learned = load_distilled(recipe, data, run).lr if of_distilled(source) else recipe.distill.alpha
    return settings_with(recipe, source, learned)


def settings_with(recipe: Recipe, source: Source, learned: float) -> Settings:
    """Return the training settings for networks on a source whose learned learning rate is ``learned``."""
    e = recipe.evaluate
    small = Settings.of_a_small_set(recipe, learned if e.lr is None else e.lr)
    if source.endswith("-plain"):
        without = recipe.augment.model_copy(update={"operations": ()})
        small = replace(small, augment=without, augmentation="dsa", cutmix=0.0)
    if source == results.TEACHERS:
        return _by_sgd(small, epochs=0, batch=0, lr=0.0)
    if not of_everything(source):
        return small
    return _by_sgd(
        small,
        epochs=e.full_epochs,
        batch=e.full_batch,
        lr=e.full_lr,
        weight_decay=e.full_weight_decay,
        sampling="class-balanced" if source == "full-balanced" else "shuffled",
        logit_adjustment=e.logit_adjustment if source == "full-logit-adjusted" else 0.0,
    )


def _by_sgd(small: Settings, **own: Any) -> Settings:
    """Return settings by LAD's protocol, with momentum, decay and augmentation of ``small``."""
    kept = {name: getattr(small, name) for name in ("momentum", "weight_decay", "decay", "augment")}
    return Settings(**{**kept, **own})


def description(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> results.Row:
    """Return the row fields shared by all architectures and seeds of a source."""
    settings = settings_of(recipe, data, run, source)
    distilled = load_distilled(recipe, data, run) if of_distilled(source) else None
    row: results.Row = {
        "source": source,
        "split": recipe.evaluate.split,
        "selection": distilled.meta.selection if distilled else "none",
        "method": distilled.meta.method if distilled else source,
        "ipc": None if of_everything(source) or source == results.TEACHERS else recipe.ipc,
        "set_id": _set_id(recipe, run, source),
        "lr_rule": _lr_rule(recipe, source),
        "settings": settings.document() | {"labels": labels_of(source, distilled)},
        "label_adjustment": "adsa" if results.labels_adjusted(source) else "none",
        "keeps": keeps(recipe, data, run, source),
    }
    if _chosen(source):
        row["settings"]["chosen_by"] = baselines.feature_space(recipe, run, _whole(recipe, data, run)).name
    if results.labelled_by_experts(source):
        row["settings"]["labelled_by"] = _teachers(recipe, data, run).name()
    elif results.uses_experts(source):
        row["settings"]["labelled_by"] = _labeller_name(recipe, data, run, source)
    if results.labels_stored(source):
        row["settings"]["stored_views"] = recipe.evaluate.stored_views
        if settings.cutmix:
            row["settings"]["mixed"] = "before labelling"
    return row


def keeps(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> dict[str, int]:
    """Return the bytes that a user of a source keeps: its images, labels and teachers.

    Distilled and starting sets are whitened float32 images; real ones are stored as 8 bits a channel. A hard label is one
    byte (two above 256 classes), a soft one K float32 numbers, a teacher the float32 weights of one network.
    """
    if source == results.TEACHERS:
        return {"images": 0, "labels": 0, "teachers": labeller(recipe, data, run, source).bytes}
    images, small = data.splits.train, not of_everything(source)
    count = recipe.ipc * data.classes if small else len(images)
    pixels = images.channels * images.size**2 * (4 if of_distilled(source) else 1)
    kept = {"images": count * pixels, "labels": count * (1 if data.classes <= 256 else 2), "teachers": 0}
    if results.labelled_online(source):
        if _carries_its_own(recipe, run, source):
            return kept | {"labels": 0, "teachers": labeller(recipe, data, run, source).bytes}
        return kept | {"labels": 0, "teachers": _teachers(recipe, data, run).bytes(recipe.evaluate.teachers)}
    if results.labels_stored(source):
        return kept | {"labels": 4 * count * data.classes * recipe.evaluate.stored_views}
    distilled = load_distilled(recipe, data, run) if of_distilled(source) else None
    return kept | ({"labels": 4 * count * data.classes} if labels_of(source, distilled) != "hard" else {})


def training_set(recipe: Recipe, data: PreparedData, run: RunDir, source: Source, seed: int | str) -> TrainingSet:
    """Return the training set of the network with seed ``seed``.

    Raises:
        DistilledError: the distilled set is missing, damaged or of other data, or does not record its initialisation.
        RunDirError, TrajectoryError: see ``baselines.chosen_real``.
        TrajectoryError: a labelling expert is missing in the run's buffer, or damaged.
    """
    images = _training_set(recipe, data, run, source, seed)
    if recipe.evaluate.augmentation == "randaugment" and not of_everything(source):
        images = replace(images, strong=strong_augmentation(data.whitening, recipe.augment))
    if results.labels_stored(source):
        views = StoredViews(images, labeller(recipe, data, run, source), recipe, seed)
        return replace(images, stored=views)
    if results.labelled_online(source):
        label = labeller(recipe, data, run, source)
        return replace(images, label_views=label, label_logits=lambda x: label.logits(x) / label.temperature)
    return images


def _training_set(recipe: Recipe, data: PreparedData, run: RunDir, source: Source, seed: int | str) -> TrainingSet:
    """``training_set`` without online and stored labels and strong augmentation.

    Where the experts label views, the labels are the classes, which ``evaluate.label_loss`` logits uses a little.
    """
    hard = source.endswith("-hard")
    if results.labelled_online(source) or results.labels_stored(source):
        source, hard = results.base_source(source), True
    if of_distilled(source):
        distilled = load_distilled(recipe, data, run)
        images_SCHH, logits_SK = _images_and_logits(distilled, run, source)
        p_SK = F.softmax(logits_SK, dim=1)
        if results.labels_adjusted(source):
            p_SK, _ = adsa(logits_SK, distilled.labels, data.counts)
        elif hard:
            p_SK = F.one_hot(distilled.labels, data.classes).float()
        return TrainingSet(rows_of(images_SCHH.to(data.device), p_SK.to(data.device)), len(images_SCHH))
    if of_everything(source):
        return everything(data)
    of = drawn_as(source)
    if of == "random":
        picked = baselines.random_real(recipe, data, seed)
    else:
        trained, how = _network_for_features(recipe, data, run), _whole(recipe, data, run)
        picked = baselines.chosen_real(recipe, data, run, of, trained, how)
    chosen = torch.from_numpy(picked)
    if results.labelled_by_experts(source):
        p_SK = _teachers(recipe, data, run).soft_labels(picked).to(data.device)
        if results.labels_adjusted(source):
            p_SK, _ = adsa(p_SK.clamp_min(1e-30).log(), data.splits.train.labels_N[chosen].to(p_SK.device), data.counts)
            p_SK = p_SK.to(data.device)
        return TrainingSet(lambda rows: (data.train.batch(chosen[rows])[0], p_SK[rows.to(p_SK.device)]), len(chosen))
    return TrainingSet(lambda rows: _with_hard_labels(data, chosen[rows]), len(chosen))


def adjusted_by(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> float | None:
    """Return tau of a distilled or starting set's adjusted labels; None for other sources."""
    if not (results.labels_adjusted(source) and of_distilled(source)):
        return None
    distilled = load_distilled(recipe, data, run)
    return adsa(_images_and_logits(distilled, run, source)[1], distilled.labels, data.counts)[1]


def _teachers(recipe: Recipe, data: PreparedData, run: RunDir) -> Teachers:
    """Return the experts that label: the run's own, or those of ``evaluate.teachers_from``.

    Raises RecipeError if these are of other images or another whitening.
    """
    if recipe.evaluate.teachers_from is None:
        return Teachers(recipe, data, Buffer(run.trajectories, recipe.experts_hash()))
    other = RunDir.existing(Path(recipe.evaluate.teachers_from).expanduser())
    theirs = recipe_file.load(other.recipe)
    buffer = Buffer(other.trajectories, theirs.experts_hash())
    where = f"evaluate.teachers_from: {other.root}"
    if not buffer.parts:
        raise RecipeError(f"{where}: holds no experts yet; `lad-dist experts {other.root}` trains them")
    if buffer.meta.data_fingerprint != data.splits.train.fingerprint():
        raise RecipeError(f"{where}: its experts are from other training images; valid: a run on the same ones")
    for field in ("whitening", "zca_eps", "normalize_before_zca"):
        if getattr(theirs.data, field) != getattr(recipe.data, field):
            raise RecipeError(f"{where}: has another data.{field}; valid: a run with the same whitening")
    return Teachers(theirs, data, buffer, other.root.name)


def _carries_its_own(recipe: Recipe, run: RunDir, source: Source) -> bool:
    """Return whether a source's teachers are those that the distilled set carries.

    So it is for an imported set, whose experts are elsewhere; and, for all sources, where distillation began before all
    experts were trained (``buffer.start_after``): the set carries those that made its start.
    """
    e, carried = recipe.evaluate, (run.distilled / TEACHERS_FILE).is_file()
    if e.teachers_from is not None:
        return False
    if results.is_imported(run):
        return of_distilled(source) or source == results.TEACHERS
    return carried and recipe.buffer.start_after is not None and e.teachers is None


def labeller(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> Labeller:
    """Return the teachers of a source. Raises as ``training_set``."""
    if _carries_its_own(recipe, run, source):
        own = load_distilled(recipe, data, run).labeller()
        return Labeller(own.model, own.shape, own.weights[: recipe.evaluate.teachers], own.temperature)
    return _teachers(recipe, data, run).labeller(recipe.evaluate.teachers)


def _labeller_name(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> str:
    if not _carries_its_own(recipe, run, source):
        teachers = _teachers(recipe, data, run)
        return teachers.name(teachers.count(recipe.evaluate.teachers))
    own, sums = labeller(recipe, data, run, source), json.loads((run.distilled / "meta.json").read_text())["sha256"]
    who = f"{len(own.weights)} teachers that came with the set ({sums[TEACHERS_FILE][:8]})"
    return f"mean logits of {who}, temperature {own.temperature:g}"


def _images_and_logits(distilled: DistilledSet, run: RunDir, source: Source) -> tuple[Tensor, Tensor]:
    """Return images (S, C, H, H) and label logits (S, K) of the distilled set, or of what it started from."""
    if results.base_source(source) == "distilled":
        return distilled.images, distilled.label_logits
    if distilled.initial_label_logits is None:
        raise DistilledError(_no_start(distilled, run))
    return distilled.initial_images, distilled.initial_label_logits


def _no_start(distilled: DistilledSet, run: RunDir) -> str:
    if distilled.meta.imported:
        return f"{run.distilled}: is imported, so its starting set is not known"
    return (
        f"{run.distilled}: holds no initial label logits (an older version made it), so the source initial cannot be measured; "
        "distill again with --out, or leave initial out of evaluate.baselines"
    )


def prepare_shared(recipe: Recipe, data: PreparedData, run: RunDir, source: Source) -> None:
    """Compute and store what all seeds of a source share, so that concurrent processes do not each do it.

    Raises as ``training_set``.
    """
    if _chosen(source):
        training_set(recipe, data, run, source, 0)


def everything(data: PreparedData) -> TrainingSet:
    """Return the whole long-tailed set with hard labels."""
    return TrainingSet(lambda rows: _with_hard_labels(data, rows), len(data.train), data.splits.train.labels_N.numpy())


def load_distilled(recipe: Recipe, data: PreparedData, run: RunDir) -> DistilledSet:
    """Load the run's distilled set and check that it is of the recipe's data."""
    distilled = DistilledSet.load(run.distilled)
    if distilled.meta.data_fingerprint != data.splits.train.fingerprint():
        raise DistilledError(
            f"{run.distilled}: was made from other training images than this recipe's; distill again with --out"
        )
    return distilled


def _lr_rule(recipe: Recipe, source: Source) -> str:
    """Return the origin of the learning rate in ``settings_of``."""
    if source == results.TEACHERS:
        return "none"
    if of_everything(source):
        return "evaluate.full_lr"
    if recipe.evaluate.lr is not None:
        return "evaluate.lr"
    return "the learned alpha" if of_distilled(source) else "distill.alpha"


def labels_of(source: Source, distilled: DistilledSet | None) -> str:
    """Return the kind of a source's labels; ``distilled``: the set whose images it has, which may have hard ones."""
    if results.labelled_online(source):
        return "teacher"
    if results.labels_stored(source):
        return "stored"
    if results.labels_adjusted(source):
        return "soft, adjusted by ADSA"
    if source in ("distilled", "distilled-plain", "initial"):
        return "hard" if distilled is not None and distilled.is_hard else "soft"
    return "soft" if results.labelled_by_experts(source) else "hard"


def _set_id(recipe: Recipe, run: RunDir, source: Source) -> str:
    """Return the training set's id: a distilled or starting set's checksum, or the name of the real set."""
    if results.base_source(source) == "initial":
        distilled = DistilledSet.load(run.distilled)
        if distilled.initial_label_logits is None:
            raise DistilledError(_no_start(distilled, run))
        tensors = (distilled.initial_images, distilled.initial_label_logits)
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()
    if of_distilled(source):
        return str(json.loads((run.distilled / "meta.json").read_text())["sha256"]["tensors.safetensors"])
    return f"{drawn_as(source)}, seed {recipe.seed}, {recipe.experts_hash()[:16]}"


def _whole(recipe: Recipe, data: PreparedData, run: RunDir) -> dict[str, Any]:
    """Return the settings of a network on the whole set, in whose features images are chosen if there is no expert."""
    return settings_of(recipe, data, run, "full").document()


def _network_for_features(recipe: Recipe, data: PreparedData, run: RunDir) -> Callable[[], nn.Module]:
    def trained() -> nn.Module:
        shape, purpose = data.splits.train.shape, ("evaluate", "features")
        network = build(recipe.model, *shape, seed=recipe.seed, purpose=purpose).to(data.device)
        settings = settings_of(recipe, data, run, "full")
        train(network, everything(data), settings, recipe.seed, ("features",), lambda: None)
        return network

    return trained


def _with_hard_labels(data: PreparedData, rows_B: Tensor) -> tuple[Tensor, Tensor]:
    images_BCHH, labels_B = data.train.batch(rows_B)
    return images_BCHH, F.one_hot(labels_B, data.classes).to(images_BCHH.dtype)
