"""Choose a process's number of CPU threads by timing steps of the recipe with one thread and with several.

Small steps gain nothing by a second thread, and beside other processes two threads can be slower than one. The choice
is made when a run's data are first loaded and kept in the run's folder: the same number of threads gives the same bits.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lad_dist import cores
from lad_dist.errors import RunDirError
from lad_dist.experts.scheduler import cores_to_use
from lad_dist.plan.calibration import STUDENT_STEPS, Steps, Timer, with_threads
from lad_dist.plan.shapes import Shapes
from lad_dist.profile import Profile
from lad_dist.recipe import Recipe
from lad_dist.rundir import published

SECONDS = 3.0  # for all timings together, about
_ROUNDS = 5
_GAIN = 0.9  # more threads must take less than this fraction of the time of fewer


@dataclass(frozen=True)
class Team:
    """The chosen ``threads``, and the reason in words."""

    threads: int
    why: str

    def save(self, path: Path) -> None:
        """Publish as JSON. Raises StorageError."""
        with published(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Team:
        """Read what ``save`` wrote. Raises RunDirError if it is damaged."""
        try:
            doc = json.loads(path.read_text(encoding="utf-8"))
            made = cls(**doc)
            if type(made.threads) is not int or made.threads < 1 or not isinstance(made.why, str):
                raise ValueError(f"threads: {made.threads!r}")
        except (OSError, ValueError, TypeError) as error:
            raise RunDirError(f"{path}: is not a record of threads ({error}); remove it to choose again") from error
        return made


def most_threads(profile: Profile) -> int:
    """Return the most threads to try: torch's default (OMP_NUM_THREADS, the cores), within this process's cores."""
    return min(torch.get_num_threads(), cores_to_use(profile))


_TOO_LONG = 1e10  # FLOPs of one image's forward pass: its student steps take minutes


def choose(recipe: Recipe, shapes: Shapes, most: int, seconds: float = SECONDS) -> Team:
    """Return the fewest threads about as fast as any number up to ``most``, timing student steps with each in turn."""
    if most < 2:
        return Team(1, "one core")
    if shapes.forward_flops > _TOO_LONG:
        return Team(most, "one step takes too long to be timed; steps of that size gain from every core")
    tried = sorted({1 << power for power in range(most.bit_length())} | {most})
    images = min(recipe.distill.batch, shapes.classes * recipe.ipc)
    timer = Timer(torch.device("cpu"))
    make = Steps(recipe, shapes, timer.device).of("representation/recompute")
    began, affordable = time.perf_counter(), seconds / (len(tried) * (_ROUNDS + 2))
    count = 1
    with with_threads(1):
        while True:
            job = make(count)
            job()
            if timer.seconds(job) * 2 > affordable or count == images:
                break
            count = min(images, count * 2)
    taken: dict[int, list[float]] = {threads: [] for threads in tried}
    for _ in range(_ROUNDS):
        for threads in tried:
            with with_threads(threads):
                job()  # warm-up: create and wake the threads
                taken[threads].append(timer.seconds(job) / STUDENT_STEPS)
        if time.perf_counter() - began > 2 * seconds:
            break
    typical = {threads: statistics.median(times) for threads, times in taken.items()}
    chosen = 1
    for threads in tried:
        if typical[threads] < _GAIN * typical[chosen]:
            chosen = threads
    found = ", ".join(f"{typical[t] * 1e3:.3g} ms with {t}" for t in tried)
    free = cores.obtained(most)
    busy = f"; the machine is busy ({free:.1f} of {most} cores are free)" if free < cores.FREE_ABOVE * most else ""
    return Team(chosen, f"a step on {count} image{'s' if count > 1 else ''} takes {found}{busy}")
