"""Reading windows: the trajectory buffer against replay_buffer_N.pt files of the same weights.

    python benchmarks/buffer.py                  # 20 experts x 101 checkpoints x 320,010 weights; prints the tables
    python benchmarks/buffer.py --write          # and writes benchmarks/results/buffer.md
    python benchmarks/buffer.py --experts 10     # smaller, quicker

A window is what one iteration matches: two checkpoints of one expert, here two epochs apart. The family of methods that
began with MTT (Cazenavette et al., CVPR 2022, ``buffer.py`` and ``distill.py`` of github.com/GeorgeCazenavette/mtt-distillation)
keeps ten experts in a file, a list (experts) of lists (epochs) of lists of tensors, written by ``torch.save`` and loaded
whole for any of its windows.

Every number is of a fresh process, without its imports' time. Cold: the files' pages were dropped from the page cache by
posix_fadvise(DONTNEED), which needs no rights; that they are gone is checked by mincore(2). What lies below
the operating system (a virtual disk's host) may still hold them, for both formats alike.

Needs about 2.4 times 2.6 GB on the disk of --folder while it runs (removed afterwards), and some minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from machine import processor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

Vector = npt.NDArray[np.float32]
RESULTS = Path(__file__).parent / "results" / "buffer.md"
EXPERTS_PER_FILE = 10
LENGTH = 2  # epochs between the two checkpoints of a window
READERS = 8
LARGE_CACHE_MB = 512  # beside the recipe's default


# The weights


def trajectory(expert: int, epochs: int, start: Vector) -> Iterator[Vector]:
    """A walk from ``start`` (P,) whose steps become smaller, as those of training do; ``epochs`` + 1 checkpoints.

    Made up: 0.3% of the weights' size at first, falling with the square root of the epoch. What matters here is how many
    bytes differ from row to row and compress; the encoding's own benchmark (buffer_encoding.md) uses real ones.
    """
    draws = np.random.default_rng(expert)
    weights = start + 0.02 * draws.standard_normal(len(start), np.float32)
    yield weights.copy()
    for epoch in range(1, epochs + 1):
        weights += np.float32(3e-3 / np.sqrt(epoch)) * draws.standard_normal(len(start), np.float32)
        yield weights.copy()


def write_both(folder: Path, experts: int, epochs: int) -> dict[str, Any]:
    """The same weights as a buffer and as .pt files; their sizes in bytes, and seconds to write."""
    import torch

    from lad_dist.models.convnet import build, flat_parameters
    from lad_dist.models.layout import Layout
    from lad_dist.trajectories import BufferMeta, PartWriter

    network = build(3, 32, 10, 128, 3, seed=0, purpose=("benchmark",))
    layout, start = Layout.of(network), flat_parameters(network).numpy()
    meta = BufferMeta(
        "0" * 64,
        "0" * 64,
        (10,) * 10,
        tuple(zip(layout.names, layout.shapes, strict=True)),
        layout.classifier,
        {},
        {"torch": torch.__version__},
    )
    seconds = {"buffer": 0.0, "pt": 0.0}
    for first in range(0, experts, EXPERTS_PER_FILE):
        pending: list[list[list[torch.Tensor]]] = []
        for expert in range(first, min(first + EXPERTS_PER_FILE, experts)):
            rows = list(trajectory(expert, epochs, start))
            began = time.perf_counter()
            with PartWriter(folder / "buffer", meta, "representation", expert, epochs_per_part=5) as writer:
                for epoch, row in enumerate(rows):
                    writer.append(epoch, row)
            seconds["buffer"] += time.perf_counter() - began
            pending.append([[t.clone() for t in layout.views(torch.from_numpy(row)).values()] for row in rows])
            print(f"expert {expert + 1}/{experts} written", file=sys.stderr)
        began = time.perf_counter()
        path = folder / f"replay_buffer_{first // EXPERTS_PER_FILE}.pt"
        torch.save(pending, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        seconds["pt"] += time.perf_counter() - began
    return {
        "weights": len(start),
        "raw": 4 * len(start) * experts * (epochs + 1),
        "buffer": size(folder / "buffer"),
        "pt": sum(p.stat().st_size for p in pt_files(folder)),
        "seconds": seconds,
    }


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def pt_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("replay_buffer_*.pt"))


# The page cache


def forget(paths: list[Path]) -> bool:
    """Drop the files' pages from the page cache; whether (nearly) all of them are known to be gone."""
    for path in paths:
        for attempt in range(20):  # pages on their way to or from the disk stay
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if resident(path) <= 0.01:
                break
            time.sleep(0.01 * attempt)
        else:
            return False
    return True


