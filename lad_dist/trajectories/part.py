"""Write, seal, open and read one part file.

A part has two SHA-256 checksums in its Parquet footer: one of all bytes before the footer, one of the footer itself
(with that checksum's digits set to zero). The footer's is checked whenever a part is opened, so damaged sizes and
offsets never reach the Parquet decoder; the data's is checked by ``verify``, which thus detects any changed byte. Page
checksums protect every single read.

The footer also holds the part's name and one SHA-256 of each row's weights, so that a buffer's digest needs no weights
(``read_row_sums``). Parts of earlier versions lack these checksums; their rows are read instead.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from lad_dist.errors import TrajectoryError, first_line
from lad_dist.trajectories import files
from lad_dist.trajectories.schema import (
    COLUMNS,
    KEY_COLUMNS,
    META_KEY,
    VECTOR_COLUMN,
    VECTOR_LEAF,
    WRITER_OPTIONS,
    BufferMeta,
    Checkpoint,
    PartName,
    arrow_schema,
)

_DATA_SUM, _FOOTER_SUM = b"lad_dist_data_sha256", b"lad_dist_footer_sha256"
_ROW_SUMS = b"lad_dist_row_sha256"  # the part's name, a line break, 64 digits per row
_NO_SUM = b"0" * 64
# In Thrift's compact protocol a key and the 64-character value after it are separated by 0x18 (next field, binary)
# and 0x40 (length 64). JSON escapes control characters, so the metadata cannot contain this by chance.
_SUMS = {key: re.compile(re.escape(key) + b"\x18\x40([0-9a-f]{64})") for key in (_DATA_SUM, _FOOTER_SUM)}

# The same for values of any length, preceded by it as a base-128 varint: bytes from 0x80 on, then one below.
_VALUES = {
    key: re.compile(re.escape(b"\x18" + bytes([len(key)]) + key) + rb"\x18([\x80-\xff]{0,4}[\x00-\x7f])")
    for key in (META_KEY, _ROW_SUMS)
}

_MAGIC = b"PAR1"
_LAST_BYTES = 2**15  # read at once from the end of a file; footers of ten epochs have 10 to 20 KiB
_TAIL = 8  # length of the footer (4 bytes, little-endian), then the magic
_LARGEST_FOOTER = 2**26
_SLACK = 2**16  # bytes for the page header and the levels of one vector
_CHUNK = 2**20


@dataclass(frozen=True, eq=False)
class Footer:
    """A part's footer after all checks that need no data. Immutable, so threads can share it."""

    name: PartName
    path: str
    stamp: files.Stamp
    meta: BufferMeta
    parquet: pq.FileMetaData
    data_sum: str
    data_end: int  # where the footer starts, in bytes
    row_sums: tuple[bytes, ...] | None = None  # of the weights, by row; None in parts of earlier versions

    def row_group(self, epoch: int) -> int:
        """Index of the row group that holds ``epoch``."""
        return epoch - self.name.first


class RowSums(NamedTuple):
    """A part's metadata as JSON and one checksum per row of weights (None in parts of earlier versions)."""

    meta: bytes
    sums: tuple[bytes, ...] | None


