"""Every mistake a user can make: one clear message, the right exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FACTOR_ONE = {"imbalance": "natural"}


def pictures(root: Path, split: str, per_class: dict[str, int], shape: tuple[int, int] = (8, 8)) -> None:
    draws = np.random.default_rng(0)
    for name, count in per_class.items():
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(root / split / name / f"{i}.png")


@pytest.fixture
def folders(tmp_path):
    """An image folder of three classes."""
    root = tmp_path / "images"
    pictures(root, "train", {"a": 6, "b": 5, "c": 4})
    pictures(root, "test", {"a": 2, "b": 2, "c": 2})
    return root


def folder_data(root: Path, **fields: object) -> dict[str, object]:
    return {"dataset": "image-folder", "root": str(root), **FACTOR_ONE, **fields}


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_unknown_data_set(lad, job):
    lad("run", job(data={"dataset": "digitz"})).fails(2, "tiny.yaml: data.dataset", "digitz", "'digits'", "'cifar10'")
    assert not Path("runs").exists()


def test_ipc_0(lad, job):
    lad("run", job(ipc=0)).fails(2, "tiny.yaml: ipc", "0", "greater than or equal to 1")
    lad("run", job(), "--set", "ipc=0").fails(2, "--set ipc=0", "greater than or equal to 1")
    assert not Path("runs").exists()


def test_three_faults_at_once(lad, job):
    bad = job(ipc=0, data={"dataset": "digits", "imbalance_facto": 5}, experts={"lr": "fast"})
    ended = lad("run", bad).fails(2, "3 faults", "did you mean data.imbalance_factor", "experts.lr", "ipc")
    assert len(ended.err.strip().splitlines()) == 4
    assert not Path("runs").exists()


def test_unknown_key_of_set_names_the_nearest(lad, job):
    lad("run", job(), "--set", "distill.iteration=5").fails(2, "--set distill.iteration=5", "distill.iterations")


def test_set_without_a_value(lad, job):
    lad("run", job(), "--set", "ipc").fails(2, "--set ipc", "field=value")


def test_a_recipe_that_is_not_yaml(lad, tmp_path):
    (tmp_path / "bad.yaml").write_text("ipc: [1\n")
    lad("run", "bad.yaml").fails(2, "bad.yaml:2", "not valid YAML")


def test_markup_in_a_name_is_printed_as_it_is(lad):
    lad("run", "[bold]x[/nope].yaml").fails(2, "[bold]x[/nope].yaml")


# --- data -------------------------------------------------------------------------------------------------------------


def test_class_without_images_then_with(lad, job, folders, look):
    for file in (folders / "train" / "b").iterdir():
        file.unlink()
    command = ("run", job(data=folder_data(folders)), "--out", "out")
    lad(*command).fails(3, "train/b", "no images of class b")
    assert look.leftovers(Path("out")) == [] and not Path("out/evaluation").exists()
    shutil.rmtree(folders / "train" / "b")
    pictures(folders, "train", {"b": 5})
    lad(*command).succeeds()


@pytest.mark.parametrize(("labels", "said"), [
    ((1, 2, 3), "labels 0 do not occur"), ((0, 2, 2), "labels 1 do not occur"), ((-1, 0, 1), "labels -1 are not valid"),
])  # fmt: skip
def test_labels_that_are_not_0_to_k_minus_1(lad, job, folders, tmp_path, labels, said):
    for split in ("train", "test"):
        lines = [f"{split}/{name}/{i}.png {label}" for name, label in zip("abc", labels, strict=True) for i in range(2)]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    data = {"dataset": "list", "root": str(folders), "train": str(tmp_path / "train.txt"),
            "test": str(tmp_path / "test.txt"), **FACTOR_ONE}  # fmt: skip
    lad("run", job(data=data), "--out", "out").fails(3, "train.txt", said)
    assert not Path("out/distilled").exists()


def test_image_that_does_not_decode_then_does(lad, job, folders):
    bad = folders / "train" / "c" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:40])
    command = ("run", job(data=folder_data(folders)), "--out", "out")
    lad(*command).fails(3, str(bad), "not a readable image")
    bad.write_bytes(good)
    lad(*command).succeeds()


def test_image_that_is_not_square(lad, job, folders):
    file = folders / "train" / "a" / "3.png"
    Image.fromarray(np.zeros((8, 9), dtype=np.uint8)).save(file)
    lad("run", job(data=folder_data(folders)), "--out", "out").fails(3, str(file), "9x8", "not square", "center-crop")


def test_images_that_changed_since_the_experts_were_trained(lad, job, folders):
    command = (job(data=folder_data(folders)), "--out", "out")
    lad("experts", *command).succeeds()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folders / "train" / "a" / "0.png")
    for verb in ("experts", "distill", "run"):
        lad(verb, *command).fails(5, "data_fingerprint")


# --- trajectories -----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(finished, tmp_path):
    """A run folder whose experts are trained and nothing else."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "recipe.yaml", run)
    shutil.copytree(finished / "trajectories", run / "trajectories")
    return run


def test_damaged_part(lad, trained, finished, look):
    part = sorted((trained / "trajectories/representation/expert-0001").glob("*.parquet"))[0]
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 8] ^= 1
    part.write_bytes(whole)
    ended = lad("buffer", "verify", trained)
    assert ended.code == 1 and str(part) in ended.err and "Traceback" not in ended.err
    lad("run", trained).fails(5, str(part), "damaged", "lad-dist experts")
    assert look.leftovers(trained) == [] and not (trained / "distilled").exists()
    part.unlink()
    lad("run", trained).succeeds()
    lad("buffer", "verify", trained).succeeds()
    assert look.distilled_bytes(trained) == look.distilled_bytes(finished)


