"""What a buffer of many experts costs: opening, inspect, verify, status, windows, S3; at 10, 100 and 1,000 experts.

    python benchmarks/buffer_scale.py                       # prints the tables
    python benchmarks/buffer_scale.py --write               # and writes benchmarks/results/buffer-scale.md
    python benchmarks/buffer_scale.py --experts 10 100      # smaller
    python benchmarks/buffer_scale.py --no-s3               # without moto's server

The weights are made up, the network is tiny: what grows with experts is the number of files, rows and events. Parts are
written by the package's own writer (without waiting for the disk), events by its own log. Every number is of a fresh
process, the least of some repeats, in seconds of the processor (user and system): files are in the page cache, and other
work on the machine matters less so. *command* is the whole command, imports included. The store is moto's server in its
own process; its times are by the clock, and moto's.

The same buffer three times: as experts write it, after `lad-dist buffer compact`, and after `lad-dist buffer prune` and
`compact`. Needs about 1 GB in --folder for 1,000 experts, and some ten minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from machine import processor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from lad_dist.recipe import Recipe
    from lad_dist.trajectories import Buffer, BufferMeta

RESULTS = Path(__file__).parent / "results" / "buffer-scale.md"
EPOCHS, CLASSIFIER_EPOCHS, PER_PART = 100, 10, 5
WINDOWS = 300
CLOCK = time.perf_counter if "s3://" in " ".join(sys.argv) else time.process_time
INSPECT_MS = 5.0  # at most, for each expert
TIMES = 2.0  # status and a window: at most so many times those of the fewest experts


def recipe_of(experts: int) -> Recipe:
    """Digits with a tiny network; windows as those of CIFAR-10-LT start below epoch 20."""
    from lad_dist.recipe import Recipe

    doc = {
        "name": "buffer-scale",
        "ipc": 2,
        "data": {"dataset": "digits", "imbalance_factor": 20, "n_max": 120, "whitening": "standardize"},
        "model": {"width": 8, "depth": 2},
        "experts": {"count": experts, "epochs": EPOCHS, "classifier_epochs": CLASSIFIER_EPOCHS},
    }
    return Recipe.model_validate(doc)


def meta_of(recipe: Recipe) -> BufferMeta:
    from lad_dist.models.layout import Layout
    from lad_dist.models.network import build
    from lad_dist.trajectories import BufferMeta

    layout = Layout.of(build(recipe.model, 1, 8, 10, seed=0, purpose=("template",)))
    shapes = tuple(zip(layout.names, layout.shapes, strict=True))
    return BufferMeta(
        recipe.experts_hash(), "0" * 64, (10,) * 10, shapes, layout.classifier, recipe.experts_document(), {}
    )


def grow(folder: Path, first: int, last: int) -> None:
    """Add experts ``first`` to ``last`` - 1 with their events to the run in ``folder``."""
    from lad_dist.progress import Events
    from lad_dist.rundir import RunDir
    from lad_dist.trajectories import PartWriter
    from lad_dist.trajectories.schema import STAGES

    recipe = recipe_of(last)
    run, meta = RunDir.open(folder, recipe), meta_of(recipe)
    sync = os.fsync
    os.fsync = lambda handle: None  # this machine's disk is not what is measured
    lasts = {"representation": EPOCHS, "classifier": CLASSIFIER_EPOCHS}
    events = Events(run.events)
    events.emit("stage-started", stage="experts")
    for expert in range(first, last):
        draws = np.random.default_rng(expert)
        events.emit("expert-started", expert=expert, host="host", pid=1)
        for stage in STAGES:
            weights = draws.standard_normal(meta.vector_length(stage), np.float32)
            with PartWriter(run.trajectories, meta, stage, expert, PER_PART) as writer:
                for epoch in range(lasts[stage] + 1):
                    writer.append(epoch, weights, *((0.5, 0.5, 0.1) if epoch else ()))
                    weights = weights * np.float32(0.999)
                    if epoch:
                        of = {"expert": expert, "stage": stage, "epoch": epoch, "loss": 0.5, "accuracy": 0.5}
                        events.emit("expert-epoch", **of, images_per_second=1000.0, host="host", pid=1)
        events.emit("expert-finished", expert=expert)
    events.emit("stage-finished", stage="experts")
    os.fsync = sync


# What the fresh processes do. Each prints one JSON object.


def peak() -> int:
    """Bytes that were resident at most so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status["VmHWM"].split()[0])


