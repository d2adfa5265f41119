"""Experts trained by a fleet: real processes, real signals. Whatever is lost, the buffer ends up the same."""

from __future__ import annotations

import os
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lad_dist.trajectories import Buffer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what is left of a process is looked up in /proc"),
]
EACH, PART = 75, 5  # epochs of an expert, and of a part
RECIPE: dict[str, Any] = {
    "name": "fleet", "ipc": 1,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 60},
    "model": {"width": 16, "depth": 2},
    "augment": {"operations": ["crop", "scale"]},
    "experts": {"count": 3, "epochs": 60, "classifier_epochs": 15, "batch": 64, "epochs_per_part": PART},
}  # fmt: skip
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


def test_two_actors_one_killed_twice(lad, fleet_job, undisturbed, nodes, on, look):
    run = Path("run")
    process = lad.start("experts", fleet_job, "--out", run, *on)
    killed: list[int] = []
    for restarts in (0, 1):

        def well_under_way(found: Happenings, restarts: int = restarts) -> bool:
            since = next((i for i, e in enumerate(found) if len(of(found[: i + 1], "expert-restarted")) == restarts), 0)
            return len(of(found[since:], "expert-epoch", 1)) > 2 * PART and len(of(found, "expert-started", 1)) > restarts

        assert look.wait_for(run, process, well_under_way)
        if restarts == 0:
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


def assert_metrics(port: int) -> None:
    names = ("experts_done", "experts_total", "experts_active", "epochs_total", "images_per_second", "buffer_bytes",
             "bytes_written_total")  # fmt: skip
    found: dict[str, float] = {}
    until = time.monotonic() + 30
    while not all(found.get(name, -1) > 0 for name in names if name != "experts_done"):
        assert time.monotonic() < until, found
        time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            for line in page.read().decode().splitlines():
                if line.startswith("ray_ladist_"):
                    name, value = line.removeprefix("ray_ladist_").partition("{")[0], line.rpartition(" ")[2]
                    found[name.removesuffix(" ").split(" ")[0]] = float(value)
    assert set(names) <= set(found) and found["experts_total"] == 3 and found["experts_active"] == 2


def test_a_second_driver_does_no_work_twice(lad, fleet_job, undisturbed, on, look, monkeypatch):
    run = Path("run")
    first = lad.start("experts", fleet_job, "--out", run, *on)
    assert look.wait_for(run, first, lambda found: len(of(found, "expert-epoch")) > 2)
    second = lad.start("experts", fleet_job, "--out", run)
    lad.ended(first).succeeds()
    said = lad.ended(second).succeeds().out
    assert "by another driver" in said or "another driver is training" in said or of(look.events(run), "expert-finished")
    assert len(of(look.events(run), "expert-epoch")) <= 3 * EACH + PART
    by_first = {e["expert"] for e in of(look.events(run), "expert-epoch") if "pid" in e}
    by_second = {e["expert"] for e in of(look.events(run), "expert-epoch") if "pid" not in e}
    assert by_first and by_second and by_first | by_second == {0, 1, 2}
    same_as(undisturbed, run, look)


def test_a_poisoned_expert(lad, fleet_job, undisturbed, on, look):
    """Expert 1's part is damaged: it fails every time, and says why once; the others finish; later it can be mended."""
    run, parts = Path("run"), Path("run/trajectories/representation")
    lad("experts", fleet_job, "--out", run, "--set", "experts.count=1").succeeds()
    shutil.rmtree(parts.parent / "classifier")
    (parts / "expert-0001").mkdir()
    damaged = parts / "expert-0001" / "epochs-0000-0004.parquet"
    damaged.write_bytes(b"PAR1 is how it begins, but this is no Parquet file")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"experts": recipe["experts"] | {"count": 3}}))
    ended = lad.ended(lad.start("experts", fleet_job, "--out", run, *on))
    assert ended.code == 5
    assert ended.out.count("Traceback (most recent call last)") == 1 and "Traceback" not in ended.err
    assert ended.err.count("error: ") == 1 and "1 expert failed 3 times: expert 1: " in ended.err
    assert damaged.name in ended.err and "the other experts are finished" in ended.err
    happened = look.events(run)
    assert [e["expert"] for e in of(happened, "expert-failed")] == [1]
    assert [e["attempt"] for e in of(happened, "expert-restarted", 1)] == [1, 2]
    assert {e["expert"] for e in of(happened, "expert-finished")} >= {0, 2}
    damaged.unlink()
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


