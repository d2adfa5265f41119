"""Check that this environment has what a run needs. ``lad-dist doctor``: one finding a line, with a remedy if not ok.

    findings.py     result of a check
    machine.py      this machine: Python, packages, GPUs, ranks, folders, clock, Ray
    cluster.py      SLURM: its version, the partitions, whether it would accept every stage's jobs
    slurm_probe.py  one real job on a compute node, and what it found there (probe.py is what it runs)

Nothing is left behind: no file, no job, no process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lad_dist.doctor.findings import Finding
from lad_dist.profile import Profile


def examine(profile: Profile, out: Path, wait_seconds: float) -> Iterator[Finding]:
    """Run all checks, yielding findings as they come.

    ``out``: parent of the run folders, which need not exist; ``wait_seconds``: limit of the SLURM job, queueing too.
    """
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
