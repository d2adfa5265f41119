"""Every kind of data set but Parquet, read from small files, and every way in which its files can be wrong."""

from __future__ import annotations

import gzip
import os
import pickle
import socket
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from small_datasets import picture, pixels, write_folders

from lad_dist.data import arrays
from lad_dist.data.datasets import load_splits
from lad_dist.data.sources import ROOT_VARIABLE, ArraySource, check_labels, data_root
from lad_dist.errors import DataError


def at(image_set, index):
    return image_set.images_NCHW[index].numpy()


# --- digits, Fashion-MNIST, CIFAR ---------------------------------------------------------------------------------


def test_digits_split_is_balanced_and_leaves_120_of_each_class(config):
    splits = load_splits(config(dataset="digits", imbalance_factor=20))
    assert splits.test.counts == (54,) * 10
    assert splits.train.counts == (120, 86, 61, 44, 31, 22, 16, 11, 8, 6)
    assert sum(splits.full_counts) + 540 == 1797 and min(splits.full_counts) == 120
    assert (splits.train.channels, splits.train.size) == (1, 8)
    assert splits.train.images_NCHW.max() == 255


def write_idx(folder: Path, compressed: bool, per_class: int = 2) -> None:
    folder.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        labels = np.repeat(np.arange(10, dtype=np.uint8), per_class)
        images = np.arange(len(labels) * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(-1, 28, 28)
        for name, magic, array in (("images-idx3-ubyte", 2051, images), ("labels-idx1-ubyte", 2049, labels)):
            content = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
            if compressed:
                (folder / f"{prefix}-{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / f"{prefix}-{name}").write_bytes(content)


@pytest.mark.parametrize(
    ("place", "compressed"),
    [("FashionMNIST/raw", False), ("FashionMNIST/raw", True), ("fashion-mnist", True), ("x", True)],
)
def test_fashion_mnist_is_found_in_each_layout(config, tmp_path, monkeypatch, place, compressed):
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "x")
    write_idx(tmp_path / place, compressed)
    splits = load_splits(config(dataset="fashion-mnist", root=str(tmp_path), imbalance="natural"))
    assert splits.train.counts == splits.test.counts == (2,) * 10
    assert splits.train.class_names[9] == "Ankle boot"
    np.testing.assert_array_equal(at(splits.train, 1)[0], (np.arange(784, 1568) % 256).reshape(28, 28))


def test_missing_fashion_mnist_says_where_it_may_be_put(config, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "DEBIAN_FASHION_MNIST", tmp_path / "x")
    with pytest.raises(DataError) as caught:
        load_splits(config(dataset="fashion-mnist", root=str(tmp_path / "here")))
    for part in (
        f"{tmp_path}/here/FashionMNIST/raw",
        f"{tmp_path}/x",
        "dataset-fashion-mnist",
        "data.download is false",
    ):
        assert part in str(caught.value)


def test_damaged_idx_file_is_named(config, tmp_path):
    write_idx(tmp_path / "fashion-mnist", True)
    file = tmp_path / "fashion-mnist" / "t10k-images-idx3-ubyte.gz"
    whole = file.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        gzip.compress(b"\0\0\0\1" * 9),
        gzip.compress(gzip.decompress(whole)[:-5]),
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz"):
            load_splits(config(dataset="fashion-mnist", root=str(tmp_path)))


@pytest.mark.skipif(
    not arrays.DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_fashion_mnist_of_debian(config, tmp_path):
    splits = load_splits(config(dataset="fashion-mnist", root=str(tmp_path), imbalance_factor=100))
    assert splits.full_counts == (6000,) * 10 and splits.test.counts == (1000,) * 10
    assert splits.train.counts[0] == 6000 and splits.train.counts[-1] == 60
    assert splits.train.images_NCHW.shape[1:] == (1, 28, 28)


def write_cifar(root: Path, dataset: str) -> np.ndarray:
    folder = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[dataset]
    folder.mkdir(parents=True)
    classes = {"cifar10": 10, "cifar100": 100}[dataset]
    data = np.random.default_rng(0).integers(0, 256, (classes, 3 * 32 * 32), dtype=np.uint8)
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[dataset]
    batch = pickle.dumps({"data": data, key: list(range(classes))})
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if dataset == "cifar10" else ["train", "test"]
    for name in names:
        (folder / name).write_bytes(batch)
    meta = {"label_names": [f"n{c}" for c in range(10)], "fine_label_names": [f"n{c}" for c in range(100)]}
    (folder / ("batches.meta" if dataset == "cifar10" else "meta")).write_bytes(pickle.dumps(meta))
    return data


@pytest.mark.parametrize(("dataset", "classes", "per_class"), [("cifar10", 10, 5), ("cifar100", 100, 1)])
def test_cifar_in_torchvisions_layout(config, tmp_path, monkeypatch, dataset, classes, per_class):
    arrays.import_torchvision()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # these are not the real files
    data = write_cifar(tmp_path, dataset)
    splits = load_splits(config(dataset=dataset, root=str(tmp_path), imbalance="natural"))
    assert splits.train.counts == (per_class,) * classes and splits.test.counts == (1,) * classes
    assert splits.train.class_names[7] == "n7"
    assert splits.train.images_NCHW.is_contiguous()
    np.testing.assert_array_equal(at(splits.train, 3), data[3].reshape(3, 32, 32))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_missing_cifar_says_where_to_put_it(config, tmp_path, monkeypatch, dataset):
    with pytest.raises(
        DataError, match=rf"no intact {dataset} files in {tmp_path}.*data.download is false.*unpack https"
    ):
        load_splits(config(dataset=dataset, root=str(tmp_path)))

    def no_network(self):
        raise URLError("Name or service not known")

    arrays.import_torchvision()
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", no_network)
    with pytest.raises(DataError, match=r"downloading failed .*Name or service not known"):
        load_splits(config(dataset=dataset, root=str(tmp_path), download=True))


# --- class folders, Tiny-ImageNet, lists --------------------------------------------------------------------------


def test_image_folder_keeps_pixels_and_order(config, tmp_path):
    root = write_folders(tmp_path, {"ant": 3, "bee": 2})
    (root / "train" / "ant" / "._00.png").write_bytes(b"not an image, as macOS leaves them")
    splits = load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))
    assert splits.train.class_names == ("ant", "bee") and splits.train.counts == (3, 2)
    for index, seed in enumerate((0, 1, 2, 100, 101)):
        np.testing.assert_array_equal(at(splits.train, index), pixels(seed))


