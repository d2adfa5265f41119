"""The ways to launch a run that the campaign of faults disturbs, and how it does so.

    process   one process, forked from one that has run before: nothing is imported or compiled again
    group     the same, where one user of a group begins and another goes on (only root can be both)
    store     the same, with its buffer in an S3 server (moto) behind a proxy that can be slow, fail, or be away
    ranks     a distillation and an evaluation over two ranks, which are forked as well
    fleet     experts by Ray actors of a private cluster, in fresh processes
    slurm     a chain of jobs on the SLURM of cluster/dev-slurm

Forked commands have a heartbeat of ``BEAT`` and claims that are void after ``STALE``; the package's own numbers, 5 and 30
seconds, hold for the others. They also obey file modes, as root does not, and take Python's wall clock from ``Clock``.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.campaign import campaign
from tests.campaign.campaign import Forked, Outcome
from tests.campaign.faults import Case, Done, Launch, Running
from tests.campaign.kinds import HERE

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

BEAT, STALE = 0.3, 2.0
PAUSE, LONG_PAUSE = STALE + 1.0, 32.0
DISK = "6m"
GROUP_UMASK = 0o002  # of fresh processes: Ray's actors and SLURM's jobs must inherit it
OUTAGE = 3.0  # seconds, of a store
STAGES_OF = {
    "ranks": ("distill", "distill", "evaluate"),
    "fleet": ("experts",),
    "slurm": ("experts", "distill", "evaluate", "report"),
    "store": ("start", "experts", "distill"),
}
_VERSION_3, _OVERRIDE = 0x20080522, 0b110  # of capset(2): CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH


class Clock:
    """An offset to ``time.time`` that forked processes share; C code sees the kernel's clock as ever."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, seconds: float) -> None:
        """From now on, in all processes."""
        self._memory[:] = struct.pack("d", seconds)

    def install(self) -> None:
        """In this process."""
        real = time.time
        time.time = lambda: real() + struct.unpack("d", self._memory[:])[0]


CLOCK = Clock()


def obey_modes() -> None:
    """Give up root's privilege to ignore file modes; nothing for others."""
    if os.geteuid() != 0 or sys.platform != "linux":
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        data[0] &= ~_OVERRIDE
        data[1] &= ~_OVERRIDE
        libc.capset(header, data)


def prepare_fork() -> None:
    """What a forked command does first."""
    from lad_dist import ranks
    from lad_dist.trajectories import claims

    claims.STALE_SECONDS, claims.REFRESH_SECONDS = STALE, BEAT
    config = ranks._launch_config
    ranks._launch_config = lambda world, logs: dataclasses.replace(config(world, logs), start_method="fork")
    CLOCK.install()
    os.umask(Process.umask)
    obey_modes()


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == pid and state != "Z":
                    found += [int(entry.name), *children(int(entry.name))]
    return found


