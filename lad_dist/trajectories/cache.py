"""Checkpoints of a buffer in bounded memory: the recently used ones stay decoded, the ones needed next are read ahead."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt

from lad_dist.errors import LadDistError
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage

Row = tuple[Stage, int, int]  # stage, expert, epoch
Vector = npt.NDArray[np.float32]
_OWN_PAGES = 2**16  # bytes from which a row has memory pages of its own
_CLOSE_SECONDS = 5.0  # that a read of the thread is waited for; a store that does not answer must not hold up the end


def _kept(vector: Vector) -> Vector:
    """A copy that cannot be written to, in memory that goes back to the system with the last reference to it.

    Rows that come and go by turns on the heaps of two threads leave holes there: a cache of 512 MiB took 780.
    """
    kept: Vector = vector
    if vector.nbytes >= _OWN_PAGES:
        kept = np.frombuffer(mmap.mmap(-1, vector.nbytes), vector.dtype)
        kept[:] = vector
    kept.flags.writeable = False
    return kept


class CheckpointCache:
    """Reads checkpoints of ``buffer``, each once as long as it is among the ``limit_bytes`` used last.

    Any number of threads may read; the same row wanted by several at a time is read once. ``prefetch`` reads in a thread
    of its own, which begins at its first call and ends with ``close``. Reading ahead never changes what a read returns or
    raises: a row that could not be read ahead is read again by whoever needs it, who then meets the error itself.
    """

    def __init__(self, buffer: Buffer, limit_bytes: int) -> None:
        self.buffer, self.limit_bytes = buffer, limit_bytes
        self._rows: OrderedDict[Row, Vector] = OrderedDict()
        self._bytes = 0
        self._reading: dict[Row, Future[Vector]] = {}
        self._lock = threading.Lock()  # of the three above; never held while a file is read
        self._wanted: list[Row] = []
        self._room = 0  # bytes that the thread may still read ahead
        self._work = threading.Condition()  # of the two above and the two below
        self._closed = False
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the weights that are kept at the moment; never more than ``limit_bytes``."""
        return self._bytes

    def read(self, stage: Stage, expert: int, epoch: int) -> Vector:
        """The weights of one checkpoint, as ``Buffer.read`` returns them; shared with later readers, so not writeable.

        Raises ``TrajectoryError`` as ``Buffer.read`` does, and what went wrong in the thread that is not a reading error.
        """
        if self._bug is not None:
            raise self._bug
        row = (stage, expert, epoch)
        while True:
            with self._lock:
                if row in self._rows:
                    self._rows.move_to_end(row)
                    return self._rows[row]
                reading = self._reading.get(row)
                if reading is None:
                    mine = self._reading[row] = Future()
            if reading is None:
                return self._read_now(row, mine)
            if reading.exception() is None:  # waits; an interruption of this thread is raised from here
                return reading.result()  # else the other reader's error: this one reads for itself

    def _read_now(self, row: Row, mine: Future[Vector]) -> Vector:
        """Read a row that this thread has announced in ``_reading``, keep it, and give it to those who wait for it."""
        try:
            vector = self.buffer.read(*row)
        except BaseException as error:
            with self._lock:
                del self._reading[row]
            # Who waits must not see this thread's interruption as its own.
            mine.set_exception(error if isinstance(error, LadDistError) else LadDistError("the read was given up"))
            raise
        vector = _kept(vector)
        with self._lock:
            del self._reading[row]
            if vector.nbytes <= self.limit_bytes:
                self._rows[row] = vector
                self._bytes += vector.nbytes
            while self._bytes > self.limit_bytes:
                self._bytes -= self._rows.popitem(last=False)[1].nbytes
        mine.set_result(vector)
        return vector

    # --- reading ahead ----------------------------------------------------------------------------------------------

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Read ``rows`` in the background, in this order, until half of the limit is used; returns at once.

        What an earlier call asked for and was not begun is forgotten. Raises what went wrong in the thread before, unless
        it was a reading error.
        """
        with self._work:
            if self._bug is not None:
                raise self._bug
            if self._closed:
                return
            self._wanted, self._room = list(dict.fromkeys(rows)), self.limit_bytes // 2
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-prefetch", daemon=True)
                self._thread.start()
            self._work.notify()

    def _run(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                row = self._wanted.pop(0)
            try:
                read = self.read(*row).nbytes  # which also keeps the rows that are there from being pushed out
                with self._work:
                    self._room -= read
                    if self._room <= 0:  # more would push out what was just read ahead
                        self._wanted = []
            except LadDistError:
                continue  # whoever needs the row reads it again and meets the error, if it is still there
            except BaseException as error:  # a bug: the next read or prefetch raises it
                self._bug = error
                return

    def close(self) -> None:
        """End the thread and forget what is kept. The thread's read in progress is waited for, a few seconds at most."""
        with self._work:
            self._closed, self._wanted = True, []
            self._work.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            self._rows.clear()
            self._bytes = 0
