"""The kinds of cases: each makes one ``Attempt`` in a folder of its own from a seeded generator.

``Undamaged`` is what damage is done to, and what outcomes are compared with: a tiny finished run, a second run of other
seeds, a folder of images, and what every command says about them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tests.campaign.campaign import MARKER, Attempt, Outcome, call

Doc = dict[str, Any]
RECIPE: Doc = {
    "name": "campaign",
    "ipc": 1,
    "data": {"dataset": "digits", "imbalance_factor": 5, "n_max": 20, "whitening": "standardize"},
    "model": {"width": 4, "depth": 2},
    "experts": {"count": 2, "epochs": 2, "classifier_epochs": 2, "batch": 32, "lr": 0.05, "classifier_lr": 0.05,
                "epochs_per_part": 2},
    "distill": {"iterations": 4, "student_steps": 2, "student_steps_classifier": 2, "batch": 6, "window_epochs": 1,
                "start_epoch_max": 2, "classifier_start_epoch_max": 2, "class_weights": "mean-one", "lr_images": 1.0,
                "lr_labels": 0.5, "lr_alpha": 1e-6, "alpha": 0.05, "checkpoint_every": 2},
    "evaluate": {"seeds": 1, "epochs": 2, "batch": 8, "full_epochs": 1, "full_batch": 32, "baselines": ["initial", "random"]},
}  # fmt: skip
OF_PICTURES: Doc = {
    **RECIPE,
    "data": {"dataset": "image-folder", "imbalance": "natural", "image_size": 8, "whitening": "standardize"},
    "model": {"width": 4, "depth": 1},
    "experts": {**RECIPE["experts"], "count": 1, "epochs": 1, "classifier_epochs": 1, "epochs_per_part": 1},
    "distill": {**RECIPE["distill"], "start_epoch_max": 1, "classifier_start_epoch_max": 1},
}
CLASSES = ("jay", "wren", "owl of the north")
HERE = ["--device", "cpu", "--threads", "1"]


@dataclass(frozen=True)
class Undamaged:
    """``root/run`` and ``root/other`` are finished runs, ``root/pictures`` a folder of images, ``said`` the outcomes."""

    root: Path
    said: dict[str, str] = field(default_factory=dict)

    @classmethod
    def made(cls, root: Path, limit: float) -> Undamaged:
        """What is there, or made now. Raises RuntimeError where a command fails on undamaged input."""
        file = root / "said.json"
        if not file.exists():
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            for name, seed in (("run", 0), ("other", 1)):
                doc = {**RECIPE, "seed": seed, "experts": {**RECIPE["experts"], "seed": seed}}
                doc["evaluate"] = {**RECIPE["evaluate"], "baselines": ["initial", "random", "random-teacher"]}
                (root / f"{name}.yaml").write_text(yaml.safe_dump(doc))
                _well(["run", f"{name}.yaml", "--out", name, "--fleet", "off", *HERE], root, 10 * limit)
                _as_of_jobs(root / name)
            pictures(root / "pictures")
            said = {}
            for name, reader in READERS.items():
                folder = root / f"reading {name}"
                copy_run(root, folder)
                reader.prepare(folder / "run")
                outcome = _well(reader.command, folder, limit)
                said[name] = reader.result(folder, outcome)
                shutil.rmtree(folder)
            for name, lists in (("image-folder", False), ("list", True)):
                folder = root / f"reading {name}"
                shutil.copytree(root / "pictures", folder / "pictures")
                said[name] = data_line(_well(experts_of_pictures(folder, lists), folder, limit))
                shutil.rmtree(folder)
            file.write_text(json.dumps(said, indent=1))
        return cls(root, json.loads(file.read_text()))


def _as_of_jobs(run: Path) -> None:
    """Add the files that a run has whose stages were jobs on SLURM, on a machine that chose its threads."""
    from lad_dist.plan.threads import Team
    from lad_dist.rundir import RunDir
    from lad_dist.slurm_jobs import SlurmJob, Submission, task_file, write_submissions

    logs = run / "slurm" / "logs" / "20260101-000000-abc"
    job = SlurmJob("experts", "7", None, str(logs / "7" / "7_submission.sh"))
    write_submissions(RunDir(run), [Submission("20260101-000000-abc", 1.8e9, "slurm-small", str(logs), (job,))])
    task_file(logs, "7").parent.mkdir(parents=True)
    task_file(logs, "7").write_text(json.dumps({"restarts": 0, "node": "n1", "time": 1.8e9, "state": "finished"}))
    Team(1, "one core").save(run / "threads.json")


def _well(command: list[str], folder: Path, limit: float) -> Outcome:
    outcome = call(command, folder, limit)
    if outcome.code != 0:
        raise RuntimeError(f"undamaged input: lad-dist {' '.join(command)}: {outcome.code}\n{outcome.text}")
    return outcome


def same(_: Outcome) -> str:
    """For commands whose outcome is the user's business."""
    return ""


