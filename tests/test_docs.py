"""What README and docs/ show works: commands exist, links lead somewhere, and every command is run, or says here why not."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lad_dist.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {  # what in a command tells why it is not run
    r"^make ": "is what runs the tests, or takes minutes; tests/test_deployment_files.py and CI run them",
    r"--on (?!local)|^doctor --on|^cancel |^logs ": "needs a cluster; tests/slurm runs these verbs on a SLURM of two nodes",
    r"^view ": "serves until Ctrl-C; tests/test_view.py",
    r"--watch": "goes on until a run ends; tests/test_status.py",
    r"hf://": "needs the hub; tests/sharing has one on 127.0.0.1",
    r"s3://|gs://": "needs a bucket; tests/trajectories/test_remote.py has one",
    r"my-recipe\.yaml|/data/|--replay RUN|their-files|runs/theirs": "names something of the reader's; tests of these verbs make it",
    r"tune_lr": "trains dozens of networks; tests/evaluate/test_tune.py does so with small ones",
    r"digits-lt-aligned": "trains for a minute; the demo runs it, tests/distill/test_statistics.py a small one",
    r"compare runs/lad runs/datm|runs/big|^buffer prune ": "names runs of minutes; tests/report, tests/trajectories",
    r"digits-lt-matching": "trains for minutes; benchmarks/methods.py and the demo run it",
    r"--buffers shared-experts": "is --buffers of other pages again; tests/test_pipeline.py shares experts",
    r"--fleet on": "starts Ray; tests/experts/test_fleet.py",
    r"^--install-completion": "writes into the home folder; tests/test_cli.py asks for the script",
    r"resnet18": "trains minutes; tests/models/test_zoo.py",
}
SMALL = {
    "name": "digits-lt", "ipc": 2,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 60, "whitening": "standardize"},
    "model": {"width": 4, "depth": 2},
    "experts": {"count": 2, "epochs": 3, "classifier_epochs": 2, "batch": 32, "lr": 0.05, "epochs_per_part": 2},
    "distill": {"iterations": 2, "student_steps": 2, "student_steps_classifier": 2, "batch": 6, "window_epochs": 1,
                "start_epoch_max": 2, "lr_images": 0.1, "lr_labels": 0.1},
    "evaluate": {"seeds": 1, "epochs": 2, "full_epochs": 1},
}  # fmt: skip
CHEAP = ["model.width=4", "experts.epochs=3", "experts.count=1", "experts.classifier_epochs=2", "distill.iterations=2",
         "distill.start_epoch_max=1", "evaluate.epochs=1", "evaluate.full_epochs=1", "evaluate.seeds=1",
         "distill.lr_images=0.01", "distill.lr_labels=0.01", "distill.lr_alpha=0", "distill.student_steps=3",
         "data.whitening=standardize"]  # fmt: skip

ONE_AFTER_THE_OTHER = """
import json, sys
from lad_dist.cli import main
for sys.argv in json.load(sys.stdin):
    print("$", *sys.argv, flush=True)
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""  # in one process, which imports torch once


def commands(page: Path) -> list[str]:
    """The lines of indented blocks that call lad-dist, continued ones joined, without their comments."""
    text = re.sub(r"\\\n\s+", "", page.read_text(encoding="utf-8"))
    return [re.sub(r" +#.*", "", line) for line in re.findall(r"^    lad-dist (.+)$", text, re.MULTILINE)]


ALL = [pytest.param(line, id=f"{page.stem}: {line}") for page in PAGES for line in dict.fromkeys(commands(page))]


