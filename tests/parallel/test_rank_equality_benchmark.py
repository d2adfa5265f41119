"""The script that measures how far ranks drift apart."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_sees_no_difference_between_equal_runs_and_rounding_between_ranks(benchmark_module, tmp_path):
    again, two = benchmark_module("rank_equality").drift(2, tmp_path)
    assert str(again) == "0" and again.typical == 0
    assert 0 < two.largest < 1e-5 and two.typical < 1e-3


def test_the_page_has_the_figures_that_were_measured():
    measured = (ROOT / "benchmarks" / "results" / "rank_equality.md").read_text()
    shown = (
        (ROOT / "docs" / "scaling.md").read_text().partition("<!-- drift -->\n")[2].partition("<!-- end drift -->")[0]
    )
    assert shown.count("\n") >= 4 and shown in measured + "\n"