def send(number: int, *pids: int) -> None:
    """A signal to those that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# --------------------------------------------------------------------------------------------------------------- one process


class Process:
    """``lad-dist run`` in a forked process."""

    continues = True
    umask = 0o022

    def __init__(self) -> None:
        self.command = ["run", "job.yaml", "--out", "run", "--fleet", "off", *HERE]
        self.stages = ("start", "experts", "distill", "evaluate", "report")

    def prepare(self, folder: Path, case: Case | None) -> None:
        """The run folder of a case of a full disk is a file system of its own."""
        if case is not None and case.fault == "full disk":
            (folder / "run").mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "lad-dist-campaign", str(folder / "run")]
            subprocess.run(
                mount, capture_output=True, check=False
            )  # where that is not allowed, the limit of file sizes

    def start(self, folder: Path, tag: str) -> Forked:
        """In a fork."""
        return campaign.start(self.command, folder, (f"{tag}.out", f"{tag}.err"), prepare_fork)

    def digest(self, folder: Path) -> str:
        """Computed in a fork: another process's Arrow keeps threads."""
        outcome = campaign.start(["buffer", "inspect", "run", "--json"], folder, ("d.out", "d.err"), prepare_fork)
        return str(json.loads(outcome.outcome(240).out)["digest"])

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """The faults of one process."""
        run = folder / "run"
        how: dict[str, Callable[[], Done]] = {
            "killed": lambda: self.killed(first),
            "stopped, and another driver": lambda: self.stopped(case, folder, first),
            "full disk": lambda: full_disk(run) if os.path.ismount(run) else file_size_limit(case, [first.pid]),
            "file size limit": lambda: file_size_limit(case, [first.pid, *children(first.pid)]),
            "read-only folder": lambda: read_only(run),
            "clock jump": lambda: clock_jump(case),
            "file times moved": lambda: times_moved(case, run),
            "two drivers": lambda: Done("a second driver", [self.start(folder, "2")]),
        }
        return how[case.fault]()

    @staticmethod
    def killed(first: Running) -> Done:
        """SIGKILL."""
        send(signal.SIGKILL, first.pid)
        return Done("killed", [])

    def stopped(self, case: Case, folder: Path, first: Running) -> Done:
        """SIGSTOP until its claims are void; another driver takes over; SIGCONT while that works."""
        send(signal.SIGSTOP, first.pid)
        time.sleep(PAUSE)
        second = self.start(folder, "2")
        time.sleep(case.draw.random() * 2)
        send(signal.SIGCONT, first.pid)
        return Done(f"stopped for {PAUSE:g} s and more", [second])


def full_disk(run: Path) -> Done:
    """Fill the file system of the run folder, until the command has ended."""
    ballast = run / ".tmp-ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return Done("no byte is left on the disk", [], lambda: ballast.unlink(missing_ok=True))


def file_size_limit(case: Case, pids: list[int]) -> Done:
    """A limit on the size of files makes the kernel refuse writes beyond it, as a full disk does, in this process alone."""
    size = case.draw.choice((6_000, 10_000, 20_000))  # its output is a file too, of 4 KB
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))
    return Done(f"no file may grow beyond {size} bytes", [])


def read_only(run: Path) -> Done:
    """No folder of the run may be written to."""
    folders = [run, *(path for path in run.rglob("*") if path.is_dir() and not path.is_symlink())]
    if not run.exists():
        folders = [run.parent]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            folder.chmod(0o555)

    def undo() -> None:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError):
                folder.chmod(0o755)

    return Done("its folders are read-only", [], undo)


def clock_jump(case: Case) -> Done:
    """Python's wall clock jumps; in half of the cases it stays so for the command that continues."""
    hours = case.draw.choice((-24 * 400, -24, -1, 1, 24, 24 * 400))
    stays = case.draw.random() < 0.5
    CLOCK.set(3600.0 * hours)
    back = case.draw.random() * 1.5
    if not stays:
        time.sleep(back)
        CLOCK.set(0.0)
    text = "as long as the command runs" if stays else f"for {back:.1f} s"
    return Done(f"the clock is {hours} hours off, {text}", [], lambda: CLOCK.set(0.0))


def times_moved(case: Case, run: Path) -> Done:
    """The times of all files jump, as those of a file server with another clock."""
    hours = case.draw.choice((-24 * 400, -24, -1, 1, 24, 24 * 400))
    for path in run.rglob("*"):
        with contextlib.suppress(OSError):
            now = path.stat().st_mtime + 3600 * hours
            os.utime(path, (now, now))
    return Done(f"all files are {hours} hours off", [])


