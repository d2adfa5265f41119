"""The experts stage as a process of its own, beside a distillation that begins before it ends (``buffer.start_after``).

The process is ``lad-dist experts RUN`` with this one's profile: it has its own interpreter, its own GPU context and, where
there is one, its own fleet. The two meet in the buffer, as they would on two machines.
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

_STOP_SECONDS = 8.0  # that the process, and its fleet, have to publish and end when this one ends
_GROUP_SECONDS = 2.0  # within which a Ctrl-C that the whole group was sent has reached this process too
_READ_SECONDS = 2.0  # that the end of its output is waited for, which a process of its own may hold open
_INTERRUPTED = (Interrupted.exit_code, -signal.SIGINT, -signal.SIGTERM)


class ExpertsProcess:
    """``lad-dist experts`` at work. Made by ``in_background``."""

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
        self._message: list[str] = []  # from its ``error: ...`` on
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
        """Its process id."""
        return self._process.pid

    def error(self) -> LadDistError | None:
        """How it failed, with its own message and of its own type where it said one; None if it did not, or is at work."""
        code = self._process.returncode
        if not self.ended.is_set() or code == 0:
            return None
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        text = "\n".join(self._message).removeprefix("error: ").strip()
        kinds = {kind.exit_code: kind for kind in _below(LadDistError)}
        if code in kinds and text:
            return kinds[code](f"the process that trains the experts {how}: {text}")
        return (Interrupted if code in _INTERRUPTED else ExpertError)(
            f"the process that trains the experts {how}; what is published is kept, and the same command continues"
        )

    def ask_to_end(self) -> None:
        """End it as Ctrl-C would, without waiting; it may have had that Ctrl-C already, and does not mind."""
        if not self._asked_to_end.is_set() and self._process.poll() is None:
            self._process.terminate()
        self._asked_to_end.set()

    def wait(self) -> None:
        """Until it has ended; how, ``error`` knows. Failing does not interrupt the main thread any more."""
        self._awaited.set()
        self._watcher.join()

    def stop(self) -> None:
        """End it, by force if it does not end in time."""
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
        """Keep the error that it ends with, to be shown once; whatever else it complains of is shown at once."""
        with output:
            for line in output:
                if self._message or line.startswith("error: "):
                    self._message.append(line.rstrip())
                else:
                    self._say(line.rstrip())

    def _watch(self) -> None:
        """When it fails, interrupt the main thread, wherever it is: in the loop, or waiting for ranks or for experts."""
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
    """Train the experts of the run folder ``run`` while the block runs, and wait for the rest of them at its end.

    ``say`` is given every line that the process prints, from a thread. However the block ends, the process has ended too,
    within 10 s. Main thread only: a process that fails interrupts the block.

    Raises:
        LadDistError: the process failed; in place of what the block raised when it was interrupted for that.
        Interrupted: asked to stop.
    """
    with tempfile.TemporaryDirectory(prefix="lad-dist-") as folder, as_exceptions():
        file = Path(folder) / "profile.yaml"
        here = profile.model_copy(update={"buffers": None, "log": ()})  # the run folder knows its buffer
        file.write_text(recipe_file.dump(here), encoding="utf-8")
        process = ExpertsProcess(run, file, say)
        _forward_interruptions(process)
        try:
            yield process
            if not process.ended.is_set():
                say("experts: the rest of them are still in training")
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
    """Until the handlers are replaced: a signal that stops this process stops ``process`` at once, so that both save at a time.

    Where ranks distill, their launcher has handlers of its own, and ``process`` is told when they have ended. No signal
    reaches another thread than the main one.
    """
    if not in_main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        stop = signal.getsignal(number)
        assert callable(stop), "as_exceptions has just set it"

        def both(number: int, frame: FrameType | None, stop: Callable[..., Any] = stop) -> None:
            if not process.ended.is_set():  # else it has failed, and this is how the main thread is told
                process.ask_to_end()
            stop(number, frame)

        signal.signal(number, both)


def _below(kind: type[LadDistError]) -> Iterator[type[LadDistError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)
