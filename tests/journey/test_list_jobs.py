"""The recipes of ImageNet-LT and Places-LT, from their lists to a report, on a small tree of the same form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lad_dist import recipe_file
from lad_dist.catalog import find_job
from lad_dist.distilled import DistilledSet
from lad_dist.pipeline import open_pipeline
from lad_dist.profile import Profile

COUNTS = (40, 16, 6, 5)
CHEAP = [
    "model.width=4", "model.depth=2", "data.image_size=16", "ipc=2",
    "experts.count=1", "experts.epochs=3", "experts.classifier_epochs=2", "experts.batch=16",
    "distill.iterations=2", "distill.batch=4", "distill.student_steps=2", "distill.student_steps_classifier=2",
    "distill.start_epoch_min=0", "distill.start_epoch_max=2", "distill.window_epochs=1", "distill.lr_images=0.1",
    "distill.lr_labels=0.1",
    "evaluate.epochs=2", "evaluate.seeds=1", "evaluate.full_epochs=1", "evaluate.batch=8",
]  # fmt: skip


def write_tree(root: Path, names: dict[str, str]) -> None:
    """Pictures of many sizes, one of them grey, in nested folders, and the lists that name them."""
    draw = np.random.default_rng(0)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for label, count in enumerate(COUNTS):
        for i in range(count + 5):
            split = "train" if i < count else "test"
            name = names[split].format(label=label, i=i)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shape = (int(draw.integers(18, 60)), int(draw.integers(18, 60)))
            pixels = draw.integers(0, 60, (*shape, 3)) + 45 * label
            picture = Image.fromarray(pixels.astype(np.uint8))
            (picture.convert("L") if i == 1 else picture).save(root / name, "JPEG")
            lines[split].append(f"{name} {label}\n")
    for split, text in lines.items():
        draw.shuffle(text)
        (root / names[f"{split} list"]).write_text("".join(text))


@pytest.mark.parametrize(("job", "names"), [
    ("imagenet-lt-f256-ipc10", {
        "train": "train/n0{label}/n0{label}_{i}.JPEG", "test": "val/ILSVRC2012_val_{label}{i}.JPEG",
        "train list": "ImageNet_LT_train.txt", "test list": "ImageNet_LT_test.txt",
    }),
    ("places-lt-f996-ipc10", {
        "train": "data_256/a/place{label}/{i:08}.jpg", "test": "test_256/Places365_test_{label}{i:08}.jpg",
        "train list": "Places_LT_train.txt", "test list": "Places_LT_test.txt",
    }),
])  # fmt: skip
def test_from_lists_to_a_report(tmp_path, silent, job, names):
    write_tree(tmp_path / "data", names)
    recipe = recipe_file.load(find_job(job).recipe, [*CHEAP, f"data.root={tmp_path / 'data'}"])
    pipeline = open_pipeline(recipe, tmp_path / "run", Profile(fleet="off"), None, torch.device("cpu"), silent)
    pipeline.all()
    distilled = DistilledSet.load(tmp_path / "run")
    assert distilled.meta.counts == COUNTS and distilled.images.shape == (2 * len(COUNTS), 3, 16, 16)
    rows = json.loads((tmp_path / "run/evaluation/results.json").read_text())["rows"]
    assert {row["source"] for row in rows} == {"distilled", "initial", "random-soft", "random", "full"}
    assert all(row["imbalance_factor"] is None and row["counts"] == list(COUNTS) for row in rows)
    assert "natural imbalance" in (tmp_path / "run/report/index.html").read_text()
