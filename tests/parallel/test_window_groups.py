"""Several windows an iteration, one after the other or on groups of ranks: the same average, checkpoints, replay."""

from __future__ import annotations

import shutil

import pytest
import rank_workers
import torch

from lad_dist import ranks
from lad_dist.distill.replay import ReplayRecord
from lad_dist.distill.state import State
from lad_dist.distilled import DistilledSet
from lad_dist.plan.memory import Batches
from lad_dist.plan.scaling import Network, PhaseCost, Several, StepTime, iteration, several_of
from lad_dist.plan.shapes import Shapes
from lad_dist.plan.speed import LINKS
from lad_dist.profile import Profile
from lad_dist.progress import read_events


def over(pipeline, world: int) -> DistilledSet:
    pipeline.profile = Profile(fleet="off", ranks=world, threads=1)
    pipeline.distill()
    return DistilledSet.load(pipeline.run.distilled)


def same(ours: DistilledSet, theirs: DistilledSet) -> None:
    for a, b in ((ours.images, theirs.images), (ours.label_logits, theirs.label_logits)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_the_gradient_is_the_mean_over_the_windows(small_recipe, small_experts, monkeypatch):
    from lad_dist.distill import loop

    doc = small_recipe(distill={"windows": 3}).model_dump(mode="json")
    seen = []
    matched = loop.Distillation._matched

    def noted(work, state, path, phases):
        synthetic = state.optimizers.synthetic_set()
        each = [
            [work.student.run(synthetic, p.phase, path).by_rows.images_SCHH for p in work.phases(state.iteration, n)]
            for n in range(3)
        ]
        found = matched(work, state, path, phases)
        for i, (_, mean) in enumerate(found[1]):
            torch.testing.assert_close(mean.by_rows.images_SCHH, torch.stack([g[i] for g in each]).mean(0))
            assert not torch.equal(each[0][i], each[1][i])
            seen.append(i)
        return found

    monkeypatch.setattr(loop.Distillation, "_matched", noted)
    rank_workers.iterations(ranks.ALONE, doc, str(small_experts), torch.float32, count=1)
    assert seen == [0, 1]


def test_one_window_is_as_before(small_recipe):
    assert small_recipe(distill={"windows": 1}).recipe_hash() == small_recipe().recipe_hash()
    assert small_recipe(distill={"windows": 2}).recipe_hash() != small_recipe().recipe_hash()
    assert small_recipe(distill={"windows": 2}).drawn_phases == ("representation", "classifier") * 2


def test_a_method_without_windows_is_refused(small_recipe):
    with pytest.raises(ValueError, match=r"distill.windows: 2, but no phase of method aligned has windows; valid: 1"):
        small_recipe(method="aligned", distill={"windows": 2})


def test_memory_and_time_of_the_plan_know_groups(small_recipe):
    recipe = small_recipe(distill={"windows": 4, "batch": 7})
    shapes = Shapes(1, 8, 3, recipe.model.width, recipe.model.depth)
    assert [Batches.of(recipe, shapes, world).world for world in (1, 2, 3, 8)] == [1, 1, 3, 2]
    several = several_of(recipe, shapes)
    step = PhaseCost("representation", "keep", 10, 1000, 1, StepTime(1.0))
    network = Network(LINKS["loopback"], LINKS["loopback"], 64)
    alone, groups, one_group = (
        iteration((step,), 12, 12, world, network, of) for world, of in ((1, several), (4, several), (4, Several()))
    )
    assert alone[0] == pytest.approx(4 * 10 * 12) and groups[2] == 12 and one_group[2] == 3
    assert groups[1] == pytest.approx(network.between_groups(several.set_bytes, 4, 1)) and groups[0] - groups[1] == 120


@pytest.mark.parametrize(
    ("world", "windows", "dtype", "changes"),
    [
        (2, 2, torch.float32, {}),
        (2, 4, torch.float64, {}),
        (3, 3, torch.float64, {}),
        (4, 2, torch.float64, {"gradient": "recompute"}),
    ],
)
def test_groups_of_ranks_equal_one_process(small_recipe, small_experts, tmp_path, world, windows, dtype, changes):
    """Two groups of one rank with a window each give the same bits; others the same to rounding, all groups the same."""
    doc = small_recipe(distill={"windows": windows, "batch": 7, **changes}).model_dump(mode="json")
    ranks.launch(world, rank_workers.whole_iterations, (str(tmp_path), doc, str(small_experts), dtype), 0, print)
    alone = rank_workers.iterations(ranks.ALONE, doc, str(small_experts), dtype)
    parts = [torch.load(tmp_path / f"rank-{r}.pt") for r in range(world)]
    size = world // ranks.groups_of(windows, world)
    for rank, part in enumerate(parts):
        assert torch.equal(part["alpha"], parts[0]["alpha"])
        assert all(torch.equal(part[name], parts[rank % size][name]) for name in ("images", "labels"))
    for name in ("images", "labels"):
        found = torch.cat([p[name] for p in parts[:size]])
        if dtype == torch.float32:
            assert torch.equal(found, alone[name])
        torch.testing.assert_close(found, alone[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(parts[0]["alpha"], alone["alpha"], rtol=1e-10, atol=1e-10)


def test_a_phase_without_students_beside_windows(pipeline_of):
    changes = {"windows": 2, "iterations": 2, "lambda_regression": 1.0, "regression_batch": 20}
    one, two = (over(pipeline_of(f"over-{world}", distill=changes), world) for world in (1, 2))
    assert all(map(torch.equal, (one.images, one.label_logits), (two.images, two.label_logits)))


def test_an_error_of_one_group_is_that_of_all(small_recipe, small_experts, tmp_path):
    """The second window has the same weights at both ends; the first group would wait for the second's gradients."""
    doc = small_recipe(distill={"windows": 2}).model_dump(mode="json")
    ranks.launch(2, rank_workers.a_window_without_length, (str(tmp_path), doc, str(small_experts)), 0, print)
    said = [(tmp_path / f"rank-{r}.txt").read_text() for r in range(2)]
    assert said[0] == said[1] and said[0].startswith("NumericalError: the expert has the same weights at both ends")


def test_only_the_first_group_writes(small_recipe, tmp_path):
    recipe = small_recipe(distill={"windows": 2})
    state = State(recipe, torch.zeros(4, 1, 8, 8), torch.zeros(4, 10), torch.zeros(4, 1, 8, 8), {})
    for index, names in ((1, []), (0, ["shard-000-of-001.safetensors"])):
        folder = tmp_path / str(index)
        state.save(folder, recipe, ranks.ALONE, ranks.Groups(index, 2, ranks.ALONE, ranks.ALONE, ranks.ALONE))
        assert [path.name for path in folder.rglob("*.safetensors")] == names


def test_a_run_of_groups_resumes_alone_and_replays(pipeline_of):
    alone = over(pipeline_of("alone", distill={"windows": 2}), 1)
    changing = pipeline_of("changing", distill={"windows": 2, "iterations": 3})
    over(changing, 2)
    names = sorted(p.name for p in changing.run.distill_checkpoint.rglob("*.safetensors"))
    assert names == ["shard-000-of-001.safetensors"]  # a group holds the whole set
    shutil.rmtree(changing.run.distilled)
    changing.recipe = pipeline_of("to-the-end", distill={"windows": 2}).recipe
    same(over(changing, 1), alone)
    begun = [e["iteration"] for e in read_events(changing.run.events) if e["kind"] == "distill-started"]
    assert begun == [0, 3]
    (first, *_) = [e for e in read_events(changing.run.events) if e["kind"] == "iteration"]
    assert [phase for phase, _, _ in first["windows"]] == ["representation", "classifier"] * 2
    replay = pipeline_of("replay", distill={"windows": 2})
    record = ReplayRecord.read(changing.run.root, replay.recipe, replay.run)
    assert [record.window("classifier", 0, n) for n in (0, 1)] == [
        (i, e) for p, i, e in first["windows"] if p == "classifier"
    ]
    replay.distill(changing.run.root)
    same(DistilledSet.load(replay.run.distilled), alone)
