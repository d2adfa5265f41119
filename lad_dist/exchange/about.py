"""Metadata of an exported folder, lad_dist.json: the set's origin and the meaning of its numbers."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, Literal

from lad_dist import methods
from lad_dist.distilled import DistilledSet
from lad_dist.labeller import FILE as TEACHERS

Form = Literal["pt", "png", "folder", "parquet", "hf"]
ABOUT = "lad_dist.json"  # marks a folder as an export, which --force may replace
WHITENING = "whitening.safetensors"
CARRIERS = ("folder", "parquet", "hf")  # forms that hold whitening and teachers as files
FORMAT = "lad-dist distilled set 1"
_LONGEST_NAME = 60
_OF_MACHINE = ("root", "train", "test", "download")  # fields of a recipe's data
_PATH = re.compile(r"[/\\~$]")  # in text of a recipe, whose other values are names and ``module:attribute``

_OF_DATASET = {
    "digits": "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998",
    "fashion-mnist": "Xiao et al., Fashion-MNIST, 2017, arXiv:1708.07747",
    "cifar10": "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    "cifar100": "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    "tiny-imagenet": "Le and Yang, Tiny ImageNet Visual Recognition Challenge, Stanford CS 231N, 2015",
}


def about(distilled: DistilledSet, form: Form) -> dict[str, Any]:
    """Return the content of lad_dist.json: counts, shapes, learning rate, whitening, provenance, citations."""
    meta, whitening = distilled.meta, distilled.whitening
    how: dict[str, Any] = {"kind": whitening.kind, "eps": whitening.eps}
    if whitening.kind == "standardize":
        how |= {"mean": whitening.mean.tolist(), "std": whitening.inverse.tolist()}
    if form in CARRIERS:
        how["file"] = WHITENING
    carried = distilled.teachers if form in CARRIERS else None
    return {
        "format": FORMAT,
        "form": form,
        "dataset": meta.dataset,
        "method": meta.method,
        "selection": meta.selection,
        "iteration": meta.iteration,
        "ipc": meta.ipc,
        "images": len(distilled),
        "shape": list(distilled.images.shape[1:]),
        "class_names": list(meta.class_names),
        "training_images_per_class": list(meta.counts),
        "imbalance_factor": imbalance_factor(distilled),
        "lr": meta.lr,
        "labels": "hard" if distilled.is_hard else "soft",
        "whitening": how,
        "teachers": None
        if carried is None
        else {"file": TEACHERS, "count": len(carried.weights), "temperature": carried.temperature},
        "data_fingerprint": meta.data_fingerprint,
        "recipe_hash": meta.recipe_hash,
        "recipe": public_recipe(meta.recipe),
        "versions": meta.versions,
        "cite": citations(distilled),
    }


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe without what is of the machine alone: the folders of its data, and any other path."""
    clean: dict[str, Any] = {}
    for name, value in recipe.items():
        if isinstance(value, dict):
            clean[name] = public_recipe(value)
        elif name not in _OF_MACHINE and not (isinstance(value, str) and _PATH.search(value)):
            clean[name] = value
    return clean


def imbalance_factor(distilled: DistilledSet) -> float | None:
    """Return the ratio of the largest to the smallest class's training images; None where a class has none."""
    counts = distilled.meta.counts
    return max(counts) / min(counts) if min(counts, default=0) else None


def citations(distilled: DistilledSet) -> list[str]:
    """Return the citations for publications that use the set: method, then data set. Empty where neither is known."""
    method, dataset = distilled.meta.method, distilled.meta.dataset.split("/")[0]
    return [*methods.cited(method), *([_OF_DATASET[dataset]] if dataset in _OF_DATASET else [])]


def as_json(document: dict[str, Any]) -> str:
    """Format a document as JSON, for files and for the Parquet schema."""
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def class_folders(class_names: tuple[str, ...]) -> list[str]:
    """Return a portable folder name per class, like ``003-Angora_cat``; sorting them by name keeps the class order."""
    width = max(3, len(str(len(class_names) - 1)))
    plain = (unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode() for name in class_names)
    clean = (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:_LONGEST_NAME] for name in plain)
    return [f"{c:0{width}d}-{name}".rstrip("-") for c, name in enumerate(clean)]
