"""What a fleet is made of, without a cluster: who trains, what is left, what is told, and what an actor does.

Whole fleets with real processes are in ``tests/journey/test_fleet_faults.py``.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from rich.console import Console

from lad_dist.data.prepare import prepare
from lad_dist.environment import environment
from lad_dist.errors import ExpertError, Interrupted, NumericalError, RecipeError, StorageError, TrajectoryError
from lad_dist.experts import actor as actor_module
from lad_dist.experts import cluster, private, scheduler
from lad_dist.experts.actor import Claimed, ExpertActor, Finished, Orders, SharedData, Started, failure_of
from lad_dist.experts.scheduler import ExpertLog, ExpertQueue, Failure, Process, choose, name_of, train_here
from lad_dist.experts.train import Epoch, ExpertTrainer
from lad_dist.interrupts import as_exceptions
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen, read_events
from lad_dist.trajectories import Buffer, claims

ROOT = Path(__file__).parents[2]
EACH = 7  # epochs of an expert of the small recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_recipe):
    return prepare(small_recipe(), tmp_path_factory.mktemp("data") / "whitening.safetensors", torch.device("cpu"))


@pytest.fixture
def trainer(tmp_path, small_recipe, data):
    return ExpertTrainer(small_recipe(experts={"count": 3}), data, tmp_path / "buffer")


class Told:
    """A record, and what it has said and written."""

    def __init__(self, trainer: ExpertTrainer, folder: Path) -> None:
        self.out, self.path = io.StringIO(), folder / "events.jsonl"
        self.screen = Screen(Console(file=self.out, width=300))
        e = trainer.recipe.experts
        self.record = ExpertLog(e, trainer.left(range(e.count)), Events(self.path), self.screen)

    def kinds(self) -> list[tuple[str, int]]:
        return [(e["kind"], e["expert"]) for e in read_events(self.path) if e["kind"] != "expert-epoch"]


@pytest.fixture
def told(trainer, tmp_path):
    return Told(trainer, tmp_path)


# --- fleet or not -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "left", "fleet", "why"), [
    ({"fleet": "off", "threads": 8}, 8, False, "fleet is off"),
    ({"fleet": "on", "threads": 1}, 1, True, "fleet is on"),
    ({"threads": 8}, 1, False, "one expert is left"),
    ({"threads": 1}, 8, False, "no two experts fit (1 core, 1 per expert)"),
    ({"threads": 3, "threads_per_expert": 2}, 8, False, "no two experts fit (3 cores, 2 per expert)"),
    ({"threads": 4, "threads_per_expert": 2}, 8, True, "2 experts at a time fit (4 cores, 2 per expert)"),
    ({"threads": 8}, 3, True, "3 experts at a time fit (8 cores, 1 per expert)"),
    ({"threads": 1, "ray": {"address": "head:6379"}}, 3, True, "the Ray cluster at head:6379 is named"),
])  # fmt: skip
def test_choice_on_cpus(fields, left, fleet, why, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert choose(Profile(**fields), on_gpu=False, left=left) == (fleet, why)


@pytest.mark.parametrize(("gpus", "each", "fleet"), [(1, 1, False), (1, 4, True), (8, 1, True)])
def test_choice_on_gpus(gpus, each, fleet, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(scheduler, "gpu_count", lambda: gpus)
    found = choose(Profile(threads=1, experts_per_gpu=each), on_gpu=True, left=100)
    assert found.fleet == fleet and f"{gpus} GPU" in found.why


def test_choice_by_the_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert choose(Profile(threads=1), on_gpu=False, left=2) == (True, "the Ray cluster at 10.0.0.1:6379 is named")
    assert scheduler.cluster_address(Profile(ray={"address": "head:1"})) == "head:1"


def test_cores():
    assert scheduler.cores_to_use(Profile(threads=5)) == 5
    assert scheduler.cores_to_use(Profile()) >= 1


def test_ray_is_imported_by_no_other_verb_and_not_without_a_fleet(tmp_path):
    """In one process: a whole run without a fleet, then every verb that looks at it. torch's compiler is not imported either."""
    recipe = {
        "name": "tiny", "ipc": 1, "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20},
        "model": {"width": 4, "depth": 1}, "augment": {"operations": []},
        "experts": {"count": 2, "epochs": 2, "classifier_epochs": 2, "batch": 64},
        "distill": {"iterations": 1, "student_steps": 1, "student_steps_classifier": 1, "window_epochs": 1,
                    "start_epoch_max": 1},
        "evaluate": {"seeds": 1, "epochs": 1, "full_epochs": 1},
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(json.dumps(recipe))
    code = """
import sys
from contextlib import suppress
from lad_dist import cli
for verb in ("experts tiny.yaml --fleet off --out run", "experts tiny.yaml --threads 1 --out other --device cpu",
             "distill run", "evaluate run", "run run", "report run", "status run", "buffer inspect run", "jobs", "clusters"):
    with suppress(SystemExit):
        cli.app(verb.split())
    assert not {"ray", "torch._dynamo"} & set(sys.modules), verb
import lad_dist.experts.fleet
assert "ray" in sys.modules
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.rstrip().endswith("done"), done.stdout + done.stderr
    assert (tmp_path / "run/report/index.html").exists()
    assert "in this process: no two experts fit (1 core" in done.stdout


# --- the queue --------------------------------------------------------------------------------------------------------


def test_the_queue_skips_what_is_claimed_and_crosses_off_what_is_finished(trainer, told, monkeypatch):
    queue = ExpertQueue(trainer, [0, 1, 2])
    with closing(trainer.train(0)) as epochs:
        assert len(list(epochs)) == EACH
    with claims.hold(trainer.folder, name_of(1), "another") as held:
        assert held
        assert queue.take(told.record) == 2
        assert told.kinds() == [("expert-finished", 0)]
        assert queue.take(told.record) is None and len(queue) == 1
        queue.say_waiting(told.screen)
        queue.say_waiting(told.screen)
        assert told.out.getvalue().count("waiting for those that another driver is training (expert 1 by process") == 1
        queue.put_back(2)
    assert queue.take(told.record) is None  # it looks again every couple of seconds
    monkeypatch.setattr(queue, "_look_at", 0.0)
    assert queue.take(told.record) == 1
    queue.again(1)
    assert [queue.take(told.record) for _ in range(2)] == [1, 2]
    assert len(queue) == 0 and queue.take(told.record) is None


def test_in_this_process_it_waits_for_another_driver_and_finishes_what_that_leaves(trainer, told, monkeypatch):
    monkeypatch.setattr(scheduler, "LOOK_AGAIN_SECONDS", 0.01)
    queue = ExpertQueue(trainer, [0, 1, 2])
    waited = []
    claim = claims.hold(trainer.folder, name_of(0), "another")

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            claim.__exit__(None, None, None)

    assert claim.__enter__()
    monkeypatch.setattr(scheduler.time, "sleep", wait)
    train_here(trainer, queue, told.record, told.screen)
    assert len(waited) >= 3
    assert told.kinds() == [(kind, e) for e in (1, 2, 0) for kind in ("expert-started", "expert-finished")]
    assert not any(trainer.left(range(3)).values()) and told.record.experts_done == 3
    assert list((trainer.folder / "claims").iterdir()) == []


def test_in_this_process_a_claim_that_came_in_between_is_respected(trainer, told, monkeypatch):
    monkeypatch.setattr(scheduler.claims, "foreign", lambda *args: None)
    monkeypatch.setattr(scheduler.time, "sleep", lambda seconds: None)
    queue, seen = ExpertQueue(trainer, [0, 1]), []
    claim = claims.hold(trainer.folder, name_of(0), "another")
    assert claim.__enter__()

    def put_back(expert: int) -> None:
        seen.append(expert)
        claim.__exit__(None, None, None)
        queue._waiting.append(expert)

    monkeypatch.setattr(queue, "put_back", put_back)
    train_here(trainer, queue, told.record, told.screen)
    assert seen == [0] and not any(trainer.left(range(2)).values())


# --- the record -------------------------------------------------------------------------------------------------------


class Board:
    def __init__(self) -> None:
        self.done, self.rows, self.seen = 0, {}, []

    def advance(self, steps: int = 1) -> None:
        self.done += steps

    def row(self, key: str, text: str | None) -> None:
        self.rows[key] = text
        self.seen.append(text)
        if text is None:
            del self.rows[key]


def epoch(expert: int, number: int, stage: str = "representation") -> Epoch:
    return Epoch(expert, stage, number, 0.5, 0.25, 1000.0)


def test_the_record_counts_repeated_epochs_once(told):
    record, board, by = told.record, Board(), Process("host", 42)
    record.show_on(board)
    assert (record.total_epochs, record.epochs_trained) == (3 * EACH, 0)
    record.starting(1)
    record.started(1, by)
    for number in (1, 2, 3):
        record.epoch(epoch(1, number), by)
    assert board.done == 3 and record.images_per_second == {1: 1000.0}
    assert board.rows == {"expert-0001": "representation epoch 3 of 4, loss 0.5, accuracy 0.250, 1000 images/s"}
    record.restarted(Failure(1, "it is gone"), 1, 3)
    assert board.rows == {} and record.images_per_second == {}
    record.started(1, by)
    for number in (2, 3, 4):
        record.epoch(epoch(1, number), by)
    assert board.done == 4
    record.epoch(epoch(1, 1, "classifier"))
    assert board.done == 5 and record.experts_done == 0
    record.finished(1)
    assert board.done == EACH and record.experts_done == 1 and record.epochs_trained == EACH
    record.finished(2, elsewhere=True)
    assert board.done == 2 * EACH
    assert told.kinds() == [("expert-started", 1), ("expert-restarted", 1), ("expert-started", 1), ("expert-finished", 1),
                            ("expert-finished", 2)]  # fmt: skip
    events = list(read_events(told.path))
    assert events[0]["host"] == "host" and events[0]["pid"] == events[1]["pid"] == 42
    assert "pid" not in events[-3] and events[-1]["elsewhere"] is True and "elsewhere" not in events[-2]
    assert "expert-0001: it is gone; retried from its last part (1 of 3)" in told.out.getvalue()


def test_what_a_stage_with_failures_ends_with(told):
    assert told.record.error(4) is None
    told.record.failed(Failure(2, "NaN", "NumericalError", "Traceback: where it was\n"), 4)
    error = told.record.error(4)
    assert isinstance(error, NumericalError) and error.exit_code == 7
    assert str(error).startswith("1 expert failed 4 times: expert 2: NaN; finished work is kept")
    assert told.out.getvalue().count("Traceback: where it was") == 1
    told.record.failed(Failure(0, "gone"), 4)
    told.record.finished(1)
    error = told.record.error(1)
    assert type(error) is ExpertError and error.exit_code == 9
    assert str(error).startswith("2 experts failed once: expert 0: gone; expert 2: NaN; the other experts are finished")
    assert [e["kind"] for e in read_events(told.path)] == ["expert-failed", "expert-failed", "expert-finished"]


# --- an actor ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def orders(small_recipe, tmp_path):
    return Orders(small_recipe(), tmp_path / "by the actor", "driver", "cpu", 1)


def shared(data) -> SharedData:
    """As it arrives in another process: arrays that cannot be written to."""
    found = SharedData.of(data)
    for array in (found.images_NCHW, found.labels_N, *found.whitening):
        array.flags.writeable = False
    return found


def test_an_actor_writes_what_the_trainer_writes(data, trainer, orders, recwarn):
    reports = list(ExpertActor(orders, shared(data), 1).train())
    assert isinstance(reports[0], Started) and reports[0].process.pid > 0
    assert [r.epoch for r in reports[1:-1]] == [1, 2, 3, 4, 1, 2, 3] and reports[-1] == Finished()
    assert not [w for w in recwarn if "writ" in str(w.message)]
    with closing(trainer.train(1)) as epochs:
        list(epochs)
    assert Buffer(orders.location).digest() == Buffer(trainer.folder).digest()
    assert Buffer(orders.location).meta == Buffer(trainer.folder).meta


@pytest.mark.parametrize("whitening", ["zca", "standardize", "none"])
def test_shared_data_is_the_same_data(small_recipe, tmp_path, whitening):
    recipe = small_recipe(data={"whitening": whitening})
    original = prepare(recipe, tmp_path / "whitening.safetensors", torch.device("cpu"))
    handed = shared(original)
    assert handed.nbytes >= 96 * 64
    found = handed.prepared(torch.device("cpu"))
    rows = torch.arange(len(original.train))
    for a, b in zip(found.train.batch(rows), original.train.batch(rows), strict=True):
        assert torch.equal(a, b)
    assert found.splits.train.fingerprint() == original.splits.train.fingerprint()
    assert found.counts == original.counts and len(found.splits.test) == 0
    assert np.shares_memory(found.splits.train.images_NCHW.numpy(), handed.images_NCHW)


def test_an_actor_says_what_it_does_and_how_far_it_is(data, orders, capsys):
    actor = ExpertActor(orders, shared(data), 1, trained=2)
    assert repr(actor) == "expert 1, from epoch 2 of 7"
    list(actor.train())
    lines = [line.split(" expert 1: ")[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("begins: process ") and lines[-1] == "finished: all its epochs are in the buffer"
    assert [line.partition(",")[0] for line in lines[1:-1]] == [
        *(f"representation epoch {epoch} of 4" for epoch in (1, 2, 3, 4)),
        *(f"classifier epoch {epoch} of 3" for epoch in (1, 2, 3)),
    ]
    assert "images/s" in lines[1] and "loss" in lines[1]


def test_an_actor_leaves_what_another_driver_claims(data, orders):
    with claims.hold(orders.location, name_of(0), "another"):
        assert list(ExpertActor(orders, shared(data), 0).train()) == [Claimed()]
    with claims.hold(orders.location, name_of(0), orders.owner):  # of a lost actor of the same driver
        assert isinstance(list(ExpertActor(orders, shared(data), 0).train())[-1], Finished)


def test_an_actor_reports_errors_as_text(data, orders, monkeypatch):
    class Poisoned(ExpertTrainer):
        def train(self, expert):
            yield epoch(expert, 1)
            raise ValueError("poison")

    monkeypatch.setattr(actor_module, "ExpertTrainer", Poisoned)
    _, first, failure = ExpertActor(orders, shared(data), 5).train()
    assert isinstance(first, Epoch)
    assert (failure.expert, failure.message, failure.kind) == (5, "ValueError: poison", None)
    assert failure.trace.startswith("Traceback") and "in train" in failure.trace
    assert list((orders.location / "claims").iterdir()) == []


def test_the_kind_of_a_failure():
    class Special(TrajectoryError):
        pass

    assert failure_of(0, StorageError("full")).kind == "StorageError"
    assert failure_of(0, Special("odd")).kind == "TrajectoryError"
    assert failure_of(0, OSError("no")).kind is None


@pytest.mark.parametrize(("number", "lasting"), [
    (errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, True), (errno.EACCES, True), (errno.EIO, False),
    (errno.ESTALE, False),
])  # fmt: skip
@pytest.mark.parametrize("where", ["part", "claim"])
def test_what_no_second_attempt_cures(data, orders, monkeypatch, number, lasting, where):
    refused = "lad_dist.trajectories.files.os.fsync" if where == "part" else "lad_dist.trajectories.claims.os.link"
    monkeypatch.setattr(refused, Mock(side_effect=OSError(number, os.strerror(number))))
    *_, failure = ExpertActor(orders, shared(data), 5).train()
    assert (failure.kind, failure.lasting) == ("StorageError", lasting)
    assert os.strerror(number) in failure.message


def test_an_actor_uses_as_many_threads_as_it_is_told(data, orders, monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    ExpertActor(orders, shared(data), 0)
    assert told == [1]


# --- beside Ray -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_signal_is_lost_where_a_library_drops_exceptions_of_handlers(number):
    with (
        pytest.raises(Interrupted, match=number.name),
        as_exceptions(),
        cluster.signals_heeded(),
        suppress(Interrupted),
    ):
        signal.raise_signal(number)


def test_a_handler_that_a_library_has_put_in_place_of_ours():
    before = signal.getsignal(signal.SIGTERM)

    def start() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as ray.init does
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM"), as_exceptions(), cluster.signals_heeded():
        start()
    with as_exceptions():
        ours = signal.getsignal(signal.SIGTERM)
        with cluster.signals_heeded():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGTERM) is ours
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_node_that_takes_too_long_to_start_is_one_error(tmp_path, monkeypatch):
    """Ray raises a plain Exception then."""
    from lad_dist.experts import fleet

    raised: list[Exception] = [Exception("The current node timed out during startup.")]

    def late(**arguments):
        raise raised[0]

    monkeypatch.setattr(fleet.ray, "init", late)
    monkeypatch.setattr(fleet, "listens", lambda address: True)
    with pytest.raises(ExpertError, match="no cluster could be started on this machine: The current node timed out"):
        fleet._started(Profile(), 0, tmp_path)
    with pytest.raises(ExpertError, match=r"no Ray cluster answers there.*The current node timed out"):
        fleet._joined("127.0.0.1:1")
    raised[0] = Interrupted("interrupted by SIGINT")
    with pytest.raises(Interrupted):
        fleet._started(Profile(), 0, tmp_path)


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("LAD_A", "1")
    monkeypatch.delenv("LAD_B", raising=False)
    with environment({"LAD_A": "2", "LAD_B": "3"}):
        assert (os.environ["LAD_A"], os.environ["LAD_B"]) == ("2", "3")
    assert os.environ["LAD_A"] == "1" and "LAD_B" not in os.environ


def test_processes_of_a_failed_start_are_ended():
    import ray  # noqa: F401

    psutil = import_module("psutil")  # Ray's own copy
    before = subprocess.Popen(["sleep", "100"])
    try:
        with pytest.raises(Interrupted), cluster.nothing_left_on_error():
            started = psutil.Popen(["sh", "-c", "sleep 100 & sleep 100"])
            while not (children := started.children()):
                time.sleep(0.01)
            raise Interrupted("now")
        assert not started.is_running() and before.poll() is None
        assert all(not c.is_running() or c.status() == psutil.STATUS_ZOMBIE for c in children)
    finally:
        before.kill()
        before.wait()


def test_processes_of_the_private_folder_are_ended_whoever_their_parent_is(tmp_path):
    import ray  # noqa: F401

    psutil = import_module("psutil")  # Ray's own copy
    folder, other = tmp_path / "ladist-ray-a", tmp_path / "ladist-ray-ab"
    command = "import time; time.sleep(100)"
    start = f"{sys.executable} -c '{command}' --temp-dir={folder}/r >&2 & echo $!"
    orphan = psutil.Process(
        int(subprocess.run(["sh", "-c", start], stdout=subprocess.PIPE, check=True).stdout.split()[0])
    )
    stranger = subprocess.Popen([sys.executable, "-c", command, f"--temp-dir={other}/r"])
    try:
        assert orphan.ppid() != os.getpid() and orphan.status() != psutil.STATUS_ZOMBIE
        cluster.end_processes_of(folder)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_cluster_that_does_not_start_in_time_is_one_message(monkeypatch, tmp_path):
    """Ray raises a plain Exception then."""

    def init(**_):
        raise Exception("The current node timed out during startup.")

    fleet = import_module("lad_dist.experts.fleet")
    monkeypatch.setattr(fleet.ray, "init", init)
    with pytest.raises(ExpertError, match=r"no cluster could be started .*timed out.*--fleet off"):
        fleet._started(Profile(threads=1), 0, tmp_path)


def test_the_object_store_fits_the_images(monkeypatch):
    monkeypatch.setattr(cluster, "gpu_count", lambda: 0)
    mib = 2**20
    assert cluster.own_arguments(Profile(threads=2), 0, Path("/tmp/x"))["object_store_memory"] == 80 * mib
    assert cluster.own_arguments(Profile(threads=2), 1000 * mib, Path("/tmp/x"))["object_store_memory"] == 1300 * mib
    chosen = cluster.own_arguments(Profile(threads=2, ray={"object_store_mb": 100}), 1000 * mib, Path("/tmp/x"))
    assert chosen["_temp_dir"] == "/tmp/x/r"
    assert chosen["object_store_memory"] == 100 * mib and chosen["num_cpus"] == 2 and chosen["address"] == "local"
    assert cluster.own_arguments(Profile(threads=1, threads_per_expert=3), 0, Path("/tmp/x"))["num_cpus"] == 3


def test_the_environment_of_a_cluster_of_its_own(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("RAY_worker_niceness", "5")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    found = cluster.own_environment(Profile(threads_per_expert=3), Path("/private/token"))
    assert found["RAY_AUTH_MODE"] == "token" and found["RAY_AUTH_TOKEN_PATH"] == "/private/token"
    with environment(found):
        assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN"] == "of another cluster"
    assert found["OMP_NUM_THREADS"] == "3" and found["RAY_worker_niceness"] == "5"
    assert found["RAY_USAGE_STATS_ENABLED"] == "0"


def test_directions():
    own = cluster.Cluster("127.0.0.1:6379", "127.0.0.1:8266", own=True, token=Path("/tmp/private/token"))
    first, second = own.directions()
    assert "http://127.0.0.1:8266" in first and "its token: in /tmp/private/token" in first
    assert "ssh -L 8266:127.0.0.1:8266 " in second
    (line,) = cluster.Cluster("10.0.0.1:6379", None, own=False).directions()
    assert "joined the cluster at 10.0.0.1:6379" in line


# --- nobody else's ----------------------------------------------------------------------------------------------------


def test_a_private_folder_is_private_short_and_gone_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))  # too long for the sockets inside
    with private.private_folder() as folder:
        assert folder.parent == Path("/tmp") and stat.S_IMODE(folder.stat().st_mode) == 0o700
        private.write_token(folder / "token")
        assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600 and len((folder / "token").read_text()) == 64
    assert not folder.exists()


def test_a_token_is_never_readable_by_others_not_even_for_a_moment(tmp_path, monkeypatch):
    (tmp_path / "token").write_text("known to others")
    (tmp_path / "token").chmod(0o644)
    old, modes, fdopen = os.umask(0), [], os.fdopen

    def seen(descriptor, *args):
        modes.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return fdopen(descriptor, *args)

    monkeypatch.setattr(os, "fdopen", seen)
    try:
        private.write_token(tmp_path / "token")
    finally:
        os.umask(old)
    assert modes == [0o600] and "known" not in (tmp_path / "token").read_text()


def test_folders_that_killed_processes_left_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(private, "_LONGEST", 4096)
    ages = {"left": 3, "locked": 3, "new": 0, "half-removed": 61, "half-made": 3}
    folders = {name: tmp_path / f"ladist-ray-{name}" for name in ages}
    for name, folder in folders.items():
        folder.mkdir()
        if "half" not in name:
            (folder / "lock").touch()
        os.utime(folder, (time.time() - ages[name],) * 2)
    with (folders["locked"] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with private.private_folder():
            assert {name for name, folder in folders.items() if folder.exists()} == {"locked", "new", "half-made"}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620])
def test_a_token_file_that_others_can_use_is_refused(tmp_path, monkeypatch, mode):
    from lad_dist.experts.fleet import connected

    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(mode)
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        with pytest.raises(ExpertError, match=rf"{token}: .*mode {mode:04o}.*chmod 600"), connected(Profile(), 0):
            raise AssertionError
    token.chmod(0o600)
    private.check_token(os.environ)


# --- the fleet's decisions --------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(trainer, told, monkeypatch):
    """A fleet that is not connected to any cluster: ``fleet("cuda", experts_per_gpu=2)``."""
    from lad_dist.experts import fleet as module

    def make(device: str, **fields: object) -> module.Fleet:
        made = module.Fleet.__new__(module.Fleet)
        made.cluster, made.profile = cluster.Cluster("127.0.0.1:1", None, own=False), Profile(**fields)
        made.staff = module.Staff(trainer, None, "namespace")
        made.record, made.screen, made.queue = told.record, told.screen, ExpertQueue(trainer, [])
        made._device, made._room, made._looked_at = device, 0, -module.LOOK_SECONDS
        made._attempts, made._orders = Counter(), Orders(trainer.recipe, "/somewhere", "driver", device, 1)
        return made

    return make


NODES = [{"Alive": True, "Resources": {"CPU": 5.0, "GPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
         {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}, {"Alive": True, "Resources": {}}]  # fmt: skip


@pytest.mark.parametrize(("device", "fields", "room"), [
    ("cpu", {}, 8), ("cpu", {"threads_per_expert": 2}, 3), ("cuda", {}, 3), ("cuda", {"experts_per_gpu": 4}, 12),
])  # fmt: skip
def test_as_many_as_fit_the_nodes_that_are_alive(fleet, monkeypatch, device, fields, room):
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    assert fleet(device, **fields)._fits() == room


def test_no_room_anywhere_is_said(fleet, told, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: NODES[3:])
    made = fleet("cuda")
    assert made._fits() == 1
    assert "no node has room for an expert" in told.out.getvalue()


def test_as_many_attempts_as_the_profile_allows(fleet, told):
    made = fleet("cpu", expert_retries=2)
    for attempt in (1, 2, 3):
        made._failed(Failure(1, f"reason {attempt}"))
        assert len(made.queue) == min(attempt, 2)
    assert told.kinds() == [("expert-restarted", 1), ("expert-restarted", 1), ("expert-failed", 1)]
    assert [f.message for f in told.record.failures] == ["reason 3"]


def test_a_buffer_that_refuses_every_write_ends_the_fleet(fleet, told):
    made = fleet("cpu")
    with pytest.raises(StorageError, match=r"^the disk is full$"):
        made._failed(Failure(1, "the disk is full", "StorageError", "Traceback: where it was", lasting=True))
    assert told.kinds() == [("expert-failed", 1)]
    assert "Traceback" not in told.out.getvalue() and len(made.queue) == 0


def test_parts_that_are_written_where_the_driver_does_not_see_them(fleet, monkeypatch):
    monkeypatch.setattr("lad_dist.experts.fleet.SEEN_SECONDS", 0.01)
    monkeypatch.setattr("lad_dist.experts.fleet.WAIT_SECONDS", 0.01)
    with pytest.raises(StorageError, match=r"/somewhere: lacks parts that an actor wrote there.*share under one name"):
        fleet("cpu")._finished(1)


def test_the_state_dump_of_a_node_that_ended_is_left_out_and_nothing_else(monkeypatch):
    from ray._private import worker

    from lad_dist.experts.fleet import _without_state_dumps

    printed: list[str] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: printed.extend(data["lines"]))
    ours = worker.print_to_stdstream
    with _without_state_dumps():
        for line in ("Raylet is terminated. Termination is unexpected.", "1 Workers killed due to memory pressure"):
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert printed == ["1 Workers killed due to memory pressure"] and worker.print_to_stdstream is ours


def test_an_address_that_cannot_be_used(monkeypatch):
    from lad_dist.experts.fleet import connected

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address, kind, said in (
        ("ray://head:10001", RecipeError, "client protocol"),
        ("127.0.0.1:1", ExpertError, "no Ray cluster answers there"),
    ):
        with pytest.raises(kind, match=said), connected(Profile(ray={"address": address}), 0):
            raise AssertionError
