"""Cost model of ranks, as in docs/scaling.md.

A rank computes its share of every synthetic batch. The next student step needs the sum of all gradients, so a step
takes as long as the rank with most of the batch, plus the sum:

    step(W)      = compute(largest share of W) + sums x allreduce(bytes, W)
    allreduce    = latency(W) + 2 (W - 1) / W x bytes / bandwidth
    bytes        = 4 P (representation: the whole gradient), 4 (K D + K) (classifier: the classifier's)
    sums         = 1 per step; 2 in the representation phase if graphs are recomputed (both passes need the sum)

Several windows an iteration (``distill.windows``) are a second axis: see ``Several``.

The bandwidth term is a ring's (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009); the latency term a chain within a host and a tree between hosts, as in NCCL's own model
(github.com/NVIDIA/nccl, src/graph/tuning.cc).

Shapes and units: S synthetic images, B of a batch, W ranks, P parameters; seconds and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from lad_dist.plan.shapes import Shapes
from lad_dist.ranks import groups_of
from lad_dist.recipe import SET_PHASES, Recipe

HELPS_ABOVE = 0.5  # parallel efficiency below which more ranks count as wasted
WAY_AND_BACK = 2.1  # forward passes that a classifier-phase step costs (plan/speed.py, WORK)
NEARLY = 1.1  # up to this multiple of the least seconds counts as fastest
RANK_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class StepTime:
    """Time of one step on ``images`` images: the larger of launching its operations and computing them.

    ``launch`` is independent of the images and hides the computation on devices with a queue; ``per_step`` is
    independent of them, too, and is added to the computation.
    """

    per_image: float
    per_step: float = 0.0
    launch: float = 0.0

    def seconds(self, images: float) -> float:
        """Return the seconds of one step."""
        return max(self.launch, self.per_step + images * self.per_image)

    def slower(self, factor: float) -> StepTime:
        """Return the same step with fewer threads, such that an image takes ``factor`` times as long."""
        return StepTime(self.per_image * factor, self.per_step, self.launch)


@dataclass(frozen=True)
class Link:
    """Link between ranks: ``bandwidth`` in bytes/s; ``latency`` of a collective, and of each ``hop``, in seconds."""

    name: str
    bandwidth: float
    latency: float
    hop: float
    source: str


@dataclass(frozen=True)
class Network:
    """Links of ``per_host`` ranks: ``inside`` a host, ``between`` hosts."""

    inside: Link
    between: Link
    per_host: int

    def allreduce(self, count: int, world: int) -> float:
        """Return the seconds of an all-reduce of ``count`` bytes over ``world`` ranks; 0 for one rank."""
        if world == 1:
            return 0.0
        hosts = math.ceil(world / self.per_host)
        chain, tree = min(world, self.per_host) - 1, math.ceil(math.log2(hosts)) if hosts > 1 else 0
        slowest = self.between if hosts > 1 else self.inside
        latency = slowest.latency + 2 * (chain * self.inside.hop + tree * self.between.hop)
        return latency + 2 * (world - 1) / world * count / slowest.bandwidth

    def between_groups(self, count: float, groups: int, within: int) -> float:
        """Return the seconds of sums of ``count`` bytes over ``groups`` ranks, ``within`` of which share the links.

        The ranks of one group are neighbours: ``within`` sums run at once, and those of a host share its line.
        """
        hosts = math.ceil(groups * within / self.per_host)
        if hosts == 1:
            return self.inside.latency + 2 * (groups - 1) * (self.inside.hop + count / groups / self.inside.bandwidth)
        here = max(1, self.per_host // within)  # groups of a host
        latency = self.between.latency + 2 * (
            (here - 1) * self.inside.hop + math.ceil(math.log2(min(hosts, groups))) * self.between.hop
        )
        sharing = min(within, self.per_host)
        return latency + sharing * 2 * (groups - 1) / groups * count / self.between.bandwidth


@dataclass(frozen=True)
class PhaseCost:
    """Cost of one phase on one rank: its steps, the time of each, and the bytes and number of its sums."""

    name: str
    path: str
    steps: int
    bytes_per_sum: int
    sums_per_step: int
    step: StepTime


PhasesOf = Callable[[int], Sequence[PhaseCost]]
"""Function from a number of ranks to the phases of an iteration."""


@dataclass(frozen=True)
class Scaling:
    """An iteration on ``world`` ranks: images per step on the busiest, gradient path, seconds in all and of the sums
    alone, and the efficiency: speedup over one rank, divided by ``world``. It may exceed 1 if one rank recomputes.
    """

    world: int
    share: float
    path: str
    seconds: float
    communication: float
    efficiency: float


def phases_of(recipe: Recipe, shapes: Shapes, path: str, step_of: Callable[[str], StepTime]) -> tuple[PhaseCost, ...]:
    """Return the phases of an iteration. ``step_of(kind)``: time of a student step on one rank."""
    d, total = recipe.distill, shapes.classes * recipe.ipc
    steps = {"representation": d.student_steps, "classifier": d.student_steps_classifier}
    bytes_per_sum = {"representation": 4 * shapes.parameters, "classifier": 4 * shapes.classifier}
    found = []
    for name in recipe.phases:
        if name == "regression":  # forward and backward over the batch, forward over the real images
            step = step_of(f"classifier/{path}")
            real = d.regression_batch * step.per_image / WAY_AND_BACK
            features = 4 * min(d.batch, total) * (shapes.classifier // shapes.classes + shapes.classes)
            found.append(
                PhaseCost(name, path, 1, features, 1, StepTime(step.per_image, step.per_step + real, step.launch))
            )
        elif name == "statistics":  # forward and backward over the batch; sums of its images' statistics
            step = step_of(f"classifier/{path}")
            vectors = 4 * min(d.batch, total) * shapes.statistics
            found.append(PhaseCost(name, path, 1, vectors, 1, step))
        else:
            sums = 2 if path == "recompute" and name == "representation" else 1
            found.append(PhaseCost(name, path, steps[name], bytes_per_sum[name], sums, step_of(f"{name}/{path}")))
    return tuple(found)


def mean_batch(total: int, batch: int) -> float:
    """Return the mean images of a student step: a permutation of all is cut into batches; the last may be smaller."""
    return total / math.ceil(total / min(batch, total))


def spread(total: int, batch: int, world: int) -> float:
    """Return the standard deviation of a rank's share of a batch.

    The batch is drawn without replacement (hypergeometric); 0 for the whole set.
    """
    if world == 1 or total <= batch or total < 2:
        return 0.0
    mean = mean_batch(total, batch)
    return math.sqrt(mean / world * (1 - 1 / world) * (total - mean) / (total - 1))


def largest_share(total: int, batch: int, world: int, draws: int = 1) -> float:
    """Return the images of a batch on the rank with the most, expected over ``draws`` batches.

    The largest of n normal variables, by Blom's approximation (1958); exact if the batch is the whole set.
    """
    rows = math.ceil(total / world)
    if total <= batch:
        return rows
    n = max(world * draws, 1)
    above = NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if world > 1 else 0.0
    return min(rows, mean_batch(total, batch) / world + above * spread(total, batch, world))


@dataclass(frozen=True)
class Several:
    """``windows`` of an iteration, shared by gcd(windows, ranks) groups; ``set_bytes``: of a synthetic set's gradient.

    A group runs its windows one after the other; then each phase's gradients are summed between the groups, one rank of
    each with one another. Neighbours form a group, so the groups' sums leave a host where the groups do.
    """

    windows: int = 1
    set_bytes: int = 0

    def groups(self, world: int) -> int:
        """Return the number of groups."""
        return groups_of(self.windows, world)


ONE_WINDOW = Several()


def several_of(recipe: Recipe, shapes: Shapes) -> Several:
    """Return a recipe's windows of an iteration."""
    numbers = shapes.channels * shapes.size**2 + shapes.classes
    return Several(recipe.distill.windows, 4 * shapes.classes * recipe.ipc * numbers)


