"""Fewer parts, fewer epochs: the same checkpoints and digest, at any moment, and clear words about what is no longer there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from lad_dist.cli import app
from lad_dist.errors import StorageError, TrajectoryError
from lad_dist.recipe import Recipe
from lad_dist.rundir import RunDir
from lad_dist.trajectories import Buffer, PartWriter, claims, files, kept, upkeep
from lad_dist.trajectories.kept import Kept
from lad_dist.trajectories.replay import export_pt

LAST = {"representation": 12, "classifier": 3}
NEEDED = Kept({"representation": ((2, 5), (12, 12)), "classifier": ((0, 1), (3, 3))})


@pytest.fixture
def recipe_meta(meta):
    return replace(meta, recipe={"experts": {"epochs": 12, "classifier_epochs": 3}})


@pytest.fixture
def filled(write, recipe_meta):
    """Two complete experts and one that has only begun."""
    for expert in (0, 1):
        for stage, last in LAST.items():
            write(last, stage=stage, expert=expert, per_part=4, meta=recipe_meta)
    return write(6, expert=2, per_part=4, meta=recipe_meta)


def rows_of(buffer: Buffer) -> dict[tuple[str, int, int], tuple[bytes, float | None]]:
    keys = [(s, i, e) for s, i in buffer.keys for e in buffer.epochs(s, i)]
    found = [buffer.read_checkpoint(*key) for key in keys]
    return {key: (row.weights.tobytes(), row.loss) for key, row in zip(keys, found, strict=True)}


def test_compacting_changes_the_parts_only(filled):
    buffer = Buffer(filled)
    before, digest = rows_of(buffer), buffer.digest()
    reader = Buffer(filled)
    reader.read("representation", 0, 5)
    assert upkeep.compact(buffer, 13) == (12, 6)
    assert [str(n) for n in buffer.parts_of("representation", 0)] == [
        "representation/expert-0000/epochs-0000-0012.parquet"
    ]
    assert len(buffer.parts_of("representation", 2)) == 2  # its expert is not complete
    assert rows_of(buffer) == before and buffer.digest() == digest and buffer.verify() == []
    assert reader.read("representation", 0, 5).tobytes() == before["representation", 0, 5][0]  # its part is gone
    assert upkeep.compact(buffer, 13) == (6, 6)


def test_a_killed_compaction_loses_nothing_and_continues(filled, monkeypatch):
    digest = Buffer(filled).digest()

    def refuses(*_):
        raise StorageError("the power went")

    monkeypatch.setattr(files, "remove", refuses)
    with pytest.raises(StorageError):
        upkeep.compact(Buffer(filled), 13)
    monkeypatch.undo()
    assert Buffer(filled).digest() == digest and Buffer(filled).verify() == []
    assert upkeep.compact(Buffer(filled), 13)[1] == 6
    assert Buffer(filled).digest() == digest


@pytest.mark.parametrize("work", [upkeep.compact, lambda buffer: upkeep.prune(buffer, NEEDED)])
def test_nothing_is_rewritten_below_a_writer(filled, work):
    with (
        claims.hold(filled, "expert-0002", "someone"),
        pytest.raises(TrajectoryError, match="expert-0002 is being trained"),
    ):
        work(Buffer(filled))
    with claims.hold(filled, "upkeep", "someone"), pytest.raises(TrajectoryError, match="another compact or prune"):
        work(Buffer(filled))
    work(Buffer(filled))


def test_pruning_keeps_what_is_needed(filled):
    buffer = Buffer(filled)
    before, size = rows_of(buffer), sum(map(buffer.size_of, buffer.parts))
    plan = upkeep.plan_prune(buffer, NEEDED)
    assert rows_of(buffer) == before and 0 < plan.bytes < size
    assert upkeep.prune(buffer, NEEDED) == plan
    assert buffer.epochs("representation", 0) == (2, 3, 4, 5, 12) and buffer.epochs("classifier", 0) == (0, 1, 3)
    assert all(before[key] == row for key, row in rows_of(buffer).items()) and buffer.verify() == []
    assert (
        buffer.last_contiguous_epoch("representation", 0) == 12 and buffer.last_contiguous_epoch("classifier", 1) == 3
    )
    assert buffer.last_contiguous_epoch("representation", 2) == 6  # the part that it resumes from stays
    digest = buffer.digest()
    upkeep.compact(buffer)
    assert buffer.digest() == digest and upkeep.prune(buffer, NEEDED).bytes == 0
    assert buffer.inspect()["kept"]["classifier"] == [[0, 1], [3, 3]]


def test_what_was_pruned_is_named_once(filled, tmp_path):
    buffer = Buffer(filled)
    upkeep.prune(buffer, NEEDED)
    with pytest.raises(
        TrajectoryError, match=r"epoch 7 is not kept: this buffer keeps only representation epochs 2 to 5, 12"
    ):
        buffer.read("representation", 0, 7)
    more = Kept({"representation": ((2, 8), (12, 12)), "classifier": ((0, 1),)})
    with pytest.raises(TrajectoryError, match=r"keeps only .*this recipe needs representation epochs 2 to 8; valid"):
        upkeep.prune(buffer, more)
    with pytest.raises(TrajectoryError, match=r"replay_buffer_N\.pt files hold every epoch"):
        export_pt(buffer, tmp_path / "out")
    (filled / "kept.json").write_text("[")
    with pytest.raises(TrajectoryError, match=r"kept\.json: says which epochs"):
        Buffer(filled)


def test_a_lost_epoch_is_still_a_gap(filled):
    buffer = Buffer(filled)
    upkeep.prune(buffer, NEEDED)
    (filled / str(buffer.parts_of("representation", 1)[0])).unlink()
    buffer.refresh()
    assert buffer.last_contiguous_epoch("representation", 1) is None
    assert any("expert-0001" in problem and "missing" in problem for problem in buffer.verify())


def test_a_writer_keeps_the_last_epoch_to_resume_from(tmp_path, recipe_meta, weights):
    filesystem, root = files.local(tmp_path)
    kept.write(filesystem, root, NEEDED)
    seen = []
    for first, last in ((0, 9), (10, 12)):
        with PartWriter(tmp_path, recipe_meta, "representation", 4, 3) as writer:
            for epoch in range(first, last + 1):
                writer.append(epoch, weights("representation", 4, epoch))
        seen.append(
            (Buffer(tmp_path).epochs("representation", 4), Buffer(tmp_path).last_contiguous_epoch("representation", 4))
        )
    assert seen == [((2, 3, 4, 5, 9), 9), ((2, 3, 4, 5, 12), 12)]
    assert np.array_equal(Buffer(tmp_path).read("representation", 4, 3), weights("representation", 4, 3))


def test_what_a_recipe_needs():
    recipe = Recipe.model_validate({"distill": {"start_epoch_min": 4, "start_epoch_max": 6, "window_epochs": 10}})
    spans = kept.needed(recipe).spans
    assert spans["representation"] == ((4, 5), (14, 15), (100, 100)) and spans["classifier"] == ((0, 0), (10, 10))
    regression = Recipe.model_validate({"distill": {"lambda_regression": 1.0}})
    assert kept.needed(regression).spans["representation"] == ((0, 21), (100, 100))
    both = kept.needed(recipe).together(kept.needed(regression))
    assert both.spans["representation"] == ((0, 21), (100, 100)) and not both.lacking(kept.needed(recipe))


@pytest.fixture
def run_folder(tmp_path, meta, weights):
    """A run of a small recipe, whose experts are made up."""
    recipe = Recipe.model_validate(
        {
            "data": {"dataset": "digits"},
            "experts": {"count": 2, "epochs": 12, "classifier_epochs": 3},
            "distill": {"start_epoch_max": 4, "window_epochs": 1},
        }
    )
    run = RunDir.open(tmp_path / "run", recipe)
    meta = replace(meta, experts_hash=recipe.experts_hash(), recipe=recipe.experts_document())
    for expert in (0, 1):
        for stage, last in LAST.items():
            with PartWriter(run.trajectories, meta, stage, expert, 3) as writer:
                for epoch in range(last + 1):
                    writer.append(epoch, weights(stage, expert, epoch))
    return run


def test_the_commands(run_folder, tmp_path):
    def invoked(*words, typed=None):
        return CliRunner().invoke(app, ["buffer", *words], input=typed)

    where = str(run_folder.root)
    assert "14 parts before, 4 now" in invoked("compact", where).stdout
    asked = invoked("prune", where, typed="n\n")
    assert (
        asked.exit_code == 1
        and "frees about" in asked.stdout
        and len(Buffer(run_folder.trajectories).epochs("representation", 0)) == 13
    )
    pruned = invoked("prune", where, "--yes")
    assert pruned.exit_code == 0, pruned.output
    assert Buffer(run_folder.trajectories).epochs("representation", 1) == (0, 1, 2, 3, 4, 12)
    assert "keeps:   only representation epochs 0 to 4, 12" in invoked("inspect", where).stdout
    unknown = invoked("prune", str(run_folder.trajectories), "--yes")
    assert isinstance(unknown.exception, TrajectoryError) or "which epochs are needed is not known" in unknown.output
    other = invoked("prune", str(run_folder.trajectories), "--for", "digits-lt", "--yes")
    assert other.exit_code != 0
