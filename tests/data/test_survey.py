"""What lies in a folder of images, and the messages where it is not what is needed."""

from __future__ import annotations

import pytest
from PIL import Image

from lad_dist.data.survey import survey
from lad_dist.errors import DataError


def pictures(folder, count, size=(8, 8), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new(mode, size).save(folder / f"{mode} {i}.png")


def test_class_folders_alone(tmp_path):
    pictures(tmp_path / "Zaunkönig", 3)
    pictures(tmp_path / "blue tit", 2, (12, 9), "L")
    found = survey(tmp_path)
    assert (found.train, found.test) == (".", None)
    assert dict(zip(found.classes, found.counts, strict=True)) == {"Zaunkönig": 3, "blue tit": 2}
    assert (found.grey, found.colour, found.square, found.one_size) == (2, 3, False, False)
    assert sorted(found.sides) == [8, 8, 8, 9, 9]


@pytest.mark.parametrize(("names", "expected"), [
    (("train", "test"), ("train", "test")), (("Training", "val"), ("Training", "val")), (("train",), ("train", None)),
])  # fmt: skip
def test_splits_by_their_names(tmp_path, names, expected):
    for name in names:
        for c in "ab":
            pictures(tmp_path / name / c, 2)
    found = survey(tmp_path)
    assert (found.train, found.test) == expected and found.one_size and found.counts == (2, 2)


def test_what_is_not_ready_is_one_clear_message(tmp_path):
    def refused(name, match):
        with pytest.raises(DataError, match=match):
            survey(tmp_path / name)

    refused("absent", r"is not a folder; valid: a folder with one folder of images for each class")
    pictures(tmp_path / "flat", 3)
    refused("flat", r"no class folders with images, but 3 images directly in it; valid: .*CLASS")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "train.parquet").write_bytes(b"PAR1")
    refused("tables", r"but Parquet files, which data.dataset: parquet reads")
    pictures(tmp_path / "one" / "only", 3)
    refused("one", r"one class folder, only; valid: two or more")
    pictures(tmp_path / "hole" / "a", 3)
    (tmp_path / "hole" / "b").mkdir()
    refused("hole", r"no images in b; valid: at least one image in each class folder")
    for c in "ab":
        pictures(tmp_path / "tested" / "test" / c, 1)
    refused("tested", r"has a folder test and no folder train")
    pictures(tmp_path / "broken" / "a", 1)
    pictures(tmp_path / "broken" / "b", 1)
    (tmp_path / "broken" / "b" / "x.jpg").write_bytes(b"no image")
    refused("broken", r"x.jpg .*: not readable as images; remove or replace them")
