"""The distilled set: a folder that can be read, trained on, and whose damage is seen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import lad_dist
from lad_dist.data.whitening import Whitening
from lad_dist.distilled import DistilledMeta, DistilledSet
from lad_dist.errors import DistilledError

FILES = ("tensors.safetensors", "whitening.safetensors", "meta.json")


def meta(**fields) -> DistilledMeta:
    values = dict(method="lad", dataset="digits/train", ipc=2, class_names=("cat", "dog", "Ünal"), counts=(50, 9, 2),
                  lr=0.0123, iteration=250, selection="last", recipe_hash="ab", experts_hash="cd", data_fingerprint="e",
                  recipe={"ipc": 2}, versions={"torch": "2"}, label_source={"images_repeated": 1})  # fmt: skip
    return DistilledMeta(**values | fields)


def made(kind: str = "zca") -> DistilledSet:
    draws = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8, generator=draws)
    images = 2 * torch.randn(6, 3, 4, 4, generator=draws)
    return DistilledSet(images, torch.randn(6, 3, generator=draws), torch.tensor([0, 0, 1, 1, 2, 2]), meta(),
                        Whitening.fit(real, kind), torch.randn(6, 3, 4, 4, generator=draws))  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    made().write(tmp_path / "set")
    return tmp_path / "set"


def test_round_trip_keeps_every_bit(folder):
    whole, before = lad_dist.load(folder), made()
    for name in ("images", "label_logits", "labels", "initial_images"):
        assert torch.equal(getattr(whole, name), getattr(before, name))
    assert whole.meta == before.meta
    assert torch.equal(whole.whitening.matrix, before.whitening.matrix)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)


def test_unpacks_to_images_soft_labels_and_rate(folder):
    images, soft_labels, lr = lad_dist.load(str(folder))
    assert images.shape == (6, 3, 4, 4) and images.dtype == torch.float32
    torch.testing.assert_close(soft_labels, made().label_logits.softmax(1))
    torch.testing.assert_close(soft_labels.sum(1), torch.ones(6))
    assert lr == 0.0123


def test_is_a_dataset(folder):
    whole = lad_dist.load(folder)
    assert isinstance(whole, torch.utils.data.Dataset) and len(whole) == 6
    image, soft_label = whole[4]
    assert torch.equal(image, whole.images[4])
    torch.testing.assert_close(soft_label, whole.soft_labels[4])
    torch.testing.assert_close(whole[-1][1], whole.soft_labels[5])
    with pytest.raises(IndexError):
        whole[6]


def test_feeds_a_data_loader(folder):
    whole = lad_dist.load(folder)
    batches = list(DataLoader(whole, batch_size=4))
    assert [len(x) for x, _ in batches] == [4, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), whole.images)
    torch.testing.assert_close(torch.cat([y for _, y in batches]), whole.soft_labels)
    shuffled = torch.cat([x for x, _ in DataLoader(whole, batch_size=2, shuffle=True)])
    assert sorted(shuffled.flatten(1).sum(1).tolist()) == pytest.approx(sorted(whole.images.flatten(1).sum(1).tolist()))


def test_the_folder_of_a_run_will_do(folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.move(folder, tmp_path / "run" / "distilled")
    assert len(lad_dist.load(tmp_path / "run")) == 6


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
def test_pictures_are_pictures(kind):
    pictures = made(kind).pictures()
    assert pictures.shape == (6, 3, 4, 4)
    assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    assert float(pictures.min()) == 0 or float(pictures.max()) == 1  # the images were drawn far out


def test_pictures_of_real_images_are_those_images():
    whole, real = made(), torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    same = DistilledSet(whole.preprocess(real), torch.zeros(5, 3), torch.zeros(5), whole.meta, whole.whitening)
    torch.testing.assert_close(same.pictures(), real.float() / 255, rtol=0, atol=1e-5)


def test_preprocess_whitens_as_the_training_images_were(folder):
    whole, real = lad_dist.load(folder), torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(whole.preprocess(real), made().whitening.apply(real))
    expected = (real.float().flatten(1) / 255 - whole.whitening.mean) @ whole.whitening.matrix
    torch.testing.assert_close(whole.preprocess(real).flatten(1), expected)


def test_labels_and_names(folder):
    whole = lad_dist.load(folder)
    assert whole.labels.tolist() == [0, 0, 1, 1, 2, 2] and whole.meta.class_names == ("cat", "dog", "Ünal")


def test_without_initial_images_it_starts_as_it_is(tmp_path):
    whole = made()
    DistilledSet(whole.images, whole.label_logits, whole.labels, whole.meta, whole.whitening).write(tmp_path)
    assert torch.equal(lad_dist.load(tmp_path).initial_images, whole.images)


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    said = "not a distilled set" if name == "meta.json" else rf"{name}: is missing"
    with pytest.raises(DistilledError, match=said):
        lad_dist.load(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(DistilledError, match="lad-dist distill"):
        lad_dist.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", FILES[:2])
def test_every_flipped_bit_in_tensors_is_seen(folder, name):
    whole, draws = (folder / name).read_bytes(), random.Random(0)
    for _ in range(25):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        (folder / name).write_bytes(damaged)
        with pytest.raises(DistilledError, match=rf"{name}: does not match the checksum"):
            lad_dist.load(folder)
    (folder / name).write_bytes(whole)
    lad_dist.load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_file_cut_short_is_seen(folder, name, left):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(DistilledError, match=name.replace(".", r"\.")):
        lad_dist.load(folder)


def test_a_damaged_meta_file_is_refused_or_reads(folder):
    """No checksum covers meta.json itself; whatever is in it, nothing but DistilledError comes out."""
    whole, draws, refused = (folder / "meta.json").read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draws.choice([1, 1, 5])):
            damaged[draws.randrange(len(whole))] = draws.randrange(256)
        (folder / "meta.json").write_bytes(damaged)
        try:
            lad_dist.load(folder)
        except DistilledError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(("change", "said"), [
    ({"format_version": 2}, "format version 1"), ({"format_version": None}, "format version 1"),
    ({"lr": ...}, r"missing fields: \['lr'\]"), ({"sha256": ...}, r"missing fields: \['sha256'\]"),
    ({"colour": 3}, r"unknown fields: \['colour'\]"),
    ({"class_names": ["cat", "dog"]}, r"meta\.json: does not match its own checksum"),
    ({"lr": 0.5}, r"meta\.json: does not match its own checksum"),
    ({"sha256": {}}, "checksum"), ({"sha256": "x"}, r"meta\.json: sha256"), ({"lr": "fast"}, r"meta\.json: lr"),
    ({"class_names": None}, r"meta\.json: class_names"), ({"counts": 3}, r"meta\.json: counts"),
    ({"lr": None, "ipc": "many"}, r"meta\.json: ipc: .*; lr: "),
])  # fmt: skip
def test_a_meta_file_that_is_not_right(folder, change, said):
    doc = json.loads((folder / "meta.json").read_text()) | change
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in doc.items() if v is not ...}))
    with pytest.raises(DistilledError, match=said):
        lad_dist.load(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}"])
def test_a_meta_file_of_another_kind(folder, text):
    (folder / "meta.json").write_text(text)
    with pytest.raises(DistilledError, match=r"meta\.json: is not of format version 1"):
        lad_dist.load(folder)


def test_files_of_two_sets_do_not_mix(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    made("standardize").write(other)
    shutil.copy(other / "whitening.safetensors", folder / "whitening.safetensors")
    with pytest.raises(DistilledError, match="damaged or from another set"):
        lad_dist.load(folder)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("labels", torch.zeros(5, dtype=torch.long), r"labels has shape \(5,\), valid: \(6,\)"),
    ("label_logits", torch.zeros(6, 4), r"label_logits has shape \(6, 4\), valid: \(6, 3\)"),
    ("images", torch.full((6, 3, 4, 4), float("nan")), "images holds NaN"),
    ("label_logits", torch.full((6, 3), float("inf")), "label_logits holds NaN or infinity"),
])  # fmt: skip
def test_tensors_that_do_not_fit_together(tmp_path, name, value, said):
    whole = made()
    setattr(whole, name, value)
    whole.write(tmp_path)
    with pytest.raises(DistilledError, match=said):
        lad_dist.load(tmp_path)
