"""Every kind of data set, read from small files, and every way in which its files can be wrong."""

from __future__ import annotations

import gzip
import json
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_datasets import picture, pixels, png, write_folders

from lad_dist.data import arrays
from lad_dist.data.datasets import load_splits
from lad_dist.data.sources import ROOT_VARIABLE, ArraySource, check_labels, data_root
from lad_dist.errors import DataError

CIFAR10_JPEG = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10-jpeg"


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
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz"):
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
        DataError, match=f"no intact {dataset} files in {tmp_path}.*data.download is false.*unpack https"
    ):
        load_splits(config(dataset=dataset, root=str(tmp_path)))

    def no_network(self):
        raise URLError("Name or service not known")

    arrays.import_torchvision()
    monkeypatch.setattr("torchvision.datasets.cifar.CIFAR10.download", no_network)
    with pytest.raises(DataError, match="downloading failed .*Name or service not known"):
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
    with pytest.raises(DataError, match="data.test: .*/other is not a folder"):
        load_splits(config(dataset="image-folder", root=str(root), test="other"))


def test_image_folder_faults(config, tmp_path):
    def load():
        load_splits(config(dataset="image-folder", root=str(tmp_path / "x")))

    with pytest.raises(DataError, match="data.root: .*/x is not a folder"):
        load()
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="data.train: .*/x/train is not a folder"):
        load()
    (tmp_path / "x" / "train").mkdir()
    with pytest.raises(DataError, match="has no folder test or val"):
        load()
    (tmp_path / "x" / "test").mkdir()
    with pytest.raises(DataError, match="train: no class folders"):
        load()
    write_folders(tmp_path / "y", {"ant": 1, "bee": 1})
    (tmp_path / "y" / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="train/cow: no images of class cow"):
        load_splits(config(dataset="image-folder", root=str(tmp_path / "y")))
    (tmp_path / "y" / "train" / "cow").rmdir()
    (tmp_path / "y" / "test" / "dog").mkdir()
    with pytest.raises(DataError, match="class folder dog is not in the training split; valid: ant, bee"):
        load_splits(config(dataset="image-folder", root=str(tmp_path / "y")))


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
    with pytest.raises(DataError, match="val_annotations.txt:2: .*class n99 is not in the training split"):
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
        ("# nothing\n", r"train.txt: there are no images"),
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
    with pytest.raises(DataError, match="data.test: not given"):
        load_splits(config(dataset="list", root=str(tmp_path), train="x"))
    with pytest.raises(DataError, match="data.train: .*/x cannot be read"):
        load_splits(config(dataset="list", root=str(tmp_path), train="x", test="x"))


# --- Parquet ------------------------------------------------------------------------------------------------------


def write_parquet(
    file: Path, images, labels, as_struct=False, names=("image", "label"), metadata=None, group=3
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if as_struct:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        image_array = pa.array([{"bytes": image, "path": None} for image in images], kind)
    else:
        image_array = pa.array(images, pa.binary())
    label_array = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    table = pa.Table.from_arrays([image_array, label_array], names=list(names))
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=group)


@pytest.mark.parametrize("as_struct", [False, True])
@pytest.mark.parametrize(
    ("train", "files"),
    [
        ("train.parquet", ["train.parquet"]),
        ("shards", ["shards/0.parquet", "shards/1.parquet"]),
        ("data/train-*.parquet", ["data/train-0.parquet", "data/train-1.parquet", "data/train-2.parquet"]),
        (None, ["data/train-0.parquet", "data/train-1.parquet"]),
    ],
)
def test_parquet_file_folder_and_pattern(config, tmp_path, train, files, as_struct):
    for f, name in enumerate(files):
        write_parquet(tmp_path / name, [png(10 * f + i) for i in range(7)], [i % 2 for i in range(7)], as_struct)
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1], as_struct)
    splits = load_splits(config(dataset="parquet", root=str(tmp_path), train=train, imbalance="natural"))
    assert splits.full_counts == (4 * len(files), 3 * len(files))
    seeds = [10 * f + i for f in range(len(files)) for i in range(7)]
    for index, seed in enumerate(seeds):
        np.testing.assert_array_equal(at(splits.train, index), pixels(seed))


