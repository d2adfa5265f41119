"""``replay_buffer_N.pt``, the files of the MTT family: written, read by a peer's code, read back, refused."""

import contextlib
import errno
import io
import math
import pickle
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from lad_dist import cli
from lad_dist.errors import Interrupted, StorageError, TrajectoryError
from lad_dist.trajectories import Buffer, PartWriter, claims
from lad_dist.trajectories.pt_files import complete_experts, export_pt, import_pt, pt_files

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


def test_files_are_what_the_code_of_peers_reads(full, exported, meta):
    """As MTT's ``distill.py`` does: load, pick an expert and an epoch, flatten the parameters."""
    names = [p.relative_to(exported).as_posix() for p in sorted(exported.rglob("*")) if p.is_file()]
    assert names == [f"{stage}/replay_buffer_{n}.pt" for stage in sorted(LAST) for n in (0, 1)]
    for stage in LAST:
        buffer = []
        for n in (0, 1):
            buffer = buffer + torch.load(exported / stage / f"replay_buffer_{n}.pt")
        assert [len(expert) for expert in buffer] == [LAST[stage] + 1] * 3
        for expert, trajectory in enumerate(buffer):
            for epoch, checkpoint in enumerate(trajectory):
                assert [tuple(p.shape) for p in checkpoint] == [shape for _, shape in meta.parameters]
                flat = torch.cat([p.data.to("cpu").reshape(-1) for p in checkpoint], 0).numpy()
                row = full.read(stage, expert, epoch)
                if stage == "classifier":  # the frozen backbone comes before it
                    end = full.read("representation", expert, LAST["representation"])
                    row = np.concatenate([end[: -len(row)], row])
                np.testing.assert_array_equal(flat, row)


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


def test_nothing_complete_is_nothing_to_export(write, tmp_path):
    buffer = Buffer(write(1))
    with pytest.raises(TrajectoryError, match="no expert's representation stage is complete"):
        export_pt(buffer, tmp_path / "pt")
    assert not (tmp_path / "pt").exists()
    with pytest.raises(TrajectoryError, match="experts per file: 0"):
        export_pt(buffer, tmp_path / "pt", experts_per_file=0)


def test_export_replaces_nothing(full, tmp_path):
    old = tmp_path / "pt" / "classifier" / "replay_buffer_7.pt"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"precious")
    with pytest.raises(TrajectoryError, match=r"replay_buffer_7\.pt: is there already"):
        export_pt(full, tmp_path / "pt")
    assert old.read_bytes() == b"precious" and not (tmp_path / "pt" / "representation").exists()
    assert len(export_pt(full, tmp_path / "pt", ["representation"])) == 1


