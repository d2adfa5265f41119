"""The experts complete so far, while others are still being trained (``buffer.start_after``)."""

from __future__ import annotations

import threading
import time

from lad_dist.errors import Interrupted, TrajectoryError
from lad_dist.interrupts import StopFlag
from lad_dist.progress import Events, Screen
from lad_dist.ranks import ALONE, Ranks
from lad_dist.recipe import Recipe
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import Stage

REFRESH_SECONDS = 2.0  # between two listings of the buffer
_WAIT_SECONDS = 1.0
_VISIBLE_SECONDS = 60.0  # allowed delay of a network file system between two hosts' views


class LiveExperts:
    """The complete experts of a buffer that is still being filled. All ranks use rank 0's view.

    Rank 0 lists the buffer in a thread, every ``REFRESH_SECONDS`` until all experts are complete or ``close`` is
    called.
    """

    def __init__(self, buffer: Buffer, recipe: Recipe, ranks: Ranks = ALONE, flag: StopFlag | None = None) -> None:
        self._buffer, self._recipe, self._ranks, self._flag = buffer, recipe, ranks, flag or StopFlag()
        self._stages: dict[Stage, int] = {"representation": recipe.experts.epochs, **dict([recipe.labelling])}
        self._agreed: tuple[int, ...] = ()
        self._seen = self._look()
        self._fault: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def wait(self, screen: Screen, events: Events) -> None:
        """Wait until ``buffer.start_after`` experts are complete. All ranks call it.

        Raises:
            TrajectoryError: the buffer cannot be listed.
            Interrupted: a stop was requested.
        """
        wanted, told = self._recipe.buffer.start_after, None
        assert wanted is not None
        if self._ranks.first and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="live-buffer", daemon=True)
            self._thread.start()
        while True:
            views = self._ranks.gather((self._flag.name, self._first_view()))
            stopped = next((name for name, _ in views if name is not None), None)
            if stopped is not None:
                raise Interrupted(f"interrupted by {stopped}; finished work is kept, and the same command continues")
            found = len(views[0][1])
            if found >= wanted:
                return
            if found != told:
                told = found
                screen.say(
                    f"distill: waiting for experts: {found} of the first {wanted} complete in {self._buffer.folder}"
                )
                events.emit("distill-waiting", complete=found, wanted=wanted)
            time.sleep(_WAIT_SECONDS)

    def now(self) -> tuple[int, ...]:
        """Return the experts to draw from, ascending and equal on every rank. All ranks call it; it does not list.

        Raises TrajectoryError if the buffer can no longer be listed, or this host does not see what rank 0 sees.
        """
        if len(self._agreed) < self._recipe.experts.count:
            agreed = self._ranks.share(self._first_view())
            if agreed != self._agreed and not self._ranks.first:
                self._await(agreed)
            self._agreed = agreed
        return self._agreed

    def close(self) -> None:
        """Stop the thread; wait up to 5 s for a listing in progress."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def _first_view(self) -> tuple[int, ...]:
        """Return the last view of rank 0's thread; meaningless on other ranks."""
        if self._fault is not None:
            raise self._fault
        return self._seen

    def _look(self) -> tuple[int, ...]:
        return self._buffer.complete(self._stages, range(self._recipe.experts.count))

    def _watch(self) -> None:
        try:
            while len(self._seen) < self._recipe.experts.count and not self._stop.wait(REFRESH_SECONDS):
                self._buffer.refresh()
                self._seen = self._look()
        except BaseException as fault:  # re-raised at the next call of ``_first_view``
            self._fault = fault

    def _await(self, agreed: tuple[int, ...]) -> None:
        until = time.monotonic() + _VISIBLE_SECONDS
        while missing := sorted(set(agreed) - set(self._look())):
            if time.monotonic() > until:
                raise TrajectoryError(
                    f"{self._buffer.folder}: rank {self._ranks.rank} does not see expert {missing[0]}, which rank 0 sees "
                    f"complete, after {_VISIBLE_SECONDS:.0f} s; valid: a buffer that all hosts share"
                )
            time.sleep(0.2)
            self._buffer.refresh()