def damaged(path: str, what: str) -> TrajectoryError:
    """Return the error for a part whose content is damaged."""
    return TrajectoryError(
        f"{path}: the part is damaged: {what}; delete it and run `lad-dist experts` again, which redoes its epochs"
    )


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Convert errors of the file system or the Parquet decoder into a ``TrajectoryError`` that names the part."""
    try:
        yield
    except FileNotFoundError as cause:
        raise TrajectoryError(
            f"{path}: the part was removed after it was listed; run `lad-dist experts` again, which redoes its epochs"
        ) from cause
    except OSError as cause:
        if files.of_the_store(cause):
            raise TrajectoryError(
                f"{path}: cannot be read: {first_line(cause)}; run the same command again when the store answers"
            ) from cause
        if cause.errno is None:  # Arrow's own errors about the content are OSErrors without a number
            raise damaged(path, first_line(cause)) from cause
        raise TrajectoryError(f"{path}: cannot be read: {cause.strerror}; valid: a readable file") from cause
    except (pa.ArrowException, ValueError, OverflowError, MemoryError) as cause:
        raise damaged(path, first_line(cause)) from cause


def write_part(file: BinaryIO, meta: BufferMeta, rows: Sequence[Checkpoint]) -> None:
    """Write ``rows`` (consecutive epochs of one expert and stage) and seal the file. Raises OSError."""
    schema = arrow_schema(meta)
    with pq.ParquetWriter(file, schema, **WRITER_OPTIONS) as writer:
        for row in rows:
            weights = pa.ListArray.from_arrays(
                pa.array([0, row.weights.size], pa.int32()),
                pa.array(row.weights),
                type=schema.field(VECTOR_COLUMN).type,
            )
            columns = [
                weights if field.name == VECTOR_COLUMN else pa.array([getattr(row, field.name)], field.type)
                for field in schema
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=1)
        # Without an embedded Arrow schema the writer drops the schema's metadata, so it is added to the footer here.
        name = PartName(rows[0].stage, rows[0].expert, rows[0].epoch, rows[-1].epoch)
        sums = f"{name}\n" + "".join(weights_sum(row.weights).hex() for row in rows)
        writer.add_key_value_metadata(
            {**schema.metadata, _ROW_SUMS: sums.encode(), _DATA_SUM: _NO_SUM, _FOOTER_SUM: _NO_SUM}
        )
    _seal(file)


def weights_sum(weights: npt.NDArray[np.float32]) -> bytes:
    """Return the SHA-256 of one row's weights as little-endian float32."""
    return hashlib.sha256(weights.astype("<f4", copy=False).tobytes()).digest()


def _seal(file: BinaryIO) -> None:
    """Replace the zeros left by ``write_part`` with the two checksums."""
    file.flush()
    size = file.seek(0, 2)
    file.seek(size - _TAIL)
    data_end = size - _TAIL - int.from_bytes(file.read(4), "little")
    file.seek(0)
    data, left = hashlib.sha256(), data_end
    while left:
        chunk = file.read(min(_CHUNK, left))
        assert chunk, "the file that was just written is shorter than it says"
        data.update(chunk)
        left -= len(chunk)
    footer = file.read()
    footer = _with_sum(footer, _DATA_SUM, data.hexdigest().encode())
    footer = _with_sum(footer, _FOOTER_SUM, hashlib.sha256(footer).hexdigest().encode())
    file.seek(data_end)
    file.write(footer)


def _find_sum(footer: bytes, key: bytes) -> re.Match[bytes] | None:
    found = list(_SUMS[key].finditer(footer))
    return found[0] if len(found) == 1 else None


def _with_sum(footer: bytes, key: bytes, digits: bytes) -> bytes:
    found = _find_sum(footer, key)
    assert found is not None, f"the Parquet writer did not store {key!r} as Thrift's compact protocol does"
    return footer[: found.start(1)] + digits + footer[found.end(1) :]


def load_footer(filesystem: fs.FileSystem, path: str, name: PartName) -> Footer:
    """Read and check the footer of the part at ``path``, which should hold ``name``.

    Checks the footer's checksum, the format version, the columns, the rows against ``name``, and that every size and
    offset fits into the file, so that no read can allocate more than a checkpoint needs. Raises ``TrajectoryError``.
    """
    with damage_named(path):
        stamp = files.stamp(filesystem, path)
        if stamp is None:
            raise FileNotFoundError(path)
        footer, data_end, data_sum = _read_footer(filesystem, path)
        limit = len(footer)  # no string or list in the footer can be longer than the footer
        parquet = pq.ParquetFile(
            pa.BufferReader(_MAGIC + footer), thrift_string_size_limit=limit, thrift_container_size_limit=limit
        ).metadata
        meta = parsed_meta((parquet.metadata or {}).get(META_KEY), path)
        result = Footer(name, path, stamp, meta, parquet, data_sum, data_end)
        _check_rows(result)
        return replace(result, row_sums=_row_sums(parquet.metadata.get(_ROW_SUMS), path, name))


