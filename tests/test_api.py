"""``lad_dist`` in Python: the stages, what they return, callbacks, threads and interruptions; equal to the command line."""

from __future__ import annotations

import signal
import sys
import threading

import pytest
import torch
import yaml

import lad_dist
from lad_dist import Callback, Profile, Recipe, Run, cli, recipe_file, results
from lad_dist.callbacks import Evaluation, ExpertEpoch, Iteration, StageEnd
from lad_dist.errors import DistilledError, Interrupted, LadDistError, RankError, RecipeError, RunDirError

HERE = Profile(fleet="off", device="cpu", threads=1)


class Told(Callback):
    """Keeps all that it is told, by method."""

    def __init__(self):
        self.started, self.epochs, self.iterations, self.evaluations, self.ended, self.kinds = [], [], [], [], [], []

    def on_event(self, event):
        self.kinds.append(event["kind"])

    def on_stage_start(self, stage):
        self.started.append(stage)

    def on_epoch(self, epoch):
        self.epochs.append(epoch)

    def on_iteration(self, iteration):
        self.iterations.append(iteration)

    def on_evaluation(self, evaluation):
        self.evaluations.append(evaluation)

    def on_stage_end(self, end):
        self.ended.append(end)


@pytest.fixture
def opened(tmp_path, small_experts, small_recipe):
    """A run in a folder of its own, with trained experts unless ``trained`` is False."""

    def make(name="run", trained=True, profile=HERE, callbacks=(), **changes):
        buffers = small_experts if trained else None
        return Run.open(
            tmp_path / name,
            small_recipe(**changes),
            profile=profile,
            buffers=buffers,
            callbacks=callbacks,
            quiet=True,
        )

    return make


def test_stages_one_after_the_other_equal_the_command_line(opened, tmp_path, small_recipe):
    told = Told()
    run = opened(trained=False, callbacks=[told])
    assert not run.folder.exists() and run.results() == []
    run.train_experts()
    images, soft_labels, lr = run.distill()
    measured = run.evaluate()
    page = run.report()
    assert page.exists() and run.status().finished
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(small_recipe().model_dump(mode="json")))
    with pytest.raises(SystemExit) as ended:
        cli.app(
            ["run", str(job), "--out", str(tmp_path / "by-cli"), "--threads", "1", "--device", "cpu", "--fleet", "off"]
        )
    assert ended.value.code == 0
    other = lad_dist.load(tmp_path / "by-cli" / "distilled")
    assert torch.equal(images, other.images) and torch.equal(soft_labels, other.soft_labels) and lr == other.lr
    again = Run.open(tmp_path / "by-cli").results()
    assert [(r.source, r.seed, r.overall, r.per_class) for r in measured] == [
        (r.source, r.seed, r.overall, r.per_class) for r in again
    ]
    assert {r.source for r in measured} == {"distilled", *small_recipe().evaluate.baselines}
    first = measured[0]
    assert (first.epochs, first.batch, first.split, first.ipc) == (3, 8, "test", 2) and len(first.per_class) == 10
    # what was told
    assert told.started == [end.stage for end in told.ended] and told.started[:2] == ["experts", "distill"]
    assert all(end.error is None and end.seconds > 0 for end in told.ended)
    assert [i.number for i in told.iterations] == list(range(1, 7))
    assert all(set(i.losses) == {"representation", "classifier"} and i.alpha > 0 for i in told.iterations)
    assert sorted((e.stage, e.expert, e.epoch) for e in told.epochs) == sorted(
        (stage, expert, epoch)
        for stage, epochs in (("representation", 4), ("classifier", 3))
        for expert in range(2)
        for epoch in range(1, epochs + 1)
    )
    assert [(e.source, e.seed, e.overall) for e in told.evaluations] == [
        (r.source, r.seed, r.overall) for r in measured
    ]
    kinds = type(told.epochs[0]), type(told.iterations[0]), type(told.evaluations[0]), type(told.ended[0])
    assert kinds == (ExpertEpoch, Iteration, Evaluation, StageEnd)
    assert told.kinds == [event["kind"] for event in run.events()]


def test_the_recipe_file_is_that_of_the_last_stage(opened, small_recipe):
    run = opened(evaluate={"baselines": ["initial"]})
    run.run_all()
    longer = small_recipe(evaluate={"baselines": ["initial"]}, distill={"iterations": 7})
    run = Run.open(run.folder, longer, profile=run.profile, quiet=True)
    run.evaluate("initial")  # a question: the recipe file stays
    assert recipe_file.load(run.folder / "recipe.yaml").distill.iterations == 6
    run.distill()
    assert recipe_file.load(run.folder / "recipe.yaml").distill.iterations == 7


def test_everything_in_one_call_and_nothing_twice(opened):
    run = opened(evaluate={"baselines": ["initial"]})
    measured = run.run_all()
    assert {r.source for r in measured} == {"distilled", "initial"}
    before = len(run.events())
    assert run.run_all() == measured
    assert [e["kind"] for e in run.events()[before:]] == ["stage-started", "stage-finished"]  # the report's