# ---------------------------------------------------------------------------------------------------------------- recipes

WRONG = (None, True, -1, 0, 1.5, -0.5, 1e300, 10**12, 10**30, "text", "", " 3 ", "1e3", [], [1], {}, {"a": 1}, "NaN",
         float("nan"), float("inf"), "∞", "0x10", "1_000", "yes", "null", "\x07", "a" * 5000)  # fmt: skip
ABSURD = {
    "ipc": 10**9, "model.width": 4096, "model.depth": 8, "experts.epochs": 10**12, "experts.count": 10**9, "evaluate.seeds": 10**9,
    "distill.iterations": 10**15, "distill.batch": 10**12, "distill.student_steps": 10**6, "data.n_max": 10**9,
    "evaluate.epochs": 10**6, "data.image_size": 1024, "experts.batch": 10**6, "experts.draws_per_class": 10**6,
    "buffer.cache_mb": 10**6, "data.validation_per_class": 10**6, "data.imbalance_factor": 1000,
    "distill.window_epochs": 10**6, "experts.lr": 1e300,
}  # fmt: skip
ODD_TEXTS = ("", "=", "==", "x", "-1", "1e400", "nan", ".inf", "[", "{a: 1}", "[1, [2, [3]]]", "&a [*a]", "*a",
             "!!python/name:os.system", "1e12", "999999999999", "'", '"', "null", "\t", "{" * 100, "0b101", "1:30",
             "2001-02-03", "é", "@x", "%")  # fmt: skip


def leaves(doc: Doc, prefix: str = "") -> list[str]:
    """The dotted names of all fields."""
    names = []
    for key, value in doc.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def put(doc: Doc, name: str, value: object) -> None:
    """Set a dotted field."""
    *sections, leaf = name.split(".")
    for section in sections:
        doc = doc.setdefault(section, {})
    doc[leaf] = value


def broken_texts(rng: random.Random) -> dict[str, str]:
    """What no recipe looks like, by what is wrong."""
    whole = yaml.safe_dump(RECIPE, sort_keys=False)
    depth = rng.choice((40, 1_000, 20_000))
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    cut = whole[: rng.randrange(40, len(whole) - 20)]
    return {
        "empty file": "",
        "comments only": "# nothing\n",
        "null": "null\n",
        "a list": "- ipc\n- 1\n",
        "a number": "17\n",
        f"{depth} levels of mappings": "{a: " * depth + "1" + "}" * depth,
        f"{depth} levels of lists": "data: " + "[" * depth + "]" * depth,
        "alias bomb": bomb + "data: *a9\n",
        "alias of itself": "data: &a {b: *a}\n",
        "merge keys without end": "a: &a {<<: *a}\n",
        "a key twice": whole + "ipc: 7\n",
        "a key twice within a section": whole.replace("  width: 4\n", "  width: 4\n  width: 8\n"),
        "a tag of Python": f"name: !!python/object/apply:os.system ['touch {MARKER}']\n",
        "a tag of its own": "name: !campaign x\n",
        "binary": "name: !!binary ////\n",
        "a date as number": "ipc: 2001-02-30\n",
        "a NUL byte": whole + "\0",
        "tabs": whole.replace("  width", "\twidth"),
        "a bracket left open": whole + "extra: [1, 2\n",
        "a huge number": whole.replace("ipc: 1", "ipc: " + "9" * 10_000),
        "sexagesimal number": whole.replace("ipc: 1", "ipc: 1:30"),
        "octal number": whole.replace("ipc: 1", "ipc: 010"),
        "a number as key": "1: 2\n",
        "null as key": "~: 2\n",
        "2 MB of comments": "# x\n" * 500_000 + whole,
        "cut in the middle": cut if cut.strip() else "",
    }


