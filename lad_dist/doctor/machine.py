"""Checks of this machine: Python, packages, GPUs, ranks, folders and their clock, Ray."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from lad_dist import cores, ranks
from lad_dist.doctor.findings import Finding, fail, ok, warn
from lad_dist.errors import LadDistError
from lad_dist.experts.cluster import listens
from lad_dist.experts.private import exposure, renewed, token_file
from lad_dist.experts.scheduler import cluster_address
from lad_dist.profile import Profile

OLDEST, NEWEST = (3, 11), (3, 13)
GB = 10**9
LITTLE_GB, TOO_LITTLE_GB = 10, 1  # of free disk: an expert of CIFAR-10 takes 0.11 GB
FEW_INODES = 10_000
CLOCK_SECONDS = 2.0
DASHBOARD_PORT = 8265
_TORCHVISION_AHEAD = 15  # torch 2.N pairs with torchvision 0.(N + 15), since 2.0
_RANKS_SECONDS = 60.0


def software() -> Iterator[Finding]:
    """Check Python and every dependency of lad-dist against the declared version ranges."""
    here, shown = sys.version_info[:2], sys.version.split()[0]
    if here < OLDEST:
        yield fail("python", f"{shown}", f"use Python {_dotted(OLDEST)} or newer")
    elif here > NEWEST:
        yield warn(
            "python", f"{shown} is newer than what lad-dist is tested with", f"prefer {_dotted(NEWEST)} or older"
        )
    else:
        yield ok("python", f"{shown}, {sys.executable}")
    try:
        required = requires("lad-dist") or ()
    except PackageNotFoundError:
        yield fail("packages", "lad-dist is on Python's path, but not installed", "pip install it, with what it needs")
        return
    needs = [need.partition(";")[::2] for need in sorted(required)]
    wrong = [text for need, extra in needs for text in _unmet(need, optional="extra" in extra)]
    if wrong:
        yield fail(
            "packages", "; ".join(wrong), "pip install -U lad-dist, or see its constraints.txt for a set that works"
        )
    else:
        named = ("lad-dist", "torch", "torchvision", "ray", "submitit", "pyarrow", "numba")
        yield ok("packages", ", ".join(f"{name} {_version(name) or 'not installed'}" for name in named))
    yield from _torch_pair()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _unmet(need: str, optional: bool) -> list[str]:
    """Return ``["torch 2.1 is installed, needed: 2.8 or newer"]``; requirements here: a name and a lower bound.

    An optional package may be absent.
    """
    name, _, least = re.sub(r"\[[^\]]*\]", "", need).replace(" ", "").partition(">=")
    there = _version(name)
    if there is None:
        return [] if optional else [f"{name} is not installed"]
    return [f"{name} {there} is installed, needed: {least} or newer"] if _numbers(there) < _numbers(least) else []


def _torch_pair() -> Iterator[Finding]:
    try:
        torch, vision = version("torch"), version("torchvision")
    except PackageNotFoundError:
        return  # said above
    if _numbers(vision)[:2] != (0, _numbers(torch)[1] + _TORCHVISION_AHEAD):
        fitting = f"0.{_numbers(torch)[1] + _TORCHVISION_AHEAD}"
        yield warn("torchvision", f"{vision} was not made for torch {torch}", f"pip install 'torchvision=={fitting}.*'")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def gpus(profile: Profile) -> Iterator[Finding]:
    """Compare the GPUs that torch sees with those that the profile expects here."""
    import torch

    if not torch.cuda.is_available():
        if profile.launcher == "local" and (profile.device == "cuda" or profile.gpus_per_node):
            yield fail("gpu", f"torch {torch.__version__} sees none, and the profile needs one{_driver()}",
                       "install the driver, or a torch built for CUDA; or use a profile with device: cpu")  # fmt: skip
        else:
            yield ok("gpu", f"none here{_driver()}; {cores.available()} CPU cores")
        return
    count = torch.cuda.device_count()
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        text = f"{index}: {torch.cuda.get_device_name(index)}, {free / GB:.0f} of {total / GB:.0f} GB free"
        if free < total / 2:
            yield warn("gpu", text, "other processes use it: nvidia-smi lists them")
        else:
            yield ok("gpu", text)
    yield ok("cuda", f"torch is built for CUDA {torch.version.cuda}{_driver()}")
    if profile.launcher == "local" and profile.gpus_per_node > count:
        yield fail("gpu", f"{count} of the profile's {profile.gpus_per_node} found", "lower gpus_per_node")


def _driver() -> str:
    """Return ``, driver 550.54``; empty without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f", driver {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.strip() else ""


