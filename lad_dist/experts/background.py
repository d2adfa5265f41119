"""The experts stage as a separate process, beside a distillation that starts before it ends (``buffer.start_after``).

The process is ``lad-dist experts RUN`` with this process's profile: it has its own interpreter, GPU context and, if
configured, fleet. The two communicate only through the buffer, as on two machines.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from lad_dist import recipe_file
from lad_dist.errors import ExpertError, Interrupted, LadDistError
from lad_dist.interrupts import as_exceptions, in_main_thread
from lad_dist.profile import Profile

_STOP_SECONDS = 8.0  # for the process and its fleet to publish and end when this process ends
_GROUP_SECONDS = 2.0  # within which a Ctrl-C sent to the whole process group has reached this process too
_READ_SECONDS = 2.0  # wait for the end of its output, which one of its children may hold open
_INTERRUPTED = (Interrupted.exit_code, -signal.SIGINT, -signal.SIGTERM)


class ExpertsProcess:
    """A running ``lad-dist experts``. Created by ``in_background``."""

    def __init__(self, run: Path, profile_file: Path, say: Callable[[str], None]) -> None:
        command = [sys.executable, "-m", "lad_dist.cli", "experts", str(run.resolve()), "--on", str(profile_file)]
        self._say = say
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, this package
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._message: list[str] = []  # its lines from ``error: ...`` on
        self._asked_to_end, self._awaited = threading.Event(), threading.Event()
        self.ended = threading.Event()
        assert self._process.stdout is not None and self._process.stderr is not None
        readers = ((self._pass_on, self._process.stdout), (self._listen, self._process.stderr))
        self._readers = [threading.Thread(target=read, args=(file,), daemon=True) for read, file in readers]
        self._watcher = threading.Thread(target=self._watch, name="experts-process", daemon=True)
        for thread in (*self._readers, self._watcher):
            thread.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def error(self) -> LadDistError | None:
        """Return the process's error, with its printed message and type, if any; None on success or while it runs."""
        code = self._process.returncode
        if not self.ended.is_set() or code == 0:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        text = "\n".join(self._message).removeprefix("error: ").strip()
        kinds = {kind.exit_code: kind for kind in _below(LadDistError)}
        if code in kinds and text:
            return kinds[code](f"the process that trains the experts {how}: {text}")
        return (Interrupted if code in _INTERRUPTED else ExpertError)(
            f"the process that trains the experts {how}; published parts are kept, and the same command continues"
        )

    def ask_to_end(self) -> None:
        """Request termination like Ctrl-C, without waiting. Harmless if the process has already received a Ctrl-C."""
        if not self._asked_to_end.is_set() and self._process.poll() is None:
            self._process.terminate()
        self._asked_to_end.set()

    def wait(self) -> None:
        """Wait for its end; ``error`` returns the outcome. From now on a failure does not interrupt the main thread."""
        self._awaited.set()
        self._watcher.join()

    def stop(self) -> None:
        """Terminate the process, by force if it does not end in time."""
        self.ask_to_end()
        if self._process.poll() is None:
            try:
                self._process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._watcher.join(_READ_SECONDS)

    def _pass_on(self, output: IO[str]) -> None:
        with output:
            for line in output:
                self._say(line.rstrip())

    def _listen(self, output: IO[str]) -> None:
        """Keep the final error message, which is shown once; pass on all other lines immediately."""
        with output:
            for line in output:
                if self._message or line.startswith("error: "):
                    self._message.append(line.rstrip())
                else:
                    self._say(line.rstrip())

    def _watch(self) -> None:
        """On failure, interrupt the main thread, whether in the loop or waiting for ranks or experts."""
        code = self._process.wait()
        for reader in self._readers:
            reader.join(_READ_SECONDS)
        self.ended.set()
        if code == 0 or self._asked_to_end.wait(_GROUP_SECONDS if code in _INTERRUPTED else 0.0):
            return
        if not self._awaited.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def in_background(run: Path, profile: Profile, say: Callable[[str], None]) -> Iterator[ExpertsProcess]:
    """Train the experts of the run folder ``run`` while the block runs, and wait for the remaining ones at its end.

    ``say`` receives every line that the process prints, from a thread. However the block ends, the process ends too,
    within 10 s. Main thread only: a failing process interrupts the block.

    Raises:
        LadDistError: the process failed; replaces the error that the interruption caused in the block.
        Interrupted: a stop was requested.
    """
    with tempfile.TemporaryDirectory(prefix="lad-dist-") as folder, as_exceptions():
        file = Path(folder) / "profile.yaml"
        here = profile.model_copy(update={"buffers": None, "log": ()})  # the run folder records its buffer
        file.write_text(recipe_file.dump(here), encoding="utf-8")
        process = ExpertsProcess(run, file, say)
        _forward_interruptions(process)
        try:
            yield process
            if not process.ended.is_set():
                say("experts: the others are still in training")
            process.wait()
        except Interrupted:
            failed = process.error()
            if failed is None or isinstance(failed, Interrupted):
                raise
            raise failed from None
        finally:
            process.stop()
        failed = process.error()
        if failed is not None:
            raise failed


def _forward_interruptions(process: ExpertsProcess) -> None:
    """Forward a signal that stops this process to ``process`` at once, so that both save concurrently.

    Holds until the handlers are replaced: when ranks distill, their launcher installs its own, and ``process`` is
    stopped after they have ended. Only the main thread receives signals.
    """
    if not in_main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        stop = signal.getsignal(number)
        assert callable(stop), "as_exceptions has just set it"

        def both(number: int, frame: FrameType | None, stop: Callable[..., Any] = stop) -> None:
            if not process.ended.is_set():  # else it has failed, and this signal tells the main thread
                process.ask_to_end()
            stop(number, frame)

        signal.signal(number, both)


def _below(kind: type[LadDistError]) -> Iterator[type[LadDistError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)