def test_a_question_beside_the_recipe(opened):
    run = opened(evaluate={"baselines": []})
    run.distill()
    kept = (run.folder / "recipe.yaml").read_bytes()
    asked = run.evaluate("distilled", "random", architectures=["mlp"], seeds=1)
    assert [(r.source, r.architecture, r.seed) for r in asked] == [("distilled", "mlp", 0), ("random", "mlp", 0)]
    assert len(run.evaluate(seeds=1)) == 3  # the recipe's sources: one convnet more
    assert (run.folder / "recipe.yaml").read_bytes() == kept
    with pytest.raises(RecipeError, match="source 'initail' is not known; valid: 'distilled'"):
        run.evaluate("initail")
    with pytest.raises(RecipeError, match=r"evaluate\.architectures"):
        run.evaluate(architectures=["lenet"])


def test_results_as_a_pandas_frame(opened, monkeypatch):
    run = opened(evaluate={"baselines": []})
    assert list(run.frame().columns)[:4] == ["source", "architecture", "seed", "overall"] and len(run.frame()) == 0
    run.distill()
    run.evaluate()
    frame = run.frame()
    assert frame.groupby("source")["overall"].mean()["distilled"] == pytest.approx(
        sum(r.overall for r in run.results()) / 2
    )
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LadDistError, match="pip install pandas"):
        run.frame()


class Stop(Callback):
    """Does something at one iteration."""

    def __init__(self, at, what):
        self.at, self.what = at, what

    def on_iteration(self, iteration):
        if iteration.number == self.at:
            self.what()


def fail():
    raise ValueError("the logger lost its server")


def test_an_error_of_a_callback_ends_the_stage_and_the_same_call_continues(opened):
    whole = opened("whole").distill()
    with pytest.raises(ValueError, match="lost its server"):
        opened(callbacks=[Stop(5, fail)]).distill()
    run = opened()
    stopped = [e for e in run.events() if e["kind"] == "stage-stopped"]
    assert "ValueError: the logger lost its server" in stopped[-1]["error"]
    images, soft_labels, _ = run.distill()
    assert torch.equal(images, whole.images) and torch.equal(soft_labels, whole.soft_labels)


def test_a_signal_leaves_a_run_that_the_same_call_continues(opened):
    whole = opened("whole").distill()
    before = signal.getsignal(signal.SIGINT)
    run = opened(callbacks=[Stop(3, lambda: signal.raise_signal(signal.SIGINT))])
    with pytest.raises(Interrupted, match="the same command continues"):
        run.distill()
    assert signal.getsignal(signal.SIGINT) is before
    images, _, _ = run.distill()  # the same object, whose callback does not see iteration 3 again
    assert torch.equal(images, whole.images)


def test_another_thread_works_as_well_and_only_one_at_a_time(opened):
    whole = opened("whole").distill()
    refused, made = [], []

    def second():
        try:
            run.distill()
        except RunDirError as error:
            refused.append(str(error))

    def meanwhile():
        second()  # the same object
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    run = opened(callbacks=[Stop(2, meanwhile)])
    thread = threading.Thread(target=lambda: made.append(run.distill()))
    thread.start()
    thread.join()
    assert len(refused) == 2 and all("another thread is using this run" in text for text in refused)
    assert torch.equal(made[0].images, whole.images)


def test_callbacks_hear_of_ranks_too(opened, monkeypatch):
    told = Told()
    run = opened(callbacks=[told], profile=HERE.model_copy(update={"ranks": 2}), evaluate={"baselines": []})
    run.distill()
    assert [i.number for i in told.iterations] == list(range(1, 7))
    assert [(e.stage, e.error) for e in told.ended] == [("distill", None)]
    refused = []

    def elsewhere():
        try:
            opened("other", profile=run.profile).distill()
        except RankError as error:
            refused.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert refused and "main thread" in refused[0]


def test_what_cannot_be_opened(tmp_path, opened, monkeypatch):
    with pytest.raises(RunDirError, match="is not a run folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="digits-lt"):
        Run.open(tmp_path / "x", "digits-l")
    with pytest.raises(RecipeError):
        Run.open(tmp_path / "x", "digits-lt", profile="nowhere")
    assert not (tmp_path / "x").exists()
    assert Run.open(tmp_path / "x", "digits-lt").recipe.name == "digits-lt"
    with pytest.raises(DistilledError):
        opened().distilled()
    cluster = opened(profile=Profile(launcher="slurm"))
    with pytest.raises(RecipeError, match=r"submit\(\)"):
        cluster.distill()
    with pytest.raises(RecipeError, match="submits no jobs"):
        opened().submit()
    with pytest.raises(RecipeError, match="stage 'train' is not known; valid: experts"):
        cluster.submit("train")


def test_the_names_of_the_package():
    assert lad_dist.Recipe is Recipe and set(lad_dist.__all__) >= {"Run", "Recipe", "Profile", "Callback", "load"}
    with pytest.raises(AttributeError, match="Runn"):
        _ = lad_dist.Runn
    assert set(results.Result.__dataclass_fields__) > {"overall", "tail", "per_class"}


def test_what_follows_from_a_changed_field_changes_with_it(tmp_path):
    from lad_dist import Recipe, change

    recipe = change("digits-lt-matching", "ipc=3")
    assert isinstance(recipe, Recipe) and (recipe.ipc, recipe.method) == (3, "lad")
    other = change(recipe, "method=mtt", "evaluate.protocol=rldd")
    assert (other.distill.matching, other.distill.labels, other.ipc) == ("joint", "hard", 3)
    assert other.evaluate.optimizer == "adamw"
    assert change(Recipe(), "model.network=resnet18").evaluate.architectures == ("resnet18",)
    assert change(recipe) == recipe
    with pytest.raises(RecipeError, match=r"distill\.iteration"):
        change(recipe, "distill.iteration=4")