def iteration(
    phases: Sequence[PhaseCost], total: int, batch: int, world: int, network: Network, several: Several = ONE_WINDOW
) -> tuple[float, float, float]:
    """Return (seconds, those of the sums among them, images of a step on the busiest rank) of one iteration."""
    groups = several.groups(world)
    within = world // groups
    share = largest_share(total, batch, within)
    sums, compute = 0.0, 0.0
    for p in phases:
        turns = 1 if p.name in SET_PHASES else several.windows // groups
        compute += turns * p.steps * p.step.seconds(share)
        sums += turns * p.steps * p.sums_per_step * network.allreduce(p.bytes_per_sum, within)
        if groups > 1:
            sums += network.between_groups(several.set_bytes / within, groups, within)
    return compute + sums, sums, share


def scaling(
    phases: PhasesOf,
    total: int,
    batch: int,
    worlds: Sequence[int],
    network: Network,
    several: Several = ONE_WINDOW,
) -> tuple[Scaling, ...]:
    """Return the cost of an iteration for each number of ranks, in their order."""
    alone, _, _ = iteration(phases(1), total, batch, 1, network, several)
    rows = []
    for world in worlds:
        costs = phases(world)
        seconds, sums, share = iteration(costs, total, batch, world, network, several)
        rows.append(Scaling(world, share, costs[0].path, seconds, sums, alone / (world * seconds)))
    return tuple(rows)


def best(rows: Sequence[Scaling]) -> Scaling:
    """Return the fewest ranks nearly as fast as the fastest, among those of efficiency ``HELPS_ABOVE`` or more."""
    good = [r for r in rows if r.efficiency >= HELPS_ABOVE] or rows[:1]
    fastest = min(r.seconds for r in good)
    return min((r for r in good if r.seconds <= NEARLY * fastest), key=lambda r: r.world)


def advice(rows: Sequence[Scaling], world: int) -> str:
    """Return where more ranks stop helping, in a sentence. ``rows`` must contain ``world``."""
    here, good = next(r for r in rows if r.world == world), best(rows)
    times = f"{here.seconds:.3g} s an iteration against {good.seconds:.3g} s"
    if world > good.world and here.seconds * NEARLY >= good.seconds:
        return f"more ranks stop helping at {good.world}: {world} are no faster, or barely ({times})"
    if here.efficiency < HELPS_ABOVE:
        return (
            f"more ranks stop helping at {good.world}: {world} reach an efficiency of {here.efficiency:.0%} only ({times} at "
            f"{good.efficiency:.0%})"
        )
    if world < good.world:
        return f"more ranks help, up to {good.world} ({times})"
    return f"the best number of ranks is {good.world}; more would not help" if rows[-1] != good else "more ranks help"
