"""Files of a shared set, made from a run without what is private; their checksums.

README.md               the card, which its owner may edit: it has no checksum
meta.json, tensors.safetensors, whitening.safetensors, teachers.safetensors   the distilled set, see distilled.py
recipe.yaml             the recipe, without paths
results.json            a line per training source and network: accuracies over seeds; of a run that was evaluated
synthetic.png           a picture of the set
SHA256SUMS              the checksum of every other file but README.md, as ``sha256sum --check`` reads it

The images that the distillation started from are real training images, and are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lad_dist import recipe_file, results
from lad_dist.distilled import FILES, META, DistilledSet
from lad_dist.errors import SharingError
from lad_dist.exchange.about import public_recipe
from lad_dist.exchange.card import title
from lad_dist.report import pictures
from lad_dist.rundir import RunDir
from lad_dist.sharing import card

CARD, SUMS, RECIPE, RESULTS, PICTURE = "README.md", "SHA256SUMS", "recipe.yaml", "results.json", card.PICTURE
SUMMED = (META, *FILES, RECIPE, RESULTS, PICTURE)
NAMES = (CARD, SUMS, *SUMMED)  # the only files that are pushed or pulled
_REQUIRED = (META, *(name for name in FILES if not name.startswith("teachers")))
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LINE = re.compile(r"(?P<sum>[0-9a-f]{64})  (?P<name>[\w.-]+)", re.ASCII)
_SUM = re.compile(r"sha256:[0-9a-f]+")
_UNKNOWN = "unknown"


def write(run: Path, folder: Path, address: str, license_name: str = _UNKNOWN) -> DistilledSet:
    """Write the files of a shared set into an empty folder; return the set.

    ``run``: a run folder, its distilled set's folder, or a shared set. ``address``: what the card tells readers to load.

    Raises:
        DistilledError: ``run`` has no whole distilled set.
        RunDirError: its results are damaged.
        SharingError: the images are neither grey nor colour, or ``license_name`` is no identifier.
    """
    if not _LICENSE.fullmatch(license_name):
        raise SharingError(
            f"--license {license_name}: is not an identifier of a licence; valid: one that the hub knows, such as cc-by-4.0, "
            f"mit or other, or {_UNKNOWN}"
        )
    whole = DistilledSet.load(run)
    if whole.images.shape[1] not in (1, 3):
        raise SharingError(f"{run}: its images have {whole.images.shape[1]} channels; valid: 1 or 3, for the picture")
    meta = replace(whole.meta, recipe=public_recipe(whole.meta.recipe), versions=_versions(whole))
    shared = DistilledSet(
        whole.images, whole.label_logits, whole.labels, meta, whole.whitening.to("cpu"), teachers=whole.teachers
    )
    shared.write(folder)
    (folder / RECIPE).write_text(
        recipe_file.as_yaml(
            meta.recipe, "The recipe of this set, without paths: of its data, and of other runs that it used."
        ),
        encoding="utf-8",
    )
    measured = summaries(run)
    if measured:
        (folder / RESULTS).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    shown = pictures.gallery(shared)
    (folder / PICTURE).write_bytes(pictures.png_grid(shown, title(shared), shown.synthetic_GMHHC))
    (folder / CARD).write_text(card.card(shared, measured, address, license_name), encoding="utf-8")
    (folder / SUMS).write_text(sums(folder), encoding="utf-8")
    return shared


def _versions(distilled: DistilledSet) -> dict[str, str]:
    """Return the versions; of what the set was imported from the checksum, without the file's name."""
    return {
        name: ", ".join(_SUM.findall(value)) if name == "imported from" else value
        for name, value in distilled.meta.versions.items()
    }


def summaries(run: Path) -> list[dict[str, Any]]:
    """Return the results of a run folder, its distilled set's folder, or a shared set; empty where it has none.

    Raises RunDirError or SharingError where they are damaged.
    """
    shared = run / RESULTS
    if shared.is_file():
        try:
            found = json.loads(shared.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SharingError(f"{shared}: cannot be read: {error}; valid: results that lad-dist push wrote") from error
        return list(found)
    root = run.resolve().parent if (run / META).is_file() else run
    files = RunDir(root)
    return results.summary(results.read(files.results)) if (files.distilled / META).is_file() else []


def sums(folder: Path) -> str:
    """Return the text of SHA256SUMS for the files in a folder."""
    present = [name for name in SUMMED if (folder / name).is_file()]
    return "".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(present))


def listed(text: str, where: str) -> dict[str, str]:
    """Return the checksums by name of a text of SHA256SUMS. Raises SharingError where it is of something else."""
    lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    found = {line["name"]: line["sum"] for line in lines if line is not None}
    if len(found) != len(lines) or not set(_REQUIRED) <= set(found) <= set(SUMMED):
        raise SharingError(
            f"{where}: its {SUMS} is not of a shared set; valid: one that lad-dist push wrote, which lists "
            f"{', '.join(_REQUIRED)}"
        )
    return found


def check(folder: Path, where: str) -> None:
    """Verify every checksum. Raises SharingError, naming ``where`` and the file that is missing or damaged."""
    try:
        text = (folder / SUMS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise SharingError(
            f"{where}: holds no shared set (no {SUMS}); valid: what lad-dist push wrote to that address"
        ) from None
    for name, expected in listed(text, where).items():
        if not (folder / name).is_file():
            raise SharingError(f"{where}: {name} is missing, which its {SUMS} lists; valid: all files of one push")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise SharingError(
                f"{where}: {name} does not match its {SUMS}: it is damaged, or of another push; valid: all files of one push"
            )
