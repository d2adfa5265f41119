import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lad_dist.errors import Interrupted, NumericalError, StorageError, TrajectoryError
from lad_dist.trajectories import Buffer, BufferMeta, PartWriter, files

ROOT = Path(__file__).resolve().parents[2]


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".parquet"]


def test_append_says_when_a_part_was_published(tmp_path, meta, weights):
    writer = PartWriter(tmp_path, meta, "classifier", 2, epochs_per_part=2)
    published = [writer.append(epoch, weights("classifier", 2, epoch)) for epoch in range(5)]
    assert published == [False, True, False, True, False]
    assert Buffer(tmp_path).epochs("classifier", 2) == (0, 1, 2, 3)
    assert writer.flush() and not writer.flush()
    assert Buffer(tmp_path).epochs("classifier", 2) == (0, 1, 2, 3, 4)
    assert not leftovers(tmp_path)


def test_the_weights_are_copied(tmp_path, meta, weights):
    live = weights("classifier", 2, 0)
    expected = live.copy()
    with PartWriter(tmp_path, meta, "classifier", 2) as writer:
        writer.append(0, live)
        live += 1  # the optimiser goes on
        writer.append(1, live)
    assert np.array_equal(Buffer(tmp_path).read("classifier", 2, 0), expected)


@pytest.mark.parametrize("epoch", [5, 7, 0, -1])
def test_epochs_out_of_order_are_refused(tmp_path, meta, weights, epoch):
    writer = PartWriter(tmp_path, meta, "classifier", 2, epochs_per_part=1)
    writer.append(5, weights("classifier", 2, 5))  # a resumed expert starts anywhere
    with pytest.raises(TrajectoryError, match=rf"classifier expert 2 epoch {epoch}: .*valid: 6"):
        writer.append(epoch, weights("classifier", 2, 6))


@pytest.mark.parametrize("wrong", [np.zeros(63), np.zeros(62, np.float32), np.zeros((63, 1), np.float32)])
def test_vectors_of_the_wrong_kind_are_refused(tmp_path, meta, wrong):
    with pytest.raises(TrajectoryError, match=r"classifier expert 2 epoch 0: .*valid: float32 of shape \(63,\)"):
        PartWriter(tmp_path, meta, "classifier", 2).append(0, wrong)


def test_numbers_that_are_not_finite_are_refused_and_located(tmp_path, meta, weights):
    writer = PartWriter(tmp_path, meta, "classifier", 2)
    bad = weights("classifier", 2, 0)
    bad[61] = np.inf
    with pytest.raises(NumericalError, match=r"classifier expert 2 epoch 0: 1 of 63 .* head\.bias"):
        writer.append(0, bad)
    with pytest.raises(NumericalError, match="loss is nan"):
        writer.append(0, weights("classifier", 2, 0), loss=float("nan"))
    assert not writer.flush()


@pytest.mark.parametrize("arguments", [("head", 0, 1), ("classifier", -1, 1), ("classifier", 0, 0)])
def test_arguments_out_of_bounds_are_refused(tmp_path, meta, arguments):
    with pytest.raises(TrajectoryError, match="valid"):
        PartWriter(tmp_path, meta, *arguments)


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupted, ValueError, None])
def test_pending_checkpoints_are_published_however_the_block_ends(tmp_path, meta, weights, error):
    try:
        with PartWriter(tmp_path, meta, "classifier", 2) as writer:
            for epoch in range(3):
                writer.append(epoch, weights("classifier", 2, epoch))
            if error:
                raise error("stop")
    except (KeyboardInterrupt, Interrupted, ValueError) as raised:
        assert isinstance(raised, error)
    assert Buffer(tmp_path).last_contiguous_epoch("classifier", 2) == 2


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "mounted"),
        (errno.EIO, "accepts files"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusing_disk_is_reported_and_leaves_nothing(tmp_path, meta, weights, monkeypatch, call, number, advice):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    writer = PartWriter(tmp_path, meta, "classifier", 2, epochs_per_part=2)
    for epoch in range(3):
        writer.append(epoch, weights("classifier", 2, epoch))
    monkeypatch.setattr(files.os, call, refuse)
    with pytest.raises(StorageError) as caught:
        writer.append(3, weights("classifier", 2, 3))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "classifier/expert-0002/epochs-0002-0003.parquet"))
    assert os.strerror(number) in message and advice in message
    assert not leftovers(tmp_path)
    monkeypatch.undo()
    assert Buffer(tmp_path).verify() == []  # what was published before is intact
    assert writer.flush()  # space was made: nothing is lost
    assert Buffer(tmp_path).last_contiguous_epoch("classifier", 2) == 3


def test_a_full_disk_on_the_way_out_does_not_hide_the_first_error(tmp_path, meta, weights, monkeypatch):
    with pytest.raises(ValueError, match="the cause") as caught, PartWriter(tmp_path, meta, "classifier", 2) as writer:
        writer.append(0, weights("classifier", 2, 0))
        monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        raise ValueError("the cause")
    assert any("could not be published" in note for note in caught.value.__notes__)