class Group(Process):
    """Two users of a group with umask 002: the first command is one's, all others are the other's."""

    umask = GROUP_UMASK
    group, one, other = 54_321, 54_322, 54_323  # ids that nobody has

    def start(self, folder: Path, tag: str) -> Forked:
        """What is root's, as a copy of an earlier run is, becomes the first user's."""
        for path in (folder, folder / "job.yaml", folder / "run", *(folder / "run").rglob("*")):
            if path.exists() and path.stat().st_uid == 0:
                os.chown(path, self.one, self.group)
                path.chmod(0o2775 if path.is_dir() else 0o664)
        user = self.one if tag == "1" else self.other

        def become() -> None:
            prepare_fork()
            os.environ["HOME"] = str(folder)
            os.umask(self.umask)
            os.setgroups([self.group])
            os.setgid(self.group)
            os.setuid(user)

        return campaign.start(self.command, folder, (f"{tag}.out", f"{tag}.err"), become)


# -------------------------------------------------------------------------------------------------------------------- ranks


class TwoRanks(Process):
    """The same with ``--ranks 2``, from trained experts on."""

    def __init__(self) -> None:
        super().__init__()
        self.command = [*self.command, "--ranks", "2"]
        self.stages = ("distill", "evaluate")

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """A rank is a grandchild of the command, in between is the launcher's watchdog, if any."""
        ranks = children(first.pid)
        if case.fault == "rank killed" and ranks:
            send(signal.SIGKILL, case.draw.choice(ranks))
            return Done("a rank killed", [])
        if case.fault == "rank stopped" and ranks:
            rank = case.draw.choice(ranks)
            send(signal.SIGSTOP, rank)
            time.sleep(PAUSE)
            send(signal.SIGCONT, rank)
            return Done(f"a rank stopped for {PAUSE:g} s", [])
        if case.fault in ("rank killed", "rank stopped"):
            return self.killed(first)  # between two launches
        done = super().do(case, folder, first)
        if case.fault == "killed":
            time.sleep(0.2)
        return done


# -------------------------------------------------------------------------------------------------------------- an S3 server


class Store(Process):
    """The same with ``--buffers s3://...``; a run that was copied would name the other's buffer."""

    continues = False

    def __init__(self, folder: Path, proxy: int) -> None:
        super().__init__()
        self.folder, self.proxy = folder, proxy
        self.stages = STAGES_OF["store"]
        self.state("well")

    def state(self, text: str) -> None:
        """What the proxy does from now on."""
        (self.folder / "state.new").write_text(text)
        os.replace(self.folder / "state.new", self.folder / "state")

    def prepare(self, folder: Path, case: Case | None) -> None:
        """A bucket folder of its own for each case, which survives in the server only."""
        name = "undisturbed" if case is None else case.name
        uri = f"s3://bucket/{name}?endpoint_override=127.0.0.1:{self.proxy}&scheme=http"
        self.command = ["run", "job.yaml", "--out", "run", "--fleet", "off", *HERE, "--buffers", uri]

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """The store is ill for some seconds, or until the command has ended."""
        how = {"slow store": "slow", "failing store": "error", "store away": "away"}
        if case.fault not in how:
            return super().do(case, folder, first)
        self.state(how[case.fault])
        lasts = case.draw.random() < 0.3 and case.fault != "slow store"
        if not lasts:
            until = time.monotonic() + OUTAGE
            while time.monotonic() < until and not first.ended():
                time.sleep(0.05)
            self.state("well")
        text = "until the command has ended" if lasts else f"for {OUTAGE:g} s"
        return Done(f"the store is {how[case.fault]} {text}", [], lambda: self.state("well"))