def test_chosen_parquet_rows_land_where_they_were_chosen(config, tmp_path):
    labels = [1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    write_parquet(tmp_path / "train" / "0.parquet", [png(i) for i in range(4)], labels[:4])
    write_parquet(tmp_path / "train" / "1.parquet", [png(i) for i in range(4, 10)], labels[4:])
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1])
    splits = load_splits(config(dataset="parquet", root=str(tmp_path), imbalance_factor=4, validation_per_class=1))
    order = np.random.RandomState(42).permutation(5)
    zeros, ones = np.flatnonzero(np.array(labels) == 0), np.flatnonzero(np.array(labels) == 1)
    assert splits.train.counts == (4, 1) and splits.validation is not None
    for index, seed in enumerate([*zeros[order[:4]], *ones[order[:1]]]):
        np.testing.assert_array_equal(at(splits.train, index), pixels(int(seed)))
    np.testing.assert_array_equal(at(splits.validation, 1), pixels(int(ones[order[4]])))


def test_class_names_of_hugging_face_and_of_a_plain_key(config, tmp_path):
    features = {"img": {"_type": "Image"}, "fine_label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    for metadata in ({"huggingface": json.dumps({"info": {"features": features}})}, {"classes": "cat, dog"}):
        for split in ("train", "test"):
            file = tmp_path / f"{split}.parquet"
            write_parquet(file, [png(0), png(1)], [0, 1], True, ("img", "fine_label"), metadata)
        assert load_splits(config(dataset="parquet", root=str(tmp_path))).train.class_names == ("cat", "dog")
    write_parquet(tmp_path / "train.parquet", [png(0)], [0], True, ("img", "fine_label"), {"classes": "cat,dog"})
    with pytest.raises(DataError, match=r"train.parquet, column 'fine_label': no images of class 1 \(dog\)"):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2, 2], "train.parquet, column 'label': labels 1 do not occur although the largest is 2"),
        ([0, -1, 1], "train.parquet, column 'label': labels -1 are not valid; valid: integers 0 to 1"),
        ([0, None, 1], "train.parquet: row 1, column 'label': no label"),
        (pa.array(["a", "b", "c"]), "data.label_column: .*no column fits; valid: a column of integer labels"),
        (pa.array([0.0, 1.0, 1.0]), "data.label_column: .*no column fits"),
        (pa.array([0, 1, 2**63], pa.uint64()), "train.parquet: column 'label'"),
    ],
)
def test_parquet_label_faults(config, tmp_path, labels, message):
    write_parquet(tmp_path / "train.parquet", [png(0), png(1), png(2)], labels)
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1])
    with pytest.raises(DataError, match=message):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


def test_parquet_image_faults_name_file_and_row(config, tmp_path):
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1])
    natural = config(dataset="parquet", root=str(tmp_path), imbalance="natural")
    for content, message in (
        (b"no image", "not a readable image"),
        (None, "no image"),
        (png(3)[:60], "not a readable"),
    ):
        write_parquet(tmp_path / "train.parquet", [png(i) for i in range(4)] + [content], [0, 0, 1, 1, 1])
        with pytest.raises(DataError, match=f"train.parquet: row 4, column 'image': {message}"):
            load_splits(natural)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="train.parquet: not a readable Parquet file"):
        load_splits(natural)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match="data.train: no Parquet file at .*train.parquet"):
        load_splits(natural)


def test_parquet_columns_given_found_or_refused(config, tmp_path):
    names = ("photo", "kind")
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{split}.parquet", [png(0), png(1)], [0, 1], names=names)
    assert len(load_splits(config(dataset="parquet", root=str(tmp_path))).train) == 2  # the only ones that fit
    given = {"image_column": "photo", "label_column": "kind"}
    assert len(load_splits(config(dataset="parquet", root=str(tmp_path), **given)).train) == 2
    with pytest.raises(
        DataError, match=r"data.label_column: .*no column 'x'.*columns are photo \(binary\), kind \(int64\)"
    ):
        load_splits(config(dataset="parquet", root=str(tmp_path), label_column="x"))
    table = pq.read_table(tmp_path / "train.parquet")
    pq.write_table(table.append_column("kind2", table["kind"]), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="data.label_column: .*columns kind, kind2 could all be meant"):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


def test_shards_with_other_columns_are_refused(config, tmp_path):
    write_parquet(tmp_path / "train" / "0.parquet", [png(0), png(1)], [0, 1])
    write_parquet(tmp_path / "train" / "1.parquet", [png(0), png(1)], [0, 1], names=("image", "y"))
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1])
    with pytest.raises(DataError, match="1.parquet: column 'label' is missing"):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


@pytest.mark.skipif(not CIFAR10_JPEG.is_dir(), reason="needs ../shared/data/cifar10-jpeg")
def test_cifar10_in_jpeg(config):
    splits = load_splits(config(dataset="parquet", root=str(CIFAR10_JPEG), imbalance_factor=200))
    assert splits.train.counts == (5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25)
    assert splits.test.counts == (1000,) * 10 and splits.train.class_names[9] == "truck"


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
