"""Several runs on one page: what it shows, that a browser loads it, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lad_dist import results
from lad_dist.cli import app
from lad_dist.errors import RunDirError, StorageError
from lad_dist.report.compare import write_comparison


def browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture
def two_runs(make_run, tmp_path) -> list[Path]:
    """Two runs of one recipe but for the method; the second is 4 points better for every seed, on two architectures."""
    _, run = make_run(architectures=("convnet", "resnet18"))
    first, second = run.root.rename(tmp_path / "first"), tmp_path / "second"
    shutil.copytree(first, second)
    text = (second / "recipe.yaml").read_text()
    (second / "recipe.yaml").write_text(text.replace("weighted_loss: true", "weighted_loss: false"))
    for file in (second / "evaluation" / "rows").glob("distilled-*.json"):
        row = json.loads(file.read_text())
        del row["sha256"]
        file.write_text(json.dumps(row | {"overall": row["overall"] + 0.04, "set_id": "another"}))
    return [first, second]


def tables_of(text: str) -> dict[str, int]:
    """Rows in the body of every labelled table."""
    found = re.findall(r'<table[^>]*aria-label="([^"]+)".*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    return {label: body.count("<tr") for label, body in found}


def test_what_the_page_shows(two_runs, tmp_path):
    write_comparison(two_runs, tmp_path / "pages" / "compare.html")
    text = (tmp_path / "pages" / "compare.html").read_text()
    rows = tables_of(text)
    assert rows["Runs"] == 2 and rows["Where the recipes differ"] == 1 and "distill.weighted_loss" in text
    assert (
        rows["Accuracy by run and source"] == 10 + 2
    )  # all but the distilled sets are the same in both, and shown once
    assert rows["What distilling added"] == 2 * 2 * 2 and "+5.7" in text  # runs, architectures, references
    assert rows["Differences in pairs"] == 2 * len(results.FIGURES) and rows["Cost"] >= 2
    assert re.search(r"second − first</th><td>convnet</td><td>overall</td><td class=\"number\">\+4\.0</td>", text)
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) > 8
    for chart in charts:
        assert "first" in chart and "second" in chart and "aria-label=" in chart
    uris = re.findall(r'<img src="([^"]*)"', text)
    assert len(uris) == 2 * 10 * 2 and all(uri.startswith("data:image/") for uri in uris)
    assert "://" not in text


@pytest.mark.skipif(browser() is None and os.environ.get("CI") != "true", reason="no chromium to load the page in")
def test_a_browser_loads_it_without_a_console_message(two_runs, tmp_path):
    assert browser() is not None, "CI needs chromium (apt-get install chromium)"
    page = tmp_path / "compare.html"
    write_comparison(two_runs, page)
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0",
               "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert done.stdout.count("<svg") == page.read_text().count("<svg") > 0


def test_runs_of_other_data_have_no_common_chart_of_classes(two_runs, make_run, tmp_path):
    _, other = make_run(names=[f"another {c}" for c in range(10)])
    write_comparison([two_runs[0], other.root], tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    assert "Accuracy by class" not in text and "another 3" in text


def test_runs_of_one_name_are_told_apart(two_runs, tmp_path):
    again = tmp_path / "elsewhere" / "first"
    shutil.copytree(two_runs[1], again)
    write_comparison([two_runs[0], again], tmp_path / "compare.html")
    assert "elsewhere/first" in (tmp_path / "compare.html").read_text()


def test_a_run_that_has_no_set_yet(two_runs, tmp_path):
    shutil.rmtree(two_runs[1] / "distilled")
    write_comparison(two_runs, tmp_path / "compare.html")
    assert len(re.findall(r'<img src="', (tmp_path / "compare.html").read_text())) == 10 * 2


def test_what_is_refused_leaves_nothing(two_runs, tmp_path):
    page = tmp_path / "compare.html"
    with pytest.raises(RunDirError, match="7 runs; valid on one page: at most 6"):
        write_comparison([tmp_path / str(i) for i in range(7)], page)
    with pytest.raises(RunDirError, match="named twice"):
        write_comparison([two_runs[0], two_runs[0]], page)
    with pytest.raises(RunDirError, match="nowhere"):
        write_comparison([two_runs[0], tmp_path / "nowhere"], page)
    shutil.rmtree(two_runs[1] / "evaluation")
    with pytest.raises(RunDirError, match="second: holds no results yet"):
        write_comparison(two_runs, page)
    assert not page.exists()
    with pytest.raises(StorageError, match="is a folder"):
        write_comparison(two_runs[:1], tmp_path)


def test_the_command_says_where_the_page_is(two_runs, tmp_path):
    done = CliRunner().invoke(app, ["compare", *map(str, two_runs), "--out", str(tmp_path / "compare.html")])
    assert done.exit_code == 0, done.output
    assert f"page: {tmp_path / 'compare.html'}" in done.output and (tmp_path / "compare.html").exists()
    assert "second - first, convnet, overall: +4.0 ± 0.0 (standard error) points over 3 paired seeds" in done.output


def change(file: Path, **fields: object) -> None:
    """A row that says something else, with the checksum of that."""
    row = {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"}
    results.put(file.parents[1] / "results.json", row | fields)


def changed_rows(run: Path, **fields: object) -> None:
    for file in (run / "evaluation" / "rows").glob("*.json"):
        change(file, **fields)


def compared(*runs: Path) -> str:
    done = CliRunner().invoke(app, ["compare", *map(str, runs)], terminal_width=200, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_a_baseline_of_another_ipc_is_another_baseline(two_runs, tmp_path):
    assert compared(*two_runs).count("Random real ") == 1
    changed_rows(two_runs[1], ipc=5)
    assert compared(*two_runs).count("Random real ") == 2
    write_comparison(two_runs, tmp_path / "compare.html")
    assert (tmp_path / "compare.html").read_text().count("<td>Random real</td><td>convnet</td>") == 2


@pytest.mark.parametrize(("fields", "reason"), [
    ({"counts": [7] * 10}, "training images per class differ"), ({"split": "validation"}, "splits differ"),
    ({"dataset": "mnist/train"}, "data sets differ"), ({"fingerprints": {"train": "b"}}, "images differ"),
])  # fmt: skip
def test_runs_of_other_data_are_not_compared_in_pairs(two_runs, tmp_path, fields, reason):
    changed_rows(two_runs[0], dataset="digits/train", fingerprints={"train": "a"})
    changed_rows(two_runs[1], dataset="digits/train", fingerprints={"train": "a"})
    assert "second - first, convnet, overall: +4.0" in compared(*two_runs)
    changed_rows(two_runs[1], **fields)
    said = compared(*two_runs)
    assert f"second - first: not compared in pairs: their {reason}" in said and "second - first, convnet" not in said
    write_comparison(two_runs, tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text()
    assert "second and first are not compared in pairs" in text and "Differences in pairs" not in text


def test_damaged_results_and_sets_are_one_clear_error(two_runs):
    tensors = two_runs[1] / "distilled" / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = CliRunner().invoke(app, ["compare", *map(str, two_runs)])
    assert done.exit_code != 0 and "does not match the checksum" in done.output and "Traceback" not in done.output
    tensors.write_bytes(whole)
    (two_runs[1] / "evaluation" / "results.json").write_text('{"rows": [{"source": "distilled"')
    done = CliRunner().invoke(app, ["compare", *map(str, two_runs)])
    assert done.exit_code != 0 and "is not a results file" in done.output


def test_rows_of_two_protocols_are_two_lines(two_runs):
    (file,) = (two_runs[0] / "evaluation" / "rows").glob("random-convnet-2.json")
    change(file, settings={"epochs": 30, "lr": 0.05})
    said = compared(two_runs[0])
    assert re.search(r"Random real .* 30, 0.05", said) and re.search(r"Random real .* 300, 0.05", said)
