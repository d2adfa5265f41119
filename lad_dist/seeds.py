"""Counter-based randomness: every draw is a pure function of (seed, purpose, index).

Any epoch of any expert and any iteration of a distillation can therefore be recomputed alone, in any order and on any
number of processes, with the same draws. The counters are hashed (SHA-256) into the 128-bit key of NumPy's Philox
generator.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

Counter = int | str

_global_generator = threading.RLock()


def key(seed: int, *counters: Counter) -> int:
    """Return a 128-bit key for (seed, counters). Different counters give unrelated keys; ``1`` and ``"1"`` differ."""
    text = repr((int(seed), *(c if isinstance(c, str) else int(c) for c in counters))).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:16], "little")


def rng(seed: int, *counters: Counter) -> np.random.Generator:
    """Return a NumPy generator for (seed, counters), for example ``rng(seed, "expert", 7, "epoch", 3)``."""
    return np.random.Generator(np.random.Philox(key=key(seed, *counters)))


@contextmanager
def torch_seeded(seed: int, *counters: Counter) -> Iterator[None]:
    """Run a block (the construction of a network) with torch's CPU generator seeded from (seed, counters).

    The state of the global generator is restored afterwards, so code outside the block is not affected. Blocks of
    several threads are serialised, because the generator is global to the process.
    """
    import torch

    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, *counters) % 2**63)
        yield
