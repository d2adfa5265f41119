"""Install an imported set in a job's run folder, where ``lad-dist evaluate`` treats it like one distilled there.

S images, K classes, C channels, H side.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from lad_dist import __version__, results
from lad_dist.data.datasets import ImageSet
from lad_dist.data.prepare import PreparedData
from lad_dist.data.whitening import Kind
from lad_dist.distilled import IMPORTED, DistilledMeta, DistilledSet
from lad_dist.errors import DistilledError
from lad_dist.exchange.incoming import Incoming
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir

_OF_THE_SET = ("distilled", "initial", results.TEACHERS)  # sources that another set measures anew


@dataclass(frozen=True)
class Installed:
    """Statistics of an imported set, for display."""

    distilled: DistilledSet
    largest_is_class: int  # images whose largest label value is at their class
    inside: float  # fraction of values in [0, 1] after undoing the whitening


def install(
    incoming: Incoming,
    recipe: Recipe,
    data: PreparedData,
    run: RunDir,
    preprocessing: Kind | None = None,
    force: bool = False,
) -> Installed:
    """Check a set against the recipe's data, and publish it as the run's distilled set.

    Real images get the recipe's whitening, so the set's images must be in the same space: they are assumed to be
    whitened that way or, with ``preprocessing`` none, to be pixels in [0, 1], which are whitened here. ``force``
    replaces an existing distilled set and deletes its results.

    Raises:
        DistilledError: the set does not fit the recipe's data, or the run already has one.
        StorageError: it cannot be written.
    """
    refuse_second(run, force)
    images = data.splits.train
    _check_images(incoming, images)
    _check_origin(incoming, recipe, images)
    classes_S = _classes(incoming, recipe, images.num_classes)
    images_SCHH = _whitened(incoming, recipe, data, preprocessing)
    logits_SK = incoming.logits(images.num_classes)
    said = incoming.about or {}
    meta = DistilledMeta(
        method=IMPORTED,
        dataset=images.name,
        ipc=recipe.ipc,
        class_names=images.class_names,
        counts=images.counts,
        lr=incoming.lr,
        iteration=said.get("iteration", 0),
        selection=said.get("selection", IMPORTED),
        recipe_hash=recipe.recipe_hash(),
        experts_hash=IMPORTED,  # the run does not have the experts it was matched to
        data_fingerprint=images.fingerprint(),
        recipe=recipe.model_dump(mode="json"),
        versions={
            "imported from": incoming.source,
            **({"method there": said["method"]} if said else {}),
            "lad_dist": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    teachers = incoming.teachers
    if teachers is not None and teachers.shape != images.shape:
        shape = "x".join(map(str, teachers.shape))
        raise DistilledError(
            f"{incoming.where}: its teachers are of {shape} (channels, side, classes), not of the recipe's data"
        )
    if teachers is not None:
        teachers.check()
    order_S = classes_S.argsort(stable=True)  # class after class, as everything that takes a set up assumes
    images_SCHH, logits_SK, classes_S = images_SCHH[order_S], logits_SK[order_S], classes_S[order_S]
    whole = DistilledSet(images_SCHH, logits_SK, classes_S, meta, data.whitening.to("cpu"), teachers=teachers)
    whole.validate(str(incoming.where))
    with run.publish_folder(run.distilled) as temporary:
        whole.write(temporary)
    if force:
        results.forget(run.results, lambda row: results.base_source(row["source"]) in _OF_THE_SET)
    pictures = whole.whitening.invert(images_SCHH)
    inside = float(((pictures >= -1e-4) & (pictures <= 1 + 1e-4)).float().mean())
    return Installed(whole, int((logits_SK.argmax(1) == classes_S).sum()), inside)


def refuse_second(run: RunDir, force: bool) -> None:
    """Raise DistilledError where the run has a distilled set, unless ``force`` is given."""
    if run.distilled.exists() and not force:
        raise DistilledError(
            f"{run.distilled}: already exists and is not replaced; choose another run folder with --out, or --force"
        )


def _check_images(incoming: Incoming, images: ImageSet) -> None:
    there, here = tuple(incoming.images_SCHH.shape[1:]), (images.channels, images.size, images.size)
    if there != here:
        raise DistilledError(
            f"{incoming.where}: its images are {_by(there)} where the recipe's data ({images.name}) are {_by(here)}; valid: a job "
            "with the data that the set was distilled from (data.dataset, data.channels, data.image_size)"
        )
    classes = images.num_classes
    if incoming.kind != "indices" and incoming.labels.shape[1] != classes:
        raise DistilledError(
            f"{incoming.labels_from}: labels are of {incoming.labels.shape[1]} classes where the recipe's data ({images.name}) "
            f"have {classes}; valid: shape ({len(incoming.images_SCHH)}, {classes})"
        )
    indices = incoming.labels if incoming.kind == "indices" else incoming.classes_S
    if indices is not None and (int(indices.min()) < 0 or int(indices.max()) >= classes):
        raise DistilledError(
            f"{incoming.labels_from}: classes are {int(indices.min())} to {int(indices.max())} where the recipe's data "
            f"({images.name}) have {classes}; valid: 0 to {classes - 1}"
        )


def _check_origin(incoming: Incoming, recipe: Recipe, images: ImageSet) -> None:
    """Check the metadata of our own exports against the recipe. Raises DistilledError."""
    said = incoming.about
    if said is None:
        return
    there, here = said["recipe"].get("data", {}), recipe.data.model_dump(mode="json")
    for field in ("zca_eps", "normalize_before_zca") if recipe.data.whitening == "zca" else ():
        if there.get(field, here[field]) != here[field]:
            raise DistilledError(
                f"{incoming.where}: was whitened with data.{field} {there[field]} where the recipe has {here[field]}; valid: "
                f"--set data.{field}={there[field]}"
            )
    if said["whitening"]["kind"] != recipe.data.whitening:
        raise DistilledError(
            f"{incoming.where}: was whitened by {said['whitening']['kind']} where the recipe's data.whitening is "
            f"{recipe.data.whitening}; valid: --set data.whitening={said['whitening']['kind']}"
        )
    if said["data_fingerprint"] != images.fingerprint():
        raise DistilledError(
            f"{incoming.where}: was distilled from other training images than this recipe's, so its whitening differs; "
            "valid: the same data, imbalance and order"
        )


def _classes(incoming: Incoming, recipe: Recipe, classes: int) -> Tensor:
    """Return each image's class, int64 (S,): from the file, else class after class, as MTT, DATM and LAD order them.

    Raises DistilledError where a class does not have ``ipc`` images.
    """
    count = len(incoming.images_SCHH)
    if count != classes * recipe.ipc:
        hint = (
            f"--set ipc={count // classes}"
            if count % classes == 0
            else f"a multiple of {classes}, equally many per class"
        )
        raise DistilledError(
            f"{incoming.where}: has {count} images where {classes} classes with ipc {recipe.ipc} make {classes * recipe.ipc}; "
            f"valid: {hint}"
        )
    given = incoming.labels if incoming.kind == "indices" else incoming.classes_S
    if given is None:
        return torch.arange(classes).repeat_interleave(recipe.ipc)
    for c, has in enumerate(torch.bincount(given, minlength=classes).tolist()):
        if has != recipe.ipc:
            raise DistilledError(
                f"{incoming.labels_from}: class {c} has {has} images; valid: {recipe.ipc} of each class (ipc)"
            )
    return given


def _whitened(incoming: Incoming, recipe: Recipe, data: PreparedData, preprocessing: Kind | None) -> Tensor:
    """Return the images in the recipe's whitened space, (S, C, H, H). Raises DistilledError."""
    kind, images_SCHH = recipe.data.whitening, incoming.images_SCHH
    low, high = float(images_SCHH.min()), float(images_SCHH.max())
    if preprocessing not in (None, kind) and incoming.about is not None:
        raise DistilledError(
            f"{incoming.where}: says itself how it was whitened ({incoming.about['whitening']['kind']}); --preprocessing is "
            "for sets of other code"
        )
    if preprocessing not in (None, "none", kind):
        raise DistilledError(
            f"{incoming.where}: --preprocessing {preprocessing} where the recipe's data.whitening is {kind}, which real images "
            f"will go through; valid: --set data.whitening={preprocessing}"
        )
    if preprocessing == "none" and kind != "none" and incoming.about is None:
        if low < 0 or high > 1:
            raise DistilledError(
                f"{incoming.where}: --preprocessing none where its values are {low:.4g} to {high:.4g}; valid: pixels in [0, 1], "
                f"or --preprocessing {kind}"
            )
        return data.whitening.to("cpu").apply_float(images_SCHH)
    if preprocessing is None and kind != "none" and incoming.about is None and low >= 0 and high <= 1:
        raise DistilledError(
            f"{incoming.where}: all its values lie in [0, 1], as pixels that are not whitened do; say --preprocessing none if they "
            f"are pixels, or --preprocessing {kind} if they are whitened"
        )
    return images_SCHH


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
