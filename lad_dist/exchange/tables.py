"""Parquet with a row per image, alone or as a Hugging Face data set: PNG images for viewing, and the exact values.

    image          PNG, whitening undone (binary; in the Hugging Face form a struct of bytes and path)
    label          int64, the class
    class_name     string (not in the Hugging Face form, whose label is a ClassLabel)
    soft_label     float32 [K], probabilities: the softmax of label_logits
    label_logits   float32 [K]
    whitened       float32 [C * H * H], the learned image, flattened from (C, H, H)

S images, K classes, C channels, H side.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lad_dist.data.parquet import read_rows, write_rows
from lad_dist.distilled import DistilledSet
from lad_dist.errors import DataError, DistilledError
from lad_dist.exchange.about import FORMAT, WHITENING, as_json
from lad_dist.exchange.incoming import Incoming
from lad_dist.exchange.pictures import Progress, pixels, png
from lad_dist.exchange.pt import check_rate
from lad_dist.labeller import FILE as TEACHERS
from lad_dist.labeller import Labeller

FILE = "distilled.parquet"
HF_FILE = "data/train-00000-of-00001.parquet"
_KEY = "lad_dist"  # key in the schema's metadata
_NUMBERS = ("label", "label_logits", "whitened")


def write(distilled: DistilledSet, folder: Path, said: dict[str, Any], on_images: Progress) -> None:
    """Write distilled.parquet and whitening.safetensors; ``said``, the export's metadata, goes into the schema."""
    names = distilled.meta.class_names
    columns: dict[str, Any] = {"image": _pictures(distilled, on_images), "label": distilled.labels.long().numpy()}
    columns["class_name"] = [names[c] for c in distilled.labels.tolist()]
    write_rows(folder / FILE, columns | _floats(distilled), {_KEY: as_json(said)})
    distilled.whitening.to("cpu").save(folder / WHITENING)


def write_hf(distilled: DistilledSet, folder: Path, said: dict[str, Any], on_images: Progress) -> None:
    """Write the split ``train`` of a Hugging Face data set, and whitening.safetensors; ``card.py`` makes the card."""
    structs = [{"bytes": data, "path": f"{i:05d}.png"} for i, data in enumerate(_pictures(distilled, on_images))]
    columns: dict[str, Any] = {"image": structs, "label": distilled.labels.long().numpy(), **_floats(distilled)}
    (folder / HF_FILE).parent.mkdir()
    write_rows(
        folder / HF_FILE,
        columns,
        {"huggingface": json.dumps({"info": {"features": hf_features(distilled)}}), _KEY: as_json(said)},
    )
    distilled.whitening.to("cpu").save(folder / WHITENING)


def hf_features(distilled: DistilledSet) -> dict[str, Any]:
    """Return the columns as ``datasets.Features`` serializes them.

    Uses ``Sequence``, which versions 2 to 5 of ``datasets`` read; 4 and 5 write ``List``.
    """
    classes, values = len(distilled.meta.class_names), distilled.images[0].numel()

    def floats(length: int) -> dict[str, Any]:
        return {"feature": {"dtype": "float32", "_type": "Value"}, "length": length, "_type": "Sequence"}

    return {
        "image": {"_type": "Image"},
        "label": {"names": list(distilled.meta.class_names), "_type": "ClassLabel"},
        "soft_label": floats(classes),
        "label_logits": floats(classes),
        "whitened": floats(values),
    }


def read(path: Path, lr: float | None = None) -> Incoming:
    """Read a folder of ``write`` or ``write_hf``, or its Parquet file, bit for bit.

    ``lr`` replaces the set's. Raises DistilledError where the file is missing, damaged, or not exported by lad-dist.
    """
    file = path if path.is_file() else next((path / name for name in (FILE, HF_FILE) if (path / name).is_file()), None)
    if file is None:
        raise DistilledError(
            f"{path}: holds no distilled set; valid: a folder with {FILE} or {HF_FILE}, or such a file"
        )
    try:
        columns, metadata = read_rows(file, _NUMBERS)
    except DataError as error:
        raise DistilledError(f"{error}; valid: a file that `lad-dist export --to parquet` or `--to hf` made") from error
    said = _said(file, metadata)
    images, labels = columns["whitened"], columns["label"]
    count, shape = len(labels), tuple(said["shape"])
    if images.shape != (count, int(np.prod(shape))) or not count or columns["label_logits"].ndim != 2:
        raise DistilledError(
            f"{file}: column whitened has shape {images.shape} where its own metadata say {count} images of {shape}; "
            "valid: a file as lad-dist exported it"
        )
    for name in ("whitened", "label_logits"):
        if columns[name].dtype != np.float32 or not np.isfinite(columns[name]).all():
            raise DistilledError(
                f"{file}: column {name} holds {columns[name].dtype}, or NaN or infinity; valid: finite float32"
            )
    return Incoming(
        file,
        torch.from_numpy(images.reshape(count, *shape).copy()),
        torch.from_numpy(columns["label_logits"].copy()),
        "logits",
        f"{file}, column label_logits",
        check_rate(said["lr"] if lr is None else lr, str(file)),
        f"{file.name} sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}",
        torch.from_numpy(labels.astype(np.int64)),
        said,
        _teachers(path, said),
    )


def _teachers(path: Path, said: dict[str, Any]) -> Labeller | None:
    """Read the teachers beside the Parquet file; None where the export has none, or the file alone was given.

    Raises DistilledError where the folder lacks a file that its metadata name, or it is damaged.
    """
    return Labeller.load(path / TEACHERS) if said.get("teachers") and path.is_dir() else None


def _said(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        said = json.loads(metadata[_KEY])
        fits = (
            said["format"] == FORMAT
            and isinstance(said["lr"], float)
            and isinstance(said["data_fingerprint"], str)
            and isinstance(said["whitening"]["kind"], str)
            and isinstance(said["selection"], str)
            and isinstance(said["method"], str)
            and isinstance(said.get("iteration", 0), int)
            and len(said["shape"]) == 3
            and all(isinstance(n, int) and n > 0 for n in said["shape"])
        )
    except (KeyError, ValueError, TypeError):
        fits = False
    if not fits:
        raise DistilledError(
            f"{file}: was not exported by lad-dist (its schema's metadata lack {_KEY}, or it is of another version); valid: a "
            "file that `lad-dist export --to parquet` or `--to hf` made"
        )
    return dict(said)


def _pictures(distilled: DistilledSet, on_images: Progress) -> list[bytes]:
    return [png(picture) for picture in pixels(distilled, on_images)]


def _floats(distilled: DistilledSet) -> dict[str, Any]:
    return {
        "soft_label": distilled.soft_labels.float().numpy(),
        "label_logits": distilled.label_logits.float().numpy(),
        "whitened": distilled.images.float().flatten(1).numpy(),
    }
