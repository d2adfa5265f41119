"""Several windows an iteration, one after the other or on groups of ranks: the same average, checkpoints, replay."""

from __future__ import annotations

import shutil

import pytest
import rank_workers
import torch

from lad_dist import ranks
from lad_dist.distill.replay import ReplayRecord
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
    averaged = loop.Distillation._averaged

    def noted(work, state, path, first):
        synthetic = state.optimizers.synthetic_set()
        each = [
            [work.student.run(synthetic, p.phase, path).by_rows.images_SCHH for p in work.phases(state.iteration, n)]
            for n in range(3)
        ]
        found = averaged(work, state, path, first)
        for i, (_, mean) in enumerate(found):
            torch.testing.assert_close(mean.by_rows.images_SCHH, torch.stack([g[i] for g in each]).mean(0))
            assert not torch.equal(each[0][i], each[1][i])
            seen.append(i)
        return found

    monkeypatch.setattr(loop.Distillation, "_averaged", noted)
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


@pytest.mark.parametrize(("world", "windows", "dtype"), [(2, 2, torch.float32), (4, 2, torch.float64)])
def test_groups_of_ranks_equal_one_process(small_recipe, small_experts, tmp_path, world, windows, dtype):
    """Two groups of one rank give the same bits; two groups of two, the same to rounding."""
    doc = small_recipe(distill={"windows": windows, "batch": 7}).model_dump(mode="json")
    ranks.launch(world, rank_workers.whole_iterations, (str(tmp_path), doc, str(small_experts), dtype), 0, print)
    alone = rank_workers.iterations(ranks.ALONE, doc, str(small_experts), dtype)
    parts = [torch.load(tmp_path / f"rank-{r}.pt") for r in range(world)]
    size = world // windows
    for first in range(0, world, size):
        for name in ("images", "labels"):
            found = torch.cat([p[name] for p in parts[first : first + size]])
            if size == 1:
                assert torch.equal(found, alone[name])
            torch.testing.assert_close(found, alone[name], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(parts[first]["alpha"], alone["alpha"], rtol=1e-10, atol=1e-10)


def test_a_run_of_groups_resumes_alone_and_replays(pipeline_of):
    alone = over(pipeline_of("alone", distill={"windows": 2}), 1)
    changing = pipeline_of("changing", distill={"windows": 2, "iterations": 3})
    over(changing, 2)
    names = sorted(p.name for p in changing.run.distill_checkpoint.rglob("*.safetensors"))
    assert names == ["shard-000-of-001.safetensors"]  # a group holds the whole set
    shutil.rmtree(changing.run.distilled)
    changing.recipe = pipeline_of("to-the-end", distill={"windows": 2}).recipe
    same(over(changing, 1), alone)
    (first, *_) = [e for e in read_events(changing.run.events) if e["kind"] == "iteration"]
    assert [phase for phase, _, _ in first["windows"]] == ["representation", "classifier"] * 2
    replay = pipeline_of("replay", distill={"windows": 2})
    record = ReplayRecord.read(changing.run.root, replay.recipe, replay.run)
    assert [record.window("classifier", 0, n) for n in (0, 1)] == [
        (i, e) for p, i, e in first["windows"] if p == "classifier"
    ]
    replay.distill(changing.run.root)
    same(DistilledSet.load(replay.run.distilled), alone)
