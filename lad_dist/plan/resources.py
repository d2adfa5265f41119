"""Resources of a job: devices, their memory, concurrent experts, and the network between ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lad_dist.distill.memory import free_bytes
from lad_dist.errors import RecipeError
from lad_dist.experts.scheduler import cores_to_use
from lad_dist.plan.scaling import Network, StepTime
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.speed import CARDS, CPU_SOURCE, LINKS, Card, card_named, cpu_step, gpu_step
from lad_dist.profile import Profile

if TYPE_CHECKING:
    import torch

GPUS_PER_HOST = 8  # assumed for hosts that the profile does not describe


@dataclass(frozen=True)
class Resources:
    """Devices of a job. ``device``: ``cpu`` or ``cuda``; ``name``: for display; ``here``: it is this machine's own.

    ``memory``: bytes of a device (a host, for CPUs) free for the job. ``world`` ranks
    share the distillation, at most ``per_host`` per host, with ``threads`` CPU threads per host.
    """

    device: str
    name: str
    here: bool
    card: Card | None
    memory: int
    hosts: int
    per_host: int
    threads: int
    world: int
    experts_at_a_time: int
    threads_per_expert: int
    network: Network
    team: int | None = None
    """Threads of a process that has a host's CPU to itself; None: all."""

    @property
    def chooses_threads(self) -> bool:
        """Whether a run there would choose its number of CPU threads by timing (``threads.py``)."""
        return self.device == "cpu" and self.here and self.team is None and self.threads > 1 and self.world == 1

    @property
    def rank_memory(self) -> int:
        """Bytes that one rank may use of its device."""
        return self.rank_memory_of(self.world)

    def rank_memory_of(self, world: int) -> int:
        """Return a rank's bytes if there are ``world``: ranks on a host share its memory, each GPU has its own."""
        return self.memory if self.device == "cuda" else self.memory // max(1, -(-world // self.hosts))

    def rank_threads(self, world: int) -> float:
        """Return the CPU threads of a rank if ``world`` of them share the hosts."""
        return min(self.team or self.threads, self.threads / max(1.0, world / self.hosts))

    def table(self, kind: str, shapes: Shapes, threads: int) -> StepTime:
        """Return a step's time by the table of devices; on a CPU, with ``threads`` threads."""
        return cpu_step(kind, shapes, threads) if self.card is None else gpu_step(kind, shapes, self.card)

    @property
    def table_source(self) -> str:
        """Source of the table's numbers."""
        if self.card is None:
            return CPU_SOURCE
        return f"assumed: FLOPs and bytes counted, at 30% and 70% of the data sheet of {self.card.name}"


def resources_of(profile: Profile, device: torch.device | None, gpu: str | None = None) -> Resources:
    """Return the resources of a profile. ``device``: this machine's, or None if the profile's GPUs are elsewhere.

    ``gpu``: a card of the table to plan for instead. Raises RecipeError if the table lacks it.
    """
    if gpu is not None and gpu not in CARDS:
        raise RecipeError(f"--gpu: {gpu}: not in the table; valid: {', '.join(CARDS)}")
    if gpu is None and device is not None and device.type == "cpu":
        return _of_cpu(profile)
    if gpu is None and device is not None:
        return _of_gpu_here(profile, device)
    return _of_cards(profile, CARDS[gpu or "a100"])


def _of_cpu(profile: Profile) -> Resources:
    import torch

    memory = free_bytes(torch.device("cpu"))
    cores, hosts = cores_to_use(profile), profile.nodes
    return Resources(
        device="cpu",
        name=f"CPU, {cores} thread{'s' if cores > 1 else ''}" + (f" on each of {hosts} hosts" if hosts > 1 else ""),
        here=True,
        card=None,
        memory=memory,
        hosts=hosts,
        per_host=max(1, -(-profile.world // hosts)),
        threads=cores,
        world=profile.world,
        experts_at_a_time=_experts(profile, hosts * (cores // profile.threads_per_expert)),
        threads_per_expert=profile.threads_per_expert,
        network=Network(LINKS["loopback"], LINKS["ethernet"], max(1, -(-profile.world // hosts))),
        team=profile.threads,
    )


def two_threads() -> Resources:
    """Return a CPU of two threads as in the table, with enough memory: independent of this machine."""
    return Resources(
        device="cpu",
        name="CPU, 2 threads",
        here=False,
        card=None,
        memory=8 * 10**9,
        hosts=1,
        per_host=1,
        threads=2,
        world=1,
        experts_at_a_time=2,
        threads_per_expert=1,
        network=Network(LINKS["loopback"], LINKS["ethernet"], 1),
    )


def _of_gpu_here(profile: Profile, device: torch.device) -> Resources:
    import torch

    name = torch.cuda.get_device_name(device)
    card = card_named(name)
    found = torch.cuda.device_count()
    return _gpus(profile, name, True, card or CARDS["a100"], free_bytes(device), profile.gpus_per_node or found)


def _of_cards(profile: Profile, card: Card) -> Resources:
    per_host = profile.gpus_per_node or min(GPUS_PER_HOST, max(1, -(-profile.world // profile.nodes)))
    return _gpus(profile, card.name, False, card, int(card.memory * 0.95), per_host)


def _gpus(profile: Profile, name: str, here: bool, card: Card, memory: int, per_host: int) -> Resources:

    inside = LINKS["nvlink"] if card.nvlink else LINKS["pcie"]
    gpus = profile.nodes * per_host
    return Resources(
        device="cuda",
        name=f"{gpus} x {name}",
        here=here,
        card=card,
        memory=memory,
        hosts=profile.nodes,
        per_host=per_host,
        threads=cores_to_use(profile),
        world=profile.world,
        experts_at_a_time=_experts(profile, gpus * profile.experts_per_gpu),
        threads_per_expert=1,
        network=Network(inside, LINKS["ethernet"], per_host),
    )


def _experts(profile: Profile, fit: int) -> int:
    return 1 if profile.fleet == "off" else max(1, fit)
