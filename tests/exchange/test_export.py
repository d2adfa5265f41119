"""Every form of export holds the set, says what it is, and appears whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import socket

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_sets import NAMES, make_set
from torchvision.datasets import ImageFolder

import lad_dist
from lad_dist.data.whitening import Whitening
from lad_dist.errors import DistilledError, StorageError
from lad_dist.exchange import export as export_module
from lad_dist.exchange.export import export
from lad_dist.exchange.pictures import CELL, GAP

FORMS = ("pt", "png", "folder", "parquet", "hf")
FOLDERS = ["000-cat", "001-T_shirt_top_new", "002-Unal_x"]


def expected_pixels(distilled):
    """uint8 (S, H, H, C), computed here from the whitening's own tensors."""
    w, flat = distilled.whitening, distilled.images.flatten(1)
    if w.kind == "zca":
        flat = flat @ w.inverse + w.mean
    elif w.kind == "standardize":
        flat = (distilled.images * w.inverse[:, None, None] + w.mean[:, None, None]).flatten(1)
    pictures = flat.reshape(distilled.images.shape).clamp(0, 1)
    return (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()


def read_png(data):
    pixels = np.asarray(Image.open(data if not isinstance(data, bytes) else io.BytesIO(data)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


# --- pt ---------------------------------------------------------------------------------------------------------------


def test_pt_is_what_the_code_of_datm_and_lad_reads(tmp_path):
    """As DATM's distill/evaluation.py reads the files, and as its evaluate_synset trains on them."""
    whole = make_set()
    export(whole, "pt", tmp_path / "out")
    image_syn_eval = torch.load(tmp_path / "out" / "images_best.pt")
    label_syn_eval = torch.load(tmp_path / "out" / "labels_best.pt")
    lr = float(torch.load(tmp_path / "out" / "lr_best.pt"))
    assert image_syn_eval.dtype == label_syn_eval.dtype == torch.float32 and not image_syn_eval.requires_grad
    assert (
        torch.equal(image_syn_eval, whole.images) and torch.equal(label_syn_eval, whole.label_logits) and lr == whole.lr
    )
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.0005)
    losses = []
    for _ in range(40):
        output = net(image_syn_eval)
        loss = torch.sum(-F.log_softmax(output, dim=1) * F.softmax(label_syn_eval, dim=1)) / output.shape[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    entropy = -(whole.soft_labels * whole.soft_labels.log()).sum(1).mean()
    assert losses[-1] < losses[0] and losses[-1] < float(entropy) + 0.1  # it learns what the soft labels say


def test_pt_of_hard_labels_is_what_the_code_of_mtt_reads(tmp_path):
    export(make_set(hard=True, method="mtt"), "pt", tmp_path / "out")
    labels = torch.load(tmp_path / "out" / "labels_best.pt")
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, 1, 1, 2, 2]
    torch.nn.CrossEntropyLoss()(torch.zeros(6, 3), labels)
    assert sorted(os.listdir(tmp_path / "out")) == ["images_best.pt", "labels_best.pt", "lad_dist.json", "lr_best.pt"]
    lr = torch.load(tmp_path / "out" / "lr_best.pt")
    assert lr.shape == () and lr.dtype == torch.float32


# --- png and folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "channels"), [("zca", 3), ("standardize", 1), ("none", 3)])
def test_every_pixel_of_the_grid(tmp_path, kind, channels):
    whole = make_set(kind, channels)
    export(whole, "png", tmp_path / "out")
    grid, expected = read_png(tmp_path / "out" / "grid.png"), expected_pixels(whole)
    step = CELL + GAP
    assert grid.shape == (GAP + 3 * step, GAP + 2 * step, channels)
    for r in range(3):
        for i in range(2):
            tile = grid[GAP + r * step : GAP + r * step + CELL, GAP + i * step : GAP + i * step + CELL]
            assert np.array_equal(tile, expected[2 * r + i].repeat(CELL // 4, 0).repeat(CELL // 4, 1))
        assert (grid[r * step : r * step + GAP] == 255).all()
        row = read_png(tmp_path / "out" / "classes" / f"{FOLDERS[r]}.png")
        assert np.array_equal(row, grid[r * step : (r + 1) * step + GAP])
    assert len(os.listdir(tmp_path / "out" / "classes")) == 3


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
def test_the_folder_is_an_image_folder_with_soft_labels_beside_it(tmp_path, kind):
    whole = make_set(kind)
    export(whole, "folder", tmp_path / "out")
    read = ImageFolder(tmp_path / "out" / "images")
    assert read.classes == FOLDERS and read.targets == whole.labels.tolist()
    assert np.array_equal(np.stack([np.asarray(image) for image, _ in read]), expected_pixels(whole))
    rows = list(csv.reader((tmp_path / "out" / "labels.csv").open(encoding="utf-8", newline="")))
    assert rows[0] == ["file", "class_index", *(f"{c}_{name}" for c, name in enumerate(NAMES))]
    assert [str(tmp_path / "out" / row[0]) for row in rows[1:]] == [path for path, _ in read.samples]
    assert [int(row[1]) for row in rows[1:]] == read.targets
    assert np.array_equal(np.array([row[2:] for row in rows[1:]], dtype=np.float32), whole.soft_labels.numpy())
    said = json.loads((tmp_path / "out" / "lad_dist.json").read_text())
    assert said["lr"] == whole.lr and said["whitening"]["kind"] == kind and "rounded to 8 bits" in said["precision"]
    assert "rounded to 8 bits" in (tmp_path / "out" / "README.md").read_text()
    if kind == "standardize":
        assert said["whitening"]["mean"] == pytest.approx(whole.whitening.mean.tolist())
        assert said["whitening"]["std"] == pytest.approx((1 / whole.whitening.matrix).tolist())
    real = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    stored = Whitening.load(tmp_path / "out" / "whitening.safetensors")
    assert torch.equal(stored.apply(real), whole.preprocess(real))


def test_many_classes_keep_their_order_in_folders(tmp_path):
    names = tuple(["..", "", "a" * 300, "con"] + [f"n{i}" for i in range(1200)])
    draws, count = torch.Generator().manual_seed(0), 1204
    base = make_set("none", 1)
    fields = {**vars(base.meta), "class_names": names, "counts": (1,) * count, "ipc": 1}
    whole = lad_dist.distilled.DistilledSet(
        torch.rand(count, 1, 4, 4, generator=draws), torch.zeros(count, count), torch.arange(count),
        type(base.meta)(**fields), base.whitening)  # fmt: skip
    export(whole, "folder", tmp_path / "out")
    read = ImageFolder(tmp_path / "out" / "images")
    assert read.targets == list(range(count)) and read.classes[:2] == ["0000", "0001"]


# --- parquet and Hugging Face -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_parquet_holds_every_bit(tmp_path, channels):
    whole = make_set("zca", channels)
    whole.images[0, 0, 0, 0], whole.images[0, 0, 0, 1] = -0.0, 1e-42  # signed zero, subnormal
    export(whole, "parquet", tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "distilled.parquet")
    assert table.schema.names == ["image", "label", "class_name", "soft_label", "label_logits", "whitened"]
    for name, expected in (("whitened", whole.images.flatten(1)), ("label_logits", whole.label_logits),
                           ("soft_label", whole.soft_labels)):  # fmt: skip
        assert np.stack(table[name].to_numpy()).tobytes() == expected.numpy().tobytes()
    assert table["label"].to_pylist() == whole.labels.tolist()
    assert table["class_name"].to_pylist() == [NAMES[c] for c in whole.labels]
    assert np.array_equal(np.stack([read_png(data) for data in table["image"].to_pylist()]), expected_pixels(whole))
    said = json.loads(table.schema.metadata[b"lad_dist"])
    assert said["lr"] == whole.lr and said["shape"] == [channels, 4, 4] and said["class_names"] == list(NAMES)
    assert said == json.loads((tmp_path / "out" / "lad_dist.json").read_text())


def test_hugging_face_datasets_loads_the_folder_without_network(tmp_path, hf, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("looked for a network")

    whole = make_set()
    export(whole, "hf", tmp_path / "out")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    splits = hf.load_dataset(str(tmp_path / "out"))
    assert list(splits) == ["train"]
    train = splits["train"]
    assert isinstance(train.features["image"], hf.Image) and train.features["label"].names == list(NAMES)
    assert train.features["whitened"].length == 48 and train.features["soft_label"].length == 3
    assert train["label"][:] == whole.labels.tolist()
    pixels = np.stack([np.asarray(image) for image in train["image"]])
    assert np.array_equal(pixels, expected_pixels(whole))
    exact = train.with_format("numpy")
    for name, expected in (("whitened", whole.images.flatten(1)), ("soft_label", whole.soft_labels),
                           ("label_logits", whole.label_logits)):  # fmt: skip
        assert exact[name][:].dtype == np.float32 and exact[name][:].tobytes() == expected.numpy().tobytes()


def test_the_card_says_what_a_reader_must_know(tmp_path, hf):
    import yaml

    export(make_set(), "hf", tmp_path / "out")
    _, head, text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    said = yaml.safe_load(head)
    assert hf.Features._from_yaml_list(said["dataset_info"]["features"]) == (
        hf.load_dataset(str(tmp_path / "out"), split="train").features
    )
    assert "license" not in said and "add `license:`" in text
    for words in (
        "digits/train", "61 training images", "imbalance factor 25", "2 per class of 3", "lad, iteration 250",
        "arXiv:2408.14506", "Alpaydin", "0.012299999594688416", '| T-shirt/top, "new" | 9 |', "\\| x | 2 |",
    ):  # fmt: skip
        assert words in text, words


def test_an_imported_set_claims_no_method(tmp_path):
    export(make_set(method="imported", dataset="list/train", iteration=0), "hf", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Method: imported." in text and "arXiv" not in text and "The set's author" in text


@pytest.mark.parametrize("form", FORMS)
def test_every_export_says_where_it_comes_from_and_no_private_path(tmp_path, form):
    export(make_set(), form, tmp_path / "out")
    text = (tmp_path / "out" / "lad_dist.json").read_text(encoding="utf-8")
    said = json.loads(text)
    assert said["form"] == form and said["imbalance_factor"] == 25 and said["training_images_per_class"] == [50, 9, 2]
    assert said["method"] == "lad" and said["recipe"]["data"] == {"dataset": "digits"} and len(said["cite"]) == 5
    assert all(b"/home/me" not in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_command_exports_a_run(a_run, lad, tmp_path, monkeypatch, form):
    run = a_run()
    monkeypatch.chdir(tmp_path)
    ended = lad("export", run, "--to", form)
    assert ended.exit_code == 0, ended.output
    assert f"6 images in exports/digits-lt-{form}" in ended.output
    again = lad("export", run / "distilled", "--to", form)
    assert again.exit_code == 6 and "--force replaces it" in again.output
    (tmp_path / "exports" / f"digits-lt-{form}" / "old").write_text("")
    assert lad("export", run, "--to", form, "--force").exit_code == 0
    assert not (tmp_path / "exports" / f"digits-lt-{form}" / "old").exists()
    assert os.listdir(tmp_path / "exports") == [f"digits-lt-{form}"]
    assert len(lad_dist.load(run)) == 6


def test_a_run_without_a_distilled_set_is_named(tmp_path, lad):
    (tmp_path / "run").mkdir()
    ended = lad("export", tmp_path / "run", "--to", "pt", "--out", tmp_path / "out")
    assert ended.exit_code == 6 and f"{tmp_path / 'run'}: is not a distilled set" in ended.output
    assert ended.output.count("error:") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("force", [False, True])
def test_force_replaces_exports_and_nothing_else(tmp_path, force):
    mine = tmp_path / "mine"
    mine.mkdir()
    export(make_set(), "pt", mine, force)  # empty: nothing is lost
    for other in (tmp_path / "thesis", tmp_path / "file"):
        if other.name == "file":
            other.write_text("mine")
        else:
            other.mkdir()
            (other / "chapter").write_text("mine")
        with pytest.raises(DistilledError, match="not an export of lad-dist"):
            export(make_set(), "pt", other, force)
    assert (tmp_path / "thesis" / "chapter").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_place_that_cannot_be_written(tmp_path, lad, a_run):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="out: cannot be"):
        export(make_set(), "pt", tmp_path / "file" / "out")
    assert lad("export", a_run(), "--to", "pt", "--out", tmp_path / "file" / "out").exit_code == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(StorageError, match="Permission denied"):
        export(make_set(), "hf", tmp_path / "closed" / "out")


@pytest.mark.parametrize("form", FORMS)
def test_an_export_that_fails_leaves_the_old_one_and_no_trace(tmp_path, form, monkeypatch):
    export(make_set(), form, tmp_path / "out")
    before = (tmp_path / "out" / "lad_dist.json").read_bytes()

    def full(_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "as_json", full)
    with pytest.raises(StorageError, match="free some space"):
        export(make_set(method="mtt"), form, tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out" / "lad_dist.json").read_bytes() == before


def test_what_a_killed_export_left_is_removed(tmp_path):
    from lad_dist.rundir import host_name

    dead, alive = (tmp_path / f".tmp-{host_name()}-{pid}-x" for pid in (2**22 + 1, os.getpid()))
    dead.mkdir(), alive.mkdir()
    export(make_set(), "pt", tmp_path / "out")
    assert not dead.exists() and alive.exists()
