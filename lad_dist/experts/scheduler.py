"""Which experts are left, whether a fleet or this process trains them, and what is told about it. No Ray here.

choose       fleet or this process, and why
ExpertQueue  the experts that are left; those that another driver is training come last
ExpertLog    events for machines, a board for people, and the experts that failed
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

LOOK_AGAIN_SECONDS = 2.0  # between two looks at the experts that other drivers are training


def name_of(expert: int) -> str:
    """``expert-0007``: what an expert is called in claims, on the board, and on Ray's dashboard."""
    return f"expert-{expert:04d}"


# Fleet or not


class Choice(NamedTuple):
    """Whether a fleet trains, and the reason in words."""

    fleet: bool
    why: str


def choose(profile: Profile, on_gpu: bool, left: int) -> Choice:
    """Who trains ``left`` experts: a fleet of actors, or this process. Looks at nothing but this machine."""
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
    """The running Ray cluster that the profile or RAY_ADDRESS names; None: one of its own."""
    return profile.ray.address or os.environ.get("RAY_ADDRESS") or None


def cores_to_use(profile: Profile) -> int:
    """CPU cores that may be used: ``threads`` of the profile, else what this process may run on."""
    return cores.available() if profile.threads is None else profile.threads


def gpu_count() -> int:
    """CUDA GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


# What is left


class ExpertQueue:
    """The experts that are left, in order. ``owner`` is this driver's name in claims."""

    def __init__(self, trainer: ExpertTrainer, experts: Iterable[int]) -> None:
        self.owner = claims.owner_id()
        self.location = trainer.folder
        self._trainer, self._waiting = trainer, deque(experts)
        self._claimed: dict[int, str] = {}
        self._look_at, self._said = 0.0, ""

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, record: ExpertLog) -> int | None:
        """The next expert that is neither finished nor claimed by another driver; None if there is none at the moment.

        Whatever another driver finished meanwhile is crossed off, in ``record`` too. Experts that others are training
        are looked at every couple of seconds. Raises TrajectoryError and StorageError.
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
        """Another driver was quicker to claim it: to the end of the queue."""
        self._waiting.append(expert)

    def again(self, expert: int) -> None:
        """It failed and is tried again: next."""
        self._waiting.appendleft(expert)

    def say_waiting(self, screen: Screen) -> None:
        """Say whom the rest waits for, once for the same experts."""
        who = "; ".join(f"expert {expert} by {other}" for expert, other in sorted(self._claimed.items()))
        if who and who != self._said:
            self._said = who
            screen.say(f"experts: waiting for those that another driver is training ({who})")


# What is told


class Process(NamedTuple):
    """An actor's process."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Failure:
    """Why an attempt at an expert ended: ``kind`` is the name of its type in ``errors.py``, None for any other.

    ``message`` is one line or paragraph for people; ``trace`` says where it came from. ``lasting``: the buffer refuses every
    write until somebody acts, so that no expert can go on.
    """

    expert: int
    message: str
    kind: str | None = None
    trace: str | None = None
    lasting: bool = False

    def error(self) -> LadDistError:
        """As an error of its kind."""
        error: LadDistError = getattr(errors, self.kind or "", ExpertError)(self.message)
        return error


