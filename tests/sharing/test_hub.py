"""Push, pull and load through a hub on 127.0.0.1: the bytes travel over HTTP, by huggingface_hub's own requests."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lad_dist
from lad_dist.errors import SharingError
from lad_dist.sharing import contents

ROOT = Path(__file__).parents[2]
FILES = {".gitattributes", "README.md", "SHA256SUMS", "meta.json", "recipe.yaml", "results.json", "synthetic.png",
         "teachers.safetensors", "tensors.safetensors", "whitening.safetensors"}  # fmt: skip


def refused(ended) -> str:
    """The one line of an error of sharing."""
    assert ended.exit_code == SharingError.exit_code, ended.output
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def same(one, other) -> None:
    for name in ("images", "label_logits", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.lr == other.lr and one.meta.class_names == other.meta.class_names
    assert torch.equal(one.whitening.mean, other.whitening.mean)
    for ours, theirs in zip(one.teachers.weights, other.teachers.weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_set_is_pushed_pulled_and_loaded(hub, make_run, lad, tmp_path):
    run = make_run()
    pushed = lad("push", run, "hf://me/birds", "--license", "cc-by-4.0")
    assert pushed.exit_code == 0, pushed.output
    revision = re.search(r"pushed to hf://me/birds@([0-9a-f]{40}): 9 files, 0\.\d+ MB, 6 images", pushed.stdout)[1]
    assert set(hub.repositories["me/birds"].files) == FILES
    pulled = lad("pull", "hf://me/birds", tmp_path / "mine")
    assert pulled.exit_code == 0 and {f.name for f in (tmp_path / "mine").iterdir()} == FILES - {".gitattributes"}
    for name in FILES - {".gitattributes"}:
        assert (tmp_path / "mine" / name).read_bytes() == hub.repositories["me/birds"].files[name]
    original = lad_dist.load(run)
    for where in (tmp_path / "mine", "hf://me/birds", f"hf://me/birds@{revision}", "hf://datasets/me/birds@main"):
        same(lad_dist.load(where), original)


def test_it_works_in_a_process_of_its_own_by_the_environment_alone(hub, make_run, tmp_path):
    run = make_run()
    code = (
        "import sys, lad_dist; from lad_dist.sharing import transfer\n"
        f"place = transfer.push(__import__('pathlib').Path({str(run)!r}), 'hf://me/birds').place\n"
        "images, soft_labels, lr = lad_dist.load(place)\n"
        "print(place, tuple(images.shape), lr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"hf://me/birds@[0-9a-f]{40} \(6, 3, 4, 4\) 0\.0122999\d+\n", done.stdout)


def test_nothing_private_travels(hub, make_run, lad, private, tmp_path):
    run = make_run()
    local = b"".join(file.read_bytes() for file in run.rglob("*") if file.is_file())
    assert all(word.encode() in local for word in private)
    assert lad("push", run, "hf://me/birds").exit_code == 0
    files = hub.repositories["me/birds"].files
    for word in (*private, str(tmp_path), "/tmp"):
        assert [name for name, data in files.items() if word.encode() in data] == [], word
    assert lad_dist.load("hf://me/birds").meta.versions == {"torch": "2", "imported from": "sha256:0a"}
    recipe = yaml.safe_load(files["recipe.yaml"])
    assert recipe["data"] == {"dataset": "image-folder"} and recipe["distill"] == {"iterations": 9}


def test_the_real_images_it_started_from_stay_at_home(hub, make_run, lad):
    run = make_run()
    assert bool((lad_dist.load(run).initial_images == 7).all())
    assert lad("push", run, "hf://me/birds").exit_code == 0
    shared = lad_dist.load("hf://me/birds")
    assert torch.equal(shared.initial_images, shared.images) and shared.initial_label_logits is None


def test_the_card(hub, make_run, lad):
    assert lad("push", make_run(), "hf://me/birds", "--license", "cc-by-4.0").exit_code == 0
    text = hub.repositories["me/birds"].files["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and {"dataset-distillation", "long-tailed", "lad"} <= set(head["tags"])
    assert "![" in text and "](synthetic.png)" in text and 'load("hf://me/birds")' in text
    assert "| Distilled (LAD) | convnet | 2 | 60.0 ± 14.1 | 60.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 0.0 |" in text
    assert "recipe.yaml" in text and "arXiv:2408.14506" in text and "cc-by-4.0." in text
    assert hub.repositories["me/birds"].files["synthetic.png"].startswith(b"\x89PNG")


def test_no_licence_is_invented(hub, make_run, lad):
    assert lad("push", make_run(), "hf://me/birds").exit_code == 0
    text = hub.repositories["me/birds"].files["README.md"].decode()
    assert 'license: "unknown"' in text and "None is known" in text
    assert "valid: one that the hub knows" in refused(lad("push", "run", "hf://me/birds", "--license", "MIT: yes"))


def test_a_second_push_of_the_same_set_changes_nothing_and_of_another_needs_force(hub, make_run, lad):
    one, other = make_run("one"), make_run("other", iteration=7)
    assert lad("push", one, "hf://me/birds").exit_code == 0 and lad("push", one, "hf://me/birds").exit_code == 0
    first = lad_dist.load("hf://me/birds")
    line = refused(lad("push", other, "hf://me/birds"))
    assert line == "error: hf://me/birds: already holds another set; --force replaces it, or choose another address"
    old = hub.repositories["me/birds"].refs["main"]
    assert lad("push", other, "hf://me/birds", "--force").exit_code == 0
    assert lad_dist.load("hf://me/birds").meta.iteration == 7
    assert lad_dist.load(f"hf://me/birds@{old}").meta.iteration == first.meta.iteration != 7


def test_a_replaced_set_leaves_no_file_of_the_old_one_and_keeps_the_owners(hub, make_run, lad):
    assert lad("push", make_run("one"), "hf://me/birds").exit_code == 0
    repository = hub.repositories["me/birds"]
    repository.commit({**repository.files, "LICENSE": b"of the owner"})
    without = make_run("other")
    whole = lad_dist.load(without)
    whole.teachers = None
    (without / "distilled" / "teachers.safetensors").unlink()
    whole.write(without / "distilled")
    assert lad("push", without, "hf://me/birds", "--force").exit_code == 0
    assert set(repository.files) == FILES - {"teachers.safetensors"} | {"LICENSE"}
    assert lad_dist.load("hf://me/birds").teachers is None


def test_a_repository_with_other_files_is_left_alone(hub, make_run, lad):
    from stand_in import Repository

    hub.repositories["me/birds"] = Repository()
    oid = hub.repositories["me/birds"].commit({"train.parquet": b"x"})
    for more in ((), ("--force",)):
        line = refused(lad("push", make_run(f"run{len(more)}"), "hf://me/birds", *more))
        assert "hf://me/birds: already holds other files (train.parquet)" in line
    assert hub.repositories["me/birds"].refs["main"] == oid


def test_private(hub, make_run, lad, monkeypatch, tmp_path):
    run = make_run()
    assert lad("push", run, "hf://me/birds", "--private").exit_code == 0
    assert hub.repositories["me/birds"].private
    same(lad_dist.load("hf://me/birds"), lad_dist.load(run))
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(tmp_path / "cache")
    line = refused(lad("pull", "hf://me/birds", tmp_path / "mine"))
    assert f"hf://me/birds: {hub.url} has no such data set, or HF_TOKEN does not open it; valid: " in line
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    assert lad("push", run, "hf://me/open").exit_code == 0
    assert "hf://me/open: is public already; valid: another name" in refused(
        lad("push", run, "hf://me/open", "--private")
    )


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_push_without_a_token_reaches_nobody(hub, make_run, lad, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    line = refused(lad("push", make_run(), "hf://me/birds"))
    assert (
        line.startswith(f"error: hf://me/birds: pushing needs a token of {hub.url}; valid: HF_TOKEN") and not hub.seen
    )


def test_a_token_without_the_right(hub, make_run, lad, monkeypatch):
    line = refused(lad("push", make_run("one"), "hf://somebody-else/birds"))
    assert "hf://somebody-else/birds: " in line and "refuses the token (403)" in line
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses the token (401); valid: an HF_TOKEN" in refused(lad("push", make_run("two"), "hf://me/birds"))


def test_missing_repository_and_revision(hub, make_run, lad, tmp_path):
    line = refused(lad("pull", "hf://me/nothing", tmp_path / "mine"))
    assert f"hf://me/nothing: {hub.url} has no such data set" in line and not (tmp_path / "mine").exists()
    assert lad("push", make_run(), "hf://me/birds").exit_code == 0
    line = refused(lad("pull", "hf://me/birds@v9", tmp_path / "mine"))
    assert line == "error: hf://me/birds@v9: has no revision v9; valid: a branch, a tag or a commit"


def test_no_network(hub, make_run, lad, monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", closed)
    for line in (
        refused(lad("push", make_run(), "hf://me/birds")),
        refused(lad("pull", "hf://me/birds", tmp_path / "x")),
    ):
        assert f"hf://me/birds: {closed} cannot be reached (" in line and "valid: a network connection" in line


def test_a_hub_that_fails(hub, lad, tmp_path):
    hub.failing = True
    line = refused(lad("pull", "hf://me/birds", tmp_path / "mine"))
    assert f"hf://me/birds: {hub.url} answers 503" in line and not (tmp_path / "mine").exists()


def test_a_cached_set_needs_no_network(hub, make_run, lad):
    run = make_run()
    assert lad("push", run, "hf://me/birds").exit_code == 0
    same(lad_dist.load("hf://me/birds"), lad_dist.load(run))
    hub.failing = True
    same(lad_dist.load("hf://me/birds"), lad_dist.load(run))


@pytest.mark.parametrize("name", ["meta.json", "tensors.safetensors"])
def test_a_damaged_file_is_named_and_nothing_is_written(hub, make_run, lad, tmp_path, name):
    assert lad("push", make_run(), "hf://me/birds").exit_code == 0
    repository = hub.repositories["me/birds"]
    data = bytearray(repository.files[name])
    data[len(data) // 2] ^= 1
    repository.commit({**repository.files, name: bytes(data)})
    line = refused(lad("pull", "hf://me/birds", tmp_path / "place" / "mine"))
    assert f"hf://me/birds: {name} does not match its SHA256SUMS: it is damaged" in line
    assert not (tmp_path / "place").exists()
    with pytest.raises(SharingError, match=f"{name} does not match"):
        lad_dist.load("hf://me/birds")


def test_a_file_damaged_in_the_cache_alone_is_fetched_again(hub, make_run, lad, tmp_path):
    run = make_run()
    assert lad("push", run, "hf://me/birds").exit_code == 0
    lad_dist.load("hf://me/birds")
    (cached,) = (tmp_path / "cache").rglob("tensors.safetensors")
    cached.resolve().write_bytes(b"damaged")
    same(lad_dist.load("hf://me/birds"), lad_dist.load(run))


def test_a_set_that_is_no_set_though_its_checksums_fit(hub, make_run, lad, tmp_path):
    from stand_in import Repository

    folder = tmp_path / "made"
    folder.mkdir()
    for name in ("meta.json", "tensors.safetensors", "whitening.safetensors"):
        (folder / name).write_bytes(b"{}")
    (folder / "SHA256SUMS").write_text(contents.sums(folder))
    hub.repositories["me/birds"] = Repository()
    hub.repositories["me/birds"].commit({f.name: f.read_bytes() for f in folder.iterdir()})
    ended = lad("pull", "hf://me/birds", tmp_path / "mine")
    assert ended.exit_code == 6 and "error: hf://me/birds: is not a whole distilled set: " in ended.stderr


@pytest.mark.parametrize("lines", ["", "x\n", f"{'0' * 64}  ../../etc/passwd\n", f"{'0' * 64}  meta.json\n"])
def test_checksums_of_something_else(hub, lad, tmp_path, lines):
    from stand_in import Repository

    hub.repositories["me/birds"] = Repository()
    hub.repositories["me/birds"].commit({"SHA256SUMS": lines.encode(), "meta.json": b"{}"})
    assert "its SHA256SUMS is not of a shared set" in refused(lad("pull", "hf://me/birds", tmp_path / "mine"))


def test_only_files_of_a_set_are_fetched(hub, make_run, lad, tmp_path):
    assert lad("push", make_run(), "hf://me/birds").exit_code == 0
    repository = hub.repositories["me/birds"]
    repository.commit({**repository.files, "huge.bin": b"x", "run.py": b"print()"})
    assert lad("pull", "hf://me/birds", tmp_path / "mine").exit_code == 0
    assert {f.name for f in (tmp_path / "mine").iterdir()} == FILES - {".gitattributes"}
    assert not [line for line in hub.seen if "huge.bin" in line or "run.py" in line]


def test_without_the_library(make_run, lad, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for words in (("push", make_run(), "hf://me/birds"), ("pull", "hf://me/birds", tmp_path / "mine")):
        assert refused(lad(*words)) == (
            "error: hf://me/birds: the hub needs huggingface_hub, which is not installed; valid: pip install 'lad-dist[hub]'"
        )
