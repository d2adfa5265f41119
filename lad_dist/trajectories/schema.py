"""On-disk format of a trajectory buffer: names, columns, metadata, encoding.

    <buffer>/<stage>/expert-0007/epochs-0000-0009.parquet

One row is one checkpoint, keyed (stage, expert, epoch); a part file holds a few consecutive epochs of one expert in one
stage, one row group per row, so that reading a checkpoint reads no other. Rows of the classifier stage hold the
classifier's weights only, because the backbone is frozen there. The schema metadata of every part (``BufferMeta``)
describe the vectors completely, so each part is self-contained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lad_dist.errors import TrajectoryError

Stage = Literal["representation", "classifier"]
STAGES: tuple[Stage, ...] = get_args(Stage)

FORMAT_VERSION = 1
META_KEY = b"lad_dist"

VECTOR_COLUMN = "weights"
VECTOR_LEAF = "weights.list.element"  # the column's path inside Parquet
KEY_COLUMNS = ("stage", "expert", "epoch")

# Measured on a real trajectory: benchmarks/results/buffer_encoding.md (made by benchmarks/buffer_encoding.py). The
# bytes of trained floats hardly repeat; they compress only after BYTE_STREAM_SPLIT has grouped the exponents, and
# levels above zstd 1 gain nothing. A dictionary makes the vector half as large again. The key columns have statistics:
# the reader checks every row's key from the footer, and other tools can skip rows. Most other readers support format
# 2.6 with version 1 data pages and no embedded Arrow schema (DuckDB and polars do; fastparquet lacks
# BYTE_STREAM_SPLIT). A vector is always one page: a page holds whole rows.
WRITER_OPTIONS: dict[str, Any] = {
    "version": "2.6",
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "use_byte_stream_split": [VECTOR_LEAF],
    "write_statistics": list(KEY_COLUMNS),
    "write_page_checksum": True,
    "data_page_version": "1.0",
    "store_schema": False,
}

# A Parquet page holds a whole vector, and its size is a signed 32-bit number of bytes; leave room for the page's
# levels.
LARGEST_VECTOR = (2**31 - 2**20) // 4


@dataclass(frozen=True)
class BufferMeta:
    """Origin of a buffer and layout of its vectors; stored as JSON in every part.

    ``parameters``: (name, shape) in module order; a representation row is the concatenation of their flattened values.
    ``classifier_parameters``: names of the parameters in a classifier row, also in module order.
    ``recipe``: the part of the recipe that determines the experts; ``experts_hash`` is its hash.
    ``versions``: of the libraries that wrote the part; the only field in which parts of one buffer may differ.
    Raises ``TrajectoryError`` if the fields contradict each other.
    """

    experts_hash: str
    data_fingerprint: str
    class_counts: tuple[int, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    classifier_parameters: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        # Lists (from JSON, from callers) become tuples, so that equal metadata compares equal.
        object.__setattr__(self, "class_counts", tuple(int(n) for n in self.class_counts))
        layout = tuple((str(name), tuple(int(n) for n in shape)) for name, shape in self.parameters)
        object.__setattr__(self, "parameters", layout)
        object.__setattr__(self, "classifier_parameters", tuple(self.classifier_parameters))
        names = [name for name, _ in self.parameters]
        if len(set(names)) != len(names):
            raise TrajectoryError(
                "trajectory metadata: parameters: a name occurs twice; every parameter needs its own name"
            )
        chosen = set(self.classifier_parameters)
        if self.classifier_parameters != tuple(name for name in names if name in chosen):
            raise TrajectoryError(
                f"trajectory metadata: classifier_parameters: {list(self.classifier_parameters)} is not a "
                f"selection, in module order, of the parameters; valid: names from {names}"
            )
        if (
            any(n < 1 for _, shape in self.parameters for n in shape)
            or self.vector_length("representation") > LARGEST_VECTOR
        ):
            raise TrajectoryError(
                "trajectory metadata: parameters: every dimension must be at least 1 and all weights together at most "
                f"{LARGEST_VECTOR:,}"
            )

    def vector_length(self, stage: Stage) -> int:
        """Number of weights in one row of ``stage``."""
        chosen = set(self.classifier_parameters)
        return sum(math.prod(shape) for name, shape in self.parameters if stage == "representation" or name in chosen)

    def parameter_at(self, stage: Stage, position: int) -> str:
        """Return the name of the parameter at element ``position`` of a row of ``stage``."""
        chosen = set(self.classifier_parameters)
        end = 0
        for name, shape in self.parameters:
            if stage == "representation" or name in chosen:
                end += math.prod(shape)
                if position < end:
                    return name
        raise IndexError(f"position {position} is outside a {stage} vector of {end} weights")

    def differences(self, other: BufferMeta) -> list[str]:
        """Return the names of fields, except ``versions``, in which two parts' metadata differ."""
        if self is other:
            return []
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if name != "versions" and mine[name] != theirs[name]]

    def to_metadata(self) -> dict[bytes, bytes]:
        """Make Arrow schema metadata ``{b"lad_dist": JSON}``. Raises ``TrajectoryError`` if ``recipe`` is not JSON."""
        try:
            return {META_KEY: json.dumps(asdict(self), sort_keys=True, allow_nan=False).encode()}
        except (TypeError, ValueError) as cause:
            raise TrajectoryError(
                f"trajectory metadata: cannot be written as JSON: {cause}; valid: plain values"
            ) from cause

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, source: str = "schema metadata") -> BufferMeta:
        """Parse the output of ``to_metadata``. Raises ``TrajectoryError``, naming ``source``."""
        text = (metadata or {}).get(META_KEY)
        if text is None:
            raise TrajectoryError(f"{source}: has no lad_dist metadata, so it is not a part of a trajectory buffer")
        try:
            fields = json.loads(text)
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise TrajectoryError(
                    f"{source}: has format version {version!r}; this lad-dist reads version {FORMAT_VERSION}: use "
                    "the release that wrote it, or run `lad-dist experts` into a new buffer"
                )
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as cause:
            raise TrajectoryError(f"{source}: its lad_dist metadata cannot be understood ({cause!r})") from cause


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One row of a buffer.

    ``weights``: float32, shape (vector_length(stage),). ``loss``: mean training loss of the epoch; ``accuracy``:
    training accuracy as a fraction; ``seconds``: duration of the epoch. The three are None at epoch 0, before training.
    """

    stage: Stage
    expert: int
    epoch: int
    weights: npt.NDArray[np.float32]
    loss: float | None = None
    accuracy: float | None = None
    seconds: float | None = None


class PartName(NamedTuple):
    """Key range of one part: epochs ``first`` to ``last``, both included. Sorts in order of preference."""

    stage: Stage
    expert: int
    first: int
    last: int

    def __str__(self) -> str:
        return part_path(*self)


_NUMBER = "([0-9]{4}|[1-9][0-9]{4,8})"  # as part_path writes them
_PART_PATH = re.compile(rf"(representation|classifier)/expert-{_NUMBER}/epochs-{_NUMBER}-{_NUMBER}\.parquet")
PART_PATH_FORM = "<stage>/expert-0007/epochs-0000-0009.parquet, where <stage> is representation or classifier"


def expert_folder(stage: Stage, expert: int) -> str:
    """Folder of one expert in one stage, relative to the buffer, with forward slashes."""
    return f"{stage}/expert-{expert:04d}"


def part_path(stage: Stage, expert: int, first: int, last: int) -> str:
    """Path of a part relative to the buffer, with forward slashes; inverse of ``parse_part_path``."""
    return f"{expert_folder(stage, expert)}/epochs-{first:04d}-{last:04d}.parquet"


def parse_part_path(path: str) -> PartName | None:
    """Return the key range in a path relative to the buffer, or None if ``part_path`` does not make that path."""
    match = _PART_PATH.fullmatch(path)
    if match is None:
        return None
    stage: Stage = "representation" if match[1] == "representation" else "classifier"
    name = PartName(stage, int(match[2]), int(match[3]), int(match[4]))
    return name if name.first <= name.last else None


COLUMNS = pa.schema(
    [
        pa.field("stage", pa.string(), nullable=False),
        pa.field("expert", pa.int32(), nullable=False),
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field(VECTOR_COLUMN, pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        pa.field("loss", pa.float64()),
        pa.field("accuracy", pa.float64()),
        pa.field("seconds", pa.float64()),
    ]
)


def arrow_schema(meta: BufferMeta) -> pa.Schema:
    """Return the schema of a part, with ``meta`` in its metadata."""
    return COLUMNS.with_metadata(meta.to_metadata())
