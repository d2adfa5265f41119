"""Starter recipe of ``lad-dist init`` for a folder of images, with a comment on each choice.

Sizes follow from the data; the method's hyperparameters are those of jobs/digits-lt.yaml and
jobs/fashion-mnist-lt.yaml, which were tuned on held-out images of those two data sets.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from pathlib import Path

from lad_dist.data.survey import Survey

_SIDES = (
    8,
    12,
    16,
    24,
    32,
)  # sides in pixels that images are resized to; twice the side costs four times as much
_MOST_RESIZED = 64  # images of one common side up to this are not resized
_EXPERT_STEPS = 300  # approximate, of the representation stage
TEST_FRACTION = 0.2


def name_of(folder: Path) -> str:
    """Return the folder's name in characters allowed in a recipe's name."""
    plain = unicodedata.normalize("NFKD", folder.absolute().name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._").lower() or "my-data"


def recipe_text(found: Survey, name: str) -> str:
    """Return the text of the recipe file."""
    train, side = _training_counts(found), _side(found)
    total, largest = sum(train), max(train)
    ipc = 10 if sorted(train)[len(train) // 2] >= 50 else (5 if sorted(train)[len(train) // 2] >= 15 else 2)
    batch = max(8, min(64, total // 4))
    epochs = max(30, min(100, math.ceil(_EXPERT_STEPS / math.ceil(total / batch))))
    depth = 3 if side >= 16 else 2
    lines = [
        f"# {name}: {total} training images of {len(train)} classes, {largest} down to {min(train)} each.",
        f"# Purpose:   written by `lad-dist init` for {_one_line(str(found.root))}; every line may be changed (docs/recipes.md).",
        f"# Command:   lad-dist run {name}.yaml --quick      a short trial, within ten minutes on two cores",
        f"#            lad-dist plan {name}.yaml             what the whole run costs",
        f"#            lad-dist run {name}.yaml",
        f"name: {_quoted(name)}",
        "method: lad-fr".ljust(36) + "# lad, datm and mtt match trajectories, at many times the cost",
        f"ipc: {ipc}".ljust(36) + "# synthetic images per class",
        "data:",
        "  dataset: image-folder",
        f"  root: {_quoted(str(found.root.absolute()))}",
        *_splits(found),
        "  imbalance: natural".ljust(36) + "# class sizes unchanged; exponential cuts a longer tail",
        *_pixels(found, side),
        "  whitening: standardize".ljust(36) + "# zca is the published choice; it suits a thousand images and more",
        "  # validation_per_class: 2         # hold images out to choose settings on, with evaluate.split: validation",
        "model:",
        "  width: 32".ljust(36) + "# 128 as published, 16 times the work",
        f"  depth: {depth}",
        "augment:",
        "  operations: [color, crop, cutout, flip, scale, rotate]",
        "  # leave flip out where a mirrored image is not of its class (letters, digits, arrows); color where colour tells",
        "experts:\n  count: 4",
        f"  epochs: {epochs}".ljust(36) + f"# about {epochs * math.ceil(total / batch)} steps",
        "  classifier_epochs: 20",
        f"  batch: {batch}",
        "  lr: 0.05",
        "  classifier_lr: 0.05",
        "distill:",
        "  iterations: 400".ljust(36) + "# more if the regression loss still falls",
        f"  batch: {min(100, len(train) * ipc)}",
        "  optimizer: adam",
        "  schedule: cosine",
        "  lr_images: 0.005".ljust(36) + "# larger where real images are far from enough (0.03 on CIFAR-10)",
        "  momentum_images: 0.5",
        "  lr_labels: 0.02",
        "  momentum_labels: 0.5",
        "  alpha: 0.05",
        "evaluate:",
        "  seeds: 5",
        "  epochs: 600",
        "  lr: 0.05",
        f"  full_epochs: {epochs}",
        "  full_lr: 0.05",
        f"  full_batch: {batch}",
    ]
    return "\n".join(lines) + "\n"


def said(found: Survey) -> list[str]:
    """Summarize the survey in a few lines."""
    train = _training_counts(found)
    sides = (
        f"{min(found.sides)} to {max(found.sides)} pixels" if len(set(found.sides)) > 1 else f"{found.sides[0]} pixels"
    )
    colours = "grey and colour" if found.grey and found.colour else ("grey" if found.grey else "colour")
    taken = f"{TEST_FRACTION:.0%} of each class's images are taken out for testing (data.test_fraction)"
    return [
        f"{len(train)} classes, {sum(train)} training images, {max(train)} to {min(train)} of a class",
        f"shorter sides of {sides}, {'square' if found.square else 'not all square'}, {colours}",
        f"test images: folder {found.test}" if found.test is not None else f"no test folder: {taken}",
    ]


def _training_counts(found: Survey) -> tuple[int, ...]:
    """Return the training images per class."""
    if found.test is not None:
        return found.counts
    return tuple(n - min(max(1, round(n * TEST_FRACTION)), n - 1) for n in found.counts)


def _splits(found: Survey) -> list[str]:
    lines = []
    if found.train != "train":
        lines.append(f"  train: {_quoted(found.train)}".ljust(36) + "# where the class folders are, below root")
    if found.test is None:
        lines.append(
            f"  test_fraction: {TEST_FRACTION}".ljust(36) + "# no test folder: this share of each class is the test set"
        )
    elif found.test not in ("test", "val"):
        lines.append(f"  test: {_quoted(found.test)}")
    return lines


def _side(found: Survey) -> int:
    if found.one_size and found.typical_side <= _MOST_RESIZED:
        return max(4, found.typical_side)
    return max((side for side in _SIDES if side <= found.typical_side), default=_SIDES[0])


def _pixels(found: Survey, side: int) -> list[str]:
    lines = [f"  image_size: {side}".ljust(36) + f"# sides are {min(found.sides)} to {max(found.sides)} pixels"]
    lines += [
        "  fit: center-crop".ljust(36) + ("# not all images are square" if not found.square else "# squares stay whole")
    ]
    why = "grey and colour images: all are read as colour" if found.grey and found.colour else "as in the images"
    return [*lines, f"  channels: {3 if found.colour else 1}".ljust(36) + f"# {why}"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