@contextmanager
def object_store(folder: Path) -> Iterator[Store]:
    """moto's server and the proxy before it, both on the loopback address."""
    from ray_nodes import free_port, wait_until

    if importlib.util.find_spec("moto") is None:
        raise SystemExit("moto[server] is not installed: --store 0 leaves these cases out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    server, proxy = free_port(), free_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
    os.environ.update(keys)
    commands = [
        ["-m", "moto.server", "-H", "127.0.0.1", "-p", str(server)],
        [str(ROOT / "tests" / "campaign" / "ill_store.py"), str(proxy), str(server), str(folder / "state")],
    ]
    started = [
        subprocess.Popen([sys.executable, *each], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        for each in commands
    ]
    try:
        from lad_dist.experts.cluster import listens

        wait_until(lambda: all(listens(f"127.0.0.1:{port}") for port in (server, proxy)), 120, "the S3 server")
        make = f"from pyarrow import fs; fs.S3FileSystem(endpoint_override='127.0.0.1:{server}', scheme='http', "
        make += "region='us-east-1', allow_bucket_creation=True).create_dir('bucket')"
        subprocess.run([sys.executable, "-c", make], check=True, timeout=120)  # not here: it would start threads
        yield Store(folder, proxy)
    finally:
        for process in started:
            process.terminate()
            process.wait(10)


# ------------------------------------------------------------------------------------------------------------ fresh processes


class Fresh:
    """``lad-dist`` as a process and session of its own."""

    def __init__(self, command: list[str], folder: Path, tag: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "160"}
        self.began, self.out, self.err = time.monotonic(), folder / f"{tag}.out", folder / f"{tag}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lad_dist.cli", *command], cwd=folder, env=environment, stdout=out, stderr=err,
                start_new_session=True, umask=GROUP_UMASK,
            )  # fmt: skip
        self.pid = self._process.pid

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def outcome(self, limit: float) -> Outcome:
        """What it did; everything of its session is gone afterwards."""
        from ray_nodes import kill_session

        code: int | None
        try:
            code = self._process.wait(max(0.1, limit - (time.monotonic() - self.began)))
        except subprocess.TimeoutExpired:
            code = None
        if code is None or code < 0:
            kill_session(self.pid)
            self._process.wait()
        out, err = self.out.read_text(errors="replace"), self.err.read_text(errors="replace")
        return Outcome(code, out, err, round(time.monotonic() - self.began, 2))


class Fleet(Process):
    """Experts by actors of a private Ray cluster."""

    umask = GROUP_UMASK

    def __init__(self) -> None:
        super().__init__()
        self.command = ["run", "job.yaml", "--out", "run", "--on", "fleet.yaml"]
        self.stages = STAGES_OF["fleet"]

    def prepare(self, folder: Path, case: Case | None) -> None:
        """No dashboard, which takes long to start."""
        ray = {"dashboard": False, "object_store_mb": 80}
        profile = {"name": "fleet", "fleet": "on", "threads": 2, "device": "cpu", "ray": ray}
        (folder / "fleet.yaml").write_text(yaml.safe_dump(profile))

    def start(self, folder: Path, tag: str) -> Running:  # type: ignore[override]
        """A fresh process: Ray's do not survive a fork."""
        return Fresh(self.command, folder, tag)

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """Processes of the cluster, by what they are."""
        from ray_nodes import session

        members = session(first.pid)
        actors = [pid for pid, name in members.items() if name.startswith("ray::")]
        raylets = [pid for pid, name in members.items() if "raylet/raylet" in name.split(" ")[0]]
        if case.fault == "actor killed" and actors:
            send(signal.SIGKILL, case.draw.choice(actors))
            return Done("an actor killed", [])
        if case.fault == "actor stopped" and actors:
            actor = case.draw.choice(actors)
            send(signal.SIGSTOP, actor)
            time.sleep(LONG_PAUSE)
            send(signal.SIGCONT, actor)
            return Done(f"an actor stopped for {LONG_PAUSE:g} s", [])
        if case.fault == "node lost" and raylets:
            send(signal.SIGKILL, *raylets)
            return Done("the raylet killed", [])
        if case.fault == "two drivers":
            return super().do(case, folder, first)
        return self.killed(first)


