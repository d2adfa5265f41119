"""Scheduling of experts: which are left, whether a fleet or this process trains them, and reports. Does not import Ray.

choose       fleet or this process, and why
ExpertQueue  the remaining experts; those that another driver is training come last
ExpertLog    events, progress board, and failed experts
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lad_dist import cores, errors, extras
from lad_dist.errors import ExpertError, LadDistError
from lad_dist.profile import Profile
from lad_dist.progress import Board, Events, Screen
from lad_dist.recipe import ExpertsConfig
from lad_dist.trajectories import claims

if TYPE_CHECKING:
    from lad_dist.experts.train import Epoch, ExpertTrainer

LOOK_AGAIN_SECONDS = 2.0  # between two checks of the experts that other drivers are training


def name_of(expert: int) -> str:
    """Return ``expert-0007``: an expert's name in claims, on the board, and on Ray's dashboard."""
    return f"expert-{expert:04d}"


# Choice of a fleet


class Choice(NamedTuple):
    """Whether a fleet trains, and the reason in words."""

    fleet: bool
    why: str


def choose(profile: Profile, on_gpu: bool, left: int) -> Choice:
    """Choose who trains ``left`` experts: a fleet of actors, or this process. Inspects only this machine."""
    if profile.fleet != "auto":
        return Choice(profile.fleet == "on", f"fleet is {profile.fleet}")
    if left < 2:
        return Choice(False, "one expert is left")
    if not extras.installed("ray"):
        return Choice(False, "Ray is not installed (pip install 'lad-dist[ray]')")
    address = cluster_address(profile)
    if address is not None:
        return Choice(True, f"the Ray cluster at {address} is named")
    if on_gpu:
        gpus = gpu_count()
        fit, has = gpus * profile.experts_per_gpu, f"{_many(gpus, 'GPU')}, {profile.experts_per_gpu} per GPU"
    else:
        usable = cores_to_use(profile)
        fit, has = (
            usable // profile.threads_per_expert,
            f"{_many(usable, 'core')}, {profile.threads_per_expert} per expert",
        )
    if fit < 2:
        return Choice(False, f"no two experts fit ({has})")
    return Choice(True, f"{min(fit, left)} experts at a time fit ({has})")


def cluster_address(profile: Profile) -> str | None:
    """Return the address of the running Ray cluster that the profile or RAY_ADDRESS names; None: a private cluster."""
    return profile.ray.address or os.environ.get("RAY_ADDRESS") or None


def cores_to_use(profile: Profile) -> int:
    """Return the usable CPU cores: ``threads`` of the profile, else those available to this process."""
    return cores.available() if profile.threads is None else profile.threads


def gpu_count() -> int:
    """Return the number of CUDA GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


# Remaining experts


class ExpertQueue:
    """The remaining experts, in order. ``owner`` is this driver's name in claims."""

    def __init__(self, trainer: ExpertTrainer, experts: Iterable[int]) -> None:
        self.owner = claims.owner_id()
        self.location = trainer.folder
        self._trainer, self._waiting = trainer, deque(experts)
        self._claimed: dict[int, str] = {}
        self._look_at, self._said = 0.0, ""

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, record: ExpertLog) -> int | None:
        """Return the next expert that is neither finished nor claimed by another driver; None if there is none yet.

        Experts that other drivers have finished are dropped, and recorded in ``record``. Experts that others are
        training are checked every ``LOOK_AGAIN_SECONDS``. Raises TrajectoryError and StorageError.
        """
        if not self._waiting or time.monotonic() < self._look_at:
            return None
        left = self._trainer.left(self._waiting)
        self._claimed.clear()
        for _ in range(len(self._waiting)):
            expert = self._waiting.popleft()
            if not left[expert]:
                record.finished(expert, elsewhere=True)
                continue
            other = claims.foreign(self.location, name_of(expert), self.owner)
            if other is None:
                return expert
            self._claimed[expert] = str(other)
            self._waiting.append(expert)
        self._look_at = time.monotonic() + LOOK_AGAIN_SECONDS
        return None

    def put_back(self, expert: int) -> None:
        """Append an expert that another driver claimed first to the end of the queue."""
        self._waiting.append(expert)

    def again(self, expert: int) -> None:
        """Put a failed expert at the front of the queue, to be retried next."""
        self._waiting.appendleft(expert)

    def say_waiting(self, screen: Screen) -> None:
        """Report which claimed experts the queue is waiting for, once per set of experts."""
        who = "; ".join(f"expert {expert} by {other}" for expert, other in sorted(self._claimed.items()))
        if who and who != self._said:
            self._said = who
            screen.say(f"experts: waiting for those that another driver is training ({who})")


# Reports


