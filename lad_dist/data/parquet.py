"""Data sets in Parquet: one row per image, the image encoded (PNG, JPEG, ...), the label an integer.

The image column is binary, or a struct with a binary field ``bytes`` as written by the Hugging Face hub. ``write_rows``
and ``read_rows`` serve the files of ``exchange/``: small tables, written and read whole.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lad_dist.data.sources import Indices, Item, Labels, data_root
from lad_dist.errors import DataError

if TYPE_CHECKING:
    from lad_dist.recipe import DataConfig

IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "cls")
_DEFAULT_PATTERNS = ("{}.parquet", "{}", "{}-*.parquet", "data/{}.parquet", "data/{}-*.parquet")
_DEFAULT_TEST_SPLITS = ("test", "validation", "val", "valid")
_ROWS_AT_ONCE = 256  # encoded images in memory
_READ_BUFFER = 2**20  # bytes; without it, or with pre_buffer, a whole row group of images is held in memory


@dataclass(frozen=True)
class ParquetSource:
    """One split: ``starts[i]`` is the index of the first image of ``files[i]``; the last entry is the image count."""

    where: str
    labels_N: Labels
    class_names: tuple[str, ...] | None
    files: tuple[Path, ...]
    starts: tuple[int, ...]
    image_column: str
    channels: int | None = None
    notes: tuple[str, ...] = ()

    def items(self, indices: Indices) -> Iterator[tuple[int, Item]]:
        """Yield items in file order; row groups without a wanted row are not read."""
        by_row = np.argsort(indices, kind="stable")  # the k-th wanted row is output by_row[k]
        rows = indices[by_row]
        for file, start, stop in zip(self.files, self.starts[:-1], self.starts[1:], strict=True):
            low, high = np.searchsorted(rows, (start, stop))
            if low == high:
                continue
            with _opened(file) as parquet:
                for k, row, content in _wanted_rows(parquet, self.image_column, rows[low:high] - start):
                    where = f"{file}: row {row}, column {self.image_column!r}"
                    if content is None:
                        raise DataError(f"{where}: no image; valid: an encoded image in every row")
                    yield int(by_row[low + k]), Item(where, content)


def parquet(config: DataConfig) -> tuple[ParquetSource, ParquetSource]:
    """Return the training and test split.

    ``train`` and ``test`` are a file, a folder of files, or a pattern, relative to root. By default they are searched
    under root as train.parquet, train/, train-*.parquet, data/train.parquet and data/train-*.parquet (for the test
    split: test, validation, val or valid).
    """
    root = data_root(config.root)
    train = _source(_split_files(root, config.train, "data.train", ("train",)), config, None)
    test = _source(_split_files(root, config.test, "data.test", _DEFAULT_TEST_SPLITS), config, train.class_names)
    return train, test


def _split_files(root: Path, given: str | None, field: str, names: tuple[str, ...]) -> tuple[Path, ...]:
    patterns = [given] if given is not None else [p.format(name) for name in names for p in _DEFAULT_PATTERNS]
    for pattern in patterns:
        path = root / pattern
        if path.is_dir():
            found = sorted(path.glob("*.parquet"))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())
        if found:
            return tuple(found)
    raise DataError(
        f"{field}: no Parquet file at {', '.join(str((root / p).absolute()) for p in patterns[:5])}; "
        "valid: a file, a folder of *.parquet files, or a pattern such as data/train-*.parquet, relative to data.root"
    )


def _source(files: tuple[Path, ...], config: DataConfig, train_names: tuple[str, ...] | None) -> ParquetSource:
    with _opened(files[0]) as first:
        schema = first.schema_arrow
    image_column = _column(files[0], schema, config.image_column, "data.image_column", IMAGE_NAMES, _holds_images)
    label_column = _column(files[0], schema, config.label_column, "data.label_column", LABEL_NAMES, pa.types.is_integer)
    labels = [_read_labels(file, image_column, label_column) for file in files]
    starts = np.cumsum([0, *(len(of_file) for of_file in labels)])
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return ParquetSource(
        where=f"{where}, column {label_column!r}",
        labels_N=np.concatenate(labels),
        class_names=_class_names(schema, label_column) or train_names,
        files=files,
        starts=tuple(int(start) for start in starts),
        image_column=image_column,
    )


def _opened(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, buffer_size=_READ_BUFFER, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a readable Parquet file ({error})") from error


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        position = kind.get_field_index("bytes")
        return position >= 0 and _holds_images(kind.field(position).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _column(
    file: Path,
    schema: pa.Schema,
    given: str | None,
    field: str,
    usual: Sequence[str],
    fits: Callable[[pa.DataType], bool],
) -> str:
    """Return column ``given``; else the first of the ``usual`` names whose type fits; else the only one that fits."""
    fitting = [name for name in schema.names if fits(schema.field(name).type)]
    columns = ", ".join(f"{entry.name} ({entry.type})" for entry in schema)
    if given is not None:
        if given in fitting:
            return given
        problem = f"column {given!r} has another type" if given in schema.names else f"there is no column {given!r}"
    else:
        candidates = [name for name in usual if name in fitting] or fitting
        if len(candidates) == 1 or (candidates and candidates[0] in usual):
            return candidates[0]
        problem = f"columns {', '.join(candidates)} all fit" if candidates else "no column fits"
    what = "encoded images (binary, or struct with bytes)" if field.endswith("image_column") else "integer labels"
    raise DataError(f"{field}: {file}: {problem}; valid: a column of {what}; the columns are {columns}")


def _read_labels(file: Path, image_column: str, label_column: str) -> Labels:
    with _opened(file) as parquet:
        schema = parquet.schema_arrow
        for name, fits in ((label_column, pa.types.is_integer), (image_column, _holds_images)):
            if name not in schema.names or not fits(schema.field(name).type):
                raise DataError(
                    f"{file}: column {name!r} is missing or of another type than in the split's first file; "
                    f"the columns are {', '.join(f'{entry.name} ({entry.type})' for entry in schema)}"
                )
        try:
            column = parquet.read(columns=[label_column]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: column {label_column!r} cannot be read ({error})") from error
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise DataError(f"{file}: row {row}, column {label_column!r}: no label; valid: an integer in every row")
    try:
        return np.asarray(column.cast(pa.int64()).to_numpy(), dtype=np.int64)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: column {label_column!r}: {error}; valid: integers 0 to K-1 with no gaps") from error


def _wanted_rows(parquet: pq.ParquetFile, column: str, rows: Indices) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield (k, ``rows[k]``, its content) for the sorted ``rows`` of one file."""
    group_sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]
    start = 0
    for group, size in enumerate(group_sizes):
        low, high = np.searchsorted(rows, (start, start + size))
        batch_start = start
        start += size
        if low == high:
            continue
        is_struct = pa.types.is_struct(parquet.schema_arrow.field(column).type)
        selected = [f"{column}.bytes"] if is_struct else [column]
        for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=selected):
            first, last = np.searchsorted(rows, (batch_start, batch_start + len(batch)))
            values = pc.struct_field(batch.column(0), "bytes") if is_struct else batch.column(0)
            for k in range(first, last):
                yield k, int(rows[k]), values[int(rows[k]) - batch_start].as_py()
            batch_start += len(batch)


