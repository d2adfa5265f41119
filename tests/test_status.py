"""``lad-dist status``: what a run's files say, once and again and again."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from lad_dist import progress, recipe_file, status
from lad_dist.cli import app
from lad_dist.errors import RunDirError
from lad_dist.progress import read_events
from lad_dist.report.page import write_report
from lad_dist.rundir import RunDir
from lad_dist.status import Follower, read_status
from lad_dist.status.show import print_status
from lad_dist.status.tensorboard import scalars
from lad_dist.trajectories.schema import part_path

ROOT = Path(__file__).parents[1]
BEGAN = 1_700_000_000.0
EPOCHS, CLASSIFIER_EPOCHS = 10, 5


class Run:
    """A run folder whose files are written by hand: 100 experts of 10 + 5 epochs."""

    def __init__(self, root: Path, recipe: Any) -> None:
        root.mkdir()
        (root / "recipe.yaml").write_text(recipe_file.dump(recipe))
        self.root, self.now = root, BEGAN

    def event(self, kind: str, after: float = 0.0, **fields: Any) -> None:
        self.now += after
        with (self.root / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": self.now, "kind": kind, **fields}) + "\n")

    def start_fleet(self) -> None:
        self.event("stage-started", stage="experts", remaining=100)
        self.event("ray-started", address="127.0.0.1:6379", dashboard="127.0.0.1:8265", namespace="lad")

    def epoch(self, expert: int, epoch: int, stage: str = "representation", after: float = 0.0, **fields: Any) -> None:
        figures = {"loss": 0.25, "accuracy": 0.5, "images_per_second": 1234.5, "host": "gpu7", "pid": 4000 + expert}
        self.event("expert-epoch", after, expert=expert, stage=stage, epoch=epoch, **(figures | fields))

    def publish(self, stage: str, expert: int, last: int) -> None:
        part = self.root / "trajectories" / part_path(stage, expert, 0, last)
        part.parent.mkdir(parents=True)
        part.touch()

    def status(self, after: float = 1.0) -> status.RunStatus:
        return read_status(self.root, self.now + after)

    def finish(self, recipe: Any) -> None:
        """Everything that a finished run leaves, as far as the status looks at it."""
        for expert in range(recipe.experts.count):
            self.publish("representation", expert, EPOCHS)
            self.publish("classifier", expert, CLASSIFIER_EPOCHS)
        (self.root / "distilled").mkdir()
        (self.root / "report").mkdir()
        (self.root / "report" / "index.html").touch()
        figures = {"overall": 0.5, "head": 0.5, "medium": 0.5, "tail": 0.5, "ipc": 2, "split": "test", "method": "lad",
                   "selection": "last", "architecture": "convnet"}  # fmt: skip
        rows = [{"source": s, "seed": i, **figures} for s in ("distilled", *recipe.evaluate.baselines) for i in (0, 1)]
        (self.root / "evaluation").mkdir()
        (self.root / "evaluation" / "results.json").write_text(json.dumps({"rows": rows}))


@pytest.fixture
def recipe(small_recipe):
    return small_recipe(experts={"count": 100, "epochs": EPOCHS, "classifier_epochs": CLASSIFIER_EPOCHS})


@pytest.fixture
def run(tmp_path, recipe):
    return Run(tmp_path / "run", recipe)


# --- a fleet ----------------------------------------------------------------------------------------------------------


def test_a_fleet_has_a_line_per_expert_at_work(run):
    run.start_fleet()
    for expert in (2, 11, 3):
        run.event("expert-started", expert=expert, host="gpu7", pid=4000 + expert)
    for epoch in (1, 2, 3):
        run.epoch(2, epoch, after=5.0)
        run.epoch(11, epoch, after=5.0)
    found = run.status(after=7.0)
    assert found.experts == (
        "expert  2  representation epoch 3 of 10, loss 0.25, accuracy 0.5, 1234 images/s, gpu7/4002, 0:12 ago",
        "expert  3  starts, gpu7/4003, 0:37 ago",
        "expert 11  representation epoch 3 of 10, loss 0.25, accuracy 0.5, 1234 images/s, gpu7/4011, 0:07 ago",
    )
    stage = found.stages[0]
    assert stage.state == "running"
    # An epoch takes 10 s, so an expert 150 s: 3600 * 3 / 150 an hour. 1494 epochs are left, 3 at a time.
    assert stage.detail == (
        "0 of 100 experts, 3 in training, 6 of 1500 epochs, 72 experts per hour, about 1:23:00 left, last event 0:07 ago"
    )
    assert found.notes == ("Ray: dashboard http://127.0.0.1:8265, address 127.0.0.1:6379, namespace lad",)


def test_one_expert_after_the_other_needs_no_lines(run):
    run.event("stage-started", stage="experts", remaining=100)
    run.epoch(7, 3)
    found = run.status()
    assert found.experts == () and found.stages[0].detail == (
        "0 of 100 experts, expert 7: representation epoch 3 of 10, loss 0.25, accuracy 0.5, 3 of 1500 epochs, "
        "last event 0:01 ago"
    )


def test_stages_that_take_different_time_are_told_apart(run):
    run.start_fleet()
    for epoch in range(1, EPOCHS + 1):
        run.epoch(0, epoch, after=10.0)
    for epoch in range(1, CLASSIFIER_EPOCHS + 1):
        run.epoch(0, epoch, "classifier", after=2.0)
    assert "32.73 experts per hour, about 3:01:30 left" in run.status().stages[0].detail  # 110 s each, 99 to go


def test_what_became_of_experts(run):
    run.start_fleet()
    run.publish("representation", 0, EPOCHS)
    run.publish("classifier", 0, CLASSIFIER_EPOCHS)
    run.event("expert-finished", expert=0)
    run.epoch(1, 4)
    run.event("expert-restarted", expert=1, attempt=1, error="the process died")
    waiting = run.status()
    assert waiting.experts == (
        "expert  1  stopped 0:01 ago, will be retried, restarted 1 time, gpu7/4001, the process died",
    )
    assert waiting.stages[0].detail.startswith("1 of 100 experts, 0 in training, 19 of 1500 epochs")
    run.event("expert-started", expert=1, host="gpu8", pid=1)
    run.epoch(2, 4)
    run.event("expert-failed", expert=2, host="gpu7", pid=9, error="NumericalError:\n  the loss is nan")
    found = run.status()
    assert found.stages[0].detail.startswith("1 of 100 experts, 1 in training, 23 of 1500 epochs")
    assert found.experts == (
        "expert  2  failed 0:01 ago, gpu7/9, NumericalError: the loss is nan",
        "expert  1  representation epoch 4 of 10, loss 0.25, accuracy 0.5, 1234 images/s, gpu8/1, restarted 1 time, 0:01 ago",
    )
    run.event("expert-started", expert=2, host="gpu9", pid=10)
    run.epoch(2, 4, host="gpu9")
    assert not any("failed" in line for line in run.status().experts)


def test_an_ended_or_silent_stage_has_no_experts_at_work_and_no_dashboard(run):
    run.start_fleet()
    run.epoch(1, 4)
    silent = run.status(after=3600)
    assert silent.stages[0].state == "stopped" and silent.experts == () and silent.notes == ()
    run.event("stage-stopped", stage="experts", error="Interrupted: by you")
    found = run.status()
    assert found.experts == () and found.notes == () and found.error == "experts: Interrupted: by you"
    run.event("stage-started", stage="experts")
    assert run.status().experts == () and run.status().error is None


def test_epochs_that_died_with_their_process_are_not_counted(run):
    run.start_fleet()
    run.epoch(1, 9)
    run.event("stage-started", stage="experts")
    run.epoch(2, 1)
    assert "1 of 1500 epochs" in run.status().stages[0].detail


@pytest.mark.parametrize("fields", [
    {}, {"expert": "7"}, {"expert": None}, {"expert": 7}, {"expert": 7, "stage": [1], "epoch": "3"},
    {"expert": 7, "stage": "representation", "epoch": None, "loss": "low", "host": 3, "pid": "x", "time": "noon"},
    {"expert": 10**9, "stage": "other", "epoch": -1, "loss": None},
])  # fmt: skip
@pytest.mark.parametrize("kind", ["expert-epoch", "expert-started", "expert-restarted", "expert-failed",
                                  "expert-finished", "iteration", "early-evaluation", "ray-started", "stage-finished"])  # fmt: skip
def test_odd_events_harm_nothing(run, kind, fields):
    run.start_fleet()
    run.event(kind, **fields)
    run.event(kind, **fields)
    run.epoch(1, 1)
    print_status(run.status(), Console(file=io.StringIO()))


def shown(run: Run, terminal: bool, width: int) -> list[str]:
    out = io.StringIO()
    print_status(run.status(), Console(file=out, force_terminal=terminal, color_system=None, width=width))
    return out.getvalue().splitlines()


def test_many_experts_are_cut_short(run):
    run.start_fleet()
    for expert in range(50):
        run.epoch(expert, 1)
    plain = [line for line in shown(run, terminal=False, width=60) if line.startswith("    ")]
    assert len(plain) == 20 and plain[-1] == "    ... and 31 more" and plain[0].endswith("gpu7/4000, 0:01 ago")
    cut = [line for line in shown(run, terminal=True, width=60) if line.startswith("    ")]
    assert len(cut) == 20 and max(map(len, cut)) == 60


def test_a_buffer_that_cannot_be_listed_hides_nothing_else(run, monkeypatch):
    from lad_dist.errors import TrajectoryError
    from lad_dist.trajectories import reader

    def away(*_: object) -> None:
        raise TrajectoryError("s3://bucket: is away")

    monkeypatch.setattr(reader, "Buffer", away)
    run.start_fleet()
    run.epoch(1, 1)
    found = run.status()
    assert found.notes[0] == "buffer: s3://bucket: is away" and found.experts[0].startswith("expert  1")


def test_the_last_look_at_the_set_is_told(run):
    run.event("stage-started", stage="distill")
    run.event("iteration", iteration=200, loss_representation=0.9)
    assert "quick measurement" not in run.status().stages[1].detail
    for iteration, overall in ((100, 0.5), (200, 0.625)):
        run.event("early-evaluation", iteration=iteration, overall=overall, tail=None)
    assert "quick measurement at iteration 200 62.5%" in run.status().stages[1].detail
    run.event("early-evaluation", iteration=300, error="the loss became NaN or Inf")
    assert "quick measurement" not in run.status().stages[1].detail


# --- again and again --------------------------------------------------------------------------------------------------


def test_a_follower_reads_only_what_is_new(run, monkeypatch):
    run.start_fleet()
    for epoch in range(1, 11):
        run.epoch(1, epoch)
    follower = Follower(run.root)
    first = follower.read(run.now)
    assert first == follower.read(run.now) and first.version == follower.read(run.now + 1).version
    parsed = []
    real = progress._event
    monkeypatch.setattr(progress, "_event", lambda line: parsed.append(line) or real(line))
    run.epoch(1, 1, "classifier")
    second = follower.read(run.now)
    assert len(parsed) == 1 and second.version != first.version
    assert "classifier epoch 1 of 5" in second.experts[0] and second == read_status(run.root, run.now)


def test_a_follower_survives_a_file_that_is_cut_or_replaced(run):
    run.start_fleet()
    run.epoch(1, 3)
    follower = Follower(run.root)
    assert "epoch 3 of 10" in follower.read(run.now).experts[0]
    events = run.root / "events.jsonl"
    whole = events.read_bytes()
    with events.open("ab") as file:
        file.write(b'{"kind":"expert-epoch","expert":1,"sta')
    assert "epoch 3 of 10" in follower.read(run.now).experts[0]
    events.write_bytes(whole[: whole.rindex(b'{"time"') + 7])  # truncated within its last event
    assert follower.read(run.now).experts == ()
    events.rename(run.root / "events.jsonl.1")
    assert follower.read(run.now).stages[0].state == "not started"
    run.event("stage-started", stage="experts")
    run.epoch(5, 6)
    run.epoch(6, 1)
    assert follower.read(run.now).experts[0].startswith("expert  5  representation epoch 6 of 10")


def test_a_follower_sees_new_parts(run):
    follower = Follower(run.root)
    assert "0 of 100 experts" not in follower.read(run.now).stages[0].detail
    run.publish("representation", 0, EPOCHS)
    run.publish("classifier", 0, CLASSIFIER_EPOCHS)
    run.event("stage-started", stage="experts")
    run.event("stage-finished", stage="experts")  # the end of a stage is looked at without delay
    assert "1 of 100 experts" in follower.read(run.now).stages[0].detail


def test_a_run_folder_that_goes_away(run):
    follower = Follower(run.root)
    (run.root / "recipe.yaml").unlink()
    with pytest.raises(RunDirError, match="not a run folder"):
        follower.read()


def test_a_hundred_megabytes_are_read_once(run, monkeypatch):
    """A long distillation with figures per class: the first look may take a while, the others must not."""
    run.event("stage-started", stage="distill")
    line = {
        "kind": "iteration",
        "loss_representation": 0.5,
        "alpha": 0.01,
        "experts": [1] * 40,
        "per_class": [0.125] * 100,
    }
    lines = [json.dumps({"time": BEGAN + i, "iteration": i, **line}) for i in range(1000)]
    with (run.root / "events.jsonl").open("a") as file:
        for _ in range(20):  # 20 MB here; reading is linear
            file.write("\n".join(lines) + "\n")
    follower = Follower(run.root)
    follower.read(run.now)
    run.event("iteration", iteration=1000)
    began = time.perf_counter()
    assert follower.read(run.now).stages[1].detail.startswith("iteration 1000 of")
    assert time.perf_counter() - began < 0.25


# --- the command ------------------------------------------------------------------------------------------------------


def start(*args: str, **streams: Any) -> subprocess.Popen[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.Popen([sys.executable, "-m", "lad_dist.cli", "status", *args], env=variables, **streams)


def test_watching_ends_when_everything_is_done(run, recipe):
    run.finish(recipe)
    done = start(str(run.root), "--watch", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0 and err == b""
    assert out.count(b"--- ") == 1 and b"100 of 100 experts" in out and b"50.0" in out


def test_watching_in_a_log_tells_changes_only(run, recipe):
    run.now = time.time()
    run.start_fleet()
    run.epoch(1, 1)
    process = start(str(run.root), "--watch", "--every", "0.1", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    seen = b""
    while b"epoch 1 of 10" not in seen:
        seen += process.stdout.readline()
    time.sleep(1.0)  # ten looks at nothing new
    run.epoch(1, 2)
    while b"epoch 2 of 10" not in seen:
        seen += process.stdout.readline()
    run.finish(recipe)
    run.event("stage-finished", stage="experts")
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == b""
    assert seen.count(b"--- ") == 2 and rest.count(b"--- ") >= 1  # it may look while the run is finishing
    assert b"dashboard http://127.0.0.1:8265" in seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_watching_in_a_terminal_until_interrupted(run, number):
    run.now = time.time()
    run.start_fleet()
    run.epoch(1, 1)
    controller, terminal = pty.openpty()
    process = start(str(run.root), "--watch", "--every", "0.1", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    while b"epoch 1 of 10" not in seen:
        seen += os.read(controller, 65536)
    run.epoch(1, 2)
    while b"epoch 2 of 10" not in seen:
        seen += os.read(controller, 65536)
    process.send_signal(number)
    try:
        while piece := os.read(controller, 65536):
            seen += piece
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(controller)
    assert process.wait(60) == 130
    text = seen.decode()
    assert "Traceback" not in text and "error" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is given back"
    assert max(len(part) for part in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text))) <= 100


def test_status_needs_neither_torch_nor_ray(run):
    run.start_fleet()
    run.epoch(1, 1)
    code = (
        "import sys, lad_dist.cli as c\n"
        f"try: c.app(['status', {str(run.root)!r}])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'ray', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_how_often_is_checked(run):
    process = start(str(run.root), "--watch", "--every", "0", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert b"0.1" in process.communicate(timeout=60)[1] and process.returncode == 2


ODD = [None, True, -1, 10**400, 1e999, float("nan"), "text", [1, "x"], [[]], {"a": 1}, {"a": {"b": "c"}}, {}]
KINDS = ["iteration", "expert-epoch", "early-evaluation", "evaluated", "distill-started", "data", "stage-started", "stage-finished",
         "stage-stopped", "ray-started", "expert-started", "expert-failed", "initial-set", "precision", "candidate"]  # fmt: skip
FIELDS = ["time", "kind", "iteration", "epoch", "expert", "seed", "stage", "source", "architecture", "loss", "accuracy", "alpha",
          "seconds", "overall", "tail", "loss_representation", "cosine_classifier", "counts", "fingerprint", "alignment", "error",
          "pixel_gradient_norm", "peak_memory_bytes", "windows", "gradient", "why", "experts", "images_per_second", "host",
          "dashboard", "replayed_from", "name"]  # fmt: skip


def test_odd_values_in_events_are_no_traceback_anywhere(run, tmp_path):
    """Every field of every kind of event with every odd value: status, the report, and TensorBoard."""
    whole = {"iteration": 3, "epoch": 2, "expert": 0, "seed": 0, "stage": "representation", "source": "distilled",
             "architecture": "convnet", "counts": [5, 1], "alpha": 0.1, "loss_representation": 0.5, "seconds": 1.0,
             "alignment": {"representation": {"cosine_head": 0.5}}, "pixel_gradient_norm": [1.0, 0.5]}  # fmt: skip
    lines = [
        json.dumps({"time": 1.0, "kind": kind, **whole, field: odd})
        for kind in KINDS
        for field in FIELDS
        for odd in ODD
    ]
    lines += ["[" * 100_000, "9" * 5000, "null", "[]", '"kind"', '{"kind": ["x"]}']
    run.root.joinpath("events.jsonl").write_text("\n".join(lines) + "\n")
    print_status(run.status(), Console(file=io.StringIO()))
    recipe = recipe_file.load(run.root / "recipe.yaml")
    write_report(recipe, RunDir(run.root))
    assert (run.root / "report" / "index.html").exists()
    for event in read_events(run.root / "events.jsonl"):
        for tag, value, step in scalars(event):
            assert isinstance(tag, str) and math.isfinite(value) and isinstance(step, int)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["folder", "fifo", "unreadable"])
@pytest.mark.parametrize("verb", ["status", "report", "tensorboard"])
def test_events_that_are_no_readable_file_are_one_error(run, monkeypatch, kind, verb):
    file = run.root / "events.jsonl"
    file.unlink(missing_ok=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.touch()
        real = os.open

        def refused(path, *args, **fields):
            if Path(path) == file:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *args, **fields)

        monkeypatch.setattr(os, "open", refused)
    if verb == "report":
        with pytest.raises(RunDirError, match=r"events\.jsonl: cannot be read"):
            write_report(recipe_file.load(run.root / "recipe.yaml"), RunDir(run.root))
        return
    done = CliRunner().invoke(app, [verb, str(run.root)])
    assert done.exit_code == 4 and "events.jsonl: cannot be read" in done.output.replace("\n", " "), done.output


def test_a_recipe_that_cannot_be_read_is_one_error(run, monkeypatch):
    real = Path.open

    def refused(self, *args, **fields):
        if self.name == "recipe.yaml":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *args, **fields)

    monkeypatch.setattr(Path, "open", refused)
    done = CliRunner().invoke(app, ["status", str(run.root)])
    assert done.exit_code == 2 and "recipe.yaml: cannot be read: Permission denied" in done.output.replace("\n", " ")
