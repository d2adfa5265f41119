"""The distilled set as an artefact: a folder with tensors in safetensors and metadata in JSON.

tensors.safetensors     images (S, C, H, H) float32, whitened; label_logits (S, K); labels (S,), the class of each image;
                        initial_images (S, C, H, H) and initial_label_logits (S, K), the initial values (an imported
                        or shared set has none)
whitening.safetensors   see data/whitening.py
teachers.safetensors    where there are experts: up to four, which label images (see labeller.py)
meta.json               class names, learning rate, training counts, provenance, versions, checksums
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor
from torch.utils.data import Dataset

from lad_dist.data.whitening import Whitening
from lad_dist.errors import DataError, DistilledError
from lad_dist.labeller import FILE as TEACHERS
from lad_dist.labeller import Labeller
from lad_dist.rundir import save_tensors

if TYPE_CHECKING:
    from lad_dist.recipe import Recipe

FORMAT_VERSION = 1
IMPORTED = "imported"  # value of ``DistilledMeta.method`` of sets made elsewhere, and of an unknown ``selection``
HARD_LABEL_LOGIT = 200.0  # softmax of one such logit among zeros is one-hot in float32
_TENSORS, _WHITENING, META = "tensors.safetensors", "whitening.safetensors", "meta.json"
FILES = (_TENSORS, _WHITENING, TEACHERS)


@dataclass(frozen=True)
class DistilledMeta:
    """Metadata of a distilled set.

    ``lr`` is the learned student learning rate; ``counts`` are training images per class; ``selection`` tells how its
    iteration was chosen.
    """

    method: str
    dataset: str
    ipc: int
    class_names: tuple[str, ...]
    counts: tuple[int, ...]
    lr: float
    iteration: int
    selection: str
    recipe_hash: str
    experts_hash: str
    data_fingerprint: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    label_source: dict[str, int] = field(default_factory=dict)

    @property
    def iterations(self) -> int | None:
        """Total iterations of its distillation, of which ``iteration`` was chosen; None for an imported set."""
        found = (self.recipe.get("distill") or {}).get("iterations")
        return found if isinstance(found, int) else None

    @property
    def imported(self) -> bool:
        """Whether the set was made elsewhere."""
        return self.method == IMPORTED

    def grows_into(self, recipe: Recipe) -> bool:
        """Return whether ``recipe``, which may share the run folder, adds iterations to the same distillation."""
        return (
            self.method == recipe.method and self.iterations is not None and self.iterations < recipe.distill.iterations
        )


class DistilledSet(Dataset[tuple[Tensor, Tensor]]):
    """A distilled set. Item i is (image (C, H, H) float32 whitened, soft label (K,) of probabilities).

    Unpacks as ``images_SCHH, soft_labels_SK, lr = load(folder)``.
    """

    def __init__(
        self,
        images_SCHH: Tensor,
        label_logits_SK: Tensor,
        labels_S: Tensor,
        meta: DistilledMeta,
        whitening: Whitening,
        initial_SCHH: Tensor | None = None,
        initial_logits_SK: Tensor | None = None,
        teachers: Labeller | None = None,
    ) -> None:
        self.images, self.label_logits, self.labels = images_SCHH, label_logits_SK, labels_S
        self.meta, self.whitening = meta, whitening
        self.initial_label_logits, self.teachers = initial_logits_SK, teachers
        self._initial_images = initial_SCHH

    @property
    def initial_images(self) -> Tensor:
        """The images that the distillation started from, (S, C, H, H); the images themselves where they are not known."""
        return self.images if self._initial_images is None else self._initial_images

    @property
    def soft_labels(self) -> Tensor:
        """Label probabilities, shape (S, K)."""
        return F.softmax(self.label_logits, dim=1)

    @property
    def lr(self) -> float:
        """The learned learning rate for training a network on the set."""
        return self.meta.lr

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], F.softmax(self.label_logits[index], dim=-1)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images, self.soft_labels, self.lr))

    @property
    def is_hard(self) -> bool:
        """Whether every label is one-hot at the image's class, as in MTT."""
        one_hot_SK = F.one_hot(self.labels.long(), len(self.meta.class_names)).float()
        return torch.equal(self.soft_labels, one_hot_SK)

    def pictures(self) -> Tensor:
        """Return the images with whitening undone, in [0, 1], shape (S, C, H, H)."""
        return self.whitening.invert(self.images).clamp(0, 1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Whiten uint8 images (N, C, H, H) as input of networks trained on this set."""
        return self.whitening.apply(images)

    def labeller(self) -> Labeller:
        """Return the teachers: called with whitened images (B, C, H, H), they return label probabilities (B, K).

        Label each augmented batch with them, in place of ``soft_labels``.

        Raises:
            DistilledError: the set has none, or their weights are not of their network.
            RecipeError: their network cannot be built here.
        """
        if self.teachers is None:
            raise DistilledError(
                f"the distilled set of {self.meta.dataset} carries no {TEACHERS}: an older version made it, or it was "
                "imported without; valid: a set distilled with this version, or its soft_labels"
            )
        self.teachers.check()
        return self.teachers

    def write(self, folder: Path) -> None:
        """Write the files into an empty folder; the caller publishes it."""
        tensors = {
            "images": self.images,
            "label_logits": self.label_logits,
            "labels": self.labels,
        }
        if self._initial_images is not None:
            tensors["initial_images"] = self._initial_images.clone()
        if self.initial_label_logits is not None:
            tensors["initial_label_logits"] = self.initial_label_logits
        save_tensors(tensors, folder / _TENSORS)
        self.whitening.save(folder / _WHITENING)
        if self.teachers is not None:
            self.teachers.save(folder / TEACHERS)
        sums = {name: _sha256(folder / name) for name in FILES if (folder / name).exists()}
        doc = {"format_version": FORMAT_VERSION, **asdict(self.meta)}
        doc["sha256"] = {**sums, META: _sha256_of_meta(doc)}
        (folder / META).write_text(json.dumps(doc, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> DistilledSet:
        """Read a folder written by ``write``.

        Raises:
            DistilledError: a file is missing or damaged, or the parts are inconsistent; names the file.
        """
        folder = Path(path)
        if not (folder / META).is_file() and (folder / "distilled" / META).is_file():
            folder = folder / "distilled"
        meta, sums = _read_meta(folder / META)
        carried = [TEACHERS] if TEACHERS in sums else []
        for name in (_TENSORS, _WHITENING, *carried):
            if not (folder / name).is_file():
                raise DistilledError(
                    f"{folder / name}: is missing; a distilled set has {_TENSORS}, {_WHITENING} and {META}"
                )
            if _sha256(folder / name) != sums.get(name):
                raise DistilledError(
                    f"{folder / name}: does not match the checksum in {META}: it is damaged or from another set"
                )
        try:
            tensors = parse_tensors((folder / _TENSORS).read_bytes())
            whitening = Whitening.load(folder / _WHITENING)
        except (SafetensorError, DataError) as error:
            raise DistilledError(f"{folder}: cannot be read: {error}") from error
        lacking = [name for name in ("images", "label_logits", "labels") if name not in tensors]
        if lacking:
            raise DistilledError(f"{folder / _TENSORS}: lacks {', '.join(lacking)}: it is not of a distilled set")
        whole = cls(
            tensors["images"],
            tensors["label_logits"],
            tensors["labels"],
            meta,
            whitening,
            tensors.get("initial_images"),
            tensors.get("initial_label_logits"),
            Labeller.load(folder / TEACHERS) if carried else None,
        )
        whole.validate(str(folder))
        return whole

    def validate(self, where: str) -> None:
        """Raise DistilledError if shapes are inconsistent or a value is not finite."""
        count, classes = len(self.images), len(self.meta.class_names)
        expected = {"label_logits": (count, classes), "labels": (count,)}
        if self.initial_label_logits is not None:
            expected["initial_label_logits"] = (count, classes)
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise DistilledError(f"{where}: {name} has shape {tuple(getattr(self, name).shape)}, valid: {shape}")
        for name in ("images", *(name for name in expected if name != "labels")):
            if not bool(getattr(self, name).isfinite().all()):
                raise DistilledError(f"{where}: {name} holds NaN or infinity")


def hard_logits(classes_S: Tensor, classes: int) -> Tensor:
    """Return label logits (S, K) whose softmax is one-hot at each image's class."""
    return HARD_LABEL_LOGIT * F.one_hot(classes_S, classes).float()


def _read_meta(path: Path) -> tuple[DistilledMeta, dict[str, str]]:
    """Return the metadata and the checksums of the other files."""
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise DistilledError(
            f"{path.parent}: is not a distilled set (no {META}); `lad-dist distill JOB` makes one"
        ) from None
    except ValueError as error:
        raise DistilledError(f"{path}: is not valid JSON: {error}") from None
    if not isinstance(doc, dict) or doc.get("format_version") != FORMAT_VERSION:
        raise DistilledError(f"{path}: is not of format version {FORMAT_VERSION}, which this lad-dist reads")
    own_sum = _sha256_of_meta({k: v for k, v in doc.items() if k != "sha256"})
    fields = DistilledMeta.__dataclass_fields__
    del doc["format_version"]
    missing = [n for n in [*fields, "sha256"] if n not in doc and n != "label_source"]
    unknown = [n for n in doc if n not in fields and n != "sha256"]
    if missing or unknown:
        raise DistilledError(f"{path}: missing fields: {missing or 'none'}; unknown fields: {unknown or 'none'}")
    try:
        sums = TypeAdapter(dict[str, str]).validate_python(doc.pop("sha256"))
        meta = TypeAdapter(DistilledMeta).validate_python(doc)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'sha256'}: {e['msg']}" for e in error.errors())
        raise DistilledError(f"{path}: {faults}") from None
    if sums.get(META) != own_sum:
        raise DistilledError(f"{path}: does not match its own checksum: it was changed after it was written")
    return meta, sums


def _sha256_of_meta(doc: dict[str, Any]) -> str:
    """Return the checksum of the metadata's contents, independent of its formatting."""
    return hashlib.sha256(json.dumps(doc, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
