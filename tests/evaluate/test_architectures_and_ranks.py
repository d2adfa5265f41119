"""Several architectures; seeds at once; rows spread over processes that this one or a launcher started."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace

import evaluation_workers
import pytest

from lad_dist import pipeline as pipeline_module
from lad_dist import ranks, results
from lad_dist.errors import RecipeError
from lad_dist.evaluate import measure
from lad_dist.pipeline import evaluate_as_rank, own_device
from lad_dist.profile import Profile
from lad_dist.progress import Events, Screen, read_events
from lad_dist.ranks import ProcessRank

MEASURED = ("source", "architecture", "seed", "overall", "per_class", "ece", "confusion", "train_loss", "settings")
EVERY = {"architectures": ["convnet", "vgg11", "resnet18", "alexnet", "mlp", "vit"], "seeds": 1, "epochs": 1}
SEVERAL = {"architectures": ["convnet", "mlp"], "seeds": 2}


def measured(pipeline) -> list[dict]:
    return [{k: r[k] for k in MEASURED} for r in results.read(pipeline.run.results)]


def over(pipeline, **profile):
    return replace(pipeline, profile=Profile(fleet="off", threads=1, **profile))


def test_a_row_for_every_architecture(pipeline_of):
    pipeline = pipeline_of(evaluate=EVERY)
    pipeline.evaluate("random")
    rows = results.read(pipeline.run.results)
    assert {r["architecture"] for r in rows} == set(EVERY["architectures"])
    settings = {r["architecture"]: r["settings"]["network"] for r in rows}
    assert settings["convnet"] == {"width": 4, "depth": 2, "norm": "instance"}
    assert settings["resnet18"] == {"norm": "instance"} and settings["vit"] == {}
    assert len(results.summary(rows)) == 6


def test_another_norm_is_another_measurement(pipeline_of, small_recipe):
    pipeline = pipeline_of(evaluate={"seeds": 1})
    pipeline.evaluate("random")
    before = measured(pipeline)
    replace(pipeline, recipe=small_recipe(evaluate={"seeds": 1, "norm": "batch"})).evaluate("random")
    (after,) = measured(pipeline)
    assert after["train_loss"] != before[0]["train_loss"] and after["settings"]["network"]["norm"] == "batch"


def test_seeds_at_once_measure_what_they_measure_alone(pipeline_of):
    one_by_one, together = (pipeline_of(n, evaluate={"seeds": 3, "together": n}) for n in ("off", "on"))
    for pipeline in (one_by_one, together):
        pipeline.evaluate("random")
    assert [r["together"] for p in (one_by_one, together) for r in results.read(p.run.results)] == [1, 1, 1, 3, 3, 3]
    for a, b in zip(measured(one_by_one), measured(together), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["per_class"] == pytest.approx(a["per_class"], abs=0.06)  # an image on the border of two classes
        assert b["settings"] == a["settings"]
    together.evaluate("random")  # and neither is measured again because of it
    assert len([e for e in read_events(together.run.events) if e["kind"] == "evaluated"]) == 3


@pytest.mark.parametrize("same", [True, False])
def test_auto_trains_at_once_where_a_batch_is_small_and_the_bits_are_the_same(pipeline_of, monkeypatch, same):
    monkeypatch.setattr(measure, "same_together", lambda *args: same)
    pipeline = pipeline_of()
    monkeypatch.setattr(measure, "TOGETHER_VALUES", 8 * 4 * 12 * 12)  # batch, width, side of the first block
    pipeline.evaluate("random")
    monkeypatch.setattr(measure, "TOGETHER_VALUES", 8 * 4 * 12 * 12 - 1)
    other = pipeline_of("other")
    other.evaluate("random")
    assert {r["together"] for r in results.read(pipeline.run.results)} == {2 if same else 1}
    assert {r["together"] for r in results.read(other.run.results)} == {1}


@pytest.mark.parametrize("width", [4, 32])  # where grouped convolutions add in another order, and where they do not
def test_three_seeds_measure_the_bits_of_three_measured_one_at_a_time(pipeline_of, small_recipe, width):
    """On a CPU, whether or not they are trained at once: which of the two is the library's and the processor's matter."""
    once = pipeline_of("once", model={"width": width}, evaluate={"seeds": 3, "epochs": 6})
    once.evaluate("random")
    apart = pipeline_of("apart", model={"width": width}, evaluate={"seeds": 1, "epochs": 6})
    for seeds in (1, 2, 3):
        changed = small_recipe(model={"width": width}, evaluate={"seeds": seeds, "epochs": 6})
        replace(apart, recipe=changed).evaluate("random")
    assert {r["together"] for r in results.read(apart.run.results)} == {1}
    assert len(measured(once)) == 3 and measured(once) == measured(apart)


# --- over ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(pipeline_of):
    pipeline = pipeline_of("alone", evaluate={**SEVERAL, "together": "off"})
    pipeline.evaluate("k-center")
    return pipeline


def test_two_processes_measure_the_same_bits_as_one(pipeline_of, alone):
    pipeline = over(pipeline_of(evaluate={**SEVERAL, "together": "off"}), ranks=2)
    pipeline.evaluate("k-center")
    assert measured(pipeline) == measured(alone)
    table = results._merged(pipeline.run.results)
    assert [(r["architecture"], r["seed"]) for r in table] == [("convnet", 0), ("convnet", 1), ("mlp", 0), ("mlp", 1)]
    events = list(read_events(pipeline.run.events))
    assert len([e for e in events if e["kind"] == "evaluated"]) == 4  # of both processes
    assert [e["networks"] for e in events if e["kind"] == "stage-started"] == [4]


def test_a_rank_that_is_killed_starts_again_and_nothing_is_measured_twice(pipeline_of, alone, monkeypatch, tmp_path):
    pipeline = over(pipeline_of(evaluate={**SEVERAL, "together": "off"}), ranks=2)
    said: list[str] = []
    launch = ranks.launch

    def launched(world, function, args, restarts, say):
        assert function is pipeline_module.evaluate_rank and restarts == 3
        launch(world, evaluation_workers.dies_once, (*args, str(tmp_path / "once")), restarts, said.append)

    monkeypatch.setattr(ranks, "launch", launched)
    pipeline.evaluate("k-center")
    assert measured(pipeline) == measured(alone)
    assert len(said) == 1 and "rank 1 of 2 was killed by SIGKILL" in said[0]
    evaluated = [(e["architecture"], e["seed"]) for e in read_events(pipeline.run.events) if e["kind"] == "evaluated"]
    assert sorted(evaluated) == [("convnet", 0), ("mlp", 0), ("mlp", 1)]  # ("convnet", 1) died between row and event


def test_only_as_many_processes_as_rows_and_none_for_one(pipeline_of, monkeypatch):
    worlds: list[int] = []
    monkeypatch.setattr(ranks, "launch", lambda world, *_: worlds.append(world))
    over(pipeline_of("many", evaluate={"seeds": 3}), ranks=8).evaluate("random")
    over(pipeline_of("one", evaluate={"seeds": 1}), ranks=8).evaluate("random")
    assert worlds == [3]


def test_a_share_of_the_rows_under_a_launcher(pipeline_of, alone, monkeypatch):
    """Rank 1 takes its share and no more; rank 0 goes on until all rows are there, whoever measures them."""
    pipeline = pipeline_of(evaluate={**SEVERAL, "together": "off"})
    monkeypatch.setattr(ranks, "place", lambda: ProcessRank(1, 2, 1))
    pipeline.evaluate("k-center")
    own = [("convnet", 1), ("mlp", 1)]
    assert [(r["architecture"], r["seed"]) for r in results.read(pipeline.run.results)] == own
    monkeypatch.setattr(ranks, "place", lambda: ProcessRank(0, 2, 0))
    pipeline.evaluate("k-center")
    assert measured(pipeline) == measured(alone)
    again = pipeline_of("again", evaluate={**SEVERAL, "together": "off"})
    again.evaluate("k-center")  # rank 1 never came
    assert measured(again) == measured(alone)


def test_rank_0_leaves_a_row_that_another_publishes_meanwhile(pipeline_of, monkeypatch):
    pipeline, other = (pipeline_of(n, evaluate={"seeds": 2, "epochs": 40, "together": "off"}) for n in ("a", "b"))
    other.evaluate("random")
    done = results.read(other.run.results)
    planned = measure.planned_rows(pipeline.recipe, pipeline.data, pipeline.run, "random")
    monkeypatch.setattr(measure, "_LOOK_SECONDS", 0.0)
    epochs = []
    original = measure.train

    def train(network, images, settings, seed, counters, on_epoch):
        def counted() -> None:
            epochs.append(counters)
            if counters[-1] == 1 and len(epochs) == 43:  # the third epoch of what was the other's
                results.put(pipeline.run.results, done[1])
            on_epoch()

        return original(network, images, settings, seed, counters, counted)

    monkeypatch.setattr(measure, "train", train)
    evaluate_as_rank(pipeline, "random", planned, ProcessRank(0, 2, 0), awaited=False)
    assert len(epochs) == 43 and measured(pipeline) == measured(other)
    assert len(results._merged(pipeline.run.results)) == 2


def test_two_writers_at_the_same_time(pipeline_of, small_recipe, alone):
    """Two processes of an array, both with the whole job, in one run folder."""
    pipeline = pipeline_of(evaluate={**SEVERAL, "together": "off"})
    again = replace(pipeline, events=Events(pipeline.run.events), screen=Screen.silent())
    _ = pipeline.data
    threads = [threading.Thread(target=p.evaluate, args=("k-center",)) for p in (pipeline, again)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert measured(pipeline) == measured(alone)
    assert len(results._merged(pipeline.run.results)) == 4


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device(torch.device("cpu"), ProcessRank(3, 4, 3)) == torch.device("cpu")
    with pytest.raises(RecipeError, match=r"rank 1 is number 1 on this host, which has 1 GPUs"):
        own_device(torch.device("cuda"), ProcessRank(1, 2, 1))


def test_the_command_takes_architectures_and_seeds(pipeline_of):
    pipeline = pipeline_of(evaluate={"seeds": 1})
    command = [sys.executable, "-m", "lad_dist.cli", "evaluate", str(pipeline.run.root), "--baseline", "random",
               "--arch", "convnet,mlp", "--seeds", "2", "--ranks", "2", "--threads", "1"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "evaluate random: 4 networks over 2 ranks" in done.stdout and "mlp" in done.stdout
    rows = [(r["architecture"], r["seed"]) for r in results.read(pipeline.run.results)]
    assert rows == [("convnet", 0), ("convnet", 1), ("mlp", 0), ("mlp", 1)]
    wrong = subprocess.run([*command[:5], "--arch", "convnet,resnet9"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "evaluate.architectures" in wrong.stderr
