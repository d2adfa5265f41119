"""The code blocks of docs/exchange.md run on what the commands of its first lines write."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import lad_dist
from lad_dist.exchange.export import export
from lad_dist.exchange.pictures import pixels

TEXT = (Path(__file__).parents[2] / "docs" / "exchange.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(re.findall(r"```python\n# (\w+)\n(.*?)```", TEXT, re.DOTALL))


def test_every_block_has_a_test():
    assert set(BLOCKS) == {"pt", "folder", "parquet", "hf", "import"} and TEXT.count("```python") == len(BLOCKS)


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
@pytest.mark.parametrize("form", ["pt", "folder", "parquet", "hf"])
def test_the_blocks_read_the_exports(form, kind, tmp_path, monkeypatch, hf):
    from tiny_sets import NAMES, make_set

    whole = make_set(kind, channels=1 if kind == "standardize" else 3)
    monkeypatch.chdir(tmp_path)
    export(whole, form, tmp_path / "exports" / f"digits-lt-{form}")
    found: dict = {}
    exec(BLOCKS[form], found)
    if form == "folder":
        expected = whole.preprocess(pixels(whole).permute(0, 3, 1, 2))
        torch.testing.assert_close(found["images"], expected)
        assert np.array_equal(np.float32(list(found["soft_labels"].values())), whole.soft_labels.numpy())
        assert all((tmp_path / found["root"] / file).is_file() for file in found["soft_labels"])
        return
    assert np.array_equal(np.asarray(found["images"]), whole.images.numpy())
    if form == "pt":
        loss = found["soft_cross_entropy"](torch.zeros(6, 3), found["labels"])
        assert float(loss) == pytest.approx(np.log(3), rel=1e-6) and found["lr"] == whole.lr
    else:
        assert np.array_equal(np.asarray(found["soft_labels"]), whole.soft_labels.numpy())
    if form == "hf":
        assert found["names"] == list(NAMES)


def test_the_card_s_block_reads_the_folder_too(tmp_path, hf):
    from tiny_sets import make_set

    whole = make_set()
    export(whole, "hf", tmp_path / "out")
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(block.replace("PATH", str(tmp_path / "out")), found)
    assert torch.equal(found["images"], whole.images) and torch.equal(found["soft_labels"], whole.soft_labels)


def test_load_reads_a_run_with_an_imported_set(tmp_path, monkeypatch, a_run):
    a_run().rename(tmp_path / "runs" / "theirs")
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(BLOCKS["import"], found)
    assert torch.equal(found["images"], lad_dist.load(tmp_path / "runs" / "theirs").images) and found["lr"] > 0