class Process(NamedTuple):
    """An actor's process."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Failure:
    """A failed attempt at an expert: ``kind`` is the name of its type in ``errors.py``, None for any other.

    ``message`` is one line or paragraph for users; ``trace`` the traceback. ``lasting``: the buffer rejects all writes
    until somebody intervenes, so no expert can continue.
    """

    expert: int
    message: str
    kind: str | None = None
    trace: str | None = None
    lasting: bool = False

    def error(self) -> LadDistError:
        """Return an error of its kind."""
        error: LadDistError = getattr(errors, self.kind or "", ExpertError)(self.message)
        return error


class ExpertLog:
    """Report what happens to the experts, and track their progress.

    Args:
        left: epochs still to be trained, for every expert of the recipe.
    """

    def __init__(self, experts: ExpertsConfig, left: Mapping[int, int], events: Events, screen: Screen) -> None:
        self.failures: list[Failure] = []
        self.images_per_second: dict[int, float] = {}  # of the experts being trained
        self._experts, self._events, self._screen = experts, events, screen
        self._each = experts.epochs + experts.classifier_epochs
        self._trained = {expert: self._each - epochs for expert, epochs in left.items()}
        self._board: Board | None = None

    @property
    def total_epochs(self) -> int:
        """Epochs of all experts, both stages."""
        return self._each * len(self._trained)

    @property
    def epochs_trained(self) -> int:
        """Completed epochs, whoever trained them."""
        return sum(self._trained.values())

    def trained(self, expert: int) -> int:
        """Return the completed epochs of an expert, as known to this driver."""
        return self._trained[expert]

    @property
    def experts_done(self) -> int:
        """Finished experts, whoever trained them."""
        return sum(epochs == self._each for epochs in self._trained.values())

    @property
    def experts_total(self) -> int:
        return len(self._trained)

    def show_on(self, board: Board) -> None:
        """Show progress on ``board`` from now on."""
        self._board = board

    def starting(self, expert: int) -> None:
        """Record that an actor for the expert is being started."""
        self._row(expert, "starting")

    def started(self, expert: int, by: Process | None = None) -> None:
        """Record that a process has begun to train the expert: ``by``, or this process."""
        self._events.emit("expert-started", expert=expert, **(by._asdict() if by else {}))
        self._row(expert, "begins")

    def epoch(self, epoch: Epoch, by: Process | None = None) -> None:
        """Record a trained epoch."""
        self._events.emit("expert-epoch", **vars(epoch), **(by._asdict() if by else {}))
        e, first = self._experts, epoch.stage == "representation"
        self._reached(epoch.expert, epoch.epoch if first else e.epochs + epoch.epoch)
        self.images_per_second[epoch.expert] = epoch.images_per_second
        self._row(epoch.expert, in_words(epoch, e))

    def finished(self, expert: int, elsewhere: bool = False) -> None:
        """Record that all epochs of the expert are in the buffer; ``elsewhere``: another driver trained them."""
        self._events.emit("expert-finished", expert=expert, **({"elsewhere": True} if elsewhere else {}))
        self._reached(expert, self._each)
        self.stopped(expert)

    def restarted(self, failure: Failure, attempt: int, retries: int) -> None:
        """Record the ``attempt``-th retry of an expert, from its last part."""
        expert, reason = failure.expert, failure.message
        self._events.emit("expert-restarted", expert=expert, attempt=attempt, error=reason)
        self._screen.say(f"{name_of(expert)}: {reason}; retried from its last part ({attempt} of {retries})")
        self.stopped(expert)

    def failed(self, failure: Failure, attempts: int) -> None:
        """Record that an expert is given up, and show its trace; the caller must raise a lasting failure."""
        self._events.emit("expert-failed", expert=failure.expert, attempts=attempts, error=failure.message)
        if not failure.lasting:
            self.failures.append(failure)
            self._screen.say(f"{name_of(failure.expert)}: failed {_times(attempts)}; the last time:")
            self._screen.say((failure.trace or failure.message).rstrip())
        self.stopped(failure.expert)

    def stopped(self, expert: int) -> None:
        """Record that the expert is not being trained at the moment."""
        self.images_per_second.pop(expert, None)
        self._row(expert, None)

    def error(self, attempts: int) -> LadDistError | None:
        """Return the stage's error: None without failures, else of the kind that all failures share, or ExpertError."""
        if not self.failures:
            return None
        kinds = {failure.kind for failure in self.failures}
        kind = getattr(errors, next(iter(kinds)) or "", ExpertError) if len(kinds) == 1 else ExpertError
        why = "; ".join(f"expert {f.expert}: {f.message}" for f in sorted(self.failures, key=lambda f: f.expert))
        others = "the other experts are finished, and" if self.experts_done else "finished work is kept, and"
        error: LadDistError = kind(
            f"{_many(len(self.failures), 'expert')} failed {_times(attempts)}: {why}; {others} the same command continues"
        )
        return error

    def _reached(self, expert: int, epochs: int) -> None:
        """Count an expert's new epochs; epochs repeated after a restart count once."""
        more = epochs - self._trained[expert]
        if more > 0:
            self._trained[expert] = epochs
            if self._board is not None:
                self._board.advance(more)

    def _row(self, expert: int, text: str | None) -> None:
        if self._board is not None:
            self._board.row(name_of(expert), text)


def in_words(epoch: Epoch, experts: ExpertsConfig) -> str:
    """``representation epoch 31 of 100, loss 0.2345, accuracy 0.912, 812 images/s``."""
    return (
        f"{epoch.stage} epoch {epoch.epoch} of {experts.last_epochs[epoch.stage]}, loss {epoch.loss:.4g}, "
        f"accuracy {epoch.accuracy:.3f}, {epoch.images_per_second:.0f} images/s"
    )


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"{attempts} times"


# Training in this process


def train_here(trainer: ExpertTrainer, queue: ExpertQueue, record: ExpertLog, screen: Screen) -> None:
    """Train the remaining experts one by one in this process. Raises what ``ExpertTrainer.train`` raises."""
    while len(queue):
        expert = queue.take(record)
        if expert is None:
            if len(queue):
                queue.say_waiting(screen)
                time.sleep(LOOK_AGAIN_SECONDS)
            continue
        with claims.hold(queue.location, name_of(expert), queue.owner) as held:
            if not held:
                queue.put_back(expert)
                continue
            record.started(expert)
            with closing(trainer.train(expert)) as epochs:
                for epoch in epochs:
                    record.epoch(epoch)
        record.finished(expert)
