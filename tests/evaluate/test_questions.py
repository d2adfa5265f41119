"""What is asked of a run beside its recipe: the recipe stays, the report is written again, protocols are told apart."""

from __future__ import annotations

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lad_dist import recipe_file, results
from lad_dist.cli import app
from lad_dist.report.tables import protocol_notes
from lad_dist.status import print_results, read_status


@pytest.fixture
def run(pipeline_of):
    """A finished run of the small recipe."""
    pipeline = pipeline_of(evaluate={"baselines": ["random"], "seeds": 2})
    pipeline.all()
    return pipeline.run


def asked(verb, run, *options):
    done = CliRunner().invoke(app, [verb, str(run.root), "--device", "cpu", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_other_networks_do_not_change_the_recipe(run):
    before, page = run.recipe.read_bytes(), run.report / "index.html"
    old = page.read_text()
    out = asked("evaluate", run, "--arch", "mlp", "--seeds", "3")
    assert run.recipe.read_bytes() == before
    assert f"report: {page}" in out and "mlp" in out
    assert page.read_text() != old and "mlp" in page.read_text()  # the page that it names has the new rows
    (stage,) = [s for s in read_status(run.root).stages if s.name == "evaluate distilled"]
    assert (stage.state, stage.detail) == ("done", "2 of 2 networks, and 3 more")
    asked("evaluate", run, "--set", "evaluate.epochs=1", "--baseline", "random")
    asked("report", run, "--set", "evaluate.seeds=9")
    assert run.recipe.read_bytes() == before and "not finished" not in page.read_text()


def test_a_run_does_change_what_may_differ(run):
    asked("run", run, "--set", "evaluate.seeds=3", "--fleet", "off")
    assert recipe_file.load(run.recipe).evaluate.seeds == 3


def test_no_page_is_written_where_there_is_none(run):
    (run.report / "index.html").unlink()
    assert "writes the report" in asked("evaluate", run, "--seeds", "1")
    assert not (run.report / "index.html").exists()


def test_networks_of_other_epochs_have_a_line_of_their_own(run, capsys):
    asked("evaluate", run, "--baseline", "random", "--seeds", "1", "--set", "evaluate.epochs=1")
    rows = [r for r in results.read(run.results) if r["source"] == "random"]
    assert sorted(r["settings"]["epochs"] for r in rows) == [1, 3]
    summaries = [s for s in results.summary(rows) if s["source"] == "random"]
    assert [(s["epochs"], s["seeds"], s["differs"]) for s in summaries] == [(1, 1, ""), (3, 1, "epochs 3")]
    assert all(s["overall_std"] is None for s in summaries)  # nothing was averaged
    print_results(rows, Console(width=200))
    told = capsys.readouterr().out
    assert "Random real, epochs 3" in told and "3, 0.05" in told and "1, 0.05" in told
    assert "Random real, epochs 3" in (run.report / "index.html").read_text()


def test_what_else_differs_between_sources_is_said(run):
    asked("evaluate", run, "--baseline", "random", "--set", "evaluate.batch=4", "--set", "evaluate.momentum=0.5")
    notes = protocol_notes(results.read(run.results))
    assert notes[0].endswith("the learned alpha: Distilled (LAD); distill.alpha: Random real.")
    assert (
        notes[1] == "Protocol differs from Distilled (LAD): Random real: batch 4 (there 8), momentum 0.5 (there 0.9)."
    )
    assert notes[1] in (run.report / "index.html").read_text()


def test_every_row_carries_its_protocol(run):
    for row in results.read(run.results):
        assert {"epochs", "lr", "batch", "augment", "network"} <= set(row["settings"])
        assert row["settings"]["network"]["norm"] == "instance" and row["split"] == "test" and row["lr_rule"]
    assert json.loads(run.results.read_text())["rows"][0]["lr_rule"] == "the learned alpha"
