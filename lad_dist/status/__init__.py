"""What a run folder says about itself: which stages are done, running or stopped, and what has come out so far.

    log.py     the events, folded into what is known now
    read.py    the files and the log together: ``read_status`` once, ``Follower`` again and again
    show.py    in words and tables
    watch.py   redrawn until everything is done

Reads files only (``events.jsonl``, ``results.json``, the names of the buffer's parts), so it works from any terminal
while the run goes on, and after it was killed. What is done is judged by the files that a stage leaves; events tell the
rest.
"""

from lad_dist.status.read import SILENT_SECONDS, Follower, RunStatus, StageStatus, read_status
from lad_dist.status.show import (
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
