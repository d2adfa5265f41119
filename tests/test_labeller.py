"""Teachers that travel with a distilled set: saved with it, exported, imported, refused where damaged."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from lad_dist import load, results
from lad_dist.data.prepare import prepare
from lad_dist.errors import DistilledError, RecipeError
from lad_dist.evaluate.sources import training_set
from lad_dist.exchange import tables
from lad_dist.exchange.about import CARRIERS
from lad_dist.exchange.export import export
from lad_dist.exchange.install import install
from lad_dist.labeller import FILE, Labeller
from lad_dist.recipe import MOST_TEACHERS, ModelConfig
from lad_dist.rundir import load_tensors, save_tensors
from lad_dist.teachers import Teachers
from lad_dist.trajectories.reader import Buffer

MODEL = ModelConfig(width=4, depth=1)


@pytest.fixture
def run(pipeline_of):
    pipeline = pipeline_of()
    pipeline.distill()
    return pipeline


def made(count=2, temperature=1.5, shift=0.0) -> Labeller:
    from lad_dist.models.network import build

    def weights(seed):
        network = build(MODEL, 1, 8, 3, seed=seed, purpose=("t",))
        return {name: p.detach() + shift for name, p in network.named_parameters()}

    return Labeller(MODEL, (1, 8, 3), [weights(seed) for seed in range(count)], temperature)


def test_a_distilled_set_carries_the_experts_that_label(run):
    teachers = load(run.run.distilled).labeller()
    recipe, images = run.recipe, load(run.run.distilled).images
    buffer = Buffer(run.run.trajectories, recipe.experts_hash())
    count = min(recipe.experts.count, MOST_TEACHERS)
    assert len(teachers.weights) == count and teachers.temperature == recipe.distill.label_temperature
    expected = Teachers(recipe, run.data, buffer).labeller(count)(images)
    torch.testing.assert_close(teachers(images), expected)
    assert expected.shape == (len(images), 10) and torch.allclose(expected.sum(1), torch.ones(len(images)))
    assert teachers.bytes == sum(4 * t.numel() for one in teachers.weights for t in one.values())


def test_a_set_without_teachers_says_so(run):
    folder = run.run.distilled
    doc = json.loads((folder / "meta.json").read_text())
    del doc["sha256"][FILE]  # as an older version wrote it
    (folder / FILE).unlink()
    (folder / "meta.json").write_text(json.dumps(doc))
    with pytest.raises(
        DistilledError, match=r"carries no teachers\.safetensors.*valid: a set distilled with this version"
    ):
        load(folder).labeller()


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_damage_is_named(run, damage):
    file = run.run.distilled / FILE
    if damage == "flipped":
        held = bytearray(file.read_bytes())
        held[-5] ^= 1
        file.write_bytes(held)
    else:
        file.unlink()
    with pytest.raises(DistilledError, match=FILE):
        load(run.run.distilled)


# --- the file -----------------------------------------------------------------------------------------------------------


def test_saved_and_read_they_say_the_same(tmp_path):
    images, teachers = torch.randn(5, 1, 8, 8), made()
    for name in ("a", "b"):
        teachers.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = Labeller.load(tmp_path / "a")
    assert torch.equal(again(images), teachers(images)) and again.temperature == 1.5 and again.shape == (1, 8, 3)
    assert not torch.equal(made(1)(images), teachers(images))


def changed(path, about=None, tensors=None) -> None:
    """The file with another description or other tensors, and a fitting checksum."""
    there, metadata = load_tensors(path)
    key = "lad_dist_teachers"
    said = {**json.loads(metadata[key]), **(about or {})}
    save_tensors(tensors or there, path, {key: json.dumps(said)})


@pytest.mark.parametrize(("about", "said"), [
    ({"temperature": 0.0}, "temperature of 0"),
    ({"temperature": "warm"}, "not a whole file of teachers"), ({"shape": [1, 8]}, "not a whole file of teachers"),
    ({"shape": [3, 8, 3]}, "teacher 0 are not those of its network"), ({"model": {"width": 0}}, "not a whole file"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, about, said):
    path = tmp_path / FILE
    made().save(path)
    changed(path, about)
    with pytest.raises(DistilledError, match=f"{FILE}: .*({said})"):
        Labeller.load(path).check()


@pytest.mark.parametrize(("names", "said"), [
    ([], "holds no teachers"), (["0.a", "2.a"], "numbered .0, 2."), (["0.classifier.bias"], "teacher 0 are not those"),
    (["x.a"], "not a whole file"), ([f"{10**12}.a"], "numbered"),
])  # fmt: skip
def test_tensors_that_are_no_teachers_are_refused(tmp_path, names, said):
    path = tmp_path / FILE
    made().save(path)
    _, metadata = load_tensors(path)
    save_tensors({name: torch.zeros(3) for name in names}, path, {"lad_dist_teachers": metadata["lad_dist_teachers"]})
    with pytest.raises(DistilledError, match=f"{FILE}: .*{said}"):
        Labeller.load(path).check()


def test_a_set_whose_network_is_elsewhere_loads_and_its_teachers_say_what_is_missing(run):
    path = run.run.distilled / FILE
    changed(path, {"model": {"network": "nowhere_at_all:Net"}})
    doc = json.loads((run.run.distilled / "meta.json").read_text())
    doc["sha256"][FILE] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run.run.distilled / "meta.json").write_text(json.dumps(doc))
    distilled = load(run.run.distilled)
    assert len(distilled) == 20
    with pytest.raises(RecipeError, match="nowhere_at_all"):
        distilled.labeller()


def test_another_kind_of_file_is_refused(tmp_path):
    path = tmp_path / FILE
    for text in (b"", b"no tensors", b"\0" * 100):
        path.write_bytes(text)
        with pytest.raises(DistilledError, match="is not a whole file of teachers"):
            Labeller.load(path)
    save_tensors({"x": torch.zeros(1)}, path)
    with pytest.raises(DistilledError, match="is not a whole file of teachers"):
        Labeller.load(path)
    with pytest.raises(DistilledError, match="is missing"):
        Labeller.load(tmp_path / "nowhere")


# --- exports ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pt", "png", *CARRIERS])
def test_exports_that_hold_the_whitening_hold_the_teachers(run, tmp_path, form):
    distilled = load(run.run.distilled)
    export(distilled, form, tmp_path / form)
    said = json.loads((tmp_path / form / "lad_dist.json").read_text())
    if form not in CARRIERS:
        assert said["teachers"] is None and not (tmp_path / form / FILE).exists()
        return
    assert said["teachers"] == {"file": FILE, "count": len(distilled.labeller().weights), "temperature": 1.0}
    assert (tmp_path / form / FILE).read_bytes() == (run.run.distilled / FILE).read_bytes()
    if form != "parquet":
        assert FILE in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize("form", ["parquet", "hf"])
def test_an_import_keeps_them_and_trains_with_them(run, pipeline_of, tmp_path, form):
    export(load(run.run.distilled), form, tmp_path / form)
    theirs = pipeline_of("theirs")
    data = prepare(theirs.recipe, theirs.run.whitening, torch.device("cpu"))
    install(tables.read(tmp_path / form), theirs.recipe, data, theirs.run)
    shutil.rmtree(theirs.run.trajectories.resolve(), ignore_errors=True)  # no experts are needed
    images = load(run.run.distilled).images
    expected = load(run.run.distilled).labeller()(images)
    assert torch.equal(load(theirs.run.distilled).labeller()(images), expected)
    trained = training_set(theirs.recipe, data, theirs.run, "distilled-teacher", 0)
    assert torch.equal(trained.label_views(images), expected)
    assert results.is_imported(theirs.run)


def test_an_import_whose_teachers_are_gone_or_of_other_images_is_refused(run, pipeline_of, tmp_path):
    export(load(run.run.distilled), "parquet", tmp_path / "out")
    theirs = pipeline_of("theirs")
    made(shift=0.0).save(tmp_path / "out" / FILE)
    data = prepare(theirs.recipe, theirs.run.whitening, torch.device("cpu"))
    with pytest.raises(DistilledError, match="teachers are of 1x8x3"):
        install(tables.read(tmp_path / "out"), theirs.recipe, data, theirs.run)
    (tmp_path / "out" / FILE).unlink()
    with pytest.raises(DistilledError, match=f"{FILE}: is missing"):
        tables.read(tmp_path / "out")
    assert tables.read(tmp_path / "out" / "distilled.parquet").teachers is None
