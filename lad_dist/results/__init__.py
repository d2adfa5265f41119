"""Evaluation results: one file per row, and results.json, the table merged from them.

    evaluation/rows/SOURCE-ARCHITECTURE-SEED.json   one row each: one writer per file, published by rename
    evaluation/results.json                         all rows without confusion matrices, for people and other programs

Any number of processes may measure rows of one run concurrently; ``read`` returns every published row, whether or not
it is in the merged table yet. Both kinds of file hold a checksum of their content. To measure again, remove the folder
evaluation/.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lad_dist import recipe_file
from lad_dist.errors import LadDistError, RecipeError, RunDirError
from lad_dist.plugins import Name
from lad_dist.recipe import BASELINE_NAMES, Recipe
from lad_dist.rundir import RunDir, published

Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Typed row: one network, trained on ``source`` and measured.

    Accuracies are top-1 in [0, 1]: over all images, and means over the head, medium and tail thirds of the classes;
    ``balanced`` is the mean over classes, ``per_class`` each class's. ``ece``: expected calibration error. ``split``:
    test or validation. ``ipc`` is None for a source without a fixed number of images per class. ``seconds``: training
    time.
    """

    source: str
    architecture: str
    seed: int
    overall: float
    head: float
    medium: float
    tail: float
    balanced: float | None
    ece: float | None
    per_class: tuple[float, ...]
    ipc: int | None
    epochs: int
    lr: float
    batch: int
    split: str
    train_images: int | None
    seconds: float | None

    @classmethod
    def of(cls, row: Row) -> Result:
        """Return the result held by a row of results.json."""
        read = {f.name: row.get(f.name) for f in fields(cls)} | {
            n: row["settings"][n] for n in ("epochs", "lr", "batch")
        }
        return cls(**read | {"per_class": tuple(row.get("per_class", ()))})


FIGURES = ("overall", "head", "medium", "tail")
MORE_FIGURES = ("balanced", "ece")  # absent from rows of older versions
Source = str
TITLES = {
    "distilled": "Distilled",
    "distilled-adsa": "Distilled, labels adjusted (ADSA)",
    "distilled-hard": "Distilled, hard labels",
    "distilled-plain": "Distilled, no augmentation",
    "distilled-stored": "Distilled, stored labels",
    "distilled-teacher": "Distilled, teacher labels",
    "initial": "Starting set",
    "initial-hard": "Starting set, hard labels",
    "initial-adsa": "Starting set, labels adjusted (ADSA)",
    "initial-stored": "Starting set, stored labels",
    "initial-teacher": "Starting set, teacher labels",
    "random-soft": "Random real, soft labels",
    "random-soft-adsa": "Random real, soft labels adjusted (ADSA)",
    "random-soft-plain": "Random real, soft labels, no augmentation",
    "random-stored": "Random real, stored labels",
    "random-teacher": "Random real, teacher labels",
    "random": "Random real",
    "random-plain": "Random real, no augmentation",
    "k-center": "Real, k-center greedy",
    "herding-soft": "Real, herding, soft labels",
    "herding-stored": "Real, herding, stored labels",
    "herding-teacher": "Real, herding, teacher labels",
    "herding": "Real, herding",
    "graph-cut": "Real, graph-cut",
    "full": "Whole long-tailed set",
    "full-balanced": "Whole set, class-balanced sampling",
    "full-logit-adjusted": "Whole set, logit-adjusted loss",
    "teachers": "The teachers themselves",
}
"""Training sources and their titles, in the order of every table.

``initial`` is the set that distillation started from, ``...-hard`` are images with their class as label, ``...-adsa``
with adjusted soft labels, ``...-soft`` are real images with the experts' mean logits as labels, ``...-stored`` are
images with the experts' labels of some augmented views, ``...-teacher`` are images whose augmented batches the experts
label anew, ``...-plain`` is a set without augmentation;
``full-...`` are other ways to train on the whole long-tailed set. ``teachers``, which trains nothing, are the experts
that label, measured as one network.
"""
SOURCES = tuple(TITLES)
TEACHERS = "teachers"

