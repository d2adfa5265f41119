"""Data sets with one file per image: class folders, Tiny-ImageNet, and text lists (ImageNet-LT, Places-LT)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lad_dist.data.longtail import positions_by_class, within_class_order
from lad_dist.data.sources import FileSource, data_root, existing_folder
from lad_dist.errors import DataError

if TYPE_CHECKING:
    from lad_dist.recipe import DataConfig

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
TINY_IMAGENET_FOLDER = "tiny-imagenet-200"
_TEST_FOLDERS = ("test", "val")


def image_folder(config: DataConfig) -> tuple[FileSource, FileSource]:
    """``root/<split>/<class>/**/<image>``: classes in alphabetical order, and files within a class too.

    With ``data.test_fraction`` both splits come from the training folder.
    """
    root = existing_folder(data_root(config.root), "data.root")
    train = existing_folder(root / (config.train or "train"), "data.train")
    if config.test_fraction is not None:
        return split_by_class(_by_class(train, _class_folders(train)), config.test_fraction)
    test = _test_folder(root, config, _TEST_FOLDERS)
    classes = _class_folders(train)
    return _by_class(train, classes), _by_class(test, classes)


def split_by_class(source: FileSource, fraction: float) -> tuple[FileSource, FileSource]:
    """Split one source into (training, test) images.

    Test images are the first round(n * fraction) of each class's order, at least one and at most all but one.
    """
    test_N = np.zeros(len(source.labels_N), dtype=bool)
    for positions in positions_by_class(source.labels_N, int(source.labels_N.max()) + 1):
        count = min(max(1, round(len(positions) * fraction)), len(positions) - 1)
        test_N[positions[within_class_order(len(positions))[:count]]] = True
    train, test = (
        FileSource(
            f"{source.where} ({split})",
            source.labels_N[mask],
            [file for file, kept in zip(source.files, mask, strict=True) if kept],
            source.class_names,
            source.channels,
        )
        for split, mask in (("train", ~test_N), ("test", test_N))
    )
    return train, test


def tiny_imagenet(config: DataConfig) -> tuple[FileSource, FileSource]:
    """Tiny-ImageNet, 200 classes of 500 + 50 colour 64x64 images: root, or root/tiny-imagenet-200, as unpacked.

    The validation images, which serve as test set, may also have been sorted into class folders. Some files are grey;
    all are read as colour unless ``config.channels`` overrides it.
    """
    root = existing_folder(data_root(config.root), "data.root")
    if (root / TINY_IMAGENET_FOLDER).is_dir():
        root = root / TINY_IMAGENET_FOLDER
    train = existing_folder(root / (config.train or "train"), f"data.root: {TINY_IMAGENET_FOLDER} is missing")
    test = _test_folder(root, config, ("val",))
    classes = _class_folders(train)
    names = _synset_names(root / "words.txt", classes)
    annotations = test / "val_annotations.txt"
    annotated = annotations.is_file() and (test / "images").is_dir()
    return (
        _by_class(train, classes, names, channels=3),
        _annotated(annotations, classes, names) if annotated else _by_class(test, classes, names, channels=3),
    )


def image_list(config: DataConfig) -> tuple[FileSource, FileSource]:
    """Text files of lines ``path label``, paths relative to root. Blank lines and # comments are skipped."""
    root = data_root(config.root)
    for field, value in (("data.train", config.train), ("data.test", config.test)):
        if value is None:
            raise DataError(f"{field}: not given; valid: a text file of 'path label' lines (list needs both)")
    return _listed(root, root / str(config.train), "data.train"), _listed(root, root / str(config.test), "data.test")


def _test_folder(root: Path, config: DataConfig, defaults: tuple[str, ...]) -> Path:
    if config.test is not None:
        return existing_folder(root / config.test, "data.test")
    for name in defaults:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"data.test: {root.absolute()} has no folder {' or '.join(defaults)}; valid: the name of the test folder"
    )


