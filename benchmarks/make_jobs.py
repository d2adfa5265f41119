"""Write jobs/*.yaml for every cell of the published tables and beyond them: ``python benchmarks/make_jobs.py [FOLDER]``.

Beyond: imbalance factors up to 1000 on CIFAR-10-LT and Fashion-MNIST-LT (whose
jobs/fashion-mnist-lt-matching.yaml is written by hand and
read here), ImageNet-LT and Places-LT.

Results: Zhao et al., "Distilling Long-tailed Datasets", arXiv 2408.14506. Settings: the authors' configurations,
github.com/ichbill/LTDD, folder configs, as of commit ec8a4b3 (cifar10-lt-f200-ipc20 was changed there last; before, it repeated
factor 100's settings). tests/golden/official_configs.csv has their numbers. The files are committed; a test compares them
with what this script writes, so change the numbers here and run it again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

PAPER = "arXiv 2408.14506"
COST = "published for CIFAR-10-LT, factor 100, IPC 1, one GPU: experts 31,388 s, distillation 30,141 s"
NOT_MEASURED = "This recipe's own cost is not measured yet."


@dataclass(frozen=True)
class Cell:
    """One recipe. ``lambdas`` and ``steps`` are (representation, classifier); ``start`` is the first start epoch and
    the bound below which start epochs lie; ``growth`` is (the bound at iteration 0, iterations over which it grows)."""

    dataset: str
    factor: int
    ipc: int
    lad: float  # published accuracy, percent
    lambdas: tuple[float, float]
    lr_images: int
    start: tuple[int, int]
    steps: tuple[int, int]
    growth: tuple[int, int] | None = None
    random: float | None = None
    full: float | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.dataset}-lt-f{self.factor}-ipc{self.ipc}"


TITLES = {"cifar10": "CIFAR-10-LT", "cifar100": "CIFAR-100-LT", "tiny-imagenet": "Tiny-ImageNet-LT"}
CANNOT_START = (
    "As published, the classifier phase draws start epochs from an empty range and the code stops at once.",
    "Here they start at epoch 0, as in the configurations that run.",
)
UNNAMED = "The configuration reads factor 100's data and experts; its other settings are taken for factor 50 here."


def cifar10() -> list[Cell]:
    """Factors 10, 50, 100 and 200; IPC 10, 20 and 50."""
    random = {10: (32.5, 39.6, 51.9), 50: (33.2, 42.0, 51.6), 100: (34.4, 41.4, 52.6), 200: (32.5, 42.2, 49.9)}
    lad = {10: (58.1, 63.0, 70.5), 50: (54.2, 59.4, 65.8), 100: (53.4, 58.2, 64.0), 200: (52.2, 56.6, 62.3)}
    full = {10: 76.7, 50: 69.8, 100: 66.2, 200: 62.1}
    lambdas = {
        10: ((1.0, 0.2), (1.0, 0.2), (1.0, 0.2)),
        50: ((1.0, 0.5), (0.5, 1.0), (0.5, 1.0)),
        100: ((0.5, 1.0), (0.5, 1.0), (1.0, 0.5)),
        200: ((0.1, 1.0), (0.1, 1.0), (0.1, 1.0)),
    }
    lr_images = {10: (100, 100, 1000), 50: (100, 100, 100), 100: (100, 100, 1000), 200: (100, 1000, 1000)}
    bound = {10: (20, 40, 40), 50: (20, 20, 40), 100: (20, 20, 40), 200: (20, 40, 40)}
    # Where the configuration switches "Sequential_Generation" on; elsewhere the bound is fixed.
    growth = {(10, 10): (10, 1000), (50, 20): (10, 2000), (50, 50): (20, 2000), (100, 20): (10, 2000)}
    notes = {
        (10, 10): CANNOT_START,
        (50, 50): (UNNAMED, *CANNOT_START),
        (200, 50): ("The configuration says ipc: 20; the table's 50 is taken here.",),
    }
    return [
        Cell(
            "cifar10",
            factor,
            ipc,
            lad=lad[factor][i],
            lambdas=lambdas[factor][i],
            lr_images=lr_images[factor][i],
            start=(0, bound[factor][i]),
            steps=(80, 60) if (factor, ipc) == (100, 50) else (80, 80),
            growth=growth.get((factor, ipc)),
            random=random[factor][i],
            full=full[factor],
            notes=notes.get((factor, ipc), ()),
        )
        for factor in lad
        for i, ipc in enumerate((10, 20, 50))
    ]


def cifar100() -> list[Cell]:
    """Factors 10, 20 and 50; IPC 10, 20 and 50."""
    lad = {10: (31.5, 37.5, 40.0), 20: (31.4, 35.1, 37.0), 50: (29.8, 31.9, 33.2)}
    neighbour = ("No configuration is published for factor 50; the settings are factor 20's.",)
    return [
        Cell(
            "cifar100",
            factor,
            ipc,
            lad=lad[factor][i],
            lambdas=(1.0, 0.1),
            lr_images=1000,
            start=(30, 50) if (factor, ipc) == (10, 10) else (20, 70),
            steps=(40, 20),
            notes=neighbour if factor == 50 else (),
        )
        for factor in lad
        for i, ipc in enumerate((10, 20, 50))
    ]


def tiny_imagenet() -> list[Cell]:
    """Factors 10, 20 and 100; IPC 10 and 20."""
    lad = {10: (26.0, 27.9), 20: (23.6, 25.5), 100: (17.1, 18.0)}
    neighbour = ("No configuration is published for factor 100; the settings are factor 20's.",)
    return [
        Cell(
            "tiny-imagenet",
            factor,
            ipc,
            lad=lad[factor][i],
            lambdas=(1.0, 0.1),
            lr_images=100,
            start=(10, 50),
            steps=(25, 25) if ipc == 10 else (20, 20),
            notes=neighbour if factor == 100 else (),
        )
        for factor in lad
        for i, ipc in enumerate((10, 20))
    ]


def header(cell: Cell) -> str:
    """What the file is for, how to start it, what it costs and what comes out."""
    others = [f"random real images {cell.random} %"] if cell.random is not None else []
    others += [f"the whole long-tailed set {cell.full} %"] if cell.full is not None else []
    lines = [
        f"{TITLES[cell.dataset]}, imbalance factor {cell.factor}, {cell.ipc} images per class.",
        f"Purpose:   this cell of the published table ({PAPER}), by LAD.",
        f"Command:   lad-dist run {cell.name}",
        f"Cost:      {COST}.",
        f"           {NOT_MEASURED}",
        f"Result:    {cell.lad} % overall (published, chosen on the test set; here the last iteration is reported).",
        *([f"           Published beside it: {', '.join(others)}."] if others else []),
        "Settings:  the authors' configuration (github.com/ichbill/LTDD). It names several GPUs, over which its",
        "           gradients come out smaller than on one device; what that did to its results is not known.",
        *(f"           {note}" for note in cell.notes),
    ]
    return "".join(f"# {line}\n" for line in lines)


def document(cell: Cell) -> str:
    """A whole recipe file of a published cell."""
    large = cell.dataset != "cifar10"
    lines = [f"name: {cell.name}", "method: lad", f"ipc: {cell.ipc}", "data:", f"  dataset: {cell.dataset}"]
    lines += [f"  imbalance_factor: {cell.factor}"]
    if cell.dataset == "cifar100":
        lines += ["  normalize_before_zca: published    # CIFAR-10's recipes whiten pixels as they are, as published"]
    if cell.dataset == "tiny-imagenet":
        lines += ["model:", "  depth: 4                           # 64x64 images: one block more than for 32x32"]
    return header(cell) + "\n".join(lines) + "\n" + _EXPERTS + distill_section(cell, large) + _EVALUATE


_EXPERTS = """\
experts:
  count: 100
  epochs: 100
  classifier_epochs: 10