def test_image_folder_takes_val_where_there_is_no_test(config, tmp_path):
    root = write_folders(tmp_path, {"ant": 1, "bee": 1}, ("train", "val"))
    assert len(load_splits(config(dataset="image-folder", root=str(root))).test) == 2
    with pytest.raises(DataError, match=r"data.test: .*/other is not a folder"):
        load_splits(config(dataset="image-folder", root=str(root), test="other"))


def test_image_folder_faults(config, tmp_path):
    def load():
        load_splits(config(dataset="image-folder", root=str(tmp_path / "x")))

    with pytest.raises(DataError, match=r"data.root: .*/x is not a folder"):
        load()
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match=r"data.train: .*/x/train is not a folder"):
        load()
    (tmp_path / "x" / "train").mkdir()
    with pytest.raises(DataError, match=r"has no folder test or val"):
        load()
    (tmp_path / "x" / "test").mkdir()
    with pytest.raises(DataError, match=r"train: no class folders"):
        load()
    write_folders(tmp_path / "y", {"ant": 1, "bee": 1})
    (tmp_path / "y" / "train" / "cow").mkdir()
    with pytest.raises(DataError, match=r"train/cow: no images of class cow"):
        load_splits(config(dataset="image-folder", root=str(tmp_path / "y")))
    (tmp_path / "y" / "train" / "cow").rmdir()
    (tmp_path / "y" / "test" / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder dog is not in the training split; valid: ant, bee"):
        load_splits(config(dataset="image-folder", root=str(tmp_path / "y")))


def test_links_to_folders_within_a_class_are_not_followed_and_said(config, tmp_path):
    root = write_folders(tmp_path / "data", {"ant": 3, "bee": 2})
    outside = write_folders(tmp_path / "other", {"ant": 4})
    (root / "train" / "ant" / "more").symlink_to(outside / "train" / "ant")
    (root / "train" / "bee" / "tested").symlink_to("../../test/bee")
    (root / "train" / "bee" / "linked.png").symlink_to(outside / "train" / "ant" / "00.png")  # a file may be a link
    splits = load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))
    assert splits.train.counts == (3, 3) and splits.test.counts == (3, 2)
    first, second = splits.notes
    assert "train/ant/more (a link to the folder" in first and "train/bee/tested" in second


@pytest.mark.parametrize(
    ("place", "target"), [("ant/loop", "."), ("ant/loop", ".."), ("ant/up", "../.."), ("bee/deep/up", "../../../..")]
)
def test_links_that_lead_around_themselves_are_refused(config, tmp_path, place, target):
    root = write_folders(tmp_path, {"ant": 3, "bee": 2})
    (root / "train" / place).parent.mkdir(exist_ok=True)
    (root / "train" / place).symlink_to(target)
    with pytest.raises(DataError, match=rf"train/{place}: is a link to .*a loop"):
        load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))


