"""benchmarks/parity.py on the official numbers, and on files of other sizes made by the textbook reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from textbook import make_golden

GOLDEN = Path(__file__).parent / "golden" / "lad_golden.npz"
INPUTS = {
    "param_names_shapes_json", "start_params", "images", "label_logits", "class_counts", "syn_steps", "batch_syn",
    "syn_lr", "e2e/lambda_first_second", "e2e/lr_img_lr_lr_y", "e2e/momentum_img_lr_y", "e2e/perms",
    "labelinit/expert_logits", "labelinit/true_labels", "dsa/x_c1", "dsa/x_c3", "dsa/seed",
    "zca/train", "zca/test", "zca/eps", "sampler/labels", "sampler/epoch1", "sampler/epoch2", "sampler/len",
    *(f"{which}/{name}" for which in ("first", "second") for name in ("target_params", "perms", "index_chunks")),
    *(f"{which}/{name}" for which in ("gsam_full", "gsam_frozen")
      for name in ("images", "labels", "hparams", "hparams_names", "params_before")),
}  # fmt: skip


def outputs(path: Path) -> set[str]:
    """The rows that a file calls for: all its arrays but inputs and max-norm; the sampler's draws need not match."""
    return {n for n in np.load(path).files if n not in INPUTS and not n.startswith("maxnorm/")} | {"sampler/structure"}


def check(path: Path, errors: dict[str, float]) -> None:
    assert set(errors) == outputs(path)
    beyond = {n: e for n, e in errors.items() if not e < (1e-6 if n.startswith("dsa/") else 1e-9)}
    assert beyond == {}


@pytest.fixture(scope="module")
def parity(benchmark_module):
    return benchmark_module("parity")


def test_every_official_number(parity):
    check(GOLDEN, parity.parity(GOLDEN))


NAMES = ("channels", "side", "width", "depth", "classes", "count", "batch", "steps", "iterations")
SIZES = {
    "colour, odd side": (3, 13, 6, 2, 7, 14, 7, 3, 3),
    "grey, odd side, batches of unequal size": (1, 9, 5, 3, 3, 8, 3, 5, 2),
    "batch larger than the set": (3, 8, 4, 1, 4, 5, 9, 3, 1),
    "two channels, one step": (2, 16, 3, 4, 2, 4, 2, 1, 2),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_files_of_other_sizes(parity, tmp_path, sizes):
    make_golden(tmp_path / "other.npz", **dict(zip(NAMES, sizes, strict=True)))
    check(tmp_path / "other.npz", parity.parity(tmp_path / "other.npz"))


@pytest.mark.parametrize(
    "name",
    [
        "first/image_grad",
        "second/lr_grad",
        "e2e/images_after2",
        "gsam_full/losses",
        "zca/matrix",
        "dsa/crop_c1",
        "longtail/cifar10_0.1",
        "labelinit/out",
    ],
)
def test_a_wrong_number_shows(parity, tmp_path, name):
    golden = dict(np.load(GOLDEN))
    changed = golden[name].astype(np.float64)
    changed.flat[-1] += 1e-3 * np.abs(changed).max() + (1 if name.startswith("longtail") else 0)
    np.savez(tmp_path / "wrong.npz", **{**golden, name: changed})
    errors = parity.parity(tmp_path / "wrong.npz")
    assert [n for n, e in errors.items() if not e < 1e-6] == [name]


def test_a_sampler_of_another_structure_shows(parity, tmp_path):
    golden = dict(np.load(GOLDEN))
    golden["sampler/epoch1"] = np.sort(golden["sampler/epoch1"])  # the same draws, but one class after the other
    np.savez(tmp_path / "wrong.npz", **golden)
    assert parity.parity(tmp_path / "wrong.npz")["sampler/structure"] == 1


def test_relative_error(parity):
    assert parity.relative_error(np.array([1.0, 2.2]), np.array([1.0, 2.0])) == pytest.approx(0.1)
    assert parity.relative_error(np.array([0.0, 0.5]), np.zeros(2)) == 0.5
    assert parity.relative_error(np.array([np.nan, 1.0]), np.ones(2)) == float("inf")
    assert parity.relative_error(np.ones(3), np.ones(2)) == float("inf")