"""
_EVALUATE = """\
evaluate:
  epochs: 1000                       # no lr here: networks train with the learned alpha, as published
"""


def distill_section(cell: Cell, large: bool) -> str:
    """The ``distill`` section. ``large``: with what CIFAR-100 and Tiny-ImageNet share, in place of CIFAR-10's."""
    lines = ["distill:", "  iterations: 10000"]
    lines += [f"  batch: {1000 if cell.dataset == 'cifar100' else 500}"]
    lines += [f"  student_steps: {cell.steps[0]}", f"  student_steps_classifier: {cell.steps[1]}"]
    lines += [f"  lambda_representation: {cell.lambdas[0]}", f"  lambda_classifier: {cell.lambdas[1]}"]
    if cell.start[0]:
        lines += [f"  start_epoch_min: {cell.start[0]}"]
    lines += [f"  start_epoch_max: {cell.start[1]}"]
    if cell.growth:
        lines += [f"  start_epoch_max_first: {cell.growth[0]}          # the bound on start epochs grows from here"]
        lines += [f"  start_epoch_growth: {cell.growth[1]}"]
    lines += [f"  lr_images: {cell.lr_images}", f"  lr_labels: {10 if large else 2}"]
    if cell.dataset == "tiny-imagenet":
        lines += ["  lr_alpha: 1.0e-4"]
    if large:
        lines += [
            "  initial: real-random               # published so; CIFAR-10 starts from correctly classified images",
            "  initial_labels: one-expert         # likewise: wrong ones included",
        ]
    return "\n".join(lines) + "\n"


