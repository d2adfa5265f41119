"""Does this environment have what a run needs? ``lad-dist doctor``: one finding a line, with what to do where something is wrong.

    findings.py     what a check found
    machine.py      Python, packages, GPUs, ranks, folders, clock, Ray: of the machine that asks
    cluster.py      what SLURM says: its version, the partition, whether it would take every stage's jobs
    slurm_probe.py  one real job that goes to a compute node and back, and what it found there (probe.py is what it runs)

Nothing is left behind: no file, no job, no process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lad_dist.doctor.findings import Finding
from lad_dist.profile import Profile


def examine(profile: Profile, out: Path, wait_seconds: float) -> Iterator[Finding]:
    """Everything that can be checked, as it is found. ``out``: the folder that run folders will be in, which need not exist;
    ``wait_seconds``: how long the job on SLURM may take, waiting included."""
    from lad_dist.doctor import cluster, machine, slurm_probe

    yield from machine.software()
    yield from machine.gpus(profile)
    yield from machine.ranks_meet(profile)
    yield from machine.folders(out)
    yield from machine.ray_ready(profile)
    if profile.launcher == "slurm":
        there = list(cluster.slurm(profile))
        yield from there
        if not any(one.level == "fail" for one in there):
            yield from slurm_probe.to_a_node(profile, out, wait_seconds)
