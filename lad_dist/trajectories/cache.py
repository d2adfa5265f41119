"""LRU cache of decoded checkpoints in bounded memory, with prefetching of those needed next."""

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
_OWN_PAGES = 2**16  # bytes; rows at least this large get memory pages of their own
_CLOSE_SECONDS = 5.0  # longest wait for the thread's read: a store that does not answer must not block the exit


def _kept(vector: Vector) -> Vector:
    """Return a read-only copy whose memory returns to the system with its last reference.

    Rows allocated and freed alternately on the heaps of two threads fragment them: a cache of 512 MiB took 780.
    """
    kept: Vector = vector
    if vector.nbytes >= _OWN_PAGES:
        kept = np.frombuffer(mmap.mmap(-1, vector.nbytes), vector.dtype)
        kept[:] = vector
    kept.flags.writeable = False
    return kept


class CheckpointCache:
    """LRU cache of ``limit_bytes`` for checkpoints of ``buffer``.

    Any number of threads may read; concurrent reads of one row share one file access. ``prefetch`` reads in a separate
    thread, started at its first call and ended by ``close``. Prefetching never changes what a read returns or raises: a
    row whose prefetch failed is read again by its caller, who gets the error.
    """

    def __init__(self, buffer: Buffer, limit_bytes: int) -> None:
        self.buffer, self.limit_bytes = buffer, limit_bytes
        self._rows: OrderedDict[Row, Vector] = OrderedDict()
        self._bytes = 0
        self._reading: dict[Row, Future[Vector]] = {}
        self._lock = threading.Lock()  # guards the three above; never held while a file is read
        self._wanted: list[Row] = []
        self._room = 0  # bytes that the thread may still prefetch
        self._work = threading.Condition()  # guards the two above and the two below
        self._closed = False
        self._bug: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the cached weights; never more than ``limit_bytes``."""
        return self._bytes

    def read(self, stage: Stage, expert: int, epoch: int) -> Vector:
        """Return the weights of one checkpoint as ``Buffer.read`` does, but read-only, since readers share them.

        Raises ``TrajectoryError`` as ``Buffer.read`` does, and any error of the prefetch thread that is not a read
        error.
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
                return reading.result()  # after another reader's error, this one reads the row itself

    def _read_now(self, row: Row, mine: Future[Vector]) -> Vector:
        """Read a row registered in ``_reading`` by this thread, cache it, and pass it to the waiting threads."""
        try:
            vector = self.buffer.read(*row)
        except BaseException as error:
            with self._lock:
                del self._reading[row]
            # Waiting threads must not see this thread's interruption as their own.
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

    # --- prefetching ------------------------------------------------------------------------------------------------

    def prefetch(self, rows: Iterable[Row]) -> None:
        """Read ``rows`` in the background, in this order, up to half of the limit; return at once.

        Drops pending rows of earlier calls. Raises an earlier error of the thread, unless it was a read error.
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
                read = self.read(*row).nbytes  # also marks cached rows as recently used, so they are not evicted
                with self._work:
                    self._room -= read
                    if self._room <= 0:  # more would evict what was just prefetched
                        self._wanted = []
            except LadDistError:
                continue  # the caller that needs the row reads it again and gets the error, if it persists
            except BaseException as error:  # a bug: raised by the next read or prefetch
                self._bug = error
                return

    def close(self) -> None:
        """Stop the thread, waiting a few seconds at most for its current read, and clear the cache."""
        with self._work:
            self._closed, self._wanted = True, []
            self._work.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)
        with self._lock:
            self._rows.clear()
            self._bytes = 0
