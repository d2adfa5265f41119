"""Decoded images kept on disk: used where they are what decoding would give, made again where not."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import picture, write_folders
from typer.testing import CliRunner

from lad_dist.cli import app
from lad_dist.data import decoded, decoding
from lad_dist.data.datasets import load_splits, look
from lad_dist.errors import DataError, StorageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, which keeps the smallest sets."""
    monkeypatch.setenv("LAD_DIST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decoded, "LEAST_IMAGES", 4)
    monkeypatch.setattr(decoded, "_SPARE_BYTES", 0)
    return tmp_path / "cache" / "decoded"


@pytest.fixture
def data(config, tmp_path):
    root = write_folders(tmp_path / "data", {"a": 4, "b": 3})
    return config(dataset="image-folder", root=str(root), imbalance="natural")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many images each call of ``decode`` was given."""
    calls: list[int] = []

    def decode(source, indices, *more):
        calls.append(len(indices))
        return decoding.decode(source, indices, *more)

    monkeypatch.setattr(decoded, "decode", decode)
    return calls


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.json"))


def test_the_second_start_decodes_nothing_and_has_the_same_bits(data, cache, counted):
    first, calls = load_splits(data), len(counted)
    again = load_splits(data)
    assert len(counted) == calls == 2 and len(entries(cache)) == 2  # training and test images
    for a, b in ((first.train, again.train), (first.test, again.test)):
        assert torch.equal(a.images_NCHW, b.images_NCHW) and a.fingerprint() == b.fingerprint()
    assert "are decoded, and kept in" in first.notes[0] and "are read from" in again.notes[0]
    kept_pixels = decoded.pixel_digest(again.train.images_NCHW)
    kept_pixels.update(again.train.labels_N.numpy().data)
    assert kept_pixels.hexdigest() == again.train.fingerprint()


def test_looking_fills_the_cache_and_then_decodes_nothing(data, cache, counted):
    look(data)
    assert counted == [7, 7]
    look(data)
    load_splits(data)
    assert counted == [7, 7]


def test_looking_at_little_memory(data, cache, counted, monkeypatch):
    monkeypatch.setattr(decoded, "_CHUNK_BYTES", 2 * 3 * 8 * 8)
    whole = load_splits(data)
    assert max(counted) == 2 and sum(counted) == 14
    monkeypatch.setenv("LAD_DIST_CACHE", "off")
    assert torch.equal(load_splits(data).train.images_NCHW, whole.train.images_NCHW)


@pytest.mark.parametrize("change", ["content", "same size and time", "time", "removed"])
def test_a_changed_file_is_never_read_from_the_cache(data, cache, change):
    load_splits(data)
    file = Path(data.root) / "train" / "a" / "01.png"
    before = file.stat()
    if change == "time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "removed":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        picture(999).save(file)
        if change == "same size and time":
            new = file.read_bytes()
            file.write_bytes((new + bytes(len(content)))[: max(len(new), len(content))])
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    splits = load_splits(data)
    if change == "removed":
        assert len(splits.train) == 6
        return
    assert "decoded again, as files have changed" in splits.notes[0]
    expected = np.asarray(decoding.Image.open(file)).transpose(2, 0, 1)
    np.testing.assert_array_equal(splits.train.images_NCHW[1].numpy(), expected)


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "facts", "other array", "lying facts"])
def test_a_damaged_entry_is_made_again(data, cache, damage):
    whole = load_splits(data)
    facts = next(f for f in entries(cache) if "train" in json.loads(f.read_text())["where"])
    file = cache / json.loads(facts.read_text())["file"]
    content = bytearray(file.read_bytes())
    if damage in ("bit", "short", "gone", "other array"):
        file.unlink()  # ``whole`` has mapped it
    if damage == "bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "short":
        file.write_bytes(content[:-1])
    elif damage == "other array":
        np.save(file, np.zeros((7, 3, 8, 8), dtype=np.uint8))
    elif damage == "facts":
        facts.write_text("{")
    elif damage == "lying facts":
        facts.write_text(facts.read_text().replace('"stamp": "', '"stamp": "0'))
    healed = load_splits(data)
    assert torch.equal(whole.train.images_NCHW, healed.train.images_NCHW)
    assert "decoded again, as it was damaged" in healed.notes[0]
    assert "read from" in load_splits(data).notes[0]


def test_other_sizes_and_selections_have_entries_of_their_own(data, cache, config):
    load_splits(data)
    small = load_splits(config(dataset="image-folder", root=data.root, imbalance="natural", image_size=4))
    assert small.train.size == 4 and len(entries(cache)) == 4
    assert load_splits(data).train.size == 8


def test_parquet_is_kept_too(config, tmp_path, cache, counted):
    from small_datasets import png

    from lad_dist.data.parquet import write_rows

    for split in ("train", "test"):
        write_rows(
            tmp_path / f"{split}.parquet", {"image": [png(i) for i in range(6)], "label": [0, 1, 0, 1, 0, 1]}, {}
        )
    of_parquet = config(dataset="parquet", root=str(tmp_path), imbalance="natural")
    first, again = load_splits(of_parquet), load_splits(of_parquet)
    assert torch.equal(first.train.images_NCHW, again.train.images_NCHW) and len(counted) == 2


def test_few_images_and_arrays_are_not_kept(data, cache, config, monkeypatch):
    monkeypatch.setattr(decoded, "LEAST_IMAGES", 8)
    assert load_splits(data).notes == ()
    monkeypatch.setattr(decoded, "LEAST_IMAGES", 1)
    load_splits(config(dataset="digits"))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAD_DIST_CACHE", str(tmp_path / "file"))
    splits = load_splits(data)
    assert len(splits.train) == 7 and "are not kept" in splits.notes[0] and "LAD_DIST_CACHE" in splits.notes[0]
    look(data)
    monkeypatch.setattr(decoded, "_SPARE_BYTES", 2**62)
    monkeypatch.setenv("LAD_DIST_CACHE", str(tmp_path / "full"))
    assert "GB are needed" in load_splits(data).notes[0]


def test_a_file_that_is_no_image_is_named_and_leaves_nothing(data, cache):
    (Path(data.root) / "train" / "a" / "01.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"a/01\.png"):
        load_splits(data)
    assert list(cache.iterdir()) == []


def test_files_that_change_meanwhile_are_not_kept(data, cache, monkeypatch):
    file, real = Path(data.root) / "train" / "a" / "01.png", decoding.decode

    def decode(*what):
        images = real(*what)
        os.utime(file)
        return images

    monkeypatch.setattr(decoded, "decode", decode)
    assert "changed while they were decoded" in load_splits(data).notes[0]
    assert len(entries(cache)) == 1  # the test images


def fingerprint(data) -> str:
    return load_splits(data).train.fingerprint()


def test_processes_that_start_together_agree(data, cache):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        said = set(pool.map(fingerprint, [data] * 3, chunksize=1))
    assert said == {load_splits(data).train.fingerprint()}
    assert len(entries(cache)) == 2 and not list(cache.glob(".tmp-*"))


def test_a_reader_keeps_its_images_when_the_entry_is_cleared_or_replaced(data, cache):
    mine = load_splits(data).train
    expected = mine.images_NCHW.clone()
    assert decoded.clear() > 2 * 7 * 3 * 64 and decoded.listed() == []
    assert torch.equal(mine.images_NCHW, expected)
    mine.images_NCHW[0] = 0  # a copy of the page: the file stays
    again = load_splits(data).train
    again.images_NCHW[0] = 0
    assert torch.equal(load_splits(data).train.images_NCHW, expected)


def test_unused_entries_and_replaced_files_go(data, cache):
    load_splits(data)
    (first, *_), old = entries(cache), 1e9
    os.utime(first, (old, old))
    stray = cache / f"{'0' * 32}-{'1' * 16}.npy"
    stray.write_bytes(b"")
    os.utime(stray, (old, old))
    mine = [cache / name for name in ("mine.npy", "mine.json")]
    for file in mine:
        file.write_bytes(b"")
        os.utime(file, (old, old))
    decoded._tidy(cache)
    assert all(file.exists() for file in mine)
    assert not first.exists() and not stray.exists() and len(decoded.listed()) == 1


def test_where_it_lies(monkeypatch):
    monkeypatch.delenv("LAD_DIST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert decoded.folder() == Path("/x/lad-dist/decoded")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert decoded.folder() == Path("/home/me/.cache/lad-dist/decoded")
    monkeypatch.setenv("LAD_DIST_CACHE", "OFF")
    assert decoded.folder() is None and decoded.clear() == 0


def test_a_folder_that_cannot_be_cleared_is_named(data, cache, monkeypatch):
    load_splits(data)

    def refuse(self, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StorageError, match=r"cannot be removed: Permission denied"):
        decoded.clear()


def test_the_verb_lists_and_clears(data, cache, monkeypatch):
    said = CliRunner().invoke(app, ["cache"])
    assert said.exit_code == 0 and f"0.0 MB in {cache}" in said.output
    load_splits(data)
    shown = json.loads(CliRunner().invoke(app, ["cache", "--json"]).output)
    assert [entry["shape"] for entry in shown["entries"]] == [[7, 3, 8, 8]] * 2 and shown["folder"] == str(cache)
    assert "7 of 3x8x8" in CliRunner().invoke(app, ["cache"]).output
    assert f"freed in {cache}" in CliRunner().invoke(app, ["cache", "--clear"]).output and decoded.listed() == []
    assert json.loads(CliRunner().invoke(app, ["cache", "--clear", "--json"]).output)["freed"] == 0
    monkeypatch.setenv("LAD_DIST_CACHE", "off")
    assert "LAD_DIST_CACHE is off" in CliRunner().invoke(app, ["cache"]).output


def test_the_plan_says_where_and_how_large(cache):
    assert decoded.planned_bytes("list", [115_846, 50_000], 12288) == 165_846 * 12288
    assert decoded.planned_bytes("list", [3, 50_000], 12288) == 50_000 * 12288
    assert decoded.planned_bytes("cifar10", [60_000, 10_000], 3072) == 0
