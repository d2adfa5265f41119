"""The model of ranks against 2, 3 and 4 of them, over a network of known delay and rate.

    sudo python benchmarks/network.py             # prints the table; Linux, root, `ip`
    sudo python benchmarks/network.py --write     # and writes benchmarks/results/network.md

Each rank is a process in a network namespace of its own, whose only way out is a TUN device. This program is the network
between them: it reads every packet, waits as long as the line would take, and writes it to its destination. (So it needs
no ``netem``, which not every kernel has.) A rank sends at the line's rate, and its packets arrive after the line's delay.

A CPU is some 50 times slower than the GPU that a fast line connects. So that sums weigh as much beside the computing as
there, lines are 50 times slower as well: 25 and 100 Gbit/s and 8.5 us become 0.5 and 2 Gbit/s and 0.425 ms.

The model knows the line's settings, the time that gloo takes for the shortest sum on one host, and the time of each rank's
share, apart (benchmarks/ranks.py). No number is fitted to what crossed the network. Two rules were added for what runs here,
after a look at these figures: gloo announces a buffer before it sends it, so each of the ring's 2 (W - 1) rounds takes two
hops; and where more ranks than cores wait for each other in every step, they take turns, W / cores rounded up.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import platform
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from fcntl import ioctl
from pathlib import Path
from typing import Any

import torch
from machine import processor
from ranks import PATHS, arguments, measure_on_rank, shapes_of

from lad_dist import ranks as ranks_module
from lad_dist.plan.scaling import Link, Network

RESULTS = Path(__file__).resolve().parent / "results" / "network.md"
SLOWER = 50  # a CPU than a GPU, and a line here than a real one
HOP = 8.5e-6 * SLOWER  # seconds from one rank to another: NCCL's tuning model for a network
LINES = {"25 Gbit/s": 25e9 / SLOWER, "100 Gbit/s": 100e9 / SLOWER}  # bits a second
HOPS_A_ROUND = 2  # gloo: "ready to receive", then the data
MTU = 65_000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PORT = 29_417
SUMS = (2**10, 2**17, 2**20, 2**22)


@dataclass(frozen=True)
class Line:
    """A rank's line: ``rate`` in bytes a second, ``delay`` in seconds to any other rank."""

    rate: float
    delay: float


class Wires(threading.Thread):
    """Carries packets between TUN devices: a packet leaves when its line is free, and arrives ``delay`` later."""

    def __init__(self, devices: Sequence[int], line: Line) -> None:
        super().__init__(daemon=True)
        self._devices, self._line = devices, line
        self._over = threading.Event()
        self.late, self.count = 0.0, 0  # seconds in all beyond the delay, packets

    def run(self) -> None:
        free = [0.0] * len(self._devices)  # when each rank's line can send again
        waiting: list[tuple[float, int, int, bytes]] = []
        while not self._over.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                due, _, target, packet = heapq.heappop(waiting)
                self.late += now - due
                with suppress(OSError):  # a device that is not up yet: the packet is lost
                    os.write(self._devices[target], packet)
            pause = max(min(waiting[0][0] - time.monotonic(), 0.05), 0.0) if waiting else 0.05
            for device in select.select(self._devices, (), (), pause)[0]:
                packet = os.read(device, MTU + 64)
                if packet[0] >> 4 != 4 or not 0 < packet[19] <= len(self._devices):  # not to 10.77.0.RANK+1
                    continue
                source, target = self._devices.index(device), packet[19] - 1
                free[source] = max(free[source], time.monotonic()) + len(packet) / self._line.rate
                self.count += 1
                heapq.heappush(waiting, (free[source] + self._line.delay, self.count, target, packet))

    def end(self) -> None:
        self._over.set()
        self.join()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def namespaces(world: int, line: Line) -> Iterator[tuple[list[str], Wires]]:
    """Yield the names of ``world`` network namespaces, and what connects them."""
    names, devices = [f"ladist-{os.getpid()}-{rank}" for rank in range(world)], []
    made: list[str] = []
    wires: Wires | None = None
    try:
        for rank, name in enumerate(names):
            ip("netns", "add", name)
            made.append(name)
            device = os.open("/dev/net/tun", os.O_RDWR)
            devices.append(device)
            link = f"lad{os.getpid() % 100_000}n{rank}"
            ioctl(device, _TUNSETIFF, struct.pack("16sH22x", link.encode(), _IFF_TUN | _IFF_NO_PI))
            ip("link", "set", link, "netns", name, "name", "line")
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "line")
            ip("-n", name, "link", "set", "line", "mtu", str(MTU), "up")
            ip("-n", name, "link", "set", "lo", "up")
        wires = Wires(devices, line)
        wires.start()
        yield names, wires
    finally:
        if wires is not None:
            wires.end()
        for device in devices:
            os.close(device)
        for name in made:
            ip("netns", "del", name)