DISTILLED = tuple(source for source in SOURCES if source.startswith("distilled"))
WHOLE = tuple(source for source in SOURCES if source.startswith("full"))
_NAMES = Name(SOURCES, BASELINE_NAMES.group, BASELINE_NAMES.endings)

FORMAT_VERSION = 2  # of results.json; version 1 has no checksum
_KEY = ("source", "architecture", "seed")
_ONLY_IN_ROWS = ("confusion", "confusion_pairs")  # K x K numbers, or three for every pair that occurs


def asked(recipe: Recipe) -> list[str]:
    """Return the sources that a recipe asks for, whatever the run has, in their order."""
    e = recipe.evaluate
    adjusted = ["distilled-adsa"] if e.label_adjustment == "adsa" else []
    return list(dict.fromkeys(["distilled", *adjusted, *e.baselines]))


def wanted(recipe: Recipe, run: RunDir) -> list[str]:
    """Return the sources that ``lad-dist run`` measures, in its order."""
    e = recipe.evaluate
    imported = is_imported(run)  # no known initialisation, and no expert of its own to label images
    experts = not imported or e.teachers_from is not None
    left_out = ("initial",) if imported or _without_start(run.distilled / "tensors.safetensors") else ()
    own = (
        ("distilled-stored", "distilled-teacher", TEACHERS)
        if (run.distilled / "teachers.safetensors").is_file()
        else ()
    )
    return [s for s in asked(recipe) if base_source(s) not in left_out and (experts or s in own or not uses_experts(s))]


def labelled_by_experts(source: Source) -> bool:
    """Return whether a source is real images with one soft label each, by the experts."""
    return source.removesuffix("-plain").removesuffix("-adsa").endswith("-soft")


def labels_stored(source: Source) -> bool:
    """Return whether a source has labels of the experts for some augmented views of each image."""
    return source.endswith("-stored")


def labels_adjusted(source: Source) -> bool:
    """Return whether a source's soft labels are adjusted by ADSA."""
    return source.removesuffix("-plain").endswith("-adsa")


def labelled_online(source: Source) -> bool:
    """Return whether the experts label every augmented batch of a source."""
    return source.removesuffix("-plain").endswith("-teacher")


def uses_experts(source: Source) -> bool:
    """Return whether training on a source needs the experts."""
    return labelled_by_experts(source) or labelled_online(source) or labels_stored(source) or source == TEACHERS


def base_source(source: Source) -> str:
    """Return the source without its endings for labels and augmentation: ``random`` of ``random-soft-plain``."""
    if source in DISTILLED:
        return "distilled"
    if source == "initial-hard":
        return "initial"
    for ending in ("-plain", "-adsa", "-soft", "-stored", "-teacher"):
        source = source.removesuffix(ending)
    return source


def check_source(source: str) -> Source:
    """Return a source's validated name. Raises RecipeError if it is unknown."""
    if not _NAMES.takes(source):
        raise RecipeError(f"evaluate: source {source!r} is not known; valid: {_NAMES.valid}")
    return source


def planned_among(rows: Iterable[Row], source: str, recipe: Recipe) -> int:
    """Count the networks of a source requested by the recipe among ``rows``, which may hold others too."""
    asked = {(source, *network) for network in networks(recipe, source)}
    return sum(_key(row) in asked for row in rows)


def networks(recipe: Recipe, source: Source) -> list[tuple[str, int]]:
    """Return (architecture, seed) of every network that the recipe measures a source by."""
    e = recipe.evaluate
    if source == TEACHERS:
        return [(_network_of_teachers(recipe), 0)]
    return [(a, seed) for a in dict.fromkeys(e.architectures) for seed in range(e.seeds)]


def _network_of_teachers(recipe: Recipe) -> str:
    """Return the teachers' network: that of the run ``evaluate.teachers_from`` where it can be read."""
    if recipe.evaluate.teachers_from is not None:
        with contextlib.suppress(LadDistError):
            return recipe_file.load(Path(recipe.evaluate.teachers_from).expanduser() / "recipe.yaml").model.network
    return recipe.model.network


