"""Data sets loaded as whole arrays: the UCI digits, Fashion-MNIST (IDX files), CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import gzip
import http.client
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lad_dist.data.longtail import within_class_order
from lad_dist.data.sources import ArraySource, Pixels, data_root
from lad_dist.data.torchvision_import import import_torchvision
from lad_dist.errors import DataError

if TYPE_CHECKING:
    from lad_dist.recipe import DataConfig

_DIGITS = Path(__file__).with_name("digits.npz")
DIGITS_TEST_PER_CLASS = 54  # leaves 120 to 129 training images per class
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # from Debian's package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_FASHION_MNIST_PREFIX = {"train": "train", "test": "t10k"}
_IDX_IMAGES, _IDX_LABELS = 2051, 2049  # magic numbers: unsigned bytes in three dimensions, in one
# Errors that a torchvision download can raise (URLError and timeouts are OSErrors, a bad checksum is a RuntimeError).
_DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


def digits(config: DataConfig) -> tuple[ArraySource, ArraySource]:
    """Return the training pool and test split of 1,797 grey 8x8 digits, which come with the package.

    The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; UCI Machine Learning Repository,
    doi.org/10.24432/C50P49, CC BY 4.0), in the order in which scikit-learn's ``load_digits`` has it.

    The split is part of the data set, not of a recipe: of each class, the first 54 of ``within_class_order`` are test
    images (540, balanced), the others the training pool, in data set order. Grey levels 0..16 are scaled to 0..255.
    """
    with np.load(_DIGITS) as file:
        labels_N, levels_NHW = file["labels"].astype(np.int64), file["levels"]
    images_NCHW = np.rint(levels_NHW * (255 / 16)).astype(np.uint8)[:, None]
    is_test = np.zeros(len(labels_N), dtype=bool)
    for c in range(10):
        positions = np.flatnonzero(labels_N == c)
        is_test[positions[within_class_order(len(positions))[:DIGITS_TEST_PER_CLASS]]] = True
    names = tuple(str(c) for c in range(10))
    return (
        ArraySource("digits (train)", labels_N[~is_test], images_NCHW[~is_test], names),
        ArraySource("digits (test)", labels_N[is_test], images_NCHW[is_test], names),
    )


def fashion_mnist(config: DataConfig) -> tuple[ArraySource, ArraySource]:
    """Fashion-MNIST, 60,000 + 10,000 grey 28x28 images, from the first folder with the four IDX files (.gz or not).

    Searched: root/FashionMNIST/raw (torchvision's place), root/fashion-mnist, root, and Debian's package folder. If
    none has them and ``config.download`` allows it, torchvision downloads them into root.
    """
    root = data_root(config.root)
    raw = root / "FashionMNIST" / "raw"
    searched = (raw, root / "fashion-mnist", root, DEBIAN_FASHION_MNIST)
    folder = next((folder for folder in searched if _has_fashion_mnist(folder)), None)
    if folder is None:
        problem = "data.download is false"
        if config.download:
            try:
                import_torchvision()
                from torchvision.datasets import FashionMNIST

                FashionMNIST(root, download=True)
            except _DOWNLOAD_ERRORS as error:
                problem = f"downloading failed ({error})"
        if not _has_fashion_mnist(raw):
            raise DataError(
                f"data.root: no Fashion-MNIST files in {', '.join(str(f.absolute()) for f in searched)}; {problem}; "
                "put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
                f"t10k-labels-idx1-ubyte.gz into {raw.absolute()}, or install Debian's package dataset-fashion-mnist"
            )
        folder = raw
    return _idx_split(folder, "train"), _idx_split(folder, "test")


def cifar(config: DataConfig) -> tuple[ArraySource, ArraySource]:
    """CIFAR-10 or CIFAR-100, 50,000 + 10,000 colour 32x32 images, in torchvision's layout under root or downloaded."""
    return _cifar_split(config, is_train=True), _cifar_split(config, is_train=False)


def _cifar_split(config: DataConfig, is_train: bool) -> ArraySource:
    import_torchvision()
    from torchvision.datasets import CIFAR10, CIFAR100

    dataset = {"cifar10": CIFAR10, "cifar100": CIFAR100}[config.dataset]
    root = data_root(config.root)
    folder = root / dataset.base_folder
    problem = "data.download is false"
    loaded = None
    try:
        loaded = dataset(root, train=is_train)  # verifies the files' checksums
    except RuntimeError:  # absent or damaged
        if config.download:
            try:
                loaded = dataset(root, train=is_train, download=True)
            except _DOWNLOAD_ERRORS as error:
                problem = f"downloading failed ({error})"
    if loaded is None:
        raise DataError(
            f"data.root: no intact {config.dataset} files in {folder.absolute()}, and {problem}; unpack {dataset.url} "
            f"into {root.absolute()}, or set data.root to the folder that holds {dataset.base_folder}"
        )
    return ArraySource(
        where=f"{folder} ({'train' if is_train else 'test'})",
        labels_N=np.asarray(loaded.targets, dtype=np.int64),
        images_NCHW=loaded.data.transpose(0, 3, 1, 2),  # a view; the selected images are copied once, later
        class_names=tuple(loaded.classes),
    )


def read_idx(file: Path) -> Pixels:
    """Read an IDX file of unsigned bytes (http://yann.lecun.com/exdb/mnist), gzipped or not: (N, H, W) or (N,)."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        (magic,) = struct.unpack_from(">I", content)
        if magic not in (_IDX_IMAGES, _IDX_LABELS):
            raise DataError(f"{file}: magic number {magic}; valid: {_IDX_IMAGES} (images) or {_IDX_LABELS} (labels)")
        dimensions = magic % 256
        shape = struct.unpack_from(f">{dimensions}I", content, 4)
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise DataError(f"{file}: not a readable IDX file ({error}); download it again") from error


def _idx_files(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Return the image and label files of a split in ``folder``, or None."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        stem = folder / f"{_FASHION_MNIST_PREFIX[split]}-{kind}"
        candidates = [file for file in (stem, stem.with_name(stem.name + ".gz")) if file.is_file()]
        if not candidates:
            return None
        found.append(candidates[0])
    return found[0], found[1]


def _has_fashion_mnist(folder: Path) -> bool:
    return all(_idx_files(folder, split) is not None for split in _FASHION_MNIST_PREFIX)


def _idx_split(folder: Path, split: str) -> ArraySource:
    files = _idx_files(folder, split)
    assert files is not None, "the folder was chosen because it has them"
    images_NHW, labels_N = read_idx(files[0]), read_idx(files[1])
    if images_NHW.ndim != 3 or labels_N.ndim != 1 or len(images_NHW) != len(labels_N):
        raise DataError(f"{files[0]}: shape {images_NHW.shape} does not match {files[1].name}: {labels_N.shape}")
    return ArraySource(str(files[1]), labels_N.astype(np.int64), images_NHW[:, None], FASHION_MNIST_CLASSES)
