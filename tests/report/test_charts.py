"""The charts: where things are drawn."""

from __future__ import annotations

import re

import pytest

from lad_dist.report.charts import ClassSeries, Line, class_chart, line_chart
from lad_dist.report.drawing import ticks
from lad_dist.report.history import Curve, smoothed, thinned


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.41, 0.79, [0.4, 0.5, 0.6, 0.7, 0.8]),
        (-1.0, 1.0, [-1.0, -0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@pytest.mark.parametrize(("low", "high"), [(1.0, 250.0), (1.0, 10_000.0), (0.0, 1.0), (3.0, 3.0)])
def test_ticks_of_whole_numbers_stay_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5, whole=True)
    assert found and all(low <= t <= high and t == int(t) for t in found)


def heights(svg: str, css: str) -> list[float]:
    path = re.search(rf'<path class="{css}" d="([^"]*)"', svg)
    assert path
    return [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path[1])]


def test_a_line_goes_down_the_page_as_its_values_go_down() -> None:
    svg = line_chart("t", [Line("a", "s1", [(0, 3.0), (1, 2.0), (2, 1.0)], smooth=False)], "x", "y")
    drawn = heights(svg, "line s1")
    assert drawn == sorted(drawn) and drawn[1] - drawn[0] == pytest.approx(drawn[2] - drawn[1], abs=0.2)


def test_a_missing_value_breaks_the_line() -> None:
    svg = line_chart("t", [Line("a", "s1", [(0, 1.0), (1, None), (2, 1.5), (3, 2.0)], smooth=False)], "x", "y")
    assert re.search(r'class="line s1" d="M[^M]+M[^M]+"', svg)


def test_a_value_that_dwarfs_all_others_is_cut_off_and_counted() -> None:
    curve: Curve = [(float(i), 1.0 + 0.1 * (i % 3)) for i in range(300)]
    assert "above the axis" not in line_chart("t", [Line("a", "s1", curve)], "x", "y")
    curve[17] = (17.0, 1e6)
    svg = line_chart("t", [Line("a", "s1", curve)], "x", "y")
    assert "1 value above the axis" in svg and "1,000,000" not in svg
    assert min(heights(svg, "raw s1")) >= 30


def test_no_values_no_chart() -> None:
    assert line_chart("t", [Line("a", "s1", []), Line("b", "s2", [(1, None)])], "x", "y") == ""


@pytest.mark.parametrize("classes", [1, 2, 30, 31, 1000])
def test_the_chart_by_class_draws_any_number_of_classes(classes: int) -> None:
    names = [f"<{c}>" for c in range(classes)]
    series = [
        ClassSeries("Distilled", "s1", [0.5] * classes, None),
        ClassSeries("Full", "s3", [0.9] * classes, [0.1] * classes),
    ]
    svg = class_chart("t", names, [1000] * classes, series, [("head", 0), ("medium", classes), ("tail", 0)], 420)
    assert svg.count('class="fill count"') == (classes if classes <= 30 else 1)  # beyond, one path
    assert svg.count('class="fill s1" x') == 1 + (classes if classes <= 30 else 0)  # the legend, and the bars
    assert "<0>" not in svg and "head" not in svg


def test_smoothing_keeps_ends_length_and_constants() -> None:
    curve: Curve = [(float(i), 2.0) for i in range(100)]
    assert smoothed(curve) == curve
    ramp: Curve = [(float(i), float(i)) for i in range(100)]
    assert [y for _, y in smoothed(ramp)] == pytest.approx([y for _, y in ramp])
    assert smoothed([(0, 1.0), (1, None), (2, 3.0)]) == [(0, 1.0), (2, 3.0)]


def test_thinning_keeps_spikes_and_order() -> None:
    curve: Curve = [(float(i), 0.0) for i in range(10_000)]
    curve[4321] = (4321.0, 9.0)
    few = thinned(curve, 600)
    assert len(few) <= 600 and (4321.0, 9.0) in few and [x for x, _ in few] == sorted(x for x, _ in few)
    assert thinned(curve[:500], 600) == curve[:500]
