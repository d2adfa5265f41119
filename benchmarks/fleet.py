"""How many experts an hour does a fleet train, and how much memory does one more expert take?

    python benchmarks/fleet.py                                 # 2 actors of one thread against one process of one thread
    python benchmarks/fleet.py --device cuda --job cifar10-lt-f100-ipc10 --experts 16 --epochs 3   # 1, 2, 4, 8 per GPU
    ... --write                                                # and writes benchmarks/results/fleet.md (fleet-cuda.md)

Every row is one `lad-dist experts` in a process of its own, in an empty run folder. Its rate counts from the first epoch's
end to the last expert's end, and so leaves out the start of Ray but not that of the actors. Resident memory is read from
the processes while they train: of an actor all that is in memory (RSS), and its share where pages are shared (PSS), which
is what one more expert takes. The digests of all buffers must be equal (on a CPU). Wanted on two cores: at least 1.7 times
the experts per hour, and less than 600 MiB per expert.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import processor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from lad_dist.progress import read_events
from lad_dist.trajectories import Buffer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20
PER_GPU = (1, 2, 4, 8)
# The digits with a network of which an epoch takes about a second on one thread, as in the experiments on a GPU.
DIGITS = {"data.n_max": "120", "data.imbalance_factor": "2", "model.width": "128", "model.depth": "2"}


@dataclass(frozen=True)
class Way:
    """One way to train: its name, and the profile that says so."""

    name: str
    profile: dict[str, Any]


@dataclass
class Row:
    """What was measured: seconds from start to end and of training alone; memory in bytes, utilisation as a fraction."""

    way: str
    experts: int
    wall: float
    training: float
    digest: str
    rss: int = 0
    pss: int = 0
    gpu: float | None = None

    @property
    def per_hour(self) -> float:
        return 3600 * self.experts / self.training


def ways(args: argparse.Namespace) -> list[Way]:
    common = {"device": args.device, "threads_per_expert": 1, "ray": {"dashboard": False}}
    if args.device == "cuda":
        here = Way("one process", {**common, "fleet": "off"})
        return [here, *(Way(f"{n} per GPU", {**common, "fleet": "on", "experts_per_gpu": n}) for n in PER_GPU)]
    return [
        Way("one process, one thread", {**common, "fleet": "off"}),
        Way(f"{args.actors} actors, one thread each", {**common, "fleet": "on", "threads": args.actors}),
    ]


def measure(args: argparse.Namespace, way: Way, folder: Path) -> Row:
    """One whole `lad-dist experts` of ``way``. Raises CalledProcessError with what it printed."""
    profile, run = (
        folder / f"{re.sub('[^a-z0-9]+', '-', way.name.lower())}.yaml",
        folder / re.sub("[^a-z0-9]+", "-", way.name),
    )
    profile.write_text(json.dumps(way.profile))
    sets = dict(DIGITS) if args.job == "digits-lt" else {}
    sets |= {"experts.count": str(args.experts), "experts.epochs": str(args.epochs)}
    sets |= {"experts.classifier_epochs": str(args.classifier_epochs), "distill.start_epoch_max": "1"}
    sets |= {
        "distill.classifier_start_epoch_max": "1",
        "distill.window_epochs": "1",
        **dict(s.split("=", 1) for s in args.set),
    }
    command = [sys.executable, "-m", "lad_dist.cli", "experts", args.job, "--on", profile, "--out", run]
    for name, value in sets.items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    began = time.perf_counter()
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        with Watch(run / "events.jsonl", process.pid, args.device) as watch:
            process.wait()
        wall = time.perf_counter() - began
        log.seek(0)
        if process.returncode:
            raise SystemExit(f"{way.name}: exit code {process.returncode}\n{log.read()}")
    happened = list(read_events(run / "events.jsonl"))
    epochs = [e for e in happened if e["kind"] == "expert-epoch"]
    begin, end = epochs[0], max(e["time"] for e in happened if e["kind"] == "expert-finished")
    share = (
        1 - 1 / len(epochs) if way.profile["fleet"] == "off" else 1.0
    )  # the first epoch is over when counting begins
    seconds = (end - begin["time"]) / share
    if (
        way.profile["fleet"] != "off"
    ):  # all actors' first epochs run before that: count from their processes' first sign
        seconds = end - min(e["time"] for e in happened if e["kind"] == "expert-started")
    rss, pss, gpu = watch.summary()
    return Row(way.name, args.experts, wall, seconds, Buffer(run / "trajectories").digest(), rss, pss, gpu)


class Watch:
    """Looks at the processes that train, twice a second, and at the GPU: the median of each one's largest figures."""

    def __init__(self, events: Path, pid: int, device: str) -> None:
        self.events, self.pid, self.device = events, pid, device
        self.rss: dict[int, int] = {}
        self.pss: dict[int, int] = {}
        self.busy: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(0.5):
            happened = list(read_events(self.events))
            pids = {e["pid"] for e in happened if e["kind"] == "expert-started" and "pid" in e} or {self.pid}
            for pid in pids:
                found = memory(pid)
                if found is not None:
                    self.rss[pid] = max(self.rss.get(pid, 0), found[0])
                    self.pss[pid] = max(self.pss.get(pid, 0), found[1])
            if self.device == "cuda" and any(e["kind"] == "expert-epoch" for e in happened):
                self.busy.append(gpu_busy())

    def summary(self) -> tuple[int, int, float | None]:
        """(RSS, PSS) in bytes, and the mean utilisation of the GPUs."""
        rss, pss = (int(statistics.median(found.values())) if found else 0 for found in (self.rss, self.pss))
        return rss, pss, statistics.mean(self.busy) if self.busy else None


