"""``lad-dist plan``: what it says, what it refuses, and the change that it names for each."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

from lad_dist import catalog, cli, recipe_file
from lad_dist.data.longtail import exponential_counts
from lad_dist.errors import DataError, RecipeError
from lad_dist.plan import estimate, resources
from lad_dist.plan.dataset_info import dataset_info, published
from lad_dist.plan.estimate import make_plan, shapes_of
from lad_dist.plan.limits import rank_bytes
from lad_dist.plan.memory import Batches
from lad_dist.plan.resources import resources_of
from lad_dist.profile import Profile
from lad_dist.recipe import DataConfig, Recipe

CIFAR = "cifar10-lt-f100-ipc50"


def lad(*args: str):
    return CliRunner().invoke(cli.app, ["plan", *args], prog_name="lad-dist")


def planned(*args: str, code: int = 0) -> dict:
    ended = lad(*args, "--no-calibrate", "--json")
    assert ended.exit_code == code, ended.output
    return json.loads(ended.stdout)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """A machine with little on it: 16 GB of memory, plenty of disk, no data sets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAD_DIST_DATA", str(tmp_path / "no-data"))
    monkeypatch.setattr(resources, "free_bytes", lambda device: 16 * 10**9)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=10**12))


def test_every_shipped_recipe_can_be_planned_without_its_data():
    for job in catalog.jobs():
        recipe = recipe_file.load(catalog.find_job(job).recipe)
        if recipe.data.dataset == "parquet":
            continue  # nothing is published about a file of one's own
        facts, where = published(recipe.data), resources_of(Profile(ranks=4), None, "a100")
        assert facts is not None
        made = make_plan(recipe, facts, where, None, None, None)
        assert not made.faults and {d.stage for d in made.durations} >= {"experts", "distill", "evaluate"}


def test_a_plan_in_words():
    ended = lad("digits-lt", "--no-calibrate")
    assert ended.exit_code == 0, ended.output
    for word in (
        "405 training images",
        "12586 weights",
        "gradient path: keep",
        "trajectory buffer",
        "one rank, total, keep",
    ):
        assert word in re.sub(r"\s+", " ", ended.output)


def test_a_plan_makes_nothing(tmp_path):
    planned(CIFAR)
    assert list(tmp_path.iterdir()) == []


def test_what_auto_will_pick_is_what_fits():
    made = planned(CIFAR, "--set", "distill.memory_gb=16")
    assert made["path"] == "recompute" and "need 70." in made["why"]
    assert planned(CIFAR, "--set", "distill.memory_gb=80", "--gpu", "h200")["path"] == "keep"
    assert planned(CIFAR, "--gpu", "a100", "--ranks", "8")["path"] == "keep", "a rank holds an eighth"


def test_where_no_student_is_trained_there_are_no_graphs():
    made = planned("digits-lt", "--gpu", "h100", "--set", "distill.student_steps=100000")
    assert made["path"] == "keep" and made["why"] == "no student is trained in the regression phase"
    made = planned("digits-lt-matching", "--set", "distill.lambda_representation=0", "--set", "distill.student_steps=80",
                   "--set", "distill.student_steps_classifier=2")  # fmt: skip
    assert "the graphs of 2 steps" in made["why"]


def test_a_gpu_to_plan_for_is_not_a_cpu():
    ended = lad("digits-lt", "--gpu", "h100", "--device", "cpu")
    assert "valid: without --device cpu" in f"{ended.output}{ended.exception}"


def test_auto_is_told_the_same_as_the_distillation_will_be(small_recipe, pipeline_of):
    from lad_dist.distill.memory import step_bytes
    from lad_dist.distill.student import Batch, Phase, Student, SyntheticSet
    from lad_dist.models.convnet import build, flat_parameters
    from lad_dist.plan.memory import auto_bytes

    recipe = Recipe(ipc=2, distill={"student_steps": 5, "batch": 20})
    shapes = shapes_of(recipe, published(recipe.data))
    module = build(3, 32, 10, 128, 3, seed=0, purpose=("test",))
    batch, start = Batch(torch.arange(20)), flat_parameters(module)
    student = Student(module)
    phase = Phase(start, start + 1, [batch] * 5, student.layout.span("all"))
    synthetic = SyntheticSet(torch.randn(20, 3, 32, 32), torch.randn(20, 10), torch.tensor(0.1))
    asked = 5 * step_bytes(student, synthetic, phase, batch)
    assert auto_bytes(shapes, Batches(20, 20), 5) == pytest.approx(asked, rel=0.05)


def test_hours_follow_from_counts():
    one, ten = (planned("digits-lt", "--set", f"distill.iterations={n}")["durations"] for n in (300, 3000))
    seconds = [sum(d["seconds"] for d in made if d["stage"] == "distill") for made in (one, ten)]
    assert seconds[1] == pytest.approx(10 * seconds[0])


