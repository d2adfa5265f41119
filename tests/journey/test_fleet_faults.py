"""Experts trained by a fleet: real processes, real signals. Whatever is lost, the buffer ends up the same."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from lad_dist.trajectories import Buffer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what is left of a process is looked up in /proc"),
]
ROOT = Path(__file__).parents[2]
EACH, PART = 50, 5  # epochs of an expert, and of a part
RECIPE: dict[str, Any] = {
    "name": "fleet", "ipc": 1,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 60},
    "model": {"width": 16, "depth": 2},
    "augment": {"operations": ["crop", "scale"]},
    "experts": {"count": 3, "epochs": 40, "classifier_epochs": 10, "batch": 64, "epochs_per_part": PART},
}  # fmt: skip
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two cores")
Happenings = list[dict[str, Any]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, from beginning to end. Read only."""
    from lad_dist import cli

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "fleet.yaml").write_text(yaml.safe_dump(RECIPE))
    arguments = ["experts", folder / "fleet.yaml", "--out", folder / "run", "--threads", 1, "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        cli.app([*map(str, arguments), "--fleet", "off"])
    assert ended.value.code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def fleet_job(undisturbed: Path) -> Path:
    return undisturbed.parent / "fleet.yaml"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster of one node with two cores, which tests may add nodes to."""
    from ray_nodes import RayNodes

    started = RayNodes()
    try:
        started.head(2)
        yield started
    finally:
        started.close()


@pytest.fixture
def on(nodes: Any, lad: Any, tmp_path: Path) -> list[object]:
    """The options that train on that cluster; ``lad`` may use it then."""
    lad.environment |= {**nodes.token, "RAY_metrics_report_interval_ms": "1000"}
    profile = {"name": "nodes", "expert_retries": 2, "ray": {"address": nodes.address}}
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(profile))
    return ["--on", tmp_path / "nodes.yaml", "--fleet", "on"]


def of(happened: Happenings, kind: str, expert: int | None = None) -> Happenings:
    return [e for e in happened if e["kind"] == kind and expert in (None, e.get("expert"))]


def same_as(undisturbed: Path, run: Path, look: Any) -> None:
    buffer = Buffer(run / "trajectories")
    assert buffer.digest() == Buffer(undisturbed / "trajectories").digest()
    assert buffer.verify() == []
    assert list((run / "trajectories" / "claims").iterdir()) == []


@needs_two_cores
def test_a_killed_driver_takes_all_that_computes_along(killed):
    """Two small processes of Ray's notice at once, too, and then try for a minute to report it (see the last test)."""
    from ray_nodes import session, wait_until

    wait_until(lambda: all("Agent" in command for command in session(killed[0]).values()), 15, str(session(killed[0])))


@contextmanager
def still(pids: Iterable[int]) -> Iterator[None]:
    """Actors that do nothing while something is looked at."""
    pids = list(pids)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_two_actors_one_killed_twice(lad, fleet_job, undisturbed, nodes, on, look):
    run = Path("run")
    process = lad.start("experts", fleet_job, "--out", run, *on)
    killed: list[int] = []
    for restarts in (0, 1):

        def well_under_way(found: Happenings, restarts: int = restarts) -> bool:
            since = next((i for i, e in enumerate(found) if len(of(found[: i + 1], "expert-restarted")) == restarts), 0)
            return (
                len(of(found[since:], "expert-epoch", 1)) > 2 * PART and len(of(found, "expert-started", 1)) > restarts
            )

        assert look.wait_for(run, process, well_under_way)
        if restarts == 0:
            with still(e["pid"] for e in of(look.events(run), "expert-started")):
                assert_metrics(nodes.metrics_port)
        killed.append(of(look.events(run), "expert-started", 1)[-1]["pid"])
        os.kill(killed[-1], signal.SIGKILL)
    ended = lad.ended(process).succeeds()
    same_as(undisturbed, run, look)
    happened = look.events(run)
    again = of(happened, "expert-restarted")
    assert [(e["expert"], e["attempt"]) for e in again] == [(1, 1), (1, 2)]
    for event, pid in zip(again, killed, strict=True):
        assert f"process {pid} on" in event["error"]
        assert event["error"] in ended.out
    assert len(set(killed)) == 2
    assert len(of(happened, "expert-epoch")) <= 3 * EACH + 2 * PART  # what was published was not trained again
    first, second = (of(happened, "expert-epoch", e) for e in (0, 1))
    assert first[0]["pid"] != second[0]["pid"] and first[0]["host"]
    assert first[0]["time"] < second[-1]["time"] and second[0]["time"] < first[-1]["time"]  # at the same time
    (cluster,) = of(happened, "ray-started")
    assert cluster["address"] == nodes.address and "fleet" not in cluster["namespace"].partition("-run-")[0]
    assert f"joined the cluster at {nodes.address}" in ended.out
    assert f"{3 * EACH}/{3 * EACH} epochs done" in ended.out
    assert_shown_on_the_dashboard(nodes.actors())


def assert_shown_on_the_dashboard(actors: list[dict[str, Any]]) -> None:
    """Each actor is named by its expert and where it began, has a line per epoch in its log, and has ended by itself."""
    shown = {actor["name"]: actor for actor in actors if actor["class_name"] == "ExpertActor"}
    assert set(shown) == {"expert-0000", "expert-0001", "expert-0001-start-2", "expert-0001-start-3", "expert-0002"}
    for name in ("expert-0000", "expert-0001-start-3", "expert-0002"):
        actor, expert = shown[name], int(name[7:11])
        begin = int(actor["repr_name"].removeprefix(f"expert {expert}, from epoch ").removesuffix(f" of {EACH}"))
        assert (begin > PART) == ("start" in name)
        assert f"expert {expert}: classifier epoch 10 of 10, loss" in actor["log"]
        assert actor["log"].count(" epoch ") >= EACH - begin
        assert "exit code 0" in str(actor["death_cause"]) and "ray.kill" not in str(actor["death_cause"])


def assert_metrics(port: int) -> None:
    """The endpoint that Prometheus reads has every series that the Grafana dashboard asks for, with its labels, and no other."""
    found: dict[str, float] = {}
    labels: dict[str, set[str]] = {}
    wanted = asked_by_the_dashboard()
    until = time.monotonic() + 30
    while not all(found.get(name, -1) > 0 for name in wanted if name != "ray_ladist_experts_done"):
        assert time.monotonic() < until, found
        time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            for line in page.read().decode().splitlines():
                sample = re.fullmatch(r"(ray_ladist_\w+)(?:\{(.*)\})? (\S+)", line)
                if sample:
                    found[sample[1]] = float(sample[3])
                    labels[sample[1]] = set(re.findall(r'(\w+)="', sample[2] or ""))
    assert set(found) == set(wanted)
    assert {name: asked - labels[name] for name, asked in wanted.items()} == {name: set() for name in wanted}
    assert found["ray_ladist_experts_total"] == 3 and found["ray_ladist_experts_active"] == 2


def asked_by_the_dashboard() -> dict[str, set[str]]:
    """The series that cluster/monitoring/grafana-dashboard.json shows, each with the labels that it selects or groups by."""
    document = json.loads((ROOT / "cluster" / "monitoring" / "grafana-dashboard.json").read_text())
    expressions = [target["expr"] for panel in document["panels"] for target in panel.get("targets", ())]
    asked: dict[str, set[str]] = {}
    for text in expressions:
        for name, selected in re.findall(r"(ray_ladist_\w+)(?:\{([^}]*)\})?", text):
            by = re.findall(r"\w+", "".join(re.findall(r"by \(([^)]*)\)", text)))
            asked.setdefault(name, set()).update(by, re.findall(r"(\w+)=", selected))
    for variable in document["templating"]["list"]:
        for name, label in re.findall(r"label_values\((\w+), (\w+)\)", json.dumps(variable.get("query"))):
            asked[name].add(label)
    assert len(asked) >= 7
    return asked


def test_a_second_driver_does_no_work_twice(lad, fleet_job, undisturbed, on, look):
    """It trains what the first has not begun, and waits for the rest."""
    run = Path("run")
    first = lad.start("experts", fleet_job, "--out", run, *on)
    assert look.wait_for(run, first, lambda found: {e["expert"] for e in of(found, "expert-epoch")} >= {0, 1})
    with still(e["pid"] for e in of(look.events(run), "expert-started")):
        second = lad.start("experts", fleet_job, "--out", run)
        assert look.wait_for(run, second, lambda found: of(found, "expert-finished") != [])
    lad.ended(first).succeeds()
    said = lad.ended(second).succeeds().out
    assert (
        "waiting for those that another driver is training (expert 0 by process " in said and "; expert 1 by " in said
    )
    epochs = of(look.events(run), "expert-epoch")
    assert len(epochs) == 3 * EACH
    assert {e["expert"] for e in epochs if "pid" in e} == {0, 1} and {
        e["expert"] for e in epochs if "pid" not in e
    } == {2}
    assert [e["expert"] for e in of(look.events(run), "expert-finished") if e.get("elsewhere")].count(2) == 1
    same_as(undisturbed, run, look)


def test_a_poisoned_expert(lad, fleet_job, undisturbed, nodes, on, look, tmp_path):
    """Expert 1's part is damaged: it fails every time, and says why once; the others finish; later it can be mended."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(run / "trajectories" / "classifier")  # so that there is something left to do for all of them
    (run / "events.jsonl").unlink()
    *_, damaged = sorted((run / "trajectories/representation/expert-0001").iterdir())
    good = damaged.read_bytes()
    damaged.write_bytes(b"PAR1 is how it begins, but this is no Parquet file")
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump({"expert_retries": 1, "ray": {"address": nodes.address}}))
    ended = lad.ended(lad.start("experts", fleet_job, "--out", run, *on))
    assert ended.code == 5
    assert ended.out.count("Traceback (most recent call last)") == 1 and "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1 and "1 expert failed 2 times: expert 1: " in ended.err
    assert damaged.name in ended.err and "the other experts are finished" in ended.err
    happened = look.events(run)
    assert [e["expert"] for e in of(happened, "expert-failed")] == [1]
    assert [e["attempt"] for e in of(happened, "expert-restarted", 1)] == [1]
    assert {e["expert"] for e in of(happened, "expert-finished")} >= {0, 2}
    damaged.write_bytes(good)
    lad("experts", fleet_job, "--out", run).succeeds()
    same_as(undisturbed, run, look)


def test_a_lost_node(lad, fleet_job, undisturbed, nodes, on, look):
    """A second node joins, trains, and is gone with all its processes."""
    from ray_nodes import kill_session, session

    run, other = Path("run"), nodes.node(1)
    process = lad.start("experts", fleet_job, "--out", run, *on)

    def there(found: Happenings) -> list[int]:
        return [e["expert"] for e in of(found, "expert-started") if e["pid"] in session(other)]

    assert look.wait_for(
        run, process, lambda found: any(len(of(found, "expert-epoch", expert)) > PART for expert in there(found))
    )
    (lost,) = there(look.events(run))
    kill_session(other)
    lad.ended(process).succeeds()
    again = of(look.events(run), "expert-restarted")
    assert {e["expert"] for e in again} == {lost} and 1 <= len(again) <= 2
    assert len(of(look.events(run), "expert-epoch")) <= 3 * EACH + PART
    same_as(undisturbed, run, look)


def test_a_cluster_that_is_not_there(lad, fleet_job, tmp_path):
    from ray_nodes import free_port

    nowhere = f"127.0.0.1:{free_port()}"
    lad.environment["RAY_ADDRESS"] = nowhere
    ended = lad.ended(lad.start("experts", fleet_job, "--out", "run", "--fleet", "auto"))
    ended.fails(9, nowhere, "no Ray cluster answers", "ray start --head")


def test_a_cluster_that_goes_away(lad, fleet_job, look):
    from ray_nodes import RayNodes, kill_session

    run, gone = Path("run"), RayNodes()
    try:
        head = gone.head(1)
        lad.environment |= {**gone.token, "RAY_ADDRESS": gone.address}
        process = lad.start("experts", fleet_job, "--out", run, "--fleet", "auto")
        assert look.wait_for(run, process, lambda found: len(of(found, "expert-epoch")) > PART)
        kill_session(head)
        lad.ended(process, 30).fails(9, f"the Ray cluster at {gone.address} is gone", "the same command continues")
    finally:
        gone.close()


# --- a cluster of its own ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(fleet_job: Path, tmp_path_factory: pytest.TempPathFactory, look: Any) -> Iterator[tuple[int, Path]]:
    """The session and the private folder of a driver that was killed while two actors trained."""
    from ray_nodes import kill_session, wait_until

    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "lad_dist.cli", "experts", fleet_job, "--out", "run", "--fleet", "on"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        driver = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_until(lambda: two_train(folder / "run", look), 180, (folder / "log").read_text())
        private = private_of(driver.pid)
        driver.kill()
        driver.wait()
        yield driver.pid, private
    finally:
        kill_session(driver.pid)


def private_of(driver: int) -> Path:
    """The private folder of the driver's own cluster."""
    from ray_nodes import session

    (private,) = (f for f in Path("/tmp").glob("ladist-ray-*") if str(f) in str(session(driver)))
    return private


def two_train(run: Path, look: Any) -> bool:
    return len({e["pid"] for e in of(look.events(run), "expert-epoch")}) == 2


def ports(pids: set[int]) -> set[str]:
    """The addresses that these processes listen on."""
    from importlib import import_module

    import ray  # noqa: F401

    psutil, found = import_module("psutil"), set()  # Ray's own copy
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended since the list was made
            found |= {c.laddr.ip for c in psutil.Process(pid).net_connections(kind="inet") if c.status == "LISTEN"}
    return found


def interrupt(process: Any, number: signal.Signals, lad: Any) -> Any:
    """How it ended; all processes of its session must, within ten seconds. Ctrl-C goes to the whole process group."""
    from ray_nodes import session, wait_until

    until = time.monotonic() + 10
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    ended = lad.ended(process, 10)
    wait_until(lambda: not session(process.pid), until - time.monotonic(), str(session(process.pid)))
    return ended.fails(130, f"interrupted by {number.name}", "the same command continues")


def nobody_else_may(driver: int, dashboard: str) -> Path:
    """The private folder of the driver's cluster, whose dashboard answers only to who has the token in it."""
    private = private_of(driver)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    token = private / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    jobs = urllib.request.Request(f"http://{dashboard}/api/jobs/")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(jobs, timeout=10)
    jobs.add_header("Authorization", f"Bearer {token.read_text()}")
    with urllib.request.urlopen(jobs, timeout=10) as answer:
        assert answer.status == 200
    return private


@needs_two_cores
def test_interrupted(lad, fleet_job, undisturbed, look):
    from ray_nodes import kill_session, session, wait_until

    run = Path("run")
    lad.environment |= {"HOME": str(lad.folder), "RAY_AUTH_MODE": "disabled"}
    process = lad.start("experts", fleet_job, "--out", run, "--fleet", "on", preexec_fn=os.setsid)
    try:
        wait_until(lambda: two_train(run, look), 180)
        private = nobody_else_may(process.pid, of(look.events(run), "ray-started")[0]["dashboard"])
        members = session(process.pid)
        assert len(members) > 5 and ports(set(members)) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        ended = interrupt(process, signal.SIGINT, lad)
    finally:
        kill_session(process.pid)
    assert ended.out.count(f"its token: in {private / 'token'}") == ended.out.count("ssh -L ") == 1
    assert not private.exists() and not (lad.folder / ".ray").exists()
    assert [e["stage"] for e in of(look.events(run), "stage-stopped")] == ["experts"]
    lad("experts", fleet_job, "--out", run).succeeds()
    same_as(undisturbed, run, look)


FULL = """
import errno, os
sync = os.fsync
def fsync(handle):
    if ".epochs-0010" in os.readlink(f"/proc/self/fd/{handle}"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sync(handle)
os.fsync = fsync
"""


@needs_two_cores
def test_a_full_disk_ends_the_fleet_at_once(lad, fleet_job, undisturbed, look, tmp_path):
    """From the third part on there is no space: one message, no second attempt, and the same command goes on later."""
    from ray_nodes import kill_session, session, wait_until

    run, patched = Path("run"), tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(FULL)
    lad.environment["PYTHONPATH"] = f"{patched}:{ROOT}"
    process = lad.start("experts", fleet_job, "--out", run, "--fleet", "on", preexec_fn=os.setsid)
    try:
        ended = lad.ended(process).fails(8, "epochs-0010-0014.parquet", "No space left on device", "free some space")
        wait_until(lambda: not session(process.pid), 10, str(session(process.pid)))  # the dashboard's modules, last
    finally:
        kill_session(process.pid)
    assert "retried" not in ended.out
    happened = look.events(run)
    assert len(of(happened, "expert-failed")) in (1, 2)  # the other actor may meet it at the same moment
    assert not of(happened, "expert-restarted")
    assert of(happened, "stage-stopped")[0]["time"] - of(happened, "expert-failed")[0]["time"] < 10
    lad("experts", fleet_job, "--out", run).succeeds()
    same_as(undisturbed, run, look)


@needs_two_cores
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_ray_starts(lad, fleet_job, number):
    from ray_nodes import kill_session, session, wait_until

    process = lad.start("experts", fleet_job, "--out", "run", "--fleet", "on", preexec_fn=os.setsid)
    try:
        wait_until(lambda: any("raylet/raylet" in command for command in session(process.pid).values()), 60)
        private = private_of(process.pid)
        interrupt(process, number, lad)
        assert not private.exists()
    finally:
        kill_session(process.pid)


@needs_two_cores
def test_nothing_is_left_of_a_killed_driver_in_the_end(killed):
    from ray_nodes import session, wait_until

    from lad_dist.experts.private import private_folder

    driver, folder = killed
    wait_until(lambda: not session(driver), 90, str(session(driver)))
    with private_folder():  # the first thing that the next cluster of a driver does
        assert not folder.exists()
