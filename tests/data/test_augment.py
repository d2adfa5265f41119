"""DSA: what each operation does, what is drawn for it, and that both can be taken apart."""

from __future__ import annotations

import itertools
import sys
import types

import numpy as np
import pytest
import torch
from textbook import augmented

from lad_dist.data import augment
from lad_dist.data.augment import Draw, apply, draw
from lad_dist.errors import RecipeError
from lad_dist.recipe import OPERATIONS, AugmentConfig
from lad_dist.seeds import rng

SIDE, MANY = 13, 4000
COUNT = itertools.count()


def drawn(operation: str, batch: int = MANY, size: int = SIDE, seed: int = 0, **fields) -> Draw:
    return draw(rng(seed), AugmentConfig(operations=(operation,), **fields), batch, size)


def images(batch: int = 6, channels: int = 3, side: int = SIDE, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))


# --- what is drawn ----------------------------------------------------------------------------------------------------


def covers(values: np.ndarray, low: float, high: float) -> bool:
    """Uniform over [low, high], as far as thousands of draws tell."""
    width = high - low
    return bool(low <= values.min() < low + 0.02 * width and high - 0.02 * width < values.max() <= high
                and abs(values.mean() - (low + high) / 2) < 0.03 * width)  # fmt: skip


def test_operations_come_equally_often():
    names = [draw(rng(0, i), AugmentConfig(), 1, 8).operation for i in range(3000)]
    counts = {name: names.count(name) for name in OPERATIONS}
    assert sum(counts.values()) == 3000 and all(400 < n < 600 for n in counts.values())


def test_color_ranges():
    brightness, saturation, contrast = drawn("color").values_BD.T
    assert covers(brightness, -0.5, 0.5) and covers(saturation, 0, 2) and covers(contrast, 0.5, 1.5)
    brightness, saturation, contrast = drawn("color", brightness=0.4, saturation=1.0, contrast=0.1).values_BD.T
    assert covers(brightness, -0.2, 0.2) and covers(saturation, 0, 1) and covers(contrast, 0.9, 1.1)
    assert set(drawn("color", contrast=0.0).values_BD[:, 2]) == {1.0}
    assert covers(drawn("color", contrast=1.0).values_BD[:, 2], 0, 2)


@pytest.mark.parametrize(("size", "fraction", "most"), [(13, 0.125, 2), (32, 0.125, 4), (8, 0.08, 1), (8, 0.0, 0)])
def test_crop_range(size, fraction, most):
    values = drawn("crop", size=size, crop=fraction).values_BD
    for column in values.T:
        found, counts = np.unique(column, return_counts=True)
        assert found.tolist() == list(range(-most, most + 1)) and counts.min() > 0.8 * MANY / len(found)