class ExpertLog:
    """Tells what happens to the experts; also knows how much is done.

    Args:
        left: epochs that are still to be trained, for every expert of the recipe.
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
        """Of all experts, both stages."""
        return self._each * len(self._trained)

    @property
    def epochs_trained(self) -> int:
        """Epochs that are done, whoever trained them."""
        return sum(self._trained.values())

    def trained(self, expert: int) -> int:
        """Epochs of an expert that are done, as far as this driver knows."""
        return self._trained[expert]

    @property
    def experts_done(self) -> int:
        """Experts that are finished, whoever trained them."""
        return sum(epochs == self._each for epochs in self._trained.values())

    @property
    def experts_total(self) -> int:
        return len(self._trained)

    def show_on(self, board: Board) -> None:
        """From now on, show it there."""
        self._board = board

    def starting(self, expert: int) -> None:
        """Someone was told to train it."""
        self._row(expert, "starting")

    def started(self, expert: int, by: Process | None = None) -> None:
        """A process has begun to train it: this one, unless another is named."""
        self._events.emit("expert-started", expert=expert, **(by._asdict() if by else {}))
        self._row(expert, "begins")

    def epoch(self, epoch: Epoch, by: Process | None = None) -> None:
        """It got one epoch further."""
        self._events.emit("expert-epoch", **vars(epoch), **(by._asdict() if by else {}))
        e, first = self._experts, epoch.stage == "representation"
        self._reached(epoch.expert, epoch.epoch if first else e.epochs + epoch.epoch)
        self.images_per_second[epoch.expert] = epoch.images_per_second
        self._row(epoch.expert, in_words(epoch, e))

    def finished(self, expert: int, elsewhere: bool = False) -> None:
        """All its epochs are in the buffer; ``elsewhere``: another driver put them there."""
        self._events.emit("expert-finished", expert=expert, **({"elsewhere": True} if elsewhere else {}))
        self._reached(expert, self._each)
        self.stopped(expert)

    def restarted(self, failure: Failure, attempt: int, retries: int) -> None:
        """It is tried again from its last part, for the ``attempt``-th time."""
        expert, reason = failure.expert, failure.message
        self._events.emit("expert-restarted", expert=expert, attempt=attempt, error=reason)
        self._screen.say(f"{name_of(expert)}: {reason}; tried again from its last part ({attempt} of {retries})")
        self.stopped(expert)

    def failed(self, failure: Failure, attempts: int) -> None:
        """It is given up; where it failed is shown here, and nowhere else. A lasting failure is the caller's to raise."""
        self._events.emit("expert-failed", expert=failure.expert, attempts=attempts, error=failure.message)
        if not failure.lasting:
            self.failures.append(failure)
            self._screen.say(f"{name_of(failure.expert)}: failed {_times(attempts)}; the last time:")
            self._screen.say((failure.trace or failure.message).rstrip())
        self.stopped(failure.expert)

    def stopped(self, expert: int) -> None:
        """Nobody trains it at the moment."""
        self.images_per_second.pop(expert, None)
        self._row(expert, None)

    def error(self, attempts: int) -> LadDistError | None:
        """What the stage ends with: None where all is well, else an error of the kind that all failures share."""
        if not self.failures:
            return None
        kinds = {failure.kind for failure in self.failures}
        kind = getattr(errors, next(iter(kinds)) or "", ExpertError) if len(kinds) == 1 else ExpertError
        why = "; ".join(f"expert {f.expert}: {f.message}" for f in sorted(self.failures, key=lambda f: f.expert))
        others = "the other experts are finished, and" if self.experts_done else "what was finished before is kept, and"
        error: LadDistError = kind(
            f"{_many(len(self.failures), 'expert')} failed {_times(attempts)}: {why}; {others} the same command continues"
        )
        return error

    def _reached(self, expert: int, epochs: int) -> None:
        """An expert that was restarted repeats some epochs, which count once."""
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
    last = experts.epochs if epoch.stage == "representation" else experts.classifier_epochs
    return (
        f"{epoch.stage} epoch {epoch.epoch} of {last}, loss {epoch.loss:.4g}, accuracy {epoch.accuracy:.3f}, "
        f"{epoch.images_per_second:.0f} images/s"
    )


def _times(attempts: int) -> str:
    return "once" if attempts == 1 else f"{attempts} times"


# This process


def train_here(trainer: ExpertTrainer, queue: ExpertQueue, record: ExpertLog, screen: Screen) -> None:
    """Train what is left in this process, one expert after the other. Raises what ``ExpertTrainer.train`` raises."""
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
