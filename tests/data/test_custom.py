"""Data of one's own: every form of it gives the images and labels of the same data set read by name; refusals name the field."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from lad_dist import plugins
from lad_dist.data import custom
from lad_dist.data.arrays import digits
from lad_dist.data.datasets import load_splits, look
from lad_dist.errors import DataError
from lad_dist.recipe import DataConfig, Recipe

TAIL = {"imbalance_factor": 5, "n_max": 20}


def config(source="mine:data", **fields):
    return DataConfig.model_validate({"dataset": "custom", "source": source, **TAIL, **fields})


@pytest.fixture
def mine(monkeypatch):
    """Makes ``mine:data`` whatever it is given."""

    def make(data):
        made = types.ModuleType("mine")
        made.data = data
        monkeypatch.setitem(sys.modules, "mine", made)

    return make


class Pairs(torch.utils.data.Dataset):
    """(image, label) by index, the image made by ``view``; counts what is fetched."""

    def __init__(self, source, view, targets=False):
        self.source, self.view, self.fetched = source, view, 0
        if targets:
            self.targets, self.classes = source.labels_N.tolist(), [f"digit {c}" for c in range(10)]

    def __len__(self):
        return len(self.source.labels_N)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        self.fetched += 1
        return self.view(self.source.images_NCHW[index]), self.source.labels_N[index]


VIEWS = {
    "PIL": lambda image: Image.fromarray(image[0]),
    "array HW": lambda image: image[0],
    "tensor CHW of floats": lambda image: torch.from_numpy(image / np.float32(255)),
    "array HWC": lambda image: image.transpose(1, 2, 0),
    "PIL, palette": lambda image: Image.fromarray(image[0]).convert("RGB").quantize(17),
}
ARRAYS = {
    "NCHW": lambda images: images,
    "NHW, tensor": lambda images: torch.from_numpy(images[:, 0]),
    "NHWC": lambda images: images.transpose(0, 2, 3, 1),
    "floats": lambda images: images / np.float64(255),
}


@pytest.fixture(scope="module")
def by_name():
    return load_splits(DataConfig.model_validate({"dataset": "digits", **TAIL}))


def same(found, known):
    for split in ("train", "test"):
        a, b = getattr(found, split), getattr(known, split)
        assert torch.equal(a.images_NCHW, b.images_NCHW) and torch.equal(a.labels_N, b.labels_N)
    assert found.train.name == "custom/train" and found.full_counts == known.full_counts


@pytest.mark.parametrize("view", [*ARRAYS])
def test_pairs_of_arrays(mine, by_name, view):
    train, test = digits(config())
    mine(tuple((ARRAYS[view](of.images_NCHW), of.labels_N) for of in (train, test)))
    same(load_splits(config()), by_name)


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("view", [v for v in VIEWS if v != "PIL, palette"])
def test_torch_data_sets(mine, by_name, view, targets):
    train, test = (Pairs(of, VIEWS[view], targets) for of in digits(config()))
    asked = []

    def data(given):
        asked.append(given)
        return train, test

    mine(data)
    found = load_splits(config())
    same(found, by_name)
    assert asked == [config()]
    assert found.train.class_names[3] == ("digit 3" if targets else "3")
    if targets:  # only what is kept, and the first image once more to see what it is like
        assert train.fetched == len(found.train) + 1
    counts, tested, pixels = look(config())
    assert (counts, tested, pixels.size, pixels.channels) == (found.train.counts, 540, 8, 1)


def test_16_bit_grey_is_scaled_as_in_files():
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    pixels = custom._pixels(Image.fromarray(levels), "here")
    np.testing.assert_array_equal(pixels, np.rint(levels / 257))
    with pytest.raises(DataError, match="here: floating-point pixels"):
        custom._pixels(Image.fromarray(levels.astype(np.float32)), "here")


def test_tensors_that_need_gradients_are_taken(mine, by_name):
    train, test = digits(config())
    mine(tuple((torch.from_numpy(of.images_NCHW / 255).requires_grad_(), of.labels_N) for of in (train, test)))
    same(load_splits(config()), by_name)


def test_a_palette_is_colour(mine):
    mine(tuple(Pairs(of, VIEWS["PIL, palette"], True) for of in digits(config())))
    assert load_splits(config()).train.channels == 3
    assert load_splits(config(channels=1)).train.channels == 1


def test_a_source_and_a_hugging_face_data_set(mine, by_name):
    datasets = pytest.importorskip("datasets")
    train, test = digits(config())
    mine((train, test))
    same(load_splits(config()), by_name)
    features = datasets.Features(
        {
            "digit": datasets.Image(),
            "label": datasets.ClassLabel(names=[f"n{c}" for c in range(10)]),
            "id": datasets.Value("int64"),
        }
    )

    def table(of):
        pictures = [Image.fromarray(image[0]) for image in of.images_NCHW]
        return datasets.Dataset.from_dict(
            {"digit": pictures, "label": of.labels_N.tolist(), "id": range(len(pictures))}, features=features
        )

    made = table(train), table(test)
    mine(made)
    found = load_splits(config())
    same(found, by_name)
    assert found.train.class_names[0] == "n0"
    with pytest.raises(DataError, match=r"data\.label_column: .* has no column 'class'; valid: digit, label, id"):
        load_splits(config(label_column="class"))
    with pytest.raises(DataError, match=r"data\.image_column: .* 0 columns of images"):
        mine(tuple(of.remove_columns("digit") for of in made))
        load_splits(config())


def test_names_that_packages_offer(monkeypatch, by_name):
    class Point:
        name = "their-digits"

        @staticmethod
        def load():
            return digits

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point] if group == "lad_dist.datasets" else [])
    same(load_splits(config("their-digits")), by_name)
    with pytest.raises(
        DataError, match=r"data\.source: 'birds' is not known; valid: module:attribute, or the names their-digits"
    ):
        load_splits(config("birds"))


def raising(_):
    raise KeyError("birds")


IMAGES = np.zeros((20, 1, 8, 8), np.uint8)
LABELS = np.arange(20) % 10
GOOD = (IMAGES, LABELS)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (3, r"returned builtins\.int; valid: \(train, test\)"),
        ((GOOD, GOOD, GOOD), r"returned builtins\.tuple; valid: \(train, test\)"),
        (raising, "raised KeyError: 'birds'"),
        ((GOOD, 3), r"mine:data \(test\): is builtins\.int; valid: a torch Dataset"),
        ((GOOD, {"a": 1}), r"item 0 raised KeyError: 0"),
        (((IMAGES[:, :, :, 0], LABELS[:19]), GOOD), "20 images, but 19 labels"),
        (((IMAGES[:, 0, 0], LABELS), GOOD), r"images of shape \(20, 8\)"),
        (((IMAGES.astype(np.int32), LABELS), GOOD), "pixels of type int32; valid: uint8"),
        (((IMAGES - 0.5, LABELS), GOOD), r"pixels outside \[0, 1\]"),
        (((IMAGES * np.nan, LABELS), GOOD), r"pixels outside \[0, 1\]"),
        (((IMAGES, LABELS + 0.5), GOOD), "labels of type float64"),
        (((IMAGES, LABELS - 1), GOOD), "labels -1 are not valid"),
        (([(1, 2, 3)] * 4, GOOD), r"item 0 is builtins\.tuple; valid: \(image, label\)"),
        (([("a.png", 0), ("b.png", 1)],) * 2, r"image 0: is builtins\.str; valid: a PIL image"),
        (
            ([(np.zeros((2, 8, 8), np.uint8), c) for c in (0, 1)],) * 2,
            r"image 0: shape \(2, 8, 8\)",
        ),
    ],
)
def test_what_cannot_be_used_is_named(mine, data, said):
    mine(data)
    with pytest.raises(DataError, match=said) as caught:
        load_splits(config(imbalance="natural", imbalance_factor=100, n_max=None))
    assert "mine:data" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere_at_all:data", "No module named 'nowhere_at_all'; valid: a module that Python finds"),
        ("math:birds", "AttributeError: .*birds"),
        ("math:", "valid: module:attribute"),
    ],
)
def test_names_that_lead_nowhere(source, said):
    with pytest.raises(DataError, match=rf"data\.source: {source}.*{said}"):
        load_splits(config(source))


@pytest.mark.parametrize("data", [{"dataset": "custom"}, {"dataset": "digits", "source": "mine:data"}])
def test_source_and_custom_go_together(data):
    with pytest.raises(ValidationError, match=r"data\.source: names the data of data\.dataset custom"):
        Recipe.model_validate({"data": data})


def test_recipes_without_it_keep_their_hashes():
    document = Recipe().model_dump(mode="json")
    assert document["data"].pop("source") is None
    assert Recipe.model_validate(document).experts_hash() == Recipe().experts_hash()
