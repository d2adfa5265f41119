"""benchmarks/scale.py: sizes of classes, made-up images, fitted exponents."""

from __future__ import annotations

import pytest
from PIL import Image


@pytest.fixture
def scale(benchmark_module):
    return benchmark_module("scale")


@pytest.mark.parametrize("name", ["imagenet-lt", "places-lt", "inaturalist"])
def test_class_sizes_have_the_shape_of_the_data_set(scale, name):
    shape = scale.SHAPES[name]
    sizes = scale.class_sizes(shape)
    assert (len(sizes), sum(sizes), max(sizes), min(sizes)) == (
        shape.classes, shape.images, shape.largest, shape.smallest
    )  # fmt: skip
    few = scale.class_sizes(shape, 0.01)
    assert min(few) == 2 and max(few) == max(2, round(shape.largest / 100))


def test_images_are_of_mixed_sizes_and_their_class(scale, tmp_path, monkeypatch):
    from lad_dist.data.datasets import load_splits
    from lad_dist.recipe import DataConfig

    monkeypatch.setitem(scale.SHAPES, "imagenet-lt", scale.Shape("small", 4, 60, 30, 5, 2))
    root = scale.make(tmp_path, "imagenet-lt")
    assert scale.make(tmp_path, "imagenet-lt") == root  # and makes nothing again
    files = sorted(root.glob("train/*/*.jpg"))
    assert len(files) == 60 and len({Image.open(file).size for file in files}) > 30
    assert sum(file.stat().st_size for file in files) / 60 < 3000
    splits = load_splits(
        DataConfig(dataset="list", root=str(root), train="train.txt", test="test.txt", imbalance="natural",
                   image_size=8, fit="center-crop", whitening="standardize")
    )  # fmt: skip
    assert max(splits.train.counts) == 30 and splits.test.counts == (2,) * 4
    images, labels = splits.train.images_NCHW.float(), splits.train.labels_N
    means = [images[labels == c].mean(0) for c in range(4)]
    nearest = [min(range(4), key=lambda c: float((x - means[c]).square().sum())) for x in splits.test.images_NCHW]
    assert sum(a == b for a, b in zip(nearest, splits.test.labels_N.tolist(), strict=True)) >= 7


def test_exponents(scale):
    assert scale.exponent([(1, 3), (10, 300), (100, 30_000)]) == pytest.approx(2)
    assert scale.exponent([(1, 5.0), (10, 5.0)]) == pytest.approx(0)


def test_every_measurement_names_a_function(scale):
    for function, _ in scale.measurements(1.0).values():
        assert callable(getattr(scale, function))
