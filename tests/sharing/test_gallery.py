"""The sets that come with the repository load, are whole and small, and the page says what they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import lad_dist
from lad_dist.sharing import contents

ROOT = Path(__file__).parents[2]
SETS = sorted(folder.name for folder in (ROOT / "gallery").iterdir() if folder.is_dir())
MOST = 2_000_000  # bytes of a set


@pytest.mark.parametrize("name", SETS)
def test_a_set_loads_and_is_whole(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    contents.check(Path("gallery") / name, name)
    distilled = lad_dist.load(f"gallery/{name}")
    images, soft_labels, lr = distilled
    assert len(images) == distilled.meta.ipc * soft_labels.shape[1] and lr > 0
    assert name.endswith(f"-ipc{distilled.meta.ipc}") and distilled.meta.selection == "last"
    assert {f.name for f in (Path("gallery") / name).iterdir()} <= set(contents.NAMES)
    assert sum(f.stat().st_size for f in (Path("gallery") / name).iterdir()) < MOST
    assert distilled.labeller()(images[:2]).shape == (2, soft_labels.shape[1])
    assert torch.equal(distilled.initial_images, images)  # no real image is published


@pytest.mark.parametrize("name", SETS)
def test_a_set_names_no_machine_and_no_path(name):
    for file in (ROOT / "gallery" / name).iterdir():
        if file.suffix in (".json", ".yaml", ".md"):
            assert not re.search(r"(?<![\w.:/])/(?:\w+/)+|\bhost\b|~/", file.read_text(encoding="utf-8")), file


def test_the_page_is_what_the_script_writes(benchmark_module):
    gallery = benchmark_module("gallery")
    assert list(json.loads((ROOT / "gallery" / "gallery.json").read_text())) == SETS == sorted(gallery.entries())
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery.page(), (
        "python benchmarks/gallery.py --page"
    )
    for name in SETS:
        assert (ROOT / "docs" / "images" / f"gallery-{name}.png").read_bytes() == gallery.picture(name)


def test_a_finished_run_of_ones_own_joins(benchmark_module, make_run, monkeypatch, tmp_path):
    gallery = benchmark_module("gallery")
    for name in ("GALLERY", "PICTURES"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(gallery, name, tmp_path / name)
    monkeypatch.setattr(gallery, "LEDGER", tmp_path / "GALLERY" / "gallery.json")
    monkeypatch.setattr(gallery, "PAGE", tmp_path / "gallery.md")
    words = [
        "gallery.py",
        "birds-ipc2",
        "--run",
        str(make_run()),
        "--command",
        "lad-dist run birds.yaml",
        "--license",
        "mit",
    ]
    monkeypatch.setattr("sys.argv", words)
    gallery.main()
    page = (tmp_path / "gallery.md").read_text()
    assert "| [birds-ipc2](#birds-ipc2) | 6 |" in page and "60.0 (40.0)" in page and "`lad-dist run birds.yaml`" in page
    assert (tmp_path / "PICTURES" / "gallery-birds-ipc2.png").exists()
    assert lad_dist.load(tmp_path / "GALLERY" / "birds-ipc2").meta.ipc == 2
