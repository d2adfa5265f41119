"""Counter-based randomness: every draw is a function of its seed and counters, and of nothing else."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from lad_dist.seeds import key, rng, torch_seeded


def test_a_key_does_not_change_between_versions():
    # Published numbers depend on it: the first 16 bytes of SHA-256 of the counters' repr, little-endian.
    expected = hashlib.sha256(b"(7, 'expert', 3)").digest()[:16]
    assert key(7, "expert", 3) == int.from_bytes(expected, "little")
    assert rng(7, "expert", 3).bit_generator.state["bit_generator"] == "Philox"


def test_the_same_counters_give_the_same_draws_in_any_order():
    first = rng(1, "expert", 7, "epoch", 3).random(5)
    rng(1, "expert", 7, "epoch", 4).random(100)
    np.random.seed(0)
    np.testing.assert_array_equal(rng(1, "expert", 7, "epoch", 3).random(5), first)


def test_different_counters_give_different_draws():
    counters = [(0,), (1,), (0, 1), (0, "1"), (0, 1, 1), (0, 11), (0, "1", 1), (0, "a"), (0, "a", "b"), (0, "b", "a"),
                (0, "ab"), (0, "a, b")]  # fmt: skip
    assert len({key(*c) for c in counters}) == len(counters)
    assert len({float(rng(*c).random()) for c in counters}) == len(counters)


def test_numpy_integers_are_integers():
    assert key(np.int64(3), np.int64(4)) == key(3, 4)


def test_torch_seeded_is_pure_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with torch_seeded(1, "init", 2):
        first = torch.randn(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    with torch_seeded(1, "init", 2):
        assert torch.equal(torch.randn(4), first)
    with torch_seeded(1, "init", 3):
        assert not torch.equal(torch.randn(4), first)


def test_torch_seeded_restores_after_an_error():
    before = torch.random.get_rng_state()
    with pytest.raises(KeyError), torch_seeded(1):
        torch.randn(3)
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), before)


def test_threads_draw_what_they_draw_alone():
    def draw(which: int) -> torch.Tensor:
        with torch_seeded(1, "init", which):
            return torch.stack([torch.randn(500) for _ in range(50)])

    alone = [draw(which) for which in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, [*range(8)] * 5))
    assert all(torch.equal(together[i], alone[i % 8]) for i in range(40))
