"""Survey of an image folder: which subfolders are splits and classes, how many images, of which sizes and colours.

Only headers are read, of a sample if there are many images.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lad_dist.data.decoding import GREY_MODES
from lad_dist.data.folders import IMAGE_SUFFIXES, image_files
from lad_dist.errors import DataError

_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_SAMPLE = 2000  # maximum number of headers read
_SHOWN = 5


@dataclass(frozen=True)
class Survey:
    """A folder readable by ``data.dataset: image-folder``.

    ``train`` and ``test`` are names of folders in ``root``, ``.`` for itself; ``test`` is None if missing. ``counts``
    are training images of each class; ``sides`` the shorter sides.
    """

    root: Path
    train: str
    test: str | None
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    sides: tuple[int, ...]
    square: bool
    grey: int
    colour: int

    @property
    def one_size(self) -> bool:
        """Whether all images are squares of the same side."""
        return self.square and len(set(self.sides)) == 1

    @property
    def typical_side(self) -> int:
        """Median of the shorter sides."""
        return int(statistics.median(self.sides))


def survey(root: Path) -> Survey:
    """Survey ``root``. Raises DataError if it holds no class folders, naming what was found and what is valid."""
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder; valid: a folder with one folder of images for each class")
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    train = _named(folders, _TRAIN)
    test = _named(folders, _TEST)
    if train is None and test is not None:
        raise DataError(
            f"{root}: has a folder {test} and no folder train; valid: train/CLASS/* beside it, or class folders alone"
        )
    inside = root / train if train else root
    found = {entry.name: image_files(entry)[0] for entry in sorted(inside.iterdir()) if _is_class(entry)}
    classes = tuple(found)
    empty = [name for name, files in found.items() if not files]
    if not classes or len(empty) == len(classes):
        raise DataError(
            f"{inside}: no class folders with images{_instead(inside)}; valid: {inside}/CLASS/*.jpg (or .png, ...)"
        )
    if empty:
        raise DataError(
            f"{inside}: no images in {_listed(empty)}; valid: at least one image in each class folder, or remove the folder"
        )
    if len(classes) < 2:
        raise DataError(f"{inside}: one class folder, {classes[0]}; valid: two or more")
    files = [file for of_class in found.values() for file in of_class]
    step = max(1, len(files) // _SAMPLE)
    sizes, modes = _headers(files[::step])
    grey = sum(count for mode, count in modes.items() if mode in GREY_MODES)
    return Survey(
        root=root,
        train=train or ".",
        test=test,
        classes=classes,
        counts=tuple(len(of_class) for of_class in found.values()),
        sides=tuple(min(size) for size in sizes),
        square=all(width == height for width, height in sizes),
        grey=grey,
        colour=sum(modes.values()) - grey,
    )


def _named(folders: list[Path], names: tuple[str, ...]) -> str | None:
    by_name = {folder.name.lower(): folder.name for folder in reversed(folders)}
    return next((by_name[name] for name in names if name in by_name), None)


def _is_class(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _instead(folder: Path) -> str:
    """Describe what is there instead of class folders."""
    kinds = Counter(entry.suffix.lower() for entry in folder.iterdir() if entry.is_file())
    images = sum(count for suffix, count in kinds.items() if suffix in IMAGE_SUFFIXES)
    if images:
        return f", but {images} images directly in it"
    if kinds[".parquet"]:
        return ", but Parquet files, which data.dataset: parquet reads (docs/own-data.md)"
    if kinds[".txt"]:
        return ", but text files; lists of 'path label' lines are read by data.dataset: list (docs/own-data.md)"
    return ""


def _headers(files: list[Path]) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Return sizes, and the number of images per mode. Raises DataError naming the files that are not images."""
    sizes: list[tuple[int, int]] = []
    modes: Counter[str] = Counter()
    broken: list[str] = []
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
                modes[image.mode] += 1
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{file} ({error})")
    if broken:
        raise DataError(f"{_listed(broken)}: not readable as images; remove or replace them")
    return sizes, modes


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
