"""Which Parquet encoding should hold the weight vectors of the trajectory buffer? Measured on a real trajectory.

    python benchmarks/buffer_encoding.py --cifar FOLDER            # prints the table
    python benchmarks/buffer_encoding.py --cifar FOLDER --write    # and writes benchmarks/results/buffer_encoding.md

Trains the ConvNet of the experiments (width 128, depth 3, 3x32x32, 10 classes: 320,010 weights) for some epochs on a
small real subset, keeps every epoch's weights, and writes them in every candidate encoding. What was chosen is
``lad_dist.trajectories.schema.WRITER_OPTIONS``; the last row measures the buffer as built, which reopens the file for
every read. Targets: half of the random reads under 5 ms, less than 0.9 of the raw size, and any Parquet reader sees a
list of floats. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import processor
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lad_dist.trajectories import Buffer, BufferMeta, PartWriter

Trajectory = npt.NDArray[np.float32]  # (checkpoints, weights)
RESULTS = Path(__file__).parent / "results" / "buffer_encoding.md"
PAGE = 2**20


# The trajectory


def cifar_images(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` images spread over ``train.parquet`` (columns image: encoded, label): (N, 3, 32, 32) in [0, 1]."""
    from PIL import Image

    table = pq.read_table(folder / "train.parquet", columns=["image", "label"])
    table = table.take(np.linspace(0, table.num_rows - 1, count).astype(np.int64))
    pixels = []
    for value in table["image"].to_pylist():
        data = value["bytes"] if isinstance(value, dict) else value
        pixels.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return images, torch.tensor(table["label"].to_pylist(), dtype=torch.long)


def digit_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8x8 digits that scikit-learn carries, each pixel repeated 4x4 and the grey value in all three channels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None] / 16
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    return images, torch.tensor(digits.target[:count])


def convnet() -> nn.Sequential:
    """Three blocks of 3x3 convolution, norm of each channel, ReLU and 2x2 average pooling; a linear classifier."""
    layers: list[nn.Module] = []
    for channels in (3, 128, 128):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 10))


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> tuple[Trajectory, nn.Sequential]:
    """Weights at the initialisation and after every epoch of plain SGD (lr 0.01, weight decay 5e-3, batch 64)."""
    torch.manual_seed(0)
    images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    network = convnet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, weight_decay=5e-3)

    def weights() -> npt.NDArray[np.float32]:
        return torch.cat([p.detach().flatten() for p in network.parameters()]).numpy().copy()

    trajectory = [weights()]
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trajectory.append(weights())
        print(f"epoch {epoch}/{epochs}: loss {np.mean(losses):.3f}", file=sys.stderr)
    return np.stack(trajectory), network


# The candidates


@dataclass(frozen=True)
class Encoding:
    """One way to store a vector. ``type``: list, list of nullable elements, fixed-size list, or fixed-size binary."""

    type: str = "list"
    compression: str = "none"
    level: int | None = None
    encoding: str = "plain"  # plain, split (BYTE_STREAM_SPLIT) or dictionary
    checksums: bool = True
    page_bytes: int = PAGE
    page_version: str = "1.0"
    rows_per_group: int = 1

    @property
    def floats(self) -> bool:
        return self.type != "fixed binary"

    @property
    def leaf(self) -> str:
        return "weights.list.element" if self.floats else "weights"

    def field(self, length: int) -> pa.Field:
        element = pa.field("element", pa.float32(), nullable=self.type == "list, nullable")
        kinds: dict[str, pa.DataType] = {
            "list": pa.list_(element),
            "list, nullable": pa.list_(element),
            "fixed list": pa.list_(element, length),
            "fixed binary": pa.binary(4 * length),
        }
        return pa.field("weights", kinds[self.type], nullable=self.type == "list, nullable")

    def rows(self, weights: Trajectory) -> pa.Array:
        kind = self.field(weights.shape[1]).type
        if not self.floats:
            return pa.array([row.tobytes() for row in weights], kind)
        if self.type == "fixed list":
            return pa.FixedSizeListArray.from_arrays(pa.array(weights.ravel()), type=kind)
        offsets = np.arange(0, weights.size + 1, weights.shape[1], dtype=np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(weights.ravel()), type=kind)

    def options(self) -> dict[str, Any]:
        return {
            "compression": self.compression,
            "compression_level": self.level,
            "use_dictionary": [self.leaf] if self.encoding == "dictionary" else False,
            "use_byte_stream_split": [self.leaf] if self.encoding == "split" else False,
            "write_statistics": False,
            "write_page_checksum": self.checksums,
            "data_page_size": self.page_bytes,
            "data_page_version": self.page_version,
        }

    def cells(self) -> list[str]:
        compression = self.compression if self.level is None else f"{self.compression} {self.level}"
        pages = f"{self.page_bytes // 1024} KiB, v{self.page_version[0]}"
        checksums = "yes" if self.checksums else "no"
        return [self.type, compression, self.encoding, checksums, pages, str(self.rows_per_group)]


