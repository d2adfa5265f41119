"""Every check of ``lad-dist doctor`` that needs no SLURM, found good and found wanting. With SLURM: tests/slurm/test_doctor.py."""

from __future__ import annotations

import os
import socket
import stat
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from lad_dist import doctor, ranks
from lad_dist.cli import app
from lad_dist.doctor import cluster, machine, slurm_probe
from lad_dist.doctor.findings import Finding, fail, ok, warn
from lad_dist.errors import RankError
from lad_dist.profile import Profile


def by_name(findings) -> dict[str, Finding]:
    return {one.name: one for one in findings}


def levels(findings) -> list[str]:
    return [one.level for one in findings]


def test_here_all_is_well_and_nothing_is_left(tmp_path):
    before = set(Path("/tmp").glob(".lad-dist-doctor-*")) | set(Path("/tmp").glob("ladist-ranks-*"))
    done = CliRunner().invoke(app, ["doctor", "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert "fail " not in done.output and "2 processes connected over gloo and summed" in done.output
    assert not (tmp_path / "runs").exists() and not list(tmp_path.iterdir())
    assert set(Path("/tmp").glob(".lad-dist-doctor-*")) | set(Path("/tmp").glob("ladist-ranks-*")) <= before


def test_the_exit_code_says_whether_a_check_failed(monkeypatch):
    found = [ok("one", "good"), warn("two", "so so", "mind it"), fail("three", "bad", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda profile, out, wait: iter(found))
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 12 and "error: 1 check failed: three" in done.output
    assert "warn  two            so so -> mind it" in done.output.splitlines()
    monkeypatch.setattr(doctor, "examine", lambda profile, out, wait: iter(found[:2]))
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0


def test_an_unknown_profile_is_one_error():
    done = CliRunner().invoke(app, ["doctor", "--on", "slurm-smal"])
    assert done.exit_code == 2 and "slurm-small" in done.output


# --- software ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "level"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 14, 0), "warn")])
def test_python(monkeypatch, version, level):
    monkeypatch.setattr(machine.sys, "version_info", version)
    assert by_name(machine.software())["python"].level == level


def test_packages_that_are_too_old_or_missing(monkeypatch):
    there = {"pyarrow": "16.1.0", "torch": "2.8.0a0+cu121", "torchvision": "0.23.0"}

    def version(name):
        if name == "rich":
            raise PackageNotFoundError(name)
        return there.get(name, "99.0")

    monkeypatch.setattr(machine, "version", version)
    found = by_name(machine.software())
    assert found["packages"].level == "fail"
    assert found["packages"].found == "pyarrow 16.1.0 is installed, needed: 17 or newer; rich is not installed"
    assert "torchvision" not in found


def test_torchvision_of_another_torch(monkeypatch):
    monkeypatch.setattr(
        machine, "version", lambda name: {"torch": "2.9.1+cu128", "torchvision": "0.23.0"}.get(name, "99")
    )
    found = by_name(machine.software())["torchvision"]
    assert found.level == "warn" and "torchvision==0.24.*" in found.todo


# --- devices and ranks ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a CUDA GPU")
def test_a_gpu_that_is_not_there(monkeypatch):
    assert levels(machine.gpus(Profile())) == ["ok"]
    assert levels(machine.gpus(Profile(device="cuda"))) == ["fail"]
    assert levels(machine.gpus(Profile(device="cuda", launcher="slurm"))) == ["ok"]  # the nodes may have some


def test_gpus_that_are_in_use_or_too_few(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((79, 3)[index] * 10**9, 80 * 10**9))
    found = list(machine.gpus(Profile(device="cuda", gpus_per_node=8)))
    assert levels(found) == ["ok", "warn", "ok", "fail"]
    assert found[0].found == "0: H100, 79 of 80 GB free" and "2 of the profile's 8" in found[-1].found


def test_ranks_that_do_not_meet(monkeypatch):
    def launch(*args, **fields):
        raise RankError("rank 0 of 2: could not connect to the others")

    monkeypatch.setattr(ranks, "launch", launch)
    (found,) = machine.ranks_meet(Profile(device="cpu"))
    assert found.level == "fail" and "over gloo: rank 0 of 2: could not connect" in found.found


# --- folders and clock ------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    found = by_name(machine.folders(tmp_path / "file" / "runs"))["runs"]
    assert found.level == "fail" and "file: cannot be written: Not a directory" in found.found and "--out" in found.todo


@pytest.mark.parametrize(("gb", "inodes", "level"), [
    (200, 10**6, "ok"), (5, 10**6, "warn"), (0.5, 10**6, "fail"), (200, 100, "warn"), (200, 0, "fail"),
])  # fmt: skip
def test_room(tmp_path, monkeypatch, gb, inodes, level):
    facts = SimpleNamespace(f_bavail=int(gb * 1000), f_frsize=10**6, f_files=10**7, f_favail=inodes)
    monkeypatch.setattr(machine.os, "statvfs", lambda folder: facts)
    assert by_name(machine.folders(tmp_path))["runs"].level == level


def test_a_file_system_that_counts_no_inodes(tmp_path, monkeypatch):
    facts = SimpleNamespace(f_bavail=10**6, f_frsize=10**6, f_files=0, f_favail=0)
    monkeypatch.setattr(machine.os, "statvfs", lambda folder: facts)
    assert by_name(machine.folders(tmp_path))["runs"].level == "ok"


@pytest.mark.parametrize(("off", "level"), [(0, "ok"), (9, "warn"), (-9, "warn")])
def test_the_clock_of_the_folders_host(tmp_path, monkeypatch, off, level):
    real = os.fstat

    def fstat(number):
        facts = real(number)
        return SimpleNamespace(
            **{n: getattr(facts, n) for n in dir(facts) if n.startswith("st_")} | {"st_mtime": time.time() + off}
        )

    monkeypatch.setattr(machine.os, "fstat", fstat)
    found = by_name(machine.folders(tmp_path))["clock"]
    assert found.level == level
    assert off == 0 or f"9 s {'ahead of' if off > 0 else 'behind'} this one" in found.found


# --- Ray --------------------------------------------------------------------------------------------------------------


def test_a_ray_cluster_that_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert by_name(machine.ray_ready(Profile.model_validate({"ray": {"address": address}})))["ray"].level == "ok"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"{address} answers" in by_name(machine.ray_ready(Profile()))["ray"].found
    found = by_name(machine.ray_ready(Profile()))["ray"]
    assert found.level == "fail" and f"no cluster answers at {address}" in found.found


def test_a_ray_token_that_others_can_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert "ray token" not in by_name(machine.ray_ready(Profile()))
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("0" * 64)
    file.chmod(0o644)
    found = by_name(machine.ray_ready(Profile()))["ray token"]
    assert found.level == "warn" and str(file) in found.found and "0644" in found.found
    assert "umask 077" in found.todo and "chmod 600" in found.todo
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert by_name(machine.ray_ready(Profile()))["ray token"].level == "fail"  # which a fleet would refuse
    file.chmod(0o600)
    assert by_name(machine.ray_ready(Profile()))["ray token"].level == "ok"


def test_no_ray(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", version)
    (found,) = machine.ray_ready(Profile())
    assert found.level == "warn" and "lad-dist[ray]" in found.todo
    (found,) = machine.ray_ready(Profile(fleet="on"))
    assert found.level == "fail"


# --- SLURM, played by scripts -----------------------------------------------------------------------------------------

SCRIPTS = {
    "scontrol": 'case "$1" in ping) echo "Slurmctld(primary) at h is UP";; esac',
    "sinfo": "echo 'main*|up|1-00:00:00|2|idle|gpu:a100:4'; echo 'old|down|infinite|1|down|(null)'",
    "sbatch": 'case "$1" in --version) echo "slurm 23.11.1";; --test-only) exit 0;; *) echo 77;; esac',
    "squeue": "exit 0",
    "scancel": 'echo "$@" >> "$FAKE/cancelled"',
    "sacct": "echo 'Slurm accounting storage is disabled' >&2; exit 1",
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """``fake(sinfo="...")``: SLURM's commands as shell scripts; None leaves one out."""

    def make(**scripts) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in {**SCRIPTS, **scripts}.items():
            if text is not None:
                (folder / name).write_text(f"#!/bin/sh\n{text}\n")
                (folder / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if all(scripts.values()) else str(folder))
        monkeypatch.setenv("FAKE", str(tmp_path))
        return tmp_path

    return make


def on_slurm(**fields) -> Profile:
    return Profile.model_validate({"launcher": "slurm", "device": "cpu", "slurm": fields})


def test_slurm_that_would_do(fake):
    fake()
    found = list(cluster.slurm(on_slurm()))
    assert set(levels(found)) == {"ok"}
    assert by_name(found)["partition"].found == "the default, main: 2 nodes idle, each gpu:a100:4, limit 1-00:00:00"
    assert "squeue and the jobs' own records are used" in by_name(found)["accounting"].found


def test_commands_that_are_missing(fake):
    fake(sbatch=None, squeue=None)
    (found,) = cluster.slurm(on_slurm())
    assert found.level == "fail" and found.found == "sbatch, squeue: not found"


@pytest.mark.parametrize("scontrol", ["echo 'Slurmctld(primary) at h is DOWN'", "echo 'error: no host' >&2; exit 1"])
def test_a_controller_that_is_down(fake, scontrol):
    fake(scontrol=scontrol)
    (found,) = cluster.slurm(on_slurm())
    assert found.level == "fail" and found.name == "slurm"


def test_partitions(fake):
    fake()
    found = [one for one in cluster.slurm(on_slurm(partition="gpux")) if one.name == "partition"]
    assert found[0].level == "fail" and found[0].todo == "set slurm.partition; valid: main, old"
    profile = on_slurm(stages={"distill": {"partition": "old"}})
    found = [one for one in cluster.slurm(profile) if one.name == "partition"]
    assert levels(found) == ["ok", "warn"] and "the partition is down" in found[1].found


def test_a_stage_that_slurm_would_refuse(fake):
    fake(
        sbatch='case "$1" in --version) echo slurm 23;; *) echo "sbatch: error: allocation failure: Nope" >&2; exit 1;; esac'
    )
    found = by_name(cluster.slurm(on_slurm()))
    assert (
        found["distill"].level == "fail"
        and "Nope" in found["distill"].found
        and "slurm.stages.distill" in found["distill"].todo
    )


def test_numbers_that_contradict_each_other(fake):
    fake()
    found = by_name(cluster.slurm(on_slurm(stages={"report": {"time_minutes": 1}}, warning_seconds=90)))
    assert found["report"].level == "fail" and "slurm.warning_seconds: 90 s is not below" in found["report"].found
    assert found["experts"].level == "ok"


def test_a_log_folder_that_cannot_be_written(fake, tmp_path):
    fake()
    (tmp_path / "file").touch()
    found = by_name(cluster.slurm(on_slurm(logs=str(tmp_path / "file" / "logs"))))
    assert found["logs"].level == "fail" and "Not a directory" in found["logs"].found


# --- the job, played by scripts ---------------------------------------------------------------------------------------


def on_a_node(fake, tmp_path, monkeypatch, squeue: str, **job) -> Finding:
    monkeypatch.setattr(slurm_probe, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(slurm_probe, "_ARRIVAL_SECONDS", 0.05)
    fake(squeue=squeue, **job)
    (found,) = slurm_probe.to_a_node(on_slurm(), tmp_path / "runs", 0.3)
    assert list((tmp_path / "runs").iterdir()) == []  # nothing is left
    return found


def test_a_job_that_waits_is_cancelled(fake, tmp_path, monkeypatch):
    found = on_a_node(fake, tmp_path, monkeypatch, "echo '77|PENDING|Priority||5:00|0:00|'")
    assert found.level == "warn" and "still pending after 0 s (Priority)" in found.found
    assert (tmp_path / "cancelled").read_text() == "77\n"


def test_a_job_that_hangs(fake, tmp_path, monkeypatch):
    found = on_a_node(fake, tmp_path, monkeypatch, "echo '77|RUNNING|None|n1|5:00|0:00|'")
    assert found.level == "fail" and "without an answer" in found.found and (tmp_path / "cancelled").exists()


def test_a_folder_that_is_not_shared(fake, tmp_path, monkeypatch):
    found = on_a_node(fake, tmp_path, monkeypatch, "echo '77|COMPLETED|None|n1|5:00|0:01|'")
    assert found.level == "fail" and found.name == "shared folder" and "--out" in found.todo


def test_a_job_that_is_refused(fake, tmp_path, monkeypatch):
    refuse = 'echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1'
    found = on_a_node(fake, tmp_path, monkeypatch, "exit 0", sbatch=refuse)
    assert found.level == "fail" and found.found.endswith("Invalid account") and not (tmp_path / "cancelled").exists()


def compared(answer: dict, profile: Profile | None = None) -> dict[str, Finding]:
    now = time.time()
    told = {"token": "t", "node": "n1", "time": now, "python": ".".join(map(str, sys.version_info[:3])),
            "lad_dist": slurm_probe.__version__, "torch": "2.13.0", "gpus": 0, **answer}  # fmt: skip
    return by_name(slurm_probe._compared(told, "t", profile or on_slurm(), (now, now)))


def test_what_the_job_found():
    assert {one.level for one in compared({}).values()} == {"ok"}
    assert compared({"token": "other"})["shared folder"].level == "fail"
    assert compared({"time": time.time() + 60})["clock"].level == "warn"
    assert compared({"lad_dist": "0.0.1"})["node's python"].level == "fail"
    assert compared({"python": "3.9.1"})["node's python"].level == "fail"
    assert compared({"error": "torch cannot be imported: libcudart"})["node's python"].level == "fail"
    cuda = Profile.model_validate({"launcher": "slurm", "device": "cuda", "gpus_per_node": 1})
    assert compared({}, cuda)["node's gpu"].level == "fail"
    assert compared({"gpus": 1}, cuda)["node's gpu"].level == "ok"


def test_the_script_asks_for_what_the_profile_says(tmp_path):
    profile = Profile.model_validate({"launcher": "slurm", "gpus_per_node": 4, "slurm": {
        "partition": "gpu", "account": "me", "setup": ["module load cuda"], "python": "/opt/py"}})  # fmt: skip
    text = slurm_probe._script(profile, tmp_path / "a b")
    lines = text.splitlines()
    for line in ('#SBATCH --partition="gpu"', '#SBATCH --account="me"', '#SBATCH --gpus-per-node="1"', "module load cuda",
                 f"exec /opt/py -m lad_dist.doctor.probe '{tmp_path}/a b'",
                 f'#SBATCH --output="{tmp_path}/a b/log.out"'):  # fmt: skip
        assert line in lines
    assert "qos" not in text
