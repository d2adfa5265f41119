"""A run's events as TensorBoard reads them."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lad_dist.cli import app
from lad_dist.progress import read_events

pytest.importorskip("tensorboard", reason="needs the package tensorboard")


def read_back(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: {one.step: one.value for one in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


@pytest.fixture
def run(pipeline_of):
    pipeline = pipeline_of("run", evaluate={"seeds": 1, "baselines": ["random"]})
    pipeline.all()
    pipeline.events.close()
    return pipeline.run


def test_every_number_arrives(run):
    done = CliRunner().invoke(app, ["tensorboard", str(run.root)])
    assert done.exit_code == 0 and f"tensorboard --logdir {run.tensorboard}" in done.output.replace("\n", "")
    found = read_back(run.tensorboard)
    events = list(read_events(run.events))
    iterations = [e for e in events if e["kind"] == "iteration"]
    assert found["distill/loss/representation"] == {
        e["iteration"]: pytest.approx(e["loss_representation"]) for e in iterations
    }
    assert set(found["distill/alpha"]) == {e["iteration"] for e in iterations}
    measured = {e["source"]: e["overall"] for e in events if e["kind"] == "evaluated"}
    for source, overall in measured.items():
        assert found[f"evaluate/{source}/convnet/overall"] == {0: pytest.approx(overall)}
    assert set(measured) == {"distilled", "random"}


def test_again_begins_afresh_and_watching_ends_with_the_run(run):
    for more in ([], ["--watch", "--every", "0.1"]):
        assert CliRunner().invoke(app, ["tensorboard", str(run.root), *more]).exit_code == 0
    assert len(list(run.tensorboard.iterdir())) == 1
    assert len(read_back(run.tensorboard)["distill/alpha"]) == 6


def test_numbers_that_are_null_are_left_out(run):
    line = {"time": 1.0, "kind": "iteration", "iteration": 99, "alpha": None, "loss_classifier": 0.5}
    look = {"time": 2.0, "kind": "early-evaluation", "iteration": 99, "overall": 0.75, "tail": None}
    with run.events.open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(look) + "\n")
    assert CliRunner().invoke(app, ["tensorboard", str(run.root)]).exit_code == 0
    found = read_back(run.tensorboard)
    assert 99 in found["distill/loss/classifier"] and 99 not in found["distill/alpha"]
    assert found["distill/accuracy/overall"] == {99: pytest.approx(0.75)} and "distill/accuracy/tail" not in found


def test_without_the_package_there_is_one_error(run, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **fields):
        if "tensorboard" in name and not name.startswith("lad_dist"):
            raise ImportError("No module named 'tensorboard'")
        return real(name, *args, **fields)

    monkeypatch.setattr(builtins, "__import__", missing)
    done = CliRunner().invoke(app, ["tensorboard", str(run.root)])
    assert done.exit_code == 4 and "pip install tensorboard" in done.output and not run.tensorboard.exists()


def test_a_folder_that_is_no_run(tmp_path):
    done = CliRunner().invoke(app, ["tensorboard", str(tmp_path)])
    assert done.exit_code == 4 and "is not a run folder" in done.output


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", ["open", "write", "flush"])
def test_a_full_or_read_only_disk_is_one_error_and_no_hang(run, monkeypatch, moment):
    real, code = Path.open, {"open": errno.EROFS, "write": errno.ENOSPC, "flush": errno.ENOSPC}[moment]

    class Full(io.BytesIO):
        def write(self, content):
            if moment == "write":
                raise OSError(code, os.strerror(code))
            return super().write(content)

        def flush(self):
            if moment == "flush" and not self.closed:
                raise OSError(code, os.strerror(code))

    def opened(self, mode="r", *args, **fields):
        if self.parent.name != "tensorboard" or "w" not in mode:
            return real(self, mode, *args, **fields)
        if moment == "open":
            raise OSError(code, os.strerror(code), str(self))
        return Full()

    monkeypatch.setattr(Path, "open", opened)
    done = CliRunner().invoke(app, ["tensorboard", str(run.root)])
    assert done.exit_code == 8, done.output
    assert os.strerror(code) in done.output and "cannot be written" in done.output.replace("\n", " ")