def windows(experts: int) -> Iterator[tuple[int, int]]:
    draws = np.random.default_rng(1)
    while True:
        yield int(draws.integers(experts)), int(draws.integers(20))


def read_window(buffer: Buffer, expert: int, epoch: int) -> None:
    for at in (epoch, epoch + 2):
        assert np.isfinite(buffer.read("representation", expert, at)[-1])


def measure_open(location: str, experts: int) -> dict[str, Any]:
    from lad_dist.trajectories import Buffer

    imports, began = peak(), CLOCK()
    buffer = Buffer(location)
    return {"seconds": CLOCK() - began, "parts": len(buffer.parts), "grown": peak() - imports}


def measure_first(location: str, experts: int) -> dict[str, Any]:
    from lad_dist.trajectories import Buffer

    began = CLOCK()
    read_window(Buffer(location), *next(windows(experts)))
    return {"seconds": CLOCK() - began}


def measure_windows(location: str, experts: int) -> dict[str, Any]:
    from lad_dist.trajectories import Buffer

    buffer, drawn, times = Buffer(location), windows(experts), []
    for _ in range(WINDOWS):
        at = next(drawn)
        began = CLOCK()
        read_window(buffer, *at)
        times.append(CLOCK() - began)
    return {"seconds": float(np.median(times[WINDOWS // 5 :])), "peak": peak()}


def measure_inspect(location: str, experts: int) -> dict[str, Any]:
    from lad_dist.trajectories import Buffer

    began = CLOCK()
    found = Buffer(location).inspect()
    return {
        "seconds": CLOCK() - began,
        "bytes": found["bytes"],
        "digest": found["digest"],
        "peak": peak(),
    }


def measure_verify(location: str, experts: int) -> dict[str, Any]:
    from lad_dist.trajectories import Buffer

    began = CLOCK()
    problems = Buffer(location).verify()
    assert not problems, problems[:3]
    return {"seconds": CLOCK() - began, "peak": peak()}


def measure_status(location: str, experts: int) -> dict[str, Any]:
    import lad_dist.trajectories.reader  # noqa: F401  (imports do not count here)
    from lad_dist.status import read_status

    began = CLOCK()
    status = read_status(Path(location).parent)
    found = {"seconds": CLOCK() - began, "peak": peak()}
    assert status.stages[0].detail == f"{experts} of {experts} experts", status.stages[0]
    return found


MEASURES: dict[str, Callable[[str, int], dict[str, Any]]] = {
    name: globals()[f"measure_{name}"] for name in ("open", "first", "windows", "inspect", "verify", "status")
}


# The parent


def least(name: str, location: str, experts: int, repeats: int) -> dict[str, Any]:
    """The fastest of some fresh processes."""
    command = [sys.executable, __file__, "--measure", name, "--location", location, "--experts", str(experts)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment())
        found.append(json.loads(done.stdout.splitlines()[-1]))
    best: dict[str, Any] = min(found, key=lambda one: one["seconds"])
    return best


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(repeats: int, *words: str) -> float:
    """Least processor seconds of a command."""
    times = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = [sys.executable, "-m", "lad_dist.cli", *words]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def measure(folder: Path, experts: int, repeats: int) -> dict[str, Any]:
    """Everything of one buffer, in the run in ``folder``."""
    location, found = str(folder / "trajectories"), dict[str, Any]()
    for name in MEASURES:
        print(f"{experts} experts: {name}", file=sys.stderr)
        found[name] = least(name, location, experts, 1 if name == "verify" else repeats)
    found["inspect command"] = command(repeats, "buffer", "inspect", str(folder))
    found["status command"] = command(repeats, "status", str(folder))
    return found


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's server; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()  # nothing of it is kept; with a thousand experts it takes minutes to end by itself
        process.wait()


def upload(folder: Path, server: str, name: str) -> str:
    """Copy a buffer into a bucket of its own; returns its URI. The parts are complete, so one request each."""
    from pyarrow import fs

    there = fs.S3FileSystem(endpoint_override=server, scheme="http", region="us-east-1", allow_bucket_creation=True)
    there.create_dir(name)
    fs.copy_files(str(folder), f"{name}/buffer", destination_filesystem=there)
    return f"s3://{name}/buffer?endpoint_override={server}&scheme=http"


def measure_s3(folder: Path, server: str, experts: int, layout: str) -> dict[str, Any]:
    print(f"{experts} experts: S3, {layout}", file=sys.stderr)
    uri = upload(folder / "trajectories", server, f"bucket-{experts}-{layout}")
    return {name: least(name, uri, experts, 2) for name in ("open", "first", "windows")}


def run_all(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    layouts: dict[str, dict[int, Any]] = {"written": {}, "compacted": {}, "pruned": {}}
    found: dict[str, Any] = {"layouts": layouts, "s3": {"written": {}, "compacted": {}}, "upkeep": {}}
    first = 0
    with s3_server() if asked.s3 else _no_server() as server:
        for experts in asked.experts:
            run = folder / f"r{experts}"
            if not run.exists():
                if first:
                    shutil.copytree(folder / f"r{first}", run)
                grow(run, first, experts)
            first = experts
            layouts["written"][experts] = measure(run, experts, asked.repeats)
            if experts <= asked.upkeep_most:
                found["upkeep"][experts] = after_upkeep(asked, folder, experts, found, server)
            if server is not None:
                found["s3"]["written"][experts] = measure_s3(run, server, experts, "written")
    return found


def after_upkeep(
    asked: argparse.Namespace, folder: Path, experts: int, found: dict[str, Any], server: str | None
) -> dict[str, float]:
    """Measure copies of the run, compacted and pruned; seconds of the two commands."""
    seconds = {}
    copy = folder / "copy"
    shutil.copytree(folder / f"r{experts}", copy)
    seconds["compact"] = command(1, "buffer", "compact", str(copy))
    found["layouts"]["compacted"][experts] = measure(copy, experts, asked.repeats)
    if server is not None:
        found["s3"]["compacted"][experts] = measure_s3(copy, server, experts, "compacted")
    seconds["prune"] = command(1, "buffer", "prune", str(copy), "--yes")
    command(1, "buffer", "compact", str(copy))
    found["layouts"]["pruned"][experts] = measure(copy, experts, asked.repeats)
    shutil.rmtree(copy)
    return seconds


@contextmanager
def _no_server() -> Iterator[None]:
    yield None


def report(asked: argparse.Namespace, found: dict[str, Any]) -> str:
    import pyarrow

    counts = asked.experts
    few, many = counts[0], counts[-1]
    lines = [
        "# A buffer of many experts",
        "",
        f"Made by `python benchmarks/buffer_scale.py --experts {' '.join(map(str, counts))} --repeats {asked.repeats} --write`, "
        "which says how.",
        "",
        f"- {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"pyarrow {pyarrow.__version__}; one thread.",
        f"- {EPOCHS + 1} + {CLASSIFIER_EPOCHS + 1} checkpoints an expert, a tiny network, {PER_PART} epochs a part as experts "
        "write them; an event log of 112 lines an expert beside it.",
        "- Seconds of the processor, the least of fresh processes; a window: two checkpoints of one expert, the median.",
        "",
    ]
    titles = {
        "written": "As experts write it",
        "compacted": "After `buffer compact`",
        "pruned": "After `buffer prune` and `compact`",
    }
    for layout, by_count in found["layouts"].items():
        if not by_count:
            continue
        lines += [
            f"## {titles[layout]}",
            "",
            "| | " + " | ".join(f"{n:,}" for n in by_count) + f" | {many:,} / {few:,} |",
        ]
        lines.append("|---" * (len(by_count) + 2) + "|")
        for title, of in ROWS.items():
            values = [of(by_count[n], n) for n in by_count]
            ratio = f"{values[-1][0] / values[0][0]:.2f}" if len(values) > 1 else ""
            lines.append(f"| {title} | " + " | ".join(text for _, text in values) + f" | {ratio} |")
        lines.append("")
    written = found["layouts"]["written"]
    worst = max(1e3 * written[n]["inspect command"] / n for n in counts if n >= 100) if many >= 100 else float("nan")
    slower = written[many]["status command"] / written[few]["status command"]
    window = written[many]["windows"]["seconds"] / written[few]["windows"]["seconds"]
    lines += [
        f"Bars: `inspect` at most {INSPECT_MS:g} ms an expert from 100 experts on: {worst:.1f} ms. `status` and a window at most "
        f"{TIMES:g} times those of {few} experts: {slower:.2f} and {window:.2f}.",
        "",
    ]
    if found["upkeep"]:
        lines += [
            "| seconds of the processor | " + " | ".join(f"{n:,}" for n in counts) + " |",
            "|---" * (len(counts) + 1) + "|",
        ]
        for verb in ("compact", "prune"):
            lines.append(
                f"| `buffer {verb}` | " + " | ".join(f"{found['upkeep'][n][verb]:.1f}" for n in found["upkeep"]) + " |"
            )
        lines.append("")
    if found["s3"]["written"]:
        lines += ["## In a store (moto's server, same machine; by the clock)", ""]
        lines += ["| | " + " | ".join(f"{n:,}" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
        for layout, by_count in found["s3"].items():
            for title, name in (
                ("listing", "open"),
                ("listing and the first window", "first"),
                ("a window", "windows"),
            ):
                if by_count:
                    shown = " | ".join(f"{by_count[n][name]['seconds']:.3f} s" for n in by_count)
                    lines.append(f"| {layout}: {title} | {shown} |")
        lines += ["", "A listing is one request for each 1,000 objects; a real store answers one in some 0.1 s.", ""]
    return "\n".join(lines)


def _seconds(name: str) -> Callable[[dict[str, Any], int], tuple[float, str]]:
    def of(found: dict[str, Any], experts: int) -> tuple[float, str]:
        value = found[name] if isinstance(found[name], float) else found[name]["seconds"]
        return value, f"{1e3 * value:,.1f} ms" if value < 1 else f"{value:.2f} s"

    return of


def _each(found: dict[str, Any], experts: int) -> tuple[float, str]:
    value = 1e3 * found["inspect command"] / experts
    return value, f"{value:.1f} ms"


def _mib(name: str, field: str) -> Callable[[dict[str, Any], int], tuple[float, str]]:
    return lambda found, experts: (found[name][field], f"{found[name][field] / 2**20:,.0f} MiB")


ROWS: dict[str, Callable[[dict[str, Any], int], tuple[float, str]]] = {
    "parts": lambda found, experts: (found["open"]["parts"], f"{found['open']['parts']:,}"),
    "bytes": lambda found, experts: (found["inspect"]["bytes"], f"{found['inspect']['bytes'] / 1e6:,.1f} MB"),
    "opening (listing)": _seconds("open"),
    "opening and the first window": _seconds("first"),
    "a window": _seconds("windows"),
    "`status`, without imports": _seconds("status"),
    "`status`, command": _seconds("status command"),
    "`buffer inspect`, without imports": _seconds("inspect"),
    "`buffer inspect`, command": _seconds("inspect command"),
    "`buffer inspect`, command, an expert": _each,
    "`buffer verify`, without imports": _seconds("verify"),
    "peak memory, windows": _mib("windows", "peak"),
    "peak memory, `inspect`": _mib("inspect", "peak"),
    "peak memory, `verify`": _mib("verify", "peak"),
    "peak memory, `status`": _mib("status", "peak"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[10, 100, 1000], help="ascending")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--folder", type=Path, help="where to put the files meanwhile; default: the temporary folder")
    parser.add_argument("--s3", action=argparse.BooleanOptionalAction, default=True, help="measure moto's server too")
    parser.add_argument(
        "--upkeep-most", type=int, default=1000, help="compact and prune buffers of up to so many experts"
    )
    parser.add_argument("--keep", type=Path, help="make the runs here, leave them, and use those that are here")
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--location", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    if asked.measure:
        print(json.dumps(MEASURES[asked.measure](asked.location, asked.experts[0])))
        return
    if asked.keep:
        found = run_all(asked, asked.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="buffer-scale-", dir=asked.folder) as name:
            found = run_all(asked, Path(name))
    text = report(asked, found)
    if asked.json:
        asked.json.write_text(json.dumps(found))
    print(text)
    if asked.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
