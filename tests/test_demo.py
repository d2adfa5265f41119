"""``lad-dist demo``: its commands, and how it ends where one fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lad_dist import catalog, cli
from lad_dist.cli.demo import commands
from lad_dist.recipe import Recipe


def test_two_runs_measure_their_starting_sets_on_the_same_experts_and_one_its_teachers():
    from lad_dist import recipe_file

    first, second, third, compared = commands(Path("runs/demo"), ["--buffers", "b"])
    assert {"initial", "random-soft"} <= set(Recipe().evaluate.baselines) and "evaluate.baselines=[initial]" in second
    ours, theirs = (recipe_file.load(catalog.find_job(command[1]).recipe) for command in (first, second))
    assert ours.experts_hash() == theirs.experts_hash()
    assert third[1] == "digits-lt-aligned" and "random-teacher" in third[-1]
    assert compared == ["compare", "runs/demo/lad", "runs/demo/datm"]


@pytest.mark.parametrize("fails", [None, "digits-lt-matching"])
def test_each_command_is_shown_and_run_until_one_fails(monkeypatch, tmp_path, fails):
    ran = []

    def run(command, check):
        ran.append(command[3:])
        return subprocess.CompletedProcess(command, 130 if fails in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    ended = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "d")], prog_name="lad-dist")
    shown = [line.removeprefix("$ lad-dist ") for line in ended.stdout.splitlines() if line.startswith("$ lad-dist ")]
    assert shown == [" ".join(command) for command in ran]
    if fails is None:
        assert ended.exit_code == 0 and len(ran) == 4
        assert f"file://{tmp_path / 'd'}/lad/report/index.html" in ended.stdout
    else:
        assert ended.exit_code == 130 and len(ran) == 2 and "took" not in ended.stdout