@pytest.mark.parametrize("target", ["..", "../..", ".", "../test", "../test/ant", "ant"])
def test_a_class_that_is_a_link_into_the_data_set_is_refused(config, tmp_path, target):
    root = write_folders(tmp_path, {"ant": 3, "bee": 2})
    (root / "train" / "cow").symlink_to(target)
    with pytest.raises(DataError, match=r"train/cow: is a link to .*belongs to the same data set"):
        load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))


def test_splits_and_classes_may_be_links_to_other_disks(config, tmp_path):
    real = write_folders(tmp_path / "disk", {"ant": 3, "bee": 2})
    for split in ("train", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        (tmp_path / "data" / split / "ant").symlink_to(real / split / "ant")
        (tmp_path / "data" / split / "bee").symlink_to(real / split / "bee")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "train").symlink_to(tmp_path / "data" / "train")
    (tmp_path / "linked" / "test").symlink_to(tmp_path / "data" / "test")
    for root in ("data", "linked"):
        splits = load_splits(config(dataset="image-folder", root=str(tmp_path / root), imbalance="natural"))
        assert splits.train.counts == (3, 2) and splits.notes == ()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "zero", "giant", "socket"])
def test_only_regular_files_are_read(config, tmp_path, kind):
    root = write_folders(tmp_path, {"ant": 3, "bee": 2})
    odd = root / "train" / "ant" / "0.png"
    with socket.socket(socket.AF_UNIX) as made:
        if kind == "fifo":
            os.mkfifo(odd)
        elif kind == "zero":
            odd.symlink_to("/dev/zero")
        elif kind == "giant":
            odd.touch()
            os.truncate(odd, 2**31)
        else:
            made.bind(os.path.relpath(odd))
        with pytest.raises(
            DataError, match=r"train/ant/0\.png: (not a regular file|2,147,483,648 bytes|not a readable image)"
        ):
            load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))


@pytest.mark.timeout(20)
def test_a_list_that_is_no_regular_file(config, tmp_path):
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(DataError, match=r"data.train: .*train.txt is not a regular file"):
        load_splits(config(dataset="list", root=str(tmp_path), train="train.txt", test="test.txt"))


def test_a_byte_order_mark_in_a_list_is_no_part_of_a_name(config, tmp_path):
    root = write_folders(tmp_path, {"ant": 1, "bee": 1})
    lines = "train/ant/00.png 0\ntrain/bee/00.png 1\n"
    for name in ("train.txt", "test.txt"):
        (root / name).write_text(lines, encoding="utf-8-sig")
    splits = load_splits(config(dataset="list", root=str(root), train="train.txt", test="test.txt"))
    assert splits.train.counts == (1, 1)