def _class_folders(train: Path) -> tuple[str, ...]:
    """Return the names of the class folders. One may be a link, to a folder outside the data set.

    Raises DataError if a link leads to a folder that contains the split, or to one of the data set's own folders: its
    images would be counted twice, or belong to another split.
    """
    names = sorted(entry.name for entry in train.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{train.absolute()}: no class folders; valid: one folder of images for each class")
    own = [d for d in (train.absolute().parent.resolve(), train.resolve()) if d != d.parent]
    for name in names:
        target = (train / name).resolve()
        if (train / name).is_symlink() and any(target in (d, *d.parents) or d in target.parents for d in own):
            raise DataError(
                f"{(train / name).absolute()}: is a link to {target}, which belongs to the same data set; "
                "valid: folders, or links to folders outside the data set"
            )
    return tuple(names)


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Return all images below ``folder``, sorted, and the links to folders there, which are not followed.

    Hidden files (macOS leaves ``._x.jpg`` in archives) are skipped. Raises DataError if a link leads to an enclosing
    folder.
    """
    files: list[Path] = []
    skipped: list[str] = []
    for parent, folders, names in os.walk(folder):
        for link in (Path(parent, name) for name in sorted(folders) if os.path.islink(os.path.join(parent, name))):
            target = link.resolve()
            if target in (Path(parent).resolve(), *Path(parent).resolve().parents):
                raise DataError(f"{link.absolute()}: is a link to {target}, which contains it: a loop; remove the link")
            skipped.append(f"{link.absolute()} (a link to the folder {target}) is not followed")
        files += [
            Path(parent, name)
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(files), sorted(skipped)


def _by_class(
    split: Path, classes: tuple[str, ...], names: tuple[str, ...] | None = None, channels: int | None = None
) -> FileSource:
    """Return the files of ``split/<class>/``. Raises ``DataError`` if a class has none, or a folder is not a class."""
    unknown = sorted(set(_class_folders(split)) - set(classes))
    if unknown:
        raise DataError(
            f"{split.absolute()}: class folder {', '.join(unknown[:10])} is not in the training split; "
            f"valid: {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
        )
    files: list[Path] = []
    labels: list[int] = []
    notes: list[str] = []
    for label, name in enumerate(classes):
        of_class, skipped = image_files(split / name)
        notes += skipped
        if not of_class:
            raise DataError(f"{(split / name).absolute()}: no images of class {name}; valid: at least one")
        files += of_class
        labels += [label] * len(of_class)
    return FileSource(
        str(split), np.array(labels, dtype=np.int64), files, names or classes, channels, notes=tuple(notes)
    )


def _synset_names(words: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Return each synset's first word in ``words.txt`` (``n02124075<tab>Egyptian cat``), else the synset itself."""
    if not words.is_file():
        return classes
    wanted = set(classes)
    names: dict[str, str] = {}
    for line in words.read_text(encoding="utf-8-sig").splitlines():
        synset, _, text = line.partition("\t")
        if synset in wanted:
            names[synset] = text.split(",")[0].strip()
    return tuple(names.get(synset) or synset for synset in classes)


def _annotated(annotations: Path, classes: tuple[str, ...], names: tuple[str, ...]) -> FileSource:
    """Read Tiny-ImageNet's validation images: ``val_annotations.txt`` has file, synset and a box, separated by tabs."""
    label_of = {synset: label for label, synset in enumerate(classes)}

    def parse(line: str) -> tuple[str, int]:
        file, synset = line.split("\t")[:2]
        if synset not in label_of:
            raise ValueError(f"class {synset} is not in the training split")
        return file, label_of[synset]

    names_in_file, labels, lines = _parse_lines(annotations, "data.test", parse, "'file<tab>class' lines")
    files = [annotations.parent / "images" / name for name in names_in_file]
    return FileSource(str(annotations), np.array(labels, dtype=np.int64), files, names, 3, lines)


def _listed(root: Path, file: Path, field: str) -> FileSource:
    def parse(line: str) -> tuple[str, int]:
        path, label = line.rsplit(maxsplit=1)  # a path may contain spaces
        return path, int(label)

    paths, labels, lines = _parse_lines(file, field, parse, "'path label' lines, the label an integer")
    try:
        labels_N = np.array(labels, dtype=np.int64)
    except OverflowError as error:
        raise DataError(f"{file}: a label is beyond 64 bits; valid: integers 0 to K-1 with no gaps") from error
    return FileSource(str(file), labels_N, [root / path for path in paths], lines=lines)


def _parse_lines(
    file: Path, field: str, parse: Callable[[str], tuple[str, int]], valid: str
) -> tuple[list[str], list[int], list[int]]:
    """Return paths, labels and line numbers. Raises ``DataError`` with file:line if ``parse`` raises ``ValueError``."""
    paths: list[str] = []
    labels: list[int] = []
    lines: list[int] = []
    try:
        if file.exists() and not file.is_file():  # a FIFO would block, a device never end
            raise DataError(f"{field}: {file.absolute()} is not a regular file; valid: a text file")
        with file.open(encoding="utf-8-sig") as text:  # with or without a byte order mark
            for number, line in enumerate(text, start=1):
                stripped = line.strip()
                if not stripped or stripped.startswith("#"):
                    continue
                try:
                    path, label = parse(stripped)
                except ValueError as error:
                    raise DataError(f"{file}:{number}: {stripped[:80]!r}: {error}; valid: {valid}") from error
                paths.append(path)
                labels.append(label)
                lines.append(number)
    except OSError as error:
        raise DataError(f"{field}: {file.absolute()} cannot be read ({error.strerror}); valid: a text file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{field}: {file.absolute()} is not UTF-8 text; valid: {valid}") from error
    return paths, labels, lines