def candidates() -> Iterator[Encoding]:
    """Types first, then compression by encoding, then page and row-group options around the choice."""
    for kind in ("fixed binary", "list, nullable", "fixed list"):
        yield Encoding(type=kind)
    for kind in ("fixed binary", "list, nullable", "fixed list"):
        yield Encoding(type=kind, encoding="split", compression="zstd", level=1)
    codecs: tuple[tuple[str, int | None], ...] = (
        ("none", None), ("snappy", None), ("lz4", None), ("zstd", 1), ("zstd", 3), ("zstd", 9),
    )  # fmt: skip
    for encoding in ("plain", "split", "dictionary"):
        for compression, level in codecs:
            yield Encoding(encoding=encoding, compression=compression, level=level)
    chosen = Encoding(encoding="split", compression="zstd", level=1)
    yield replace(chosen, checksums=False)
    yield replace(chosen, page_bytes=64 * 1024)
    yield replace(chosen, page_bytes=16 * PAGE)
    yield replace(chosen, page_version="2.0")
    yield replace(chosen, rows_per_group=4)


# The measurement


@dataclass(frozen=True)
class Measured:
    size: float  # bytes on disk / bytes of the vectors
    write_ms: float  # for one row
    read_ms: npt.NDArray[np.float64]  # every random read

    def cells(self) -> list[str]:
        half, slow = np.percentile(self.read_ms, [50, 99])
        return [f"{self.size:.3f}", f"{self.write_ms:.1f}", f"{half:.2f}", f"{slow:.2f}"]


def timed_reads(
    read: Callable[[int], npt.NDArray[np.float32]], trajectory: Trajectory, reads: int
) -> npt.NDArray[np.float64]:
    """Milliseconds of ``reads`` reads of random rows; each row's content is checked outside the clock."""
    times = []
    for row in np.random.default_rng(0).integers(0, len(trajectory), reads):
        start = time.perf_counter()
        weights = read(int(row))
        times.append((time.perf_counter() - start) * 1e3)
        assert np.array_equal(weights, trajectory[row]), "an encoding changed the weights"
    return np.array(times)


def measure(candidate: Encoding, trajectory: Trajectory, file: Path, reads: int) -> Measured:
    """Write the trajectory to ``file``; read rows with the file open and its footer parsed, on one thread."""
    schema = pa.schema([candidate.field(trajectory.shape[1])])
    start = time.perf_counter()
    with pq.ParquetWriter(file, schema, **candidate.options()) as writer:
        for first in range(0, len(trajectory), candidate.rows_per_group):
            rows = candidate.rows(trajectory[first : first + candidate.rows_per_group])
            writer.write_table(pa.Table.from_arrays([rows], schema=schema))
    write_ms = (time.perf_counter() - start) * 1e3 / len(trajectory)
    opened = pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=candidate.checksums)

    def read(row: int) -> npt.NDArray[np.float32]:
        group, position = divmod(row, candidate.rows_per_group)
        column = opened.read_row_group(group, columns=["weights"], use_threads=False).column(0)
        value = column.slice(position, 1).combine_chunks()
        if candidate.floats:
            weights: npt.NDArray[np.float32] = value.flatten().to_numpy()
            return weights
        return np.frombuffer(value[0].as_buffer(), np.float32)

    return Measured(file.stat().st_size / trajectory.nbytes, write_ms, timed_reads(read, trajectory, reads))


