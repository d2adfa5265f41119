"""Distillation over ranks: N equal one, whatever N a run was begun with; a killed rank; stopping together; torchrun."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rank_workers
import torch
from rich.console import Console

from lad_dist import ranks
from lad_dist.distilled import DistilledSet
from lad_dist.errors import RankError, StorageError
from lad_dist.profile import Profile
from lad_dist.progress import Screen, read_events

ROOT = Path(__file__).parents[2]
MANY = 1000  # threads: more than there are cores anywhere


def over(pipeline, world: int, **fields) -> DistilledSet:
    """Distill over ``world`` ranks of one thread each."""
    pipeline.profile = Profile(**{"fleet": "off", "ranks": world, "threads": 1, **fields})
    pipeline.distill()
    return DistilledSet.load(pipeline.run.distilled)


def same(ours: DistilledSet, theirs: DistilledSet, tolerance: float = 1e-4) -> None:
    for name in ("images", "label_logits"):
        a, b = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    assert ours.lr == pytest.approx(theirs.lr, rel=tolerance)
    assert torch.equal(ours.initial_images, theirs.initial_images)


@pytest.mark.parametrize(("gradient", "world"), [("keep", 3), ("recompute", 2)])
def test_five_iterations_in_float64(small_recipe, small_experts, tmp_path, world, gradient):
    """20 images: even shares over 2 ranks, uneven ones over 3. Both phases, all augmentations, both gradient paths."""
    recipe = small_recipe(distill={"gradient": gradient, "batch": 7})
    doc = recipe.model_dump(mode="json")
    what = (str(tmp_path), doc, str(small_experts), torch.float64)
    ranks.launch(world, rank_workers.whole_iterations, what, restarts=0, say=print)
    alone = rank_workers.iterations(ranks.ALONE, doc, str(small_experts), torch.float64)
    parts = [torch.load(tmp_path / f"rank-{r}.pt") for r in range(world)]
    for name in ("images", "labels"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), alone[name], rtol=1e-10, atol=1e-10)
    for part in parts:
        for name in ("alpha", "students"):
            torch.testing.assert_close(part[name], alone[name], rtol=1e-10, atol=1e-10)
    steps = recipe.distill.student_steps + recipe.distill.student_steps_classifier
    per_iteration = 2  # what all must agree on: before the step and after it
    for i, calls in enumerate(parts[0]["calls"]):
        if gradient == "keep":
            assert calls == {"total": steps + per_iteration}
        else:
            buckets = calls.pop("bucket")
            assert buckets == recipe.distill.student_steps  # the way there; "total" is the way back
            assert calls == {"total": steps + per_iteration} | ({"replicate": 1} if i == 0 else {})


def test_the_distilled_set_of_two_ranks_is_that_of_one(pipeline_of):
    alone = over(pipeline_of("alone"), 1)
    both, said = pipeline_of("both"), io.StringIO()
    both.screen = Screen(Console(file=said, width=200))
    same(over(both, 2, threads=MANY), alone)
    assert f"threads: 2 ranks x {MANY} threads exceed the " in said.getvalue()
    again = over(pipeline_of("again"), 2)
    for name in ("images", "label_logits"):  # the same number of ranks, the same bits
        assert torch.equal(getattr(again, name), getattr(DistilledSet.load(both.run.distilled), name))
    kinds = [e["kind"] for e in read_events(both.run.events)]
    assert kinds.count("iteration") == 6 and kinds.count("initial-set") == 1  # rank 0 alone reports


@pytest.mark.slow
def test_more_ranks_than_images(pipeline_of):
    fields = {"ipc": 1, "distill": {"iterations": 2}}
    same(over(pipeline_of("many", **fields), 12), over(pipeline_of("one", **fields), 1))


def test_a_run_goes_on_with_more_or_fewer_ranks(pipeline_of):
    undisturbed = over(pipeline_of("undisturbed"), 1)
    changing = pipeline_of("changing", distill={"iterations": 2})
    over(changing, 3)
    for iterations, world in ((4, 2), (6, 1)):
        shutil.rmtree(changing.run.distilled)
        changing.recipe = pipeline_of(f"to-{iterations}", distill={"iterations": iterations}).recipe
        found = over(changing, world)
        names = sorted(p.name for p in changing.run.distill_checkpoint.rglob("*.safetensors"))
        assert names == [f"shard-{r:03d}-of-{world:03d}.safetensors" for r in range(world)]
    same(found, undisturbed)


def ranks_of(run) -> list[int]:
    """The process of each rank."""
    started = [e for e in read_events(run.events) if e["kind"] == "distill-started"]
    return [pid for _, pid in started[-1]["ranks"]]


def start(folder: Path, job: Path, *options: str, world: int = 2) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [
        sys.executable,
        "-m",
        "lad_dist.cli",
        "distill",
        str(job),
        "--ranks",
        str(world),
        "--threads",
        "1",
        *options,
    ]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def wait_for_iteration(run, process, iteration: int) -> None:
    until = time.monotonic() + 90
    while time.monotonic() < until and process.poll() is None:
        if any(e["kind"] == "iteration" and e["iteration"] >= iteration for e in read_events(run.events)):
            return
        time.sleep(0.01)
    out, err = process.communicate(timeout=30)
    raise AssertionError(f"iteration {iteration} was never reached\n{out}\n{err}")


LONG = {"iterations": 16, "checkpoint_every": 5}
_undisturbed: list[DistilledSet] = []


@pytest.fixture
def undisturbed(pipeline_of) -> DistilledSet:
    """What one process makes of LONG, made once."""
    if not _undisturbed:
        _undisturbed.append(over(pipeline_of("undisturbed", distill=LONG), 1))
    return _undisturbed[0]


def test_a_killed_rank_is_named_and_its_run_goes_on_to_the_same_result(pipeline_of, undisturbed):
    killed = pipeline_of("killed", distill=LONG)
    process = start(killed.run.root.parent, killed.run.root)
    wait_for_iteration(killed.run, process, 7)
    os.kill(ranks_of(killed.run)[1], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "rank 1 of 2 was killed by SIGKILL; starting again from the last checkpoint (1 of 3)" in out
    assert "continuing after iteration" in out
    same(DistilledSet.load(killed.run.distilled), undisturbed, 1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_ranks_stop_together_and_the_run_goes_on(pipeline_of, undisturbed, number):
    stopped = pipeline_of("stopped", distill=LONG)
    process = start(stopped.run.root.parent, stopped.run.root)
    wait_for_iteration(stopped.run, process, 7)
    children = ranks_of(stopped.run)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert time.monotonic() - began < ranks._GRACE - 5  # they end by themselves; none is killed
    assert err.startswith("error: interrupted by ") and "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    (folder,) = stopped.run.distill_checkpoint.iterdir()
    assert folder.name != "iteration-000005"  # saved where it stopped, not only where it would have been anyway
    same(over(stopped, 1), undisturbed, 1e-3)


def test_ranks_end_with_a_launcher_that_is_killed(pipeline_of, undisturbed):
    left = pipeline_of("left", distill=LONG)
    process = start(left.run.root.parent, left.run.root)
    wait_for_iteration(left.run, process, 7)
    children = ranks_of(left.run)
    process.kill()
    process.communicate()
    until = time.monotonic() + 25
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < until, "ranks without a launcher"
        time.sleep(0.1)
    (folder,) = left.run.distill_checkpoint.iterdir()
    assert folder.name != "iteration-000005"
    same(over(left, 1), undisturbed, 1e-3)


def test_torchrun_starts_the_ranks_as_well(pipeline_of, tmp_path):
    """One of the ranks alone selects the iteration to keep."""
    selecting = {"distill": {"select": "test-as-published", "select_every": 2}}
    alone = over(pipeline_of("alone", **selecting), 1)
    under = pipeline_of("torchrun", **selecting)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
               "-m", "lad_dist.cli", "distill", str(under.run.root), "--threads", str(MANY), "--device", "cpu"]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("initial images") == 1 and done.stdout.count("select: iteration-") == 1
    measured = [e["iteration"] for e in read_events(under.run.events) if e["kind"] == "candidate"]
    assert measured == [2, 4, 6]
    assert done.stdout.count(f"threads: 2 ranks x {MANY} threads exceed the ") == 1
    same(DistilledSet.load(under.run.distilled), alone)


def test_a_disk_that_is_full_for_one_rank(pipeline_of, monkeypatch):
    full = pipeline_of("full", distill={"iterations": 1})
    full.run.distill_checkpoint.parent.mkdir()
    full.run.distill_checkpoint.touch()  # where the folder of checkpoints should be
    with pytest.raises(StorageError, match="checkpoints/distill"):
        over(full, 2)
    assert not full.run.distilled.exists()


def test_a_rank_that_never_comes(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29871")
    began = time.monotonic()
    with (
        pytest.raises(RankError, match=r"rank 0 of 2: could not connect to the others at 127\.0\.0\.1:29871"),
        ranks.joined(ranks.ProcessRank(0, 2, 0), torch.device("cpu"), timeout=2),
    ):
        raise AssertionError("there is no other rank")
    assert time.monotonic() - began < 20


def test_the_regression_phase_of_three_ranks_equals_that_of_one(pipeline_of):
    """20 images in uneven shares; a batch of 7 may leave a rank without an image."""
    distill = {"optimizer": "adam", "schedule": "cosine", "batch": 7, "regression_epoch_max": 4, "lr_images": 0.02,
               "regression_dropout": 0.5}  # fmt: skip
    fields = {"method": "lad-fr", "distill": distill}
    same(over(pipeline_of("three", **fields), 3), over(pipeline_of("one", **fields), 1))