def cifar10_jpeg(cell: Cell) -> tuple[str, str]:
    """The CIFAR-10 cell on images that went through JPEG: (name, text)."""
    name = "cifar10-jpeg-lt-f100-ipc10"
    text = f"""\
# CIFAR-10 re-encoded as JPEG, imbalance factor 100, 10 images per class. NOT the published data: label its numbers so.
# Purpose:   the published cell's settings where CIFAR-10 is at hand as Parquet files of JPEG images.
# Command:   lad-dist run {name} --set data.root=FOLDER    (with train.parquet and test.parquet)
# Cost:      {COST}.
#            {NOT_MEASURED}
# Result:    none is published for these data; on CIFAR-10 itself {cell.lad} % (published, chosen on the test set).
# Settings:  those of {cell.name}.
name: {name}
method: lad
ipc: {cell.ipc}
data:
  dataset: parquet
  train: train.parquet
  test: test.parquet
  imbalance_factor: {cell.factor}
"""
    return name, text + _EXPERTS + distill_section(cell, large=False) + _EVALUATE


@dataclass(frozen=True)
class Lists:
    """A data set that is published as lists of ``path label`` lines."""

    name: str
    title: str
    stem: str
    classes: str
    images: str
    epoch: str


IMAGENET_LT = Lists(
    "imagenet-lt-f256-ipc10",
    "ImageNet-LT at 64x64",
    "ImageNet_LT",
    "1000 classes of 1280 to 5 training images (factor 256, as the lists are)",
    "115,846 training images",
    "1280",
)
PLACES_LT = Lists(
    "places-lt-f996-ipc10",
    "Places-LT at 64x64",
    "Places_LT",
    "365 classes of 4980 to 5 training images (factor 996, as the lists are)",
    "62,500 training images",
    "4980",
)


