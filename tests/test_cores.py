"""How threads wait, and how much of the cores a process is given."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lad_dist import cores

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
