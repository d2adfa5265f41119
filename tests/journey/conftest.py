"""Whole runs through the command line, tiny: seconds on one thread."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from lad_dist import cli

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "name": "tiny", "ipc": 1,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20},
    "model": {"width": 4, "depth": 1},
    "augment": {"operations": ["crop", "scale"]},
    "experts": {"count": 2, "epochs": 3, "classifier_epochs": 2, "batch": 32, "epochs_per_part": 2},
    "distill": {"iterations": 3, "student_steps": 2, "student_steps_classifier": 2, "batch": 5, "window_epochs": 1,
                "start_epoch_max": 2, "class_weights": "mean-one", "lr_images": 1.0, "lr_alpha": 1e-7,
                "checkpoint_every": 2},
    "evaluate": {"seeds": 1, "epochs": 2, "full_epochs": 1},
}  # fmt: skip


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def fails(self, code: int, *said: str) -> Ended:
        """One clear message on stderr with all of ``said`` in it, this exit code, no traceback."""
        assert self.code == code, f"exit code {self.code}, expected {code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        assert self.err.startswith("error: ") and self.err.count("error: ") == 1, self.err
        for text in said:
            assert text in self.err, f"{text!r} is not in {self.err!r}"
        return self

    def succeeds(self) -> Ended:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


@dataclass
class LadDist:
    """``lad-dist`` in this process (quick), or as a process of its own (to be killed). Always on one thread.

    Experts are trained in the process, unless ``--fleet`` is among the arguments.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, *args: object) -> Ended:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.app([str(a) for a in self._arguments(args)], prog_name="lad-dist")
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Ended(code, out.getvalue(), err.getvalue())

    def start(self, *args: object, preexec_fn: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **self.environment}
        command = [sys.executable, "-m", "lad_dist.cli", *(str(a) for a in self._arguments(args))]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=preexec_fn,
        )

    @staticmethod
    def ended(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
        out, err = process.communicate(timeout=timeout)
        return Ended(process.returncode, out, err)

    @staticmethod
    def _arguments(args: tuple[object, ...]) -> list[object]:
        if not args or args[0] not in ("run", "experts", "distill", "evaluate", "report"):
            return list(args)
        if "--fleet" in args:  # whose actors may use all cores, one thread each
            return [*args, "--device", "cpu"]
        here = ["--fleet", "off"] if args[0] in ("run", "experts") else []
        return [*args, "--threads", 1, "--device", "cpu", *here]


@pytest.fixture
def lad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LadDist:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return LadDist(tmp_path)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """Writes the tiny recipe with some sections changed (``data={...}`` replaces the section)."""

    def write(file: str = "tiny.yaml", **sections: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(TINY | sections))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny recipe, undisturbed. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    LadDist(folder)("run", folder / "tiny.yaml", "--out", folder / "run").succeeds()
    return folder / "run"


def events(run: Path) -> list[dict[str, Any]]:
    if not (run / "events.jsonl").exists():
        return []
    whole = (run / "events.jsonl").read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def wait_for(run: Path, process: subprocess.Popen[str], reached: Callable[[list[dict[str, Any]]], bool]) -> bool:
    """Until the events say so (True) or the process has ended (False)."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if reached(events(run)):
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.003)
    raise AssertionError(f"nothing of the kind within two minutes: {events(run)[-3:]}")


def leftovers(folder: Path) -> list[str]:
    """Temporary files below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith("."))


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def distilled_bytes(run: Path) -> bytes:
    return (run / "distilled" / "tensors.safetensors").read_bytes()


@pytest.fixture(scope="session")
def look() -> Any:
    """The helpers above, for tests (pytest's import mode does not put this folder on the path)."""

    class Look:
        pass

    for helper in (events, wait_for, leftovers, contents, distilled_bytes):
        setattr(Look, helper.__name__, staticmethod(helper))
    return Look