def resident(path: Path) -> float:
    """The share of a file's pages that are in the page cache (mincore(2), which reads none of them)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(begin), ctypes.c_size_t(len(mapped)), pages)
        del begin  # else the map cannot be closed
    return 1.0 if failed else float((np.frombuffer(pages, np.uint8) & 1).mean())


# What the fresh processes do. Each prints one JSON object.


def memory() -> dict[str, int]:
    """Bytes: the most that was resident so far, and what this process alone accounts for now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return {"peak": 1024 * int(status["VmHWM"].split()[0]), "pss": 1024 * int(rollup["Pss"].split()[0])}


def windows(seed: int, experts: int, epochs: int) -> Iterator[tuple[int, int]]:
    """Expert and start epoch, uniform, without end."""
    draws = np.random.default_rng(seed)
    while True:
        yield int(draws.integers(experts)), int(draws.integers(epochs - LENGTH + 1))


def read_window(read: Callable[..., Vector], expert: int, epoch: int) -> None:
    assert np.isfinite(read("representation", expert, epoch)[-1] + read("representation", expert, epoch + LENGTH)[-1])


def measure_first(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """One window of a buffer that nobody has opened before: the listing and the footers included."""
    from lad_dist.trajectories import Buffer

    cold = forget([p for p in (folder / "buffer").rglob("*") if p.is_file()])
    began = time.perf_counter()
    read_window(Buffer(folder / "buffer").read, *next(windows(1, experts, epochs)))
    return {"seconds": time.perf_counter() - began, "cold": cold, **memory()}


def measure_windows(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """Many windows, nothing of them kept: in the page cache, then each with its pages dropped before it."""
    from lad_dist.trajectories import Buffer
    from lad_dist.trajectories.schema import part_path

    buffer = Buffer(folder / "buffer")
    parts = {(p.expert, e): p for p in buffer.parts for e in range(p.first, p.last + 1)}
    seconds: dict[str, list[float]] = {"warm": [], "cold": []}
    gone = True
    for kind, times in seconds.items():
        drawn = windows(2, experts, epochs)
        for i in range(count + 20):
            expert, epoch = next(drawn)
            if kind == "cold":
                own = {parts[expert, e] for e in (epoch, epoch + LENGTH)}
                gone &= forget([folder / "buffer" / part_path(p.stage, p.expert, p.first, p.last) for p in own])
            began = time.perf_counter()
            read_window(buffer.read, expert, epoch)
            if i >= 20:
                times.append(time.perf_counter() - began)
    return {"cold_is_cold": gone, **memory(), **{k: np.percentile(t, [50, 99]).tolist() for k, t in seconds.items()}}


def measure_threads(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """Windows per second of one reader, then of eight threads that share one buffer."""
    from lad_dist.trajectories import Buffer

    buffer = Buffer(folder / "buffer")

    def work(seed: int) -> None:
        drawn = windows(seed, experts, epochs)
        for _ in range(count):
            read_window(buffer.read, *next(drawn))

    rates = []
    for readers in (1, READERS):
        threads = [threading.Thread(target=work, args=(10 + r,)) for r in range(readers)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rates.append(readers * count / (time.perf_counter() - began))
    return {"one": rates[0], "threads": rates[1], **memory()}


def measure_reader(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """One of eight processes: reads from the moment in which the parent says so."""
    from lad_dist.trajectories import Buffer

    buffer, drawn = Buffer(folder / "buffer"), windows(os.getpid(), experts, epochs)
    read_window(buffer.read, *next(drawn))
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    for _ in range(count):
        read_window(buffer.read, *next(drawn))
    return {"seconds": time.perf_counter() - began, **memory()}


def measure_cached(folder: Path, experts: int, epochs: int, count: int, cache_mb: int | None = None) -> dict[str, Any]:
    """As a distillation reads: through the cache, the next window read ahead; memory after many windows."""
    from lad_dist.recipe import BufferConfig
    from lad_dist.trajectories import Buffer
    from lad_dist.trajectories.cache import CheckpointCache

    imports = memory()["peak"]
    cache_mb = cache_mb or BufferConfig().cache_mb
    cache = CheckpointCache(Buffer(folder / "buffer"), cache_mb * 2**20)
    drawn, times = windows(3, experts, epochs), []
    following = next(drawn)
    for _ in range(2 * count):
        expert, epoch = following
        began = time.perf_counter()
        read_window(cache.read, expert, epoch)
        times.append(time.perf_counter() - began)
        following = next(drawn)
        cache.prefetch([("representation", following[0], following[1] + at) for at in (0, LENGTH)])
        time.sleep(0.02)  # what an iteration computes meanwhile; the shortest measured takes some 30 ms
    found = {
        "imports": imports,
        "cache_mb": cache_mb,
        "cache": cache.bytes,
        **memory(),
        "waits": np.percentile(times, [50, 99]).tolist(),
    }
    cache.close()
    return found


def measure_cached_more(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """The same with a larger cache."""
    return measure_cached(folder, experts, epochs, count, LARGE_CACHE_MB)


def measure_pt(folder: Path, experts: int, epochs: int, count: int) -> dict[str, Any]:
    """Load a file to have one window of it: cold, then again in the page cache; memory with one file, then with all."""
    import torch

    imports = memory()["peak"]
    cold = forget(pt_files(folder))
    began = time.perf_counter()
    loaded = torch.load(pt_files(folder)[0], weights_only=True)
    window = [torch.cat([p.reshape(-1) for p in loaded[3][at]]) for at in (7, 7 + LENGTH)]
    found: dict[str, Any] = {"cold": time.perf_counter() - began, "cold_is_cold": cold, "imports": imports, **memory()}
    assert all(bool(w.isfinite().all()) for w in window)
    del loaded
    began = time.perf_counter()
    kept = [torch.load(pt_files(folder)[0], weights_only=True)]
    found["warm"] = time.perf_counter() - began
    kept += [torch.load(path, weights_only=True) for path in pt_files(folder)[1:]]
    return found | {"all": memory(), "files": len(kept)}


MEASURES = {
    name: globals()[f"measure_{name}"]
    for name in ("first", "windows", "threads", "reader", "cached", "cached_more", "pt")
}


# The parent


def start(name: str, asked: argparse.Namespace, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--measure", name, "--folder", str(folder), "--experts", str(asked.experts)]
    command += ["--epochs", str(asked.epochs), "--windows", str(asked.windows)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a measurement ended with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything, one fresh process after the other (the eight readers together)."""
    found = {}
    for name in ("first", "pt", "windows", "threads", "cached", "cached_more"):
        print(f"measuring: {name}", file=sys.stderr)
        found[name] = result(start(name, asked, folder))
    readers = [start("reader", asked, folder) for _ in range(READERS)]
    for reader in readers:
        assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    for reader in readers:
        assert reader.stdin is not None
        reader.stdin.write("go\n")
        reader.stdin.flush()
    ended = [result(reader) for reader in readers]
    found["processes"] = {
        "rate": sum(asked.windows / one["seconds"] for one in ended),
        "peak": max(one["peak"] for one in ended),
        "pss": sum(one["pss"] for one in ended),
    }
    return found


def report(asked: argparse.Namespace, sizes: dict[str, Any], found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    import pyarrow
    import torch

    def ms(pair: list[float]) -> str:
        return f"{1e3 * pair[0]:.1f} / {1e3 * pair[1]:.1f} ms"

    def mib(value: int) -> str:
        return f"{value / 2**20:,.0f} MiB"

    pt, first, window, cached = found["pt"], found["first"], found["windows"], found["cached"]
    more, processes = found["cached_more"], found["processes"]
    peak, everything = pt["peak"], pt["all"]["peak"]
    sure = all((pt["cold_is_cold"], first["cold"], window["cold_is_cold"]))
    gone = "and were checked to be gone" if sure else "but could not be checked to be gone"
    lines = [
        "# Reading windows from the trajectory buffer and from .pt files",
        "",
        f"Made by `python benchmarks/buffer.py --experts {asked.experts} --epochs {asked.epochs} --windows {asked.windows} "
        "--write`, which says how.",
        "",
        f"- {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}, pyarrow {pyarrow.__version__}; one computing thread per process.",
        f"- {asked.experts} experts x {asked.epochs + 1} checkpoints x {sizes['weights']:,} float32 weights "
        f"({sizes['raw'] / 1e9:.2f} GB), a made-up walk with falling steps; {EXPERTS_PER_FILE} experts in a .pt file.",
        f"- A window is two checkpoints of one expert. Cold: pages dropped by posix_fadvise(DONTNEED), {gone}.",
        "- A .pt file that is loaded gives the windows of its own ten experts at no further cost; the buffer gives those of all.",
        "",
        "| | buffer | .pt files | ratio |",
        "|---|---|---|---|",
        f"| size on disk | {sizes['buffer'] / 1e9:.2f} GB ({sizes['buffer'] / sizes['raw']:.3f} of raw) "
        f"| {sizes['pt'] / 1e9:.2f} GB | {sizes['buffer'] / sizes['pt']:.2f} |",
        f"| seconds to write, synced | {sizes['seconds']['buffer']:.1f} | {sizes['seconds']['pt']:.1f} | |",
        f"| first window of a fresh process, cold | {1e3 * first['seconds']:.1f} ms | {pt['cold']:.2f} s "
        f"| {pt['cold'] / first['seconds']:.0f} times faster |",
        f"| any further window, cold, p50 / p99 | {ms(window['cold'])} | {pt['cold']:.2f} s (of a file not loaded) "
        f"| {pt['cold'] / window['cold'][0]:.0f} times faster |",
        f"| the same in the page cache | {ms(window['warm'])} | {pt['warm']:.2f} s "
        f"| {pt['warm'] / window['warm'][0]:.0f} times faster |",
        f"| waited for, if read ahead while 20 ms are computed | {ms(cached['waits'])} | | |",
        f"| windows per second, 1 reader | {found['threads']['one']:.0f} | | |",
        f"| {READERS} threads of one process | {found['threads']['threads']:.0f} | | |",
        f"| {READERS} processes | {processes['rate']:.0f} (together {mib(processes['pss'])} PSS) | | |",
        "",
        "Resident memory of a fresh process, at its peak (VmHWM), imports included:",
        "",
        "| what it does | peak | of one .pt file's | of all files' |",
        "|---|---|---|---|",
    ]
    rows = [(f"buffer, {asked.windows} windows, none kept", window["peak"])]
    for one in (cached, more):
        kept = (
            f"`buffer.cache_mb: {one['cache_mb']}`{' (the default)' if one is cached else ''}, {mib(one['cache'])} used"
        )
        rows.append((f"buffer, {2 * asked.windows} windows, {kept}", one["peak"]))
    rows += [("one .pt file loaded", peak), (f"all {pt['files']} .pt files loaded", everything)]
    for what, value in rows:
        lines.append(f"| {what} | {mib(value)} | {value / peak:.3f} | {value / everything:.3f} |")
    lines += ["", f"Of these, imports: {mib(cached['imports'])} for the buffer, {mib(pt['imports'])} for torch.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=20, help="experts (default 20; at least 4)")
    parser.add_argument(
        "--epochs", type=int, default=100, help="epochs after the initialisation (default 100; at least 9)"
    )
    parser.add_argument("--windows", type=int, default=300, help="windows of each measurement (default 300)")
    parser.add_argument("--folder", type=Path, help="where to put the files meanwhile; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write what was measured into this file")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(MEASURES[asked.measure](asked.folder, asked.experts, asked.epochs, asked.windows)))
        return
    with tempfile.TemporaryDirectory(prefix="buffer-benchmark-", dir=asked.folder) as name:
        folder = Path(name)
        sizes = write_both(folder, asked.experts, asked.epochs)
        found = measure(asked, folder)
    text = report(asked, sizes, found)
    if asked.json:
        asked.json.write_text(json.dumps({**found, "sizes": sizes}))
    print(text)
    if asked.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
