"""Which resource a partition lacks, from what sinfo says of its nodes."""

from __future__ import annotations

import pytest

from lad_dist.launch.shortage import Node, compared

NODES = [Node.parsed(line) for line in ("gpu*|64|515000|gpu:a100:4,gpu:a40:2(S:0-1)", "gpu*|8|16000+|(null)")]


def test_gpus_of_several_kinds_are_counted():
    assert [node.gpus for node in NODES] == [6, 0]


@pytest.mark.parametrize(("asked", "said"), [
    ({"mem_gb": 600, "gpus_per_node": 8}, "memory (mem_gb): 600 GB per node requested, gpu has at most 503 GB; "
                                          "GPUs (gpus_per_node): 8 per node requested, gpu has at most 6"),
    ({"tasks_per_node": 8, "cpus_per_task": 9}, "cores (cpus_per_task): 72 per node requested, gpu has at most 64"),
    ({"nodes": 3}, "nodes: 3 requested, gpu has 2"),
    ({"nodes": 2, "gpus_per_node": 1}, "1 of gpu's nodes have the memory, cores and GPUs together, 2 are requested"),
    ({"nodes": 1, "gpus_per_node": 6, "mem_gb": 500}, None),
])  # fmt: skip
def test_what_is_lacking(asked, said):
    assert compared(asked, NODES) == said