def ranks_meet(profile: Profile) -> Iterator[Finding]:
    """Check that two processes can sum a number, over NCCL between GPUs, else gloo. One GPU: one process."""
    import torch

    cuda = profile.device != "cpu" and torch.cuda.is_available()
    backend, world = ("NCCL", min(2, torch.cuda.device_count())) if cuda else ("gloo", 2)
    if world == 1:
        yield ok("ranks", "one GPU, so one rank: no communication to check")
        return
    began = time.monotonic()
    try:
        ranks.launch(world, add_up, (cuda,), restarts=0, say=lambda _: None)
    except (LadDistError, OSError) as error:
        todo = "set NCCL_DEBUG=INFO and try again" if cuda else "check for a firewall on the loopback device"
        yield fail("ranks", f"{world} processes did not connect over {backend}: {error}", todo)
    else:
        yield ok("ranks", f"{world} processes connected over {backend} and summed, in {time.monotonic() - began:.0f} s")


def add_up(cuda: bool) -> None:
    """Worker process of ``ranks_meet``. Raises RankError if the others do not come, or the sum is wrong."""
    import torch

    from lad_dist.errors import RankError

    where = ranks.place()
    assert where is not None, "ranks.launch says who one is"
    device = torch.device("cuda", where.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    with ranks.joined(where, device, _RANKS_SECONDS) as group:
        total = float(group.total(torch.ones(1, device=device)))
        if total != group.world:
            raise RankError(f"the sum over {group.world} ranks is {total}; valid: {group.world}")


def folders(out: Path) -> Iterator[Finding]:
    """Check the space for runs and temporary files, and that the clock of the folder's host agrees with this one's."""
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    yield from _room("runs", there)
    yield from _clock(there)
    yield from _room("temporary", Path(tempfile.gettempdir()))


def _room(name: str, folder: Path) -> Iterator[Finding]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lad-dist-doctor-"):
            pass
    except OSError as error:
        yield fail(name, f"{folder}: cannot be written: {error.strerror}", _elsewhere(name))
        return
    facts = os.statvfs(folder)
    free = facts.f_bavail * facts.f_frsize / GB
    inodes = facts.f_favail if facts.f_files else None  # some file systems do not count them
    text = f"{folder}: {free:.0f} GB free" + ("" if inodes is None else f", {inodes:,} inodes free")
    if free < TOO_LITTLE_GB or inodes == 0:
        yield fail(name, text, f"free some space, or {_elsewhere(name)}")
    elif free < LITTLE_GB or (inodes is not None and inodes < FEW_INODES):
        yield warn(name, text, "lad-dist plan JOB estimates what a job needs")
    else:
        yield ok(name, text)


def _elsewhere(name: str) -> str:
    return "set TMPDIR to another folder" if name == "temporary" else "choose another folder with --out"


def _clock(folder: Path) -> Iterator[Finding]:
    before = time.time()
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".lad-dist-doctor-") as file:
            stamped = os.fstat(file.fileno()).st_mtime
    except OSError:
        return  # said above
    ahead = stamped - (before + time.time()) / 2
    if abs(ahead) > CLOCK_SECONDS:
        text = f"{folder}: its host's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this one"
        yield warn("clock", text, "sync both clocks (NTP): file times show who is still training an expert")
    else:
        yield ok("clock", "agrees with that of the folder's host")


def ray_ready(profile: Profile) -> Iterator[Finding]:
    """Check that Ray is installed, that a named cluster answers, or else that the dashboard's port is free."""
    try:
        there = version("ray")
    except PackageNotFoundError:
        instead = "pip install 'lad-dist[ray]'; experts are trained in one process until then"
        yield (fail if profile.fleet == "on" else warn)("ray", "is not installed", instead)
        return
    address = cluster_address(profile)
    yield from _ray_token(joins=bool(address))
    if address and re.fullmatch(r"\S+:\d+", address):
        if listens(address):
            yield ok("ray", f"{there}; {address} answers")
        else:
            yield fail(
                "ray", f"no cluster answers at {address}", "start that cluster, or unset ray.address and RAY_ADDRESS"
            )
    elif listens(f"127.0.0.1:{DASHBOARD_PORT}"):
        found = f"{there}; port {DASHBOARD_PORT} is in use, so the dashboard gets another one"
        yield ok("ray", f"{found} and prints it")
    else:
        yield ok("ray", f"{there}; a local cluster starts on 127.0.0.1, dashboard on port {DASHBOARD_PORT}")


def _ray_token(joins: bool) -> Iterator[Finding]:
    """Check whether others can read a Ray cluster's token and so run code as this user. ``joins``: it will be used."""
    file = token_file(os.environ)
    if file is None:
        return
    how = exposure(file)
    if how is None:
        yield ok("ray token", f"{file}: only its owner can read it")
    else:
        yield (fail if joins else warn)("ray token", f"{file}: {how}", renewed(file))