def test_a_full_disk_leaves_no_half_file(full, tmp_path, monkeypatch):
    def refuse(content, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(StorageError, match="No space left"):
        export_pt(full, tmp_path / "pt")
    assert [p for p in (tmp_path / "pt").rglob("*") if p.is_file()] == []


# --- what is not an expert of this recipe ---------------------------------------------------------------------------------


def content_of(exported, stage="representation"):
    return torch.load(exported / stage / "replay_buffer_0.pt")


def changed(content, expert, epoch, layer, change):
    content[expert][epoch][layer] = change(content[expert][epoch][layer].clone())


def nan(tensor):
    tensor.view(-1)[-1] = math.nan
    return tensor


@pytest.mark.parametrize(("change", "said"), [
    (lambda c: changed(c, 1, 2, 0, lambda t: t.T), r"a\.pt: expert 1, epoch 2, layer features.weight: has shape \[7, 20\]"),
    (lambda c: changed(c, 1, 3, 2, nan), "expert 1, epoch 3, layer head.weight: holds NaN"),
    (lambda c: changed(c, 0, 1, 1, lambda t: t.double()), "layer features.bias: is torch.float64.*valid: plain torch.float32"),
    (lambda c: changed(c, 0, 1, 1, lambda t: t.to_sparse()), "layer features.bias: is torch.float32, torch.sparse_coo"),
    (lambda c: changed(c, 0, 1, 1, lambda t: t.tolist()), "layer features.bias: is list; valid: a tensor"),
    (lambda c: c[0][2].pop(), "expert 0, epoch 2: has 3 tensors and the recipe's network 4 parameters.*head.bias"),
    (lambda c: c[1].__setitem__(0, c[1][0][0]), "expert 1, epoch 0: is Tensor; valid: a list of 4 tensors"),
    (lambda c: c[1].pop(), "expert 1: has 3 checkpoints, epochs 0 to 2.*experts.epochs=3; experts.epochs=2 would fit"),
    (lambda c: c[1].__delitem__(slice(1, None)), "expert 1: has 1 checkpoints.*at least epochs 0 and 1"),
    (lambda c: c[1].clear(), "expert 1: is an empty list; valid: a list of checkpoints"),
    (lambda c: c.clear(), r"a\.pt: is an empty list; valid: a list of experts"),
    (lambda c: c[0].__setitem__(1, c[0][0]), "expert 0: epochs 0 and 1 are one and the same tensors"),
])  # fmt: skip
def test_experts_of_another_kind_are_refused(exported, taken_in, tmp_path, change, said):
    content = content_of(exported)
    change(content)
    with pytest.raises(TrajectoryError, match=said):
        taken_in(saved(tmp_path / "a.pt", content))
    assert "representation/expert-0001" not in "".join(parts(tmp_path / "new")), "of a faulty expert nothing is written"


class Code:
    """Runs when it is unpickled by a loader that lets it."""

    def __reduce__(self):
        return (print, ("the pickle's code ran",))


@pytest.mark.parametrize("make", [
    lambda path, good: torch.save([[[Code()]]], path),
    lambda path, good: path.write_bytes(pickle.dumps([[[Code()]]])),
    lambda path, good: torch.save({"buffer": 1}, path),
    lambda path, good: torch.save(torch.load(good), path, _use_new_zipfile_serialization=False),
    lambda path, good: path.write_bytes(good.read_bytes()[:-400]),
    lambda path, good: path.write_bytes(b"no zip"),
    lambda path, good: path.write_bytes(b""),
    lambda path, good: zipfile.ZipFile(path, "w").close(),
    lambda path, good: path.mkdir(),
    lambda path, good: None,
], ids=["code", "bare pickle", "dict", "old format", "cut short", "text", "empty", "empty zip", "folder", "missing"])  # fmt: skip
def test_files_that_are_none_are_one_clear_error(exported, taken_in, tmp_path, capfd, make):
    path = tmp_path / "a.pt"
    make(path, exported / "representation" / "replay_buffer_0.pt")
    with pytest.raises(TrajectoryError, match=r"a\.pt: .*; valid: "):
        taken_in(path)
    assert "code ran" not in "".join(capfd.readouterr()) and not parts(tmp_path / "new")


def test_an_interruption_is_not_taken_for_damage(exported, taken_in, monkeypatch):
    def stopped(*args, **kwargs):
        raise Interrupted("interrupted by SIGTERM")

    monkeypatch.setattr(torch, "load", stopped)
    with pytest.raises(Interrupted):
        taken_in(pt_files(exported / "representation"))


def test_any_flipped_byte_of_the_weights_is_noticed(exported, taken_in, tmp_path):
    file = exported / "representation" / "replay_buffer_0.pt"
    data = bytearray(file.read_bytes())
    weights = torch.load(file)[1][2][0].numpy().tobytes()
    data[data.index(weights) + 5] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(TrajectoryError, match=r"is damaged: the checksum of .* is wrong"):
        taken_in(tmp_path / "a.pt")


def test_classifier_experts_must_share_their_experts_backbone(exported, taken_in, tmp_path):
    files = pt_files(exported / "classifier")
    with pytest.raises(TrajectoryError, match=r"representation stage of expert 0.*epoch 3 is missing\); import that"):
        taken_in(files, "classifier")
    taken_in(pt_files(exported / "representation"))
    content = content_of(exported, "classifier")
    changed(content, 1, 2, 1, lambda t: t + 1e-3)
    with pytest.raises(TrajectoryError, match=r"expert 1, epoch 2, layer features\.bias: differs from the last repr"):
        taken_in(saved(tmp_path / "a.pt", content), "classifier")
    with pytest.raises(TrajectoryError, match=r"expert 0, epoch 0, layer features\.weight: differs"):
        taken_in(files[::-1], "classifier")
    with pytest.raises(TrajectoryError, match=r"experts\.classifier_epochs=2 would fit"):
        taken_in(files, "classifier", epochs=5)


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


def test_gaps_in_the_numbers_are_an_error(exported, tmp_path):
    (exported / "classifier" / "replay_buffer_0.pt").unlink()
    with pytest.raises(TrajectoryError, match=r"replay_buffer_0\.pt is missing"):
        pt_files(exported / "classifier")
    with pytest.raises(TrajectoryError, match=r"holds no replay_buffer_N\.pt"):
        pt_files(tmp_path)
    for n in range(11):
        (tmp_path / f"replay_buffer_{n}.pt").touch()
    assert [p.name for p in pt_files(tmp_path)][9:] == ["replay_buffer_9.pt", "replay_buffer_10.pt"]


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
    assert code == 5 and "error: peers: holds no folder classifier/" in said
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
    assert code == 5 and "experts.epochs=4 would fit" in said and "Traceback" not in said
