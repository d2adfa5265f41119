"""``replay_buffer_N.pt``, the files of the MTT family: written, read by a peer's code, read back, refused."""

import contextlib
import io
import math
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from lad_dist import cli
from lad_dist.errors import Interrupted, TrajectoryError
from lad_dist.trajectories import Buffer, PartWriter, claims
from lad_dist.trajectories.replay import complete_experts, export_pt, import_pt
from lad_dist.trajectories.replay_file import pt_files

LAST = {"representation": 3, "classifier": 2}


@pytest.fixture
def meta(meta):
    return replace(
        meta, recipe={"experts": {"epochs": LAST["representation"], "classifier_epochs": LAST["classifier"]}}
    )


@pytest.fixture
def full(tmp_path, meta, write):
    """A buffer with three complete experts."""
    for stage, last in LAST.items():
        for expert in range(3):
            write(last, stage, expert)
    return Buffer(tmp_path / "buffer")


@pytest.fixture
def exported(full, tmp_path):
    export_pt(full, tmp_path / "pt", experts_per_file=2)
    return tmp_path / "pt"


@pytest.fixture
def taken_in(tmp_path, meta):
    """Imports files of a stage into ``tmp_path/new`` as the recipe asks, with changes."""

    def run(files, stage="representation", **changes):
        files = files if isinstance(files, list) else [files]
        return import_pt(files, tmp_path / "new", changes.pop("meta", meta), stage, **{"epochs": LAST[stage]} | changes)

    return run


def saved(path, content):
    torch.save(content, path)
    return path


