"""How figures are written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lad_dist.report import tables


def summary(**fields: object) -> dict[str, object]:
    return {
        "source": "distilled",
        "architecture": "convnet",
        "seeds": 3,
        "method": "lad",
        "overall": 0.84382,
        "overall_std": 0.0171,
        "head": 0.5,
        "head_std": None,
        "medium": None,
        "medium_std": None,
        "tail": 1.0,
        "tail_std": 0.0,
        **fields,
    }


def test_result_lines_have_one_decimal_a_deviation_and_a_dash_where_nothing_is() -> None:
    (line,) = tables.result_lines([summary()])
    assert line.cells() == ("Distilled (LAD)", "convnet", "3", "84.4 ± 1.7", "50.0", "–", "100.0 ± 0.0")
    assert len(line.cells()) == len(tables.headings())


@pytest.mark.parametrize(
    ("source", "method", "title"),
    [
        ("random", "random", "Random real"),
        ("full", "full", "Whole long-tailed set"),
        ("distilled", "datm", "Distilled (DATM)"),
        ("distilled", "lad-without-wma", "Distilled (LAD without weight mismatch avoidance)"),
        ("other", "x", "other"),
    ],
)
def test_sources_are_named_for_people(source: str, method: str, title: str) -> None:
    assert tables.source_title({"source": source, "method": method}) == title


def test_groups_by_count_that_hold_no_class_are_left_out() -> None:
    rows = [
        {
            "source": "full",
            "method": "full",
            "architecture": "convnet",
            "by_count": {"many": m, "medium": None, "few": 0.25},
        }
        for m in (0.9, 0.8)
    ]
    groups, (line,) = tables.count_group_lines(rows)
    assert groups == ("many", "few") and line.figures == ("85.0 ± 7.1", "25.0 ± 0.0")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (31_388, "8 h 43 min"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


def test_importing_the_tables_is_cheap() -> None:
    heavy = "('torch', 'jinja2', 'PIL', 'numpy')"
    code = f"import sys, lad_dist.report.tables; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