def test_ranks_divide_gpus_hours_and_stop_helping():
    hours = {n: planned(CIFAR, "--gpu", "a100", "--ranks", str(n)) for n in (1, 4, 64)}
    seconds = {n: sum(d["seconds"] for d in made["durations"] if d["stage"] == "distill") for n, made in hours.items()}
    assert seconds[4] < seconds[1] / 3
    assert "stop helping at 8" in hours[64]["advice"] and "up to 8" in hours[1]["advice"]
    assert "distill.windows=8" in hours[64]["advice"] and "8 groups" in hours[64]["advice"]
    assert "distill.windows" not in hours[4]["advice"]
    grouped = planned(CIFAR, "--gpu", "a100", "--ranks", "64", "--set", "distill.windows=8")
    assert "distill.windows" not in grouped["advice"]
    one, several = (
        next(row["efficiency"] for row in made["scaling"] if row["world"] == 64) for made in (hours[64], grouped)
    )
    assert several > 4 * one
    assert any("assumed" in rate["source"] for rate in hours[1]["rates"])


# what cannot fit


def fault(*args: str) -> str:
    ended = lad(*args, "--no-calibrate")
    assert ended.exit_code == RecipeError.exit_code, ended.output
    assert "one step" not in ended.stdout, "hours of what cannot run"
    return ended.stderr


def test_a_batch_that_does_not_fit_and_the_one_that_does():
    said = fault(CIFAR, "--set", "model.width=1024", "--set", "ipc=200", "--set", "distill.batch=2000", "--gpu", "rtx4090",
                 "--set", "experts.batch=64")  # fmt: skip
    assert "distill.batch: 2000 images a step need" in said
    fits, ranks = (
        int(re.search(pattern, said)[1]) for pattern in (r"distill\.batch=(\d+) fits", r"--ranks (\d+) fits")
    )
    recipe = Recipe(ipc=200, model={"width": 1024}, data={"imbalance_factor": 100})
    facts, where = published(recipe.data), resources_of(Profile(), None, "rtx4090")

    def needs(batch: int, world: int) -> int:
        return rank_bytes(recipe, facts, shapes_of(recipe, facts), "cuda", Batches(2000, batch, world), "recompute")

    assert needs(fits, 1) <= where.memory < needs(fits + 1, 1)
    assert needs(2000, ranks) <= where.memory < needs(2000, ranks - 1)
    planned(CIFAR, "--set", "model.width=1024", "--set", "ipc=200", "--set", f"distill.batch={fits}", "--gpu", "rtx4090",
            "--set", "experts.batch=64")  # fmt: skip


def test_keeping_where_only_recomputing_fits():
    said = fault(CIFAR, "--set", "distill.gradient=keep")
    assert "distill.gradient: keep needs" in said and "recompute needs" in said
    planned(CIFAR, "--set", "distill.gradient=recompute")


