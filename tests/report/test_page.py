"""The page: whole, self-contained, safe against hostile names, and present for runs that are not finished."""

from __future__ import annotations

import base64
import hashlib
import io
import json
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
from lad_dist.data.longtail import head_medium_tail
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DistilledError, RunDirError
from lad_dist.progress import Events, read_events
from lad_dist.recipe import Recipe
from lad_dist.report import contents
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
    first = cells.index(["trained on", "architecture", "overall", "tail", "what distilling added: overall", "tail"])
    assert cells[first + 1] == ["Distilled (LAD)", "convnet", "67.5 ± 1.0", "57.0 ± 1.0", "–", "–"]
    # seed by seed 5, 3 and -3 points above the starting set
    assert cells[first + 2] == ["Starting set", "convnet", "65.8 ± 5.1", "55.3 ± 5.1", "+1.7 ± 2.4", "+1.7 ± 2.4"]
    assert cells[first + 3][0] == "Random real, soft labels" and cells[first + 3][4:] == ["+10.0 ± 0.0"] * 2
    assert cells[first + 4][4] == cells[first + 5][4] == "–"
    assert "distilled added +1.7 ± 2.4 points over its starting set, less than two standard errors." in page.words
    headings = ["source", "architecture", "seeds", "overall", "head", "medium", "tail", "epochs, lr"]
    assert cells.index(headings) > first
    figures = ["67.5 ± 1.0", "78.0 ± 1.0", "67.5 ± 1.0", "57.0 ± 1.0", "300, 0.05"]
    assert ["Distilled (LAD)", "convnet", "3", *figures] in cells
    assert [row[0] for row in cells].count("Random real") == 3
    assert ["class 9", "6", "tail", "54.0 ± 1.0", "52.3 ± 5.1", "29.0 ± 1.0", "64.0 ± 1.0"] in cells
    assert "not finished" not in page.words
    titles = [attrs.get("aria-label") for attrs in page.all("svg")]
    assert titles == ["Accuracy by class over training images"] * 2 + [
        "Confusion: distilled",
        "Confusion: whole long-tailed set",
        "Matching loss",
        "Direction of the student",
        "Length of the student's displacement",
        "Loss of the student",
        "Learning rate of the student, alpha",
        "Gradient of the pixels",
        "Direction by class group, representation phase",
        "Direction by class group, classifier phase",
        "Length by class group, representation phase",
        "Length by class group, classifier phase",
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
    assert ("Confusion: distilled" in svgs) == (lacking != "evaluated")
    assert ("Direction by class group, classifier phase" in svgs) == (lacking != "events")
    assert bool(page.all("img")) == (lacking != "distilled")
    assert ("not finished" in page.words) == (lacking in ("distilled", "evaluated"))
    assert ("shared buffer before this run" in page.words) == (lacking in ("experts", "events"))


def test_a_run_of_before_alignment_and_confusion_were_recorded_has_the_rest(make_run: MakeRun) -> None:
    recipe, run = make_run(confusion=False)
    lines = [line for line in run.events.read_text().splitlines() if '"kind":"iteration"' not in line]
    old = [json.dumps({"kind": "iteration", "iteration": i, "alpha": 0.05, "loss_classifier": 0.9}) for i in (1, 2, 3)]
    run.events.write_text("\n".join(lines + old) + "\n")
    _, page = report(recipe, run)
    svgs = [str(attrs.get("aria-label")) for attrs in page.all("svg")]
    assert "Matching loss" in svgs and not [s for s in svgs if "Confusion" in s or "class group" in s]
    assert "Gradient alignment" not in page.words and "classes are confused" not in page.words


def test_the_alignment_is_drawn_for_each_group_that_has_it(make_run: MakeRun) -> None:
    text, page = report(*make_run())
    drawn = {
        title: re.search(rf'<svg role="img" aria-label="{title}".*?</svg>', text, re.S)
        for title in ("Direction by class group, representation phase", "Direction by class group, classifier phase")
    }
    heights = {}
    for title, svg in drawn.items():
        assert svg
        assert (">backbone<" in svg[0]) == ("representation" in title)  # a frozen backbone has no direction
        assert ">cosine<" in svg[0] and ">iteration<" in svg[0] and ">at right angles<" in svg[0]
        for colour in ("s1", "s2", "s3"):
            path = re.search(rf'class="line {colour}" d="M\S+ (\S+?)L', svg[0])
            assert path
            heights[title, colour] = float(path[1])
        assert (
            heights[title, "s1"] < heights[title, "s2"] < heights[title, "s3"]
        )  # head highest on the page, tail lowest
    assert "matches the backbone only" in page.words


def test_a_joint_method_has_one_phase(make_run: MakeRun) -> None:
    recipe, run = make_run(sets=("method=mtt",))
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    for event in events:
        event.get("alignment", {}).pop("classifier", None)
    run.events.write_text("".join(json.dumps(e) + "\n" for e in events))
    _, page = report(recipe, run)
    titles = [
        str(attrs.get("aria-label")) for attrs in page.all("svg") if "class group" in str(attrs.get("aria-label"))
    ]
    assert titles == ["Direction by class group, all weights phase", "Length by class group, all weights phase"]
    assert "matches the backbone only" not in page.words


def test_the_confusion_matrix_in_groups(make_run: MakeRun) -> None:
    """Each class's missed images are taken for the class before: the tail's only way out is medium's last class."""
    _, page = report(*make_run())
    cells = [[" ".join(c.split()) for c in row] for row in page.rows]
    # distilled, 81 % less 3 % per class, mean of 3 seeds: head 0-2 misses class 0's 19 % to class 9; tail 7-9 loses class 7's
    assert ["head", "93.7", "0.0", "6.3"] in cells and ["tail", "0.0", "13.3", "86.7"] in cells
    assert "convnet, 3 networks added up" in page.words


def test_published_figures_stand_beside_the_runs_own(make_run: MakeRun) -> None:
    same = ("data.dataset=cifar10", "ipc=10")
    _, page = report(*make_run(factor=100.0, n_max=5000, ipc=10, sets=same, architectures=("convnet", "resnet18")))
    cells = [[" ".join(c.split()) for c in row] for row in page.rows]
    assert ["source", "architecture", "this run", "published"] in cells
    for row in (
        ["Distilled (LAD)", "convnet", "67.5 ± 1.0", "53.4"],
        ["Distilled (LAD)", "resnet18", "67.5 ± 1.0", "43.6"],
        ["Distilled (DATM)", "convnet", "–", "37.3"],
        ["Random real", "convnet", "42.5 ± 1.0", "34.4"],
        ["Whole long-tailed set", "convnet", "77.5 ± 1.0", "66.2"],
    ):
        assert row in cells
    assert "arXiv 2408.14506" in page.words and "chosen by accuracy on the test set" in page.words


@pytest.mark.parametrize(
    ("changes", "sets"),
    [
        ({}, ()),  # digits
        ({"n_max": 500}, ("data.dataset=cifar10", "ipc=10")),  # fewer images than published
        ({"ipc": 1}, ("data.dataset=cifar10", "ipc=1")),
        ({}, ("data.dataset=cifar10", "ipc=10", "data.image_size=16")),
        ({}, ("data.dataset=cifar10", "ipc=10", "evaluate.split=validation", "data.validation_per_class=5")),
        ({"factor": 30.0}, ("data.dataset=cifar10", "ipc=10")),
    ],
)
def test_nothing_published_stands_beside_another_experiment(make_run: MakeRun, changes: Any, sets: Any) -> None:
    _, page = report(*make_run(**{"factor": 100.0, "n_max": 5000, "ipc": 10, **changes}, sets=sets))
    assert "Comparison with published figures" not in page.words and "published" not in {
        c for row in page.rows for c in row
    }


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
    recipe, run = make_run(confusion=False)  # so that the merged table is all there is
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


# --- quick measurements on the way ------------------------------------------------------------------------------------


def look_at(run: RunDir, iteration: int, **figures: float | None) -> None:
    Events(run.events).emit("early-evaluation", iteration=iteration, split="test", epochs=3, seconds=1.0, **figures)


def test_accuracy_on_the_way(make_run):
    recipe, run = make_run()
    look_at(run, 10, overall=0.5, head=0.8, medium=0.5, tail=0.25)
    assert not read_history(read_events(run.events)).early_curve("head")  # a single point is no curve
    look_at(run, 20, error="the training loss is nan")
    look_at(run, 30, overall=0.6, head=0.75, medium=0.625, tail=0.5)
    history = read_history(read_events(run.events))
    assert history.early_curve("tail") == [(10, 0.25), (20, None), (30, 0.5)]
    write_report(recipe, run)
    assert "Accuracy during distillation" in (run.root / "report" / "index.html").read_text()
    Events(run.events).emit("distill-started", iteration=15)
    assert list(read_history(read_events(run.events)).early) == [10]  # measured again when the run comes by again


def test_no_accuracy_on_the_way(make_run):
    recipe, run = make_run()
    write_report(recipe, run)
    assert "Accuracy during distillation" not in (run.root / "report" / "index.html").read_text()


def many_classes(make_run: MakeRun, **changes: Any) -> tuple[str, Page]:
    """The page of a run of 300 classes, some of which have hostile names; confusion is recorded as pairs."""
    names = [*HOSTILE, *(f"class {c}" for c in range(len(HOSTILE), 300))]
    recipe, run = make_run(
        classes=300, ipc=1, channels=3, whitening="standardize", n_max=1280, names=names, confusion=False, **changes
    )
    for row in results.read(run.results):
        right = [round(100 * accuracy) for accuracy in row["per_class"]]
        pairs = [[c, c, n] for c, n in enumerate(right)] + [[c, (c + 1) % 300, 100 - n] for c, n in enumerate(right)]
        results.put(run.results, {**row, "confusion": [], "confusion_pairs": pairs})
    return report(recipe, run)


def test_of_many_classes_the_page_shows_both_ends_and_a_search_box(make_run: MakeRun) -> None:
    text, page = many_classes(make_run)
    cells = [[" ".join(c.split()) for c in row] for row in page.rows]
    assert sum(row[2:3] in (["head"], ["medium"], ["tail"]) for row in cells) == 20
    assert "10 classes of highest accuracy, Distilled" in page.words and "10 classes of lowest" in page.words
    assert any(row[0] == "class 299" for row in cells) and not any(row[0] == "class 150" for row in cells)
    assert [attrs.get("type") for attrs in page.all("input")] == ["search"]
    (searched,) = re.findall(r'<script type="application/json" id="class-figures">(.*?)</script>', text, re.DOTALL)
    rows = json.loads(searched)
    assert len(rows) == 300 and {row[0] for row in rows} >= {*HOSTILE, "class 150"} and len(rows[0]) == 7


def test_only_the_search_boxs_script_may_run(make_run: MakeRun) -> None:
    text, page = many_classes(make_run)
    assert len(page.all("script")) == 2 and "<script>alert" not in text
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in text


def test_the_confusion_of_many_classes_is_drawn_in_blocks_and_its_worst_pairs_listed(make_run: MakeRun) -> None:
    text, page = many_classes(make_run)
    cells = [[" ".join(c.split()) for c in row] for row in page.rows]
    assert "Each cell holds 3 neighbouring classes." in page.words
    assert any(row[:2] == ["class 299", HOSTILE[0]] and 48 < float(row[2]) < 50 for row in cells)
    drawings = re.findall(r'<svg role="img" aria-label="Confusion: distilled".*?</svg>', text, re.DOTALL)
    assert drawings[0].count("M") <= 100 * 100


def test_the_page_stays_small(make_run: MakeRun) -> None:
    text, _ = many_classes(make_run, iterations=3)
    assert len(text) < 900_000


def test_few_classes_of_large_images_are_shown(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from lad_dist.report import pictures as shown

    monkeypatch.setattr(shown, "_MOST_PIXELS", 2 * 2 * 8 * 8 * 20)
    _, page = report(*make_run(classes=30, channels=3, whitening="standardize"))
    assert len(page.all("img")) == 20 * 2 * 2 and "20 of 30 classes" in page.words


def test_gradient_norms_by_group_are_drawn_as_those_by_class(make_run: MakeRun) -> None:
    recipe, run = make_run()
    by_class, _ = report(recipe, run)
    groups = head_medium_tail(tuple(contents.read(recipe, run).counts))["by_thirds"]
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    for event in events:
        norms = event.pop("pixel_gradient_norm", None)
        if norms:
            event["pixel_gradient_norms"] = {part: sum(norms[c] for c in of) / len(of) for part, of in groups.items()}
    run.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    by_group, _ = report(recipe, run)
    drawn = [
        re.findall(r'<svg role="img" aria-label="Gradient of the pixels".*?</svg>', t) for t in (by_class, by_group)
    ]
    assert drawn[0] == drawn[1] != []
