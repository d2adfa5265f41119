"""The trajectory buffer: a folder of Parquet parts with one row per checkpoint of an expert.

``schema`` defines the on-disk format. The rest of the package uses ``writer`` and ``reader``, which build on ``part``
(one file) and ``files`` (the file system). ``verify`` checks a whole buffer, and ``claims`` records which process works
on which expert. No other subpackage imports pyarrow for the buffer.
"""

from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import STAGES, BufferMeta, Checkpoint, Stage
from lad_dist.trajectories.writer import PartWriter

__all__ = ["STAGES", "Buffer", "BufferMeta", "Checkpoint", "PartWriter", "Stage"]
