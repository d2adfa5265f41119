"""Parquet data sets: where files are found, which rows are read, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import pixels, png

from lad_dist.data.datasets import load_splits
from lad_dist.errors import DataError

CIFAR10_JPEG = Path(__file__).parents[2] / ".." / "shared" / "data" / "cifar10-jpeg"


def at(image_set, index):
    return image_set.images_NCHW[index].numpy()


def write_parquet(
    file: Path, images, labels, as_struct=False, names=("image", "label"), metadata=None, group=3, plain=False
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if as_struct:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        image_array = pa.array([{"bytes": image, "path": None} for image in images], kind)
    else:
        image_array = pa.array(images, pa.binary())
    label_array = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    table = pa.Table.from_arrays([image_array, label_array], names=list(names))
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=group, use_dictionary=not plain)


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


def test_large_row_group_is_never_held_whole(tmp_path):
    image = png(0, (64, 64))  # 12 kB, as random pixels do not compress
    write_parquet(tmp_path / "train.parquet", [image] * 8000, [i % 2 for i in range(8000)], group=8000, plain=True)
    write_parquet(tmp_path / "test.parquet", [image] * 2, [0, 1])
    code = f"""
        import pyarrow
        from lad_dist.data.datasets import load_splits
        from lad_dist.recipe import DataConfig
        load_splits(DataConfig(dataset="parquet", root={str(tmp_path)!r}, imbalance_factor=1, n_max=3))
        print(pyarrow.default_memory_pool().max_memory())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 8000 * len(image) / 2


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
        with pytest.raises(DataError, match=rf"train.parquet: row 4, column 'image': {message}"):
            load_splits(natural)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train.parquet: not a readable Parquet file"):
        load_splits(natural)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"data.train: no Parquet file at .*train.parquet"):
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
    with pytest.raises(DataError, match=r"data.label_column: .*columns kind, kind2 all fit"):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


def test_shards_with_other_columns_are_refused(config, tmp_path):
    write_parquet(tmp_path / "train" / "0.parquet", [png(0), png(1)], [0, 1])
    write_parquet(tmp_path / "train" / "1.parquet", [png(0), png(1)], [0, 1], names=("image", "y"))
    write_parquet(tmp_path / "test.parquet", [png(0), png(1)], [0, 1])
    with pytest.raises(DataError, match=r"1.parquet: column 'label' is missing"):
        load_splits(config(dataset="parquet", root=str(tmp_path)))


@pytest.mark.skipif(not CIFAR10_JPEG.is_dir(), reason="needs ../shared/data/cifar10-jpeg")
def test_cifar10_in_jpeg(config):
    splits = load_splits(config(dataset="parquet", root=str(CIFAR10_JPEG), imbalance_factor=200))
    assert splits.train.counts == (5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25)
    assert splits.test.counts == (1000,) * 10 and splits.train.class_names[9] == "truck"