@pytest.mark.parametrize("line", ALL)
def test_commands_exist(line):
    import typer

    command = typer.main.get_command(app)
    for word in line.split():
        if not hasattr(command, "commands") or word.startswith("-"):
            break
        assert word in command.commands
        command = command.commands[word]
    assert not hasattr(command, "commands") or line.startswith("--")
    for option in re.findall(r"--[a-z-]+", line):
        assert any(option in p.opts for p in command.params), option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Files, pictures, and headings where a link names one."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)]+)\)|<img src=\"([^\"]+)\"", text):
        name, _, anchor = "".join(target).partition("#")
        file = page.parent / name if name else page
        assert file.exists(), name
        if anchor:
            headings = re.findall(r"^#+ +(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_the_table_of_messages_quotes_what_the_code_says():
    """Pieces around an ellipsis, in the texts of the sources."""
    sources = (ROOT / "lad_dist").rglob("*.py")
    ours = "\n".join(text for file in sources for text in texts(ast.parse(file.read_text(encoding="utf-8"))))
    others = ("Killed", "No space left on device")  # the shell's, the system's
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [m for row in re.findall(r"^\| (`.+?) \| ", page, re.MULTILINE) for m in re.findall(r"`([^`]+)`", row)]
    pieces = [piece for message in quoted for piece in re.split(r" ?\.\.\. ?", message) if message not in others]
    assert len(pieces) > 20
    assert [piece for piece in pieces if piece not in ours] == []


def texts(tree: ast.AST) -> Iterator[str]:
    """Text literals; of f-strings, what lies between the fields, joined by an ellipsis."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "...".join(str(part.value) for part in node.values if isinstance(part, ast.Constant))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_tutorial_s_profile_is_one():
    from lad_dist.profile import Profile

    (text,) = re.findall(
        r"^    name: my-slurm\n(?:    .*\n)+", (ROOT / "docs/first-slurm-job.md").read_text(), re.MULTILINE
    )
    assert Profile.model_validate(yaml.safe_load(textwrap.dedent(text))).launcher == "slurm"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index] == [
        "README.md"
    ]


def test_the_reference_of_recipes_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "docs" / "make_recipes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == module.text(), "run docs/make_recipes.py"


def own_data(folder: Path) -> str:
    """The folder that docs/own-data.md's recipe is about, made in ``folder``; returns the recipe."""
    for split, count in (("train", 9), ("test", 2)):
        for label, name in enumerate(("wren", "robin")):
            (folder / "birds" / split / name).mkdir(parents=True)
            for i in range(count - 3 * label * (split == "train")):
                picture = Image.new("RGB", (40, 36 + i), (120 * label, 20 * i, 90))
                picture.save(folder / "birds" / split / name / f"{i}.jpg")
    block = re.search(r"^    name: birds\n(?:    .*\n)+", (ROOT / "docs/own-data.md").read_text(), re.MULTILINE)
    assert block is not None
    text = textwrap.dedent(block[0]).replace("/data/birds", str(folder / "birds"))
    return text.replace("validation_per_class: 5", "validation_per_class: 1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to call lad-dist in, whose shipped recipe digits-lt is a small one; ``place(*lines)`` runs command lines.

    ``place.folder`` is the folder.
    """
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "lad_dist", folder / "site" / "lad_dist")
    for name in ("jobs", "cluster"):
        shutil.copytree(ROOT / name, folder / "site" / name)
    (folder / "site/jobs/digits-lt.yaml").write_text("# Purpose: small\n" + yaml.safe_dump(SMALL))
    (folder / "birds.yaml").write_text(own_data(folder))
    environment = {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}

    def words_of(line: str) -> list[str]:
        words = shlex.split(re.sub(r"(iterations=\d)00\b", r"\1", line))
        if "birds.yaml" in words:
            words += [part for value in CHEAP for part in ("--set", value)]
            words += [] if "--out" in words else ["--out", "runs/birds"]  # without the values that were set just now
        return words

    def call(*lines: str) -> None:
        asked = json.dumps([["lad-dist", *words_of(line)] for line in lines])
        done = subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER], input=asked, cwd=folder, env=environment,
                              timeout=500, capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    call("run digits-lt")
    call.folder = folder
    return call


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(place, page):
    """In the order of the page, each page by itself: what another one exported is out of the way."""
    shutil.rmtree(place.folder / "exports", ignore_errors=True)
    place(*(line for line in dict.fromkeys(commands(page)) if not any(re.search(pattern, line) for pattern in NOT_RUN)))


def test_what_is_not_run_occurs():
    every = [f"lad-dist {line}" for page in PAGES for line in commands(page)] + ["make demo"]
    unused = [p for p in NOT_RUN if not any(re.search(p, line.removeprefix("lad-dist ")) for line in every)]
    assert unused == []
