"""Find which resource a partition lacks for a job that SLURM refuses: SLURM says only that no node can take it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lad_dist.errors import ClusterError
from lad_dist.slurm_jobs import slurm_command

_MB = 1024  # per GB, as SLURM reads --mem


@dataclass(frozen=True)
class Node:
    """Resources of one node of a partition."""

    partition: str
    cores: int
    memory_mb: int
    gpus: int

    @classmethod
    def parsed(cls, line: str) -> Node:
        """Parse a line of ``sinfo --Node --format=%P|%c|%m|%G``: ``main*|4|8000|gpu:a100:2(S:0-1)``."""
        partition, cores, memory, gres = line.split("|", 3)
        gpus = sum(int(count) for count in re.findall(r"\bgpu(?::[^,:(]+)?:(\d+)", gres))
        return cls(partition.strip(), int(cores.strip(" +")), int(memory.strip(" +")), gpus)


def shortage(asked: Mapping[str, Any]) -> str | None:
    """Return ``memory (mem_gb): 900 GB per node requested, main has at most 7.8 GB``; None if no shortage is known.

    ``asked``: submitit's parameters.
    """
    try:
        nodes = nodes_of(asked.get("slurm_partition"))
    except (ClusterError, ValueError):
        return None
    return compared(asked, nodes) if nodes else None


def nodes_of(partition: str | None) -> list[Node]:
    """Return the nodes of a partition; None: the cluster's default one. Raises ClusterError if sinfo fails."""
    chosen = [] if partition is None else [f"--partition={partition}"]
    lines = slurm_command(["sinfo", "--noheader", "--Node", *chosen, "--format=%P|%c|%m|%G"]).splitlines()
    found = [Node.parsed(line) for line in lines if line.strip()]
    return found if partition is not None else [node for node in found if node.partition.endswith("*")]


def compared(asked: Mapping[str, Any], nodes: list[Node]) -> str | None:
    """Return the shortage of the nodes of one partition, as ``shortage`` does."""
    count, gpus = asked.get("nodes", 1), asked.get("gpus_per_node", 0)
    cores = asked.get("tasks_per_node", 1) * asked.get("cpus_per_task", 1)
    memory_mb = float(asked.get("mem_gb", 0)) * _MB
    name = ", ".join(dict.fromkeys(node.partition.rstrip("*") for node in nodes))
    most = Node(name, max(n.cores for n in nodes), max(n.memory_mb for n in nodes), max(n.gpus for n in nodes))
    lacking = []
    if memory_mb > most.memory_mb:
        gb = f"{asked['mem_gb']:g} GB per node requested, {name} has at most {most.memory_mb / _MB:.3g} GB"
        lacking.append(f"memory (mem_gb): {gb}")
    if cores > most.cores:
        lacking.append(f"cores (cpus_per_task): {cores} per node requested, {name} has at most {most.cores}")
    if gpus > most.gpus:
        lacking.append(f"GPUs (gpus_per_node): {gpus} per node requested, {name} has at most {most.gpus}")
    if count > len(nodes):
        lacking.append(f"nodes: {count} requested, {name} has {len(nodes)}")
    if lacking:
        return "; ".join(lacking)
    fit = sum(n.memory_mb >= memory_mb and n.cores >= cores and n.gpus >= gpus for n in nodes)
    together = f"{fit} of {name}'s nodes have the memory, cores and GPUs together, {count} are requested"
    return together if fit < count else None