@pytest.fixture
def alone(lad: Any, fleet_job: Path, look: Any) -> Iterator[Callable[[], Any]]:
    """Starts a driver with a cluster of its own in a session of its own, and waits until its actors train."""
    from ray_nodes import kill_session, wait_until

    started = []

    def start() -> Any:
        lad.environment["RAY_AUTH_TOKEN"] = "0" * 64
        process = lad.start("experts", fleet_job, "--out", "run", "--fleet", "on", preexec_fn=os.setsid)
        started.append(process.pid)
        wait_until(lambda: len({e["pid"] for e in of(look.events(Path("run")), "expert-epoch")}) == 2, 60)
        return process

    yield start
    for leader in started:
        kill_session(leader)


def ports(pids: set[int]) -> set[str]:
    """The addresses that these processes listen on."""
    from importlib import import_module

    import ray  # noqa: F401

    psutil, found = import_module("psutil"), set()  # Ray's own copy
    for pid in pids:
        found |= {c.laddr.ip for c in psutil.Process(pid).net_connections(kind="inet") if c.status == "LISTEN"}
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two cores")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(lad, alone, fleet_job, undisturbed, look, number):
    """Ctrl-C goes to the whole process group, SIGTERM to the driver; all processes end, and the run can be continued."""
    from ray_nodes import session, wait_until

    process = alone()
    members = session(process.pid)
    assert len(members) > 5 and ports(set(members)) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    began = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    ended = lad.ended(process, 10)
    wait_until(lambda: not session(process.pid), 10 - (time.monotonic() - began), str(session(process.pid)))
    ended.fails(130, f"interrupted by {number.name}", "the same command continues")
    assert ended.out.count("ray get-auth-token") == ended.out.count("ssh -L 82") == 1
    assert [e["stage"] for e in of(look.events(Path("run")), "stage-stopped")] == ["experts"]
    if number == signal.SIGINT:
        lad("experts", fleet_job, "--out", "run").succeeds()
        same_as(undisturbed, Path("run"), look)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two cores")
def test_interrupted_while_ray_starts(lad, fleet_job, look):
    from ray_nodes import kill_session, session, wait_until

    lad.environment["RAY_AUTH_TOKEN"] = "0" * 64
    process = lad.start("experts", fleet_job, "--out", "run", "--fleet", "on", preexec_fn=os.setsid)
    try:
        wait_until(lambda: any("DashboardAgent" in command or "dashboard/agent.py" in command
                               for command in session(process.pid).values()), 60)  # fmt: skip
        began = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        ended = lad.ended(process, 10)
        wait_until(lambda: not session(process.pid), 10 - (time.monotonic() - began), str(session(process.pid)))
        ended.fails(130, "interrupted by SIGINT")
    finally:
        kill_session(process.pid)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two cores")
def test_a_killed_driver_takes_its_cluster_along(alone):
    """Whatever computes ends at once; two small processes of Ray's notice at once too, and try for a minute to report it."""
    from ray_nodes import session, wait_until

    process = alone()
    process.kill()
    process.communicate()

    def reporters_only() -> bool:
        return all("Agent" in command for command in session(process.pid).values())

    wait_until(reporters_only, 15, "only Ray's agents are left")
    wait_until(lambda: not session(process.pid), 90, "nothing is left")
