"""The page: whole, self-contained, safe against hostile names, and present for runs that are not finished."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lad_dist import results
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, RunDirError
from lad_dist.progress import Events, read_events
from lad_dist.recipe import Recipe
from lad_dist.report.history import read_history
from lad_dist.report.page import write_report
from lad_dist.rundir import RunDir

MakeRun = Callable[..., tuple[Recipe, RunDir]]

HOSTILE = [
    '<script>alert("x")</script>',
    "a & b",
    "\"quoted\" 'name'",
    "{{ 7 * 7 }}",
    "é – 猫",
    "</svg></title><img src=x onerror=1>",
    *(str(c) for c in range(6, 10)),
]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a test asks of a page. Fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if {"td", "th"} & set(self._open) and self.rows:
            self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def report(recipe: Recipe, run: RunDir) -> tuple[str, Page]:
    write_report(recipe, run)
    text = (run.report / "index.html").read_text(encoding="utf-8")
    return text, Page(text)


def pictures(page: Page) -> list[Image.Image]:
    found: list[Image.Image] = []
    for attrs in page.all("img"):
        kind, _, data = str(attrs["src"]).partition(";base64,")
        assert kind in ("data:image/png", "data:image/jpeg")
        found.append(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))
        found[-1].load()
    return found


def test_a_finished_run_has_tables_charts_and_pictures(make_run: MakeRun) -> None:
    _, page = report(*make_run())
    cells = [[" ".join(c.split()) for c in row] for row in page.rows]
    assert ["source", "architecture", "seeds", "overall", "head", "medium", "tail"] in cells
    assert ["Distilled (LAD)", "convnet", "3", "67.5 ± 1.0", "78.0 ± 1.0", "67.5 ± 1.0", "57.0 ± 1.0"] in cells
    assert [row[0] for row in cells].count("Random real") == 2 and [row[0] for row in cells].count(
        "Whole long-tailed set"
    ) == 2
    assert ["class 9", "6", "tail", "54.0 ± 1.0", "29.0 ± 1.0", "64.0 ± 1.0"] in cells
    assert "not finished" not in page.words
    titles = [attrs.get("aria-label") for attrs in page.all("svg")]
    assert titles == ["Accuracy by class over training images"] * 2 + [
        "Matching loss",
        "Direction of the student",
        "Learning rate of the student, alpha",
        "Gradient of the pixels",
        "Training loss of the experts",
        "Training accuracy of the experts",
    ]
    assert ["distill", "1 min 23 s", "1", "0.53 GB", "2.00 GB"] in cells
    assert "f" * 64 in page.words and "testhost (cpu)" in page.words


def test_pictures_are_the_set_with_whitening_undone(make_run: MakeRun) -> None:
    recipe, run = make_run(channels=3)
    _, page = report(recipe, run)
    shown = pictures(page)
    assert len(shown) == 2 * 10 * 2 and all(p.size == (8, 8) for p in shown)
    distilled = DistilledSet.load(run.distilled)
    undone = (
        distilled.whitening.invert(distilled.initial_images).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    )
    for i, at in ((0, 2), (1, 3), (2, 6), (19, 39)):  # a class's synthetic images come first, then where they started
        assert np.array_equal(np.asarray(shown[at]), undone[i])
    assert not np.array_equal(np.asarray(shown[0]), undone[0])
    for name in ("synthetic.png", "initial.png"):
        grid = Image.open(run.report / name)
        grid.load()
        assert grid.height >= 10 * 64


def test_the_page_needs_nothing_from_anywhere(make_run: MakeRun) -> None:
    text, page = report(*make_run(names=HOSTILE))
    assert "://" not in text
    assert page.all("script") == []
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "data", "srcset", "xlink:href"):
            assert str(attrs.get(name, "data:")).startswith("data:")
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


def test_hostile_class_names_are_shown_as_text(make_run: MakeRun) -> None:
    text, page = report(*make_run(names=HOSTILE))
    assert "<script" not in text and "onerror=1>" not in text.replace("onerror=1&gt;", "")
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert '<script>alert("x")</script>' in page.words and "{{ 7 * 7 }}" in page.words and "猫" in page.words
    assert " 49 " not in f" {page.words} "


@pytest.mark.parametrize("lacking", ["distilled", "evaluated", "experts", "events"])
def test_a_partial_run_is_reported_with_what_it_has(make_run: MakeRun, lacking: str) -> None:
    _, page = report(*make_run(**{lacking: False}))
    svgs = {attrs.get("aria-label") for attrs in page.all("svg")}
    assert ("Matching loss" in svgs) == (lacking != "events")
    assert ("Training loss of the experts" in svgs) == (lacking not in ("events", "experts"))
    assert ("Accuracy by class over training images" in svgs) == (lacking != "evaluated")
    assert bool(page.all("img")) == (lacking != "distilled")
    assert ("not finished" in page.words) == (lacking in ("distilled", "evaluated"))
    assert ("shared buffer before this run" in page.words) == (lacking in ("experts", "events"))


def test_an_empty_run_folder_is_reported(make_run: MakeRun) -> None:
    _, page = report(*make_run(distilled=False, evaluated=False, events=False))
    assert "0 of 30 iterations" in page.words and "Random real: 0 of 3 networks are measured" in page.words
    assert not page.all("svg") and not page.all("img")


def test_a_large_set_is_shown_in_part_and_the_page_says_so(make_run: MakeRun) -> None:
    recipe, run = make_run(classes=120, ipc=12, size=16, channels=3, whitening="standardize")
    _, page = report(recipe, run)
    assert len(page.all("img")) == 2 * 100 * 10
    assert "the first 10 of 12 images of each class; 100 of 120 classes" in page.words


def test_published_selection_is_called_optimistic(make_run: MakeRun) -> None:
    _, page = report(*make_run(sets=("distill.select=test-as-published",)))
    assert "chosen by accuracy on the test set" in page.words and "optimistic" in page.words
    assert any(attrs.get("class") == "note" for attrs in page.all("p"))


def test_seeds_measured_in_different_ways_are_not_passed_over(make_run: MakeRun) -> None:
    recipe, run = make_run()
    rows = results.read(run.results)
    rows[1]["settings"] = {"epochs": 1, "lr": 9.0}
    results.write(run.results, rows)
    assert "“Distilled” were not all measured in the same way" in report(recipe, run)[1].words


def test_iterations_that_a_resumed_run_tells_twice_count_once(make_run: MakeRun, iteration_event: Any) -> None:
    recipe, run = make_run()
    events = Events(run.events)
    events.emit("distill-started", iteration=20, gradient="keep", why="resumed")
    events.emit("iteration", **{**iteration_event(21, 10), "alpha": 0.7, "loss_classifier": float("nan")})
    events.close()
    history = read_history(read_events(run.events))
    assert sorted(history.iterations) == list(range(1, 22))
    assert history.curve("alpha")[-1] == (21, 0.7) and history.curve("loss_classifier")[-1] == (21, None)
    report(recipe, run)


def test_a_damaged_run_is_an_error_that_names_the_file(make_run: MakeRun) -> None:
    recipe, run = make_run()
    tensors = run.distilled / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(DistilledError, match=r"tensors\.safetensors"):
        write_report(recipe, run)
    shutil.rmtree(run.distilled)
    run.results.write_text("{")
    with pytest.raises(RunDirError, match=r"results\.json"):
        write_report(recipe, run)
    assert not run.report.exists()


def browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def console_of(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM after loading in a headless browser, and its console messages."""
    command = [
        str(browser()),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
        "--enable-logging=stderr",
        "--log-level=0",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(browser() is None and os.environ.get("CI") != "true", reason="no chromium to load the page in")
def test_a_browser_loads_the_page_without_a_console_message(make_run: MakeRun, tmp_path: Path) -> None:
    assert browser() is not None, "CI needs chromium (apt-get install chromium)"
    recipe, run = make_run(names=HOSTILE)
    text, _ = report(recipe, run)
    dom, console = console_of(run.report / "index.html", tmp_path / "profile")
    assert console == []
    assert dom.count("<svg") == text.count("<svg") > 0
    broken = tmp_path / "broken.html"  # the check itself can fail: the policy on the page refuses a script, loudly
    broken.write_text(text.replace("</main>", "<script>1</script></main>"), encoding="utf-8")
    assert console_of(broken, tmp_path / "profile")[1]
