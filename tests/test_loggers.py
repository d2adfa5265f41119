"""``--log NAME``: a run's events in a tracking service, from the command line and in Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lad_dist import Callback, Profile, Run, cli, loggers
from lad_dist.callbacks import Evaluation, ExpertEpoch, Iteration, StageEnd
from lad_dist.errors import RecipeError
from lad_dist.progress import Events
from lad_dist.recipe import Recipe

MADE = []
ROOT = Path(__file__).parents[1]


class Kept(Callback):
    """A logger of one's own: ``tests.test_loggers:Kept``."""

    def __init__(self, folder, recipe):
        self.folder, self.recipe, self.kinds, self.closed = folder, recipe, [], False
        MADE.append(self)

    def on_event(self, event):
        self.kinds.append(event["kind"])

    def close(self):
        self.closed = True


def something_else(folder, recipe):
    return print


@pytest.fixture(autouse=True)
def none_made():
    MADE.clear()


def on_the_command_line(*words) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.app([str(word) for word in words])
    return int(ended.value.code or 0)


def test_one_of_ones_own_by_an_option_gets_the_events_and_is_closed(tmp_path, small_experts, small_recipe):
    job, run = tmp_path / "job.yaml", tmp_path / "run"
    job.write_text(yaml.safe_dump(small_recipe().model_dump(mode="json")))
    options = ("--out", run, "--buffers", small_experts, "--threads", 1, "--log", f"{__name__}:Kept")
    assert on_the_command_line("distill", job, *options) == 0
    (made,) = MADE
    assert made.closed and made.folder == run and made.recipe == small_recipe()
    assert made.kinds == [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert made.kinds.count("iteration") == small_recipe().distill.iterations


def test_one_of_a_profile_in_python_stage_after_stage(tmp_path, small_experts, small_recipe):
    profile = Profile(fleet="off", device="cpu", threads=1, log=(f"{__name__}:Kept",))
    run = Run.open(tmp_path / "run", small_recipe(), profile=profile, buffers=small_experts, quiet=True)
    run.distill()
    run.evaluate("distilled", seeds=1)
    first, second = MADE
    assert first.closed and second.closed
    assert "iteration" in first.kinds and "evaluated" not in first.kinds and "evaluated" in second.kinds


@pytest.mark.parametrize(("name", "said"), [
    ("mlfow", "log: 'mlfow' is not known; valid: module:attribute"),
    (f"{__name__}:Missing", "log: .*Missing.*valid: module:attribute"),
    (f"{__name__}:MADE", "is a list; valid: wandb, or a function of"),
])  # fmt: skip
def test_a_name_that_nobody_offers_makes_no_run(tmp_path, small_experts, small_recipe, name, said):
    profile = Profile(fleet="off", device="cpu", threads=1, log=(name,))
    run = Run.open(tmp_path / "run", small_recipe(), profile=profile, buffers=small_experts, quiet=True)
    with pytest.raises(RecipeError, match=said):
        run.distill()
    assert not run.folder.exists()


def test_what_is_no_callback(tmp_path):
    events = Events(tmp_path / "events.jsonl")
    attached = loggers.attached([f"{__name__}:something_else"], tmp_path, Recipe(name="x"), events)
    with (
        pytest.raises(RecipeError, match=r"returned a builtin_function_or_method; valid: a lad_dist\.Callback"),
        attached,
    ):
        pass
    events.close()


# --- Weights & Biases ---------------------------------------------------------------------------------------------------


def tell(logger: Callback, error: str | None = None) -> None:
    logger.on_epoch(ExpertEpoch("representation", 3, 2, 0.7, None, 100.0))
    logger.on_iteration(Iteration(5, {"representation": 0.5, "classifier": 0.25}, 0.01, 0.2))
    logger.on_evaluation(Evaluation("distilled", "convnet", 1, 0.4, 0.5, 0.4, 0.3))
    logger.on_stage_end(StageEnd("distill", 3.0, error))
    logger.close()


def test_what_wandb_is_told(tmp_path, monkeypatch):
    told, finished = [], []
    run = SimpleNamespace(
        log=told.append,
        summary={},
        finish=lambda exit_code: finished.append(exit_code),
        define_metric=lambda *names, **options: None,
    )
    given = {}

    def init(**settings):
        given.update(settings)
        return run

    fake = SimpleNamespace(init=init, Settings=lambda **options: SimpleNamespace(project=None), Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    tell(loggers.find("wandb")(tmp_path / "a run", Recipe(name="x")))
    assert given["project"] == "lad-dist" and given["group"] == "a run" and given["config"]["name"] == "x"
    assert told == [
        {"experts/epoch": 2, "experts/3/representation/loss": 0.7},
        {"distill/iteration": 5, "distill/alpha": 0.01, "distill/loss/representation": 0.5, "distill/loss/classifier": 0.25},
        {"evaluation/seed": 1, "evaluation/distilled/convnet/overall": 0.4, "evaluation/distilled/convnet/head": 0.5,
         "evaluation/distilled/convnet/medium": 0.4, "evaluation/distilled/convnet/tail": 0.3},
    ]  # fmt: skip
    assert run.summary == {"seconds/distill": 3.0} and finished == [0]
    tell(loggers.find("wandb")(tmp_path / "a run", Recipe(name="x")), "NumericalError: the loss is nan")
    assert finished == [0, 1]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tell(loggers.find("wandb")(tmp_path, Recipe(name="x")))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # its own process writes the file
    while b"evaluation/distilled/convnet/tail" not in (held := file.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    assert b"distill/loss/representation" in held and b"evaluation/distilled/convnet/tail" in held


WITHOUT_LOGIN = """
from pathlib import Path
from lad_dist import Recipe, loggers
loggers.find("wandb")(Path("."), Recipe(name="x"))
"""


def test_wandb_without_a_login(tmp_path):
    known = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}  # which wandb reads once in a process
    environment = {**known, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WITHOUT_LOGIN]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert re.search("RecipeError: --log wandb: .*; valid: wandb login, or WANDB_MODE=offline", last), ended.stderr


def test_wandb_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"valid: pip install 'lad-dist\[wandb\]'"):
        loggers.find("wandb")(tmp_path, Recipe(name="x"))
