"""Status of a run folder: stages done, running or stopped, and results so far.

    log.py     the events, reduced to the current state
    read.py    the files and the log combined: ``read_status`` once, ``Follower`` repeatedly
    show.py    as text and tables
    watch.py   redrawn until everything is done

Only reads files (``events.jsonl``, ``results.json``, the names of the buffer's parts), so it works from any terminal
during the run and after it was killed. Completion is determined from the files a stage leaves; the rest from events.
"""

from lad_dist.status.read import SILENT_SECONDS, Follower, RunStatus, StageStatus, read_status
from lad_dist.status.show import (
    compare_document,
    compare_notes,
    compare_table,
    print_results,
    print_status,
    results_notes,
    results_table,
    status_lines,
)
from lad_dist.status.watch import watch

__all__ = [
    "SILENT_SECONDS",
    "Follower",
    "RunStatus",
    "StageStatus",
    "compare_document",
    "compare_notes",
    "compare_table",
    "print_results",
    "print_status",
    "read_status",
    "results_notes",
    "results_table",
    "status_lines",
    "watch",
]
