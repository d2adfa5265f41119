"""Memory within the limits of control groups."""

from __future__ import annotations

import pytest

from lad_dist import host_memory


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of 64 GB, of which 40 are available; ``host(group, limit, used, files)`` makes a control group."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {64 * 10**6} kB\nMemAvailable:  {40 * 10**6} kB\nHugePages_Total: 0\n"
    )
    (tmp_path / "own").write_text("12:memory:/other\n0::/slurm/job_7/step_0\n")
    for name, file in (("_HOST", "meminfo"), ("_OWN", "own"), ("_GROUPS", "cgroup")):
        monkeypatch.setattr(host_memory, name, tmp_path / file)

    def group(name, limit, used, files=0):
        folder = tmp_path / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon {used - files}\ninactive_file {files}\n")

    return group


def test_without_a_limit_the_host_counts(host):
    host("slurm/job_7/step_0", "max", 5)
    assert host_memory.free() == 40 * 10**6 * 1024
    assert host_memory.total() > 2**30


def test_the_tightest_limit_above_the_process_counts(host):
    host("slurm/job_7/step_0", "max", 5)
    host("slurm/job_7", 16 * 10**6, 6 * 10**6)
    host("slurm", 48 * 10**6, 45 * 10**6)
    host("other", 10, 10)
    assert host_memory.free() == 3 * 10**6
    assert host_memory.total() == 16 * 10**6


def test_cached_files_count_as_free(host):
    host("", 16 * 10**6, 15 * 10**6, files=12 * 10**6)
    assert host_memory.free() == 13 * 10**6


def test_nothing_is_negative(host):
    host("", 10, 20)
    assert host_memory.free() == 0


def test_a_system_that_says_nothing(tmp_path, monkeypatch):
    for name in ("_HOST", "_OWN", "_GROUPS"):
        monkeypatch.setattr(host_memory, name, tmp_path / "missing")
    assert host_memory.free() == 8 * 2**30