def parts(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet"))


# --- there and back -----------------------------------------------------------------------------------------------------


def test_both_stages_survive_the_round_trip(full, exported, taken_in, tmp_path):
    heard = []
    for stage in LAST:
        assert taken_in(pt_files(exported / stage), stage, epochs_per_part=2, on_expert=heard.append) == 3
    new = Buffer(tmp_path / "new")
    assert heard == [0, 1, 2] * 2
    assert new.digest() == full.digest()
    assert new.verify() == []
    assert not new.meta.differences(full.meta)


def test_parameters_that_are_modules_own_are_read(meta, taken_in, tmp_path):
    """Some peers save ``nn.Parameter``, and more epochs than are asked for; the first ones are taken."""
    content = [[[torch.nn.Parameter(torch.full(shape, float(e))) for _, shape in meta.parameters] for e in range(6)]]
    assert taken_in(saved(tmp_path / "a.pt", content), first_expert=4) == 1
    new = Buffer(tmp_path / "new")
    assert (new.experts("representation"), new.epochs("representation", 4)) == ((4,), (0, 1, 2, 3))
    assert new.read("representation", 4, 2).tolist() == [2.0] * meta.vector_length("representation")


def test_only_complete_experts_are_exported(full, write, tmp_path):
    write(1, "representation", 3)  # still in training
    write(2, "classifier", 3)
    write(3, "representation", 4, first=1)  # its initialisation is missing
    full.refresh()
    assert complete_experts(full, "representation") == complete_experts(full, "classifier") == (0, 1, 2)
    files = export_pt(full, tmp_path / "pt")
    assert [len(torch.load(file)) for file in files] == [3, 3]


def test_export_replaces_nothing(full, tmp_path):
    old = tmp_path / "pt" / "classifier" / "replay_buffer_7.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"precious")
    with pytest.raises(TrajectoryError, match=r"replay_buffer_7\.pt: already exists"):
        export_pt(full, tmp_path / "pt")
    assert old.read_bytes() == b"precious" and not (tmp_path / "pt" / "representation").exists()
    assert len(export_pt(full, tmp_path / "pt", ["representation"])) == 1


# --- what is not an expert of this recipe ---------------------------------------------------------------------------------


def content_of(exported, stage="representation"):
    return torch.load(exported / stage / "replay_buffer_0.pt")


def changed(content, expert, epoch, layer, change):
    content[expert][epoch][layer] = change(content[expert][epoch][layer].clone())


def nan(tensor):
    tensor.view(-1)[-1] = math.nan
    return tensor


class Code:
    """Runs when it is unpickled by a loader that lets it."""

    def __reduce__(self):
        return (print, ("the pickle's code ran",))


def test_an_interruption_is_not_taken_for_damage(exported, taken_in, monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted("interrupted by SIGTERM")

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(Interrupted):
        taken_in(pt_files(exported / "representation"))


# --- what is in the buffer already ------------------------------------------------------------------------------------------


def test_an_interrupted_import_continues(full, exported, taken_in, tmp_path, monkeypatch):
    files, append, rows = pt_files(exported / "representation"), PartWriter.append, []

    def interrupted(writer, epoch, *args, **kwargs):
        rows.append((writer.expert, epoch))
        if len(rows) == 7:  # expert 1, epoch 2
            raise KeyboardInterrupt
        return append(writer, epoch, *args, **kwargs)

    monkeypatch.setattr(PartWriter, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        taken_in(files)
    assert Buffer(tmp_path / "new").epochs("representation", 1) == (0, 1)
    before, rows[:] = parts(tmp_path / "new"), [None] * 7
    assert taken_in(files) == 3
    assert rows[7:] == [(1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)], "only what was missing"
    after = parts(tmp_path / "new")
    assert set(before) < set(after)
    assert taken_in(files) == 3 and parts(tmp_path / "new") == after, "a third time changes nothing"
    taken_in(pt_files(exported / "classifier"), "classifier")
    assert Buffer(tmp_path / "new").digest() == full.digest() and Buffer(tmp_path / "new").verify() == []


def test_experts_are_never_mixed(exported, taken_in, tmp_path, meta):
    files = pt_files(exported / "representation")
    taken_in(files)
    before = parts(tmp_path / "new")
    with pytest.raises(TrajectoryError, match="expert 0, epoch 0: differs from representation expert 1 in"):
        taken_in(files, first_expert=1)
    with pytest.raises(TrajectoryError, match="made by another recipe"):
        taken_in(files, meta=replace(meta, experts_hash="bb22"))
    with pytest.raises(TrajectoryError, match="data_fingerprint differ"):
        taken_in(files, meta=replace(meta, data_fingerprint="ee"))
    assert parts(tmp_path / "new") == before


def test_an_expert_that_is_being_trained_is_left_alone(exported, taken_in, tmp_path):
    with claims.hold(tmp_path / "new", "expert-0001", "another driver") as held:
        assert held
        with pytest.raises(TrajectoryError, match="expert 1 is being trained or imported by another process"):
            taken_in(pt_files(exported / "representation"))
    assert Buffer(tmp_path / "new").experts("representation") == (0,)


# --- the command line -------------------------------------------------------------------------------------------------------


def lad(*args):
    """``lad-dist`` in this process: exit code, and what it said."""
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            cli.app([str(a) for a in args], prog_name="lad-dist")
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, said.getvalue()


def test_imported_experts_are_as_good_as_trained_ones(small_experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = lad("buffer", "export", small_experts, "--to", "pt", "peers", "--experts-per-file", 1)
    assert code == 0 and "representation: 2 experts" in said and "4 files in peers" in said, said
    quick = ["--threads", 1, "--device", "cpu"]
    recipe = tmp_path / "small.yaml"
    shutil.copy(small_experts / "recipe.yaml", recipe)
    code, said = lad("buffer", "import", recipe, "peers", "--from", "pt", "--out", "mine", *quick)
    assert code == 0, said
    assert "representation: 2 of the 2 experts" in said and "classifier: 2 of the 2 experts" in said, said
    trained, mine = Buffer(small_experts / "trajectories"), Buffer(tmp_path / "mine" / "trajectories")
    assert mine.digest() == trained.digest()
    shutil.copytree(small_experts, tmp_path / "theirs", symlinks=True)
    made = []
    for run in ("mine", "theirs"):
        code, said = lad("distill", run, *quick)
        assert code == 0, said
        made.append((tmp_path / run / "distilled" / "tensors.safetensors").read_bytes())
    assert made[0] == made[1]
    code, said = lad("experts", "mine", "--fleet", "off", *quick)
    assert code == 0 and "experts: done" in said, said


def test_one_stage_and_single_files(small_experts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "small.yaml"
    shutil.copy(small_experts / "recipe.yaml", recipe)
    code, said = lad("buffer", "export", small_experts, "peers", "--stage", "representation", "--experts-per-file", 1)
    assert code == 0 and [p.name for p in (tmp_path / "peers").iterdir()] == ["representation"], said
    into = ["--out", "mine", "--threads", 1, "--device", "cpu"]
    code, said = lad("buffer", "import", recipe, "peers", *into)
    assert code == 5 and "error: peers: has no folder classifier/" in said
    code, said = lad("buffer", "import", recipe, "peers/representation", *into)
    assert code == 5 and "--stage representation" in said
    code, said = lad("buffer", "import", recipe, "nowhere", *into)
    assert code == 5 and "nowhere: does not exist" in said
    second = "peers/representation/replay_buffer_1.pt"
    code, said = lad("buffer", "import", recipe, second, "--stage", "representation", "--first-expert", 1, *into)
    assert code == 0 and "representation: 1 of the 2 experts" in said and "classifier: 0 of the 2" in said, said
    code, said = lad("buffer", "import", recipe, "peers/representation", "--stage", "representation", *into)
    assert code == 0 and "representation: 2 of the 2 experts" in said, said
    other = yaml.safe_load(recipe.read_text())
    other["experts"]["epochs"] = 9
    recipe.write_text(yaml.safe_dump(other))
    code, said = lad("buffer", "import", recipe, "peers", "--stage", "representation", "--out", "longer")
    assert code == 5 and "valid: --set experts.epochs=4" in said and "Traceback" not in said
