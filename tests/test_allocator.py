"""Memory that is kept for its next use: no page is filled with zeros again, results are the same, and it is given back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lad_dist import allocator

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc is told what to keep")
PROGRAM = """
import resource, sys
import torch
from pathlib import Path
from lad_dist import allocator

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def work():
    before, total = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, 0.0
    for _ in range(5):
        total += float((torch.ones(20_000_000) + 1).sum())  # 80 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, total

torch.set_num_threads(1)
kept = allocator.keep_freed_memory()
first = work()
later = [work() for _ in range(4)]  # now and then the heap still grows: a block whose place was taken goes to another
again = min(later)
held = resident()
allocator.give_back()
print(int(kept), first[0], again[0], int(first[1] == again[1] == 2.0e8), held, resident())
"""


def run(**environment: str) -> list[int]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@glibc
def test_the_same_pages_serve_again_and_are_given_back():
    kept, first, again, right, held, after = run()
    assert kept and right
    assert first > 20_000 and again < first / 20
    assert held - after > 100e6


@glibc
def test_what_the_environment_sets_stays():
    kept, first, again, right, *_ = run(MALLOC_MMAP_THRESHOLD_="1048576")
    assert not kept and right
    assert again > first / 2  # every use of a large block is new pages


def test_another_c_library(monkeypatch):
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert allocator.keep_freed_memory() is False
    allocator.give_back()


def test_a_c_library_without_its_version(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert allocator._glibc() is None
