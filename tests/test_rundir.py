"""The run folder: publish by rename, leftovers, other recipes, shared buffers."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lad_dist import recipe_file, rundir
from lad_dist.errors import RunDirError, StorageError
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir, host_name, published

ROOT = Path(__file__).resolve().parents[1]


def changed(*sets: str) -> Recipe:
    return recipe_file.from_document({}, sets)


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_published_file_appears_whole(tmp_path):
    final = tmp_path / "a" / "b.txt"
    with published(final) as temporary:
        temporary.write_text("half")
        assert not final.exists() and temporary.parent == final.parent and temporary.suffix == ".txt"
    assert final.read_text() == "half" and names(final.parent) == ["b.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_what_is_published_honours_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with published(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with RunDir(tmp_path).publish_folder(tmp_path / "folder") as temporary:
            (temporary / "inside").touch()
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "folder", "folder/inside")}
    assert modes == {"file": 0o666 & ~mask, "folder": 0o777 & ~mask, "folder/inside": 0o666 & ~mask}


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, error):
    final = tmp_path / "b.txt"
    final.write_text("old")
    with pytest.raises(StorageError if isinstance(error, OSError) else type(error)), published(final) as temporary:
        temporary.write_text("new")
        raise error
    assert final.read_text() == "old" and names(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_when_publishing(tmp_path, monkeypatch, call):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "b.txt"))

    (tmp_path / "b.txt").write_text("old")
    monkeypatch.setattr(os, call, full)
    refused = pytest.raises(StorageError, match="No space left on device; free some space")
    with refused, published(tmp_path / "b.txt") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "b.txt").read_text() == "old" and names(tmp_path) == ["b.txt"]


def test_a_published_folder_replaces_the_old_one(tmp_path):
    run = RunDir.open(tmp_path / "run", Recipe())
    for content in ("one", "two"):
        with run.publish_folder(run.distilled) as temporary:
            (temporary / f"{content}.txt").write_text(content)
    assert names(run.distilled) == ["two.txt"]
    assert names(run.root) == ["distilled", "recipe.yaml", "trajectories"]
    with pytest.raises(ValueError, match="x"), run.publish_folder(run.distilled) as temporary:
        (temporary / "three.txt").write_text("three")
        raise ValueError("x")
    assert names(run.distilled) == ["two.txt"]
    assert names(run.root) == ["distilled", "recipe.yaml", "trajectories"]


# --- opening ----------------------------------------------------------------------------------------------------------


def test_opening_writes_the_resolved_recipe(tmp_path):
    recipe = changed("ipc=3", "method=datm")
    run = RunDir.open(tmp_path / "a" / "run", recipe)
    assert recipe_file.load(run.recipe) == recipe
    assert "matching: joint" in run.recipe.read_text()
    before = run.recipe.stat().st_mtime_ns
    RunDir.open(run.root, recipe)
    assert run.recipe.stat().st_mtime_ns == before


def test_another_recipe_is_refused_with_what_differs(tmp_path):
    run = RunDir.open(tmp_path / "run", changed("ipc=3"))
    (run.distill_checkpoint / "iteration-000001").mkdir(
        parents=True
    )  # before it, only the data contradict: test_grow.py
    text = run.recipe.read_text()
    with pytest.raises(RunDirError) as refused:
        RunDir.open(run.root, changed("ipc=4", "distill.lr_images=7", "data.n_max=5"))
    for part in ("ipc is 3 there, 4 here", "distill.lr_images is 100.0 there, 7.0 here",
                 "data.n_max is null there, 5 here"):  # fmt: skip
        assert part in str(refused.value)
    assert run.recipe.read_text() == text


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_while_only_experts_are_there_the_distillation_may_change(tmp_path, schedule):
    """Also by an ``--out`` of a run that was begun with other iterations, and after a kill within its first checkpoint."""
    first, other = (Recipe(distill={"schedule": schedule, "iterations": count}) for count in (9, 5))
    run = RunDir.open(tmp_path / "run", first)
    part = run.trajectories / "representation" / "expert-0000" / "epochs-0000-0001.parquet"
    part.parent.mkdir(parents=True)
    part.touch()
    left = run.distill_checkpoint / f".tmp-{host_name()}-{2**22 + 1}-abcd"  # no process has that number
    left.mkdir(parents=True)
    RunDir.open(tmp_path / "run", other)
    assert recipe_file.load(run.recipe).distill.iterations == 5 and part.exists() and not left.exists()


@pytest.mark.parametrize("free", [
    "data.root=/x", "distill.checkpoint_every=3", "evaluate.seeds=9", "distill.gradient=keep", "name=other",
    "experts.epochs_per_part=3",
])  # fmt: skip
def test_what_changes_no_pixel_may_change(tmp_path, free):
    run = RunDir.open(tmp_path / "run", Recipe())
    RunDir.open(run.root, changed(free))
    assert recipe_file.load(run.recipe) == changed(free)


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_living_one_are_not(tmp_path):
    run = RunDir.open(tmp_path / "run", Recipe())
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = rundir.host_name()
    (run.root / f".tmp-{host}-{ended.pid}-folder").mkdir()
    for folder in (run.root / "checkpoints", run.root / "evaluation", run.trajectories):
        folder.mkdir(exist_ok=True)
        (folder / f".tmp-{host}-{ended.pid}-abc").write_text("half")
        (folder / f".tmp-{host}-{os.getpid()}-abc").write_text("being written")
        (folder / ".tmp-elsewhere-1-abc").write_text("being written on another host")
        old = folder / ".tmp-elsewhere-1-old"
        old.write_text("left behind on another host")
        os.utime(old, (0, 0))
    RunDir.open(run.root, Recipe())
    left = sorted({p.name for p in run.root.rglob(".tmp-*")})
    assert left == sorted([f".tmp-{host}-{os.getpid()}-abc", ".tmp-elsewhere-1-abc"])


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirError, match="not empty and not a run folder"):
        RunDir.open(tmp_path, Recipe())
    assert names(tmp_path) == ["thesis.tex"]


def test_a_folder_that_another_process_of_the_run_is_just_making(tmp_path, monkeypatch):
    """As the tasks of an array do that start together: its recipe is being published, or appears between two looks."""
    (tmp_path / ".tmp-elsewhere-1-abc.yaml").write_text("being written on another host")
    RunDir.open(tmp_path, Recipe())
    (tmp_path / "recipe.yaml").rename(tmp_path / "later.yaml")
    look = type(tmp_path).iterdir

    def iterdir(folder):
        seen = list(look(folder))
        if (tmp_path / "later.yaml").exists():
            (tmp_path / "later.yaml").rename(tmp_path / "recipe.yaml")
        return iter(seen)

    monkeypatch.setattr(type(tmp_path), "iterdir", iterdir)
    RunDir.open(tmp_path, Recipe())
    assert (tmp_path / "recipe.yaml").exists() and not (tmp_path / "later.yaml").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError, match="Not a directory; choose another folder with --out"):
        RunDir.open(tmp_path / "file" / "run", Recipe())


def test_existing_wants_a_run_folder(tmp_path):
    with pytest.raises(RunDirError, match="not a run folder"):
        RunDir.existing(tmp_path)
    assert RunDir.existing(RunDir.open(tmp_path / "run", Recipe()).root).root == tmp_path / "run"


# --- shared buffers ---------------------------------------------------------------------------------------------------


def test_jobs_with_the_same_experts_share_a_buffer(tmp_path):
    store = tmp_path / "buffers"
    one = RunDir.open(tmp_path / "one", changed("ipc=1"), store)
    two = RunDir.open(tmp_path / "two", changed("ipc=2"), store)
    other = RunDir.open(tmp_path / "other", changed("experts.lr=0.02"), store)
    assert one.trajectories.resolve() == two.trajectories.resolve() != other.trajectories.resolve()
    assert names(store) == sorted(changed(s).experts_hash()[:16] for s in ("ipc=1", "experts.lr=0.02"))
    RunDir.open(tmp_path / "one", changed("ipc=1"), store)
    RunDir.open(tmp_path / "one", changed("ipc=1"))  # without --buffers it keeps what it has
    assert one.trajectories.is_symlink()


def test_a_run_with_a_buffer_of_its_own_keeps_it(tmp_path):
    run = RunDir.open(tmp_path / "run", Recipe())
    (run.trajectories / "something").touch()
    with pytest.raises(RunDirError, match="already holds a buffer"):
        RunDir.open(run.root, Recipe(), tmp_path / "buffers")
    assert names(run.trajectories) == ["something"]


# --- buffers in an object store ---------------------------------------------------------------------------------------

STORE = "s3://bucket/lad?endpoint_override=127.0.0.1:5000&scheme=http"


def test_a_run_may_use_a_buffer_in_an_object_store(tmp_path):
    run = RunDir.open(tmp_path / "run", Recipe(), STORE)
    expected = f"s3://bucket/lad/{Recipe().experts_hash()[:16]}?endpoint_override=127.0.0.1:5000&scheme=http"
    assert run.trajectories == expected
    assert run.whitening == run.root / "whitening.safetensors"
    assert names(run.root) == ["recipe.yaml", "trajectories.uri"]
    assert (run.root / "trajectories.uri").read_text() == expected + "\n"
    for again in (STORE, None):  # without --buffers it keeps what it has
        assert RunDir.open(run.root, Recipe(), again).trajectories == expected
    assert RunDir.existing(run.root).trajectories == expected
    assert names(run.root) == ["recipe.yaml", "trajectories.uri"]


def test_a_file_uri_is_a_folder(tmp_path):
    run = RunDir.open(tmp_path / "run", Recipe(), f"file://{tmp_path}/buffers")
    assert run.trajectories.is_symlink() and names(tmp_path / "buffers") == [Recipe().experts_hash()[:16]]
    assert RunDir.open(run.root, Recipe(), tmp_path / "buffers").trajectories == run.trajectories
    assert RunDir.open(run.root, Recipe(), str(tmp_path / "buffers")).trajectories == run.trajectories


@pytest.mark.parametrize("other", ["s3://bucket/other", "s3://bucket/lad", "local"])
def test_a_run_with_a_buffer_in_a_store_keeps_it(tmp_path, other):
    run = RunDir.open(tmp_path / "run", Recipe(), STORE)
    before = run.trajectories
    with pytest.raises(RunDirError, match=r"trajectories\.uri: names the buffer s3://bucket/lad/.*no --buffers"):
        RunDir.open(run.root, Recipe(), tmp_path if other == "local" else other)
    assert run.trajectories == before and names(run.root) == ["recipe.yaml", "trajectories.uri"]


def test_a_run_with_a_local_buffer_is_not_given_one_in_a_store(tmp_path):
    own = RunDir.open(tmp_path / "own", Recipe())
    (own.trajectories / "something").touch()
    linked = RunDir.open(tmp_path / "linked", Recipe(), tmp_path / "buffers")
    for run in (own, linked):
        with pytest.raises(
            RunDirError, match="trajectories: already holds a buffer, so the run cannot use s3://bucket/lad/"
        ):
            RunDir.open(run.root, Recipe(), STORE)
        assert names(run.root) == ["recipe.yaml", "trajectories"]
    empty = RunDir.open(tmp_path / "empty", Recipe())
    assert RunDir.open(empty.root, Recipe(), STORE).trajectories.startswith("s3://")
    assert not (empty.root / "trajectories").exists()


@pytest.mark.parametrize("secret", ["s3://KEY:SECRET@bucket/lad", "s3://bucket/lad?session_token=SECRET"])
def test_credentials_are_not_kept_in_a_run(tmp_path, secret):
    with pytest.raises(
        RunDirError, match=r"^s3://bucket/lad: the URI holds credentials.*AWS_SECRET_ACCESS_KEY"
    ) as caught:
        RunDir.open(tmp_path / "run", Recipe(), secret)
    assert "SECRET@" not in str(caught.value) and "token" not in str(caught.value)
    assert "trajectories.uri" not in names(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"/a/folder", b"s3://a\ns3://b", b"\xff\xfe"])
def test_a_damaged_note_of_the_buffer(tmp_path, content):
    run = RunDir.open(tmp_path / "run", Recipe(), STORE)
    (run.root / "trajectories.uri").write_bytes(content)
    with pytest.raises(RunDirError, match=r"trajectories\.uri: .*valid: one line with"):
        RunDir.open(run.root, Recipe())


def test_the_experts_of_a_run_serve_another(tmp_path):
    one = RunDir.open(tmp_path / "one", changed("ipc=1"))
    (one.trajectories / "part").touch()
    (one.distill_checkpoint / "iteration-000001").mkdir(parents=True)
    with pytest.raises(RunDirError, match=rf"ipc is 1 there, 2 here.*--buffers {one.root} to use its experts"):
        RunDir.open(one.root, changed("ipc=2"))
    two = RunDir.open(tmp_path / "two", changed("ipc=2"), one.root)
    assert (two.trajectories / "part").exists() and two.whitening.resolve() == one.whitening.resolve()
    assert RunDir.whitening_to_come(tmp_path / "three", changed("ipc=3"), two.root).resolve() == one.whitening.resolve()
    assert RunDir.open(two.root, changed("ipc=2"), one.root).trajectories == two.trajectories
    RunDir.open(one.root, changed("ipc=1"), one.root)
    assert not one.trajectories.is_symlink()
    with pytest.raises(RunDirError, match=r"its experts are of another recipe \(.*experts.lr is 0.01 there, 0.02 here"):
        RunDir.open(tmp_path / "other", changed("experts.lr=0.02"), one.root)
    with pytest.raises(RunDirError, match="or remove this one"):
        RunDir.open(one.root, changed("experts.lr=0.02"))


@pytest.mark.parametrize("names", [["b", "a", "c"], ["x"]])
def test_tensors_are_written_as_safetensors_writes_them(tmp_path, names):
    """Byte for byte, but for the metadata; views, one number and nothing at all included."""
    import torch
    from safetensors.torch import load_file, save

    kinds = [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16, torch.bool]
    tensors = {f"{n}{i}": torch.arange(6).to(k).view(2, 3) for n in names for i, k in enumerate(kinds)}
    tensors |= {"one": torch.tensor(3.5), "none": torch.empty(0), "turned": torch.arange(6.0).view(2, 3).t()}
    rundir.save_tensors(tensors, tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == save({k: t.contiguous() for k, t in tensors.items()})
    rundir.save_tensors(tensors, tmp_path / "summed", {"about": "x", "dtype": "y"})
    found, metadata = rundir.load_tensors(tmp_path / "summed")
    assert metadata["about"] == "x" and len(metadata["sha256"]) == 64
    for read in (found, load_file(tmp_path / "summed")):
        assert set(read) == set(tensors) and all(torch.equal(read[k], t) for k, t in tensors.items())


LOADS = """
import sys
from pathlib import Path
import torch
from lad_dist import rundir

def peak():
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(words["VmHWM"].split()[0])

path = Path(sys.argv[1])
rundir.load_tensors(path.with_name("small"))
before = peak()
tensors, _ = rundir.load_tensors(path)
print((peak() - before) / path.stat().st_size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_loading_tensors_holds_nothing_else(tmp_path):
    import torch

    rundir.save_tensors({"a": torch.zeros(1)}, tmp_path / "small", {})
    rundir.save_tensors({n: torch.ones(8, 2**20) for n in "abcd"}, tmp_path / "large", {})  # 128 MiB
    command = [sys.executable, "-c", LOADS, str(tmp_path / "large")]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert 0.9 < float(told.stdout) < 1.3
