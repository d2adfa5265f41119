"""The command line apart from the stages: help, catalogue, names, messages, terminals."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated
from unittest.mock import Mock

import pytest
import typer
from typer.testing import CliRunner

import lad_dist
from lad_dist import catalog, cli, recipe_file
from lad_dist.cli.options import JobOptions, expanded
from lad_dist.launch import local
from lad_dist.pipeline import Pipeline
from lad_dist.profile import Profile
from lad_dist.progress import Screen
from lad_dist.recipe import Recipe

ROOT = Path(__file__).parents[1]


def process(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-m", "lad_dist.cli", *args], capture_output=True, env=variables, timeout=60)


def lad(*args: str):
    return CliRunner().invoke(cli.app, list(args), prog_name="lad-dist")


def test_help_answers_at_once():
    """In processor time, of which it is made: on a busy machine the clock on the wall measures the others."""
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    code = (
        "import sys, lad_dist.cli as c\n"
        "try: c.app(['--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'torchvision', 'ray', 'pyarrow', 'pydantic', 'sklearn', 'yaml', 'numpy'}\n"
        "heavy = slow & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_help_names_every_command():
    shown = lad("--help").output
    for command in ("run", "experts", "distill", "evaluate", "report", "status", "jobs", "clusters", "buffer"):
        assert f" {command} " in shown


STAGE_VERBS = ("run", "experts", "distill", "evaluate", "report")


@pytest.mark.parametrize("verb", STAGE_VERBS)
def test_help_of_a_stage_lists_the_shared_options_and_then_its_own(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    ended = lad(verb, "--help")
    assert ended.exit_code == 0 and "JOB" in ended.output
    listed = re.findall(r"^│ (--[a-z-]+)", ended.output, re.MULTILINE)
    own = {"run": ["--fleet"], "experts": ["--fleet"], "distill": ["--replay"], "evaluate": ["--baseline"]}
    shared = ["--out", "--on", "--set", "--buffers", "--device", "--threads"]
    assert listed[: len(shared)] == shared and listed[-1] == "--help"
    assert set(own.get(verb, [])) <= set(listed)


def test_a_stage_verb_hands_on_what_it_was_told(monkeypatch, tmp_path):
    told = {}

    def record(recipe, out, profile, buffers, screen, stages, keep_recipe):
        told.update(recipe=recipe, out=out, profile=profile, buffers=buffers, stages=stages, keep=keep_recipe)
        raise SystemExit(0)

    monkeypatch.setattr(local, "run", record)
    folder = str(tmp_path / "x")
    lad("experts", "digits-lt", "--out", folder, "--set", "ipc=3", "--set", "seed=7", "--buffers", "s3://b/p?region=eu",
        "--device", "cpu", "--threads", "2", "--fleet", "off")  # fmt: skip
    assert (told["recipe"].ipc, told["recipe"].seed, told["out"], len(told["stages"])) == (3, 7, Path(folder), 1)
    assert told["buffers"] == "s3://b/p?region=eu", "a path would lose a slash"
    profile = told["profile"]
    assert (profile.device, profile.threads, profile.fleet) == ("cpu", 2, "off")
    lad("experts", "digits-lt")
    assert (told["buffers"], told["profile"].fleet, told["out"]) == (None, "auto", Path("runs/digits-lt"))
    for verb, keeps in (("evaluate", True), ("report", True), ("run", False), ("experts", False)):
        lad(verb, "digits-lt")
        assert told["keep"] is keeps, verb
    lad("distill", "digits-lt", "--replay", "runs/first")
    pipeline = Mock(spec=Pipeline)
    for stage in told["stages"]:
        stage(pipeline)
    pipeline.distill.assert_called_once_with(Path("runs/first"))


@pytest.mark.parametrize(("given", "of_profile", "used"), [
    ("s3://b/p", None, "s3://b/p"), ("some/where", None, Path("some/where")), (Path("x"), "s3://b/p", Path("x")),
    (None, "s3://b/p", "s3://b/p"), (None, "~/p", Path.home() / "p"), ("~/p", None, Path.home() / "p"),
    (None, None, None),
])  # fmt: skip
def test_where_buffers_lie(monkeypatch, given, of_profile, used):
    class OpenedError(Exception):
        pass

    def opened(recipe, out, profile, buffers, *rest):
        raise OpenedError(buffers)

    monkeypatch.setattr(local, "open_pipeline", opened)
    profile = Profile(buffers=of_profile, device="cpu")
    with pytest.raises(OpenedError) as found:
        local.run(Recipe(name="x"), Path("x"), profile, given, Screen(), [])
    assert found.value.args == (used,)


def test_a_verb_with_options_of_its_own_and_a_group_of_them():
    """What a new verb relies on: groups of options are told apart from its own, and required ones stay required."""
    told = []

    def plan(asked: JobOptions, hours: Annotated[float, typer.Option(help="How long.")] = 1.0) -> None:
        """Says what it would cost."""
        told.append((asked, hours))

    one = typer.Typer()
    one.command()(expanded(plan))
    assert CliRunner().invoke(one, ["digits-lt", "--threads", "3", "--hours", "2"]).exit_code == 0
    assert told == [(JobOptions("digits-lt", threads=3), 2.0)]
    assert CliRunner().invoke(one, []).exit_code == 2
    assert "Says what it would cost" in CliRunner().invoke(one, ["--help"]).output


def test_version():
    assert lad("--version").output == f"lad-dist {lad_dist.__version__}\n"


@pytest.mark.parametrize("columns", ["80", "200"])
def test_jobs_lists_every_shipped_recipe(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    shown, every = lad("jobs").output, lad("jobs", "--all").output
    assert catalog.jobs() and "digits-lt" in catalog.jobs()
    for name, file in catalog.jobs().items():
        assert name in every and (name in shown or catalog.family(name) in shown)
        assert catalog.purpose(file).split()[0] in every
    assert len(shown.splitlines()) < 60 and max(map(len, shown.splitlines())) <= int(columns)
    assert shown.count("published table (arXiv") <= 3


def test_jobs_by_words_and_their_text():
    shown = lad("jobs", "tiny", "f20-").output
    assert "tiny-imagenet-lt-f20-ipc10" in shown and "tiny-imagenet-lt-f20-ipc20" in shown
    assert "f100" not in shown and "cifar" not in shown
    assert lad("jobs", "show", "digits-lt").output == catalog.jobs()["digits-lt"].read_text()
    for words, said in ((["nothing-like-it"], "no recipe's name has nothing-like-it"), (["show"], "no recipe named"),
                        (["show", "digit-lt"], "did you mean digits-lt")):  # fmt: skip
        refused = lad("jobs", *words)
        assert refused.exit_code == 2 and said in refused.stderr


def test_jobs_are_grouped_by_data_set(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = lad("jobs").output
    titles = [line for line in shown.splitlines() if line and line[0] != " " and not line.startswith("jobs ")]
    assert titles == sorted({catalog.data_set(name) for name in catalog.jobs()})
    entries = [line for line in shown.splitlines() if " IPC " in line]
    assert len(entries) > 10 and len({line.index("IPC") for line in entries}) == 1, "figures are aligned"


def test_clusters_lists_every_shipped_profile(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = lad("clusters").output
    assert "local" in catalog.profiles()
    for name, file in catalog.profiles().items():
        assert name in shown and catalog.purpose(file) in re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize(("words", "offered"), [
    ("lad-dist clu", ["clusters"]),
    ("lad-dist run digits", ["digits-lt", "digits-lt-aligned", "digits-lt-matching"]),
    ("lad-dist run digits-lt --on slurm", ["slurm-a100", "slurm-small"]),
    ("lad-dist run my-recipe.y", []),  # the shell offers files
])  # fmt: skip
def test_shells_complete_verbs_recipes_and_profiles(words, offered):
    variables = {"_LAD_DIST_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    ended = CliRunner().invoke(cli.app, [], prog_name="lad-dist", env=variables)
    assert ended.output.split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_asks_lad_dist(monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    ended = lad("--show-completion", shell)
    assert ended.exit_code == 0 and "_LAD_DIST_COMPLETE" in ended.output


# Mirrors "every recipe is loaded by a test, recursively, and the test fails if it found none".
RECIPES = sorted((ROOT / "jobs").rglob("*.yaml"))
PROFILES = sorted((ROOT / "cluster").glob("*.yaml"))


def test_recipes_and_profiles_are_found():
    assert RECIPES and PROFILES
    assert sorted(catalog.jobs().values()) == RECIPES, "two recipes of one name hide each other"


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_recipe_loads(file):
    assert recipe_file.load(file).name == file.stem
    assert catalog.purpose(file), f"{file}: its header has no '# Purpose:' line"


@pytest.mark.parametrize("file", PROFILES, ids=lambda f: f.stem)
def test_every_profile_loads(file):
    profile = recipe_file.validated(Profile, recipe_file.read_document(file), str(file))
    assert profile.name == file.stem


# --- names ------------------------------------------------------------------------------------------------------------


def test_unknown_job_names_the_nearest():
    ended = lad("run", "digit-lt")
    assert ended.exit_code == 2 and "did you mean digits-lt" in ended.stderr and "lad-dist jobs" in ended.stderr


def test_unknown_job_file():
    ended = lad("run", "mine/digits-lt.yaml")
    assert ended.exit_code == 2 and "mine/digits-lt.yaml: no such file" in ended.stderr


def test_unknown_profile_names_the_nearest():
    ended = lad("run", "digits-lt", "--on", "locl")
    assert ended.exit_code == 2 and "did you mean local" in ended.stderr


def test_folder_that_is_no_run_as_a_job(tmp_path):
    ended = lad("run", str(tmp_path))
    assert ended.exit_code == 2 and "folder without recipe.yaml" in ended.stderr


def test_a_shipped_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits-lt").mkdir()
    (tmp_path / "digits-lt" / "recipe.yaml").touch()
    assert catalog.find_job("digits-lt").run is None
    assert catalog.find_job("./digits-lt").run == Path("digits-lt")


def test_default_run_folder():
    job, recipe = catalog.JobFile(Path("x.yaml")), Recipe(name="x")

    def out(*sets):
        return str(cli.default_out(job, recipe, sets))

    assert out() == "runs/x"
    assert out("ipc=3") == "runs/x+ipc=3"
    assert out("seed=1", "ipc=3") == out("ipc=3", "seed=1") == "runs/x+ipc=3+seed=1"
    assert out("ipc=3", "ipc=4") == "runs/x+ipc=4", "the last one holds"
    assert out("name=x") == "runs/x", "the name is there already"
    odd = {out("data.root=/a/b"), out("data.root=/a b"), out("data.root=/a:b"), out("data.root=" + "x" * 400)}
    assert len(odd) == 4 and all("/" not in o.removeprefix("runs/") and len(o) < 200 for o in odd)
    assert cli.default_out(catalog.JobFile(Path("r/recipe.yaml"), run=Path("r")), recipe, ["ipc=3"]) == Path("r")


# --- messages and terminals -------------------------------------------------------------------------------------------


def test_device_threads_and_fleet_are_checked():
    assert lad("run", "digits-lt", "--device", "tpu").exit_code == 2
    assert lad("run", "digits-lt", "--threads", "0").exit_code == 2
    assert lad("run", "digits-lt", "--fleet", "yes").exit_code == 2


def test_cuda_where_there_is_none(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    ended = lad("run", "digits-lt", "--device", "cuda", "--out", str(tmp_path / "x"))
    assert ended.exit_code == 2 and "no CUDA GPU here" in ended.stderr and not (tmp_path / "x").exists()


def test_ctrl_c_outside_a_stage(monkeypatch):
    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(catalog, "find_job", interrupted)
    ended = lad("run", "digits-lt")
    assert ended.exit_code == 130 and len(ended.stderr.splitlines()) == 1 and "interrupted" in ended.stderr


def test_a_bug_keeps_its_traceback_without_locals(tmp_path):
    code = (
        "from lad_dist import catalog, cli\n"
        "def bug(text):\n"
        "    local_secret = 'x' * 3\n"
        "    raise ZeroDivisionError('a bug')\n"
        "catalog.find_job = bug\n"
        "cli.main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, "run", "digits-lt"], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr and "ZeroDivisionError: a bug" in ended.stderr and "xxx" not in ended.stderr


@pytest.mark.parametrize("command", [["jobs"], ["clusters"], ["--help"], ["buffer", "--help"]])
@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {"COLUMNS": "12"}, {"COLUMNS": "1"},
    {"TERM": "dumb"}, {"NO_COLOR": "1"},
])  # fmt: skip
def test_any_terminal_will_do(command, environment):
    ended = process(*command, **environment)
    assert ended.returncode == 0, ended.stderr.decode(errors="replace")
    assert b"Traceback" not in ended.stderr


def test_broken_pipe():
    shell = f"{sys.executable} -m lad_dist.cli jobs | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in ended.stderr and "BrokenPipe" not in ended.stderr
    assert ended.stdout.strip() in ("0", "1")


@pytest.mark.parametrize("verb", [["plan"], ["status"], ["compare"], ["buffer", "verify"], ["run"]])
def test_a_path_longer_than_any_is_one_message(verb):
    ended = CliRunner().invoke(cli.app, [*verb, "x" * 5000], prog_name="lad-dist")
    assert ended.exit_code == 8, ended.output
    assert "File name too long" in ended.stderr and len(ended.stderr) < 500


@pytest.mark.parametrize("threads", ["1025", "9" * 30])
def test_more_threads_than_any_machine_has_are_refused(threads):
    ended = CliRunner().invoke(cli.app, ["plan", "digits-lt", "--threads", threads], prog_name="lad-dist")
    assert ended.exit_code == 2 and "threads" in ended.output and "Traceback" not in ended.output
    assert isinstance(ended.exception, SystemExit)


def test_a_profile_of_gpus_has_one_rank_on_the_cpu():
    assert Profile(nodes=2, gpus_per_node=4).world == Profile(device="cuda", nodes=2, gpus_per_node=4).world == 8
    assert Profile(device="cpu", nodes=2, gpus_per_node=4).world == 1
    assert Profile(device="cpu", gpus_per_node=4, ranks=3).world == 3