def _without_start(tensors: Path) -> bool:
    """Return whether a distilled set, by its header, is of a version that did not store its initial labels."""
    try:
        with tensors.open("rb") as file:
            return "initial_label_logits" not in json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ):  # missing or damaged: reported by the set's reader
        return False


def is_imported(run: RunDir) -> bool:
    """Return whether the run's distilled set was imported."""
    meta = run.distilled / "meta.json"
    try:
        return bool(json.loads(meta.read_text(encoding="utf-8"))["method"] == "imported")
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: reported by the set's reader
        return False


def read(path: Path) -> list[Row]:
    """Return all rows: of the row files, and those only in the merged table at ``path`` (older runs, or copied alone).

    Raises:
        RunDirError: a file is damaged; names it.
    """
    rows = {_key(row): row for row in _merged(path)}
    folder = rows_folder(path)
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if not file.name.startswith("."):  # skip files still being written
            row = _row(file)
            if row_file(path, row).name != file.name:
                raise RunDirError(
                    f"{file}: is the row of {row_file(path, row).name}, under another name; remove it to measure it again"
                )
            rows[_key(row)] = row
    _check_one_run(path, rows.values())
    return sorted(rows.values(), key=_order)


def _check_one_run(path: Path, rows: Iterable[Row]) -> None:
    """Reject a table with rows of two runs: all rows of a run share its recipe's seed, which never changes."""
    seeded = [row for row in rows if row.get("recipe_seed") is not None]
    counts = Counter(row["recipe_seed"] for row in seeded)
    if len(counts) < 2:
        return
    own = counts.most_common(1)[0][0]
    strange = next(row for row in seeded if row["recipe_seed"] != own)
    file = row_file(path, strange)
    raise RunDirError(
        f"{file if file.exists() else path}: holds the row of a run of seed {strange['recipe_seed']!r}, while other rows of this "
        f"run are of seed {own!r}; remove it to measure it again"
    )


def write(path: Path, rows: list[Row]) -> None:
    """Publish ``rows`` as the merged table."""
    slim = [{k: v for k, v in row.items() if k not in _ONLY_IN_ROWS} for row in rows]
    doc = {"format_version": FORMAT_VERSION, "rows": slim, "sha256": _sum_of(slim)}
    with published(path) as temporary:
        temporary.write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")


def put(path: Path, row: Row) -> Path:
    """Publish one row beside the merged table at ``path``, replacing any older one of its name; return its file."""
    file = row_file(path, row)
    _check(row)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {**row, "sha256": _sum_of(row)}.items())
    with published(file) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return file


def merge(path: Path) -> list[Row]:
    """Bring the merged table at ``path`` up to date with the row files; return all rows.

    Several processes may do so concurrently. Each checks again after writing, so the last one leaves every row in the
    table.
    """
    while True:
        rows = read(path)
        if not rows:
            return rows
        slim = [{k: v for k, v in row.items() if k not in _ONLY_IN_ROWS} for row in rows]
        if path.exists() and json.dumps(slim) == json.dumps(_merged(path)):
            return rows
        write(path, rows)


def forget(path: Path, which: Callable[[Row], bool]) -> None:
    """Remove the rows selected by ``which``; their events stay."""
    rows = read(path)
    kept = [row for row in rows if not which(row)]
    if len(kept) < len(rows):
        for row in rows:
            if which(row):
                row_file(path, row).unlink(missing_ok=True)
        write(path, kept)


def rows_folder(path: Path) -> Path:
    """Return the folder of the row files of the merged table at ``path``."""
    return path.parent / "rows"


def row_file(path: Path, row: Row) -> Path:
    """Return a row's file, named by source, architecture and seed in characters valid on every file system."""
    return rows_folder(path) / ("-".join(file_word(str(row[k])) for k in _KEY) + ".json")


def file_word(name: str) -> str:
    """Make a name valid on every file system; a changed one gets a hash suffix, as ``a:b`` is not ``a_b``."""
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name)
    return f"{word}_{hashlib.sha256(name.encode()).hexdigest()[:8]}" if re.search("[^A-Za-z0-9_-]", name) else word