def read_row_sums(filesystem: fs.FileSystem, path: str, name: PartName) -> RowSums:
    """Read the row checksums of the part at ``path``, which should hold ``name``, from its footer alone.

    Takes a tenth of the time of ``load_footer``: checks the footer's checksum and decodes nothing else. Raises
    ``TrajectoryError``.
    """
    with damage_named(path):
        footer, _, _ = _read_footer(filesystem, path)
        meta = _value(footer, META_KEY)
        if meta is None:
            raise damaged(path, "its footer has no lad_dist metadata")
        return RowSums(meta, _row_sums(_value(footer, _ROW_SUMS), path, name))


_PARSED: dict[bytes, BufferMeta] = {}  # the parts of a buffer repeat few metadata
_MOST_PARSED = 64


def parsed_meta(text: bytes | None, path: str) -> BufferMeta:
    """Return a part's metadata from their JSON; parts with equal JSON share one object. Raises ``TrajectoryError``."""
    known = _PARSED.get(text or b"")
    if known is None:
        known = BufferMeta.from_metadata({} if text is None else {META_KEY: text}, path)
        if len(_PARSED) >= _MOST_PARSED:
            _PARSED.clear()
        _PARSED[text or b""] = known
    return known


def _row_sums(text: bytes | None, path: str, name: PartName) -> tuple[bytes, ...] | None:
    if text is None:
        return None
    said, _, digits = text.decode().partition("\n")
    if said != str(name):
        raise damaged(path, f"it holds {said} where its name says {name}; was it renamed?")
    sums = bytes.fromhex(digits)
    rows = name.last - name.first + 1
    if len(sums) != 32 * rows:
        raise damaged(path, f"it has {len(sums)} bytes of sums for {rows} rows")
    return tuple(sums[at : at + 32] for at in range(0, len(sums), 32))


def _value(footer: bytes, key: bytes) -> bytes | None:
    """Return the value of ``key`` in a footer without decoding the rest."""
    found = _VALUES[key].search(footer)
    if found is None:
        return None
    length = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(found[1]))
    return footer[found.end() : found.end() + length]


def _read_footer(filesystem: fs.FileSystem, path: str) -> tuple[bytes, int, str]:
    """Return the checked bytes from the footer to the end of the file, their offset, and the data's checksum."""
    with files.open_for_reading(filesystem, path) as source:
        size = source.size()
        if size < len(_MAGIC) + _TAIL:
            raise damaged(path, f"it is {size} bytes long, too short for a Parquet file")
        begin = max(0, size - _LAST_BYTES)
        end = source.read_at(size - begin, begin)
        if end[-len(_MAGIC) :] != _MAGIC:
            raise damaged(path, "it does not end as a Parquet file does, so it was cut short or overwritten")
        length = int.from_bytes(end[-_TAIL : -len(_MAGIC)], "little")
        if not 0 < length <= min(size - _TAIL - len(_MAGIC), _LARGEST_FOOTER):
            raise damaged(path, f"its footer claims {length:,} bytes in a file of {size:,}")
        data_end = size - _TAIL - length
        footer = end[data_end - begin :] if data_end >= begin else source.read_at(length + _TAIL, data_end)
    data_sum, footer_sum = _find_sum(footer, _DATA_SUM), _find_sum(footer, _FOOTER_SUM)
    if data_sum is None or footer_sum is None:
        raise damaged(path, "its footer has no checksums, so lad-dist did not write it in this form")
    if hashlib.sha256(_with_sum(footer, _FOOTER_SUM, _NO_SUM)).hexdigest().encode() != footer_sum[1]:
        raise damaged(path, "its footer does not match its checksum")
    return footer, data_end, data_sum[1].decode()


def _check_rows(footer: Footer) -> None:
    """Check the footer against the part's name and its first row against the file's length, without reading data.

    ``read_row`` checks the row that it reads.
    """
    parquet, name, path = footer.parquet, footer.name, footer.path
    rows = name.last - name.first + 1
    expected = COLUMNS
    if not parquet.schema.to_arrow_schema().remove_metadata().equals(expected):
        raise damaged(path, f"its columns are not those of a trajectory part; valid: {', '.join(expected.names)}")
    if parquet.num_rows != rows or parquet.num_row_groups != rows:
        raise damaged(
            path, f"it holds {parquet.num_rows} rows in {parquet.num_row_groups} row groups where its name says {rows}"
        )
    _check_row(footer, name.first)