def from_lists(data: Lists, like: Cell) -> tuple[str, str]:
    """A data set of lists at 64x64 with another cell's settings: (name, text)."""
    text = f"""\
# {data.title}: {data.classes}, 10 images per class.
# Purpose:   a large natural long tail. The settings are UNPUBLISHED: no table has this cell.
# Command:   lad-dist run {data.name} --set data.root=FOLDER    (the two lists and their images)
# Cost:      not measured yet. {data.images}; a classifier epoch draws {data.epoch} of each class.
# Result:    none is known.
# Settings:  those of {like.name}, with fewer experts and simpler whitening.
# Lists:     Liu et al., "Large-Scale Long-Tailed Recognition in an Open World", 2019 (lines of "path label").
name: {data.name}
method: lad
ipc: {like.ipc}
data:
  dataset: list
  train: {data.stem}_train.txt
  test: {data.stem}_test.txt
  image_size: 64
  fit: center-crop
  imbalance: natural                 # the lists are long-tailed already
  whitening: standardize             # ZCA of 64x64 colour images is a 12288 x 12288 matrix
model:
  depth: 4
experts:
  count: 10
  epochs: 100
  classifier_epochs: 10
"""
    return data.name, text + distill_section(like, large=True) + _EVALUATE


def cifar10_beyond(factor: int, like: Cell) -> tuple[str, str]:
    """CIFAR-10-LT at a factor that no table has: (name, text)."""
    name = f"cifar10-lt-f{factor}-ipc{like.ipc}"
    text = f"""\
# CIFAR-10-LT, imbalance factor {factor}, {like.ipc} images per class.
# Purpose:   a longer tail than the published ones (5000 down to {5000 // factor} images). UNPUBLISHED: no table has this cell.
# Command:   lad-dist run {name}
# Cost:      {COST}.
#            {NOT_MEASURED}
# Result:    none is known.
# Settings:  those of {like.name}.
name: {name}
method: lad
ipc: {like.ipc}
data:
  dataset: cifar10
  imbalance_factor: {factor}
"""
    return name, text + _EXPERTS + distill_section(like, large=False) + _EVALUATE


FASHION = Path(__file__).parents[1] / "jobs" / "fashion-mnist-lt-matching.yaml"


def fashion(factor: int) -> tuple[str, str]:
    """jobs/fashion-mnist-lt-matching.yaml at another factor: (name, text)."""
    name = f"fashion-mnist-lt-f{factor}"
    body = "".join(
        line for line in FASHION.read_text(encoding="utf-8").splitlines(keepends=True) if not line.startswith("#")
    )
    body = body.replace("name: fashion-mnist-lt-matching\n", f"name: {name}\n")
    body = body.replace("imbalance_factor: 100\n", f"imbalance_factor: {factor}\n")
    smallest = 1000 // factor
    text = f"""\
# Fashion-MNIST-LT: 28x28 grey images, factor {factor} (1000 down to {smallest} image{"s" if smallest > 1 else ""} per class).
# Purpose:   how the result depends on the imbalance; fashion-mnist-lt-matching is the same at factor 100.
# Command:   lad-dist run {name}
# Cost:      as fashion-mnist-lt-matching.
# Result:    benchmarks/results/fashion-mnist-lt-sweep.md has all factors, at 16x16.
# Settings:  those of fashion-mnist-lt-matching, chosen at factor 100.
"""
    return name, text + body


def published() -> dict[str, str]:
    """The text of every file with the published protocol, by its stem."""
    cells = {cell.name: cell for cell in (*cifar10(), *cifar100(), *tiny_imagenet())}
    files = {name: document(cell) for name, cell in cells.items()}
    large = cells["tiny-imagenet-lt-f20-ipc10"]
    files.update([cifar10_jpeg(cells["cifar10-lt-f100-ipc10"])])
    files.update([from_lists(IMAGENET_LT, large), from_lists(PLACES_LT, large)])
    files.update(cifar10_beyond(factor, cells["cifar10-lt-f200-ipc10"]) for factor in (500, 1000))
    return files


def jobs() -> dict[str, str]:
    """The text of every file by its stem."""
    return published() | dict(fashion(factor) for factor in (10, 50, 200, 500, 1000))


def main() -> None:
    """Write the files into the folder given, by default jobs/."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "jobs"
    for name, text in jobs().items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    print(f"{folder}: {len(jobs())} recipes written")


if __name__ == "__main__":
    main()