def same_measurement(row: Row, other: Row) -> bool:
    """Return whether two rows are the same measurement (everything equal except the measured values).

    Rows of versions that did not fingerprint images are assumed to use the same ones.
    """
    images, others = row.get("fingerprints"), other.get("fingerprints")
    if images and others and images != others:
        return False
    return all(row.get(k) == other.get(k) for k in (*_KEY, "split", "settings", "set_id"))


def replace(rows: list[Row], new: Row) -> list[Row]:
    """Return ``rows`` with ``new`` replacing an older row of the same (source, architecture, seed)."""
    return [r for r in rows if _key(r) != _key(new)] + [new]


def images_of(row: Mapping[str, Any]) -> str:
    """Return a comparison key of the images a row was trained and measured on; empty if not recorded."""
    return json.dumps(row["fingerprints"], sort_keys=True) if row.get("fingerprints") else ""


def way_of(row: Mapping[str, Any]) -> str:
    """Return a comparison key of how a row was measured.

    It covers the protocol (epochs, learning rate, batch, augmentation, norm, split), the set and the images. Rows of
    one source are averaged only if their keys are equal.
    """
    return json.dumps(
        [row.get("settings"), row.get("set_id"), row.get("ipc"), row.get("split"), images_of(row)], sort_keys=True
    )