# Runs in another process, because it is killed or limited there. ARGS: folder, then what happens to it.
CHILD = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np
from lad_dist.errors import StorageError
from lad_dist.seeds import rng
from lad_dist.trajectories import BufferMeta, PartWriter, files

folder, event = Path(sys.argv[1]), sys.argv[2]
meta = BufferMeta("aa11", "ff00", (1,), (("w", (4000,)),), ("w",))
if event == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
elif event != "none":
    original, calls = getattr(os, event), []
    def killing(*arguments):
        calls.append(1)
        if len(calls) == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)
    setattr(files.os, event, killing)
try:
    with PartWriter(folder, meta, "representation", 1, epochs_per_part=1 if event == "limit" else 3) as writer:
        for epoch in range(30):
            if event == "limit" and epoch == 2:
                writer.epochs_per_part = 3
            writer.append(epoch, rng(0, epoch).normal(size=4000).astype(np.float32), loss=1.0)
except StorageError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def child(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(folder), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_writer_killed_in_the_middle_leaves_whole_parts_only(tmp_path, call):
    count = {"replace": "3", "fsync": "5"}[call]  # a part is synced twice, its folder the second time
    process = child(tmp_path, call, count)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    buffer = Buffer(tmp_path)
    assert buffer.verify() == []
    assert buffer.last_contiguous_epoch("representation", 1) == 5  # parts 0-2 and 3-5; 6-8 was in flight
    assert len(leftovers(tmp_path)) == 1
    meta = BufferMeta("aa11", "ff00", (1,), (("w", (4000,)),), ("w",))
    PartWriter(tmp_path, meta, "representation", 1)  # the next writer cleans up
    assert leftovers(tmp_path) == []
    assert Buffer(tmp_path).last_contiguous_epoch("representation", 1) == 5


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system cannot limit the size of files")
def test_a_file_that_really_cannot_grow_is_reported(tmp_path):
    process = child(tmp_path, "limit")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == StorageError.exit_code, errors
    assert "epochs-0002-0004.parquet: could not be published: File too large" in output
    assert leftovers(tmp_path) == []
    buffer = Buffer(tmp_path)
    assert buffer.verify() == [] and buffer.last_contiguous_epoch("representation", 1) == 1


def test_concurrent_writers_of_one_expert_do_no_harm(tmp_path):
    """Two processes write the same expert while a thread reads it: all reads are right, the end is sound."""
    from lad_dist.seeds import rng

    wrong: list[str] = []
    stop = threading.Event()

    def watch() -> None:
        buffer = Buffer(tmp_path)
        while not stop.is_set():
            buffer.refresh()
            for epoch in buffer.epochs("representation", 1):
                expected = rng(0, epoch).normal(size=4000).astype(np.float32)
                try:
                    if not np.array_equal(buffer.read("representation", 1, epoch), expected):
                        wrong.append(f"epoch {epoch} differs")
                except TrajectoryError as error:
                    wrong.append(str(error))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        writers = [child(tmp_path, "none") for _ in range(2)]
        errors = [writer.communicate(timeout=60)[1] for writer in writers]
    finally:
        stop.set()
        watcher.join()
    assert [writer.returncode for writer in writers] == [0, 0], errors
    assert wrong == []
    buffer = Buffer(tmp_path)
    assert buffer.verify() == [] and len(buffer.parts) == 10 and leftovers(tmp_path) == []
    assert buffer.last_contiguous_epoch("representation", 1) == 29


def test_only_abandoned_temporary_files_are_removed(tmp_path, write):
    folder = write(2) / "representation/expert-0007"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files.host_name()
    names = {
        "dead": f".epochs-0000-0003.parquet.{host}.{dead.pid}.aa.tmp",
        "alive": f".epochs-0000-0003.parquet.{host}.{os.getpid()}.aa.tmp",
        "elsewhere": ".epochs-0000-0003.parquet.another-host.1.aa.tmp",
        "elsewhere, old": ".epochs-0000-0003.parquet.another-host.1.bb.tmp",
        "foreign": ".notes.tmp",
    }
    for name in names.values():
        (folder / name).write_bytes(b"half a part")
    hours_ago = time.time() - 2 * files.ABANDONED_AFTER
    os.utime(folder / names["elsewhere, old"], (hours_ago, hours_ago))
    filesystem, root = files.resolve(tmp_path / "buffer")
    removed = files.clean_temporary_files(filesystem, f"{root}/{folder.relative_to(tmp_path / 'buffer')}")
    assert {Path(path).name for path in removed} == {names["dead"], names["elsewhere, old"]}
    assert {path.name for path in leftovers(folder)} == {names["alive"], names["elsewhere"], names["foreign"]}
    assert Buffer(tmp_path / "buffer").epochs("representation", 7) == (0, 1, 2)