def test_a_disk_that_is_too_small(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    said = fault(CIFAR)
    assert (
        "experts.count: the trajectory buffer of 100 experts still needs 11.1 GB" in said
        and "experts.count=9 fits" in said
    )
    assert planned(CIFAR, "--set", "experts.count=9")["faults"] == []
    assert planned(CIFAR, "--buffers", "s3://bucket/prefix")["faults"] == [], "a store's room is not known"


def test_what_is_on_the_disk_already_is_not_needed_again(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    fault("digits-lt")
    folder = tmp_path / "runs" / "digits-lt" / "trajectories"
    folder.mkdir(parents=True)
    (folder / "part.parquet").write_bytes(bytes(15 * 10**6))
    planned("digits-lt")
    (folder.parent / "recipe.yaml").write_text(recipe_file.dump(recipe_file.load(catalog.find_job("digits-lt").recipe)))
    planned("digits-lt", "--out", "elsewhere", "--buffers", str(folder.parent))  # a run folder: its experts
    monkeypatch.setenv("HOME", str(tmp_path))
    planned("digits-lt", "--out", "~/runs/digits-lt")


def test_zca_of_images_that_are_too_large():
    said = fault("tiny-imagenet-lt-f20-ipc10", "--set", "data.image_size=128")
    assert "data.whitening: zca of 3x128x128 images needs 48.3 GB for matrices of 49152 x 49152" in said
    assert "data.whitening=standardize needs none" in said
    size = int(re.search(r"data\.image_size=(\d+) fits", said)[1])
    assert 5 * (3 * size**2) ** 2 * 4 <= 16e9 < 5 * (3 * (size + 1) ** 2) ** 2 * 4


def test_experts_that_do_not_fit():
    said = fault(CIFAR, "--set", "experts.batch=12406", "--set", "distill.batch=50")
    assert "experts.batch: " in said and re.search(r"experts\.batch=\d+ fits", said)


def test_all_faults_at_once(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=0))
    said = fault(CIFAR, "--set", "distill.gradient=keep", "--set", "experts.batch=12406")
    assert "3 faults" in said


# the data


def test_published_counts_are_those_of_the_recipe():
    facts = published(DataConfig(dataset="cifar100", imbalance_factor=50))
    assert facts.counts == exponential_counts(500, 100, 50) and (facts.channels, facts.size) == (3, 32)
    assert published(DataConfig(dataset="cifar10", imbalance="natural", validation_per_class=10)).train == 49_900


@pytest.mark.parametrize(("job", "train", "test", "classes", "largest"), [
    ("imagenet-lt-f256-ipc10", 115_846, 50_000, 1000, 1280),
    ("places-lt-f996-ipc10", 62_500, 36_500, 365, 4980),
])  # fmt: skip
def test_published_counts_of_lists(job, train, test, classes, largest):
    """Liu et al., CVPR 2019."""
    lists = published(recipe_file.load(catalog.find_job(job).recipe).data)
    assert (lists.train, lists.test, lists.classes, max(lists.counts), min(lists.counts)) == (
        train,
        test,
        classes,
        largest,
        5,
    )
    assert list(lists.counts) == sorted(lists.counts, reverse=True)


def test_data_that_are_here_are_looked_at():
    config = DataConfig(dataset="digits", imbalance_factor=20)
    there, known = dataset_info(config), published(config)
    assert there.source != known.source
    assert (there.counts, there.test, there.size) == (known.counts, known.test, known.size)


def test_unknown_data_that_are_not_here():
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        dataset_info(DataConfig(dataset="parquet", train="nowhere.parquet", test="nowhere.parquet"))


# where


def test_a_calibration_measures_this_device():
    ended = lad("digits-lt", "--calibrate", "1", "--threads", "1", "--json")
    assert ended.exit_code == 0, ended.output
    made = json.loads(ended.stdout)
    assert {rate["source"] for rate in made["rates"]} == {"measured now on this machine"}
    assert all(0 < rate["seconds"] < 30 for rate in made["rates"])


def test_gpus_that_are_elsewhere(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("name: cluster\ndevice: cuda\nnodes: 2\ngpus_per_node: 8\nexperts_per_gpu: 2\n")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    made = planned(CIFAR, "--on", str(file))
    assert made["world"] == 16 and "16 x NVIDIA A100" in made["place"] and "not here" in made["place"]
    how = next(d["how"] for d in made["durations"] if d["stage"] == "experts")
    assert "32 at a time" in how


def test_an_unknown_card():
    ended = lad(CIFAR, "--gpu", "voodoo2")
    assert ended.exit_code == RecipeError.exit_code and "valid: a100" in ended.stderr


def test_ranks_of_one_host_share_its_memory_and_cores():
    four, one = (resources_of(Profile(ranks=n, threads=8, device="cpu"), torch.device("cpu")) for n in (4, 1))
    assert four.rank_memory == one.rank_memory // 4
    assert (four.rank_threads(4), one.rank_threads(1)) == (2, 8)
    two_hosts = resources_of(Profile(ranks=4, nodes=2, threads=8, device="cpu"), torch.device("cpu"))
    assert two_hosts.rank_memory == one.rank_memory // 2 and two_hosts.rank_threads(4) == 4


def test_every_source_and_every_choice_of_a_schedule_is_in_the_plan():
    def evaluation(*sets: str) -> dict[str, float]:
        options = [part for one in sets for part in ("--set", one)]
        durations = planned("digits-lt", *options)["durations"]
        return {d["what"]: d["seconds"] for d in durations if d["stage"] == "evaluate"}

    adjusted = evaluation("evaluate.label_adjustment=adsa")
    assert "distilled-adsa" in adjusted
    chosen = evaluation("data.validation_per_class=5", "data.n_max=100", "distill.select=validation",
                        "distill.select_every=300", "distill.iterations=400")  # fmt: skip
    assert chosen["select"] == pytest.approx(2 * chosen["distilled"] / 5, rel=0.01)  # the last set is one; five seeds
    fixed = evaluation()
    assert list(fixed) == ["distilled", "initial", "random-soft", "random", "full"]
    several = evaluation("evaluate.architectures=[convnet,vgg11]")
    assert all(several[source] == pytest.approx(2 * fixed[source]) for source in fixed)
    tuned = evaluation("data.validation_per_class=5", "data.n_max=100", "evaluate.tune_lr=[0.01,0.1]",
                       "evaluate.tune_epochs=[100,300]")  # fmt: skip
    assert set(tuned) == {*fixed, *(f"tune {source}" for source in fixed)}
    # 2 x 2 networks of 200 epochs each, and two more for the learned alpha; five seeds of at most 300
    assert tuned["tune random"] / tuned["random"] == pytest.approx(4 * 200 / (5 * 300), rel=0.01)
    assert tuned["tune initial"] / tuned["tune random"] == pytest.approx(6 / 4, rel=0.01)
    assert tuned["tune full"] / tuned["full"] == pytest.approx(2 / 5, rel=0.01)
