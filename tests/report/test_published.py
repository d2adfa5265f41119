"""Published figures: the cells that exist, copied right, and none for what was not published."""

from __future__ import annotations

import pytest

from lad_dist.methods import METHODS
from lad_dist.report import published, tables
from lad_dist.report.published import PublishedFigure, cell
from lad_dist.results import TITLES


def of(figures: list[PublishedFigure], source: str, method: str = "", architecture: str = "convnet") -> float | None:
    found = [f.percent for f in figures if (f.source, f.method, f.architecture) == (source, method, architecture)]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize(
    ("dataset", "factor", "ipc", "percent"),
    [
        ("cifar10", 10, 50, 70.5),
        ("cifar10", 50, 20, 59.4),
        ("cifar10", 100, 10, 53.4),
        ("cifar10", 200, 50, 62.3),
        ("cifar100", 10, 10, 31.5),
        ("cifar100", 50, 50, 33.2),
        ("tiny-imagenet", 20, 20, 25.5),
        ("tiny-imagenet", 100, 10, 17.1),
    ],
)
def test_lads_own_figures(dataset: str, factor: float, ipc: int, percent: float) -> None:
    assert of(cell(dataset, float(factor), ipc), "distilled", "lad") == percent


def test_baselines_parts_and_other_networks_of_cifar10() -> None:
    figures = cell("cifar10", 100.0, 10)
    assert (of(figures, "random"), of(figures, "full"), of(figures, "distilled", "mtt")) == (34.4, 66.2, 37.7)
    assert of(figures, "distilled", "lad", "vgg11") == 29.7 and len(figures) == 9
    parts = cell("cifar10", 100.0, 50)
    assert (of(parts, "distilled", "lad-without-adm"), of(parts, "distilled", "lad-without-wma")) == (57.1, 54.8)
    dashes = cell("cifar10", 200.0, 10)
    assert of(dashes, "distilled", "mtt") is None and of(dashes, "distilled", "lad") == 52.2


@pytest.mark.parametrize(
    ("dataset", "factor", "ipc"),
    [
        ("cifar10", 20, 10),
        ("cifar10", 100, 1),
        ("cifar100", 100, 10),
        ("cifar100", 10, 5),
        ("tiny-imagenet", 10, 50),
        ("digits", 10, 10),
    ],
)
def test_what_was_not_published(dataset: str, factor: float, ipc: int) -> None:
    assert cell(dataset, float(factor), ipc) == []


def test_lad_leads_every_column_of_its_table_and_the_whole_set_every_row() -> None:
    """As in the paper: a slip in copying a digit is likely to break it."""
    for factor in (10.0, 50.0, 100.0, 200.0):
        for ipc in (10, 20, 50):
            figures = cell("cifar10", factor, ipc)
            lad, whole = of(figures, "distilled", "lad"), of(figures, "full")
            assert lad is not None and whole is not None
            small = [f.percent for f in figures if f.architecture == "convnet" and f.source != "full"]
            assert max(small) == lad
            assert factor == 200.0 or lad < whole  # at 200 and IPC 50 LAD passes the whole set


def test_every_published_name_is_one_that_the_tables_know() -> None:
    for factor, ipc in ((100.0, 10), (100.0, 50)):
        for figure in cell("cifar10", factor, ipc):
            assert figure.source in TITLES and (not figure.method or figure.method in METHODS)
    assert "2408.14506" in published.CITATION


def test_own_figures_of_another_method_do_not_stand_beside_lads() -> None:
    row = {"source": "distilled", "method": "datm", "architecture": "convnet", "overall": 0.4, "overall_std": 0.01}
    lines = tables.published_lines(cell("cifar10", 100.0, 10), [row])
    cells = {(line.source, line.architecture): line.figures for line in lines}
    assert cells["Distilled (DATM)", "convnet"] == ("40.0 ± 1.0", "37.3")
    assert cells["Distilled (LAD)", "convnet"] == ("–", "53.4")


def test_own_figures_of_one_architecture_do_not_stand_beside_anothers() -> None:
    row = {"source": "distilled", "method": "lad", "architecture": "convnet", "overall": 0.5}
    lines = tables.published_lines(cell("cifar10", 100.0, 10), [row])
    own = {line.architecture: line.figures[0] for line in lines if line.source == "Distilled (LAD)"}
    assert own == {"convnet": "50.0", "vgg11": "–", "resnet18": "–"}