def by_way(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Group rows by (source, architecture, way), in the order of rows."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["architecture"], way_of(row)), []).append(row)
    return groups


def of_one_way(rows: Iterable[Row]) -> list[Row]:
    """Return per (source, architecture) the rows of the most frequent way (ties: the first)."""
    largest: dict[tuple[str, str], list[Row]] = {}
    for (source, architecture, _), members in by_way(rows).items():
        if len(members) > len(largest.get((source, architecture), ())):
            largest[source, architecture] = members
    return [row for members in largest.values() for row in members]


def summary(rows: Iterable[Row]) -> list[Row]:
    """Average every figure over seeds, per (source, architecture, way), in the order of rows.

    Each figure has its mean, the sample standard deviation (``..._std``) and the standard error of the mean
    (``..._sem``); None if there is no value, or only one.

    Rows of different protocols, sets or images are never averaged. If a source and architecture have several,
    ``differs`` states how this one differs from the first, and ``images`` identifies the images.
    """
    groups = by_way(rows)
    first: dict[tuple[str, str], list[Row]] = {}
    out = []
    for (source, architecture, _), members in groups.items():
        reference = first.setdefault((source, architecture), members)
        entry: Row = {
            "differs": "" if reference is members else differences(members[0], reference[0]),
            "images": _short(images_of(members[0])) if images_of(members[0]) != images_of(reference[0]) else None,
            "epochs": (members[0].get("settings") or {}).get("epochs"),
            "lr": (members[0].get("settings") or {}).get("lr"),
            "ipc": members[0].get("ipc"),
            "source": source,
            "architecture": architecture,
            "seeds": len(members),
            "split": members[0]["split"],
            "selection": members[0]["selection"],
            "method": members[0]["method"],
        }
        for figure in (*FIGURES, *MORE_FIGURES):
            values = [m[figure] for m in members if m.get(figure) is not None]
            spread = len(values) > 1
            entry[figure] = statistics.mean(values) if values else None
            entry[f"{figure}_std"] = statistics.stdev(values) if spread else None
            entry[f"{figure}_sem"] = statistics.stdev(values) / len(values) ** 0.5 if spread else None
        out.append(entry)
    return out


def data_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a row's data identity as far as recorded: data set, images per class, and their fingerprints."""
    return row.get("dataset"), str(row.get("counts")), images_of(row)


def not_comparable(rows: Iterable[Row], others: Iterable[Row]) -> str:
    """Return why networks of two runs cannot be paired (trained or measured on different data); empty if they can."""
    one, other = next(iter(rows), None), next(iter(others), None)
    if one is None or other is None:
        return ""
    for what, a, b in (
        ("data sets", one.get("dataset"), other.get("dataset")),
        ("training images per class", one.get("counts"), other.get("counts")),
        ("splits", one.get("split"), other.get("split")),
    ):
        if a is not None and b is not None and a != b:
            return f"their {what} differ ({_told(a)} and {_told(b)})"
    if images_of(one) and images_of(other) and images_of(one) != images_of(other):
        return "their images differ (fingerprints)"
    return ""


def differences(row: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Describe how the first row's measurement differs: ``epochs 30, split validation``.

    ``another set`` if only the training set differs.
    """
    own, others = (_flat({**(r.get("settings") or {}), "split": r.get("split")}) for r in (row, other))
    changed = [f"{name} {_told(own.get(name))}" for name in {**own, **others} if own.get(name) != others.get(name)]
    if not changed and images_of(row) == images_of(other):
        changed = ["another set"]
    return ", ".join(changed)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= _flat(value) if isinstance(value, dict) else {name: value}
    return found


def _told(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "none" if value in (None, [], ()) else str(value)


def _short(images: str) -> str:
    """Return a short human-readable id of ``images_of``."""
    return hashlib.sha256(images.encode()).hexdigest()[:8] if images else "unknown"


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in _KEY)


def _order(row: Row) -> tuple[Any, ...]:
    """Sort key: sources in the order of ``SOURCES``, ConvNet before other architectures, seeds ascending."""
    known = SOURCES.index(row["source"]) if row["source"] in SOURCES else len(SOURCES)
    return known, str(row["source"]), row["architecture"] != "convnet", str(row["architecture"]), row["seed"]


def _merged(path: Path) -> list[Row]:
    if not path.exists():
        return []
    try:
        doc = _parsed(path)
        rows = list(doc["rows"])
        version = doc.get("format_version", 1)
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"format_version is {version!r:.80}; valid: 1 or {FORMAT_VERSION}")
        if version == FORMAT_VERSION and doc["sha256"] != _sum_of(rows):
            raise ValueError("it does not match its own checksum")
        for row in rows:
            _check(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(f"{path}: is not a results file ({_reason(error)}); remove it to evaluate again") from error
    return rows


def _row(file: Path) -> Row:
    try:
        row = _parsed(file)
        said = row.pop("sha256") if "sha256" in row or "fingerprints" in row else None
        if said is not None and said != _sum_of(row):  # rows of versions without checksums have no fingerprints either
            raise ValueError("it does not match its own checksum")
        _check(row)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"{file}: is not a row of results ({_reason(error)}); remove it to measure it again"
        ) from error
    return row


def _parsed(file: Path) -> dict[str, Any]:
    try:
        doc = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(doc, dict):
        raise ValueError(f"it holds {type(doc).__name__} where an object is valid")
    return doc


def _no_number(text: str) -> None:
    raise ValueError(f"it holds {text} where a number is valid")


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _sum_of(content: Any) -> str:
    """Return the checksum of a row, or of a table of rows."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check(row: Any) -> None:
    """Raise ValueError or KeyError unless the row's identifying fields and all its fractions are valid."""
    if not isinstance(row, dict):
        raise ValueError(f"a row is {row!r:.80}; valid: an object")
    for name in ("source", "architecture", *(n for n in ("split", "selection", "method") if n in row)):
        if not isinstance(row[name], str):
            raise ValueError(f"{name} is {row[name]!r:.80}; valid: text")
    if type(row["seed"]) is not int or row["seed"] < 0:
        raise ValueError(f"seed is {row['seed']!r:.80}; valid: a whole number from 0")
    if row["overall"] is None:
        raise ValueError("overall is null; valid: a number from 0 to 1")
    per_class = row.get("per_class") or []
    if not isinstance(per_class, list):
        raise ValueError(f"per_class is {per_class!r:.80}; valid: a list of numbers from 0 to 1")
    shares = [(name, row.get(name)) for name in (*FIGURES, *MORE_FIGURES)] + [
        ("per_class", value) for value in per_class
    ]
    for name, value in shares:
        if value is not None and not (type(value) in (int, float) and 0 <= value <= 1):
            raise ValueError(f"{name} is {value!r:.80}; valid: a number from 0 to 1")
