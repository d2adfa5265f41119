"""Checks of SLURM from the machine that would submit. Nothing is submitted here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lad_dist.doctor.findings import Finding, fail, ok, warn
from lad_dist.errors import ClusterError, RecipeError
from lad_dist.profile import Profile
from lad_dist.recipe import Recipe
from lad_dist.rundir import STAGES
from lad_dist.slurm_jobs import slurm_command

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")


def slurm(profile: Profile) -> Iterator[Finding]:
    """Check the commands, controller, partitions and log folder, and whether SLURM would accept every stage's job."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        yield fail(
            "slurm",
            f"{', '.join(missing)}: not found",
            "run doctor on a login node of the cluster, or module load slurm",
        )
        return
    try:
        ping = slurm_command(["scontrol", "ping"])
    except ClusterError as error:
        yield fail(
            "slurm", f"its controller does not answer: {error}", "check SLURM_CONF, or ask the cluster's administrators"
        )
        return
    if "is UP" not in ping:
        yield fail("slurm", " ".join(ping.split()), "ask the cluster's administrators")
        return
    yield ok("slurm", slurm_command(["sbatch", "--version"]).strip())
    known = partitions()
    wanted = dict.fromkeys(getattr(profile.slurm.stages, s).partition or profile.slurm.partition for s in STAGES)
    for name in wanted:
        yield _partition(name, known)
    yield _accounting()
    yield from _logs(profile)
    if all(name is None or name in known for name in wanted):
        yield from _stages(profile)


def partitions() -> dict[str, str]:
    """Return the state, limit, nodes and GPUs of each partition in words, by name; the default one also under ``*``."""
    found: dict[str, list[str]] = {}
    default = None
    for line in slurm_command(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%T|%G"]).splitlines():
        name, state, limit, nodes, condition, gres = (part.strip() for part in line.split("|"))
        default = name.rstrip("*") if name.endswith("*") else default
        gpus = f", each {gres}" if gres not in ("", "(null)") else ""
        text = f"{nodes} nodes {condition}{gpus}, limit {limit}" + (
            "" if state == "up" else f", the partition is {state}"
        )
        found.setdefault(name.rstrip("*"), []).append(text)
    words = {name: "; ".join(texts) for name, texts in found.items()}
    return words | ({"*": f"{default}: {words[default]}"} if default else {})


def _partition(name: str | None, known: dict[str, str]) -> Finding:
    if name is None and "*" not in known:
        return warn("partition", "the cluster has no default partition", f"set slurm.partition; valid: {_names(known)}")
    if name is None:
        return ok("partition", f"the default, {known['*']}")
    if name not in known:
        return fail("partition", f"{name}: unknown here", f"set slurm.partition; valid: {_names(known)}")
    if "the partition is" in known[name]:
        return warn("partition", f"{name}: {known[name]}", "jobs wait until it is up")
    return ok("partition", f"{name}: {known[name]}")


def _names(known: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in known if name != "*")) or "none"


def _accounting() -> Finding:
    try:
        slurm_command(["sacct", "--noheader", "--allocations", "--starttime=now"])
    except ClusterError as error:
        return ok("accounting", f"not available ({error}): squeue and the jobs' own records are used")
    return ok("accounting", "available, though not needed: squeue is used")


def _logs(profile: Profile) -> Iterator[Finding]:
    if profile.slurm.logs is None:
        return
    folder = Path(profile.slurm.logs).expanduser()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".lad-dist-doctor-"):
            pass
    except OSError as error:
        yield fail(
            "logs", f"slurm.logs: {folder}: {error.strerror}", "name a folder that this machine and all nodes can write"
        )
    else:
        yield ok("logs", str(folder))


def _stages(profile: Profile) -> Iterator[Finding]:
    from lad_dist.launch.slurm import refusal

    for stage in STAGES:
        try:
            why = refusal(stage, Recipe(), profile)
        except RecipeError as error:
            yield fail(stage, str(error), "correct the profile")
            continue
        if why is not None:
            yield fail(
                stage,
                f"SLURM would refuse its job: {why}",
                f"correct slurm.stages.{stage}, or the settings of all stages",
            )
        else:
            yield ok(stage, "SLURM would take its job")
    if "SLURM_JOB_ID" in os.environ:
        yield warn("slurm", "doctor runs inside a job, whose settings new jobs may inherit", "submit from a login node")