@pytest.mark.parametrize(("content", "said"), [(b"", "it is empty"), (b"no image", "it is of an unknown format")])
def test_what_is_no_image_is_said_in_words(config, tmp_path, content, said):
    root = write_folders(tmp_path, {"ant": 1, "bee": 1})
    (root / "train" / "ant" / "00.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"ant/00\.png: not a readable image \({said}\)") as raised:
        load_splits(config(dataset="image-folder", root=str(root)))
    assert "BytesIO" not in str(raised.value)


def test_one_class_is_refused(config, tmp_path):
    root = write_folders(tmp_path, {"ant": 3})
    with pytest.raises(DataError, match=r"train: one class only; valid: two or more"):
        load_splits(config(dataset="image-folder", root=str(root), imbalance="natural"))


def write_tiny_imagenet(root: Path, reorganised: bool) -> None:
    base = root / "tiny-imagenet-200"
    for c, synset in enumerate(("n01", "n02")):
        (base / "train" / synset / "images").mkdir(parents=True)
        for i in range(2):
            # grey files occur in the real set, also as the very first one here
            mode = "L" if (c, i) == (0, 0) else "RGB"
            picture(10 * c + i, (64, 64), mode).save(base / "train" / synset / "images" / f"{synset}_{i}.JPEG")
    (base / "words.txt").write_text("n02\tEgyptian cat\nn01\tgoldfish, Carassius auratus\nn03\tother\n")
    images = base / "val" / "images"
    if reorganised:
        for c, synset in enumerate(("n01", "n02")):
            (base / "val" / synset).mkdir(parents=True)
            picture(50 + c, (64, 64)).save(base / "val" / synset / "v.JPEG")
    else:
        images.mkdir(parents=True)
        for i in range(2):
            picture(50 + i, (64, 64)).save(images / f"val_{i}.JPEG")
        (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n")


@pytest.mark.parametrize("reorganised", [False, True])
@pytest.mark.parametrize("below", ["", "tiny-imagenet-200"])
def test_tiny_imagenet(config, tmp_path, reorganised, below):
    write_tiny_imagenet(tmp_path, reorganised)
    splits = load_splits(config(dataset="tiny-imagenet", root=str(tmp_path / below), imbalance="natural"))
    assert splits.train.class_names == ("goldfish", "Egyptian cat")
    assert splits.train.images_NCHW.shape == (4, 3, 64, 64) and splits.test.labels_N.tolist() == [0, 1]
    assert torch.equal(splits.train.images_NCHW[0, 0], splits.train.images_NCHW[0, 2])  # the grey one, as colour


def test_tiny_imagenet_annotation_faults_name_the_line(config, tmp_path):
    write_tiny_imagenet(tmp_path, False)
    annotations = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    annotations.write_text("val_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn99\t0\t0\t9\t9\n")
    with pytest.raises(DataError, match=r"val_annotations.txt:2: .*class n99 is not in the training split"):
        load_splits(config(dataset="tiny-imagenet", root=str(tmp_path)))


def list_config(config, root: Path, train: str, test: str = "a 0\nb c 1\n", **fields):
    for i, name in enumerate(("a", "b c", "d")):
        picture(i).save(root / name, "PNG")
    (root / "train.txt").write_text(train)
    (root / "test.txt").write_text(test)
    return config(dataset="list", root=str(root), train="train.txt", test="test.txt", **fields)


def test_list_with_comments_blank_lines_and_spaces_in_paths(config, tmp_path):
    splits = load_splits(list_config(config, tmp_path, "# path label\n\na 0\n  b c 1\r\nd\t1\n", imbalance="natural"))
    assert splits.train.labels_N.tolist() == [0, 1, 1] and splits.train.class_names == ("0", "1")
    np.testing.assert_array_equal(at(splits.train, 1), pixels(1))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a 0\na\n", r"train.txt:2: 'a'"),
        ("a 0\na one\n", r"train.txt:2: 'a one'.*valid: 'path label' lines"),
        ("a 0\na 1.0\n", r"train.txt:2: 'a 1.0'"),
        ("# nothing\n", r"train.txt: no images"),
        ("a 0\na 3\n", r"train.txt: labels 1, 2 do not occur although the largest is 3; valid: integers 0 to K-1"),
        ("a 1\na 2\n", r"train.txt: labels 0 do not occur"),
        ("a 0\na -1\n", r"train.txt: labels -1 are not valid; valid: integers 0 to 0"),
        ("a 0\na 1000000000000\n", r"labels 1, 2, 3.*\.\.\. do not occur although the largest is 1000000000000"),
        ("a 0\na 99999999999999999999\n", r"train.txt: a label is beyond 64 bits"),
        ("a 0\nd 1\nnowhere 1\n", r"train.txt:3: .*nowhere: no such file"),
    ],
)
def test_list_faults_name_file_and_line(config, tmp_path, train, message):
    with pytest.raises(DataError, match=message):
        load_splits(list_config(config, tmp_path, train, imbalance="natural"))


def test_test_split_has_the_training_classes(config, tmp_path):
    with pytest.raises(DataError, match=r"test.txt: labels 2 are not valid; valid: integers 0 to 1"):
        load_splits(list_config(config, tmp_path, "a 0\nd 1\n", "a 0\nd 2\n"))
    with pytest.raises(DataError, match=r"test.txt: no images of class 1; valid: at least one image of each of the 2"):
        load_splits(list_config(config, tmp_path, "a 0\nd 1\n", "a 0\n"))


def test_list_needs_both_files(config, tmp_path):
    with pytest.raises(DataError, match=r"data.test: not given"):
        load_splits(config(dataset="list", root=str(tmp_path), train="x"))
    with pytest.raises(DataError, match=r"data.train: .*/x cannot be read"):
        load_splits(config(dataset="list", root=str(tmp_path), train="x", test="x"))


# --- the data folder, labels --------------------------------------------------------------------------------------


def test_data_root_expands_and_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.setenv(ROOT_VARIABLE, "$SCRATCH/data")
    assert data_root("~/a") == Path("/home/x/a") and data_root("${SCRATCH}/b") == Path("/scratch/b")
    assert data_root(None) == Path("/scratch/data")
    monkeypatch.delenv(ROOT_VARIABLE)
    assert data_root(None) == Path("data")
    with pytest.raises(DataError, match=r"data.root: '\$NOWHERE/x' contains an environment variable that is not set"):
        data_root("$NOWHERE/x")


def test_many_faulty_labels_are_cut_short():
    labels = np.array([0, *range(100, 150)])
    source = ArraySource("somewhere", labels, np.zeros((len(labels), 1, 2, 2), np.uint8), tuple("abc"))
    with pytest.raises(DataError, match=r"somewhere: labels 100, .*109, \.\.\. are not valid; valid: integers 0 to 2"):
        check_labels(source)
