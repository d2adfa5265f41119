"""A run to share, and a hub on 127.0.0.1 that the tests push to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from lad_dist import results
from lad_dist.cli import app
from lad_dist.distilled import DistilledSet
from lad_dist.labeller import Labeller
from lad_dist.models.network import build
from lad_dist.recipe import ModelConfig

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "exchange")]  # stand_in.py, tiny_sets.py


PRIVATE = ("node17.lab.example", "jane.doe", "/home/", "/mnt/", "secret")  # in the run, and not to travel
VERSIONS = {"torch": "2", "imported from": "/mnt/secret/jane.doe.pt sha256:0a"}


def a_labeller() -> Labeller:
    model = ModelConfig(width=2, depth=2)
    network = build(model, 3, 4, 3, seed=0, purpose=("template",))
    return Labeller(model, (3, 4, 3), [{n: p.detach() for n, p in network.named_parameters()}], 1.5)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """``make_run(name, iteration=2)``: a run folder with a set, its real starting images, teachers and results.

    What ``private`` lists is in it: a machine's name, a person's, and paths.
    """
    from tiny_sets import make_set

    def make(name: str = "run", **fields: Any) -> Path:
        folder = tmp_path / "runs" / name
        (folder / "distilled").mkdir(parents=True)
        data = {"dataset": "image-folder", "root": "/home/jane.doe/birds", "train": "/mnt/secret/*.jpg"}
        plain = make_set(
            **{"recipe": {"ipc": 2, "data": data, "distill": {"iterations": 9}}, "versions": VERSIONS} | fields
        )
        whole = DistilledSet(
            plain.images, plain.label_logits, plain.labels, plain.meta, plain.whitening,
            initial_SCHH=torch.full_like(plain.images, 7.0), initial_logits_SK=plain.label_logits.clone(), teachers=a_labeller(),
        )  # fmt: skip
        whole.write(folder / "distilled")
        row = {"source": "distilled", "architecture": "convnet", "seed": 0, "overall": 0.5, "head": 0.6, "medium": 0.5,
               "tail": 0.4, "split": "test", "selection": "last", "method": "lad", "host": PRIVATE[0],
               "settings": {"epochs": 3, "lr": 0.1, "batch": 8}, "ipc": 2, "recipe_seed": 0}  # fmt: skip
        file = folder / "evaluation" / "results.json"
        for each in (row, row | {"seed": 1, "overall": 0.7}):
            results.put(file, each)
        (folder / "events.jsonl").write_text(json.dumps({"host": PRIVATE[0]}) + "\n")
        return folder

    return make


@pytest.fixture
def private() -> tuple[str, ...]:
    """Words of the run that are not to travel."""
    return PRIVATE


@pytest.fixture
def lad() -> Callable[..., Result]:
    """``lad("push", run, "hf://me/birds")`` in this process; a message is one line."""

    def call(*args: object) -> Result:
        return CliRunner(env={"COLUMNS": "1000"}).invoke(app, [str(a) for a in args])

    return call


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub that answers at HF_ENDPOINT, and a token for it. The library reads some of its environment when imported."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the package huggingface_hub")
    from stand_in import TOKEN, running

    with running() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield made