@pytest.mark.parametrize("stage", ["representation", "classifier"])
def test_missing_part(lad, trained, finished, look, stage):
    part = sorted((trained / f"trajectories/{stage}/expert-0001").glob("*.parquet"))[-1]
    part.unlink()
    lad("distill", trained).fails(5, stage, "expert 1", "missing", "lad-dist experts")
    assert look.leftovers(trained) == [] and not (trained / "distilled").exists()
    lad("run", trained).succeeds()
    assert look.distilled_bytes(trained) == look.distilled_bytes(finished)


@pytest.mark.parametrize("verb", ["experts", "distill", "run"])
def test_buffer_made_by_another_recipe(lad, trained, verb):
    shutil.rmtree(trained / "trajectories")
    lad("experts", trained, "--out", "other", "--set", "experts.lr=0.02").succeeds()
    shutil.copytree("other/trajectories", trained / "trajectories")
    lad(verb, trained).fails(5, "another recipe", str(trained / "trajectories"))
    assert not (trained / "distilled").exists()


# --- storage ----------------------------------------------------------------------------------------------------------

WIDE = {"width": 256, "depth": 1}  # its parts are larger than everything else in the run folder


def test_full_disk_while_a_part_is_written(lad, job, look):
    """A limit on the size of a file makes the kernel refuse the write of a part half-way."""
    command = ("experts", job(model=WIDE), "--out", "out")
    limit = 150_000
    process = lad.start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    lad.ended(process).fails(8, "epochs-0000-0001.parquet", "could not be published", "run the same command again")
    assert look.leftovers(Path("out")) == []
    assert list(Path("out").rglob("*.parquet")) == []
    lad(*command).succeeds()
    lad("buffer", "verify", "out").succeeds()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "lad-dist-test", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_really_full_disk(lad, job, small_disk, look):
    run, ballast = small_disk / "run", small_disk / "ballast"
    command = ("experts", job(model=WIDE), "--out", run)
    lad(*command).fails(2, "experts.count: the trajectory buffer of 2 experts", "another disk with --out or --buffers")
    assert not run.exists()  # the whole disk is too small
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 400_000))
    lad(*command).fails(8, "No space left on device", "free some space")
    assert look.leftovers(run) == []
    lad("buffer", "verify", run)  # whatever was published is whole
    ballast.unlink()
    lad(*command).succeeds()
    lad("buffer", "verify", run).succeeds()
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 4096))
    before = look.contents(run / "trajectories")
    lad("run", run).fails(8, "No space left on device")
    assert look.contents(run / "trajectories") == before and not (run / "distilled").exists()
    ballast.unlink()
    lad("run", run).succeeds()
    assert look.leftovers(run) == []


@pytest.mark.parametrize("call", ["emit", "close"])
def test_full_disk_while_an_event_is_written(lad, job, finished, monkeypatch, look, call):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(f"lad_dist.progress.Events.{call}", full)
        lad("run", job(), "--out", "run").fails(8, "run: No space left on device", "the same command continues")
    lad("run", job(), "--out", "run").succeeds()
    assert look.distilled_bytes(Path("run")) == look.distilled_bytes(finished)


def test_run_folder_below_a_file(lad, job, tmp_path):
    (tmp_path / "file").write_text("precious")
    lad("run", job(), "--out", "file/run").fails(4, "file/run", "Not a directory", "--out")
    assert (tmp_path / "file").read_text() == "precious"


def test_run_folder_where_nothing_can_be_written(lad, job):
    lad("run", job(), "--out", "/proc/lad-dist").fails(4, "/proc/lad-dist", "--out")


def test_folder_that_is_not_a_run(lad, job, tmp_path, look):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    lad("run", job(), "--out", "home").fails(4, "home", "not a run folder")
    lad("status", "home").fails(4, "home", "not a run folder")
    assert list(look.contents(tmp_path / "home")) == ["thesis.tex"]


def test_run_folder_of_another_recipe(lad, job, finished, look):
    before = look.contents(finished)
    lad("run", job(), "--out", finished, "--set", "distill.lr_images=7", "--set", "ipc=2").fails(
        4, "ipc is 1 there, 2 here", "distill.lr_images is 1.0 there, 7.0 here", "--out"
    )
    assert look.contents(finished) == before


def test_results_that_are_not_json(lad, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "evaluation" / "results.json").write_text("{")
    lad("evaluate", run).fails(4, "results.json")
    (run / "evaluation" / "results.json").unlink()
    lad("run", run).succeeds()


def test_damaged_distilled_set(lad, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "distilled" / "tensors.safetensors").write_bytes(b"nonsense")
    (run / "evaluation" / "results.json").unlink()
    lad("evaluate", run).fails(6, "tensors.safetensors")
    shutil.rmtree(run / "distilled")
    lad("run", run).succeeds()


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_nan_in_distillation_names_the_iteration(lad, trained, look):
    for _ in range(2):  # the second time from the state that was kept
        lad("run", trained, "--out", "nan", "--set", "distill.alpha=1.0e+30").fails(7, "iteration 1", "distill.alpha")
        assert not Path("nan/distilled").exists() and look.leftovers(Path("nan")) == []
    assert "last error: distill: NumericalError: iteration 1" in lad("status", "nan").succeeds().out


def test_nan_in_experts_names_expert_and_epoch(lad, job):
    lad("run", job(), "--out", "nan", "--set", "experts.lr=1.0e+30").fails(7, "expert 0", "representation", "epoch 1")
    assert not Path("nan/distilled").exists()


def test_nan_in_evaluation(lad, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    lad("evaluate", run, "--set", "evaluate.lr=1.0e+30", "--set", "evaluate.epochs=5").fails(7, "evaluate.lr")
    assert (run / "evaluation/results.json").read_bytes() == (finished / "evaluation/results.json").read_bytes()