def over_network(world: int, line: Line, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``measure_on_rank`` finds where every rank has a namespace of its own."""
    with tempfile.TemporaryDirectory() as folder, namespaces(world, line) as (names, wires):
        out = Path(folder) / "found.json"
        ranks = []
        for rank, name in enumerate(names):
            own = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1"}
            own |= {"MASTER_PORT": str(_PORT), "GLOO_SOCKET_IFNAME": "line"}
            command = ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", str(out), json.dumps(settings)]
            ranks.append(subprocess.Popen(command, env={**os.environ, **own}))
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        for rank in ranks:
            rank.terminate()
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"benchmarks/network.py: ranks ended with {codes}")
        return {**json.loads(out.read_text()), "settings": settings, "late": wires.late / max(wires.count, 1)}


def on_one_host(world: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The same over the loopback interface."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        ranks_module.launch(world, measure_on_rank, (str(out), settings), restarts=0, say=print)
        return {**json.loads(out.read_text()), "settings": settings}


def link_of(results: dict[str, Any], line: Line | None) -> Link:
    """A line by its settings, or one host as measured there: its shortest sum, and its largest."""
    world, sums = results["settings"]["world"], {int(count): seconds for count, seconds in results["sums"].items()}
    start, large = min(sums.values()), max(sums)
    if line is not None:
        return Link("line", line.rate, start, HOPS_A_ROUND * line.delay, __file__)
    return Link("one host", 2 * (world - 1) / world * large / max(sums[large] - start, 1e-9), start, 0.0, __file__)


def computing(results: dict[str, Any], path: str) -> float:
    """Seconds of an iteration's shares. More ranks than cores, all waiting for the last in every step, take turns."""
    world, cores = results["settings"]["world"], os.cpu_count() or 1
    return float(results["iterations"][path]["apart"] * math.ceil(world / cores) / max(world / cores, 1.0))


def network_of(link: Link, world: int) -> Network:
    """Ranks in a ring: a sum passes 2 (W - 1) times from one to the next."""
    return Network(link, link, world)


def waiting(results: dict[str, Any], path: str, link: Link) -> float:
    """Seconds of an iteration's sums, by the model."""
    s, shapes = results["settings"], shapes_of(results["settings"])
    network = network_of(link, s["world"])
    first = network.allreduce(4 * shapes.parameters, s["world"]) * (2 if path == "recompute" else 1)
    return float(s["steps"] * (first + network.allreduce(4 * shapes.classifier, s["world"])))


def rows(name: str, results: dict[str, Any], link: Link) -> tuple[list[str], list[str]]:
    """Lines of the tables of iterations and of sums."""
    world, network = results["settings"]["world"], network_of(link, results["settings"]["world"])
    iterations, sums = [], []
    for path in PATHS:
        found, sum_seconds = results["iterations"][path], waiting(results, path, link)
        model = computing(results, path) + sum_seconds
        cells = " | ".join(
            f"{1e3 * s:.0f} ms" for s in (found["alone"], found["apart"], sum_seconds, model, found["together"])
        )
        iterations.append(f"| {name} | {world} | {path} | {cells} | {model / found['together']:.2f} |")
    for count, seconds in results["sums"].items():
        model = network.allreduce(int(count), world)
        sums.append(
            f"| {name} | {world} | {int(count):,} | {1e3 * seconds:.2f} ms | {1e3 * model:.2f} ms | {model / seconds:.2f} |"
        )
    return iterations, sums


def report(found: list[tuple[str, dict[str, Any], Link]]) -> str:
    first = found[0][1]["settings"]
    tables = [rows(name, results, link) for name, results, link in found]
    late = max(results.get("late", 0.0) for _, results, _ in found)
    worst = max(
        (
            abs(1 - (computing(r, p) + waiting(r, p, link)) / r["iterations"][p]["together"])
            for _, r, link in found
            for p in PATHS
        ),
    )
    return "\n".join([
        "# Ranks over a network of known delay and rate",
        "",
        "Made by `python benchmarks/network.py --write`, as root, which says how.",
        "",
        f"{date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
        f"gloo. One thread a rank; width {first['width']}, {first['shape']}, {first['classes'] * first['ipc']} images, "
        f"{first['steps']} student steps a phase; medians of {first['repeats']}. Lines are {SLOWER} times slower than their names: "
        f"{', '.join(f'{name} is {bits / 1e9:g} Gbit/s' for name, bits in LINES.items())}, {1e3 * HOP:.3f} ms from rank to rank "
        f"(packets are up to {1e3 * late:.2f} ms late on average).",
        "",
        "| network | ranks | path | 1 rank | shares, without sums | sums (model) | model | measured | model / measured |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line for iterations, _ in tables for line in iterations),
        "",
        f"The model is within {math.ceil(100 * worst)}% of what was measured.",
        "",
        "| network | ranks | bytes | a sum, measured | model | model / measured |",
        "|---|---|---|---|---|---|",
        *(line for _, sums in tables for line in sums),
        "",
    ])  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        measure_on_rank(sys.argv[2], json.loads(sys.argv[3]))
        os._exit(0)  # gloo's threads have been seen to abort at the end of a process
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--shape", default="3x32x32")
    parser.add_argument("--ipc", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    asked = parser.parse_args()
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        raise SystemExit("benchmarks/network.py: needs root and /dev/net/tun, for network namespaces")
    given = {name: getattr(asked, name) for name in ("width", "shape", "ipc", "repeats")}
    base = arguments([word for name, value in given.items() for word in (f"--{name}", str(value))])
    keys = ("width", "depth", "shape", "classes", "ipc", "batch", "steps", "repeats", "threads", "device")
    found: list[tuple[str, dict[str, Any], Link]] = []
    for world in asked.worlds:
        settings = {k: getattr(base, k) for k in keys} | {"world": world, "sums": list(SUMS), "bucket_widths": []}
        local = on_one_host(world, settings)
        found.append(("one host", local, link_of(local, None)))
        for name, bits in LINES.items():
            line = Line(bits / 8, HOP)
            found.append((name, over_network(world, line, settings), link_of(local, line)))
    text = report(found)
    print(text)
    if asked.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
