"""PNG folders in torchvision's ImageFolder layout with soft labels; grids alone.

images/000-airplane/00000.png    one folder per class, in label order; whitening undone
labels.csv                       file, class index, and a column per class with the probability
lad_dist.json                    learning rate, whitening, provenance
whitening.safetensors            the whitening, as read by data/whitening.py
teachers.safetensors             the teachers, if the set has them, as read by labeller.py
README.md                        the files, and the loss of precision in PNG
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from lad_dist.distilled import DistilledSet
from lad_dist.exchange.about import WHITENING, class_folders
from lad_dist.exchange.pictures import Progress, pixels, png, png_grid

PRECISION = (
    "The images were learned as whitened float32 values. These PNG files hold them with the whitening undone, clipped to "
    "[0, 1] and rounded to 8 bits, so a network trained on them learns from slightly other images than the set's own, and "
    "where learned values lay outside [0, 1] from clearly other ones. The exact values are in the formats pt, parquet and hf."
)
_README = """# {title}

{count} images distilled from {dataset}, {ipc} per class, by lad-dist.

- `images/`: one folder per class, named by the label and the class; `torchvision.datasets.ImageFolder("images")` reads it.
- `labels.csv`: for every image its file, its class, and a column per class with the soft label's probabilities.
- `lad_dist.json`: the learning rate to train with (`lr`), the whitening, and how the set was made.
- `whitening.safetensors`: the whitening, fitted on the training images: real images go through it before a network sees them.
{teachers}
{precision}
"""


_TEACHERS = """- `teachers.safetensors`: networks that label augmented batches (`lad_dist.labeller.Labeller.load`).
"""


def write_folder(distilled: DistilledSet, folder: Path, on_images: Progress) -> None:
    """Write all files except lad_dist.json into ``folder``."""
    meta, names = distilled.meta, class_folders(distilled.meta.class_names)
    pictures_SHHC, labels = pixels(distilled, on_images), distilled.labels.tolist()
    width = max(5, len(str(len(labels) - 1)))
    files = [f"images/{names[c]}/{i:0{width}d}.png" for i, c in enumerate(labels)]
    for name in names:  # classes without images get a folder too
        (folder / "images" / name).mkdir(parents=True)
    for file, picture in zip(files, pictures_SHHC, strict=True):
        (folder / file).write_bytes(png(picture))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as target:
        table = csv.writer(target)
        table.writerow(["file", "class_index", *(f"{c}_{name}" for c, name in enumerate(meta.class_names))])
        for file, c, p_K in zip(files, labels, distilled.soft_labels.numpy(), strict=True):
            table.writerow([file, c, *(np.format_float_positional(p, unique=True, trim="-") for p in p_K)])
    distilled.whitening.to("cpu").save(folder / WHITENING)
    text = _README.format(
        title=f"Distilled {meta.dataset.split('/')[0]}",
        count=len(labels),
        dataset=meta.dataset,
        ipc=meta.ipc,
        precision=PRECISION,
        teachers=_TEACHERS if distilled.teachers is not None else "",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def write_grids(distilled: DistilledSet, folder: Path, on_images: Progress) -> None:
    """Write all files except lad_dist.json: grid.png, one row per class, and classes/CLASS.png, each row alone."""
    pictures_SHHC, names = pixels(distilled, on_images), class_folders(distilled.meta.class_names)
    rows = [pictures_SHHC[distilled.labels == c] for c in range(len(names))]
    (folder / "grid.png").write_bytes(png_grid(rows))
    (folder / "classes").mkdir()
    for name, row in zip(names, rows, strict=True):
        if len(row):
            (folder / "classes" / f"{name}.png").write_bytes(png_grid([row]))
