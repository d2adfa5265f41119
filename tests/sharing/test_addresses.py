"""Addresses, and shared sets as folders and as files of a web server."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
import torch

import lad_dist
from lad_dist.errors import SharingError
from lad_dist.sharing.address import FolderAddress, HubAddress, WebAddress, parse


@pytest.fixture
def shared(make_run, lad, tmp_path) -> Path:
    """A set pushed to a folder."""
    folder = tmp_path / "shared" / "birds"
    assert lad("push", make_run(), folder).exit_code == 0
    return folder


@pytest.fixture
def web(shared):
    """The address of that folder on a web server of 127.0.0.1."""
    handler = functools.partial(_Quiet, directory=str(shared.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/birds"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def refused(ended) -> str:
    assert ended.exit_code == SharingError.exit_code, ended.output
    (line,) = ended.stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(("text", "address"), [
    ("hf://me/birds", HubAddress("me/birds")),
    ("hf://me/birds@v1.0", HubAddress("me/birds", "v1.0")),
    ("hf://me/birds@refs/pr/1", HubAddress("me/birds", "refs/pr/1")),
    ("hf://datasets/me/b_1.d-s", HubAddress("me/b_1.d-s")),
    ("https://example.org/sets/birds/", WebAddress("https://example.org/sets/birds")),
    ("file:///sets/birds", FolderAddress(Path("/sets/birds"))),
    ("sets/birds", FolderAddress(Path("sets/birds"))),
])  # fmt: skip
def test_addresses(text, address):
    assert parse(text) == address and parse(text).name in ("birds", "b_1.d-s")


@pytest.mark.parametrize("text", [
    "hf://birds", "hf://me/birds/more/x", "hf:me/birds", "hf://", "hf://me/birds@", "hf://me/-birds", "hf://me/a--b", "hf://me/..",
    "hf://m e/birds", "hf://me/birds@../x", "s3://bucket/birds", "https://example.org", "https://me:secret@example.org/birds",
    "https://example.org/birds?token=secret", "ftp://example.org/birds", "file://host/birds",
])  # fmt: skip
def test_addresses_that_are_none(text, lad, tmp_path):
    line = refused(lad("pull", text, tmp_path / "mine"))
    assert line.startswith("error: ") and "valid: " in line and "hf://OWNER/NAME" in line and "secret" not in line
    with pytest.raises(SharingError):
        lad_dist.load(text)


def test_a_push_goes_to_the_hub_or_a_folder(make_run, lad):
    run = make_run()
    assert "files cannot be pushed to a web server; valid: hf://OWNER/NAME, or a folder" in refused(
        lad("push", run, "https://example.org/birds")
    )
    assert "a push goes to the main branch" in refused(lad("push", run, "hf://me/birds@v1"))
    assert "--private is for the hub" in refused(lad("push", run, "somewhere", "--private"))


@pytest.mark.parametrize("part", ["", "distilled"])
def test_a_run_and_its_distilled_set_are_shared_alike(make_run, lad, tmp_path, part):
    run = make_run()
    assert lad("push", run / part, tmp_path / "birds").exit_code == 0
    assert "| Distilled (LAD) | convnet | 2 |" in (tmp_path / "birds" / "README.md").read_text()


def test_a_shared_set_is_shared_on_with_its_results(shared, lad, tmp_path):
    assert lad("push", shared, tmp_path / "again" / "birds").exit_code == 0
    for file in shared.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "birds" / file.name).read_bytes(), file.name


def test_a_run_that_was_not_measured(make_run, lad, tmp_path):
    run = make_run()
    shutil.rmtree(run / "evaluation")
    assert lad("push", run, tmp_path / "birds").exit_code == 0
    assert "Not measured." in (tmp_path / "birds" / "README.md").read_text()
    assert not (tmp_path / "birds" / "results.json").exists()


def test_no_set_no_push(lad, tmp_path):
    ended = lad("push", tmp_path, tmp_path / "birds")
    assert ended.exit_code == 6 and "is not a distilled set" in ended.stderr and not (tmp_path / "birds").exists()


def test_folders_are_pulled_and_replaced(shared, make_run, lad, tmp_path):
    assert lad("pull", shared, tmp_path / "mine").exit_code == 0
    images, _, lr = lad_dist.load(tmp_path / "mine")
    assert torch.equal(images, lad_dist.load(shared).images) and lr == lad_dist.load(shared.as_uri()).lr
    other = make_run("other", iteration=7)
    assert "already holds another set; --force replaces it" in refused(lad("push", other, shared))
    assert lad("push", other, shared, "--force").exit_code == 0 and lad_dist.load(shared).meta.iteration == 7


@pytest.mark.parametrize("more", [(), ("--force",)])
def test_a_folder_with_other_files_is_left_alone(shared, make_run, lad, more):
    (shared / "notes.txt").write_text("mine")
    assert "already holds other files (notes.txt)" in refused(
        lad("push", make_run("other", iteration=7), shared, *more)
    )
    assert (shared / "notes.txt").exists() and lad_dist.load(shared).meta.iteration == 250


def test_a_second_pull_finds_the_same(shared, lad, tmp_path):
    assert lad("pull", shared, tmp_path / "mine").exit_code == 0
    (tmp_path / "mine" / "README.md").write_text("my own card")
    ended = lad("pull", shared, tmp_path / "mine")
    assert ended.exit_code == 0 and ended.stdout.startswith(f"verified, and already in {tmp_path / 'mine'}: 9 files")
    assert (tmp_path / "mine" / "README.md").read_text() == "my own card"


@pytest.mark.parametrize("name", ["meta.json", "notes.txt"])
def test_other_content_is_not_overwritten(shared, lad, tmp_path, name):
    mine = tmp_path / "mine"
    assert lad("pull", shared, mine).exit_code == 0
    (mine / name).write_text("mine")
    line = refused(lad("pull", shared, mine))
    assert line.startswith(f"error: {mine}: already holds other content than {shared} ({name}); valid: a new folder")
    assert (mine / name).read_text() == "mine"


def test_the_default_folder_is_named_after_the_address(web, lad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = lad("pull", web)
    assert ended.exit_code == 0 and ended.stdout.startswith("pulled to birds: 9 files")
    assert torch.equal(lad_dist.load("birds").images, lad_dist.load(web).images)


def test_a_web_server_without_a_set(web, lad, tmp_path, shared):
    assert "holds no shared set (no SHA256SUMS)" in refused(lad("pull", web + "/more", tmp_path / "mine"))
    (shared / "tensors.safetensors").write_bytes(b"x")
    assert "tensors.safetensors does not match its SHA256SUMS" in refused(lad("pull", web, tmp_path / "mine"))
    (shared / "tensors.safetensors").unlink()
    assert "tensors.safetensors is missing, which its SHA256SUMS lists" in refused(lad("pull", web, tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", ["meta.json", "recipe.yaml", "results.json", "synthetic.png", "tensors.safetensors",
                                  "teachers.safetensors", "whitening.safetensors"])  # fmt: skip
def test_every_file_is_verified(shared, lad, tmp_path, name):
    data = bytearray((shared / name).read_bytes())
    data[len(data) // 2] ^= 1
    (shared / name).write_bytes(data)
    assert f"{name} does not match its SHA256SUMS" in refused(lad("pull", shared, tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


def test_a_web_server_that_is_not_there(lad, tmp_path):
    line = refused(lad("pull", "http://127.0.0.1:9/birds", tmp_path / "mine"))
    assert "http://127.0.0.1:9/birds/SHA256SUMS: cannot be reached (" in line


def test_nothing_is_left_of_a_pull_that_fails_at_the_end(shared, lad, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    ended = lad("pull", shared, tmp_path / "place" / "mine")
    assert ended.exit_code == 8 and "No space left on device" in ended.stderr
    assert list((tmp_path / "place").iterdir()) == []


def test_an_address_that_is_no_folder(lad, tmp_path):
    assert "is not a folder; valid: hf://OWNER/NAME" in refused(lad("pull", tmp_path / "nothing", tmp_path / "mine"))


def test_a_set_is_exported_from_its_address(web, lad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = lad("export", web, "--to", "pt")
    assert ended.exit_code == 0, ended.output
    assert torch.equal(torch.load("exports/birds-pt/images_best.pt"), lad_dist.load(web).images)


def test_a_set_is_evaluated_from_its_address(pipeline_of, lad, tmp_path, monkeypatch):
    """As the run that made it would measure it: the same images, labels, rate and teachers."""
    from lad_dist import recipe_file

    pipeline = pipeline_of("made", evaluate={"baselines": [], "seeds": 1})
    pipeline.distill()
    monkeypatch.chdir(tmp_path)
    assert lad("push", "made", "digits").exit_code == 0
    job = tmp_path / "job.yaml"
    job.write_text(recipe_file.dump(pipeline.recipe))
    ended = lad("import", job, (tmp_path / "digits").as_uri(), "--from", "set", "--out", "theirs")
    assert ended.exit_code == 0, ended.output
    there, here = lad_dist.load("made"), lad_dist.load("theirs")
    assert torch.equal(there.images, here.images) and torch.equal(there.label_logits, here.label_logits)
    assert there.lr == here.lr and len(there.teachers.weights) == len(here.teachers.weights)
    assert here.meta.selection == there.meta.selection and here.meta.versions["method there"] == "lad"
    other = lad("import", job, "digits", "--from", "set", "--out", "refused", "--set", "data.n_max=19")
    assert other.exit_code == 6 and "was distilled from other training images" in other.stderr