def measure_buffer(trajectory: Trajectory, network: nn.Sequential, folder: Path, reads: int) -> Measured:
    """The same for the buffer as built: parts of 4 epochs, synced and renamed; every read reopens its file."""
    layout = tuple((name, tuple(p.shape)) for name, p in network.named_parameters())
    classifier = tuple(name for name, _ in layout[-2:])
    meta = BufferMeta("0" * 64, "0" * 64, (1,) * 10, layout, classifier)
    start = time.perf_counter()
    with PartWriter(folder, meta, "representation", 0, epochs_per_part=4) as writer:
        for epoch, weights in enumerate(trajectory):
            writer.append(epoch, weights)
    write_ms = (time.perf_counter() - start) * 1e3 / len(trajectory)
    buffer = Buffer(folder)
    for epoch in buffer.epochs("representation", 0):
        buffer.read("representation", 0, epoch)  # footers are read once
    times = timed_reads(lambda row: buffer.read("representation", 0, row), trajectory, reads)
    return Measured(sum(f.stat().st_size for f in folder.rglob("*.parquet")) / trajectory.nbytes, write_ms, times)


def table(trajectory: Trajectory, network: nn.Sequential, source: str, reads: int) -> str:
    """Measure everything; the result as Markdown."""
    columns = ["type", "compression", "encoding", "page checksums", "pages", "rows per group"]
    columns += ["size / raw", "write, ms", "read p50, ms", "read p99, ms"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    with tempfile.TemporaryDirectory() as folder:
        measure(Encoding(), trajectory, Path(folder) / "warm-up.parquet", reads)
        for candidate in candidates():
            cells = candidate.cells() + measure(candidate, trajectory, Path(folder) / "x.parquet", reads).cells()
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
        cells = measure_buffer(trajectory, network, Path(folder) / "buffer", reads).cells()
        lines.append(f"| **the buffer as built** | zstd 1 | split | yes | 1024 KiB, v1 | 1 | {' | '.join(cells)} |")
    checkpoints, length = trajectory.shape
    return "\n".join(
        [
            "# Encodings of the trajectory buffer",
            "",
            "Made by `python benchmarks/buffer_encoding.py --write`; the choice is `WRITER_OPTIONS` in "
            "`lad_dist/trajectories/schema.py`.",
            "",
            f"- {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"torch {torch.__version__}, pyarrow {pa.__version__}.",
            f"- {checkpoints} checkpoints (the initialisation and one after every epoch) of {length:,} float32 "
            f"weights, a ConvNet of width 128 and depth 3 trained on {source}.",
            f"- Reads: {reads} random rows, warm cache, footers parsed, one thread. The candidates keep one file open; "
            "the buffer as built opens the file for each read and returns a copy; its writes include two checksums, "
            "fsync and rename.",
            "- `split` is BYTE_STREAM_SPLIT; in a fixed binary it cannot see the floats and gains nothing. `fixed "
            "binary` is the only type that other readers do not show as floats.",
            "- Tried by hand on parts as built: DuckDB 2.0.0 and polars 2.1.0 show lists of floats; fastparquet "
            "2026.9.0 lacks BYTE_STREAM_SPLIT and refuses the column, but nothing below 0.9 of the raw size does "
            "without it.",
            "",
            *lines,
            "",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder with train.parquet; without it, scikit-learn's digits")
    parser.add_argument("--images", type=int, default=512, help="training images (default 512)")
    parser.add_argument("--epochs", type=int, default=11, help="epochs of training (default 11)")
    parser.add_argument("--reads", type=int, default=200, help="random reads for each encoding (default 200)")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.parent.name}/{RESULTS.name}")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    if chosen.cifar:
        images, labels = cifar_images(chosen.cifar, chosen.images)
        source = f"{len(images)} images of CIFAR-10 re-encoded as JPEG"
    else:
        print("no --cifar: training on scikit-learn's digits, enlarged to 3x32x32", file=sys.stderr)
        images, labels = digit_images(chosen.images)
        source = f"{len(images)} of scikit-learn's digits, enlarged to 3x32x32 (no CIFAR-10 folder was given)"
    trajectory, network = train(images, labels, chosen.epochs)
    text = table(trajectory, network, source, chosen.reads)
    print(text)
    if chosen.write:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