def _class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...] | None:
    """Read class names from schema metadata: Hugging Face's ClassLabel, else the comma-separated key ``classes``."""
    metadata = schema.metadata or {}
    if b"huggingface" in metadata:
        try:
            feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        except (ValueError, KeyError, TypeError):
            feature = None  # ignore metadata without class names
        if isinstance(feature, dict) and isinstance(feature.get("names"), list):
            return tuple(str(name) for name in feature["names"])
    if b"classes" in metadata:
        return tuple(name.strip() for name in metadata[b"classes"].decode().split(","))
    return None


# --- whole tables, for exchange ------------------------------------------------------------------------------------

Cells = npt.NDArray[Any] | Sequence[bytes] | Sequence[str] | Sequence[Mapping[str, object]]


def write_rows(path: Path, columns: Mapping[str, Cells], metadata: Mapping[str, str]) -> None:
    """Write a table to ``path`` (publishing it is up to the caller); every page has a checksum.

    columns: an array (N,) becomes a column of its type, an array (N, D) one of lists of length D; bytes, strings and
    structs (of ``bytes`` and ``path``, as images on the Hugging Face hub) are given as sequences. metadata: of the
    schema. Raises OSError if the file cannot be written.
    """
    arrays = {name: _array(cells) for name, cells in columns.items()}
    schema = pa.schema([(name, array.type) for name, array in arrays.items()], metadata=dict(metadata))
    table = pa.Table.from_arrays(list(arrays.values()), schema=schema)
    pq.write_table(
        table, path, row_group_size=_ROWS_AT_ONCE, compression="zstd", use_dictionary=False, write_page_checksum=True
    )


def _array(cells: Cells) -> pa.Array:
    if isinstance(cells, np.ndarray):
        flat = pa.array(np.ascontiguousarray(cells).reshape(-1))
        return flat if cells.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, cells.shape[1])
    if cells and isinstance(cells[0], Mapping):
        return pa.array(cells, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.array(cells)


def read_rows(path: Path, numbers: Sequence[str]) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Return the columns ``numbers`` as arrays, (N,) or, for lists of one length D, (N, D); and the metadata.

    Raises DataError if the file is missing, damaged, or lacks such a column.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            missing = [name for name in numbers if name not in schema.names]
            if missing:
                raise DataError(
                    f"{path}: column {missing[0]!r} is missing; the columns are {', '.join(map(str, schema.names))}"
                )
            table = parquet.read(columns=list(numbers))
        columns = {name: _numbers(path, name, table.column(name).combine_chunks()) for name in numbers}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    try:
        return columns, {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: its metadata are not text ({error})") from error


def _numbers(path: Path, name: str, column: pa.Array) -> npt.NDArray[Any]:
    length, values = 0, column
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if is_list or pa.types.is_fixed_size_list(column.type):
        values = column.flatten()
        length = len(values) // max(1, len(column))
        lengths = pc.list_value_length(column)
        if column.null_count or not bool(pc.all(pc.equal(lengths, length)).as_py()):
            raise DataError(f"{path}: column {name!r} holds lists of different lengths; valid: one length")
    if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise DataError(f"{path}: column {name!r} holds {column.type}; valid: numbers in every row")
    flat: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), length) if length else flat
