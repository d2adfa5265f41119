"""How threads wait, and how much of the cores a process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lad_dist import cores, ranks

ROOT = Path(__file__).parents[1]
# What the command line's entry leaves in the environment, and whether torch was loaded before that.
LOOK = """
import os, sys
from lad_dist import cli
cli.app = lambda: print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
cli.main()
"""


@pytest.mark.parametrize(("given", "kept"), [(None, "passive"), ("active", "active")])
def test_the_command_line_has_threads_sleep_before_torch_is_loaded(given, kept):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(ROOT)}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [kept, "False"]


def test_cores_that_others_use_are_not_obtained():
    count = len(os.sched_getaffinity(0))
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * count)]
    try:
        assert cores.obtained(count, 0.5) < cores.FREE_ABOVE * count
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_one_thread_obtains_at_most_one_core():
    assert 0 < cores.obtained(1, 0.1) <= 1.01


@pytest.mark.parametrize(("asked", "world", "each"), [
    (None, 1, 4), (None, 2, 2), (None, 3, 1), (None, 8, 1),  # as many as there is room for
    (2, 2, 2), (1, 4, 1), (9, 1, 9),  # as asked
    (3, 2, 2), (2, 8, 1),
])  # fmt: skip
def test_ranks_have_no_more_threads_than_cores(monkeypatch, asked, world, each):
    monkeypatch.setattr(cores, "available", lambda: 4)
    threads, said = cores.of_each_rank(asked, world)
    assert threads == each
    assert (said is not None) == (asked is not None and asked > each)
    if said:
        assert f"{world} ranks x {asked} threads exceed the 4 cores here; each rank uses {each}" in said


def test_ranks_that_torchrun_started_share_the_cores():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert ranks.on_this_host(torchrun) == 2
    assert ranks.on_this_host({}) == ranks.on_this_host({"LOCAL_WORLD_SIZE": "2"}) == 1
    assert ranks.on_this_host({"RANK": "0", "LOCAL_WORLD_SIZE": "x"}) == 1
