"""A SLURM of two virtual nodes for the session, `lad-dist` as a process, and what the jobs have left behind."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEV = ROOT / "cluster" / "dev-slurm"
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol")


def _three_free_ports() -> int:
    while True:
        first = random.randrange(12_000, 30_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + 3):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


@dataclass(frozen=True)
class Slurm:
    """The running SLURM, its folder, and what it says."""

    folder: Path

    def state(self, job: str) -> str:
        """Of a job, or of all jobs of an array, as squeue says; empty if it knows none."""
        command = ["squeue", "-h", "-r", "--states=all", f"--jobs={job}", "--format=%T"]
        states = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return " ".join(sorted(set(states)))

    def live(self) -> str:
        command = ["squeue", "-h", "-r", "--format=%i %T %j"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def processes(self, job: str) -> dict[int, str]:
        """The living processes that a job of this SLURM has started, whatever group or session they are in by now."""
        marks = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURM_JOB_ID={job}".encode()}
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if marks <= set((entry / "environ").read_bytes().split(b"\0")):
                        state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                        name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        if state != "Z" and "slurmstepd" not in name:
                            found[int(entry.name)] = name
        return found

    def nothing_left(self, *jobs: str) -> None:
        """No process of these jobs lives, a few seconds after they ended."""
        wait_until(
            lambda: not any(self.processes(job) for job in jobs), 20, lambda: str([self.processes(j) for j in jobs])
        )


def wait_until(reached: Callable[[], Any], seconds: float, what: Callable[[], str] = str) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not reached():
        assert time.monotonic() - began < seconds, f"not within {seconds} s: {what()}"
        time.sleep(0.2)
    return time.monotonic() - began


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Started in a folder of its own, on ports of its own; ended at the end of the session."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        why = f"SLURM is not installed ({', '.join(missing)}): apt-get install slurmctld slurmd slurm-client"
        pytest.fail(why) if os.environ.get("CI") == "true" else pytest.skip(why)
    folder = Path(tempfile.mkdtemp(prefix="ld-slurm-", dir="/tmp"))  # SLURM's sockets need a short path
    ports = {"DEV_SLURM_PORT": str(_three_free_ports()), "DEV_SLURM_FIRST_JOB": str(random.randrange(10_000, 60_000))}
    before = os.environ.get("SLURM_CONF")
    try:
        subprocess.run([DEV / "up", folder], env={**os.environ, **ports}, check=True, capture_output=True, timeout=60)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield Slurm(folder)
    finally:
        subprocess.run([DEV / "down", folder], check=False, capture_output=True, timeout=60)
        if before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = before
    left = subprocess.run(["pgrep", "-af", f"slurm.*{folder}"], capture_output=True, text=True, check=False).stdout
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


@dataclass
class LadDist:
    """``lad-dist`` as a process in ``folder``."""

    folder: Path

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        command = [sys.executable, "-m", "lad_dist.cli", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __call__(self, *arguments: object, code: int = 0, timeout: float = 240) -> tuple[str, str]:
        """What it printed, once it ended with ``code``."""
        return self.ended(self.start(*arguments), code, timeout)

    @staticmethod
    def ended(process: subprocess.Popen[str], code: int = 0, timeout: float = 240) -> tuple[str, str]:
        out, err = process.communicate(timeout=timeout)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in out + err
        return out, err

    def job(self, **changes: Any) -> Path:
        """Writes the small recipe with some fields of its sections changed."""
        document = {name: {**value, **changes.get(name, {})} if isinstance(value, dict) else changes.get(name, value)
                    for name, value in SMALL.items()}  # fmt: skip
        file = self.folder / "job.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    def profile(self, file: str = "profile.yaml", stages: Any = None, ray: Any = None, **slurm: Any) -> Path:
        """Writes cluster/dev-slurm.yaml with changes in its section ``slurm``, of its stages, and ``ray``."""
        document = yaml.safe_load((ROOT / "cluster" / "dev-slurm.yaml").read_text())
        document["slurm"] |= slurm
        for stage, fields in (stages or {}).items():
            document["slurm"]["stages"][stage] = {**document["slurm"]["stages"].get(stage, {}), **fields}
        document["ray"] = {"object_store_mb": 80, **(ray or {})}
        path = self.folder / file
        path.write_text(yaml.safe_dump(document))
        return path


SMALL: dict[str, Any] = {
    "name": "small", "ipc": 2,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20, "whitening": "standardize"},
    "model": {"width": 8, "depth": 2},
    "augment": {"operations": ["crop", "scale"]},
    "experts": {"count": 2, "epochs": 4, "classifier_epochs": 3, "batch": 32, "lr": 0.02, "classifier_lr": 0.02,
                "epochs_per_part": 2},
    "distill": {"iterations": 6, "student_steps": 3, "student_steps_classifier": 2, "batch": 6, "window_epochs": 1,
                "start_epoch_max": 3, "classifier_start_epoch_max": 2, "class_weights": "mean-one", "lr_images": 1.0,
                "lr_labels": 0.5, "lr_alpha": 1e-6, "alpha": 0.05, "checkpoint_every": 2},
    "evaluate": {"seeds": 2, "epochs": 3, "batch": 8, "full_epochs": 1, "full_batch": 32, "baselines": ["random"]},
}  # fmt: skip


@pytest.fixture
def lad(slurm: Slurm, tmp_path: Path) -> LadDist:
    return LadDist(tmp_path)
