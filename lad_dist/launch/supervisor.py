"""Process that SLURM starts on a node to run the actual Python: ``python -m lad_dist.launch.supervisor ARGUMENTS``.

It starts ``python ARGUMENTS`` as its child, waits for it, and then ends every process that the child left behind,
however the child ended: a killed driver cannot stop its Ray. Orphans of a dead child become the supervisor's own
(Linux: PR_SET_CHILD_SUBREAPER), however far they have detached themselves; processes that others started never do.

The warning signal, SIGUSR2, is blocked here and so in every process below from its first instruction on: SLURM sends
it to all processes of a job step, most of which it would kill. Its receiver takes it with ``sigwait`` (``job.py``).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

WARNING = signal.SIGUSR2
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_END_SECONDS = 1.5  # between SIGTERM and SIGKILL to what was left behind


def main(arguments: list[str]) -> int:
    """Run ``python ARGUMENTS``; return its exit code, or 128 + the signal that ended it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [WARNING])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        signal.signal(number, lambda *_: None)  # SLURM sends them to the child as well; wait for its end
    adopt_orphans()
    child = subprocess.Popen([sys.executable, *arguments])  # noqa: S603 - this interpreter
    try:
        code = child.wait()
    finally:
        end_descendants()
        shutil.rmtree(private_folder(os.environ), ignore_errors=True)
    return 128 - code if code < 0 else code


def private_folder(environment: Mapping[str, str]) -> Path:
    """Return this task's folder for sockets and temporary files; short, as a socket's path has 107 bytes at most."""
    user = environment.get("USER") or str(os.getuid())
    task = f"{environment.get('SLURM_JOB_ID', os.getpid())}-{environment.get('SLURM_PROCID', 0)}"
    return Path(f"/tmp/r-{user[:12]}-{task}")  # noqa: S108 - /tmp is short, and local to the node


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies. Do nothing if the system does not support it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants() -> None:
    """End all processes below this one, by SIGTERM, then by SIGKILL. Return when none is left."""
    until = time.monotonic() + _END_SECONDS
    asked: set[int] = set()
    while left := descendants(os.getpid()):
        forced = time.monotonic() > until
        for pid in left - asked if not forced else left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if forced else signal.SIGTERM)
        asked |= left
        _reap()
        time.sleep(0.05)


def descendants(pid: int) -> set[int]:
    """Return the living processes below ``pid``, by their parents in /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError, ValueError):
                # pid (name) state ppid ...; the name may hold spaces and parentheses
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state != "Z" or int(parent) == os.getpid():  # a zombie of ours is still to be reaped
                    children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = [child for child in children.get(waiting.pop(), []) if child not in found]
        found.update(below)
        waiting += below
    return found


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
