"""Ranks on this machine: collectives, launching, a rank that dies or raises, and the student's gradients over ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import rank_workers
import torch

from lad_dist import ranks
from lad_dist.distill.shards import Share
from lad_dist.distill.student import GradientPath
from lad_dist.errors import NumericalError, RankError, StorageError
from lad_dist.ranks import ProcessRank, Ranks

ROOT = Path(__file__).parents[2]
CASES = [
    (dtype, path, classifier_only, batch)
    for dtype in (torch.float64, torch.float32)
    for path in get_args(GradientPath)
    for classifier_only in (False, True)
    for batch in (9, 4, 1)
]


FEW = [
    (torch.float64, path, classifier_only, 3, 1) for path in get_args(GradientPath) for classifier_only in (False, True)
]


@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (3, CASES), (5, FEW)])
def test_the_students_gradients_do_not_depend_on_the_number_of_ranks(world, cases, tmp_path):
    """2: uneven shares; 3: a class each; 5: more ranks than images. Batches of 1 leave most ranks without images."""
    ranks.launch(world, rank_workers.student_cases, (str(tmp_path), cases), restarts=0, say=print)
    parts = [torch.load(tmp_path / f"rank-{r}.pt") for r in range(world)]
    for case, alone, *found in zip(cases, rank_workers.alone(cases), *parts, strict=True):
        tolerance = 1e-11 if case[0] == torch.float64 else 2e-5
        for name in ("images", "labels"):
            whole = torch.cat([f[name] for f in found])
            assert torch.allclose(whole, alone[name], rtol=tolerance, atol=tolerance * alone[name].abs().max()), case
        for name in ("sum", "final", "alpha", "loss"):
            assert torch.allclose(found[0][name], alone[name], rtol=tolerance, atol=tolerance), (case, name)
            assert all(torch.equal(f[name], found[0][name]) for f in found), (case, name)  # no rank drifts away
        assert torch.allclose(sum(f["inner"] for f in found), alone["inner"], rtol=tolerance), case


def test_one_summed_gradient_per_student_step_and_nothing_else(tmp_path):
    cases = [(torch.float32, p, c, 9) for p in get_args(GradientPath) for c in (False, True)]
    ranks.launch(2, rank_workers.student_cases, (str(tmp_path), cases), restarts=0, say=print)
    keep, keep_classifier, recompute, recompute_classifier, *captured = torch.load(tmp_path / "rank-1.pt")
    assert keep["calls"] == keep_classifier["calls"] == recompute_classifier["calls"] == {"total": 4}
    assert [each["calls"] for each in captured] == [{"total": 4}] * 2
    # one bucket per step on the way there, one sum per step on the way back; "replicate" is once in a student's life
    assert recompute["calls"] == {"replicate": 1, "bucket": 4, "total": 4}


def test_collectives(tmp_path):
    ranks.launch(3, rank_workers.collectives, (str(tmp_path),), restarts=0, say=print)
    for rank in range(3):
        assert np.load(tmp_path / f"{rank}.npy").tolist() == [0, 0, 1, 2, 3, 3]


def test_ranks_have_the_environment_of_the_call(tmp_path, monkeypatch):
    for value in ("first", "second", None):
        monkeypatch.delenv("LADIST_TOLD", raising=False)
        if value is not None:
            monkeypatch.setenv("LADIST_TOLD", value)
        ranks.launch(2, rank_workers.tells, (str(tmp_path), "LADIST_TOLD"), restarts=0, say=print)
        assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == [str(value)] * 2


def test_a_rank_that_waits_for_one_that_has_stopped_ends_as_well(tmp_path):
    code = "import sys, rank_workers; from lad_dist import ranks\n"
    code += "ranks.launch(2, rank_workers.one_waits_for_the_other, (sys.argv[1],), restarts=0, say=print)"
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests/support"))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.PIPE
    ) as launcher:
        until = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            assert time.monotonic() < until and launcher.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        launcher.terminate()
        _, said = launcher.communicate(timeout=60)
    assert b"Interrupted: interrupted by SIGTERM" in said and time.monotonic() - began < ranks._GRACE - 5


def test_a_killed_rank_is_named_and_all_start_again(tmp_path):
    said: list[str] = []
    ranks.launch(2, rank_workers.dies, (1, "kill", str(tmp_path / "once")), restarts=1, say=said.append)
    assert said == ["rank 1 of 2 was killed by SIGKILL; starting again from the last checkpoint (1 of 1)"]


def test_a_rank_that_keeps_dying_is_an_error_within_bounded_time(tmp_path):
    began = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of 2 was killed by SIGKILL, and no restart is allowed"):
        ranks.launch(2, rank_workers.dies, (1, "kill", str(tmp_path / "once")), restarts=0, say=print)
    assert time.monotonic() - began < 40


@pytest.mark.parametrize("kind", [NumericalError, StorageError])
def test_an_error_of_one_rank_is_the_error_of_all_and_no_reason_to_start_again(kind, tmp_path):
    said: list[str] = []
    with pytest.raises(kind, match="said by rank 1"):
        ranks.launch(2, rank_workers.dies, (1, kind.__name__, str(tmp_path / "once")), restarts=3, say=said.append)
    assert said == []


def test_shares_are_contiguous_even_and_complete():
    for total, world in [(10, 1), (10, 3), (7, 7), (5, 8), (1000, 64)]:
        shares = [Share.of(total, Ranks(r, world)) for r in range(world)]
        assert shares[0].first == 0 and shares[-1].end == total
        assert all(a.end == b.first for a, b in pairwise(shares))
        sizes = [s.end - s.first for s in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, None),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, ProcessRank(3, 4, 1)),
    ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_ID": "0"}, ProcessRank(1, 2, 0)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, None),  # in a batch script, not in a step
])  # fmt: skip
def test_where_the_launcher_has_put_this_process(environment, expected):
    assert ranks.place(environment) == expected


@pytest.mark.parametrize("wrong", [{"RANK": "4", "WORLD_SIZE": "4"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_a_contradictory_environment(wrong):
    with pytest.raises(RankError, match="RANK"):
        ranks.place(wrong)


def test_the_first_host_of_a_node_list():
    assert ranks.first_host("localhost,other") == "localhost"
    assert ranks.first_host("localhost") == "localhost"
    assert ranks.first_host("no-such-node[03-04,7],login") == "127.0.0.1"  # names that lead nowhere


def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path):
    from lad_dist.rundir import publish_shared_folder

    def write(folder: Path) -> list[Path]:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        publish_shared_folder(tmp_path / "a" / "b", write, 0, lambda v: v, lambda v: [v])
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    with pytest.raises(StorageError, match="No space left"):  # rank 1 says so; this one has written its part
        publish_shared_folder(
            tmp_path / "a" / "b", lambda folder: [], 0, lambda v: v, lambda v: [v, "No space left on device"]
        )
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