def _check_row(footer: Footer, epoch: int) -> None:
    """Check one row's key, sizes and offsets in the footer."""
    name, path, length = footer.name, footer.path, footer.meta.vector_length(footer.name.stage)
    group = footer.parquet.row_group(footer.row_group(epoch))
    columns = [group.column(i) for i in range(group.num_columns)]
    key = [column.statistics for column in columns if column.path_in_schema in KEY_COLUMNS]
    if any(s is None or not s.has_min_max or s.min != s.max for s in key):
        raise damaged(path, f"epoch {epoch}: its key is not in the footer")
    if tuple(s.min for s in key) != (name.stage, name.expert, epoch):
        raise damaged(
            path,
            f"it holds {[s.min for s in key]} where its name says {[name.stage, name.expert, epoch]}; was it renamed?",
        )
    for column in columns:
        values = length if column.path_in_schema == VECTOR_LEAF else 1
        start, size = column.data_page_offset, column.total_compressed_size
        within = len(_MAGIC) <= start and size >= 0 and start + size <= footer.data_end
        if column.num_values != values or not within or not 0 <= column.total_uncompressed_size <= 8 * values + _SLACK:
            raise damaged(path, f"epoch {epoch}: column {column.path_in_schema} has impossible sizes or offsets")


def read_row(filesystem: fs.FileSystem, footer: Footer, epoch: int, columns: Sequence[str]) -> pa.Table:
    """Read columns of one row from that row's bytes only, verifying page checksums. Raises ``TrajectoryError``."""
    with damage_named(footer.path), files.open_for_reading(filesystem, footer.path) as source:
        _check_row(footer, epoch)
        opened = pq.ParquetFile(source, metadata=footer.parquet, pre_buffer=False, page_checksum_verification=True)
        table = opened.read_row_group(footer.row_group(epoch), columns=list(columns), use_threads=False)
        if table.num_rows != 1:
            raise damaged(footer.path, f"epoch {epoch}: {table.num_rows} rows in its row group")
        return table


def vector(footer: Footer, table: pa.Table) -> npt.NDArray[np.float32]:
    """Return the weights in a one-row table as a writable copy, float32 of shape (vector_length,)."""
    # by DLPack: to_numpy would import pandas where it is installed, 0.3 s and 65 MB in every process
    values = np.from_dlpack(table.column(VECTOR_COLUMN).chunk(0).flatten())
    length = footer.meta.vector_length(footer.name.stage)
    if values.shape != (length,):
        raise damaged(footer.path, f"a vector of {values.size} weights where the layout has {length}")
    return np.array(values, dtype=np.float32)


def checkpoint(filesystem: fs.FileSystem, footer: Footer, epoch: int) -> Checkpoint:
    """Read one whole row. Raises ``TrajectoryError``."""
    table = read_row(filesystem, footer, epoch, footer.parquet.schema.to_arrow_schema().names)
    row = {name: table.column(name)[0].as_py() for name in table.column_names if name != VECTOR_COLUMN}
    key = (row["stage"], row["expert"], row["epoch"])
    if key != (footer.name.stage, footer.name.expert, epoch):
        raise damaged(
            footer.path, f"it holds {list(key)} where its name says {[footer.name.stage, footer.name.expert, epoch]}"
        )
    return Checkpoint(weights=vector(footer, table), **row)


def data_sum(filesystem: fs.FileSystem, footer: Footer) -> str:
    """Compute the SHA-256 of all bytes before the footer; equal to ``footer.data_sum`` if undamaged.

    Raises ``TrajectoryError``.
    """
    total, position = hashlib.sha256(), 0
    with damage_named(footer.path), files.open_for_reading(filesystem, footer.path) as source:
        while position < footer.data_end:
            chunk = source.read_at(min(_CHUNK, footer.data_end - position), position)
            if not chunk:
                raise damaged(footer.path, "it became shorter while it was read")
            total.update(chunk)
            position += len(chunk)
    return total.hexdigest()