@pytest.mark.parametrize(("size", "fraction", "side"), [(13, 0.5, 7), (12, 0.5, 6), (8, 0.0, 0), (8, 1.0, 8)])
def test_cutout_range(size, fraction, side):
    rows, columns, sides = drawn("cutout", size=size, cutout=fraction).values_BD.T
    places = list(range(-(side // 2), size + 1 - side % 2 - side // 2))
    assert set(sides) == {side}
    assert np.unique(rows).tolist() == np.unique(columns).tolist() == places


def test_flip_probability():
    assert set(drawn("flip").values_BD[:, 0]) == {0.0, 1.0} and abs(drawn("flip").values_BD.mean() - 0.5) < 0.03
    assert drawn("flip", flip=0.0).values_BD.max() == 0 and drawn("flip", flip=1.0).values_BD.min() == 1
    assert abs(drawn("flip", flip=0.2).values_BD.mean() - 0.2) < 0.03


def test_scale_and_rotate_ranges():
    for factors in drawn("scale").values_BD.T:
        assert covers(factors, 1 / 1.2, 1.2)
    assert covers(drawn("scale", scale=2.0).values_BD[:, 0], 0.5, 2)
    assert covers(drawn("rotate").values_BD[:, 0], -np.pi / 12, np.pi / 12)
    assert covers(drawn("rotate", rotate=90.0).values_BD[:, 0], -np.pi / 2, np.pi / 2)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_images_have_parameters_of_their_own(operation):
    values = drawn(operation, batch=200).values_BD
    columns = values[:, :2].T if operation == "cutout" else values.T
    assert all(len(np.unique(column)) > 1 for column in columns)
    if len(columns) > 1:
        assert abs(np.corrcoef(columns)[0, 1]) < 0.3


@pytest.mark.parametrize("operation", OPERATIONS)
def test_draws_are_a_function_of_the_generator(operation):
    np.testing.assert_array_equal(drawn(operation, 5).values_BD, drawn(operation, 5).values_BD)
    assert drawn(operation, 50).values_BD.tolist() != drawn(operation, 50, seed=1).values_BD.tolist()


def test_no_operations_is_the_identity():
    nothing, x = draw(rng(0), AugmentConfig(operations=()), 6, SIDE), images()
    assert nothing.operation == "none" and len(nothing.values_BD) == 6
    assert torch.equal(apply(x, nothing), x)
    assert torch.equal(apply(x[2:4], nothing.rows(slice(2, 4))), x[2:4])


# --- what is done -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 13])
def test_equals_the_textbook_image_by_image(operation, channels, side, monkeypatch, benchmark_module):
    x = images(12, channels, side, torch.float32)
    expected = augmented(operation, x, seed=5)
    torch.manual_seed(5)
    torch.randint(0, 1, (1,))
    values = benchmark_module("parity")._official_draws(operation, x, AugmentConfig())
    torch.testing.assert_close(apply(x, Draw(operation, values.double().numpy())), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_some_rows_alone_are_those_rows_of_the_whole(operation):
    x, d = images(), drawn(operation, 6)
    whole = apply(x, d)
    for index in (slice(0, 2), slice(3, 6), slice(5, 5), np.array([4, 1])):
        rows = torch.arange(6)[index if isinstance(index, slice) else torch.from_numpy(index)]
        assert torch.equal(apply(x[rows], d.rows(index)), whole[rows])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_differentiable(operation, channels):
    x, d = images(2, channels, 5).requires_grad_(), drawn(operation, 2, 5)
    assert torch.autograd.gradcheck(lambda x: apply(x, d), x)
    assert apply(x.float(), d).dtype == torch.float32 and apply(x, d).shape == x.shape


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_input_is_left_alone(operation):
    x = images()
    before = x.clone()
    changed = apply(x, drawn(operation, 6))
    assert torch.equal(x, before) and not torch.equal(changed, x)


@pytest.mark.parametrize(("operation", "values"), [
    ("color", [0.0, 1.0, 1.0]), ("crop", [0.0, 0.0]), ("cutout", [0.0, 0.0, 0.0]), ("flip", [0.0]),
    ("scale", [1.0, 1.0]), ("rotate", [0.0]),
])  # fmt: skip
def test_neutral_parameters_change_nothing(operation, values):
    x = images()
    torch.testing.assert_close(apply(x, Draw(operation, np.tile(values, (6, 1)))), x)


def test_saturation_does_nothing_to_grey_images():
    x = images(channels=1)
    low, high = (apply(x, Draw("color", np.tile([0.2, s, 1.3], (6, 1)))) for s in (0.0, 2.0))
    assert torch.equal(low, high) and not torch.equal(low, x)


def test_no_saturation_makes_colour_grey():
    grey = apply(images(), Draw("color", np.tile([0.0, 0.0, 1.0], (6, 1))))
    torch.testing.assert_close(grey, images().mean(1, keepdim=True).expand(-1, 3, -1, -1))


def test_contrast_keeps_the_mean_and_scales_the_deviation():
    x = images()
    changed = apply(x, Draw("color", np.tile([0.0, 1.0, 0.5], (6, 1))))
    torch.testing.assert_close(changed.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(changed.std((1, 2, 3)), 0.5 * x.std((1, 2, 3)))


def test_crop_shifts_and_fills_with_zero():
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    shifted = apply(x, Draw("crop", np.array([[1.0, -2.0]])))
    assert shifted[0, 0].tolist() == [[0, 0, 5, 6], [0, 0, 9, 10], [0, 0, 13, 14], [0, 0, 0, 0]]


def test_flip_mirrors_the_images_it_is_told():
    x = images(3)
    flipped = apply(x, Draw("flip", np.array([[1.0], [0.0], [1.0]])))
    assert torch.equal(flipped, torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))


def test_cutout_makes_a_hole_of_its_side():
    hole = apply(torch.ones(1, 2, 8, 8), Draw("cutout", np.array([[2.0, 3.0, 4.0]])))
    assert int((hole == 0).sum()) == 2 * 16 and float(hole[0, :, 2:6, 3:7].abs().sum()) == 0


def test_rotation_by_a_right_angle():
    x = images(1)
    turned = apply(x, Draw("rotate", np.array([[np.pi / 2]])))
    torch.testing.assert_close(turned, torch.rot90(x, 1, (2, 3)), rtol=1e-6, atol=1e-6)


def test_no_images():
    assert apply(images()[:0], drawn("rotate", 6).rows(slice(0, 0))).shape == (0, 3, SIDE, SIDE)


def test_every_operation_of_the_recipe_is_known():
    assert set(augment._OPERATIONS) == set(augment._RANGES) == set(OPERATIONS)


# --- operations of one's own ------------------------------------------------------------------------------------------


def dim(images_BCHH, uniform_B1):
    return images_BCHH * (1 - uniform_B1.view(-1, 1, 1, 1))


dim.numbers = 1


def halved(images_BCHH, uniform_B3):
    return images_BCHH[:, :, ::2]


def broken(images_BCHH, uniform_B3):
    raise KeyError("no")


@pytest.fixture
def own(monkeypatch):
    """Makes ``NAME:op`` the given operation, under a name that no cache knows; returns it."""

    def give(operation) -> str:
        module = types.ModuleType(f"mine_augmentation_{next(COUNT)}")
        module.op = operation
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return f"{module.__name__}:op"

    return give


def test_an_operation_of_ones_own_gets_its_numbers_row_by_row(own):
    config = AugmentConfig(operations=("flip", own(dim)))
    made = [draw(rng(0, i), config, 6, SIDE) for i in range(40)]
    mine = [d for d in made if d.operation != "flip"]
    assert 10 < len(mine) < 30 and all(d.values_BD.shape == (6, 1) for d in mine)
    x, rows = images(6), np.array([4, 1])
    x.requires_grad_()
    whole = apply(x, mine[0])
    torch.testing.assert_close(whole[rows], apply(x[rows], mine[0].rows(rows)), rtol=0, atol=0)
    torch.testing.assert_close(whole, x * (1 - torch.as_tensor(mine[0].values_BD).to(x.dtype).view(-1, 1, 1, 1)))
    assert bool(torch.autograd.grad(whole.sum(), x)[0].isfinite().all())
    with torch.no_grad():  # where the check itself needs a graph
        apply(x, draw(rng(0), AugmentConfig(operations=(own(lambda i, u: 2 * i),)), 6, SIDE))


@pytest.mark.parametrize(("operation", "said"), [
    (halved, r"returns \(4, 3, \d+, \d+\) for images of .*; valid: the same shape"),
    (lambda i, u: i.detach(), "not differentiable with respect to the images"),
    (lambda i, u: i + torch.randn_like(i), "an image's result changes with its batch or between calls"),
    (lambda i, u: i - i.mean(dim=0), "an image's result changes with its batch"),
    (lambda i, u: i.add_(1), "RuntimeError: a leaf Variable"),
    (lambda i, u: (i - i).sqrt(), "its gradient is not finite"),
    (broken, "KeyError: 'no'"),
    (3, "is a int; valid: a callable"),
])  # fmt: skip
def test_what_is_no_operation_is_refused_in_one_line(own, operation, said):
    name = own(operation)
    with pytest.raises(RecipeError, match=rf"^augment\.operations: {name}: .*{said}") as refused:
        apply(images(2), draw(rng(0), AugmentConfig(operations=(name,)), 2, SIDE))
    assert "\n" not in str(refused.value)


def test_operations_that_nobody_knows():
    with pytest.raises(ValueError, match=r"should be 'color', .*'rotate' or module:attribute"):
        AugmentConfig(operations=("flop",))
