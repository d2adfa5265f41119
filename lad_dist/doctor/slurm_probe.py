"""One real SLURM job: checks that a compute node shares the runs' folder, runs the setup lines and has lad-dist."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lad_dist import __version__
from lad_dist.doctor.findings import Finding, fail, ok, warn
from lad_dist.doctor.probe import ANSWER, ASKED
from lad_dist.errors import ClusterError
from lad_dist.launch.chain import setup_lines
from lad_dist.profile import Profile
from lad_dist.slurm_jobs import slurm_command, squeue

CLOCK_SECONDS = 2.0
_LOOK_SECONDS = 1.0
_ARRIVAL_SECONDS = 30.0  # for a network file system to show what a job wrote
_WAITING = ("PENDING", "CONFIGURING", "")


def to_a_node(profile: Profile, out: Path, wait_seconds: float) -> Iterator[Finding]:
    """Submit the job, wait for it, and report its findings. Always remove the job and the files in the end."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".lad-dist-doctor-", dir=out.resolve()))
    except OSError as error:
        yield fail("shared folder", f"{out}: {error.strerror}", "choose another folder with --out")
        return
    number = None
    try:
        token = secrets.token_hex(8)
        (folder / ASKED).write_text(json.dumps({"token": token}), encoding="utf-8")
        submitted = time.time()
        try:
            script = _script(profile, folder)
            number = slurm_command(["sbatch", "--parsable"], text=script).split(";")[0].strip()
        except ClusterError as error:
            yield fail("job", f"SLURM refused a job of one task: {error}", "correct the profile")
            return
        state, reason, node = _awaited(number, folder, wait_seconds)
        if (folder / ANSWER).exists():
            found = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
            yield from _compared(found, token, profile, (submitted, time.time()))
        elif state in _WAITING:
            yield warn("job", f"still {state.lower() or 'waiting'} after {wait_seconds:.0f} s ({reason})",
                       "the cluster may be busy: try again with a longer --wait")  # fmt: skip
        elif state == "RUNNING":
            yield fail(
                "job",
                f"running on {node} for {wait_seconds:.0f} s without an answer",
                "check for a setup line that hangs",
            )
        else:
            yield _lost(state, node, folder)
    finally:
        if number is not None:
            with suppress(ClusterError):
                slurm_command(["scancel", number])
        shutil.rmtree(folder, ignore_errors=True)


def _script(profile: Profile, folder: Path) -> str:
    s = profile.slurm
    gpus = any(own.gpus_per_node for _, own in s.stages) or profile.gpus_per_node > 0
    asked = {
        "job-name": "lad-dist-doctor", "nodes": 1, "ntasks": 1, "time": 5, "output": f"{folder}/log.out",
        "error": f"{folder}/log.err", "partition": s.partition, "account": s.account, "qos": s.qos,
        "constraint": s.constraint, "reservation": s.reservation, "gpus-per-node": 1 if gpus else None,
    }  # fmt: skip
    lines = [f'#SBATCH --{name}="{value}"' for name, value in asked.items() if value is not None]
    python = s.python or shlex.quote(sys.executable)
    run = f"exec {python} -m lad_dist.doctor.probe {shlex.quote(str(folder))}"
    return "\n".join(["#!/bin/bash", *lines, *setup_lines(s.setup), run, ""])


def _awaited(number: str, folder: Path, wait_seconds: float) -> tuple[str, str, str]:
    """Return (state, reason, node) once there is an answer, the job is over, or time is up."""
    began = time.monotonic()
    over: float | None = None
    state, reason, node = "", "", ""
    while not (folder / ANSWER).exists():
        now = time.monotonic()
        if over is not None and now - over > (_ARRIVAL_SECONDS if state == "COMPLETED" else 0):
            break
        if over is None and now - began > wait_seconds:
            break
        row = squeue([number]).get(number)
        if row is not None:
            state, reason, node = row["state"], row["reason"], row["node"]
        if over is None and (row is None or state not in ("RUNNING", "COMPLETING", *_WAITING)):
            over = now
        time.sleep(_LOOK_SECONDS)
    return state, reason, node


def _compared(found: dict[str, Any], token: str, profile: Profile, between: tuple[float, float]) -> Iterator[Finding]:
    node = found["node"]
    if found.get("token") != token:
        yield fail("shared folder", f"{node} did not read what was written here", "name a shared folder with --out")
        return
    yield ok(
        "shared folder",
        f"{node} read it and answered {between[1] - between[0]:.0f} s after the job was submitted",
    )
    off = max(between[0] - found["time"], found["time"] - between[1], 0)
    if off > CLOCK_SECONDS:
        yield warn("clock", f"that of {node} is off by {off:.0f} s", "sync both clocks (NTP)")
    here = ".".join(map(str, sys.version_info[:2]))
    if found["lad_dist"] != __version__ or not found["python"].startswith(f"{here}."):
        yield fail("node's python", f"{node} has lad-dist {found['lad_dist']} on Python {found['python']}, this machine "
                   f"{__version__} on {here}", "point slurm.python, or a setup line, to the same environment")  # fmt: skip
    elif "error" in found:
        yield fail(
            "node's python", f"{node}: {found['error']}", "point slurm.python, or a setup line, to the environment"
        )
    else:
        yield ok("node's python", f"{found['python']}, lad-dist {found['lad_dist']}, torch {found['torch']}")
    if profile.device == "cuda" and not found.get("gpus"):
        yield fail(
            "node's gpu",
            f"torch sees none on {node}",
            "a driver, or a torch built for CUDA, or gpus_per_node is missing",
        )
    elif found.get("gpus"):
        yield ok("node's gpu", f"torch sees {found['gpus']} on {node}")


def _lost(state: str, node: str, folder: Path) -> Finding:
    """Return the finding for a job that is over without an answer."""
    with suppress(OSError):
        lines = (folder / "log.err").read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip()]
        if said:
            setup = any("slurm.setup" in line for line in said)
            todo = "correct slurm.setup" if setup else "point slurm.python, or a setup line, to the environment"
            return fail("job", f"{state.lower() or 'gone'} on {node or 'its node'}: {'; '.join(said[-2:])}", todo)
    where = f"{node} wrote nothing that is visible here" if node else "none of its files is visible here"
    return fail("shared folder", f"the job ended ({state.lower() or 'gone'}), and {where}",
                "name a folder with --out that this machine and all nodes share")  # fmt: skip