def memory(pid: int) -> tuple[int, int] | None:
    """(RSS, PSS) of a process in bytes; None where it has ended, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    found = {name: 1024 * int(size) for name, size in re.findall(r"^(Rss|Pss): +(\d+) kB", text, re.MULTILINE)}
    return (found["Rss"], found["Pss"]) if len(found) == 2 else None


def gpu_busy() -> float:
    """Mean utilisation of the GPUs now, as ``nvidia-smi`` tells it."""
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return statistics.mean(float(line) for line in done.stdout.split()) / 100


def page(args: argparse.Namespace, rows: list[Row]) -> str:
    """The results as Markdown."""
    first = rows[0]
    machine = torch.cuda.get_device_name() if args.device == "cuda" else processor()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, ray {version('ray')}"
    what = f"{args.job}, {args.experts} experts of {args.epochs} + {args.classifier_epochs} epochs"
    gpu = args.device == "cuda"
    head = "| | experts per hour | ratio | wall s | RSS MiB | PSS MiB |" + (" GPU busy |" if gpu else "")
    lines = [
        "# Experts per hour: a fleet against one process",
        "",
        f"`{' '.join(['python benchmarks/fleet.py', *sys.argv[1:]])}`",
        "",
        f"{datetime.date.today().isoformat()}; {machine}, {os.cpu_count()} cores; {versions}; {what}.",
        "Rates leave out the start of Ray, not that of the actors. RSS and PSS: of a process that trains, the median over",
        "processes of each one's largest; PSS counts shared pages by the share, and so is what one more expert takes.",
        "",
        head,
        "|---" + "|---:" * (6 if gpu else 5) + "|",
    ]
    for row in rows:
        figures = [f"{row.per_hour:.1f}", f"{row.per_hour / first.per_hour:.2f}", f"{row.wall:.0f}"]
        figures += [f"{row.rss / MIB:.0f}", f"{row.pss / MIB:.0f}"]
        figures += ([f"{row.gpu:.0%}" if row.gpu is not None else ""]) if gpu else []
        lines.append(f"| {row.way} | {' | '.join(figures)} |")
    equal = len({row.digest for row in rows}) == 1
    lines += ["", f"Digests: {'equal' if equal else 'not equal'} ({', '.join(sorted({r.digest[:12] for r in rows}))})."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", default="digits-lt", help="a shipped recipe's name or a file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as of lad-dist")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--classifier-epochs", type=int, default=10)
    parser.add_argument("--actors", type=int, default=2, help="on CPUs")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in ways(args):
            row = measure(args, way, Path(folder))
            rows.append(row)
            print(f"{way.name}: {row.per_hour:.1f} experts per hour, {row.wall:.0f} s in all", file=sys.stderr)
    text = page(args, rows)
    print(text)
    if args.json:
        args.json.write_text(json.dumps([{**vars(row), "per_hour": row.per_hour} for row in rows]))
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / ("fleet-cuda.md" if args.device == "cuda" else "fleet.md")).write_text(text)


if __name__ == "__main__":
    main()
