"""The trajectory buffer: a folder of Parquet parts with one row per checkpoint of an expert.

``schema`` says what is on disk, ``writer`` and ``reader`` are what the rest of the package uses; ``part`` (one file)
and ``files`` (the file system) are theirs, ``verify`` reads everything once, and ``claims`` says who is at work on which
expert. No other room imports pyarrow for the buffer.
"""

from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import STAGES, BufferMeta, Checkpoint, Stage
from lad_dist.trajectories.writer import PartWriter, clean_temporary

__all__ = ["STAGES", "Buffer", "BufferMeta", "Checkpoint", "PartWriter", "Stage", "clean_temporary"]