class Slurm(Process):
    """A chain of jobs on two virtual nodes."""

    umask = GROUP_UMASK

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.command = folder, ["run", "job.yaml", "--out", "run", "--on", "slurm.yaml", "--wait"]
        self.stages = STAGES_OF["slurm"]

    def prepare(self, folder: Path, case: Case | None) -> None:
        """The profile of the virtual nodes; an array of two jobs for the experts."""
        document = yaml.safe_load((ROOT / "cluster" / "dev-slurm.yaml").read_text())
        document["slurm"]["stages"] = {"evaluate": {"jobs": 1}, "experts": {"nodes": 2}}
        (folder / "slurm.yaml").write_text(yaml.safe_dump(document))

    def start(self, folder: Path, tag: str) -> Running:  # type: ignore[override]
        """A fresh process, as its jobs are."""
        return Fresh(self.command, folder, tag)

    def do(self, case: Case, folder: Path, first: Running) -> Done:
        """SLURM's daemons are started again at once, as an init system would."""
        if case.fault == "two drivers":
            return Done("a second driver", [self.start(folder, "2")])
        if case.fault == "driver killed":
            send(signal.SIGKILL, first.pid)
            return Done("the waiting driver killed", [])
        if case.fault == "job killed":
            send(signal.SIGKILL, *self.of_jobs(folder / "run"))
            return Done("all processes of its jobs killed", [])
        if case.fault == "task cancelled":
            jobs = json.loads((folder / "run" / "slurm" / "jobs.json").read_text())["submissions"][-1]["jobs"]
            (number,) = (job["id"] for job in jobs if job["stage"] == case.stage)
            task = f"{number}_1" if case.stage == "experts" else number
            subprocess.run(["scancel", task], check=True, timeout=60)
            return Done(f"scancel {case.stage}", [self.start(folder, "2")])
        if case.fault == "controller killed":
            return self.daemon("slurmctld", ["slurmctld"])
        node = case.draw.choice(("n1", "n2"))
        return self.daemon(f"slurmd.{node}", ["slurmd", "-N", node])

    def daemon(self, name: str, command: list[str]) -> Done:
        """Kill one of SLURM's daemons, start it again two seconds later."""
        pid = int((self.folder / "run" / f"{name}.pid").read_text())
        send(signal.SIGKILL, pid)
        time.sleep(2)
        path = f"{os.environ['PATH']}:/usr/sbin"
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True, timeout=60)
        return Done(f"{name} killed and started again", [])

    def of_jobs(self, run: Path) -> list[int]:
        """The processes that the run's jobs have started."""
        marks = {f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    variables = set((entry / "environ").read_bytes().split(b"\0"))
                    if marks <= variables and any(v.startswith(b"SLURM_JOB_ID=") for v in variables):
                        found.append(int(entry.name))
        return [pid for pid in found if b"slurmstepd" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@contextmanager
def virtual_nodes(folder: Path) -> Iterator[Slurm]:
    """The SLURM of cluster/dev-slurm, on free ports, in a folder with a short path."""
    dev, place = ROOT / "cluster" / "dev-slurm", Path(f"/tmp/ld-faults-{os.getpid()}")
    ports = {"DEV_SLURM_PORT": str(random.randrange(12_000, 30_000)),
             "DEV_SLURM_FIRST_JOB": str(random.randrange(10_000, 60_000))}  # fmt: skip
    subprocess.run([dev / "up", place], env={**os.environ, **ports}, check=True, capture_output=True, timeout=120)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(place / "slurm.conf")
    try:
        yield Slurm(place)
    finally:
        subprocess.run([dev / "down", place], check=False, capture_output=True, timeout=120)
        shutil.rmtree(place, ignore_errors=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


@contextmanager
def opened(name: str, out: Path) -> Iterator[Launch]:
    """The launch of a name, with what it needs running."""
    if name == "store":
        with object_store(out / "store") as store:
            yield store
    elif name == "slurm":
        with virtual_nodes(out / "slurm") as slurm:
            yield slurm
    else:
        if name == "group" and os.geteuid() != 0:
            raise SystemExit("only root can be two users: --group 0 leaves these cases out")
        yield {"process": Process, "group": Group, "ranks": TwoRanks, "fleet": Fleet}[name]()


def unmount(folder: Path) -> None:
    """The file system of a case of a full disk."""
    if os.path.ismount(folder / "run"):
        subprocess.run(["umount", "--lazy", str(folder / "run")], check=True)