def recipe(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """``plan`` of a recipe with one fault, or with a value that may be valid: then it must be the value that was written."""
    file = folder / "recipe.yaml"
    doc = copy.deepcopy(RECIPE)
    choice = rng.choice(("text", "unknown key", "wrong value", "wrong value", "absurd", "section"))
    if choice == "text":
        what, text = rng.choice(sorted(broken_texts(rng).items()))
        file.write_text(text, encoding="utf-8")
        partly = what in ("cut in the middle", "2 MB of comments")  # a shorter recipe may be a recipe
        return Attempt(what, ["plan", "recipe.yaml"], ("recipe.yaml",), same if partly else taken)
    name = rng.choice(leaves(doc))
    if choice == "unknown key":
        name, value = name + rng.choice(("s", "_", "x", "\u00e9")), 1
    elif choice == "absurd":
        name, value = rng.choice(sorted(ABSURD.items()))
    elif choice == "section":
        name, value = (
            rng.choice(("data", "model", "experts", "distill", "evaluate", "buffer", "augment")),
            rng.choice(WRONG),
        )
    else:
        value = rng.choice(WRONG)
    put(doc, name, value)
    file.write_text(yaml.safe_dump(doc, allow_unicode=True), encoding="utf-8")
    what = f"{choice}: {name} = {_short(value)}"
    return Attempt(what, ["plan", "recipe.yaml"], _words(name), lambda _: other_value(file, [], name, value))


def taken(_: Outcome) -> str:
    """For input that must be refused."""
    return "was taken"


def other_value(file: Path, sets: list[str], name: str, value: object) -> str:
    """In what the field of the loaded recipe differs from what was asked."""
    from lad_dist import recipe_file

    got: Any = recipe_file.load(file, sets).model_dump(mode="json")
    for part in name.split("."):
        got = got[part] if isinstance(got, dict) and part in got else f"no field {part}"
    if isinstance(value, dict) and isinstance(got, dict):
        got = {key: got.get(key) for key in value}
    equal = got == value and isinstance(got, bool) == isinstance(value, bool)
    return "" if equal else f"{name} is {_short(got)}, asked was {_short(value)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:50] + f"... ({len(text)} characters)"


def _words(name: str) -> tuple[str, ...]:
    """What a message about a field may call it: its own name, or what could not fit because of it."""
    return (name, name.rpartition(".")[2], "memory", "disk", "GB")


def option(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """``plan`` with an odd ``--set``, or a verb with an odd option."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    if rng.random() < 0.3:
        odd = [
            ["plan", "recipe.yaml", "--threads", rng.choice(("0", "-1", "x", "9" * 30, "1000000"))],
            ["plan", "recipe.yaml", "--device", rng.choice(("tpu", "cuda", ""))],
            ["plan", "recipe.yaml", "--on", rng.choice(("nowhere", "recipe.yaml", "/", "/dev/null", ""))],
            ["plan", rng.choice(("nothing", "/", "/dev/null", "", "no\0thing".replace("\0", "\\0"), "x" * 5000))],
            ["status", rng.choice(("nothing", "/", "/dev/null", "", "x" * 5000))],
            ["compare", rng.choice(("nothing", "/", "/dev/null", ""))],
            [
                "buffer",
                rng.choice(("verify", "inspect")),
                rng.choice(("nothing", "/dev/null", "s3://", "s3:///x", "gopher://x")),
            ],
            ["export", "nothing", "--to", rng.choice(("pt", "zip", ""))],
            ["experts", "recipe.yaml", "--out", rng.choice(("recipe.yaml", "/dev/null", "/dev/null/x", "x" * 300))],
        ]
        command = rng.choice(odd)
        named = (*(word[:200] for word in command[-2:] if word), "empty", "folder", "JOB", "profile")
        return Attempt("option: " + _short(command[-1]), command, named, same)
    name = rng.choice(leaves(RECIPE))
    text = rng.choice(ODD_TEXTS)
    name = rng.choice(
        (name, name, name, name + "x", "", ".", "..", name.partition(".")[0], name + ".deeper", "__class__")
    )
    assignment = rng.choice((f"{name}={text}", f"{name}={text}", f"{name}={text}", name, f"{name}:{text}"))
    asked = assignment.partition("=")

    def differs(_: Outcome) -> str:
        from lad_dist import recipe_file

        return other_value(file, [assignment], asked[0].strip(), recipe_file.parse_yaml(f"x: {asked[2]}", "x")["x"])

    named = (*(_words(name) if name.strip(".") else ()), "--set", assignment)
    return Attempt(f"--set {assignment!r}", ["plan", "recipe.yaml", "--set", assignment], named, differs)


# --------------------------------------------------------------------------------------------------------- images and lists


def pictures(root: Path) -> None:
    """Three classes with a tail, one with a name of several words, two splits, and a list of each."""
    draw = np.random.default_rng(0)
    for split, counts in (("train", (8, 5, 3)), ("test", (3, 3, 3))):
        lines = []
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
                lines.append(f"{split}/{name}/{i}.png {label}")
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")


def experts_of_pictures(folder: Path, lists: bool) -> list[str]:
    """The command that trains one expert on ``folder/pictures``; its recipe is written."""
    doc = copy.deepcopy(OF_PICTURES)
    doc["data"]["root"] = str(folder / "pictures")
    if lists:
        doc["data"] |= {"dataset": "list", "train": "train.txt", "test": "test.txt"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(doc))
    return ["experts", "recipe.yaml", "--out", "run", "--fleet", "off", *HERE]


def data_line(outcome: Outcome) -> str:
    """How many images of which shape a run says it has, without the name."""
    found = re.search(r"data: .*?, (\d+ training images.*)", outcome.text)
    return found[1] if found else ""


def _fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(target: str | Path) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return link


def _image(mode: str, size: tuple[int, int] = (12, 12)) -> Callable[[Path], None]:
    return lambda path: Image.new(mode, size).save(path)


def image_folder(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """An expert trained on a folder of images with one odd thing in it: refused, or the same images as without it."""
    root = folder / "pictures"
    shutil.copytree(undamaged.root / "pictures", root)
    split, name = rng.choice(("train", "test")), rng.choice(CLASSES)
    place = root / split / name
    old, new = place / "1.png", place / "new.png"
    loop, ends = place / "loop", rng.randrange(1, 60)
    content = old.read_bytes()
    as_before: dict[str, Callable[[], object]] = {  # refused, or as if it were not there
        "a FIFO beside the images": lambda: _fifo(new),
        "a FIFO for an image": lambda: _fifo(old),
        "a link to /dev/zero for an image": lambda: _link("/dev/zero")(old),
        "a link to /dev/zero beside the images": lambda: _link("/dev/zero")(new),
        "a link to nothing": lambda: _link("nowhere.png")(new),
        "a link to itself": lambda: _link("new.png")(new),
        "a folder named like an image": lambda: new.mkdir(),
        "a folder linked to itself": lambda: loop.symlink_to("."),
        "a folder linked to the split": lambda: loop.symlink_to("../.."),
        "a folder linked to the data set": lambda: loop.symlink_to("../../.."),
        "a class linked to the split": lambda: (root / split / "loop").symlink_to("."),
        "a class linked to the other split": lambda: (root / "train" / "also").symlink_to("../test/jay"),
        "an image cut short": lambda: old.write_bytes(content[:ends]),
        "an image without its end": lambda: old.write_bytes(content[: -rng.randrange(13, 100)]),
        "an empty image": lambda: old.write_bytes(b""),
        "text named like an image": lambda: old.write_text("no image"),
        "a pickle named like an image": lambda: old.write_bytes(payload(folder)),
        "zeros named like an image": lambda: old.write_bytes(bytes(1000)),
        "a hidden file": lambda: (place / "._1.png").write_bytes(b"x"),
        "a text file": lambda: (place / "notes.txt").write_text("x"),
        "a socket-like name": lambda: (place / "a\nb.txt").write_text("x"),
    }
    anything: dict[str, Callable[[], object]] = {  # refused or taken, never a traceback
        "one class": lambda: [shutil.rmtree(root / s / c) for s in ("train", "test") for c in CLASSES[1:]],
        "no classes": lambda: [shutil.rmtree(root / "train" / c) for c in CLASSES],
        "an empty class": lambda: [file.unlink() for file in place.iterdir()],
        "no test split": lambda: shutil.rmtree(root / "test"),
        "a class that only the test has": lambda: shutil.copytree(root / "test" / "jay", root / "test" / "kite"),
        "grey among colour": lambda: _image("L")(old),
        "a palette": lambda: _image("P")(old),
        "transparency": lambda: _image("RGBA")(old),
        "16 bits": lambda: _image("I;16")(old),
        "one bit": lambda: _image("1")(old),
        "32-bit floats": lambda: _image("F")(old.with_suffix(".tif")),
        "CMYK": lambda: _image("CMYK")(old.with_suffix(".jpg")),
        "another size": lambda: _image("RGB", (40, 40))(old),
        "not square": lambda: _image("RGB", (40, 12))(old),
        "one pixel": lambda: _image("RGB", (1, 1))(old),
        "a very wide image": lambda: _image("RGB", (60_000, 1))(old),
        "a name that is not UTF-8": lambda: shutil.copy(old, os.fsencode(place) + b"/\xff.png"),
        "a line break in a name": lambda: shutil.copy(old, place / "a\nb.png"),
    }
    what = rng.choice([*as_before, *anything])
    before = undamaged.said["image-folder"]
    command = experts_of_pictures(folder, lists=False)
    {**as_before, **anything}[what]()
    if rng.random() < 0.25:
        command = ["init", "pictures", "--out", "made.yaml"]
        return Attempt(f"{what} ({split}, {name})", command, ("pictures", "data."), same)

    def differs(outcome: Outcome) -> str:
        found = data_line(outcome)
        return "" if what in anything or found == before else f"{found}, without it {before}"

    return Attempt(f"{what} ({split}, {name})", command, ("pictures", "data."), differs)


def list_file(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """An expert trained on the images that a text file lists, with one odd thing in the file."""
    root = folder / "pictures"
    shutil.copytree(undamaged.root / "pictures", root)
    file = root / rng.choice(("train.txt", "test.txt"))
    text = file.read_text()
    lines = text.splitlines()
    spot = rng.randrange(len(lines))
    path = lines[spot].rpartition(" ")[0]

    def line(new: str) -> bytes:
        return "\n".join([*lines[:spot], new, *lines[spot + 1 :]]).encode()

    as_before = {
        "a byte-order mark": b"\xef\xbb\xbf" + text.encode(),
        "CRLF": text.replace("\n", "\r\n").encode(),
        "blank lines and comments": ("# list\n\n" + text + "\n\n").encode(),
        "no last line break": text.strip().encode(),
        "tabs": line(f"{path}\t{lines[spot][-1]}"),
        "UTF-16": text.encode("utf-16"),
        "a missing image": line("train/jay/none.png 0"),
        "no label": line(path),
        "a label of text": line(f"{path} jay"),
        "a label of -1": line(f"{path} -1"),
        "a label of 1.5": line(f"{path} 1.5"),
        "a huge label": line(f"{path} {10 ** rng.choice((6, 12, 30))}"),
        "a label in other digits": line(f"{path} ²"),
        "an empty file": b"",
        "comments only": b"# none\n",
        "a NUL byte in a path": line(f"{path}\0 0"),
        "a very long path": line("x" * 10_000 + " 0"),
        "a folder for an image": line("train/jay 0"),
        "a device for an image": line("/dev/zero 0"),
        "bytes that are no text": bytes(rng.randrange(256) for _ in range(400)),
        "a pickle": payload(folder),
        "a label left out": "\n".join(each for each in lines if not each.endswith(" 1")).encode(),
        "the missing label 4": (text + f"{path} 4\n").encode(),
    }
    anything = {
        "a line twice": (text + lines[spot]).encode(),
        "an image of the other split": line("test/jay/0.png 0"),
        "a path out of the root": line(f"../pictures/{path} 0"),
        "an absolute path": line(f"{root / path} 0"),
    }
    what = rng.choice([*as_before, *anything, "a folder", "a FIFO", "no file", "a link to /dev/zero"])
    command = experts_of_pictures(folder, lists=True)
    if what in ("a folder", "a FIFO", "no file", "a link to /dev/zero"):
        file.unlink()
        make = {"a folder": file.mkdir, "a FIFO": lambda: _fifo(file), "no file": lambda: None}
        make.get(what, lambda: file.symlink_to("/dev/zero"))()
    else:
        file.write_bytes({**as_before, **anything}[what])
    before = undamaged.said["list"]

    def differs(outcome: Outcome) -> str:
        found = data_line(outcome)
        return "" if what in anything or found == before else f"{found}, without it {before}"

    return Attempt(f"{what} ({file.name})", command, (file.name, "pictures", "data."), differs)


# ------------------------------------------------------------------------------------------------------- the files of a run


class _Payload:
    """Unpickling one makes the marker file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (self.marker, os.O_CREAT | os.O_WRONLY)


def payload(folder: Path) -> bytes:
    """A pickle that makes the marker in ``folder`` when it is read."""
    return pickle.dumps(_Payload(folder / MARKER))


def copy_run(root: Path, folder: Path) -> None:
    """The finished run as ``folder/run`` and the other as ``folder/other``, in links that nothing writes through."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(root / "run", folder / "run")
    shutil.copytree(root / "other", folder / "other")


def text_result(folder: Path, outcome: Outcome) -> str:
    """What the command printed."""
    return outcome.out


def tensors_result(folder: Path, outcome: Outcome) -> str:
    """The distilled tensors, byte for byte."""
    return hashlib.sha256((folder / "run/distilled/tensors.safetensors").read_bytes()).hexdigest()


def figures_result(folder: Path, outcome: Outcome) -> str:
    """Every accuracy of the merged table, and the distilled tensors."""
    rows = json.loads((folder / "run/evaluation/results.json").read_text())["rows"]
    return json.dumps([[row["source"], row["seed"], row["per_class"]] for row in rows]) + tensors_result(
        folder, outcome
    )


def page_result(folder: Path, outcome: Outcome) -> str:
    """The numbers in the report's tables."""
    page = (folder / "run/report/index.html").read_text()
    return json.dumps(re.findall(r"<td[^>]*>\s*([-+]?\d+\.\d+[^<]*)<", page))


def export_result(folder: Path, outcome: Outcome) -> str:
    """The sizes and digests of the exported images and labels."""
    files = sorted(file for file in (folder / "x").rglob("*") if file.suffix in (".png", ".csv", ".npy"))
    return json.dumps([[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])


def _as_it_is(run: Path) -> None:
    pass


def _remove(*names: str) -> Callable[[Path], None]:
    def prepare(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return prepare


@dataclass(frozen=True)
class Reader:
    """A command that reads the files of ``run``; ``prepare`` removes what it is to make again."""

    command: list[str]
    result: Callable[[Path, Outcome], str] = text_result
    prepare: Callable[[Path], None] = _as_it_is


READERS = {
    "status": Reader(["status", "run"]),
    "report": Reader(["report", "run", *HERE], page_result),
    "compare": Reader(["compare", "run", "other"]),
    "tensorboard": Reader(["tensorboard", "run"]),
    "export": Reader(["export", "run", "--to", "folder", "--out", "x"], export_result),
    "export pt": Reader(["export", "run", "--to", "pt", "--out", "x"], export_result),
    "buffer verify": Reader(["buffer", "verify", "run"]),
    "buffer inspect": Reader(["buffer", "inspect", "run"]),
    "buffer export": Reader(["buffer", "export", "run", "x"]),
    "distill, continued": Reader(["distill", "run", *HERE], tensors_result, _remove("distilled")),
    "distill": Reader(["distill", "run", *HERE], tensors_result, _remove("distilled", "checkpoints")),
    "evaluate": Reader(
        ["evaluate", "run", *HERE],
        figures_result,
        _remove("evaluation/rows/distilled-convnet-0.json", "evaluation/results.json"),
    ),
    "run": Reader(
        ["run", "run", "--fleet", "off", *HERE], figures_result, _remove("evaluation/results.json", "report")
    ),
}
FREE_TEXT = (
    "recipe.yaml",
    "events.jsonl",
    "threads.json",
    "task.json",
)  # no checksum: one may edit the recipe, and logs are logs


def run_file(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """One file of a finished run damaged, and a command that may read it."""
    copy_run(undamaged.root, folder)
    name = rng.choice(sorted(READERS))
    reader, run = READERS[name], folder / "run"
    reader.prepare(run)
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.parent.name != "report")
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        groups.setdefault((file.relative_to(run).parts[0], file.suffix), []).append(file)
    target = rng.choice(groups[rng.choice(sorted(groups))])  # a buffer has many parts, and is one kind of file
    content, short = target.read_bytes(), str(target.relative_to(run))
    ways = ["cut", "flipped bit", "flipped bit", "emptied", "swapped", "swapped", "pickle", "folder", "zeros"]
    ways += ["other version"] if target.suffix in (".json", ".safetensors") else []
    ways += ["unreadable"] if os.geteuid() != 0 else []
    way = rng.choice(ways)
    if way == "cut":
        target.write_bytes(content[: rng.randrange(1, len(content))])
    elif way == "flipped bit":
        spot = rng.randrange(len(content))
        target.write_bytes(content[:spot] + bytes([content[spot] ^ 1 << rng.randrange(8)]) + content[spot + 1 :])
    elif way == "emptied":
        target.write_bytes(b"")
    elif way == "zeros":
        target.write_bytes(bytes(len(content)))
    elif way == "pickle":
        target.write_bytes(payload(folder))
    elif way == "folder":
        target.unlink()
        target.mkdir()
    elif way == "unreadable":
        target.chmod(0)
    elif way == "other version":
        _of_the_future(target)
    else:
        of_other = folder / "other" / short
        alike = [file for file in files if file != target and file.suffix == target.suffix and file.parts[-2] != "rows"]
        if target.name not in FREE_TEXT and of_other.exists():  # another run's recipe or log is a sound one
            alike.append(of_other)
        source = rng.choice(alike or [file for file in files if file != target])
        way = f"replaced by {source.relative_to(folder)}"
        target.write_bytes(source.read_bytes())

    def differs(outcome: Outcome) -> str:
        if target.name in FREE_TEXT and reader.result is text_result:
            return (
                "" if _cells(outcome.out) == _cells(undamaged.said[name]) or name == "tensorboard" else "another table"
            )
        found = reader.result(folder, outcome)
        return "" if found == undamaged.said[name] else f"{found[:140]}, undamaged: {undamaged.said[name][:140]}"

    named = (target.name, target.parent.name + "/", short)
    return Attempt(f"{short}: {way}", reader.command, named, differs, target)


def _of_the_future(file: Path) -> None:
    """As a version to come might write it: whole, with a right checksum, and of another format."""
    from lad_dist.results import _sum_of
    from lad_dist.rundir import load_tensors, save_tensors

    if file.suffix == ".safetensors":
        tensors, metadata = load_tensors(file)
        metadata.pop("sha256", None)
        save_tensors(tensors, file, {**metadata, "format": "lad-dist of another version 99"})
        return
    document = json.loads(file.read_text())
    document["format_version"] = 99
    if document.pop("sha256", None) is not None:
        document["sha256"] = _sum_of(document.get("rows", document))
    file.write_text(json.dumps(document))


def _cells(text: str) -> list[str]:
    """The lines of tables that hold figures."""
    return [line for line in text.splitlines() if re.search(r"\d+\.\d", line) and line[:1] in "│ "]


def value(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """An odd value in a row of results whose checksum is right, or in an event: of a wrong type, or impossible."""
    from lad_dist.results import FIGURES, MORE_FIGURES, _sum_of

    copy_run(undamaged.root, folder)
    run = folder / "run"
    if rng.random() < 0.5:
        file, commands = run / "events.jsonl", ("status", "report", "tensorboard")
        lines = file.read_text().splitlines()
        spot = rng.randrange(len(lines))
        document = json.loads(lines[spot])
        what = _made_odd(rng, document)
        lines[spot] = json.dumps(document)
        file.write_text("\n".join(lines) + "\n")
        must = False
    else:
        file, commands = rng.choice(sorted((run / "evaluation" / "rows").iterdir())), ("status", "report", "compare")
        document = json.loads(file.read_text())
        del document["sha256"]
        what = _made_odd(rng, document)
        file.write_text(json.dumps({**document, "sha256": _sum_of(document)}))
        (run / "evaluation" / "results.json").unlink()
        shares = [document.get(name) for name in (*FIGURES, *MORE_FIGURES) if document.get(name) is not None]
        must = any(not (type(share) in (int, float) and 0 <= share <= 1) for share in shares)
    command = {"report": ["report", "run", *HERE], "compare": ["compare", "run", "other"]}
    name = rng.choice(commands)
    return Attempt(
        f"{file.name}: {what}", command.get(name, [name, "run"]), (file.name, "results.json"), taken if must else same
    )


def _made_odd(rng: random.Random, document: Doc) -> str:
    """Change one field of a document, at any depth; how."""
    where, name = document, rng.choice(sorted(document))
    while isinstance(where[name], dict) and where[name] and rng.random() < 0.7:
        where, name = where[name], rng.choice(sorted(where[name]))
    how = rng.choice(("left out", "other", "other", "other", "larger"))
    if how == "left out":
        del where[name]
        return f"{name} left out"
    old = where[name]
    if how == "larger" and isinstance(old, list) and old:
        where[name] = [*old[:-1], rng.choice((17.0, -1, "x", None, [1]))]
    elif how == "larger" and type(old) in (int, float):
        where[name] = old + 17
    else:
        where[name] = rng.choice(WRONG)
    return f"{name} = {_short(where[name])}"


# ---------------------------------------------------------------------------------------------------- sets made elsewhere


def foreign_file(rng: random.Random, folder: Path, undamaged: Undamaged) -> Attempt:
    """A set or a buffer in another tool's files, damaged, and the verb that imports it."""
    import torch

    made = folder / "theirs"
    made.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    tensors: dict[str, Any] = {
        "images_best.pt": torch.zeros(10, 1, 8, 8),
        "labels_best.pt": torch.eye(10),
        "lr_best.pt": torch.tensor(0.05),
    }
    target = rng.choice(sorted(tensors))
    odd: dict[str, Any] = {
        "NaN": torch.full((10, 1, 8, 8), float("nan")),
        "another shape": torch.zeros(3, 2, 5),
        "complex": torch.zeros(10, 1, 8, 8, dtype=torch.complex64),
        "empty": torch.zeros(0),
        "a list": [1, 2],
        "a dict": {"a": 1},
        "text": "x",
        "meta": torch.zeros(10, 1, 8, 8, device="meta"),
        "sparse": torch.eye(10).to_sparse(),
        "an object": _Payload(folder / MARKER),
    }
    raw = {"emptied": b"", "a bare pickle": payload(folder), "text, not tensors": b"no tensors", "a folder": None}
    what = rng.choice([*odd, *raw, "cut", "flipped bit", "missing"])
    for name, tensor in tensors.items():
        torch.save(odd[what] if name == target and what in odd else tensor, made / name)
    path = made / target
    if what in raw or what == "missing":
        path.unlink()
        if what == "a folder":
            path.mkdir()
        elif what != "missing":
            path.write_bytes(raw[what] or b"")
    elif what in ("cut", "flipped bit"):
        content, spot = path.read_bytes(), rng.randrange(path.stat().st_size)
        flipped = content[:spot] + bytes([content[spot] ^ 1 << rng.randrange(8)]) + content[spot + 1 :]
        path.write_bytes(content[:spot] if what == "cut" else flipped)
    command = ["import", "recipe.yaml", "theirs", "--from", "pt", "--out", "run", *HERE]
    if rng.random() < 0.3:
        path = path.rename(made / "replay_buffer_0.pt") if path.exists() else path
        command = ["buffer", "import", "recipe.yaml", "theirs", "--stage", "representation", "--out", "run", *HERE]
    return Attempt(f"{target}: {what}", command, (path.name, "theirs", "images_best", "labels_best"), same)


Kind = Callable[[random.Random, Path, Undamaged], Attempt]
KINDS: dict[str, Kind] = {
    "recipe": recipe,
    "option": option,
    "image folder": image_folder,
    "list file": list_file,
    "run file": run_file,
    "foreign file": foreign_file,
    "value": value,
}
