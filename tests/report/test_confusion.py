"""The confusion matrix: what is drawn where, for few classes and for many."""

from __future__ import annotations

import re

import pytest

from lad_dist.report.confusion import CELLS_UP_TO, NUMBERS_UP_TO, confusion_chart

THIRDS = (("head", 1), ("medium", 2), ("tail", 1))


def diagonal(classes: int) -> list[list[float]]:
    return [[float(true == said) for said in range(classes)] for true in range(classes)]


def test_rows_are_true_classes_and_columns_predicted_ones() -> None:
    shares = diagonal(4)
    shares[3] = [0.25, 0.0, 0.0, 0.75]  # the last class is taken for the first
    svg = confusion_chart("t", ["a", "b", "c", "<d>"], shares, THIRDS)
    cells = {
        title: (float(x), float(y), float(opacity))
        for x, y, opacity, title in re.findall(
            r'<rect class="fill s1" x="([\d.]+)" y="([\d.]+)"[^>]*fill-opacity="([\d.]+)"><title>([^<]*)</title>', svg
        )
    }
    wrong, right, first = (
        cells["&lt;d&gt; predicted as a: 25.0 %"],
        cells["&lt;d&gt; predicted as &lt;d&gt;: 75.0 %"],
        cells["a predicted as a: 100.0 %"],
    )
    assert len(cells) == 5
    assert wrong[0] == first[0] and wrong[1] == right[1] > first[1] and right[0] > wrong[0]
    assert wrong[2] == pytest.approx(first[2] / 2, abs=2e-3)  # the square root of a quarter
    assert re.findall(r'class="cell"[^>]*>(\d+)<', svg) == ["100", "100", "100", "25", "75"]
    assert ">true class<" in svg and ">predicted class<" in svg and "<d>" not in svg
    assert svg.count('class="divider"') == 4


@pytest.mark.parametrize("classes", [1, 2, NUMBERS_UP_TO, NUMBERS_UP_TO + 1, CELLS_UP_TO, CELLS_UP_TO + 1, 200, 1000])
def test_any_number_of_classes(classes: int) -> None:
    names = [f"class {c}" for c in range(classes)]
    svg = confusion_chart("t", names, diagonal(classes), (("head", 0), ("medium", classes), ("tail", 0)))
    assert svg.count("<title>") == (classes if classes <= CELLS_UP_TO else 0)
    assert svg.count('class="cell"') == (classes if classes <= NUMBERS_UP_TO else 0)
    if classes > CELLS_UP_TO:
        (path,) = re.findall(r'<path class="fill s1" fill-opacity="1.00" d="([^"]*)"', svg)
        assert path.count("M") == classes and ">medium<" in svg and ">head<" not in svg
    assert len(svg) < 100_000


def test_a_class_without_test_images_is_an_empty_row() -> None:
    svg = confusion_chart("t", ["a", "b", "c", "d"], [*diagonal(4)[:3], [0.0] * 4], THIRDS)
    assert svg.count("<title>") == 3
